package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/store"
)

func TestSeedSize(t *testing.T) {
	const mib = 1 << 20
	for _, row := range []struct {
		name                string
		content, least, mib int64
	}{
		{"nothing", 0, 0, 512},
		{"all that fits the least size", 128 * mib, 0, 512},
		{"one byte more", 128*mib + 1, 0, 576},
		{"a step to its end", 160 * mib, 0, 576},
		{"a step and a byte", 160*mib + 1, 0, 640},
		{"many small files", 0, 513 * mib, 576},
	} {
		if got := seedSizeBytes(row.content, row.least); got != row.mib*mib {
			t.Errorf("%s: %d MiB, want %d", row.name, got/mib, row.mib)
		}
	}
}

// The seed is the image's /root and nothing else, and its top is root's.
func TestAddSeed(t *testing.T) {
	when := time.Date(2020, 1, 2, 3, 4, 5, 600, time.UTC)
	home := []entry{
		dir("root/", 0o750).owned(12, 13).at(when).with("user.top", "1"),
		file("root/.profile", 0o640, "profile").owned(1000, 1001).at(when),
		hardlink("root/.again", "root/.profile"),
		hardlink("outside", "root/.profile"),
		symlink("root/.link", "/etc/x"),
		dir("root/.ssh/", 0o700),
		file("root/.ssh/config", 0o600, strings.Repeat("config\n", 5000)).with("user.a", "b"),
	}
	for _, row := range []struct {
		name    string
		entries []entry
		want    string // "" is an empty seed
		top     uint16
	}{
		{"a home", home, "root", 0o750},
		{"a home of root's", []entry{dir("root/", 0o700), file("root/x", 0o600, "x")}, "root", 0o700},
		{"none", []entry{file("etc/x", 0o644, "x")}, "", 0o700},
		{"a file", []entry{file("root", 0o644, "x")}, "", 0o700},
		{"a symlink", []entry{symlink("root", "var/home"), file("var/home/x", 0o600, "x")}, "var/home", 0o755},
		{"symlinks one behind the other", []entry{symlink("root", "/a"), symlink("a", "../b/./"), file("b/x", 0o600, "x")}, "b", 0o755},
		{"a dangling symlink", []entry{symlink("root", "/nowhere")}, "", 0o700},
		{"a symlink to itself", []entry{symlink("root", "root")}, "", 0o700},
		{"a symlink to the root", []entry{symlink("root", "/"), file("x", 0o600, "x")}, "", 0o700},
		{"a symlink out of the image", []entry{symlink("root", "../../../../../../etc"), file("etc/x", 0o600, "x")}, "etc", 0o755},
	} {
		t.Run(row.name, func(t *testing.T) {
			b, rootfs := buildTar(t, BuildOptions{SizeBytes: smallBytes}, row.entries...)
			base := openFS(t, rootfs)
			if err := addSeed(t.Context(), filepath.Dir(rootfs), base, b.Identity); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(filepath.Dir(rootfs), store.ImageWorkSeed)
			clean(t, path)
			st, err := os.Stat(path)
			if err != nil || st.Size() != minSeedBytes || st.Mode() != 0o400 {
				t.Fatalf("the seed: %v, %v", st, err)
			}
			checkTop(t, path, row.top)
			seed := openFS(t, path)
			if row.want == "" {
				if list, err := seed.ReadDir("."); err != nil || len(list) != 1 { // lost+found
					t.Errorf("an empty seed has %v, %v", list, err)
				}
				return
			}
			compareBelow(t, base, row.want, seed)
		})
	}
}

// below is a directory of a file system as a tree of its own.
type below struct {
	*ext4.FS
	at string
}

func (b below) path(p string) string {
	if p == "." {
		return b.at
	}
	return b.at + "/" + p
}
func (b below) Open(p string) (fs.File, error)             { return b.FS.Open(b.path(p)) }
func (b below) Lstat(p string) (fs.FileInfo, error)        { return b.FS.Lstat(b.path(p)) }
func (b below) ReadLink(p string) (string, error)          { return b.FS.ReadLink(b.path(p)) }
func (b below) ReadDir(p string) ([]fs.DirEntry, error)    { return b.FS.ReadDir(b.path(p)) }
func (b below) Xattrs(p string) (map[string][]byte, error) { return b.FS.Xattrs(b.path(p)) }

// compareBelow wants the seed to be all that is below at, but for whose the top
// is, and for links from elsewhere.
func compareBelow(t *testing.T, base *ext4.FS, at string, seed *ext4.FS) {
	t.Helper()
	if err := ext4.Compare(below{base, at}, seed, ext4.DiffAll|ext4.DiffHoles, func(d ext4.Difference) bool {
		switch {
		case d.Path == "lost+found", d.Path == "." && d.Aspect == ext4.DiffOwner,
			strings.HasPrefix(d.Path, ".again") && d.Aspect == ext4.DiffLinks, d.Path == ".profile" && d.Aspect == ext4.DiffLinks:
		default:
			t.Error(d)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
}

func TestReplaceSeed(t *testing.T) {
	im, s := newImages(t)
	l := newLayout(t)
	l.add("a", tarOf(t, file("root/old", 0o600, "old")))
	image, _ := pull(t, im, l, "a", "a")
	old := openFS(t, image.WorkSeed) // as a VM that is being made has it
	base := shaOf(t, image.Rootfs)

	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, "new"), []byte("new"), 0o640); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		for path, owner := range map[string]int{home: 1000, filepath.Join(home, "new"): 1000} {
			if err := os.Chown(path, owner, owner); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(home, "other"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(filepath.Join(home, "other"), 77, 78); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(home, 0o750); err != nil {
		t.Fatal(err)
	}
	src, ref := reference(t, "rootfs:"+home, home)
	again, err := im.ReplaceSeed(t.Context(), "a", src, ref)
	if err != nil {
		t.Fatal(err)
	}
	clean(t, again.WorkSeed)
	checkTop(t, again.WorkSeed, 0o750)
	seed := openFS(t, again.WorkSeed)
	if data, err := seed.ReadFile("new"); err != nil || string(data) != "new" {
		t.Errorf("new: %q, %v", data, err)
	}
	for name, uid := range map[string]uint32{"new": 0, "other": 77} {
		info, err := seed.Lstat(name)
		if os.Geteuid() != 0 && name == "other" {
			continue
		}
		if err != nil || info.Sys().(*ext4.Stat).UID != uid {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
	if _, err := seed.Lstat("old"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("old: %v", err)
	}
	if data, err := old.ReadFile("old"); err != nil || string(data) != "old" {
		t.Errorf("who has the seed of before reads %q, %v", data, err)
	}
	if again.ID != image.ID || shaOf(t, image.Rootfs) != base {
		t.Error("the base is another")
	}

	// What fails leaves the seed as it is.
	_, err = im.ReplaceSeed(t.Context(), "none", src, ref)
	wantCode(t, err, banger.CodeNotFound)
	src, ref = l.reference("a")
	_, err = im.ReplaceSeed(t.Context(), "a", src, ref)
	wantCode(t, err, banger.CodeUsage, "no directory")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	src, ref = reference(t, "rootfs:"+home, home)
	if _, err = im.ReplaceSeed(ctx, "a", src, ref); err == nil {
		t.Error("canceled, and it worked")
	}
	if data, err := openFS(t, again.WorkSeed).ReadFile("new"); err != nil || string(data) != "new" {
		t.Errorf("after failures: %q, %v", data, err)
	}
	if left := inside(t, s, "tmp"); left != nil {
		t.Errorf("tmp/ has %q", left)
	}
	// An image of before there were seeds has none, and gets one.
	planted := plant(t, s, "aabb00000001", "one")
	if planted.WorkSeed != "" {
		t.Errorf("a seed from nowhere: %s", planted.WorkSeed)
	}
	src, ref = reference(t, "rootfs:"+home, home)
	if got, err := im.ReplaceSeed(t.Context(), "one", src, ref); err != nil || got.WorkSeed == "" {
		t.Errorf("%+v, %v", got, err)
	}
}
