//go:build linux

package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/ext4/internal/disk"
	"banger/ext4/internal/e2fs"
)

// torn gives a copy of a mounted image, as a machine that lost its power
// leaves it: what was synced is in the journal, and hardly any of it in place.
func torn(t testing.TB, image, dir string) string {
	t.Helper()
	d, err := os.Open(dir)
	must(t, err)
	defer d.Close()
	const syncfs = 306 // SYS_SYNCFS on amd64
	if _, _, errno := syscall.Syscall(syncfs, d.Fd(), 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	return clone(t, image)
}

// clone copies an image.
func clone(t testing.TB, image string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "clone")
	if out, exit := e2fs.Run(t, "cp", "--sparse=always", image, path); exit != 0 {
		t.Fatal(out)
	}
	return path
}

// churn makes the kernel write metadata, revoke it and use its blocks again.
func churn(t testing.TB, dir string, round int) {
	t.Helper()
	sub := filepath.Join(dir, fmt.Sprint("round", round))
	must(t, os.Mkdir(sub, 0o755))
	for i := range 400 {
		must(t, os.WriteFile(filepath.Join(sub, highBytes(i)), nil, 0o600))
	}
	f, err := os.Create(filepath.Join(dir, fmt.Sprint("tree", round)))
	must(t, err)
	for i := range int64(400) {
		_, err := f.WriteAt([]byte{byte(i) | 1}, i*8192)
		must(t, err)
	}
	must(t, f.Sync())
	must(t, f.Close())
	if round > 0 {
		must(t, os.RemoveAll(filepath.Join(dir, fmt.Sprint("round", round-1))))
		must(t, os.Remove(filepath.Join(dir, fmt.Sprint("tree", round-1))))
	}
	// A block that begins like one of the journal, for data=journal.
	var magic [8192]byte
	binary.BigEndian.PutUint32(magic[:], disk.JournalMagic)
	binary.BigEndian.PutUint32(magic[4096:], disk.JournalMagic)
	f, err = os.Create(filepath.Join(dir, fmt.Sprint("magic", round)))
	must(t, err)
	_, err = f.Write(magic[:])
	must(t, err)
	must(t, f.Sync())
	must(t, f.Close())
}

var journals = []struct {
	name    string
	args    []string
	options string
}{
	{"checksums v3", []string{"-t", "ext4"}, ""},
	{"checksums v3 1k", []string{"-t", "ext4", "-b", "1024"}, ""},
	{"checksums v3 32 bit", []string{"-t", "ext4", "-O", "^64bit"}, ""},
	{"no checksums", []string{"-t", "ext4", "-O", "^metadata_csum"}, ""},
	{"no checksums 32 bit", []string{"-t", "ext4", "-O", "^metadata_csum,^64bit"}, ""},
	{"checksum of transactions", []string{"-t", "ext4", "-O", "^metadata_csum"}, "journal_checksum"},
	{"ext3", []string{"-t", "ext3", "-b", "1024"}, ""},
	{"data in the journal", []string{"-t", "ext4"}, "data=journal"},
	{"data in the journal, no checksums", []string{"-t", "ext4", "-O", "^metadata_csum,^64bit", "-b", "1024"}, "data=journal"},
	{"small journal", []string{"-t", "ext4", "-b", "1024", "-J", "size=1"}, "data=journal"},
	{"fast_commit", []string{"-t", "ext4", "-O", "fast_commit"}, ""},
}

// What a journal holds is read as the kernel replays it.
func TestReplay(t *testing.T) {
	for _, c := range journals {
		t.Run(c.name, func(t *testing.T) {
			image := mkfs(t, 64*mib, c.args...)
			dir, unmount := e2fs.Mount(t, image, strings.Trim("rw,"+c.options, ","))
			var copies []string
			for round := range 5 {
				churn(t, dir, round)
				copies = append(copies, torn(t, image, dir))
			}
			unmount()
			replayed := 0
			for _, path := range copies {
				fsys := openImage(t, path)
				if fsys.dev.journal != nil {
					replayed += len(fsys.dev.journal.blocks)
				}
				before, err := os.ReadFile(path)
				must(t, err)
				mounted := clone(t, path)
				dir, unmount := e2fs.Mount(t, mounted, "rw,noatime")
				list, err := differences(fsys, hostTree(dir), seenByKernel)
				must(t, err)
				for _, d := range list {
					t.Error(d)
				}
				unmount()
				after, err := os.ReadFile(path)
				must(t, err)
				if !bytes.Equal(before, after) {
					t.Error("reading wrote")
				}
			}
			if replayed == 0 {
				t.Error("no journal had anything to replay")
			}
			t.Logf("%d blocks replayed", replayed)
		})
	}
}

// Fast commits are not replayed: an image that has some is refused.
func TestFastCommits(t *testing.T) {
	image := mkfs(t, 64*mib, "-t", "ext4", "-O", "fast_commit")
	dir, unmount := e2fs.Mount(t, image, "rw")
	path := torn(t, image, dir)
	openImage(t, path) // only full commits
	for i := range 3 {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint("new", i)))
		must(t, err)
		_, err = f.WriteString("new")
		must(t, err)
		must(t, f.Sync()) // makes a fast commit
		must(t, f.Close())
	}
	path = clone(t, image)
	unmount()
	r, err := os.Open(path)
	must(t, err)
	defer r.Close()
	if _, err := Open(r); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "fast commits") {
		t.Errorf("fast commits: %v", err)
	}
}

// A journal that lies is an error or is not believed; a bit of each of its
// blocks flipped, it never makes files of what was not written.
func TestReplayDamaged(t *testing.T) {
	image := mkfs(t, 16*mib, "-t", "ext4", "-b", "1024", "-J", "size=1")
	dir, unmount := e2fs.Mount(t, image, "rw")
	for round := range 2 {
		churn(t, dir, round)
	}
	path := torn(t, image, dir)
	unmount()
	good, err := os.ReadFile(path)
	must(t, err)
	fsys := openImage(t, path)
	j, err := fsys.openJournal()
	must(t, err)
	want := len(fsys.dev.journal.blocks)
	seen := map[string]int{}
	for n := range j.end {
		at, err := j.place(n)
		must(t, err)
		bad := bytes.Clone(good)
		bad[at*1024+uint64(n*7%1024)] ^= 0x10
		fsys, err := Open(bytes.NewReader(bad))
		switch {
		case err != nil:
			seen["refused"]++
		case fsys.dev.journal == nil || len(fsys.dev.journal.blocks) < want:
			seen["shorter"]++
		default:
			seen["unaffected"]++
		}
	}
	t.Log(seen)
	if seen["refused"] == 0 || seen["shorter"] == 0 {
		t.Errorf("damage was not noticed: %v", seen)
	}
}
