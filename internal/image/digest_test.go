package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// verityOf is the fs-verity digest of a file as its documentation reads.
func verityOf(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	desc := make([]byte, 256)
	copy(desc, []byte{1, 1, 12})
	binary.LittleEndian.PutUint64(desc[8:], uint64(len(data)))
	for level := data; len(level) > 0; {
		level = append(level, make([]byte, -len(level)&4095)...)
		var hashes []byte
		for ; len(level) > 0; level = level[4096:] {
			sum := sha256.Sum256(level[:4096])
			hashes = append(hashes, sum[:]...)
		}
		if len(hashes) == 32 {
			copy(desc[16:], hashes)
			break
		}
		level = hashes
	}
	sum := sha256.Sum256(desc)
	return "fsverity-sha256:" + hex.EncodeToString(sum[:])
}

// fsverityOf is what the program says.
func fsverityOf(t testing.TB, path string) string {
	t.Helper()
	out, exit := tool(t, "fsverity", "digest", path)
	digest, _, ok := strings.Cut(out, " ")
	if exit != 0 || !ok {
		t.Fatalf("fsverity digest: exit %d: %s", exit, out)
	}
	return "fsverity-" + digest
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
	const (
		block  = verityBlockBytes
		group  = 128 * block
		super  = 128 * group
		zeros  = "written zeros of "
		chunks = 3 * digestChunkBytes
	)
	one := []byte{1}
	type row struct {
		name   string
		size   int64
		pieces map[int64][]byte
		same   string // as which row before
	}
	rows := []row{
		{"two bytes in two blocks", 2 * block, map[int64][]byte{0: one, block: one}, ""},
		{"the last byte of the first block", 2 * block, map[int64][]byte{block - 1: one}, ""},
		{"the first byte of the second block", 2 * block, map[int64][]byte{block: one}, ""},
		{"one more block of a hole", 3 * block, map[int64][]byte{block: one}, ""},
		{"one more block of zeros", 3 * block, map[int64][]byte{block: one, 2 * block: make([]byte, block)}, "one more block of a hole"},
		{"a short last block", block + 2, map[int64][]byte{block: one}, ""},
		{"a group of zeros between others", 3 * group, map[int64][]byte{0: one, group: make([]byte, group), 3*group - 1: one}, ""},
		{"a hole of a group between others", 3 * group, map[int64][]byte{0: one, 3*group - 1: one}, "a group of zeros between others"},
		{"data around the buffer's end", chunks, map[int64][]byte{digestChunkBytes - 1: {1, 2}, 2 * digestChunkBytes: one}, ""},
		{"a long run", chunks + 5, map[int64][]byte{0: bytes.Repeat(one, chunks+5)}, ""},
	}
	for _, size := range []int64{
		0, 1, block - 1, block, block + 1, group - block - 1, group - block, group - block + 1, group - 1, group, group + 1,
		group + block - 1, group + block, group + block + 1, 2*group - 1, 2 * group, 2*group + 1,
		super - group, super - block, super - 1, super, super + 1, super + block, super + group + 1,
	} {
		hole := fmt.Sprintf("%d bytes of a hole", size)
		rows = append(rows, row{hole, size, nil, ""})
		if size > 0 {
			rows = append(rows, row{fmt.Sprintf("%d bytes, the last is written", size), size, map[int64][]byte{size - 1: one}, ""})
		}
		if size > 0 && size <= 2*group+1 {
			rows = append(rows, row{zeros + hole, size, map[int64][]byte{0: make([]byte, size)}, hole},
				row{fmt.Sprintf("%d bytes, all written", size), size, map[int64][]byte{0: bytes.Repeat([]byte{7}, int(size))}, ""})
		}
	}
	seen := map[string]string{}
	for _, row := range rows {
		f := sparse(t, row.size, row.pieces)
		got, err := digestOf(t.Context(), f)
		if err != nil {
			t.Fatalf("%s: %v", row.name, err)
		}
		if want := fsverityOf(t, f.Name()); got != want {
			t.Errorf("%s: %s, fsverity says %s", row.name, got, want)
		}
		if want := verityOf(t, f.Name()); got != want {
			t.Errorf("%s: %s, the documentation gives %s", row.name, got, want)
		}
		before, known := seen[got]
		if known != (row.same != "") || before != row.same {
			t.Errorf("%s: the same as %q, want %q", row.name, before, row.same)
		}
		if !known {
			seen[got] = row.name
		}
	}
}

func TestDigestRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		pieces := map[int64][]byte{}
		size := r.Int64N(1 << (8 + r.IntN(18)))
		for range r.IntN(8) {
			b := make([]byte, r.IntN(1<<(1+r.IntN(20))))
			if r.IntN(3) > 0 {
				for i := range b {
					b[i] = byte(r.Uint32())
				}
			}
			pieces[r.Int64N(size+1)] = b
		}
		f := sparse(t, size, pieces)
		if got, err := digestOf(t.Context(), f); err != nil || got != fsverityOf(t, f.Name()) {
			t.Fatalf("%d bytes: %s, %v, fsverity says %s", size, got, err, fsverityOf(t, f.Name()))
		}
	}
}

func TestDigestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f := sparse(t, 1, map[int64][]byte{0: {1}})
	if _, err := digestOf(ctx, f); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := wholeDigestOf(ctx, f); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	d := newDigester(sparse(t, 0, nil))
	if _, err := d.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := d.digest(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// A hole costs nothing: to read 1 TiB, a full tree of four levels, would take
// an hour. Its root is worked out along the two paths that lead to data.
func TestDigestOfHole(t *testing.T) {
	const size = 1 << 40
	first, last := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	f := sparse(t, size, map[int64][]byte{0: first, size - 4096: last})
	x, y, z := sha256.Sum256(first), sha256.Sum256(last), sha256.Sum256(make([]byte, 4096))
	var root [32]byte
	for range 4 {
		node := func(first, last [32]byte) []byte {
			return bytes.Join([][]byte{first[:], bytes.Repeat(z[:], 126), last[:]}, nil)
		}
		root = sha256.Sum256(node(x, y)) // of the topmost level, in the end
		x, y, z = sha256.Sum256(node(x, z)), sha256.Sum256(node(z, y)), sha256.Sum256(node(z, z))
	}
	desc := make([]byte, 256)
	copy(desc, []byte{1, 1, 12})
	binary.LittleEndian.PutUint64(desc[8:], size)
	copy(desc[16:], root[:])
	want := fmt.Sprintf("fsverity-sha256:%x", sha256.Sum256(desc))
	if got, err := digestOf(t.Context(), f); err != nil || got != want {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
	d := newDigester(sparse(t, 0, nil))
	for at, b := range map[int64][]byte{0: first, size - 4096: last} {
		if _, err := d.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := d.digest(t.Context()); err != nil || got != want {
		t.Errorf("while it is written: %s, %v, want %s", got, err, want)
	}
	// No size is too large.
	full := new(merkleTree)
	full.digest(1<<63 - 1)
	if full.blocks != 1<<51 {
		t.Errorf("2^63-1 bytes: %d blocks", full.blocks)
	}
}

// A record may have a digest of before, or of after this version.
func TestDigestLike(t *testing.T) {
	f := sparse(t, 3*verityBlockBytes, map[int64][]byte{0: {1}})
	for _, row := range []struct{ record, want string }{
		{"sha256:00", shaOf(t, f.Name())},
		{"fsverity-sha256:00", verityOf(t, f.Name())},
		{"fsverity-sha512:00", ""},
		{"fsverity-sha256", ""},
		{"SHA256:00", ""},
		{"", ""},
	} {
		got, known, err := digestLike(t.Context(), f, row.record)
		if err != nil || known != (row.want != "") || got != row.want {
			t.Errorf("%q: %q, %v, %v, want %q", row.record, got, known, err, row.want)
		}
	}
}

// What a base of 64 MiB costs to digest, as it stands and while it is written
// from a buffer of 1 MiB, beside SHA-256 of the same bytes.
func BenchmarkDigest(b *testing.B) {
	const size = 64 << 20
	buf := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(buf)
	f := sparse(b, size, map[int64][]byte{0: bytes.Repeat(buf, size/len(buf))})
	bench := func(name string, do func() error) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if err := do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	write := func(to io.WriterAt) error {
		for at := int64(0); at < size; at += int64(len(buf)) {
			if _, err := to.WriteAt(buf, at); err != nil {
				return err
			}
		}
		return nil
	}
	bench("sha256", func() error {
		h := sha256.New()
		for range size / len(buf) {
			h.Write(buf)
		}
		h.Sum(nil)
		return nil
	})
	bench("file", func() error { _, err := digestOf(b.Context(), f); return err })
	bench("file-sha256", func() error { _, err := wholeDigestOf(b.Context(), f); return err })
	bench("write", func() error { return write(f) })
	d := newDigester(f)
	bench("write-digested", func() error {
		if err := write(d); err != nil {
			return err
		}
		_, err := d.digest(b.Context())
		return err
	})
}
