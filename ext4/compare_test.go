//go:build linux

package ext4

import (
	"bytes"
	"errors"
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
	free   bool           // holes are not compared
	blocks map[int64]bool // that are not holes; nil: those with data
}

type piece struct {
	at   int64
	data []byte
}

func (f *file) reader() io.Reader {
	if f.size > 1<<40 {
		return &skippingReader{pieceReader{f: f}}
	}
	return &pieceReader{f: f}
}

// skippingReader knows its holes, or it would take minutes.
type skippingReader struct{ pieceReader }

func (r *skippingReader) skipHole() (int64, error) {
	next := r.f.size
	for _, p := range r.f.pieces {
		if p.at+int64(len(p.data)) > r.at {
			next = max(p.at/disk.BlockSize*disk.BlockSize, r.at)
			break
		}
	}
	n := next - r.at
	r.at = next
	return n, nil
}

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
	if f.blocks != nil {
		return f.blocks
	}
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
	aspects := seenByKernel
	for _, f := range files {
		if f.free {
			aspects &^= DiffHoles
		}
	}
	diffs, err := differences(hostTree(dir), &memTree{files: files}, aspects)
	if err != nil {
		diffs = append(diffs, err.Error())
	}
	// Compare leaves the links of directories alone.
	subdirs := make(map[string]uint64)
	for path, f := range files {
		if f.isDir() && path != "/" {
			subdirs[filepath.Dir(path)]++
		}
	}
	if files["lost+found"] == nil {
		subdirs["."]++
	}
	for path, f := range files {
		var st syscall.Stat_t
		if !f.isDir() || syscall.Lstat(filepath.Join(dir, path), &st) != nil {
			continue
		}
		want := subdirs[filepath.Clean(strings.TrimPrefix(path, "/"))] + 2
		if want >= MaxLinks {
			want = 1
		}
		if st.Nlink != want {
			diffs = append(diffs, fmt.Sprintf("%q: %d links, not %d", path, st.Nlink, want))
		}
	}
	return diffs
}

func (f *file) isDir() bool { return f.Mode&disk.TypeMask == disk.TypeDir }

// memTree is a tree as Compare takes it: what an image made of it should show.
type memTree struct {
	files tree
	inos  map[*file]uint32
	names map[*file]uint32
	lists map[string][]string
}

// prepare counts names. There is a root, and lost+found, whatever the tree says.
func (m *memTree) prepare() {
	if m.inos != nil {
		return
	}
	m.inos, m.names, m.lists = make(map[*file]uint32), make(map[*file]uint32), make(map[string][]string)
	all := maps.Clone(m.files)
	if all["/"] == nil {
		all["/"] = directoryFile()
	}
	if all[lostFoundName] == nil {
		all[lostFoundName] = &file{Inode: Inode{Mode: 0o040700}}
	}
	m.files = all
	for path, f := range all {
		if m.inos[f] == 0 {
			m.inos[f] = uint32(len(m.inos) + 1)
		}
		m.names[f]++
		if path != "/" {
			dir := filepath.Dir(path)
			m.lists[dir] = append(m.lists[dir], filepath.Base(path))
		}
	}
	for _, list := range m.lists {
		slices.Sort(list)
	}
}

func (m *memTree) at(path string) (*file, error) {
	m.prepare()
	if path == "." {
		path = "/"
	}
	if f := m.files[path]; f != nil {
		return f, nil
	}
	return nil, &fs.PathError{Op: "lstat", Path: path, Err: fs.ErrNotExist}
}

func (m *memTree) Lstat(path string) (fs.FileInfo, error) {
	f, err := m.at(path)
	if err != nil {
		return nil, err
	}
	when := func(t time.Time) time.Time {
		if t.IsZero() {
			return testTime
		}
		return t
	}
	return &fileInfo{base(path), &Stat{
		Ino: m.inos[f], Mode: f.Mode, UID: f.UID, GID: f.GID, Links: m.names[f], SizeBytes: f.size, Major: f.Major, Minor: f.Minor,
		Atime: when(f.Atime), Mtime: when(f.Mtime), Ctime: when(f.Ctime), Crtime: when(f.Crtime),
	}}, nil
}

func (m *memTree) ReadLink(path string) (string, error) {
	f, err := m.at(path)
	if err != nil {
		return "", err
	}
	return f.Target, nil
}

func (m *memTree) ReadDir(path string) (list []fs.DirEntry, err error) {
	m.prepare()
	for _, name := range m.lists[path] {
		info, err := m.Lstat(join(path, name))
		if err != nil {
			return nil, err
		}
		list = append(list, fs.FileInfoToDirEntry(info))
	}
	return list, nil
}

func (m *memTree) Xattrs(path string) (map[string][]byte, error) {
	f, err := m.at(path)
	if err != nil {
		return nil, err
	}
	return f.Xattrs, nil
}

func (m *memTree) Open(path string) (fs.File, error) {
	f, err := m.at(path)
	if err != nil {
		return nil, err
	}
	return &memFile{pieceReader: &pieceReader{f: f}, data: f.dataBlocks()}, nil
}

// memFile knows its holes.
type memFile struct {
	*pieceReader
	data map[int64]bool
}

func (f *memFile) Stat() (fs.FileInfo, error) { return nil, fs.ErrInvalid }
func (f *memFile) Close() error               { return nil }

func (f *memFile) ReadAt(p []byte, at int64) (int, error) {
	return io.ReadFull(&pieceReader{f.f, at}, p[:min(int64(len(p)), f.f.size-at)])
}

func (f *memFile) NextData(offset int64) (start, end int64, err error) {
	if len(f.data) == 0 {
		return 0, 0, io.EOF
	}
	blocks := slices.Sorted(maps.Keys(f.data))
	i, _ := slices.BinarySearch(blocks, offset/disk.BlockSize)
	if i == len(blocks) {
		return 0, 0, io.EOF
	}
	start = max(blocks[i]*disk.BlockSize, offset)
	for i+1 < len(blocks) && blocks[i+1] == blocks[i]+1 {
		i++
	}
	return start, min((blocks[i]+1)*disk.BlockSize, f.f.size), nil
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

// Every aspect is seen when it differs, and only then.
func TestCompare(t *testing.T) {
	make1 := func() tree {
		link := regular("linked")
		sparse := &file{Inode: Inode{Mode: 0o100644}, size: 40960, pieces: []piece{{8192, []byte("data")}}}
		dev := &file{Inode: Inode{Mode: 0o020600, Major: 300, Minor: 70000}}
		sym := &file{Inode: Inode{Mode: 0o120777, Target: "there"}}
		x := regular("x")
		x.Xattrs = map[string][]byte{"user.a": []byte("1"), aclAccess: bytes.Clone(fullACL)}
		x.Mode = 0o100774
		return tree{"d": directoryFile(), "d/e": directoryFile(), "f": regular("hello"), "l1": link, "l2": link,
			"sparse": sparse, "dev": dev, "sym": sym, "x": x}
	}
	image := build(t, make1(), params(16<<20))
	dir, _ := e2fs.Mount(t, image, "ro")
	const every = DiffAll | DiffAtime | DiffCtime | DiffCrtime | DiffHoles
	for _, c := range []struct {
		aspect Aspect
		path   string
		change func(tree)
	}{
		{0, "", func(tree) {}},
		{DiffMode, "f", func(f tree) { f["f"].Mode = 0o100600 }},
		{DiffType, "f", func(f tree) { f["f"] = symlink(5) }},
		{DiffOwner, "f", func(f tree) { f["f"].UID = 1 }},
		{DiffOwner, "f", func(f tree) { f["f"].GID = 1 }},
		{DiffAtime, "f", func(f tree) { f["f"].Atime = testTime.Add(1) }},
		{DiffMtime, "f", func(f tree) { f["f"].Mtime = testTime.Add(1) }},
		{DiffCtime, "f", func(f tree) { f["f"].Ctime = testTime.Add(1) }},
		{DiffCrtime, "f", func(f tree) { f["f"].Crtime = testTime.Add(1) }},
		{DiffContent, "sym", func(f tree) { f["sym"].Target = "thers" }},
		{DiffDevice, "dev", func(f tree) { f["dev"].Major++ }},
		{DiffDevice, "dev", func(f tree) { f["dev"].Minor++ }},
		{DiffContent, "f", func(f tree) { f["f"].pieces[0].data[4] = 'x' }},
		{DiffContent, "f", func(f tree) { f["f"].size++ }},
		{DiffContent, "sparse", func(f tree) { f["sparse"].pieces = nil }},
		{DiffContent, "sparse", func(f tree) { f["sparse"].pieces[0].at = 0 }},
		{DiffContent, "l1", func(f tree) { f["l1"].pieces[0].data[0] = 'x' }},
		{DiffHoles, "sparse", func(f tree) {
			f["sparse"].pieces = append(f["sparse"].pieces, piece{20480, []byte{0}})
			f["sparse"].blocks = map[int64]bool{2: true, 5: true}
		}},
		{DiffLinks, "l1", func(f tree) { f["l2"] = regular("linked") }},
		{DiffName, "nothere", func(f tree) { f["nothere"] = regular("") }},
		{DiffName, "d/e", func(f tree) { delete(f, "d/e") }},
		{DiffXattrs, "x", func(f tree) { f["x"].Xattrs["user.a"] = []byte("2") }},
		{DiffXattrs, "x", func(f tree) { f["x"].Xattrs["user.b"] = nil }},
		{DiffXattrs, "x", func(f tree) { delete(f["x"].Xattrs, "user.a") }},
		{DiffXattrs, "x", func(f tree) { f["x"].Xattrs[aclAccess][10] ^= 1 }},
		{DiffMode, ".", func(f tree) { f["/"] = &file{Inode: Inode{Mode: 0o040700}} }},
	} {
		files := make1()
		c.change(files)
		for which, side := range map[string]Tree{"read": openImage(t, image), "mounted": hostTree(dir)} {
			aspects := every
			if which == "mounted" {
				aspects &^= DiffCrtime // not part of stat
			}
			for _, swap := range []bool{false, true} {
				a, b := side, Tree(&memTree{files: files})
				if swap {
					a, b = b, a
				}
				var seen []Difference
				must(t, Compare(a, b, aspects, func(d Difference) bool { seen = append(seen, d); return true }))
				found := false
				for _, d := range seen {
					found = found || d.Path == c.path && d.Aspect == c.aspect
				}
				if want := c.aspect != 0 && aspects&c.aspect != 0; found != want || !want && len(seen) > 0 {
					t.Errorf("%s %q, %s: %v", c.aspect, c.path, which, seen)
				}
				// Not asked for, not told.
				must(t, Compare(a, b, aspects&^c.aspect, func(d Difference) bool {
					if d.Aspect == c.aspect {
						t.Errorf("%s %q, %s: told without being asked: %v", c.aspect, c.path, which, d)
					}
					return true
				}))
			}
		}
	}
}

// A comparison stops when it is told to, and passes errors on with the tree
// they are of.
func TestCompareStops(t *testing.T) {
	a, b := &memTree{files: tree{}}, &memTree{files: tree{"1": regular(""), "2": regular(""), "3": regular("")}}
	calls := 0
	must(t, Compare(a, b, DiffAll, func(Difference) bool { calls++; return calls < 2 }))
	if calls != 2 {
		t.Errorf("%d calls", calls)
	}
	err := Compare(hostTree("/nowhere"), b, DiffAll, func(Difference) bool { return true })
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "tree a") {
		t.Errorf("error: %v", err)
	}
}
