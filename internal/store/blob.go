package store

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
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
	return &BlobWriter{f: f, tmp: tmp, final: final}, nil
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

// A BlobWriter holds a blob that is arriving. Exactly one of Commit and Abort
// must be called last.
type BlobWriter struct {
	f     *os.File
	tmp   *Temp
	final string
}

func (w *BlobWriter) Write(p []byte) (int, error) { return w.f.Write(p) }

// Commit makes the blob durable and visible. The caller has verified digest
// and size. Where two writers race both win: the bytes are the same.
func (w *BlobWriter) Commit() error {
	defer w.tmp.Remove()
	if err := w.f.Sync(); err != nil {
		w.f.Close()
		return fmt.Errorf("fsync %s: %w", w.final, err)
	}
	if err := w.f.Close(); err != nil {
		return err
	}
	if err := os.Rename(w.f.Name(), w.final); err != nil {
		return err
	}
	return syncDir(filepath.Dir(w.final))
}

// Abort drops what has arrived.
func (w *BlobWriter) Abort() error {
	w.f.Close()
	return w.tmp.Remove()
}
