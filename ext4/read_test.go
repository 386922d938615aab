//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"banger/ext4/internal/e2fs"
)

// mkfs makes a file system with mke2fs in a sparse file.
func mkfs(t testing.TB, sizeBytes int64, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	must(t, err)
	must(t, f.Truncate(sizeBytes))
	must(t, f.Close())
	if out, exit := e2fs.Run(t, "mke2fs", append(append([]string{"-q", "-F"}, args...), path)...); exit != 0 {
		t.Fatalf("mke2fs %q: %s", args, out)
	}
	return path
}

// flavours are the file systems that others make, by what is special in each.
var flavours = []struct {
	name string
	args []string
	tune []string // debugfs commands after that
}{
	{"ext2 revision 0", []string{"-t", "ext2", "-r", "0", "-b", "1024"}, nil},
	{"ext2 1k", []string{"-t", "ext2", "-b", "1024"}, nil},
	{"ext2 4k", []string{"-t", "ext2", "-b", "4096"}, nil},
	{"ext2 without filetype", []string{"-t", "ext2", "-O", "^filetype"}, nil},
	{"ext3 1k", []string{"-t", "ext3", "-b", "1024"}, nil},
	{"ext3 2k", []string{"-t", "ext3", "-b", "2048"}, nil},
	{"ext3 4k inodes of 128", []string{"-t", "ext3", "-b", "4096", "-I", "128"}, nil},
	{"ext4 1k", []string{"-t", "ext4", "-b", "1024"}, nil},
	{"ext4 2k", []string{"-t", "ext4", "-b", "2048"}, nil},
	{"ext4 4k", []string{"-t", "ext4", "-b", "4096"}, nil},
	{"ext4 inodes of 128", []string{"-t", "ext4", "-I", "128"}, nil},
	{"ext4 inodes of 1024", []string{"-t", "ext4", "-I", "1024"}, nil},
	{"without extents", []string{"-t", "ext4", "-O", "^extents,^64bit", "-b", "1024"}, nil},
	{"without metadata_csum", []string{"-t", "ext4", "-O", "^metadata_csum"}, nil},
	{"uninit_bg", []string{"-t", "ext4", "-O", "^metadata_csum,uninit_bg"}, nil},
	{"without 64bit", []string{"-t", "ext4", "-O", "^64bit"}, nil},
	{"without flex_bg", []string{"-t", "ext4", "-O", "^flex_bg"}, nil},
	{"without dir_index", []string{"-t", "ext4", "-O", "^dir_index"}, nil},
	{"without journal", []string{"-t", "ext4", "-O", "^has_journal"}, nil},
	{"without sparse_super", []string{"-t", "ext4", "-O", "^sparse_super,^resize_inode", "-b", "1024"}, nil},
	{"inline_data", []string{"-t", "ext4", "-O", "inline_data"}, nil},
	{"inline_data inodes of 1024", []string{"-t", "ext4", "-O", "inline_data", "-I", "1024"}, nil},
	{"ea_inode", []string{"-t", "ext4", "-O", "ea_inode"}, nil},
	{"ea_inode 1k", []string{"-t", "ext4", "-O", "ea_inode", "-b", "1024"}, nil},
	{"metadata_csum_seed", []string{"-t", "ext4", "-O", "metadata_csum_seed"}, nil},
	{"large_dir 1k", []string{"-t", "ext4", "-O", "large_dir", "-b", "1024"}, nil},
	{"meta_bg", []string{"-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"}, nil},
	{"sparse_super2", []string{"-t", "ext4", "-O", "sparse_super2,^resize_inode", "-b", "1024"}, nil},
	{"bigalloc", []string{"-t", "ext4", "-O", "bigalloc", "-C", "16384"}, nil},
	{"orphan_file", []string{"-t", "ext4", "-O", "orphan_file"}, nil},
	{"mmp", []string{"-t", "ext4", "-O", "mmp"}, nil},
	{"fast_commit", []string{"-t", "ext4", "-O", "fast_commit"}, nil},
	{"hash tea", []string{"-t", "ext4"}, []string{"ssv def_hash_version 2"}},
	{"hash legacy", []string{"-t", "ext4"}, []string{"ssv def_hash_version 0"}},
	{"hash unsigned", []string{"-t", "ext4"}, []string{"ssv flags 2"}},
	{"hash tea unsigned 1k", []string{"-t", "ext4", "-b", "1024"}, []string{"ssv def_hash_version 2", "ssv flags 2"}},
	{"hash legacy unsigned", []string{"-t", "ext4"}, []string{"ssv def_hash_version 0", "ssv flags 2"}},
	{"small groups", []string{"-t", "ext4", "-g", "1024", "-b", "1024"}, nil},
}

// populate has the kernel put one of each into a mounted file system.
func populate(t testing.TB, dir string) { populateWith(t, dir, 1500) }

// populateWith has as many entries in the largest directory.
func populateWith(t testing.TB, dir string, most int) {
	t.Helper()
	try := func(err error, what string) {
		t.Helper()
		if err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	at := func(elem ...string) string { return filepath.Join(append([]string{dir}, elem...)...) }
	for _, n := range []int{0, 1, 59, 60, 61, 100, 160, 161, 800, 1023, 1024, 1025, 4095, 4096, 4097, 100_000, 3_000_001} {
		must(t, os.WriteFile(at(fmt.Sprintf("size-%d", n)), bytes.Repeat([]byte("0123456789abcde"), n/15+1)[:n], 0o640))
	}
	// Blocks at every level of a block map, and a hole at the end.
	f, err := os.Create(at("sparse"))
	must(t, err)
	for _, offset := range []int64{0, 5000, 11 << 10, 12 << 10, 300 << 10, 70 << 20, 5 << 30} {
		if _, err := f.WriteAt([]byte(fmt.Sprint("at ", offset)), offset); err != nil && !errors.Is(err, syscall.EFBIG) {
			t.Fatal(err)
		}
	}
	must(t, f.Close())
	f, err = os.Create(at("striped"))
	must(t, err)
	for i := range int64(600) {
		_, err := f.WriteAt([]byte{byte(i) | 1}, i*8192)
		must(t, err)
	}
	must(t, f.Truncate(600*8192+100_000))
	must(t, f.Close())
	f, err = os.Create(at("unwritten"))
	must(t, err)
	try(syscall.Fallocate(int(f.Fd()), 0, 0, 1<<20), "fallocate")
	_, err = f.WriteAt([]byte("some"), 512<<10)
	must(t, err)
	must(t, f.Close())
	for _, n := range []int{1, 59, 60, 61, 900, 1023} {
		must(t, os.Symlink(strings.Repeat("t", n), at(fmt.Sprintf("link-%d", n))))
	}
	if os.Symlink(strings.Repeat("t", 4095), at("link-4095")) != nil {
		t.Log("no symlink of 4095 bytes") // blocks of 1 KiB
	}
	must(t, os.Symlink("/deep/er", at("absolute")))
	must(t, os.Symlink("../../../size-1", at("escape")))
	must(t, os.MkdirAll(at("deep/er/still"), 0o750))
	must(t, os.WriteFile(at("deep/er/still/file"), []byte("here"), 0o600))
	must(t, os.Link(at("deep/er/still/file"), at("hard")))
	must(t, os.Link(at("hard"), at("deep/hard")))
	must(t, os.Mkdir(at("empty"), 0o1777))
	must(t, os.Mkdir(at("few"), 0o2755))
	for i := range 4 {
		must(t, os.WriteFile(at("few", fmt.Sprint(i)), nil, 0o600))
	}
	for _, n := range []int{40, most} {
		many := at(fmt.Sprintf("many-%d", n))
		must(t, os.Mkdir(many, 0o755))
		for i := range n {
			must(t, os.WriteFile(filepath.Join(many, highBytes(i)), nil, 0o600))
		}
		for i := 0; i < n; i += 3 {
			must(t, os.Remove(filepath.Join(many, highBytes(i))))
		}
	}
	must(t, syscall.Mknod(at("null"), syscall.S_IFCHR|0o666, 1<<8|3))
	must(t, syscall.Mknod(at("big"), syscall.S_IFBLK|0o600, 259<<8|70000&0xFF|(70000&^0xFF)<<12))
	must(t, syscall.Mkfifo(at("fifo"), 0o4644))
	must(t, syscall.Mknod(at("socket"), syscall.S_IFSOCK|0o755, 0))
	must(t, os.Chown(at("size-1"), 3_000_000_000, 70000))
	must(t, os.Chmod(at("size-1"), 0o755|os.ModeSetuid|os.ModeSetgid))
	for name, when := range map[string]time.Time{"size-59": time.Unix(-1e9, 5), "size-60": time.Unix(1e10, 123456789), "size-61": time.Unix(1700000000, 999999999)} {
		must(t, os.Chtimes(at(name), when, when.Add(time.Hour)))
	}
	// ACLs take an id for each named user, so use some.
	for _, x := range []struct {
		path, name string
		value      []byte
	}{
		{"size-100", "user.small", []byte("v")}, {"size-100", "user.empty", nil}, {"size-100", "trusted.t", []byte("tt")},
		{"size-160", "user.mid", bytes.Repeat([]byte("m"), 300)}, {"size-160", "security.capability", []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
		{"size-161", "user.large", bytes.Repeat([]byte("l"), 900)}, {"size-0", aclAccess, fullACL}, {"few", aclDefault, fullACL}, {"few", aclAccess, fullACL},
		{"size-800", "user.huge", bytes.Repeat([]byte("huge"), 5000)}, {"size-1023", "user.huge", bytes.Repeat([]byte("huge"), 5000)}, {"size-1024", "user.most", bytes.Repeat([]byte("most"), 16384)},
	} {
		err := lsetxattr(at(x.path), x.name, x.value)
		if len(x.value) > 3000 && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.E2BIG)) {
			continue // no ea_inode
		}
		try(err, x.path+": "+x.name)
	}
	// Equal xattrs share a block.
	for i := range 3 {
		path := at("few", fmt.Sprint(i))
		try(lsetxattr(path, "user.shared", bytes.Repeat([]byte("s"), 700)), path)
	}
}

func lsetxattr(path, name string, value []byte) error {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	q, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	v := append(bytes.Clone(value), 0)
	_, _, errno := syscall.Syscall6(syscall.SYS_LSETXATTR, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(q)), uintptr(unsafe.Pointer(&v[0])), uintptr(len(value)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// flavoured makes a file system of one flavour, filled by the kernel.
func flavoured(t testing.TB, args, tune []string) string {
	t.Helper()
	image := mkfs(t, 64*mib, args...)
	for _, command := range tune {
		if out, exit := e2fs.Run(t, "debugfs", "-w", "-R", command, image); exit != 0 {
			t.Fatal(out)
		}
	}
	dir, unmount := e2fs.Mount(t, image, "rw")
	populate(t, dir)
	unmount()
	return image
}

// What others made reads the way it mounts.
func TestReadFlavours(t *testing.T) {
	for _, c := range flavours {
		t.Run(c.name, func(t *testing.T) {
			sameAsKernel(t, flavoured(t, c.args, c.tune))
		})
	}
}

// A file system that this kernel may not write, filled by mke2fs.
func TestReadQuota(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "deep/er"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "deep/er/file"), bytes.Repeat([]byte("x"), 100_000), 0o600))
	must(t, os.Symlink("deep", filepath.Join(dir, "link")))
	sameAsKernel(t, mkfs(t, 64*mib, "-t", "ext4", "-O", "quota,project,verity", "-d", dir))
}

// Inside an image a path goes where it would for a process whose root it is.
func TestResolve(t *testing.T) {
	fsys := openImage(t, flavoured(t, []string{"-t", "ext4"}, nil))
	for path, want := range map[string]string{
		"absolute/still/file": "here", "escape": "0", "deep/hard": "here",
	} {
		if got, err := fsys.ReadFile(path); string(got) != want {
			t.Errorf("%q: %q, %v", path, got, err)
		}
	}
	for path, reason := range map[string]string{
		"": "invalid", "/": "invalid", "deep/": "invalid", "deep//er": "invalid", "deep/..": "invalid", "./deep": "invalid", "a\x00": "invalid",
		"nothing": "not exist", "deep/nothing": "not exist", "size-1/x": "not a directory", "link-59": "not exist",
	} {
		if _, err := fsys.Stat(path); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: %v, want %q", path, err, reason)
		}
	}
}

// Symlinks in a circle end.
func TestResolveLoop(t *testing.T) {
	loop := func(target string) *file { return &file{Inode: Inode{Mode: 0o120777, Target: target}} }
	files := tree{"a": loop("b"), "b": loop("a/x"), "self": loop("self")}
	for i := range 41 {
		files[fmt.Sprintf("l%d", i)] = loop(fmt.Sprintf("l%d", i+1))
	}
	files["l41"] = regular("end")
	fsys := openImage(t, build(t, files, params(mib)))
	for _, path := range []string{"a", "self", "l0"} {
		if _, err := fsys.Stat(path); err == nil || !strings.Contains(err.Error(), "too many symlinks") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := fsys.Stat("l1"); err != nil {
		t.Errorf("40 symlinks: %v", err)
	}
}

// What cannot be read is refused by name.
func TestRefusedFeatures(t *testing.T) {
	for _, c := range []struct {
		reason string
		args   []string
	}{
		{"encrypt", []string{"-t", "ext4", "-O", "encrypt"}},
		{"casefold", []string{"-t", "ext4", "-O", "casefold"}},
		{"journal_dev", []string{"-O", "journal_dev"}},
		{"block size 8 KiB", []string{"-t", "ext4", "-b", "8192"}},
		{"block size 64 KiB", []string{"-t", "ext4", "-b", "65536"}},
	} {
		image := mkfs(t, 64*mib, c.args...)
		f, err := os.Open(image)
		must(t, err)
		defer f.Close()
		if _, err := Open(f); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%q: %v", c.reason, err)
		}
	}
	for row, data := range map[string][]byte{
		"empty": nil, "short": make([]byte, 2047), "zeros": make([]byte, 1<<20), "text": bytes.Repeat([]byte("not an image"), 1000),
	} {
		if _, err := Open(bytes.NewReader(data)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", row, err)
		}
	}
	broken := errors.New("broken")
	if _, err := Open(failingReader{broken}); !errors.Is(err, broken) || errors.Is(err, ErrCorrupt) {
		t.Errorf("a failing reader: %v", err)
	}
}

type failingReader struct{ err error }

func (r failingReader) ReadAt([]byte, int64) (int, error) { return 0, r.err }

var _ io.ReaderAt = failingReader{}

func lremove(path, name *byte) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_LREMOVEXATTR, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(name)), 0); errno != 0 {
		return errno
	}
	return nil
}
