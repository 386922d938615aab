//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"banger/ext4/internal/disk"
	"banger/ext4/internal/e2fs"
)

// What reading any image may cost.
const (
	maxHeapBytes = 64 << 20
	maxFileReads = 4 << 20 // bytes of a file that a visit reads
	maxObjects   = 20_000
)

// A visit reads everything in an image the way a hostile one must be read:
// data without holes, and only so much.
type visit struct {
	fs      *FS
	objects int
	steps   int
	errs    []error
	base    uint64 // bytes of heap that are not the visit's
	peak    uint64 // and those that are
}

func (v *visit) fail(err error) bool {
	if err != nil && err != io.EOF {
		v.errs = append(v.errs, err)
	}
	return err != nil
}

func (v *visit) step() {
	if v.steps++; v.steps%256 == 0 {
		if heap() > v.base+maxHeapBytes {
			runtime.GC() // some is garbage
			v.peak = max(v.peak, heap()-min(heap(), v.base))
		}
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func (v *visit) walk(dir string) {
	list, err := v.fs.ReadDir(dir)
	if v.fail(err) {
		return
	}
	for _, d := range list {
		path := d.Name()
		if dir != "." {
			path = dir + "/" + path
		}
		if v.objects++; v.objects > maxObjects || len(path) > maxPathBytes {
			return
		}
		v.step()
		info, err := d.Info()
		if v.fail(err) {
			continue
		}
		_, err = v.fs.Xattrs(path)
		v.fail(err)
		switch {
		case info.IsDir():
			v.walk(path)
		case info.Mode()&fs.ModeSymlink != 0:
			_, err := v.fs.ReadLink(path)
			v.fail(err)
		case info.Mode().IsRegular():
			v.file(path)
		}
	}
}

func (v *visit) file(path string) {
	file, err := v.fs.Open(path)
	if v.fail(err) {
		return
	}
	defer file.Close()
	r := file.(*FileReader)
	buf := make([]byte, 64<<10)
	at := int64(0)
	for read := 0; read < maxFileReads; {
		v.step()
		start, end, err := r.NextData(at)
		if v.fail(err) {
			return
		}
		if start < at || end <= start || end > r.size() {
			panic(fmt.Sprintf("data from %d to %d after %d", start, end, at))
		}
		for at = start; at < end && read < maxFileReads; {
			n, err := r.ReadAt(buf[:min(int64(len(buf)), end-at)], at)
			if v.fail(err) {
				return
			}
			at += int64(n)
			read += n
		}
	}
}

// sane requires that an error says it is the image's.
func sane(t testing.TB, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, fs.ErrNotExist) && err != io.EOF {
		t.Fatalf("an error that does not say it is the image's: %v", err)
	}
}

// visitImage reads an image whole: errors that say they are the image's, and
// within the bounds.
func visitImage(t testing.TB, data []byte) *visit {
	t.Helper()
	runtime.GC()
	v := &visit{base: heap()}
	f, err := Open(bytes.NewReader(data))
	if !v.fail(err) {
		v.fs = f
		v.walk(".")
	}
	for _, err := range v.errs {
		sane(t, err)
	}
	if v.peak > maxHeapBytes {
		t.Fatalf("%d bytes of heap for an image of %d", v.peak, len(data))
	}
	return v
}

// Thousands of images with bits flipped where metadata lies, cut short, or
// with blocks in each other's places: an error or data, in time.
func TestBrokenImages(t *testing.T) {
	seed := number("EXT4_SEED", uint64(time.Now().UnixNano()))
	flips := int(number("EXT4_FLIPS", 100))
	t.Logf("EXT4_SEED=%d EXT4_FLIPS=%d", seed, flips)
	r := rand.New(rand.NewPCG(seed, 0))
	for _, args := range [][]string{
		{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum"},
		{"-t", "ext4", "-b", "1024", "-O", "inline_data,ea_inode"},
		{"-t", "ext4", "-b", "4096", "-O", "^metadata_csum,inline_data,ea_inode"},
		{"-t", "ext3", "-b", "1024"},
		{"-t", "ext2", "-b", "1024"},
	} {
		image := mkfs(t, 24*mib, append(args, "-N", "2048")...)
		dir, unmount := e2fs.Mount(t, image, "rw")
		populateWith(t, dir, 200)
		torn := torn(t, image, dir)
		unmount()
		for _, path := range []string{image, torn} {
			good, err := os.ReadFile(path)
			must(t, err)
			if v := visitImage(t, good); len(v.errs) > 0 || v.objects < 200 {
				t.Fatalf("%q: %d objects, %v", args, v.objects, v.errs)
			}
			metadata := metadataBlocks(t, good)
			failed := 0
			slowest := time.Duration(0)
			for range flips {
				bad := bytes.Clone(good)
				switch r.IntN(10) {
				case 0:
					bad = bad[:r.IntN(len(bad))]
				case 1:
					bs := len(metadata[0].b)
					a, b := metadata[r.IntN(len(metadata))], metadata[r.IntN(len(metadata))]
					copy(bad[a.at*uint64(bs):][:bs], b.b)
				default:
					for range 1 + r.IntN(8) {
						m := metadata[r.IntN(len(metadata))]
						at := m.at*uint64(len(m.b)) + uint64(r.IntN(len(m.b)))
						if r.IntN(2) == 0 {
							bad[at] ^= 1 << r.IntN(8)
						} else {
							bad[at] = [...]byte{0, 1, 0x7F, 0x80, 0xFF}[r.IntN(5)]
						}
					}
				}
				start := time.Now()
				if v := visitImage(t, bad); len(v.errs) > 0 {
					failed++
				}
				slowest = max(slowest, time.Since(start))
			}
			t.Logf("%q: %d of %d with errors, slowest %v", args, failed, flips, slowest.Round(time.Millisecond))
			if failed == 0 {
				t.Errorf("%q: nothing was noticed", args)
			}
			if slowest > 30*time.Second {
				t.Errorf("%q: %v for one image", args, slowest)
			}
		}
	}
}

type metadataBlock struct {
	at uint64
	b  []byte
}

// metadataBlocks are the blocks that a visit of an image goes by: superblock,
// descriptors, inodes in use, directories, maps, xattrs, journal.
func metadataBlocks(t *testing.T, image []byte) (list []metadataBlock) {
	t.Helper()
	f, err := Open(&noting{data: image, note: func(at int64, n int) {}})
	must(t, err)
	bs := f.geo.blockSize
	seen := map[uint64]bool{}
	reader := &noting{data: image, note: func(at int64, n int) {
		if block := uint64(at / int64(bs)); n <= bs && !seen[block] {
			seen[block] = true
			list = append(list, metadataBlock{block, image[block*uint64(bs):][:bs]})
		}
	}}
	f, err = Open(reader)
	must(t, err)
	v := &visit{fs: f}
	v.walk(".")
	return list
}

// noting is an image that tells what is read of it.
type noting struct {
	data []byte
	note func(at int64, n int)
}

func (n *noting) ReadAt(p []byte, at int64) (int, error) {
	n.note(at, len(p))
	return bytes.NewReader(n.data).ReadAt(p, at)
}

// patched changes an image made by a Writer, at a byte of an inode, and seals
// the inode again.
func patched(t *testing.T, image string, path string, change func(f *FS, data []byte, n *inode, raw []byte)) []byte {
	t.Helper()
	data, err := os.ReadFile(image)
	must(t, err)
	f, err := Open(bytes.NewReader(data))
	must(t, err)
	n, err := f.resolve(path, false)
	must(t, err)
	block, offset, err := f.inodeAt(n.ino)
	must(t, err)
	raw := data[block*4096+uint64(offset):][:256]
	change(f, data, n, raw)
	disk.SealInode(raw, n.ino, f.geo.seed)
	return data
}

// Images that only malice makes, sums and all.
func TestHostileImages(t *testing.T) {
	files := tree{"a": directoryFile(), "a/b": directoryFile(), "a/b/c": directoryFile(), "f": regular(strings.Repeat("f", 20_000)), "g": regular("gg"),
		"many": striped(2000), "link": symlink(100), "x": withXattrs(map[string][]byte{"user.x": make([]byte, 600)})}
	image := build(t, files, params(32*mib))
	// editDir changes the one block of a directory.
	editDir := func(path string, change func(b []byte)) []byte {
		return patched(t, image, path, func(f *FS, data []byte, n *inode, raw []byte) {
			m, err := f.mapBlock(n, 0)
			must(t, err)
			b := data[m.start*4096:][:4096]
			change(b)
			disk.SealDirBlock(b, f.geo.inodeSeed(n.ino, 0))
		})
	}
	entry := func(b []byte, name string) []byte {
		i := bytes.Index(b, []byte(name))
		if i < 8 {
			t.Fatalf("no entry %q", name)
		}
		return b[i-8:]
	}
	inoOf := func(path string) uint32 {
		n, err := openImage(t, image).resolve(path, false)
		must(t, err)
		return n.ino
	}
	for _, c := range []struct {
		row, reason string
		data        []byte
	}{
		{"a directory in itself", "belongs in", editDir("a/b", func(b []byte) { le.PutUint32(entry(b, "c"), inoOf("a")) })},
		{"the root in a directory", "reserved", editDir("a/b", func(b []byte) { le.PutUint32(entry(b, "c"), 2) })},
		{"a directory in two", "belongs in", editDir("a", func(b []byte) { le.PutUint32(entry(b, "b"), inoOf("a/b/c")) })},
		{"a slash in a name", "the name", editDir("a", func(b []byte) { entry(b, "b")[8] = '/' })},
		{"a NUL in a name", "the name", editDir("a", func(b []byte) { entry(b, "b")[8] = 0 })},
		{"an entry of 0 bytes", "entry of 0", editDir("a", func(b []byte) { le.PutUint16(entry(b, "b")[4:], 0) })},
		{"an entry past its block", "entry of", editDir("a", func(b []byte) { le.PutUint16(entry(b, "b")[4:], 4096) })},
		{"an entry of a free inode", "checksum", editDir("a", func(b []byte) { le.PutUint32(entry(b, "b"), 1000) })},
		{"an entry of no inode", "there are only", editDir("a", func(b []byte) { le.PutUint32(entry(b, "b"), 1<<31) })},
		{"an entry of another type", "another type", editDir("a", func(b []byte) { entry(b, "b")[7] = 1 })},
		{"a name twice", "twice", editDir(".", func(b []byte) { entry(b, "g")[8] = 'f' })},
		{"two names of a directory, of no type", "two names", editDir(".", func(b []byte) {
			// lost+found becomes a name of "a", and neither says what it is.
			e := entry(b, "lost+found")
			le.PutUint32(e, inoOf("a"))
			e[7] = 0
			i := bytes.Index(b, []byte("\x01\x02a"))
			b[i+1] = 0
		})},
		{"a directory of 2^31 bytes", "bytes", patched(t, image, "a", func(f *FS, _ []byte, _ *inode, raw []byte) { le.PutUint32(raw[disk.InodeSizeAt:], 1<<31) })},
		{"a directory with a hole", "hole", patched(t, image, "a", func(_ *FS, _ []byte, _ *inode, raw []byte) { le.PutUint32(raw[disk.InodeSizeAt:], 8192) })},
		{"overlapping extents", "overlap", patched(t, image, "f", func(_ *FS, _ []byte, _ *inode, raw []byte) {
			b := raw[disk.InodeBlockAt:][:60]
			_, _, start := disk.DecodeExtent(b, 0)
			disk.PutExtentHeader(b, 2, 4, 0)
			disk.PutExtent(b, 0, 0, 5, start)
			disk.PutExtent(b, 1, 2, 5, start)
		})},
		{"an extent beyond the image", "extent of", patched(t, image, "f", func(_ *FS, _ []byte, _ *inode, raw []byte) { disk.PutExtent(raw[disk.InodeBlockAt:], 0, 0, 5, 1<<40) })},
		{"an extent tree in a circle", "extent tree", patched(t, image, "many", func(f *FS, data []byte, n *inode, raw []byte) {
			_, child := disk.DecodeExtentIndex(raw[disk.InodeBlockAt:], 0)
			b := data[child*4096:][:4096]
			disk.PutExtentHeader(b, 1, 340, 1)
			disk.PutExtentIndex(b, 0, 0, child)
			disk.SealExtentBlock(b, f.geo.inodeSeed(n.ino, 0))
		})},
		{"an extent tree of depth 60", "depth", patched(t, image, "many", func(_ *FS, _ []byte, _ *inode, raw []byte) { le.PutUint16(raw[disk.InodeBlockAt+6:], 60) })},
		{"a file of 2^63 bytes", "bytes", patched(t, image, "f", func(_ *FS, _ []byte, _ *inode, raw []byte) { le.PutUint32(raw[disk.InodeSizeHiAt:], 1<<31) })},
		{"a symlink of 4 GiB", "symlink of", patched(t, image, "link", func(_ *FS, _ []byte, _ *inode, raw []byte) { le.PutUint32(raw[disk.InodeSizeAt:], 1<<32-1) })},
		{"an xattr block that is none", "xattr", patched(t, image, "x", func(_ *FS, _ []byte, _ *inode, raw []byte) { le.PutUint32(raw[disk.InodeXattrBlockAt:], 1) })},
		{"an inode of no type", "mode", patched(t, image, "g", func(_ *FS, _ []byte, _ *inode, raw []byte) { le.PutUint16(raw, 0) })},
	} {
		v := visitImage(t, c.data)
		found := false
		for _, err := range v.errs {
			found = found || errors.Is(err, ErrCorrupt) && strings.Contains(err.Error(), c.reason)
		}
		if !found {
			t.Errorf("%s: no error with %q: %v", c.row, c.reason, v.errs)
		}
		if v.objects > len(files)+10 {
			t.Errorf("%s: %d objects", c.row, v.objects)
		}
	}
	// Two files that share blocks are no error to a reader, and both read.
	crossed := patched(t, image, "g", func(f *FS, data []byte, n *inode, raw []byte) {
		other, err := f.resolve("f", false)
		must(t, err)
		copy(raw[disk.InodeBlockAt:][:60], other.iblock())
	})
	f, err := Open(bytes.NewReader(crossed))
	must(t, err)
	if b, err := f.ReadFile("g"); err != nil || string(b) != "ff" {
		t.Errorf("cross-linked: %q, %v", b, err)
	}
}
