//go:build linux

package ext4

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"banger/ext4/internal/e2fs"
)

// e2fsprogs must hash every name as we do. It knows the unsigned versions by
// number only.
func TestHash(t *testing.T) {
	seedText := "01020304-0506-0708-090a-0b0c0d0e0f10"
	seed := hashSeed([16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16})
	var names []string
	for _, n := range []int{1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255} {
		names = append(names, strings.Repeat("abcdefg", 40)[:n], strings.Repeat("\x80\xfe\xc3z\x7f", 70)[:n])
	}
	for number, h := range map[int]dirHash{
		0: {version: hashLegacy}, 1: {version: hashHalfMD4}, 2: {version: hashTEA},
		3: {version: hashLegacy, unsigned: true}, 4: {version: hashHalfMD4, unsigned: true}, 5: {version: hashTEA, unsigned: true},
	} {
		var script strings.Builder
		for _, name := range names {
			fmt.Fprintf(&script, "dx_hash -h %d -s %s %s\ndx_hash -h %d %s\n", number, seedText, name, number, name)
		}
		path := filepath.Join(t.TempDir(), "script")
		must(t, os.WriteFile(path, []byte(script.String()), 0o600))
		out, _ := e2fs.Run(t, "debugfs", "-f", path)
		found := regexp.MustCompile(`is (0x[0-9a-f]+) \(minor (0x[0-9a-f]+)\)`).FindAllStringSubmatch(out, -1)
		if len(found) != 2*len(names) {
			t.Fatalf("%d hashes for %d names:\n%s", len(found), len(names), out)
		}
		for i, name := range names {
			for j, state := range [][4]uint32{seed, hashSeed([16]byte{})} {
				h.state = state
				sum := h.sum(name)
				got := fmt.Sprintf("%#x %#x", sum.major, sum.minor)
				if want := found[2*i+j][1] + " " + found[2*i+j][2]; got != want {
					t.Errorf("version %d, %q: %s, want %s", number, name, got, want)
				}
			}
		}
	}
}

// manyNames makes a directory "d" of n entries and checks it with e2fsck and,
// name by name, with the kernel.
func manyNames(t *testing.T, n int, name func(i int) string, mode uint16, p Params) string {
	t.Helper()
	f := newImage(t)
	w, err := NewWriter(f, Options{})
	must(t, err)
	must(t, w.Add("d", &Inode{Mode: 0o040755}))
	for i := range n {
		must(t, w.Add("d/"+name(i), &Inode{Mode: mode}))
	}
	must(t, w.Finish(p))
	e2fs.Clean(t, f.Name())
	dir, unmount := e2fs.Mount(t, f.Name(), "ro")
	var st syscall.Stat_t
	for i := range n {
		if err := syscall.Lstat(dir+"/d/"+name(i), &st); err != nil {
			t.Fatalf("entry %d, %q: %v", i, name(i), err)
		}
	}
	list, err := os.ReadDir(dir + "/d")
	must(t, err)
	if len(list) != n {
		t.Errorf("%d entries listed, not %d", len(list), n)
	}
	if _, err := os.Lstat(dir + "/d/no such name"); !os.IsNotExist(err) {
		t.Errorf("a name that is not there: %v", err)
	}
	unmount()
	return f.Name()
}

func decimal(i int) string { return fmt.Sprint(i) }

func highBytes(i int) string {
	return fmt.Sprintf("\xff\x80%d\xc3\xa9%s", i, strings.Repeat("\x9d", i%90))
}

func TestDirectorySizes(t *testing.T) {
	// Entries of 4 bytes take 12 each: 338 beside the dots in one block.
	four := func(i int) string { return fmt.Sprintf("%04d", i) }
	long := func(i int) string { return fmt.Sprintf("%0255d", i) }
	for _, c := range []struct {
		row    string
		n      int
		name   func(int) string
		levels int // -1: no index
	}{
		{"one block", 338, four, -1},
		{"one block and one", 339, four, 0},
		{"high bytes", 3000, highBytes, 0},
		{"last with one level", 15 * writerGeometry.indexRootLimit(), long, 0},
		{"first with two", 15*writerGeometry.indexRootLimit() + 1, long, 1},
	} {
		t.Run(c.row, func(t *testing.T) {
			image := manyNames(t, c.n, c.name, 0o100644, params(128<<20))
			out, _ := e2fs.Run(t, "debugfs", "-R", "htree_dump d", image)
			want := fmt.Sprintf("Indirect levels: %d", c.levels)
			if c.levels < 0 {
				want = "Not a hash-indexed directory"
			}
			if !strings.Contains(out, want) {
				t.Errorf("no %q in\n%.300s", want, out)
			}
		})
	}
}

// Two names with the same hash on both sides of a block's end are found by the
// continuation bit. Such names are rare, so this one counts on numbers.
func TestHashCollisions(t *testing.T) {
	p := params(256 << 20)
	hash := dirHash{version: hashHalfMD4, state: hashSeed(p.HashSeed)}
	// Many names that share their major hash with another.
	byHash := make(map[uint32]string)
	var names []string
	for i := 0; len(names) < 600; i++ {
		name := fmt.Sprintf("%0100d", i)
		h := hash.sum(name).major
		if first, ok := byHash[h]; ok {
			names = append(names, first, name)
			delete(byHash, h)
		} else if len(byHash) < 1_000_000 {
			byHash[h] = name
		}
		if i > 1_500_000 {
			break
		}
	}
	if len(names) < 200 {
		t.Fatalf("only %d colliding names", len(names))
	}
	manyNames(t, len(names), func(i int) string { return names[i] }, 0o100644, p)
}

func TestSubdirectories(t *testing.T) {
	if testing.Short() {
		t.Skip("130,000 directories")
	}
	for _, n := range []int{MaxLinks - 3, MaxLinks - 2, MaxLinks - 1} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			f := newImage(t)
			w, err := NewWriter(f, Options{})
			must(t, err)
			must(t, w.Add("d", &Inode{Mode: 0o040755}))
			for i := range n {
				must(t, w.Add("d/"+decimal(i), &Inode{Mode: 0o040755}))
			}
			p := params(512 << 20)
			p.Inodes = uint32(n) + 100
			must(t, w.Finish(p))
			e2fs.Clean(t, f.Name())
			dir, unmount := e2fs.Mount(t, f.Name(), "ro")
			var st syscall.Stat_t
			must(t, syscall.Lstat(dir+"/d", &st))
			want := uint64(n) + 2
			if want >= MaxLinks {
				want = 1
			}
			if uint64(st.Nlink) != want {
				t.Errorf("%d links, not %d", st.Nlink, want)
			}
			unmount()
		})
	}
}

// Directories that are large, and larger where there is time.
func TestManyEntries(t *testing.T) {
	counts := []int{200_000}
	if soak {
		counts = append(counts, 1_000_000)
	}
	if testing.Short() {
		counts = []int{20_000}
	}
	for _, n := range counts {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			p := params(8 << 30)
			p.Inodes = uint32(n) + 100
			manyNames(t, n, highBytes, 0o100644, p)
		})
	}
}

// Names with bytes of 0x80 and more lie elsewhere under the other flag, and
// are found all the same.
func TestUnsignedHash(t *testing.T) {
	for _, unsigned := range []bool{false, true} {
		p := params(64 << 20)
		p.UnsignedHash = unsigned
		image := manyNames(t, 5000, highBytes, 0o100644, p)
		dump, _ := e2fs.Run(t, "dumpe2fs", "-h", image)
		want := "signed_directory_hash"
		if unsigned {
			want = "unsigned_directory_hash"
		}
		if got := strings.TrimSpace(regexp.MustCompile(`(?m)^Filesystem flags:(.*)$`).FindStringSubmatch(dump)[1]); got != want {
			t.Errorf("flags are %q, not %q", got, want)
		}
		// The kernel puts new names where it will look for them.
		dir, unmount := e2fs.Mount(t, image, "rw")
		for i := 5000; i < 6000; i++ {
			must(t, os.WriteFile(dir+"/d/"+highBytes(i), nil, 0o600))
			must(t, os.Remove(dir+"/d/"+highBytes(i-5000)))
		}
		unmount()
		e2fs.Clean(t, image)
	}
}

// What the kernel does to our htrees must leave them sound: add to every leaf,
// split blocks, remove.
func TestKernelGrowsDirectory(t *testing.T) {
	f := newImage(t)
	w, err := NewWriter(f, Options{})
	must(t, err)
	must(t, w.Add("d", &Inode{Mode: 0o040755}))
	for i := range 2000 {
		must(t, w.Add("d/"+highBytes(i), &Inode{Mode: 0o100644}))
	}
	must(t, w.Finish(params(64<<20)))
	dir, unmount := e2fs.Mount(t, f.Name(), "rw")
	for i := 2000; i < 5000; i++ {
		must(t, os.WriteFile(dir+"/d/"+highBytes(i), []byte("new"), 0o600))
		if i < 3500 {
			must(t, os.Remove(dir+"/d/"+highBytes(i-2000)))
		}
	}
	unmount()
	e2fs.Clean(t, f.Name())
}
