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
	from, to int64 // written, and the kernel was not told
}

// NewWriteback is for a file that is new or not written to yet.
func NewWriteback(f *os.File) *Writeback { return &Writeback{f: f} }

// Wrote tells of n bytes that were written at off. Only what follows the last
// write is sure to be written out early.
func (w *Writeback) Wrote(off int64, n int) {
	if off != w.to {
		w.from = off
	}
	if w.to = off + int64(n); w.to-w.from >= writebackBytes {
		_ = unix.SyncFileRange(int(w.f.Fd()), w.from, w.to-w.from, unix.SYNC_FILE_RANGE_WRITE)
		w.from = w.to
	}
}
