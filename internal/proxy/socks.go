package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"banger"
)

// SOCKS protocol version 5, RFC 1928: no authentication, CONNECT alone. All
// lengths are of one byte, so a request needs no other limit.
const (
	socksVersion = 5

	noAuthentication    = 0    // section 3
	noAcceptableMethods = 0xff // section 3

	commandConnect = 1 // section 4

	addressIPv4   = 1 // section 5
	addressDomain = 3
	addressIPv6   = 4
)

// Replies, section 6.
const (
	replySucceeded          = 0
	replyFailure            = 1
	replyNotAllowed         = 2
	replyHostUnreachable    = 4
	replyRefused            = 5
	replyTTLExpired         = 6 // what clients take for a time-out
	replyCommandUnsupported = 7
	replyAddressUnsupported = 8
)

// A socksError is a request that is answered with a reply.
type socksError struct {
	reply  byte
	reason string
}

func (e *socksError) Error() string { return "SOCKS request: " + e.reason }

var errNoMethod = errors.New("SOCKS greeting: the client offers authentication only, and there is none here")

// serveSOCKS answers a connection whose first byte has been read.
func (p *proxy) serveSOCKS(ctx context.Context, conn *net.TCPConn) {
	host, port, err := readSOCKS(conn, conn)
	if err != nil {
		var e *socksError
		if errors.As(err, &e) {
			writeReply(conn, e.reply)
			p.note(err)
		} else if errors.Is(err, errNoMethod) {
			p.note(err)
		}
		return
	}
	vm, err := p.dial(ctx, host, port)
	if err != nil {
		conn.SetDeadline(time.Now().Add(requestTimeout))
		writeReply(conn, replyOf(err))
		return
	}
	conn.SetDeadline(time.Now().Add(requestTimeout))
	if writeReply(conn, replySucceeded) != nil {
		abort(vm)
		return
	}
	conn.SetDeadline(time.Time{})
	join(conn, vm)
}

// readSOCKS reads a greeting, whose version has been read, answers it, and
// reads the request. It takes no byte of what follows. The host is an address
// as text, or a name as it came.
func readSOCKS(r io.Reader, w io.Writer) (host string, port uint16, err error) {
	var buf [256]byte
	read := func(n int) ([]byte, error) {
		_, err := io.ReadFull(r, buf[:n])
		return buf[:n], err
	}
	b, err := read(1)
	if err != nil {
		return "", 0, err
	}
	if b, err = read(int(b[0])); err != nil {
		return "", 0, err
	}
	if !slices.Contains(b, noAuthentication) {
		_, _ = w.Write([]byte{socksVersion, noAcceptableMethods})
		return "", 0, errNoMethod
	}
	if _, err := w.Write([]byte{socksVersion, noAuthentication}); err != nil {
		return "", 0, err
	}
	if b, err = read(4); err != nil {
		return "", 0, err
	}
	version, command, reserved, kind := b[0], b[1], b[2], b[3]
	switch {
	case version != socksVersion:
		return "", 0, &socksError{replyFailure, fmt.Sprintf("version %d after a greeting of version 5", version)}
	case reserved != 0:
		return "", 0, &socksError{replyFailure, "its reserved byte is not 0"}
	case command != commandConnect:
		return "", 0, &socksError{replyCommandUnsupported, fmt.Sprintf("command %d, CONNECT alone is served", command)}
	}
	switch kind {
	case addressIPv4, addressIPv6:
		size := 4
		if kind == addressIPv6 {
			size = 16
		}
		if b, err = read(size); err != nil {
			return "", 0, err
		}
		a, _ := netip.AddrFromSlice(b)
		host = a.String()
	case addressDomain:
		if b, err = read(1); err != nil {
			return "", 0, err
		}
		if b, err = read(int(b[0])); err != nil {
			return "", 0, err
		}
		host = string(b)
	default:
		return "", 0, &socksError{replyAddressUnsupported, fmt.Sprintf("address type %d", kind)}
	}
	if b, err = read(2); err != nil {
		return "", 0, err
	}
	return host, binary.BigEndian.Uint16(b), nil
}

// writeReply answers a request. What the connection is bound to is the VM's
// affair and not told.
func writeReply(w io.Writer, reply byte) error {
	_, err := w.Write([]byte{socksVersion, reply, 0, addressIPv4, 0, 0, 0, 0, 0, 0})
	return err
}

// replyOf is the reply that comes closest to an error of Dial.
func replyOf(err error) byte {
	switch banger.CodeOf(err) {
	case banger.CodeUsage:
		return replyNotAllowed
	case banger.CodeNotFound, banger.CodeConflict:
		return replyHostUnreachable
	case banger.CodeUnavailable:
		return replyRefused
	case banger.CodeTimeout:
		return replyTTLExpired
	}
	return replyFailure
}
