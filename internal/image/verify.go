package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/oci"
)

// Verified is what a look at a base image found. Texts are untrusted.
type Verified struct {
	Image       *Image
	Entries     int      // of the layers
	Differences []string // between the base and what it was made from; at most maxDifferences
	Notes       []string // what is as it may be, and what could not be checked
}

// maxDifferences is enough to see what is wrong.
const maxDifferences = 100

// allAspects are what the base of an image has exactly as its layers say. The
// content of files is compared by its hash, and how it lies on the disk is the
// writer's affair.
const allAspects = (ext4.DiffAll | ext4.DiffAtime | ext4.DiffCtime | ext4.DiffCrtime) &^ ext4.DiffContent

// Verify reads a base image and all that it was made from again, and says what
// differs: the file's digest against the record, the layers against their
// digests, and every entry of the merged layers against the file system, by
// other code than wrote it. It needs no space on the disk. src has the blobs.
func (im *Images) Verify(ctx context.Context, name string, src *oci.Source, agent *os.File) (*Verified, error) {
	image, err := im.Find(name)
	if err != nil {
		return nil, err
	}
	release, err := im.Hold(image)
	if err != nil {
		return nil, err
	}
	defer release()
	guest, err := guestFileList(agent)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(image.Rootfs)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	v := &Verified{Image: image}
	digest, known, err := digestLike(ctx, f, image.BaseDigest)
	if err != nil {
		return nil, err
	}
	if !known {
		v.differ("base image: its record has the digest %.100q, which is of no kind that this version of banger knows", image.BaseDigest)
	} else if digest != image.BaseDigest {
		v.differ("base image: digest %s, not the %s it was made with", digest, image.BaseDigest)
	}
	base, err := ext4.Open(f)
	if err != nil {
		v.differ("base image: %v", err)
		return v, nil
	}
	if uuid := base.UUID(); uuid != image.UUID {
		v.differ("base image: UUID %x, not %x", uuid, image.UUID)
	}
	if image.WorkSeed == "" {
		v.Notes = append(v.Notes, "it has no work seed")
	} else if err := readable(ctx, image.WorkSeed); err != nil {
		v.differ("work seed: %v", err)
	}
	if image.Digest == nil {
		v.Notes = append(v.Notes, "it was not made of layers: its digest, its structure and its guest files are what could be checked")
		if err := readAll(ctx, base); err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			v.differ("base image: %v", err)
		}
		if err := checkGuestFiles(base, masks(image.Masked)); err != nil {
			v.differ("%v", err)
		}
		if err := checkGuestFiles(base, guest); err != nil {
			v.Notes = append(v.Notes, fmt.Sprintf("%v: from another release?", err))
		}
		return v, nil
	}
	src.Platform = image.Platform
	img, err := src.Stored(ctx, image.Name, *image.Digest)
	if err != nil {
		return v.layersBad(ctx, err)
	}
	tree, err := oci.Squash(ctx, img, hashSink{})
	if err != nil {
		return v.layersBad(ctx, err)
	}
	nodes, err := putGuestFiles(tree, hashSink{}, guest)
	if err != nil {
		return nil, err
	}
	// What is masked is on record, so that another release finds it as well.
	if _, err := putGuestFiles(tree, hashSink{}, masks(image.Masked)); err != nil {
		return nil, err
	}
	v.Entries = tree.Entries
	return v, v.compare(ctx, base, &layerTree{tree: tree, numbers: make(map[*node]uint32)}, nodes)
}

func (v *Verified) differ(format string, args ...any) {
	if len(v.Differences) < maxDifferences {
		v.Differences = append(v.Differences, fmt.Sprintf(format, args...))
	}
}

// layersBad records that the layers are not what the record says.
func (v *Verified) layersBad(ctx context.Context, err error) (*Verified, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if banger.CodeOf(err) == banger.CodeInternal {
		return nil, err
	}
	v.differ("layers: %v", err)
	return v, nil
}

// compare goes through the base and the layers side by side.
func (v *Verified) compare(ctx context.Context, base *ext4.FS, want *layerTree, guest map[*node]bool) error {
	err := ext4.Compare(base, want, allAspects, func(d ext4.Difference) bool {
		n := want.tree.Lookup(d.Path)
		switch {
		case d.Path == "lost+found" && n == nil:
		case guest[n] && d.Aspect == ext4.DiffName:
			v.Notes = append(v.Notes, fmt.Sprintf("guest file %q: not in it: of another release", d.Path))
		default:
			v.differ("%v", d)
		}
		return len(v.Differences) < maxDifferences && ctx.Err() == nil
	})
	if err != nil && ctx.Err() == nil {
		v.differ("base image: %v", err)
	}
	hashed := make(map[*node]bool) // of those with several names
	return want.tree.Walk(func(path string, n *node) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if hashed[n] || len(v.Differences) == maxDifferences {
			return nil
		}
		if n.Nlink > 1 {
			hashed[n] = true
		}
		var differs string
		var err error
		switch n.Mode & modeType {
		case modeRegular:
			differs, err = contentDiffers(base, path[1:], n)
		case modeSymlink:
			var target string
			if target, err = base.ReadLink(path[1:]); err == nil && target != n.Target {
				differs = fmt.Sprintf("target %.64q, not %.64q", target, n.Target)
			}
		}
		switch {
		case err != nil:
			if _, serr := base.Lstat(path[1:]); serr == nil { // else it was reported
				v.differ("%q: %v", path[1:], err)
			}
		case differs != "" && guest[n]:
			v.Notes = append(v.Notes, fmt.Sprintf("guest file %q: %s: of another release", path[1:], differs))
		case differs != "":
			v.differ("%q: %s", path[1:], differs)
		}
		return nil
	})
}

func contentDiffers(base *ext4.FS, path string, n *node) (string, error) {
	info, err := base.Lstat(path)
	if err != nil || !info.Mode().IsRegular() {
		return "", err // another type was reported
	}
	if info.Size() != n.SizeBytes {
		return fmt.Sprintf("content: %d bytes, not %d", info.Size(), n.SizeBytes), nil
	}
	f, err := base.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	if [sha256.Size]byte(h.Sum(nil)) != n.Content {
		return "content: other bytes", nil
	}
	return "", nil
}

// readable opens a file system and reads all of it.
func readable(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	disk, err := ext4.Open(f)
	if err != nil {
		return err
	}
	return readAll(ctx, disk)
}

// readAll reads every entry of a file system: whatever has a checksum is
// checked by that.
func readAll(ctx context.Context, f *ext4.FS) error {
	return fs.WalkDir(f, ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			_, err = f.Xattrs(path)
		}
		if err == nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return err
	})
}

// node is one inode of layers that are read for their hashes.
type node = oci.Node[[sha256.Size]byte]

// hashSink takes contents for their hash alone.
type hashSink struct{}

func (hashSink) Place(r io.Reader, sizeBytes int64) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	if _, err := io.CopyN(h, r, sizeBytes); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

func (hashSink) Discard([sha256.Size]byte) {}

// layerTree is merged layers as ext4.Compare looks at them, without content.
type layerTree struct {
	tree    *oci.Tree[[sha256.Size]byte]
	numbers map[*node]uint32 // of inodes with several names
}

func (t *layerTree) find(p string) (*node, error) {
	n := t.tree.Lookup(p)
	if n == nil {
		return nil, &fs.PathError{Op: "look up", Path: p, Err: fs.ErrNotExist}
	}
	return n, nil
}

func (t *layerTree) Open(p string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrInvalid}
}

func (t *layerTree) Lstat(p string) (fs.FileInfo, error) {
	n, err := t.find(p)
	if err != nil {
		return nil, err
	}
	return t.info(path.Base(p), n), nil
}

func (t *layerTree) info(name string, n *node) *layerInfo {
	ino := uint32(0)
	if n.Nlink > 1 {
		if ino = t.numbers[n]; ino == 0 {
			ino = uint32(len(t.numbers) + 1)
			t.numbers[n] = ino
		}
	}
	atime, ctime := n.Mtime, n.Mtime
	if n.Atime != nil {
		atime = *n.Atime
	}
	if n.Ctime != nil {
		ctime = *n.Ctime
	}
	return &layerInfo{name, ext4.Stat{
		Ino: ino, Mode: n.Mode, UID: n.UID, GID: n.GID, Links: n.Nlink, SizeBytes: n.SizeBytes,
		Atime: atime.Time(), Mtime: n.Mtime.Time(), Ctime: ctime.Time(), Crtime: n.Mtime.Time(),
		Major: n.Major, Minor: n.Minor,
	}}
}

func (t *layerTree) ReadLink(p string) (string, error) {
	n, err := t.find(p)
	if err != nil {
		return "", err
	}
	return n.Target, nil
}

func (t *layerTree) ReadDir(p string) (list []fs.DirEntry, err error) {
	if p == "." {
		p = ""
	}
	for _, name := range t.tree.Names(p) {
		n, err := t.find(p + "/" + name)
		if err != nil {
			return nil, err
		}
		list = append(list, fs.FileInfoToDirEntry(t.info(name, n)))
	}
	return list, nil
}

func (t *layerTree) Xattrs(p string) (map[string][]byte, error) {
	n, err := t.find(p)
	if err != nil {
		return nil, err
	}
	return n.Xattrs.All(), nil
}

// layerInfo is a node as an fs.FileInfo.
type layerInfo struct {
	name string
	stat ext4.Stat
}

func (i *layerInfo) Name() string       { return i.name }
func (i *layerInfo) Size() int64        { return i.stat.SizeBytes }
func (i *layerInfo) ModTime() time.Time { return i.stat.Mtime }
func (i *layerInfo) IsDir() bool        { return i.stat.Mode&modeType == modeDir }
func (i *layerInfo) Sys() any           { return &i.stat }

// Mode gives the type that a directory listing needs; the rest is in Sys.
func (i *layerInfo) Mode() fs.FileMode {
	m := fs.FileMode(i.stat.Mode & 0o777)
	switch i.stat.Mode & modeType {
	case modeDir:
		m |= fs.ModeDir
	case modeSymlink:
		m |= fs.ModeSymlink
	}
	return m
}
