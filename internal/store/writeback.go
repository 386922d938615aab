package store

import (
	"os"

	"golang.org/x/sys/unix"
)

// writebackBytes is how much of a file that grows may wait for the disk.
const writebackBytes = 8 << 20

// Writeback has the kernel write out a file while it grows, so that the fsync
// at its end finds little left to do. It promises nothing and waits for
// nothing, unless the disk is behind; an error is the fsync's to tell.
type Writeback struct {
	f        *os.File
	forget   bool
	from, to int64 // written, and the kernel was not told
	before   int64 // where the part before that begins
}

// NewWriteback is told of all that is written to f from now on. forget is for a
// file that nobody will soon read: what is on the disk leaves memory, which the
// rest of the file then uses again.
func NewWriteback(f *os.File, forget bool) *Writeback { return &Writeback{f: f, forget: forget} }

// Wrote tells of n bytes that were written at off. Only what follows the last
// write is sure to be written out early.
func (w *Writeback) Wrote(off int64, n int) {
	if off != w.to {
		w.from, w.before = off, off
	}
	if w.to = off + int64(n); w.to-w.from < writebackBytes {
		return
	}
	fd := int(w.f.Fd())
	_ = unix.SyncFileRange(fd, w.from, w.to-w.from, unix.SYNC_FILE_RANGE_WRITE)
	if w.forget && w.before < w.from { // no length would be all of the file
		// By now on the disk, if that keeps up; what is not stays.
		_ = unix.Fadvise(fd, w.before, w.from-w.before, unix.FADV_DONTNEED)
	}
	w.before, w.from = w.from, w.to
}
