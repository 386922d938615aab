package oci

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"strings"

	"banger"
)

// ExportTar is Export for what was not made of layers: an image of one, not
// compressed, of which write gives the tar. It is asked twice, and must write
// the same bytes.
func ExportTar(ctx context.Context, w io.Writer, name, platform string, config banger.ImageConfig, write func(io.Writer) error) error {
	h := sha256.New()
	n := &countingWriter{w: h}
	if err := write(n); err != nil {
		return sourceError(ctx, name, err)
	}
	digest := digestOf(h)
	parts := append(strings.SplitN(platform, "/", 3), "", "")
	rawConfig, err := json.Marshal(map[string]any{
		"os": parts[0], "architecture": parts[1], "variant": parts[2],
		"config": map[string]any{
			"Entrypoint": config.Entrypoint, "Cmd": config.Cmd, "Env": config.Env,
			"User": config.User, "WorkingDir": config.WorkingDir, "StopSignal": config.StopSignal,
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest}},
	})
	if err != nil {
		return err
	}
	descriptor := func(media, digest string, size int64) map[string]any {
		return map[string]any{"mediaType": media, "digest": digest, "size": size}
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": mediaOCIManifest,
		"config": descriptor(mediaOCIConfig, sum(rawConfig), int64(len(rawConfig))),
		"layers": []any{descriptor(mediaOCILayer, digest, n.n)},
	})
	if err != nil {
		return err
	}
	src := &writtenImage{documents: map[string][]byte{sum(rawConfig): rawConfig, sum(manifest): manifest}, write: write}
	img := &Image{
		Name: name, Digest: sum(manifest), Documents: []string{sum(manifest), sum(rawConfig)}, from: src,
		Layers: []Layer{{Digest: digest, DiffID: digest, MediaType: mediaOCILayer, SizeBytes: n.n}},
	}
	return (&Source{Blobs: src}).Export(ctx, w, img, name)
}

// writtenImage is the documents of an image, and its one layer, which is
// written when it is asked for.
type writtenImage struct {
	documents map[string][]byte
	write     func(io.Writer) error
}

func (i *writtenImage) Open(digest string) (io.ReadCloser, int64, error) {
	raw, ok := i.documents[digest]
	if !ok {
		return nil, 0, fs.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(raw)), int64(len(raw)), nil
}

var errReadOnly = errors.New("nothing is kept here")

func (i *writtenImage) Create(string) (BlobWriter, error)        { return nil, errReadOnly }
func (i *writtenImage) Resume(string, int64) (BlobWriter, error) { return nil, errReadOnly }

func (i *writtenImage) openBlob(context.Context, string, int64) (io.ReadCloser, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(i.write(w)) }() // ends when r is closed
	return r, nil
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
