package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/store"
)

// RegisterOptions says how a file system that another tool made becomes an
// image.
type RegisterOptions struct {
	Name  string   // under which it is kept
	Label string   // how the user called the file
	Agent *os.File // the guest binary
	Seed  *os.File // a work seed that came with it; nil makes one of its /root
	Trim  bool     // see trim.go
}

// Register makes a base image of a copy of src, a regular file with an ext2,
// ext3 or ext4 file system: the guest files are put into the copy and read back
// from it. src is read and nothing else. Registered again, what has changed
// becomes another base and the name moves; the base of before stays as it is
// for the VMs that have it.
func (im *Images) Register(ctx context.Context, src *os.File, opts RegisterOptions) (*Image, error) {
	if err := checkName(opts.Name); err != nil {
		return nil, err
	}
	guest, err := guestFileList(opts.Agent)
	if err != nil {
		return nil, err
	}
	unlock, err := im.s.Lock(ctx, "build")
	if err != nil {
		return nil, err
	}
	defer unlock()
	tmp, err := im.s.TempDir("image")
	if err != nil {
		return nil, err
	}
	defer tmp.Remove()
	rootfs := filepath.Join(tmp.Path, store.ImageRootfs)
	fail := func(err error) error { return registerError(ctx, opts.Label, err) }
	if err := copyDisk(ctx, rootfs, src); err != nil {
		return nil, fail(err)
	}
	put, err := injectGuestFiles(ctx, rootfs, guest, opts.Trim)
	if err != nil {
		return nil, fail(err)
	}
	f, err := os.Open(rootfs)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	base, err := ext4.Open(f)
	if err != nil {
		return nil, fail(fmt.Errorf("read back: %w", err))
	}
	if err := checkGuestFiles(base, append(guest, masks(put.masked)...)); err != nil {
		return nil, err
	}
	digest, err := digestOf(ctx, f)
	if err != nil {
		return nil, err
	}
	identity := sha256.Sum256(fmt.Appendf(nil, "%s\nregistered %s\n", builder, digest))
	if opts.Seed == nil {
		err = addSeed(ctx, tmp.Path, base, identity)
	} else {
		var seedSum string
		if seedSum, err = givenSeed(ctx, tmp.Path, opts.Seed, identity); err == nil {
			identity = sha256.Sum256(fmt.Appendf(nil, "%x\nseed %s\n", identity, seedSum))
		}
	}
	if err != nil {
		return nil, fail(err)
	}
	uuid := base.UUID()
	r := record{
		ID: idOf(identity), Reference: "ext4:" + opts.Label, BaseDigest: digest, UUID: hex.EncodeToString(uuid[:]),
		Platform: "linux/amd64", Created: time.Now().UTC().Truncate(time.Second),
		Trimmed: opts.Trim, Masked: put.masked, Notes: put.notes,
	}
	return im.commit(ctx, tmp, f, r, opts.Name)
}

// copyDisk copies the open file src. It is named through its descriptor: what
// its path leads to by now is of no interest.
func copyDisk(ctx context.Context, dst string, src *os.File) error {
	err := ext4.CopyFile(ctx, dst, fmt.Sprintf("/proc/self/fd/%d", src.Fd()))
	if err == nil {
		err = os.Chmod(dst, 0o600)
	}
	return err
}

// givenSeed makes the work seed of a file that came with a base: it is read and
// written anew, so that whatever stands there is a sound file system.
func givenSeed(ctx context.Context, dir string, seed *os.File, identity [32]byte) (digest string, err error) {
	f, err := ext4.Open(seed)
	if err != nil {
		return "", fmt.Errorf("work seed %s: %w", seed.Name(), err)
	}
	out := filepath.Join(dir, store.ImageWorkSeed)
	if err := seedOf(ctx, out, f, ".", seedIdentity(identity)); err != nil {
		return "", fmt.Errorf("work seed %s: %w", seed.Name(), err)
	}
	made, err := os.Open(out)
	if err != nil {
		return "", err
	}
	defer made.Close()
	if digest, err = digestOf(ctx, made); err != nil {
		return "", err
	}
	return digest, made.Chmod(0o400)
}

// injected is what an injection did beside the guest files.
type injected struct {
	masked []string // units of systemd
	notes  []string
}

// injectGuestFiles changes the image at path, all or nothing.
func injectGuestFiles(ctx context.Context, path string, guest []guestFile, trim bool) (*injected, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	old, err := ext4.Open(f)
	if err != nil {
		return nil, errors.Join(err, otherFormat(f))
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if old.SizeBytes() > st.Size() {
		return nil, fmt.Errorf("%d bytes of a file system of %d: it is cut short", st.Size(), old.SizeBytes())
	}
	if old.UUID() == [16]byte{} {
		return nil, errors.New("its file system has no UUID, by which a guest finds it")
	}
	strip, err := overlayEntries(ctx, old)
	if err != nil {
		return nil, err
	}
	put := new(injected)
	if len(strip) > 0 {
		put.notes = append(put.notes, fmt.Sprintf("xattrs of overlayfs left out (%d)", len(strip)))
	}
	if trim {
		put.masked = trimmable(func(path string) bool { _, err := old.Lstat(path); return err == nil })
		put.notes = append(put.notes, noteTrimmed(put.masked)...)
	}
	return put, ext4.Edit(ctx, path, time.Time{}, func(e *ext4.Editor) error {
		for _, path := range slices.Sorted(maps.Keys(strip)) {
			if err := e.SetXattrs(path, strip[path]); err != nil {
				return err
			}
		}
		return editGuestFiles(e, append(guest, masks(put.masked)...))
	})
}

// overlayEntries finds what overlayfs in the guest would take for its own: a
// device 0:0, which is an error, and xattrs. It gives the xattrs that are to
// stay, by path.
func overlayEntries(ctx context.Context, f *ext4.FS) (strip map[string]map[string][]byte, err error) {
	strip = make(map[string]map[string][]byte)
	n := 0
	err = fs.WalkDir(f, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if n++; n%1000 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*ext4.Stat); ok && st.Mode&modeType == modeChar && st.Major == 0 && st.Minor == 0 {
			return fmt.Errorf("entry %q: character device 0:0, which an overlay takes for a whiteout", path)
		}
		xattrs, err := f.Xattrs(path)
		if err != nil {
			return err
		}
		kept := maps.Clone(xattrs)
		maps.DeleteFunc(kept, func(k string, _ []byte) bool {
			return strings.HasPrefix(k, "trusted.overlay.") || strings.HasPrefix(k, "user.overlay.")
		})
		if len(kept) != len(xattrs) {
			if len(strip) == maxStripped {
				return fmt.Errorf("more than %d entries with xattrs of overlayfs: it is the upper side of an overlay, not a root file system", maxStripped)
			}
			strip[path] = kept
		}
		return nil
	})
	return strip, err
}

// maxStripped bounds the memory for what is to be stripped.
const maxStripped = 10_000

// otherFormat says what a file is that is no file system, if it is well known.
func otherFormat(f io.ReaderAt) error {
	head := make([]byte, 512)
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil
	}
	switch {
	case bytes.HasPrefix(head, []byte("QFI\xfb")):
		return errors.New("it is a qcow2 image: `qemu-img convert -O raw` it first")
	case head[510] == 0x55 && head[511] == 0xaa:
		return errors.New("it has a partition table: register the partition's own bytes")
	}
	return nil
}

// registerError finds the code of what went wrong with a file of the user's.
func registerError(ctx context.Context, label string, err error) error {
	switch {
	case ctx.Err() != nil:
		return banger.Errorf(banger.CodeCanceled, "%s: %w", label, context.Cause(ctx))
	case isFull(err):
		return banger.Errorf(banger.CodeNoSpace, "%s: %w", label, err).WithHint("free some space and try again; the file is as it was")
	case errors.Is(err, ext4.ErrNoSpace), errors.Is(err, ext4.ErrNoInodes):
		return banger.Errorf(banger.CodeInvalid, "%s: no room in it for the guest files: %w", label, err).
			WithHint("make it larger: truncate -s +128M FILE && e2fsck -f FILE && resize2fs FILE")
	case errors.Is(err, errors.ErrUnsupported):
		return banger.Errorf(banger.CodeInvalid, "%s: %w", label, err).WithHint("make the file system without that feature")
	}
	var known *banger.Error
	if errors.As(err, &known) {
		return err
	}
	return banger.Errorf(banger.CodeInvalid, "%s: %w", label, err).WithHint("it must be an ext4 file system that is not mounted; nothing of it was changed")
}

// A name that the user chose: what a reference may hold, and no white space.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$`)

// maxNameBytes is beyond any full reference to a registry.
const maxNameBytes = 512

func checkName(name string) error {
	if len(name) > maxNameBytes || !namePattern.MatchString(name) {
		return banger.Errorf(banger.CodeUsage, "image name %q: it begins with a letter or digit, and goes on with those and . _ : / @ + -", clip(name)).
			WithHint("choose another with --name")
	}
	return nil
}

func clip(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
