package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"syscall"

	"banger"
)

// A Sink takes the contents of regular files while they stream by. It is
// called from one goroutine, in the order of the layers.
type Sink[C any] interface {
	// Place takes exactly sizeBytes bytes from r, zero included, and returns a
	// handle for them. What it leaves unread is an error.
	Place(r io.Reader, sizeBytes int64) (C, error)
	// Discard says that nothing leads to c any more.
	Discard(c C)
}

// Squash streams all layers of img, lowest first, into sink and returns the
// merged tree. Contents that a later layer hides are discarded when all layers
// are placed, in a fixed order. When Squash fails, what sink holds is
// worthless. No goroutine of Squash outlives it.
//
// The merge is that of the OCI image specification (layer.md, "Applying
// Changesets"), with entries applied in order and whiteouts, wherever they
// stand in their layer, against lower layers only. Three things the
// specification leaves open are settled as container engines do on disk:
// parents that are symlinks are followed inside the image, a hard link carries
// no metadata of its own, and of two entries with one name the later counts.
func Squash[C any](ctx context.Context, img *Image, sink Sink[C]) (*Tree[C], error) {
	lim := img.source.lim()
	p := newProgress(img.source.Progress)
	b := newBuilder(sink, lim)
	if img.stream != nil {
		b.begin(false)
		digest, notes, err := img.stream(ctx, p, b.add)
		if err == nil {
			err = b.end()
		}
		if err != nil {
			return nil, sourceError(ctx, img.Name, err)
		}
		b.tree.InputDigest = digest
		b.tree.Notes = append(b.tree.Notes, notes...)
		return b.finish(), nil
	}
	if img.tar != nil {
		bl := *img.tar
		bl.filter, bl.inputSum = img.filter, &b.tree.InputDigest
		if err := squashLayers(ctx, b, []blob{bl}, p, lim); err != nil {
			return nil, sourceError(ctx, img.Name, err)
		}
		return b.finish(), nil
	}
	if len(img.Layers) > lim.layers {
		return nil, banger.Errorf(banger.CodeInvalid, "image %q: %d layers, at most %d are taken", img.Name, len(img.Layers), lim.layers)
	}
	blobs := make([]blob, len(img.Layers))
	seen := make(map[string]bool)
	for i, l := range img.Layers {
		blobs[i] = img.source.layerBlob(img, l)
		if seen[l.Digest] {
			blobs[i].keep = nil // kept the first time
		}
		seen[l.Digest] = true
	}
	if err := squashLayers(ctx, b, blobs, p, lim); err != nil {
		return nil, sourceError(ctx, img.Name, err)
	}
	return b.finish(), nil
}

// localError marks an error of this host, not of the image: of the sink or of
// the blob cache.
type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

// sourceError puts the image's name before a plain error and finds its code.
func sourceError(ctx context.Context, name string, err error) error {
	if ctx.Err() != nil {
		return banger.Errorf(banger.CodeCanceled, "image %q: %w", name, context.Cause(ctx))
	}
	if e, ok := errors.AsType[*banger.Error](err); ok {
		return e
	}
	code := banger.CodeInvalid
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		code = banger.CodeNoSpace
	} else if _, ok := errors.AsType[*localError](err); ok {
		code = banger.CodeInternal
	}
	return banger.Errorf(code, "image %q: %w", name, err)
}

// An entry is one thing to put into the tree, from a tar or a directory.
type entry struct {
	name         string // as it came; not checked
	typ          uint16 // S_IFMT; 0 for a hard link
	mode         int64  // 07777
	uid, gid     int64
	major, minor int64
	size         int64 // regular files
	mtime        Time
	atime, ctime *Time
	target       string // of a symlink or hard link
	xattrs       map[string][]byte
	notes        []string // what of it cannot be applied
}

// builder applies entries to a tree, one layer after the other.
type builder[C any] struct {
	tree *Tree[C]
	sink Sink[C]
	lim  limits

	layered  bool // whiteouts mean something
	entries  int
	metadata int64 // bytes alive
	content  int64 // bytes of files placed
	dead     []C
	notes    map[string]int
	kinds    map[string]*Xattrs

	whiteouts []whiteout
	links     []pendingLink
}

type whiteout struct {
	dir  []string
	name string // "" for an opaque whiteout
	cost int64  // charged while it waits
}

// A pendingLink is a hard link whose target has not come yet.
type pendingLink struct {
	name   string
	comps  []string
	target []string
	seq    uint32
	state  uint8
	cost   int64 // charged while it waits
}

func newBuilder[C any](sink Sink[C], lim limits) *builder[C] {
	b := &builder[C]{sink: sink, lim: lim, notes: make(map[string]int), kinds: make(map[string]*Xattrs)}
	b.tree = newTree(func(c C) { b.dead = append(b.dead, c) })
	b.tree.charge = b.charge
	return b
}

func (b *builder[C]) charge(n int64) error {
	b.metadata += n
	if n > 0 && b.metadata > b.lim.metadataBytes {
		return fmt.Errorf("names, xattrs and nodes need more than %d bytes of memory", b.lim.metadataBytes)
	}
	return nil
}

func (b *builder[C]) begin(layered bool) {
	b.layered = layered
	b.tree.layer++
	b.tree.seq = 0
}

// finish discards dead contents and hands the tree over.
func (b *builder[C]) finish() *Tree[C] {
	for _, c := range b.dead {
		b.sink.Discard(c)
	}
	t := b.tree
	for _, what := range slices.Sorted(maps.Keys(b.notes)) {
		t.Notes = append(t.Notes, fmt.Sprintf("%s (%d)", what, b.notes[what]))
	}
	b.dead = nil
	t.discard = b.sink.Discard
	t.charge = func(int64) error { return nil }
	t.layer++
	return t
}

func entryError(name string, err error) error {
	return fmt.Errorf("entry %q: %w", clip(name), err)
}

// clip keeps a name from outside short enough for one line.
func clip(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

// add applies one entry. body holds the bytes of a regular file and is read to
// its end.
func (b *builder[C]) add(e *entry, body io.Reader) error {
	if err := b.apply(e, body); err != nil {
		return entryError(e.name, err)
	}
	return nil
}

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
	aufsPrefix     = ".wh..wh."
)

var (
	errContradiction = errors.New("listed both as a directory with entries in it and as something else")
	errTooMany       = errors.New("too many entries")
)

func (b *builder[C]) apply(e *entry, body io.Reader) error {
	if b.entries++; b.entries > b.lim.entries {
		return fmt.Errorf("more than %d entries", b.lim.entries)
	}
	b.tree.seq++
	comps, err := splitPath(e.name)
	if err != nil {
		return err
	}
	if b.layered {
		if done, err := b.applyWhiteout(comps); done || err != nil {
			return err
		}
	}
	if e.typ == 0 {
		return b.applyLink(e, comps)
	}
	n, err := b.node(e)
	if err != nil {
		return err
	}
	for _, note := range e.notes {
		b.notes[note]++
	}
	if len(comps) == 0 {
		if !n.IsDir() {
			return errors.New("the root of an image must be a directory")
		}
		n.Nlink = 1
		if err := b.charge(n.cost()); err != nil {
			return err
		}
		_ = b.charge(-b.tree.root.node.cost())
		b.tree.root.node, b.tree.root.implied = n, false
		return nil
	}
	if n.Type() == modeRegular {
		if b.content += n.SizeBytes; b.content > b.lim.expandedBytes {
			return fmt.Errorf("files of more than %d bytes in all", b.lim.expandedBytes)
		}
		if n.Content, err = b.place(body, n.SizeBytes); err != nil {
			return err
		}
	}
	return b.link(comps, n)
}

func (b *builder[C]) place(body io.Reader, size int64) (C, error) {
	r := countingReader{r: body}
	c, err := b.sink.Place(&r, size)
	if r.err != nil && r.err != io.EOF {
		// What broke the stream says more than what the sink made of it.
		return c, r.err
	}
	if err == nil && r.n != size {
		err = fmt.Errorf("%d of its %d bytes were taken", r.n, size)
	}
	if err != nil {
		return c, &localError{err}
	}
	return c, nil
}

type countingReader struct {
	r   io.Reader
	n   int64
	err error
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil {
		c.err = err
	}
	return n, err
}

// link puts n at comps, its parents resolved in the tree as it stands.
func (b *builder[C]) link(comps []string, n *Node[C]) error {
	before := b.tree.Entries
	if n.Nlink > 0 {
		// A parent of the new link may take the place of the old one.
		n.Nlink++
		defer func() { n.Nlink-- }()
	}
	at, err := b.tree.descend(comps[:len(comps)-1], replaceFiles)
	if err != nil {
		return err
	}
	if made := b.tree.Entries - before; made > 0 {
		if b.entries += made; b.entries > b.lim.entries {
			return fmt.Errorf("%w: more than %d with the directories they imply", errTooMany, b.lim.entries)
		}
	}
	dir, base := at.top(), comps[len(comps)-1]
	if at.length()+len(base) > MaxPathBytes {
		return errTooLong
	}
	if d := dir.kids[base]; d != nil && d.implied && d.layer == b.tree.layer && len(d.kids) > 0 && !n.IsDir() {
		return errContradiction
	}
	if _, err := b.tree.put(dir, base, n); err != nil {
		return err
	}
	for _, d := range at.dirs {
		d.touched = b.tree.layer
	}
	return nil
}

// applyWhiteout notes whiteouts for the end of the layer; only then is it known
// what the layer itself has put there.
func (b *builder[C]) applyWhiteout(comps []string) (done bool, err error) {
	for i, c := range comps {
		if !strings.HasPrefix(c, whiteoutPrefix) {
			continue
		}
		if c != opaqueName && strings.HasPrefix(c, aufsPrefix) {
			b.notes["aufs's own entries (.wh..wh.*) left out"]++
			return true, nil
		}
		if i != len(comps)-1 {
			return true, errors.New("below a whiteout")
		}
		w := whiteout{dir: comps[:i], cost: 64}
		for _, d := range comps {
			w.cost += int64(len(d) + 16)
		}
		if c != opaqueName {
			w.name = strings.TrimPrefix(c, whiteoutPrefix)
			if w.name == "" || w.name == "." || w.name == ".." {
				return true, errors.New("whiteout of nothing that can be removed")
			}
		}
		b.whiteouts = append(b.whiteouts, w)
		return true, b.charge(w.cost)
	}
	return false, nil
}

func (b *builder[C]) applyLink(e *entry, comps []string) error {
	if len(comps) == 0 {
		return errors.New("the root of an image must be a directory")
	}
	target, err := splitPath(e.target)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", clip(e.target), err)
	}
	d := b.tree.find(target)
	if d == nil {
		cost := int64(160 + 2*len(e.name) + len(e.target) + 16*(len(comps)+len(target)))
		b.links = append(b.links, pendingLink{name: e.name, comps: comps, target: target, seq: b.tree.seq, cost: cost})
		return b.charge(cost)
	}
	if d.node.IsDir() {
		return fmt.Errorf("hard link to %q, a directory", clip(e.target))
	}
	if b.tree.find(comps) == d {
		return nil
	}
	return b.link(comps, d.node)
}

// end completes a layer: hard links that came before their target, then the
// whiteouts.
func (b *builder[C]) end() error {
	if err := b.endLinks(); err != nil {
		return err
	}
	for _, w := range b.whiteouts {
		at, err := b.tree.descend(w.dir, mustExist)
		switch {
		case errors.Is(err, errNotFound), errors.Is(err, errNotDir):
			continue // nothing to hide
		case err != nil:
			return entryError(strings.Join(append(w.dir, whiteoutPrefix+w.name), "/"), err)
		case w.name == "":
			err = b.tree.purge(at.top())
		default:
			d := at.top().kids[w.name]
			if d == nil {
				continue
			}
			if d.touched < b.tree.layer {
				b.tree.remove(at.top(), w.name)
				continue
			}
			err = b.tree.purgeAt(d)
		}
		if err != nil {
			return entryError(w.name, err)
		}
	}
	for _, w := range b.whiteouts {
		b.metadata -= w.cost
	}
	for _, l := range b.links {
		b.metadata -= l.cost
	}
	b.whiteouts, b.links = b.whiteouts[:0], nil
	return nil
}

const (
	linkOpen  = iota
	linkUnder // being resolved: meeting it again is a loop
	linkDone
)

// endLinks resolves links to links in the order they need, without recursion.
func (b *builder[C]) endLinks() error {
	if len(b.links) == 0 {
		return nil
	}
	byPath := make(map[string]int, len(b.links))
	for i, l := range b.links {
		byPath[strings.Join(l.comps, "/")] = i
	}
	var stack []int
	for i := range b.links {
		stack = append(stack, i)
		for len(stack) > 0 {
			l := &b.links[stack[len(stack)-1]]
			if l.state == linkDone {
				stack = stack[:len(stack)-1]
				continue
			}
			d := b.tree.find(l.target)
			if d == nil {
				next, ok := byPath[strings.Join(l.target, "/")]
				if !ok || b.links[next].state != linkOpen {
					return entryError(l.name, fmt.Errorf("hard link to %q, which is not there", clip(strings.Join(l.target, "/"))))
				}
				l.state = linkUnder
				if &b.links[next] == l {
					return entryError(l.name, errors.New("hard link to itself"))
				}
				stack = append(stack, next)
				continue
			}
			l.state = linkDone
			stack = stack[:len(stack)-1]
			if d.node.IsDir() {
				return entryError(l.name, fmt.Errorf("hard link to %q, a directory", clip(strings.Join(l.target, "/"))))
			}
			// A later entry of this layer with the same name counts.
			if old := b.tree.find(l.comps); old != nil && (old == d || !old.implied && old.layer == b.tree.layer && old.seq > l.seq) {
				continue
			}
			b.tree.seq = l.seq
			if err := b.link(l.comps, d.node); err != nil {
				return entryError(l.name, err)
			}
		}
	}
	return nil
}

// node checks what an entry says of its inode.
func (b *builder[C]) node(e *entry) (*Node[C], error) {
	n := &Node[C]{Mode: e.typ | uint16(e.mode&modePerm), Mtime: e.mtime, Atime: e.atime, Ctime: e.ctime}
	var err error
	if n.UID, err = id("uid", e.uid); err != nil {
		return nil, err
	}
	if n.GID, err = id("gid", e.gid); err != nil {
		return nil, err
	}
	switch e.typ {
	case modeRegular:
		if e.size < 0 {
			return nil, fmt.Errorf("size %d", e.size)
		}
		n.SizeBytes = e.size
	case modeSymlink:
		switch {
		case e.target == "":
			return nil, errors.New("symlink to nothing")
		case len(e.target) > MaxTargetBytes:
			return nil, fmt.Errorf("symlink target longer than %d bytes", MaxTargetBytes)
		case strings.IndexByte(e.target, 0) >= 0:
			return nil, errors.New("NUL in its symlink target")
		}
		n.Target = strings.Clone(e.target)
		n.Mode |= 0o777 // Linux knows no other
	case modeChar, modeBlock:
		// 12 and 20 bits: what the kernel's dev_t holds.
		if e.major < 0 || e.major > 0xfff || e.minor < 0 || e.minor > 0xfffff {
			return nil, fmt.Errorf("device number %d:%d", e.major, e.minor)
		}
		if e.typ == modeChar && e.major == 0 && e.minor == 0 {
			return nil, errors.New("character device 0:0, which an overlay takes for a whiteout")
		}
		n.Major, n.Minor = uint32(e.major), uint32(e.minor)
	}
	xattrs, err := b.xattrs(e.xattrs)
	n.Xattrs = b.packed(xattrs)
	return n, err
}

func id(what string, v int64) (uint32, error) {
	if v < 0 || v > 1<<32-1 {
		return 0, fmt.Errorf("%s %d is not in 0..%d", what, v, uint32(1<<32-1))
	}
	return uint32(v), nil
}

// packed is a set in little room, shared with others of the same if there are
// not many kinds.
func (b *builder[C]) packed(set map[string][]byte) *Xattrs {
	x := newXattrs(set)
	const kinds, kindBytes = 100, 1 << 10
	if x == nil || len(x.packed) > kindBytes {
		return x
	}
	if same := b.kinds[x.packed]; same != nil {
		return same
	}
	if len(b.kinds) < kinds {
		b.kinds[x.packed] = x
	}
	return x
}

// xattrs keeps what a Linux file system can hold, less what overlayfs in the
// guest would take for its own. What goes is noted.
func (b *builder[C]) xattrs(in map[string][]byte) (map[string][]byte, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := make(map[string][]byte, len(in))
	total := 0
	for k, v := range in {
		if total += len(k) + len(v); total > MaxXattrBytes {
			return nil, fmt.Errorf("xattrs of more than %d bytes", MaxXattrBytes)
		}
		if len(k) > MaxNameBytes || strings.IndexByte(k, 0) >= 0 {
			return nil, fmt.Errorf("xattr name %q", clip(k))
		}
		switch space, rest, _ := strings.Cut(k, "."); {
		case strings.HasPrefix(k, "trusted.overlay."), strings.HasPrefix(k, "user.overlay."):
			b.notes["xattrs of overlayfs left out"]++
		case rest != "" && (space == "user" || space == "trusted" || space == "security"),
			k == "system.posix_acl_access", k == "system.posix_acl_default":
			out[k] = v
		default:
			b.notes["xattrs of no Linux namespace left out"]++
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}
