package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/oci"
	"banger/internal/store"
)

// blobs gives oci the blob store, and on the call of that number does what
// failing says; calls are all of Open, Create, Write and Commit.
type blobs struct {
	*store.Blobs
	at      int64 // 0: never
	failing func() error
	calls   atomic.Int64
}

func (b *blobs) call() error {
	if b.calls.Add(1) == b.at {
		return b.failing()
	}
	return nil
}

func (b *blobs) Open(digest string) (io.ReadCloser, int64, error) {
	if err := b.call(); err != nil {
		return nil, 0, err
	}
	return b.Blobs.Open(digest)
}

func (b *blobs) Create(digest string) (oci.BlobWriter, error) {
	if err := b.call(); err != nil {
		return nil, err
	}
	w, err := b.Blobs.Create(digest)
	return blobWriter{w, b}, err
}

func (b *blobs) Resume(digest string, sizeBytes int64) (oci.BlobWriter, error) {
	if err := b.call(); err != nil {
		return nil, err
	}
	w, err := b.Blobs.Resume(digest, sizeBytes)
	return blobWriter{w, b}, err
}

type blobWriter struct {
	*store.BlobWriter
	b *blobs
}

func (w blobWriter) Write(p []byte) (int, error) {
	if err := w.b.call(); err != nil {
		return 0, err
	}
	return w.BlobWriter.Write(p)
}

func (w blobWriter) Commit() error {
	if err := w.b.call(); err != nil {
		w.BlobWriter.Abort()
		return err
	}
	return w.BlobWriter.Commit()
}

func openStore(t testing.TB, root string) (*Images, *store.Store) {
	t.Helper()
	s, err := store.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	return Open(s), s
}

func newImages(t testing.TB) (*Images, *store.Store) {
	t.Helper()
	return openStore(t, filepath.Join(t.TempDir(), "state"))
}

func pull(t testing.TB, im *Images, l *layout, tag, name string) (image *Image, built bool) {
	t.Helper()
	src, ref := l.reference(tag)
	src.Blobs = &blobs{Blobs: im.s.Blobs()}
	image, err := im.Pull(t.Context(), src, ref, PullOptions{Name: name, OnStep: func(step string, _, _ time.Time) { built = built || step == "build" }})
	if err != nil {
		t.Fatal(err)
	}
	return image, built
}

// inside lists what is in a folder of the store.
func inside(t testing.TB, s *store.Store, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.Root(), dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func digests(t testing.TB, s *store.Store) []string {
	t.Helper()
	d, err := s.Blobs().Digests()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestPullAndRemove(t *testing.T) {
	im, s := newImages(t)
	l := newLayout(t)
	shared := tarOf(t, file("bin/sh", 0o755, "shell"))
	manifestA, blobsA := l.add("a", shared, tarOf(t, file("a", 0o644, "a")))
	manifestB, blobsB := l.add("b", shared, tarOf(t, file("b", 0o644, "b")))

	a, built := pull(t, im, l, "a", "")
	if !built {
		t.Error("the first pull reports no build")
	}
	_, ref := l.reference("a")
	if a.Name != ref.String() || a.Reference != ref.String() || a.Digest == nil || *a.Digest != manifestA ||
		a.Platform != "linux/amd64" || !slices.Equal(a.Config.Cmd, []string{"/bin/a"}) || a.SizeBytes != minBaseBytes || len(a.ID) != 12 {
		t.Errorf("pulled %+v", a)
	}
	st, err := os.Stat(a.Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode() != 0o400 {
		t.Errorf("the base has mode %v", st.Mode())
	}
	if got := verityOf(t, a.Rootfs); got != a.BaseDigest {
		t.Errorf("base_digest %s, the file's is %s", a.BaseDigest, got)
	}
	clean(t, a.Rootfs)
	if left := inside(t, s, "tmp"); left != nil {
		t.Errorf("a good pull leaves %q", left)
	}

	// Again, and under another name: the base is the one that is there.
	for _, name := range []string{"", "mine"} {
		again, built := pull(t, im, l, "a", name)
		now, err := os.Stat(again.Rootfs)
		if err != nil || built || again.ID != a.ID || !os.SameFile(st, now) || now.ModTime() != st.ModTime() {
			t.Errorf("pull as %q: built %v, %s at %v, was %s at %v, %v", name, built, again.ID, now.ModTime(), a.ID, st.ModTime(), err)
		}
	}
	for _, name := range []string{a.Name, "mine", a.ID, a.ID[:4]} {
		if found, err := im.Find(name); err != nil || found.ID != a.ID {
			t.Errorf("find %q: %v, %v", name, found, err)
		}
	}
	for _, name := range []string{"", "min", a.ID[:3], a.ID + "0", strings.ToUpper(a.ID) + "x", "../images"} {
		_, err := im.Find(name)
		wantCode(t, err, banger.CodeNotFound, "not in the store")
	}

	// The name moves; the image it was of stays, since it has another.
	b, built := pull(t, im, l, "b", "mine")
	if found, err := im.Find("mine"); !built || err != nil || found.ID != b.ID || b.ID == a.ID {
		t.Errorf("the moved name is %v, %v", found, err)
	}
	list, err := im.List()
	if err != nil || len(list) != 2 || list[0].Name != "mine" || list[1].Name != a.Name {
		t.Errorf("list %v, %v", list, err)
	}

	// Held: it keeps name and base.
	release, err := im.Hold(b)
	if err != nil {
		t.Fatal(err)
	}
	release2, err := im.Hold(b)
	if err != nil {
		t.Fatalf("a second VM: %v", err)
	}
	wantCode(t, im.Remove(t.Context(), "mine"), banger.CodeConflict, "VM is using it", "stop that VM")
	release()
	wantCode(t, im.Remove(t.Context(), "mine"), banger.CodeConflict)
	if found, err := im.Find("mine"); err != nil || found.ID != b.ID {
		t.Errorf("after a refused removal: %v, %v", found, err)
	}
	release2()

	// A name that is not the last takes nothing with it, held or not.
	pull(t, im, l, "b", "other")
	release, err = im.Hold(b)
	if err != nil {
		t.Fatal(err)
	}
	before := digests(t, s)
	if err := im.Remove(t.Context(), "other"); err != nil {
		t.Error(err)
	}
	if now := digests(t, s); !slices.Equal(before, now) {
		t.Errorf("blobs %q became %q", before, now)
	}
	release()

	// The last one takes the base and what nobody else needs.
	if err := im.Remove(t.Context(), "mine"); err != nil {
		t.Fatal(err)
	}
	now := digests(t, s)
	for _, d := range append(blobsA, manifestA) {
		if !slices.Contains(now, d) {
			t.Errorf("blob %s of the other image is gone", d)
		}
	}
	for _, d := range []string{blobsB[1], manifestB} {
		if slices.Contains(now, d) {
			t.Errorf("blob %s that nobody needs is there", d)
		}
	}
	if got := inside(t, s, "images"); !slices.Equal(got, []string{a.ID, "names.json"}) {
		t.Errorf("images/ has %q", got)
	}
	if left := inside(t, s, "trash"); left != nil {
		t.Errorf("trash/ has %q", left)
	}
	_, err = im.Hold(b)
	wantCode(t, err, banger.CodeNotFound, "removed")
	wantCode(t, im.Remove(t.Context(), "mine"), banger.CodeNotFound)
	if err := im.Remove(t.Context(), a.ID[:6]); err != nil {
		t.Error(err)
	}
	if got := digests(t, s); got != nil {
		t.Errorf("without images there are the blobs %q", got)
	}
	if list, err := im.List(); err != nil || len(list) != 0 {
		t.Errorf("list %v, %v", list, err)
	}
}

func TestPullWithoutName(t *testing.T) {
	im, s := newImages(t)
	path := filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(path, tarOf(t, file("a", 0o644, "a")), 0o600); err != nil {
		t.Fatal(err)
	}
	src, ref := reference(t, "rootfs:"+path, path)
	_, err := im.Pull(t.Context(), src, ref, PullOptions{})
	wantCode(t, err, banger.CodeUsage, "--name")
	if got := inside(t, s, "images"); got != nil {
		t.Errorf("images/ has %q", got)
	}
}

// Of two pulls at once, each through a store of its own as two processes have
// them, one does the work.
func TestPullAtOnce(t *testing.T) {
	root := filepath.Join(t.TempDir(), "state")
	l := newLayout(t)
	l.add("a", tarOf(t, file("a", 0o644, strings.Repeat("a", 1<<20))))
	var builds atomic.Int32
	var pulls sync.WaitGroup
	for i := range 3 {
		im, s := openStore(t, root)
		src, ref := l.reference("a")
		src.Blobs = &blobs{Blobs: s.Blobs()}
		pulls.Go(func() {
			_, err := im.Pull(t.Context(), src, ref, PullOptions{Name: fmt.Sprintf("name-%d", i), OnStep: func(step string, _, _ time.Time) {
				if step == "build" {
					builds.Add(1)
				}
			}})
			if err != nil {
				t.Error(err)
			}
		})
	}
	pulls.Wait()
	im, s := openStore(t, root)
	list, err := im.List()
	if err != nil || len(list) != 3 || list[0].ID != list[2].ID || builds.Load() != 1 {
		t.Errorf("%d builds, list %v, %v", builds.Load(), list, err)
	}
	if left := inside(t, s, "tmp"); left != nil {
		t.Errorf("tmp/ has %q", left)
	}
}

// nothing requires that a failed pull left no trace but whole blobs.
func nothing(t *testing.T, s *store.Store) {
	t.Helper()
	for _, dir := range []string{"tmp", "trash", "blobs/partial"} {
		if left := inside(t, s, dir); left != nil {
			t.Errorf("%s/ has %q", dir, left)
		}
	}
	for _, name := range inside(t, s, "images") {
		if name != "names.json" {
			t.Errorf("images/ has %q", name)
		}
	}
	for _, d := range digests(t, s) {
		if got := shaOf(t, filepath.Join(s.Root(), "blobs/sha256", strings.TrimPrefix(d, "sha256:"))); got != d {
			t.Errorf("blob %s has the digest %s", d, got)
		}
	}
	if list, err := Open(s).List(); err != nil || len(list) != 0 {
		t.Errorf("list %v, %v", list, err)
	}
}

// A pull that fails, or is canceled, at any step of the cache leaves nothing.
func TestPullFailsAtEveryStep(t *testing.T) {
	l := newLayout(t)
	l.add("a", tarOf(t, file("a", 0o644, "a")), tarOf(t, file("b", 0o644, "b")))
	for _, how := range []string{"full", "canceled"} {
		t.Run(how, func(t *testing.T) {
			for at := int64(1); ; at++ {
				im, s := newImages(t)
				ctx, cancel := context.WithCancel(t.Context())
				src, ref := l.reference("a")
				b := &blobs{Blobs: s.Blobs(), at: at, failing: func() error { return fmt.Errorf("write: %w", unix.ENOSPC) }}
				if how == "canceled" {
					b.failing = func() error { cancel(); return nil }
				}
				src.Blobs = b
				// What comes after the fetch is canceled below; here it would
				// only cost time.
				fetched := false
				_, err := im.Pull(ctx, src, ref, PullOptions{Name: "a", OnStep: func(step string, _, _ time.Time) {
					if step == "fetch" {
						fetched = true
						cancel()
					}
				}})
				cancel()
				nothing(t, s)
				if b.calls.Load() < at {
					if !fetched || at < 10 {
						t.Errorf("a pull of two layers made %d calls, fetched: %v, %v", at-1, fetched, err)
					}
					return
				}
				switch {
				case fetched: // what could not be opened in the cache was fetched
				case how == "full" && banger.CodeOf(err) != banger.CodeNoSpace && !errors.Is(err, unix.ENOSPC),
					how == "canceled" && banger.CodeOf(err) != banger.CodeCanceled && !errors.Is(err, context.Canceled):
					t.Errorf("call %d: %q %v", at, banger.CodeOf(err), err)
				}
			}
		})
	}
	// After the last byte was fetched there is work left to cancel.
	for _, at := range []string{"resolve", "fetch"} {
		im, s := newImages(t)
		ctx, cancel := context.WithCancel(t.Context())
		src, ref := l.reference("a")
		src.Blobs = &blobs{Blobs: s.Blobs()}
		_, err := im.Pull(ctx, src, ref, PullOptions{Name: "a", OnStep: func(step string, _, _ time.Time) {
			if step == at {
				cancel()
			}
		}})
		if banger.CodeOf(err) != banger.CodeCanceled && !errors.Is(err, context.Canceled) {
			t.Errorf("canceled at %s: %v", at, err)
		}
		nothing(t, s)
	}
	// While another pull has the lock.
	im, s := newImages(t)
	unlock, err := s.Lock(t.Context(), "build")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	src, ref := l.reference("a")
	if _, err := im.Pull(ctx, src, ref, PullOptions{Name: "a"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("canceled while it waits: %v", err)
	}
	nothing(t, s)
}

// Damage of every kind is the image's fault and leaves nothing.
func TestPullDamaged(t *testing.T) {
	layer := tarOf(t, file("a", 0o644, strings.Repeat("text", 10000)))
	for name, damage := range map[string]func(data []byte) []byte{
		"a bit of a layer": func(d []byte) []byte { d[len(d)/2] ^= 1; return d },
		"the end is cut":   func(d []byte) []byte { return d[:len(d)-1] },
		"a byte too many":  func(d []byte) []byte { return append(d, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLayout(t)
			_, layers := l.add("a", layer)
			path := filepath.Join(l.dir, "blobs/sha256", strings.TrimPrefix(layers[0], "sha256:"))
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			l.write("blobs/sha256/"+filepath.Base(path), damage(data))
			im, s := newImages(t)
			src, ref := l.reference("a")
			src.Blobs = &blobs{Blobs: s.Blobs()}
			_, err = im.Pull(t.Context(), src, ref, PullOptions{Name: "a"})
			wantCode(t, err, banger.CodeInvalid, layers[0])
			nothing(t, s)
		})
	}
}

// A disk that is full at any moment of a pull leaves nothing on it.
func TestPullDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, "mounting a small tmpfs needs root")
	}
	l := newLayout(t)
	l.add("a", tarOf(t, file("a", 0o644, strings.Repeat("no zero ", 200<<10))))
	full := 0
	for sizeKiB := 128; ; sizeKiB += 352 {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dk,mode=0700", sizeKiB)); err != nil {
			missing(t, fmt.Sprintf("mount tmpfs: %v", err))
		}
		done := func() bool {
			defer func() {
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Errorf("umount: %v", err)
				}
			}()
			im, s := openStore(t, dir)
			src, ref := l.reference("a")
			src.Blobs = &blobs{Blobs: s.Blobs()}
			_, err := im.Pull(t.Context(), src, ref, PullOptions{Name: "a", Agent: agentFile(t)})
			if err == nil {
				return true
			}
			if full++; !errors.Is(err, unix.ENOSPC) {
				t.Errorf("%d KiB: %v is not known as a full disk", sizeKiB, err)
			}
			nothing(t, s)
			return false
		}()
		if done {
			break
		}
		if sizeKiB > 16<<10 {
			t.Fatal("16 MiB are not enough for an image of 1.6 MiB")
		}
	}
	if full < 4 {
		t.Errorf("only %d disks were too small", full)
	}
}

// plant puts an image into the store that has the record of one and a few
// bytes for a base.
func plant(t testing.TB, s *store.Store, id string, names ...string) *Image {
	t.Helper()
	tmp, err := s.TempDir("image")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tmp.Path, store.ImageRootfs), []byte("base of "+id), 0o400); err != nil {
		t.Fatal(err)
	}
	r := record{ID: id, Reference: "ref", BaseDigest: "sha256:00", UUID: strings.Repeat("ab", 16), Platform: "linux/amd64"}
	if err := store.WriteJSON(filepath.Join(tmp.Path, store.ImageRecord), imageSchema, r); err != nil {
		t.Fatal(err)
	}
	im := Open(s)
	if err := im.ensureNames(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := tmp.Commit(s.Image(id)); err != nil {
		t.Fatal(err)
	}
	var image *Image
	for _, name := range names {
		if image, err = im.name(t.Context(), name, id); err != nil {
			t.Fatal(err)
		}
	}
	return image
}

func TestFind(t *testing.T) {
	im, s := newImages(t)
	plant(t, s, "aabb00000001", "one", "uno")
	plant(t, s, "aabb00000002", "two", "aabb")
	plant(t, s, "aabc00000003", "three")
	for name, id := range map[string]string{
		"one": "aabb00000001", "uno": "aabb00000001",
		"aabb": "aabb00000002", // a name comes before an id
		"aabc": "aabc00000003", "aabb00000001": "aabb00000001",
	} {
		if found, err := im.Find(name); err != nil || found.ID != id {
			t.Errorf("find %q: %+v, %v; want %s", name, found, err, id)
		}
	}
	_, err := im.Find("aabb0")
	wantCode(t, err, banger.CodeUsage, "more than one")
	_, err = im.Find("aab")
	wantCode(t, err, banger.CodeNotFound)
	_, err = im.Find("aabd")
	wantCode(t, err, banger.CodeNotFound, "image pull")
	found, err := im.Find("aabb00000001")
	if err != nil || found.Digest != nil || found.UUID != [16]byte([]byte(strings.Repeat("\xab", 16))) {
		t.Errorf("%+v, %v", found, err)
	}
}

// TestRemoveByID: an id says which image, and not which of its names.
func TestRemoveByID(t *testing.T) {
	im, s := newImages(t)
	image := plant(t, s, "aaaa11112222", "one", "two")
	if err := im.Remove(t.Context(), image.ID); banger.CodeOf(err) != banger.CodeConflict || !strings.Contains(err.Error(), "2 names") {
		t.Fatalf("an id with two names: %v", err)
	}
	if err := im.Remove(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	if err := im.Remove(t.Context(), image.ID[:4]); err != nil {
		t.Fatalf("an id with one name: %v", err)
	}
	if _, err := im.Find("one"); banger.CodeOf(err) != banger.CodeNotFound {
		t.Errorf("after the last name: %v", err)
	}
}

// A record that is lost or damaged is an error with a name, never taken for an
// empty one.
func TestRecords(t *testing.T) {
	rows := []struct {
		name   string
		damage func(t *testing.T, s *store.Store) error
		word   string
		finds  bool // another image is still found
	}{
		{"no names", func(t *testing.T, s *store.Store) error { return os.Remove(s.ImageNames()) }, "is missing", false},
		{"garbage for names", func(t *testing.T, s *store.Store) error {
			return os.WriteFile(s.ImageNames(), []byte("garbage"), 0o600)
		}, "names.json", false},
		{"empty names file", func(t *testing.T, s *store.Store) error { return os.Truncate(s.ImageNames(), 0) }, "names.json", false},
		{"names are null", func(t *testing.T, s *store.Store) error {
			return os.WriteFile(s.ImageNames(), []byte(`{"schema":1,"names":null}`), 0o600)
		}, "no names", false},
		{"names of tomorrow", func(t *testing.T, s *store.Store) error {
			return os.WriteFile(s.ImageNames(), []byte(`{"schema":2,"names":{}}`), 0o600)
		}, "schema", false},
		{"no record", func(t *testing.T, s *store.Store) error {
			return os.Remove(filepath.Join(s.Image("aabb00000001"), store.ImageRecord))
		}, "one", true},
		{"no base", func(t *testing.T, s *store.Store) error {
			return os.Remove(filepath.Join(s.Image("aabb00000001"), store.ImageRootfs))
		}, "base image", true},
		{"no folder", func(t *testing.T, s *store.Store) error { return os.RemoveAll(s.Image("aabb00000001")) }, "one", true},
		{"short UUID", func(t *testing.T, s *store.Store) error {
			return store.WriteJSON(filepath.Join(s.Image("aabb00000001"), store.ImageRecord), imageSchema, record{ID: "aabb00000001", UUID: "abcd"})
		}, "UUID", true},
		{"long UUID", func(t *testing.T, s *store.Store) error {
			return store.WriteJSON(filepath.Join(s.Image("aabb00000001"), store.ImageRecord), imageSchema, record{ID: "aabb00000001", UUID: strings.Repeat("ab", 17)})
		}, "UUID", true},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			im, s := newImages(t)
			plant(t, s, "aabb00000001", "one")
			plant(t, s, "aabb00000002", "two")
			if err := r.damage(t, s); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(s.ImageNames())
			_, findErr := im.Find("one")
			_, listErr := im.List()
			removeErr := im.Remove(t.Context(), "one")
			for _, err := range []error{findErr, listErr, removeErr} {
				if err == nil || !strings.Contains(err.Error(), r.word) {
					t.Errorf("%v: does not say %q", err, r.word)
				}
			}
			if _, err := im.Find("two"); (err == nil) != r.finds {
				t.Errorf("the other image: %v", err)
			}
			if after, _ := os.ReadFile(s.ImageNames()); string(before) != string(after) {
				t.Errorf("names were %q and are %q", before, after)
			}
			if _, err := os.Stat(s.Image("aabb00000002")); err != nil {
				t.Errorf("the other base: %v", err)
			}
		})
	}
	// A pull takes up a base that has lost its name, but not half of one.
	im, s := newImages(t)
	l := newLayout(t)
	manifest, _ := l.add("a", tarOf(t, file("a", 0o644, "a")))
	id := idOf(identity(&oci.Image{Digest: manifest, Platform: "linux/amd64"}, "", false))
	plant(t, s, id)
	if image, built := pull(t, im, l, "a", "found"); built || image.ID != id {
		t.Errorf("a base without a name was not taken up: %+v", image)
	}
	if err := os.Remove(filepath.Join(s.Image(id), store.ImageRecord)); err != nil {
		t.Fatal(err)
	}
	src, ref := l.reference("a")
	if _, err := im.Pull(t.Context(), src, ref, PullOptions{Name: "second"}); err == nil {
		t.Error("a base without a record got a name")
	}
	if n, err := im.readNames(); err != nil || n.Names["second"] != "" {
		t.Errorf("names %v, %v", n, err)
	}
	// And whatever is damaged, no blob goes on account of it.
	keep, err := s.Blobs().Create("sha256:" + strings.Repeat("0", 64))
	if err != nil {
		t.Fatal(err)
	}
	if err := keep.Commit(); err != nil {
		t.Fatal(err)
	}
	plant(t, s, "aabb00000009", "nine")
	if err := im.Remove(t.Context(), "nine"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removal beside a base without a record: %v", err)
	}
	if !slices.Contains(digests(t, s), "sha256:"+strings.Repeat("0", 64)) {
		t.Error("a blob that the damaged image may need is gone")
	}
}

func TestHoldAfterRemoveBegan(t *testing.T) {
	im, s := newImages(t)
	image := plant(t, s, "aabb00000001", "one")
	f, err := os.Open(s.Image(image.ID))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	_, err = im.Hold(image)
	wantCode(t, err, banger.CodeConflict, "being removed")

	// Removed, and made again, between the opening of the folder and its lock.
	two := plant(t, s, "aabb00000002", "two")
	opened, err := os.Open(s.Image(two.ID))
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	if err := lockFolder(opened, s.Image(two.ID), "two"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(opened.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := im.Remove(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, lockFolder(opened, s.Image(two.ID), "two"), banger.CodeNotFound, "removed")
	plant(t, s, two.ID, "two")
	wantCode(t, lockFolder(opened, s.Image(two.ID), "two"), banger.CodeNotFound, "removed")
}

// Whoever holds an image has it, whatever is removed and made at the same time.
func TestHoldAgainstRemove(t *testing.T) {
	_, s := newImages(t)
	im := Open(s)
	const rounds = 50
	id := "aabb00000001"
	var held, refused int
	for range rounds {
		image := plant(t, s, id, "one")
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				err := im.Remove(t.Context(), "one")
				if err == nil {
					return
				}
				if banger.CodeOf(err) != banger.CodeConflict {
					t.Errorf("remove: %v", err)
					return
				}
			}
		})
		for range 20 {
			release, err := im.Hold(image)
			if err != nil {
				if c := banger.CodeOf(err); c != banger.CodeNotFound && c != banger.CodeConflict {
					t.Errorf("hold: %v", err)
				}
				refused++
				continue
			}
			held++
			if data, err := os.ReadFile(image.Rootfs); err != nil || string(data) != "base of "+id {
				t.Errorf("a held base: %q, %v", data, err)
			}
			release()
		}
		wg.Wait()
	}
	t.Logf("held %d times, refused %d times", held, refused)
	if held == 0 || refused == 0 {
		t.Errorf("held %d times, refused %d times: nothing was tried", held, refused)
	}
}

// A pull that finds the base there and a removal of its last name leave either
// a whole image or none.
func TestPullAgainstRemove(t *testing.T) {
	_, s := newImages(t)
	im := Open(s)
	l := newLayout(t)
	manifest, _ := l.add("a", tarOf(t, file("a", 0o644, "a")))
	id := idOf(identity(&oci.Image{Digest: manifest, Platform: "linux/amd64"}, "", false))
	for range 40 {
		if _, err := os.Stat(s.Image(id)); err != nil {
			plant(t, s, id, "old")
		} else if _, err := im.name(t.Context(), "old", id); err != nil {
			t.Fatal(err)
		}
		// Where the base is gone already, the pull is ended before it builds.
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			src, ref := l.reference("a")
			im.Pull(ctx, src, ref, PullOptions{Name: "new", OnStep: func(step string, _, _ time.Time) {
				if _, err := os.Stat(s.Image(id)); step == "resolve" && err != nil {
					cancel()
				}
			}})
		})
		wg.Go(func() {
			if err := im.Remove(t.Context(), "old"); err != nil {
				t.Errorf("remove: %v", err)
			}
		})
		wg.Wait()
		cancel()
		list, err := im.List()
		if err != nil {
			t.Fatalf("after a pull and a removal at once: %v", err)
		}
		if len(list) == 1 {
			if err := im.Remove(t.Context(), "new"); err != nil {
				t.Fatal(err)
			}
		}
	}
}
