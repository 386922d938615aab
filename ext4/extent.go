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
	extents []extent
	tree    []uint64 // blocks of the extent tree, leaves first; set by Finish
	owner   *node
	dead    bool
}

// SizeBytes is the size of the content, holes included.
func (c *Content) SizeBytes() int64 { return c.size }

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

func ceilDiv[T int | uint64 | int64](a, b T) T { return (a + b - 1) / b }

// treeBlocks is the number of blocks that a tree of so many extents takes
// beyond its root in the inode.
func treeBlocks(extents int) (n int) {
	for extents > disk.ExtentsInInode {
		extents = ceilDiv(extents, disk.ExtentsInBlock)
		n += extents
	}
	return n
}

// putTree writes the tree blocks of c and gives the root for the inode.
func (c *Content) putTree(out *output, inodeSeed uint32) (root [60]byte, err error) {
	if len(c.extents) <= disk.ExtentsInInode {
		disk.PutExtentHeader(root[:], len(c.extents), disk.ExtentsInInode, 0)
		for i, e := range c.extents {
			disk.PutExtent(root[:], i, e.logical, e.length, e.start)
		}
		return root, nil
	}
	type child struct {
		logical uint32
		block   uint64
	}
	var level []child
	tree := c.tree
	for rest := c.extents; len(rest) > 0; tree = tree[1:] {
		n := min(len(rest), disk.ExtentsInBlock)
		b, err := out.block(tree[0])
		if err != nil {
			return root, err
		}
		disk.PutExtentHeader(b, n, disk.ExtentsInBlock, 0)
		for i, e := range rest[:n] {
			disk.PutExtent(b, i, e.logical, e.length, e.start)
		}
		disk.SealExtentBlock(b, inodeSeed)
		level = append(level, child{rest[0].logical, tree[0]})
		rest = rest[n:]
	}
	depth := 1
	for ; len(level) > disk.ExtentsInInode; depth++ {
		var above []child
		for rest := level; len(rest) > 0; tree = tree[1:] {
			n := min(len(rest), disk.ExtentsInBlock)
			b, err := out.block(tree[0])
			if err != nil {
				return root, err
			}
			disk.PutExtentHeader(b, n, disk.ExtentsInBlock, depth)
			for i, e := range rest[:n] {
				disk.PutExtentIndex(b, i, e.logical, e.block)
			}
			disk.SealExtentBlock(b, inodeSeed)
			above = append(above, child{rest[0].logical, tree[0]})
			rest = rest[n:]
		}
		level = above
	}
	disk.PutExtentHeader(root[:], len(level), disk.ExtentsInInode, depth)
	for i, e := range level {
		disk.PutExtentIndex(root[:], i, e.logical, e.block)
	}
	return root, nil
}
