package guest

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// portsDir lists the virtio-serial ports, by the kernel's
	// drivers/char/virtio_console.c.
	portsDir = "/sys/class/virtio-ports"
	// maxPortNameBytes bounds a port's name, which the VMM chose.
	maxPortNameBytes = 256
	// serviceTimeout bounds the service number at the head of a stream.
	serviceTimeout = 10 * time.Second
	// windowBytes is the yamux window of one stream; four times the default
	// makes bulk output a quarter faster.
	windowBytes = 1 << 20
	// tailBytes is how much of what a broken session read is looked through
	// for the handshake of the next host.
	tailBytes = 8 << 10
	// rejoinPause keeps a host that connects and breaks at once from
	// making the agent spin.
	rejoinPause = 20 * time.Millisecond
	// seekPause and seekPauseMax are between two looks for a transport.
	seekPause    = 10 * time.Millisecond
	seekPauseMax = time.Second
)

// serveChannel serves the host for ever, on the virtio-serial port where the
// VMM gives one and else on vsock. ready is called once, when the host can
// reach the agent.
func (s *server) serveChannel(ready func()) {
	for pause := seekPause; ; pause = min(2*pause, seekPauseMax) {
		if p, err := openPort(); err == nil {
			ready()
			s.servePort(p)
		} else if l, err := listenVsock(wire.AgentPort); err == nil {
			ready()
			l.serve(s.serve)
		}
		time.Sleep(pause)
	}
}

// A port is the virtio-serial port of the channel. It is one descriptor for
// the life of the agent: closing it would throw away what the next host has
// already sent. To its user it is a connection that ends when the host leaves
// and begins when one is there.
type port struct {
	f   *os.File
	raw interface {
		Read(func(uintptr) bool) error
	}
	tail []byte // the last bytes read in this session
	head []byte // to be read again before anything else
	left bool   // the host was seen to leave
}

// openPort finds the port by its name. The device node is devtmpfs's, named as
// in sysfs.
func openPort() (*port, error) {
	ports, err := os.ReadDir(portsDir)
	if err != nil {
		return nil, err
	}
	for _, e := range ports {
		name, err := readBounded(filepath.Join(portsDir, e.Name(), "name"), maxPortNameBytes)
		if err != nil || strings.TrimSpace(string(name)) != wire.PortName {
			continue
		}
		fd, err := unix.Open("/dev/"+e.Name(), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err != nil {
			return nil, err
		}
		return newPort(os.NewFile(uintptr(fd), wire.PortName))
	}
	return nil, unix.ENODEV
}

func newPort(f *os.File) (*port, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &port{f: f, raw: raw}, nil
}

func (p *port) Read(b []byte) (int, error) {
	n := copy(b, p.head)
	p.head = p.head[n:]
	if n == 0 {
		var err error
		if n, err = p.f.Read(b); err != nil {
			p.left = p.left || errors.Is(err, io.EOF)
			return n, err
		}
	}
	p.tail = append(p.tail, b[max(0, n-tailBytes):n]...)
	if over := len(p.tail) - tailBytes; over > 0 {
		p.tail = append(p.tail[:0], p.tail[over:]...)
	}
	return n, nil
}

func (p *port) Write(b []byte) (int, error) { return p.f.Write(b) }

// Close ends a session on the port, not the port.
func (p *port) Close() error { return p.f.SetDeadline(time.Unix(1, 0)) }

// await waits until a host is connected. Without one a read returns 0 and the
// port is always "ready" (EPOLLHUP); the runtime's edge-triggered poller wakes
// only when that changes.
func (p *port) await() error {
	p.f.SetDeadline(time.Time{})
	if len(p.head) > 0 {
		return nil
	}
	var got []byte
	var rerr error
	err := p.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		n, err := unix.Read(int(fd), b[:])
		switch {
		case n > 0:
			got = append(got, b[0])
			return true
		case n == 0 || err == unix.EAGAIN || err == unix.EINTR:
			return false
		}
		rerr = err
		return true
	})
	p.head = got
	return errors.Join(err, rerr)
}

// servePort serves one host after another; it returns when the port is gone.
func (s *server) servePort(p *port) {
	defer p.f.Close()
	for {
		if p.await() != nil {
			return
		}
		p.left, p.tail = false, nil
		if wire.HandshakeGuest(p) == nil {
			// From here on the tail holds the nonce and what follows: where a
			// host died inside its handshake, the next one's begins in there.
			p.tail = append([]byte{}, p.tail[max(0, len(p.tail)-wire.NonceBytes):]...)
			s.serveMux(p)
		}
		// A host that left without being noticed, because the next one came
		// at once, leaves that one's handshake among the bytes already read.
		if !p.left {
			p.head = append(p.tail, p.head...)
		}
		time.Sleep(rejoinPause)
	}
}

// serveMux serves one host's session. Keepalive and the open timeout are off:
// a paused guest must find its session again.
func (s *server) serveMux(p *port) {
	mux, err := yamux.Server(p, muxConfig())
	if err != nil {
		return
	}
	defer mux.Close()
	for {
		st, err := mux.AcceptStream()
		if err != nil {
			return
		}
		go func() {
			// The host says which service it wants, as a vsock port would.
			var number [4]byte
			st.SetReadDeadline(time.Now().Add(serviceTimeout))
			_, err := io.ReadFull(st, number[:])
			if err != nil || binary.BigEndian.Uint32(number[:]) != wire.AgentPort {
				st.Close()
				return
			}
			s.serve(st)
		}()
	}
}

func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = time.Minute
	// A paused VMM stops reading for as long as it likes.
	c.ConnectionWriteTimeout = 24 * time.Hour
	c.MaxStreamWindowSize = windowBytes
	c.LogOutput = io.Discard
	return c
}

// A vsockListener accepts connections from the host, and from nobody else: a
// process in the guest that dials the agent has another CID.
type vsockListener struct{ f *os.File }

// listenVsock listens on a vsock port (vsock(7)), where the guest has one.
func listenVsock(number uint32) (*vsockListener, error) {
	if _, err := os.Stat("/dev/vsock"); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: number})
	if err == nil {
		err = unix.Listen(fd, maxStreams)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &vsockListener{os.NewFile(uintptr(fd), "vsock")}, nil
}

// serve hands every connection of the host to f until the socket breaks.
func (l *vsockListener) serve(f func(stream)) {
	defer l.f.Close()
	raw, err := l.f.SyscallConn()
	if err != nil {
		return
	}
	for {
		nfd := -1
		var from unix.Sockaddr
		var aerr error
		err := raw.Read(func(fd uintptr) bool {
			nfd, from, aerr = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return aerr != unix.EAGAIN
		})
		switch {
		case err != nil:
			return
		case aerr == unix.ECONNABORTED, aerr == unix.EINTR:
			continue
		case aerr == unix.EMFILE, aerr == unix.ENFILE, aerr == unix.ENOMEM, aerr == unix.ENOBUFS:
			time.Sleep(rejoinPause)
			continue
		case aerr != nil:
			return
		}
		if vm, ok := from.(*unix.SockaddrVM); !ok || vm.CID != unix.VMADDR_CID_HOST {
			unix.Close(nfd)
			continue
		}
		go f(os.NewFile(uintptr(nfd), "vsock"))
	}
}
