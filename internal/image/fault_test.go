package image

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/oci"
	"banger/internal/store"
	"banger/internal/store/storetest"
)

// What changes a store, each done in a process that is stopped before every
// operation on a file. inputs is a folder that holds what it reads.
var changes = []struct {
	name  string
	empty bool // begins with an empty store
	do    func(ctx context.Context, im *Images, inputs string) error
}{
	{"pull from a registry", false, func(ctx context.Context, im *Images, inputs string) error {
		return pullFault(ctx, im, inputs, "", "new")
	}},
	{"the first pull", true, func(ctx context.Context, im *Images, inputs string) error {
		return pullFault(ctx, im, inputs, "", "new")
	}},
	{"pull that moves a name", false, func(ctx context.Context, im *Images, inputs string) error {
		return pullFault(ctx, im, inputs, "", "drop")
	}},
	{"build from a tar", false, func(ctx context.Context, im *Images, inputs string) error {
		return pullFault(ctx, im, inputs, "rootfs:"+filepath.Join(inputs, "x.tar"), "built")
	}},
	{"register", false, func(ctx context.Context, im *Images, inputs string) error {
		src, err := os.Open(filepath.Join(inputs, "foreign.ext4"))
		if err != nil {
			return err
		}
		defer src.Close()
		agent, err := os.Open(filepath.Join(inputs, "agent"))
		if err != nil {
			return err
		}
		defer agent.Close()
		_, err = im.Register(ctx, src, RegisterOptions{Name: "registered", Label: "foreign.ext4", Agent: agent})
		return err
	}},
	{"seed", false, func(ctx context.Context, im *Images, inputs string) error {
		home := filepath.Join(inputs, "home")
		dir, err := os.Open(home)
		if err != nil {
			return err
		}
		defer dir.Close()
		ref, err := oci.ParseReference("rootfs:" + home)
		if err != nil {
			return err
		}
		_, err = im.ReplaceSeed(ctx, "keep", &oci.Source{Input: dir}, ref)
		return err
	}},
	{"tag", false, func(ctx context.Context, im *Images, _ string) error {
		_, err := im.Tag(ctx, "keep", "second")
		return err
	}},
	{"rm of a name", false, func(ctx context.Context, im *Images, _ string) error { return im.Remove(ctx, "keep-too") }},
	{"rm of the last name", false, func(ctx context.Context, im *Images, _ string) error { return im.Remove(ctx, "drop") }},
	{"prune", false, func(ctx context.Context, im *Images, _ string) error {
		_, err := im.Prune(ctx)
		return err
	}},
}

// pullFault pulls a reference, or "" for what the registry has.
func pullFault(ctx context.Context, im *Images, inputs, from, name string) error {
	src := &oci.Source{Blobs: &blobs{Blobs: im.s.Blobs()}}
	if from == "" {
		text, err := os.ReadFile(filepath.Join(inputs, "registry"))
		if err != nil {
			return err
		}
		from = string(text)
	} else {
		f, err := os.Open(strings.TrimPrefix(from, "rootfs:"))
		if err != nil {
			return err
		}
		defer f.Close()
		src.Input = f
	}
	ref, err := oci.ParseReference(from)
	if err != nil {
		return err
	}
	agent, err := os.Open(filepath.Join(inputs, "agent"))
	if err != nil {
		return err
	}
	defer agent.Close()
	_, err = im.Pull(ctx, src, ref, PullOptions{Name: name, Agent: agent})
	return err
}

func openFault(root string) (*Images, *store.Store, error) {
	s, err := store.Open(root)
	if err != nil {
		return nil, nil, err
	}
	im := Open(s)
	im.baseBytes = 2 << 20
	return im, s, nil
}

func doFault(ctx context.Context, root, inputs string, do func(context.Context, *Images, string) error) error {
	im, _, err := openFault(root)
	if err != nil {
		return err
	}
	return do(ctx, im, inputs)
}

// serveLayout is a registry of what is in a layout.
func serveLayout(l *layout) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/" {
			return
		}
		what := strings.TrimPrefix(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:], "sha256:")
		if strings.Contains(r.URL.Path, "/manifests/") {
			for _, m := range l.manifests {
				if m["annotations"].(map[string]string)["org.opencontainers.image.ref.name"] == what {
					what = strings.TrimPrefix(m["digest"].(string), "sha256:")
				}
			}
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		}
		http.ServeFile(w, r, filepath.Join(l.dir, "blobs/sha256", filepath.Base(what)))
	})
}

var createdLine = regexp.MustCompile(`"created": "[^"]*"`)

// withoutTime is an image's record without the time it was made.
func withoutTime(data []byte) []byte { return createdLine.ReplaceAll(data, nil) }

// A sweep is one change, done once without any fault, and what it made of what.
type sweep struct {
	do           func(context.Context, *Images, string) error
	inputs       string
	known        *storetest.Prints
	start, final storetest.Contents // final: when it was done
	pruned       storetest.Contents // and after a prune
	noNames      string             // a names file without names, which the first pull begins with
	tried        map[string]bool
}

// check requires of a store that was cut off from the change, or in which the
// change failed, that nothing is lost and nothing is half, that the change can
// be made again, and that nothing is left in the end that would not be there
// without the fault. done: the change was reported as made.
func (sw *sweep) check(t *testing.T, root string, done bool) (problem string) {
	t.Helper()
	im, s, err := openFault(root)
	if err != nil {
		return fmt.Sprintf("open: %v", err)
	}
	for _, room := range []string{"tmp", "trash"} {
		if left := inside(t, s, room); left != nil {
			return fmt.Sprintf("%s/ has %q", room, left)
		}
	}
	if _, err := im.List(); err != nil {
		return fmt.Sprintf("list: %v", err)
	}
	now := sw.known.Of(t, root)
	for path, is := range now {
		if strings.HasPrefix(path, "images/.names.json.") {
			continue // prune takes it
		}
		if strings.HasPrefix(path, "blobs/partial/") {
			continue // the next pull takes it, whatever is in it, or prune does
		}
		if before, after := sw.start[path], sw.final[path]; is != before && is != after && !(path == "images/names.json" && before == "" && is == sw.noNames) {
			return fmt.Sprintf("%s: %q, was %q and becomes %q", path, is, before, after)
		} else if _, ok := sw.start[path]; !ok {
			if _, ok := sw.final[path]; !ok {
				return fmt.Sprintf("%s has no business here", path)
			}
		}
	}
	for path := range sw.start {
		_, stays := sw.final[path]
		if _, ok := now[path]; !ok && stays && !strings.HasPrefix(path, "images/.names.json.") {
			return fmt.Sprintf("%s is lost", path)
		}
	}
	for path := range now { // no half image
		dir, ok := strings.CutSuffix(path, "/")
		if !ok || filepath.Dir(dir) != "images" {
			continue
		}
		for _, name := range []string{store.ImageRecord, store.ImageRootfs, store.ImageWorkSeed} {
			if now[path+name] == "" {
				return fmt.Sprintf("%s has no %s", path, name)
			}
		}
	}
	names := now["images/names.json"]
	if done {
		for path, is := range sw.final {
			if strings.HasPrefix(path, "images/") && now[path] != is {
				return fmt.Sprintf("it was done, and %s is %q", path, now[path])
			}
		}
		// What was removed may be back after a power cut, if nothing leads to it.
		for path := range now {
			if _, ok := sw.final[path]; !ok && strings.HasPrefix(path, "images/") && !strings.HasPrefix(path, "images/.names.json.") {
				return fmt.Sprintf("it was done, and %s is there", path)
			}
		}
	}
	id := fmt.Sprint(now) // maps are printed in order
	if sw.tried[id] {
		return ""
	}
	sw.tried[id] = true
	err = sw.do(t.Context(), im, sw.inputs)
	// What was removed cannot be removed again.
	if err != nil && !(banger.CodeOf(err) == banger.CodeNotFound && names == sw.final["images/names.json"]) {
		return fmt.Sprintf("again: %v", err)
	}
	if got := sw.known.Of(t, root)["images/names.json"]; got != sw.final["images/names.json"] {
		return "done again, and the names are others"
	}
	if _, err := im.Prune(t.Context()); err != nil {
		return fmt.Sprintf("prune: %v", err)
	}
	now = sw.known.Of(t, root)
	for path, is := range sw.pruned {
		if now[path] != is {
			return fmt.Sprintf("in the end %s is %q, want %q", path, now[path], is)
		}
	}
	for path := range now {
		if _, ok := sw.pruned[path]; !ok {
			return fmt.Sprintf("in the end there is %s", path)
		}
	}
	return ""
}

// TestFaults makes each change of a store with a fault at each of its
// operations on files: killed there, the operation failing once or the disk
// for good, and a power cut that leaves what was fsynced and, of all else, this
// or that.
func TestFaults(t *testing.T) {
	const inputsVar = "BANGER_TEST_CHANGE_INPUTS"
	if storetest.Child(t, func(change, root string) (func() error, error) {
		im, _, err := openFault(root)
		return func() error {
			for _, c := range changes {
				if c.name == change {
					return c.do(t.Context(), im, os.Getenv(inputsVar))
				}
			}
			return fmt.Errorf("no such change: %s", change)
		}, err
	}) {
		return
	}
	r := storetest.Rand(t)
	t.Setenv("HOME", t.TempDir()) // no login
	work := storetest.Dir(t)
	l := newLayout(t)
	shared := tarOf(t, file("bin/sh", 0o755, strings.Repeat("shell", 5000)))
	for _, tag := range []string{"b", "c", "d"} {
		l.add(tag, shared, tarOf(t, file("root/"+tag, 0o644, strings.Repeat(tag, 10_000))))
	}
	// One that comes in several pieces.
	noise := make([]byte, 600_000)
	rand.NewChaCha8([32]byte{}).Read(noise)
	l.add("a", shared, tarOf(t, file("root/a", 0o644, string(noise))))
	srv := httptest.NewServer(serveLayout(l))
	defer srv.Close()
	inputs := t.TempDir()
	for name, data := range map[string]string{
		"agent": agentText, "x.tar": string(tarOf(t, file("root/x", 0o644, strings.Repeat("x", 10_000)))), "home/new": "new",
		"registry": strings.TrimPrefix(srv.URL, "http://") + "/r/i:a",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(inputs, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(inputs, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	// The store that most begin with: an image of two names, one of one, one
	// of none, a blob of none, and names that were being written.
	template := filepath.Join(work, "template")
	im, s, err := openFault(template)
	if err != nil {
		t.Fatal(err)
	}
	put := func(tag, name string) *Image {
		src, ref := l.reference(tag)
		src.Blobs = &blobs{Blobs: s.Blobs()}
		image, err := im.Pull(t.Context(), src, ref, PullOptions{Name: name, Agent: agentFile(t)})
		if err != nil {
			t.Fatal(err)
		}
		return image
	}
	kept := put("b", "keep")
	put("b", "keep-too")
	put("d", "drop")
	put("c", "drop")
	if err := ext4.CopyFile(t.Context(), filepath.Join(inputs, "foreign.ext4"), kept.Rootfs); err != nil {
		t.Fatal(err)
	}
	stray, err := s.Blobs().Create("sha256:" + strings.Repeat("5", 64))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(stray.Commit(), os.WriteFile(filepath.Join(s.Images(), ".names.json.123"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(work, "empty")
	if _, _, err := openFault(empty); err != nil {
		t.Fatal(err)
	}

	for row, c := range changes {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			from := template
			if c.empty {
				from = empty
			}
			sw := &sweep{do: c.do, inputs: inputs, known: storetest.NewPrints(withoutTime), tried: map[string]bool{}}
			sw.start = sw.known.Of(t, from)
			none := filepath.Join(t.TempDir(), "names.json")
			if err := store.WriteJSON(none, namesSchema, names{map[string]string{}}); err != nil {
				t.Fatal(err)
			}
			sw.noNames = sw.known.File(t, none)
			whole := filepath.Join(work, fmt.Sprint(row))
			storetest.LinkTree(t, from, whole)
			if err := doFault(t.Context(), whole, inputs, c.do); err != nil {
				t.Fatal(err)
			}
			sw.final = sw.known.Of(t, whole)
			if im, _, err = openFault(whole); err != nil {
				t.Fatal(err)
			}
			if _, err := im.Prune(t.Context()); err != nil {
				t.Fatal(err)
			}
			sw.pruned = sw.known.Of(t, whole)
			if fmt.Sprint(sw.start) == fmt.Sprint(sw.final) {
				t.Fatal("it changes nothing")
			}

			campaign := &storetest.Campaign{Change: c.name, Row: row, From: from, Work: work, Env: []string{inputsVar + "=" + inputs}, Check: sw.check}
			tried := campaign.Run(t, r)
			t.Logf("%s, %d stores gone on with; %s", tried, len(sw.tried), time.Since(begin).Round(time.Millisecond))
		})
	}
}
