package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"banger"
	"banger/internal/store"
)

// Tag gives the image called by name, or by an id, one more name.
func (im *Images) Tag(ctx context.Context, name, tag string) (*Image, error) {
	if err := checkName(tag); err != nil {
		return nil, err
	}
	// Whoever removes a base has the lock from its last name to its folder.
	unlock, err := im.s.Lock(ctx, "build")
	if err != nil {
		return nil, err
	}
	defer unlock()
	image, err := im.Find(name)
	if err != nil {
		return nil, err
	}
	return im.name(ctx, tag, image.ID)
}

// Pruned is what a Prune removed.
type Pruned struct {
	Images     []string // ids
	Blobs      int
	FreedBytes int64
}

// Prune removes every base that has no name and that no VM has, every blob
// that no base was made from, and what came of blobs whose pull did not end.
// What it cannot tell, it keeps.
func (im *Images) Prune(ctx context.Context) (p Pruned, err error) {
	unlock, err := im.s.Lock(ctx, "build")
	if err != nil {
		return p, err
	}
	defer unlock()
	n, err := im.readNames()
	if err != nil {
		return p, err
	}
	named := slices.Collect(maps.Values(n.Names))
	entries, err := os.ReadDir(im.s.Images())
	if err != nil {
		return p, err
	}
	for _, e := range entries {
		if !e.IsDir() || slices.Contains(named, e.Name()) {
			continue
		}
		freed, err := im.pruneImage(e.Name())
		if banger.CodeOf(err) == banger.CodeConflict {
			continue
		}
		if err != nil {
			return p, err
		}
		p.Images = append(p.Images, e.Name())
		p.FreedBytes += freed
	}
	if err := im.dropHalfNames(ctx); err != nil {
		return p, err
	}
	for _, collect := range []func() (int, int64, error){im.s.Blobs().RemovePartials, im.collectBlobs} {
		blobs, freed, err := collect()
		p.Blobs, p.FreedBytes = p.Blobs+blobs, p.FreedBytes+freed
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// dropHalfNames removes what stays of a names file whose writer was killed.
func (im *Images) dropHalfNames(ctx context.Context) error {
	unlock, err := im.s.Lock(ctx, "names") // nobody is writing one
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(im.s.Images())
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "."+filepath.Base(im.s.ImageNames())+".") {
			err = errors.Join(err, os.Remove(filepath.Join(im.s.Images(), e.Name())))
		}
	}
	return err
}

// pruneImage removes one base without a name; CodeConflict if a VM has it.
func (im *Images) pruneImage(id string) (freedBytes int64, err error) {
	dir := im.s.Image(id)
	held, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer held.Close()
	if err := syscall.Flock(int(held.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return 0, banger.Errorf(banger.CodeConflict, "image %s: a VM is using it", id)
	}
	if im.Users != nil {
		// Asked under the lock: who makes a VM of the image holds it until the
		// VM is there to be found.
		users, err := im.Users(id)
		if err != nil {
			return 0, err
		}
		if len(users) > 0 {
			return 0, banger.Errorf(banger.CodeConflict, "image %s: the VM %s needs it", id, users[0])
		}
	}
	if freedBytes, err = allocatedIn(dir); err != nil {
		return 0, err
	}
	return freedBytes, im.s.Remove(dir)
}

// allocatedIn is what the files in a folder occupy.
func allocatedIn(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		sum += st.Blocks * 512
		return nil
	})
	return sum, err
}

// collectBlobs removes the blobs that no image was made from, and says how many
// and how large they were. The caller has the build lock.
func (im *Images) collectBlobs() (count int, freedBytes int64, err error) {
	entries, err := os.ReadDir(im.s.Images())
	if err != nil {
		return 0, 0, err
	}
	needed := map[string]bool{}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		var r record
		if err := store.ReadJSON(filepath.Join(im.s.Image(e.Name()), store.ImageRecord), imageSchema, &r); err != nil {
			return 0, 0, fmt.Errorf("image %s: %w", e.Name(), err) // what cannot be read may need anything
		}
		for _, d := range r.Blobs {
			needed[d] = true
		}
	}
	blobs := im.s.Blobs()
	digests, err := blobs.Digests()
	if err != nil {
		return 0, 0, err
	}
	for _, d := range digests {
		if needed[d] {
			continue
		}
		r, size, err := blobs.Open(d)
		if err == nil {
			r.Close()
			err = blobs.Remove(d)
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return count, freedBytes, err
		}
		count, freedBytes = count+1, freedBytes+size
	}
	return count, freedBytes, nil
}
