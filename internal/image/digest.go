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
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// The digest of a base is its fs-verity file digest (the kernel's
// Documentation/filesystems/fsverity.rst), with SHA-256, blocks of 4 KiB and no
// salt: what `fsverity digest` says of the file, and what the kernel would hold
// it to. The hashes of blocks do not depend on each other, so that they are made
// in any order, while the base is written, and a hole of any size costs nothing.
//
//	fsverity-sha256:  that
//	sha256:           SHA-256 of the whole file; what records had first
const (
	verityDigest     = "fsverity-sha256:"
	wholeDigest      = "sha256:"
	digestChunkBytes = 1 << 20
)

const (
	verityBlockBytes = 4096
	verityFanoutLog  = 7
	verityFanout     = 1 << verityFanoutLog // hashes in a block of the tree
	verityLevels     = 8                    // FS_VERITY_MAX_LEVELS of fs/verity/fsverity_private.h: for any size of a file
)

var zeroBlock [verityBlockBytes]byte

// zeroHashes are those of subtrees over zeros alone: of a block of data, of a
// block of such hashes, and so on.
var zeroHashes = func() (hashes [verityLevels][sha256.Size]byte) {
	var block [verityBlockBytes]byte
	for level := range hashes {
		hashes[level] = sha256.Sum256(block[:])
		for at := 0; at < len(block); at += sha256.Size {
			copy(block[at:], hashes[level][:])
		}
	}
	return hashes
}()

// A merkleTree is that of a file, which comes to it in order. Of each level it
// has the last block of hashes, so far as that is filled; the file's own blocks
// are below level 0. Where a hash goes follows from the number of blocks.
type merkleTree struct {
	blocks int64 // of the file, so far
	levels [verityLevels + 1][verityBlockBytes]byte
}

// add appends what a hash of a level stands for. The file must have come to the
// end of such a subtree.
func (t *merkleTree) add(level int, hash [sha256.Size]byte) {
	end := t.blocks + subtreeBlocks(level)
	t.put(level, t.blocks, hash)
	for ; end%subtreeBlocks(level+1) == 0; level++ {
		t.put(level+1, t.blocks, sha256.Sum256(t.levels[level][:]))
	}
	t.blocks = end
}

// put sets the hash of a level above a block of the file.
func (t *merkleTree) put(level int, block int64, hash [sha256.Size]byte) {
	at := block / subtreeBlocks(level) % verityFanout
	copy(t.levels[level][at*sha256.Size:], hash[:])
}

// subtreeBlocks are the blocks of a file below one hash of a level.
func subtreeBlocks(level int) int64 { return 1 << (level * verityFanoutLog) }

// data appends blocks. The last block of a file may be short: the rest of it
// counts as zeros.
func (t *merkleTree) data(b []byte) {
	for ; len(b) >= verityBlockBytes; b = b[verityBlockBytes:] {
		t.add(0, blockHash(b[:verityBlockBytes]))
	}
	if len(b) > 0 {
		var last [verityBlockBytes]byte
		copy(last[:], b)
		t.add(0, blockHash(last[:]))
	}
}

// zerosTo appends blocks of zeros up to a number of blocks, by the largest
// subtrees that fit.
func (t *merkleTree) zerosTo(blocks int64) {
	for t.blocks < blocks {
		level := 0
		for level+1 < verityLevels {
			n := subtreeBlocks(level + 1)
			if t.blocks%n != 0 || blocks-t.blocks < n {
				break
			}
			level++
		}
		t.add(level, zeroHashes[level])
	}
}

// digest ends the tree, over a file of so many bytes, and gives its digest.
func (t *merkleTree) digest(sizeBytes int64) string {
	blocks := sizeBytes / verityBlockBytes
	if sizeBytes%verityBlockBytes != 0 {
		blocks++
	}
	t.zerosTo(blocks)
	root := t.root()
	var desc [256]byte // struct fsverity_descriptor
	desc[0] = 1        // version
	desc[1] = 1        // hash_algorithm: FS_VERITY_HASH_ALG_SHA256
	desc[2] = 12       // log_blocksize
	binary.LittleEndian.PutUint64(desc[8:], uint64(sizeBytes))
	copy(desc[16:], root[:])
	sum := sha256.Sum256(desc[:])
	return verityDigest + hex.EncodeToString(sum[:])
}

// root closes the last block of each level and gives the hash of the only one
// of the topmost: that of the file's block if it has but one, and zeros if it
// has none.
func (t *merkleTree) root() (root [sha256.Size]byte) {
	if t.blocks == 0 {
		return root
	}
	last := t.blocks - 1
	level := 0
	for ; last/subtreeBlocks(level) > 0; level++ {
		if t.blocks%subtreeBlocks(level+1) == 0 {
			continue // it is full, and was
		}
		used := last/subtreeBlocks(level)%verityFanout + 1
		clear(t.levels[level][used*sha256.Size:])
		t.put(level+1, last, sha256.Sum256(t.levels[level][:]))
	}
	return [sha256.Size]byte(t.levels[level][:sha256.Size])
}

// blockHash is the hash of one block. Most of what is not a hole is not zeros:
// to look costs next to nothing.
func blockHash(b []byte) [sha256.Size]byte {
	if bytes.Equal(b, zeroBlock[:]) {
		return zeroHashes[0]
	}
	return sha256.Sum256(b)
}

// digestOf is the digest of a file, whose holes are not read. It takes the
// same memory for any file.
func digestOf(ctx context.Context, f *os.File) (string, error) {
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	t := new(merkleTree)
	buf := make([]byte, digestChunkBytes)
	err = eachData(f, st.Size(), func(from, to int64) error {
		t.zerosTo(from / verityBlockBytes)
		for at := from; at < to; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(int64(len(buf)), to-at)
			if _, err := f.ReadAt(buf[:n], at); err != nil {
				return fmt.Errorf("%s: at %d: %w", f.Name(), at, err)
			}
			t.data(buf[:n])
			at += n
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return t.digest(st.Size()), nil
}

// eachData calls f for the parts of a file that may hold data, which begin and
// end with a block, or the file.
func eachData(file *os.File, size int64, f func(from, to int64) error) error {
	fd := int(file.Fd())
	for at := int64(0); at < size; {
		from, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // nothing but a hole is left
		}
		if err != nil {
			from = at // a file system that does not say
		}
		to, err := unix.Seek(fd, from, unix.SEEK_HOLE)
		if err != nil {
			to = size
		}
		from = max(at, from/verityBlockBytes*verityBlockBytes)
		to = min(size, (to+verityBlockBytes-1)/verityBlockBytes*verityBlockBytes)
		if to <= from {
			return fmt.Errorf("%s: its data is from %d to %d", file.Name(), from, to)
		}
		if err := f(from, to); err != nil {
			return err
		}
		at = to
	}
	return nil
}

// wholeDigestOf hashes all of a file.
func wholeDigestOf(ctx context.Context, f *os.File) (string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	h := sha256.New()
	buf := make([]byte, digestChunkBytes)
	for {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		if err == io.EOF {
			return wholeDigest + hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// digestLike hashes a file in the way that a digest was made; known says
// whether this version knows it.
func digestLike(ctx context.Context, f *os.File, digest string) (got string, known bool, err error) {
	switch {
	case strings.HasPrefix(digest, verityDigest):
		got, err = digestOf(ctx, f)
	case strings.HasPrefix(digest, wholeDigest):
		got, err = wholeDigestOf(ctx, f)
	default:
		return "", false, nil
	}
	return got, true, err
}
