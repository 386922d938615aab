package ext4

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"banger/ext4/internal/disk"
)

// editPrefix begins the name of a copy that is to take the place of an image.
const editPrefix = ".ext4edit-"

// ErrInUse is wrapped by the error of an edit of an image that somebody has
// open: mounted through a loop device, or locked, as QEMU locks its disks.
var ErrInUse = errors.New("the image is in use")

// Edit changes the file system in the image at path, all or nothing: change is
// called with an [Editor], and what it did is in the image if and only if Edit
// gives no error. When the process is killed, the machine loses its power, the
// disk is full or a write fails, the image has the old state or the new one,
// never anything between; after an error of the image itself it may be either.
// Both are states that e2fsck and the kernel are content with, once they have
// replayed the journal.
//
// The change goes through the image's own journal, and the image stays the
// same file. Where there is none, or the change is larger than it holds, a copy
// of the image beside it (.ext4edit-*, with the same mode and owner) is changed
// and takes its place. Killed in between, the copy stays and may be removed.
//
// now becomes the time of what is changed and made; the zero Time leaves times
// as they are and gives what is new 1970.
//
// Any ext2, ext3 or ext4 image will do that mke2fs or a [Writer] made, if it was
// unmounted cleanly or has a journal, which is replayed first. Refused are
// images with errors noted in them, with features that an edit would not keep
// right ([errors.ErrUnsupported], with their names), and those in use
// ([ErrInUse]). Two edits of one image exclude each other.
func Edit(ctx context.Context, path string, now time.Time, change func(*Editor) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("image %q: %w", path, err)
		}
	}()
	f, err := os.OpenFile(path, os.O_RDWR|openNonblock, 0)
	if err != nil {
		return reason(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return reason(err)
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	if err := claim(f, info); err != nil {
		return err
	}
	e, err := newEditor(f, now)
	if err != nil {
		return err
	}
	if size := e.fs.SizeBytes(); info.Size() < size {
		return corrupt("%d bytes, of a file system of %d", info.Size(), size)
	}
	if err := change(e); err != nil {
		return err
	}
	if err := errors.Join(e.broken, ctx.Err()); err != nil {
		return err
	}
	err = e.commit()
	if !errors.Is(err, errTooLarge) {
		return err
	}
	return e.commitCopy(ctx, path, info)
}

// reason is an error of the file without its name, which the caller adds.
func reason(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}

// commitCopy makes the change in a copy that takes the image's place.
func (e *Editor) commitCopy(ctx context.Context, path string, info os.FileInfo) (err error) {
	// The image may be reached by a symlink, which stays.
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return reason(err)
	}
	copied := filepath.Join(filepath.Dir(path), editPrefix+rand.Text())
	if err := CopyFile(ctx, copied, path); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(copied)
		}
	}()
	f, err := os.OpenFile(copied, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := keepOwner(f, info); err != nil {
		return err
	}
	if err := f.Chmod(info.Mode().Perm()); err != nil {
		return err
	}
	if err := e.apply(f); err != nil {
		return err
	}
	if err := os.Rename(copied, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// superBlock is the block that the superblock lies in.
func (f *FS) superBlock() uint64 { return disk.SuperblockOffset / uint64(f.geo.blockSize) }
