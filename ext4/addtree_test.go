//go:build linux

package ext4

import (
	"errors"
	"io/fs"
	"maps"
	"strings"
	"testing"
	"time"

	"banger/ext4/internal/e2fs"
)

// An image reads back as the tree it was made of, other trees are copied into
// others whole.
func TestAddTree(t *testing.T) {
	files := sample()
	files["dir/hard"], files["hard"] = files["plain"], files["plain"]
	files["huge"] = &file{Inode: Inode{Mode: 0o100600}, size: 1<<42 + 5, pieces: []piece{{5000, []byte("x")}, {1 << 41, []byte("y")}, {1<<42 + 4, []byte("z")}}}
	image := build(t, files, params(64*mib))
	list, err := differences(openImage(t, image), &memTree{files: files}, DiffAll|DiffAtime|DiffCtime|DiffCrtime|DiffHoles)
	must(t, err)
	for _, d := range list {
		t.Error(d)
	}
	f := newImage(t)
	w, err := NewWriter(f, Options{})
	must(t, err)
	must(t, w.AddTree(".", openImage(t, image), "."))
	must(t, w.Add("again", &Inode{Mode: 0o040755}))
	must(t, w.AddTree("again/dir", openImage(t, image), "dir"))
	must(t, w.AddTree("again/one", openImage(t, image), "huge"))
	p := params(64 * mib)
	p.Time = testTime.Add(time.Hour)
	must(t, w.Finish(p))
	e2fs.Clean(t, f.Name())
	for path, file := range maps.Clone(files) {
		if path == "dir" || strings.HasPrefix(path, "dir/") {
			copied := *file
			files["again/"+path] = &copied
		}
	}
	huge := *files["huge"]
	files["again"], files["again/one"] = &file{Inode: Inode{Mode: 0o040755, Atime: p.Time, Mtime: p.Time, Ctime: p.Time, Crtime: p.Time}}, &huge
	lost := directoryFile()
	lost.Mode, lost.Atime, lost.Mtime, lost.Ctime, lost.Crtime = 0o040700, p.Time, p.Time, p.Time, p.Time
	files[lostFoundName] = lost
	list, err = differences(openImage(t, f.Name()), &memTree{files: files}, DiffAll|DiffAtime|DiffCtime|DiffCrtime|DiffHoles)
	must(t, err)
	for _, d := range list {
		t.Error(d)
	}
	if err := w.AddTree("x", openImage(t, image), "nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("from nothing: %v", err)
	}
}
