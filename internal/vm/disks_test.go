package vm

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"banger"
)

func TestUUID(t *testing.T) {
	var u [16]byte
	for i := range u {
		u[i] = byte(i * 0x11)
	}
	if got, want := formatUUID(u), "00112233-4455-6677-8899-aabbccddeeff"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := formatUUID([16]byte{}), "00000000-0000-0000-0000-000000000000"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := map[string]bool{}
	for range 1000 {
		s := formatUUID(newUUID())
		if !form.MatchString(s) || seen[s] {
			t.Fatalf("%s is no random UUID, or the second of its kind", s)
		}
		seen[s] = true
	}
}

// need finds a tool; where checks are binding it must be there.
func need(t *testing.T, tool string) string {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		if path = "/usr/sbin/" + tool; exec.Command(path, "-V").Run() == nil {
			return path
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing", tool)
		}
		t.Skipf("NOT TESTED: %s is missing", tool)
	}
	return path
}

func TestCreateDisk(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name      string
		sizeBytes int64
		mode      uint16
	}{
		{"overlay", banger.DefaultOverlayDiskBytes, overlayDirMode},
		{"work", 64 << 20, workDirMode},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, c.name)
			uuid, err := createDisk(path, c.sizeBytes, c.name, c.mode)
			if err != nil {
				t.Fatal(err)
			}
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if st.Size() != c.sizeBytes || st.Mode() != 0o600 {
				t.Errorf("%d bytes, mode %v", st.Size(), st.Mode())
			}
			if held := st.Sys().(*syscall.Stat_t).Blocks * 512; held > 16<<20 {
				t.Errorf("it occupies %d bytes", held)
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var inBlock [16]byte
			if _, err := f.ReadAt(inBlock[:], 1024+0x68); err != nil || inBlock != uuid {
				t.Errorf("the superblock says %x, createDisk %x, %v", inBlock, uuid, err)
			}
			fsck := func() ([]byte, error) { return exec.Command(need(t, "e2fsck"), "-fn", path).CombinedOutput() }
			if out, err := fsck(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
			if c.sizeBytes > 1<<30 {
				return // a big one takes seconds to be found broken
			}
			// It would have complained.
			w, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			if _, err := w.WriteAt(bytes.Repeat([]byte{0xff}, 64), 4096+12); err != nil {
				t.Fatal(err)
			}
			if _, err := fsck(); err == nil {
				t.Error("e2fsck finds broken block group descriptors clean")
			}
		})
	}
}

func TestCreateDiskIsExclusive(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "work")
	if err := os.WriteFile(path, []byte("my work"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, link} {
		if _, err := createDisk(p, 1<<30, "work", workDirMode); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "my work" {
		t.Errorf("the disk holds %q, %v", data, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "elsewhere")); err == nil {
		t.Error("made through a symlink")
	}
}

func TestCreateDiskRefusesSizes(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int64{-1, 0, 1, 4096} {
		if _, err := createDisk(filepath.Join(dir, "disk"), size, "x", workDirMode); err == nil {
			t.Errorf("%d bytes: made", size)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 0 {
			t.Errorf("%d bytes: %v is left", size, entries)
		}
	}
}

const spaceVar = "BANGER_TEST_VM_SPACE" // set in the process that has the small disk

// On a disk with no room for a file system nothing of it stays.
func TestCreateDiskWithoutSpace(t *testing.T) {
	dir := os.Getenv(spaceVar)
	if dir == "" {
		inNamespace(t)
		return
	}
	if err := syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	for _, size := range []string{"4k", "16k", "64k"} {
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		_, err := createDisk(filepath.Join(dir, "disk"), banger.DefaultOverlayDiskBytes, "x", overlayDirMode)
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("on %s: %v", size, err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 0 {
			t.Errorf("on %s: %v is left", size, entries)
		}
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}
}

// inNamespace runs the calling test again where it may mount: as root, or in
// a user namespace where the host allows that.
func inNamespace(t *testing.T) {
	t.Helper()
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
			if !strings.Contains(string(out), "--- PASS: "+t.Name()) {
				t.Fatalf("the test did not run:\n%s", out)
			}
			return
		}
		if !errors.Is(err, syscall.EPERM) {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("cannot test: no file system can be filled, neither as root nor in a user namespace: %v", err)
	}
	t.Skipf("NOT TESTED: no file system can be filled, neither as root nor in a user namespace: %v", err)
}

func BenchmarkCreateDisk(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk")
	for b.Loop() {
		if _, err := createDisk(path, banger.DefaultOverlayDiskBytes, "overlay", overlayDirMode); err != nil {
			b.Fatal(err)
		}
		os.Remove(path)
	}
}
