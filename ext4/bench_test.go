//go:build linux

package ext4

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// benchFile is a File that is the same from round to round.
func benchFile(b *testing.B) *os.File {
	f, err := os.Create(filepath.Join(b.TempDir(), "image"))
	must(b, err)
	b.Cleanup(func() { f.Close() })
	return f
}

func BenchmarkFormat16GiB(b *testing.B) { benchmarkFormat(b, 16<<30) }
func BenchmarkFormat1TiB(b *testing.B)  { benchmarkFormat(b, 1<<40) }

func benchmarkFormat(b *testing.B, size int64) {
	f := benchFile(b)
	for b.Loop() {
		must(b, Format(f, params(size), nil))
	}
}

// One directory: the time for an entry must not grow with their number.
func BenchmarkDirectory(b *testing.B) {
	for _, n := range []int{10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			f := benchFile(b)
			p := params(8 << 30)
			p.Inodes = uint32(n) + 100
			for b.Loop() {
				w, err := NewWriter(f, Options{})
				must(b, err)
				must(b, w.Add("d", &Inode{Mode: 0o040755}))
				for i := range n {
					must(b, w.Add(fmt.Sprintf("d/message-%07d.eml", i), &Inode{Mode: 0o100644}))
				}
				must(b, w.Finish(p))
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/entry")
		})
	}
}

// Many small files in directories of 50, against writing as many bytes at the
// same block boundaries to one file: the difference is the file system.
func BenchmarkSmallFiles(b *testing.B) {
	const files, size = 20_000, 12_000
	body := bytes.Repeat([]byte("not zero "), size/9+1)[:size]
	b.Run("ext4", func(b *testing.B) {
		f := benchFile(b)
		b.SetBytes(files * size)
		b.ReportAllocs()
		for b.Loop() {
			w, err := NewWriter(f, Options{})
			must(b, err)
			var r bytes.Reader
			for i := range files {
				dir := fmt.Sprintf("d%d", i/50)
				if i%50 == 0 {
					must(b, w.Add(dir, &Inode{Mode: 0o040755}))
				}
				r.Reset(body)
				c, err := w.Place(&r, size)
				must(b, err)
				must(b, w.Add(fmt.Sprintf("%s/f%d", dir, i), &Inode{Mode: 0o100644, Content: c}))
			}
			must(b, w.Finish(params(1<<30)))
		}
	})
	b.Run("bytes-only", func(b *testing.B) {
		f := benchFile(b)
		b.SetBytes(files * size)
		padded := make([]byte, (size+4095)/4096*4096)
		copy(padded, body)
		for b.Loop() {
			must(b, f.Truncate(0))
			buf := make([]byte, 0, 1<<20)
			at := int64(0)
			for range files {
				if len(buf)+len(padded) > cap(buf) {
					_, err := f.WriteAt(buf, at)
					must(b, err)
					at += int64(len(buf))
					buf = buf[:0]
				}
				buf = append(buf, padded...)
			}
			_, err := f.WriteAt(buf, at)
			must(b, err)
		}
	})
}
