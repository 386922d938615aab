package store

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dirty is how many bytes of a file the kernel has not begun to write out.
func dirty(t *testing.T, f *os.File) int64 {
	t.Helper()
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0); err != nil {
		t.Skipf("SKIPPED: the kernel (Linux 6.5 and newer) does not say what is dirty: %v", err)
	}
	return int64(stat.Dirty) * int64(os.Getpagesize())
}

func TestWriteback(t *testing.T) {
	var fs unix.Statfs_t
	if err := unix.Statfs(t.TempDir(), &fs); err != nil {
		t.Fatal(err)
	} else if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("SKIPPED: temporary files have no disk here (tmpfs)")
	}
	f, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriteback(f)
	part := make([]byte, 1<<20)
	for off := int64(0); off <= 8*writebackBytes; off += int64(len(part)) {
		n, err := f.WriteAt(part, off)
		if err != nil {
			t.Fatal(err)
		}
		w.Wrote(off, n)
	}
	end := time.Now().Add(5 * time.Second) // the kernel by itself waits 30
	for dirty(t, f) > writebackBytes {
		if time.Now().After(end) {
			t.Fatalf("%d bytes are dirty still", dirty(t, f))
		}
		time.Sleep(10 * time.Millisecond)
	}
}
