package ext4

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"banger/ext4/internal/disk"
)

// dirEntry is a name in a directory. The dot entries are never among them.
type dirEntry struct {
	name     string
	hash     nameHash // set by layoutDir where there is an index
	ino      uint32
	entry    uint32 // the Writer's own: one more than the index in names.entries, or 0
	fileType byte   // from disk.DirFileType; left out where the geometry has none
}

const dotEntrySize = 12

// dirEntrySize is the room that an entry with a name of n bytes takes.
func dirEntrySize(n int) int { return disk.DirEntryHeader + align4(n) }

// dirLayout is a directory as it will lie on disk. Its size depends on the
// names alone; inode numbers may be filled in until put.
type dirLayout struct {
	g                        *geometry
	self, parent, generation uint32     // inode numbers; the directory's i_generation
	entries                  []dirEntry // by hash when indexed, else by name
	starts                   []int      // first entry of each leaf
	nodes                    int        // index blocks below the root, 0 or more
	indexed                  bool
	blocks                   int // may be raised where there is no index: they are empty then
}

// layoutDir sorts entries, which it keeps, and divides them into blocks. One
// block, or a file system without dir_index, makes a list; else it is an htree
// (Documentation/filesystems/ext4/directory.rst) of at most two levels.
func (g *geometry) layoutDir(entries []dirEntry) (*dirLayout, error) {
	d := &dirLayout{g: g, entries: entries}
	bytes := 2 * dotEntrySize
	for i := range entries {
		bytes += dirEntrySize(len(entries[i].name))
	}
	if bytes <= g.dirRoom() || !g.dirIndex {
		slices.SortFunc(entries, func(a, b dirEntry) int { return strings.Compare(a.name, b.name) })
		d.starts = g.leaves(entries, 2*dotEntrySize)
		d.blocks = len(d.starts)
		return d, nil
	}
	d.indexed = true
	for i := range entries {
		entries[i].hash = g.hash.sum(entries[i].name)
	}
	slices.SortFunc(entries, func(a, b dirEntry) int {
		if a.hash.major != b.hash.major {
			return cmp.Compare(a.hash.major, b.hash.major)
		}
		return cmp.Or(cmp.Compare(a.hash.minor, b.hash.minor), strings.Compare(a.name, b.name))
	})
	d.starts = g.leaves(entries, 0)
	if len(d.starts) > g.indexRootLimit() {
		d.nodes = ceilDiv(len(d.starts), g.indexNodeLimit())
		if d.nodes > g.indexRootLimit() {
			return nil, fmt.Errorf("directory of %d entries: more than an index of two levels holds, and three (large_dir) are not written", len(entries))
		}
	}
	d.blocks = 1 + d.nodes + len(d.starts)
	return d, nil
}

// leaves fills blocks with entries, of which the first has used bytes already,
// and gives the first entry of each. There is at least one.
func (g *geometry) leaves(entries []dirEntry, used int) []int {
	starts, room := []int{0}, g.dirRoom()
	for i := range entries {
		size := dirEntrySize(len(entries[i].name))
		if used += size; used > room {
			starts, used = append(starts, i), size
		}
	}
	return starts
}

// leaf gives the entries of leaf i, none past the last.
func (d *dirLayout) leaf(i int) []dirEntry {
	switch {
	case i >= len(d.starts):
		return nil
	case i == len(d.starts)-1:
		return d.entries[d.starts[i]:]
	}
	return d.entries[d.starts[i]:d.starts[i+1]]
}

// put fills the zeroed b, one block long, with logical block i.
func (d *dirLayout) put(b []byte, i int) {
	seed := d.g.inodeSeed(d.self, d.generation)
	switch {
	case !d.indexed && i == 0:
		room := dotEntrySize
		if len(d.leaf(0)) == 0 {
			room = d.g.dirRoom() - dotEntrySize
		}
		d.putDots(b, room)
		d.putLeaf(b, 2*dotEntrySize, d.leaf(0), seed)
	case !d.indexed:
		d.putLeaf(b, 0, d.leaf(i), seed)
	case i == 0:
		d.putDots(b, d.g.blockSize-dotEntrySize)
		levels, pointers, step := 0, len(d.starts), 1 // to leaves
		if d.nodes > 0 {
			levels, pointers, step = 1, d.nodes, d.g.indexNodeLimit()
		}
		disk.PutIndexRootInfo(b, d.g.hash.version, levels)
		for j := range pointers {
			disk.PutIndexEntry(b, disk.IndexRootAt, j, d.leafHash(j*step), uint32(1+j))
		}
		d.sealIndex(b, disk.IndexRootAt, pointers, d.g.indexRootLimit(), seed)
	case i <= d.nodes:
		disk.PutDirEntry(b, 0, d.g.blockSize, 0, "")
		limit := d.g.indexNodeLimit()
		from := (i - 1) * limit
		pointers := min(limit, len(d.starts)-from)
		for j := range pointers {
			disk.PutIndexEntry(b, disk.IndexNodeAt, j, d.leafHash(from+j), uint32(1+d.nodes+from+j))
		}
		d.sealIndex(b, disk.IndexNodeAt, pointers, limit, seed)
	default:
		d.putLeaf(b, 0, d.leaf(i-1-d.nodes), seed)
	}
}

// leafHash is the hash that an index has for a leaf.
func (d *dirLayout) leafHash(i int) uint32 {
	from := d.starts[i]
	hash := d.entries[from].hash.major
	if from > 0 && d.entries[from-1].hash.major == hash {
		hash |= 1 // this hash began in the leaf before
	}
	return hash
}

func (d *dirLayout) sealIndex(b []byte, at, count, limit int, seed uint32) {
	disk.PutIndexCount(b, at, count, limit)
	if d.g.csum {
		disk.SealIndexBlock(b, at, count, limit, seed)
	}
}

func (d *dirLayout) putDots(b []byte, parentLen int) {
	d.putEntry(b, d.self, dotEntrySize, disk.DirFileType(disk.TypeDir), ".")
	d.putEntry(b[dotEntrySize:], d.parent, parentLen, disk.DirFileType(disk.TypeDir), "..")
}

func (d *dirLayout) putEntry(b []byte, ino uint32, recLen int, fileType byte, name string) {
	if !d.g.filetype {
		fileType = 0
	}
	disk.PutDirEntry(b, ino, recLen, fileType, name)
}

// putLeaf writes entries from offset at, the last one reaching to the tail.
func (d *dirLayout) putLeaf(b []byte, at int, entries []dirEntry, seed uint32) {
	room := d.g.dirRoom()
	if len(entries) == 0 && at == 0 {
		disk.PutDirEntry(b, 0, room, 0, "")
	}
	for i := range entries {
		e := &entries[i]
		size := dirEntrySize(len(e.name))
		if i == len(entries)-1 {
			size = room - at
		}
		d.putEntry(b[at:], e.ino, size, e.fileType, e.name)
		at += size
	}
	if d.g.csum {
		disk.SealDirBlock(b, seed)
	}
}
