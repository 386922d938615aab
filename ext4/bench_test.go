//go:build linux

package ext4

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"banger/ext4/internal/e2fs"
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

// An overlay disk after a short life, 512 MiB with 500 KiB of data in 125
// places, beside what else copies files. Every copy is fsynced, and its
// removal is part of the round.
func BenchmarkCopyFile(b *testing.B) {
	dir := b.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	s := diskImage{sizeBytes: 512 << 20}
	for i := range int64(125) {
		s.pieces = append(s.pieces, piece{i << 22, letters(4096)})
	}
	s.write(b, src)
	sync := func(b *testing.B) {
		f, err := os.Open(dst)
		must(b, err)
		must(b, f.Sync())
		must(b, f.Close())
	}
	bench := func(name string, copy func(b *testing.B)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				copy(b)
				must(b, os.Remove(dst))
			}
		})
	}
	bench("CopyFile", func(b *testing.B) { must(b, CopyFile(context.Background(), dst, src)) })
	bench("CopyFile-blocks", func(b *testing.B) { must(b, copyRefusing(dst, src, copyWays["blocks"]...)) })
	for _, option := range []string{"--reflink=never", "--sparse=always"} {
		cp := e2fs.Tool(b, "cp")
		bench("cp"+option, func(b *testing.B) {
			if out, err := exec.Command(cp, option, src, dst).CombinedOutput(); err != nil {
				b.Fatalf("cp: %v: %s", err, out)
			}
			sync(b)
		})
	}
	bench("io.Copy", func(b *testing.B) {
		from, err := os.Open(src)
		must(b, err)
		defer from.Close()
		to, err := os.Create(dst)
		must(b, err)
		defer to.Close()
		_, err = io.Copy(to, from)
		must(b, err)
		sync(b)
	})
}
