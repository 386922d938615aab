package vm

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"banger"
	"banger/ext4"
)

// writeSeed makes a work seed that has one of everything, and content of
// sizeBytes that is no hole.
func writeSeed(t *testing.T, sizeBytes int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seed.ext4")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := ext4.NewWriter(f, ext4.Options{})
	if err != nil {
		t.Fatal(err)
	}
	place := func(data []byte) *ext4.Content {
		c, err := w.Place(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	when := time.Date(2020, 1, 2, 3, 4, 5, 6, time.UTC)
	linked := &ext4.Inode{Mode: 0o100600, UID: 7, GID: 8, Mtime: when, Content: place(bytes.Repeat([]byte("x"), int(sizeBytes)))}
	for _, e := range []struct {
		path string
		in   *ext4.Inode
	}{
		{".", &ext4.Inode{Mode: 0o040711, Mtime: when, Xattrs: map[string][]byte{"user.top": []byte("1")}}},
		{"file", linked},
		{"link", linked},
		{"\xff\n!", &ext4.Inode{Mode: 0o120777, Target: "file"}},
		{"dir", &ext4.Inode{Mode: 0o041770, UID: 1 << 31}},
		{"dir/suid", &ext4.Inode{Mode: 0o104755, Content: place([]byte("suid")), Xattrs: map[string][]byte{"security.capability": bytes.Repeat([]byte{1}, 20)}}},
		{"dir/null", &ext4.Inode{Mode: 0o020666, Major: 1, Minor: 3}},
	} {
		if err := w.Add(e.path, e.in); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(ext4.Params{SizeBytes: 512 << 20, UUID: newUUID()}); err != nil {
		t.Fatal(err)
	}
	return path
}

func openDisk(t *testing.T, path string) *ext4.FS {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	disk, err := ext4.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

// A work disk holds what the seed holds, to the last attribute, in a file
// system of its own.
func TestCreateWorkDisk(t *testing.T) {
	seed := writeSeed(t, 100_000)
	path := filepath.Join(t.TempDir(), "work.ext4")
	const size = 8 << 30
	uuid, err := createWorkDisk(path, size, seed)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(need(t, "e2fsck"), "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	disk := openDisk(t, path)
	if disk.UUID() != uuid || uuid == openDisk(t, seed).UUID() || disk.SizeBytes() != size {
		t.Errorf("UUID %x, said %x, %d bytes", disk.UUID(), uuid, disk.SizeBytes())
	}
	if err := ext4.Compare(openDisk(t, seed), disk, ext4.DiffAll|ext4.DiffHoles, func(d ext4.Difference) bool {
		if d.Path != "lost+found" { // each file system has its own
			t.Error(d)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	// A disk that exists stays as it is.
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := createWorkDisk(path, size, seed); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a disk: %v", err)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) || before.ModTime() != after.ModTime() {
		t.Errorf("the disk was touched: %v", err)
	}
}

// What fails leaves no disk.
func TestCreateWorkDiskRefuses(t *testing.T) {
	seed := writeSeed(t, 4<<20)
	for name, row := range map[string]struct {
		size int64
		seed string
		code banger.Code
	}{
		"a seed larger than the disk": {4 << 20, seed, banger.CodeUsage},
		"a seed that is none":         {1 << 30, os.Args[0], banger.CodeInternal},
		"a seed that is gone":         {1 << 30, seed + "x", banger.CodeInternal},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "work.ext4")
			_, err := createWorkDisk(path, row.size, row.seed)
			if err == nil || banger.CodeOf(err) != row.code {
				t.Errorf("%q: %v", banger.CodeOf(err), err)
			}
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("something is left: %v", err)
			}
		})
	}
}
