package ext4

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"banger/ext4/internal/disk"
)

const (
	// copyChunkBytes go between two looks at the context.
	copyChunkBytes = 4 << 20
	// copyPrefix begins the name of a half-made copy, see CopyFile.
	copyPrefix = ".ext4copy-"
)

// errImageChanged is not worth a name outside: to copy again is all one can do.
var errImageChanged = errors.New("the image changed while it was copied: stop what writes to it")

// CopyFile copies a disk image, the regular file src, to dst, which must not
// exist, not even as a dangling symlink. The copy has the bytes, the size and
// the holes of src, and mode 0600 (less the umask) whatever the mode of src,
// since a disk holds what its owner told nobody else.
//
// Where the file system can, the copy shares the blocks of src (a reflink, as
// on XFS and Btrfs). Elsewhere data is copied extent by extent inside the
// kernel, and where that is refused, block by block, with blocks of zeros
// becoming holes. Blocks reserved and never written become holes too, unless
// they were read just before and stand in the page cache.
//
// Nobody may write to src meanwhile: an error if its size or its modification
// time show it.
//
// dst appears at once, complete and on stable storage, or not at all: it is
// made as a file without a name, which goes with its maker. Where the file
// system has no such files (NFS, say) it has the name .ext4copy-* in the
// directory of dst instead; that is all a killed process leaves, and it may be
// removed once no copy is under way. dst needs a file system with one or the
// other: O_TMPFILE or hard links.
//
// An error wraps the reason: [fs.ErrExist], [syscall.ENOSPC], the error of ctx.
// After an error dst is as it was before. Data is copied with a look at ctx
// every 4 MiB; an fsync and a reflink are not interrupted.
func CopyFile(ctx context.Context, dst, src string) error {
	return (&copying{ctx: ctx}).run(dst, src)
}

// copying is one CopyFile:
//
//	open ─> O_TMPFILE ────────> FICLONE ──────────────────> fsync ─> link ─> fsync of the directory
//	          │                    │                          ^
//	          └─> create a name ─┘ └─> SEEK_DATA, copy ─┬─────┤
//	                                                    │     │
//	                                                    └─> read, write
//
// A step down is taken where the file system refuses; any other error ends
// it, and what was made goes.
type copying struct {
	ctx       context.Context
	src       *os.File
	dst       *os.File
	sizeBytes int64
	modTime   time.Time
	sparse    bool // src has fewer blocks than its size asks for

	// fault is a test's: called before each operation, its error takes the
	// place of the operation.
	fault func(operation string) error
}

// do is one operation. Its name is part of the error.
func (c *copying) do(operation string, f func() error) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if c.fault != nil {
		if err := c.fault(operation); err != nil {
			return fmt.Errorf("%s: %w", operation, err)
		}
	}
	if err := f(); err != nil {
		// The path is in the error already.
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			err = e.Err
		} else if e, ok := errors.AsType[*os.LinkError](err); ok {
			err = e.Err
		}
		return fmt.Errorf("%s: %w", operation, err)
	}
	return nil
}

func (c *copying) run(dst, src string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("disk image %q: copy to %q: %w", src, dst, err)
		}
		if c.src != nil {
			c.src.Close()
		}
	}()
	if err := c.do("open the image", func() error { return c.open(src) }); err != nil {
		return err
	}
	dirName, name := filepath.Split(dst)
	if name == "" {
		return errors.New("the destination is not the name of a file")
	}
	// Names are relative to an open directory from here on: should it move,
	// what was made is still found, and removed.
	var root *os.Root
	if err := c.do("open the directory", func() (err error) {
		root, err = os.OpenRoot(cmp.Or(dirName, "."))
		return err
	}); err != nil {
		return err
	}
	defer root.Close()
	var dir *os.File
	if err := c.do("open the directory", func() (err error) {
		dir, err = root.Open(".")
		return err
	}); err != nil {
		return err
	}
	defer dir.Close()
	// Only the link decides; but why copy first?
	if err := c.do("look for the destination", func() error {
		_, err := root.Lstat(name)
		switch {
		case err == nil:
			return fs.ErrExist
		case errors.Is(err, fs.ErrNotExist):
			return nil
		}
		return err
	}); err != nil {
		return err
	}

	var names []string // of what is being made
	defer func() {
		if c.dst != nil {
			c.dst.Close() // the fsync has told what there is to tell
		}
		if err != nil {
			for _, n := range names {
				root.Remove(n)
			}
		}
	}()
	// Whatever the reason that there can be no file without a name, if it
	// is more than that it comes up again with the next one.
	if err := c.do("O_TMPFILE", func() (err error) {
		c.dst, err = createUnnamed(root)
		return err
	}); err != nil {
		if err := c.do("create", func() (err error) {
			tmp := copyPrefix + rand.Text()
			c.dst, err = root.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
			if err == nil {
				names = append(names, tmp)
			}
			return err
		}); err != nil {
			return err
		}
	}
	if err := c.copy(); err != nil {
		return err
	}
	if err := c.do("look at the image again", func() error {
		info, err := c.src.Stat()
		if err == nil && (info.Size() != c.sizeBytes || !info.ModTime().Equal(c.modTime)) {
			err = errImageChanged
		}
		return err
	}); err != nil {
		return err
	}
	if err := c.do("fsync", c.dst.Sync); err != nil {
		return err
	}
	if err := c.do("link", func() error {
		if len(names) == 0 {
			return linkUnnamed(c.dst, dir, name)
		}
		return root.Link(names[0], name)
	}); err != nil {
		return err
	}
	names = append(names, name)
	if len(names) == 2 {
		if err := c.do("unlink", func() error { return root.Remove(names[0]) }); err != nil {
			return err
		}
	}
	return c.do("fsync the directory", func() error {
		if runtime.GOOS == "windows" { // has no such thing
			return nil
		}
		return dir.Sync()
	})
}

// open opens the source, and neither waits for a FIFO's writer nor wakes a
// device.
func (c *copying) open(src string) error {
	regular := func(info fs.FileInfo, err error) (fs.FileInfo, error) {
		if err == nil && !info.Mode().IsRegular() {
			err = errors.New("not a regular file")
		}
		return info, err
	}
	if _, err := regular(os.Stat(src)); err != nil {
		return err
	}
	f, err := os.OpenFile(src, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return err
	}
	c.src = f
	info, err := regular(f.Stat())
	if err != nil {
		return err
	}
	c.sizeBytes, c.modTime, c.sparse = info.Size(), info.ModTime(), hasHoles(info)
	return nil
}

// copy gives dst the bytes of src in the best way that is not refused. A way
// that failed half-way has left nothing that the next one does not overwrite
// with the same.
func (c *copying) copy() error {
	if c.do("FICLONE", func() error { return reflink(c.dst, c.src) }) == nil {
		return nil
	}
	if err := c.do("set the size", func() error { return c.dst.Truncate(c.sizeBytes) }); err != nil {
		return err
	}
	at := int64(0)
	for at < c.sizeBytes {
		var start, end int64
		err := c.do("SEEK_DATA", func() (err error) {
			start, end, err = nextData(c.src, at)
			return err
		})
		end = min(end, c.sizeBytes)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil || start < at || end <= start:
			return c.blocks(at)
		case c.sparse && start == 0 && end == c.sizeBytes:
			// All data, says a file system that has given fewer
			// blocks than that: it only does not know its holes.
			return c.blocks(at)
		}
		if err := c.extent(start, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// extent copies a range in which src has no holes.
func (c *copying) extent(start, end int64) error {
	if err := c.do("seek", func() error {
		_, err := c.src.Seek(start, io.SeekStart)
		if err == nil {
			_, err = c.dst.Seek(start, io.SeekStart)
		}
		return err
	}); err != nil {
		return err
	}
	for left := end - start; left > 0; {
		n := min(left, copyChunkBytes)
		if err := c.do("copy", func() error {
			// copy_file_range(2), or read and write where that
			// is refused.
			got, err := c.dst.ReadFrom(&io.LimitedReader{R: c.src, N: n})
			if err == nil && got < n {
				err = errImageChanged
			}
			return err
		}); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

// blocks copies the rest of src from at on, less its blocks of zeros.
func (c *copying) blocks(at int64) error {
	buf := make([]byte, len(zeros))
	for at < c.sizeBytes {
		b := buf[:min(int64(len(buf)), c.sizeBytes-at)]
		if err := c.do("read", func() error {
			_, err := c.src.ReadAt(b, at)
			if err == io.EOF {
				err = errImageChanged
			}
			return err
		}); err != nil {
			return err
		}
		for from := 0; from < len(b); {
			to := from
			for to < len(b) {
				block := b[to:min(to+disk.BlockSize, len(b))]
				if bytes.Equal(block, zeros[:len(block)]) {
					break
				}
				to += len(block)
			}
			if to > from {
				if err := c.do("write", func() error {
					_, err := c.dst.WriteAt(b[from:to], at+int64(from))
					return err
				}); err != nil {
					return err
				}
			}
			from = to + disk.BlockSize
		}
		at += int64(len(b))
	}
	return nil
}
