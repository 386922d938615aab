package ext4

import (
	"errors"
	"io"
	"io/fs"

	"banger/ext4/internal/disk"
)

// mapping is what lies at some block of a file: length blocks from start on,
// or, if start is 0, that much of a hole. Allocated blocks that were never
// written read as zeros and are a hole here.
type mapping struct{ start, length uint64 }

// mapBlock finds what lies at a block of n, and how far it goes on.
func (f *FS) mapBlock(n *inode, logical uint64) (mapping, error) {
	if n.has(disk.InodeExtents) {
		return f.mapExtent(n, logical)
	}
	return f.mapIndirect(n, logical)
}

// mapExtent walks down an extent tree
// (Documentation/filesystems/ext4/ifork.rst, "Extent Tree").
func (f *FS) mapExtent(n *inode, logical uint64) (mapping, error) {
	const maxDepth = 5
	node, end := n.iblock(), uint64(1)<<32 // end of what this node covers
	low := uint64(0)                       // and its start
	root := true
	for depth := uint16(0); ; root = false {
		h := disk.DecodeExtentHeader(node)
		room := (len(node) - disk.ExtentSize) / disk.ExtentSize
		switch {
		case h.Magic != disk.ExtentMagic:
			return mapping{}, corrupt("inode %d: extent tree: magic number %#04x", n.ino, h.Magic)
		case h.Entries > h.Max || int(h.Max) > room:
			return mapping{}, corrupt("inode %d: extent tree: node of %d of %d entries", n.ino, h.Entries, h.Max)
		case root && h.Depth > maxDepth || !root && h.Depth != depth:
			return mapping{}, corrupt("inode %d: extent tree: depth %d", n.ino, h.Depth)
		case h.Depth > 0 && h.Entries == 0:
			return mapping{}, corrupt("inode %d: extent tree: inner node without entries", n.ino)
		}
		entry := func(i int) uint64 { return uint64(le.Uint32(node[disk.ExtentSize*(i+1):])) }
		// The last entry that starts at or before the block.
		found := -1
		for lo, hi := 0, int(h.Entries); lo < hi; {
			if mid := (lo + hi) / 2; entry(mid) <= logical {
				found, lo = mid, mid+1
			} else {
				hi = mid
			}
		}
		if found+1 < int(h.Entries) {
			// Binary search went by it, so it is after logical.
			if next := entry(found + 1); next < end {
				end = next
			}
		}
		if found < 0 {
			if !root && h.Depth > 0 {
				return mapping{}, corrupt("inode %d: extent tree: node starts at %d, its parent says %d", n.ino, entry(0), low)
			}
			return mapping{length: end - logical}, nil
		}
		if first := entry(found); first < low {
			return mapping{}, corrupt("inode %d: extent tree: block %d in a node for %d on", n.ino, first, low)
		}
		if h.Depth == 0 {
			return f.mapLeaf(n, node, found, logical, end)
		}
		first, child := disk.DecodeExtentIndex(node, found)
		if !f.validBlock(child, 1) {
			return mapping{}, corrupt("inode %d: extent tree: node at block %d", n.ino, child)
		}
		var err error
		if node, err = f.extentNode(n, child); err != nil {
			return mapping{}, err
		}
		low, depth = uint64(first), h.Depth-1
	}
}

// extentNode reads a block of an extent tree.
func (f *FS) extentNode(n *inode, block uint64) ([]byte, error) {
	b, err := f.dev.block(block)
	if err != nil {
		return nil, err
	}
	if f.geo.csum {
		// The checksum comes right after the last possible entry
		// (ext4_extent_tail), which is not always the end of the block.
		tail := (len(b) / disk.ExtentSize) * disk.ExtentSize
		if disk.CRC32C(f.geo.inodeSeed(n.ino, n.generation()), b[:tail]) != le.Uint32(b[tail:]) {
			return nil, corrupt("inode %d: extent tree: block %d: its checksum does not match", n.ino, block)
		}
	}
	return b, nil
}

func (f *FS) mapLeaf(n *inode, node []byte, i int, logical, end uint64) (mapping, error) {
	first, stored, start := disk.DecodeExtent(node, i)
	length, written := uint64(stored), true
	if length > disk.MaxExtentLen {
		length, written = length-disk.MaxExtentLen, false
	}
	if length == 0 || !f.validBlock(start, length) {
		return mapping{}, corrupt("inode %d: extent of %d blocks at block %d", n.ino, length, start)
	}
	stop := uint64(first) + length
	if stop > end {
		return mapping{}, corrupt("inode %d: extents overlap at block %d of the file", n.ino, end)
	}
	switch {
	case logical >= stop:
		return mapping{length: end - logical}, nil
	case !written:
		return mapping{length: stop - logical}, nil
	}
	return mapping{start + logical - uint64(first), stop - logical}, nil
}

// mapIndirect walks down the block map of ext2 and ext3
// (Documentation/filesystems/ext4/ifork.rst, "Direct/Indirect Block Addressing").
func (f *FS) mapIndirect(n *inode, logical uint64) (mapping, error) {
	const direct = 12
	pointers := uint64(f.geo.blockSize / 4)
	table := n.iblock()
	at, limit := logical, uint64(direct)
	level := 0
	if logical >= direct {
		span := pointers
		at -= direct
		for level = 1; at >= span; level++ {
			if level == 3 {
				return mapping{}, corrupt("inode %d: block %d: beyond what a block map holds", n.ino, logical)
			}
			at -= span
			span *= pointers
		}
		root := le.Uint32(table[4*(direct+level-1):])
		if root == 0 {
			return mapping{length: span - at}, nil
		}
		for ; level > 0; level-- {
			if !f.validBlock(uint64(root), 1) {
				return mapping{}, corrupt("inode %d: block map at block %d", n.ino, root)
			}
			b, err := f.dev.block(uint64(root))
			if err != nil {
				return mapping{}, err
			}
			table, limit = b, pointers
			span /= pointers
			if level == 1 {
				break
			}
			root = le.Uint32(b[4*(at/span):])
			if at %= span; root == 0 {
				return mapping{length: span - at}, nil
			}
		}
	}
	// A run within this table.
	first := uint64(le.Uint32(table[4*at:]))
	m := mapping{first, 1}
	for ; at+m.length < limit; m.length++ {
		next := uint64(le.Uint32(table[4*(at+m.length):]))
		if first == 0 && next != 0 || first != 0 && next != first+m.length {
			break
		}
	}
	if first != 0 && !f.validBlock(first, m.length) {
		return mapping{}, corrupt("inode %d: data at block %d", n.ino, first)
	}
	return m, nil
}

// eachRun calls do for all blocks that an inode has for its content, and for
// those of its map. It ends when do gives an error, as it must when it is
// given a block twice: maps that go in circles do that.
func (f *FS) eachRun(n *inode, do func(start, count uint64) error) error {
	if n.has(disk.InodeExtents) {
		return f.eachExtentRun(n, n.iblock(), -1, do)
	}
	table := n.iblock()
	for i := range 15 {
		if err := f.eachMapRun(n, uint64(le.Uint32(table[4*i:])), max(i-11, 0), do); err != nil {
			return err
		}
	}
	return nil
}

func (f *FS) eachExtentRun(n *inode, node []byte, depth int, do func(start, count uint64) error) error {
	h := disk.DecodeExtentHeader(node)
	const maxDepth = 5
	if h.Magic != disk.ExtentMagic || h.Entries > h.Max || int(h.Max) > (len(node)-disk.ExtentSize)/disk.ExtentSize ||
		h.Depth > maxDepth || depth >= 0 && int(h.Depth) != depth {
		return corrupt("inode %d: extent tree: a node of depth %d", n.ino, h.Depth)
	}
	for i := range int(h.Entries) {
		if h.Depth == 0 {
			_, length, start := disk.DecodeExtent(node, i)
			if length > disk.MaxExtentLen {
				length -= disk.MaxExtentLen
			}
			if err := do(start, uint64(length)); err != nil {
				return err
			}
			continue
		}
		_, child := disk.DecodeExtentIndex(node, i)
		// Read before do, which may be the end of the block.
		b, err := f.extentNode(n, child)
		if err == nil {
			err = do(child, 1)
		}
		if err == nil {
			err = f.eachExtentRun(n, b, int(h.Depth)-1, do)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *FS) eachMapRun(n *inode, block uint64, level int, do func(start, count uint64) error) error {
	if block == 0 {
		return nil
	}
	if level == 0 {
		return do(block, 1)
	}
	b, err := f.dev.block(block)
	if err == nil {
		err = do(block, 1)
	}
	if err != nil {
		return err
	}
	for ; len(b) > 0; b = b[4:] {
		if err := f.eachMapRun(n, uint64(le.Uint32(b)), level-1, do); err != nil {
			return err
		}
	}
	return nil
}

// A FileReader reads an object that is not a directory. It is an [io.ReaderAt] and
// an [io.Seeker].
type FileReader struct {
	fs     *FS
	inode  *inode
	path   string
	inline []byte // all bytes, if they lie in the inode
	at     int64
	read   uint64 // bytes that sequential reads have taken from the image
	closed bool

	// For sequential reads only.
	last   mapping // of the last block looked up
	lastAt uint64
	part   []byte // the last block read in part
	partAt uint64
}

func (f *FS) openFile(n *inode) (*FileReader, error) {
	file := &FileReader{fs: f, inode: n}
	if n.has(disk.InodeInlineData) {
		b, err := f.inlineData(n)
		if err != nil {
			return nil, err
		}
		if uint64(len(b)) < n.size {
			return nil, corrupt("inode %d: %d bytes inline, not %d", n.ino, len(b), n.size)
		}
		file.inline = b[:n.size]
	}
	return file, nil
}

// size is that of the bytes that can be read.
func (f *FileReader) size() int64 {
	if k := f.inode.kind(); k != disk.TypeRegular && k != disk.TypeSymlink && k != disk.TypeDir {
		return 0
	}
	return int64(f.inode.size)
}

// Stat describes the file.
func (f *FileReader) Stat() (fs.FileInfo, error) {
	if f.closed {
		return nil, pathError("stat", f.path, fs.ErrClosed)
	}
	return &fileInfo{base(f.path), f.fs.stat(f.inode)}, nil
}

// Close frees nothing; a closed one reads no more.
func (f *FileReader) Close() error {
	if f.closed {
		return pathError("close", f.path, fs.ErrClosed)
	}
	f.closed = true
	return nil
}

// Read reads on from where the last Read or Seek ended. A file that has more
// data than its image has blocks is damaged.
func (f *FileReader) Read(p []byte) (int, error) {
	n, err := f.readAt(p, f.at, true)
	f.at += int64(n)
	return n, err
}

// ReadAt reads at any offset. Calls may run side by side.
func (f *FileReader) ReadAt(p []byte, offset int64) (int, error) {
	if offset < 0 {
		return 0, pathError("read", f.path, fs.ErrInvalid)
	}
	done := 0
	for done < len(p) {
		n, err := f.readAt(p[done:], offset+int64(done), false)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// Seek sets the offset of the next Read.
func (f *FileReader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		offset += f.at
	case io.SeekEnd:
		offset += f.size()
	default:
		return 0, pathError("seek", f.path, fs.ErrInvalid)
	}
	if f.closed || offset < 0 {
		return 0, pathError("seek", f.path, fs.ErrInvalid)
	}
	f.at, f.read = offset, 0
	return offset, nil
}

// NextData finds the next bytes at or after an offset that are not a hole:
// [start, end), with a hole or the end of the file after them. It gives io.EOF
// if there are none. Bytes that lie in the inode count as data.
func (f *FileReader) NextData(offset int64) (start, end int64, err error) {
	size := f.size()
	switch {
	case offset < 0 || f.closed:
		return 0, 0, pathError("seek", f.path, fs.ErrInvalid)
	case offset >= size:
		return 0, 0, io.EOF
	case f.inline != nil:
		return offset, size, nil
	}
	bs := int64(f.fs.geo.blockSize)
	found := false
	for at := offset; at < size; {
		m, err := f.fs.mapBlock(f.inode, uint64(at/bs))
		if err != nil {
			return 0, 0, pathError("seek", f.path, err)
		}
		if m.start == 0 && found {
			return start, at, nil
		}
		if m.start != 0 && !found {
			start, found = at, true
		}
		at = (at/bs + int64(m.length)) * bs
	}
	if !found {
		return 0, 0, io.EOF
	}
	return start, size, nil
}

func (f *FileReader) readAt(p []byte, offset int64, sequential bool) (int, error) {
	size := f.size()
	switch {
	case f.closed:
		return 0, pathError("read", f.path, fs.ErrClosed)
	case len(p) == 0:
		return 0, nil
	case offset >= size:
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), size-offset)]
	if f.inline != nil {
		return copy(p, f.inline[offset:]), nil
	}
	bs := int64(f.fs.geo.blockSize)
	logical, within := uint64(offset/bs), offset%bs
	m, err := f.mapping(logical, sequential)
	if err != nil {
		return 0, pathError("read", f.path, err)
	}
	if room := int64(m.length)*bs - within; int64(len(p)) > room {
		p = p[:room]
	}
	if m.start == 0 {
		clear(p)
		return len(p), nil
	}
	if sequential {
		if f.read += uint64(len(p)); f.read > 2*f.fs.super.Blocks*uint64(bs) {
			return 0, pathError("read", f.path, corrupt("inode %d: more data than the image has blocks", f.inode.ino))
		}
	}
	n, err := f.readBlocks(p, m.start, within, sequential)
	return n, pathError("read", f.path, err)
}

// mapping is mapBlock, with the memory of one answer for sequential reads.
func (f *FileReader) mapping(logical uint64, sequential bool) (mapping, error) {
	if !sequential {
		return f.fs.mapBlock(f.inode, logical)
	}
	m := f.last
	if ahead := logical - f.lastAt; logical >= f.lastAt && ahead < m.length {
		if m.length -= ahead; m.start != 0 {
			m.start += ahead
		}
		return m, nil
	}
	m, err := f.fs.mapBlock(f.inode, logical)
	if err == nil {
		f.last, f.lastAt = m, logical
	}
	return m, err
}

// readBlocks fills p from within bytes after the start of a block on: whole
// blocks, or a part of the first.
func (f *FileReader) readBlocks(p []byte, block uint64, within int64, sequential bool) (int, error) {
	bs := int64(f.fs.geo.blockSize)
	if whole := int64(len(p)) / bs * bs; within == 0 && whole > 0 {
		err := f.fs.dev.read(block, p[:whole])
		if err != nil {
			return 0, err
		}
		return int(whole), nil
	}
	if sequential && f.part != nil && f.partAt == block {
		return copy(p, f.part[within:]), nil
	}
	b := make([]byte, bs)
	if err := f.fs.dev.read(block, b); err != nil {
		return 0, err
	}
	if sequential {
		f.part, f.partAt = b, block
	}
	return copy(p, b[within:]), nil
}

var errIsDir = errors.New("is a directory")
