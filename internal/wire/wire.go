// Package wire is the protocol between host and guest agent: one truth for two
// binaries. docs/wire.md describes the bytes. It imports only the standard
// library, because it is part of the guest binary.
//
// A connection to the agent is a stream that a driver's DialGuest opened. On
// it the host sends one Request, the agent answers one Reply, and, where the
// request is of the streaming kind, typed frames follow in both directions
// until one side closes. All lengths are checked before anything is allocated.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Version is the protocol's. Host and agent of one release are always built
// together (the agent that boots a VM comes from the host's own release), so a
// difference is an error, not a negotiation.
const Version = 1

const (
	// PortName is the virtio-serial port that carries the channel.
	PortName = "banger.agent"
	// AgentPort is the service number of the agent for DialGuest, and its
	// vsock port.
	AgentPort uint32 = 1024

	// BootConfigPath is where the initramfs holds the BootConfig of this VM.
	BootConfigPath = "/banger/boot.json"

	// ReadyLine is written to the console once by the agent as the very first
	// thing it does: the host takes it as the mark of StageKernel.
	ReadyLine = "banger-vsock-agent: first process started"
)

const (
	// MaxMessageBytes bounds a Request, Reply, or event. An environment and an
	// argument list fit (the kernel's own limit on both is a few MiB; Docker's
	// users stay far below this).
	MaxMessageBytes = 1 << 20
	// MaxFrameBytes bounds the payload of one frame.
	MaxFrameBytes = 64 << 10
)

// WriteMessage writes v as JSON behind a 4-byte big-endian length.
func WriteMessage(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(data) > MaxMessageBytes {
		return fmt.Errorf("message: %d bytes, the limit is %d", len(data), MaxMessageBytes)
	}
	buf := make([]byte, 4+len(data))
	binary.BigEndian.PutUint32(buf, uint32(len(data)))
	copy(buf[4:], data)
	_, err = w.Write(buf)
	return err
}

// ReadMessage reads one message into v. io.EOF means that the peer closed
// between messages.
func ReadMessage(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxMessageBytes {
		return fmt.Errorf("message: %d bytes announced, the limit is %d", n, MaxMessageBytes)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(r, data); err != nil {
		return noEOF(err)
	}
	return json.Unmarshal(data, v)
}

// A FrameType says what a frame carries.
type FrameType byte

const (
	FrameStdin    FrameType = 1 // host to guest: bytes for standard input
	FrameStdout   FrameType = 2 // guest to host
	FrameStderr   FrameType = 3 // guest to host; never with a pty
	FrameStdinEOF FrameType = 4 // host to guest: half-close; empty
	FrameResize   FrameType = 5 // host to guest: Window as JSON
	FrameSignal   FrameType = 6 // host to guest: a name of Signals, as text
	FrameExit     FrameType = 7 // guest to host: Exit as JSON; the last frame
	FrameEvent    FrameType = 8 // guest to host: BootEvent as JSON
	FrameCredit   FrameType = 9 // guest to host: so many more bytes of FrameStdin may come, 4 bytes big-endian
)

// StdinWindowBytes is how much FrameStdin a host may send before the first
// FrameCredit. The agent holds that much and gives credit for what the
// command has taken, so a command that reads nothing never keeps a signal or
// a resize from being read.
const StdinWindowBytes = 256 << 10

// A Frame is one typed piece of a stream: 1 byte type, 4 bytes big-endian
// length, payload.
type Frame struct {
	Type    FrameType
	Payload []byte
}

// WriteFrame writes one frame with a single Write, so that frames written
// under one lock never interleave.
func WriteFrame(w io.Writer, t FrameType, payload []byte) error {
	if len(payload) > MaxFrameBytes {
		return fmt.Errorf("frame: %d bytes, the limit is %d", len(payload), MaxFrameBytes)
	}
	buf := make([]byte, 5+len(payload))
	buf[0] = byte(t)
	binary.BigEndian.PutUint32(buf[1:], uint32(len(payload)))
	copy(buf[5:], payload)
	_, err := w.Write(buf)
	return err
}

// ReadFrame reads one frame into buf, which should hold MaxFrameBytes (it is
// replaced when it is smaller); the payload is valid until buf is used again.
// io.EOF means that the peer closed between frames.
func ReadFrame(r io.Reader, buf []byte) (Frame, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Frame{}, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > MaxFrameBytes {
		return Frame{}, fmt.Errorf("frame: %d bytes announced, the limit is %d", n, MaxFrameBytes)
	}
	if int(n) > len(buf) {
		buf = make([]byte, n)
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return Frame{}, noEOF(err)
	}
	return Frame{FrameType(head[0]), buf[:n]}, nil
}

// noEOF turns an end inside a unit into an error that cannot be mistaken for
// an orderly close.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
