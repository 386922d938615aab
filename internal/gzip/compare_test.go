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
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	rival "github.com/klauspost/compress/gzip"
)

// library reads with compress/gzip. The end of a whole stream is io.EOF, an
// empty one is cut short.
func library(stream []byte, limit int) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(stream))
	if err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	n, err := io.Copy(&out, io.LimitReader(r, int64(limit)+1))
	if n > int64(limit) {
		return out.Bytes()[:limit], naiveLimit
	}
	if err == nil {
		err = io.EOF
	}
	return out.Bytes(), err
}

// compare reads a stream with ours, with the naive reader and with the
// library. Ours and the naive one must agree in every byte and in the error.
// The library must take what they take and refuse what they refuse, but for
// what is named here. It returns what the naive one says.
func compare(t testing.TB, what string, r *rand.Rand, stream []byte, limit int) error {
	t.Helper()
	z := &naiveReader{in: stream, limit: limit}
	wantErr := z.read()
	least := 1
	if len(z.out) > 2000 {
		least = len(z.out) / 200 // each Read moves the window
	}
	most := 1 << r.IntN(19)
	source := sources[r.IntN(len(sources))]
	if len(stream) > 10_000 {
		source = sources[0]
	}
	got, err := drain(t, NewReader(source.of(bytes.NewReader(stream))), limit, func() int {
		return max(least, min(1+r.IntN(most), 300<<10))
	})
	wants(t, what+", "+source.name, got, err, z.out, wantErr)

	std, stdErr := library(stream, limit)
	prefix := min(len(z.out), len(std))
	if !bytes.Equal(z.out[:prefix], std[:prefix]) {
		t.Errorf("%s: compress/gzip gives other bytes", what)
	}
	why := ""
	if errors.Is(wantErr, ErrCorrupt) {
		why = strings.TrimPrefix(wantErr.Error(), ErrCorrupt.Error()+": ")
	}
	same := stdErr == wantErr
	if why != "" {
		same = stdErr != io.EOF && stdErr != naiveLimit && stdErr != io.ErrUnexpectedEOF
	}
	switch {
	case z.longName:
		// Ours is laxer: the RFC has no limit for names, the library has 511
		// bytes.
		same = same || stdErr == gzip.ErrHeader
	case why == "reserved flags":
		// Ours is stricter, as RFC 1952 section 2.3.1.2 wants it.
		same = true
	case why == "no end of block":
		// Ours says so at once, the library when the block does not end.
		same = stdErr != io.EOF
	case why == "no member":
		// The library calls less than ten bytes of something else cut short.
		same = same || stdErr == io.ErrUnexpectedEOF
	case same && len(std) != len(z.out) && wantErr != io.ErrUnexpectedEOF:
		// When the stream is cut short the library may stop a few bytes
		// early: it asks for the bits of the shortest code there can be.
		t.Errorf("%s: compress/gzip gives %d bytes, not %d", what, len(std), len(z.out))
	}
	if !same {
		t.Errorf("%s: compress/gzip says %v, ours %v", what, stdErr, wantErr)
	}
	return wantErr
}

// repair sets the trailers to what the members are, as far as they can be
// read: else nearly every change would end at a CRC.
func repair(stream []byte, limit int) []byte {
	stream = bytes.Clone(stream)
	for range 10 {
		z := &naiveReader{in: stream, limit: limit}
		err := z.read()
		if err == nil || !strings.HasSuffix(err.Error(), ": CRC") && !strings.HasSuffix(err.Error(), ": size") {
			return stream
		}
		data := z.out[z.begin:]
		trailer := stream[z.at/8-8:]
		binary.LittleEndian.PutUint32(trailer, crc32.ChecksumIEEE(data))
		binary.LittleEndian.PutUint32(trailer[4:], uint32(len(data)))
	}
	return stream
}

// randomSize is as often small as large.
func randomSize(r *rand.Rand, bits int) int { return r.IntN(1 << r.IntN(bits+1)) }

func randomData(r *rand.Rand, bits int) []byte {
	n := randomSize(r, bits)
	switch r.IntN(4) {
	case 0:
		return noise(r.Uint64(), n)
	case 1:
		return bytes.Repeat(noise(r.Uint64(), 1+randomSize(r, 6)), 1+n/64)
	}
	return text(r.Uint64(), n)
}

// randomBlocks writes a stream that no compressor would: any codes, any
// matches.
func randomBlocks(r *rand.Rand, w *writer) {
	field := func() []byte {
		if r.IntN(4) > 0 {
			return nil
		}
		return bytes.Repeat([]byte("f"), randomSize(r, 9))
	}
	w.header(byte(r.IntN(4)), field(), field(), field())
	for left := r.IntN(5); left >= 0; left-- {
		end := uint(0)
		if left == 0 {
			end = last
		}
		switch r.IntN(4) {
		case 0:
			w.stored(end, noise(r.Uint64(), min(65535, randomSize(r, 17))))
			continue
		case 1:
			w.fixed(end)
		default:
			lit := wholeCode(r, 257+r.IntN(30), 15)
			if r.IntN(4) == 0 { // few symbols, many zeros
				few := wholeCode(r, 2+r.IntN(20), 15)
				at := r.Perm(len(lit))[:len(few)]
				if !slices.Contains(at, endOfBlock) {
					at[0] = endOfBlock
				}
				clear(lit)
				for i, n := range few {
					lit[at[i]] = n
				}
			}
			dist := []uint8{uint8(r.IntN(2))}
			if r.IntN(4) > 0 {
				dist = wholeCode(r, 2+r.IntN(29), 15)
			}
			w.dynamicRepeats(r, end, lit, dist)
		}
		var bytes, lengths []int
		for s, n := range w.lit {
			if n > 0 && s < 256 {
				bytes = append(bytes, s)
			}
			if n > 0 && s > 256 && s < 286 {
				lengths = append(lengths, s)
			}
		}
		for range randomSize(r, 12) {
			member := len(w.data) - w.begin
			if len(lengths) == 0 || member == 0 || r.IntN(3) == 0 {
				if len(bytes) > 0 {
					w.lits(byte(bytes[r.IntN(len(bytes))]))
				}
				continue
			}
			e := litlenSymbols[lengths[r.IntN(len(lengths))]]
			length := e.value() + r.IntN(1<<e.consume())
			if length == maxMatch && (len(w.lit) <= 285 || w.lit[285] == 0) {
				length--
			}
			distance := member // the farthest
			switch r.IntN(4) {
			case 0:
				distance = 1 + r.IntN(17)
			case 1, 2:
				distance = 1 + randomSize(r, 15)
			}
			distance = min(distance, windowBytes, member)
			if s, _, _ := distSymbol(distance); s < len(w.dist) && w.dist[s] > 0 {
				w.match(length, distance)
			}
		}
		w.end()
	}
	w.trailer()
}

// randomStream is one of some members that somebody else made.
func randomStream(t testing.TB, r *rand.Rand, gnu [][]byte) []byte {
	var out bytes.Buffer
	for range 1 + r.IntN(2)*r.IntN(3) {
		var w interface {
			io.WriteCloser
			Flush() error
		}
		var err error
		switch r.IntN(4) {
		case 0:
			own := &writer{}
			randomBlocks(r, own)
			out.Write(own.out)
			continue
		case 1:
			if len(gnu) > 0 {
				out.Write(gnu[r.IntN(len(gnu))])
				continue
			}
			fallthrough
		case 2:
			z, e := gzip.NewWriterLevel(&out, gzip.HuffmanOnly+r.IntN(gzip.BestCompression-gzip.HuffmanOnly+1))
			if r.IntN(4) == 0 {
				z.Name, z.Comment, z.Extra = "name", strings.Repeat("c", randomSize(r, 9)), noise(1, 1+randomSize(r, 16))[1:]
			}
			w, err = z, e
		default:
			w, err = rival.NewWriterLevel(&out, rival.StatelessCompression+r.IntN(rival.BestCompression-rival.StatelessCompression+1))
		}
		if err != nil {
			t.Fatal(err)
		}
		for range 1 + r.IntN(3) {
			if _, err := w.Write(randomData(r, 17)); err != nil {
				t.Fatal(err)
			}
			if r.IntN(3) == 0 {
				if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return out.Bytes()
}

// damage changes a stream in place of what happens to one.
func damage(r *rand.Rand, stream, other []byte) []byte {
	// Half of the changes are where headers and codes stand.
	where := func(b []byte) int {
		if r.IntN(2) == 0 {
			return r.IntN(min(len(b), 120))
		}
		return r.IntN(len(b))
	}
	stream = bytes.Clone(stream)
	switch r.IntN(6) {
	case 0, 1:
		for range 1 + r.IntN(3) {
			stream[where(stream)] ^= 1 << r.IntN(8)
		}
	case 2:
		return stream[:where(stream)]
	case 3:
		return append(stream[:where(stream)], other[where(other):]...)
	case 4:
		at := where(stream)
		return append(stream[:at], stream[at+1:]...)
	case 5:
		at := where(stream)
		return bytes.Join([][]byte{stream[:at], {byte(r.Uint32())}, stream[at:]}, nil)
	}
	return stream
}

// gnuStreams are what GNU gzip makes of something.
func gnuStreams(t *testing.T, seed uint64) (out [][]byte) {
	path, err := exec.LookPath("gzip")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("cannot test: no gzip")
		}
		t.Log("NOT TESTED: streams of GNU gzip, which is not here")
		return nil
	}
	for level := 1; level <= 9; level++ {
		for i, size := range []int{0, 1, 3000, 200_000} {
			cmd := exec.Command(path, fmt.Sprintf("-%d", level), "-cn")
			cmd.Stdin = bytes.NewReader(text(seed+uint64(i), size))
			b, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, b)
		}
	}
	return out
}

// TestCompare: GZIP_STREAMS random streams, whole and damaged. GZIP_SEED
// repeats a run.
func TestCompare(t *testing.T) {
	count := 2000
	if s := os.Getenv("GZIP_STREAMS"); s != "" {
		if count, _ = strconv.Atoi(s); count < 1 {
			t.Fatalf("GZIP_STREAMS=%s", s)
		}
	}
	if testing.Short() {
		count = 200
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("GZIP_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("GZIP_SEED=%d", seed)
	gnu := gnuStreams(t, seed)
	seen := map[string]int{}
	for i := range count {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		stream := randomStream(t, r, gnu)
		kind := r.IntN(3)
		if kind > 0 {
			stream = damage(r, stream, randomStream(t, r, gnu))
		}
		if kind > 1 {
			stream = repair(stream, 4<<20)
		}
		err := compare(t, fmt.Sprintf("GZIP_SEED=%d, stream %d", seed, i), r, stream, 4<<20)
		seen[err.Error()]++
		if kind == 0 && err != io.EOF && err != naiveLimit {
			t.Errorf("stream %d is not damaged, and refused: %v", i, err)
		}
		if t.Failed() {
			return
		}
	}
	for why, n := range seen {
		t.Logf("%6d %s", n, why)
	}
	if whole := seen[io.EOF.Error()]; count >= 200 && (whole < count/4 || whole > count*3/4 || len(seen) < 8) {
		t.Error("the streams are too much alike")
	}
}

// FuzzRead: whole streams, and what stands between a header and a trailer that
// are right.
func FuzzRead(f *testing.F) {
	// Not all: they count as executions.
	seeds := map[string]int{}
	for _, s := range streams() {
		if len(s.bytes) > 2000 {
			continue
		}
		seeds[s.why]++
		if n := seeds[s.why]; s.why == "" && n%8 != 0 || s.why != "" && n > 4 {
			continue
		}
		if body, ok := bytes.CutPrefix(s.bytes, []byte("\x1f\x8b\x08\x00\x01\x02\x03\x04\x05\x06")); ok {
			f.Add(body)
		} else {
			f.Add(s.bytes)
		}
	}
	f.Add(pack(f, text(29, 2000), gzip.DefaultCompression))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 16 << 20
		r := rand.New(rand.NewPCG(uint64(len(b)), uint64(crc32.ChecksumIEEE(b))))
		compare(t, "whole", r, b, limit)
		w := &writer{}
		w.member()
		w.bytes(b)
		w.bytes(make([]byte, 8)) // where the trailer may be
		z := &naiveReader{in: w.out, limit: limit}
		if err := z.read(); err != nil && strings.HasSuffix(err.Error(), ": CRC") {
			w.out = w.out[:z.at/8]
		}
		compare(t, "body", r, repair(w.out, limit), limit)
	})
}
