package oci

import (
	"errors"
	"strings"
	"testing"

	"banger"
)

func TestParseReference(t *testing.T) {
	hex := strings.Repeat("0a", 32)
	for in, want := range map[string]string{
		"debian":                          "docker.io/library/debian:latest",
		"debian:bookworm":                 "docker.io/library/debian:bookworm",
		"user/app":                        "docker.io/user/app:latest",
		"docker.io/debian":                "docker.io/library/debian:latest",
		"index.docker.io/library/debian":  "docker.io/library/debian:latest",
		"ghcr.io/a/b/c:v1":                "ghcr.io/a/b/c:v1",
		"localhost:5000/x":                "localhost:5000/x:latest",
		"[::1]:5000/x:y":                  "[::1]:5000/x:y",
		"debian@sha256:" + hex:            "docker.io/library/debian@sha256:" + hex,
		"debian:12@sha256:" + hex:         "docker.io/library/debian:12@sha256:" + hex,
		"apt:bookworm":                    "apt:bookworm",
		"rootfs:./x y.tar":                "rootfs:./x y.tar",
		"rootfs:/a:b@c":                   "rootfs:/a:b@c",
		"-":                               "docker-archive:-",
		"./x.tar":                         "docker-archive:./x.tar",
		"/a/x y.tar.gz":                   "docker-archive:/a/x y.tar.gz",
		"docker-archive:x.tar":            "docker-archive:x.tar",
		"docker-archive:x.tar:debian:12":  "docker-archive:x.tar:debian:12",
		"oci-archive:x":                   "docker-archive:x",
		"oci:dir":                         "oci:dir",
		"oci:/a/b:tag":                    "oci:/a/b:tag",
		"oci:/a:b/c":                      "oci:/a:b/c",
		"oci:/a@sha256:" + hex:            "oci:/a@sha256:" + hex,
		strings.Repeat("a", 128) + "/b:c": "docker.io/" + strings.Repeat("a", 128) + "/b:c",
	} {
		r, err := ParseReference(in)
		if err != nil || r.String() != want {
			t.Errorf("%q: %q, %v, want %q", in, r, err, want)
		}
	}
	for in, want := range map[string]string{
		"": "not a valid", "Debian": "upper case", "debian:": "not a valid", "debian:" + strings.Repeat("t", 129): "not a valid",
		"debian@sha256:123": "not a valid", "debian@sha512:" + hex + hex: "not sha256", hex: "not a valid",
		"apt:": "no suite", "apt:-x": "no suite", "apt:Bookworm": "no suite", "apt:a b": "no suite", "apt:x;y": "no suite", "apt:bookworm+0123abcd": "no suite",
		"oci:": "no directory", "oci::tag": "no directory", "rootfs:": "no directory", "./x": "a path is not", "/x": "a path is not", "./a:b.tar": "a path is not", "x.tar/": "not a valid",
		"docker-archive:": "no file", "oci-archive::x": "no file", "docker-daemon:x": "not supported", "https://x/y": "not supported", "a\x00b": "NUL", strings.Repeat("a", 4097): "too long", "a/" + strings.Repeat("b", 256): "too long",
	} {
		_, err := ParseReference(in)
		e, ok := errors.AsType[*banger.Error](err)
		if !ok || e.Code != banger.CodeUsage || !strings.Contains(e.Message, want) {
			t.Errorf("%q: error %v, want %q", clip(in), err, want)
		}
	}
}

func FuzzParseReference(f *testing.F) {
	for _, s := range []string{"debian", "a.b:1/c:d@sha256:" + strings.Repeat("00", 32), "oci:a:b", "oci:a@b:c", "apt:x", "rootfs:/", "[::1]/x", "LOCALHOST/x", "-", "./x.tgz", "docker-archive:a:b:c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseReference(s)
		if err != nil {
			if e, ok := errors.AsType[*banger.Error](err); !ok || e.Code != banger.CodeUsage || strings.Contains(e.Message, "\n") {
				t.Errorf("%q: %#v", s, err)
			}
			return
		}
		again, err := ParseReference(r.String())
		if err != nil || again != r {
			t.Errorf("%q: %+v, its text %q: %+v, %v", s, r, r.String(), again, err)
		}
	})
}

// FuzzTar feeds bytes as one layer, and again on top of a tree, and wants the
// books to be right.
func FuzzTar(f *testing.F) {
	for _, shape := range squashShapes {
		for _, l := range shape.layers {
			f.Add(tarOf(f, l))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		lim := defaultLimits
		lim.expandedBytes = 1 << 20
		lim.entries = 1000
		base := tarOf(t, []te{dir("d"), fileEntry("d/x", "1"), hard("y", "d/x"), sym("l", "d"), sym("a", "/l")})
		tree, sink, err := squashMem(t, memImage(t, &lim, base, raw, raw))
		if err != nil {
			return
		}
		checkBooks(t, tree, sink)
		_ = tree.Walk(func(path string, n *Node[int]) error {
			if len(path) > MaxPathBytes+1 || strings.Contains(path, "/../") || n.Type() == modeChar && n.Major == 0 && n.Minor == 0 {
				t.Errorf("path %q, node %+v", path, n)
			}
			if tree.Lookup(path) != n {
				t.Errorf("%q is not found", path)
			}
			return nil
		})
	})
}

func fileEntry(name, body string) te { return f(name, body) }
