package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

func gz(t testing.TB, raw []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zst(t testing.TB, raw []byte, opts ...zstd.EOption) []byte {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, opts...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// blobCache is a Blobs in memory that checks how it is used.
type blobCache struct {
	mu                     sync.Mutex
	blobs                  map[string][]byte
	partial                map[string][]byte // of writers that were suspended
	open                   int               // writers neither committed nor aborted
	fail                   error             // of writing
	failCreate, failCommit error
}

type blobCacheWriter struct {
	bytes.Buffer
	c       *blobCache
	digest  string
	partial []byte
}

func (c *blobCache) Open(d string) (io.ReadCloser, int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	raw, ok := c.blobs[d]
	if !ok {
		return nil, 0, fs.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(raw)), int64(len(raw)), nil
}

func (c *blobCache) Create(d string) (BlobWriter, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failCreate != nil {
		return nil, c.failCreate
	}
	c.open++
	return &blobCacheWriter{c: c, digest: d}, nil
}

// Resume begins with what a writer left that was suspended.
func (c *blobCache) Resume(d string, sizeBytes int64) (BlobWriter, error) {
	w, err := c.Create(d)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	w.(*blobCacheWriter).partial = c.partial[d]
	w.(*blobCacheWriter).Buffer.Write(c.partial[d])
	delete(c.partial, d)
	return w, nil
}

func (w *blobCacheWriter) Partial() (io.Reader, int64) {
	return bytes.NewReader(w.partial), int64(len(w.partial))
}

func (w *blobCacheWriter) Suspend() error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	w.c.open--
	if w.c.partial == nil {
		w.c.partial = make(map[string][]byte)
	}
	w.c.partial[w.digest] = bytes.Clone(w.Bytes())
	return nil
}

func (w *blobCacheWriter) Write(p []byte) (int, error) {
	if w.c.fail != nil {
		return 0, w.c.fail
	}
	return w.Buffer.Write(p)
}

func (w *blobCacheWriter) Commit() error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	w.c.open--
	if sum(w.Bytes()) != w.digest {
		return errors.New("committed with a wrong digest")
	}
	if w.c.failCommit != nil {
		return w.c.failCommit
	}
	if w.c.blobs == nil {
		w.c.blobs = make(map[string][]byte)
	}
	w.c.blobs[w.digest] = w.Bytes()
	return nil
}

func (w *blobCacheWriter) Abort() error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	w.c.open--
	return nil
}

func noise(n int) string {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32() >> 8)
	}
	return string(b)
}

// TestLayerStreams is about one layer whose stored bytes are this or that.
func TestLayerStreams(t *testing.T) {
	raw := tarOf(t, []te{dir("d"), f("d/big", noise(700<<10)), f("x", "y")})
	plain, zipped, zstded := mediaOCILayer, mediaOCILayer+"+gzip", mediaOCILayer+"+zstd"
	flip := func(b []byte, at int) []byte { c := bytes.Clone(b); c[at] ^= 0x10; return c }
	twoMembers := append(gz(t, raw[:1000]), gz(t, raw[1000:])...)
	skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3}, zst(t, raw)...)
	wide := zst(t, raw, zstd.WithWindowSize(128<<20), zstd.WithSingleSegment(false))
	for _, tt := range []struct {
		name      string
		stored    []byte
		media     string
		digest    string // default: the right one
		diffID    string
		size      int // default: the right one
		raw       []byte
		err, note string
	}{
		{name: "plain", stored: raw, media: plain},
		{name: "gzip", stored: gz(t, raw), media: zipped},
		{name: "zstd", stored: zst(t, raw), media: zstded},
		{name: "docker gzip", stored: gz(t, raw), media: mediaDockerLayer + ".gzip"},
		{name: "gzip of two members", stored: twoMembers, media: zipped},
		{name: "zstd after a skippable frame", stored: skippable, media: zstded},
		{name: "zstd of too wide a window", stored: wide, media: zstded, err: "needs a window of more than"},
		{name: "gzip called plain", stored: gz(t, raw), media: plain, err: "does not fit its content (gzip)"},
		{name: "zstd called gzip", stored: zst(t, raw), media: zipped, err: "does not fit its content (zstd)"},
		{name: "plain called gzip", stored: raw, media: zipped, err: "does not fit its content (neither"},
		{name: "empty called gzip", stored: nil, media: zipped, raw: []byte{}, err: "does not fit"},
		{name: "empty", stored: nil, media: plain, raw: []byte{}},
		{name: "gzip cut short", stored: gz(t, raw)[:300<<10], media: zipped, err: "cut short"},
		{name: "zstd cut short", stored: zst(t, raw)[:300<<10], media: zstded, err: "cut short"},
		{name: "tar cut short", stored: raw[:300<<10], raw: raw[:300<<10], media: plain, err: "cut short"},
		{name: "garbage", stored: []byte(noise(2000)), raw: []byte(noise(2000)), media: plain, err: "not a tar archive"},
		{name: "gzip of garbage", stored: gz(t, []byte(noise(2000))), raw: []byte(noise(2000)), media: zipped, err: "not a tar archive"},
		{name: "bit flipped in gzip, digest tells", stored: flip(gz(t, raw), 5000), digest: sum(gz(t, raw)), media: zipped, err: "digest is sha256:"},
		{name: "bit flipped in plain header, digest tells", stored: flip(raw, 100), digest: sum(raw), media: plain, err: "digest is sha256:"},
		{name: "bit flipped in plain body, digest tells", stored: flip(raw, 5000), digest: sum(raw), media: plain, raw: flip(raw, 5000), err: "digest is sha256:"},
		{name: "bit flipped in gzip, digest right", stored: flip(gz(t, raw), 300<<10), media: zipped, err: "gzip stream is damaged"},
		{name: "DiffID of something else", stored: gz(t, raw), diffID: sum(nil), media: zipped, err: "DiffID is sha256:"},
		{name: "longer than said", stored: gz(t, raw), size: len(gz(t, raw)) - 1, media: zipped, err: "size is more than"},
		{name: "shorter than said", stored: gz(t, raw), size: len(gz(t, raw)) + 1, media: zipped, err: "size is"},
		{name: "zeros after the end", stored: append(bytes.Clone(raw), make([]byte, 9000)...), media: plain, raw: append(bytes.Clone(raw), make([]byte, 9000)...)},
		{name: "bytes after the end", stored: append(bytes.Clone(raw), "trailing"...), media: plain, raw: append(bytes.Clone(raw), "trailing"...), note: "after the end of its tar left out (8)"},
		{name: "garbage after gzip", stored: append(gz(t, raw), "trailing garbage"...), media: zipped, err: "gzip stream is damaged"},
		{name: "one zero after gzip", stored: append(gz(t, raw), 0), media: zipped, err: "gzip stream is damaged"},
	} {
		for _, cached := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s cached=%v", tt.name, cached), func(t *testing.T) {
				before := runtime.NumGoroutine()
				if tt.raw == nil {
					tt.raw = raw
				}
				l := Layer{Digest: sum(tt.stored), DiffID: sum(tt.raw), MediaType: tt.media, SizeBytes: int64(len(tt.stored))}
				if tt.digest != "" {
					l.Digest = tt.digest
				}
				if tt.diffID != "" {
					l.DiffID = tt.diffID
				}
				if tt.size != 0 {
					l.SizeBytes = int64(tt.size)
				}
				cache := &blobCache{}
				img := &Image{Name: "test", source: &Source{Blobs: cache}, from: memBlobs{l.Digest: tt.stored}, Layers: []Layer{l}}
				if cached {
					cache.blobs = map[string][]byte{l.Digest: tt.stored}
				}
				tree, sink, err := squashMem(t, img)
				if tt.err != "" {
					if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), l.Digest) || strings.Contains(err.Error(), "\n") {
						t.Errorf("error %v, want one line with %q and the layer", err, tt.err)
					}
				} else if err != nil {
					t.Error(err)
				} else {
					if len(tt.raw) > 0 && len(dump(tree, sink)) != 4 {
						t.Errorf("tree %q", dump(tree, sink))
					}
					if got := strings.Join(tree.Notes, ";"); (tt.note == "") != (got == "") || !strings.Contains(got, tt.note) {
						t.Errorf("notes %q, want %q", got, tt.note)
					}
					if !bytes.Equal(cache.blobs[l.Digest], tt.stored) {
						t.Error("blob not kept")
					}
				}
				if cache.open != 0 {
					t.Errorf("%d blob writers left open", cache.open)
				}
				if !cached && tt.digest != "" && cache.blobs[l.Digest] != nil {
					t.Error("a blob with a wrong digest was kept")
				}
				waitGoroutines(t, before)
			})
		}
	}
}

// A blob that cannot be kept fails the pull, whichever step of keeping it fails.
func TestBlobCacheFull(t *testing.T) {
	broken := errors.New("disk is broken")
	for name, cache := range map[string]*blobCache{"create": {failCreate: broken}, "write": {fail: broken}, "commit": {failCommit: broken}} {
		img := memImage(t, nil, tarOf(t, []te{f("x", "y")}))
		img.source.Blobs = cache
		_, _, err := squashMem(t, img)
		if err == nil || !strings.Contains(err.Error(), "blob cache: disk is broken") || cache.open != 0 {
			t.Errorf("%s: error %v, %d writers open", name, err, cache.open)
		}
	}
}

// brokenSink fails at the n-th file.
type brokenSink struct {
	memSink
	n     int
	short bool
}

func (b *brokenSink) Place(r io.Reader, size int64) (int, error) {
	if b.n--; b.n == 0 {
		if b.short {
			return 0, nil
		}
		return 0, errors.New("sink is full")
	}
	return b.memSink.Place(r, size)
}

func TestSinkErrors(t *testing.T) {
	before := runtime.NumGoroutine()
	raw := tarOf(t, []te{f("a", "1"), f("b", noise(3<<20)), f("c", "3")})
	for _, short := range []bool{false, true} {
		_, err := Squash(t.Context(), memImage(t, nil, raw, raw), &brokenSink{n: 2, short: short})
		want := "sink is full"
		if short {
			want = "0 of its 3145728 bytes were taken"
		}
		if err == nil || !strings.Contains(err.Error(), `entry "b": `+want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	waitGoroutines(t, before)
}

type fullSink struct{ memSink }

func (fullSink) Place(io.Reader, int64) (int, error) {
	return 0, &fs.PathError{Op: "write", Path: "base.img", Err: syscall.ENOSPC}
}

func TestSinkFull(t *testing.T) {
	_, err := Squash(t.Context(), memImage(t, nil, tarOf(t, []te{f("a", "1")})), &fullSink{})
	wantError(t, "disk full", err, banger.CodeNoSpace, "no space left on device")
	_, err = Squash(t.Context(), memImage(t, nil, tarOf(t, []te{f("a", "1")})), &brokenSink{n: 1})
	wantError(t, "sink broken", err, banger.CodeInternal, "sink is full")
}

// cancelSink cancels from within a Place.
type cancelSink struct {
	memSink
	cancel func()
}

func (c *cancelSink) Place(r io.Reader, size int64) (int, error) {
	c.cancel()
	return c.memSink.Place(r, size)
}

// endless never ends and never fails, until its context does.
type endless struct{ memBlobs }

func (endless) openBlob(ctx context.Context, _ string, _ int64) (io.ReadCloser, error) {
	r, w := io.Pipe()
	context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })
	return r, nil
}

func TestCancel(t *testing.T) {
	before := runtime.NumGoroutine()
	raw := tarOf(t, []te{f("b", noise(5<<20)), f("c", "3")})
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := Squash(ctx, memImage(t, nil, raw, raw), &cancelSink{cancel: cancel}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled in Place: error %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	img := memImage(t, nil, raw)
	img.from = endless{}
	if _, err := Squash(ctx, img, &memSink{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled in a read: error %v", err)
	}
	waitGoroutines(t, before)
}

func TestLimits(t *testing.T) {
	long := strings.Repeat("n", MaxNameBytes)
	deep := strings.Repeat("d/", MaxPathBytes/2-1) + "ab" // 4096 bytes
	many := func(n int) (l []te) {
		for i := range n {
			l = append(l, f(fmt.Sprintf("f%d", i), ""))
		}
		return l
	}
	x := func(n int) te {
		e := f("x", "")
		e.pax = map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", n-len("user.a"))}
		return e
	}
	for _, tt := range []struct {
		name    string
		lim     limits
		in, out [][]te
		err     string
	}{
		{name: "name of 255/256", in: [][]te{{f(long, "")}}, out: [][]te{{f(long+"n", "")}}, err: "name longer than 255"},
		{name: "path of 4096/4097", in: [][]te{{f(deep, "")}}, out: [][]te{{f(deep+"c", "")}}, err: "path longer than 4096"},
		{name: "symlink target of 4095/4096", in: [][]te{{sym("s", strings.Repeat("t", 4095))}}, out: [][]te{{sym("s", strings.Repeat("t", 4096))}}, err: "target longer than 4095"},
		{name: "xattrs of 65536/65537", in: [][]te{{x(MaxXattrBytes)}}, out: [][]te{{x(MaxXattrBytes + 1)}}, err: "xattrs of more than"},
		{name: "entries", lim: limits{entries: 10}, in: [][]te{many(5), many(5)}, out: [][]te{many(5), many(6)}, err: "more than 10 entries"},
		{name: "entries implied", lim: limits{entries: 10}, in: [][]te{{f("a/b/c/d/e/f/g/h/i/j", "")}}, out: [][]te{{f("a/b/c/d/e/f/g/h/i/j/k", "")}}, err: "too many entries"},
		{name: "layers", lim: limits{layers: 3}, in: [][]te{{}, {}, {}}, out: [][]te{{}, {}, {}, {}}, err: "4 layers, at most 3"},
		{name: "uncompressed bytes", lim: limits{expandedBytes: 6 * 512}, in: [][]te{{f("a", "x")}}, out: [][]te{{f("a", "x"), f("b", "x"), f("c", ""), f("d", "")}}, err: "layers of more than 3072 bytes"},
		{name: "path through symlinks", in: [][]te{{sym("s", "."), f("s/x", "")}},
			out: [][]te{{dir(deep[:3000]), sym("s", "/"+deep[:3000]), f("s/"+deep[:2000]+"x", "")}}, err: "its path inside the image is longer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lim := defaultLimits
			if tt.lim.layers > 0 {
				lim.layers = tt.lim.layers
			}
			if tt.lim.entries > 0 {
				lim.entries = tt.lim.entries
			}
			if tt.lim.expandedBytes > 0 {
				lim.expandedBytes = tt.lim.expandedBytes
			}
			for i, layers := range [][][]te{tt.in, tt.out} {
				var tars [][]byte
				for _, l := range layers {
					tars = append(tars, tarOf(t, l))
				}
				_, _, err := squashMem(t, memImage(t, &lim, tars...))
				if i == 0 && err != nil {
					t.Errorf("at the limit: %v", err)
				}
				if i == 1 && (err == nil || !strings.Contains(err.Error(), tt.err)) {
					t.Errorf("past the limit: error %v, want %q", err, tt.err)
				}
			}
		})
	}
}

// sparseTar is a GNU sparse (PAX 1.0) file of a size with nothing in it.
func sparseTar(t *testing.T, size string) []byte {
	var b bytes.Buffer
	records := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=hole", "GNU.sparse.realsize=" + size} {
		n := len(kv) + 2
		for len(fmt.Sprint(n+len(fmt.Sprint(n)))) != len(fmt.Sprint(n)) {
			n++
		}
		rec := fmt.Sprintf("%d %s\n", len(kv)+2+len(fmt.Sprint(len(kv)+4)), kv)
		records += rec
	}
	header := func(name string, typ byte, n int) {
		var h [512]byte
		copy(h[:], name)
		copy(h[100:], "0000644\x000000000\x000000000\x00")
		copy(h[124:], fmt.Sprintf("%011o\x0000000000000\x00", n))
		copy(h[148:], "        ")
		h[156] = typ
		copy(h[257:], "ustar\x0000")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		b.Write(h[:])
	}
	pad := func() { b.Write(make([]byte, (512-b.Len()%512)%512)) }
	header("pax", 'x', len(records))
	b.WriteString(records)
	pad()
	m := fmt.Sprintf("1\n%s\n0\n", size)
	header("hole", '0', 512)
	b.WriteString(m)
	pad()
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

func TestSparse(t *testing.T) {
	tree, _, err := squashMem(t, memImage(t, nil, sparseTar(t, "1000000")))
	if err != nil {
		t.Fatal(err)
	}
	if n := tree.Lookup("hole"); n == nil || n.SizeBytes != 1000000 {
		t.Fatalf("node %+v", n)
	}
	// A few bytes must not become more than an image may hold.
	_, _, err = squashMem(t, memImage(t, nil, sparseTar(t, "99999999999999")))
	if err == nil || !strings.Contains(err.Error(), "files of more than") {
		t.Errorf("error %v", err)
	}
}

// TestMetadata is about what a header says of one inode.
func TestMetadata(t *testing.T) {
	one := func(h *tar.Header) (*Tree[int], error) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if h.Name == "" {
			h.Name = "x"
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		w.Close()
		tree, _, err := squashMem(t, memImage(t, nil, b.Bytes()))
		return tree, err
	}
	for _, tt := range []struct {
		name  string
		h     tar.Header
		check func(n *Node[int]) bool
		err   string
	}{
		{name: "uid 2^32-1", h: tar.Header{Uid: 1<<32 - 1, Gid: 1<<32 - 1}, check: func(n *Node[int]) bool { return n.UID == 1<<32-1 && n.GID == 1<<32-1 }},
		{name: "uid 2^32", h: tar.Header{Uid: 1 << 32}, err: "uid 4294967296"},
		{name: "gid 2^32", h: tar.Header{Gid: 1 << 32}, err: "gid 4294967296"},
		{name: "uid -1", h: tar.Header{Uid: -1, Format: tar.FormatGNU}, err: "uid -1"},
		{name: "nanoseconds before 1970", h: tar.Header{ModTime: time.Unix(-315619200, 123456789), Format: tar.FormatPAX},
			check: func(n *Node[int]) bool { return n.Mtime == Time{-315619200, 123456789} }},
		{name: "after 2038", h: tar.Header{ModTime: time.Date(2100, 1, 1, 0, 0, 0, 5, time.UTC), Format: tar.FormatPAX},
			check: func(n *Node[int]) bool {
				return n.Mtime.Time().Equal(time.Date(2100, 1, 1, 0, 0, 0, 5, time.UTC)) && n.Atime == nil
			}},
		{name: "atime and ctime", h: tar.Header{AccessTime: time.Unix(5, 6), ChangeTime: time.Unix(7, 8), Format: tar.FormatPAX},
			check: func(n *Node[int]) bool { return *n.Atime == Time{5, 6} && *n.Ctime == Time{7, 8} }},
		{name: "block device 4095:1048575", h: tar.Header{Typeflag: tar.TypeBlock, Devmajor: 4095, Devminor: 1048575, Format: tar.FormatGNU}, check: func(n *Node[int]) bool { return n.Major == 4095 && n.Minor == 1048575 && n.Type() == modeBlock }},
		{name: "major 4096", h: tar.Header{Typeflag: tar.TypeBlock, Devmajor: 4096, Format: tar.FormatGNU}, err: "device number 4096:0"},
		{name: "minor 1048576", h: tar.Header{Typeflag: tar.TypeChar, Devminor: 1 << 20, Format: tar.FormatGNU}, err: "device number 0:1048576"},
		{name: "character device 0:0", h: tar.Header{Typeflag: tar.TypeChar}, err: "character device 0:0"},
		{name: "character device 0:1", h: tar.Header{Typeflag: tar.TypeChar, Devminor: 1}, check: func(n *Node[int]) bool { return n.Minor == 1 }},
		{name: "FIFO", h: tar.Header{Typeflag: tar.TypeFifo, Mode: 0o600}, check: func(n *Node[int]) bool { return n.Mode == modeFIFO|0o600 }},
		{name: "type V", h: tar.Header{Typeflag: 'V', Format: tar.FormatGNU}, err: "of type 'V'"},
		{name: "empty symlink", h: tar.Header{Typeflag: tar.TypeSymlink}, err: "symlink to nothing"},
		{name: "xattrs", h: tar.Header{PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02", "LIBARCHIVE.xattr.user.a%20b": "aGk=", "LIBARCHIVE.xattr.user.c": "aGk",
			"SCHILY.xattr.user.c": "plain", "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.whiteout": "y",
			"SCHILY.xattr.com.apple.provenance": "x", "SCHILY.xattr.system.posix_acl_access": "\x02\x00\x00\x00"}},
			check: func(n *Node[int]) bool {
				return len(n.Xattrs.All()) == 4 && string(n.Xattrs.Get("security.capability")) == "\x01\x00\x00\x02" && string(n.Xattrs.Get("user.a b")) == "hi" && string(n.Xattrs.Get("user.c")) == "plain"
			}},
		{name: "xattr value not base64", h: tar.Header{PAXRecords: map[string]string{"LIBARCHIVE.xattr.user.a": "*"}}, err: "not base64"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.h.Typeflag == 0 {
				tt.h.Typeflag = tar.TypeReg
			}
			tree, err := one(&tt.h)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), `entry "x"`) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if n := tree.Lookup("x"); !tt.check(n) {
				t.Errorf("node %+v", n)
			}
			if tt.name == "xattrs" {
				if got := strings.Join(tree.Notes, "; "); got != "xattrs of no Linux namespace left out (1); xattrs of overlayfs left out (2)" {
					t.Errorf("notes %q", got)
				}
			}
		})
	}
}

// TestMetadataBudget fills the budget and looks at what it costs in truth.
func TestMetadataBudget(t *testing.T) {
	const budget = 16 << 20
	lim := defaultLimits
	lim.metadataBytes = budget
	pr, pw := io.Pipe()
	made := make(chan int, 1)
	go func() {
		w := tar.NewWriter(pw)
		n := 0
		for ; ; n++ {
			h := &tar.Header{Name: fmt.Sprintf("d%03d/file-%07d", n/1000, n), Typeflag: tar.TypeReg, Mode: 0o644}
			if w.WriteHeader(h) != nil {
				break
			}
		}
		made <- n
	}()
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	b := newBuilder[struct{}](emptySink{}, lim)
	b.begin(true)
	_, _, err := readTar(pr, b.add)
	pr.Close()
	if err == nil || !strings.Contains(err.Error(), "bytes of memory") {
		t.Fatalf("error %v", err)
	}
	used := heap() - before
	n := <-made
	t.Logf("%d entries, %d bytes an entry charged, %d used", n, budget/n, used/uint64(n))
	if used > budget*5/4 {
		t.Errorf("a budget of %d bytes let %d be used", budget, used)
	}
	runtime.KeepAlive(b)
}

type emptySink struct{}

func (emptySink) Place(r io.Reader, _ int64) (struct{}, error) {
	_, err := io.Copy(io.Discard, r)
	return struct{}{}, err
}
func (emptySink) Discard(struct{}) {}

func TestPut(t *testing.T) {
	tree, sink, err := squashMem(t, memImage(t, nil, tarOf(t, []te{
		dir("usr"), dir("usr/lib"), sym("lib", "usr/lib"), sym("usr/lib/agent", "/etc/passwd"), dir("etc"), f("etc/passwd", "root"),
		sym("loop", "loop"), f("file", "x"), f("two", "y"), hard("three", "two"), sym("sbin", "usr/sbin"), sym("abs", "/lib/../../etc/./passwd"), sym("up", ".."),
	})))
	if err != nil {
		t.Fatal(err)
	}
	n := func() *Node[int] { return &Node[int]{Mode: modeRegular | 0o755, Content: 99} }
	for path, want := range map[string]string{"lib/agent": "", "/sbin/x/y": "", "two": "", "loop/x": "too many levels", "file/x": "not a directory", "a/../b": `".."`, "/": "root cannot"} {
		err := tree.Put(path, n())
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("put %q: error %v, want %q", path, err, want)
		}
	}
	if got := tree.Lookup("usr/lib/agent"); got == nil || got.Type() != modeRegular {
		t.Errorf("the planted symlink stayed: %+v", got)
	}
	if got := tree.Lookup("etc/passwd"); string(sink.files[got.Content]) != "root" {
		t.Error("written through a planted symlink")
	}
	if tree.Lookup("usr/sbin/x/y") == nil || tree.Lookup("three").Nlink != 1 {
		t.Error("parents or link counts wrong")
	}
	if tree.Resolve("abs") != tree.Lookup("etc/passwd") || tree.Resolve("loop") != nil || tree.Resolve("up") != tree.Lookup("/") || tree.Resolve("nothing") != nil {
		t.Error("Resolve wrong")
	}
	if !tree.Remove("three") || tree.Remove("three") || !tree.Remove("lib/agent") || tree.Lookup("usr/lib/agent") != nil {
		t.Error("Remove wrong")
	}
	// "y" lost both its names, the agent its only one.
	if len(sink.discarded) != 2 || !sink.discarded[99] {
		t.Errorf("discarded %v", sink.discarded)
	}
}

// benchTree is a tar like that of a distribution: many small files, some big.
func benchTree(b *testing.B) []byte {
	var l []te
	text := strings.Repeat("all work and no play makes jack a dull boy\n", 300)
	big := noise(1 << 20)
	for i := range 4000 {
		if i%100 == 0 {
			l = append(l, dir(fmt.Sprintf("usr/share/d%d", i/100)))
		}
		l = append(l, f(fmt.Sprintf("usr/share/d%d/f%d", i/100, i), text[i%1000:]))
	}
	for i := range 60 {
		l = append(l, f(fmt.Sprintf("usr/lib/l%d", i), big[i*1000:]))
	}
	return tarOf(b, l)
}

// cpu reports the processor time of a benchmark, all threads together: on a
// busy machine the wall clock says little.
func cpu(b *testing.B) func() {
	spent := func() int64 {
		var ru unix.Rusage
		_ = unix.Getrusage(unix.RUSAGE_SELF, &ru)
		return ru.Utime.Nano() + ru.Stime.Nano()
	}
	start := spent()
	return func() { b.ReportMetric(float64(spent()-start)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkSquash is the whole pipeline into a sink that drops everything.
func BenchmarkSquash(b *testing.B) {
	raw := benchTree(b)
	stored := gz(b, raw)
	b.SetBytes(int64(len(raw)))
	defer cpu(b)()
	for b.Loop() {
		img := &Image{Name: "test", source: &Source{}, from: memBlobs{sum(stored): stored},
			Layers: []Layer{{Digest: sum(stored), DiffID: sum(raw), MediaType: mediaOCILayer + "+gzip", SizeBytes: int64(len(stored))}}}
		if _, err := Squash(b.Context(), img, emptySink{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFloor is the plain sum: both hashes and inflate, one after the other.
func BenchmarkFloor(b *testing.B) {
	raw := benchTree(b)
	stored := gz(b, raw)
	b.SetBytes(int64(len(raw)))
	defer cpu(b)()
	for b.Loop() {
		outer, inner := sha256.New(), sha256.New()
		outer.Write(stored)
		r, err := gzip.NewReader(bytes.NewReader(stored))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyBuffer(struct{ io.Writer }{inner}, struct{ io.Reader }{r}, make([]byte, chunkBytes)); err != nil {
			b.Fatal(err)
		}
	}
}
