//go:build linux

package ext4

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"banger/ext4/internal/e2fs"
)

// openImage opens a finished image for reading.
func openImage(t testing.TB, path string) *FS {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	fsys, err := Open(f)
	must(t, err)
	return fsys
}

// sameAsKernel requires that an image reads the way it mounts.
func sameAsKernel(t *testing.T, image string) {
	t.Helper()
	dir, unmount := e2fs.Mount(t, image, "ro,noload")
	defer unmount()
	list, err := differences(openImage(t, image), hostTree(dir), seenByKernel)
	must(t, err)
	for _, d := range list {
		t.Error(d)
	}
}

func TestReadOwn(t *testing.T) {
	sameAsKernel(t, build(t, sample(), params(64*mib)))
}

// An FS keeps the promises of io/fs.
func TestFS(t *testing.T) {
	files := tree{"link": symlink(1), "t": regular("target"), "dir": directoryFile(), "dir/deep": directoryFile(), "dir/deep/file": regular("deep"),
		"striped": striped(3), "empty": regular("")}
	for i := range 40 {
		files[fmt.Sprintf("dir/%d", i)] = regular(strings.Repeat("y", i*300))
	}
	if err := fstest.TestFS(openImage(t, build(t, files, params(8*mib))), "t", "dir/deep/file", "striped", "empty", "link"); err != nil {
		t.Error(err)
	}
}

// One FS serves many readers at once.
func TestConcurrentReads(t *testing.T) {
	image := build(t, sample(), params(64*mib))
	fsys, other := openImage(t, image), openImage(t, image)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			list, err := differences(fsys, other, DiffAll)
			if err != nil || len(list) > 0 {
				t.Errorf("%v %q", err, list)
			}
		})
	}
	wg.Wait()
}
