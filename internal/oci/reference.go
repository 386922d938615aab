package oci

import (
	"errors"
	"regexp"
	"strings"

	"banger"

	"github.com/distribution/reference"
)

// Kind says where an image comes from.
type Kind int

const (
	KindRegistry Kind = iota + 1 // Docker's grammar: debian:bookworm, host/path@sha256:...
	KindLayout                   // oci:DIR[:TAG] or oci:DIR@sha256:..., an OCI image layout
	KindRootfs                   // rootfs:DIR or rootfs:TAR, a tree as it is
	KindApt                      // apt:SUITE, built from the distribution's mirror
	KindArchive                  // docker-archive:FILE[:NAME:TAG], ./FILE.tar or -, a tar of an image
)

// A Reference is the parsed text of an image reference. Made only by
// ParseReference; comparable.
type Reference struct {
	Kind       Kind
	Host       string // registry: as written, "docker.io" where nothing was
	Repository string // registry: path in it
	Tag        string // registry: "" only beside a digest; layout: may be ""; archive: NAME:TAG or ""
	Digest     string // registry, layout: "sha256:..." or ""
	Path       string // layout, rootfs, archive: as written
	Suite      string // apt
}

var (
	tagPattern    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	// archivePattern is a path that says what it is. It has no colon, which
	// would end it after docker-archive:.
	archivePattern = regexp.MustCompile(`^(\./|\.\./|/)[^:]*\.(tar|tar\.gz|tgz|tar\.zst)$`)
	suitePattern   = regexp.MustCompile(`^[a-z][a-z0-9.-]{0,63}$`)
)

// maxReferenceBytes is far above what any registry takes and what Linux takes
// as a path.
const maxReferenceBytes = 4096

// reservedSchemes would otherwise parse as names of images at Docker Hub.
var reservedSchemes = []string{"docker-daemon", "docker", "dir", "http", "https"}

// ParseReference parses an image reference. Anything that is not one is a
// *banger.Error of CodeUsage that names the text.
func ParseReference(s string) (Reference, error) {
	bad := func(reason string) (Reference, error) {
		return Reference{}, banger.Errorf(banger.CodeUsage, "image reference %q: %s", clip(s), reason)
	}
	if len(s) > maxReferenceBytes {
		return bad("too long")
	}
	if strings.IndexByte(s, 0) >= 0 {
		return bad("NUL in it")
	}
	if s == "-" {
		return Reference{Kind: KindArchive, Path: s}, nil
	}
	scheme, rest, ok := strings.Cut(s, ":")
	if ok {
		switch scheme {
		case "docker-archive", "oci-archive":
			file, tag, _ := strings.Cut(rest, ":")
			if file == "" {
				return bad("no file named after " + scheme + ":")
			}
			return Reference{Kind: KindArchive, Path: file, Tag: tag}, nil
		case "oci":
			return parseLayout(rest, bad)
		case "rootfs":
			if rest == "" {
				return bad("no directory or tar named after rootfs:")
			}
			return Reference{Kind: KindRootfs, Path: rest}, nil
		case "apt":
			if !suitePattern.MatchString(rest) {
				return bad("no suite named after apt:, such as apt:bookworm")
			}
			return Reference{Kind: KindApt, Suite: rest}, nil
		}
		for _, r := range reservedSchemes {
			if scheme == r {
				return bad("references of kind " + scheme + ": are not supported")
			}
		}
	}
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "/") || strings.HasPrefix(s, "~") {
			if archivePattern.MatchString(s) {
				return Reference{Kind: KindArchive, Path: s}, nil
			}
			e := banger.Errorf(banger.CodeUsage, "image reference %q: a path is not an image name", clip(s))
			return Reference{}, e.WithHint("for a directory or tar say rootfs:%s, for an OCI layout oci:%s, for an archive of an image docker-archive:%s", clip(s), clip(s), clip(s))
		}
		return bad(parseReason(s, err))
	}
	r := Reference{Kind: KindRegistry, Host: reference.Domain(named), Repository: reference.Path(named)}
	if d, ok := named.(reference.Digested); ok {
		r.Digest = d.Digest().String()
		if !digestPattern.MatchString(r.Digest) {
			return bad("its digest is not sha256")
		}
	}
	if t, ok := named.(reference.Tagged); ok {
		r.Tag = t.Tag()
	} else if r.Digest == "" {
		r.Tag = "latest"
	}
	return r, nil
}

func parseReason(s string, err error) string {
	if errors.Is(err, reference.ErrNameTooLong) {
		return "too long"
	}
	if lower := strings.ToLower(s); lower != s {
		if _, err := reference.ParseNormalizedNamed(lower); err == nil {
			return "upper case in its name"
		}
	}
	return "not a valid image name"
}

func parseLayout(rest string, bad func(string) (Reference, error)) (Reference, error) {
	r := Reference{Kind: KindLayout, Path: rest}
	if i := strings.LastIndexByte(rest, '@'); i >= 0 && digestPattern.MatchString(rest[i+1:]) {
		r.Path, r.Digest = rest[:i], rest[i+1:]
	} else if i := strings.LastIndexByte(rest, ':'); i >= 0 && tagPattern.MatchString(rest[i+1:]) {
		r.Path, r.Tag = rest[:i], rest[i+1:]
	}
	if r.Path == "" {
		return bad("no directory named after oci:")
	}
	return r, nil
}

// String returns the reference in full; ParseReference of it gives r again.
func (r Reference) String() string {
	s := ""
	switch r.Kind {
	case KindRegistry:
		s = r.Host + "/" + r.Repository
	case KindLayout:
		s = "oci:" + r.Path
	case KindArchive:
		s = "docker-archive:" + r.Path
	case KindRootfs:
		return "rootfs:" + r.Path
	case KindApt:
		return "apt:" + r.Suite
	}
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest
	}
	return s
}

// Name is the full canonical name, e.g. "docker.io/library/debian:latest" or
// "apt:bookworm".
func (r Reference) Name() string { return r.String() }
