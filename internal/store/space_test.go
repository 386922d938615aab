package store

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const spaceVar = "BANGER_TEST_STORE_SPACE" // set in the process that has the small disk

// onSmallDisk runs the calling test again in a process with a mount namespace
// of its own, in which dir is a tmpfs of sizeBytes; there it returns true. An
// ordinary user gets that through a user namespace, where the host allows it.
func onSmallDisk(t *testing.T, size string) (dir string, inside bool) {
	t.Helper()
	if dir := os.Getenv(spaceVar); dir != "" {
		if err := syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
			t.Fatal(err)
		}
		return dir, true
	}
	var out []byte
	var err error
	for _, flags := range []uintptr{syscall.CLONE_NEWNS, syscall.CLONE_NEWNS | syscall.CLONE_NEWUSER} {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), spaceVar+"="+t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		if flags&syscall.CLONE_NEWUSER != 0 {
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
		}
		if out, err = cmd.CombinedOutput(); err == nil {
			if !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
				t.Fatalf("the test did not run:\n%s", out)
			}
			return "", false
		}
		if !errors.Is(err, syscall.EPERM) {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("cannot test: no file system can be filled, neither as root nor in a user namespace: %v", err)
	}
	t.Skipf("NOT TESTED: no file system can be filled, neither as root nor in a user namespace: %v", err)
	return "", false
}

// fill writes a file until the disk is full to the last byte.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, n := range []int{64 << 10, 4 << 10, 1} {
		for {
			if _, err := f.Write(make([]byte, n)); errors.Is(err, syscall.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestFullDisk(t *testing.T) {
	dir, inside := onSmallDisk(t, "1m")
	if !inside {
		return
	}
	s, err := Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(s.Images(), "names.json")
	if err := WriteJSON(record, 1, sample{Name: "old"}); err != nil {
		t.Fatal(err)
	}
	hold := newVM(t, s, testVM)
	tmp, err := s.TempDir("image")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tmp.Path, "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	arriving, err := s.Blobs().Create(digestOf('b'))
	if err != nil {
		t.Fatal(err)
	}
	fill(t, filepath.Join(dir, "ballast"))

	// Writing fails whole: the old is there, nothing else is.
	for _, n := range []int{1, 4096, 100_000} {
		err := WriteJSON(record, 1, sample{Name: strings.Repeat("n", n)})
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("record of %d bytes on a full disk: %v", n, err)
		}
	}
	var got sample
	if err := ReadJSON(record, 1, &got); err != nil || got.Name != "old" {
		t.Errorf("the old record is %+v, %v", got, err)
	}
	wantNames(t, s.Images(), "names.json")

	if _, err := io.WriteString(arriving, strings.Repeat("x", 8192)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("blob on a full disk: %v", err)
	}
	if err := arriving.Abort(); err != nil {
		t.Error(err)
	}
	if err := putBlob(s, digestOf('a'), "new"); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("new blob on a full disk: %v", err)
	}
	if digests, err := s.Blobs().Digests(); err != nil || len(digests) != 0 {
		t.Errorf("blobs %q, %v", digests, err)
	}
	wantNames(t, filepath.Join(s.Root(), tmpDir), filepath.Base(tmp.Path))

	// Opening and deleting work with no byte free.
	if _, err := Open(s.Root()); err != nil {
		t.Errorf("open on a full disk: %v", err)
	}
	if err := tmp.Remove(); err != nil {
		t.Errorf("remove on a full disk: %v", err)
	}
	if err := s.Remove(s.VM(testVM)); err != nil {
		t.Errorf("delete on a full disk: %v", err)
	}
	hold.Close()

	// And with room again everything does.
	if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
		t.Fatal(err)
	}
	if err := WriteJSON(record, 1, sample{Name: "new"}); err != nil {
		t.Error(err)
	}
	if err := putBlob(s, digestOf('a'), "new"); err != nil {
		t.Error(err)
	}
}
