package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Export writes an image whose blobs are all in s.Blobs as one tar: an OCI
// image layout that is also what `docker load` takes. Blobs are written as they
// are, each verified on the way. name is what the image is called in it.
func (s *Source) Export(ctx context.Context, w io.Writer, img *Image, name string) error {
	p := newProgress(s.Progress)
	manifest := s.cachedDocument(img.Digest)
	config := s.cachedDocument(img.Documents[len(img.Documents)-1])
	if manifest == nil || config == nil {
		return sourceError(ctx, img.Name, fmt.Errorf("manifest or config is missing or damaged"))
	}
	doc, err := parseDocument(manifest, "")
	if err != nil {
		return sourceError(ctx, img.Name, err)
	}
	mediaType := mediaOCIManifest
	if doc.config.MediaType == mediaDockerConfig {
		mediaType = mediaDockerManifest
	}
	annotations := map[string]string{}
	var tags []string
	if ref, err := ParseReference(name); err == nil && ref.Kind == KindRegistry && ref.Tag != "" {
		ref.Digest = ""
		tags = []string{ref.String()}
		annotations[annotationRefName], annotations[annotationImageName] = ref.Tag, ref.String()
	}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": mediaOCIIndex,
		"manifests": []any{map[string]any{"mediaType": mediaType, "digest": img.Digest, "size": len(manifest), "annotations": annotations}},
	})
	if err != nil {
		return err
	}
	docker := dockerImage{Config: blobPath(sum(config)), RepoTags: tags, Layers: []string{}}
	for _, l := range img.Layers {
		docker.Layers = append(docker.Layers, blobPath(l.Digest))
	}
	dockerManifest, err := json.Marshal([]dockerImage{docker})
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	file := func(name string, r io.Reader, size int64) error {
		if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}); err != nil {
			return &localError{err}
		}
		_, err := io.CopyN(t, r, size)
		return err
	}
	small := func(name string, data []byte) error { return file(name, bytes.NewReader(data), int64(len(data))) }
	var total, done int64
	for _, l := range img.Layers {
		total += l.SizeBytes
	}
	write := func() error {
		for _, f := range []struct {
			name string
			data []byte
		}{
			{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
			{"index.json", index},
			{"manifest.json", dockerManifest},
			{blobPath(img.Digest), manifest},
			{blobPath(sum(config)), config},
		} {
			if err := small(f.name, f.data); err != nil {
				return err
			}
		}
		written := make(map[string]bool)
		for _, l := range img.Layers {
			if written[l.Digest] {
				continue // an archive has a name once
			}
			written[l.Digest] = true
			r, err := img.from.openBlob(ctx, l.Digest, l.SizeBytes)
			if err != nil {
				return err
			}
			v := &verifier{ctx: ctx, r: r, h: sha256.New(), want: l.Digest, size: l.SizeBytes, step: func(n int) {
				done += int64(n)
				p.report("export", "layer "+l.Digest, done, total)
			}}
			err = file(blobPath(l.Digest), v, l.SizeBytes)
			if err == nil {
				err = v.finish()
			}
			r.Close()
			if err != nil {
				return fmt.Errorf("layer %s: %w", l.Digest, err)
			}
		}
		return t.Close()
	}
	if err := write(); err != nil {
		return sourceError(ctx, img.Name, err)
	}
	return nil
}
