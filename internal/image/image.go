// Package image is the store of base images: what a base is made of, how it is
// named and found, and when it may go. The rules of registries and layers are
// oci's, those of the file system ext4's.
package image

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/oci"
	"banger/internal/store"
)

// Schemas of the records of this package.
const (
	imageSchema = 1
	namesSchema = 1
)

// record is what stands in images/<id>/image.json. Paths are not in it, so
// that the state folder can be moved.
type record struct {
	ID         string             `json:"id"`
	Reference  string             `json:"reference"`
	Digest     string             `json:"digest,omitempty"`
	BaseDigest string             `json:"base_digest"`
	UUID       string             `json:"uuid"` // of the file system, 32 hex digits
	Platform   string             `json:"platform"`
	Created    time.Time          `json:"created"`
	Config     banger.ImageConfig `json:"config"`
	Blobs      []string           `json:"blobs,omitempty"` // digests it was made from
	Trimmed    bool               `json:"trimmed,omitempty"`
	Masked     []string           `json:"masked,omitempty"` // units of systemd, by trimming
	Notes      []string           `json:"notes,omitempty"`
}

// names is what stands in images/names.json.
type names struct {
	Names map[string]string `json:"names"` // full name to image id
}

// Images is the room of base images in a store.
type Images struct {
	s *store.Store
	// Users says which VMs, by name, need a base image, running or not. Nil
	// stands for none.
	Users func(id string) ([]string, error)

	baseBytes int64 // size of new bases; 0: by content. Set by tests.
}

// Open returns the images of a store.
func Open(s *store.Store) *Images { return &Images{s: s} }

// An Image is one base image in the store.
type Image struct {
	banger.Image
	UUID   [16]byte // of its file system
	Masked []string // units of systemd, by trimming
	Notes  []string // see Built.Notes
}

// List returns all images, by name.
func (im *Images) List() ([]*Image, error) {
	n, err := im.readNames()
	if err != nil {
		return nil, err
	}
	var list []*Image
	for _, name := range slices.Sorted(maps.Keys(n.Names)) {
		image, err := im.load(n.Names[name], name)
		if err != nil {
			return nil, err
		}
		list = append(list, image)
	}
	return list, nil
}

// Find returns the image of a full name, or of an id or its unique beginning
// of at least four digits. No image is CodeNotFound.
func (im *Images) Find(name string) (*Image, error) {
	n, err := im.readNames()
	if err != nil {
		return nil, err
	}
	if id, ok := n.Names[name]; ok {
		return im.load(id, name)
	}
	found := ""
	if len(name) >= 4 && strings.Trim(name, "0123456789abcdef") == "" {
		for _, full := range slices.Sorted(maps.Keys(n.Names)) {
			id := n.Names[full]
			if !strings.HasPrefix(id, name) {
				continue
			}
			if found != "" && n.Names[found] != id {
				return nil, banger.Errorf(banger.CodeUsage, "image %q: more than one id begins so", name)
			}
			found = full
		}
	}
	if found == "" {
		return nil, banger.Errorf(banger.CodeNotFound, "image %q: not in the store", name).
			WithHint("`banger image ls` shows what is; `banger image pull` gets one")
	}
	return im.load(n.Names[found], found)
}

// ByID returns the image of a whole id, whether it still has a name or not.
func (im *Images) ByID(id string) (*Image, error) {
	if !store.IsID(id) {
		return nil, banger.Errorf(banger.CodeUsage, "image: %q is no id", id)
	}
	image, err := im.load(id, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, banger.Errorf(banger.CodeNotFound, "image %s: not in the store", id)
	}
	return image, err
}

func (im *Images) load(id, name string) (*Image, error) {
	var r record
	dir := im.s.Image(id)
	if err := store.ReadJSON(filepath.Join(dir, store.ImageRecord), imageSchema, &r); err != nil {
		return nil, fmt.Errorf("image %q: %w", name, err)
	}
	image := &Image{Image: banger.Image{
		ID: r.ID, Name: name, Reference: r.Reference, BaseDigest: r.BaseDigest,
		Rootfs: filepath.Join(dir, store.ImageRootfs), Platform: r.Platform,
		Created: r.Created, Config: r.Config, Trimmed: r.Trimmed,
	}, Masked: r.Masked, Notes: r.Notes}
	if r.Digest != "" {
		image.Digest = &r.Digest
	}
	uuid, err := hex.DecodeString(r.UUID)
	if err != nil || len(uuid) != len(image.UUID) {
		return nil, fmt.Errorf("image %q: record: %q is no UUID", name, r.UUID)
	}
	copy(image.UUID[:], uuid)
	var st syscall.Stat_t
	if err := syscall.Stat(image.Rootfs, &st); err != nil {
		return nil, fmt.Errorf("image %q: base image %s: %w", name, image.Rootfs, err)
	}
	image.SizeBytes, image.AllocatedBytes = st.Size, st.Blocks*512
	seed := filepath.Join(dir, store.ImageWorkSeed)
	if err := syscall.Stat(seed, &st); err == nil {
		image.WorkSeed = seed
	} else if !errors.Is(err, fs.ErrNotExist) { // bases of before there were any have none
		return nil, fmt.Errorf("image %q: work seed %s: %w", name, seed, err)
	}
	return image, nil
}

// readNames reads the names. Where there never was one there is none; a file
// that cannot be read is an error.
func (im *Images) readNames() (names, error) {
	n := names{Names: map[string]string{}}
	err := store.ReadJSON(im.s.ImageNames(), namesSchema, &n)
	if errors.Is(err, fs.ErrNotExist) {
		// Bases without names would mean that the names were lost.
		entries, err := os.ReadDir(im.s.Images())
		if err != nil {
			return n, err
		}
		if slices.ContainsFunc(entries, fs.DirEntry.IsDir) {
			return n, banger.Errorf(banger.CodeInternal, "images: %s is missing and there are images in %s",
				im.s.ImageNames(), im.s.Images()).WithHint("put the file back, or move the folders away and pull again")
		}
		return n, nil
	}
	if err == nil && n.Names == nil {
		err = fmt.Errorf("record %s: it has no names", im.s.ImageNames())
	}
	return n, err
}

// PullOptions says how an image comes into the store.
type PullOptions struct {
	Name  string // under which it is kept; empty is the reference's own
	Agent *os.File
	Trim  bool // see trim.go
	// OnStep is told of the parts of a pull as they end.
	OnStep func(name string, start, end time.Time)
}

// Pull makes the base image of a reference and gives it its name. Where the
// base is there already only the name moves. Of two pulls at once the second
// waits and finds the work done.
func (im *Images) Pull(ctx context.Context, src *oci.Source, ref oci.Reference, opts PullOptions) (*Image, error) {
	name := opts.Name
	if name == "" {
		name = NameOf(src, ref, opts.Trim)
	}
	nameless := banger.Errorf(banger.CodeUsage, "image %q: it has no name of its own", ref).WithHint("give it one with --name")
	if name == "" && ref.Kind != oci.KindArchive { // which may bring one
		return nil, nameless
	}
	if opts.Name != "" {
		if err := checkName(opts.Name); err != nil {
			return nil, err
		}
	}
	step := func(what string, start time.Time) time.Time {
		end := time.Now()
		if opts.OnStep != nil {
			opts.OnStep(what, start, end)
		}
		return end
	}
	unlock, err := im.s.Lock(ctx, "build")
	if err != nil {
		return nil, err
	}
	defer unlock()

	t := time.Now()
	img, err := src.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	if name == "" {
		name = trimName(img.Suggested, ref, opts.Trim)
	}
	if name == "" {
		return nil, nameless
	}
	t = step("resolve", t)
	if img.Digest != "" {
		id := idOf(identity(img, "", opts.Trim))
		if _, err := os.Stat(im.s.Image(id)); err == nil {
			return im.name(ctx, name, id)
		}
	}
	tmp, err := im.s.TempDir("image")
	if err != nil {
		return nil, err
	}
	defer tmp.Remove()
	f, err := os.OpenFile(filepath.Join(tmp.Path, store.ImageRootfs), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := newDigester(f)
	build := func() (*Built, error) {
		return Build(ctx, img, out, BuildOptions{SizeBytes: im.baseBytes, Agent: opts.Agent, Trim: opts.Trim})
	}
	built, err := build()
	if errors.Is(err, oci.ErrResumed) {
		// Or the image is bad, as the whole of it will show.
		if err = out.Truncate(0); err == nil {
			built, err = build()
		}
	}
	if err != nil {
		return nil, err
	}
	if opts.OnStep != nil {
		opts.OnStep("fetch", t, built.FetchEnd)
	}
	t = built.FetchEnd
	id := idOf(built.Identity)
	if _, err := os.Stat(im.s.Image(id)); err == nil {
		return im.name(ctx, name, id)
	}
	digest, err := out.digest(ctx)
	if err != nil {
		return nil, err
	}
	r := record{
		ID: id, Reference: ref.String(), Digest: img.Digest, BaseDigest: digest,
		UUID: hex.EncodeToString(built.UUID[:]), Platform: img.Platform,
		Created: time.Now().UTC().Truncate(time.Second), Config: img.Config,
		Blobs: blobsOf(img), Trimmed: opts.Trim, Masked: built.Masked, Notes: built.Notes,
	}
	base, err := ext4.Open(f)
	if err != nil {
		return nil, fmt.Errorf("base image: read back: %w", err)
	}
	if err := addSeed(ctx, tmp.Path, base, built.Identity); err != nil {
		return nil, err
	}
	image, err := im.commit(ctx, tmp, f, r, name)
	step("build", t)
	return image, err
}

// commit makes what stands in tmp an image of the store, unless one of its id
// is there already, and gives it a name. f is its base.
func (im *Images) commit(ctx context.Context, tmp *store.Temp, f *os.File, r record, name string) (*Image, error) {
	if _, err := os.Stat(im.s.Image(r.ID)); err == nil {
		return im.name(ctx, name, r.ID)
	}
	// The base never changes from here on.
	if err := f.Chmod(0o400); err != nil {
		return nil, err
	}
	if err := store.WriteJSON(filepath.Join(tmp.Path, store.ImageRecord), imageSchema, r); err != nil {
		return nil, err
	}
	// The names file comes first where there is none: a base without any
	// names file reads as names that were lost.
	if err := im.ensureNames(ctx); err != nil {
		return nil, err
	}
	if err := tmp.Commit(im.s.Image(r.ID)); err != nil {
		return nil, err
	}
	return im.name(ctx, name, r.ID)
}

// isFull says whether an error means that a disk of this host is full.
func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// blobsOf lists the digests of all that an image was made from.
func blobsOf(img *oci.Image) []string {
	digests := slices.Clone(img.Documents)
	for _, l := range img.Layers {
		digests = append(digests, l.Digest)
	}
	return digests
}

// idOf is the folder's name of an identity.
func idOf(identity [32]byte) string { return hex.EncodeToString(identity[:6]) }

// name points a name at an image. One that is not whole gets none: every list
// would fail at it.
func (im *Images) name(ctx context.Context, name, id string) (*Image, error) {
	image, err := im.load(id, name)
	if err != nil {
		return nil, err
	}
	if err := im.changeNames(ctx, func(n names) error { n.Names[name] = id; return nil }); err != nil {
		return nil, err
	}
	return image, nil
}

func (im *Images) ensureNames(ctx context.Context) error {
	return im.changeNames(ctx, func(names) error { return nil })
}

// changeNames rewrites the names under their lock, unless change refuses.
func (im *Images) changeNames(ctx context.Context, change func(names) error) error {
	unlock, err := im.s.Lock(ctx, "names")
	if err != nil {
		return err
	}
	defer unlock()
	n, err := im.readNames()
	if err != nil {
		return err
	}
	if err := change(n); err != nil {
		return err
	}
	return store.WriteJSON(im.s.ImageNames(), namesSchema, n)
}

// Hold keeps an image from being removed until release is called or the
// process ends. One that is being removed is CodeConflict, one that is gone
// CodeNotFound.
func (im *Images) Hold(image *Image) (release func(), err error) {
	dir := im.s.Image(image.ID)
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, banger.Errorf(banger.CodeNotFound, "image %q: it was removed", image.Name)
	}
	if err != nil {
		return nil, err
	}
	if err := lockFolder(f, dir, image.Name); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// lockFolder takes the shared lock of an image's folder, which was opened as
// dir and must still be what is there: between the opening and the lock it may
// have gone to the trash.
func lockFolder(f *os.File, dir, name string) error {
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); err != nil {
		return banger.Errorf(banger.CodeConflict, "image %q: it is being removed", name)
	}
	opened, err := f.Stat()
	if err != nil {
		return err
	}
	now, err := os.Lstat(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil || !os.SameFile(opened, now) {
		return banger.Errorf(banger.CodeNotFound, "image %q: it was removed", name)
	}
	return nil
}

// Remove takes the name away and, when it was the last one, the base and the
// blobs that nothing else needs. An image that a VM holds is CodeConflict, and
// so is an id of an image with several names. It
// waits for a pull that is under way, which may be about to name this very
// base, and whose blobs are not yet anyone's.
func (im *Images) Remove(ctx context.Context, name string) error {
	if _, err := im.Find(name); err != nil {
		return err // no reason to wait
	}
	unlock, err := im.s.Lock(ctx, "build")
	if err != nil {
		return err
	}
	defer unlock()
	image, err := im.Find(name)
	if err != nil {
		return err
	}
	last := false
	var held *os.File
	err = im.changeNames(ctx, func(n names) error {
		if name != image.Name { // it was an id
			var all []string
			for other, id := range n.Names {
				if id == image.ID {
					all = append(all, other)
				}
			}
			if slices.Sort(all); len(all) > 1 {
				return banger.Errorf(banger.CodeConflict, "image %q: it has %d names", name, len(all)).
					WithHint("say which to remove: %s", strings.Join(all, ", "))
			}
		}
		delete(n.Names, image.Name)
		last = !slices.Contains(slices.Collect(maps.Values(n.Names)), image.ID)
		if !last {
			return nil
		}
		if held, err = os.Open(im.s.Image(image.ID)); err != nil {
			return err
		}
		if err := syscall.Flock(int(held.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			return banger.Errorf(banger.CodeConflict, "image %q: a VM is using it", image.Name).
				WithHint("stop that VM first")
		}
		if im.Users == nil {
			return nil
		}
		// Asked under the lock: who makes a VM of the image holds it until the
		// VM is there to be found.
		users, err := im.Users(image.ID)
		if err == nil && len(users) > 0 {
			return banger.Errorf(banger.CodeConflict, "image %q: the VM %s needs it", image.Name, users[0]).
				WithHint("remove what was made of it first: banger rm %s", strings.Join(users, " "))
		}
		return err
	})
	if held != nil {
		defer held.Close()
	}
	if err != nil || !last {
		return err
	}
	// The name went first: a base without a name is harmless, and the next
	// pull of the same image takes it up again.
	if err := im.s.Remove(im.s.Image(image.ID)); err != nil {
		return err
	}
	_, _, err = im.collectBlobs()
	return err
}
