//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/ext4/internal/e2fs"
)

func symlink(n int) *file {
	return &file{Inode: Inode{Mode: 0o120777, Target: strings.Repeat("t", n)}}
}

func device(mode uint16, major, minor uint32) *file {
	return &file{Inode: Inode{Mode: mode, Major: major, Minor: minor}}
}

func withXattrs(set map[string][]byte) *file {
	f := regular("x")
	f.Xattrs = set
	return f
}

// striped has n blocks of data with a hole after each.
func striped(n int) *file {
	f := &file{Inode: Inode{Mode: 0o100644}, size: int64(n) * 8192}
	for i := range n {
		f.pieces = append(f.pieces, piece{int64(i) * 8192, []byte{byte(i) | 1}})
	}
	return f
}

// One image with a row for every boundary.
func TestAttributes(t *testing.T) {
	files := tree{}
	for _, n := range []int{1, 58, 59, 60, 61, 4094, 4095} {
		files[fmt.Sprintf("symlink-%d", n)] = symlink(n)
	}
	for _, n := range []int{1, 2, 3, 4, 5, 254, 255} {
		files[strings.Repeat("n", n)] = regular("name")
	}
	for b := 1; b < 256; b++ {
		if b != '/' && b != '.' {
			files[string([]byte{byte(b)})] = regular("byte")
		}
	}
	for _, n := range []int{1, 4095, 4096, 4097, 8192, 1<<20 - 1, 1 << 20, 1<<20 + 1, 3<<20 + 5} {
		files[fmt.Sprintf("size-%d", n)] = regular(strings.Repeat("0123456789abcde", n/15+1)[:n])
	}
	files["empty"] = regular("")
	files["zeros"] = &file{Inode: Inode{Mode: 0o100644}, size: 12345}
	files["end-in-hole"] = &file{Inode: Inode{Mode: 0o100644}, size: 1 << 20, pieces: []piece{{4096, []byte("x")}}}
	files["start-in-hole"] = &file{Inode: Inode{Mode: 0o100644}, size: 1<<20 + 1, pieces: []piece{{1 << 20, []byte("x")}}}
	// An extent holds 32768 blocks.
	files["extents-4"], files["extents-5"] = striped(4), striped(5)
	files["extents-340"], files["extents-341"] = striped(340), striped(341)
	files["extents-1360"], files["extents-1361"] = striped(4*340), striped(4*340+1)
	for _, mode := range []uint16{0, 0o777, 0o1777, 0o2755, 0o4755, 0o7777} {
		f := regular("mode")
		f.Mode = 0o100000 | mode
		files[fmt.Sprintf("mode-%o", mode)] = f
		d := directoryFile()
		d.Mode = 0o040000 | mode
		files[fmt.Sprintf("dir-%o", mode)] = d
	}
	files["fifo"] = device(0o010644, 0, 0)
	files["socket"] = device(0o140755, 0, 0)
	for _, d := range [][2]uint32{{0, 0}, {1, 3}, {255, 255}, {255, 256}, {256, 255}, {256, 256}, {259, 70000}, {4095, 1<<20 - 1}} {
		files[fmt.Sprintf("char-%d-%d", d[0], d[1])] = device(0o020600, d[0], d[1])
		files[fmt.Sprintf("block-%d-%d", d[0], d[1])] = device(0o060600, d[0], d[1])
	}
	for _, id := range []uint32{0, 65535, 65536, 3000000000, 1<<32 - 2} {
		f := regular("id")
		f.UID, f.GID = id, id/2
		files[fmt.Sprintf("id-%d", id)] = f
	}
	for _, at := range []time.Time{
		time.Unix(-1<<31, 0), time.Unix(-1<<31, 999999999), time.Date(1960, 5, 4, 3, 2, 1, 7, time.UTC), time.Unix(-1, 999999999), time.Unix(0, 0), time.Unix(0, 1),
		time.Unix(1<<31-1, 999999999), time.Unix(1<<31, 0), time.Unix(1<<32-1, 5), time.Unix(1<<32, 5), time.Date(2100, 1, 1, 0, 0, 0, 321691970, time.UTC),
		time.Unix(3<<31, 0), time.Unix(1<<33, 0), time.Unix(1<<34-1<<31-1, 999999999),
	} {
		f := regular("time")
		f.Atime, f.Mtime, f.Ctime, f.Crtime = at, at.Add(0), at, at
		files[fmt.Sprintf("time-%d", at.UnixNano()/1000)] = f
	}
	mixed := regular("four times")
	mixed.Atime, mixed.Mtime, mixed.Ctime, mixed.Crtime = time.Unix(1, 1), time.Unix(2, 2), time.Unix(3, 3), time.Unix(4, 4)
	files["time-mixed"] = mixed
	// 88 bytes in the inode: 16 and the name, then the value, each to 4.
	for _, n := range []int{0, 1, 4, 67, 68, 69} {
		files[fmt.Sprintf("xattr-body-%d", n)] = withXattrs(map[string][]byte{"user.abcd": bytes.Repeat([]byte("v"), n)})
	}
	// And 4060 in the block.
	for _, n := range []int{4039, 4040} {
		files[fmt.Sprintf("xattr-block-%d", n)] = withXattrs(map[string][]byte{"user.abcd": bytes.Repeat([]byte("v"), n)})
	}
	files["xattr-name-255"] = withXattrs(map[string][]byte{"user." + strings.Repeat("n", 250): []byte("v")})
	many := map[string][]byte{"security.capability": {1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}
	for i := range 40 {
		many[fmt.Sprintf("user.%d", i*i*i)] = bytes.Repeat([]byte{byte(i)}, i)
		many[fmt.Sprintf("trusted.%d\x80\xff", i)] = nil
	}
	files["xattr-many"] = withXattrs(many)
	files["xattr-empty-in-block"] = withXattrs(map[string][]byte{"user.long": make([]byte, 500), "user.zz": {}})
	special := device(0o010600, 0, 0)
	special.Xattrs = map[string][]byte{"trusted.x": []byte("fifo")}
	files["xattr-fifo"] = special
	long := symlink(60)
	long.Xattrs = map[string][]byte{"trusted.x": bytes.Repeat([]byte("symlink"), 50)}
	files["xattr-symlink"] = long
	a := withXattrs(map[string][]byte{aclAccess: fullACL})
	a.Mode = 0o100774
	files["acl"] = a
	d := directoryFile()
	d.Mode = 0o040774
	d.Xattrs = map[string][]byte{aclAccess: fullACL, aclDefault: fullACL, "user.dir": []byte("yes")}
	files["acl-dir"] = d
	hard := regular("hard")
	files["hard-1"], files["acl-dir/hard-2"], files["hard-3"] = hard, hard, hard
	hardDev := device(0o020666, 1, 3)
	files["hard-dev"], files["acl-dir/hard-dev"] = hardDev, hardDev
	root := directoryFile()
	root.Mode, root.UID, root.GID, root.Mtime = 0o041770, 5, 70000, time.Unix(5, 5)
	root.Xattrs = map[string][]byte{"user.root": []byte("r")}
	files["/"] = root
	roundTrip(t, files, params(64<<20))
}

// Values that the inode and its block cannot hold lie in inodes of their own.
func TestLargeXattrs(t *testing.T) {
	value := func(n, seed int) []byte { return bytes.Repeat([]byte{byte(seed), 0, 0, 7, 1}, n/5+1)[:n] }
	files := tree{}
	for _, n := range []int{4041, 8192, 8193, MaxXattrBytes - 1, MaxXattrBytes} {
		files[fmt.Sprintf("one-%d", n)] = withXattrs(map[string][]byte{"user.abcd": value(n, 1)})
	}
	files["zeros"] = withXattrs(map[string][]byte{"user.abcd": make([]byte, 20000)})
	files["same"] = withXattrs(map[string][]byte{"user.other": value(8192, 1), "user.again": value(8192, 1), "user.small": []byte("s")})
	full := map[string][]byte{"user.empty": nil, "trusted.small": []byte("small\x80")}
	for i := range 100 { // names of the inode and its block, and nearly all values elsewhere
		full[fmt.Sprintf("user.name-%d\xff", i)] = value(100+i*500, i)
	}
	files["many"] = withXattrs(full)
	for n := 190; n <= 207; n++ { // 20 bytes of name; the values are 4 bytes, and fit or not
		set := map[string][]byte{}
		for i := range n {
			set[fmt.Sprintf("user.%03d", i)] = value(5+i%3, i)
		}
		files[fmt.Sprintf("names-%d", n)] = withXattrs(set)
	}
	d := directoryFile()
	d.Xattrs = map[string][]byte{"user.dir": value(50000, 3)}
	files["dir"] = d
	link := symlink(70)
	link.Xattrs = map[string][]byte{"trusted.link": value(5000, 4)}
	files["dir/link"] = link
	for _, n := range []int{1, 4, 5, 59, 60} { // e2fsck doubts fast symlinks
		link := symlink(n)
		link.Xattrs = map[string][]byte{"trusted.link": value(5000, 4)}
		files[fmt.Sprintf("dir/link-%d", n)] = link
	}
	hard := withXattrs(map[string][]byte{"user.hard": value(6000, 5), "security.capability": {1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}})
	files["dir/hard-1"], files["hard-2"] = hard, hard
	image := build(t, files, params(256<<20))
	dir, unmount := e2fs.Mount(t, image, "ro")
	for _, d := range compare(dir, files) {
		t.Error(d)
	}
	unmount()
	dump, _ := e2fs.Run(t, "dumpe2fs", "-h", image)
	if !strings.Contains(dump, "ea_inode") {
		t.Errorf("no feature ea_inode in\n%s", dump)
	}
	// And the kernel can let go of them, shared ones too.
	dir, unmount = e2fs.Mount(t, image, "rw")
	for path := range files {
		if path != "dir" && path != "hard-2" {
			must(t, os.Remove(dir+"/"+path))
		}
	}
	must(t, syscall.Setxattr(dir+"/hard-2", "user.hard", value(7000, 6), 0))
	unmount()
	e2fs.Clean(t, image)
	// Values within the block need no feature.
	dump, _ = e2fs.Run(t, "dumpe2fs", "-h", build(t, tree{"f": withXattrs(map[string][]byte{"user.abcd": value(4040, 1)})}, params(1<<20)))
	if strings.Contains(dump, "ea_inode") {
		t.Errorf("feature ea_inode without need")
	}
}

// A large value that has no place leaves nothing behind.
func TestLargeXattrFails(t *testing.T) {
	f := newImage(t)
	w, err := NewWriter(f, Options{MaxSizeBytes: 1 << 20})
	must(t, err)
	set := map[string][]byte{}
	for i := range 30 {
		set[fmt.Sprintf("user.%d", i)] = bytes.Repeat([]byte{byte(i)}, 40000)
	}
	if err := w.Add("x", &Inode{Mode: 0o100644, Xattrs: set}); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("1.2 MB in 1 MiB: %v", err)
	}
	if n := w.UsedBytes(); n != 0 {
		t.Errorf("%d bytes in use", n)
	}
	must(t, w.Add("x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{"user.a": make([]byte, 100)}}))
	must(t, w.Finish(params(1<<20)))
	e2fs.Clean(t, f.Name())
}

func TestBirthTime(t *testing.T) {
	f := regular("x")
	f.Crtime = time.Unix(5_000_000_000, 987654321)
	image := build(t, tree{"f": f}, params(1<<20))
	out, _ := e2fs.Run(t, "debugfs", "-R", "stat f", image)
	// Seconds modulo 2^32, then nanoseconds and epoch bits.
	want := fmt.Sprintf("crtime: 0x%08x:%08x", uint32(5_000_000_000&(1<<32-1)), uint32(987654321<<2|1))
	if !strings.Contains(out, want) {
		t.Errorf("no %q in\n%s", want, out)
	}
}

func TestLargeSparseFile(t *testing.T) {
	big := &file{Inode: Inode{Mode: 0o100644}, size: 5<<30 + 3, pieces: []piece{{0, []byte("a")}, {4<<30 - 1, []byte("bc")}, {5 << 30, []byte("end")}}}
	roundTrip(t, tree{"big": big}, params(16<<20))
}

// More extents than get every hole.
func TestManyExtents(t *testing.T) {
	f := &file{Inode: Inode{Mode: 0o100644}, free: true}
	for i := range 7000 { // two blocks of data, one of zeros
		f.pieces = append(f.pieces, piece{f.size, bytes.Repeat([]byte{byte(i) | 1}, 4097)})
		f.size += 3 * 4096
	}
	image := newImage(t)
	w, err := NewWriter(image, Options{})
	must(t, err)
	f.Content, err = w.Place(f.reader(), f.size)
	must(t, err)
	if n := len(f.Content.extents); n <= 4096 || n >= 7000 {
		t.Errorf("%d extents", n)
	}
	must(t, w.Add("f", &f.Inode))
	must(t, w.Finish(params(256<<20)))
	e2fs.Clean(t, image.Name())
	dir, _ := e2fs.Mount(t, image.Name(), "ro")
	for _, d := range compare(dir, tree{"f": f}) {
		t.Error(d)
	}
}

// Data runs over superblock backups, and over more than 32768 blocks.
func TestAcrossGroups(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 160 MB")
	}
	data := bytes.Repeat([]byte("some bytes that are not zero...."), 160<<20/32)
	image := build(t, tree{"f": {Inode: Inode{Mode: 0o100600}, size: int64(len(data)), pieces: []piece{{0, data}}}}, params(240<<20))
	dir, unmount := e2fs.Mount(t, image, "ro")
	r, err := os.Open(dir + "/f")
	must(t, err)
	defer r.Close()
	got, err := io.ReadAll(r)
	must(t, err)
	if !bytes.Equal(got, data) {
		t.Error("bytes differ")
	}
	r.Close()
	unmount()
	// The kernel must find its way among metadata that was moved.
	dir, unmount = e2fs.Mount(t, image, "rw")
	must(t, os.WriteFile(dir+"/before", data[:10<<20], 0o600))
	must(t, os.Remove(dir+"/f"))
	for i := range 15 {
		must(t, os.WriteFile(fmt.Sprintf("%s/after%d", dir, i), data[:10<<20], 0o600))
	}
	unmount()
	e2fs.Clean(t, image)
}

func TestRefused(t *testing.T) {
	f := newImage(t)
	w, err := NewWriter(f, Options{MaxSizeBytes: 64 << 20})
	must(t, err)
	other, err := NewWriter(newImage(t), Options{})
	must(t, err)
	place := func(w *Writer) *Content {
		c, err := w.Place(strings.NewReader("x"), 1)
		must(t, err)
		return c
	}
	ok := func(path string, n *Inode) *Inode {
		must(t, w.Add(path, n))
		return n
	}
	dir := ok("dir", &Inode{Mode: 0o040755})
	plain := ok("file", &Inode{Mode: 0o100644})
	taken, dead := place(w), place(w)
	ok("taken", &Inode{Mode: 0o100644, Content: taken})
	w.Discard(dead)
	w.Discard(dead)
	w.Discard(taken) // has a name: stays
	w.Discard(nil)
	foreign := &Inode{Mode: 0o100644}
	must(t, other.Add("f", foreign))
	big := map[string][]byte{"user.abcd": make([]byte, MaxXattrBytes+1)}
	crowd := map[string][]byte{}
	for i := range 204 { // 20 bytes each, of 88 and 4060
		crowd[fmt.Sprintf("user.%03d", i)] = make([]byte, 4)
	}
	crowd["user.0"] = nil
	for _, c := range []struct {
		row, path string
		n         *Inode
		reason    string
	}{
		{"name 256", strings.Repeat("n", 256), &Inode{Mode: 0o100644}, "more than 255"},
		{"dot", "dir/.", &Inode{Mode: 0o100644}, "dot name"},
		{"dot dot", "..", &Inode{Mode: 0o100644}, "dot name"},
		{"dot dot within", "dir/../x", &Inode{Mode: 0o100644}, "dot name"},
		{"double slash", "dir//x", &Inode{Mode: 0o100644}, "empty name"},
		{"trailing slash", "dir/x/", &Inode{Mode: 0o040755}, "empty name"},
		{"absolute", "/x", &Inode{Mode: 0o100644}, "absolute"},
		{"nul", "a\x00b", &Inode{Mode: 0o100644}, "NUL"},
		{"no parent", "nodir/x", &Inode{Mode: 0o100644}, "was not added"},
		{"parent is a file", "file/x", &Inode{Mode: 0o100644}, "not a directory"},
		{"twice", "file", &Inode{Mode: 0o100644}, "exists already"},
		{"root is a file", "/", &Inode{Mode: 0o100644}, "must be a directory"},
		{"directory link", "dir2", dir, "second name"},
		{"root has a name", "/", dir, "has a name"},
		{"foreign inode", "x", foreign, "another image"},
		{"foreign content", "x", &Inode{Mode: 0o100644, Content: place(other)}, "another image"},
		{"dead content", "x", &Inode{Mode: 0o100644, Content: dead}, "discarded"},
		{"content twice", "x", &Inode{Mode: 0o100644, Content: taken}, "another file"},
		{"content of a directory", "x", &Inode{Mode: 0o040755, Content: place(w)}, "not a regular file"},
		{"target of a file", "x", &Inode{Mode: 0o100644, Target: "y"}, "not a symlink"},
		{"symlink 0", "x", &Inode{Mode: 0o120777}, "empty"},
		{"symlink 4096", "x", &Inode{Mode: 0o120777, Target: strings.Repeat("t", 4096)}, "more than 4095"},
		{"symlink nul", "x", &Inode{Mode: 0o120777, Target: "a\x00"}, "NUL"},
		{"no type", "x", &Inode{Mode: 0o644}, "no file type"},
		{"unknown type", "x", &Inode{Mode: 0o170000}, "no file type"},
		{"major 4096", "x", &Inode{Mode: 0o020644, Major: 4096}, "12 and 20 bits"},
		{"minor 2^20", "x", &Inode{Mode: 0o060644, Minor: 1 << 20}, "12 and 20 bits"},
		{"time before", "x", &Inode{Mode: 0o100644, Mtime: time.Unix(-1<<31-1, 999999999)}, "1901"},
		{"time after", "x", &Inode{Mode: 0o100644, Crtime: time.Unix(1<<34-1<<31, 0)}, "2446"},
		{"xattr 65537", "x", &Inode{Mode: 0o100644, Xattrs: big}, "more than 65536"},
		{"xattr names", "x", &Inode{Mode: 0o100644, Xattrs: crowd}, "more than the 4148"},
		{"xattr namespace", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{"system.data": nil}}, "namespaces"},
		{"xattr no name", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{"user.": nil}}, "nothing after"},
		{"xattr name 256", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{"user." + strings.Repeat("n", 251): nil}}, "more than 255"},
		{"xattr nul", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{"user.a\x00": nil}}, "NUL"},
		{"acl short", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclAccess: {2, 0, 0}}}, "whole number"},
		{"acl version", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclAccess: {1, 0, 0, 0}}}, "version 1"},
		{"acl order", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclAccess: acl([3]uint32{4, 0, 0}, [3]uint32{1, 0, 0}, [3]uint32{32, 0, 0})}}, "out of order"},
		{"acl twice", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclAccess: acl([3]uint32{1, 0, 0}, [3]uint32{1, 0, 0})}}, "twice"},
		{"acl perm", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclAccess: acl([3]uint32{1, 8, 0})}}, "rwx"},
		{"acl tag", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclAccess: acl([3]uint32{3, 0, 0})}}, "unknown"},
		{"acl id", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclAccess: acl([3]uint32{1, 0, 0}, [3]uint32{2, 0, noID})}}, "not a user"},
		{"acl no mask", "x", &Inode{Mode: 0o100644, Xattrs: map[string][]byte{aclDefault: acl([3]uint32{1, 0, 0}, [3]uint32{2, 0, 5}, [3]uint32{4, 0, 0}, [3]uint32{32, 0, 0})}}, "missing"},
	} {
		err := w.Add(c.path, c.n)
		if err == nil || !strings.Contains(err.Error(), c.reason) || !strings.Contains(err.Error(), fmt.Sprintf("%q", c.path)) {
			t.Errorf("%s: got %v, want %q and the path", c.row, err, c.reason)
		}
	}
	for i := 1; i < MaxLinks; i++ {
		must(t, w.Add(fmt.Sprintf("dir/%d", i), plain))
	}
	if err := w.Add("dir/one-more", plain); err == nil {
		t.Errorf("link %d was accepted", MaxLinks+1)
	}
	for _, c := range []struct {
		row    string
		in     string
		size   int64
		reason string
	}{
		{"short", "abc", 4, "shorter"},
		{"long", "abcd", 3, "longer"},
		{"long, empty", "a", 0, "longer"},
		{"negative", "", -1, "not between"},
		{"too large", "", MaxFileBytes + 1, "not between"},
	} {
		if _, err := w.Place(strings.NewReader(c.in), c.size); err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("place %s: got %v, want %q", c.row, err, c.reason)
		}
	}
	broken := errors.New("broken")
	if _, err := w.Place(io.MultiReader(strings.NewReader("abc"), errorReader{broken}), 10); !errors.Is(err, broken) {
		t.Errorf("reader's error: got %v", err)
	}
	if _, err := w.Place(neverZero{}, 65<<20); !errors.Is(err, ErrNoSpace) {
		t.Errorf("beyond the largest size: got %v", err)
	}
	for _, c := range []struct {
		row    string
		change func(*Params)
	}{
		{"no uuid", func(p *Params) { p.UUID = [16]byte{} }},
		{"label 17", func(p *Params) { p.Label = "12345678901234567" }},
		{"label nul", func(p *Params) { p.Label = "a\x00b" }},
		{"size below 1 MiB", func(p *Params) { p.SizeBytes = 1<<20 - 1 }},
		{"size above the largest", func(p *Params) { p.SizeBytes = 64<<20 + 4096 }},
		{"journal below 4 MiB", func(p *Params) { p.JournalBytes = 4<<20 - 1 }},
		{"reserved 51", func(p *Params) { p.ReservedBlocksPercent = 51 }},
		{"ratio 1023", func(p *Params) { p.InodeRatio = 1023 }},
		{"time", func(p *Params) { p.Time = time.Unix(1<<40, 0) }},
	} {
		p := params(64 << 20)
		c.change(&p)
		if err := w.Finish(p); err == nil {
			t.Errorf("params, %s: accepted", c.row)
		}
	}
	p := params(64 << 20)
	p.Label = "1234567890123456"
	must(t, w.Finish(p))
	e2fs.Clean(t, f.Name())
	if err := w.Finish(p); err == nil {
		t.Error("finished twice")
	}
	if err := w.Add("late", &Inode{Mode: 0o100644}); err == nil {
		t.Error("added after the end")
	}
}

type errorReader struct{ err error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.err }

type neverZero struct{}

func (neverZero) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'z'
	}
	return len(p), nil
}

// An ACL without entries says nothing, and setting one removes it.
func TestEmptyACL(t *testing.T) {
	f := withXattrs(map[string][]byte{aclAccess: acl(), "user.a": []byte("1")})
	image := build(t, tree{"f": f}, params(1<<20))
	delete(f.Xattrs, aclAccess)
	dir, _ := e2fs.Mount(t, image, "ro")
	for _, d := range compare(dir, tree{"f": f}) {
		t.Error(d)
	}
}

// The id -1 is none to the kernel, which shows its "nobody"; the image holds it.
func TestInvalidID(t *testing.T) {
	f := regular("x")
	f.UID, f.GID = noID, noID
	image := build(t, tree{"f": f}, params(1<<20))
	out, _ := e2fs.Run(t, "debugfs", "-R", "stat f", image)
	if want := "User: 4294967295   Group: 4294967295"; !strings.Contains(strings.ReplaceAll(out, "  ", " "), strings.ReplaceAll(want, "  ", " ")) && !strings.Contains(out, "User:    -1   Group:    -1") {
		t.Errorf("no %q in\n%s", want, out)
	}
}

// lost+found may come from the caller, as a directory or as anything else.
func TestLostFound(t *testing.T) {
	own := directoryFile()
	own.Mode = 0o040711
	for row, files := range map[string]tree{
		"none":      {},
		"directory": {"lost+found": own, "lost+found/x": regular("x")},
		"file":      {"lost+found": regular("lost")},
	} {
		t.Run(row, func(t *testing.T) { roundTrip(t, files, params(8<<20)) })
	}
}

// After a refusal the Writer goes on, also when a survey had been made.
func TestLostFoundAfterSurvey(t *testing.T) {
	f := newImage(t)
	w, err := NewWriter(f, Options{})
	must(t, err)
	if _, err := w.MinSizeBytes(params(0)); err != nil {
		t.Fatal(err)
	}
	must(t, w.Add("lost+found", &Inode{Mode: 0o040755}))
	must(t, w.Finish(params(1<<20)))
	e2fs.Clean(t, f.Name())
}
