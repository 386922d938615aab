//go:build linux

package ext4

import (
	"os"
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
	files := sample()
	files["link"].Target = "dir/../plain"
	files["striped"] = striped(10)
	image := build(t, files, params(64*mib))
	sameAsKernel(t, image)
	fsys := openImage(t, image)
	if err := fstest.TestFS(fsys, "plain", "dir", "striped"); err != nil {
		t.Error(err)
	}
}
