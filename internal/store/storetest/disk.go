package storetest

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"banger/ext4"
)

// A disk knows of a folder what a power cut could leave of it. What POSIX
// promises is little: the bytes of a file are there if they were fsynced, the
// names in a folder if it was. All else may be there or not, each file and each
// folder for itself; a folder may be seen as it was at any moment since its
// last fsync. That is worse than any file system does, which is what it is for.
type disk struct {
	t      *testing.T
	root   string
	keep   string                  // copies of what was fsynced
	top    uint64                  // inode of root
	dirs   map[uint64][]dirEntries // by inode: as fsynced, then as seen since
	synced map[uint64]string       // by inode: a copy of the file as fsynced
	now    map[uint64]string       // by inode: where a file is at this moment
	dirty  map[uint64]bool         // by inode: written to since it was fsynced
	copies int
}

type dirEntries map[string]dirEntry

type dirEntry struct {
	ino uint64
	dir bool
}

// newDisk takes what is in root for fsynced.
func newDisk(t *testing.T, root, keep string) *disk {
	d := &disk{t: t, root: root, keep: keep, dirs: map[uint64][]dirEntries{}, synced: map[uint64]string{}, dirty: map[uint64]bool{}}
	d.top = stat(t, root).Ino
	d.look()
	for ino, path := range d.now {
		d.synced[ino] = d.name()
		if err := os.Link(path, d.synced[ino]); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func stat(t testing.TB, path string) (st syscall.Stat_t) {
	t.Helper()
	if err := syscall.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st
}

// name is a new one for a copy.
func (d *disk) name() string {
	d.copies++
	return filepath.Join(d.keep, fmt.Sprint(d.copies))
}

// look notes what there is to see now.
func (d *disk) look() {
	d.t.Helper()
	d.now = map[uint64]string{}
	var dir func(path string, ino uint64)
	dir = func(path string, ino uint64) {
		entries, err := os.ReadDir(path)
		if errors.Is(err, fs.ErrNotExist) {
			return // it is being removed by another thread
		}
		if err != nil {
			d.t.Fatal(err)
		}
		seen := dirEntries{}
		for _, e := range entries {
			var st syscall.Stat_t
			if err := syscall.Lstat(filepath.Join(path, e.Name()), &st); errors.Is(err, fs.ErrNotExist) {
				continue
			} else if err != nil {
				d.t.Fatal(err)
			}
			seen[e.Name()] = dirEntry{st.Ino, e.IsDir()}
			if e.IsDir() {
				dir(filepath.Join(path, e.Name()), st.Ino)
			} else {
				d.now[st.Ino] = filepath.Join(path, e.Name())
			}
		}
		switch history := d.dirs[ino]; {
		case history == nil && d.dirs[d.top] != nil && ino != d.top:
			d.dirs[ino] = []dirEntries{{}, seen} // new: nothing in it is durable
		case history == nil || !equalEntries(history[len(history)-1], seen):
			d.dirs[ino] = append(history, seen)
		}
	}
	dir(d.root, d.top)
}

func equalEntries(a, b dirEntries) bool {
	if len(a) != len(b) {
		return false
	}
	for name, e := range a {
		if b[name] != e {
			return false
		}
	}
	return true
}

// change is told of an operation before it happens, after look.
func (d *disk) change(op operation) {
	d.t.Helper()
	if op.fd == "" {
		return
	}
	var st syscall.Stat_t
	if err := syscall.Stat(op.fd, &st); err != nil {
		d.t.Fatal(err)
	}
	if op.call != "fsync" {
		d.dirty[st.Ino] = true
		return
	}
	if history := d.dirs[st.Ino]; st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
		if history == nil {
			d.t.Fatalf("fsync of a folder that was never seen: %s", op.path)
		}
		d.dirs[st.Ino] = history[len(history)-1:]
		return
	}
	to := d.name()
	if err := ext4.CopyFile(d.t.Context(), to, op.fd); err != nil {
		d.t.Fatal(err)
	}
	d.synced[st.Ino], d.dirty[st.Ino] = to, false
}

// A cut chooses what is there after a power cut: which of the views of a
// folder, the oldest first, and what of a file.
type cut struct {
	view  func(views int) int
	bytes func() part
}

type part int

const (
	partSynced part = iota // its bytes of the last fsync; none if there was none
	partNow                // all that was written
	partZeros              // its length, and zeros
)

// cuts are the extremes and, with r, one at random.
func cuts(r *rand.Rand) map[string]cut {
	oldest, newest := func(int) int { return 0 }, func(n int) int { return n - 1 }
	is := func(p part) func() part { return func() part { return p } }
	return map[string]cut{
		"killed":                {newest, is(partNow)}, // the power is on
		"only what was fsynced": {oldest, is(partSynced)},
		"names before bytes":    {newest, is(partSynced)},
		"lengths before bytes":  {newest, is(partZeros)},
		"bytes before names":    {oldest, is(partNow)},
		"random":                {r.IntN, func() part { return part(r.IntN(3)) }},
	}
}

// after writes what a cut leaves into a new folder. It returns nil and a name
// of what is there, which is the same for the same.
func (d *disk) after(c cut, to string) (id string) {
	d.t.Helper()
	var lines []string
	var dir func(ino uint64, at string)
	dir = func(ino uint64, at string) {
		if err := os.Mkdir(filepath.Join(to, at), 0o700); err != nil {
			d.t.Fatal(err)
		}
		views := d.dirs[ino]
		view := views[c.view(len(views))]
		for name, e := range view {
			if e.dir {
				lines = append(lines, filepath.Join(at, name)+"/")
				dir(e.ino, filepath.Join(at, name))
				continue
			}
			lines = append(lines, filepath.Join(at, name)+" "+d.file(e.ino, c.bytes(), filepath.Join(to, at, name)))
		}
	}
	dir(d.top, "")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// file puts one file there.
func (d *disk) file(ino uint64, p part, to string) (id string) {
	d.t.Helper()
	synced, now := d.synced[ino], d.now[ino]
	if now == "" || synced != "" && !d.dirty[ino] { // it was removed, or all of it is durable
		p = partSynced
	}
	var err error
	switch {
	case strings.HasSuffix(to, ".lock"):
		return "" // a link of it would be held with it
	case p == partSynced && synced != "" && goneOnWith(to):
		id, err = synced, ext4.CopyFile(d.t.Context(), to, synced)
	case p == partSynced && synced != "":
		id, err = synced, os.Link(synced, to)
	case p == partSynced:
		id, err = "empty", os.WriteFile(to, nil, 0o600)
	case p == partZeros:
		id = "zeros"
		if err = os.WriteFile(to, nil, 0o600); err == nil {
			err = os.Truncate(to, stat(d.t, now).Size)
		}
	default:
		st := stat(d.t, now)
		id, err = fmt.Sprint(ino, st.Size, st.Mtim), ext4.CopyFile(d.t.Context(), to, now)
	}
	if err != nil {
		d.t.Fatal(err)
	}
	return id
}

// goneOnWith tells the files that are written to where they stand: blobs that
// came in part, and logs.
func goneOnWith(path string) bool {
	return strings.Contains(path, "/partial/") || strings.HasSuffix(path, ".log")
}
