package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/oci"
)

// File type bits of a mode, as in stat(2).
const (
	modeType    = 0o170000
	modeRegular = 0o100000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeSymlink = 0o120000
)

// label is the volume name of every base.
const label = "banger-base"

// builder is part of every image's identity: a base made by other rules is
// another base.
const builder = "banger base image, version 3"

// The size of a base: its content and a quarter, so that a file system that is
// mounted read-only here can also be used, and grown, elsewhere.
const (
	minBaseBytes  = 1 << 30
	baseStepBytes = 64 << 20
	maxBaseBytes  = 1 << 40 // what may be asked for; it costs room in every base
)

// epoch stands in for the time of what an image says nothing about, so that
// the same input always gives the same bytes.
var epoch = time.Unix(0, 0).UTC()

// BuildOptions says how a base is made.
type BuildOptions struct {
	SizeBytes int64    // of the file system; 0 takes it from the content
	Agent     *os.File // the guest binary; nil leaves the guest files out
	Trim      bool     // see trim.go
}

// Built is what became of a build.
type Built struct {
	Image     *oci.Image
	Identity  [32]byte // of everything that decides the base's bytes, the guest files excepted
	UUID      [16]byte
	SizeBytes int64
	Entries   int
	Masked    []string // units of systemd, if it was trimmed
	Notes     []string // what the image asked for and did not get, one line each; untrusted
	FetchEnd  time.Time
}

// An Output is what a base is written to and read back from: an *os.File, or
// what stands before one.
type Output interface {
	ext4.File
	io.ReaderAt
}

// Build streams an image into out, which must be empty, as one ext4 file
// system. It neither fsyncs nor closes out; when it fails what is in out is
// worthless.
func Build(ctx context.Context, img *oci.Image, out Output, opts BuildOptions) (*Built, error) {
	if n := opts.SizeBytes; n != 0 && (n < ext4.MinImageBytes || n > maxBaseBytes) {
		return nil, banger.Errorf(banger.CodeUsage, "size: %d bytes, it is from %d MiB to %d GiB", n, ext4.MinImageBytes>>20, int64(maxBaseBytes>>30))
	}
	w, err := ext4.NewWriter(out, ext4.Options{MaxSizeBytes: maxBaseBytes})
	if err != nil {
		return nil, err
	}
	tree, err := oci.Squash(ctx, img, w)
	if err != nil {
		return nil, err
	}
	b := &Built{Image: img, FetchEnd: time.Now(), Notes: tree.Notes}
	b.Identity = identity(img, tree.InputDigest, opts.Trim)
	var guest []guestFile
	if opts.Agent != nil {
		if guest, err = guestFileList(opts.Agent); err != nil {
			return nil, err
		}
	}
	if opts.Trim {
		b.Masked = trimmable(func(path string) bool { return tree.Lookup(path) != nil })
		b.Notes = append(b.Notes, noteTrimmed(b.Masked)...)
		guest = append(guest, masks(b.Masked)...)
	}
	if len(guest) > 0 {
		if _, err := putGuestFiles(tree, w, guest); banger.CodeOf(err) == banger.CodeInvalid {
			return nil, banger.Errorf(banger.CodeInvalid, "image %q: no place for a guest file: %w", img.Name, err)
		} else if err != nil {
			return nil, err
		}
	}
	if err := addTree(ctx, w, tree, b); err != nil {
		return nil, err
	}
	params := paramsOf(b.Identity, label)
	params.SizeBytes = opts.SizeBytes
	b.UUID = params.UUID
	if params.SizeBytes == 0 {
		least, err := w.MinSizeBytes(params)
		if err != nil {
			return nil, err
		}
		params.SizeBytes = max(minBaseBytes, (least+least/4+baseStepBytes-1)/baseStepBytes*baseStepBytes)
	}
	b.SizeBytes = params.SizeBytes
	if err := w.Finish(params); err != nil {
		var space *ext4.SpaceError
		if errors.As(err, &space) {
			return nil, banger.Errorf(banger.CodeUsage, "size: %w", err).
				WithHint("leave the size out to have it chosen by content, or ask for at least %d MiB", (space.NeedBytes+1<<20-1)>>20)
		}
		return nil, err
	}
	base, err := ext4.Open(out)
	if err != nil {
		return nil, fmt.Errorf("base image: read back: %w", err)
	}
	return b, checkGuestFiles(base, guest)
}

// paramsOf are those of a file system whose identity is a hash.
func paramsOf(identity [32]byte, label string) ext4.Params {
	p := ext4.Params{Label: label, Time: epoch}
	// Two different halves of the hash: the UUID is shown to users, the seed
	// is not.
	copy(p.UUID[:], identity[:16])
	p.UUID[6] = p.UUID[6]&0x0f | 0x80 // version 8, RFC 9562 section 5.8
	p.UUID[8] = p.UUID[8]&0x3f | 0x80
	copy(p.HashSeed[:], identity[16:])
	return p
}

// addTree gives the merged tree to the writer and uses it up. Nodes and inodes
// are in step: a node found under two paths is one inode with two links.
func addTree(ctx context.Context, w *ext4.Writer, tree *oci.Tree[*ext4.Content], b *Built) error {
	linked := make(map[*oci.Node[*ext4.Content]]*ext4.Inode)
	return tree.Drain(func(path string, n *oci.Node[*ext4.Content]) error {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		inode := linked[n]
		if inode == nil {
			// What the layer does not say of times follows from what it does.
			mtime := n.Mtime.Time()
			atime, ctime := mtime, mtime
			if n.Atime != nil {
				atime = n.Atime.Time()
			}
			if n.Ctime != nil {
				ctime = n.Ctime.Time()
			}
			inode = &ext4.Inode{
				Mode: n.Mode, UID: n.UID, GID: n.GID,
				Atime: atime, Mtime: mtime, Ctime: ctime, Crtime: mtime,
				Target: n.Target, Major: n.Major, Minor: n.Minor,
				Xattrs: n.Xattrs.All(), Content: n.Content,
			}
			if n.Nlink > 1 {
				linked[n] = inode
			}
		}
		b.Entries++
		err := w.Add(strings.TrimPrefix(path, "/"), inode)
		if err == nil {
			return nil
		}
		if _, ok := errors.AsType[syscall.Errno](err); ok {
			return err // of the file that is written
		}
		// What an image may say and ext4 cannot hold.
		return banger.Errorf(banger.CodeInvalid, "image %q: entry %w", b.Image.Name, err)
	})
}

// identity hashes what decides the bytes of a base: the rules it is made by,
// what is masked in it, and the manifest or, where there is none, the input
// itself.
func identity(img *oci.Image, inputDigest string, trim bool) [32]byte {
	source := img.Digest
	if source == "" {
		source = "input " + inputDigest
	}
	text := fmt.Appendf(nil, "%s\n%s\n%s\n", builder, img.Platform, source)
	if trim {
		text = fmt.Appendf(text, "without %s\n", strings.Join(needless, " "))
	}
	return sha256.Sum256(text)
}
