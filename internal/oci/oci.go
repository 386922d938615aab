// Package oci turns an image reference into one verified file tree. It knows
// references, registries, image layouts, manifests, digests, layers and
// whiteouts, and the sources that are no images at all: a directory, a tar, a
// distribution's archive. It knows nothing of file systems or of the store:
// bytes of files go to a Sink, blobs to a Blobs, as they stream by.
//
// Every byte that comes in is hostile. Digests and sizes are recomputed, every
// document and every tree has a named limit, and no name from an image ever
// becomes a path on the host.
package oci

import (
	"context"
	"io"
	"net/http"
	"os"
	"sync"

	"banger"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Limits on what an image may hold. An image past one of them is refused by
// name; nothing is cut to fit.
const (
	MaxManifestBytes = 4 << 20   // one manifest or index
	MaxConfigBytes   = 8 << 20   // one image configuration
	MaxBlobBytes     = 64 << 30  // one compressed layer
	MaxLayers        = 128       // layers of an image
	MaxExpandedBytes = 64 << 30  // uncompressed streams and file contents, holes of sparse files counted
	MaxEntries       = 1_000_000 // entries of all layers, and directories implied by them
	MaxExpansion     = 200       // bytes uncompressed for one stored, of all layers, past ExpansionFrom
	ExpansionFrom    = 1 << 30   // bytes uncompressed
	MaxMetadataBytes = 256 << 20 // names, link targets, xattrs and nodes alive at one time
	MaxPathBytes     = 4096      // one path inside an image
	MaxNameBytes     = 255       // one component of it
	MaxTargetBytes   = 4095      // the target of a symlink
	MaxXattrBytes    = 64 << 10  // names and values of one inode
	maxConfigWords   = 100_000   // of entrypoint, command and environment
	MaxZstdWindow    = 64 << 20  // memory a zstd frame may ask for
	maxSymlinkHops   = 40        // symlinks followed to resolve one path, as Linux does
	maxPathSteps     = 50 << 20  // components of paths and of symlinks on them, of all entries: seconds
	maxIndexDepth    = 3         // indexes inside indexes
)

// limits is the part of the limits above that tests scale down.
type limits struct {
	layers, entries                        int
	expandedBytes, metadataBytes, blobSize int64
}

var defaultLimits = limits{
	layers: MaxLayers, entries: MaxEntries,
	expandedBytes: MaxExpandedBytes, metadataBytes: MaxMetadataBytes, blobSize: MaxBlobBytes,
}

// Blobs keeps blobs by digest ("sha256:" and 64 hex digits, checked before it
// gets here). The store implements it.
type Blobs interface {
	// Open returns a complete blob and its size, or an error that is
	// fs.ErrNotExist. What it returns is verified again while it is read.
	Open(digest string) (io.ReadCloser, int64, error)
	// Create starts a blob that is invisible until it is committed.
	Create(digest string) (BlobWriter, error)
	// Resume is Create for a blob of so many bytes that comes over a network:
	// it may begin with what came of it before.
	Resume(digest string, sizeBytes int64) (BlobWriter, error)
}

// A BlobWriter takes the bytes of one blob. Exactly one of Commit, Suspend and
// Abort is called; Commit only after digest and size were found right.
type BlobWriter interface {
	// Partial gives what is there already, at most the blob's size, which may
	// be damaged. What is written goes behind it.
	Partial() (r io.Reader, sizeBytes int64)
	io.Writer
	Commit() error
	// Suspend keeps what has come, if there is a place for it.
	Suspend() error
	Abort() error
}

// A Source says where images come from and how. The zero value pulls
// linux/amd64 images and keeps no blobs.
type Source struct {
	Platform  string         // os/architecture[/variant]; default "linux/amd64"
	Blobs     Blobs          // nil: blobs are streamed and dropped
	Progress  func(Progress) // nil: silence; called from one goroutine at a time
	UserAgent string         // default "banger"

	// Input is what an oci:, docker-archive: or rootfs: reference names, opened
	// by the caller, who closes it after Squash. The path in the reference is a
	// label only.
	Input *os.File
	// Scratch makes an empty file without a name, for an archive that is a
	// stream or compressed. It goes when the process does.
	Scratch func() (*os.File, error)
	// Packages are added to an apt: image; see ParsePackages.
	Packages []string

	limits    *limits
	keychain  authn.Keychain    // nil: the user's; set by tests
	transport http.RoundTripper // nil: the network; set by tests

	mu           sync.Mutex
	repositories map[string]*repository // of registries, by host/path
}

func (s *Source) lim() limits {
	if s.limits != nil {
		return *s.limits
	}
	return defaultLimits
}

func (s *Source) platform() string {
	if s.Platform == "" {
		return "linux/amd64"
	}
	return s.Platform
}

// An Image is a pinned image: for registries and layouts its manifest and
// config have been read and verified, its layers not yet.
type Image struct {
	Reference Reference
	Name      string // the full name to keep it under; apt images with packages get a suffix
	Digest    string // of the manifest; "" where there is none
	Suggested string // a name that came with it, where Name is ""; "" for none
	Config    banger.ImageConfig
	Platform  string
	Layers    []Layer // lowest first; empty for rootfs: and apt:
	// Documents are the digests of what led to the layers: indexes, manifest,
	// config. With those of the layers they are all blobs of the image.
	Documents []string

	source *Source
	from   blobSource        // of layers
	tar    *blob             // instead of layers: one tar
	stream treeSource        // instead of layers: no tar at all
	filter func(*entry) bool // what to leave out of a tar; may change the entry
}

// A Layer is one layer as the manifest describes it.
type Layer struct {
	Digest    string // of the bytes as they are stored
	DiffID    string // of the uncompressed tar
	MediaType string
	SizeBytes int64 // as stored
}

// blobSource fetches one blob; what it returns is not yet verified.
type blobSource interface {
	openBlob(ctx context.Context, digest string, sizeBytes int64) (io.ReadCloser, error)
}

// A resumer can fetch the rest of a blob, from < sizeBytes.
type resumer interface {
	openRest(ctx context.Context, digest string, sizeBytes, from int64) (io.ReadCloser, error)
}

// treeSource feeds the entries of one tree that has no layers and returns the
// digest of what it read.
type treeSource func(ctx context.Context, p *progress, add addFunc) (inputDigest string, notes []string, err error)

// addFunc takes one entry; body holds the e.size bytes of a regular file.
type addFunc func(e *entry, body io.Reader) error

// Resolve finds what ref names. For a registry or a layout it fetches manifest
// and config, recomputes their digests and chooses the platform; for rootfs:
// and apt: it checks that Squash has what it needs.
func (s *Source) Resolve(ctx context.Context, ref Reference) (*Image, error) {
	if len(s.Packages) > 0 && ref.Kind != KindApt {
		return nil, banger.Errorf(banger.CodeUsage, "image %q: a package list goes with apt: images only", ref)
	}
	p := newProgress(s.Progress)
	p.report("resolve", ref.String(), 0, 0)
	img := &Image{Reference: ref, Name: ref.Name(), Platform: s.platform(), source: s}
	var err error
	switch ref.Kind {
	case KindRegistry:
		err = s.resolveRegistry(ctx, img)
	case KindLayout:
		err = s.resolveLayout(ctx, img)
	case KindArchive:
		err = s.resolveArchive(ctx, img, p)
	case KindRootfs:
		err = s.resolveRootfs(img)
	case KindApt:
		err = s.resolveApt(img)
	default:
		err = banger.Errorf(banger.CodeInternal, "image %q: unknown kind of reference", ref)
	}
	if err != nil {
		return nil, err
	}
	return img, nil
}
