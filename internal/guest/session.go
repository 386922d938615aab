package guest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// drainSilence and drainLimit bound how long a session outlives its
	// command while something else holds its output open.
	drainSilence = 250 * time.Millisecond
	drainLimit   = 2 * time.Second
	// hangupGrace is from SIGHUP to SIGKILL when the host's stream broke.
	hangupGrace = 5 * time.Second

	outputChunkBytes = 32 << 10
	// creditStepBytes is when the host is told that stdin was taken. A host
	// without credit has the whole window outstanding, so a step below the
	// window never leaves it waiting.
	creditStepBytes = wire.StdinWindowBytes / 4
)

// A session is one running command and the stream it belongs to.
type session struct {
	conn  stream
	proc  *os.Process
	pty   *os.File   // the master, nil without a pty
	outs  []*os.File // standard output and error, or the pty alone; closed by their pumps
	stdin *os.File   // nil when the host sends none; the pty's master, or a pipe

	writing sync.Mutex // frames

	mu     sync.Mutex
	reaped bool // the process group may be someone else's

	exited   chan struct{} // closed when the command ended
	exitTime time.Time     // valid after exited

	in stdinQueue
}

// startSession starts the command; the caller runs the session (run). Errors
// are *wire.Error.
func (s *server) startSession(conn stream, e *wire.Exec) (*session, error) {
	c, err := prepare(e)
	if err != nil {
		return nil, err
	}
	x := &session{conn: conn, exited: make(chan struct{})}
	x.in.init()
	attr := &os.ProcAttr{Dir: c.dir, Env: c.env, Sys: &syscall.SysProcAttr{Setsid: true}}
	if os.Geteuid() == 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: c.who.UID, Gid: c.who.GID, Groups: c.who.processGroups()}
	} else if int(c.who.UID) != os.Geteuid() {
		return nil, refuse(wire.ErrInternal, "exec: the agent is not root")
	}

	var theirs, ours []*os.File
	fail := func(err error) (*session, error) {
		for _, f := range slices.Concat(theirs, ours) {
			f.Close()
		}
		return nil, err
	}
	if e.TTY != nil {
		master, slave, err := openPTY(*e.TTY, c.who)
		if err != nil {
			return nil, refuse(wire.ErrInternal, "pty: %v", err)
		}
		ours, theirs = append(ours, master), append(theirs, slave)
		attr.Files = []*os.File{slave, slave, slave}
		attr.Sys.Setctty = true
		x.pty, x.outs = master, []*os.File{master}
		if e.Stdin {
			x.stdin = master
		}
	} else {
		pipe := func() (r, w *os.File, err error) {
			if r, w, err = os.Pipe(); err != nil {
				err = refuse(wire.ErrInternal, "pipe: %v", err)
			}
			return
		}
		var stdin *os.File
		if e.Stdin {
			r, w, err := pipe()
			if err != nil {
				return fail(err)
			}
			stdin, x.stdin = r, w
			ours = append(ours, w)
		} else if stdin, err = os.Open(os.DevNull); err != nil {
			return fail(refuse(wire.ErrInternal, "%v", bare(os.DevNull, err)))
		}
		theirs = append(theirs, stdin)
		for range 2 {
			r, w, err := pipe()
			if err != nil {
				return fail(err)
			}
			ours, theirs, x.outs = append(ours, r), append(theirs, w), append(x.outs, r)
		}
		attr.Files = theirs
		// The agent is root; a command must be able to open /dev/stdout again.
		if c.who.UID != 0 {
			for _, f := range theirs {
				if fi, err := f.Stat(); err == nil && fi.Mode()&fs.ModeNamedPipe != 0 {
					f.Chown(int(c.who.UID), int(c.who.GID))
				}
			}
		}
	}
	x.proc, err = s.spawn(c, attr)
	if err != nil {
		return fail(err)
	}
	for _, f := range theirs {
		f.Close()
	}
	return x, nil
}

// spawn starts the process. While it forks, the agent gives up its protection
// from the kernel's memory killer, so that no session ever inherits it.
func (s *server) spawn(c *command, attr *os.ProcAttr) (*os.Process, error) {
	s.forking.Lock()
	defer s.forking.Unlock()
	if s.protected {
		setOOMScore(0)
		defer setOOMScore(oomProtected)
	}
	p, err := os.StartProcess(c.path, c.args, attr)
	switch {
	case err == nil:
		return p, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, refuse(wire.ErrNotFound, "exec %q: the program or its interpreter is missing", c.path)
	case errors.Is(err, unix.E2BIG):
		return nil, refuse(wire.ErrInvalid, "exec %v", bare(c.path, err))
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return nil, refuse(wire.ErrInternal, "exec %v", bare(c.path, err))
	}
	return nil, refuse(wire.ErrNotExecutable, "exec %v", bare(c.path, err))
}

// run carries the session until its exit frame is written or the host's stream
// broke and nothing of the session's process group is left.
func (x *session) run() {
	var pumps sync.WaitGroup
	types := []wire.FrameType{wire.FrameStdout, wire.FrameStderr}
	for i, f := range x.outs {
		pumps.Go(func() { x.pump(f, types[i]) })
	}
	if x.stdin != nil {
		go x.feed(x.stdin)
	}
	broken := make(chan struct{})
	go func() {
		x.control(x.stdin != nil)
		close(broken)
	}()
	ended := make(chan wire.Exit, 1)
	go func() { ended <- x.wait() }()

	var exit wire.Exit
	select {
	case exit = <-ended:
	case <-broken:
		x.conn.Close()
		x.in.close()
		x.hangUp(ended)
	}
	drained := make(chan struct{})
	go func() { pumps.Wait(); close(drained) }()
	select {
	case <-drained:
		if data, err := json.Marshal(exit); err == nil {
			x.send(wire.FrameExit, data)
		}
	case <-broken:
	}
	x.conn.Close()
	x.in.close()
	<-drained
	if x.stdin != nil {
		x.stdin.Close() // a feeder may wait for whoever inherited the other side
	}
}

// send writes one frame; an error means that the stream is broken.
func (x *session) send(t wire.FrameType, payload []byte) error {
	x.writing.Lock()
	defer x.writing.Unlock()
	return wire.WriteFrame(x.conn, t, payload)
}

// pump passes output on until its end. After the command's own end it passes
// on what the command had written (all of that is in the pipe then), and
// leaves whoever else holds the other side after drainSilence of silence, or
// drainLimit in all.
func (x *session) pump(f *os.File, t wire.FrameType) {
	defer f.Close()
	buf := make([]byte, outputChunkBytes)
	owed := -1 // bytes of the command's own not yet passed on; -1: it runs
	for {
		if owed < 0 && isClosed(x.exited) {
			owed = buffered(f)
		}
		if owed >= 0 {
			if owed == 0 && time.Since(x.exitTime) > drainLimit {
				return
			}
			f.SetReadDeadline(time.Now().Add(drainSilence))
		}
		n, err := f.Read(buf)
		if n > 0 {
			if owed > 0 {
				owed = max(0, owed-n)
			}
			if x.send(t, buf[:n]) != nil {
				return // closing f tells the command: SIGPIPE, or SIGHUP from a pty
			}
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if owed < 0 {
				continue // the command ended just now: look once more
			}
			// A deadline that passed hides what is there to read.
			if owed = buffered(f); owed > 0 && time.Since(x.exitTime) < drainLimit {
				continue
			}
			return
		}
		if err != nil {
			return // io.EOF, or EIO: nobody holds the pty's other side
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// buffered is the number of bytes that can be read from f at once.
func buffered(f *os.File) (n int) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	rc.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return n
}

// wait waits for the command, tells the pumps, and reaps it. The process group
// is not signalled any more from the moment its leader can be reaped.
func (x *session) wait() wire.Exit {
	for {
		// WNOWAIT leaves the zombie: its number stays ours until reaped is set.
		err := unix.Waitid(unix.P_PID, x.proc.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			break
		}
	}
	x.mu.Lock()
	x.reaped = true
	state, err := x.proc.Wait()
	x.mu.Unlock()
	x.exitTime = time.Now()
	close(x.exited)
	for _, f := range x.outs {
		f.SetReadDeadline(x.exitTime.Add(drainSilence))
	}
	if err != nil {
		return wire.Exit{Code: 255}
	}
	return exitOf(state.Sys().(syscall.WaitStatus))
}

// exitOf is a wait status as the wire says it.
func exitOf(ws syscall.WaitStatus) wire.Exit {
	if ws.Signaled() {
		return wire.Exit{
			Code:   128 + int(ws.Signal()),
			Signal: strings.TrimPrefix(unix.SignalName(ws.Signal()), "SIG"),
		}
	}
	return wire.Exit{Code: ws.ExitStatus()}
}

// signal reaches the foreground process group of the pty, as its own keys
// would, or the command's process group.
func (x *session) signal(sig syscall.Signal) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.reaped {
		return
	}
	group := x.proc.Pid
	if x.pty != nil {
		if rc, err := x.pty.SyscallConn(); err == nil {
			rc.Control(func(fd uintptr) {
				if fg, err := unix.IoctlGetInt(int(fd), unix.TIOCGPGRP); err == nil && fg > 1 {
					group = fg
				}
			})
		}
	}
	unix.Kill(-group, sig)
}

// hangUp ends a session whose host went away.
func (x *session) hangUp(ended <-chan wire.Exit) {
	x.signal(unix.SIGHUP)
	x.signalGroup(unix.SIGHUP)
	select {
	case <-ended:
	case <-time.After(hangupGrace):
		x.signal(unix.SIGKILL)
		x.signalGroup(unix.SIGKILL)
		<-ended
	}
}

func (x *session) signalGroup(sig syscall.Signal) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.reaped {
		unix.Kill(-x.proc.Pid, sig)
	}
}

// control reads the host's frames until the stream ends or breaks the
// protocol. It never waits for the command: stdin goes to a queue that holds
// the whole window.
func (x *session) control(stdin bool) {
	buf := make([]byte, wire.MaxFrameBytes)
	for {
		f, err := wire.ReadFrame(x.conn, buf)
		if err != nil {
			return
		}
		switch {
		case f.Type == wire.FrameStdin && stdin:
			if !x.in.put(f.Payload) {
				return // more than its credit, or after the end
			}
		case f.Type == wire.FrameStdinEOF && stdin && len(f.Payload) == 0:
			x.in.end()
		case f.Type == wire.FrameResize:
			var w wire.Window
			if json.Unmarshal(f.Payload, &w) != nil {
				return
			}
			if x.pty != nil {
				setWindow(x.pty, w)
			}
		case f.Type == wire.FrameSignal:
			name := string(f.Payload)
			if !slices.Contains(wire.Signals, name) {
				return
			}
			x.signal(unix.SignalNum("SIG" + name))
		default:
			return
		}
	}
}

// feed passes the queue to the command and gives the host credit for it. What
// the command will not take any more is thrown away, with credit, so that the
// host can finish.
func (x *session) feed(w *os.File) {
	if w != x.pty {
		defer w.Close()
	}
	buf := make([]byte, outputChunkBytes)
	taken, gone := 0, false
	last := byte('\n')
	for {
		n, ok := x.in.take(buf)
		if !ok {
			break
		}
		if !gone {
			_, err := w.Write(buf[:n])
			gone = err != nil
			last = buf[n-1]
		}
		if taken += n; taken >= creditStepBytes {
			var credit [4]byte
			binary.BigEndian.PutUint32(credit[:], uint32(taken))
			if x.send(wire.FrameCredit, credit[:]) != nil {
				return
			}
			taken = 0
		}
	}
	if w == x.pty && !gone {
		x.typeEOF(last)
	}
}

// typeEOF is the end of input on a pty, which cannot be half-closed: the end
// character is typed, as a user at that terminal would; twice after an
// unfinished line, whose end the first one only flushes. A program that has
// put its terminal in raw mode would read the character as data and gets none.
func (x *session) typeEOF(last byte) {
	rc, err := x.pty.SyscallConn()
	if err != nil {
		return
	}
	var key []byte
	rc.Control(func(fd uintptr) {
		t, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
		if err == nil && t.Lflag&unix.ICANON != 0 {
			key = []byte{t.Cc[unix.VEOF]}
		}
	})
	if last != '\n' && last != '\r' {
		key = append(key, key...)
	}
	x.pty.Write(key)
}

// A stdinQueue holds what the host sent and the command has not taken, at most
// wire.StdinWindowBytes.
type stdinQueue struct {
	mu            sync.Mutex
	more          *sync.Cond
	buf           bytes.Buffer
	ended, closed bool
}

func (q *stdinQueue) init() { q.more = sync.NewCond(&q.mu) }

// put appends; false means that the host broke the rules.
func (q *stdinQueue) put(p []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ended || q.buf.Len()+len(p) > wire.StdinWindowBytes {
		return false
	}
	q.buf.Write(p)
	q.more.Signal()
	return true
}

// end marks the end of input; close also drops what is left.
func (q *stdinQueue) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.more.Broadcast()
}

func (q *stdinQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.more.Broadcast()
}

// take waits for bytes; false means that no more will come.
func (q *stdinQueue) take(p []byte) (int, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.buf.Len() == 0 && !q.ended && !q.closed {
		q.more.Wait()
	}
	if q.closed || q.buf.Len() == 0 {
		return 0, false
	}
	n, _ := q.buf.Read(p)
	return n, true
}

// openPTY opens a pty of that size, whose terminal belongs to the account. The
// master does not block, so that reads and writes on it can be ended.
func openPTY(size wire.Window, who account) (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, bare("/dev/ptmx", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		master.Close()
		return nil, nil, bare("/dev/ptmx", err)
	}
	setWindow(master, size)
	// TIOCGPTPEER needs no path, so a hostile /dev/pts cannot lead elsewhere.
	sfd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		master.Close()
		return nil, nil, bare("/dev/ptmx", errno)
	}
	slave = os.NewFile(sfd, "pty")
	if os.Geteuid() == 0 {
		unix.Fchown(int(sfd), int(who.UID), -1)
		unix.Fchmod(int(sfd), 0o620)
	}
	return master, slave, nil
}

func setWindow(pty *os.File, w wire.Window) {
	rc, err := pty.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) {
		unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: w.Rows, Col: w.Cols})
	})
}
