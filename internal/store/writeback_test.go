package store

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cached is how many bytes of a file are in memory, and how many of these the
// kernel has not begun to write out.
func cached(t *testing.T, f *os.File) (all, dirty int64) {
	t.Helper()
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &stat, 0); err != nil {
		t.Skipf("SKIPPED: the kernel (Linux 6.5 and newer) does not say what is dirty: %v", err)
	}
	page := int64(os.Getpagesize())
	return int64(stat.Cache) * page, int64(stat.Dirty) * page
}

func TestWriteback(t *testing.T) {
	var fs unix.Statfs_t
	if err := unix.Statfs(t.TempDir(), &fs); err != nil {
		t.Fatal(err)
	} else if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("SKIPPED: temporary files have no disk here (tmpfs)")
	}
	for _, forget := range []bool{false, true} {
		f, err := os.Create(t.TempDir() + "/file")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		w := NewWriteback(f, forget)
		const size = 8*writebackBytes + 1<<20
		part := make([]byte, 1<<20)
		for off := int64(0); off < size; off += int64(len(part)) {
			if forget && off%writebackBytes == 0 {
				if err := f.Sync(); err != nil { // no disk is behind
					t.Fatal(err)
				}
			}
			n, err := f.WriteAt(part, off)
			if err != nil {
				t.Fatal(err)
			}
			w.Wrote(off, n)
		}
		end := time.Now().Add(5 * time.Second) // the kernel by itself waits 30
		all, dirty := cached(t, f)
		for ; dirty > writebackBytes; _, dirty = cached(t, f) {
			if time.Now().After(end) {
				t.Fatalf("forget %v: %d bytes are dirty still", forget, dirty)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if forget && all > 3*writebackBytes || !forget && all <= 3*writebackBytes {
			t.Errorf("forget %v: %d bytes are in memory", forget, all)
		}
		got, err := os.ReadFile(f.Name())
		if err != nil || len(got) != size {
			t.Errorf("forget %v: it has %d bytes, %v", forget, len(got), err)
		}
	}
}
