package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"banger"

	"golang.org/x/sys/unix"
)

const (
	annotationRefName   = "org.opencontainers.image.ref.name"
	annotationImageName = "io.containerd.image.name" // the full name, which the other lacks
)

// layout is an OCI image layout; image-spec image-layout.md.
type layout struct{ files fileOpener }

// A fileOpener opens what a layout holds and tells its size.
type fileOpener interface {
	open(name string) (io.ReadCloser, int64, error)
}

// folder is a layout in a directory. Symlinks in it are followed only inside
// it, as os.Root does.
type folder struct{ dir *os.File }

func (s *Source) resolveLayout(ctx context.Context, img *Image) error {
	if s.Input == nil {
		return banger.Errorf(banger.CodeInternal, "image %q: its folder was not opened", img.Name)
	}
	err := s.pinLayout(ctx, img, &layout{folder{s.Input}})
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*banger.Error](err); ok {
		return withImage(img.Name, e)
	}
	return sourceError(ctx, img.Name, err)
}

func (s *Source) pinLayout(ctx context.Context, img *Image, l *layout) error {
	marker, err := l.readSmall("oci-layout", MaxManifestBytes)
	if err != nil {
		return err
	}
	var version struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(marker, &version); err != nil || version.Version != "1.0.0" {
		return errors.New("not an OCI image layout of version 1.0.0")
	}
	raw, err := l.readSmall("index.json", MaxManifestBytes)
	if err != nil {
		return err
	}
	doc, err := parseDocument(raw, "")
	if err != nil {
		return fmt.Errorf("index.json: %w", err)
	}
	if !doc.index {
		return errors.New("index.json: not an index")
	}
	d, err := chooseInLayout(doc.manifests, img.Reference)
	if err != nil {
		return err
	}
	if d == nil {
		// Images for several platforms, no tag to tell them apart.
		return s.pin(ctx, img, l, raw, "")
	}
	if err := d.check(MaxManifestBytes); err != nil {
		return err
	}
	if ref, err := ParseReference(d.Annotations[annotationImageName]); err == nil && ref.Kind == KindRegistry {
		img.Suggested = ref.Name()
	}
	raw, mediaType, err := s.pinned(ctx, l, d)
	if err != nil {
		return err
	}
	return s.pin(ctx, img, l, raw, mediaType)
}

// chooseInLayout finds the entry a reference means; nil means that platforms
// are to decide among all.
func chooseInLayout(manifests []descriptor, ref Reference) (*descriptor, error) {
	var tags []string
	var found []*descriptor
	for i := range manifests {
		d := &manifests[i]
		tag := d.Annotations[annotationRefName]
		if tag != "" && len(tags) < 16 {
			tags = append(tags, clip(tag))
		}
		if ref.Digest != "" && d.Digest != ref.Digest || ref.Tag != "" && tag != ref.Tag {
			continue
		}
		found = append(found, d)
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1 && !slices.ContainsFunc(found, func(d *descriptor) bool { return d.Platform == nil }):
		if ref.Tag == "" && ref.Digest == "" {
			return nil, nil
		}
		return nil, banger.Errorf(banger.CodeInvalid, "%d images are called so", len(found))
	case len(found) > 1:
		return nil, banger.Errorf(banger.CodeUsage, "holds %d images, tags %q", len(found), tags).WithHint("name one: %s:TAG", ref)
	case len(manifests) == 0:
		return nil, banger.Errorf(banger.CodeNotFound, "holds no image")
	}
	e := banger.Errorf(banger.CodeNotFound, "no such image in it")
	if len(tags) > 0 {
		e = e.WithHint("it has the tags %s", strings.Join(tags, ", "))
	}
	return nil, e
}

func (l folder) open(name string) (io.ReadCloser, int64, error) {
	// The folder is the one the caller opened, whatever its path names now.
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", l.dir.Fd()))
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return nil, 0, &localError{errno} // out of descriptors, for one
	}
	if err != nil {
		return nil, 0, errors.New("not a folder")
	}
	defer root.Close()
	// Non-blocking, so that a FIFO planted as a blob cannot hold us.
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, 0, fmt.Errorf("%s is missing", name)
		}
		return nil, 0, fmt.Errorf("%s: %w", name, pathReason(err))
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("%s: %w", name, pathReason(err))
	}
	return f, st.Size(), nil
}

// pathReason drops the path from an error whose subject is named already.
func pathReason(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

func (l *layout) readSmall(name string, most int64) ([]byte, error) {
	f, _, err := l.files.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, pathReason(err))
	}
	if int64(len(raw)) > most {
		return nil, fmt.Errorf("%s: more than %d bytes", name, most)
	}
	return raw, nil
}

// blobPath takes digests that match digestPattern only.
func blobPath(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }

func (l *layout) manifest(_ context.Context, digest string) ([]byte, string, error) {
	raw, err := l.readSmall(blobPath(digest), MaxManifestBytes)
	return raw, "", err
}

func (l *layout) openBlob(_ context.Context, digest string, sizeBytes int64) (io.ReadCloser, error) {
	f, size, err := l.files.open(blobPath(digest))
	if err != nil {
		return nil, err
	}
	if size != sizeBytes {
		f.Close()
		return nil, &mismatchError{what: "blob " + digest + ": size", got: fmt.Sprintf("%d bytes", size), want: fmt.Sprintf("%d bytes", sizeBytes)}
	}
	return f, nil
}
