package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/wire"
)

// DaemonProgram and AgentProgram are the names of banger's companions. They
// are found beside the program that runs.
const (
	DaemonProgram = "bangerd"
	AgentProgram  = "banger-vsock-agent"
)

// ErrGone is the cause of the error of a call whose server ended before it
// answered.
var ErrGone = errors.New("the other side is gone")

// Companion finds a program of the same release: beside the one that runs,
// after symlinks. Nothing is looked up in PATH.
func Companion(name string) (string, error) {
	self, err := os.Executable()
	if err == nil {
		self, err = filepath.EvalSymlinks(self)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	path := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(path); err != nil {
		return "", banger.Errorf(banger.CodeUnavailable, "%s: not found beside %s", name, self).
			WithHint("the three programs of banger belong in one folder; install them again together")
	}
	return path, nil
}

// A Client makes one call.
type Client struct {
	conn  *net.UnixConn
	out   *writer
	cmd   *exec.Cmd     // the daemon that was started for it and ends with the call; nil for none
	asked chan struct{} // closed once the request is written: no frame may come before it
}

// NewClient makes a client of a connection, which it closes after the call.
func NewClient(conn *net.UnixConn) *Client {
	return &Client{conn: conn, out: &writer{w: conn}, asked: make(chan struct{})}
}

// Pair makes a connection of which one end can be given away: whoever serves
// it then answers a client of the other.
func Pair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "daemon")
	theirs = os.NewFile(uintptr(fds[1]), "client")
	ours, err = ConnOf(f)
	f.Close() // ConnOf duplicates it
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// ConnOf makes a connection of a file, which stays the caller's to close.
func ConnOf(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("socket: %s is no unix socket", f.Name())
	}
	return conn, nil
}

// Start starts a daemon for one call, in a session of its own so that a
// terminal's Ctrl-C reaches the client only.
func Start() (*Client, error) {
	program, err := Companion(DaemonProgram)
	if err != nil {
		return nil, err
	}
	conn, theirs, err := Pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd := exec.Command(program, "call")
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3
	cmd.Stderr = os.Stderr              // a crash of the daemon must be seen
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	c := NewClient(conn)
	c.cmd = cmd
	return c, nil
}

// Cancel asks the daemon to end the call. The call then returns an error of
// CodeCanceled, once everything is cleaned up. It waits for the request to be
// sent, so it must not be called where Call never is.
func (c *Client) Cancel() error {
	<-c.asked
	return c.out.frame(frameCancel, nil)
}

// Send passes a frame of a session.
func (c *Client) Send(t wire.FrameType, payload []byte) error {
	<-c.asked
	return c.out.frame(t, payload)
}

// Call makes the call and returns when it is over, and with it a daemon that
// was started for it. Events and session
// frames are given to the handlers, which may be nil, one at a time; an
// error of onFrame ends the call.
func (c *Client) Call(ctx context.Context, method string, params any, files []*os.File, result any,
	onEvent func(Event), onFrame func(wire.Frame) error) (err error) {
	defer func() {
		c.conn.Close()
		if c.cmd == nil {
			return
		}
		if werr := c.cmd.Wait(); err == nil && werr != nil {
			err = fmt.Errorf("%s: %w", c.cmd.Path, werr)
		}
	}()
	raw, err := json.Marshal(params)
	if err == nil {
		err = writeRequest(c.conn, request{Method: method, Params: raw}, files)
	}
	close(c.asked)
	if err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) { // what it said before it went is worth reading
		return fmt.Errorf("daemon: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { c.Cancel() })
	defer stop()
	var body []byte
	buf := make([]byte, wire.MaxFrameBytes)
	for {
		f, err := wire.ReadFrame(c.conn, buf)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
				return &banger.Error{Code: banger.CodeInternal, Message: "daemon: it ended before it answered", Err: ErrGone,
					Hint: "running VMs go on; `banger ls` starts it again and shows them"}
			}
			return fmt.Errorf("daemon: %w (%w)", err, ErrGone)
		}
		switch f.Type {
		case frameEvent:
			var e Event
			if err := json.Unmarshal(f.Payload, &e); err != nil {
				return fmt.Errorf("daemon: event: %w", err)
			}
			if onEvent != nil {
				onEvent(e)
			}
		case frameResult:
			if len(body)+len(f.Payload) > maxResultBytes {
				return fmt.Errorf("daemon: a result of more than %d bytes", maxResultBytes)
			}
			body = append(body, f.Payload...)
		case frameError:
			var e banger.Error
			if err := json.Unmarshal(f.Payload, &e); err != nil {
				return fmt.Errorf("daemon: error: %w", err)
			}
			return &e
		case frameDone:
			if err := json.Unmarshal(body, result); err != nil {
				return fmt.Errorf("daemon: result: %w", err)
			}
			return nil
		default:
			if onFrame == nil {
				return fmt.Errorf("daemon: unexpected frame type %d", f.Type)
			}
			if err := onFrame(f); err != nil {
				return err
			}
		}
	}
}
