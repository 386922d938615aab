package api

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/store"
)

// folder makes one whose path, with a slash and the name of a socket, is so
// many bytes long.
func folder(t *testing.T, bytes int, name string) string {
	t.Helper()
	dir := t.TempDir()
	for rest := bytes - len(dir) - 1 - len(name); rest > 0; {
		n := min(rest-1, 100)
		if n == 0 {
			t.Fatalf("no path of %d bytes below %s", bytes, dir)
		}
		if rest-1-n == 1 { // a name of one byte must be left for the slash
			n--
		}
		dir = filepath.Join(dir, strings.Repeat("d", n))
		rest -= n + 1
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A socket's path may be as long as any path.
func TestSocketPaths(t *testing.T) {
	for _, bytes := range []int{maxSocketPath, maxSocketPath + 1, 400} {
		dir := folder(t, bytes, "s.sock")
		path := filepath.Join(dir, "s.sock")
		if len(path) != bytes {
			t.Fatalf("%d bytes, want %d", len(path), bytes)
		}
		l, err := Listen(dir, "s.sock")
		if err != nil {
			t.Fatalf("%d bytes: %v", bytes, err)
		}
		defer l.Close()
		if st, err := os.Lstat(path); err != nil || st.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("%d bytes: %v, %v", bytes, st.Mode(), err)
		}
		go func() {
			for {
				conn, err := l.AcceptUnix()
				if err != nil {
					return
				}
				if pid, err := Peer(conn); err != nil || pid != os.Getpid() {
					t.Errorf("the client is process %d, %v", pid, err)
				}
				Serve(context.Background(), conn, map[string]Handler{"m": func(context.Context, *Call) (any, error) { return "yes", nil }})
			}
		}()
		conn, err := Dial(dir, "s.sock")
		if err != nil {
			t.Fatalf("%d bytes: %v", bytes, err)
		}
		if pid, err := Peer(conn); err != nil || pid != os.Getpid() {
			t.Errorf("the server is process %d, %v", pid, err)
		}
		var got string
		if err := NewClient(conn).Call(t.Context(), "m", nil, nil, &got, nil, nil); err != nil || got != "yes" {
			t.Errorf("%d bytes: %q, %v", bytes, got, err)
		}
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	if _, err := Dial(dir, "s"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nobody listens: %v", err)
	}
	for range 2 { // a socket that was left behind is made anew
		l, err := Listen(dir, "s")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		if _, err := Dial(dir, "s"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("one who listened is gone: %v", err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dir, "s"); err == nil {
		t.Error("a file was taken for a socket")
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "text" {
		t.Errorf("the file is %q now, %v", data, err)
	}
}

// Another user's process is nobody's peer, as a client or as a daemon.
func TestPeerOfAnother(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("cannot test: another user needs root")
		}
		t.Skip("NOT TESTED: another user needs root")
	}
	dir := t.TempDir()
	for d := dir; d != "/"; d = filepath.Dir(d) { // so that nothing but the check is in the way
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
		if d == os.TempDir() || filepath.Dir(d) == os.TempDir() {
			break
		}
	}
	l, err := Listen(dir, "s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(filepath.Join(dir, "s"), 0o777); err != nil {
		t.Fatal(err)
	}
	accepted := make(chan error, 1)
	go func() {
		conn, err := l.AcceptUnix()
		if err == nil {
			_, err = Peer(conn)
			conn.Close()
		}
		accepted <- err
	}()
	go func() {
		runtime.LockOSThread() // never unlocked: the thread, which is another user from here on, ends with the goroutine
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			accepted <- errno
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, "s")})
		}
		if err != nil {
			accepted <- err
		}
	}()
	select {
	case err = <-accepted:
	case <-time.After(wait):
		t.Fatal("nobody connects")
	}
	if err == nil || !strings.Contains(err.Error(), "uid 65534") {
		t.Errorf("got %v", err)
	}
}

// A daemon that cannot start says why to who started it, with its hint.
func TestReady(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	want := banger.Errorf(banger.CodeConflict, "x: y").WithHint("z")
	if _, err := w.Write(encodeError(asError(want))); err != nil {
		t.Fatal(err)
	}
	w.Close()
	buf := make([]byte, maxReadyBytes)
	n, _ := r.Read(buf)
	var got *banger.Error
	if err := parseReady(buf[:n]); !errors.As(err, &got) || got.Code != want.Code || got.Message != want.Message || got.Hint != want.Hint {
		t.Errorf("got %+v", err)
	}
	for _, text := range []string{"{", "null", "{}", "panic: \x1b"} {
		if err := parseReady([]byte(text)); err == nil {
			t.Errorf("%q is no error", text)
		}
	}
}

// A daemon that takes connections and says nothing is told from one that is
// not there.
func TestConnectToTheDeaf(t *testing.T) {
	defer func(d time.Duration) { helloLimit = d }(helloLimit)
	helloLimit = 200 * time.Millisecond
	root := t.TempDir()
	t.Setenv("BANGER_HOME", root)
	dir := store.Run(root)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(dir, store.DaemonSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	began := time.Now()
	_, err = Connect("dev")
	if banger.CodeOf(err) != banger.CodeUnavailable || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > helloLimit+wait {
		t.Errorf("it took %v", took)
	}
}

func TestGone(t *testing.T) {
	a, b := pair(t)
	if Gone(a) || Gone(b) {
		t.Error("both are there")
	}
	b.Write([]byte("last words"))
	b.CloseWrite()
	if Gone(a) {
		t.Error("it only says no more")
	}
	b.Close()
	if !Gone(a) {
		t.Error("it is gone")
	}
	var buf [20]byte
	if n, err := a.Read(buf[:]); err != nil || string(buf[:n]) != "last words" {
		t.Errorf("its last words: %q, %v", buf[:n], err)
	}
}
