package guest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

// A client is the host's side of one session.
type client struct {
	t    *testing.T
	conn net.Conn
	wmu  sync.Mutex

	credit chan int // what the guest said it can take
	mu     sync.Mutex
	out    bytes.Buffer
	errs   bytes.Buffer
	ended  chan struct{} // the stream is at its end
	exit   *wire.Exit
	err    error
}

const sessionToken = "token"

func dial(t *testing.T, s *server, req wire.Request) (net.Conn, wire.Reply) {
	t.Helper()
	host, guest := net.Pipe()
	go s.serve(guest)
	t.Cleanup(func() { host.Close() })
	host.SetDeadline(time.Now().Add(30 * time.Second))
	if req.Version == 0 {
		req.Version = wire.Version
	}
	if err := wire.WriteMessage(host, req); err != nil {
		t.Fatal(err)
	}
	var r wire.Reply
	if err := wire.ReadMessage(host, &r); err != nil {
		t.Fatal(err)
	}
	return host, r
}

// begin starts a session; nothing of its output is read before listen.
func begin(t *testing.T, e wire.Exec) *client {
	t.Helper()
	if e.User == "" && os.Geteuid() != 0 {
		missing(t, "sessions as root need root")
	}
	conn, r := dial(t, newServer(sessionToken, newJournal(nil)), wire.Request{Token: sessionToken, Op: wire.OpExec, Exec: &e})
	if r.Error != nil {
		t.Fatalf("exec %q: %v", e.Args, r.Error)
	}
	return &client{t: t, conn: conn, credit: make(chan int, 1000), ended: make(chan struct{})}
}

func (c *client) listen() *client {
	go func() {
		defer close(c.ended)
		defer close(c.credit)
		buf := make([]byte, wire.MaxFrameBytes)
		for {
			f, err := wire.ReadFrame(c.conn, buf)
			if err != nil {
				c.err = err
				return
			}
			c.mu.Lock()
			switch {
			case c.exit != nil:
				c.t.Errorf("frame %d after the exit", f.Type)
			case f.Type == wire.FrameStdout:
				c.out.Write(f.Payload)
			case f.Type == wire.FrameStderr:
				c.errs.Write(f.Payload)
			case f.Type == wire.FrameCredit:
				c.credit <- int(binary.BigEndian.Uint32(f.Payload))
			case f.Type == wire.FrameExit:
				c.exit = new(wire.Exit)
				json.Unmarshal(f.Payload, c.exit)
			default:
				c.t.Errorf("frame %d", f.Type)
			}
			c.mu.Unlock()
		}
	}()
	return c
}

func (c *client) send(t wire.FrameType, payload []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return wire.WriteFrame(c.conn, t, payload)
}

// stdin sends all of data, within its credit, and the end.
func (c *client) stdin(data []byte) {
	room := wire.StdinWindowBytes
	for len(data) > 0 {
		n := min(len(data), room, wire.MaxFrameBytes)
		if n == 0 {
			more, ok := <-c.credit
			if !ok {
				return
			}
			room += more
			continue
		}
		if c.send(wire.FrameStdin, data[:n]) != nil {
			return
		}
		data, room = data[n:], room-n
	}
	c.send(wire.FrameStdinEOF, nil)
}

func (c *client) output() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.String()
}

// until waits for text in the output.
func (c *client) until(text string) {
	c.t.Helper()
	for end := time.Now().Add(10 * time.Second); !strings.Contains(c.output(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("no %q in %q", text, c.output())
		}
	}
}

func (c *client) wait() wire.Exit {
	c.t.Helper()
	select {
	case <-c.ended:
	case <-time.After(20 * time.Second):
		c.t.Fatalf("the session does not end; output %q", c.output())
	}
	if c.exit == nil {
		c.t.Fatalf("no exit: %v", c.err)
	}
	return *c.exit
}

func sh(script string) wire.Exec { return wire.Exec{Args: []string{"/bin/sh", "-c", script}} }

func TestExit(t *testing.T) {
	for _, c := range []struct {
		script string
		want   wire.Exit
		out    string
		errs   string
	}{
		{"true", wire.Exit{}, "", ""},
		{"echo out; echo err >&2; exit 3", wire.Exit{Code: 3}, "out\n", "err\n"},
		{"exit 255", wire.Exit{Code: 255}, "", ""},
		{"kill -KILL $$", wire.Exit{Code: 137, Signal: "KILL"}, "", ""},
		{"kill -TERM $$", wire.Exit{Code: 143, Signal: "TERM"}, "", ""},
		{"cat; tty", wire.Exit{Code: 1}, "not a tty\n", ""},
		{"echo a >/dev/stdout; echo b >/dev/stderr", wire.Exit{}, "a\n", "b\n"},
	} {
		x := begin(t, sh(c.script)).listen()
		if got := x.wait(); got != c.want || x.output() != c.out || x.errs.String() != c.errs {
			t.Errorf("%s: %+v %q %q", c.script, got, x.output(), x.errs.String())
		}
	}
}

func TestExecRefused(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, mode os.FileMode, text string) string {
		p := filepath.Join(dir, name)
		os.WriteFile(p, []byte(text), mode)
		return p
	}
	for _, c := range []struct {
		name string
		exec *wire.Exec
		code wire.ErrorCode
	}{
		{"nothing", nil, wire.ErrInvalid},
		{"no such program", &wire.Exec{Args: []string{"no-such-program"}}, wire.ErrNotFound},
		{"no such path", &wire.Exec{Args: []string{"/no/such"}}, wire.ErrNotFound},
		{"below a file", &wire.Exec{Args: []string{"/bin/sh/x"}}, wire.ErrNotFound},
		{"empty name", &wire.Exec{Args: []string{""}}, wire.ErrNotFound},
		{"no interpreter", &wire.Exec{Args: []string{file("interp", 0o755, "#!/no/such\n")}}, wire.ErrNotFound},
		{"no x bit", &wire.Exec{Args: []string{file("plain", 0o644, "#!/bin/sh\n")}}, wire.ErrNotExecutable},
		{"no program format", &wire.Exec{Args: []string{file("noise", 0o755, "\x00\x01")}}, wire.ErrNotExecutable},
		{"a directory", &wire.Exec{Args: []string{dir}}, wire.ErrNotExecutable},
		{"no such user", &wire.Exec{Args: []string{"true"}, User: "no-such-user"}, wire.ErrNoUser},
		{"no such group", &wire.Exec{Args: []string{"true"}, User: "root:no-such-group"}, wire.ErrNoUser},
		{"zero byte", &wire.Exec{Args: []string{"a\x00b"}}, wire.ErrInvalid},
		{"bad variable", &wire.Exec{Args: []string{"true"}, Env: []string{"=x"}}, wire.ErrInvalid},
		{"relative folder", &wire.Exec{Args: []string{"true"}, Dir: "x"}, wire.ErrInvalid},
		{"folder is a file", &wire.Exec{Args: []string{"true"}, Dir: "/bin/sh"}, wire.ErrInvalid},
		{"folder closed to the user", &wire.Exec{Args: []string{"true"}, User: "65534", Dir: "/root"}, wire.ErrInvalid},
		{"program closed to the user", &wire.Exec{Args: []string{file("secret", 0o700, "#!/bin/sh\n")}, User: "65534", Dir: "/"}, wire.ErrNotExecutable},
	} {
		if os.Geteuid() != 0 && c.exec != nil {
			missing(t, "sessions as root need root")
		}
		if fi, err := os.Stat("/root"); c.name == "folder closed to the user" && (err != nil || fi.Mode()&1 != 0) {
			continue
		}
		_, r := dial(t, newServer(sessionToken, newJournal(nil)), wire.Request{Token: sessionToken, Op: wire.OpExec, Exec: c.exec})
		if r.Error == nil || r.Error.Code != c.code {
			t.Errorf("%s: %+v, want %s", c.name, r.Error, c.code)
		}
	}
}

func TestRequestRefused(t *testing.T) {
	j := newJournal(nil)
	s := newServer(sessionToken, j)
	for _, c := range []struct {
		name string
		s    *server
		req  wire.Request
		code wire.ErrorCode
	}{
		{"no token", s, wire.Request{Op: wire.OpExec}, wire.ErrDenied},
		{"wrong token", s, wire.Request{Op: wire.OpBoot, Token: sessionToken + "x"}, wire.ErrDenied},
		{"no token, unknown request", s, wire.Request{Op: "x"}, wire.ErrDenied},
		{"unknown request", s, wire.Request{Op: "x", Token: sessionToken}, wire.ErrInvalid},
		{"next version", s, wire.Request{Version: wire.Version + 1, Op: wire.OpHello}, wire.ErrVersion},
		{"foreign boot, empty token", newServer("", j), wire.Request{Op: wire.OpExec}, wire.ErrDenied},
		{"shutdown of a foreign boot", s, wire.Request{Op: wire.OpShutdown, Token: sessionToken}, wire.ErrInvalid},
	} {
		if _, r := dial(t, c.s, c.req); r.Error == nil || r.Error.Code != c.code {
			t.Errorf("%s: %+v, want %s", c.name, r.Error, c.code)
		}
	}
	_, r := dial(t, s, wire.Request{Op: wire.OpHello})
	if r.Error != nil || r.Hello == nil || r.Hello.KernelRelease == "" || r.Hello.Booted {
		t.Errorf("hello: %+v", r)
	}
}

func TestSessionLimit(t *testing.T) {
	s := newServer(sessionToken, newJournal(nil))
	for range maxSessions {
		s.sessions.take()
	}
	e := sh("true")
	if _, r := dial(t, s, wire.Request{Token: sessionToken, Op: wire.OpExec, Exec: &e}); r.Error == nil || r.Error.Code != wire.ErrInternal {
		t.Errorf("session %d: %+v", maxSessions+1, r.Error)
	}
	if _, r := dial(t, s, wire.Request{Op: wire.OpHello}); r.Error != nil {
		t.Errorf("hello with all sessions open: %v", r.Error)
	}
}

// TestBytes sends random bytes both ways through cat, more than every buffer
// between holds.
func TestBytes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	data := make([]byte, 16<<20+r.IntN(1000))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	x := begin(t, wire.Exec{Args: []string{"cat"}, Stdin: true}).listen()
	x.stdin(data)
	if got := x.wait(); got.Code != 0 || sha256.Sum256(x.out.Bytes()) != sha256.Sum256(data) {
		t.Errorf("%+v: %d bytes of %d came back, or others", got, x.out.Len(), len(data))
	}
}

// TestStdinUnread: a command that reads nothing keeps no signal from it, and a
// host that sends beyond its credit loses the session.
func TestStdinUnread(t *testing.T) {
	x := begin(t, wire.Exec{Args: []string{"sleep", "60"}, Stdin: true}).listen()
	chunk := make([]byte, wire.MaxFrameBytes)
	for range wire.StdinWindowBytes / len(chunk) {
		if err := x.send(wire.FrameStdin, chunk); err != nil {
			t.Fatal(err)
		}
	}
	x.send(wire.FrameSignal, []byte("TERM"))
	if got := x.wait(); got.Signal != "TERM" {
		t.Errorf("%+v", got)
	}

	x = begin(t, wire.Exec{Args: []string{"sleep", "60"}, Stdin: true}).listen()
	var err error
	for range 2*wire.StdinWindowBytes/len(chunk) + 2 {
		if err = x.send(wire.FrameStdin, chunk); err != nil {
			break
		}
	}
	<-x.ended
	if err == nil || x.exit != nil {
		t.Errorf("twice the window was taken: %v, %v", err, x.exit)
	}
}

// TestStdinRefused: what a command leaves unread does not stop the host.
func TestStdinRefused(t *testing.T) {
	x := begin(t, wire.Exec{Args: []string{"sh", "-c", "exec <&-; sleep 0.5; echo done"}, Stdin: true}).listen()
	x.stdin(make([]byte, 4*wire.StdinWindowBytes))
	if got := x.wait(); got.Code != 0 || x.output() != "done\n" {
		t.Errorf("%+v %q", got, x.output())
	}
}

func TestProtocolBroken(t *testing.T) {
	for _, c := range []struct {
		name    string
		typ     wire.FrameType
		payload string
	}{
		{"unknown frame", 99, ""}, {"output from the host", wire.FrameStdout, "x"}, {"stdin not asked for", wire.FrameStdin, "x"},
		{"unknown signal", wire.FrameSignal, "STOP"}, {"size that is none", wire.FrameResize, "{"},
	} {
		x := begin(t, wire.Exec{Args: []string{"sleep", "60"}}).listen()
		x.send(c.typ, []byte(c.payload))
		select {
		case <-x.ended:
			if x.exit != nil {
				t.Errorf("%s: %+v", c.name, x.exit)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s: the session goes on", c.name)
		}
	}
}

// TestPTY covers size, resize, foreground signals, end of input and the order
// of the last output and the exit.
func TestPTY(t *testing.T) {
	tty := &wire.Window{Rows: 33, Cols: 101}
	e := sh("stty size; echo $TERM; trap 'stty size; exit 7' WINCH; echo ready; while :; do sleep 0.05; done")
	e.TTY, e.Env = tty, []string{"TERM=vt220"}
	x := begin(t, e).listen()
	x.until("ready")
	if !strings.HasPrefix(x.output(), "33 101\r\nvt220\r\n") {
		t.Errorf("size: %q", x.output())
	}
	x.send(wire.FrameResize, []byte(`{"rows":50,"cols":65535}`))
	if got := x.wait(); got.Code != 7 || !strings.HasSuffix(x.output(), "50 65535\r\n") {
		t.Errorf("resize: %+v %q", got, x.output())
	}

	// INT reaches the foreground group alone, not the shell behind it.
	e = sh(`trap 'echo shell hit' INT; set -m; sh -c "trap 'exit 9' INT; echo up; while :; do sleep 0.05; done"; echo after $?`)
	e.TTY = tty
	x = begin(t, e).listen()
	x.until("up")
	x.send(wire.FrameSignal, []byte("INT"))
	if x.wait(); !strings.Contains(x.output(), "after 9") || strings.Contains(x.output(), "hit") {
		t.Errorf("interrupt: %q", x.output())
	}

	for _, input := range []string{"line\n", "unfinished", ""} {
		e = wire.Exec{Args: []string{"sh", "-c", "stty -echo; echo go; cat; echo end"}, TTY: tty, Stdin: true}
		x = begin(t, e).listen()
		x.until("go")
		x.stdin([]byte(input))
		want := "go\r\n" + strings.ReplaceAll(input, "\n", "\r\n") + "end\r\n"
		if got := x.wait(); got.Code != 0 || x.output() != want {
			t.Errorf("end after %q: %+v %q", input, got, x.output())
		}
	}

	e = sh("i=0; while [ $i -lt 2000 ]; do echo line$i; i=$((i+1)); done; exit 5")
	e.TTY = tty
	x = begin(t, e).listen()
	if got := x.wait(); got.Code != 5 || !strings.HasSuffix(x.output(), "line1999\r\n") {
		t.Errorf("last line lost: %+v", got)
	}
}

// TestGrandchild: who keeps the output open after the command's end does not
// keep the session, silent or not.
func TestGrandchild(t *testing.T) {
	for _, c := range []struct {
		script   string
		min, max time.Duration
	}{
		{"sleep 8 & echo done", drainSilence, drainLimit},
		{"(while echo x 2>/dev/null; do :; done) & echo done", drainLimit, drainLimit + 2*time.Second},
		{"echo done", 0, drainSilence},
	} {
		for _, tty := range []*wire.Window{nil, {Rows: 24, Cols: 80}} {
			e := sh(c.script)
			if e.TTY = tty; tty != nil {
				// Without this, the hangup of the pty ends the grandchild.
				e.Args[2] = "trap '' HUP; " + e.Args[2]
			}
			begun := time.Now()
			x := begin(t, e).listen()
			got := x.wait()
			took := time.Since(begun)
			if got.Code != 0 || !strings.Contains(x.output(), "done") {
				t.Errorf("%s: %+v %q", c.script, got, x.output())
			}
			if took < c.min || took > c.max+time.Second {
				t.Errorf("%s: took %v, want %v to %v", c.script, took, c.min, c.max)
			}
		}
	}
}

// TestSlowHost: what the command wrote before it ended arrives whole, however
// late the host reads, and a host that does not read holds up nobody else.
func TestSlowHost(t *testing.T) {
	x := begin(t, sh("head -c 60000 /dev/zero; (sleep 20 &) ; exit 4"))
	busy := begin(t, sh("yes"))
	time.Sleep(drainLimit + 500*time.Millisecond)
	if got := begin(t, sh("exit 6")).listen().wait(); got.Code != 6 {
		t.Errorf("beside a stuck session: %+v", got)
	}
	x.listen()
	if got := x.wait(); got.Code != 4 || x.out.Len() != 60000 {
		t.Errorf("%+v, %d bytes of 60000", got, x.out.Len())
	}
	busy.conn.Close()
}

// TestHangUp: a host that goes away ends the command, at the latest by KILL.
func TestHangUp(t *testing.T) {
	for _, c := range []struct {
		script string
		max    time.Duration
	}{
		{"echo $$; sleep 60", 2 * time.Second},
		{"trap '' HUP PIPE; echo $$; while :; do sleep 0.1; done", hangupGrace + 2*time.Second},
	} {
		for _, tty := range []*wire.Window{nil, {Rows: 24, Cols: 80}} {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				e := sh(c.script)
				e.TTY = tty
				x := begin(t, e).listen()
				x.until("\n")
				pid := strings.TrimSpace(x.output())
				x.conn.Close()
				begun := time.Now()
				for {
					if _, err := os.Stat("/proc/" + pid); errors.Is(err, os.ErrNotExist) {
						break
					}
					if time.Since(begun) > c.max {
						t.Fatalf("%s: %s still runs", c.script, pid)
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
	}
}

// TestSurroundings: a session inherits nothing of the agent's.
func TestSurroundings(t *testing.T) {
	t.Setenv("SECRET", "x")
	for fd := 3; fd < 1024; fd++ {
		unix.CloseOnExec(fd) // what the test itself was started with
	}
	leak, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer leak.Close()
	// What whoever started the test ignores stays ignored; an agent is started
	// by PID 1, with nothing ignored.
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	ignored := string(regexp.MustCompile(`SigIgn:.*\n`).Find(status))
	for _, c := range []struct {
		name string
		exec wire.Exec
		want string
	}{
		{"descriptors", wire.Exec{Args: []string{"ls", "/proc/self/fd"}}, "0\n1\n2\n3\n"}, // 3 is ls's own
		{"session leader", sh("ps -o pid=,sid= -p $$ | awk '{print $1 == $2}'"), "1\n"},
		{"signals", sh("grep -E 'Sig(Blk|Ign):' /proc/self/status"), "SigBlk:\t0000000000000000\n" + ignored},
		{"user", wire.Exec{Args: []string{"sh", "-c", "id -u; id -g; pwd; echo $HOME"}, User: "65533:65532"}, "65533\n65532\n/\n/\n"},
		{"environment", wire.Exec{Args: []string{"env"}, Env: []string{"A=1", "A=2", "PATH=/bin:/usr/bin"}, User: "65533"}, "PATH=/bin:/usr/bin\nHOME=/\nA=2\n"},
	} {
		x := begin(t, c.exec).listen()
		if got := x.wait(); got.Code != 0 || x.output() != c.want {
			t.Errorf("%s: %+v %q %q", c.name, got, x.output(), x.errs.String())
		}
	}
	dir := filepath.Join(t.TempDir(), "a/b")
	e := sh("pwd")
	e.Dir = dir
	x := begin(t, e).listen()
	if x.wait(); x.output() != dir+"\n" {
		t.Errorf("folder: %q", x.output())
	}
}

// TestBootEvents: all events so far, then each as it comes, and the end with
// the host's.
func TestBootEvents(t *testing.T) {
	j := newJournal(nil)
	j.add(stageKernel, "")
	s := newServer(sessionToken, j)
	conn, _ := dial(t, s, wire.Request{Token: sessionToken, Op: wire.OpBoot})
	for i, stage := range []string{stageKernel, stageAgent} {
		if i == 1 {
			j.add(stageAgent, "detail")
		}
		f, err := wire.ReadFrame(conn, nil)
		var ev wire.BootEvent
		if err == nil {
			err = json.Unmarshal(f.Payload, &ev)
		}
		if err != nil || ev.Stage != stage {
			t.Fatalf("event %d: %+v %v", i, ev, err)
		}
	}
	conn.Close()
	for end := time.Now().Add(5 * time.Second); len(s.streams) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the stream outlives its host")
		}
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
}
