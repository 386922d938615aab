package oci

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"banger"
)

// Media types; image-spec media-types.md and Docker's image manifest v2 schema 2.
const (
	mediaOCIIndex       = "application/vnd.oci.image.index.v1+json"
	mediaOCIManifest    = "application/vnd.oci.image.manifest.v1+json"
	mediaOCIConfig      = "application/vnd.oci.image.config.v1+json"
	mediaDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	mediaDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaDockerConfig   = "application/vnd.docker.container.image.v1+json"
	mediaOCILayer       = "application/vnd.oci.image.layer.v1.tar"
	mediaDockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	mediaSchema1Prefix  = "application/vnd.docker.distribution.manifest.v1+"
)

func isIndexType(m string) bool    { return m == mediaOCIIndex || m == mediaDockerList }
func isManifestType(m string) bool { return m == mediaOCIManifest || m == mediaDockerManifest }

// layerCompression returns "", "gzip" or "zstd" for a layer's media type.
func layerCompression(mediaType string) (string, error) {
	switch mediaType {
	case mediaOCILayer, mediaDockerLayer:
		return "", nil
	case mediaOCILayer + "+gzip", mediaDockerLayer + ".gzip":
		return "gzip", nil
	case mediaOCILayer + "+zstd", mediaDockerLayer + ".zstd":
		return "zstd", nil
	}
	if strings.Contains(mediaType, "nondistributable") || strings.Contains(mediaType, "foreign") {
		return "", fmt.Errorf("media type %q: foreign layers are not supported", clip(mediaType))
	}
	return "", fmt.Errorf("media type %q is not that of a layer", clip(mediaType))
}

// A descriptor points to a document or blob; image-spec descriptor.md.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        *int64            `json:"size"`
	Platform    *platform         `json:"platform"`
	Annotations map[string]string `json:"annotations"`
}

type platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
}

func (p platform) String() string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

func parsePlatform(s string) (platform, error) {
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") {
		return platform{}, banger.Errorf(banger.CodeUsage, "platform %q: not of the form linux/amd64", clip(s))
	}
	p := platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}

// takes tells whether an image for q runs where p is wanted. A variant counts
// only where both name one; arm64's v8 is the same as none.
func (p platform) takes(q platform) bool {
	return p.OS == q.OS && p.Architecture == q.Architecture && (p.Variant == "" || q.Variant == "" || p.Variant == q.Variant)
}

// check makes sure that a descriptor is safe to act on.
func (d *descriptor) check(most int64) error {
	if !digestPattern.MatchString(d.Digest) {
		return fmt.Errorf("digest %q is not sha256 and 64 hex digits", clip(d.Digest))
	}
	if d.Size == nil || *d.Size < 0 {
		return fmt.Errorf("%s: no size given", d.Digest)
	}
	if *d.Size > most {
		return fmt.Errorf("%s: %d bytes, at most %d are taken", d.Digest, *d.Size, most)
	}
	return nil
}

// document is an index or a manifest, whichever its content says.
type document struct {
	index     bool
	manifests []descriptor
	config    descriptor
	layers    []descriptor
}

// parseDocument decides what a document is by its media type and its content
// together and refuses what could be read in two ways: keys that are there
// twice or in other case, and those of an index beside those of a manifest.
// mediaType is what the one who gave it called it; "" if nobody did.
func parseDocument(raw []byte, mediaType string) (*document, error) {
	if len(raw) > MaxManifestBytes {
		return nil, fmt.Errorf("manifest of more than %d bytes", MaxManifestBytes)
	}
	if strings.HasPrefix(mediaType, mediaSchema1Prefix) {
		return nil, errors.New("a schema 1 manifest, which is not supported: push the image again with a current tool")
	}
	top, err := topLevel(raw)
	if err != nil {
		return nil, err
	}
	if _, ok := top["fsLayers"]; ok {
		return nil, errors.New("a schema 1 manifest, which is not supported: push the image again with a current tool")
	}
	var version int
	if err := json.Unmarshal(top["schemaVersion"], &version); err != nil || version != 2 {
		return nil, errors.New("manifest: schemaVersion is not 2")
	}
	own := ""
	if m, ok := top["mediaType"]; ok {
		if err := json.Unmarshal(m, &own); err != nil {
			return nil, errors.New("manifest: mediaType is not a string")
		}
	}
	if own != "" && mediaType != "" && own != mediaType {
		return nil, fmt.Errorf("manifest: called %q but calls itself %q", clip(mediaType), clip(own))
	}
	if own == "" {
		own = mediaType
	}
	_, hasManifests := top["manifests"]
	_, hasLayers := top["layers"]
	_, hasConfig := top["config"]
	doc := &document{index: hasManifests}
	switch {
	case hasManifests && (hasLayers || hasConfig):
		return nil, errors.New("manifest: reads both as an index and as a manifest")
	case hasManifests && own != "" && !isIndexType(own), !hasManifests && own != "" && !isManifestType(own):
		return nil, fmt.Errorf("manifest: media type %q does not fit its content", clip(own))
	case hasManifests:
		if err := json.Unmarshal(top["manifests"], &doc.manifests); err != nil {
			return nil, fmt.Errorf("index: %w", jsonReason(err))
		}
		return doc, nil
	case !hasLayers || !hasConfig:
		return nil, errors.New("manifest: without layers or config")
	}
	if err := json.Unmarshal(top["layers"], &doc.layers); err != nil {
		return nil, fmt.Errorf("manifest: %w", jsonReason(err))
	}
	if err := json.Unmarshal(top["config"], &doc.config); err != nil {
		return nil, fmt.Errorf("manifest: %w", jsonReason(err))
	}
	return doc, nil
}

// documentKeys are the keys that decide what a document is.
var documentKeys = []string{"schemaVersion", "mediaType", "manifests", "layers", "config", "fsLayers", "rootfs", "os", "architecture", "variant"}

// topLevel splits one JSON object into its members. A duplicate key anywhere in
// the document, or another spelling of a key that matters, is refused: Go and
// others would not agree on which counts.
func topLevel(raw []byte) (map[string]json.RawMessage, error) {
	if err := refuseDuplicates(raw); err != nil {
		return nil, err
	}
	var top map[string]json.RawMessage
	if err := json.Unmarshal(raw, &top); err != nil || top == nil {
		return nil, errors.New("not a JSON object")
	}
	for k := range top {
		for _, want := range documentKeys {
			if k != want && strings.EqualFold(k, want) {
				return nil, fmt.Errorf("key %q is spelled %q", want, k)
			}
		}
	}
	return top, nil
}

func jsonReason(err error) error {
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("%q is not of its type", e.Field)
	}
	return errors.New("not valid JSON")
}

// maxJSONDepth is beyond any image document's nesting.
const maxJSONDepth = 64

// refuseDuplicates walks a JSON document and refuses an object with the same
// key twice.
func refuseDuplicates(raw []byte) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	type level struct {
		keys map[string]bool // nil for an array
		key  bool            // the next token is a key
	}
	var stack []level
	for {
		tok, err := dec.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return errors.New("not valid JSON")
		}
		if d, ok := tok.(json.Delim); ok {
			if d == '{' || d == '[' {
				if len(stack) == maxJSONDepth {
					return fmt.Errorf("JSON nested deeper than %d", maxJSONDepth)
				}
				l := level{}
				if d == '{' {
					l = level{keys: make(map[string]bool), key: true}
				}
				stack = append(stack, l)
				continue
			}
			stack = stack[:len(stack)-1]
		} else if n := len(stack); n > 0 && stack[n-1].key {
			k := tok.(string)
			if stack[n-1].keys[k] {
				return fmt.Errorf("key %q is there twice", clip(k))
			}
			stack[n-1].keys[k] = true
			stack[n-1].key = false
			continue
		}
		if n := len(stack); n > 0 && stack[n-1].keys != nil {
			stack[n-1].key = true
		}
	}
}

// choose picks the entry of an index for a platform.
func choose(manifests []descriptor, want platform) (*descriptor, error) {
	var have []string
	var unnamed []*descriptor
	for i := range manifests {
		d := &manifests[i]
		if !isIndexType(d.MediaType) && !isManifestType(d.MediaType) && d.MediaType != "" {
			continue // signatures and the like
		}
		if d.Platform == nil || d.Platform.OS == "" && d.Platform.Architecture == "" {
			unnamed = append(unnamed, d)
			continue
		}
		if want.takes(*d.Platform) {
			return d, nil
		}
		if d.Platform.OS != "unknown" && len(have) < 16 {
			have = append(have, clip(d.Platform.String()))
		}
	}
	switch {
	case len(unnamed) == 1:
		return unnamed[0], nil // its config says whether it fits
	case len(have) > 0:
		return nil, banger.Errorf(banger.CodeNotFound, "no image for %s, only for %q", want, have)
	case len(unnamed) > 1:
		return nil, banger.Errorf(banger.CodeInvalid, "%d images and no platform named for any", len(unnamed))
	}
	return nil, banger.Errorf(banger.CodeNotFound, "no image for %s in its index", want)
}

// imageConfig is what is read of a config; image-spec config.md.
type imageConfig struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
	Config       struct {
		Entrypoint []string `json:"Entrypoint"`
		Cmd        []string `json:"Cmd"`
		Env        []string `json:"Env"`
		User       string   `json:"User"`
		WorkingDir string   `json:"WorkingDir"`
		StopSignal string   `json:"StopSignal"`
	} `json:"config"`
	RootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// documents fetches manifests and small blobs; both kinds of source have them.
type documents interface {
	blobSource
	// manifest returns the raw document of a tag or digest, of at most
	// MaxManifestBytes, and the media type the source gives it ("" for none).
	manifest(ctx context.Context, tagOrDigest string) (raw []byte, mediaType string, err error)
}

// pin walks from a document through indexes to one manifest and its config,
// each checked against the digest and size of what pointed to it, and fills img.
func (s *Source) pin(ctx context.Context, img *Image, docs documents, raw []byte, mediaType string) error {
	lim := s.lim()
	want, err := parsePlatform(s.platform())
	if err != nil {
		return err
	}
	var doc *document
	for depth := 0; ; depth++ {
		if doc, err = parseDocument(raw, mediaType); err != nil {
			return err
		}
		img.Documents = append(img.Documents, sum(raw))
		if !doc.index {
			break
		}
		if depth == maxIndexDepth {
			return errors.New("indexes nested too deep")
		}
		d, err := choose(doc.manifests, want)
		if err != nil {
			return err
		}
		if err := d.check(MaxManifestBytes); err != nil {
			return err
		}
		if raw, mediaType, err = s.pinned(ctx, docs, d); err != nil {
			return err
		}
	}
	img.Digest = sum(raw)
	switch doc.config.MediaType {
	case mediaOCIConfig, mediaDockerConfig:
	default:
		return fmt.Errorf("not a container image: its config is of media type %q", clip(doc.config.MediaType))
	}
	if err := checkLayers(doc, lim); err != nil {
		return err
	}
	if err := doc.config.check(MaxConfigBytes); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	rawConfig, err := s.smallBlob(ctx, docs, doc.config.Digest, *doc.config.Size)
	if err != nil {
		return err
	}
	img.Documents = append(img.Documents, doc.config.Digest)
	img.from = docs
	return fillImage(img, doc, rawConfig, want)
}

// checkLayers makes sure that what a manifest says of its layers can be acted
// on.
func checkLayers(doc *document, lim limits) error {
	if len(doc.layers) == 0 {
		return errors.New("it has no layers: there is nothing in it")
	}
	if len(doc.layers) > lim.layers {
		return fmt.Errorf("%d layers, at most %d are taken", len(doc.layers), lim.layers)
	}
	for i := range doc.layers {
		if _, err := layerCompression(doc.layers[i].MediaType); err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
		if err := doc.layers[i].check(lim.blobSize); err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	return nil
}

func fillImage(img *Image, doc *document, rawConfig []byte, want platform) error {
	var cfg imageConfig
	if _, err := topLevel(rawConfig); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if err := json.Unmarshal(rawConfig, &cfg); err != nil {
		return fmt.Errorf("config: %w", jsonReason(err))
	}
	is := platform{OS: cfg.OS, Architecture: cfg.Architecture, Variant: cfg.Variant}
	if is.OS == "" {
		is.OS = want.OS // images made by hand often leave both out
	}
	if is.Architecture == "" {
		is.Architecture = want.Architecture
	}
	if !want.takes(is) {
		return banger.Errorf(banger.CodeNotFound, "no image for %s, only for %q", want, clip(is.String()))
	}
	if len(cfg.RootFS.DiffIDs) != len(doc.layers) {
		return fmt.Errorf("config: %d DiffIDs for %d layers", len(cfg.RootFS.DiffIDs), len(doc.layers))
	}
	if n := len(cfg.Config.Entrypoint) + len(cfg.Config.Cmd) + len(cfg.Config.Env); n > maxConfigWords {
		return fmt.Errorf("config: %d words of entrypoint, command and environment, at most %d are taken", n, maxConfigWords)
	}
	img.Platform = is.String()
	img.Config = banger.ImageConfig{
		Entrypoint: cfg.Config.Entrypoint, Cmd: cfg.Config.Cmd, Env: cfg.Config.Env,
		User: cfg.Config.User, WorkingDir: cfg.Config.WorkingDir, StopSignal: cfg.Config.StopSignal,
	}
	img.Layers = make([]Layer, len(doc.layers))
	for i, d := range doc.layers {
		if !digestPattern.MatchString(cfg.RootFS.DiffIDs[i]) {
			return fmt.Errorf("config: DiffID %q is not sha256 and 64 hex digits", clip(cfg.RootFS.DiffIDs[i]))
		}
		img.Layers[i] = Layer{Digest: d.Digest, DiffID: cfg.RootFS.DiffIDs[i], MediaType: d.MediaType, SizeBytes: *d.Size}
	}
	return nil
}

// pinned returns the document a descriptor points to.
func (s *Source) pinned(ctx context.Context, docs documents, d *descriptor) ([]byte, string, error) {
	if raw := s.cachedDocument(d.Digest); raw != nil && int64(len(raw)) == *d.Size {
		return raw, d.MediaType, nil
	}
	raw, mediaType, err := docs.manifest(ctx, d.Digest)
	if err != nil {
		return nil, "", err
	}
	if int64(len(raw)) != *d.Size {
		return nil, "", &mismatchError{what: "manifest: size", got: fmt.Sprintf("%d bytes", len(raw)), want: fmt.Sprintf("%d bytes", *d.Size)}
	}
	if got := sum(raw); got != d.Digest {
		return nil, "", &mismatchError{what: "manifest: digest", got: got, want: d.Digest}
	}
	if d.MediaType != "" && mediaType != "" && d.MediaType != mediaType {
		return nil, "", fmt.Errorf("manifest: called %q by its index and %q by its source", clip(d.MediaType), clip(mediaType))
	}
	if mediaType == "" {
		mediaType = d.MediaType
	}
	return raw, mediaType, s.keepDocument(d.Digest, raw)
}

func sum(raw []byte) string {
	h := sha256.Sum256(raw)
	return "sha256:" + hex.EncodeToString(h[:])
}

// smallBlob reads a whole blob, from the cache where it is there.
func (s *Source) smallBlob(ctx context.Context, from blobSource, digest string, size int64) ([]byte, error) {
	if raw := s.cachedDocument(digest); raw != nil && int64(len(raw)) == size {
		return raw, nil
	}
	r, err := from.openBlob(ctx, digest, size)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	v := &verifier{ctx: ctx, r: r, h: sha256.New(), want: digest, size: size}
	raw, err := io.ReadAll(v)
	if err == nil {
		err = v.finish()
	}
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	return raw, s.keepDocument(digest, raw)
}

// cachedDocument returns a small blob from the cache if it is there and whole.
func (s *Source) cachedDocument(digest string) []byte {
	if s.Blobs == nil {
		return nil
	}
	r, size, err := s.Blobs.Open(digest)
	if err != nil {
		return nil
	}
	defer r.Close()
	if size > MaxConfigBytes {
		return nil
	}
	raw, err := io.ReadAll(io.LimitReader(r, size+1))
	if err != nil || sum(raw) != digest {
		return nil
	}
	return raw
}

func (s *Source) keepDocument(digest string, raw []byte) error {
	if s.Blobs == nil {
		return nil
	}
	w, err := s.Blobs.Create(digest)
	if err == nil {
		if _, err = w.Write(raw); err == nil {
			err = w.Commit()
		} else {
			_ = w.Abort()
		}
	}
	if err != nil {
		return &localError{fmt.Errorf("blob cache: %w", err)}
	}
	return nil
}

// layerBlob makes a layer ready for squashing: from the cache where it is
// there, else from where the image comes from and into the cache.
func (s *Source) layerBlob(img *Image, l Layer) blob {
	b := blob{
		label: "layer " + l.Digest, digest: l.Digest, diffID: l.DiffID, mediaType: l.MediaType,
		sizeBytes: l.SizeBytes, layered: true,
	}
	b.open = func(ctx context.Context, _ *progress) (io.ReadCloser, error) {
		return img.from.openBlob(ctx, l.Digest, l.SizeBytes)
	}
	if s.Blobs == nil {
		return b
	}
	if r, size, err := s.Blobs.Open(l.Digest); err == nil {
		r.Close()
		if size == l.SizeBytes {
			b.open = func(context.Context, *progress) (io.ReadCloser, error) {
				r, _, err := s.Blobs.Open(l.Digest)
				if err != nil {
					return nil, &localError{fmt.Errorf("blob cache: %w", err)}
				}
				return r, nil
			}
			return b
		}
	}
	b.keep = s.Blobs
	if r, ok := img.from.(resumer); ok {
		b.openRest = func(ctx context.Context, from int64) (io.ReadCloser, error) {
			return r.openRest(ctx, l.Digest, l.SizeBytes, from)
		}
	}
	return b
}
