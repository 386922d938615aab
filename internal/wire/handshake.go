package wire

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// A virtio-serial port has no connections: bytes that an earlier listener
// left unread reach the next one. So the host opens with a magic word and a
// nonce, the guest answers with the same, and each side throws away whatever
// comes before what it waits for.
var (
	hostMagic  = []byte("banger-host/1\n")
	guestMagic = []byte("banger-guest/1\n")
)

// NonceBytes is the length of a handshake nonce.
const NonceBytes = 16

// maxHandshakeJunk bounds what is thrown away while looking for the peer.
const maxHandshakeJunk = 1 << 20

// errNoHandshake is what both sides report when the peer talks and never says
// the right thing.
var errNoHandshake = errors.New("handshake: the peer sent no answer within the byte limit")

// HandshakeHost sends the nonce and reads until the guest has answered it.
// The caller bounds it in time, by a deadline on or closing of rw.
func HandshakeHost(rw io.ReadWriter, nonce [NonceBytes]byte) error {
	if _, err := rw.Write(append(bytes.Clone(hostMagic), nonce[:]...)); err != nil {
		return err
	}
	return skipTo(rw, append(bytes.Clone(guestMagic), nonce[:]...))
}

// HandshakeGuest waits for a host and answers its nonce.
func HandshakeGuest(rw io.ReadWriter) error {
	if err := skipTo(rw, hostMagic); err != nil {
		return err
	}
	var nonce [NonceBytes]byte
	if _, err := io.ReadFull(rw, nonce[:]); err != nil {
		return noEOF(err)
	}
	_, err := rw.Write(append(bytes.Clone(guestMagic), nonce[:]...))
	return err
}

// skipTo reads byte by byte until the last bytes read are want, so that it
// never takes a byte that belongs to what follows.
func skipTo(r io.Reader, want []byte) error {
	window := make([]byte, 0, len(want))
	var b [1]byte
	for range maxHandshakeJunk {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return fmt.Errorf("handshake: %w", noEOF(err))
		}
		if len(window) == len(want) {
			window = append(window[:0], window[1:]...)
		}
		window = append(window, b[0])
		if bytes.Equal(window, want) {
			return nil
		}
	}
	return errNoHandshake
}
