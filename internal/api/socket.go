package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/store"
)

const (
	// maxSocketPath is sizeof(sun_path) of unix(7), less its NUL.
	maxSocketPath = 108 - 1
	// startLimit bounds the start of a daemon: it reads the records of every
	// VM, and may have to wait for the one before it to end.
	startLimit = 30 * time.Second
	// maxReadyBytes bounds what a daemon says when it cannot start.
	maxReadyBytes = 64 << 10
	// readyFD is where a daemon says that it takes calls, or why not.
	readyFD = 3
	// connectTries is how often a daemon that ends between two steps of
	// a client's is started anew.
	connectTries = 5
)

// helloLimit bounds the first answer of a daemon that is there.
var helloLimit = 10 * time.Second

// shortName calls f with a name for a file in dir that fits into a socket
// address, however long the path of dir is.
func shortName(dir, name string, f func(string) error) error {
	path := filepath.Join(dir, name)
	if len(path) <= maxSocketPath {
		return f(path)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	defer unix.Close(fd)
	return f("/proc/self/fd/" + strconv.Itoa(fd) + "/" + name)
}

// Listen makes a socket in a folder that is its owner's alone. A socket of
// that name that is there already is taken for one whose owner died: the
// caller has made sure of it by a lock.
func Listen(dir, name string) (*net.UnixListener, error) {
	path := filepath.Join(dir, name)
	st, err := os.Lstat(path)
	if err == nil && st.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("socket %s: something else has that name", path)
	}
	if err == nil {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	var l *net.UnixListener
	err = shortName(dir, name, func(short string) (err error) {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: short})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // by a name that may be another's by then
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Dial connects to a socket that Listen made, and refuses one that another
// user listens on.
func Dial(dir, name string) (*net.UnixConn, error) {
	var conn *net.UnixConn
	err := shortName(dir, name, func(short string) (err error) {
		conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: short})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", filepath.Join(dir, name), err)
	}
	if _, err := Peer(conn); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Peer returns the process id of the other end, as it was when it connected or
// listened (SO_PEERCRED, unix(7)). A process of another user is refused.
func Peer(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if sockErr != nil {
		return 0, fmt.Errorf("peer: %w", sockErr)
	}
	if int(cred.Uid) != os.Geteuid() {
		return 0, fmt.Errorf("peer: process %d is of uid %d, not of yours (%d)", cred.Pid, cred.Uid, os.Geteuid())
	}
	return int(cred.Pid), nil
}

// Gone says whether the other end of a connection is closed, whatever it has
// sent before.
func Gone(conn *net.UnixConn) (gone bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(poll, 0)
		gone = err == nil && poll[0].Revents&unix.POLLHUP != 0
	})
	return gone
}

// Address is where the resident daemon of this user listens: its state folder
// and its socket.
func Address() (root, socket string, err error) {
	if root, err = store.DefaultRoot(); err != nil {
		return "", "", err
	}
	return root, filepath.Join(store.Run(root), store.DaemonSocket), nil
}

// Connect makes a client of the resident daemon for one call. A daemon that is
// not there is started, one of another release or build makes way for ours;
// with version "" any that is there will do.
func Connect(version string) (*Client, error) {
	root, err := store.DefaultRoot()
	if err != nil {
		return nil, err
	}
	dir := store.Run(root)
	for range connectTries {
		conn, dialErr := Dial(dir, store.DaemonSocket)
		if dialErr == nil {
			if version == "" {
				return NewClient(conn), nil
			}
			stale, err := greet(conn, version)
			if err == nil && !stale {
				if conn, err = Dial(dir, store.DaemonSocket); err == nil {
					return NewClient(conn), nil
				}
			}
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
				return nil, banger.Errorf(banger.CodeUnavailable, "daemon: it does not answer").
					WithHint("end it with `kill $(pgrep -u %d -x bangerd)`; running VMs go on and are found again", os.Geteuid())
			}
			// It is ending: the next one is started below.
			time.Sleep(10 * time.Millisecond)
			if err == nil || stale {
				continue
			}
		} else if !errors.Is(dialErr, fs.ErrNotExist) && !errors.Is(dialErr, syscall.ECONNREFUSED) {
			return nil, banger.Errorf(banger.CodeUnavailable, "daemon: %w", dialErr).WithHint("`banger doctor` looks into it")
		}
		if err := startDaemon(dir); err != nil {
			return nil, err
		}
	}
	return nil, banger.Errorf(banger.CodeUnavailable, "daemon: it ends as soon as it is started").
		WithHint("its last words are in %s", filepath.Join(dir, store.DaemonLog))
}

// greet tells a daemon who we are. One of another release or build ends.
func greet(conn *net.UnixConn, version string) (stale bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), helloLimit)
	defer cancel()
	conn.SetReadDeadline(time.Now().Add(helloLimit))
	hello := Hello{Version: version}
	if hello.Program, err = Companion(DaemonProgram); err != nil {
		hello.Program = "" // then this daemon has to do
	}
	err = NewClient(conn).Call(ctx, MethodHello, hello, nil, &hello, nil, nil)
	return err == nil && hello.Stale, err
}

// startDaemon starts the resident daemon in a session of its own and waits
// until it, or another that was faster, takes calls.
func startDaemon(dir string) error {
	program, err := Companion(DaemonProgram)
	if err != nil {
		return err
	}
	// The daemon makes the folder too; its log needs it before.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return banger.Errorf(banger.CodeUnavailable, "state folder: %w", err).WithHint("BANGER_HOME names another state folder")
	}
	log, err := os.OpenFile(filepath.Join(dir, store.DaemonLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return banger.Errorf(banger.CodeUnavailable, "daemon: %w", err)
	}
	defer log.Close()
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(program, "serve")
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", program, err)
	}
	go cmd.Wait() // for as long as this process lives
	ready.SetReadDeadline(time.Now().Add(startLimit))
	text, err := io.ReadAll(io.LimitReader(ready, maxReadyBytes))
	switch {
	case err != nil:
		return banger.Errorf(banger.CodeTimeout, "daemon: it does not come up within %v", startLimit).
			WithHint("its log is %s", filepath.Join(dir, store.DaemonLog))
	case len(bytes.TrimSpace(text)) > 0:
		return parseReady(text)
	}
	return nil // it is ready, or another one is, or it died: the next try tells
}
