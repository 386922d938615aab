//go:build linux

package ext4

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"banger/ext4/internal/disk"
	"banger/ext4/internal/e2fs"
)

// A file is an Inode as a test wants it, with its bytes.
type file struct {
	Inode
	pieces []piece // in order; what lies between is zeros
	size   int64
	free   bool // holes are not compared
}

type piece struct {
	at   int64
	data []byte
}

func (f *file) reader() io.Reader { return &pieceReader{f: f} }

type pieceReader struct {
	f  *file
	at int64
}

func (r *pieceReader) Read(p []byte) (int, error) {
	if r.at == r.f.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), r.f.size-r.at))
	clear(p[:n])
	first := sort.Search(len(r.f.pieces), func(i int) bool {
		return r.f.pieces[i].at+int64(len(r.f.pieces[i].data)) > r.at
	})
	for _, piece := range r.f.pieces[first:] {
		from := piece.at - r.at
		if from >= int64(n) {
			break
		}
		copy(p[max(from, 0):n], piece.data[max(-from, 0):])
	}
	r.at += int64(n)
	return n, nil
}

// dataBlocks gives the blocks that must not be holes.
func (f *file) dataBlocks() map[int64]bool {
	blocks := make(map[int64]bool)
	for _, p := range f.pieces {
		for i, c := range p.data {
			if c != 0 {
				blocks[(p.at+int64(i))/disk.BlockSize] = true
			}
		}
	}
	return blocks
}

func regular(data string) *file {
	f := &file{Inode: Inode{Mode: 0o100644}, size: int64(len(data))}
	if data != "" {
		f.pieces = []piece{{0, []byte(data)}}
	}
	return f
}

func directoryFile() *file { return &file{Inode: Inode{Mode: 0o040755}} }

// tree is files by path; the same *file twice is a hard link.
type tree map[string]*file

var (
	testTime = time.Unix(1700000000, 123456789)
	testUUID = [16]byte{0xb4, 1, 2, 3, 4, 5, 0x46, 7, 0x88, 9, 10, 11, 12, 13, 14, 15}
	testSeed = [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9}
)

func params(sizeBytes int64) Params {
	return Params{SizeBytes: sizeBytes, UUID: testUUID, HashSeed: testSeed, Time: testTime}
}

func newImage(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fill adds a whole tree, in the order of the paths.
func fill(t testing.TB, w *Writer, files tree) {
	t.Helper()
	for _, path := range slices.Sorted(maps.Keys(files)) {
		f := files[path]
		if f.size > 0 && f.Content == nil {
			c, err := w.Place(f.reader(), f.size)
			must(t, err)
			f.Content = c
		}
		must(t, w.Add(path, &f.Inode))
	}
}

// build makes an image of a tree; e2fsck must like it.
func build(t testing.TB, files tree, p Params) (path string) {
	t.Helper()
	f := newImage(t)
	w, err := NewWriter(f, Options{})
	must(t, err)
	fill(t, w, files)
	must(t, w.Finish(p))
	e2fs.Clean(t, f.Name())
	return f.Name()
}

// roundTrip builds, mounts and compares.
func roundTrip(t testing.TB, files tree, p Params) {
	t.Helper()
	image := build(t, files, p)
	dir, unmount := e2fs.Mount(t, image, "ro")
	for _, d := range compare(dir, files) {
		t.Error(d)
	}
	unmount()
}

// compare gives the differences between what is mounted at dir and a tree.
func compare(dir string, files tree) (diffs []string) {
	report := func(path, format string, args ...any) {
		diffs = append(diffs, fmt.Sprintf("%q: ", path)+fmt.Sprintf(format, args...))
	}
	names := make(map[*file]uint64)
	subdirs := make(map[string]uint64)
	for path, f := range files {
		names[f]++
		if f.Mode&disk.TypeMask == disk.TypeDir && path != "/" {
			subdirs[filepath.Dir(path)]++
		}
	}
	inodes := make(map[*file]uint64)
	for path, f := range files {
		full := filepath.Join(dir, path)
		var st syscall.Stat_t
		if err := syscall.Lstat(full, &st); err != nil {
			report(path, "lstat: %v", err)
			continue
		}
		check := func(what string, got, want any) {
			if got != want {
				report(path, "%s is %v, not %v", what, got, want)
			}
		}
		check("mode", st.Mode, uint32(f.Mode))
		check("uid", st.Uid, f.UID)
		check("gid", st.Gid, f.GID)
		when := func(t time.Time) syscall.Timespec {
			if t.IsZero() {
				t = testTime
			}
			return syscall.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
		}
		check("atime", st.Atim, when(f.Atime))
		check("mtime", st.Mtim, when(f.Mtime))
		check("ctime", st.Ctim, when(f.Ctime))
		links := names[f]
		switch f.Mode & disk.TypeMask {
		case disk.TypeDir:
			if links = subdirs[path] + 2; path == "/" {
				links = subdirs["."] + 2
				if files["lost+found"] == nil {
					links++
				}
			}
			if links >= MaxLinks {
				links = 1
			}
		case disk.TypeSymlink:
			target, err := os.Readlink(full)
			if err != nil || target != f.Target {
				report(path, "target is %.40q (%v), not %.40q", target, err, f.Target)
			}
			check("size", st.Size, int64(len(f.Target)))
		case disk.TypeChar, disk.TypeBlock:
			const minorLow = 0xFF
			check("device", st.Rdev, uint64(f.Minor&minorLow|f.Major<<8|(f.Minor&^minorLow)<<12))
		case disk.TypeRegular:
			check("size", st.Size, f.size)
			if err := compareBytes(full, f); err != nil {
				report(path, "%v", err)
			}
		}
		check("links", uint64(st.Nlink), links)
		if ino, ok := inodes[f]; ok {
			check("inode of a hard link", st.Ino, ino)
		}
		inodes[f] = st.Ino
		got, err := xattrsOf(full)
		if err != nil {
			report(path, "%v", err)
		}
		if !maps.EqualFunc(got, f.Xattrs, bytes.Equal) {
			report(path, "xattrs are %.200q, not %.200q", got, f.Xattrs)
		}
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if files[rel] == nil && rel != "." && rel != "lost+found" {
			report(rel, "should not be there")
		}
		return nil
	})
	if err != nil {
		report(".", "%v", err)
	}
	return diffs
}

// compareBytes looks at data and holes apart, so that large sparse files are
// cheap.
func compareBytes(path string, f *file) error {
	r, err := os.Open(path)
	if err != nil {
		return err
	}
	defer r.Close()
	want := f.dataBlocks()
	const seekData, seekHole = 3, 4
	found := 0
	for at := int64(0); at < f.size; {
		from, err := r.Seek(at, seekData)
		if err != nil {
			break // no more data
		}
		to, err := r.Seek(from, seekHole)
		if err != nil {
			return err
		}
		for from < to {
			n := min(to-from, disk.BlockSize)
			got, expected := make([]byte, n), make([]byte, n)
			if _, err := r.ReadAt(got, from); err != nil {
				return fmt.Errorf("reading at %d: %w", from, err)
			}
			if _, err := io.ReadFull(&pieceReader{f, from}, expected); err != nil {
				return err
			}
			if !bytes.Equal(got, expected) {
				return fmt.Errorf("bytes differ in the block at %d", from)
			}
			if want[from/disk.BlockSize] {
				found++
			} else if !f.free {
				return fmt.Errorf("data at %d, where a hole should be", from)
			}
			from += n
		}
		at = to
	}
	if found != len(want) {
		return fmt.Errorf("%d blocks with data, not %d", found, len(want))
	}
	return nil
}

// xattrsOf lists without following symlinks, nil if there are none.
func xattrsOf(path string) (map[string][]byte, error) {
	call := func(number uintptr, name string) ([]byte, error) {
		p, err := syscall.BytePtrFromString(path)
		if err != nil {
			return nil, err
		}
		buf := make([]byte, 64<<10)
		var n uintptr
		var errno syscall.Errno
		if name == "" {
			n, _, errno = syscall.Syscall(number, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		} else {
			q, err := syscall.BytePtrFromString(name)
			if err != nil {
				return nil, err
			}
			n, _, errno = syscall.Syscall6(number, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(q)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
		}
		if errno != 0 {
			return nil, fmt.Errorf("xattr %q: %w", name, errno)
		}
		return buf[:n], nil
	}
	list, err := call(syscall.SYS_LLISTXATTR, "")
	if err != nil || len(list) == 0 {
		return nil, err
	}
	set := make(map[string][]byte)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if set[name], err = call(syscall.SYS_LGETXATTR, name); err != nil {
			return nil, err
		}
	}
	return set, nil
}

// acl makes the system call form of a POSIX ACL from tag, permission, id.
func acl(entries ...[3]uint32) []byte {
	v := le.AppendUint32(nil, 2)
	for _, e := range entries {
		v = le.AppendUint16(v, uint16(e[0]))
		v = le.AppendUint16(v, uint16(e[1]))
		v = le.AppendUint32(v, e[2])
	}
	return v
}

const noID = ^uint32(0)

var fullACL = acl([3]uint32{1, 7, noID}, [3]uint32{2, 6, 1000}, [3]uint32{2, 4, 70000}, [3]uint32{4, 5, noID},
	[3]uint32{8, 1, 3000000000}, [3]uint32{0x10, 7, noID}, [3]uint32{0x20, 4, noID})

// The comparison itself must be able to fail, on everything it looks at.
func TestCompareFails(t *testing.T) {
	make1 := func() tree {
		link := regular("linked")
		sparse := &file{Inode: Inode{Mode: 0o100644}, size: 40960, pieces: []piece{{8192, []byte("data")}}}
		dev := &file{Inode: Inode{Mode: 0o020600, Major: 300, Minor: 70000}}
		sym := &file{Inode: Inode{Mode: 0o120777, Target: "there"}}
		x := regular("x")
		x.Xattrs = map[string][]byte{"user.a": []byte("1"), aclAccess: fullACL}
		x.Mode = 0o100774
		return tree{"d": directoryFile(), "d/e": directoryFile(), "f": regular("hello"), "l1": link, "l2": link,
			"sparse": sparse, "dev": dev, "sym": sym, "x": x}
	}
	image := build(t, make1(), params(16<<20))
	dir, _ := e2fs.Mount(t, image, "ro")
	if diffs := compare(dir, make1()); len(diffs) != 0 {
		t.Fatalf("differences in an equal tree: %q", diffs)
	}
	for _, c := range []struct {
		what   string
		change func(tree)
	}{
		{"mode", func(f tree) { f["f"].Mode = 0o100600 }},
		{"uid", func(f tree) { f["f"].UID = 1 }},
		{"gid", func(f tree) { f["f"].GID = 1 }},
		{"atime", func(f tree) { f["f"].Atime = testTime.Add(1) }},
		{"mtime", func(f tree) { f["f"].Mtime = testTime.Add(1) }},
		{"ctime", func(f tree) { f["f"].Ctime = testTime.Add(1) }},
		{"target", func(f tree) { f["sym"].Target = "thers" }},
		{"device", func(f tree) { f["dev"].Minor++ }},
		{"bytes", func(f tree) { f["f"].pieces[0].data[4] = 'x' }},
		{"size", func(f tree) { f["f"].size++ }},
		{"hole for data", func(f tree) { f["sparse"].pieces = nil }},
		{"data for hole", func(f tree) { f["sparse"].pieces[0].data = make([]byte, 4096+1) }},
		{"data moved", func(f tree) { f["sparse"].pieces[0].at = 0 }},
		{"links", func(f tree) { f["l2"] = regular("linked") }},
		{"missing", func(f tree) { f["nothere"] = regular("") }},
		{"extra", func(f tree) { delete(f, "d/e") }},
		{"xattr value", func(f tree) { f["x"].Xattrs["user.a"] = []byte("2") }},
		{"xattr missing", func(f tree) { f["x"].Xattrs["user.b"] = nil }},
		{"xattr extra", func(f tree) { delete(f["x"].Xattrs, "user.a") }},
		{"acl", func(f tree) { f["x"].Xattrs[aclAccess][10] ^= 1 }},
	} {
		files := make1()
		files["x"].Xattrs[aclAccess] = bytes.Clone(fullACL)
		c.change(files)
		if len(compare(dir, files)) == 0 {
			t.Errorf("%s: no difference seen", c.what)
		}
	}
}
