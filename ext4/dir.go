package ext4

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strings"

	"banger/ext4/internal/disk"
)

// dirEntry is a name in a directory. The dot entries are never among them.
type dirEntry struct {
	name     string
	ino      uint32
	fileType byte // from disk.DirFileType; left out where the geometry has none
}

const dotEntrySize = 12

// dirEntrySize is the room that an entry with a name of n bytes takes.
func dirEntrySize(n int) int { return disk.DirEntryHeader + align4(n) }

// dirLayout is a directory as it will lie on disk. Its size depends on the
// names alone; inode numbers may be filled in until put.
type dirLayout struct {
	g                        *geometry
	self, parent, generation uint32 // inode numbers; the directory's i_generation
	indexed                  bool
	leaves                   []dirLeaf
	nodes                    int // index blocks below the root, 0 or more
	blocks                   int // may be raised where there is no index: they are empty then
	// entries gives those of a leaf. Indexes rise from call to call, when put
	// is called for the blocks in order.
	entries func(leaf int) []dirEntry
}

type dirLeaf struct {
	entries int
	hash    uint32 // least one, with the lowest bit set if it began in the leaf before; 0 for the first
}

// indexes tells whether a directory has an htree, whose entries take so many
// bytes as dirEntrySize counts.
func (g *geometry) indexes(bytes uint64) bool {
	return g.dirIndex && 2*dotEntrySize+bytes > uint64(g.dirRoom())
}

// layoutDir sorts entries, which it keeps, and lays them out.
func (g *geometry) layoutDir(entries []dirEntry) (*dirLayout, error) {
	bytes := uint64(0)
	for i := range entries {
		bytes += uint64(dirEntrySize(len(entries[i].name)))
	}
	indexed := g.indexes(bytes)
	if indexed {
		keys := make([]dirKey, len(entries))
		for i := range entries {
			keys[i] = dirKey{g.hash.sum(entries[i].name), uint32(i)}
		}
		sortKeys(keys, func(i uint32) string { return entries[i].name })
		sorted := make([]dirEntry, len(entries))
		for i, k := range keys {
			sorted[i] = entries[k.entry]
		}
		copy(entries, sorted)
	} else {
		slices.SortFunc(entries, func(a, b dirEntry) int { return strings.Compare(a.name, b.name) })
	}
	d, err := g.divideDir(indexed, func(yield func(string) bool) {
		for i := range entries {
			if !yield(entries[i].name) {
				return
			}
		}
	})
	if err != nil {
		return nil, err
	}
	starts := make([]int, len(d.leaves)+1)
	for i, l := range d.leaves {
		starts[i+1] = starts[i] + l.entries
	}
	d.entries = func(leaf int) []dirEntry { return entries[starts[leaf]:starts[leaf+1]] }
	return d, nil
}

// dirKey orders an entry of an indexed directory nearly always without its name.
type dirKey struct {
	hash  nameHash
	entry uint32 // as the caller numbers them
}

func sortKeys(keys []dirKey, name func(entry uint32) string) {
	slices.SortFunc(keys, func(a, b dirKey) int {
		if a.hash.major != b.hash.major {
			return cmp.Compare(a.hash.major, b.hash.major)
		}
		if a.hash.minor != b.hash.minor {
			return cmp.Compare(a.hash.minor, b.hash.minor)
		}
		return strings.Compare(name(a.entry), name(b.entry))
	})
}

// divideDir divides names, in the order of their hashes or any if there is no
// index, into blocks: a list, or an htree of at most two levels
// (Documentation/filesystems/ext4/directory.rst). The entries are missing.
func (g *geometry) divideDir(indexed bool, names iter.Seq[string]) (*dirLayout, error) {
	d := &dirLayout{g: g, indexed: indexed, leaves: make([]dirLeaf, 1)}
	used, room := 0, g.dirRoom()
	if !indexed {
		used = 2 * dotEntrySize
	}
	before, count := "", 0
	for name := range names {
		size := dirEntrySize(len(name))
		if used += size; used > room {
			l := dirLeaf{}
			if indexed {
				l.hash = g.hash.sum(name).major
				if g.hash.sum(before).major == l.hash {
					l.hash |= 1
				}
			}
			d.leaves, used = append(d.leaves, l), size
		}
		d.leaves[len(d.leaves)-1].entries++
		before = name
		count++
	}
	d.blocks = len(d.leaves)
	if !indexed {
		return d, nil
	}
	if len(d.leaves) > g.indexRootLimit() {
		d.nodes = ceilDiv(len(d.leaves), g.indexNodeLimit())
		if d.nodes > g.indexRootLimit() {
			return nil, fmt.Errorf("directory of %d entries: more than an index of two levels holds, and three (large_dir) are not written", count)
		}
	}
	d.blocks += 1 + d.nodes
	return d, nil
}

// put fills the zeroed b, one block long, with logical block i.
func (d *dirLayout) put(b []byte, i int) {
	seed := d.g.inodeSeed(d.self, d.generation)
	switch {
	case !d.indexed && i == 0:
		room := dotEntrySize
		if d.leaves[0].entries == 0 {
			room = d.g.dirRoom() - dotEntrySize
		}
		d.putDots(b, room)
		d.putLeaf(b, 2*dotEntrySize, 0, seed)
	case !d.indexed:
		d.putLeaf(b, 0, i, seed)
	case i == 0:
		d.putDots(b, d.g.blockSize-dotEntrySize)
		levels, pointers, step := 0, len(d.leaves), 1 // to leaves
		if d.nodes > 0 {
			levels, pointers, step = 1, d.nodes, d.g.indexNodeLimit()
		}
		disk.PutIndexRootInfo(b, d.g.hash.version, levels)
		for j := range pointers {
			disk.PutIndexEntry(b, disk.IndexRootAt, j, d.leaves[j*step].hash, uint32(1+j))
		}
		d.sealIndex(b, disk.IndexRootAt, pointers, d.g.indexRootLimit(), seed)
	case i <= d.nodes:
		disk.PutDirEntry(b, 0, d.g.blockSize, 0, "")
		limit := d.g.indexNodeLimit()
		from := (i - 1) * limit
		pointers := min(limit, len(d.leaves)-from)
		for j := range pointers {
			disk.PutIndexEntry(b, disk.IndexNodeAt, j, d.leaves[from+j].hash, uint32(1+d.nodes+from+j))
		}
		d.sealIndex(b, disk.IndexNodeAt, pointers, limit, seed)
	default:
		d.putLeaf(b, 0, i-1-d.nodes, seed)
	}
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
// Past the last leaf there are none.
func (d *dirLayout) putLeaf(b []byte, at, leaf int, seed uint32) {
	room := d.g.dirRoom()
	var entries []dirEntry
	if leaf < len(d.leaves) && d.leaves[leaf].entries > 0 {
		entries = d.entries(leaf)
	}
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
