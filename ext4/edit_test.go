//go:build linux

package ext4

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/ext4/internal/disk"
	"banger/ext4/internal/e2fs"
)

// A step is one change, made by an Editor or by the kernel.
type step struct {
	op   string
	path string
	in   Inode  // of put, mkdirall; the attributes of the others
	data string // of put
}

func (s *step) edit(e *Editor) error {
	switch s.op {
	case "put":
		return e.Put(s.path, &s.in, strings.NewReader(s.data), int64(len(s.data)))
	case "mkdirall":
		return e.MkdirAll(s.path, &s.in)
	case "remove":
		return e.Remove(s.path)
	case "removeall":
		return e.RemoveAll(s.path)
	case "chmod":
		return e.Chmod(s.path, s.in.Mode)
	case "chown":
		return e.Chown(s.path, s.in.UID, s.in.GID)
	case "chtimes":
		return e.Chtimes(s.path, s.in.Atime, s.in.Mtime)
	case "xattrs":
		return e.SetXattrs(s.path, s.in.Xattrs)
	}
	panic(s.op)
}

// onHost does the same to a mounted image, as root of which dir stands.
func (s *step) onHost(dir string) error {
	path := dir + "/" + s.path
	mode := func(p string, m uint16) error { return syscall.Chmod(p, uint32(m&0o7777)) }
	attributes := func(p string, in *Inode) error {
		if err := syscall.Lchown(p, int(in.UID), int(in.GID)); err != nil {
			return err
		}
		for name, value := range in.Xattrs {
			if err := lsetxattr(p, name, value); err != nil {
				return err
			}
		}
		if in.Mode&disk.TypeMask == disk.TypeSymlink {
			return nil
		}
		return mode(p, in.Mode)
	}
	switch s.op {
	case "put":
		if info, err := os.Lstat(path); err == nil {
			if info.IsDir() || s.in.Mode&disk.TypeMask == disk.TypeDir {
				return fs.ErrExist
			}
			if err := os.Remove(path); err != nil {
				return err
			}
		}
		var err error
		switch s.in.Mode & disk.TypeMask {
		case disk.TypeRegular:
			err = os.WriteFile(path, []byte(s.data), 0o600)
			if err == nil && strings.Contains(s.data, strings.Repeat("\x00", 4096)) {
				out, exit := execFallocate(path)
				if exit != 0 {
					err = errors.New(out)
				}
			}
		case disk.TypeDir:
			err = os.Mkdir(path, 0o700)
		case disk.TypeSymlink:
			err = os.Symlink(s.in.Target, path)
		default:
			err = syscall.Mknod(path, uint32(s.in.Mode), int(s.in.Minor&0xFF|s.in.Major<<8|(s.in.Minor&^0xFF)<<12))
		}
		if err != nil {
			return err
		}
		return attributes(path, &s.in)
	case "mkdirall":
		at := dir
		for part := range strings.SplitSeq(s.path, "/") {
			at += "/" + part
			if err := os.Mkdir(at, 0o700); errors.Is(err, fs.ErrExist) {
				continue
			} else if err != nil {
				return err
			}
			if err := attributes(at, &s.in); err != nil {
				return err
			}
		}
		return nil
	case "remove":
		return os.Remove(path)
	case "removeall":
		return os.RemoveAll(path)
	case "chmod":
		return mode(path, s.in.Mode)
	case "chown":
		return syscall.Lchown(path, int(s.in.UID), int(s.in.GID))
	case "chtimes":
		return os.Chtimes(path, s.in.Atime, s.in.Mtime)
	case "xattrs":
		old, err := xattrsOf(path)
		if err != nil {
			return err
		}
		for name := range old {
			if err := lremovexattr(path, name); err != nil {
				return err
			}
		}
		for name, value := range s.in.Xattrs {
			if err := lsetxattr(path, name, value); err != nil {
				return err
			}
		}
		return nil
	}
	panic(s.op)
}

// execFallocate makes holes of zeros.
func execFallocate(path string) (string, int) {
	out, err := os.ReadFile(path)
	if err != nil {
		return err.Error(), 1
	}
	f, err := os.Create(path)
	if err != nil {
		return err.Error(), 1
	}
	defer f.Close()
	for at := 0; at < len(out); at += 1024 {
		part := out[at:min(at+1024, len(out))]
		if bytes.Count(part, []byte{0}) < len(part) {
			if _, err := f.WriteAt(part, int64(at)); err != nil {
				return err.Error(), 1
			}
		}
	}
	if err := f.Truncate(int64(len(out))); err != nil {
		return err.Error(), 1
	}
	return "", 0
}

// steps are changes of every kind to what populate has made.
func steps() []step {
	file := func(mode uint16) Inode { return Inode{Mode: disk.TypeRegular | mode, UID: 3, GID: 70000} }
	dir := Inode{Mode: disk.TypeDir | 0o750, UID: 1000, GID: 100000}
	list := []step{
		{"put", "new", file(0o755), strings.Repeat("new file ", 50_000)},
		{"put", "empty-new", file(0), ""},
		{"put", "size-3000001", file(0o4755), "short now"},
		{"put", "size-0", file(0o600), strings.Repeat("long now ", 100_000)},
		{"put", "hard", file(0o644), "no link any more"},
		{"put", "link-60", file(0o644), "was a symlink"},
		{"put", "null", file(0o644), "was a device"},
		{"put", "sparse-new", file(0o644), "start" + strings.Repeat("\x00", 1_000_000) + "end"},
		{"put", "absolute/via", file(0o644), "through a symlink"},
		{"put", "dev-new", Inode{Mode: disk.TypeChar | 0o620, Major: 300, Minor: 70000, GID: 5}, ""},
		{"put", "fifo-new", Inode{Mode: disk.TypeFIFO | 0o600}, ""},
		{"put", "link-new", Inode{Mode: disk.TypeSymlink | 0o777, Target: "deep/er", UID: 7}, ""},
		{"put", "link-long", Inode{Mode: disk.TypeSymlink | 0o777, Target: strings.Repeat("x", 300)}, ""},
		{"put", "dir-new", dir, ""},
		{"put", "dir-new/inside", file(0o644), "inside"},
		{"mkdirall", "a/b/c/d", dir, ""},
		{"mkdirall", "absolute/still/more", dir, ""},
		{"put", "a/b/c/d/file", file(0o644), "deep"},
		{"remove", "size-1", Inode{}, ""},
		{"remove", "striped", Inode{}, ""},
		{"remove", "sparse", Inode{}, ""},
		{"remove", "link-1023", Inode{}, ""},
		{"remove", "big", Inode{}, ""},
		{"remove", "empty", Inode{}, ""},
		{"removeall", "many-1500", Inode{}, ""},
		{"removeall", "size-100000", Inode{}, ""},
		{"removeall", "nothing", Inode{}, ""},
		{"chmod", "size-59", Inode{Mode: 0o7711}, ""},
		{"chown", "size-60", Inode{UID: 4_000_000_000, GID: 1}, ""},
		{"chown", "link-1", Inode{UID: 65536, GID: 65535}, ""},
		{"chtimes", "size-61", Inode{Atime: time.Unix(1_000_000_000, 0), Mtime: time.Unix(2_000_000_000, 0)}, ""},
		{"xattrs", "size-100", Inode{Xattrs: map[string][]byte{"user.other": []byte("o")}}, ""},
		{"xattrs", "size-160", Inode{}, ""},
		{"xattrs", "size-4095", Inode{Xattrs: map[string][]byte{"user.first": bytes.Repeat([]byte("f"), 500), "security.x": []byte("s")}}, ""},
		{"xattrs", "few/1", Inode{Xattrs: map[string][]byte{"trusted.mine": []byte("not shared")}}, ""},
		{"remove", "few/2", Inode{}, ""},
		{"chmod", ".", Inode{Mode: 0o711}, ""},
	}
	for i := range 60 {
		list = append(list, step{"put", fmt.Sprintf("many-40/added-%d-%s", i, strings.Repeat("n", i%40)), file(0o600), "x"})
	}
	for i := range 40 {
		if i%3 != 0 {
			list = append(list, step{"remove", "many-40/" + highBytes(i), Inode{}, ""})
		}
	}
	return list
}

// editTime is in the past, or e2fsck complains.
var editTime = time.Unix(1_750_000_000, 0)

// change runs steps through Edit.
func change(t testing.TB, image string, list []step) {
	t.Helper()
	err := Edit(context.Background(), image, editTime, func(e *Editor) error {
		for i := range list {
			if err := list[i].edit(e); err != nil {
				return fmt.Errorf("%s %q: %w", list[i].op, list[i].path, err)
			}
		}
		return nil
	})
	must(t, err)
}

// changeOnHost runs them by the kernel, in a process whose root is the image:
// paths of the steps then lead where an Editor must take them.
func changeOnHost(t testing.TB, image string, list []step) {
	t.Helper()
	dir, unmount := e2fs.Mount(t, image, "rw")
	defer unmount()
	for i := range list {
		s := list[i]
		// The one absolute symlink, resolved by hand.
		s.path = strings.Replace(s.path, "absolute/", "deep/er/", 1)
		if err := s.onHost(dir); err != nil {
			t.Fatalf("%s %q: %v", s.op, s.path, err)
		}
	}
}

// sameButTimes are aspects in which an edit must do what the kernel does.
const sameButTimes = DiffAll &^ DiffMtime

// An edit of what others made gives what the kernel would make of it.
func TestEditFlavours(t *testing.T) {
	for _, c := range flavours {
		if c.name == "bigalloc" || c.name == "mmp" {
			continue // refused: TestEditRefused
		}
		t.Run(c.name, func(t *testing.T) {
			image := flavoured(t, c.args, c.tune)
			e2fs.Clean(t, image)
			other := clone(t, image)
			list := steps()
			if strings.Contains(c.name, "ea_inode") {
				list = append(list, step{"xattrs", "size-800", Inode{Xattrs: map[string][]byte{"user.a": bytes.Repeat([]byte("a"), 40_000), "user.huge": bytes.Repeat([]byte("huge"), 5000)}}, ""},
					step{"remove", "size-1023", Inode{}, ""})
			}
			change(t, image, list)
			e2fs.Clean(t, image)
			changeOnHost(t, other, list)
			edited, kernel := openImage(t, image), openImage(t, other)
			diffs, err := differences(edited, kernel, sameButTimes)
			must(t, err)
			for _, d := range diffs {
				t.Error(d)
			}
			sameAsKernel(t, image)
			// The kernel can go on with it.
			dir, unmount := e2fs.Mount(t, image, "rw")
			must(t, os.RemoveAll(filepath.Join(dir, "a")))
			must(t, os.RemoveAll(filepath.Join(dir, "many-40")))
			populateAgain(t, dir)
			unmount()
			e2fs.Clean(t, image)
		})
	}
}

func populateAgain(t testing.TB, dir string) {
	t.Helper()
	must(t, os.Mkdir(filepath.Join(dir, "again"), 0o755))
	for i := range 200 {
		must(t, os.WriteFile(filepath.Join(dir, "again", fmt.Sprint(i)), bytes.Repeat([]byte("again"), i*10), 0o644))
	}
}

func lremovexattr(path, name string) error {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	q, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	return lremove(p, q)
}

// memImage is an image in memory that notes each write and sync, and fails or
// stops at one of them.
type memImage struct {
	data   []byte
	synced []byte // what is on the disk for sure
	ops    int
	failAt int // 0: never
	dead   bool
	lose   *rand.Rand // which writes since the last sync survive a stop; nil: all
	recent []write
}

type write struct {
	at   int64
	data []byte
}

var errInjected = errors.New("injected")

func (m *memImage) ReadAt(p []byte, at int64) (int, error) {
	return bytes.NewReader(m.data).ReadAt(p, at)
}

func (m *memImage) fault() error {
	if m.dead {
		return errInjected
	}
	if m.ops++; m.ops == m.failAt {
		m.dead = true
		return errInjected
	}
	return nil
}

func (m *memImage) WriteAt(p []byte, at int64) (int, error) {
	if err := m.fault(); err != nil {
		return 0, err
	}
	if at+int64(len(p)) > int64(len(m.data)) {
		return 0, io.ErrShortWrite
	}
	m.recent = append(m.recent, write{at, bytes.Clone(p)})
	return copy(m.data[at:], p), nil
}

func (m *memImage) Sync() error {
	if err := m.fault(); err != nil {
		return err
	}
	for _, w := range m.recent {
		copy(m.synced[w.at:], w.data)
	}
	m.recent = nil
	return nil
}

// afterStop is what the disk holds when the machine stops dead: what was
// synced, and of the writes since then some.
func (m *memImage) afterStop() []byte {
	disk := bytes.Clone(m.synced)
	for _, w := range m.recent {
		if m.lose == nil || m.lose.IntN(2) == 0 {
			copy(disk[w.at:], w.data)
		}
	}
	return disk
}

// editMem runs steps on an image in memory.
func editMem(m *memImage, list []step) error {
	e, err := newEditor(m, editTime)
	if err != nil {
		return err
	}
	for i := range list {
		if err := list[i].edit(e); err != nil {
			return err
		}
	}
	return e.commit()
}

// Fail, or stop dead, at every write and sync of an edit: the image has the
// old state or the new one, e2fsck agrees once the journal is replayed, and
// the same edit then succeeds.
func TestEditFaults(t *testing.T) {
	list := []step{
		{"put", "new", Inode{Mode: 0o100755}, strings.Repeat("data", 30_000)},
		{"put", "size-4096", Inode{Mode: 0o100755}, "replaced"},
		{"mkdirall", "a/b", Inode{Mode: 0o040755}, ""},
		{"removeall", "many-40", Inode{}, ""},
		{"put", "few/link", Inode{Mode: 0o120777, Target: strings.Repeat("l", 100)}, ""},
		{"xattrs", "size-1024", Inode{Xattrs: map[string][]byte{"user.x": bytes.Repeat([]byte("x"), 700)}}, ""},
	}
	for _, c := range []struct {
		name string
		args []string
		torn bool
	}{
		{"ext4", []string{"-t", "ext4", "-b", "1024", "-J", "size=1"}, false},
		{"ext4 to be replayed", []string{"-t", "ext4", "-b", "1024", "-J", "size=1"}, true},
		{"ext3 4k", []string{"-t", "ext3", "-b", "4096"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := mkfs(t, 12*mib, c.args...)
			dir, unmount := e2fs.Mount(t, image, "rw")
			few := filepath.Join(dir, "few")
			must(t, os.Mkdir(few, 0o755))
			for _, n := range []int{0, 1024, 4096} {
				must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("size-%d", n)), bytes.Repeat([]byte("x"), n), 0o600))
			}
			must(t, os.Mkdir(filepath.Join(dir, "many-40"), 0o755))
			for i := range 40 {
				must(t, os.WriteFile(filepath.Join(dir, "many-40", highBytes(i)), []byte("y"), 0o600))
			}
			before := image
			if c.torn {
				before = torn(t, image, dir)
			}
			unmount()
			start, err := os.ReadFile(before)
			must(t, err)
			fresh := func(failAt int) *memImage {
				return &memImage{data: bytes.Clone(start), synced: bytes.Clone(start), failAt: failAt}
			}
			oldFS, err := Open(bytes.NewReader(start))
			must(t, err)
			whole := fresh(0)
			must(t, editMem(whole, list))
			total := whole.ops
			newFS, err := Open(bytes.NewReader(whole.data))
			must(t, err)
			seen := map[string]int{}
			check := func(k int, data []byte) {
				t.Helper()
				got, err := Open(bytes.NewReader(data))
				if err != nil {
					t.Fatalf("stopped at %d of %d: %v", k, total, err)
				}
				fromOld, err := differences(got, oldFS, DiffAll|DiffCtime)
				must(t, err)
				fromNew, err := differences(got, newFS, DiffAll|DiffCtime)
				must(t, err)
				switch {
				case len(fromOld) == 0:
					seen["old"]++
				case len(fromNew) == 0:
					seen["new"]++
				default:
					t.Fatalf("stopped at %d of %d: neither old nor new:\n%s\n%s", k, total, fromOld, fromNew)
				}
				path := filepath.Join(t.TempDir(), "stopped")
				must(t, os.WriteFile(path, data, 0o600))
				if out, exit := e2fs.Run(t, "e2fsck", "-fy", "-E", "journal_only", path); exit > 1 {
					t.Fatalf("stopped at %d of %d: e2fsck -E journal_only: exit %d: %s", k, total, exit, out)
				}
				if c.torn && len(fromOld) == 0 {
					// The counts in the superblock of an image that was
					// never unmounted may be old, with or without us.
					e2fs.Run(t, "e2fsck", "-fp", path)
				}
				e2fs.Clean(t, path)
				must(t, os.Remove(path))
			}
			r := rand.New(rand.NewPCG(1, 2))
			for k := 1; k <= total; k++ {
				m := fresh(k)
				if err := editMem(m, list); !errors.Is(err, errInjected) {
					t.Fatalf("failed at %d of %d: %v", k, total, err)
				}
				check(k, m.data) // the write failed, the machine went on
				m.lose = r
				check(k, m.afterStop())
				if k%7 == 0 {
					again := &memImage{data: m.afterStop()}
					again.synced = bytes.Clone(again.data)
					if err := editMem(again, list); err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Fatalf("again after %d: %v", k, err)
					}
				}
			}
			t.Logf("%d operations: %v", total, seen)
			if seen["old"] == 0 || seen["new"] == 0 {
				t.Errorf("not both states were seen: %v", seen)
			}
		})
	}
}

// What an edit may not touch is refused, by name, and unchanged.
func TestEditRefused(t *testing.T) {
	plain := func(args ...string) string { return mkfs(t, 16*mib, args...) }
	debugfs := func(image string, commands ...string) string {
		for _, c := range commands {
			if out, exit := e2fs.Run(t, "debugfs", "-w", "-R", c, image); exit != 0 {
				t.Fatal(out)
			}
		}
		return image
	}
	inUse := plain("-t", "ext2")
	_, unmount := e2fs.Mount(t, inUse, "rw")
	defer unmount()
	unclean := plain("-t", "ext2")
	dir, unmountUnclean := e2fs.Mount(t, unclean, "rw")
	uncleanCopy := torn(t, unclean, dir)
	unmountUnclean()
	locked := plain("-t", "ext4")
	f, err := os.OpenFile(locked, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	// As QEMU does: a shared lock on one byte.
	must(t, syscall.FcntlFlock(f.Fd(), 37, &syscall.Flock_t{Type: syscall.F_RDLCK, Start: 100, Len: 1}))
	for _, c := range []struct {
		image, reason string
		kind          error
	}{
		{plain("-t", "ext4", "-O", "bigalloc"), "bigalloc", errors.ErrUnsupported},
		{plain("-t", "ext4", "-O", "mmp"), "mmp", errors.ErrUnsupported},
		{plain("-t", "ext4", "-O", "quota"), "quota", errors.ErrUnsupported},
		{debugfs(plain("-t", "ext4"), "ssv feature_ro_compat 0x40000000"), "FEATURE_R30", errors.ErrUnsupported},
		{debugfs(plain("-t", "ext4", "-O", "^metadata_csum"), "ssv state 2"), "e2fsck", ErrCorrupt},
		{inUse, "loop", ErrInUse},
		{locked, "locked", ErrInUse},
		{uncleanCopy, "not unmounted", nil},
	} {
		before, err := os.ReadFile(c.image)
		must(t, err)
		err = Edit(context.Background(), c.image, editTime, func(e *Editor) error {
			return e.Put("x", &Inode{Mode: 0o100644}, strings.NewReader("x"), 1)
		})
		if err == nil || !strings.Contains(err.Error(), c.reason) || c.kind != nil && !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", c.reason, err)
		}
		after, err := os.ReadFile(c.image)
		must(t, err)
		if !bytes.Equal(before, after) {
			t.Errorf("%s: the image was changed", c.reason)
		}
	}
}

// A bad call is refused with its path, and the edit goes on without it.
func TestEditBadCalls(t *testing.T) {
	image := flavoured(t, []string{"-t", "ext4"}, nil)
	before := openImage(t, clone(t, image))
	file, dir := Inode{Mode: 0o100644}, Inode{Mode: 0o040755}
	small := map[string][]byte{"user.": nil}
	long := strings.Repeat("n", 256)
	must(t, Edit(context.Background(), image, editTime, func(e *Editor) error {
		for _, c := range []struct {
			row, reason string
			err         error
		}{
			{"put nowhere", "not exist", e.Put("nowhere/x", &file, nil, 0)},
			{"put under a file", "not a directory", e.Put("size-1/x", &file, nil, 0)},
			{"put over a directory", "exist", e.Put("deep", &file, nil, 0)},
			{"put a directory over a file", "exist", e.Put("size-1", &dir, nil, 0)},
			{"put over the root", "exist", e.Put(".", &file, nil, 0)},
			{"put absolute", "invalid", e.Put("/x", &file, nil, 0)},
			{"put dot dot", "invalid", e.Put("deep/../x", &file, nil, 0)},
			{"put long name", "more than 255", e.Put(long, &file, nil, 0)},
			{"put no type", "no file type", e.Put("x", &Inode{}, nil, 0)},
			{"put content in a directory", "invalid", e.Put("x", &dir, strings.NewReader("x"), 1)},
			{"put bad xattr", "prefix", e.Put("x", &Inode{Mode: 0o100644, Xattrs: small}, nil, 0)},
			{"put through a dangling symlink", "not exist", e.Put("link-59/x", &file, nil, 0)},
			{"remove nothing", "not exist", e.Remove("nothing")},
			{"remove a full directory", "not empty", e.Remove("deep")},
			{"remove the root", "root", e.RemoveAll(".")},
			{"chmod of a type", "permission bits", e.Chmod("size-1", 0o100644)},
			{"chmod nothing", "not exist", e.Chmod("nothing", 0)},
			{"chtimes too early", "1901", e.Chtimes("size-1", time.Unix(-1<<40, 0), time.Time{})},
			{"xattrs", "prefix", e.SetXattrs("size-1", small)},
			{"mkdirall over a file", "not a directory", e.MkdirAll("size-1/x", &dir)},
			{"mkdirall of a file", "invalid", e.MkdirAll("y", &file)},
		} {
			if c.err == nil || !strings.Contains(c.err.Error(), c.reason) {
				t.Errorf("%s: %v, want %q", c.row, c.err, c.reason)
			}
		}
		return e.Put("good", &file, strings.NewReader("good"), 4)
	}))
	e2fs.Clean(t, image)
	diffs, err := differences(openImage(t, image), before, DiffAll&^DiffMtime)
	must(t, err)
	if len(diffs) != 1 || !strings.Contains(diffs[0], `"good": name`) {
		t.Errorf("differences: %q", diffs)
	}
	// An error in the middle spoils the whole edit.
	err = Edit(context.Background(), image, editTime, func(e *Editor) error {
		if err := e.Put("half", &file, strings.NewReader("short"), 100); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("short content: %v", err)
		}
		e.Remove("good")
		return nil
	})
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("after an error in the middle: %v", err)
	}
	if _, err := openImage(t, image).Stat("good"); err != nil {
		t.Error(err)
	}
	e2fs.Clean(t, image)
}

// Times are those asked for, else that of the edit; what an edit changes shows
// it, and nothing else does.
func TestEditTimes(t *testing.T) {
	image := flavoured(t, []string{"-t", "ext4"}, nil)
	before := openImage(t, clone(t, image))
	own := Inode{Mode: 0o100644, Atime: time.Unix(1, 1), Mtime: time.Unix(2, 2), Ctime: time.Unix(3, 3), Crtime: time.Unix(4, 4)}
	withX := own
	withX.Xattrs = map[string][]byte{"user.x": bytes.Repeat([]byte("x"), 500)}
	must(t, Edit(context.Background(), image, editTime, func(e *Editor) error {
		return errors.Join(
			e.Put("own", &own, nil, 0), e.Put("few/own-x", &withX, nil, 0), e.Put("few/new", &Inode{Mode: 0o100644}, nil, 0),
			e.Chmod("size-0", 0o777), e.SetXattrs("size-1", withX.Xattrs), e.Remove("deep/hard"),
			e.Chtimes("size-60", time.Unix(5, 5), time.Time{}),
		)
	}))
	e2fs.Clean(t, image)
	after := openImage(t, image)
	stat := func(f *FS, path string) *Stat {
		info, err := f.Lstat(path)
		must(t, err)
		return info.Sys().(*Stat)
	}
	for _, c := range []struct {
		path                         string
		atime, mtime, ctime, created time.Time // zero: as before
	}{
		{"own", own.Atime, own.Mtime, own.Ctime, own.Crtime},
		{"few/own-x", own.Atime, own.Mtime, own.Ctime, own.Crtime},
		{"few/new", editTime, editTime, editTime, editTime},
		{"few", time.Time{}, editTime, editTime, time.Time{}},
		{"deep", time.Time{}, editTime, editTime, time.Time{}},
		{"size-0", time.Time{}, time.Time{}, editTime, time.Time{}},
		{"size-1", time.Time{}, time.Time{}, editTime, time.Time{}},
		{"hard", time.Time{}, time.Time{}, editTime, time.Time{}}, // has lost a name
		{"size-60", time.Unix(5, 5), time.Time{}, editTime, time.Time{}},
		{"few/1", time.Time{}, time.Time{}, time.Time{}, time.Time{}},
	} {
		got := stat(after, c.path)
		for what, pair := range map[string][2]time.Time{
			"atime": {got.Atime, c.atime}, "mtime": {got.Mtime, c.mtime}, "ctime": {got.Ctime, c.ctime}, "crtime": {got.Crtime, c.created},
		} {
			want := pair[1]
			if want.IsZero() {
				old := stat(before, c.path)
				want = map[string]time.Time{"atime": old.Atime, "mtime": old.Mtime, "ctime": old.Ctime, "crtime": old.Crtime}[what]
			}
			if !pair[0].Equal(want) {
				t.Errorf("%s: %s is %v, not %v", c.path, what, pair[0].UTC(), want.UTC())
			}
		}
	}
}

// What was removed while open, and cut while it was cut, is finished by an
// edit as the kernel does at the next mount.
func TestEditOrphans(t *testing.T) {
	for _, args := range [][]string{{"-t", "ext4"}, {"-t", "ext4", "-b", "1024", "-O", "inline_data,ea_inode"}, {"-t", "ext3", "-b", "1024"}} {
		image := mkfs(t, 64*mib, args...)
		dir, unmount := e2fs.Mount(t, image, "rw")
		populateWith(t, dir, 200)
		var open []*os.File
		for _, name := range []string{"size-3000001", "striped", "size-1", "size-161", "sparse"} {
			f, err := os.Open(filepath.Join(dir, name))
			must(t, err)
			must(t, os.Remove(filepath.Join(dir, name)))
			open = append(open, f)
		}
		f, err := os.Open(filepath.Join(dir, "empty"))
		must(t, err)
		must(t, os.Remove(filepath.Join(dir, "empty")))
		open = append(open, f)
		path := torn(t, image, dir)
		for _, f := range open {
			must(t, f.Close())
		}
		unmount()
		orphans := 0
		must(t, Edit(context.Background(), path, editTime, func(e *Editor) error {
			orphans = int(e.FS().super.LastOrphan)
			return e.Put("new", &Inode{Mode: 0o100644}, strings.NewReader("new"), 3)
		}))
		if orphans == 0 {
			t.Errorf("%q: no orphans", args)
		}
		e2fs.Clean(t, path)
		dir, unmount = e2fs.Mount(t, path, "rw,noatime")
		list, err := differences(openImage(t, path), hostTree(dir), seenByKernel&^DiffHoles)
		must(t, err)
		for _, d := range list {
			t.Error(d)
		}
		unmount()
	}
	// A file in the middle of being cut: the list has it, with its new size
	// and its old blocks.
	for _, args := range [][]string{{"-t", "ext4"}, {"-t", "ext3", "-b", "1024"}} {
		image := mkfs(t, 64*mib, args...)
		dir, unmount := e2fs.Mount(t, image, "rw")
		populateWith(t, dir, 10)
		unmount()
		for _, name := range []string{"size-3000001", "striped"} {
			ino := openImage(t, image)
			n, err := ino.resolve(name, false)
			must(t, err)
			for _, c := range []string{fmt.Sprintf("sif %s size 20000", name), fmt.Sprintf("sif %s dtime 0", name), fmt.Sprintf("ssv last_orphan %d", n.ino)} {
				if out, exit := e2fs.Run(t, "debugfs", "-w", "-R", c, image); exit != 0 {
					t.Fatal(out)
				}
			}
			must(t, Edit(context.Background(), image, editTime, func(e *Editor) error { return e.Chmod("size-0", 0o600) }))
			e2fs.Clean(t, image)
			b, err := openImage(t, image).ReadFile(name)
			if err != nil || len(b) != 20000 {
				t.Errorf("%q: %d bytes, %v", args, len(b), err)
			}
		}
	}
}

// Killed at any moment, by a process that edits again and again, an image has
// one of the states that an edit leaves.
func TestEditKilled(t *testing.T) {
	if image := os.Getenv("EXT4_EDIT_FOREVER"); image != "" {
		for i := 0; ; i++ {
			text := strings.Repeat(fmt.Sprintf("round %d. ", i), 5000)
			must(t, Edit(context.Background(), image, editTime, func(e *Editor) error {
				if err := e.Put("one", &Inode{Mode: 0o100644}, strings.NewReader(text), int64(len(text))); err != nil {
					return err
				}
				return e.Put("dir/two", &Inode{Mode: 0o100644}, strings.NewReader(text), int64(len(text)))
			}))
		}
	}
	self, err := os.Executable()
	must(t, err)
	rounds := int(number("EXT4_KILLS", 12))
	r := rand.New(rand.NewPCG(number("EXT4_SEED", uint64(time.Now().UnixNano())), 0))
	for _, args := range [][]string{{"-t", "ext4"}, {"-t", "ext2"}} {
		image := mkfs(t, 16*mib, args...)
		must(t, Edit(context.Background(), image, editTime, func(e *Editor) error {
			return errors.Join(e.Put("one", &Inode{Mode: 0o100644}, nil, 0), e.Put("dir", &Inode{Mode: 0o040755}, nil, 0), e.Put("dir/two", &Inode{Mode: 0o100644}, nil, 0))
		}))
		states := map[string]bool{}
		for range rounds {
			cmd := exec.Command(self, "-test.run", "^TestEditKilled$")
			cmd.Env = append(os.Environ(), "EXT4_EDIT_FOREVER="+image)
			must(t, cmd.Start())
			// From before the first write to after many edits.
			time.Sleep(time.Duration(r.ExpFloat64() * float64(60*time.Millisecond)))
			must(t, cmd.Process.Kill())
			if err := cmd.Wait(); err == nil {
				t.Fatal("the editing process ended by itself")
			}
			fsys := openImage(t, image)
			one, err := fsys.ReadFile("one")
			must(t, err)
			two, err := fsys.ReadFile("dir/two")
			must(t, err)
			if !bytes.Equal(one, two) {
				t.Fatalf("%q: two files of one edit differ", args)
			}
			states[string(one)] = true
			path := clone(t, image)
			if out, exit := e2fs.Run(t, "e2fsck", "-fy", "-E", "journal_only", path); exit > 1 {
				t.Fatalf("e2fsck: exit %d: %s", exit, out)
			}
			e2fs.Clean(t, path)
			must(t, os.Remove(path))
			left, err := filepath.Glob(filepath.Join(filepath.Dir(image), ".ext4*"))
			must(t, err)
			for _, path := range left {
				must(t, os.Remove(path))
			}
		}
		if len(states) < 3 {
			t.Errorf("%q: only %d states seen", args, len(states))
		}
	}
}

// Where a copy takes the place of the image, a failure at any step leaves the
// image, and nothing else; so does a full disk.
func TestEditCopyFails(t *testing.T) {
	small := mkfs(t, 24*mib, "-t", "ext4", "-O", "^has_journal")
	dir, _ := e2fs.Mount(t, small, "rw")
	image := filepath.Join(dir, "image")
	for _, args := range [][]string{{"-t", "ext2", "-b", "1024"}} {
		f, err := os.Create(image)
		must(t, err)
		must(t, f.Truncate(12*mib))
		must(t, f.Close())
		if out, exit := e2fs.Run(t, "mke2fs", append(append([]string{"-q", "-F"}, args...), image)...); exit != 0 {
			t.Fatal(out)
		}
		put := func(name string, size int64) error {
			return Edit(context.Background(), image, editTime, func(e *Editor) error {
				return e.Put(name, &Inode{Mode: 0o100644}, io.LimitReader(neverZero{}, size), size)
			})
		}
		must(t, put("first", 9*mib))
		if err := put("second", mib); err != nil { // 10 MiB twice, in 24
			t.Fatal(err)
		}
		fill, err := os.Create(filepath.Join(dir, "fill"))
		must(t, err)
		_, err = io.CopyN(fill, neverZero{}, 6*mib)
		must(t, err)
		must(t, fill.Close())
		if err := put("third", 1000); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("no room for a copy: %v", err)
		}
		cancelled, cancel := context.WithCancel(context.Background())
		err = Edit(cancelled, image, editTime, func(e *Editor) error { cancel(); return e.Remove("first") })
		if !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		list, err := os.ReadDir(dir)
		must(t, err)
		for _, d := range list {
			if strings.HasPrefix(d.Name(), ".") {
				t.Errorf("%s was left behind", d.Name())
			}
		}
		fsys := openImage(t, image)
		for name, want := range map[string]bool{"first": true, "second": true, "third": false} {
			if _, err := fsys.Stat(name); (err == nil) != want {
				t.Errorf("%s: %v", name, err)
			}
		}
		e2fs.Clean(t, image)
	}
}

// The image that a copy replaces keeps its mode and owner, and the symlink it
// was named by.
func TestEditCopyKeeps(t *testing.T) {
	image := mkfs(t, 4*mib, "-t", "ext2")
	must(t, os.Chmod(image, 0o640))
	if os.Geteuid() == 0 {
		must(t, os.Chown(image, 1234, 4321))
	}
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(image, link))
	must(t, Edit(context.Background(), link, editTime, func(e *Editor) error { return e.MkdirAll("a/b", &Inode{Mode: 0o040755}) }))
	if target, err := os.Readlink(link); err != nil || target != image {
		t.Errorf("the symlink: %q, %v", target, err)
	}
	var st syscall.Stat_t
	must(t, syscall.Stat(image, &st))
	if st.Mode != syscall.S_IFREG|0o640 || os.Geteuid() == 0 && (st.Uid != 1234 || st.Gid != 4321) {
		t.Errorf("mode %o of %d:%d", st.Mode, st.Uid, st.Gid)
	}
	if _, err := openImage(t, image).Stat("a/b"); err != nil {
		t.Error(err)
	}
	e2fs.Clean(t, image)
}

// A change that does not fit the journal is made by a copy, a journal that
// waits to be replayed included.
func TestEditLarge(t *testing.T) {
	image := mkfs(t, 64*mib, "-t", "ext4", "-b", "1024", "-J", "size=1", "-N", "20000")
	dir, unmount := e2fs.Mount(t, image, "rw")
	for i := range 5000 {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d-%s", i, strings.Repeat("n", 30))), nil, 0o600))
	}
	path := torn(t, image, dir)
	unmount()
	for _, path := range []string{image, path} {
		before, err := os.Stat(path)
		must(t, err)
		must(t, Edit(context.Background(), path, editTime, func(e *Editor) error {
			for i := range 5000 {
				if err := e.Chown(fmt.Sprintf("%d-%s", i, strings.Repeat("n", 30)), 1, 1); err != nil {
					return err
				}
			}
			return nil
		}))
		after, err := os.Stat(path)
		must(t, err)
		if os.SameFile(before, after) {
			t.Error("it fitted the journal")
		}
		e2fs.Clean(t, path)
		info, err := openImage(t, path).Stat("4999-" + strings.Repeat("n", 30))
		must(t, err)
		if info.Sys().(*Stat).UID != 1 {
			t.Error("not changed")
		}
	}
}

// Fill an image by edits to the last block and the last inode: errors, and
// nothing damaged.
func TestEditFull(t *testing.T) {
	for _, args := range [][]string{{"-t", "ext4", "-N", "64"}, {"-t", "ext4", "-b", "1024", "-N", "2000"}, {"-t", "ext2", "-b", "1024", "-N", "2000"}} {
		image := mkfs(t, 4*mib, args...)
		var full error
		for i := 0; full == nil && i < 3000; i++ {
			full = Edit(context.Background(), image, editTime, func(e *Editor) error {
				for j := range 20 {
					size := int64(i * 4000)
					if err := e.Put(fmt.Sprintf("%d-%d", i, j), &Inode{Mode: 0o100644}, io.LimitReader(neverZero{}, size), size); err != nil {
						return err
					}
				}
				return nil
			})
			e2fs.Clean(t, image)
		}
		if !errors.Is(full, ErrNoSpace) && !errors.Is(full, ErrNoInodes) || errors.Is(full, ErrNoSpace) && !strings.Contains(full.Error(), "bytes are free") {
			t.Errorf("%q: %v", args, full)
		}
		t.Log(full)
		must(t, Edit(context.Background(), image, editTime, func(e *Editor) error {
			list, err := e.FS().ReadDir(".")
			if err != nil {
				return err
			}
			for _, d := range list {
				if err := e.RemoveAll(d.Name()); err != nil {
					return err
				}
			}
			return nil
		}))
		e2fs.Clean(t, image)
		if list, err := openImage(t, image).ReadDir("."); err != nil || len(list) != 0 {
			t.Errorf("after removing all: %v %v", list, err)
		}
	}
}

// Random changes, made by an Editor and by the kernel, give the same.
func TestEditRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("EXT4_SEED"); s != "" {
		_, err := fmt.Sscan(s, &seed)
		must(t, err)
	}
	rounds := 15
	if s := os.Getenv("EXT4_EDITS"); s != "" {
		_, err := fmt.Sscan(s, &rounds)
		must(t, err)
	}
	t.Logf("EXT4_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range rounds {
		c := flavours[r.IntN(len(flavours))]
		if c.name == "bigalloc" || c.name == "mmp" {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			image := mkfs(t, 64*mib, c.args...)
			for _, command := range c.tune {
				e2fs.Run(t, "debugfs", "-w", "-R", command, image)
			}
			other := clone(t, image)
			model := map[string]bool{".": true} // path -> is a directory
			for range 4 {
				list := randomSteps(r, model)
				change(t, image, list)
				e2fs.Clean(t, image)
				changeOnHost(t, other, list)
				diffs, err := differences(openImage(t, image), openImage(t, other), sameButTimes)
				must(t, err)
				for _, d := range diffs {
					t.Error(d)
				}
			}
		})
	}
}

// randomSteps are changes that succeed, and keeps the model of what there is.
func randomSteps(r *rand.Rand, model map[string]bool) (list []step) {
	pick := func(dir bool) string {
		var all []string
		for path, isDir := range model {
			if isDir == dir {
				all = append(all, path)
			}
		}
		if len(all) == 0 {
			return ""
		}
		slices.Sort(all)
		return all[r.IntN(len(all))]
	}
	for range 5 + r.IntN(60) {
		parent := pick(true)
		name := strings.Repeat(string(rune('a'+r.IntN(26))), 1+r.IntN(60)) + fmt.Sprint(r.IntN(1000))
		path := name
		if parent != "." {
			path = parent + "/" + name
		}
		in := Inode{Mode: uint16(r.IntN(0o10000)), UID: r.Uint32N(1 << 31), GID: r.Uint32N(1 << 31)}
		if r.IntN(4) == 0 {
			in.Xattrs = map[string][]byte{"user.x": bytes.Repeat([]byte{byte(r.IntN(256))}, r.IntN(300))}
		}
		switch r.IntN(9) {
		case 0, 1, 2:
			in.Mode |= disk.TypeRegular
			if old := pick(false); old != "" && r.IntN(3) == 0 {
				path = old
			}
			if _, there := model[path]; there && model[path] {
				continue
			}
			size := int(r.ExpFloat64() * 20_000)
			list = append(list, step{"put", path, in, strings.Repeat("data of a file. ", size/16+1)[:size]})
			model[path] = false
		case 3, 4:
			in.Mode |= disk.TypeDir
			if _, there := model[path]; there {
				continue
			}
			list = append(list, step{"put", path, in, ""})
			model[path] = true
		case 5:
			if _, there := model[path]; there && model[path] {
				continue
			}
			list = append(list, step{"put", path, Inode{Mode: disk.TypeSymlink | 0o777, Target: strings.Repeat("t", 1+r.IntN(200))}, ""})
			model[path] = false
		case 6:
			if old := pick(false); old != "" {
				list = append(list, step{"remove", old, Inode{}, ""})
				delete(model, old)
			}
		case 7:
			if old := pick(true); old != "." && r.IntN(4) == 0 {
				list = append(list, step{"removeall", old, Inode{}, ""})
				for path := range model {
					if path == old || strings.HasPrefix(path, old+"/") {
						delete(model, path)
					}
				}
			}
		case 8:
			if old := pick(true); old != "." {
				list = append(list, step{"chmod", old, Inode{Mode: in.Mode}, ""}, step{"chown", old, in, ""})
			}
		}
	}
	return list
}
