package storetest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/ext4"
)

// Contents tells every file of a state folder by its path, less locks and what
// is in run/. Folders end in a slash.
type Contents map[string]string

// Prints are the hashes of files by inode, which do not change in the store.
type Prints struct {
	record func([]byte) []byte
	known  map[string]string
}

// NewPrints knows no file yet. record, where it is not nil, takes out of a
// record what may be another each time it is made.
func NewPrints(record func([]byte) []byte) *Prints { return &Prints{record, map[string]string{}} }

// Of tells what is in a state folder.
func (p *Prints) Of(t *testing.T, root string) Contents {
	t.Helper()
	c := Contents{}
	if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		switch {
		case rel == "":
		case rel == "locks" || rel == "run":
			return fs.SkipDir
		case d.IsDir():
			c[rel+"/"] = ""
		default:
			c[rel] = p.File(t, path)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return c
}

// File tells one file.
func (p *Prints) File(t *testing.T, path string) string {
	t.Helper()
	st := stat(t, path)
	key := fmt.Sprint(st.Ino, st.Size, st.Mtim)
	if p.known[key] != "" {
		return p.known[key]
	}
	h, size := sha256.New(), st.Size
	if size < 64<<10 { // a record, under whatever name
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if p.record != nil {
			data = p.record(data)
			size = int64(len(data))
		}
		h.Write(data)
	} else {
		hashData(t, h, path)
	}
	p.known[key] = fmt.Sprintf("%d bytes, %x", size, h.Sum(nil))
	return p.known[key]
}

// hashData hashes the blocks of a file that are not zero, and where they are.
func hashData(t *testing.T, h io.Writer, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zero := make([]byte, 4096)
	buf := make([]byte, 4096)
	for at := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return
		}
		end, err2 := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil || err2 != nil {
			t.Fatal(err, err2)
		}
		for at = start / 4096 * 4096; at < end; at += 4096 {
			n, err := f.ReadAt(buf, at)
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if string(buf[:n]) != string(zero[:n]) {
				fmt.Fprintf(h, "%d ", at)
				h.Write(buf[:n])
			}
		}
	}
}

// LinkTree makes a tree of hard links of another: a store changes no file that
// is in it, but those that are gone on with, which are copied. Locks are not linked, since who holds one holds all.
func LinkTree(t *testing.T, from, to string) {
	t.Helper()
	if err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Mkdir(to+strings.TrimPrefix(path, from), 0o700)
		}
		if strings.HasSuffix(path, ".lock") {
			return nil
		}
		if goneOnWith(path) {
			return ext4.CopyFile(t.Context(), to+strings.TrimPrefix(path, from), path)
		}
		return os.Link(path, to+strings.TrimPrefix(path, from))
	}); err != nil {
		t.Fatal(err)
	}
}
