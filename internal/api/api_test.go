package api

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/wire"
)

// exitVar makes the test binary the daemon's process of a Client: it only
// exits, with that code. The daemon's work is done by Serve in the test.
const exitVar = "BANGER_TEST_API_EXIT"

func TestMain(m *testing.M) {
	if code, err := strconv.Atoi(os.Getenv(exitVar)); err == nil {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// wait bounds whatever must happen soon.
const wait = 10 * time.Second

func pair(t *testing.T) (client, server *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

// newClient makes a Client whose daemon is serve, run with the other end.
func newClient(t *testing.T, exit int, serve func(*net.UnixConn)) *Client {
	t.Helper()
	ours, theirs := pair(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), exitVar+"="+strconv.Itoa(exit), "GORACE=atexit_sleep_ms=0") // the race detector would wait a second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(theirs)
	}()
	t.Cleanup(func() {
		ours.Close()
		select {
		case <-done:
		case <-time.After(wait):
			t.Error("the daemon's side did not end")
		}
	})
	return &Client{conn: ours, out: &writer{w: ours}, cmd: cmd, asked: make(chan struct{})}
}

// serving makes a Client of a daemon with one method, "m".
func serving(t *testing.T, h Handler) *Client {
	t.Helper()
	return newClient(t, 0, func(conn *net.UnixConn) { Serve(context.Background(), conn, map[string]Handler{"m": h}) })
}

func TestCompanion(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path, err := Companion(filepath.Base(self))
	if err != nil || filepath.Base(path) != filepath.Base(self) || !filepath.IsAbs(path) {
		t.Errorf("got %q, %v", path, err)
	}
	_, err = Companion("bangerd-that-is-not-there")
	var e *banger.Error
	if !errors.As(err, &e) || e.Code != banger.CodeUnavailable || e.Hint == "" {
		t.Errorf("missing: %v", err)
	}
}

func TestFiles(t *testing.T) {
	type params struct {
		Text string `json:"text"`
	}
	read := func(_ context.Context, c *Call) (any, error) {
		var p params
		if err := c.Params(&p); err != nil {
			return nil, err
		}
		texts := []string{p.Text}
		for i := range c.Files {
			f, err := c.File(i)
			if err != nil {
				return nil, err
			}
			data, err := io.ReadAll(f)
			if err != nil {
				return nil, err
			}
			texts = append(texts, string(data))
		}
		return texts, nil
	}
	for _, c := range []struct {
		name string
		n    int
		ok   bool
	}{{"none", 0, true}, {"one", 1, true}, {"max", maxFiles, true}, {"max+1", maxFiles + 1, false}} {
		t.Run(c.name, func(t *testing.T) {
			defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector would close what leaks
			dir := t.TempDir()
			before := openFiles(t)
			want := []string{"<é\x01&>"}
			var files []*os.File
			for i := range c.n {
				path := filepath.Join(dir, strconv.Itoa(i))
				text := fmt.Sprintf("content %d", i)
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				f, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				files = append(files, f)
				want = append(want, text)
			}
			var got []string
			err := serving(t, read).Call(context.Background(), "m", params{want[0]}, files, &got, nil, nil)
			if !c.ok {
				if err == nil || !strings.Contains(err.Error(), "5 files, the limit is 4") {
					t.Errorf("got %v", err)
				}
			} else if err != nil || !slices.Equal(got, want) {
				t.Errorf("got %q, %v; want %q", got, err, want)
			}
			closeAll(files)
			sameFiles(t, before)
		})
	}
}

func TestFileIndexes(t *testing.T) {
	c := &Call{Files: []*os.File{os.Stdin}}
	for index, ok := range map[int]bool{-2: false, -1: true, 0: true, 1: false, 1 << 40: false} {
		f, err := c.File(index)
		if (err == nil) != ok || (f != nil) != (index == 0) {
			t.Errorf("index %d: %v, %v", index, f, err)
		}
		if !ok && banger.CodeOf(err) != banger.CodeUsage {
			t.Errorf("index %d: code %s", index, banger.CodeOf(err))
		}
	}
}

func TestResultSizes(t *testing.T) {
	for _, c := range []struct {
		name  string
		bytes int // of the result's JSON
	}{
		{"an empty text", 2}, {"64 KiB-1", wire.MaxFrameBytes - 1}, {"64 KiB", wire.MaxFrameBytes},
		{"64 KiB+1", wire.MaxFrameBytes + 1}, {"5 MiB", 5 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := strings.Repeat("r", c.bytes-2)
			var got string
			err := serving(t, func(context.Context, *Call) (any, error) { return want, nil }).
				Call(context.Background(), "m", None{}, nil, &got, nil, nil)
			if err != nil || got != want {
				t.Errorf("%d bytes came, %v", len(got), err)
			}
		})
	}
	t.Run("nothing", func(t *testing.T) {
		got := &Version{}
		err := serving(t, func(context.Context, *Call) (any, error) { return nil, nil }).
			Call(context.Background(), "m", nil, nil, &got, nil, nil)
		if err != nil || got != nil {
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("more than the limit", func(t *testing.T) {
		c := newClient(t, 0, func(conn *net.UnixConn) {
			defer conn.Close()
			_, files, err := readRequest(conn)
			closeAll(files)
			piece := make([]byte, wire.MaxFrameBytes)
			for range maxResultBytes/len(piece) + 1 {
				if err == nil {
					err = wire.WriteFrame(conn, frameResult, piece)
				}
			}
		})
		var got string
		err := c.Call(context.Background(), "m", nil, nil, &got, nil, nil)
		if err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("one that is no JSON", func(t *testing.T) {
		var got string
		err := serving(t, func(context.Context, *Call) (any, error) { return make(chan int), nil }).
			Call(context.Background(), "m", nil, nil, &got, nil, nil)
		if banger.CodeOf(err) != banger.CodeInternal {
			t.Errorf("got %v", err)
		}
	})
}

func TestEventsAndFramesKeepTheirOrder(t *testing.T) {
	const n = 1000
	c := serving(t, func(_ context.Context, c *Call) (any, error) {
		for i := range n {
			c.Emit(Event{Progress: &Progress{Step: "s", Subject: "\x1b]0;x\x07", DoneBytes: int64(i)}})
			if err := c.Send(wire.Frame{Type: wire.FrameStdout, Payload: binary.BigEndian.AppendUint32(nil, uint32(i))}); err != nil {
				return nil, err
			}
		}
		c.Emit(Event{Stage: &Stage{Name: "x", StartUs: 1, EndUs: 2}})
		c.Emit(Event{Notice: "n"})
		c.Emit(Event{Started: true})
		return "end", nil
	})
	var seen []int
	var rest []Event
	var result string
	err := c.Call(context.Background(), "m", nil, nil, &result, func(e Event) {
		if e.Progress == nil {
			rest = append(rest, e)
			return
		}
		seen = append(seen, 2*int(e.Progress.DoneBytes))
	}, func(f wire.Frame) error {
		seen = append(seen, 2*int(binary.BigEndian.Uint32(f.Payload))+1)
		return nil
	})
	if err != nil || result != "end" {
		t.Fatalf("%q, %v", result, err)
	}
	for i := range 2 * n {
		if i >= len(seen) || seen[i] != i {
			t.Fatalf("at %d of %d: out of order", i, len(seen))
		}
	}
	if len(rest) != 3 || *rest[0].Stage != (Stage{"x", 1, 2}) || rest[1].Notice != "n" || !rest[2].Started {
		t.Errorf("got %+v", rest)
	}
}

func TestInput(t *testing.T) {
	c := serving(t, func(_ context.Context, c *Call) (any, error) {
		c.Emit(Event{Started: true})
		var got []string
		for f := range c.Input {
			got = append(got, fmt.Sprintf("%d:%s", f.Type, f.Payload))
			if f.Type == wire.FrameStdinEOF {
				return got, nil
			}
		}
		return nil, errors.New("the input ended")
	})
	var got []string
	err := c.Call(context.Background(), "m", nil, nil, &got, func(Event) {
		c.Send(wire.FrameStdin, []byte("a"))
		c.Send(wire.FrameSignal, []byte("INT"))
		c.Send(wire.FrameStdinEOF, nil)
	}, nil)
	if want := []string{"1:a", "6:INT", "4:"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func TestFrameHandler(t *testing.T) {
	send := func(ctx context.Context, c *Call) (any, error) {
		c.Send(wire.Frame{Type: wire.FrameStdout, Payload: []byte("x")})
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	full := errors.New("stdout is full")
	err := serving(t, send).Call(context.Background(), "m", nil, nil, nil, nil, func(wire.Frame) error { return full })
	if err != full {
		t.Errorf("got %v, want the handler's error", err)
	}
	if err := serving(t, send).Call(context.Background(), "m", nil, nil, nil, nil, nil); err == nil {
		t.Error("a frame that nobody takes is no error")
	}
}

func TestCancel(t *testing.T) {
	for name, h := range map[string]Handler{
		"returns the cause": func(ctx context.Context, c *Call) (any, error) {
			c.Emit(Event{Started: true})
			<-ctx.Done()
			return nil, context.Cause(ctx)
		},
		"returns what broke": func(ctx context.Context, c *Call) (any, error) {
			c.Emit(Event{Started: true})
			<-ctx.Done()
			return nil, io.ErrClosedPipe
		},
		"wraps the cause": func(ctx context.Context, c *Call) (any, error) {
			c.Emit(Event{Started: true})
			<-ctx.Done()
			return nil, fmt.Errorf("fetch: %w", context.Cause(ctx))
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			err := serving(t, h).Call(ctx, "m", nil, nil, nil, func(Event) { cancel() }, nil)
			if banger.CodeOf(err) != banger.CodeCanceled {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("too late", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var got string
		err := serving(t, func(ctx context.Context, c *Call) (any, error) {
			c.Emit(Event{Started: true})
			<-ctx.Done()
			return "done all the same", nil
		}).Call(ctx, "m", nil, nil, &got, func(Event) { cancel() }, nil)
		if err != nil || got != "done all the same" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	// What a handler breaks on once its context has ended broke because of that.
	t.Run("an error of its own", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		err := serving(t, func(ctx context.Context, c *Call) (any, error) {
			c.Emit(Event{Started: true})
			<-ctx.Done()
			return nil, banger.Errorf(banger.CodeConflict, "in use")
		}).Call(ctx, "m", nil, nil, nil, func(Event) { cancel() }, nil)
		if banger.CodeOf(err) != banger.CodeCanceled {
			t.Errorf("got %v", err)
		}
	})
}

// A cancel that comes before the request must not get in front of it.
func TestCancelBeforeTheRequest(t *testing.T) {
	h := func(ctx context.Context, c *Call) (any, error) {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait):
			return nil, errors.New("never canceled")
		}
	}
	params := strings.Repeat("p", 500_000) // more than the socket holds
	t.Run("by Cancel", func(t *testing.T) {
		c := serving(t, h)
		sent := make(chan error, 1)
		go func() { sent <- c.Cancel() }()
		time.Sleep(20 * time.Millisecond)
		err := c.Call(context.Background(), "m", params, nil, nil, nil, nil)
		if banger.CodeOf(err) != banger.CodeCanceled {
			t.Errorf("got %v", err)
		}
		if err := <-sent; err != nil {
			t.Errorf("cancel: %v", err)
		}
	})
	t.Run("by a context that has ended", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		err := serving(t, h).Call(ctx, "m", params, nil, nil, nil, nil)
		if banger.CodeOf(err) != banger.CodeCanceled {
			t.Errorf("got %v", err)
		}
	})
	t.Run("of a request that cannot be written", func(t *testing.T) {
		c := serving(t, h)
		if err := c.Call(context.Background(), "m", make(chan int), nil, nil, nil, nil); err == nil {
			t.Error("a channel was sent")
		}
		c.Cancel() // returns
	})
}

func TestClientGone(t *testing.T) {
	client, server := pair(t)
	begun, ended := make(chan bool, 1), make(chan error, 1)
	go Serve(context.Background(), server, map[string]Handler{"m": func(ctx context.Context, c *Call) (any, error) {
		begun <- true
		for range c.Input { // closed when the client is gone
		}
		<-ctx.Done()
		c.Emit(Event{Notice: "to nobody"})
		ended <- c.Send(wire.Frame{Type: wire.FrameStdout})
		return nil, context.Cause(ctx)
	}})
	if err := writeRequest(client, request{Method: "m"}, nil); err != nil {
		t.Fatal(err)
	}
	<-begun
	client.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, syscall.EPIPE) {
			t.Errorf("send to a client that is gone: %v", err)
		}
	case <-time.After(wait):
		t.Fatal("the handler goes on without its client")
	}
}

// What a client asked for that was gone before it was read is not begun.
func TestRequestOfTheDead(t *testing.T) {
	client, server := pair(t)
	if err := writeRequest(client, request{Method: "m"}, nil); err != nil {
		t.Fatal(err)
	}
	client.Close()
	Serve(context.Background(), server, map[string]Handler{"m": func(context.Context, *Call) (any, error) {
		t.Error("it was begun")
		return nil, nil
	}})
}

// The daemon may be asked to end while a client has not said anything yet.
func TestServeEndsWithItsContext(t *testing.T) {
	for name, sent := range map[string][]byte{"silence": nil, "half a request": {0, 0, 0, 0, 9, '{'}} {
		t.Run(name, func(t *testing.T) {
			client, server := pair(t)
			if _, err := client.Write(sent); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan struct{})
			go func() {
				defer close(done)
				Serve(ctx, server, nil)
			}()
			time.Sleep(20 * time.Millisecond)
			cancel()
			select {
			case <-done:
			case <-time.After(wait):
				t.Error("it waits for the client")
			}
		})
	}
}

func TestErrorsSurvive(t *testing.T) {
	enospc := &os.PathError{Op: "write", Path: "/x", Err: syscall.ENOSPC}
	for _, c := range []struct {
		name string
		err  error
		want banger.Error
	}{
		{"code, hint and detail",
			&banger.Error{Code: banger.CodeGuest, Message: "boot: x", Hint: "do y", Detail: "a\nb\x1b[0m", Err: io.EOF},
			banger.Error{Code: banger.CodeGuest, Message: "boot: x", Hint: "do y", Detail: "a\nb\x1b[0m"}},
		{"what was wrapped around it",
			fmt.Errorf("pull: %w", banger.Errorf(banger.CodeNotFound, "image %q: not found", "x").WithHint("h")),
			banger.Error{Code: banger.CodeNotFound, Message: `pull: image "x": not found`, Hint: "h"}},
		{"a plain one", errors.New("x: y"), banger.Error{Code: banger.CodeInternal, Message: "x: y"}},
		{"a full disk", fmt.Errorf("base: %w", enospc), banger.Error{Code: banger.CodeNoSpace, Message: "base: write /x: no space left on device"}},
		{"a full quota", syscall.EDQUOT, banger.Error{Code: banger.CodeNoSpace, Message: "disk quota exceeded"}},
		{"a full disk that has a code", banger.Errorf(banger.CodeInternal, "x: %w", enospc), banger.Error{Code: banger.CodeNoSpace, Message: "x: write /x: no space left on device"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := serving(t, func(context.Context, *Call) (any, error) { return nil, c.err }).
				Call(context.Background(), "m", nil, nil, nil, nil, nil)
			var got *banger.Error
			if !errors.As(err, &got) {
				t.Fatalf("got %v", err)
			}
			if c.want.Code == banger.CodeNoSpace {
				if got.Hint == "" {
					t.Error("no hint")
				}
				got.Hint = ""
			}
			if *got != c.want {
				t.Errorf("got %+v\nwant %+v", *got, c.want)
			}
		})
	}
	for _, code := range []banger.Code{
		banger.CodeUsage, banger.CodeNotFound, banger.CodeConflict, banger.CodeInvalid, banger.CodeUnavailable, banger.CodeNoSpace,
		banger.CodeTimeout, banger.CodeCanceled, banger.CodeGuest, banger.CodeInternal, banger.CodeCommandNotFound, banger.CodeCommandNotExecutable,
	} {
		err := serving(t, func(context.Context, *Call) (any, error) { return nil, banger.Errorf(code, "x") }).
			Call(context.Background(), "m", nil, nil, nil, nil, nil)
		if banger.CodeOf(err) != code {
			t.Errorf("%s became %s", code, banger.CodeOf(err))
		}
	}
}

// A guest or an image decides how long the text of an error is; the error
// arrives all the same.
func TestLongErrors(t *testing.T) {
	for name, e := range map[string]*banger.Error{
		"message":      {Code: banger.CodeGuest, Message: "start " + strings.Repeat("m", 1<<20), Hint: "hint", Detail: "detail"},
		"detail":       {Code: banger.CodeGuest, Message: "start ", Hint: "hint", Detail: strings.Repeat("\x1b", 1<<20)},
		"all":          {Code: banger.CodeGuest, Message: "start " + strings.Repeat("é", 1<<18), Hint: "hint" + strings.Repeat("h", 1<<18), Detail: strings.Repeat("\xff", 1<<18)},
		"just too big": {Code: banger.CodeGuest, Message: "start ", Hint: "hint", Detail: strings.Repeat("d", wire.MaxFrameBytes)},
	} {
		t.Run(name, func(t *testing.T) {
			err := serving(t, func(context.Context, *Call) (any, error) { return nil, e }).
				Call(context.Background(), "m", nil, nil, nil, nil, nil)
			var got *banger.Error
			if !errors.As(err, &got) || got.Code != banger.CodeGuest ||
				!strings.HasPrefix(got.Message, "start ") || !strings.HasPrefix(got.Hint, "hint") || got.Detail == "" {
				t.Errorf("got %.200v", err)
			}
		})
	}
}

func TestUnknownMethodAndParams(t *testing.T) {
	called := false
	h := func(_ context.Context, c *Call) (any, error) {
		called = true
		return nil, c.Params(&Named{})
	}
	for _, method := range []string{"", "M", "m ", "m\x00", strings.Repeat("m", 100_000)} {
		err := serving(t, h).Call(context.Background(), method, nil, nil, nil, nil, nil)
		if banger.CodeOf(err) != banger.CodeUsage || called {
			t.Errorf("method %.20q: %.100v", method, err)
		}
	}
	if err := serving(t, h).Call(context.Background(), "m", []int{1}, nil, nil, nil, nil); banger.CodeOf(err) != banger.CodeUsage {
		t.Errorf("a list for parameters: %v", err)
	}
	if err := (&Call{}).Params(&Named{}); err != nil {
		t.Errorf("no parameters: %v", err)
	}
}

func TestDaemonThatBreaksDown(t *testing.T) {
	take := func(conn *net.UnixConn) {
		_, files, _ := readRequest(conn)
		closeAll(files)
	}
	for _, c := range []struct {
		name  string
		exit  int
		serve func(*net.UnixConn)
		want  string
	}{
		{"at once", 1, func(conn *net.UnixConn) {}, ""},
		{"after the request", 1, take, "it ended before it answered"},
		{"in the middle of a frame", 1, func(conn *net.UnixConn) {
			take(conn)
			conn.Write([]byte{byte(frameEvent), 0, 0, 1})
		}, "unexpected EOF"},
		{"an oversize frame", 0, func(conn *net.UnixConn) {
			take(conn)
			conn.Write([]byte{byte(frameEvent), 0xff, 0xff, 0xff, 0xff})
		}, "the limit is 65536"},
		{"an event that is none", 0, func(conn *net.UnixConn) {
			take(conn)
			wire.WriteFrame(conn, frameEvent, []byte("x"))
		}, "event"},
		{"an error that is none", 0, func(conn *net.UnixConn) {
			take(conn)
			wire.WriteFrame(conn, frameError, []byte("[]"))
		}, "error"},
		{"done without a result", 0, func(conn *net.UnixConn) {
			take(conn)
			wire.WriteFrame(conn, frameDone, nil)
		}, "result"},
		{"a bad exit after a good answer", 3, func(conn *net.UnixConn) {
			take(conn)
			wire.WriteFrame(conn, frameResult, []byte(`{}`))
			wire.WriteFrame(conn, frameDone, nil)
		}, "exit status 3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := openFiles(t)
			client := newClient(t, c.exit, func(conn *net.UnixConn) {
				defer conn.Close()
				c.serve(conn)
			})
			err := client.Call(context.Background(), "m", nil, nil, &None{}, nil, func(wire.Frame) error { return nil })
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			sameFiles(t, before)
		})
	}
}

// sendRaw sends bytes with descriptors, as no client of ours would.
func sendRaw(t *testing.T, conn *net.UnixConn, data []byte, fds int) {
	t.Helper()
	var oob []byte
	if fds > 0 {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		oob = unix.UnixRights(slices.Repeat([]int{int(null.Fd())}, fds)...)
	}
	if _, _, err := conn.WriteMsgUnix(data, oob, nil); err != nil {
		t.Fatal(err)
	}
}

func message(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func TestHostileRequests(t *testing.T) {
	ok := `{"method":"m"}`
	for _, c := range []struct {
		name string
		send func(conn *net.UnixConn)
	}{
		{"nothing", func(*net.UnixConn) {}},
		{"only the first byte", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{0}, 0) }},
		{"half a length", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{0, 0, 0}, 0) }},
		{"a length and no message", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{0, 0, 0, 0, 14}, 0) }},
		{"half a message", func(conn *net.UnixConn) { sendRaw(t, conn, append([]byte{0}, message(ok)[:10]...), 0) }},
		{"max+1", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{0, 0, 0x10, 0, 1}, 0) }},
		{"4 GiB", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{0, 0xff, 0xff, 0xff, 0xff}, 0) }},
		{"an empty message", func(conn *net.UnixConn) { sendRaw(t, conn, append([]byte{0}, message("")...), 0) }},
		{"garbage", func(conn *net.UnixConn) { sendRaw(t, conn, append([]byte{0}, message("\xff\x00{}")...), 0) }},
		{"a list", func(conn *net.UnixConn) { sendRaw(t, conn, append([]byte{0}, message("[]")...), 0) }},
		{"deep nesting", func(conn *net.UnixConn) {
			sendRaw(t, conn, append([]byte{0}, message(`{"params":`+strings.Repeat("[", 100_000))...), 0)
		}},
		{"files that are missing", func(conn *net.UnixConn) { sendRaw(t, conn, append([]byte{3}, message(ok)...), 0) }},
		{"255 files that are missing", func(conn *net.UnixConn) { sendRaw(t, conn, append([]byte{255}, message(ok)...), 0) }},
		{"one file too few", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{2}, 1) }},
		{"files that nobody announced", func(conn *net.UnixConn) { sendRaw(t, conn, append([]byte{0}, message(ok)...), 2) }},
		{"max+1 files", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{maxFiles + 1}, maxFiles+1) }},
		{"max files announced, 200 sent", func(conn *net.UnixConn) {
			sendRaw(t, conn, []byte{maxFiles}, 200)
			conn.Write(message(fmt.Sprintf(`{"method":"m","files":%d}`, maxFiles))) // it may be gone already
		}},
		{"files, then the end", func(conn *net.UnixConn) { sendRaw(t, conn, []byte{maxFiles}, maxFiles) }},
		{"files, then garbage", func(conn *net.UnixConn) {
			sendRaw(t, conn, []byte{1}, 1)
			sendRaw(t, conn, message("nonsense"), 0)
		}},
		{"files that the request does not have", func(conn *net.UnixConn) {
			sendRaw(t, conn, []byte{1}, 1)
			sendRaw(t, conn, message(ok), 0)
		}},
		{"files of the request that did not come", func(conn *net.UnixConn) {
			sendRaw(t, conn, []byte{0}, 0)
			sendRaw(t, conn, message(`{"method":"m","files":1}`), 0)
		}},
		{"a negative number of files", func(conn *net.UnixConn) {
			sendRaw(t, conn, []byte{0}, 0)
			sendRaw(t, conn, message(`{"method":"m","files":-1}`), 0)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector would close what leaks
			files, goroutines := openFiles(t), runtime.NumGoroutine()
			client, server := pair(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				Serve(context.Background(), server, map[string]Handler{"m": func(context.Context, *Call) (any, error) {
					t.Error("the handler was called")
					return nil, nil
				}})
			}()
			c.send(client)
			client.CloseWrite()
			select {
			case <-done:
			case <-time.After(wait):
				t.Fatal("it does not end")
			}
			client.Close()
			sameFiles(t, files)
			sameGoroutines(t, goroutines)
		})
	}
}

// Files that come with later bytes belong to nobody and stay closed; frames
// that are none end the call.
func TestHostileFrames(t *testing.T) {
	for name, send := range map[string]func(*net.UnixConn){
		"files":          func(conn *net.UnixConn) { sendRaw(t, conn, []byte{byte(wire.FrameStdin), 0, 0, 0, 0}, 4) },
		"oversize":       func(conn *net.UnixConn) { sendRaw(t, conn, []byte{1, 0, 1, 0, 1}, 0) },
		"cut":            func(conn *net.UnixConn) { sendRaw(t, conn, []byte{1, 0, 0, 0, 9, 'x'}, 0) },
		"a flood":        func(conn *net.UnixConn) { conn.Write(make([]byte, 5*1000)) },
		"a cancel twice": func(conn *net.UnixConn) { conn.Write([]byte{68, 0, 0, 0, 0, 68, 0, 0, 0, 0}) },
	} {
		t.Run(name, func(t *testing.T) {
			defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector would close what leaks
			files, goroutines := openFiles(t), runtime.NumGoroutine()
			client, server := pair(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				Serve(context.Background(), server, map[string]Handler{"m": func(ctx context.Context, c *Call) (any, error) {
					for range c.Input {
					}
					<-ctx.Done()
					return nil, context.Cause(ctx)
				}})
			}()
			if err := writeRequest(client, request{Method: "m"}, nil); err != nil {
				t.Fatal(err)
			}
			send(client)
			client.CloseWrite()
			f, err := wire.ReadFrame(client, nil)
			var e banger.Error
			if err != nil || f.Type != frameError || json.Unmarshal(f.Payload, &e) != nil || e.Code != banger.CodeCanceled {
				t.Errorf("got %v %s, %v", f.Type, f.Payload, err)
			}
			<-done
			client.Close()
			sameFiles(t, files)
			sameGoroutines(t, goroutines)
		})
	}
}

// A handler need not read its input.
func TestInputThatNobodyReads(t *testing.T) {
	goroutines := runtime.NumGoroutine()
	client, server := pair(t)
	if err := writeRequest(client, request{Method: "m"}, nil); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := wire.WriteFrame(client, wire.FrameStdin, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	Serve(context.Background(), server, map[string]Handler{"m": func(context.Context, *Call) (any, error) {
		time.Sleep(50 * time.Millisecond) // the first frame is offered by now
		return nil, nil
	}})
	client.Close()
	sameGoroutines(t, goroutines)
}

// openFiles lists what this process has open, by descriptor.
func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(target, "anon_inode:") {
			open = append(open, e.Name()+" "+target)
		}
	}
	return open
}

// sameFiles waits for what is open to be what was open before.
func sameFiles(t *testing.T, before []string) {
	t.Helper()
	for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		now := openFiles(t)
		if len(now) <= len(before) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("open before: %q\nopen now: %q", before, now)
			return
		}
	}
}

func sameGoroutines(t *testing.T, before int) {
	t.Helper()
	for deadline := time.Now().Add(wait); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Errorf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
			return
		}
	}
}

// A check that cannot fail is none.
func TestOpenFilesSeesALeak(t *testing.T) {
	before := openFiles(t)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if len(openFiles(t)) <= len(before) {
		t.Error("an open file was not seen")
	}
}
