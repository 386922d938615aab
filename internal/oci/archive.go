package oci

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"banger"
)

// Limits on an archive of an image.
const (
	maxArchiveEntries = 8192 // files in it: three a layer in the oldest form
	maxArchiveLinks   = 8    // symlinks from one layer to another
)

// An imageArchive is a tar with an image in it, as `docker save`, skopeo and
// `banger image export` write one: an OCI image layout, or Docker's own form
// with a manifest.json, or both. It is read in any order, so a stream is kept in
// a file first. Nothing in it is unpacked: a path is a key of files and never
// one of the host.
type imageArchive struct {
	f     io.ReaderAt
	files map[string]archiveFile
	blobs map[string]string // digest to path, of Docker's form
}

type archiveFile struct {
	at, size int64
	target   string // of a symlink
}

func (s *Source) resolveArchive(ctx context.Context, img *Image, p *progress) error {
	if s.Input == nil {
		return banger.Errorf(banger.CodeInternal, "image %q: it was not opened", img.Name)
	}
	err := s.pinArchive(ctx, img, p)
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*banger.Error](err); ok && ctx.Err() == nil {
		return withImage(img.Name, e)
	}
	return sourceError(ctx, img.Name, err)
}

func (s *Source) pinArchive(ctx context.Context, img *Image, p *progress) error {
	f, err := s.seekable(ctx, img.Name, p)
	if err != nil {
		return err
	}
	a, err := scanArchive(ctx, f)
	if err != nil {
		return err
	}
	_, isLayout := a.files["oci-layout"]
	_, isDocker := a.files["manifest.json"]
	switch {
	case isLayout && (!isDocker || img.Reference.Tag == ""):
		return s.pinLayout(ctx, img, &layout{a})
	case isDocker:
		return s.pinDocker(ctx, img, a)
	}
	return banger.Errorf(banger.CodeInvalid, "no image in it: neither an OCI layout nor a manifest.json").
		WithHint("for a root file system say rootfs:%s", clip(img.Reference.Path))
}

// seekable is the input as a file of uncompressed bytes: itself, if it is one.
func (s *Source) seekable(ctx context.Context, label string, p *progress) (*os.File, error) {
	st, err := s.Input.Stat()
	if err != nil {
		return nil, pathReason(err)
	}
	in := bufio.NewReaderSize(&patientReader{ctx: ctx, f: s.Input, poll: !st.Mode().IsRegular()}, chunkBytes)
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if st.Mode().IsRegular() && compressionOf(magic) == "" {
		return s.Input, nil
	}
	r, err := decompress(in, "", false)
	if err != nil {
		return nil, inflateError(err)
	}
	defer r.Close()
	if s.Scratch == nil {
		return nil, banger.Errorf(banger.CodeInternal, "no room was given to keep a stream in")
	}
	out, err := s.Scratch()
	if err != nil {
		return nil, &localError{err}
	}
	most := s.lim().expandedBytes
	var done int64
	buf := make([]byte, chunkBytes)
	for {
		n, err := r.Read(buf)
		if done += int64(n); done > most {
			return nil, fmt.Errorf("more than %d bytes uncompressed", most)
		}
		if _, werr := out.Write(buf[:n]); werr != nil {
			return nil, &localError{werr}
		}
		p.report("fetch", label, done, 0)
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, inflateError(err)
		}
	}
}

// scanArchive finds where the files of an archive lie, without reading them.
func scanArchive(ctx context.Context, f *os.File) (*imageArchive, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, pathReason(err)
	}
	r := io.NewSectionReader(f, 0, st.Size())
	tr := tar.NewReader(r)
	a := &imageArchive{f: f, files: make(map[string]archiveFile)}
	for n := 0; ; n++ {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		h, err := tr.Next()
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return nil, tarError(&endMark{}, err)
		}
		if n == maxArchiveEntries {
			return nil, fmt.Errorf("more than %d files in it", maxArchiveEntries)
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		file := archiveFile{size: h.Size}
		switch h.Typeflag {
		case tar.TypeReg, '\x00':
			for k := range h.PAXRecords {
				if strings.HasPrefix(k, "GNU.sparse.") {
					return nil, entryError(h.Name, errors.New("a sparse file"))
				}
			}
			if file.at, err = r.Seek(0, io.SeekCurrent); err != nil {
				return nil, err
			}
			if file.at > st.Size()-file.size {
				return nil, errCutShort
			}
		case tar.TypeSymlink, tar.TypeLink:
			file.target = h.Linkname
			if h.Typeflag == tar.TypeSymlink {
				file.target = path.Join(path.Dir(name), h.Linkname)
			}
			file.target = strings.TrimPrefix(path.Clean("/"+file.target), "/")
		case tar.TypeDir, tar.TypeXGlobalHeader:
			continue
		default:
			return nil, entryError(h.Name, fmt.Errorf("tar entry of type %q has no place in an image archive", h.Typeflag))
		}
		if _, ok := a.files[name]; ok {
			return nil, entryError(h.Name, errors.New("it is there twice"))
		}
		a.files[strings.Clone(name)] = file
	}
}

// open implements fileOpener.
func (a *imageArchive) open(name string) (io.ReadCloser, int64, error) {
	at := strings.TrimPrefix(path.Clean("/"+name), "/")
	for range maxArchiveLinks {
		file, ok := a.files[at]
		if !ok {
			break
		}
		if file.target == "" {
			return io.NopCloser(io.NewSectionReader(a.f, file.at, file.size)), file.size, nil
		}
		at = file.target
	}
	return nil, 0, fmt.Errorf("%q is missing", clip(name))
}

// manifest implements documents; Docker's form has none.
func (a *imageArchive) manifest(context.Context, string) ([]byte, string, error) {
	return nil, "", errors.New("no manifest in it")
}

// openBlob implements blobSource for Docker's form.
func (a *imageArchive) openBlob(_ context.Context, digest string, _ int64) (io.ReadCloser, error) {
	r, _, err := a.open(a.blobs[digest])
	return r, err
}

// A dockerImage is one image in the manifest.json of `docker save`.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// pinDocker gives an image of Docker's form what it lacks: digests of its
// layers as they are stored, and a manifest, which is the same for the same
// archive.
func (s *Source) pinDocker(ctx context.Context, img *Image, a *imageArchive) error {
	raw, err := (&layout{a}).readSmall("manifest.json", MaxManifestBytes)
	if err != nil {
		return err
	}
	if err := refuseDuplicates(raw); err != nil {
		return fmt.Errorf("manifest.json: %w", err)
	}
	var images []dockerImage
	if err := json.Unmarshal(raw, &images); err != nil {
		return fmt.Errorf("manifest.json: %w", jsonReason(err))
	}
	d, err := chooseDocker(images, img.Reference)
	if err != nil {
		return err
	}
	want, err := parsePlatform(s.platform())
	if err != nil {
		return err
	}
	if lim := s.lim(); len(d.Layers) > lim.layers {
		return fmt.Errorf("%d layers, at most %d are taken", len(d.Layers), lim.layers)
	}
	config, err := (&layout{a}).readSmall(d.Config, MaxConfigBytes)
	if err != nil {
		return err
	}
	type described struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int64  `json:"size"`
	}
	m := struct {
		SchemaVersion int         `json:"schemaVersion"`
		MediaType     string      `json:"mediaType"`
		Config        described   `json:"config"`
		Layers        []described `json:"layers"`
	}{2, mediaOCIManifest, described{mediaOCIConfig, sum(config), int64(len(config))}, []described{}}
	a.blobs = make(map[string]string)
	for _, name := range d.Layers {
		l := described{}
		if l.MediaType, l.Digest, l.Size, err = a.layer(ctx, name, s.lim()); err != nil {
			return err
		}
		a.blobs[l.Digest] = name
		m.Layers = append(m.Layers, l)
	}
	if raw, err = json.Marshal(m); err != nil {
		return err
	}
	doc, err := parseDocument(raw, mediaOCIManifest)
	if err != nil {
		return err
	}
	if err := checkLayers(doc, s.lim()); err != nil {
		return err
	}
	if err := fillImage(img, doc, config, want); err != nil {
		return err
	}
	img.Digest, img.Documents, img.from = sum(raw), []string{sum(raw), sum(config)}, a
	for _, tag := range d.RepoTags {
		if ref, err := ParseReference(tag); err == nil && ref.Kind == KindRegistry {
			img.Suggested = ref.Name()
			break
		}
	}
	if err := s.keepDocument(sum(raw), raw); err != nil {
		return err
	}
	return s.keepDocument(sum(config), config)
}

// chooseDocker finds the image that a reference means.
func chooseDocker(images []dockerImage, ref Reference) (*dockerImage, error) {
	var tags []string
	for i := range images {
		for _, tag := range images[i].RepoTags {
			if len(tags) < 16 {
				tags = append(tags, clip(tag))
			}
			if ref.Tag == "" {
				continue
			}
			want, err := ParseReference(ref.Tag)
			if got, err2 := ParseReference(tag); err == nil && err2 == nil && want == got {
				return &images[i], nil
			}
		}
	}
	switch {
	case len(images) == 1 && ref.Tag == "":
		return &images[0], nil
	case len(images) == 0:
		return nil, banger.Errorf(banger.CodeNotFound, "holds no image")
	case ref.Tag != "":
		return nil, banger.Errorf(banger.CodeNotFound, "no such image in it").WithHint("it has %q", tags)
	}
	return nil, banger.Errorf(banger.CodeUsage, "holds %d images, %q", len(images), tags).WithHint("name one: %s:NAME:TAG", ref)
}

// layer reads one layer for its digest.
func (a *imageArchive) layer(ctx context.Context, name string, lim limits) (mediaType, digest string, size int64, err error) {
	r, size, err := a.open(name)
	if err != nil {
		return "", "", 0, err
	}
	if size > lim.blobSize {
		return "", "", 0, fmt.Errorf("%q: %d bytes, at most %d are taken", clip(name), size, lim.blobSize)
	}
	h := sha256.New()
	in := bufio.NewReaderSize(r, chunkBytes)
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return "", "", 0, err
	}
	first := bytes.Clone(magic)
	buf := make([]byte, chunkBytes)
	for {
		if ctx.Err() != nil {
			return "", "", 0, context.Cause(ctx)
		}
		n, err := in.Read(buf)
		h.Write(buf[:n])
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", "", 0, err
		}
	}
	mediaType = mediaOCILayer
	if kind := compressionOf(first); kind != "" {
		mediaType += "+" + kind
	}
	return mediaType, digestOf(h), size, nil
}
