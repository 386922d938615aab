package oci

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"banger"
)

// scratch makes files that go with the test.
func scratch(t testing.TB) func() (*os.File, error) {
	return func() (*os.File, error) {
		f, err := os.CreateTemp(t.TempDir(), "scratch")
		if err == nil {
			t.Cleanup(func() { f.Close() })
		}
		return f, err
	}
}

// pullArchive pulls an archive from a file, and keeps blobs.
func pullArchive(t testing.TB, raw []byte, text string) (*Image, *Tree[int], *memSink, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	s := &Source{Input: in, Scratch: scratch(t), Blobs: &blobCache{}}
	img, err := s.Resolve(t.Context(), ref(t, text))
	if err != nil {
		return nil, nil, nil, err
	}
	sink := &memSink{}
	tree, err := Squash(t.Context(), img, sink)
	return img, tree, sink, err
}

// dockerSave is an archive as another tool writes it.
func dockerSave(t testing.TB, images map[string][][]byte) []byte {
	t.Helper()
	refs := map[name.Tag]v1.Image{}
	for tag, layers := range images {
		img := v1.Image(empty.Image)
		for _, raw := range layers {
			layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
			if err != nil {
				t.Fatal(err)
			}
			if img, err = mutate.AppendLayers(img, layer); err != nil {
				t.Fatal(err)
			}
		}
		img, err := mutate.ConfigFile(img, withPlatform(t, img))
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := name.NewTag(tag)
		if err != nil {
			t.Fatal(err)
		}
		refs[parsed] = img
	}
	var out bytes.Buffer
	if err := tarball.MultiWrite(refs, &out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func withPlatform(t testing.TB, img v1.Image) *v1.ConfigFile {
	t.Helper()
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Cmd = []string{"/bin/sh"}
	config.History = []v1.History{{CreatedBy: "FROM", Comment: "below"}, {CreatedBy: "ENV", EmptyLayer: true}, {CreatedBy: "COPY"}}
	return config
}

func twoLayers(t testing.TB) [][]byte {
	return [][]byte{
		tarOf(t, []te{dir("etc"), f("etc/a", "below"), f("etc/b", "b")}),
		tarOf(t, []te{f("etc/a", "above"), wh("etc/b")}),
	}
}

// What another tool saved is read as what it was saved of, from a file, from a
// pipe, and compressed.
func TestArchiveOfDocker(t *testing.T) {
	layers := twoLayers(t)
	saved := dockerSave(t, map[string][][]byte{"example.org/app:v1": layers})
	want, sink, err := squashMem(t, memImage(t, nil, layers...))
	if err != nil {
		t.Fatal(err)
	}
	var digest string
	for _, row := range []struct {
		name string
		raw  []byte
	}{{"plain", saved}, {"gzip", gz(t, saved)}, {"zstd", zst(t, saved)}} {
		img, tree, got, err := pullArchive(t, row.raw, "./x.tar")
		if err != nil {
			t.Fatalf("%s: %v", row.name, err)
		}
		if !slices.Equal(dump(tree, got), dump(want, sink)) {
			t.Errorf("%s: %q", row.name, dump(tree, got))
		}
		if img.Suggested != "example.org/app:v1" || img.Name != "docker-archive:./x.tar" || len(img.Layers) != 2 || img.Config.Cmd[0] != "/bin/sh" {
			t.Errorf("%s: %+v", row.name, img)
		}
		if digest == "" {
			digest = img.Digest
		}
		if img.Digest != digest || digest == "" {
			t.Errorf("%s: digest %q, was %q", row.name, img.Digest, digest)
		}
	}
	// Standard input that is a pipe.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() { w.Write(saved); w.Close() }()
	img, err := (&Source{Input: r, Scratch: scratch(t)}).Resolve(t.Context(), ref(t, "-"))
	if err != nil || img.Digest != digest {
		t.Errorf("from a pipe: %+v, %v", img, err)
	}
}

func TestArchiveChoice(t *testing.T) {
	saved := dockerSave(t, map[string][][]byte{
		"example.org/a:1": {tarOf(t, []te{f("a", "a")})},
		"debian:12":       {tarOf(t, []te{f("b", "b")})},
	})
	for text, file := range map[string]string{"docker-archive:x:example.org/a:1": "/a", "docker-archive:x:debian:12": "/b", "docker-archive:x:docker.io/library/debian:12": "/b"} {
		_, tree, _, err := pullArchive(t, saved, text)
		if err != nil || tree.Lookup(file) == nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	_, _, _, err := pullArchive(t, saved, "./x.tar")
	wantError(t, "two images", err, banger.CodeUsage, "holds 2 images")
	_, _, _, err = pullArchive(t, saved, "docker-archive:x:debian:13")
	wantError(t, "a tag that is not in it", err, banger.CodeNotFound, "no such image")
}

// Exported, an image is what it was: to us and to another tool.
func TestExport(t *testing.T) {
	layers := twoLayers(t)
	saved := dockerSave(t, map[string][][]byte{"example.org/app:v1": append(layers, layers[0])})
	file := filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(file, saved, 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	cache := &blobCache{}
	s := &Source{Input: in, Blobs: cache}
	img, tree, err := pull(t, s, ref(t, "docker-archive:x"))
	if err != nil {
		t.Fatal(err)
	}
	kept := &Source{Blobs: cache}
	again, err := kept.Stored(t.Context(), "app", img.Digest)
	if err != nil || again.Digest != img.Digest {
		t.Fatalf("%+v, %v", again, err)
	}
	var out bytes.Buffer
	if err := kept.Export(t.Context(), &out, again, "example.org/app:v1"); err != nil {
		t.Fatal(err)
	}
	back, tree2, sink2, err := pullArchive(t, out.Bytes(), "./x.tar")
	if err != nil {
		t.Fatal(err)
	}
	if back.Digest != img.Digest || back.Suggested != "example.org/app:v1" || tree2.Entries != tree.Entries || len(dump(tree2, sink2)) == 0 {
		t.Errorf("%+v", back)
	}
	exported := filepath.Join(t.TempDir(), "out.tar")
	if err := os.WriteFile(exported, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("example.org/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := tarball.ImageFromPath(exported, &tag)
	if err != nil {
		t.Fatal(err)
	}
	ls, err := theirs.Layers()
	if err != nil || len(ls) != 3 {
		t.Fatalf("%d layers, %v", len(ls), err)
	}
	for i, l := range ls {
		id, err := l.DiffID()
		if err != nil || id.String() != img.Layers[i].DiffID {
			t.Errorf("layer %d: %s, want %s, %v", i, id, img.Layers[i].DiffID, err)
		}
	}
	// The same bytes every time, and none of a damaged blob.
	var second bytes.Buffer
	if err := kept.Export(t.Context(), &second, again, "example.org/app:v1"); err != nil || !bytes.Equal(out.Bytes(), second.Bytes()) {
		t.Errorf("exported again: %d bytes, were %d, %v", second.Len(), out.Len(), err)
	}
	damaged := slices.Clone(cache.blobs[img.Layers[0].Digest])
	damaged[len(damaged)/2] ^= 1
	whole := cache.blobs[img.Layers[0].Digest]
	cache.blobs[img.Layers[0].Digest] = damaged
	err = kept.Export(t.Context(), io.Discard, again, "x")
	wantError(t, "a damaged blob", err, banger.CodeInvalid, img.Layers[0].Digest)

	cache.blobs[img.Layers[0].Digest] = whole

	// How it came about.
	steps, err := kept.History(t.Context(), "app", img.Digest)
	if err != nil || len(steps) != 4 {
		t.Fatalf("%+v, %v", steps, err)
	}
	for i, want := range []struct{ by, layer string }{{"FROM", img.Layers[0].Digest}, {"ENV", ""}, {"COPY", img.Layers[1].Digest}, {"", img.Layers[2].Digest}} {
		got := ""
		if steps[i].Layer != nil {
			got = steps[i].Layer.Digest
		}
		if steps[i].CreatedBy != want.by || got != want.layer {
			t.Errorf("step %d: %+v, want %+v", i, steps[i], want)
		}
	}
}

// archiveOf is a tar of files, in order; a body of "-> x" is a symlink.
func archiveOf(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}
		if to, ok := strings.CutPrefix(files[i+1], "-> "); ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, to, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, files[i+1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Archives that want to be something else are refused by name, and no path of
// theirs is one of the host's.
func TestArchiveHostile(t *testing.T) {
	layer := string(tarOf(t, []te{f("x", "x")}))
	config := fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, sum([]byte(layer)))
	manifest := func(config string, layers ...string) string {
		data, err := json.Marshal([]dockerImage{{Config: config, Layers: layers}})
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	good := manifest("c.json", "l/layer.tar")
	files := []string{"c.json", config, "l/layer.tar", layer, "manifest.json", good}
	whole := archiveOf(t, files...)
	if _, _, _, err := pullArchive(t, whole, "./x.tar"); err != nil {
		t.Fatal(err)
	}
	// Layers that are symlinks to one another, as old versions of Docker save.
	linked := archiveOf(t, "c.json", config, "a/layer.tar", "-> ../l/layer.tar", "l/layer.tar", layer, "manifest.json", manifest("c.json", "a/layer.tar"))
	if _, tree, _, err := pullArchive(t, linked, "./x.tar"); err != nil || tree.Lookup("/x") == nil {
		t.Errorf("a layer that is a symlink: %v", err)
	}
	many := []string{}
	for i := range maxArchiveEntries + 1 {
		many = append(many, fmt.Sprintf("f%d", i), "")
	}
	sparse := sparseTar(t, "1000000")
	for _, row := range []struct {
		name  string
		raw   []byte
		words string
	}{
		{"empty", nil, "no image in it"},
		{"text", []byte(strings.Repeat("no tar\n", 200)), "not a tar"},
		{"a root file system", tarOf(t, []te{f("etc/passwd", "x")}), "no image in it"},
		{"cut in the middle of a layer", whole[:1536+512+700], "cut short"},
		{"a config of the host's", archiveOf(t, "l", layer, "manifest.json", manifest("../../../../../etc/hostname", "l")), "is missing"},
		{"a layer of the host's", archiveOf(t, "c.json", config, "manifest.json", manifest("c.json", "/etc/passwd")), "is missing"},
		{"a symlink to the host", archiveOf(t, "c.json", config, "l", "-> /etc/passwd", "manifest.json", manifest("c.json", "l")), "is missing"},
		{"symlinks in a circle", archiveOf(t, "c.json", config, "l", "-> m", "m", "-> l", "manifest.json", manifest("c.json", "l")), "is missing"},
		{"a name twice", archiveOf(t, append(files, "./c.json", config)...), "twice"},
		{"one file too many", archiveOf(t, many...), "more than 8192 files"},
		{"another layer than the config says", archiveOf(t, "c.json", config, "l", string(tarOf(t, []te{f("y", "y")})), "manifest.json", manifest("c.json", "l")), "DiffID"},
		{"no layers", archiveOf(t, "c.json", config, "manifest.json", manifest("c.json")), "no layers"},
		{"more layers than DiffIDs", archiveOf(t, "c.json", config, "l", layer, "manifest.json", manifest("c.json", "l", "l")), "DiffIDs"},
		{"a key twice", archiveOf(t, "c.json", config, "l", layer, "manifest.json", `[{"Config":"c.json","Config":"l","Layers":["l"]}]`), "twice"},
		{"an object for a list", archiveOf(t, "manifest.json", `{}`), "manifest.json"},
		{"no images", archiveOf(t, "manifest.json", `[]`), "holds no image"},
		{"another platform", archiveOf(t, "c.json", strings.Replace(config, "amd64", "arm64", 1), "l", layer, "manifest.json", manifest("c.json", "l")), "arm64"},
		{"a manifest of more than its limit", archiveOf(t, "manifest.json", strings.Repeat(" ", MaxManifestBytes+1)), "more than"},
		{"a sparse file", sparse, "sparse"},
		{"a device", func() []byte {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			w.WriteHeader(&tar.Header{Typeflag: tar.TypeChar, Name: "manifest.json", Devmajor: 1, Devminor: 5})
			w.Close()
			return b.Bytes()
		}(), "no place"},
		{"a gzip stream that is cut", gz(t, whole)[:100], "cut short"},
	} {
		_, _, _, err := pullArchive(t, row.raw, "./x.tar")
		e, ok := errors.AsType[*banger.Error](err)
		if !ok || !strings.Contains(e.Message, row.words) || !strings.Contains(e.Message, "./x.tar") {
			t.Errorf("%s: %v, want %q", row.name, err, row.words)
		}
	}
	// A bomb ends at the limit, and a full disk is this host's affair.
	lim := defaultLimits
	lim.expandedBytes = 1 << 20
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() { w.Write(gz(t, make([]byte, 4<<20))); w.Close() }()
	_, err = (&Source{Input: r, Scratch: scratch(t), limits: &lim}).Resolve(t.Context(), ref(t, "-"))
	wantError(t, "a bomb", err, banger.CodeInvalid, "more than 1048576 bytes")
}

// FuzzArchive reads bytes as an archive: an image or an error, whatever they
// are.
func FuzzArchive(f *testing.F) {
	layer := string(tarOf(f, []te{{name: "x", typ: tar.TypeReg, body: "x", mode: 0o644}}))
	config := fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, sum([]byte(layer)))
	f.Add(archiveOf(f, "c", config, "l", layer, "manifest.json", `[{"Config":"c","Layers":["l"]}]`))
	f.Add(archiveOf(f, "oci-layout", `{"imageLayoutVersion":"1.0.0"}`, "index.json", `{"schemaVersion":2,"manifests":[]}`))
	f.Add(archiveOf(f, "l", "-> l", "manifest.json", `[{"Config":"l"}]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		img, tree, sink, err := pullArchive(t, raw, "./x.tar")
		if err != nil {
			if _, ok := errors.AsType[*banger.Error](err); !ok {
				t.Errorf("%#v", err)
			}
			return
		}
		if len(img.Layers) == 0 {
			t.Error("an image of nothing")
		}
		checkBooks(t, tree, sink)
	})
}
