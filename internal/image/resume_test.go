package image

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/internal/oci"
	"banger/internal/store"
)

// A slowRegistry serves a layout, breaks off blobs where it is told to, and
// counts.
type slowRegistry struct {
	*httptest.Server
	l     *layout
	layer string // digest of the large layer

	mu     sync.Mutex
	stop   int                                                                        // bytes of the layer after which nothing comes; 0: all comes
	ranges func(w http.ResponseWriter, r *http.Request, data []byte, from int) []byte // what is left of data; nil: as RFC 9110 says
	asked  map[string]int                                                             // requests by path's end
	sent   int                                                                        // bytes of the layer
	stuck  chan struct{}                                                              // one for each time it stopped
}

func newSlowRegistry(t *testing.T, layers ...[]byte) *slowRegistry {
	s := &slowRegistry{l: newLayout(t), asked: map[string]int{}, stuck: make(chan struct{}, 10)}
	_, blobs := s.l.add("a", layers...)
	s.layer = blobs[0]
	plain := serveLayout(s.l)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		what := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		s.asked[what]++
		s.mu.Unlock()
		if what != s.layer {
			plain.ServeHTTP(w, r)
			return
		}
		data, err := os.ReadFile(filepath.Join(s.l.dir, "blobs/sha256", strings.TrimPrefix(s.layer, "sha256:")))
		if err != nil {
			t.Error(err)
		}
		from := 0
		if h := r.Header.Get("Range"); h != "" {
			if _, err := fmt.Sscanf(h, "bytes=%d-", &from); err != nil {
				t.Errorf("Range %q", h)
			}
		}
		left := data[from:]
		s.mu.Lock()
		ranges, stop := s.ranges, s.stop
		s.mu.Unlock()
		switch {
		case from > 0 && ranges != nil:
			if left = ranges(w, r, data, from); left == nil {
				return
			}
		case from > 0:
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(data)-1, len(data)))
			w.Header().Set("Content-Length", strconv.Itoa(len(left)))
			w.WriteHeader(http.StatusPartialContent)
		default:
			w.Header().Set("Content-Length", strconv.Itoa(len(left)))
		}
		if stop > 0 {
			left = left[:stop]
		}
		n, _ := w.Write(left)
		s.mu.Lock()
		s.sent += n
		s.mu.Unlock()
		if stop > 0 {
			w.(http.Flusher).Flush()
			s.stuck <- struct{}{}
			<-r.Context().Done()
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *slowRegistry) pull(ctx context.Context, im *Images, agent *os.File, name string) (*Image, error) {
	ref, err := oci.ParseReference(strings.TrimPrefix(s.URL, "http://") + "/r/i:a")
	if err != nil {
		return nil, err
	}
	return im.Pull(ctx, &oci.Source{Blobs: &blobs{Blobs: im.s.Blobs()}}, ref, PullOptions{Name: name, Agent: agent})
}

func noisyLayer(t *testing.T, sizeBytes int) []byte {
	noise := make([]byte, sizeBytes)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	return tarOf(t, file("noise", 0o644, string(noise)))
}

// TestPullResumes kills a pull in the middle of a layer: the next fetches the
// rest, and the whole where that is not to be had.
func TestPullResumes(t *testing.T) {
	const rootVar, urlVar = "BANGER_TEST_RESUME", "BANGER_TEST_RESUME_URL"
	if root := os.Getenv(rootVar); root != "" { // the one that is killed
		im, _ := openStore(t, root)
		im.baseBytes = smallBytes
		s := &slowRegistry{Server: &httptest.Server{URL: os.Getenv(urlVar)}}
		_, err := s.pull(t.Context(), im, agentFile(t), "a")
		t.Fatal(err)
	}
	const half = 500_000
	t.Setenv("HOME", t.TempDir())
	layer := noisyLayer(t, 1<<20)
	var want string // the digest of the base
	for _, row := range []struct {
		name   string
		cancel bool                        // not killed but canceled
		damage func(partial []byte) []byte // what is there of it becomes this
		ranges func(w http.ResponseWriter, r *http.Request, data []byte, from int) []byte
		whole  bool // must be sent again
		asked  int
	}{
		{name: "killed", asked: 2},
		{name: "canceled", cancel: true, asked: 2},
		{name: "a registry without ranges", asked: 2, whole: true, ranges: func(w http.ResponseWriter, r *http.Request, data []byte, from int) []byte { return data }},
		{name: "a registry that refuses them", asked: 3, whole: true, ranges: func(w http.ResponseWriter, r *http.Request, data []byte, from int) []byte {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return nil
		}},
		{name: "a registry that means another range", asked: 3, whole: true, ranges: func(w http.ResponseWriter, r *http.Request, data []byte, from int) []byte {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from-1, len(data)-1, len(data)))
			w.WriteHeader(http.StatusPartialContent)
			return data[from-1:]
		}},
		{name: "other bytes", asked: 3, whole: true, ranges: func(w http.ResponseWriter, r *http.Request, data []byte, from int) []byte {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(data)-1, len(data)))
			w.WriteHeader(http.StatusPartialContent)
			return bytes.Repeat([]byte{7}, len(data)-from)
		}},
		{name: "a bit of what was there", asked: 3, whole: true, damage: func(p []byte) []byte { p[1000] ^= 1; return p }},
		{name: "zeros, as after a power cut", asked: 3, whole: true, damage: func(p []byte) []byte { return make([]byte, len(p)) }},
		{name: "nothing was there", asked: 2, whole: true, damage: func(p []byte) []byte { return nil }},
		{name: "more than there can be", asked: 2, whole: true, damage: func(p []byte) []byte { return make([]byte, 2<<20) }},
		{name: "all but a byte", asked: 2, damage: nil},
		{name: "all of it", asked: 1, damage: nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newSlowRegistry(t, layer, tarOf(t, file("small", 0o644, "small")))
			s.mu.Lock()
			s.stop, s.ranges = half, row.ranges
			s.mu.Unlock()
			root := filepath.Join(t.TempDir(), "state")
			im, st := openStore(t, root)
			im.baseBytes = smallBytes
			partial := filepath.Join(root, "blobs/partial", strings.TrimPrefix(s.layer, "sha256:"))
			written := func() { // what was sent has come to the file, most of it
				for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
					if st, err := os.Stat(partial); err == nil && st.Size() >= half/2 {
						return
					}
				}
			}
			if row.cancel {
				ctx, cancel := context.WithCancel(t.Context())
				go func() { <-s.stuck; written(); cancel() }()
				if _, err := s.pull(ctx, im, agentFile(t), "a"); err == nil {
					t.Fatal("it worked")
				}
			} else {
				cmd := exec.Command(os.Args[0], "-test.run=^TestPullResumes$")
				cmd.Env = append(os.Environ(), rootVar+"="+root, "TMPDIR="+t.TempDir(), urlVar+"="+s.URL)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				<-s.stuck
				written()
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				cmd.Wait()
			}
			data, err := os.ReadFile(partial)
			if err != nil || len(data) < half/2 || len(data) > half {
				t.Fatalf("%d bytes of it are there, %v", len(data), err)
			}
			blob, err := os.ReadFile(filepath.Join(s.l.dir, "blobs/sha256", strings.TrimPrefix(s.layer, "sha256:")))
			if err != nil {
				t.Fatal(err)
			}
			switch row.name {
			case "all but a byte":
				data = blob[:len(blob)-1]
			case "all of it":
				data = blob
			}
			had := len(data)
			if row.damage != nil {
				data = row.damage(data)
			}
			if err := os.WriteFile(partial, data, 0o600); err != nil {
				t.Fatal(err)
			}
			im, st = openStore(t, root) // the partial blob outlives that
			im.baseBytes = smallBytes
			s.stop, s.sent = 0, 0
			image, err := s.pull(t.Context(), im, agentFile(t), "a")
			if err != nil {
				t.Fatal(err)
			}
			if want == "" {
				want = image.BaseDigest
				clean(t, image.Rootfs)
			}
			if image.BaseDigest != want {
				t.Errorf("the base is %s, want %s", image.BaseDigest, want)
			}
			if v := verify(t, im, "a", agentFile(t)); v.Differences != nil {
				t.Errorf("%q", v.Differences)
			}
			if got := s.asked[s.layer]; got != row.asked {
				t.Errorf("asked %d times, want %d", got, row.asked)
			}
			if rest := len(blob) - had; !row.whole && s.sent != rest || row.whole && s.sent < len(blob) {
				t.Errorf("%d bytes came, the whole is %d, what was missing %d", s.sent, len(blob), rest)
			}
			if left := inside(t, st, "blobs/partial"); left != nil {
				t.Errorf("blobs/partial/ has %q", left)
			}
		})
	}
}

// A registry that gives other bytes each time is refused in the end, and what
// came is not kept.
func TestPullResumesOnce(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	s := newSlowRegistry(t, noisyLayer(t, 1<<20))
	im, st := newSmallImages(t)
	partial := filepath.Join(st.Root(), "blobs/partial", strings.TrimPrefix(s.layer, "sha256:"))
	path := filepath.Join(s.l.dir, "blobs/sha256", filepath.Base(partial))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(partial, data[:1000], 0o600); err != nil {
		t.Fatal(err)
	}
	data[len(data)-10] ^= 1
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = s.pull(t.Context(), im, agentFile(t), "a")
	wantCode(t, err, "invalid", "digest is sha256:")
	if s.asked[s.layer] != 2 {
		t.Errorf("asked %d times", s.asked[s.layer])
	}
	if left := inside(t, st, "blobs/partial"); left != nil {
		t.Errorf("blobs/partial/ has %q", left)
	}
	nothing(t, st)
}

// Two processes that pull one image at once fetch each blob once.
func TestPullAtOnceFetchesOnce(t *testing.T) {
	const rootVar, urlVar = "BANGER_TEST_AT_ONCE", "BANGER_TEST_AT_ONCE_URL"
	if root := os.Getenv(rootVar); root != "" {
		im, _ := openStore(t, root)
		im.baseBytes = smallBytes
		s := &slowRegistry{Server: &httptest.Server{URL: os.Getenv(urlVar)}}
		fmt.Println("ready")
		io.ReadAll(os.Stdin)
		if _, err := s.pull(t.Context(), im, agentFile(t), "a"); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Setenv("HOME", t.TempDir())
	s := newSlowRegistry(t, noisyLayer(t, 1<<20), tarOf(t, file("small", 0o644, "small")))
	_, st := newImages(t)
	var all []*exec.Cmd
	var starts []io.Closer
	for range 2 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestPullAtOnceFetchesOnce$")
		cmd.Env = append(os.Environ(), rootVar+"="+st.Root(), urlVar+"="+s.URL)
		start, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, out)
		all, starts = append(all, cmd), append(starts, start)
	}
	for _, start := range starts {
		start.Close()
	}
	for _, cmd := range all {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	var blobs int
	for what, n := range s.asked {
		if what == "a" { // each asks what the tag is
			if n != 2 {
				t.Errorf("the manifest was asked for %d times", n)
			}
			continue
		}
		if blobs++; strings.HasPrefix(what, "sha256:") && n != 1 {
			t.Errorf("%s was fetched %d times", what, n)
		}
	}
	if blobs < 3 { // config and layers
		t.Errorf("asked for %v", s.asked)
	}
}

// Prune takes what came of a blob, unless it is coming.
func TestPrunePartials(t *testing.T) {
	im, s := newImages(t)
	digest := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	put := func(c string) *store.BlobWriter {
		w, err := s.Blobs().Resume(digest(c), 100)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, "part")
		return w
	}
	if err := put("a").Suspend(); err != nil {
		t.Fatal(err)
	}
	coming := put("b")
	p, err := im.Prune(t.Context())
	if err != nil || p.Blobs != 1 || p.FreedBytes != 4 {
		t.Errorf("%+v, %v", p, err)
	}
	if left := inside(t, s, "blobs/partial"); !slices.Equal(left, []string{strings.Repeat("b", 64)}) {
		t.Errorf("blobs/partial/ has %q", left)
	}
	if err := coming.Commit(); err != nil {
		t.Error(err)
	}
	if d := digests(t, s); !slices.Equal(d, []string{digest("b")}) {
		t.Errorf("blobs %q", d)
	}
}
