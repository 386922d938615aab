package image

import (
	"bytes"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/internal/oci"
)

// metaalphabet is what random names are made of: all that means something to
// some program, and a few letters.
var metaalphabet = []string{
	"\n", "\r", "\t", "\x1b", "\a", "\b", "\x7f", "\x80", "\x9b", "\xff", " ", "!", "\"", "#", "$", "%", "&", "'", "(", ")", "*", "+", ",", "-", "--", ".",
	"..", ":", ";", "<", "=", ">", "?", "@", "[", "\\", "]", "^", "`", "{", "|", "}", "~", "$(", "${", "\u202e", "\u2028", "\ufeff", "e\u0301", "a", "touch", "x",
}

// TestMetanames takes an image of names that mean something to shells,
// terminals and formats through all that is done with an image, in a process
// that may start no program: each comes out as it went in.
func TestMetanames(t *testing.T) {
	count := 2000
	if os.Getenv("IMAGE_SOAK") != "" {
		count = 100_000
	}
	guarded(t, func() {
		seed := uint64(time.Now().UnixNano())
		if s := os.Getenv("IMAGE_SEED"); s != "" {
			seed, _ = strconv.ParseUint(s, 10, 64)
		}
		t.Logf("IMAGE_SEED=%d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		canary := t.TempDir()
		names := map[string]bool{strings.Repeat("\n", 255): true}
		for c := 1; c < 256; c++ {
			if name := string([]byte{byte(c)}); name != "/" && name != "." {
				names[name] = true
			}
		}
		for _, name := range metanames(filepath.Join(canary, "victim")) {
			if name = strings.ReplaceAll(name, "/", "_"); name != "." && name != "._." {
				names[name] = true
			}
		}
		for len(names) < count {
			var name strings.Builder
			for range 1 + r.IntN(12) {
				name.WriteString(metaalphabet[r.IntN(len(metaalphabet))])
			}
			if s := name.String(); s != "." && s != ".." && !strings.HasPrefix(s, whiteout) {
				names[s] = true
			}
		}
		var entries []entry
		i := 0
		for name := range names {
			body := fmt.Sprint("content of ", name)
			switch i++; i % 4 {
			case 0:
				entries = append(entries, dir("d/"+name+"/", 0o755))
			case 1:
				entries = append(entries, symlink("d/"+name, name))
			default:
				entries = append(entries, file("d/"+name, 0o644, body))
			}
		}
		l := newLayout(t)
		l.add("a", tarOf(t, entries...))
		im, s := newImages(t)
		same := func(name string) {
			t.Helper()
			image, err := im.Find(name)
			if err != nil {
				t.Fatal(err)
			}
			list, err := openFS(t, image.Rootfs).ReadDir("d")
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range list {
				got = append(got, e.Name())
			}
			want := make([]string, 0, len(names))
			for name := range names {
				want = append(want, name)
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("%s: %d names, want %d", name, len(got), len(want))
			}
			for _, d := range verify(t, im, name, agentFile(t)).Differences {
				t.Errorf("%s: %s", name, d)
			}
		}
		src, ref := l.reference("a")
		src.Blobs = &blobs{Blobs: s.Blobs()}
		image, err := im.Pull(t.Context(), src, ref, PullOptions{Name: "x", Agent: agentFile(t)})
		if err != nil {
			t.Fatal(err)
		}
		same("x")
		if err := useAll(t, im, s, image); err != nil {
			t.Error(err)
		}
		// Exported and pulled into another store it is the same base.
		var archive bytes.Buffer
		from := &oci.Source{Blobs: &blobs{Blobs: s.Blobs()}}
		stored, err := from.Stored(t.Context(), "x", *image.Digest)
		if err == nil {
			err = from.Export(t.Context(), &archive, stored, "x")
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "x.tar")
		if err := os.WriteFile(path, archive.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		im, s = newImages(t)
		src, ref = reference(t, "docker-archive:"+path, path)
		src.Blobs = &blobs{Blobs: s.Blobs()}
		again, err := im.Pull(t.Context(), src, ref, PullOptions{Name: "x", Agent: agentFile(t)})
		if err != nil {
			t.Fatal(err)
		}
		same("x")
		if again.BaseDigest != image.BaseDigest {
			t.Errorf("exported and pulled again it is %s, was %s", again.BaseDigest, image.BaseDigest)
		}

		// As the name of an image they are refused in one clean line.
		refused := 0
		for name := range names {
			if namePattern.MatchString(name) {
				continue
			}
			refused++
			_, err := im.Tag(t.Context(), "x", name)
			if banger.CodeOf(err) != banger.CodeUsage || strings.ContainsFunc(err.Error(), func(c rune) bool { return c < ' ' || c == 0x7f || c == '\u202e' || c == '\ufffd' }) {
				t.Errorf("tag %q: %v", name, err)
			}
		}
		if err := im.Remove(t.Context(), "x"); err != nil {
			t.Error(err)
		}
		nothing(t, s)
		if err := filepath.WalkDir(canary, func(p string, d fs.DirEntry, err error) error {
			if p != canary {
				t.Errorf("there is %s", p)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		t.Logf("%d names are taken as names in an image, %d refused as names of one", len(names), refused)
	})
}

// whiteout begins names that mean something in a layer.
const whiteout = ".wh."
