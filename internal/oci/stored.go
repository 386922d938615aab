package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"banger"
)

// Stored is an image of which all blobs are in s.Blobs: nothing else is asked.
// digest is that of its manifest, name what errors call it.
func (s *Source) Stored(ctx context.Context, name, digest string) (*Image, error) {
	img := &Image{Name: name, Platform: s.platform(), source: s}
	docs := stored{s}
	raw, mediaType, err := docs.manifest(ctx, digest)
	if err == nil {
		err = s.pin(ctx, img, docs, raw, mediaType)
	}
	if err != nil {
		return nil, sourceError(ctx, name, err)
	}
	return img, nil
}

// stored is the blobs as a source of documents.
type stored struct{ s *Source }

func (d stored) manifest(_ context.Context, digest string) ([]byte, string, error) {
	if raw := d.s.cachedDocument(digest); raw != nil {
		return raw, "", nil
	}
	return nil, "", fmt.Errorf("blob %s is missing or damaged", digest)
}

func (d stored) openBlob(_ context.Context, digest string, _ int64) (io.ReadCloser, error) {
	if d.s.Blobs == nil {
		return nil, errors.New("no blobs are kept")
	}
	r, _, err := d.s.Blobs.Open(digest)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("blob %s is missing", digest)
	}
	return r, err
}

// A Step is how one layer came about, as the image's config says.
type Step struct {
	Created   string // as it stands there
	CreatedBy string
	Comment   string
	Layer     *Layer // nil where the step made none
}

// maxSteps is beyond what any builder writes; MaxConfigBytes bounds it too.
const maxSteps = 10_000

// History returns the steps of an image whose blobs are all in s.Blobs, oldest
// first. Layers that no step tells of come last.
func (s *Source) History(ctx context.Context, name, digest string) ([]Step, error) {
	img, err := s.Stored(ctx, name, digest)
	if err != nil {
		return nil, err
	}
	raw := s.cachedDocument(img.Documents[len(img.Documents)-1]) // the config: pin read it
	var config struct {
		History []struct {
			Created    string `json:"created"`
			CreatedBy  string `json:"created_by"`
			Comment    string `json:"comment"`
			EmptyLayer bool   `json:"empty_layer"`
		} `json:"history"`
	}
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, banger.Errorf(banger.CodeInvalid, "image %q: config: history: %w", name, jsonReason(err))
	}
	if len(config.History) > maxSteps {
		return nil, banger.Errorf(banger.CodeInvalid, "image %q: config: more than %d steps", name, maxSteps)
	}
	var steps []Step
	layers := img.Layers
	for _, h := range config.History {
		step := Step{Created: h.Created, CreatedBy: h.CreatedBy, Comment: h.Comment}
		if !h.EmptyLayer && len(layers) > 0 {
			step.Layer, layers = &layers[0], layers[1:]
		}
		steps = append(steps, step)
	}
	for i := range layers {
		steps = append(steps, Step{Layer: &layers[i]})
	}
	return steps, nil
}
