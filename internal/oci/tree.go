package oci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"banger"
)

// File types, as S_IFMT of stat(2) has them.
const (
	modeType    = 0o170000
	modeSocket  = 0o140000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFIFO    = 0o010000
	modePerm    = 0o7777
)

// Time is a moment with the full range that tar and Linux have, in less room
// than a time.Time. The zero value is the Unix epoch.
type Time struct {
	Sec  int64
	Nsec int32 // 0..999,999,999
}

// Time returns t in UTC.
func (t Time) Time() time.Time { return time.Unix(t.Sec, int64(t.Nsec)).UTC() }

func timeOf(t time.Time) Time { return Time{Sec: t.Unix(), Nsec: int32(t.Nanosecond())} }

// A Node is one inode of a Tree. Paths that are hard links of each other lead
// to the same *Node. C is what the Sink returned for the bytes of a file.
type Node[C any] struct {
	Mode      uint16 // S_IFMT and 07777
	Nlink     uint32 // paths that lead here; kept by the Tree
	UID, GID  uint32
	Major     uint32 // devices
	Minor     uint32
	SizeBytes int64 // regular files
	Mtime     Time
	Atime     *Time // nil unless the layer says
	Ctime     *Time // nil unless the layer says
	Target    string
	Xattrs    *Xattrs // nil for none
	Content   C       // regular files
}

// Xattrs are the extended attributes of one inode, in little room: a map of one
// would take ten times what is in it.
type Xattrs struct {
	packed string // for each, sorted: name, NUL, length of the value (4 bytes), value
}

// newXattrs packs names and values; nil for none.
func newXattrs(set map[string][]byte) *Xattrs {
	if len(set) == 0 {
		return nil
	}
	size := 0
	for name, value := range set {
		size += len(name) + 1 + 4 + len(value)
	}
	packed := make([]byte, 0, size)
	for _, name := range slices.Sorted(maps.Keys(set)) {
		packed = append(append(packed, name...), 0)
		packed = binary.LittleEndian.AppendUint32(packed, uint32(len(set[name])))
		packed = append(packed, set[name]...)
	}
	return &Xattrs{string(packed)}
}

// All returns the full names ("user.x") with their values, as lsetxattr(2)
// takes them, in a map of its own; nil for none.
func (x *Xattrs) All() map[string][]byte {
	if x == nil {
		return nil
	}
	set := make(map[string][]byte)
	for rest := x.packed; rest != ""; {
		name, after, _ := strings.Cut(rest, "\x00")
		n := binary.LittleEndian.Uint32([]byte(after[:4]))
		set[name], rest = []byte(after[4:4+n]), after[4+n:]
	}
	return set
}

// Get returns the value of a full name.
func (x *Xattrs) Get(name string) []byte { return x.All()[name] }

// Type returns the S_IFMT part of the mode.
func (n *Node[C]) Type() uint16 { return n.Mode & modeType }

// IsDir tells whether n is a directory.
func (n *Node[C]) IsDir() bool { return n.Type() == modeDir }

// dentry is a name in a directory. layer is the layer that listed it last,
// touched the last one that put anything at or below it, so that a whiteout
// can tell what is older than its own layer, whatever the order of entries.
type dentry[C any] struct {
	node    *Node[C]
	kids    map[string]*dentry[C] // directories only; nil while empty
	seq     uint32                // entry number
	layer   uint8
	touched uint8
	implied bool // made up, since an entry below it came without it
}

// A Tree is the merged file system of an image. It is not safe for concurrent
// use.
type Tree[C any] struct {
	// InputDigest is "sha256:" and the hash of what was read where there is no
	// manifest: of the stream for a tar, of metadata and content for a
	// directory and for an apt: image, where what is left out does not count.
	// "" for images with a manifest.
	InputDigest string
	// Notes says in words what was left out, and why.
	Notes []string
	// Entries is how many paths there are, the root included.
	Entries int

	root    *dentry[C]
	layer   uint8
	seq     uint32
	steps   int // of all paths that were resolved
	discard func(C)
	charge  func(bytes int64) error
}

// What one name and one inode cost in memory, measured; charged against
// MaxMetadataBytes with the lengths of names, targets and xattrs.
const (
	dentryCostBytes = 88
	nodeCostBytes   = 112
	kidsCostBytes   = 256 // of a directory's first name
	xattrsCostBytes = 32  // of a set, beside what is in it
)

func newTree[C any](discard func(C)) *Tree[C] {
	return &Tree[C]{
		root:    &dentry[C]{node: &Node[C]{Mode: modeDir | 0o755, Nlink: 1}, implied: true},
		Entries: 1,
		discard: discard,
		charge:  func(int64) error { return nil },
	}
}

// Walk calls fn for every path, the root ("/") first, parents before their
// children, children sorted by name. It stops at the first error and returns it.
func (t *Tree[C]) Walk(fn func(path string, n *Node[C]) error) error {
	if err := fn("/", t.root.node); err != nil {
		return err
	}
	return t.root.walk(make([]byte, 0, 256), fn)
}

func (d *dentry[C]) walk(prefix []byte, fn func(string, *Node[C]) error) error {
	for _, name := range d.names() {
		k := d.kids[name]
		path := append(append(prefix, '/'), name...)
		if err := fn(string(path), k.node); err != nil {
			return err
		}
		if err := k.walk(path, fn); err != nil {
			return err
		}
	}
	return nil
}

// Drain is a Walk that gives up what it has passed: the tree is used up, and its
// memory free, while whoever takes it grows.
func (t *Tree[C]) Drain(fn func(path string, n *Node[C]) error) error {
	root := t.root
	t.root = nil
	if err := fn("/", root.node); err != nil {
		return err
	}
	return root.drain(make([]byte, 0, 256), fn)
}

func (d *dentry[C]) drain(prefix []byte, fn func(string, *Node[C]) error) error {
	names := d.names()
	kids := make([]*dentry[C], len(names))
	for i, name := range names {
		kids[i] = d.kids[name]
	}
	d.kids = nil
	for i, k := range kids {
		path := append(append(prefix, '/'), names[i]...)
		kids[i], names[i] = nil, ""
		if err := fn(string(path), k.node); err != nil {
			return err
		}
		if err := k.drain(path, fn); err != nil {
			return err
		}
	}
	return nil
}

func (d *dentry[C]) names() []string {
	if len(d.kids) == 0 {
		return nil
	}
	names := make([]string, 0, len(d.kids))
	for name := range d.kids {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

var (
	errNotFound = errors.New("does not exist")
	errNotDir   = errors.New("a parent is not a directory")
	errSteps    = fmt.Errorf("the paths of the image take more than %d steps in all", maxPathSteps)
	errLoop     = errors.New("too many levels of symbolic links")
	errTooLong  = fmt.Errorf("its path inside the image is longer than %d bytes", MaxPathBytes)
)

// splitPath returns the components of a path inside an image. Leading and
// doubled slashes and "." go; ".." and bytes no Linux path can hold are refused.
func splitPath(path string) ([]string, error) {
	if len(path) > MaxPathBytes {
		return nil, fmt.Errorf("path longer than %d bytes", MaxPathBytes)
	}
	if strings.IndexByte(path, 0) >= 0 {
		return nil, errors.New("NUL in its path")
	}
	comps := make([]string, 0, strings.Count(path, "/")+1)
	for c := range strings.SplitSeq(path, "/") {
		switch {
		case c == "" || c == ".":
		case c == "..":
			return nil, errors.New(`".." in its path`)
		case len(c) > MaxNameBytes:
			return nil, fmt.Errorf("name longer than %d bytes", MaxNameBytes)
		default:
			comps = append(comps, c)
		}
	}
	return comps, nil
}

// resolveMode says what descend does where a directory is missing.
type resolveMode int

const (
	mustExist    resolveMode = iota
	makeParents              // create missing directories; a file in the way is an error
	replaceFiles             // as makeParents, and a file of an older layer gives way
)

// A trail is a directory and the directories above it, root first, with the
// lengths of their paths ("" for the root, "/usr", "/usr/bin").
type trail[C any] struct {
	dirs []*dentry[C]
	lens []int
}

func (t *trail[C]) top() *dentry[C] { return t.dirs[len(t.dirs)-1] }
func (t *trail[C]) length() int     { return t.lens[len(t.lens)-1] }

// descend resolves a directory as the kernel would with the tree as its root:
// symlinks are followed, absolute ones from the tree's root, ".." of a symlink
// stops there. comps itself holds no "..".
func (t *Tree[C]) descend(comps []string, mode resolveMode) (trail[C], error) {
	at := trail[C]{dirs: make([]*dentry[C], 1, len(comps)+1), lens: make([]int, 1, len(comps)+1)}
	at.dirs[0] = t.root
	// todo is what remains, last component first.
	todo := make([]string, 0, len(comps))
	for _, c := range slices.Backward(comps) {
		todo = append(todo, c)
	}
	hops := 0
	for len(todo) > 0 {
		c := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if t.steps++; t.steps > maxPathSteps {
			return at, errSteps
		}
		switch c {
		case "", ".":
			continue
		case "..":
			if n := len(at.dirs); n > 1 {
				at.dirs, at.lens = at.dirs[:n-1], at.lens[:n-1]
			}
			continue
		}
		if at.length()+len(c) > MaxPathBytes {
			return at, errTooLong
		}
		dir := at.top()
		d := dir.kids[c]
		if d == nil {
			if mode == mustExist {
				return at, errNotFound
			}
			var err error
			if d, err = t.imply(dir, c); err != nil {
				return at, err
			}
		} else if d.node.Type() == modeSymlink {
			if hops++; hops > maxSymlinkHops {
				return at, errLoop
			}
			if strings.HasPrefix(d.node.Target, "/") {
				at.dirs, at.lens = at.dirs[:1], at.lens[:1]
			}
			parts := strings.Split(d.node.Target, "/")
			for _, p := range slices.Backward(parts) {
				if len(p) > MaxNameBytes {
					return at, fmt.Errorf("a symlink on its path names a component longer than %d bytes", MaxNameBytes)
				}
				todo = append(todo, p)
			}
			continue
		} else if !d.node.IsDir() {
			if mode != replaceFiles || d.layer == t.layer || hops > 0 {
				return at, errNotDir
			}
			t.remove(dir, c)
			var err error
			if d, err = t.imply(dir, c); err != nil {
				return at, err
			}
		}
		at.dirs = append(at.dirs, d)
		at.lens = append(at.lens, at.length()+1+len(c))
	}
	return at, nil
}

// imply makes a directory that no entry has described: 0755, root, the epoch.
func (t *Tree[C]) imply(dir *dentry[C], name string) (*dentry[C], error) {
	d, err := t.put(dir, name, &Node[C]{Mode: modeDir | 0o755})
	if err == nil {
		d.implied = true
	}
	return d, err
}

// put sets name in dir to n. A directory over a directory keeps what is in it;
// anything else takes the place of what was there.
func (t *Tree[C]) put(dir *dentry[C], name string, n *Node[C]) (*dentry[C], error) {
	if n.Nlink == 0 {
		if err := t.charge(n.cost()); err != nil {
			return nil, err
		}
	}
	d := dir.kids[name]
	if d != nil && d.node.IsDir() && n.IsDir() {
		// The name stays, its inode is replaced.
		if err := t.charge(-d.node.cost()); err != nil {
			return nil, err
		}
		n.Nlink = 1
		d.node, d.layer, d.touched, d.implied, d.seq = n, t.layer, t.layer, false, t.seq
		return d, nil
	}
	// The new link counts before the old one goes: they may be one inode.
	n.Nlink++
	if d != nil {
		t.remove(dir, name)
	}
	if err := t.charge(dentryCostBytes + int64(len(name))); err != nil {
		return nil, err
	}
	d = &dentry[C]{node: n, layer: t.layer, touched: t.layer, seq: t.seq}
	if dir.kids == nil {
		if err := t.charge(kidsCostBytes); err != nil {
			return nil, err
		}
		dir.kids = make(map[string]*dentry[C])
	}
	// The name's bytes may be part of a long path: keep only what is needed.
	dir.kids[strings.Clone(name)] = d
	t.Entries++
	return d, nil
}

func (n *Node[C]) cost() int64 {
	c := int64(nodeCostBytes + len(n.Target))
	if n.Xattrs != nil {
		c += int64(xattrsCostBytes + len(n.Xattrs.packed))
	}
	return c
}

// remove takes name and all below it out of dir. Inodes whose last link this
// was are dead.
func (t *Tree[C]) remove(dir *dentry[C], name string) {
	d := dir.kids[name]
	if d == nil {
		return
	}
	delete(dir.kids, name)
	t.drop(d, name)
}

func (t *Tree[C]) drop(d *dentry[C], name string) {
	for _, k := range d.names() {
		t.drop(d.kids[k], k)
	}
	if d.kids != nil {
		_ = t.charge(-kidsCostBytes) // giving back cannot fail
	}
	d.kids = nil
	t.Entries--
	_ = t.charge(-int64(dentryCostBytes + len(name)))
	if d.node.Nlink--; d.node.Nlink == 0 {
		_ = t.charge(-d.node.cost())
		if d.node.Type() == modeRegular {
			t.discard(d.node.Content)
		}
	}
}

// purge removes what is older than this layer below d.
func (t *Tree[C]) purge(d *dentry[C]) error {
	for _, name := range d.names() {
		k := d.kids[name]
		if k.touched < t.layer {
			t.remove(d, name)
			continue
		}
		if err := t.purgeAt(k); err != nil {
			return err
		}
	}
	return nil
}

// purgeAt is purge for d itself: a directory of an older layer that this layer
// has put something into is hidden, and one only implied stands in its place.
func (t *Tree[C]) purgeAt(d *dentry[C]) error {
	if d.layer < t.layer {
		_ = t.charge(-d.node.cost())
		d.node = &Node[C]{Mode: modeDir | 0o755, Nlink: 1}
		d.layer, d.implied = t.layer, true
		if err := t.charge(d.node.cost()); err != nil {
			return err
		}
	}
	return t.purge(d)
}

// Lookup finds path in the tree. Symlinks on the way are followed inside the
// tree, one in the last place is not. It returns nil where there is nothing.
func (t *Tree[C]) Lookup(path string) *Node[C] {
	comps, err := splitPath(path)
	if err != nil {
		return nil
	}
	if d := t.find(comps); d != nil {
		return d.node
	}
	return nil
}

// Names lists the directory at path, which Lookup would find, sorted.
func (t *Tree[C]) Names(path string) []string {
	comps, err := splitPath(path)
	if err != nil {
		return nil
	}
	if d := t.find(comps); d != nil {
		return d.names()
	}
	return nil
}

func (t *Tree[C]) find(comps []string) *dentry[C] {
	if len(comps) == 0 {
		return t.root
	}
	at, err := t.descend(comps[:len(comps)-1], mustExist)
	if err != nil {
		return nil
	}
	return at.top().kids[comps[len(comps)-1]]
}

// Resolve is Lookup that follows a symlink in the last place too.
func (t *Tree[C]) Resolve(path string) *Node[C] {
	comps, err := splitPath(path)
	if err != nil {
		return nil
	}
	for range maxSymlinkHops {
		if len(comps) == 0 {
			return t.root.node
		}
		at, err := t.descend(comps[:len(comps)-1], mustExist)
		if err != nil {
			return nil
		}
		d := at.top().kids[comps[len(comps)-1]]
		if d == nil {
			return nil
		}
		if d.node.Type() != modeSymlink {
			return d.node
		}
		// Start again from the root with the target's own parents resolved: a
		// ".." in it is handled by descend, so try it as a directory first.
		parts := strings.Split(strings.TrimRight(d.node.Target, "/"), "/")
		base := parts[len(parts)-1]
		if base == "" || base == "." || base == ".." {
			at, err := t.descend(comps, mustExist)
			if err != nil {
				return nil
			}
			return at.top().node
		}
		if strings.HasPrefix(d.node.Target, "/") {
			comps = slices.DeleteFunc(parts, func(c string) bool { return c == "" || c == "." })
		} else {
			comps = append(slices.Clone(comps[:len(comps)-1]), parts...)
		}
	}
	return nil
}

// Put sets path to n, whatever stood there: a symlink in the last place is
// replaced, never followed; a directory over a directory keeps its children.
// Parents are resolved inside the tree and missing ones are made, 0755 root.
// Put takes n; it must not be in the tree yet unless as a hard link.
func (t *Tree[C]) Put(path string, n *Node[C]) error {
	comps, err := splitPath(path)
	if err == nil && len(comps) == 0 {
		err = errors.New("the root cannot be replaced")
	}
	if err == nil {
		var at trail[C]
		if at, err = t.descend(comps[:len(comps)-1], makeParents); err == nil {
			base := comps[len(comps)-1]
			if at.length()+len(base) > MaxPathBytes {
				err = errTooLong
			} else {
				_, err = t.put(at.top(), base, n)
			}
		}
	}
	if err != nil {
		return banger.Errorf(banger.CodeInvalid, "put %q: %w", path, err)
	}
	return nil
}

// Remove takes path, and all below it, out of the tree. Parents are resolved
// as in Put, the last component is not followed. It tells whether there was
// something.
func (t *Tree[C]) Remove(path string) bool {
	comps, err := splitPath(path)
	if err != nil || len(comps) == 0 {
		return false
	}
	at, err := t.descend(comps[:len(comps)-1], mustExist)
	if err != nil {
		return false
	}
	base := comps[len(comps)-1]
	if at.top().kids[base] == nil {
		return false
	}
	t.remove(at.top(), base)
	return true
}
