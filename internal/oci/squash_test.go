package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// memSink keeps contents in memory; a handle is an index.
type memSink struct {
	files     [][]byte
	discarded map[int]bool
}

func (m *memSink) Place(r io.Reader, size int64) (int, error) {
	b, err := io.ReadAll(io.LimitReader(r, size))
	if err != nil {
		return 0, err
	}
	m.files = append(m.files, b)
	return len(m.files) - 1, nil
}

func (m *memSink) Discard(c int) {
	if m.discarded == nil {
		m.discarded = make(map[int]bool)
	}
	if m.discarded[c] {
		panic("discarded twice")
	}
	m.discarded[c] = true
}

// te is a tar entry of a test.
type te struct {
	name string
	typ  byte
	body string
	link string
	mode int64
	uid  int
	pax  map[string]string
}

func f(name, body string) te    { return te{name: name, typ: tar.TypeReg, body: body, mode: 0o644} }
func dir(name string) te        { return te{name: name, typ: tar.TypeDir, mode: 0o755} }
func sym(name, to string) te    { return te{name: name, typ: tar.TypeSymlink, link: to, mode: 0o777} }
func hard(name, to string) te   { return te{name: name, typ: tar.TypeLink, link: to} }
func wh(name string) te         { d, b := path.Split(name); return f(d+".wh."+b, "") }
func opaque(name string) te     { return f(name+"/.wh..wh..opq", "") }
func owned(e te, uid int) te    { e.uid = uid; return e }
func moded(e te, mode int64) te { e.mode = mode; return e }

func tarOf(t testing.TB, entries []te) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.name, Typeflag: e.typ, Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.uid,
			ModTime: time.Unix(1000, 0), PAXRecords: e.pax, Format: tar.FormatPAX,
		}
		if e.typ == tar.TypeReg {
			h.Size = int64(len(e.body))
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("tar header of %q: %v", e.name, err)
		}
		if _, err := io.WriteString(w, e.body[:h.Size]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// memImage is an image of plain tars in memory.
func memImage(t testing.TB, lim *limits, tars ...[]byte) *Image {
	img := &Image{Name: "test", source: &Source{limits: lim}}
	blobs := memBlobs{}
	for _, raw := range tars {
		d := sum(raw)
		blobs[d] = raw
		img.Layers = append(img.Layers, Layer{Digest: d, DiffID: d, MediaType: mediaOCILayer, SizeBytes: int64(len(raw))})
	}
	img.from = blobs
	return img
}

type memBlobs map[string][]byte

func (m memBlobs) openBlob(_ context.Context, digest string, _ int64) (io.ReadCloser, error) {
	raw, ok := m[digest]
	if !ok {
		return nil, errors.New("no such blob")
	}
	return io.NopCloser(bytes.NewReader(raw)), nil
}

func squashMem(t testing.TB, img *Image) (*Tree[int], *memSink, error) {
	sink := &memSink{}
	tree, err := Squash(t.Context(), img, sink)
	return tree, sink, err
}

// dump renders a tree one line a path; hard links are told by a group number.
func dump(tree *Tree[int], sink *memSink) []string {
	var out []string
	group := make(map[*Node[int]]int)
	_ = tree.Walk(func(p string, n *Node[int]) error {
		s := fmt.Sprintf("%s %o %d", p, n.Mode, n.UID)
		switch n.Type() {
		case modeRegular:
			s += fmt.Sprintf(" %q", sink.files[n.Content])
		case modeSymlink:
			s += " -> " + n.Target
		}
		if !n.IsDir() && n.Nlink > 1 {
			if _, ok := group[n]; !ok {
				group[n] = len(group) + 1
			}
			s += fmt.Sprintf(" #%d/%d", group[n], n.Nlink)
		}
		out = append(out, s)
		return nil
	})
	return out
}

// naive applies layers to a map of full paths, the plainest way there is: it
// knows which layer put each path there and resolves symlinks textually.
type naive struct {
	files map[string]*naiveNode // by canonical path; "" is the root
	layer int
}

type naiveNode struct {
	inode *naiveInode
	layer int
	seq   int
	made  bool
}

type naiveInode struct {
	typ    byte
	mode   int64
	uid    int
	body   string
	target string
}

var errNaive = errors.New("refused")

func newNaive() *naive {
	return &naive{files: map[string]*naiveNode{"": {inode: &naiveInode{typ: tar.TypeDir, mode: 0o755}, made: true}}}
}

func (n *naive) split(p string) []string {
	var out []string
	for c := range strings.SplitSeq(p, "/") {
		if c != "" && c != "." {
			out = append(out, c)
		}
	}
	return out
}

func (n *naive) walk(comps []string, make bool, hops *int) (string, error) {
	at := ""
	for i := 0; i < len(comps); i++ {
		c := comps[i]
		if c == ".." {
			at = strings.TrimSuffix(at, "/"+path.Base(at))
			continue
		}
		next := at + "/" + c
		x := n.files[next]
		switch {
		case x == nil:
			if !make {
				return "", errNotFound
			}
			n.files[next] = &naiveNode{inode: &naiveInode{typ: tar.TypeDir, mode: 0o755}, layer: n.layer, made: true}
		case x.inode.typ == tar.TypeSymlink:
			if *hops++; *hops > 40 {
				return "", errNaive
			}
			rest := append(n.split(x.inode.target), comps[i+1:]...)
			if !strings.HasPrefix(x.inode.target, "/") {
				rest = append(n.split(at), rest...)
				// at is canonical: walking it again meets no symlink.
			}
			return n.walk(rest, make, hops)
		case x.inode.typ != tar.TypeDir:
			if !make {
				return "", errNotFound
			}
			if x.layer == n.layer || *hops > 0 {
				return "", errNaive
			}
			n.rm(next, 0)
			n.files[next] = &naiveNode{inode: &naiveInode{typ: tar.TypeDir, mode: 0o755}, layer: n.layer, made: true}
		}
		at = next
	}
	return at, nil
}

func (n *naive) below(p string) []string {
	var out []string
	for k := range n.files {
		if strings.HasPrefix(k, p+"/") {
			out = append(out, k)
		}
	}
	return out
}

func (n *naive) rm(p string, _ int) {
	for _, k := range n.below(p) {
		delete(n.files, k)
	}
	delete(n.files, p)
}

// hide removes what older layers left below p, and p itself if self.
func (n *naive) hide(p string, self bool) {
	keep := map[string]bool{}
	all := n.below(p)
	if self {
		all = append(all, p)
	}
	for _, k := range all {
		if x := n.files[k]; x != nil && x.layer == n.layer {
			for q := k; len(q) >= len(p); q = q[:strings.LastIndexByte(q, '/')] {
				keep[q] = true
				if q == "" {
					break
				}
			}
		}
	}
	for _, k := range all {
		if !keep[k] {
			delete(n.files, k)
		} else if x := n.files[k]; x != nil && x.layer < n.layer {
			n.files[k] = &naiveNode{inode: &naiveInode{typ: tar.TypeDir, mode: 0o755}, layer: n.layer, made: true}
		}
	}
}

func (n *naive) apply(entries []te) error {
	n.layer++
	type deferred struct {
		e   te
		seq int
	}
	var links []deferred
	put := func(e te, ino *naiveInode, seq int) error {
		comps := n.split(e.name)
		hops := 0
		if len(comps) == 0 {
			n.files[""].inode = ino
			return nil
		}
		at, err := n.walk(comps[:len(comps)-1], true, &hops)
		if err != nil {
			return errNaive
		}
		p := at + "/" + comps[len(comps)-1]
		if x := n.files[p]; x != nil {
			if ino.typ != tar.TypeDir && x.made && x.layer == n.layer && len(n.below(p)) > 0 {
				return errNaive
			}
			if ino.typ != tar.TypeDir || x.inode.typ != tar.TypeDir {
				n.rm(p, 0)
			}
		}
		n.files[p] = &naiveNode{inode: ino, layer: n.layer, seq: seq}
		return nil
	}
	find := func(name string) (string, *naiveNode) {
		comps := n.split(name)
		hops := 0
		if len(comps) == 0 {
			return "", n.files[""]
		}
		at, err := n.walk(comps[:len(comps)-1], false, &hops)
		if err != nil {
			return "", nil
		}
		p := at + "/" + comps[len(comps)-1]
		return p, n.files[p]
	}
	var hidden [][2]string
	for seq, e := range entries {
		d, base := path.Split(path.Clean("/" + e.name))
		if base == ".wh..wh..opq" {
			hidden = append(hidden, [2]string{d, ""})
			continue
		}
		if x, ok := strings.CutPrefix(base, ".wh."); ok {
			hidden = append(hidden, [2]string{d, x})
			continue
		}
		if e.typ != tar.TypeLink {
			if err := put(e, &naiveInode{typ: e.typ, mode: e.mode, uid: e.uid, body: e.body, target: e.link}, seq); err != nil {
				return err
			}
			continue
		}
		tp, x := find(e.link)
		if x == nil {
			links = append(links, deferred{e, seq})
			continue
		}
		if x.inode.typ == tar.TypeDir {
			return errNaive
		}
		if p, y := find(e.name); y != nil && p == tp {
			continue
		}
		if err := put(e, x.inode, seq); err != nil {
			return err
		}
	}
	for len(links) > 0 {
		progress := false
		for i := 0; i < len(links); i++ {
			e, seq := links[i].e, links[i].seq
			tp, x := find(e.link)
			if x == nil {
				continue
			}
			if x.inode.typ == tar.TypeDir {
				return errNaive
			}
			links = slices.Delete(links, i, i+1)
			i--
			progress = true
			if p, y := find(e.name); y != nil && (p == tp || !y.made && y.layer == n.layer && y.seq > seq) {
				continue
			}
			if err := put(e, x.inode, seq); err != nil {
				return err
			}
		}
		if !progress {
			return errNaive
		}
	}
	for _, h := range hidden {
		hops := 0
		at, err := n.walk(n.split(h[0]), false, &hops)
		if errors.Is(err, errNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if x := n.files[at]; x.inode.typ != tar.TypeDir {
			continue
		}
		if h[1] == "" {
			n.hide(at, false)
		} else if n.files[at+"/"+h[1]] != nil {
			n.hide(at+"/"+h[1], true)
		}
	}
	return nil
}

func (n *naive) dump() []string {
	types := map[byte]int64{tar.TypeReg: modeRegular, tar.TypeDir: modeDir, tar.TypeSymlink: modeSymlink}
	links := map[*naiveInode]int{}
	for _, x := range n.files {
		links[x.inode]++
	}
	paths := slices.Collect(maps.Keys(n.files))
	// Walk's order: children by name, depth first.
	slices.SortFunc(paths, func(a, b string) int { return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) })
	group := map[*naiveInode]int{}
	var out []string
	for _, p := range paths {
		x := n.files[p].inode
		name := p
		if p == "" {
			name = "/"
		}
		s := fmt.Sprintf("%s %o %d", name, types[x.typ]|x.mode, x.uid)
		switch x.typ {
		case tar.TypeReg:
			s += fmt.Sprintf(" %q", x.body)
		case tar.TypeSymlink:
			s += " -> " + x.target
		}
		if x.typ != tar.TypeDir && links[x] > 1 {
			if group[x] == 0 {
				group[x] = len(group) + 1
			}
			s += fmt.Sprintf(" #%d/%d", group[x], links[x])
		}
		out = append(out, s)
	}
	return out
}

var squashShapes = []struct {
	name   string
	layers [][]te
	want   []string // below the root; nil: must be refused
	err    string
}{
	{name: "overwritten file with another link keeps its bytes there",
		layers: [][]te{{f("f", "old"), hard("g", "f")}, {f("f", "new")}},
		want:   []string{`/f 100644 0 "new"`, `/g 100644 0 "old"`}},
	{name: "whiteout of one link", layers: [][]te{{f("f", "x"), hard("g", "f")}, {wh("f")}}, want: []string{`/g 100644 0 "x"`}},
	{name: "hard link to a lower layer", layers: [][]te{{f("f", "x")}, {hard("g", "f")}},
		want: []string{`/f 100644 0 "x" #1/2`, `/g 100644 0 "x" #1/2`}},
	{name: "hard link to a lower layer, target whited out before", layers: [][]te{{f("f", "x")}, {wh("f"), hard("g", "f")}}, want: []string{`/g 100644 0 "x"`}},
	{name: "hard link to a lower layer, target whited out after", layers: [][]te{{f("f", "x")}, {hard("g", "f"), wh("f")}}, want: []string{`/g 100644 0 "x"`}},
	{name: "hard link before its target", layers: [][]te{{hard("g", "f"), f("f", "x")}},
		want: []string{`/f 100644 0 "x" #1/2`, `/g 100644 0 "x" #1/2`}},
	{name: "chain of hard links backwards", layers: [][]te{{hard("c", "b"), hard("b", "a"), f("a", "x")}},
		want: []string{`/a 100644 0 "x" #1/3`, `/b 100644 0 "x" #1/3`, `/c 100644 0 "x" #1/3`}},
	{name: "hard link to a symlink is the symlink", layers: [][]te{{sym("s", "nowhere"), hard("g", "s")}},
		want: []string{`/g 120777 0 -> nowhere #1/2`, `/s 120777 0 -> nowhere #1/2`}},
	{name: "hard link to itself in a lower layer", layers: [][]te{{f("f", "x")}, {hard("f", "f")}}, want: []string{`/f 100644 0 "x"`}},
	{name: "hard link through a symlinked parent", layers: [][]te{{dir("usr"), dir("usr/bin"), sym("bin", "usr/bin"), f("usr/bin/a", "x")}, {hard("bin/b", "bin/a")}},
		want: []string{"/bin 120777 0 -> usr/bin", "/usr 40755 0", "/usr/bin 40755 0", `/usr/bin/a 100644 0 "x" #1/2`, `/usr/bin/b 100644 0 "x" #1/2`}},
	{name: "hard link to nothing", layers: [][]te{{hard("g", "f")}}, err: "which is not there"},
	{name: "hard links in a loop", layers: [][]te{{hard("g", "f"), hard("f", "g")}}, err: "which is not there"},
	{name: "hard link to itself", layers: [][]te{{hard("g", "g")}}, err: "hard link"},
	{name: "hard link to a directory", layers: [][]te{{dir("d"), hard("g", "d")}}, err: "a directory"},
	{name: "hard link out of the image", layers: [][]te{{hard("g", "../etc/passwd")}}, err: `".." in its path`},
	{name: "write through a symlinked directory", layers: [][]te{{dir("usr"), dir("usr/bin"), sym("bin", "usr/bin")}, {f("bin/tool", "x")}},
		want: []string{"/bin 120777 0 -> usr/bin", "/usr 40755 0", "/usr/bin 40755 0", `/usr/bin/tool 100644 0 "x"`}},
	{name: "write through an absolute symlink", layers: [][]te{{dir("usr"), sym("lib", "/usr/lib")}, {f("lib/x", "x")}},
		want: []string{"/lib 120777 0 -> /usr/lib", "/usr 40755 0", "/usr/lib 40755 0", `/usr/lib/x 100644 0 "x"`}},
	{name: "symlink that climbs stops at the root", layers: [][]te{{dir("d"), sym("d/up", "../../../../etc")}, {f("d/up/hosts", "x")}},
		want: []string{"/d 40755 0", "/d/up 120777 0 -> ../../../../etc", "/etc 40755 0", `/etc/hosts 100644 0 "x"`}},
	{name: "two chained symlinks stay inside", layers: [][]te{{sym("a", "."), sym("b", "a/.."), f("b/x", "x")}},
		want: []string{"/a 120777 0 -> .", "/b 120777 0 -> a/..", `/x 100644 0 "x"`}},
	{name: "symlink loop", layers: [][]te{{sym("a", "b"), sym("b", "a")}, {f("a/x", "x")}}, err: "too many levels"},
	{name: "whiteout through a symlinked directory", layers: [][]te{{dir("usr"), dir("usr/bin"), sym("bin", "usr/bin"), f("usr/bin/a", "x")}, {wh("bin/a")}},
		want: []string{"/bin 120777 0 -> usr/bin", "/usr 40755 0", "/usr/bin 40755 0"}},
	{name: "whiteout of a symlink leaves its target", layers: [][]te{{f("f", "x"), sym("s", "f")}, {wh("s")}}, want: []string{`/f 100644 0 "x"`}},
	{name: "dangling symlink kept", layers: [][]te{{dir("d"), sym("d/up", "../../../etc/hosts")}, {f("x", "")}},
		want: []string{"/d 40755 0", "/d/up 120777 0 -> ../../../etc/hosts", `/x 100644 0 ""`}},
	{name: "opaque after", layers: [][]te{{dir("d"), f("d/old", "")}, {dir("d"), f("d/new", ""), opaque("d")}}, want: []string{"/d 40755 0", `/d/new 100644 0 ""`}},
	{name: "opaque before", layers: [][]te{{dir("d"), f("d/old", "")}, {opaque("d"), f("d/new", "")}}, want: []string{"/d 40755 0", `/d/new 100644 0 ""`}},
	{name: "opaque root", layers: [][]te{{dir("d"), f("d/old", "")}, {f("new", ""), f(".wh..wh..opq", "")}}, want: []string{`/new 100644 0 ""`}},
	{name: "opaque keeps metadata", layers: [][]te{{owned(dir("d"), 7), f("d/old", "")}, {opaque("d")}}, want: []string{"/d 40755 7"}},
	{name: "opaque deep", layers: [][]te{{dir("d"), owned(dir("d/e"), 7), f("d/e/old", "")}, {f("d/e/new", ""), opaque("d")}}, want: []string{"/d 40755 0", "/d/e 40755 0", `/d/e/new 100644 0 ""`}},
	{name: "whiteout after own file", layers: [][]te{{f("a", "old")}, {f("a", "new"), wh("a")}}, want: []string{`/a 100644 0 "new"`}},
	{name: "whiteout before own file", layers: [][]te{{f("a", "old")}, {wh("a"), f("a", "new")}}, want: []string{`/a 100644 0 "new"`}},
	{name: "whiteout of a directory with own content before", layers: [][]te{{owned(dir("d"), 7), f("d/old", "")}, {f("d/new", ""), wh("d")}}, want: []string{"/d 40755 0", `/d/new 100644 0 ""`}},
	{name: "whiteout of a directory with own content after", layers: [][]te{{owned(dir("d"), 7), f("d/old", "")}, {wh("d"), dir("d"), f("d/new", "")}}, want: []string{"/d 40755 0", `/d/new 100644 0 ""`}},
	{name: "whiteout of a directory", layers: [][]te{{dir("d"), dir("d/e"), f("d/e/x", "")}, {wh("d")}}, want: []string{}},
	{name: "whiteout of nothing", layers: [][]te{{f("a", "")}, {wh("b"), wh("c/d")}}, want: []string{`/a 100644 0 ""`}},
	{name: "whiteout in its own layer only", layers: [][]te{{f("a", ""), wh("a")}}, want: []string{`/a 100644 0 ""`}},
	{name: "removed and put back", layers: [][]te{{f("a", "1")}, {wh("a")}, {f("a", "2")}}, want: []string{`/a 100644 0 "2"`}},
	{name: "directory over file", layers: [][]te{{f("d", "x")}, {dir("d"), f("d/x", "")}}, want: []string{"/d 40755 0", `/d/x 100644 0 ""`}},
	{name: "implied directory over file", layers: [][]te{{f("d", "x")}, {f("d/x", "")}}, want: []string{"/d 40755 0", `/d/x 100644 0 ""`}},
	{name: "file over directory", layers: [][]te{{dir("d"), f("d/x", "")}, {f("d", "y")}}, want: []string{`/d 100644 0 "y"`}},
	{name: "file over directory with a link kept elsewhere", layers: [][]te{{dir("d"), f("d/x", "b"), hard("k", "d/x")}, {f("d", "y")}},
		want: []string{`/d 100644 0 "y"`, `/k 100644 0 "b"`}},
	{name: "link below the file it leads to", layers: [][]te{{f("d", "b")}, {hard("d/x", "d")}}, want: []string{"/d 40755 0", `/d/x 100644 0 "b"`}},
	{name: "waiting link, then another entry of its name", layers: [][]te{{hard("g", "f"), f("g", "2"), f("f", "1")}}, want: []string{`/f 100644 0 "1"`, `/g 100644 0 "2"`}},
	{name: "waiting link, then something below it", layers: [][]te{{hard("g", "f"), f("g/x", "2"), f("f", "1")}}, err: "listed both"},
	{name: "link over the directory it leads into", layers: [][]te{{dir("d"), f("d/x", "b")}, {hard("d", "d/x")}}, want: []string{`/d 100644 0 "b"`}},
	{name: "directory over symlink", layers: [][]te{{dir("e"), sym("d", "e")}, {dir("d"), f("d/x", "")}},
		want: []string{"/d 40755 0", `/d/x 100644 0 ""`, "/e 40755 0"}},
	{name: "symlink over directory", layers: [][]te{{dir("d"), f("d/x", "")}, {sym("d", "e")}}, want: []string{"/d 120777 0 -> e"}},
	{name: "directories merge, metadata of the upper", layers: [][]te{{owned(dir("d"), 1), f("d/a", "")}, {moded(owned(dir("d"), 2), 0o1777)}},
		want: []string{"/d 41777 2", `/d/a 100644 0 ""`}},
	{name: "entries before their parents", layers: [][]te{{f("a/b/c", "x"), owned(dir("a/b"), 5)}}, want: []string{"/a 40755 0", "/a/b 40755 5", `/a/b/c 100644 0 "x"`}},
	{name: "duplicates, the last counts", layers: [][]te{{f("a", "1"), f("a", "2")}}, want: []string{`/a 100644 0 "2"`}},
	{name: "duplicate with a link between", layers: [][]te{{f("a", "1"), hard("b", "a"), f("a", "2")}}, want: []string{`/a 100644 0 "2"`, `/b 100644 0 "1"`}},
	{name: "all spellings of one name", layers: [][]te{{f("./a//b", "1"), dir("a/"), f("/a/./b", "2")}}, want: []string{"/a 40755 0", `/a/b 100644 0 "2"`}},
	{name: "names of any bytes", layers: [][]te{{f("a\nb\xff ", "x"), f("\x01;$(x)", "")}}, want: []string{"/\x01;$(x) 100644 0 \"\"", "/a\nb\xff  100644 0 \"x\""}},
	{name: "setuid and sticky", layers: [][]te{{moded(f("su", ""), 0o4755), moded(dir("t"), 0o1777)}}, want: []string{`/su 104755 0 ""`, "/t 41777 0"}},
	{name: "whiteout named like a whiteout", layers: [][]te{{f("a", "")}, {f(".wh..wh.plnk/x", "")}}, want: []string{`/a 100644 0 ""`}},
	{name: "climbing name", layers: [][]te{{f("a/../b", "")}}, err: `".." in its path`},
	{name: "whiteout of .", layers: [][]te{{f(".wh..", "")}}, err: "whiteout of nothing"},
	{name: "whiteout of ..", layers: [][]te{{f("d/.wh...", "")}}, err: "whiteout of nothing"},
	{name: "whiteout of no name", layers: [][]te{{f(".wh.", "")}}, err: "whiteout of nothing"},
	{name: "below a whiteout", layers: [][]te{{f(".wh.d/x", "")}}, err: "below a whiteout"},
	{name: "file and directory at once", layers: [][]te{{f("d", ""), f("d/x", "")}}, err: "not a directory"},
	{name: "directory and file at once", layers: [][]te{{f("d/x", ""), f("d", "")}}, err: "listed both"},
	{name: "root as a file", layers: [][]te{{sym("./", "x")}}, err: "must be a directory"},
	{name: "root as a link", layers: [][]te{{f("a", ""), hard("./", "a")}}, err: "must be a directory"},
}

func TestSquashShapes(t *testing.T) {
	for _, tt := range squashShapes {
		t.Run(tt.name, func(t *testing.T) {
			var tars [][]byte
			for _, l := range tt.layers {
				tars = append(tars, tarOf(t, l))
			}
			tree, sink, err := squashMem(t, memImage(t, nil, tars...))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := dump(tree, sink)
			if want := append([]string{"/ 40755 0"}, tt.want...); !slices.Equal(got, want) {
				t.Errorf("got\n%q\nwant\n%q", got, want)
			}
			checkBooks(t, tree, sink)
			n := newNaive()
			for _, l := range tt.layers {
				if slices.ContainsFunc(l, func(e te) bool { return strings.Contains(e.name, ".wh..wh.plnk") }) {
					return
				}
				if err := n.apply(l); err != nil {
					t.Fatalf("naive: %v", err)
				}
			}
			if want := n.dump(); !slices.Equal(got, want) {
				t.Errorf("naive squash differs:\n%q", want)
			}
		})
	}
}

// TestSymlinkHops is about chains of 40 and 41 symlinks.
func TestSymlinkHops(t *testing.T) {
	for hops, ok := range map[int]bool{maxSymlinkHops: true, maxSymlinkHops + 1: false} {
		l := []te{dir("s0")}
		for i := range hops {
			l = append(l, sym(fmt.Sprintf("s%d", i+1), fmt.Sprintf("s%d", i)))
		}
		_, _, err := squashMem(t, memImage(t, nil, tarOf(t, append(l, f(fmt.Sprintf("s%d/x", hops), "")))))
		if (err == nil) != ok {
			t.Errorf("%d symlinks: error %v", hops, err)
		}
	}
}

// checkBooks makes sure that link counts, entries and discarded contents agree
// with what is reachable.
func checkBooks(t *testing.T, tree *Tree[int], sink *memSink) {
	t.Helper()
	links := map[*Node[int]]uint32{}
	live := map[int]bool{}
	entries := 0
	_ = tree.Walk(func(_ string, n *Node[int]) error {
		links[n]++
		entries++
		if n.Type() == modeRegular {
			live[n.Content] = true
		}
		return nil
	})
	if entries != tree.Entries {
		t.Errorf("%d entries counted, %d found", tree.Entries, entries)
	}
	for n, c := range links {
		if n.Nlink != c {
			t.Errorf("link count %d, found %d", n.Nlink, c)
		}
	}
	for c := range sink.files {
		if live[c] == sink.discarded[c] {
			t.Errorf("content %d (%q): live %v, discarded %v", c, sink.files[c], live[c], sink.discarded[c])
		}
	}
}

// randomLayers makes layers out of few names, so that they meet often.
func randomLayers(r *rand.Rand) [][]te {
	names := []string{"a", "b", "c"}
	pathOf := func() string {
		p := names[r.IntN(3)]
		for r.IntN(2) == 0 {
			p += "/" + names[r.IntN(3)]
		}
		return p
	}
	targets := []string{"a", "b", "../b", "/c", "a/b", "../../c", ".", "c/.."}
	var layers [][]te
	for range 1 + r.IntN(4) {
		var l []te
		for range r.IntN(8) {
			p := pathOf()
			switch r.IntN(12) {
			case 0, 1, 2:
				l = append(l, f(p, strconv.Itoa(r.IntN(1000))))
			case 3, 4, 5:
				l = append(l, owned(dir(p), r.IntN(5)))
			case 6, 7:
				l = append(l, sym(p, targets[r.IntN(len(targets))]))
			case 8:
				l = append(l, hard(p, pathOf()))
			case 9, 10:
				l = append(l, wh(p))
			case 11:
				l = append(l, opaque(p))
			}
		}
		layers = append(layers, l)
	}
	return layers
}

func TestSquashRandom(t *testing.T) {
	count := 2000
	if s := os.Getenv("OCI_IMAGES"); s != "" {
		count, _ = strconv.Atoi(s)
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("OCI_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("OCI_SEED=%d", seed)
	accepted := 0
	for i := 0; accepted < count; i++ {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		layers := randomLayers(r)
		n := newNaive()
		var nerr error
		for _, l := range layers {
			if nerr = n.apply(l); nerr != nil {
				break
			}
		}
		var tars [][]byte
		for _, l := range layers {
			tars = append(tars, tarOf(t, l))
		}
		tree, sink, err := squashMem(t, memImage(t, nil, tars...))
		if (err == nil) != (nerr == nil) {
			t.Fatalf("image %d: error %v, naive %v\n%+v", i, err, nerr, layers)
		}
		if err != nil {
			continue
		}
		accepted++
		if got, want := dump(tree, sink), n.dump(); !slices.Equal(got, want) {
			t.Fatalf("image %d:\n got %q\nwant %q\n%+v", i, got, want, layers)
		}
		checkBooks(t, tree, sink)
	}
}

func waitGoroutines(t *testing.T, before int) {
	t.Helper()
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	buf := make([]byte, 1<<16)
	t.Errorf("%d goroutines before, %d after\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
}
