package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A test that needs another process runs its own binary again: the role says
// what that process does, the root on which state folder.
const (
	roleVar = "BANGER_TEST_STORE_ROLE"
	rootVar = "BANGER_TEST_STORE_ROOT"

	roleHold  = "hold"  // hold one of everything until killed
	roleCount = "count" // add to a counter under the lock
)

const testVM = "0123456789ab"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case roleHold:
		holdEverything()
	case roleCount:
		s, err := Open(os.Getenv(rootVar))
		if err != nil {
			fatal(err)
		}
		for range countRounds {
			if err := addOne(s); err != nil {
				fatal(err)
			}
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// holdEverything makes a temporary folder, a blob that is arriving, a VM and
// a lock, says so, and waits to be killed.
func holdEverything() {
	s, err := Open(os.Getenv(rootVar))
	if err != nil {
		fatal(err)
	}
	tmp, err := s.TempDir("image")
	if err != nil {
		fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tmp.Path, "half"), []byte("half"), 0o600); err != nil {
		fatal(err)
	}
	w, err := s.Blobs().Create(digestOf('a'))
	if err != nil {
		fatal(err)
	}
	if _, err := w.Write([]byte("half")); err != nil {
		fatal(err)
	}
	if err := os.Mkdir(s.VM(testVM), 0o700); err != nil {
		fatal(err)
	}
	hold, err := s.HoldVM(testVM)
	if err != nil {
		fatal(err)
	}
	unlock, err := s.Lock(context.Background(), "held")
	if err != nil {
		fatal(err)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	hold.Close()
	unlock()
	os.Exit(0)
}

// another starts this binary in a role on a state folder.
func another(t *testing.T, role string, s *Store) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVar+"="+role, rootVar+"="+s.Root(), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe() // open as long as the test lives
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd, bufio.NewReader(stdout)
}

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// names lists a folder, hidden files too.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	list := []string{}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	if got := names(t, dir); !slices.Equal(got, append([]string{}, want...)) {
		t.Errorf("%s holds %q, want %q", dir, got, want)
	}
}

func TestDefaultRoot(t *testing.T) {
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name            string
		home, xdg, user string
		want            string // "": an error
	}{
		{"BANGER_HOME wins", "/a/b", "/x", "/h", "/a/b"},
		{"BANGER_HOME is cleaned", "/a/../b/", "", "/h", "/b"},
		{"BANGER_HOME from here", "rel", "", "/h", filepath.Join(cwd, "rel")},
		{"XDG_DATA_HOME", "", "/x", "/h", "/x/banger"},
		{"a relative XDG_DATA_HOME is ignored", "", "x", "/h", "/h/.local/share/banger"},
		{"HOME", "", "", "/h", "/h/.local/share/banger"},
		{"nothing", "", "", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("BANGER_HOME", c.home)
			t.Setenv("XDG_DATA_HOME", c.xdg)
			t.Setenv("HOME", c.user)
			got, err := DefaultRoot()
			if got != c.want || (err == nil) != (c.want != "") {
				t.Errorf("got %q, %v; want %q", got, err, c.want)
			}
		})
	}
}

func TestOpenMakesEverythingPrivate(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	root := filepath.Join(t.TempDir(), "a", "b", "state")
	s, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v is for others too", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(root)
	if err != nil || again.Root() != s.Root() {
		t.Errorf("opened again: %v, %v", again, err)
	}
}

func TestOpenOneWayToWriteTheRoot(t *testing.T) {
	t.Chdir(t.TempDir())
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{"state", "state/", "./x/../state"} {
		s, err := Open(root)
		if err != nil {
			t.Fatal(err)
		}
		if want := filepath.Join(here, "state"); s.Root() != want {
			t.Errorf("opened as %q it is %q, want %q", root, s.Root(), want)
		}
		hold := newVM(t, s, testVM)
		if err := s.Remove(s.VM(testVM)); err != nil {
			t.Errorf("opened as %q: %v", root, err)
		}
		hold.Close()
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Run("writable by others", func(t *testing.T) {
		for mode, ok := range map[fs.FileMode]bool{
			0o700: true, 0o755: true, 0o720: false, 0o702: false, 0o777: false, 0o777 | fs.ModeSticky: false,
		} {
			root := t.TempDir()
			if err := os.Chmod(root, mode); err != nil {
				t.Fatal(err)
			}
			_, err := Open(root)
			if (err == nil) != ok {
				t.Errorf("mode %v: %v", mode, err)
			}
			if !ok {
				wantNames(t, root) // refused before anything is made
			}
		}
	})
	t.Run("of another user", func(t *testing.T) {
		root := "/" // root's, where we are not root
		if os.Geteuid() == 0 {
			root = t.TempDir()
			if err := os.Chown(root, 65534, 65534); err != nil {
				t.Fatal(err)
			}
		}
		_, err := Open(root)
		if err == nil || !strings.Contains(err.Error(), "owned by uid") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a file", func(t *testing.T) {
		root := filepath.Join(t.TempDir(), "state")
		if err := os.WriteFile(root, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(root); err == nil {
			t.Error("a file was opened as a state folder")
		}
	})
}

func TestNewID(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := NewID()
		if len(id) != 12 || strings.Trim(id, "0123456789abcdef") != "" || seen[id] {
			t.Fatalf("id %q: not 12 hex digits, or the second of its kind", id)
		}
		seen[id] = true
	}
}

func TestTemp(t *testing.T) {
	make := func(t *testing.T) (*Store, *Temp) {
		s := open(t)
		tmp, err := s.TempDir("image")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(tmp.Path, "deep", "er"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tmp.Path, "deep", "er", "file"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		return s, tmp
	}
	gone := func(t *testing.T, s *Store) {
		t.Helper()
		wantNames(t, filepath.Join(s.Root(), tmpDir))
	}
	t.Run("replace", func(t *testing.T) {
		s, tmp := make(t)
		if err := tmp.Replace(s.Kernel("1")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("replace of nothing: %v", err)
		}
		old := s.Kernel("1")
		if err := os.Mkdir(old, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(old, "old"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := tmp.Replace(old); err != nil {
			t.Fatal(err)
		}
		wantNames(t, old, "deep")
		gone(t, s)
		if err := tmp.Remove(); err != nil {
			t.Errorf("remove after replace: %v", err)
		}
		wantNames(t, old, "deep")
	})
	t.Run("commit", func(t *testing.T) {
		s, tmp := make(t)
		if err := tmp.Commit(s.Image("a")); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(filepath.Join(s.Image("a"), "deep", "er", "file")); err != nil || string(data) != "x" {
			t.Errorf("read %q, %v", data, err)
		}
		gone(t, s)
		if err := tmp.Remove(); err != nil {
			t.Errorf("remove after commit: %v", err)
		}
		if _, err := os.Stat(s.Image("a")); err != nil {
			t.Errorf("remove after commit took it away: %v", err)
		}
		if err := tmp.Commit(s.Image("b")); err == nil {
			t.Error("a second commit worked")
		}
	})
	for name, existing := range map[string]func(string) error{
		"a folder":       func(p string) error { return os.MkdirAll(filepath.Join(p, "x"), 0o700) },
		"an empty one":   func(p string) error { return os.Mkdir(p, 0o700) },
		"a file":         func(p string) error { return os.WriteFile(p, []byte("mine"), 0o600) },
		"a dead symlink": func(p string) error { return os.Symlink("nowhere", p) },
	} {
		t.Run("commit over "+name, func(t *testing.T) {
			s, tmp := make(t)
			if err := existing(s.Image("a")); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Lstat(s.Image("a"))
			if err := tmp.Commit(s.Image("a")); !errors.Is(err, fs.ErrExist) {
				t.Errorf("got %v", err)
			}
			if after, err := os.Lstat(s.Image("a")); err != nil || !os.SameFile(before, after) {
				t.Errorf("what was there is not: %v", err)
			}
			if err := tmp.Remove(); err != nil {
				t.Error(err)
			}
			gone(t, s)
		})
	}
	t.Run("remove twice", func(t *testing.T) {
		s, tmp := make(t)
		for range 2 {
			if err := tmp.Remove(); err != nil {
				t.Error(err)
			}
			gone(t, s)
		}
		if err := tmp.Commit(s.Image("a")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("commit after remove: %v", err)
		}
	})
	t.Run("what is no file or folder", func(t *testing.T) {
		s, tmp := make(t)
		if err := os.Symlink("/etc", filepath.Join(tmp.Path, "link")); err != nil {
			t.Fatal(err)
		}
		if err := tmp.Commit(s.Image("a")); err == nil {
			t.Error("a symlink came into the store")
		}
		if _, err := os.Lstat(s.Image("a")); !errors.Is(err, fs.ErrNotExist) {
			t.Error("refused, and there all the same")
		}
	})
	t.Run("two of one prefix", func(t *testing.T) {
		s, a := make(t)
		b, err := s.TempDir("image")
		if err != nil || a.Path == b.Path {
			t.Fatalf("%v, %v", b, err)
		}
	})
}

// Of many makers of one thing exactly one wins, and the losers leave nothing.
func TestCommitRace(t *testing.T) {
	s := open(t)
	const makers = 20
	var wg sync.WaitGroup
	won := make(chan string, makers)
	for i := range makers {
		wg.Go(func() {
			tmp, err := s.TempDir("image")
			if err != nil {
				t.Error(err)
				return
			}
			defer tmp.Remove()
			me := strconv.Itoa(i)
			if err := os.WriteFile(filepath.Join(tmp.Path, "who"), []byte(me), 0o600); err != nil {
				t.Error(err)
			}
			if err := tmp.Commit(s.Image("a")); err == nil {
				won <- me
			}
		})
	}
	wg.Wait()
	close(won)
	var winners []string
	for w := range won {
		winners = append(winners, w)
	}
	who, err := os.ReadFile(filepath.Join(s.Image("a"), "who"))
	if err != nil || len(winners) != 1 || winners[0] != string(who) {
		t.Errorf("winners %q, the folder is of %q, %v", winners, who, err)
	}
	wantNames(t, filepath.Join(s.Root(), tmpDir))
}

func TestSweep(t *testing.T) {
	s := open(t)
	mine, err := s.TempDir("mine")
	if err != nil {
		t.Fatal(err)
	}
	child, out := another(t, roleHold, s)
	if line, err := out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("the other process said %q, %v", line, err)
	}
	if err := os.MkdirAll(filepath.Join(s.Root(), trashDir, "left", "over"), 0o700); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(s.Root(), tmpDir)
	held := names(t, tmp)
	if len(held) != 3 { // mine, and its image and blob
		t.Fatalf("%s holds %q", tmp, held)
	}

	// While its owner lives, nothing of it is touched.
	if _, err := Open(s.Root()); err != nil {
		t.Fatal(err)
	}
	wantNames(t, tmp, held...)
	wantNames(t, filepath.Join(s.Root(), trashDir))
	if _, err := s.HoldVM(testVM); !errors.Is(err, ErrHeld) {
		t.Errorf("held by two: %v", err)
	}
	if _, _, err := s.Blobs().Open(digestOf('a')); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a blob is visible: %v", err)
	}

	if err := child.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	child.Wait()
	wantNames(t, tmp, held...) // so it was not the death itself that cleaned up
	if _, err := Open(s.Root()); err != nil {
		t.Fatal(err)
	}
	wantNames(t, tmp, filepath.Base(mine.Path))

	// Its VM stays, and can be taken over by one.
	hold, err := s.HoldVM(testVM)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.HoldVM(testVM); !errors.Is(err, ErrHeld) {
		t.Errorf("taken over by two: %v", err)
	}
	if err := s.Remove(s.VM(testVM)); err != nil {
		t.Error(err)
	}
	hold.Close()
	if _, err := s.HoldVM(testVM); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a VM that is gone: %v", err)
	}
	if err := mine.Remove(); err != nil {
		t.Error(err)
	}
}

// newVM makes the folder of a VM and takes the hold on it.
func newVM(t *testing.T, s *Store, id string) *os.File {
	t.Helper()
	if err := os.Mkdir(s.VM(id), 0o700); err != nil {
		t.Fatal(err)
	}
	hold, err := s.HoldVM(id)
	if err != nil {
		t.Fatal(err)
	}
	return hold
}

func TestVMIDs(t *testing.T) {
	s := open(t)
	for _, name := range []string{"0123456789ab", "0123456789a", "0123456789abc", "0123456789AB", "notes"} {
		if err := os.Mkdir(s.VM(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(t.TempDir(), s.VM("ba9876543210")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.VM("aaaaaaaaaaaa"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if ids, err := s.VMIDs(); err != nil || !slices.Equal(ids, []string{"0123456789ab"}) {
		t.Errorf("got %q, %v", ids, err)
	}
	for _, id := range []string{"ba9876543210", "aaaaaaaaaaaa"} {
		if hold, err := s.HoldVM(id); err == nil {
			hold.Close()
			t.Errorf("%s, which is no folder, was held", id)
		}
	}
}

// What Open removed, it names.
func TestSwept(t *testing.T) {
	s := open(t)
	if got := s.Swept(); len(got) != 0 {
		t.Errorf("a new folder: %q", got)
	}
	for _, dir := range []string{tmpDir + "/vm-1", trashDir + "/2"} {
		if err := os.Mkdir(filepath.Join(s.Root(), dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	again, err := Open(s.Root())
	if err != nil || !slices.Equal(again.Swept(), []string{"tmp/vm-1", "trash/2"}) {
		t.Errorf("got %q, %v", again.Swept(), err)
	}
}

// Many processes may open a folder, make and delete in it at once.
func TestOpenWhileOthersWork(t *testing.T) {
	s := open(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				if _, err := Open(s.Root()); err != nil {
					t.Errorf("open: %v", err)
				}
			}
		})
		wg.Go(func() {
			for range 25 {
				id := NewID()
				if err := os.Mkdir(s.VM(id), 0o700); err != nil {
					t.Error(err)
				}
				hold, err := s.HoldVM(id)
				if err != nil {
					t.Errorf("hold: %v", err)
					return
				}
				os.WriteFile(filepath.Join(s.VM(id), "disk"), nil, 0o600)
				if err := s.Remove(s.VM(id)); err != nil {
					t.Errorf("remove: %v", err)
				}
				hold.Close()
			}
		})
		wg.Go(func() {
			for range 25 {
				tmp, err := s.TempDir("x")
				if err != nil {
					t.Errorf("temp: %v", err)
					return
				}
				if err := tmp.Commit(s.Image(NewID())); err != nil {
					t.Errorf("commit: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(names(t, s.Images())); n != 100 {
		t.Errorf("%d images, want 100", n)
	}
	wantNames(t, s.VMs())
	wantNames(t, filepath.Join(s.Root(), trashDir))
}

const countRounds = 25

// addOne adds to a counter in a file with a read and a write that nothing but
// the lock keeps together.
func addOne(s *Store) error {
	unlock, err := s.Lock(context.Background(), "count")
	if err != nil {
		return err
	}
	defer unlock()
	path := filepath.Join(s.Root(), "count")
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	n, _ := strconv.Atoi(string(data))
	time.Sleep(100 * time.Microsecond)
	return os.WriteFile(path, []byte(strconv.Itoa(n+1)), 0o600)
}

func TestLockExcludes(t *testing.T) {
	s := open(t)
	var wg sync.WaitGroup
	var children []*exec.Cmd
	for range 2 {
		child, _ := another(t, roleCount, s)
		children = append(children, child)
	}
	for range 2 {
		wg.Go(func() {
			for range countRounds {
				if err := addOne(s); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, child := range children {
		if err := child.Wait(); err != nil {
			t.Error(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(s.Root(), "count"))
	if want := strconv.Itoa(4 * countRounds); err != nil || string(data) != want {
		t.Errorf("counted %s, %v; want %s", data, err, want)
	}
}

func TestLockEndsWithItsOwner(t *testing.T) {
	s := open(t)
	child, out := another(t, roleHold, s)
	if line, err := out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("the other process said %q, %v", line, err)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(context.Background())
	time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
	if _, err := s.Lock(ctx, "held"); !errors.Is(err, cause) {
		t.Fatalf("got %v, want the cause of the end", err)
	}
	unlock, err := s.Lock(ctx, "other")
	if err != nil {
		t.Fatalf("a lock that is free was refused: %v", err)
	}
	unlock()
	unlock() // twice is once

	child.Process.Signal(syscall.SIGKILL)
	child.Wait()
	ctx, cancelTimeout := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancelTimeout()
	unlock, err = s.Lock(ctx, "held")
	if err != nil {
		t.Fatalf("after its owner was killed: %v", err)
	}
	unlock()
}

func TestRemove(t *testing.T) {
	s := open(t)
	outside := filepath.Join(filepath.Dir(s.Root()), "outside")
	neighbour := s.Root() + "-neighbour"
	for _, dir := range []string{outside, neighbour, s.Image("a/b")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{
		"", "/", ".", s.Root(), outside, neighbour,
		s.Root() + "/../outside", s.Images() + "/../../outside", s.Images() + "/a/../../../outside",
		s.Images(), s.Images() + "/", s.Images() + "/.", s.Images() + "/..", s.Image(""), s.Image(".."),
		s.Image("a") + "/", s.Image("a/b"), s.VMs(), s.Kernels(),
		filepath.Join(s.Root(), blobsDir, "sha256"), filepath.Join(s.Root(), locksDir, "sweep.lock"),
	} {
		if err := s.Remove(dir); err == nil {
			t.Errorf("%q was removed", dir)
		}
	}
	for _, dir := range []string{outside, neighbour, s.Image("a/b")} {
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("%v", err)
		}
	}
	if err := s.Remove(s.Image("a")); err != nil {
		t.Error(err)
	}
	if err := s.Remove(s.Image("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed twice: %v", err)
	}
	wantNames(t, s.Images())
	wantNames(t, filepath.Join(s.Root(), trashDir))
}
