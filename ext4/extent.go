package ext4

import "banger/ext4/internal/disk"

// extent is a run of blocks of one object. No extent that belongs to an
// object is longer than disk.MaxExtentLen.
type extent struct {
	logical uint32 // first block within the object
	length  uint32 // blocks
	start   uint64 // first block in the image
}

// Content is bytes that lie in the image already. It belongs to the Writer
// that placed it and to at most one Inode.
type Content struct {
	writer  *Writer
	size    int64
	extents []extent // until it is given to an Inode
	first   [1]extent
	state   contentState
}

type contentState byte

const (
	contentFree  contentState = iota
	contentOwned              // by an inode that was added
	contentDead               // discarded
)

func newContent(w *Writer, size int64) *Content {
	c := &Content{writer: w, size: size}
	c.extents = c.first[:0] // most have one
	return c
}

// SizeBytes is the size of the content, holes included.
func (c *Content) SizeBytes() int64 { return c.size }

// plain tells whether the content is one extent without holes, or empty, and
// where it starts.
func (c *Content) plain() (start uint32, ok bool) {
	switch {
	case c.size == 0:
		return 0, true
	case len(c.extents) != 1 || c.size > disk.MaxExtentLen*disk.BlockSize:
		return 0, false
	}
	e := c.extents[0]
	return uint32(e.start), int64(e.length) == ceilDiv(c.size, disk.BlockSize)
}

// blocks is the number of data blocks.
func (c *Content) blocks() (n uint64) {
	for _, e := range c.extents {
		n += uint64(e.length)
	}
	return n
}

// add appends length blocks, growing the last extent where it can.
func (c *Content) add(logical uint32, start uint64, length uint32) {
	for length > 0 {
		if i := len(c.extents) - 1; i >= 0 {
			last := &c.extents[i]
			if last.logical+last.length == logical && last.start+uint64(last.length) == start && last.length < disk.MaxExtentLen {
				n := min(length, disk.MaxExtentLen-last.length)
				last.length += n
				logical, start, length = logical+n, start+uint64(n), length-n
				continue
			}
		}
		n := min(length, disk.MaxExtentLen)
		c.extents = append(c.extents, extent{logical, n, start})
		logical, start, length = logical+n, start+uint64(n), length-n
	}
}

func ceilDiv[T int | uint32 | uint64 | int64](a, b T) T { return (a + b - 1) / b }

// treeBlocks is the number of blocks that a tree of so many extents takes
// beyond its root in the inode.
func (g *geometry) treeBlocks(extents int) (n int) {
	for extents > disk.ExtentsInInode {
		extents = ceilDiv(extents, g.extentsInBlock())
		n += extents
	}
	return n
}

// putTree encodes an extent tree and gives its root for the inode. tree are its
// blocks, leaves first, as many as treeBlocks says; block gives each of them
// zeroed, to be filled before the next.
func (g *geometry) putTree(extents []extent, tree []uint64, inodeSeed uint32, block func(uint64) ([]byte, error)) (root [60]byte, err error) {
	if len(extents) <= disk.ExtentsInInode {
		disk.PutExtentHeader(root[:], len(extents), disk.ExtentsInInode, 0)
		for i, e := range extents {
			disk.PutExtent(root[:], i, e.logical, e.length, e.start)
		}
		return root, nil
	}
	type child struct {
		logical uint32
		block   uint64
	}
	// level writes the blocks of one level, of count entries, and gives what
	// the level above points to.
	level := func(count, depth int, logical func(int) uint32, put func(b []byte, i, entry int)) ([]child, error) {
		var above []child
		for from := 0; from < count; from += g.extentsInBlock() {
			n := min(count-from, g.extentsInBlock())
			b, err := block(tree[0])
			if err != nil {
				return nil, err
			}
			disk.PutExtentHeader(b, n, g.extentsInBlock(), depth)
			for i := range n {
				put(b, i, from+i)
			}
			if g.csum {
				disk.SealExtentBlock(b, inodeSeed)
			}
			above = append(above, child{logical(from), tree[0]})
			tree = tree[1:]
		}
		return above, nil
	}
	children, err := level(len(extents), 0, func(i int) uint32 { return extents[i].logical }, func(b []byte, i, entry int) {
		e := &extents[entry]
		disk.PutExtent(b, i, e.logical, e.length, e.start)
	})
	depth := 1
	for ; err == nil && len(children) > disk.ExtentsInInode; depth++ {
		list := children
		children, err = level(len(list), depth, func(i int) uint32 { return list[i].logical }, func(b []byte, i, entry int) {
			disk.PutExtentIndex(b, i, list[entry].logical, list[entry].block)
		})
	}
	if err != nil {
		return root, err
	}
	disk.PutExtentHeader(root[:], len(children), disk.ExtentsInInode, depth)
	for i, e := range children {
		disk.PutExtentIndex(root[:], i, e.logical, e.block)
	}
	return root, nil
}
