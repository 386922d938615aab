package store

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func digestOf(digit byte) string { return "sha256:" + strings.Repeat(string(digit), 64) }

func putBlob(s *Store, digest, content string) error {
	w, err := s.Blobs().Create(digest)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(w, content); err != nil {
		w.Abort()
		return err
	}
	return w.Commit()
}

func readBlob(t *testing.T, s *Store, digest string) string {
	t.Helper()
	r, size, err := s.Blobs().Open(digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil || int64(len(data)) != size {
		t.Errorf("blob of %d bytes, size %d, %v", len(data), size, err)
	}
	return string(data)
}

func TestBlob(t *testing.T) {
	s := open(t)
	tmp := filepath.Join(s.Root(), tmpDir)
	w, err := s.Blobs().Create(digestOf('a'))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "content")
	if _, _, err := s.Blobs().Open(digestOf('a')); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("visible before its commit: %v", err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := readBlob(t, s, digestOf('a')); got != "content" {
		t.Errorf("read %q", got)
	}
	if err := putBlob(s, digestOf('b'), ""); err != nil {
		t.Fatal(err)
	}
	if got := readBlob(t, s, digestOf('b')); got != "" {
		t.Errorf("an empty blob holds %q", got)
	}

	w, err = s.Blobs().Create(digestOf('c'))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "half")
	if err := w.Abort(); err != nil {
		t.Error(err)
	}
	if err := w.Abort(); err != nil {
		t.Errorf("aborted again: %v", err)
	}
	if err := w.Commit(); err == nil {
		t.Error("committed after an abort")
	}
	wantNames(t, tmp)

	// What is no blob is none, whoever put it there.
	stray := filepath.Join(s.Root(), blobsDir, "sha256", "notes.txt")
	if err := os.WriteFile(stray, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	digests, err := s.Blobs().Digests()
	if err != nil || !slices.Equal(digests, []string{digestOf('a'), digestOf('b')}) {
		t.Errorf("digests %q, %v", digests, err)
	}
	if err := s.Blobs().Remove(digestOf('a')); err != nil {
		t.Error(err)
	}
	if err := s.Blobs().Remove(digestOf('a')); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed twice: %v", err)
	}
	if _, _, err := s.Blobs().Open(digestOf('a')); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open after remove: %v", err)
	}
}

func TestHostileDigests(t *testing.T) {
	s := open(t)
	hex := strings.Repeat("a", 64)
	for _, d := range []string{
		"", "sha256:", ":", hex, "sha256" + hex,
		"sha256:" + hex[1:], "sha256:" + hex + "a",
		"sha256:" + strings.Repeat("A", 64), "SHA256:" + hex, "sha256:" + strings.Repeat("g", 64),
		"sha512:" + hex + hex, "sha512:" + hex, "md5:" + hex[:32],
		"sha256:../../../../etc/passwd",
		"sha256:" + strings.Repeat("../", 21) + "a", // 64 bytes
		"sha256:" + hex[:31] + "/" + hex[:32], "sha256:" + hex[:30] + "/../" + hex[:30],
		"../sha256:" + hex, "sha256:/" + hex[:63], "sha256:" + hex + "/..",
		"sha256:" + hex[:63] + "\x00", "sha256:" + hex[:32] + "\x00" + hex[:31], "sha256:" + hex + "\x00",
		"sha256:" + hex[:63] + "\n", " sha256:" + hex, "sha256: " + hex[:63], "sha256:" + hex + " ",
		"sha256:" + hex[:63] + "ａ", "sha256:" + hex[:63] + "\xff", "sha256:sha256:" + hex[:57],
	} {
		b := s.Blobs()
		if _, err := b.Create(d); err == nil {
			t.Errorf("digest %q: created", d)
		}
		if r, _, err := b.Open(d); err == nil {
			r.Close()
			t.Errorf("digest %q: opened", d)
		} else if errors.Is(err, fs.ErrNotExist) {
			t.Errorf("digest %q: looked for", d)
		}
		if err := b.Remove(d); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("digest %q: remove says %v", d, err)
		}
	}
	wantNames(t, filepath.Join(s.Root(), tmpDir))
	if err := putBlob(s, "sha256:"+strings.Repeat("0123456789abcdef", 4), "x"); err != nil {
		t.Errorf("a digest with every digit: %v", err)
	}
}

// Writers of one blob all win: what they bring is the same.
func TestBlobWriters(t *testing.T) {
	s := open(t)
	content := strings.Repeat("same", 10_000)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := putBlob(s, digestOf('a'), content); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := readBlob(t, s, digestOf('a')); got != content {
		t.Errorf("%d bytes, want %d", len(got), len(content))
	}
	wantNames(t, filepath.Join(s.Root(), tmpDir))
}

// What came of a blob is gone on with by one writer at a time.
func TestBlobResume(t *testing.T) {
	s := open(t)
	dir := filepath.Join(s.Root(), blobsDir, partialDir)
	resume := func(digest string, sizeBytes int64) (w *BlobWriter, had string) {
		t.Helper()
		w, err := s.Blobs().Resume(digest, sizeBytes)
		if err != nil {
			t.Fatal(err)
		}
		r, n := w.Partial()
		data, err := io.ReadAll(r)
		if err != nil || int64(len(data)) != n {
			t.Errorf("%d bytes of %d, %v", len(data), n, err)
		}
		return w, string(data)
	}
	w, had := resume(digestOf('a'), 8)
	if had != "" {
		t.Errorf("a new one has %q", had)
	}
	io.WriteString(w, "half")
	// Meanwhile another brings it whole.
	other, had := resume(digestOf('a'), 8)
	if had != "" {
		t.Errorf("the second has %q", had)
	}
	io.WriteString(other, "half-all")
	if err := other.Commit(); err != nil {
		t.Error(err)
	}
	if err := w.Suspend(); err != nil {
		t.Error(err)
	}
	wantNames(t, dir, strings.Repeat("a", 64))
	for range 2 { // it stays with the next start
		if _, err := Open(s.Root()); err != nil {
			t.Fatal(err)
		}
	}
	w, had = resume(digestOf('a'), 8)
	if had != "half" {
		t.Errorf("gone on with %q", had)
	}
	io.WriteString(w, "-all")
	if err := w.Commit(); err != nil {
		t.Error(err)
	}
	if got := readBlob(t, s, digestOf('a')); got != "half-all" {
		t.Errorf("read %q", got)
	}
	wantNames(t, dir)

	// As large as the blob is all there can be.
	for size, want := range map[int64]string{4: "four", 3: ""} {
		w, _ := resume(digestOf('b'), 9)
		io.WriteString(w, "four")
		if err := w.Suspend(); err != nil {
			t.Error(err)
		}
		w, had := resume(digestOf('b'), size)
		if had != want {
			t.Errorf("of %d bytes there are %q, want %q", size, had, want)
		}
		if err := w.Abort(); err != nil {
			t.Error(err)
		}
		wantNames(t, dir)
	}
	w, _ = resume(digestOf('c'), 9)
	if err := w.Suspend(); err != nil {
		t.Error(err)
	}
	wantNames(t, dir) // nothing came
	if _, err := s.Blobs().Resume("sha256:../../x", 1); err == nil {
		t.Error("a path for a digest")
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, strings.Repeat("d", 64))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Blobs().Resume(digestOf('d'), 1<<30); err == nil {
		t.Error("a symlink was followed")
	}
}

// So many partial blobs are kept, and so long, but none is taken that arrives.
func TestPartialsSwept(t *testing.T) {
	s := open(t)
	dir := filepath.Join(s.Root(), blobsDir, partialDir)
	now := time.Now()
	put := func(digit byte, age time.Duration) {
		t.Helper()
		path := filepath.Join(dir, strings.Repeat(string(digit), 64))
		if err := os.WriteFile(path, []byte("part"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, now.Add(-age), now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range byte(maxPartials + 1) {
		put("0123456789abcdef"[i], time.Duration(i)*time.Hour)
	}
	put('e', maxPartialAge-time.Hour)
	put('f', 2*maxPartialAge)
	oldest, err := s.Blobs().Resume(digestOf('f'), 4)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for i := range maxPartials {
		want = append(want, strings.Repeat(string("0123456789abcdef"[i]), 64))
	}
	if _, err := Open(s.Root()); err != nil {
		t.Fatal(err)
	}
	wantNames(t, dir, append(want, strings.Repeat("f", 64))...)
	oldest.Abort()
	for i, age := range []time.Duration{maxPartialAge - time.Minute, maxPartialAge + time.Minute} {
		for _, name := range names(t, dir) {
			os.Remove(filepath.Join(dir, name))
		}
		put('a', age)
		if _, err := Open(s.Root()); err != nil {
			t.Fatal(err)
		}
		if left := len(names(t, dir)); left != 1-i {
			t.Errorf("of age %s %d stay", age, left)
		}
	}
}
