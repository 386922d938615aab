package oci

import (
	"bytes"
	"context"
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
	"testing"
	"time"

	"banger"
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
	if s.client == nil {
		s.client = newRegistryClient()
		s.client.auth = func(context.Context, string) (credentials, error) { return credentials{}, nil }
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
		{"redirect to plain http elsewhere", func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://192.0.2.1/x", http.StatusFound)
			return true
		}, banger.CodeUnavailable, "not https"},
		{"token server elsewhere in plain http", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://192.0.2.1/token"`)
			w.WriteHeader(401)
			return true
		}, banger.CodeUnavailable, "is not https"},
		{"token server at the metadata address", func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://169.254.169.254/token"`)
			w.WriteHeader(401)
			return true
		}, banger.CodeUnavailable, "private network"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !tt.serve(w, r) {
					im.serve(w, r)
				}
			}))
			defer srv.Close()
			cache := &blobCache{}
			_, _, err := pull(t, &Source{Blobs: cache}, ref(t, host(srv)+"/r/i:t"))
			wantError(t, tt.name, err, tt.code, tt.err)
			if cache.open != 0 {
				t.Errorf("%d blob writers left open", cache.open)
			}
		})
	}
}

func TestRegistryRetry(t *testing.T) {
	im := newTestImage(t)
	fails := 2
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if fails--; fails >= 0 {
			w.WriteHeader(503)
			return
		}
		im.serve(w, r)
	}))
	defer srv.Close()
	if _, _, err := pull(t, &Source{}, ref(t, host(srv)+"/r/i:t")); err != nil {
		t.Error(err)
	}
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
	basic := false
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, ok := r.BasicAuth(); basic && (!ok || u != "me" || p != "secret") {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
			return
		}
		if !basic && r.Header.Get("Authorization") != "Bearer letmein" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+tokens.URL+`/token",service="reg",scope="repository:r/i:pull"`)
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
	for _, tt := range []struct {
		name  string
		basic bool
		cred  credentials
		err   string
	}{
		{name: "token", cred: credentials{Username: "me", Password: "secret"}},
		{name: "identity token", cred: credentials{IdentityToken: "identity"}},
		{name: "registry token", cred: credentials{RegistryToken: "letmein"}},
		{name: "basic", basic: true, cred: credentials{Username: "me", Password: "secret"}},
		{name: "wrong password", cred: credentials{Username: "me", Password: "wrong"}, err: "does not give access"},
		{name: "anonymous", basic: true, err: "does not give access"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			basic, leaked = tt.basic, nil
			c := newRegistryClient()
			c.auth = func(_ context.Context, h string) (credentials, error) {
				if h != host(registry) {
					t.Errorf("credentials asked for %q", h)
				}
				return tt.cred, nil
			}
			_, _, err := pull(t, &Source{client: c}, ref(t, host(registry)+"/r/i:t"))
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

func TestLoopback(t *testing.T) {
	for h, want := range map[string]bool{
		"localhost": true, "localhost:5000": true, "127.0.0.1": true, "127.9.9.9:5000": true, "[::1]": true, "[::1]:5000": true, "::1": true,
		"128.0.0.1": false, "localhost.example.com": false, "127.0.0.1.example.com": false, "0.0.0.0": false, "10.0.0.1:5000": false, "docker.io": false, "[::2]:5000": false,
	} {
		if isLoopback(h) != want {
			t.Errorf("isLoopback(%q) = %v", h, !want)
		}
	}
	for r, want := range map[string]string{"127.0.0.1:5000/x": "http://127.0.0.1:5000", "10.0.0.1:5000/x": "https://10.0.0.1:5000", "debian": "https://registry-1.docker.io", "[::1]:5000/x": "http://[::1]:5000"} {
		if got := (&Source{}).remote(ref(t, r)).base; got != want {
			t.Errorf("%s is asked at %s, want %s", r, got, want)
		}
	}
}

func TestChallenge(t *testing.T) {
	for s, want := range map[string]string{
		`Bearer realm="https://a/b?c=d,e",service=x , scope="a:b:pull,push"`: `bearer map[realm:https://a/b?c=d,e scope:a:b:pull,push service:x]`,
		`BASIC`:                       `basic map[]`,
		`Bearer realm="a\"b",realm=c`: `bearer map[realm:a"b]`,
		`Bearer realm="open`:          `bearer map[realm:open]`,
		``:                            ` map[]`,
		`Bearer ,,=,=`:                `bearer map[:]`,
	} {
		scheme, params := parseChallenge(s)
		if got := fmt.Sprint(scheme, " ", params); got != want {
			t.Errorf("%q: %s, want %s", s, got, want)
		}
	}
}

func TestCredentials(t *testing.T) {
	tmp := t.TempDir()
	for _, k := range []string{"HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG"} {
		t.Setenv(k, "")
	}
	t.Setenv("DOCKER_CONFIG", tmp)
	t.Setenv("PATH", tmp+":"+os.Getenv("PATH"))
	script := "#!/bin/sh\nread s\ncase $s in\nghcr.io) echo '{\"Username\":\"<token>\",\"Secret\":\"idt\"}';;\nquay.io) echo 'credentials not found in native keychain'; exit 1;;\n*) echo boom; exit 1;;\nesac\n"
	if err := os.WriteFile(filepath.Join(tmp, "docker-credential-test"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	config := `{"auths":{"https://index.docker.io/v1/":{"auth":"bWU6cGE6c3M="},"r.example:5000":{"username":"u","password":"p"},"bad.example":{"auth":"*"}},
		"credHelpers":{"ghcr.io":"test","quay.io":"test","broken.example":"test","evil.example":"../x"}}`
	for host, want := range map[string]string{
		"docker.io": "{me pa:ss  } <nil>", "r.example:5000": "{u p  } <nil>", "other.example": "{   } <nil>", "ghcr.io": "{  idt } <nil>", "quay.io": "{   } <nil>",
		"bad.example": "{   } login of \"bad.example\" is damaged", "broken.example": "{   } credential helper docker-credential-test: exit status 1", "evil.example": "{   } credential helper \"../x\": not a name",
	} {
		if err := os.WriteFile(filepath.Join(tmp, "config.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := lookupCredentials(t.Context(), host)
		if got := fmt.Sprint(c, " ", err); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
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
