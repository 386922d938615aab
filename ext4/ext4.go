// Package ext4 writes, reads, edits, compares and copies ext4 file-system
// images without mount, root or e2fsprogs, using the standard library only.
//
// # Writing
//
// File bytes are streamed once, straight to their final place in the image,
// before anything need be known about names:
//
//	w, err := ext4.NewWriter(f, ext4.Options{})
//	c, err := w.Place(r, sizeBytes)
//
// The tree comes later, in any order that has parents before children:
//
//	err = w.Add("etc", &ext4.Inode{Mode: 0o40755})
//	err = w.Add("etc/hosts", &ext4.Inode{Mode: 0o100644, Content: c})
//
// and everything else is written by Finish, which also fixes the size:
//
//	err = w.Finish(ext4.Params{SizeBytes: 1 << 30, UUID: id, Time: t})
//
// The image is a function of the calls and their arguments alone: no clock,
// no random numbers, no map order. What it looks like inside is described in
// docs/ext4.md.
//
// # Reading
//
// [Open] gives an [FS], which is an [io/fs.FS], over any [io.ReaderAt] with an
// ext2, ext3 or ext4 file system:
//
//	fsys, err := ext4.Open(f)
//	b, err := fs.ReadFile(fsys, "etc/hosts")
//
// # Editing
//
// [Edit] changes an image that anybody made, all or nothing:
//
//	err := ext4.Edit(ctx, "root.img", time.Now(), func(e *ext4.Editor) error {
//		return e.Put("etc/hosts", &ext4.Inode{Mode: 0o100644}, r, sizeBytes)
//	})
//
// # And the rest
//
// [Compare] tells how two trees differ, [Writer.AddTree] takes a tree from an
// image into another, and [CopyFile] copies an image, as cheaply as the host's
// file system can.
package ext4

import (
	"errors"
	"fmt"
	"io"
	"time"

	"banger/ext4/internal/disk"
)

// Limits. Where ext4 itself has the limit, it is the kernel's.
const (
	// MaxImageBytes is the largest image: 2^32-1 blocks of 4 KiB.
	MaxImageBytes = (1<<32 - 1) * disk.BlockSize
	// MinImageBytes is the smallest one.
	MinImageBytes = 1 << 20
	// MaxFileBytes is the largest file, holes included (block numbers
	// within a file have 32 bits, and the last is never used).
	MaxFileBytes = (1<<32 - 1) * disk.BlockSize
	// MaxNameBytes is the longest name of a directory entry.
	MaxNameBytes = 255
	// MaxTargetBytes is the longest symlink target.
	MaxTargetBytes = disk.BlockSize - 1
	// MaxXattrBytes is the largest value of an xattr (XATTR_SIZE_MAX).
	MaxXattrBytes = 64 << 10
	// MaxLinks is the largest number of names of a file. Directories may
	// hold more subdirectories than that; their link count then reads 1.
	MaxLinks = 65000

	defaultMaxSizeBytes = 1 << 40
)

// ErrNoSpace is wrapped by the error of a Finish whose SizeBytes is too small
// (a *SpaceError), and by that of a Place beyond Options.MaxSizeBytes.
var ErrNoSpace = errors.New("no space left in the image")

// A SpaceError is returned by Finish before anything was written. The Writer
// is as usable as before.
type SpaceError struct {
	SizeBytes int64 // what was asked for
	NeedBytes int64 // what would be accepted; 0 if nothing would
}

func (e *SpaceError) Error() string {
	if e.NeedBytes == 0 {
		return fmt.Sprintf("image of %d bytes: %v, and the largest size allowed is not enough", e.SizeBytes, ErrNoSpace)
	}
	return fmt.Sprintf("image of %d bytes: %v: at least %d bytes are needed", e.SizeBytes, ErrNoSpace, e.NeedBytes)
}

func (e *SpaceError) Unwrap() error { return ErrNoSpace }

// A File receives the image. *os.File is one; on Linux dead bytes in an
// *os.File become holes, and so they do in a [HolePuncher]. In any other File
// they are overwritten with zeros.
// What was never written must read as zeros below the size set by Truncate.
type File interface {
	io.WriterAt
	Truncate(sizeBytes int64) error
}

// A HolePuncher is a File that makes its holes itself, and so learns of them.
type HolePuncher interface {
	File
	// PunchHole makes bytes of the file read as zeros and leaves its size.
	// After an error zeros are written there.
	PunchHole(offset, lengthBytes int64) error
}

// Options are fixed before the first byte is placed.
type Options struct {
	// MaxSizeBytes is an upper bound of Params.SizeBytes, at most
	// MaxImageBytes; 0 means 1 TiB. It dimensions the room kept free for
	// group descriptors: 1 block for every 8 GiB, in each of the few
	// groups that hold a backup. Room not needed in the end is not lost.
	MaxSizeBytes int64
}

// Params are fixed by Finish.
type Params struct {
	// SizeBytes is the size of the image. A tail too small to be of use
	// to the file system is left alone by it.
	SizeBytes int64
	// Inodes is the least number of inodes there will be, used ones
	// included. 0 means one for each InodeRatio bytes of the image.
	Inodes uint32
	// InodeRatio is in bytes; 0 means what mke2fs takes: 4096 for images
	// below 512 MiB, else 16384.
	InodeRatio int64
	// UUID must not be zero. Part of every checksum.
	UUID [16]byte
	// HashSeed decides the order of entries in large directories.
	HashSeed [16]byte
	// UnsignedHash makes the order that of machines whose char is unsigned,
	// as mke2fs does there. Either is right everywhere.
	UnsignedHash bool
	// Label is the volume name, at most 16 bytes.
	Label string
	// Time is when the file system was made, and the time of every inode
	// that says nothing else. The zero Time means 1970.
	Time time.Time
	// JournalBytes is the size of the journal: 0 for what mke2fs takes for
	// SizeBytes (none below 8 MiB; the next smaller one if content leaves
	// no room), less than 0 for none, else from 4 MiB to 40 GB.
	JournalBytes int64
	// ReservedBlocksPercent of the blocks are for root only; 0 to 50.
	ReservedBlocksPercent int
}

// Format writes an empty file system: root gives the attributes of the root
// directory; nil means mode 0755 of 0:0. The cost hardly depends on the size.
func Format(f File, p Params, root *Inode) error {
	w, err := NewWriter(f, Options{MaxSizeBytes: p.SizeBytes})
	if err != nil {
		return err
	}
	if root != nil {
		if err := w.Add("/", root); err != nil {
			return err
		}
	}
	return w.Finish(p)
}

// dirHash is how names are hashed.
func (p *Params) dirHash() dirHash {
	return dirHash{version: hashHalfMD4, unsigned: p.UnsignedHash, state: hashSeed(p.HashSeed)}
}

// check refuses what no image can have, and rounds nothing.
func (p *Params) check() error {
	switch {
	case p.InodeRatio != 0 && (p.InodeRatio < 1024 || p.InodeRatio > 64<<20):
		return fmt.Errorf("inode ratio %d: not between 1 KiB and 64 MiB", p.InodeRatio)
	case p.UUID == [16]byte{}:
		return errors.New("uuid: must not be zero")
	case len(p.Label) > 16:
		return fmt.Errorf("label %q: longer than 16 bytes", p.Label)
	case p.JournalBytes > 0 && (p.JournalBytes < minJournalBlocks*disk.BlockSize || p.JournalBytes > maxJournalBlocks*disk.BlockSize):
		return fmt.Errorf("journal of %d bytes: not between 4 MiB and %d", p.JournalBytes, int64(maxJournalBlocks*disk.BlockSize))
	case p.ReservedBlocksPercent < 0 || p.ReservedBlocksPercent > 50:
		return fmt.Errorf("reserved blocks %d%%: not between 0 and 50", p.ReservedBlocksPercent)
	}
	for i := range len(p.Label) {
		if p.Label[i] == 0 {
			return fmt.Errorf("label %q: holds a NUL", p.Label)
		}
	}
	if _, err := timestamp(p.Time); err != nil {
		return fmt.Errorf("time of the file system: %w", err)
	}
	return nil
}
