package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// The digest of a base is that of its content, and no more work than that is:
// a base of 1 GiB holds a third of it, a registered one may hold a thousandth.
//
//	blocks-sha256:  SHA-256 of two others: that of every block that is not all
//	                zeros, one after the other, and that of their numbers and of
//	                the file's size, 8 bytes little-endian each
//	sha256:         SHA-256 of the whole file; what records had first
const (
	blocksDigest     = "blocks-sha256:"
	wholeDigest      = "sha256:"
	digestBlockBytes = 4096
	digestChunkBytes = 1 << 20
)

var zeroBlock [digestBlockBytes]byte

// digestOf hashes what is in a file. Holes and zeros that were written are the
// same.
func digestOf(ctx context.Context, f *os.File) (string, error) {
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	blocks, numbers := sha256.New(), sha256.New()
	buf := make([]byte, digestChunkBytes)
	err = eachData(f, st.Size(), func(from, to int64) error {
		for at := from; at < to; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(int64(len(buf)), to-at)
			if _, err := f.ReadAt(buf[:n], at); err != nil {
				return fmt.Errorf("%s: at %d: %w", f.Name(), at, err)
			}
			hashBlocks(blocks, numbers, buf[:n], at/digestBlockBytes)
			at += n
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	numbers.Write(binary.LittleEndian.AppendUint64(nil, uint64(st.Size())))
	sum := sha256.Sum256(numbers.Sum(blocks.Sum(nil)))
	return blocksDigest + hex.EncodeToString(sum[:]), nil
}

// hashBlocks hashes the blocks of b that are not all zeros, and their numbers,
// the first of b being number first. The last block may be short.
func hashBlocks(blocks, numbers hash.Hash, b []byte, first int64) {
	var number [8]byte
	begun := -1 // of a run in b
	flush := func(end int) {
		if begun >= 0 {
			blocks.Write(b[begun:end])
		}
		begun = -1
	}
	for at := 0; at < len(b); at += digestBlockBytes {
		end := min(at+digestBlockBytes, len(b))
		if bytes.Equal(b[at:end], zeroBlock[:end-at]) {
			flush(at)
			continue
		}
		if begun < 0 {
			begun = at
		}
		binary.LittleEndian.PutUint64(number[:], uint64(first+int64(at/digestBlockBytes)))
		numbers.Write(number[:])
	}
	flush(len(b))
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
		from = max(at, from/digestBlockBytes*digestBlockBytes)
		to = min(size, (to+digestBlockBytes-1)/digestBlockBytes*digestBlockBytes)
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

// digestLike hashes a file in the way that a digest was made.
func digestLike(ctx context.Context, f *os.File, digest string) (string, error) {
	if strings.HasPrefix(digest, wholeDigest) {
		return wholeDigestOf(ctx, f)
	}
	return digestOf(ctx, f)
}
