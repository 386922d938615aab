package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/oci"
	"banger/internal/store"
)

// A work seed is the image's own /root as the root of a file system: what the
// work disk of every new VM is filled with.

// seedLabel is the volume name of every work seed.
const seedLabel = "banger-seed"

// The size of a work seed: twice its content and a rest, so that one that is
// used elsewhere, as it is, has room to work in. The file is sparse.
const (
	seedSpareBytes = 256 << 20
	minSeedBytes   = 512 << 20
	seedStepBytes  = 64 << 20
)

// seedSizeBytes is the size of a seed that holds so much.
func seedSizeBytes(contentBytes, leastBytes int64) int64 {
	n := max(minSeedBytes, 2*contentBytes+seedSpareBytes, leastBytes)
	return (n + seedStepBytes - 1) / seedStepBytes * seedStepBytes
}

// seedIdentity is that of the seed that belongs to a base.
func seedIdentity(base [32]byte) [32]byte {
	return sha256.Sum256(append([]byte("work seed\n"), base[:]...))
}

// canceler ends the writing of an image when its context does.
type canceler struct {
	*os.File
	ctx context.Context
}

func (c *canceler) WriteAt(p []byte, off int64) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.File.WriteAt(p, off)
}

// seedOf writes a new file at out: the directory at of src as the root of a
// file system. It belongs to 0:0, since it becomes root's home; all else is as
// it is in src. at "" makes an empty one.
func seedOf(ctx context.Context, out string, src *ext4.FS, at string, id [32]byte) error {
	f, err := os.OpenFile(out, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if at == "" {
		p := paramsOf(id, seedLabel)
		p.SizeBytes = minSeedBytes
		return ext4.Format(f, p, &ext4.Inode{Mode: modeDir | 0o700})
	}
	w, err := ext4.NewWriter(&canceler{f, ctx}, ext4.Options{MaxSizeBytes: maxBaseBytes})
	if err != nil {
		return err
	}
	if err := w.AddTree(".", src, at); err != nil {
		return err
	}
	contentBytes, err := allocated(src, at)
	if err != nil {
		return err
	}
	if err := finishSeed(w, contentBytes, id); err != nil {
		return err
	}
	top, err := src.Lstat(at)
	if err != nil {
		return err
	}
	if st, ok := top.Sys().(*ext4.Stat); ok && st.UID == 0 && st.GID == 0 {
		return nil
	}
	return ext4.Edit(ctx, out, time.Time{}, func(e *ext4.Editor) error { return e.Chown(".", 0, 0) })
}

func finishSeed(w *ext4.Writer, contentBytes int64, id [32]byte) error {
	p := paramsOf(id, seedLabel)
	least, err := w.MinSizeBytes(p)
	if err != nil {
		return err
	}
	p.SizeBytes = seedSizeBytes(contentBytes, least)
	return w.Finish(p)
}

// allocated is what the files below a directory take.
func allocated(src *ext4.FS, at string) (sum int64, err error) {
	counted := make(map[uint32]bool) // inodes of several names
	err = fs.WalkDir(src, at, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*ext4.Stat)
		if !ok || st.Mode&modeType != modeRegular || counted[st.Ino] {
			return nil
		}
		if st.Links > 1 {
			counted[st.Ino] = true
		}
		sum += st.AllocatedBytes
		return nil
	})
	return sum, err
}

// rootHome finds the directory that /root leads to, as the guest's mount of
// the work disk will; "" where there is none.
func rootHome(base *ext4.FS) (string, error) {
	info, err := base.Stat("root")
	if errors.Is(err, ext4.ErrCorrupt) {
		return "", err
	}
	if err != nil || !info.IsDir() {
		return "", nil // nothing there, or a symlink that leads nowhere
	}
	want, _ := info.Sys().(*ext4.Stat)
	at := "root"
	const hops = 40
	for range hops {
		info, err := base.Lstat(at)
		if err != nil {
			break
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			if at == "." {
				break // a home of "/" is no home of its own
			}
			if st, ok := info.Sys().(*ext4.Stat); ok && want != nil && st.Ino == want.Ino {
				return at, nil
			}
			break
		}
		target, err := base.ReadLink(at)
		if err != nil {
			return "", err
		}
		if !strings.HasPrefix(target, "/") {
			target = path.Dir("/"+at) + "/" + target
		}
		if at = strings.TrimPrefix(path.Clean("/"+target), "/"); at == "" {
			at = "."
		}
	}
	// Or a symlink through another and "..", which a clean path does not follow
	// as the kernel does. Rare, and an empty home does no harm.
	return "", nil
}

// addSeed puts the work seed beside the base in a folder that is being made.
func addSeed(ctx context.Context, dir string, base *ext4.FS, baseID [32]byte) error {
	at, err := rootHome(base)
	if err == nil {
		err = seedOf(ctx, filepath.Join(dir, store.ImageWorkSeed), base, at, seedIdentity(baseID))
	}
	if err != nil {
		return fmt.Errorf("work seed: %w", err)
	}
	return os.Chmod(filepath.Join(dir, store.ImageWorkSeed), 0o400)
}

// ReplaceSeed makes the work seed of an image of a directory or tar of the
// user's, for VMs that are made from now on. Whoever owns its top directory
// becomes root in it; all else stays as it is.
func (im *Images) ReplaceSeed(ctx context.Context, name string, src *oci.Source, ref oci.Reference) (*Image, error) {
	unlock, err := im.s.Lock(ctx, "build")
	if err != nil {
		return nil, err
	}
	defer unlock()
	image, err := im.Find(name)
	if err != nil {
		return nil, err
	}
	if ref.Kind != oci.KindRootfs {
		return nil, banger.Errorf(banger.CodeUsage, "image seed: %q is no directory and no tar", ref)
	}
	img, err := src.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	tmp, err := im.s.TempDir("seed")
	if err != nil {
		return nil, err
	}
	defer tmp.Remove()
	file := filepath.Join(tmp.Path, store.ImageWorkSeed)
	if err := seedFromSource(ctx, file, img); err != nil {
		return nil, err
	}
	final := filepath.Join(im.s.Image(image.ID), store.ImageWorkSeed)
	if err := im.s.ReplaceFile(file, final); err != nil {
		return nil, err
	}
	return im.load(image.ID, image.Name)
}

func seedFromSource(ctx context.Context, file string, img *oci.Image) error {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	w, err := ext4.NewWriter(f, ext4.Options{MaxSizeBytes: maxBaseBytes})
	if err != nil {
		return err
	}
	tree, err := oci.Squash(ctx, img, w)
	if err != nil {
		return err
	}
	top := tree.Lookup("/")
	uid, gid := top.UID, top.GID
	var contentBytes int64
	seen := make(map[*oci.Node[*ext4.Content]]bool)
	if err := tree.Walk(func(_ string, n *oci.Node[*ext4.Content]) error {
		if seen[n] {
			return nil
		}
		if n.Nlink > 1 {
			seen[n] = true
		}
		if n.UID == uid {
			n.UID = 0
		}
		if n.GID == gid {
			n.GID = 0
		}
		contentBytes += n.SizeBytes
		return nil
	}); err != nil {
		return err
	}
	if err := addTree(ctx, w, tree, &Built{Image: img}); err != nil {
		return err
	}
	id := sha256.Sum256([]byte("work seed\n" + tree.InputDigest))
	if err := finishSeed(w, min(contentBytes, maxSeedContentBytes), id); err != nil {
		return err
	}
	return f.Chmod(0o400)
}

// maxSeedContentBytes is where the rule of a seed's size ends: a sparse file
// may be as large as it likes, and MinSizeBytes knows what it takes.
const maxSeedContentBytes = maxBaseBytes / 4
