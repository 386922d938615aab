package oci

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"banger"
)

// largeImage is one whose layer has so many bytes that do not compress.
func largeImage(t *testing.T, n int) (im *testImage, layer string) {
	t.Helper()
	im = &testImage{blobs: map[string][]byte{}, media: map[string]string{}}
	raw := tarOf(t, []te{f("noise", noise(n))})
	layer = sum(raw)
	im.blobs[layer] = raw
	config := fmt.Appendf(nil, `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, layer)
	im.blobs[sum(config)] = config
	im.manifest = im.add(mediaOCIManifest, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, mediaOCIManifest,
		desc(mediaOCIConfig, sum(config), len(config), ""), desc(mediaOCILayer, layer, len(raw), "")))
	return im, layer
}

// breakOff sends a part of a body that was announced whole, and hangs up.
func breakOff(w http.ResponseWriter, body []byte, n int) {
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	if w.Header().Get("Content-Range") != "" {
		w.WriteHeader(http.StatusPartialContent)
	}
	_, _ = w.Write(body[:min(n, len(body))])
	if n < len(body) {
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
}

// A blob that breaks off goes on where it did; what does not fit is found out.
func TestRegistryResume(t *testing.T) {
	const piece = 300 << 10
	whole := 0
	for _, row := range []struct {
		name    string
		serve   func(w http.ResponseWriter, r *http.Request, body []byte, from int)
		want    string // of the error; "" if it works
		atMost  int    // requests for the blob
		atLeast int
	}{
		{"by ranges", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			if from > 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(body)-1, len(body)))
			}
			breakOff(w, body[from:], piece)
		}, "", 5, 4},
		{"without ranges", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			breakOff(w, body, from+piece)
		}, "", 5, 4},
		{"refusing ranges", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			if from > 0 {
				http.Error(w, "{}", http.StatusRequestedRangeNotSatisfiable)
				return
			}
			whole++
			breakOff(w, body, whole*piece)
		}, "", 10, 6},
		{"never a byte more", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			if from > 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(body)-1, len(body)))
				breakOff(w, body[from:], 0)
			}
			breakOff(w, body, piece)
		}, "connection closed in the middle", resumeTries + 1, resumeTries + 1},
		{"another range than was asked for", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			if from > 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from+1, len(body)-1, len(body)))
				breakOff(w, body[from+1:], len(body))
				return
			}
			breakOff(w, body, piece)
		}, "the rest of it is", 2, 2},
		{"of another whole", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			if from > 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(body), len(body)+1))
				breakOff(w, body[from:], len(body))
				return
			}
			breakOff(w, body, piece)
		}, "the rest of it is", 2, 2},
		{"other bytes", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			if from > 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(body)-1, len(body)))
				breakOff(w, bytes.Repeat([]byte{7}, len(body)-from), len(body))
				return
			}
			breakOff(w, body, piece)
		}, "digest is sha256:", 2, 2},
		{"gone meanwhile", func(w http.ResponseWriter, r *http.Request, body []byte, from int) {
			if from > 0 {
				http.Error(w, "{}", http.StatusNotFound)
				return
			}
			breakOff(w, body, piece)
		}, "not found", 2, 2},
	} {
		t.Run(row.name, func(t *testing.T) {
			im, layer := largeImage(t, 1<<20)
			asked := 0
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !strings.HasSuffix(r.URL.Path, "/blobs/"+layer) {
					im.serve(w, r)
					return
				}
				asked++
				from := 0
				if h := r.Header.Get("Range"); h != "" {
					if _, err := fmt.Sscanf(h, "bytes=%d-", &from); err != nil {
						t.Errorf("Range %q", h)
					}
				}
				row.serve(w, r, im.blobs[layer], from)
			}))
			defer srv.Close()
			cache := &blobCache{}
			_, tree, err := pull(t, &Source{Blobs: cache}, ref(t, host(srv)+"/r/i:t"))
			_, kept := cache.blobs[layer]
			if row.want == "" {
				if err != nil || tree.Lookup("noise") == nil || !kept {
					t.Errorf("%v, kept: %v", err, kept)
				}
			} else {
				if err == nil || !strings.Contains(err.Error(), row.want) {
					t.Errorf("%v, want %q", err, row.want)
				}
				if kept {
					t.Error("a blob that did not come whole is kept")
				}
			}
			if asked < row.atLeast || asked > row.atMost {
				t.Errorf("asked %d times, want %d to %d", asked, row.atLeast, row.atMost)
			}
			if cache.open != 0 {
				t.Errorf("%d blobs are still being written", cache.open)
			}
		})
	}
}

// dripBody gives n bytes every interval, for ever.
type dripBody struct {
	ctx      context.Context
	n        int
	interval time.Duration
	left     int // of the drop
}

func (b *dripBody) Read(p []byte) (int, error) {
	if b.left > 0 {
		n := min(b.left, len(p))
		b.left -= n
		return n, nil
	}
	select {
	case <-time.After(b.interval):
		n := min(b.n, len(p))
		b.left = b.n - n
		return n, nil
	case <-b.ctx.Done():
		return 0, b.ctx.Err()
	}
}

func (b *dripBody) Close() error { return nil }

// A body that drips is given up, one that is merely slow is not.
func TestRegistryDrip(t *testing.T) {
	for _, row := range []struct {
		name     string
		n        int
		interval time.Duration
		want     string
		after    time.Duration
	}{
		{"a byte a second", 1, time.Second, "less than 65536 bytes in 1m0s", slowWindow},
		{"a byte less than the limit", slowBytes/2 - 1, slowWindow / 2, "less than 65536 bytes", slowWindow},
		{"enough", slowBytes, slowWindow / 2, "manifest of more than", slowWindow / 2 * (MaxManifestBytes/slowBytes + 1)},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &Source{transport: roundTrip(func(req *http.Request) (*http.Response, error) {
					resp := &http.Response{StatusCode: 200, Header: http.Header{}, Request: req, ContentLength: -1, Body: http.NoBody}
					if strings.HasSuffix(req.URL.Path, "/manifests/t") {
						resp.Body = &dripBody{ctx: req.Context(), n: row.n, interval: row.interval}
					}
					return resp, nil
				})}
				start := time.Now()
				_, _, err := pull(t, s, ref(t, "registry.example.com/r/i:t"))
				if banger.CodeOf(err) == "" || !strings.Contains(err.Error(), row.want) {
					t.Errorf("%v, want %q", err, row.want)
				}
				if d := time.Since(start); d < row.after-row.interval || d > row.after+row.interval+row.after/4 {
					t.Errorf("after %s, want about %s", d, row.after)
				}
			})
		})
	}
}
