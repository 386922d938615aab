package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/ext4"
	"banger/internal/oci"
	"banger/internal/store"
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

// contents tells every file of a store by its path, less locks and the time in
// an image's record. Folders end in a slash.
type contents map[string]string

// prints are the hashes of files by inode, which do not change in the store.
type prints map[string]string

var createdLine = regexp.MustCompile(`"created": "[^"]*"`)

func (known prints) of(t *testing.T, root string) contents {
	t.Helper()
	c := contents{}
	if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		switch {
		case rel == "":
		case rel == "locks" || rel == "run":
			return fs.SkipDir
		case d.IsDir():
			c[rel+"/"] = ""
		default:
			c[rel] = known.file(t, path)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (known prints) file(t *testing.T, path string) string {
	t.Helper()
	st := stat(t, path)
	key := fmt.Sprint(st.Ino, st.Size, st.Mtim)
	if known[key] != "" {
		return known[key]
	}
	h := sha256.New()
	if st.Size < 64<<10 { // a record, under whatever name
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		h.Write(createdLine.ReplaceAll(data, nil))
	} else {
		hashData(t, h, path)
	}
	known[key] = fmt.Sprintf("%d bytes, %x", st.Size, h.Sum(nil))
	return known[key]
}

// hashData hashes the blocks of a file that are not zero, and where they are.
func hashData(t *testing.T, h io.Writer, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zero := make([]byte, 4096)
	buf := make([]byte, 4096)
	for at := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return
		}
		end, err2 := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil || err2 != nil {
			t.Fatal(err, err2)
		}
		for at = start / 4096 * 4096; at < end; at += 4096 {
			n, err := f.ReadAt(buf, at)
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if string(buf[:n]) != string(zero[:n]) {
				fmt.Fprintf(h, "%d ", at)
				h.Write(buf[:n])
			}
		}
	}
}

// linkTree makes a tree of hard links of another: a store changes no file that
// is in it. Locks are not linked, since who holds one holds all.
func linkTree(t *testing.T, from, to string) {
	t.Helper()
	if err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Mkdir(to+strings.TrimPrefix(path, from), 0o700)
		}
		if strings.HasSuffix(path, ".lock") {
			return nil
		}
		return os.Link(path, to+strings.TrimPrefix(path, from))
	}); err != nil {
		t.Fatal(err)
	}
}

// A sweep is one change, done once without any fault, and what it made of what.
type sweep struct {
	do           func(context.Context, *Images, string) error
	inputs       string
	known        prints
	start, final contents // final: when it was done
	pruned       contents // and after a prune
	noNames      string   // a names file without names, which the first pull begins with
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
	now := sw.known.of(t, root)
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
	if got := sw.known.of(t, root)["images/names.json"]; got != sw.final["images/names.json"] {
		return "done again, and the names are others"
	}
	if _, err := im.Prune(t.Context()); err != nil {
		return fmt.Sprintf("prune: %v", err)
	}
	now = sw.known.of(t, root)
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
	const changeVar, rootVar, inputsVar = "BANGER_TEST_CHANGE", "BANGER_TEST_CHANGE_ROOT", "BANGER_TEST_CHANGE_INPUTS"
	if name := os.Getenv(changeVar); name != "" {
		if err := watched(3); err != nil {
			t.Fatal(err)
		}
		for _, c := range changes {
			if c.name == name {
				err := doFault(t.Context(), os.Getenv(rootVar), os.Getenv(inputsVar), c.do)
				fmt.Fprint(os.NewFile(3, "reply"), "ended: ", err)
			}
		}
		return
	}
	soak := os.Getenv("IMAGE_SOAK") != ""
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("IMAGE_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("IMAGE_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	t.Setenv("HOME", t.TempDir()) // no login

	// In memory where that is possible: thousands of stores are made.
	work, err := os.MkdirTemp("/dev/shm", "banger-faults-")
	if err != nil {
		work = t.TempDir()
	}
	defer os.RemoveAll(work)
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
			sw := &sweep{do: c.do, inputs: inputs, known: prints{}, tried: map[string]bool{}}
			sw.start = sw.known.of(t, from)
			none := filepath.Join(t.TempDir(), "names.json")
			if err := store.WriteJSON(none, namesSchema, names{map[string]string{}}); err != nil {
				t.Fatal(err)
			}
			sw.noNames = sw.known.file(t, none)
			n := 0
			fresh := func() string {
				n++
				return filepath.Join(work, fmt.Sprintf("%d-%d", row, n))
			}
			whole := fresh()
			linkTree(t, from, whole)
			if err := doFault(t.Context(), whole, inputs, c.do); err != nil {
				t.Fatal(err)
			}
			sw.final = sw.known.of(t, whole)
			if im, _, err = openFault(whole); err != nil {
				t.Fatal(err)
			}
			if _, err := im.Prune(t.Context()); err != nil {
				t.Fatal(err)
			}
			sw.pruned = sw.known.of(t, whole)
			if fmt.Sprint(sw.start) == fmt.Sprint(sw.final) {
				t.Fatal("it changes nothing")
			}

			run := func(root string, judge func(operation) verdict) string {
				cmd := exec.Command(os.Args[0], "-test.run=^TestFaults$")
				cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir(), changeVar+"="+c.name, rootVar+"="+root, inputsVar+"="+inputs)
				return watch(t, cmd, root, judge)
			}

			// Once, stopped before each operation: what a kill or a power cut
			// leaves there.
			root := fresh()
			linkTree(t, from, root)
			keep := fresh()
			if err := os.Mkdir(keep, 0o700); err != nil {
				t.Fatal(err)
			}
			d := newDisk(t, root, keep)
			var ops []operation
			states := map[string]bool{}
			cutAll := func(done bool) {
				d.look()
				all := cuts(r)
				for _, name := range slices.Sorted(maps.Keys(all)) {
					for range map[bool]int{true: 10, false: 1}[soak && name == "random"] {
						to := fresh()
						id := fmt.Sprint(done, d.after(all[name], to))
						if !states[id] {
							states[id] = true
							if problem := sw.check(t, to, done); problem != "" {
								t.Errorf("power cut after %d operations (%s): %s\nthe last ones: %v", len(ops), name, problem, ops[max(0, len(ops)-12):])
							}
						}
						if err := os.RemoveAll(to); err != nil {
							t.Fatal(err)
						}
						if t.Failed() {
							t.FailNow()
						}
					}
				}
			}
			got := run(root, func(op operation) verdict {
				cutAll(false)
				d.change(op)
				ops = append(ops, op)
				return let
			})
			if got != "ended: <nil>" {
				t.Fatalf("without a fault: %q", got)
			}
			cutAll(true)

			// And with each operation failing, or the last.
			kinds := []string{"EIO", "ENOSPC", "disk gone", "killed"}
			faults := 0
			for k := 1; k <= len(ops); k++ {
				for way, kind := range kinds {
					if !soak && (k+way+row)%len(kinds) != 0 {
						continue
					}
					faults++
					root := fresh()
					linkTree(t, from, root)
					i := 0
					var failed operation
					got := run(root, func(op operation) verdict {
						i++
						if i == k || i > k && kind == "disk gone" {
							failed = op
							return map[string]verdict{"EIO": verdict(unix.EIO), "ENOSPC": verdict(unix.ENOSPC), "disk gone": verdict(unix.EIO), "killed": kill}[kind]
						}
						return let
					})
					if i >= k && kind != "killed" && !strings.HasPrefix(got, "ended: ") {
						t.Fatalf("operation %d (%s): it ended with %q", k, kind, got)
					}
					if problem := sw.check(t, root, got == "ended: <nil>"); problem != "" {
						t.Errorf("operation %d (%s, %s): %s\nit said %q", k, kind, failed, problem, got)
					}
					if err := os.RemoveAll(root); err != nil {
						t.Fatal(err)
					}
					if t.Failed() {
						t.FailNow()
					}
				}
			}
			if now := (prints{}).of(t, from); fmt.Sprint(now) != fmt.Sprint(sw.start) {
				t.Error("a file of the store was changed in its place")
			}
			t.Logf("%d operations: %d states after a kill or a power cut, %d faults, %d stores gone on with; %s",
				len(ops), len(states), faults, len(sw.tried), time.Since(begin).Round(time.Millisecond))
			if err := os.RemoveAll(keep); err != nil {
				t.Fatal(err)
			}
		})
	}
}
