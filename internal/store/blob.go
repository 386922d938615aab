package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Blobs are the content-addressed files of the store: complete, verified by
// their writer, and never changed.
type Blobs struct{ s *Store }

// Blobs returns the blob store.
func (s *Store) Blobs() *Blobs { return &Blobs{s} }

// path turns a digest into a path, refusing anything but sha256 in lower-case
// hex: a digest is text from a registry.
func (b *Blobs) path(digest string) (string, error) {
	hex, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || !isHex256(hex) {
		return "", fmt.Errorf("digest %q: not sha256 and 64 hex digits", digest)
	}
	return filepath.Join(b.s.root, blobsDir, "sha256", hex), nil
}

func isHex256(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// Open opens a blob and tells its size; fs.ErrNotExist when it is not here.
func (b *Blobs) Open(digest string) (io.ReadCloser, int64, error) {
	path, err := b.path(digest)
	if err != nil {
		return nil, 0, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// Create begins a blob. Nothing is visible under the digest before Commit.
func (b *Blobs) Create(digest string) (*BlobWriter, error) {
	final, err := b.path(digest)
	if err != nil {
		return nil, err
	}
	tmp, err := b.s.TempDir("blob")
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(tmp.Path, "blob"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		tmp.Remove()
		return nil, err
	}
	return &BlobWriter{f: f, tmp: tmp, final: final, early: NewWriteback(f, true)}, nil
}

// Resume is Create for a blob of so many bytes that comes from far away: what
// has come of it outlives its writer, however that ends, and is what the next
// Resume begins with, as far as Partial tells. One process has it at a time;
// for another Resume is Create.
func (b *Blobs) Resume(digest string, sizeBytes int64) (*BlobWriter, error) {
	final, err := b.path(digest)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(b.s.root, blobsDir, partialDir, filepath.Base(final))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if !holds(f, path) {
		f.Close()
		return b.Create(digest)
	}
	w := &BlobWriter{f: f, final: final, partial: path, early: NewWriteback(f, true)}
	st, err := f.Stat()
	if err == nil {
		if w.have = st.Size(); w.have > sizeBytes {
			w.have, err = 0, f.Truncate(0)
		}
	}
	if err != nil {
		return nil, errors.Join(err, w.Abort())
	}
	w.at = w.have
	return w, nil
}

// holds flocks the file that was opened as path and says whether that worked
// and it is still what is there.
func holds(f *os.File, path string) bool {
	if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return false
	}
	opened, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Lstat(path)
	return err == nil && os.SameFile(opened, now)
}

// What is kept of blobs that came in part: so many, the last that grew, and
// not for ever.
const (
	maxPartials   = 8
	maxPartialAge = 7 * 24 * time.Hour
)

// sweepPartials removes the partial blobs that nobody is likely to go on with.
func (b *Blobs) sweepPartials(now time.Time) error {
	_, _, err := b.removePartials(func(newer int, at time.Time) bool {
		return newer >= maxPartials || now.Sub(at) > maxPartialAge
	})
	return err
}

// RemovePartials removes what has come of blobs that are not arriving now, and
// says how many that were and what they took.
func (b *Blobs) RemovePartials() (count int, freedBytes int64, err error) {
	return b.removePartials(func(int, time.Time) bool { return true })
}

// removePartials asks of each, the newest first, whether it goes.
func (b *Blobs) removePartials(goes func(newer int, at time.Time) bool) (count int, freedBytes int64, err error) {
	dir := filepath.Join(b.s.root, blobsDir, partialDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, 0, err
	}
	var infos []fs.FileInfo
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, 0, err
		}
		infos = append(infos, info)
	}
	slices.SortStableFunc(infos, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	for i, info := range infos {
		if !goes(i, info.ModTime()) {
			continue
		}
		path := filepath.Join(dir, info.Name())
		f := holdIfFree(path)
		if f == nil {
			continue // it is arriving
		}
		err := os.Remove(path)
		f.Close()
		if err != nil {
			return count, freedBytes, err
		}
		count, freedBytes = count+1, freedBytes+info.Size()
	}
	return count, freedBytes, nil
}

// Digests lists the blobs that are here. A stray file is not one.
func (b *Blobs) Digests() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(b.s.root, blobsDir, "sha256"))
	if err != nil {
		return nil, err
	}
	var digests []string
	for _, e := range entries {
		if isHex256(e.Name()) {
			digests = append(digests, "sha256:"+e.Name())
		}
	}
	return digests, nil
}

// Remove deletes a blob; one that is not here is fs.ErrNotExist.
func (b *Blobs) Remove(digest string) error {
	path, err := b.path(digest)
	if err != nil {
		return err
	}
	return os.Remove(path)
}

// A BlobWriter holds a blob that is arriving. Exactly one of Commit, Suspend
// and Abort must be called last.
type BlobWriter struct {
	f     *os.File
	final string
	early *Writeback
	at    int64 // where the next byte goes

	tmp     *Temp  // of Create
	partial string // of Resume: the path
	have    int64  // of Resume: what was there
}

// Partial gives what is there of the blob, which whoever writes goes on behind,
// and how much that is. Nobody has verified it. It is good until Commit, Suspend
// or Abort.
func (w *BlobWriter) Partial() (io.Reader, int64) { return io.NewSectionReader(w.f, 0, w.have), w.have }

func (w *BlobWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	w.early.Wrote(w.at, n)
	w.at += int64(n)
	return n, err
}

// Commit makes the blob durable and visible. The caller has verified digest
// and size. Where two writers race both win: the bytes are the same.
func (w *BlobWriter) Commit() error {
	if w.tmp != nil {
		defer w.tmp.Remove()
	}
	defer w.f.Close() // and a lock with it
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("fsync %s: %w", w.final, errors.Join(err, w.remove()))
	}
	if err := os.Rename(w.f.Name(), w.final); err != nil {
		return err
	}
	return syncDir(filepath.Dir(w.final))
}

// Suspend keeps what has come for the next Resume.
func (w *BlobWriter) Suspend() error {
	if st, err := w.f.Stat(); w.partial == "" || err != nil || st.Size() == 0 {
		return w.Abort()
	}
	return w.f.Close()
}

// Abort drops what has arrived.
func (w *BlobWriter) Abort() error {
	defer w.f.Close()
	if w.tmp != nil {
		return w.tmp.Remove()
	}
	return w.remove()
}

// remove drops a partial blob, which this writer still holds.
func (w *BlobWriter) remove() error {
	if w.partial == "" {
		return nil
	}
	path := w.partial
	w.partial = ""
	return os.Remove(path)
}
