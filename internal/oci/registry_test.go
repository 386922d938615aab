package oci

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"banger"

	"github.com/google/go-containerregistry/pkg/authn"
)

// testImage is an image's documents and blobs, for registries and layouts.
type testImage struct {
	blobs    map[string][]byte // by digest; manifests too
	media    map[string]string // of manifests, by digest
	manifest string            // digest of the top document
}

func desc(media, digest string, size int, extra string) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d%s}`, media, digest, size, extra)
}

// newTestImage has one gzip layer, for amd64; the manifest is behind an index
// with an arm64 entry that leads nowhere.
func newTestImage(t testing.TB) *testImage {
	im := &testImage{blobs: map[string][]byte{}, media: map[string]string{}}
	raw := tarOf(t, []te{dir("etc"), f("etc/motd", "hello")})
	layer := gz(t, raw)
	im.blobs[sum(layer)] = layer
	cfg := []byte(fmt.Sprintf(`{"os":"linux","architecture":"amd64","config":{"Cmd":["/bin/sh"],"Env":["A=b"],"User":"nobody","WorkingDir":"/w","Labels":{"a":"1","A":"2"}},"rootfs":{"type":"layers","diff_ids":[%q]}}`, sum(raw)))
	im.blobs[sum(cfg)] = cfg
	man := []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, mediaOCIManifest,
		desc(mediaOCIConfig, sum(cfg), len(cfg), ""), desc(mediaOCILayer+"+gzip", sum(layer), len(layer), "")))
	im.add(mediaOCIManifest, man)
	idx := []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s,%s,%s]}`, mediaOCIIndex,
		desc(mediaOCIManifest, sum([]byte("arm")), 3, `,"platform":{"os":"linux","architecture":"arm64","variant":"v8"}`),
		desc(mediaOCIManifest, sum([]byte("att")), 3, `,"platform":{"os":"unknown","architecture":"unknown"}`),
		desc(mediaOCIManifest, sum(man), len(man), `,"platform":{"os":"linux","architecture":"amd64"}`)))
	im.manifest = im.add(mediaOCIIndex, idx)
	return im
}

func (im *testImage) add(media string, raw []byte) string {
	im.blobs[sum(raw)], im.media[sum(raw)] = raw, media
	return sum(raw)
}

// serve answers like a registry for the repository "r/i", tag "t".
func (im *testImage) serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/v2/" {
		return
	}
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2/r/i/")
	kind, ref, _ := strings.Cut(rest, "/")
	if ref == "t" {
		ref = im.manifest
	}
	raw, found := im.blobs[ref]
	if !ok || !found || (kind == "manifests") != (im.media[ref] != "") {
		http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"many\nlines"}]}`, http.StatusNotFound)
		return
	}
	if kind == "manifests" {
		w.Header().Set("Content-Type", im.media[ref])
	}
	_, _ = w.Write(raw)
}

func host(s *httptest.Server) string { return strings.TrimPrefix(s.URL, "http://") }

func ref(t testing.TB, s string) Reference {
	t.Helper()
	r, err := ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// pull resolves and squashes, without the user's own credentials.
func pull(t testing.TB, s *Source, r Reference) (*Image, *Tree[int], error) {
	t.Helper()
	if s.keychain == nil {
		s.keychain = authn.NewMultiKeychain() // anonymous
	}
	img, err := s.Resolve(t.Context(), r)
	if err != nil {
		return nil, nil, err
	}
	tree, err := Squash(t.Context(), img, &memSink{})
	return img, tree, err
}

func TestRegistryPull(t *testing.T) {
	im := newTestImage(t)
	var mu sync.Mutex
	var asked []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.URL.Path)
		mu.Unlock()
		im.serve(w, r)
	}))
	defer srv.Close()
	cache := &blobCache{}
	var stages []string
	s := &Source{Blobs: cache, Progress: func(p Progress) { stages = append(stages, p.Stage) }}
	img, tree, err := pull(t, s, ref(t, host(srv)+"/r/i:t"))
	if err != nil {
		t.Fatal(err)
	}
	if img.Platform != "linux/amd64" || img.Config.User != "nobody" || !slices.Equal(img.Config.Cmd, []string{"/bin/sh"}) || tree.Lookup("etc/motd") == nil {
		t.Errorf("image %+v", img)
	}
	if im.media[img.Digest] != mediaOCIManifest || img.Name != host(srv)+"/r/i:t" || tree.InputDigest != "" {
		t.Errorf("digest %s of %s", img.Digest, img.Name)
	}
	if !slices.Contains(stages, "resolve") || !slices.Contains(stages, "fetch") {
		t.Errorf("stages %q", stages)
	}
	// By digest and from the cache: not one request.
	asked = nil
	if _, _, err := pull(t, s, ref(t, host(srv)+"/r/i@"+im.manifest)); err != nil || len(asked) != 0 {
		t.Errorf("second pull: error %v, asked for %q", err, asked)
	}
	for _, tt := range []struct {
		ref, platform string
		code          banger.Code
		err           string
	}{
		{ref: host(srv) + "/r/i:none", code: banger.CodeNotFound, err: "not found at"},
		{ref: host(srv) + "/r/i@" + sum(nil), code: banger.CodeNotFound, err: "not found at"},
		{ref: host(srv) + "/r/i:t", platform: "linux/s390x", code: banger.CodeNotFound, err: `no image for linux/s390x, only for ["linux/arm64/v8" "linux/amd64"]`},
		{ref: host(srv) + "/r/i:t", platform: "amd64", code: banger.CodeUsage, err: `platform "amd64"`},
		{ref: "localhost:1/r/i:t", code: banger.CodeUnavailable, err: "connection refused"},
	} {
		_, _, err := pull(t, &Source{Platform: tt.platform}, ref(t, tt.ref))
		wantError(t, tt.ref, err, tt.code, tt.err)
	}
}

func wantError(t *testing.T, what string, err error, code banger.Code, text string) {
	t.Helper()
	e, ok := errors.AsType[*banger.Error](err)
	if !ok || e.Code != code || !strings.Contains(e.Message, text) || strings.Contains(e.Message, "\n") {
		t.Errorf("%s: error %v, want one line of code %s with %q", what, err, code, text)
	}
}

func TestRegistryHostile(t *testing.T) {
	im := newTestImage(t)
	var layer string
	for d, raw := range im.blobs {
		if raw[0] == 0x1f {
			layer = d
		}
	}
	is := func(r *http.Request, what string) bool { return strings.HasSuffix(r.URL.Path, what) }
	// document serves that under the tag.
	document := func(raw string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, "manifests/t") {
				return false
			}
			_, _ = io.WriteString(w, raw)
			return true
		}
	}
	nested := im.manifest
	for range maxIndexDepth {
		nested = im.add(mediaOCIIndex, []byte(`{"schemaVersion":2,"manifests":[`+desc(mediaOCIIndex, nested, len(im.blobs[nested]), `,"platform":{"os":"linux","architecture":"amd64"}`)+`]}`))
	}
	moved := false
	refused, harmless := 0, 0
	for _, tt := range []struct {
		name  string
		serve func(w http.ResponseWriter, r *http.Request) bool // false: as an honest one
		code  banger.Code
		err   string
	}{
		{"endless manifest", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, "manifests/t") {
				return false
			}
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return true
				}
			}
		}, banger.CodeInvalid, "manifest of more than 4194304 bytes"},
		{"endless layer", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			_, _ = w.Write(im.blobs[layer])
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return true
				}
			}
		}, banger.CodeInvalid, "size is more than"},
		{"layer shorter", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			_, _ = w.Write(im.blobs[layer][:50])
			return true
		}, banger.CodeInvalid, "size is 50 bytes"},
		{"layer cut off", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(im.blobs[layer])))
			_, _ = w.Write(im.blobs[layer][:50])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, banger.CodeUnavailable, "closed in the middle"},
		{"layer of other bytes", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			b := bytes.Clone(im.blobs[layer])
			b[len(b)-20] ^= 1
			_, _ = w.Write(b)
			return true
		}, banger.CodeInvalid, "digest is sha256:"},
		{"other manifest than the index says", func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "manifests/sha256:") {
				return false
			}
			w.Header().Set("Content-Type", mediaOCIManifest)
			b := im.blobs[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]]
			_, _ = w.Write(bytes.Replace(b, []byte("2"), []byte("3"), 1))
			return true
		}, banger.CodeInvalid, "manifest: digest is"},
		{"type in header and document differ", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, "manifests/t") {
				return false
			}
			w.Header().Set("Content-Type", mediaDockerManifest)
			_, _ = w.Write(im.blobs[im.manifest])
			return true
		}, banger.CodeInvalid, "calls itself"},
		{"schema 1", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", mediaSchema1Prefix+"prettyjws")
			_, _ = io.WriteString(w, `{"schemaVersion":1}`)
			return true
		}, banger.CodeInvalid, "schema 1"},
		{"server error", func(w http.ResponseWriter, r *http.Request) bool {
			http.Error(w, "<html>\nlong page", http.StatusBadGateway)
			return true
		}, banger.CodeUnavailable, "status 502"},
		{"forbidden", func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(403); return true }, banger.CodeNotFound, "does not give access"},
		{"unauthorised without a challenge", func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(401); return true }, banger.CodeNotFound, "does not give access"},
		{"too many requests", func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(429); return true }, banger.CodeUnavailable, "too many requests"},
		{"redirects in a circle", func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
			return true
		}, banger.CodeUnavailable, "too many redirects"},
		{"layer six redirects away", func(w http.ResponseWriter, r *http.Request) bool {
			n := len(r.URL.RawQuery)
			if !is(r, layer) || n == maxRedirects+1 {
				return false
			}
			http.Redirect(w, r, r.URL.Path+"?"+strings.Repeat("x", n+1), http.StatusFound)
			return true
		}, banger.CodeUnavailable, "too many redirects"},
		{"layer five redirects away", func(w http.ResponseWriter, r *http.Request) bool {
			n := len(r.URL.RawQuery)
			if !is(r, layer) || n == maxRedirects {
				return false
			}
			http.Redirect(w, r, r.URL.Path+"?"+strings.Repeat("x", n+1), http.StatusFound)
			return true
		}, "", ""},
		{"redirect to plain http elsewhere", func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://192.0.2.1/x", http.StatusFound)
			return true
		}, banger.CodeUnavailable, `redirect to "http://192.0.2.1", which is not https`},
		{"layer redirects to plain http elsewhere", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			http.Redirect(w, r, "http://192.0.2.1/x", http.StatusFound)
			return true
		}, banger.CodeUnavailable, `redirect to "http://192.0.2.1", which is not https`},
		{"redirect to another scheme", func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
			return true
		}, banger.CodeUnavailable, "which is not https"},
		{"token server elsewhere in plain http", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://192.0.2.1/token"`)
			w.WriteHeader(401)
			return true
		}, banger.CodeUnavailable, `"http://192.0.2.1", which is not https`},
		{"token server at the metadata address", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://169.254.169.254/token"`)
			w.WriteHeader(401)
			return true
		}, banger.CodeUnavailable, "link-local address"},
		{"challenge without a token server", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", "Bearer service=\"a\u202eb\"")
			w.WriteHeader(401)
			return true
		}, banger.CodeUnavailable, "missing realm: map[service:a?b]"},
		{"endless first answer", func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/v2/" {
				return false
			}
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return true
				}
			}
		}, "", ""},
		{"endless refusal", func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(503)
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return true
				}
			}
		}, banger.CodeUnavailable, "status 503"},
		{"endless token", tokenServer(func(w http.ResponseWriter) {
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}), banger.CodeUnavailable, "body exceeds 65536 byte limit"},
		{"token of 64 KiB and one", tokenServer(func(w http.ResponseWriter) {
			_, _ = io.WriteString(w, `{"token":"`+strings.Repeat("x", 64<<10-11)+`"}`)
		}), banger.CodeUnavailable, "body exceeds 65536 byte limit"},
		{"token that is a page", tokenServer(func(w http.ResponseWriter) {
			_, _ = io.WriteString(w, "<html>")
		}), banger.CodeUnavailable, "answer not understood"},
		{"no token", tokenServer(func(w http.ResponseWriter) {
			_, _ = io.WriteString(w, `{"refresh_token":"secret"}`)
		}), banger.CodeUnavailable, "registry 127.0.0.1"},
		{"token with a line break", tokenServer(func(w http.ResponseWriter) {
			_, _ = io.WriteString(w, `{"token":"a\r\nX-Other: b"}`)
		}), banger.CodeUnavailable, "invalid header field value"},
		{"token server broken", tokenServer(func(w http.ResponseWriter) { w.WriteHeader(500) }), banger.CodeUnavailable, "status 500"},
		{"token server says the request is bad", tokenServer(func(w http.ResponseWriter) { w.WriteHeader(400) }), banger.CodeNotFound, "does not give access"},
		{"endless headers", hijacked("HTTP/1.1 200 OK\r\n", "X-Filler: "+strings.Repeat("x", 1000)+"\r\n"), banger.CodeUnavailable, "exceeded"},
		{"endless interim answers", hijacked("", "HTTP/1.1 103 Early Hints\r\nX-Filler: "+strings.Repeat("x", 1000)+"\r\n\r\n"), banger.CodeUnavailable, "registry 127.0.0.1"},
		{"not HTTP", hijacked("", "SSH-2.0-OpenSSH_9.9\r\n"), banger.CodeUnavailable, "registry 127.0.0.1"},
		{"manifest of a length that never comes", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, "manifests/t") {
				return false
			}
			w.Header().Set("Content-Length", "4611686018427387904")
			_, _ = w.Write([]byte("{}"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, banger.CodeUnavailable, "closed in the middle"},
		{"layer of a length that is not its", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			w.Header().Set("Content-Length", "4611686018427387904")
			_, _ = w.Write(im.blobs[layer])
			return true
		}, banger.CodeInvalid, "size is 4611686018427387904 bytes"},
		{"layer compressed again on the way", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(gz(t, im.blobs[layer]))
			return true
		}, banger.CodeInvalid, "size is"},
		{"a part that was not asked for", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(im.blobs[layer])-1, len(im.blobs[layer])))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(im.blobs[layer])
			return true
		}, banger.CodeUnavailable, "status 206"},
		{"no content", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, "manifests/t") {
				return false
			}
			w.WriteHeader(http.StatusNoContent)
			return true
		}, banger.CodeUnavailable, "status 204"},
		{"not modified", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			w.WriteHeader(http.StatusNotModified)
			return true
		}, banger.CodeUnavailable, "status 304"},
		{"redirect to nowhere", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) {
				return false
			}
			w.WriteHeader(http.StatusFound)
			return true
		}, banger.CodeUnavailable, "status 302"},
		{"redirect with a password", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, layer) || r.URL.RawQuery != "" {
				return false
			}
			http.Redirect(w, r, "http://user:secret@192.0.2.1/x", http.StatusFound)
			return true
		}, banger.CodeUnavailable, `redirect to "http://192.0.2.1", which is not https`},
		{"a digest in a header that is not that of the bytes", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Docker-Content-Digest", sum(nil))
			return false
		}, "", ""},
		{"tag that moves with each question", func(w http.ResponseWriter, r *http.Request) bool {
			if !is(r, "manifests/t") || !moved {
				moved = moved || is(r, "manifests/t")
				return false
			}
			_, _ = io.WriteString(w, `{"schemaVersion":2}`)
			return true
		}, "", ""},
		{"index as the manifest in it", func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "manifests/sha256:") {
				return false
			}
			w.Header().Set("Content-Type", mediaOCIIndex)
			_, _ = w.Write(im.blobs[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]])
			return true
		}, banger.CodeInvalid, "by its index and"},
		{"digest that is a path", document(`{"schemaVersion":2,"manifests":[{"mediaType":"` + mediaOCIManifest + `","digest":"sha256:../../../../etc/passwd","size":3,"platform":{"os":"linux","architecture":"amd64"}}]}`), banger.CodeInvalid, "etc/passwd"},
		{"digest of another kind", document(`{"schemaVersion":2,"manifests":[{"mediaType":"` + mediaOCIManifest + `","digest":"md5:d41d8cd98f00b204e9800998ecf8427e","size":3,"platform":{"os":"linux","architecture":"amd64"}}]}`), banger.CodeInvalid, "md5:"},
		{"layer digest that is a path", document(`{"schemaVersion":2,"config":` + desc(mediaOCIConfig, sum(nil), 2, "") + `,"layers":[` + desc(mediaOCILayer, "sha256:/etc/passwd", 3, "") + `]}`), banger.CodeInvalid, "etc/passwd"},
		{"layer of negative size", document(`{"schemaVersion":2,"config":` + desc(mediaOCIConfig, sum(nil), 2, "") + `,"layers":[` + desc(mediaOCILayer, sum(nil), -1, "") + `]}`), banger.CodeInvalid, "layer 1"},
		{"layer of 2^63-1 bytes", document(`{"schemaVersion":2,"config":` + desc(mediaOCIConfig, sum(nil), 2, "") + `,"layers":[` + desc(mediaOCILayer, sum(nil), 1<<63-1, "") + `]}`), banger.CodeInvalid, "layer 1"},
		{"layer that is a page", document(`{"schemaVersion":2,"config":` + desc(mediaOCIConfig, sum(nil), 2, "") + `,"layers":[` + desc("text/html", sum(nil), 3, "") + `]}`), banger.CodeInvalid, "layer 1"},
		{"layer from elsewhere", document(`{"schemaVersion":2,"config":` + desc(mediaOCIConfig, sum(nil), 2, "") + `,"layers":[` + desc(mediaOCILayer, sum(nil), 3, `,"urls":["http://169.254.169.254/"]`) + `]}`), banger.CodeNotFound, "not found"},
		{"config that is no config", document(`{"schemaVersion":2,"config":` + desc("application/vnd.evil", sum(nil), 2, "") + `,"layers":[` + desc(mediaOCILayer, sum(nil), 3, "") + `]}`), banger.CodeInvalid, "not a container image"},
		{"index of fifty indexes that are not there", document(`{"schemaVersion":2,"manifests":[` + strings.TrimSuffix(strings.Repeat(desc(mediaOCIIndex, sum([]byte("i")), 3, `,"platform":{"os":"linux","architecture":"amd64"}`)+",", 50), ",") + `]}`), banger.CodeNotFound, "not found"},
		{"index and manifest in one", document(`{"schemaVersion":2,"manifests":[],"config":` + desc(mediaOCIConfig, sum(nil), 2, "") + `,"layers":[]}`), banger.CodeInvalid, "both as an index and as a manifest"},
		{"two values of one key", document(`{"schemaVersion":2,"layers":[],"Layers":[],"layers":[{}]}`), banger.CodeInvalid, `"layers" is there twice`},
		{"indexes in indexes", document(string(im.blobs[nested])), banger.CodeInvalid, "index"},
		{"token server that is a file", challenge(`file:///etc/passwd`), banger.CodeUnavailable, `realm scheme "file" not allowed`},
		{"token server that is gopher", challenge(`gopher://127.0.0.1:70/x`), banger.CodeUnavailable, `realm scheme "gopher" not allowed`},
		{"token server that is a script", challenge(`javascript:alert(1)`), banger.CodeUnavailable, `registry 127.0.0.1`},
		{"token server that is a path alone", challenge(`/token`), banger.CodeUnavailable, `registry 127.0.0.1`},
		{"token server that is no scheme", challenge(`//192.0.2.1/token`), banger.CodeUnavailable, `registry 127.0.0.1`},
		{"token server that is a socket", challenge(`unix:///run/docker.sock`), banger.CodeUnavailable, `registry 127.0.0.1`},
		{"token server that is a password in it", challenge(`http://user:secret@192.0.2.1/token`), banger.CodeUnavailable, `which is not https`},
		{"token server that is escapes", challenge(`http://192.0.2.1/%0d%0aHost:%20x`), banger.CodeUnavailable, `which is not https`},
		{"token server that is the unspecified address", challenge(`http://0.0.0.0:80/token`), banger.CodeUnavailable, `private or link-local`},
		{"token that does not help", tokenServer(func(w http.ResponseWriter) {
			_, _ = io.WriteString(w, `{"token":"x"}`)
		}), banger.CodeNotFound, "does not give access"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !tt.serve(w, r) {
					im.serve(w, r)
				}
			}))
			defer srv.Close()
			cache := &blobCache{}
			start := time.Now()
			_, _, err := pull(t, &Source{Blobs: cache}, ref(t, host(srv)+"/r/i:t"))
			if tt.code != "" {
				refused++
				wantError(t, tt.name, err, tt.code, tt.err)
			} else if harmless++; err != nil {
				t.Error(err)
			}
			for digest, raw := range cache.blobs {
				if im.blobs[digest] == nil && sum(raw) != digest {
					t.Errorf("the blob %s was kept", digest)
				}
			}
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("it held us for %s", d)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error tells a secret: %v", err)
			}
			if cache.open != 0 {
				t.Errorf("%d blob writers left open", cache.open)
			}
		})
	}
	t.Logf("%d attacks of a registry refused, %d harmless", refused, harmless)
}

// challenge is a registry that sends everyone to a token server.
func challenge(realm string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm+`",service="x"`)
		w.WriteHeader(401)
		return true
	}
}

// hijacked answers with what is no answer, for ever.
func hijacked(begin, again string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return true
		}
		defer conn.Close()
		if _, err = io.WriteString(conn, begin); err != nil {
			return true
		}
		for range 1 << 20 {
			if _, err := io.WriteString(conn, again); err != nil {
				break
			}
		}
		return true
	}
}

// tokenServer is a registry and a token server in one; token answers for it.
func tokenServer(token func(w http.ResponseWriter)) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			token(w)
			return true
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token"`)
		w.WriteHeader(401)
		return true
	}
}

func TestRegistryRetry(t *testing.T) {
	for _, of := range []string{"/v2/", "/token", "/v2/r/i/manifests/t"} {
		for fails, ok := range map[int]bool{requestTries - 1: true, requestTries: false} {
			im := newTestImage(t)
			left := fails
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == of {
					if left--; left >= 0 {
						w.WriteHeader(503)
						return
					}
				}
				if r.URL.Path == "/token" {
					_, _ = io.WriteString(w, `{"token":"letmein"}`)
					return
				}
				if r.Header.Get("Authorization") != "Bearer letmein" {
					w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token"`)
					w.WriteHeader(401)
					return
				}
				im.serve(w, r)
			}))
			_, _, err := pull(t, &Source{}, ref(t, host(srv)+"/r/i:t"))
			srv.Close()
			if ok && err != nil {
				t.Errorf("%s fails %d times: %v", of, fails, err)
			} else if !ok {
				wantError(t, of, err, banger.CodeUnavailable, "status 503")
			}
		}
	}
}

// TestRegistryLoginOnce has many blobs asked for at once and two images of one
// repository; a token that expires is renewed.
func TestRegistryLoginOnce(t *testing.T) {
	im := newTestImage(t)
	var mu sync.Mutex
	asked, token, agents := map[string]int{}, "1", map[string]bool{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked[r.URL.Path]++
		agents[r.Header.Get("User-Agent")] = true
		if r.URL.Path == "/token" {
			_, _ = io.WriteString(w, `{"token":"`+token+`"}`)
			return
		}
		if r.Header.Get("Authorization") != "Bearer "+token {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",scope="repository:r/i:pull"`)
			w.WriteHeader(401)
			return
		}
		im.serve(w, r)
	}))
	defer srv.Close()
	s := &Source{UserAgent: "banger/test", keychain: authn.NewMultiKeychain()}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			r, err := s.remote(ref(t, host(srv)+"/r/i:t"))
			if err == nil {
				_, _, err = r.manifest(t.Context(), "t")
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, name := range []string{":t", "@" + im.manifest} {
		if _, _, err := pull(t, s, ref(t, host(srv)+"/r/i"+name)); err != nil {
			t.Error(err)
		}
	}
	if asked["/v2/"] != 1 || asked["/token"] != 1 {
		t.Errorf("asked %d times how to log in, %d times for a token", asked["/v2/"], asked["/token"])
	}
	mu.Lock()
	token = "2"
	mu.Unlock()
	if _, _, err := pull(t, s, ref(t, host(srv)+"/r/i:t")); err != nil {
		t.Error(err)
	}
	if asked["/v2/"] != 1 || asked["/token"] != 2 {
		t.Errorf("after the token expired: asked %d times how to log in, %d times for a token", asked["/v2/"], asked["/token"])
	}
	if len(agents) != 1 || !agents["banger/test"] {
		t.Errorf("user agents %v", agents)
	}
}

// userConfig makes a folder the user's only Docker configuration.
func userConfig(t *testing.T, config string) string {
	t.Helper()
	d := t.TempDir()
	for _, k := range []string{"XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "REGISTRY_AUTH_FILE", "DOCKER_AUTH_CONFIG"} {
		t.Setenv(k, "")
	}
	t.Setenv("HOME", d)
	t.Setenv("DOCKER_CONFIG", d)
	if config == "" {
		return d
	}
	if err := os.WriteFile(filepath.Join(d, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestRegistryLogin has a registry that wants a token, a token server that
// wants a password, and a blob store on another port that must see neither.
func TestRegistryLogin(t *testing.T) {
	im := newTestImage(t)
	var mu sync.Mutex
	var leaked []string
	blobs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if a := r.Header.Get("Authorization"); a != "" {
			leaked = append(leaked, a)
		}
		im.serve(w, r)
	}))
	defer blobs.Close()
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, p, _ := r.BasicAuth()
		if r.Method == http.MethodPost {
			_ = r.ParseForm()
			if r.Form.Get("refresh_token") == "identity" && r.Form.Get("grant_type") == "refresh_token" {
				_, _ = io.WriteString(w, `{"access_token":"letmein"}`)
				return
			}
		}
		if u != "me" || p != "secret" || r.URL.Query().Get("scope") != "repository:r/i:pull" || r.URL.Query().Get("service") != "reg" {
			w.WriteHeader(401)
			return
		}
		_, _ = io.WriteString(w, `{"token":"letmein"}`)
	}))
	defer tokens.Close()
	realm := strings.Replace(tokens.URL, "127.0.0.1", "localhost", 1)
	basic := false
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); basic && (!ok || u != "me" || p != "secret") {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
			return
		}
		if !basic && r.Header.Get("Authorization") != "Bearer letmein" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm+`/token",service="reg",scope="repository:r/i:pull"`)
			w.WriteHeader(401)
			return
		}
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, blobs.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		im.serve(w, r)
	}))
	defer registry.Close()
	me, wrong := `{"auth":"bWU6c2VjcmV0"}`, `{"auth":"bWU6d3Jvbmc="}`
	for _, tt := range []struct {
		name  string
		basic bool
		host  string // "": the registry
		login string // in Docker's config.json
		err   string
	}{
		{name: "token", login: me},
		{name: "identity token", login: `{"identitytoken":"identity"}`},
		{name: "registry token", login: `{"registrytoken":"letmein"}`},
		{name: "basic", basic: true, login: me},
		{name: "wrong password", login: wrong, err: "does not give access"},
		{name: "wrong password, basic", basic: true, login: wrong, err: "does not give access"},
		{name: "no login", login: `{}`, err: "does not give access"},
		{name: "no login, basic", basic: true, login: `{}`, err: "does not give access"},
		{name: "login of another host", basic: true, host: "localhost", login: me, err: "does not give access"},
		{name: "login of another port", basic: true, host: "127.0.0.1:1", login: me, err: "does not give access"},
		{name: "login of the host without its port", basic: true, host: "127.0.0.1", login: me, err: "does not give access"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			basic, leaked = tt.basic, nil
			if tt.host == "" {
				tt.host = host(registry)
			}
			userConfig(t, fmt.Sprintf(`{"auths":{%q:%s}}`, tt.host, tt.login))
			_, _, err := pull(t, &Source{keychain: authn.DefaultKeychain}, ref(t, host(registry)+"/r/i:t"))
			if tt.err == "" && err != nil {
				t.Error(err)
			} else if tt.err != "" {
				wantError(t, tt.name, err, banger.CodeNotFound, tt.err)
			}
			if len(leaked) > 0 {
				t.Errorf("the blob store was sent %q", leaked)
			}
		})
	}
}

// logins is a keychain with one login for every registry.
type logins authn.AuthConfig

func (l logins) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig(l)), nil
}

// TestRegistryTLS has hosts of the network played by one TLS server, and looks
// at what each of them gets to see.
func TestRegistryTLS(t *testing.T) {
	im := newTestImage(t)
	var renewed atomic.Int32
	const realm = `Bearer realm="https://auth.example.com/token"`
	is := func(r *http.Request, what string) bool { return strings.Contains(r.URL.Path, what) }
	for _, tt := range []struct {
		name  string
		login logins
		serve func(w http.ResponseWriter, r *http.Request) bool // false: as an honest one
		seen  []string                                          // credentials, by host
		err   string
	}{
		{name: "anonymous", seen: []string{"registry.example.com Bearer letmein"}},
		{name: "password", login: logins{Username: "me", Password: "secret"},
			seen: []string{"auth.example.com Basic bWU6c2VjcmV0", "registry.example.com Bearer letmein"}},
		{name: "identity token", login: logins{IdentityToken: "identity"},
			seen: []string{"auth.example.com identity", "registry.example.com Bearer letmein"}},
		{name: "token server redirects a password", login: logins{Username: "me", Password: "secret"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Host == "auth.example.com" {
				http.Redirect(w, r, "https://evil.example.com/token", http.StatusTemporaryRedirect)
				return true
			}
			return false
		}, seen: []string{"auth.example.com Basic bWU6c2VjcmV0"}, err: "redirect of a login"},
		{name: "token server redirects", serve: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Host == "auth.example.com" {
				http.Redirect(w, r, "https://other.example.com/token", http.StatusTemporaryRedirect)
				return true
			}
			return false
		}, seen: []string{"registry.example.com Bearer letmein"}},
		{name: "token that expired is renewed at a server that redirects an identity token", login: logins{IdentityToken: "identity"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Host == "auth.example.com" && renewed.Add(1) > 1 {
				http.Redirect(w, r, "https://evil.example.com/token", http.StatusTemporaryRedirect)
				return true
			}
			if is(r, "/blobs/") {
				w.Header().Set("WWW-Authenticate", realm)
				w.WriteHeader(401)
				return true
			}
			return false
		}, seen: []string{"auth.example.com identity", "registry.example.com Bearer letmein"}, err: "redirect of a login"},
		{name: "token server redirects an identity token", login: logins{IdentityToken: "identity"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Host == "auth.example.com" {
				http.Redirect(w, r, "https://evil.example.com/token", http.StatusTemporaryRedirect)
				return true
			}
			return false
		}, seen: []string{"auth.example.com identity"}, err: `redirect of a login to "https://evil.example.com", another host`},
		{name: "token server redirects an identity token to another port", login: logins{IdentityToken: "identity"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Host == "auth.example.com" {
				http.Redirect(w, r, "https://auth.example.com:444/token", http.StatusPermanentRedirect)
				return true
			}
			return false
		}, seen: []string{"auth.example.com identity"}, err: "another host"},
		{name: "first answer redirects", login: logins{Username: "me", Password: "secret"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Host == "registry.example.com" && r.URL.Path == "/v2/" {
				http.Redirect(w, r, "https://evil.example.com/v2/", http.StatusTemporaryRedirect)
				return true
			}
			if r.Host == "evil.example.com" {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(401)
				return true
			}
			return false
		}, err: `redirect of a login to "https://evil.example.com", another host`},
		{name: "layer redirects to another host, which wants a password", login: logins{Username: "me", Password: "secret"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Host == "blobs.example.com" {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(401)
				return true
			}
			return false
		}, seen: []string{"auth.example.com Basic bWU6c2VjcmV0", "registry.example.com Bearer letmein"}, err: "does not give access"},
		{name: "layer redirects to plain http", serve: func(w http.ResponseWriter, r *http.Request) bool {
			if is(r, "/blobs/") {
				http.Redirect(w, r, "http://blobs.example.com/x", http.StatusTemporaryRedirect)
			}
			return is(r, "/blobs/")
		}, seen: []string{"registry.example.com Bearer letmein"}, err: `redirect to "http://blobs.example.com", which is not https`},
		{name: "layer redirects to plain http on loopback", serve: func(w http.ResponseWriter, r *http.Request) bool {
			if is(r, "/blobs/") {
				http.Redirect(w, r, "http://127.0.0.1/x", http.StatusTemporaryRedirect)
			}
			return is(r, "/blobs/")
		}, seen: []string{"registry.example.com Bearer letmein"}, err: "which is not https"},
		{name: "layer redirects to this machine", serve: func(w http.ResponseWriter, r *http.Request) bool {
			if is(r, "/blobs/") {
				http.Redirect(w, r, "https://localhost:8443/x", http.StatusTemporaryRedirect)
			}
			return is(r, "/blobs/")
		}, seen: []string{"registry.example.com Bearer letmein"}, err: `"https://localhost:8443", which is this machine`},
		{name: "token server on this machine", login: logins{Username: "me", Password: "secret"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://localhost/token"`)
			w.WriteHeader(401)
			return true
		}, err: "which is this machine"},
		{name: "token server in plain http", login: logins{Username: "me", Password: "secret"}, serve: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://auth.example.com/token"`)
			w.WriteHeader(401)
			return true
		}, err: "use https"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var mu sync.Mutex
			var seen []string
			srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				for _, s := range []string{r.Header.Get("Authorization"), r.FormValue("refresh_token")} {
					if s = r.Host + " " + s; !strings.HasSuffix(s, " ") && !slices.Contains(seen, s) {
						seen = append(seen, s)
					}
				}
				mu.Unlock()
				switch {
				case tt.serve != nil && tt.serve(w, r):
				case r.URL.Path == "/token":
					_, _ = io.WriteString(w, `{"token":"letmein"}`)
				case r.Host == "registry.example.com" && r.Header.Get("Authorization") != "Bearer letmein":
					w.Header().Set("WWW-Authenticate", realm)
					w.WriteHeader(401)
				case r.Host == "registry.example.com" && is(r, "/blobs/"):
					http.Redirect(w, r, "https://blobs.example.com"+r.URL.Path, http.StatusTemporaryRedirect)
				default:
					im.serve(w, r)
				}
			}))
			defer srv.Close()
			network := newTransport()
			network.Proxy = nil
			network.TLSClientConfig = srv.Client().Transport.(*http.Transport).TLSClientConfig
			network.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", srv.Listener.Addr().String())
			}
			s := &Source{transport: network}
			if tt.login != (logins{}) {
				s.keychain = tt.login
			}
			_, _, err := pull(t, s, ref(t, "registry.example.com/r/i:t"))
			if e, ok := errors.AsType[*banger.Error](err); tt.err == "" && err != nil || tt.err != "" && (!ok || !strings.Contains(e.Message, tt.err)) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			slices.Sort(seen)
			if !slices.Equal(seen, tt.seen) {
				t.Errorf("credentials seen: %q, want %q", seen, tt.seen)
			}
		})
	}
}

// roundTrip is a transport without a network.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestRegistryHosts looks at which hosts are asked how.
func TestRegistryHosts(t *testing.T) {
	for h, want := range map[string]bool{
		"localhost": true, "localhost:5000": true, "127.0.0.1": true, "127.9.9.9:5000": true, "[::1]": true, "[::1]:5000": true, "::1": true,
		"128.0.0.1": false, "localhost.example.com": false, "127.0.0.1.example.com": false, "0.0.0.0": false, "10.0.0.1:5000": false, "docker.io": false, "[::2]:5000": false,
	} {
		if isLoopback(h) != want {
			t.Errorf("isLoopback(%q) = %v", h, !want)
		}
	}
	refused := &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	for r, want := range map[string]string{
		"127.0.0.1:5000/x": "http://127.0.0.1:5000/v2/", "127.0.0.2:5000/x": "http://127.0.0.2:5000/v2/", "[::1]:5000/x": "http://[::1]:5000/v2/",
		"localhost/x": "http://localhost/v2/", "localhost:5000/x": "http://localhost:5000/v2/",
		"10.0.0.1:5000/x": "https://10.0.0.1:5000/v2/", "192.168.1.1/x": "https://192.168.1.1/v2/", "r.localhost:5000/x": "https://r.localhost:5000/v2/", "r.local/x": "https://r.local/v2/",
		"debian": "https://index.docker.io/v2/", "docker.io/a/b": "https://index.docker.io/v2/", "ghcr.io/x": "https://ghcr.io/v2/",
	} {
		var mu sync.Mutex
		var asked []string
		s := &Source{transport: roundTrip(func(req *http.Request) (*http.Response, error) {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, req.URL.String())
			return nil, refused
		})}
		_, _, err := pull(t, s, ref(t, r))
		wantError(t, r, err, banger.CodeUnavailable, "registry "+ref(t, r).Host+": connection refused")
		if !slices.Equal(asked, []string{want}) {
			t.Errorf("%s is asked at %q, want %s", r, asked, want)
		}
	}
}

// TestRegistryUnreachable has a network with one thing wrong at a time.
func TestRegistryUnreachable(t *testing.T) {
	for _, tt := range []struct {
		name  string
		err   error
		want  string
		tries int
	}{
		{"refused", &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, "connection refused", 1},
		{"no such host", &net.DNSError{IsNotFound: true}, "name not resolved", 1},
		{"name server silent", &net.DNSError{IsTimeout: true}, "no answer from the name server", requestTries},
		{"no route", &net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}, "not reachable", 1},
		{"reset", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, "connection reset", requestTries},
		{"closed", io.ErrUnexpectedEOF, "connection closed in the middle of an answer", requestTries},
		{"silent", os.ErrDeadlineExceeded, "no answer in time", requestTries},
		{"certificate", &tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, "its certificate is not trusted", 1},
		{"no TLS", tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, "it does not speak TLS", 1},
		{"of many lines", errors.New("a\x1b[2J\nsecond"), "a?[2J", 1},
	} {
		for _, host := range []string{"registry.example.com", "10.0.0.1:5000", "127.0.0.1:5000"} {
			synctest.Test(t, func(t *testing.T) {
				tries := 0
				s := &Source{transport: roundTrip(func(*http.Request) (*http.Response, error) {
					tries++
					return nil, tt.err
				})}
				_, _, err := pull(t, s, ref(t, host+"/r/i:t"))
				wantError(t, tt.name, err, banger.CodeUnavailable, "registry "+host+": "+tt.want)
				if e, ok := errors.AsType[*banger.Error](err); ok && e.Hint == "" {
					t.Errorf("%s: no hint", tt.name)
				}
				if !errors.Is(err, tt.err) && tt.name != "certificate" {
					t.Errorf("%s: the cause is lost", tt.name)
				}
				if tries != tt.tries {
					t.Errorf("%s: tried %d times at %s, want %d", tt.name, tries, host, tt.tries)
				}
			})
		}
	}
}

// stuckBody gives no byte and no end.
type stuckBody struct{ ctx context.Context }

func (b stuckBody) Read([]byte) (int, error) { <-b.ctx.Done(); return 0, b.ctx.Err() }
func (b stuckBody) Close() error             { return nil }

// stuckKeychain is a credential helper that waits for someone.
type stuckKeychain chan struct{}

func (k stuckKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	<-k
	return authn.Anonymous, nil
}

// TestRegistryStuck runs on a clock of its own.
func TestRegistryStuck(t *testing.T) {
	answer := func(req *http.Request, stuckAt string) *http.Response {
		resp := &http.Response{StatusCode: 200, Header: http.Header{}, Request: req, ContentLength: -1, Body: http.NoBody}
		if strings.HasSuffix(req.URL.Path, stuckAt) {
			resp.Body = stuckBody{req.Context()}
		}
		return resp
	}
	for _, tt := range []struct {
		name  string
		at    string
		helps bool // an answer comes
		want  string
		after time.Duration
	}{
		{"manifest stops", "/manifests/t", true, "no byte for 1m0s", stallTimeout},
		{"request is not answered", "/manifests/t", false, "no byte for 1m0s", stallTimeout},
		{"login is not answered", "/v2/", false, "no answer in time", requestTries*handshakeTimeout + 4*firstRetryDelay},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &Source{transport: roundTrip(func(req *http.Request) (*http.Response, error) {
					if !tt.helps && strings.HasSuffix(req.URL.Path, tt.at) {
						<-req.Context().Done()
						return nil, req.Context().Err()
					}
					return answer(req, tt.at), nil
				})}
				start := time.Now()
				_, _, err := pull(t, s, ref(t, "registry.example.com/r/i:t"))
				wantError(t, tt.name, err, banger.CodeUnavailable, tt.want)
				if d := time.Since(start); d != tt.after {
					t.Errorf("after %s, want %s", d, tt.after)
				}
			})
		})
	}
	t.Run("helper", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			k := make(stuckKeychain)
			defer close(k)
			start := time.Now()
			_, _, err := pull(t, &Source{keychain: k}, ref(t, "registry.example.com/r/i:t"))
			wantError(t, "helper", err, banger.CodeUnavailable, "login for registry.example.com: no answer from the credential helper")
			if d := time.Since(start); d != helperTimeout {
				t.Errorf("after %s", d)
			}
		})
	})
	t.Run("canceled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			k := make(stuckKeychain)
			defer close(k)
			s := &Source{keychain: k}
			done := 0
			resolve := func() context.CancelFunc {
				ctx, cancel := context.WithCancel(t.Context())
				go func() {
					_, err := s.Resolve(ctx, ref(t, "registry.example.com/r/i:t"))
					wantError(t, "canceled", err, banger.CodeCanceled, "context canceled")
					done++
				}()
				synctest.Wait()
				return cancel
			}
			first, second := resolve(), resolve() // one waits for the helper, one for the other
			for i, cancel := range []context.CancelFunc{second, first} {
				cancel()
				synctest.Wait()
				if done != i+1 {
					t.Fatalf("%d have ended, want %d", done, i+1)
				}
			}
			if len(s.repositories["registry.example.com/r/i"].turn) != 0 {
				t.Error("the turn is still held")
			}
		})
	})
}

// TestKeychain reads logins where docker login leaves them.
func TestKeychain(t *testing.T) {
	config := `{"auths":{"https://index.docker.io/v1/":{"auth":"bWU6cGE6c3M="},"r.example:5000":{"auth":"dTpw"}},
		"credHelpers":{"ghcr.io":"test","quay.io":"test","broken.example":"test","none.example":"not-installed"}}`
	script := "#!/bin/sh\nread s\ncase $s in\nghcr.io) echo '{\"Username\":\"<token>\",\"Secret\":\"idt\"}';;\n" +
		"quay.io) echo 'credentials not found in native keychain'; exit 1;;\n*) printf 'boom\\nmore\\n'; exit 1;;\nesac\n"
	for _, tt := range []struct{ name, host, config, want, err string }{
		{name: "Docker Hub", host: "docker.io", config: config, want: "me pa:ss "},
		{name: "host with a port", host: "r.example:5000", config: config, want: "u p "},
		{name: "host without that port", host: "r.example", config: config, want: "  "},
		{name: "another host", host: "other.example", config: config, want: "  "},
		{name: "helper with an identity token", host: "ghcr.io", config: config, want: "  idt"},
		{name: "helper that has none", host: "quay.io", config: config, want: "  "},
		{name: "no configuration", host: "other.example", want: "  "},
		{name: "helper that fails", host: "broken.example", config: config, err: "login for broken.example: error getting credentials - err: exit status 1, out: `boom"},
		{name: "helper that is not there", host: "none.example", config: config, err: "login for none.example: "},
		{name: "configuration that is no JSON", host: "other.example", config: "{", err: "login for other.example: "},
		{name: "login that is damaged", host: "other.example", config: `{"auths":{"other.example":{"auth":"*"}}}`, err: "login for other.example: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := userConfig(t, tt.config)
			t.Setenv("PATH", d+":"+os.Getenv("PATH"))
			if err := os.WriteFile(filepath.Join(d, "docker-credential-test"), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			r, err := (&Source{}).remote(ref(t, tt.host+"/r/i"))
			if err != nil {
				t.Fatal(err)
			}
			login, err := r.findLogin(t.Context())
			if tt.err != "" {
				if err == nil {
					t.Fatal("no error")
				}
				err, temporary := r.explain(err)
				wantError(t, tt.name, err, banger.CodeUnavailable, tt.err)
				if temporary {
					t.Error("it would be tried again")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			c, err := login.Authorization()
			if err != nil {
				t.Fatal(err)
			}
			if got := c.Username + " " + c.Password + " " + c.IdentityToken; got != tt.want {
				t.Errorf("login %q, want %q", got, tt.want)
			}
		})
	}
}

// TestRealRegistry pulls from distribution's own server.
func TestRealRegistry(t *testing.T) {
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		missing(t, "docker-registry is not installed")
	}
	tmp := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	config := fmt.Sprintf("version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: %s/data\nhttp:\n  addr: %s\n", tmp, addr)
	if err := os.WriteFile(tmp+"/config.yml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, bin, "serve", tmp+"/config.yml")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }()
	for i := 0; ; i++ {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			break
		}
		if i == 100 {
			t.Fatal("the registry did not come up")
		}
		time.Sleep(50 * time.Millisecond)
	}
	im := newTestImage(t)
	// The index would be refused: it names a manifest that is not there.
	for d, m := range im.media {
		if m == mediaOCIManifest {
			im.manifest = d
		}
	}
	do := func(method, u, media string, body []byte) *http.Response {
		req, _ := http.NewRequest(method, u, bytes.NewReader(body))
		req.Header.Set("Content-Type", media)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}
	for d, raw := range im.blobs {
		if im.media[d] != "" {
			continue
		}
		u, err := url.Parse(do("POST", "http://"+addr+"/v2/r/i/blobs/uploads/", "", nil).Header.Get("Location"))
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Set("digest", d)
		u.RawQuery = q.Encode()
		if r := do("PUT", u.String(), "application/octet-stream", raw); r.StatusCode != 201 {
			t.Fatalf("push: %s", r.Status)
		}
	}
	if r := do("PUT", "http://"+addr+"/v2/r/i/manifests/t", mediaOCIManifest, im.blobs[im.manifest]); r.StatusCode != 201 {
		t.Fatalf("push: %s", r.Status)
	}
	img, tree, err := pull(t, &Source{}, ref(t, addr+"/r/i:t"))
	if err != nil {
		t.Fatal(err)
	}
	if img.Digest != im.manifest || tree.Lookup("etc/motd") == nil {
		t.Errorf("digest %s, want %s", img.Digest, im.manifest)
	}
	_, _, err = pull(t, &Source{}, ref(t, addr+"/r/i:none"))
	wantError(t, "unknown tag", err, banger.CodeNotFound, "not found at")
}

// missing skips a test for want of a tool, but not where everything must be.
func missing(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(reason)
	}
	t.Skip("NOT TESTED: " + reason)
}

// writeLayout lays an image out in a folder, tag "t".
func writeLayout(t testing.TB, im *testImage) string {
	d := t.TempDir()
	if err := os.MkdirAll(d+"/blobs/sha256", 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(name string, raw []byte) {
		if err := os.WriteFile(filepath.Join(d, name), raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for digest, raw := range im.blobs {
		put(blobPath(digest), raw)
	}
	put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	put("index.json", []byte(`{"schemaVersion":2,"manifests":[`+desc(im.media[im.manifest], im.manifest, len(im.blobs[im.manifest]), `,"annotations":{"org.opencontainers.image.ref.name":"t"}`)+`]}`))
	return d
}

func pullLayout(t testing.TB, d, suffix string) (*Image, *Tree[int], error) {
	in, err := os.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	return pull(t, &Source{Input: in}, ref(t, "oci:"+d+suffix))
}

func TestLayout(t *testing.T) {
	im := newTestImage(t)
	var layer, config string
	for d, raw := range im.blobs {
		if raw[0] == 0x1f {
			layer = d
		} else if im.media[d] == "" {
			config = d
		}
	}
	d := writeLayout(t, im)
	for _, suffix := range []string{"", ":t", "@" + im.manifest} {
		img, tree, err := pullLayout(t, d, suffix)
		if err != nil {
			t.Fatal(err)
		}
		if tree.Lookup("etc/motd") == nil || img.Name != "oci:"+d+suffix || img.Digest == "" {
			t.Errorf("image %+v", img)
		}
	}
	_, _, err := pullLayout(t, d, ":u")
	wantError(t, "other tag", err, banger.CodeNotFound, "no such image in it")

	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, im.blobs[layer], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		do   func(d string) error
		code banger.Code
		err  string
	}{
		{"blob is a symlink out of it", func(d string) error {
			os.Remove(d + "/" + blobPath(layer))
			return os.Symlink(outside, d+"/"+blobPath(layer))
		}, banger.CodeInvalid, "escapes"},
		{"blob is a FIFO", func(d string) error {
			os.Remove(d + "/" + blobPath(layer))
			return exec.Command("mkfifo", d+"/"+blobPath(layer)).Run()
		}, banger.CodeInvalid, "not a regular file"},
		{"blob is missing", func(d string) error { return os.Remove(d + "/" + blobPath(layer)) }, banger.CodeInvalid, "is missing"},
		{"blob is longer", func(d string) error {
			return os.WriteFile(d+"/"+blobPath(layer), append(bytes.Clone(im.blobs[layer]), 0), 0o644)
		}, banger.CodeInvalid, "size is"},
		{"config is another", func(d string) error {
			return os.WriteFile(d+"/"+blobPath(config), bytes.Replace(im.blobs[config], []byte("nobody"), []byte("root!!"), 1), 0o644)
		}, banger.CodeInvalid, "config: digest is"},
		{"digest is a path", func(d string) error {
			return os.WriteFile(d+"/index.json", []byte(`{"schemaVersion":2,"manifests":[`+desc(mediaOCIManifest, "sha256:../../../etc/passwd", 3, "")+`]}`), 0o644)
		}, banger.CodeInvalid, "is not sha256 and 64 hex digits"},
		{"version", func(d string) error {
			return os.WriteFile(d+"/oci-layout", []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o644)
		}, banger.CodeInvalid, "not an OCI image layout"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := writeLayout(t, im)
			if err := tt.do(d); err != nil {
				t.Fatal(err)
			}
			_, _, err := pullLayout(t, d, "")
			wantError(t, tt.name, err, tt.code, tt.err)
		})
	}
}

func TestDocuments(t *testing.T) {
	c, l := desc(mediaOCIConfig, sum(nil), 0, ""), desc(mediaOCILayer, sum(nil), 0, "")
	for _, tt := range []struct{ name, raw, media, err string }{
		{"manifest", `{"schemaVersion":2,"config":` + c + `,"layers":[` + l + `]}`, "", ""},
		{"index", `{"schemaVersion":2,"manifests":[]}`, mediaOCIIndex, ""},
		{"both", `{"schemaVersion":2,"config":` + c + `,"layers":[],"manifests":[]}`, mediaOCIManifest, "both as an index and as a manifest"},
		{"index called manifest", `{"schemaVersion":2,"manifests":[]}`, mediaOCIManifest, "does not fit its content"},
		{"manifest called index", `{"schemaVersion":2,"config":` + c + `,"layers":[]}`, mediaOCIIndex, "does not fit its content"},
		{"two names for one type", `{"schemaVersion":2,"mediaType":"` + mediaDockerManifest + `","config":` + c + `,"layers":[]}`, mediaOCIManifest, "calls itself"},
		{"key twice", `{"schemaVersion":2,"layers":[],"config":` + c + `,"layers":[` + l + `]}`, "", `key "layers" is there twice`},
		{"key twice below", `{"schemaVersion":2,"layers":[],"config":{"digest":"a","digest":"b"}}`, "", `key "digest" is there twice`},
		{"key in other case", `{"schemaVersion":2,"Layers":[],"config":` + c + `,"layers":[]}`, "", `is spelled "Layers"`},
		{"schema 1 by content", `{"schemaVersion":1,"fsLayers":[]}`, "", "schema 1"},
		{"version 3", `{"schemaVersion":3,"manifests":[]}`, "", "schemaVersion is not 2"},
		{"neither", `{"schemaVersion":2}`, "", "without layers or config"},
		{"array", `[]`, "", "not a JSON object"},
		{"null", `null`, "", "not a JSON object"},
		{"two documents", `{"schemaVersion":2,"manifests":[]}{}`, "", "not a JSON object"},
		{"nested", strings.Repeat(`{"a":`, 65) + "1" + strings.Repeat("}", 65), "", "nested deeper than 64"},
		{"size of 4 MiB and one", `{"schemaVersion":2,"manifests":[],"x":"` + strings.Repeat("x", MaxManifestBytes) + `"}`, "", "manifest of more than"},
		{"layers of a wrong type", `{"schemaVersion":2,"config":` + c + `,"layers":{}}`, "", "not of its type"},
	} {
		_, err := parseDocument([]byte(tt.raw), tt.media)
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.err)
		}
	}
	for media, want := range map[string]string{
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip":   "foreign layers are not supported",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":      "foreign layers are not supported",
		"application/vnd.cncf.helm.chart.content.v1.tar+gzip":            "not that of a layer",
		"application/vnd.oci.image.layer.v1.tar+gzip; charset=something": "not that of a layer",
	} {
		if _, err := layerCompression(media); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v", media, err)
		}
	}
}

// FuzzManifest feeds documents through everything that reads one.
func FuzzManifest(f *testing.F) {
	im := newTestImage(f)
	for d, raw := range im.blobs {
		if im.media[d] != "" || json.Valid(raw) {
			f.Add(raw)
		}
	}
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{}]}`))
	f.Add([]byte(`{"schemaVersion":2,"config":null,"layers":[null]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s := &Source{}
		img := &Image{Name: "fuzz", source: s}
		docs := fuzzDocuments{raw}
		if err := s.pin(context.Background(), img, docs, raw, ""); err == nil && !digestPattern.MatchString(img.Digest) {
			t.Error("pinned without a digest")
		}
		_ = fillImage(img, &document{}, raw, platform{OS: "linux", Architecture: "amd64"})
	})
}

type fuzzDocuments struct{ raw []byte }

func (d fuzzDocuments) openBlob(context.Context, string, int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(d.raw)), nil
}

func (d fuzzDocuments) manifest(context.Context, string) ([]byte, string, error) {
	return d.raw, "", nil
}
