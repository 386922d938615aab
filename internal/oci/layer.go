package oci

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	"banger"
	"banger/internal/gzip"

	"github.com/klauspost/compress/zstd"
)

// Uncompressed bytes wait in at most this much memory between the goroutine
// that inflates and the one that places.
const (
	chunkBytes = 256 << 10
	chunkCount = 8
)

// As much of the stored bytes waits between the goroutine that fetches and
// verifies and the one that inflates.
const (
	aheadBytes = 128 << 10
	aheadCount = 8
	peekBytes  = 4 << 10
)

// maxVerdictBytes is how much of a damaged layer is still read to say whether
// its digest was wrong to begin with.
const maxVerdictBytes = 256 << 20

// A blob is one tar stream to squash: a layer, or a tar that stands alone.
type blob struct {
	label     string // for errors
	digest    string // of the stored bytes; "" for a stream of which nothing is known
	diffID    string // of the uncompressed bytes; "" as above
	mediaType string // "" takes any compression
	sizeBytes int64  // as stored; -1 unknown
	keep      Blobs  // where it goes while it is read; nil: nowhere
	open      func(context.Context, *progress) (io.ReadCloser, error)
	openRest  func(ctx context.Context, from int64) (io.ReadCloser, error) // nil: only the whole can be had; needs keep
	filter    func(*entry) bool                                            // what to leave out; nil: nothing
	inputSum  *string                                                      // set to the digest of the stored bytes, or of what the filter kept
	layered   bool
}

// chunk is a piece of an uncompressed stream, or (last) its end.
type chunk struct {
	buf  []byte
	n    int
	last bool
	err  error // of the stream; last is set
}

// pipeline runs four stages over all blobs in turn: fetch and verify; inflate;
// hash; parse and place. The first three are goroutines; since one goroutine
// inflates all blobs, the next blob is under way while the last chunks of this
// one are placed, and there is never more than one decoder's memory.
type pipeline struct {
	ctx      context.Context
	blobs    []blob
	lim      limits
	progress *progress

	free     chan []byte
	raw      chan chunk
	hashed   chan chunk
	rejected atomic.Int32 // number (from 1) of the blob whose tar is bad: only its digest is still of interest, and no later blob is
	resumed  atomic.Int32 // number (from 1) of the last blob that began with what came before

	total, fetched int64 // compressed bytes
	expanded       int64

	commits   chan BlobWriter // blobs that came whole
	commitErr error           // the first of them, once all is done
}

func squashLayers[C any](ctx context.Context, b *builder[C], blobs []blob, p *progress, lim limits) error {
	ctx, cancel := context.WithCancel(ctx)
	pl := &pipeline{
		ctx: ctx, blobs: blobs, lim: lim, progress: p,
		free: make(chan []byte, chunkCount), raw: make(chan chunk, chunkCount), hashed: make(chan chunk, chunkCount),
		commits: make(chan BlobWriter, len(blobs)),
	}
	for range chunkCount {
		pl.free <- make([]byte, chunkBytes)
	}
	for _, bl := range blobs {
		if bl.sizeBytes < 0 {
			pl.total = 0
			break
		}
		pl.total += bl.sizeBytes
	}
	var wg sync.WaitGroup
	wg.Go(pl.inflate)
	wg.Go(pl.hash)
	wg.Go(pl.commit)
	defer wg.Wait()
	defer cancel()
	for i := range blobs {
		bl := &blobs[i]
		b.begin(bl.layered)
		r := &chunkReader{pl: pl}
		add := b.add
		kept := sha256.New()
		if bl.filter != nil {
			add = func(e *entry, body io.Reader) error {
				if !bl.filter(e) {
					return nil
				}
				recordEntry(kept, e)
				return b.add(e, io.TeeReader(body, kept))
			}
		}
		trailing, ended, err := readTar(r, add)
		if err != nil {
			if pl.ctx.Err() == nil {
				pl.rejected.Store(int32(i + 1))
			}
			// A wrong digest explains damage better than the damage does.
			if bl.digest != "" && !r.ended {
				_, _ = drain(r)
			}
			if mismatch, ok := errors.AsType[*mismatchError](r.err); ok {
				err = mismatch
			}
			err = fmt.Errorf("%s: %w", bl.label, err)
			if pl.resumed.Load() == int32(i+1) && isDamage(ctx, err) {
				err = &resumedError{err}
			}
			return err
		}
		if !ended && bl.diffID == "" {
			err = errCutShort
		} else {
			err = b.end()
		}
		if err != nil {
			pl.rejected.Store(int32(i + 1))
			return fmt.Errorf("%s: %w", bl.label, err)
		}
		if trailing > 0 {
			b.notes[bl.label+": bytes after the end of its tar left out"] += int(trailing)
		}
		if bl.inputSum != nil && bl.filter != nil {
			*bl.inputSum = digestOf(kept)
		}
	}
	wg.Wait()
	return pl.commitErr
}

// chunkReader is the stream of one blob at the pipeline's end.
type chunkReader struct {
	pl    *pipeline
	cur   chunk
	at    int
	ended bool
	err   error
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for {
		if r.err != nil {
			return 0, r.err
		}
		if r.at < r.cur.n {
			n := copy(p, r.cur.buf[r.at:r.cur.n])
			r.at += n
			return n, nil
		}
		if r.cur.buf != nil {
			r.pl.free <- r.cur.buf
			r.cur = chunk{}
		}
		select {
		case c, ok := <-r.pl.hashed:
			if !ok {
				r.err = context.Cause(r.pl.ctx)
				if r.err == nil {
					r.err = errors.New("internal: stream without an end")
				}
				continue
			}
			if c.last {
				r.ended = true
				if r.err = c.err; r.err == nil {
					r.err = io.EOF
				}
				continue
			}
			r.cur, r.at = c, 0
		case <-r.pl.ctx.Done():
			r.err = context.Cause(r.pl.ctx)
		}
	}
}

// hash checks DiffIDs.
func (pl *pipeline) hash() {
	defer close(pl.hashed)
	h := sha256.New()
	i := 0
	for c := range pl.raw {
		if !c.last {
			if pl.blobs[i].diffID != "" {
				h.Write(c.buf[:c.n])
			}
		} else {
			if want := pl.blobs[i].diffID; want != "" && c.err == nil && pl.rejected.Load() != int32(i+1) {
				if got := digestOf(h); got != want {
					c.err = &mismatchError{what: "DiffID", got: got, want: want}
				}
			}
			h.Reset()
			i++
		}
		select {
		case pl.hashed <- c:
		case <-pl.ctx.Done():
			return
		}
	}
}

// commit makes blobs durable, which takes the disk its time, while the next
// ones come.
func (pl *pipeline) commit() {
	for w := range pl.commits {
		if err := w.Commit(); err != nil && pl.commitErr == nil {
			pl.commitErr = &localError{fmt.Errorf("blob cache: %w", err)}
		}
	}
}

func (pl *pipeline) inflate() {
	defer close(pl.raw)
	defer close(pl.commits)
	for i := range pl.blobs {
		err := pl.inflateOne(i)
		select {
		case pl.raw <- chunk{last: true, err: err}:
		case <-pl.ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

func (pl *pipeline) inflateOne(i int) (err error) {
	bl := &pl.blobs[i]
	ctx, cancel := context.WithCancel(pl.ctx)
	defer cancel()
	v := &verifier{ctx: ctx, h: sha256.New(), want: bl.digest, size: bl.sizeBytes, most: pl.lim.blobSize}
	if bl.keep != nil {
		w, cerr := pl.keep(bl)
		if cerr != nil {
			return &localError{fmt.Errorf("blob cache: %w", cerr)}
		}
		v.tee = w
		defer func() {
			switch {
			case v.checked && v.teeErr == nil:
				// The cache has what the digest promises even if the tar inside is bad.
				pl.commits <- w // has room for all
			case err != nil && !isDamage(pl.ctx, err) && v.teeErr == nil && pl.rejected.Load() == 0:
				_ = w.Suspend() // what has come may be right
			default:
				_ = w.Abort()
			}
		}()
		if r, n := w.Partial(); n > 0 {
			v.before, v.beforeBytes = r, n
			pl.resumed.Store(int32(i + 1))
		}
	}
	if v.beforeBytes == 0 {
		v.r, err = bl.open(ctx, pl.progress)
	} else if v.beforeBytes < bl.sizeBytes {
		v.r, err = bl.openRest(ctx, v.beforeBytes)
	}
	if err != nil {
		return err
	}
	if v.r != nil {
		defer v.r.Close()
	}
	a := newAhead(v, func(n int) {
		pl.fetched += int64(n)
		pl.progress.report("fetch", bl.label, pl.fetched, pl.total)
	})
	// From here on only the goroutine of a has to do with v.
	err = pl.inflateBody(i, bufio.NewReaderSize(a, peekBytes))
	if (err != nil || pl.rejected.Load() == int32(i+1)) && bl.sizeBytes-a.n > maxVerdictBytes {
		cancel()
		a.stop()
		return err
	}
	// What the decoder left must be hashed too. A wrong digest, or what broke the
	// stream, says more than what the decoder made of it.
	a.stop()
	if verr := v.finish(); verr != nil {
		err = verr
	}
	if bl.inputSum != nil && bl.filter == nil && err == nil {
		*bl.inputSum = digestOf(v.h)
	}
	return err
}

// keep makes the place where a blob is kept.
func (pl *pipeline) keep(bl *blob) (BlobWriter, error) {
	if bl.openRest != nil {
		return bl.keep.Resume(bl.digest, bl.sizeBytes)
	}
	return bl.keep.Create(bl.digest)
}

// isDamage says whether an error is about the bytes of a blob, not about the
// way here or this host.
func isDamage(ctx context.Context, err error) bool {
	if _, ok := errors.AsType[*localError](err); ok || ctx.Err() != nil {
		return false
	}
	if e, ok := errors.AsType[*banger.Error](err); ok && e.Code == banger.CodeUnavailable {
		return false
	}
	return true
}

// A resumedError is damage in a blob of which a part came before: that part may
// be to blame, and is gone now.
type resumedError struct{ err error }

func (e *resumedError) Error() string        { return e.err.Error() }
func (e *resumedError) Unwrap() error        { return e.err }
func (e *resumedError) Is(target error) bool { return target == ErrResumed }

// ErrResumed is what an error of Squash is, too, if it may come from a part of
// a blob that was kept from before. It was dropped: the same again, into an
// empty sink, fetches all of the blob.
var ErrResumed = errors.New("a part of it was kept from before")

func (pl *pipeline) inflateBody(i int, in *bufio.Reader) error {
	r, err := decompress(in, pl.blobs[i].mediaType, pl.blobs[i].diffID != "")
	if err != nil {
		return err
	}
	defer r.Close()
	for {
		var buf []byte
		select {
		case buf = <-pl.free:
		case <-pl.ctx.Done():
			return context.Cause(pl.ctx)
		}
		n, err := 0, error(nil)
		for n < len(buf) && err == nil {
			var m int
			m, err = r.Read(buf[n:])
			n += m
		}
		if pl.expanded += int64(n); pl.expanded > pl.lim.expandedBytes {
			return fmt.Errorf("layers of more than %d bytes uncompressed", pl.lim.expandedBytes)
		}
		if pl.expanded > ExpansionFrom && pl.expanded/MaxExpansion > pl.fetched {
			return fmt.Errorf("%d bytes of layers: it expands to more than %d times that", pl.fetched, MaxExpansion)
		}
		select {
		case pl.raw <- chunk{buf: buf, n: n}:
		case <-pl.ctx.Done():
			return context.Cause(pl.ctx)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return inflateError(err)
		}
		if pl.rejected.Load() == int32(i+1) {
			return nil // its reader has an error already
		}
	}
}

func inflateError(err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the compressed stream is cut short")
	case errors.Is(err, gzip.ErrCorrupt):
		return errors.New("the gzip stream is damaged")
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("the zstd stream needs a window of more than %d bytes", MaxZstdWindow)
	}
	return err
}

// compression is told by the first bytes; a media type only has to agree. What
// is hashed needs no checksum of zstd's own.
func decompress(in *bufio.Reader, mediaType string, hashed bool) (io.ReadCloser, error) {
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	kind := compressionOf(magic)
	if kind == "" && mediaType == "" && bytes.Equal(magic, []byte{0xfd, '7', 'z', 'X'}) {
		return nil, errors.New("compressed with xz, which is not supported: gzip, zstd or none is")
	}
	if mediaType != "" {
		want, _ := layerCompression(mediaType)
		if want != kind {
			return nil, fmt.Errorf("media type %q does not fit its content (%s)", mediaType, compressionWord(kind))
		}
	}
	switch kind {
	case "gzip":
		return io.NopCloser(gzip.NewReader(in)), nil
	case "zstd":
		d, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(MaxZstdWindow), zstd.IgnoreChecksum(hashed))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(in), nil
}

// compressionOf tells by a stream's first four bytes: "gzip", "zstd" or "".
func compressionOf(magic []byte) string {
	switch {
	case len(magic) >= 2 && magic[0] == 0x1f && magic[1] == 0x8b:
		return "gzip"
	case len(magic) == 4 && (bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18})):
		return "zstd" // a frame or a skippable frame
	}
	return ""
}

func compressionWord(kind string) string {
	if kind == "" {
		return "neither gzip nor zstd"
	}
	return kind
}

// mismatchError is a digest or size other than promised.
type mismatchError struct{ what, got, want string }

func (e *mismatchError) Error() string {
	return fmt.Sprintf("%s is %s, expected %s", e.what, e.got, e.want)
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// verifier hashes and counts a blob while it is read and copies it to tee.
type verifier struct {
	before      io.Reader // what is there already and not written to tee
	beforeBytes int64
	r           io.ReadCloser // the rest; nil if there is none

	h    hash.Hash
	want string // digest; "" checks nothing
	size int64  // -1 unknown
	most int64  // cap where size is unknown
	tee  io.Writer
	step func(n int)
	ctx  context.Context

	n       int64
	end     error // what reading ended with
	teeErr  error
	checked bool // size and digest were right
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.end != nil {
		return 0, v.end
	}
	if v.ctx.Err() != nil {
		v.end = context.Cause(v.ctx)
		return 0, v.end
	}
	limit := v.size
	if limit < 0 {
		limit = v.most
	}
	// One byte more than promised is read, to see that it is not there.
	if left := limit - v.n + 1; int64(len(p)) > left {
		p = p[:left]
	}
	n, err := v.read(p)
	fromBefore := v.n < v.beforeBytes
	v.n += int64(n)
	if v.n > limit {
		v.end = &mismatchError{what: "size", got: fmt.Sprintf("more than %d bytes", limit), want: fmt.Sprintf("%d bytes", limit)}
		return 0, v.end
	}
	v.h.Write(p[:n])
	if v.tee != nil && n > 0 && !fromBefore {
		if _, terr := v.tee.Write(p[:n]); terr != nil {
			v.teeErr = terr
			v.end = &localError{fmt.Errorf("blob cache: %w", terr)}
			return 0, v.end
		}
	}
	if v.step != nil {
		v.step(n)
	}
	if err == io.EOF && v.size >= 0 && v.n != v.size {
		err = &mismatchError{what: "size", got: fmt.Sprintf("%d bytes", v.n), want: fmt.Sprintf("%d bytes", v.size)}
	}
	v.end = err
	return n, err
}

// read reads on in what is there already, then in what comes.
func (v *verifier) read(p []byte) (int, error) {
	if left := v.beforeBytes - v.n; left > 0 {
		n, err := v.before.Read(p[:min(int64(len(p)), left)])
		if err != nil && err != io.EOF {
			return n, &localError{fmt.Errorf("blob cache: %w", err)}
		}
		if n == 0 {
			return 0, &localError{errors.New("blob cache: it became shorter")}
		}
		return n, nil
	}
	if v.r == nil {
		return 0, io.EOF
	}
	return v.r.Read(p)
}

// finish reads what is left of the blob and compares the digest.
func (v *verifier) finish() error {
	if v.end == nil {
		if _, err := io.Copy(io.Discard, v); err != nil {
			return err
		}
	}
	if v.end != io.EOF {
		return v.end
	}
	if v.want != "" {
		if got := digestOf(v.h); got != v.want {
			return &mismatchError{what: "digest", got: got, want: v.want}
		}
	}
	v.checked = true
	return nil
}
