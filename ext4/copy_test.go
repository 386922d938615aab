//go:build linux

package ext4

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger/ext4/internal/e2fs"
)

// scratch is a new mounted file system, and the image or "" it is in.
func scratch(t testing.TB, fstype string, sizeBytes int64) (dir, image string, unmount func()) {
	t.Helper()
	switch fstype {
	case "tmpfs":
		dir, unmount = e2fs.MountType(t, fstype, fstype, fmt.Sprintf("size=%d", sizeBytes))
		return dir, "", unmount
	case "ramfs":
		dir, unmount = e2fs.MountType(t, fstype, fstype, "mode=0700")
		return dir, "", unmount
	}
	f := newImage(t)
	must(t, f.Truncate(sizeBytes))
	var mkfs []string
	switch fstype {
	case "ext4":
		must(t, Format(f, params(sizeBytes), nil))
	case "xfs":
		mkfs = []string{"-q", "-m", "reflink=1", f.Name()}
	case "btrfs":
		mkfs = []string{"-q", f.Name()}
	default:
		t.Fatalf("unknown file system %q", fstype)
	}
	if mkfs != nil {
		if out, exit := e2fs.Run(t, "mkfs."+fstype, mkfs...); exit != 0 {
			t.Fatalf("mkfs.%s: exit %d: %s", fstype, exit, out)
		}
	}
	dir, unmount = e2fs.MountType(t, fstype, f.Name(), "loop")
	// Only what a test makes is to be seen there.
	if err := os.Remove(filepath.Join(dir, "lost+found")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return dir, f.Name(), unmount
}

// refuse makes operations fail as where the file system has no such thing.
func refuse(operations ...string) func(string) error {
	return func(op string) error {
		if slices.Contains(operations, op) {
			return syscall.EOPNOTSUPP
		}
		return nil
	}
}

// The ways a copy can go, by what the file system does not offer.
var copyWays = map[string][]string{
	"reflink":        nil,
	"extents":        {"FICLONE"},
	"blocks":         {"FICLONE", "SEEK_DATA"},
	"named":          {"O_TMPFILE"},
	"named, extents": {"O_TMPFILE", "FICLONE"},
}

func copyRefusing(dst, src string, operations ...string) error {
	return (&copying{ctx: context.Background(), fault: refuse(operations...)}).run(dst, src)
}

// A diskImage is a sparse file: holes where no piece is.
type diskImage struct {
	sizeBytes int64
	pieces    []piece
}

func letters(n int) []byte { return bytes.Repeat([]byte("banger! "), n/8+1)[:n] }

func (s diskImage) write(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	must(t, err)
	must(t, f.Truncate(s.sizeBytes))
	for _, p := range s.pieces {
		_, err := f.WriteAt(p.data, p.at)
		must(t, err)
	}
	must(t, f.Sync())
	must(t, f.Close())
}

// naive is the whole content, one byte after the other.
func (s diskImage) naive() []byte {
	b := make([]byte, s.sizeBytes)
	for _, p := range s.pieces {
		copy(b[p.at:], p.data)
	}
	return b
}

// dataMap is what the file system says where data is.
func dataMap(t testing.TB, path string) (ranges [][2]int64) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	for at := int64(0); ; {
		start, err := syscall.Seek(int(f.Fd()), at, 3)
		if errors.Is(err, syscall.ENXIO) {
			return ranges
		}
		must(t, err)
		at, err = syscall.Seek(int(f.Fd()), start, 4)
		must(t, err)
		ranges = append(ranges, [2]int64{start, at})
	}
}

func stat(t testing.TB, path string) (st syscall.Stat_t) {
	t.Helper()
	must(t, syscall.Lstat(path, &st))
	return st
}

// freeBytes is what a file system has free once it has written everything.
func freeBytes(t testing.TB, dir string) int64 {
	t.Helper()
	if out, exit := e2fs.Run(t, "sync", "-f", dir); exit != 0 {
		t.Fatalf("sync: exit %d: %s", exit, out)
	}
	var st syscall.Statfs_t
	must(t, syscall.Statfs(dir, &st))
	return int64(st.Bfree) * st.Bsize
}

// checkCopy requires the bytes of the image and the holes of src, and a file
// for its owner only.
func checkCopy(t *testing.T, dst, src string, s diskImage) {
	t.Helper()
	st, want := stat(t, dst), stat(t, src)
	if st.Mode != syscall.S_IFREG|0o600 || st.Nlink != 1 {
		t.Errorf("copy: mode %o, %d links", st.Mode, st.Nlink)
	}
	if st.Size != s.sizeBytes {
		t.Errorf("copy: %d bytes, want %d", st.Size, s.sizeBytes)
	}
	got, wantMap := dataMap(t, dst), dataMap(t, src)
	if !slices.Equal(got, wantMap) {
		t.Errorf("copy: data at %v\nthe source has it at %v", got, wantMap)
	}
	// Extent blocks count too, and depend on what was free where.
	if st.Blocks > want.Blocks+8*(1+int64(len(got))/64) {
		t.Errorf("copy: %d blocks of 512 bytes, the source has %d", st.Blocks, want.Blocks)
	}
	f, err := os.Open(dst)
	must(t, err)
	defer f.Close()
	if s.sizeBytes <= 64<<20 {
		b, err := io.ReadAll(f)
		must(t, err)
		if !bytes.Equal(b, s.naive()) {
			t.Errorf("copy: other bytes")
		}
		return
	}
	// All else are holes in a map that is as it should be.
	for _, p := range s.pieces {
		b := make([]byte, len(p.data))
		_, err := f.ReadAt(b, p.at)
		must(t, err)
		if !bytes.Equal(b, p.data) {
			t.Errorf("copy: other bytes at %d", p.at)
		}
	}
}

// contents is all that can be seen in a directory.
func contents(t testing.TB, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	all := map[string]string{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		st := stat(t, path)
		what := fmt.Sprintf("inode %d mode %o links %d size %d", st.Ino, st.Mode, st.Nlink, st.Size)
		if e.Type() == fs.ModeSymlink {
			target, err := os.Readlink(path)
			must(t, err)
			what += " -> " + target
		}
		if e.Type().IsRegular() && st.Size <= 1<<20 {
			b, err := os.ReadFile(path)
			must(t, err)
			what += " " + string(b)
		}
		all[e.Name()] = what
	}
	return all
}

// unchanged requires a directory to be as it was.
func unchanged(t testing.TB, dir string, before map[string]string) {
	t.Helper()
	if after := contents(t, dir); !maps.Equal(before, after) {
		t.Errorf("%d entries became %d: %q", len(before), len(after), slices.Sorted(maps.Keys(after)))
	}
}

// A row for every boundary, every way, every file system.
func TestCopyFile(t *testing.T) {
	images := map[string]diskImage{
		"size-0":          {},
		"only-hole":       {1 << 20, nil},
		"hole-of-1":       {1, nil},
		"hole-at-start":   {1<<20 + 4096, []piece{{1 << 20, letters(4096)}}},
		"hole-at-end":     {1 << 20, []piece{{0, letters(4096)}}},
		"hole-at-end-odd": {1<<20 + 1, []piece{{0, letters(4097)}}},
		"holes-between":   {1 << 20, []piece{{4096, letters(8192)}, {65536, letters(4096)}, {1<<20 - 4096, letters(4096)}}},
		"last-block-odd":  {1<<20 + 5, []piece{{1 << 20, letters(5)}}},
		"sparse-5GiB":     {5<<30 + 1, []piece{{0, letters(4096)}, {1<<31 - 4096, letters(8192)}, {1<<32 - 1, letters(2)}, {5 << 30, letters(1)}}},
		"data-9MiB":       {9<<20 + 7, []piece{{0, letters(9<<20 + 7)}}},
	}
	for _, n := range []int{1, 4095, 4096, 4097, copyChunkBytes - 1, copyChunkBytes, copyChunkBytes + 1} {
		images[fmt.Sprintf("size-%d", n)] = diskImage{int64(n), []piece{{0, letters(n)}}}
	}
	many := diskImage{sizeBytes: 400 * 8192}
	for i := range int64(400) {
		many.pieces = append(many.pieces, piece{i * 8192, letters(4096)})
	}
	images["extents-400"] = many
	for _, fstype := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(fstype, func(t *testing.T) {
			dir, _, _ := scratch(t, fstype, 512<<20)
			for name, s := range images {
				src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
				s.write(t, src)
				for way, refused := range copyWays {
					if s.sizeBytes > 1<<30 && way == "blocks" && fstype != "tmpfs" {
						continue // reads holes into the page cache, slowly
					}
					t.Run(name+"/"+way, func(t *testing.T) {
						must(t, copyRefusing(dst, src, refused...))
						checkCopy(t, dst, src, s)
						if names := contents(t, dir); len(names) != 2 {
							t.Errorf("left behind: %q", slices.Sorted(maps.Keys(names)))
						}
						must(t, os.Remove(dst))
					})
				}
				must(t, os.Remove(src))
			}
		})
	}
}

// From each file system to each other one, where neither FICLONE nor, since
// Linux 5.19, copy_file_range goes.
func TestCopyFileAcross(t *testing.T) {
	s := diskImage{64 << 20, []piece{{8192, letters(5 << 20)}, {32 << 20, letters(4096)}}}
	dirs := map[string]string{}
	for _, fstype := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		dirs[fstype], _, _ = scratch(t, fstype, 512<<20)
	}
	for from, srcDir := range dirs {
		src := filepath.Join(srcDir, "src")
		s.write(t, src)
		for to, dstDir := range dirs {
			t.Run(from+"-to-"+to, func(t *testing.T) {
				dst := filepath.Join(dstDir, "dst")
				must(t, CopyFile(context.Background(), dst, src))
				checkCopy(t, dst, src, s)
				must(t, os.Remove(dst))
			})
		}
	}
}

// A reflink takes no room and is a copy all the same. copy_file_range shares
// blocks too where it can; that shows that it is what copies extents.
func TestCopyFileShares(t *testing.T) {
	const size = 32 << 20
	for _, fstype := range []string{"xfs", "btrfs"} {
		for way, row := range map[string]struct {
			refused []string
			shares  bool
		}{
			"reflink": {nil, true},
			"extents": {[]string{"FICLONE"}, true},
			"blocks":  {[]string{"FICLONE", "SEEK_DATA"}, false},
		} {
			t.Run(fstype+"/"+way, func(t *testing.T) {
				dir, _, _ := scratch(t, fstype, 512<<20)
				src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
				s := diskImage{size, []piece{{0, letters(size)}}}
				s.write(t, src)
				before := freeBytes(t, dir)
				operations := map[string]int{}
				c := &copying{ctx: context.Background(), fault: func(op string) error {
					operations[op]++
					return refuse(row.refused...)(op)
				}}
				must(t, c.run(dst, src))
				want := map[string]int{}
				switch way {
				case "extents":
					want["copy"] = size / copyChunkBytes
				case "blocks":
					want["write"] = size / len(zeros)
				}
				if operations["copy"] != want["copy"] || operations["write"] != want["write"] {
					t.Errorf("operations %v, want %v", operations, want)
				}
				took := before - freeBytes(t, dir)
				extents, _ := e2fs.Run(t, "filefrag", "-v", dst)
				shared := strings.Contains(extents, "shared")
				if shared != row.shares || (took < size/8) != row.shares {
					t.Errorf("the copy took %d bytes of %d\n%s", took, size, extents)
				}
				f, err := os.OpenFile(dst, os.O_WRONLY, 0)
				must(t, err)
				_, err = f.WriteAt([]byte("only here"), 12345)
				must(t, errors.Join(err, f.Close()))
				if b, err := os.ReadFile(src); err != nil || !bytes.Equal(b, s.naive()) {
					t.Errorf("writing to the copy changed the source (%v)", err)
				}
			})
		}
	}
}

// ramfs has holes and does not know where: SEEK_DATA says all is data.
func TestCopyFileWithoutMap(t *testing.T) {
	from, _, _ := scratch(t, "ramfs", 0)
	to, _, _ := scratch(t, "ext4", 64<<20)
	src, dst := filepath.Join(from, "src"), filepath.Join(to, "dst")
	s := diskImage{48 << 20, []piece{{8192, letters(4096)}, {48<<20 - 4096, letters(4096)}}}
	s.write(t, src)
	if m := dataMap(t, src); !slices.Equal(m, [][2]int64{{0, s.sizeBytes}}) {
		t.Fatalf("ramfs knows its holes: data at %v", m)
	}
	must(t, CopyFile(context.Background(), dst, src))
	if b, err := os.ReadFile(dst); err != nil || !bytes.Equal(b, s.naive()) {
		t.Errorf("other bytes (%v)", err)
	}
	if m := dataMap(t, dst); !slices.Equal(m, [][2]int64{{8192, 12288}, {48<<20 - 4096, 48 << 20}}) {
		t.Errorf("data at %v", m)
	}
}

// Blocks of zeros stay data where the map says so, and blocks that were
// reserved and never written are holes.
func TestCopyFileZeros(t *testing.T) {
	dir, _, _ := scratch(t, "ext4", 64<<20)
	src := filepath.Join(dir, "src")
	s := diskImage{16 << 20, []piece{{4096, make([]byte, 65536)}, {1 << 20, letters(4096)}}}
	s.write(t, src)
	f, err := os.OpenFile(src, os.O_WRONLY, 0)
	must(t, err)
	must(t, errors.Join(syscall.Fallocate(int(f.Fd()), 0, 8<<20, 4<<20), f.Sync(), f.Close()))
	// In this order: once the second has read them into the page cache, the
	// kernel calls the reserved blocks data.
	for _, row := range []struct {
		way  string
		want [][2]int64
	}{
		{"extents", [][2]int64{{4096, 4096 + 65536}, {1 << 20, 1<<20 + 4096}}},
		{"blocks", [][2]int64{{1 << 20, 1<<20 + 4096}}},
	} {
		way, want := row.way, row.want
		dst := filepath.Join(dir, way)
		must(t, copyRefusing(dst, src, copyWays[way]...))
		if m := dataMap(t, dst); !slices.Equal(m, want) {
			t.Errorf("%s: data at %v, want %v", way, m, want)
		}
		if b, err := os.ReadFile(dst); err != nil || !bytes.Equal(b, s.naive()) {
			t.Errorf("%s: other bytes (%v)", way, err)
		}
		var bytes int64
		for _, r := range want {
			bytes += r[1] - r[0]
		}
		if got := stat(t, dst).Blocks * 512; got > bytes+4096 { // an extent block
			t.Errorf("%s: %d bytes allocated for %d", way, got, bytes)
		}
	}
}

// Random sparse files against the naive copy; EXT4_COPIES gives their number,
// EXT4_SEED the first seed.
func TestRandomCopies(t *testing.T) {
	types := []string{"ext4", "xfs", "btrfs", "tmpfs"}
	var dirs []string
	for _, fstype := range types {
		dir, _, _ := scratch(t, fstype, 512<<20)
		dirs = append(dirs, dir)
	}
	ways := slices.Sorted(maps.Keys(copyWays))
	first := number("EXT4_SEED", uint64(time.Now().UnixNano()))
	for seed := first; seed < first+number("EXT4_COPIES", 300); seed++ {
		r := rand.New(rand.NewPCG(seed, 0))
		s := diskImage{sizeBytes: r.Int64N(1 << (1 + r.IntN(24)))}
		for range r.IntN(20) {
			if s.sizeBytes == 0 {
				break
			}
			at := r.Int64N(s.sizeBytes)
			if r.IntN(2) == 0 {
				at -= at % 4096
			}
			data := make([]byte, r.Int64N(min(s.sizeBytes-at, 1<<(1+r.IntN(20))))+1)
			for i := range data {
				data[i] = byte(r.Uint32()) | 1
			}
			s.pieces = append(s.pieces, piece{at, data})
		}
		from, to, way := r.IntN(len(dirs)), r.IntN(len(dirs)), ways[r.IntN(len(ways))]
		src, dst := filepath.Join(dirs[from], "src"), filepath.Join(dirs[to], "dst")
		s.write(t, src)
		must(t, copyRefusing(dst, src, copyWays[way]...))
		checkCopy(t, dst, src, s)
		if t.Failed() {
			t.Fatalf("EXT4_SEED=%d: %s to %s, %s, %d bytes in %d pieces", seed, types[from], types[to], way, s.sizeBytes, len(s.pieces))
		}
		must(t, errors.Join(os.Remove(src), os.Remove(dst)))
	}
}

// What is there is never touched, whatever it is and whenever it came.
func TestCopyFileExists(t *testing.T) {
	put := map[string]func(path string) error{
		"file":               func(path string) error { return os.WriteFile(path, []byte("old"), 0o640) },
		"empty-file":         func(path string) error { return os.WriteFile(path, nil, 0o640) },
		"directory":          func(path string) error { return os.Mkdir(path, 0o755) },
		"symlink":            func(path string) error { return os.Symlink("other", path) },
		"dangling-symlink":   func(path string) error { return os.Symlink("nowhere", path) },
		"symlink-to-itself":  func(path string) error { return os.Symlink("dst", path) },
		"symlink-to-src":     func(path string) error { return os.Symlink("src", path) },
		"hard-link-of-src":   func(path string) error { return os.Link(filepath.Join(filepath.Dir(path), "src"), path) },
		"fifo":               func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"symlink-to-outside": func(path string) error { return os.Symlink("/nowhere/at/all", path) },
	}
	for what, make := range put {
		for _, when := range []string{"before", "O_TMPFILE", "link"} {
			for way, refused := range map[string][]string{"unnamed": nil, "named": {"O_TMPFILE"}} {
				t.Run(what+"/"+when+"/"+way, func(t *testing.T) {
					dir := t.TempDir()
					src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
					must(t, os.WriteFile(src, letters(5000), 0o644))
					must(t, os.WriteFile(filepath.Join(dir, "other"), []byte("other"), 0o644))
					var before map[string]string
					there := func() {
						must(t, make(dst))
						before = contents(t, dir)
					}
					if when == "before" {
						there()
					}
					c := &copying{ctx: context.Background(), fault: func(op string) error {
						if op == when {
							there()
						}
						if op == "FICLONE" && when == "before" {
							t.Error("copies what can have no name")
						}
						return refuse(refused...)(op)
					}}
					err := c.run(dst, src)
					if !errors.Is(err, fs.ErrExist) {
						t.Errorf("error %v", err)
					}
					for name := range before { // the temporary one is not to stay
						if strings.HasPrefix(name, copyPrefix) {
							delete(before, name)
						}
					}
					unchanged(t, dir, before)
				})
			}
		}
	}
	t.Run("itself", func(t *testing.T) {
		dir := t.TempDir()
		src := filepath.Join(dir, "src")
		must(t, os.WriteFile(src, letters(5000), 0o644))
		before := contents(t, dir)
		if err := CopyFile(context.Background(), src, src); !errors.Is(err, fs.ErrExist) {
			t.Errorf("error %v", err)
		}
		unchanged(t, dir, before)
	})
}

// Destinations that name no new file.
func TestCopyFileDestination(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	must(t, os.WriteFile(src, letters(5000), 0o644))
	before := contents(t, dir)
	for dst, want := range map[string]error{
		"":                               nil,
		dir + "/":                        nil,
		dir + "/dst/":                    nil,
		dir + "/.":                       fs.ErrExist,
		dir + "/..":                      nil,
		dir + "/none/dst":                fs.ErrNotExist,
		src + "/dst":                     syscall.ENOTDIR,
		dir + "/nul\x00":                 syscall.EINVAL,
		dir + "/" + string(letters(256)): syscall.ENAMETOOLONG,
	} {
		err := CopyFile(context.Background(), dst, src)
		if err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%q: error %v, want %v", dst, err, want)
		}
	}
	unchanged(t, dir, before)
	// The longest name leaves no room for a longer temporary one.
	longest := filepath.Join(dir, string(letters(255)))
	for way, refused := range copyWays {
		if err := copyRefusing(longest, src, refused...); err != nil {
			t.Errorf("%s: %v", way, err)
		}
		must(t, os.Remove(longest))
	}
	t.Chdir(dir)
	must(t, CopyFile(context.Background(), "dst", "src"))
}

// Of many copies to one name one wins, whole, and the others leave nothing.
func TestCopyFileConcurrent(t *testing.T) {
	const many = 8
	for way, refused := range copyWays {
		t.Run(way, func(t *testing.T) {
			dir := t.TempDir()
			dst := filepath.Join(dir, "dst")
			errs := make([]error, many)
			var ready, done sync.WaitGroup
			ready.Add(many)
			for i := range many {
				src := filepath.Join(dir, fmt.Sprint(i))
				must(t, os.WriteFile(src, bytes.Repeat([]byte{'0' + byte(i)}, 100_000), 0o644))
				done.Go(func() {
					c := &copying{ctx: context.Background(), fault: func(op string) error {
						if op == "link" { // all have seen that it is not there
							ready.Done()
							ready.Wait()
						}
						return refuse(refused...)(op)
					}}
					errs[i] = c.run(dst, src)
				})
			}
			done.Wait()
			won := -1
			for i, err := range errs {
				switch {
				case err == nil && won < 0:
					won = i
				case err == nil:
					t.Errorf("%d and %d both won", won, i)
				case !errors.Is(err, fs.ErrExist):
					t.Errorf("%d: %v", i, err)
				}
			}
			if won < 0 {
				t.Fatal("none won")
			}
			if b, err := os.ReadFile(dst); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{'0' + byte(won)}, 100_000)) {
				t.Errorf("not the bytes of %d, who won (%v)", won, err)
			}
			if names := contents(t, dir); len(names) != many+1 {
				t.Errorf("left behind: %q", slices.Sorted(maps.Keys(names)))
			}
		})
	}
}

// Sources that are no image, or none that stays the same.
func TestCopyFileSource(t *testing.T) {
	dir := t.TempDir()
	dst := filepath.Join(dir, "dst")
	fifo, socket := filepath.Join(dir, "fifo"), filepath.Join(dir, "socket")
	must(t, syscall.Mkfifo(fifo, 0o600))
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	must(t, err)
	defer syscall.Close(fd)
	must(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: socket}))
	before := contents(t, dir)
	for _, src := range []string{fifo, socket, dir, "/dev/zero", "/dev/null"} {
		done := make(chan error, 1)
		go func() { done <- CopyFile(context.Background(), dst, src) }()
		select {
		case err := <-done:
			if err == nil || !strings.Contains(err.Error(), "not a regular file") {
				t.Errorf("%s: error %v", src, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: waits", src)
		}
	}
	if err := CopyFile(context.Background(), dst, filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no source: error %v", err)
	}
	unchanged(t, dir, before)

	src := filepath.Join(dir, "src")
	for name, change := range map[string]func() error{
		"grows":       func() error { return os.Truncate(src, 9<<20+1) },
		"shrinks":     func() error { return os.Truncate(src, 5<<20) },
		"is-emptied":  func() error { return os.Truncate(src, 0) },
		"is-modified": func() error { return os.Chtimes(src, time.Time{}, testTime) },
	} {
		for way, refused := range copyWays {
			for _, when := range []string{"FICLONE", "copy", "read", "look at the image again"} {
				t.Run(name+"/"+way+"/"+when, func(t *testing.T) {
					must(t, os.WriteFile(src, letters(9<<20), 0o644))
					changed := false
					c := &copying{ctx: context.Background(), fault: func(op string) error {
						if op == when && !changed {
							must(t, change())
							changed = true
						}
						return refuse(refused...)(op)
					}}
					err := c.run(dst, src)
					switch {
					case !changed: // this way does not come by there
						must(t, err)
						must(t, os.Remove(dst))
					case !errors.Is(err, errImageChanged):
						t.Errorf("error %v", err)
					}
					must(t, os.Remove(src))
					unchanged(t, dir, before)
				})
			}
		}
	}
}

// A source that is short for a moment: what was not there is not in the copy.
func TestCopyFileSourceFlickers(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	must(t, os.WriteFile(src, letters(3*copyChunkBytes), 0o644))
	must(t, os.Chtimes(src, testTime, testTime))
	before := contents(t, dir)
	for _, way := range []string{"extents", "blocks"} {
		c := &copying{ctx: context.Background(), fault: func(op string) error {
			switch op {
			case "copy", "read":
				must(t, os.Truncate(src, 100))
			case "look at the image again":
				must(t, os.Truncate(src, 3*copyChunkBytes))
				must(t, os.Chtimes(src, testTime, testTime))
			}
			return refuse(copyWays[way]...)(op)
		}}
		if err := c.run(dst, src); !errors.Is(err, errImageChanged) {
			t.Errorf("%s: error %v", way, err)
		}
		must(t, os.WriteFile(src, letters(3*copyChunkBytes), 0o644))
		must(t, os.Chtimes(src, testTime, testTime))
		unchanged(t, dir, before)
	}
}

// A symlink to an image is one.
func TestCopyFileSymlinkSource(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	s := diskImage{5000, []piece{{0, letters(5000)}}}
	s.write(t, src)
	must(t, os.Symlink("src", filepath.Join(dir, "link")))
	must(t, CopyFile(context.Background(), dst, filepath.Join(dir, "link")))
	checkCopy(t, dst, src, s)
}

// A full disk is as it was before.
func TestCopyFileNoSpace(t *testing.T) {
	for _, row := range []struct {
		fstype    string
		sizeBytes int
		ways      []string
		within    []string // the ways that take room in one file system too
	}{
		{"ext4", 16 << 20, slices.Sorted(maps.Keys(copyWays)), slices.Sorted(maps.Keys(copyWays))},
		{"tmpfs", 16 << 20, slices.Sorted(maps.Keys(copyWays)), slices.Sorted(maps.Keys(copyWays))},
		{"xfs", 320 << 20, []string{"reflink"}, nil},
		{"btrfs", 320 << 20, []string{"reflink"}, nil},
	} {
		one := func(t *testing.T, way string, within bool) {
			dir, _, _ := scratch(t, row.fstype, int64(row.sizeBytes))
			src, n := filepath.Join(t.TempDir(), "src"), row.sizeBytes+1
			if within {
				src, n = filepath.Join(dir, "src"), row.sizeBytes/5*3
			}
			s := diskImage{int64(row.sizeBytes) + 1, []piece{{0, letters(n)}}}
			s.write(t, src)
			before, beforeFree := contents(t, dir), freeBytes(t, dir)
			err := copyRefusing(filepath.Join(dir, "dst"), src, copyWays[way]...)
			if !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("error %v", err)
			}
			unchanged(t, dir, before)
			if after := freeBytes(t, dir); after < beforeFree-1<<20 {
				t.Errorf("%d bytes free before, %d after", beforeFree, after)
			}
		}
		for _, way := range row.ways {
			t.Run(row.fstype+"/across/"+way, func(t *testing.T) { one(t, way, false) })
		}
		for _, way := range row.within {
			t.Run(row.fstype+"/within/"+way, func(t *testing.T) { one(t, way, true) })
		}
	}
}

// Cancelled at any operation, whatever the way.
func TestCopyFileCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	must(t, os.WriteFile(src, letters(3*copyChunkBytes), 0o644))
	before := contents(t, dir)
	if err := CopyFile(ctx, dst, src); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	unchanged(t, dir, before)
	for way, refused := range copyWays {
		for i := 0; ; i++ {
			ctx, cancel := context.WithCancel(context.Background())
			n, cancelledAt := 0, ""
			c := &copying{ctx: ctx, fault: func(op string) error {
				if n == i {
					cancelledAt = op
					cancel()
				}
				n++
				return refuse(refused...)(op)
			}}
			err := c.run(dst, src)
			cancel()
			if cancelledAt == "" {
				must(t, err)
				must(t, os.Remove(dst))
				break
			}
			// Only the last operation is too late.
			if cancelledAt == "fsync the directory" {
				must(t, err)
				must(t, os.Remove(dst))
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("%s, cancelled at %d, %s: error %v", way, i, cancelledAt, err)
			}
			if n > i+1 {
				t.Errorf("%s, cancelled at %d, %s: %d operations more", way, i, cancelledAt, n-i-1)
			}
			unchanged(t, dir, before)
		}
	}
}

// Every operation fails once, in every way: there is an error and nothing, or
// none and a whole copy, made another way.
func TestCopyFileFaults(t *testing.T) {
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(entries)
	}
	seen := map[string]bool{}
	for _, fstype := range []string{"ext4", "btrfs"} {
		dir, _, _ := scratch(t, fstype, 512<<20)
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		s := diskImage{7 << 20, []piece{{4096, letters(copyChunkBytes + 4096)}, {6 << 20, letters(4096)}}}
		s.write(t, src)
		before := contents(t, dir)
		for way, refused := range copyWays {
			for i := 0; ; i++ {
				n, failed, open := 0, "", descriptors()
				c := &copying{ctx: context.Background(), fault: func(op string) error {
					n++
					if n-1 == i {
						failed = op
						return syscall.EIO
					}
					return refuse(refused...)(op)
				}}
				err := c.run(dst, src)
				if descriptors() != open {
					t.Fatalf("%s, %s, operation %d, %s: %d descriptors left open", fstype, way, i, failed, descriptors()-open)
				}
				seen[failed] = true
				switch failed {
				case "", "O_TMPFILE", "FICLONE", "SEEK_DATA":
					must(t, err)
					checkCopy(t, dst, src, s)
					must(t, os.Remove(dst))
				default:
					if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), failed) {
						t.Errorf("%s, %s, operation %d, %s: error %v", fstype, way, i, failed, err)
					}
				}
				unchanged(t, dir, before)
				if failed == "" {
					break
				}
			}
		}
	}
	delete(seen, "")
	want := []string{"FICLONE", "O_TMPFILE", "SEEK_DATA", "copy", "create", "fsync", "fsync the directory", "link", "look at the image again",
		"look for the destination", "open the directory", "open the image", "read", "seek", "set the size", "unlink", "write"}
	if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, want) {
		t.Errorf("operations that failed once: %q", got)
	}
}

// A file system that is read-only gives its own reason.
func TestCopyFileReadOnly(t *testing.T) {
	dir, image, unmount := scratch(t, "ext4", 16<<20)
	src := filepath.Join(dir, "src")
	must(t, os.WriteFile(src, letters(5000), 0o644))
	unmount()
	dir, _ = e2fs.Mount(t, image, "ro")
	before := contents(t, dir)
	err := CopyFile(context.Background(), filepath.Join(dir, "dst"), filepath.Join(dir, "src"))
	if !errors.Is(err, syscall.EROFS) {
		t.Errorf("error %v", err)
	}
	unchanged(t, dir, before)
}

// kill -9 at an operation leaves what CopyFile says.
func TestCopyFileKilled(t *testing.T) {
	if at := os.Getenv("EXT4_COPY_STOP"); at != "" { // the child
		c := &copying{ctx: context.Background(), fault: func(op string) error {
			if op == at {
				fmt.Println("stopped")
				time.Sleep(time.Hour)
			}
			return refuse(strings.Split(os.Getenv("EXT4_COPY_REFUSE"), ",")...)(op)
		}}
		t.Fatalf("not killed: %v", c.run("dst", "src"))
	}
	for _, row := range []struct {
		refused, at string
		temporary   int
		whole       bool
	}{
		{"FICLONE", "copy", 0, false},
		{"FICLONE", "link", 0, false},
		{"FICLONE", "fsync the directory", 0, true},
		{"FICLONE,O_TMPFILE", "copy", 1, false},
		{"FICLONE,O_TMPFILE", "link", 1, false},
		{"FICLONE,O_TMPFILE", "unlink", 1, true},
		{"FICLONE,O_TMPFILE", "fsync the directory", 0, true},
	} {
		t.Run(row.refused+"/"+row.at, func(t *testing.T) {
			dir := t.TempDir()
			src := letters(5000)
			must(t, os.WriteFile(filepath.Join(dir, "src"), src, 0o644))
			cmd := exec.Command(os.Args[0], "-test.run=^TestCopyFileKilled$")
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "EXT4_COPY_STOP="+row.at, "EXT4_COPY_REFUSE="+row.refused)
			out, err := cmd.StdoutPipe()
			must(t, err)
			must(t, cmd.Start())
			line, err := bufio.NewReader(out).ReadString('\n')
			must(t, cmd.Process.Kill())
			cmd.Wait() // killed
			if line != "stopped\n" {
				t.Fatalf("child: %q, %v", line, err)
			}
			names := contents(t, dir)
			delete(names, "src")
			if _, whole := names["dst"]; whole != row.whole {
				t.Errorf("dst there: %v, want %v", whole, row.whole)
			} else if whole {
				b, err := os.ReadFile(filepath.Join(dir, "dst"))
				must(t, err)
				if !bytes.Equal(b, src) {
					t.Error("dst has other bytes")
				}
			}
			delete(names, "dst")
			temporary := 0
			for name := range names {
				if strings.HasPrefix(name, copyPrefix) {
					temporary++
					delete(names, name)
				}
			}
			if temporary != row.temporary || len(names) != 0 {
				t.Errorf("%d temporary files, want %d; others: %q", temporary, row.temporary, slices.Sorted(maps.Keys(names)))
			}
		})
	}
}

// The disk as a power cut would leave it: without what only the page cache
// knew. Before the link nothing is there, after CopyFile all of it.
func TestCopyFilePowerCut(t *testing.T) {
	s := diskImage{8 << 20, []piece{{4096, letters(1 << 20)}, {4 << 20, letters(4096)}}}
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		for way, refused := range copyWays {
			t.Run(fstype+"/"+way, func(t *testing.T) {
				dir, image, unmount := scratch(t, fstype, 320<<20)
				src := filepath.Join(dir, "src")
				s.write(t, src)
				d, err := os.Open(dir)
				must(t, err)
				must(t, errors.Join(d.Sync(), d.Close()))
				cut := func(name string) string {
					to := filepath.Join(t.TempDir(), name)
					if out, exit := e2fs.Run(t, "cp", "--sparse=always", image, to); exit != 0 {
						t.Fatalf("cp: exit %d: %s", exit, out)
					}
					return to
				}
				var early string
				c := &copying{ctx: context.Background(), fault: func(op string) error {
					if op == "link" {
						early = cut("early")
					}
					return refuse(refused...)(op)
				}}
				must(t, c.run(filepath.Join(dir, "dst"), src))
				late := cut("late")
				unmount() // XFS and Btrfs do not mount the same one twice

				dir, unmount = e2fs.MountType(t, fstype, late, "loop")
				checkCopy(t, filepath.Join(dir, "dst"), filepath.Join(dir, "src"), s)
				unmount()
				dir, unmount = e2fs.MountType(t, fstype, early, "loop")
				named := slices.Contains(refused, "O_TMPFILE")
				for name := range contents(t, dir) {
					if name != "src" && !(named && strings.HasPrefix(name, copyPrefix)) {
						t.Errorf("before the link there is %s", name)
					}
				}
				unmount()
			})
		}
	}
}
