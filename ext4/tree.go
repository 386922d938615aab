package ext4

import (
	"hash/maphash"
	"iter"
	"strings"

	"banger/ext4/internal/disk"
)

// The tree of a Writer lies in tables of small records without pointers that
// refer to each other by index: about 50 bytes and its name for a file, and
// next to nothing for the collector to do. What few inodes have is apart.
//
//	dirs ──head──> entries ──next──> entries of the same directory
//	  ^               │  └──name───> text
//	  └────a───┐    child
//	           │      v
//	           └─── nodes ──extra──> extras ──> contents, xattrs

// node is an inode but for its number, which follows from its index: rootNode,
// madeNode, then those that were added, in that order.
type node struct {
	uid, gid uint32
	mtime    disk.Timestamp // and every other time that is set, unless extra says otherwise
	// By type: a regular file's first block and its size in bytes, if it is
	// one extent without holes; a symlink's target in text and its length;
	// a device's major and minor; a directory's index in dirs.
	a, b  uint32
	extra uint32 // 4 bits: which times are set; 28: one more than the index in extras, or 0
	mode  uint16
	links uint16 // names of anything but a directory
}

const (
	rootNode = 0
	// madeNode is lost+found, which has a link in the root's list as the
	// first of all entries, but cannot be looked up; where the tree brings
	// one of its own, survey and Finish pass over it.
	madeNode, madeEntry = 1, 0
	rootDir, madeDir    = 0, 1 // in dirs

	extraBits = 28
	extraMask = 1<<extraBits - 1
)

func (n *node) isDir() bool { return n.mode&disk.TypeMask == disk.TypeDir }

// timeSet tells whether a time of atime, mtime, ctime, crtime is not Params.Time.
func (n *node) timeSet(i int) bool { return n.extra>>(extraBits+i)&1 != 0 }

// longTarget tells whether a symlink's target takes a block of its own.
func (n *node) longTarget() bool {
	return n.mode&disk.TypeMask == disk.TypeSymlink && n.b > maxFastTarget
}

const maxFastTarget = 59 // bytes, in the inode

// extra is what few nodes have.
type extra struct {
	times   [4]disk.Timestamp // atime, mtime, ctime, crtime
	xattrs  uint32            // one more than the index, or 0
	content uint32            // one more than the index, or 0
}

// storedContent is the bytes of a file that are not one extent.
type storedContent struct {
	size    int64
	extents []extent
}

// entry is a name.
type entry struct {
	name  uint32 // in text, after a byte with its length
	child uint32 // node
	dir   uint32 // in dirs
	next  uint32 // entry of the same directory: one more than the index, or 0
}

// dir is what a directory has beside its node.
type dir struct {
	node, parent uint32 // nodes
	head         uint32 // one more than the index of an entry, or 0
	entries      uint32
	subdirs      uint32
	blocks       uint32 // set by survey
	bytes        uint64 // of its entries as they lie on disk
}

// links is the link count of a directory as the kernel would have it.
func dirLinks(subdirs uint32) uint32 {
	if n := uint64(subdirs) + 2; n < MaxLinks {
		return uint32(n)
	}
	return 1 // dir_nlink: too many to count
}

// names finds and lists what directories hold.
type names struct {
	entries table[entry]
	dirs    table[dir]
	text    text
	seed    maphash.Seed
	slots   []uint32 // open addressing by directory and name: one more than the index of an entry
}

func (t *names) nameOf(e *entry) string {
	n := t.text.get(e.name, 1)[0]
	return t.text.get(e.name+1, int(n))
}

func (t *names) hash(dir uint32, name string) uint64 {
	const spread = 0x9E3779B97F4A7C15
	return maphash.String(t.seed, name) + uint64(dir)*spread
}

// lookup gives the node that a directory has under a name.
func (t *names) lookup(dir uint32, name string) (child uint32, ok bool) {
	if len(t.slots) == 0 {
		return 0, false
	}
	mask := uint64(len(t.slots) - 1)
	for i := t.hash(dir, name) & mask; t.slots[i] != 0; i = (i + 1) & mask {
		e := t.entries.at(t.slots[i] - 1)
		if e.dir == dir && t.nameOf(e) == name {
			return e.child, true
		}
	}
	return 0, false
}

// insert adds a name that is not there.
func (t *names) insert(in uint32, name string, child uint32) {
	if n := uint64(t.entries.len()); n*4 >= uint64(len(t.slots))*3 {
		t.grow()
	}
	index := t.link(in, name, child)
	t.take(t.hash(in, name), index)
}

// link adds a name to a directory's list, where it cannot be looked up yet.
func (t *names) link(in uint32, name string, child uint32) (index uint32) {
	d := t.dirs.at(in)
	index = t.entries.add(entry{name: t.text.put(string([]byte{byte(len(name))}), name), child: child, dir: in, next: d.head})
	d.head = index + 1
	d.entries++
	d.bytes += uint64(dirEntrySize(len(name)))
	return index
}

func (t *names) take(hash uint64, index uint32) {
	mask := uint64(len(t.slots) - 1)
	i := hash & mask
	for t.slots[i] != 0 {
		i = (i + 1) & mask
	}
	t.slots[i] = index + 1
}

// sort puts the entries of a directory in the order of an htree.
func (t *names) sort(d *dir, hash *dirHash) {
	keys := make([]dirKey, 0, d.entries)
	for at := d.head; at != 0; at = t.entries.at(at - 1).next {
		keys = append(keys, dirKey{hash.sum(t.nameOf(t.entries.at(at - 1))), at - 1})
	}
	sortKeys(keys, func(i uint32) string { return t.nameOf(t.entries.at(i)) })
	next := &d.head
	for _, k := range keys {
		*next = k.entry + 1
		next = &t.entries.at(k.entry).next
	}
	*next = 0
}

// walk gives the entries of a directory one by one, then nil, in the order of
// their links; without the made one if so told.
func (t *names) walk(d *dir, withoutMade bool) (next func() *entry) {
	at := d.head
	return func() *entry {
		if withoutMade && at == madeEntry+1 {
			at = t.entries.at(at - 1).next
		}
		if at == 0 {
			return nil
		}
		e := t.entries.at(at - 1)
		at = e.next
		return e
	}
}

// in gives the names that walk does.
func (t *names) in(d *dir, withoutMade bool) iter.Seq[string] {
	return func(yield func(string) bool) {
		next := t.walk(d, withoutMade)
		for e := next(); e != nil && yield(t.nameOf(e)); {
			e = next()
		}
	}
}

func (t *names) grow() {
	t.slots = make([]uint32, max(64, 2*len(t.slots)))
	for i := uint32(madeEntry + 1); i < t.entries.len(); i++ {
		e := t.entries.at(i)
		t.take(t.hash(e.dir, t.nameOf(e)), i)
	}
}

// table is a slice that grows without being copied. An element stays where it
// is, but for those of the first chunk while it fills.
type table[T any] struct{ chunks [][]T }

const chunkLen = 1 << 12

func (t *table[T]) len() uint32 {
	if len(t.chunks) == 0 {
		return 0
	}
	last := len(t.chunks) - 1
	return uint32(last*chunkLen + len(t.chunks[last]))
}

func (t *table[T]) at(i uint32) *T { return &t.chunks[i/chunkLen][i%chunkLen] }

// add appends v and gives its index.
func (t *table[T]) add(v T) uint32 {
	n := len(t.chunks)
	switch {
	case n == 0:
		t.chunks = append(t.chunks, nil)
		n++
	case len(t.chunks[n-1]) == chunkLen:
		t.chunks = append(t.chunks, make([]T, 0, chunkLen))
		n++
	}
	t.chunks[n-1] = append(t.chunks[n-1], v)
	return t.len() - 1
}

// text holds bytes that stay as they are and where they are. A Builder never
// copies what String gave away.
type text struct{ chunks []*strings.Builder }

const (
	textChunk = 1 << 18 // bytes, a multiple of what put may be given
	maxText   = 1<<32 - textChunk
)

// full tells that put may have no place for another 64 KiB.
func (t *text) full() bool { return uint64(len(t.chunks))*textChunk > maxText }

// put keeps the pieces, at most 64 KiB, one behind the other.
func (t *text) put(pieces ...string) (at uint32) {
	bytes := 0
	for _, p := range pieces {
		bytes += len(p)
	}
	last := len(t.chunks) - 1
	if last < 0 || t.chunks[last].Len()+bytes > textChunk {
		b := new(strings.Builder)
		if last >= 0 {
			b.Grow(textChunk)
		}
		t.chunks = append(t.chunks, b)
		last++
	}
	at = uint32(last*textChunk + t.chunks[last].Len())
	for _, p := range pieces {
		t.chunks[last].WriteString(p)
	}
	return at
}

func (t *text) get(at uint32, bytes int) string {
	return t.chunks[at/textChunk].String()[at%textChunk:][:bytes]
}
