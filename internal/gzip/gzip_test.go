package gzip

import (
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"testing"

	rival "github.com/klauspost/compress/gzip"
)

// text is bytes that compress about as well as programs do: short words of a
// skewed alphabet, some of them come before.
func text(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	out := make([]byte, 0, size+512)
	for len(out) < size {
		if n := len(out); n > 1000 && r.IntN(3) > 0 {
			from := n - 1 - r.IntN(min(n-1, 40_000))
			out = append(out, out[from:min(n, from+3+r.IntN(1+r.IntN(60)))]...)
			continue
		}
		for range 1 + r.IntN(8) {
			out = append(out, byte(r.IntN(1+r.IntN(256))))
		}
	}
	return out[:size]
}

func pack(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRead(t *testing.T) {
	for _, size := range []int{0, 1, 100, windowBytes - 1, windowBytes, windowBytes + 1, 1 << 20} {
		data := text(1, size)
		for level := gzip.HuffmanOnly; level <= gzip.BestCompression; level++ {
			packed := pack(t, data, level)
			for _, buf := range []int{1, 7, fastOut, 4096, windowBytes + 1, 256 << 10} {
				var got bytes.Buffer
				if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, NewReader(bytes.NewReader(packed)), make([]byte, buf)); err != nil {
					t.Fatalf("%d bytes, level %d, by %d: %v", size, level, buf, err)
				}
				if !bytes.Equal(got.Bytes(), data) {
					t.Fatalf("%d bytes, level %d, by %d: what came is something else", size, level, buf)
				}
			}
		}
	}
}

func BenchmarkRead(b *testing.B) {
	data := text(1, 64<<20)
	packed := pack(b, data, gzip.DefaultCompression)
	for _, c := range []struct {
		name string
		open func(io.Reader) (io.Reader, error)
	}{
		{"ours", func(r io.Reader) (io.Reader, error) { return NewReader(r), nil }},
		{"klauspost", func(r io.Reader) (io.Reader, error) { return rival.NewReader(r) }},
		{"compress", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			buf := make([]byte, 256<<10)
			for b.Loop() {
				r, err := c.open(bytes.NewReader(packed))
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf); err != nil || n != int64(len(data)) {
					b.Fatal(n, err)
				}
			}
		})
	}
}
