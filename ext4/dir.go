package ext4

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"banger/ext4/internal/disk"
)

// directory is what a node has when it is one.
type directory struct {
	parent  *node
	entries map[string]*node // without the dot entries
	subdirs int
	sorted  []dirEntry // by hash when there is an index, else by name; set by survey
	blocks  int        // set by survey
}

type dirEntry struct {
	name string
	node *node
	hash nameHash
}

func (e *dirEntry) size() int { return disk.DirEntryHeader + align4(len(e.name)) }

const (
	dotEntrySize = 12
	dirRoom      = disk.BlockSize - disk.DirTailSize
	// lostFoundBlocks is what mke2fs gives lost+found, so that e2fsck need
	// not allocate when it has something to put there.
	lostFoundBlocks = 4
)

func (d *directory) indexed() bool { return d.blocks > 1 && len(d.sorted) > 0 }

// links is the link count as the kernel would have it.
func (d *directory) links() uint32 {
	if n := uint32(d.subdirs) + 2; n < MaxLinks {
		return n
	}
	return 1 // dir_nlink: too many to count
}

// arrange sorts the entries the way they will lie on disk and counts blocks.
func (d *directory) arrange(seed [4]uint32) error {
	d.sorted = make([]dirEntry, 0, len(d.entries))
	bytes := 2 * dotEntrySize
	for name, n := range d.entries {
		e := dirEntry{name: name, node: n}
		bytes += e.size()
		d.sorted = append(d.sorted, e)
	}
	if bytes <= dirRoom {
		slices.SortFunc(d.sorted, func(a, b dirEntry) int { return strings.Compare(a.name, b.name) })
		d.blocks = 1
		return nil
	}
	for i := range d.sorted {
		d.sorted[i].hash = hashName(d.sorted[i].name, seed)
	}
	slices.SortFunc(d.sorted, func(a, b dirEntry) int {
		return cmp.Or(cmp.Compare(a.hash.major, b.hash.major), cmp.Compare(a.hash.minor, b.hash.minor), strings.Compare(a.name, b.name))
	})
	leaves := 0
	for from := 0; from < len(d.sorted); leaves++ {
		from = leafEnd(d.sorted, from)
	}
	d.blocks = 1 + leaves
	if leaves > disk.IndexRootLimit {
		nodes := ceilDiv(leaves, disk.IndexNodeLimit)
		if nodes > disk.IndexRootLimit {
			return fmt.Errorf("directory of %d entries: more than an index of two levels holds", len(d.sorted))
		}
		d.blocks += nodes
	}
	return nil
}

// leafEnd is the end of the leaf that begins with entry from.
func leafEnd(entries []dirEntry, from int) int {
	used := 0
	for i := from; i < len(entries); i++ {
		if used += entries[i].size(); used > dirRoom {
			return i
		}
	}
	return len(entries)
}

// dirWriter writes the blocks of one directory in order.
type dirWriter struct {
	out  *output
	seed uint32
	rest []extent
	err  error
}

// next gives the next block, zeroed. After an error it is a dummy.
func (w *dirWriter) next() []byte {
	if w.err == nil {
		e := &w.rest[0]
		var b []byte
		b, w.err = w.out.block(e.start)
		if e.start, e.length = e.start+1, e.length-1; e.length == 0 {
			w.rest = w.rest[1:]
		}
		if w.err == nil {
			return b
		}
	}
	return make([]byte, disk.BlockSize)
}

func putDots(b []byte, self, parent uint32, parentLen int) {
	disk.PutDirEntry(b, self, dotEntrySize, 2, ".")
	disk.PutDirEntry(b[dotEntrySize:], parent, parentLen, 2, "..")
}

// putLeaf writes entries from offset at, the last one reaching to the tail.
func (w *dirWriter) putLeaf(b []byte, at int, entries []dirEntry) {
	if len(entries) == 0 && at == 0 {
		disk.PutDirEntry(b, 0, dirRoom, 0, "")
	}
	for i := range entries {
		e := &entries[i]
		size := e.size()
		if i == len(entries)-1 {
			size = dirRoom - at
		}
		disk.PutDirEntry(b[at:], e.node.ino, size, disk.DirFileType(e.node.mode), e.name)
		at += size
	}
	disk.SealDirBlock(b, w.seed)
}

// put writes the directory n whose blocks lie at extents.
func (d *directory) put(out *output, n *node, extents []extent, fsSeed uint32) error {
	w := &dirWriter{out: out, seed: disk.InodeSeed(fsSeed, n.ino), rest: slices.Clone(extents)}
	if d.indexed() {
		d.putIndexed(w, n.ino)
		return w.err
	}
	b := w.next()
	if len(d.sorted) == 0 {
		putDots(b, n.ino, d.parent.ino, dirRoom-dotEntrySize)
		disk.SealDirBlock(b, w.seed)
	} else {
		putDots(b, n.ino, d.parent.ino, dotEntrySize)
		w.putLeaf(b, 2*dotEntrySize, d.sorted)
	}
	for range d.blocks - 1 {
		w.putLeaf(w.next(), 0, nil)
	}
	return w.err
}

// putIndexed writes an htree (Documentation/filesystems/ext4/directory.rst):
// its root, then inner nodes if there are any, then the leaves.
func (d *directory) putIndexed(w *dirWriter, self uint32) {
	type pointer struct{ hash, block uint32 }
	var starts []int
	for from := 0; from < len(d.sorted); from = leafEnd(d.sorted, from) {
		starts = append(starts, from)
	}
	nodes, levels := 0, 0
	if len(starts) > disk.IndexRootLimit {
		nodes, levels = ceilDiv(len(starts), disk.IndexNodeLimit), 1
	}
	leaves := make([]pointer, len(starts))
	for i, from := range starts {
		hash := d.sorted[from].hash.major
		if from > 0 && d.sorted[from-1].hash.major == hash {
			hash |= 1 // this hash began in the leaf before
		}
		leaves[i] = pointer{hash, uint32(1 + nodes + i)}
	}
	top := leaves
	if nodes > 0 {
		top = make([]pointer, nodes)
		for i := range top {
			top[i] = pointer{leaves[i*disk.IndexNodeLimit].hash, uint32(1 + i)}
		}
	}
	putIndex := func(b []byte, at, limit int, list []pointer) {
		for i, p := range list {
			disk.PutIndexEntry(b, at, i, p.hash, p.block)
		}
		disk.PutIndexCount(b, at, len(list), limit)
		disk.SealIndexBlock(b, at, len(list), limit, w.seed)
	}
	b := w.next()
	putDots(b, self, d.parent.ino, disk.BlockSize-dotEntrySize)
	disk.PutIndexRootInfo(b, levels)
	putIndex(b, disk.IndexRootAt, disk.IndexRootLimit, top)
	for i := range nodes {
		b := w.next()
		disk.PutDirEntry(b, 0, disk.BlockSize, 0, "")
		from := i * disk.IndexNodeLimit
		putIndex(b, disk.IndexNodeAt, disk.IndexNodeLimit, leaves[from:min(from+disk.IndexNodeLimit, len(leaves))])
	}
	for i, from := range starts {
		end := len(d.sorted)
		if i+1 < len(starts) {
			end = starts[i+1]
		}
		w.putLeaf(w.next(), 0, d.sorted[from:end])
	}
}
