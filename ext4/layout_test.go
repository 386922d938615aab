//go:build linux

package ext4

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/ext4/internal/disk"
	"banger/ext4/internal/e2fs"
)

const mib = 1 << 20

// soak asks for the rows that take minutes.
var soak = os.Getenv("EXT4_SOAK") != ""

func field(t *testing.T, dump, name string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + `:\s*(.*)$`).FindStringSubmatch(dump)
	if m == nil {
		return ""
	}
	return m[1]
}

// Every size at which something changes, with the journal that mke2fs makes.
func TestFormatSizes(t *testing.T) {
	const group = 128 * mib
	for _, c := range []struct {
		size      int64
		journalMB int
	}{
		{mib, 0}, {mib + 1, 0}, {mib + 4095, 0}, {2 * mib, 0},
		{8*mib - 4096, 0}, {8 * mib, 4}, {8*mib + 4096, 4},
		{group - 4096, 4}, {group, 16}, {group + 4096, 16},
		{group + 8*mib + 52*4096, 16}, {group + 9*mib, 16}, {2*group - 4096, 16}, {2 * group, 16}, {2*group + 4096, 16},
		{512*mib - 4096, 16}, {512 * mib, 16},
		{1024*mib - 4096, 16}, {1024 * mib, 32},
		{2048*mib - 4096, 32}, {2048 * mib, 64},
		{16384*mib - 4096, 64}, {16384 * mib, 128},
		{32768*mib - 4096, 128}, {32768 * mib, 256},
		{65536*mib - 4096, 256}, {65536 * mib, 512},
		{131072*mib - 4096, 512}, {131072 * mib, 1024},
		{64 * group, 64}, {64*group + group/2, 64},
	} {
		t.Run(fmt.Sprint(c.size), func(t *testing.T) {
			f := newImage(t)
			p := params(c.size)
			must(t, Format(f, p, nil))
			info, err := f.Stat()
			must(t, err)
			if info.Size() != c.size {
				t.Errorf("file of %d bytes", info.Size())
			}
			if c.size <= 17<<30 {
				e2fs.Clean(t, f.Name())
			}
			dump, exit := e2fs.Run(t, "dumpe2fs", "-h", f.Name())
			if exit != 0 {
				t.Fatal(dump)
			}
			want := ""
			if c.journalMB > 0 {
				want = fmt.Sprint(c.journalMB * mib / disk.BlockSize)
			}
			if got := field(t, dump, "Total journal blocks"); got != want {
				t.Errorf("journal of %q blocks, want %q", got, want)
			}
			if blocks, _ := strconv.ParseInt(field(t, dump, "Block count"), 10, 64); blocks > c.size/4096 || blocks < c.size/4096-8*mib/4096-300 {
				t.Errorf("%d blocks of %d", blocks, c.size/4096)
			}
			dir, unmount := e2fs.Mount(t, f.Name(), "rw")
			must(t, os.WriteFile(filepath.Join(dir, "file"), bytes.Repeat([]byte("x"), 10000), 0o600))
			unmount()
			if c.size <= 2<<30 {
				e2fs.Clean(t, f.Name())
			}
		})
	}
}

// The largest sizes, as far as the file system under the test goes.
func TestLargest(t *testing.T) {
	for _, size := range []int64{1 << 40, 8 << 40, MaxImageBytes} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			f := newImage(t)
			err := Format(f, params(size), nil)
			if errors.Is(err, syscall.EFBIG) {
				t.Skipf("NOT TESTED: %v", err)
			}
			must(t, err)
			dir, unmount := e2fs.Mount(t, f.Name(), "rw")
			must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600))
			var st syscall.Statfs_t
			must(t, syscall.Statfs(dir, &st))
			if st.Blocks < uint64(size)/4096/100*98 {
				t.Errorf("%d blocks", st.Blocks)
			}
			unmount()
			if size == 1<<40 || soak {
				e2fs.Clean(t, f.Name())
			}
		})
	}
}

// What the caller decides is in the superblock, and nothing is left to be
// initialised.
func TestParams(t *testing.T) {
	p := Params{
		SizeBytes: 1 << 30, UUID: testUUID, HashSeed: testSeed, Label: "sixteen-bytes-ok", Time: testTime,
		InodeRatio: 65536, JournalBytes: 20 * mib, ReservedBlocksPercent: 7,
	}
	f := newImage(t)
	must(t, Format(f, p, nil))
	e2fs.Clean(t, f.Name())
	dump, _ := e2fs.Run(t, "dumpe2fs", f.Name())
	const blocks = 1 << 30 / disk.BlockSize
	for name, want := range map[string]string{
		"Filesystem volume name":  p.Label,
		"Filesystem UUID":         fmt.Sprintf("%x-%x-%x-%x-%x", p.UUID[:4], p.UUID[4:6], p.UUID[6:8], p.UUID[8:10], p.UUID[10:]),
		"Directory Hash Seed":     fmt.Sprintf("%x-%x-%x-%x-%x", p.HashSeed[:4], p.HashSeed[4:6], p.HashSeed[6:8], p.HashSeed[8:10], p.HashSeed[10:]),
		"Filesystem created":      p.Time.UTC().Format(time.ANSIC),
		"Inode count":             fmt.Sprint(1 << 30 / 65536),
		"Block count":             fmt.Sprint(blocks),
		"Reserved block count":    fmt.Sprint(blocks / 100 * 7),
		"Total journal blocks":    fmt.Sprint(20 * mib / disk.BlockSize),
		"Filesystem state":        "clean",
		"Errors behavior":         "Continue",
		"Inode size":              "256",
		"Required extra isize":    "32",
		"Checksum type":           "crc32c",
		"Default mount options":   "user_xattr acl",
		"Maximum mount count":     "-1",
		"Check interval":          "0 (<none>)",
		"Filesystem flags":        "signed_directory_hash",
		"Default directory hash":  "half_md4",
		"Filesystem OS type":      "Linux",
		"Reserved blocks uid":     "0 (user root)",
		"Filesystem revision #":   "1 (dynamic)",
		"Journal inode":           "8",
		"First inode":             "11",
		"Filesystem magic number": "0xEF53",
	} {
		if got := strings.TrimSpace(field(t, dump, name)); got != want {
			t.Errorf("%s: %q, not %q", name, got, want)
		}
	}
	groups := regexp.MustCompile(`(?m)^Group \d+: .*$`).FindAllString(dump, -1)
	if len(groups) != 8 {
		t.Fatalf("%d groups", len(groups))
	}
	for i, g := range groups {
		switch {
		case !strings.Contains(g, "ITABLE_ZEROED"):
			t.Errorf("table not zeroed: %s", g)
		case i > 0 && !strings.Contains(g, "INODE_UNINIT"):
			t.Errorf("inode bitmap without need: %s", g)
		case i > 0 && i < len(groups)-1 && !strings.Contains(g, "BLOCK_UNINIT"):
			t.Errorf("block bitmap without need: %s", g)
		}
	}
}

// An empty image must cost nothing whatever its size.
func TestFormatIsSparse(t *testing.T) {
	for _, c := range []struct{ size, most int64 }{{16 << 30, 256 << 10}, {1 << 40, 11 * mib}} {
		f := newImage(t)
		must(t, Format(f, params(c.size), nil))
		var st syscall.Stat_t
		must(t, syscall.Fstat(int(f.Fd()), &st))
		if got := st.Blocks * 512; got > c.most {
			t.Errorf("%d bytes: %d allocated, more than %d", c.size, got, c.most)
		}
	}
}

func sample() tree {
	d := directoryFile()
	d.Xattrs = map[string][]byte{aclDefault: fullACL, "user.x": make([]byte, 200)}
	files := tree{"dir": d, "link": symlink(100), "striped": striped(2000), "plain": regular("plain")}
	for i := range 1000 {
		files["dir/"+highBytes(i)] = regular(strings.Repeat("y", i*7))
	}
	return files
}

// The same calls give the same bytes, in a file and in memory.
func TestDeterministic(t *testing.T) {
	write := func(f File) {
		w, err := NewWriter(f, Options{})
		must(t, err)
		dropped, err := w.Place(strings.NewReader(strings.Repeat("dropped", 100000)), 700000)
		must(t, err)
		fill(t, w, sample())
		w.Discard(dropped)
		must(t, w.Finish(params(64*mib)))
	}
	a, b, m := newImage(t), newImage(t), new(memory)
	_, err := a.Write(bytes.Repeat([]byte("junk"), 1<<20)) // must not shine through
	must(t, err)
	write(a)
	write(b)
	write(m)
	e2fs.Clean(t, a.Name())
	one, err := os.ReadFile(a.Name())
	must(t, err)
	two, err := os.ReadFile(b.Name())
	must(t, err)
	if !bytes.Equal(one, two) {
		t.Error("two builds differ")
	}
	if !bytes.Equal(one, m.data) {
		t.Error("a build without holes differs")
	}
	if bytes.Contains(one, []byte("droppeddropped")) {
		t.Error("discarded bytes are still there")
	}
	// What makes its holes itself is asked for them, and may refuse.
	for _, refuses := range []error{nil, errBroken} {
		own := &puncher{refuses: refuses}
		write(own)
		if !bytes.Equal(one, own.data) {
			t.Errorf("a build with holes of the file's own (%v) differs", refuses)
		}
		if want := int64((700000 + disk.BlockSize - 1) / disk.BlockSize); own.asked != want {
			t.Errorf("it was asked for holes of %d blocks, want %d", own.asked, want)
		}
	}
}

// puncher is a HolePuncher: zeros are its holes.
type puncher struct {
	memory
	refuses error
	asked   int64 // blocks
}

func (p *puncher) PunchHole(offset, lengthBytes int64) error {
	p.asked += lengthBytes / disk.BlockSize
	if p.refuses == nil {
		end := min(offset+lengthBytes, int64(len(p.data)))
		clear(p.data[min(offset, end):end])
	}
	return p.refuses
}

// memory is a File that knows nothing of holes.
type memory struct{ data []byte }

func (m *memory) Truncate(n int64) error {
	if n <= int64(len(m.data)) {
		m.data = m.data[:n]
	} else {
		m.data = append(m.data, make([]byte, n-int64(len(m.data)))...)
	}
	return nil
}

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	if end := at + int64(len(p)); end > int64(len(m.data)) {
		m.data = append(m.data, make([]byte, end-int64(len(m.data)))...)
	}
	return copy(m.data[at:], p), nil
}

// Contents without an Inode are dropped: discarded, forgotten or broken off.
func TestDropped(t *testing.T) {
	f := newImage(t)
	w, err := NewWriter(f, Options{})
	must(t, err)
	want := tree{}
	for i := range 400 {
		data := strings.Repeat(string(rune('a'+i%26)), 1+i*131%20000)
		c, err := w.Place(strings.NewReader(data), int64(len(data)))
		must(t, err)
		switch i % 4 {
		case 0:
			name := fmt.Sprint(i)
			want[name] = regular(data)
			want[name].Content = c
			must(t, w.Add(name, &want[name].Inode))
		case 1:
			w.Discard(c)
		case 2:
			if _, err := w.Place(strings.NewReader(data), int64(len(data))+1); err == nil {
				t.Fatal("short input was accepted")
			}
		}
	}
	before := w.UsedBytes()
	must(t, w.Finish(params(16*mib)))
	e2fs.Clean(t, f.Name())
	var st syscall.Stat_t
	must(t, syscall.Fstat(int(f.Fd()), &st))
	if st.Blocks*512 > before {
		t.Errorf("%d bytes allocated, %d were in contents before the forgotten went", st.Blocks*512, before)
	}
	dir, _ := e2fs.Mount(t, f.Name(), "ro")
	for _, d := range compare(dir, want) {
		t.Error(d)
	}
}

// The least size is exact, and whatever is larger is accepted.
func TestMinSize(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for _, c := range []struct {
		row  string
		data int64
		p    Params
	}{
		{"empty", 0, params(0)},
		{"just below the first journal", 7 * mib, params(0)},
		{"at the first journal", 7*mib + 700<<10, params(0)},
		{"above it", 30 * mib, params(0)},
		{"one group", 127 * mib, params(0)},
		{"two groups", 129 * mib, params(0)},
		{"many inodes", 3 * mib, Params{Inodes: 200_000, UUID: testUUID}},
		{"no journal", 20 * mib, Params{JournalBytes: -1, UUID: testUUID}},
		{"journal of 16 MiB", 20 * mib, Params{JournalBytes: 16 * mib, UUID: testUUID}},
	} {
		t.Run(c.row, func(t *testing.T) {
			f := newImage(t)
			w, err := NewWriter(f, Options{})
			must(t, err)
			content, err := w.Place(io.LimitReader(neverZero{}, c.data), c.data)
			must(t, err)
			must(t, w.Add("f", &Inode{Mode: 0o100644, Content: content}))
			least, err := w.MinSizeBytes(c.p)
			must(t, err)
			s, err := w.survey(&c.p)
			must(t, err)
			for range 2000 {
				size := least/4096 + int64(r.ExpFloat64()*100000)
				if fit(&c.p, s, uint64(size)) == nil {
					t.Fatalf("least is %d, but %d blocks are refused", least, size)
				}
			}
			p := c.p
			p.SizeBytes = least - 1
			var space *SpaceError
			if err := w.Finish(p); least > MinImageBytes && (!errors.As(err, &space) || space.NeedBytes != least || !errors.Is(err, ErrNoSpace)) {
				t.Errorf("one byte less: %v", err)
			}
			p.SizeBytes = least
			must(t, w.Finish(p))
			e2fs.Clean(t, f.Name())
			dump, _ := e2fs.Run(t, "dumpe2fs", "-h", f.Name())
			if n, _ := strconv.ParseUint(field(t, dump, "Inode count"), 10, 32); n < uint64(c.p.Inodes) {
				t.Errorf("%d inodes, %d were asked for", n, c.p.Inodes)
			}
		})
	}
}

// What a whole build needs resident, in a process of its own, from the first
// call to the last: at most 32 MiB and 100 bytes for an entry with a name of
// some 15 bytes.
func TestMemory(t *testing.T) {
	const perEntry, fixed = 100, 32 << 20
	const child = "EXT4_MEMORY_CHILD"
	shapes := []struct {
		name     string
		inOneDir int
	}{{"directories of 50", 50}, {"one directory", 1 << 30}}
	if arg := os.Getenv(child); arg != "" {
		var shape, entries int
		if _, err := fmt.Sscan(arg, &shape, &entries); err != nil {
			t.Fatal(err)
		}
		f := newImage(t)
		w, err := NewWriter(f, Options{})
		must(t, err)
		dir := ""
		for i := range entries {
			if i%shapes[shape].inOneDir == 0 {
				dir = fmt.Sprintf("directory-%06d", i)
				must(t, w.Add(dir, &Inode{Mode: 0o040755}))
				continue
			}
			c, err := w.Place(strings.NewReader("x"), 1)
			must(t, err)
			must(t, w.Add(fmt.Sprintf("%s/file-%06d.txt", dir, i), &Inode{Mode: 0o100644, Content: c, Mtime: testTime}))
		}
		p := params(0)
		p.SizeBytes, err = w.MinSizeBytes(p)
		must(t, err)
		must(t, w.Finish(p))
		// Not ru_maxrss, which begins with that of the parent.
		status, err := os.ReadFile("/proc/self/status")
		must(t, err)
		fmt.Printf("\n%s\n", regexp.MustCompile(`VmHWM:.*`).Find(status))
		return
	}
	counts := []int{100_000}
	if soak {
		counts = append(counts, 1_000_000)
	}
	for shape, s := range shapes {
		for _, entries := range counts {
			most := fixed + entries*perEntry
			cmd := exec.Command(os.Args[0], "-test.run=^TestMemory$")
			// The collector lets a heap double before it looks at it, unless it
			// is told of the limit, here with room for what is not heap.
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", child, shape, entries), fmt.Sprintf("GOMEMLIMIT=%d", most-fixed/2))
			out, err := cmd.CombinedOutput()
			hwm := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(out)
			if err != nil || hwm == nil {
				t.Fatalf("%v\n%s", err, out)
			}
			resident, _ := strconv.Atoi(string(hwm[1]))
			resident <<= 10
			t.Logf("%s, %d entries: %.1f MiB resident, %d bytes an entry above 10 MiB", s.name, entries, float64(resident)/(1<<20), (resident-10<<20)/entries)
			if resident > most {
				t.Errorf("%s, %d entries: %d bytes resident, more than %d", s.name, entries, resident, most)
			}
		}
	}
}

// Every kind of metadata is under a checksum that e2fsck checks: flip one
// bit in each and it must complain.
func TestCorruptionIsSeen(t *testing.T) {
	files := sample()
	image := build(t, files, params(64*mib))
	good, err := os.ReadFile(image)
	must(t, err)
	dump, _ := e2fs.Run(t, "dumpe2fs", image)
	blockOf := func(pattern string) int64 {
		m := regexp.MustCompile(pattern).FindStringSubmatch(dump)
		if m == nil {
			t.Fatalf("no %q in\n%s", pattern, dump)
		}
		n, _ := strconv.ParseInt(m[1], 10, 64)
		return n * disk.BlockSize
	}
	physical := func(path string, logical int) int64 {
		out, _ := e2fs.Run(t, "debugfs", "-R", fmt.Sprintf("bmap %s %d", path, logical), image)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		n, err := strconv.ParseInt(lines[len(lines)-1], 10, 64)
		if err != nil || n == 0 {
			t.Fatalf("%s", out)
		}
		return n * disk.BlockSize
	}
	out, _ := e2fs.Run(t, "debugfs", "-R", "ex striped", image)
	treeBlock := regexp.MustCompile(`(?m)^ 1/ 2 .* (\d+) +\d+\s*$`).FindStringSubmatch(out)
	if treeBlock == nil {
		t.Fatalf("no tree block in\n%s", out)
	}
	treeAt, _ := strconv.ParseInt(treeBlock[1], 10, 64)
	out, _ = e2fs.Run(t, "debugfs", "-R", "stat dir", image)
	acl := regexp.MustCompile(`File ACL: (\d+)`).FindStringSubmatch(out)
	aclAt, _ := strconv.ParseInt(acl[1], 10, 64)
	for _, c := range []struct {
		what string
		at   int64
	}{
		{"superblock", 1024 + 0x78},
		{"descriptor", disk.BlockSize + 0x3C},
		{"block bitmap", blockOf(`Block bitmap at (\d+)`) + 1},
		{"inode bitmap", blockOf(`Inode bitmap at (\d+)`) + 1},
		{"root inode", blockOf(`Inode table at (\d+)`) + disk.InodeSize + 8},
		{"inode with xattrs", blockOf(`Inode table at (\d+)`) + 11*disk.InodeSize + 200},
		{"directory", physical("/", 0) + 100},
		{"htree root", physical("dir", 0) + 44},
		{"htree leaf", physical("dir", 1) + 100},
		{"extent block", treeAt*disk.BlockSize + 30},
		{"xattr block", aclAt*disk.BlockSize + 40},
		{"journal superblock", physical("<8>", 0) + 0x30},
	} {
		bad := bytes.Clone(good)
		bad[c.at] ^= 0x10
		path := filepath.Join(t.TempDir(), "bad")
		must(t, os.WriteFile(path, bad, 0o600))
		if e2fs.Fsck(t, path) == "" {
			t.Errorf("%s: e2fsck saw nothing", c.what)
		}
	}
}

// The kernel must be able to use an image fully, and to fill it.
func TestKernelWrites(t *testing.T) {
	files := sample()
	image := build(t, files, params(32*mib))
	dir, unmount := e2fs.Mount(t, image, "rw")
	must(t, os.RemoveAll(filepath.Join(dir, "dir")))
	delete(files, "dir")
	for i := range 1000 {
		delete(files, "dir/"+highBytes(i))
	}
	must(t, os.MkdirAll(filepath.Join(dir, "new/deep/er"), 0o755))
	var err error
	chunk := bytes.Repeat([]byte("fill"), 1<<18)
	for i := 0; err == nil; i++ {
		err = os.WriteFile(filepath.Join(dir, "new", fmt.Sprint(i)), chunk, 0o600)
		if i > 100 {
			t.Fatal("a full file system that is never full")
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("filling: %v", err)
	}
	must(t, os.RemoveAll(filepath.Join(dir, "new")))
	for _, d := range compare(dir, files) {
		if !strings.HasPrefix(d, `".": `) { // its own times have changed
			t.Error(d)
		}
	}
	unmount()
	e2fs.Clean(t, image)
}

// A mounted image is used hard: a source tree copied in, half of it deleted,
// filled until it is full, emptied and filled again.
func TestHeavyUse(t *testing.T) {
	image := build(t, sample(), params(96*mib))
	dir, unmount := e2fs.Mount(t, image, "rw")
	source := os.DirFS(filepath.Join(runtime.GOROOT(), "src", "cmd"))
	for round := range 2 {
		into := filepath.Join(dir, fmt.Sprint("src", round))
		err := os.CopyFS(into, source)
		if err == nil || !errors.Is(err, syscall.ENOSPC) {
			must(t, err)
		}
		n := 0
		must(t, filepath.WalkDir(into, func(path string, d fs.DirEntry, err error) error {
			if n++; err == nil && !d.IsDir() && n%2 == 0 {
				return os.Remove(path)
			}
			return err
		}))
		if n < 1000 {
			t.Fatalf("only %d entries were copied", n)
		}
		chunk := bytes.Repeat([]byte("fill"), 1<<16)
		for i := 0; err == nil; i++ {
			err = os.WriteFile(filepath.Join(into, fmt.Sprint("fill", i)), chunk, 0o600)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("filling: %v", err)
		}
		if round == 0 {
			must(t, os.RemoveAll(into))
		}
	}
	unmount()
	e2fs.Clean(t, image)
}

// Growing past the descriptors that are there moves blocks when unmounted and
// takes meta_bg when mounted; shrinking moves metadata.
func TestResize(t *testing.T) {
	for _, sizes := range [][]string{{"100M"}, {"1G"}, {"9G"}, {"9G", "100M"}} {
		t.Run(strings.Join(sizes, " "), func(t *testing.T) {
			files := sample()
			image := build(t, files, params(64*mib))
			for _, size := range sizes {
				if out, exit := e2fs.Run(t, "resize2fs", image, size); exit != 0 {
					t.Fatalf("resize2fs: exit %d\n%s", exit, out)
				}
				e2fs.Clean(t, image)
			}
			dir, _ := e2fs.Mount(t, image, "ro")
			for _, d := range compare(dir, files) {
				t.Error(d)
			}
		})
	}
	t.Run("mounted", func(t *testing.T) {
		image := build(t, sample(), params(64*mib))
		dir, unmount := e2fs.Mount(t, image, "rw")
		device, _ := e2fs.Run(t, "findmnt", "-n", "-o", "SOURCE", dir)
		device = strings.TrimSpace(device)
		must(t, os.Truncate(image, 9<<30))
		if out, exit := e2fs.Run(t, "losetup", "-c", device); exit != 0 {
			t.Fatalf("losetup: exit %d\n%s", exit, out)
		}
		out, exit := e2fs.Run(t, "resize2fs", device)
		if strings.Contains(out, "Permission denied") {
			t.Skip("NOT TESTED: no CAP_SYS_RESOURCE")
		}
		if exit != 0 {
			t.Fatalf("resize2fs: exit %d\n%s", exit, out)
		}
		must(t, os.WriteFile(filepath.Join(dir, "new"), make([]byte, 100<<20), 0o600))
		unmount()
		e2fs.Clean(t, image)
	})
}

// A File that fails must not look like success.
func TestFileFails(t *testing.T) {
	for after := range 12 {
		f := &failing{left: after}
		w, err := NewWriter(f, Options{})
		if err == nil {
			var c *Content
			c, err = w.Place(io.LimitReader(neverZero{}, 3*mib), 3*mib)
			if err == nil {
				err = errors.Join(w.Add("f", &Inode{Mode: 0o100644, Content: c}), w.Finish(params(16*mib)))
			}
		}
		if !errors.Is(err, errBroken) {
			t.Errorf("after %d calls: %v", after, err)
		}
	}
}

var errBroken = errors.New("broken")

type failing struct {
	memory
	left int
}

func (f *failing) Truncate(n int64) error {
	if f.left--; f.left < 0 {
		return errBroken
	}
	return f.memory.Truncate(n)
}

func (f *failing) WriteAt(p []byte, at int64) (int, error) {
	if f.left--; f.left < 0 {
		return 0, errBroken
	}
	return f.memory.WriteAt(p, at)
}

func randomTree(r *rand.Rand) tree {
	files := tree{}
	dirs := []string{""}
	var links []*file
	name := func() string {
		n := 1 + r.IntN(12)
		if r.IntN(10) == 0 {
			n = 1 + r.IntN(255)
		}
		b := make([]byte, n)
		for i := range b {
			for b[i] == 0 || b[i] == '/' || b[i] == '.' {
				b[i] = byte(r.Uint32())
			}
		}
		return string(b)
	}
	bytesOf := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	when := func() time.Time {
		if r.IntN(3) == 0 {
			return time.Time{}
		}
		sec := disk.MinTime + r.Int64N(disk.MaxTime-disk.MinTime)
		if sec >= 5<<31 && sec < 3<<32 {
			sec -= 1 << 32 // e2fsck doubts these: see Inode
		}
		return time.Unix(sec, r.Int64N(1e9))
	}
	for range 1 + r.IntN(1<<r.IntN(11)) {
		path := dirs[r.IntN(len(dirs))] + name()
		if files[path] != nil {
			continue
		}
		if len(links) > 0 && r.IntN(12) == 0 {
			files[path] = links[r.IntN(len(links))]
			continue
		}
		f := &file{Inode: Inode{UID: r.Uint32() >> r.IntN(32), GID: r.Uint32() >> (1 + r.IntN(31)),
			Atime: when(), Mtime: when(), Ctime: when(), Crtime: when()}}
		f.UID &^= 1 // never -1
		perm := uint16(r.IntN(0o10000))
		switch r.IntN(10) {
		case 0, 1:
			f.Mode = disk.TypeDir | perm
			dirs = append(dirs, path+"/")
		case 2:
			f.Mode = disk.TypeSymlink | 0o777
			f.Target = strings.ReplaceAll(string(bytesOf(1+r.IntN(1<<r.IntN(12)))), "\x00", "0")
		case 3:
			f.Mode = []uint16{disk.TypeChar, disk.TypeBlock}[r.IntN(2)] | perm
			f.Major, f.Minor = uint32(r.IntN(1<<(1+r.IntN(12)))), uint32(r.IntN(1<<(1+r.IntN(20))))
		case 4:
			f.Mode = []uint16{disk.TypeFIFO, disk.TypeSocket}[r.IntN(2)] | perm
		default:
			f.Mode = disk.TypeRegular | perm
			for range r.IntN(1 << r.IntN(5)) {
				f.size += int64(r.IntN(1 << (1 + r.IntN(17))))
				p := piece{f.size, bytesOf(r.IntN(1 << (1 + r.IntN(13))))}
				f.pieces = append(f.pieces, p)
				f.size += int64(len(p.data))
			}
			f.size += int64(r.IntN(1 << (1 + r.IntN(14))))
		}
		if f.Mode&disk.TypeMask != disk.TypeDir && f.Mode&disk.TypeMask != disk.TypeSymlink {
			links = append(links, f)
		}
		if r.IntN(4) == 0 {
			f.Xattrs = make(map[string][]byte)
			for range 1 + r.IntN(5) {
				f.Xattrs["trusted."+strings.ReplaceAll(name()[:1], "\x00", "x")+fmt.Sprint(r.IntN(1000))] = bytesOf(r.IntN(1 << r.IntN(14)))
			}
		}
		files[path] = f
	}
	return files
}

// number is one from the environment.
func number(name string, normal uint64) uint64 {
	if n, err := strconv.ParseUint(os.Getenv(name), 10, 64); err == nil {
		return n
	}
	return normal
}

// Random trees; EXT4_TREES gives their number, EXT4_SEED the first seed. Every
// one is built twice and read back, and one of ten is mounted.
func TestRandomTrees(t *testing.T) {
	first := number("EXT4_SEED", uint64(time.Now().UnixNano()))
	count := number("EXT4_TREES", 1000)
	if testing.Short() {
		count = min(count, 100)
	}
	t.Logf("EXT4_SEED=%d EXT4_TREES=%d", first, count)
	images := [2]*os.File{newImage(t), newImage(t)}
	for seed := first; seed < first+count; seed++ {
		var files tree
		var sums [2][sha256.Size]byte
		for i, f := range images {
			var err error
			if files, err = writeRandomTree(t, f, seed); err != nil {
				t.Fatalf("EXT4_SEED=%d: %v", seed, err)
			}
			sums[i] = digest(t, f)
		}
		if sums[0] != sums[1] {
			t.Fatalf("EXT4_SEED=%d: two builds differ", seed)
		}
		if out := e2fs.Fsck(t, images[0].Name()); out != "" {
			t.Fatalf("EXT4_SEED=%d: e2fsck: %s", seed, out)
		}
		list, err := differences(openImage(t, images[0].Name()), &memTree{files: files}, DiffAll|DiffAtime|DiffCtime|DiffCrtime)
		if err != nil || len(list) > 0 {
			t.Fatalf("EXT4_SEED=%d: read back: %v %q", seed, err, list)
		}
		if seed%10 == 0 || count < 10 {
			dir, unmount := e2fs.Mount(t, images[0].Name(), "ro")
			if diffs := compare(dir, files); len(diffs) > 0 {
				t.Fatalf("EXT4_SEED=%d: %d differences, first %s", seed, len(diffs), diffs[0])
			}
			unmount()
		}
	}
}

// writeRandomTree makes the image of one seed.
func writeRandomTree(t *testing.T, f *os.File, seed uint64) (tree, error) {
	r := rand.New(rand.NewPCG(seed, 0))
	files := randomTree(r)
	p := params(0)
	for i := range p.HashSeed {
		p.HashSeed[i] = byte(r.Uint32())
	}
	p.UnsignedHash = r.IntN(2) == 0
	w, err := NewWriter(f, Options{})
	must(t, err)
	for range r.IntN(4) { // dead bytes in between
		n := int64(r.IntN(1 << 18))
		c, err := w.Place(io.LimitReader(neverZero{}, n), n)
		must(t, err)
		w.Discard(c)
	}
	fill(t, w, files)
	p.SizeBytes, err = w.MinSizeBytes(p)
	must(t, err)
	if r.IntN(2) == 0 {
		p.SizeBytes += r.Int64N(1 << (10 + r.IntN(22)))
	}
	return files, w.Finish(p)
}

// digest is that of the size and all blocks that are not zero, wherever there
// are holes.
func digest(t *testing.T, f *os.File) (sum [sha256.Size]byte) {
	t.Helper()
	const seekData, seekHole = 3, 4
	info, err := f.Stat()
	must(t, err)
	h := sha256.New()
	fmt.Fprint(h, info.Size())
	block := make([]byte, disk.BlockSize)
	for at := int64(0); ; {
		from, err := f.Seek(at, seekData)
		if errors.Is(err, syscall.ENXIO) {
			break
		}
		must(t, err)
		at, err = f.Seek(from, seekHole)
		must(t, err)
		for ; from < at; from += disk.BlockSize {
			n, err := f.ReadAt(block, from)
			if err != io.EOF {
				must(t, err)
			}
			if !bytes.Equal(block[:n], zeros[:n]) {
				fmt.Fprint(h, from)
				h.Write(block[:n])
			}
		}
	}
	h.Sum(sum[:0])
	return sum
}
