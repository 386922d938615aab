package gzip

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

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

func noise(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	out := make([]byte, size)
	for i := range out {
		out[i] = byte(r.Uint32())
	}
	return out
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

// What drain reads into, and what is there before.
var (
	scratch = make([]byte, 1<<20+1)
	poison  = bytes.Repeat([]byte{0xa5}, len(scratch))
)

// drain reads until an error or more than limit bytes, by buffers of those
// sizes, and holds the Reader to what it says of itself: no bytes with an
// error, no error that goes away, all of the buffer unless the stream ends.
func drain(t testing.TB, z *Reader, limit int, size func() int) (out []byte, err error) {
	t.Helper()
	for len(out) <= limit {
		n := size()
		buf := scratch[:n+1]
		copy(buf, poison) // so that nothing right is left of the last Read
		got, err := z.Read(buf[:n])
		if buf[n] != poison[n] {
			t.Fatalf("Read of %d bytes wrote behind them", n)
		}
		if err != nil {
			if got != 0 {
				t.Fatalf("Read gave %d bytes and %v", got, err)
			}
			for _, p := range [][]byte{nil, buf, buf[:1]} {
				if got, again := z.Read(p); got != 0 || again != err {
					t.Fatalf("Read after %v: %d, %v", err, got, again)
				}
			}
			return out, err
		}
		if got > n || got == 0 && n > 0 || got < n && z.err == nil {
			t.Fatalf("Read of %d bytes gave %d and no error", n, got)
		}
		out = append(out, buf[:got]...)
	}
	return out[:limit], naiveLimit
}

func always(n int) func() int { return func() int { return n } }

// first is n, and then always rest.
func first(n, rest int) func() int {
	return func() int {
		m := n
		n = rest
		return m
	}
}

// wants compares with what should have come. Errors are compared by what
// callers tell them apart by.
func wants(t testing.TB, what string, got []byte, err error, want []byte, wantErr error) {
	t.Helper()
	if !sameError(err, wantErr) {
		t.Errorf("%s: %v, not %v", what, err, wantErr)
	}
	if !bytes.Equal(got, want) {
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		t.Errorf("%s: %d bytes, not %d; they differ from %d on", what, len(got), len(want), i)
	}
}

func sameError(a, b error) bool {
	if errors.Is(b, ErrCorrupt) {
		return errors.Is(a, ErrCorrupt)
	}
	return a == b
}

func TestRead(t *testing.T) {
	for _, size := range []int{0, 1, 100, windowBytes - 1, windowBytes, windowBytes + 1, 300_000} {
		data := text(1, size)
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestSpeed, gzip.DefaultCompression} {
			packed := pack(t, data, level)
			for _, buf := range []int{1, 7, fastOut - 1, fastOut, fastOut + 1, 4096, windowBytes - 1, windowBytes, windowBytes + 1, 256 << 10} {
				if buf < 100 && size > 2*windowBytes {
					continue // each Read moves the window
				}
				got, err := drain(t, NewReader(bytes.NewReader(packed)), size, always(buf))
				wants(t, fmt.Sprintf("%d bytes, level %d, by %d", size, level, buf), got, err, data, io.EOF)
			}
		}
	}
}

// mixed is a short stream that has every part there is, and where its first
// member ends.
func mixed() (*writer, int) {
	w := &writer{}
	w.header(flagHeaderCRC|1, []byte("extra"), []byte("name"), []byte("comment"))
	w.stored(more, text(2, 40))
	w.fixed(more)
	w.lits(text(3, 300)...)
	w.match(258, 1)
	w.match(13, 33)
	w.end()
	r := rand.New(rand.NewPCG(1, 0))
	w.dynamic(more, wholeCode(r, 286, 15), wholeCode(r, 30, 15)) // codes of 15 bits in both
	for i := range 256 {
		w.lits(byte(i))
	}
	w.match(258, 200)
	w.match(3, 4)
	w.match(131, 600)
	w.end()
	w.stored(last, nil)
	w.trailer()
	cut := len(w.out)
	w.header(0, nil, nil, []byte("second"))
	p := w.precode(last, 257, 1, plainPrecode)
	p.zerosAll(97)
	p.length(1)
	p.zerosAll(158)
	p.length(1)
	p.length(0)
	w.setCodes(append(append(make([]uint8, 97), 1), append(make([]uint8, 158), 1)...), []uint8{0})
	w.lits([]byte("aaaaaaaaaaaaaaaaaaaaaaa")...)
	w.end()
	w.trailer()
	return w, cut
}

// sources are ways to hand a stream out.
var sources = []struct {
	name string
	of   func(io.Reader) io.Reader
}{
	{"whole", func(r io.Reader) io.Reader { return r }},
	{"by one byte", iotest.OneByteReader},
	{"by halves", iotest.HalfReader},
	{"error with the data", iotest.DataErrReader},
	{"error with the last byte", func(r io.Reader) io.Reader { return iotest.DataErrReader(iotest.OneByteReader(r)) }},
	{"with empty reads", func(r io.Reader) io.Reader { return &stutter{r: r} }},
}

// stutter gives nothing 99 times before every byte.
type stutter struct {
	r io.Reader
	n int
}

func (s *stutter) Read(p []byte) (int, error) {
	if s.n = (s.n + 1) % 100; s.n != 0 {
		return 0, nil
	}
	return s.r.Read(p[:1])
}

func TestSources(t *testing.T) {
	w, _ := mixed()
	long := pack(t, noise(1, 3*inputBytes), gzip.HuffmanOnly) // refills its buffer
	for _, source := range sources {
		for _, buf := range []int{1, 300, 1 << 20} {
			got, err := drain(t, NewReader(source.of(bytes.NewReader(w.out))), 1<<20, always(buf))
			wants(t, fmt.Sprintf("%s, by %d", source.name, buf), got, err, w.data, io.EOF)
		}
		got, err := drain(t, NewReader(source.of(bytes.NewReader(long))), 1<<20, always(1<<20))
		wants(t, source.name+", long", got, err, noise(1, 3*inputBytes), io.EOF)
	}
}

// TestCut ends a stream after every byte: as a file that is cut short does, and
// as a source that breaks. All that the bytes say still comes.
func TestCut(t *testing.T) {
	w, second := mixed()
	broken := errors.New("broken")
	for n := range len(w.out) + 1 {
		cut := w.out[:n]
		want, wantErr := naive(cut, 1<<20)
		if !bytes.HasPrefix(w.data, want) {
			t.Fatalf("after %d bytes the naive reader has other bytes", n)
		}
		// Between two members and behind the last nothing is missing.
		if whole := n == second || n == len(w.out); whole != (wantErr == io.EOF) || !whole && wantErr != io.ErrUnexpectedEOF {
			t.Fatalf("after %d bytes the naive reader says %v", n, wantErr)
		}
		for i, source := range sources {
			if i > 0 && i != n%len(sources) {
				continue // in turn
			}
			for _, buf := range []int{1, 64, 4096} {
				if buf == 1 && n%8 != 0 {
					continue // slow
				}
				got, err := drain(t, NewReader(source.of(bytes.NewReader(cut))), 1<<20, always(buf))
				wants(t, fmt.Sprintf("%d bytes, %s, by %d", n, source.name, buf), got, err, want, wantErr)
			}
			got, err := drain(t, NewReader(source.of(io.MultiReader(bytes.NewReader(cut), iotest.ErrReader(broken)))), 1<<20, always(4096))
			wants(t, fmt.Sprintf("%d bytes, %s, and an error", n, source.name), got, err, want, broken)
		}
		if t.Failed() {
			return
		}
	}
}

// TestNoProgress: a source that gives nothing for ever, at each place.
func TestNoProgress(t *testing.T) {
	w, _ := mixed()
	for n := range len(w.out) + 1 {
		want, _ := naive(w.out[:n], 1<<20)
		got, err := drain(t, NewReader(io.MultiReader(bytes.NewReader(w.out[:n]), never{})), 1<<20, always(4096))
		wants(t, fmt.Sprintf("nothing after %d bytes", n), got, err, want, io.ErrNoProgress)
	}
}

type never struct{}

func (never) Read([]byte) (int, error) { return 0, nil }

// TestZeroBytes: a Read of nothing reads nothing.
func TestZeroBytes(t *testing.T) {
	z := NewReader(iotest.ErrReader(errors.New("asked")))
	if n, err := z.Read(nil); n != 0 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	w, _ := mixed()
	i := 0
	got, err := drain(t, NewReader(bytes.NewReader(w.out)), 1<<20, func() int { i++; return i % 3 })
	wants(t, "with empty reads between", got, err, w.data, io.EOF)
}

// TestSplit ends the caller's buffer at every place of a match, which then
// reaches into what an earlier Read gave.
func TestSplit(t *testing.T) {
	for _, distance := range []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 257, 258, 259, 300} {
		w := &writer{}
		w.member()
		w.fixed(last)
		w.lits(noise(4, 300)...)
		begin := len(w.data)
		w.match(258, distance)
		end := len(w.data)
		w.match(3, end)         // the first byte of all
		w.match(16, distance+5) // from before the match into it
		w.lits(noise(5, 2*fastOut)...)
		w.match(258, len(w.data))
		w.end()
		w.trailer()
		for n := begin - 2; n < end+30; n++ {
			for _, rest := range []int{len(w.data), 5} {
				if rest == 5 && n%16 != 0 {
					continue // slow
				}
				got, err := drain(t, NewReader(bytes.NewReader(w.out)), 1<<20, first(n, rest))
				wants(t, fmt.Sprintf("distance %d, split after %d, then by %d", distance, n, rest), got, err, w.data, io.EOF)
			}
		}
	}
}

// TestRefill: the fast loop, which may come next, wants fewer than 64 bits.
func TestRefill(t *testing.T) {
	for n := range uint(64) {
		z := NewReader(bytes.NewReader(make([]byte, 16)))
		z.nbits = n
		if z.refill(); z.nbits < max(56, n) || z.nbits > 63 || z.nbits%8 != n%8 {
			t.Errorf("%d bits become %d", n, z.nbits)
		}
	}
}

// repeated gives b again and again, n times.
type repeated struct {
	b []byte
	n int
}

func (r *repeated) Read(p []byte) (n int, err error) {
	for r.n > 0 && len(p)-n >= len(r.b) {
		n += copy(p[n:], r.b)
		r.n--
	}
	if r.n == 0 {
		err = io.EOF
	}
	return n, err
}

// TestLargerThanItsSize: the size at the end of a member counts modulo 1<<32.
func TestLargerThanItsSize(t *testing.T) {
	// Eight matches of 258 zeros take 13 bytes, which repeat whatever bit
	// they begin at. Sixteen are written, and the first eight repeated.
	const times = 1<<32/(8*maxMatch) + 1
	const size = 1 + (times+1)*8*maxMatch
	w := &writer{}
	w.member()
	w.fixed(last)
	w.lits(0)
	start := len(w.out)
	for range 16 {
		w.match(maxMatch, 1)
	}
	w.end()
	var crc uint32
	zeros := make([]byte, 1<<20)
	for left := size; left > 0; left -= len(zeros) {
		crc = crc32.Update(crc, crc32.IEEETable, zeros[:min(left, len(zeros))])
	}
	end := binary.LittleEndian.AppendUint32(w.out[start+13:], crc)
	end = binary.LittleEndian.AppendUint32(end, size&0xffffffff)
	z := NewReader(io.MultiReader(bytes.NewReader(w.out[:start]), &repeated{w.out[start : start+13], times}, bytes.NewReader(end)))
	got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{z}, make([]byte, 1<<20))
	if err != nil || got != size {
		t.Fatalf("%d bytes of %d, %v", got, size, err)
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
