package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// blocksOf is digestOf as its definition reads.
func blocksOf(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var blocks, numbers []byte
	for i := 0; i*4096 < len(data); i++ {
		block := data[i*4096 : min(len(data), (i+1)*4096)]
		if len(bytes.Trim(block, "\x00")) > 0 {
			blocks = append(blocks, block...)
			numbers = binary.LittleEndian.AppendUint64(numbers, uint64(i))
		}
	}
	numbers = binary.LittleEndian.AppendUint64(numbers, uint64(len(data)))
	of, at := sha256.Sum256(blocks), sha256.Sum256(numbers)
	sum := sha256.Sum256(append(of[:], at[:]...))
	return "blocks-sha256:" + hex.EncodeToString(sum[:])
}

// sparse makes a file of pieces, each a number of bytes at an offset; zeros are
// written as such.
func sparse(t testing.TB, size int64, pieces map[int64][]byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	for at, b := range pieces {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestDigest(t *testing.T) {
	const block = digestBlockBytes
	one := []byte{1}
	seen := map[string]string{}
	for _, row := range []struct {
		name   string
		size   int64
		pieces map[int64][]byte
		same   string // as which row
	}{
		{"no byte", 0, nil, ""},
		{"one zero", 1, nil, ""},
		{"a hole of a block", block, nil, ""},
		{"a block of zeros", block, map[int64][]byte{0: make([]byte, block)}, "a hole of a block"},
		{"a hole of a block and a byte", block + 1, nil, ""},
		{"a byte in the first block", 2 * block, map[int64][]byte{0: one}, ""},
		{"the last byte of the first block", 2 * block, map[int64][]byte{block - 1: one}, ""},
		{"the first byte of the second block", 2 * block, map[int64][]byte{block: one}, ""},
		{"one more block of a hole", 3 * block, map[int64][]byte{block: one}, ""},
		{"one more block of zeros", 3 * block, map[int64][]byte{block: one, 2 * block: make([]byte, block)}, "one more block of a hole"},
		{"a short last block", block + 2, map[int64][]byte{block: one}, ""},
		{"data around the buffer's end", 3 * digestChunkBytes, map[int64][]byte{digestChunkBytes - 1: {1, 2}, 2 * digestChunkBytes: one}, ""},
		{"a long run", 3*digestChunkBytes + 5, map[int64][]byte{0: bytes.Repeat(one, 3*digestChunkBytes+5)}, ""},
	} {
		f := sparse(t, row.size, row.pieces)
		got, err := digestOf(t.Context(), f)
		if err != nil {
			t.Fatalf("%s: %v", row.name, err)
		}
		if want := blocksOf(t, f.Name()); got != want {
			t.Errorf("%s: %s, the definition gives %s", row.name, got, want)
		}
		before, known := seen[got]
		if known != (row.same != "") || before != row.same {
			t.Errorf("%s: the same as %q, want %q", row.name, before, row.same)
		}
		if !known {
			seen[got] = row.name
		}
		if old, err := digestLike(t.Context(), f, "sha256:00"); err != nil || old != shaOf(t, f.Name()) {
			t.Errorf("%s: as records had it first: %s, %v", row.name, old, err)
		}
	}
}

func TestDigestRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		pieces := map[int64][]byte{}
		size := r.Int64N(64 * digestBlockBytes)
		for range r.IntN(8) {
			b := make([]byte, r.IntN(3*digestBlockBytes))
			if r.IntN(3) > 0 {
				for i := range b {
					b[i] = byte(r.Uint32())
				}
			}
			pieces[r.Int64N(size+1)] = b
		}
		f := sparse(t, size, pieces)
		if got, err := digestOf(t.Context(), f); err != nil || got != blocksOf(t, f.Name()) {
			t.Fatalf("%d bytes: %s, %v, the definition gives %s", size, got, err, blocksOf(t, f.Name()))
		}
	}
}

func TestDigestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := digestOf(ctx, sparse(t, 1, map[int64][]byte{0: {1}})); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// A hole costs nothing: this would take an hour.
func TestDigestOfHole(t *testing.T) {
	f := sparse(t, 4<<40, map[int64][]byte{1 << 40: {1}})
	if _, err := digestOf(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}
