package ext4

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"

	"banger/ext4/internal/disk"
)

// newInode is an inode to be made.
type newInode struct {
	*Inode
	times [4]disk.Timestamp // atime, mtime, ctime, crtime
}

func (n *newInode) isDir() bool { return n.Mode&disk.TypeMask == disk.TypeDir }

// checkInode refuses what this file system cannot hold.
func (e *Editor) checkInode(in *Inode) (newInode, error) {
	n := newInode{Inode: in}
	if in.Content != nil || in.writer != nil {
		return n, fmt.Errorf("an inode of a Writer: %w", fs.ErrInvalid)
	}
	var err error
	if n.times, err = in.check(); err != nil {
		return n, err
	}
	if len(in.Target) >= e.fs.geo.blockSize {
		return n, fmt.Errorf("symlink target: %d bytes, more than the %d of a block", len(in.Target), e.fs.geo.blockSize-1)
	}
	for i, t := range [...]bool{in.Atime.IsZero(), in.Mtime.IsZero(), in.Ctime.IsZero(), in.Crtime.IsZero()} {
		if t {
			n.times[i] = e.now
		}
	}
	fast := in.Target != "" && len(in.Target) <= maxFastTarget
	_, err = e.fs.geo.encodeXattrsOf(fast, in.Xattrs, max(e.fs.geo.inodeSize-disk.GoodOldInode-disk.ExtraIsize, 0))
	return n, err
}

// put makes an inode and gives it the name at the end of a walk.
func (e *Editor) put(w *walk, n *newInode, name string, content io.Reader, sizeBytes int64) error {
	dir, old := w.last(), (*inode)(nil)
	if w.name == "" {
		dir, old = w.dirs[len(w.dirs)-2], w.last()
	}
	ino, unused, err := e.blocks.takeInode(dir.ino, n.isDir())
	if err != nil {
		return err
	}
	e.blocks.goal = uint64(ino-1) / uint64(e.fs.super.InodesPerGroup)
	in := disk.Inode{
		Mode: n.Mode, UID: n.UID, GID: n.GID, Links: 1,
		Atime: n.times[0], Mtime: n.times[1], Ctime: n.times[2], Birth: n.times[3],
	}
	made := &inode{ino: ino, mode: n.Mode}
	c := new(Content)
	switch kind := n.Mode & disk.TypeMask; kind {
	case disk.TypeRegular:
		c, err = e.stream(content, sizeBytes)
	case disk.TypeDir:
		in.Links = 2
		l, layoutErr := e.fs.geo.layoutDir(nil)
		if err = layoutErr; err == nil {
			l.self, l.parent = ino, dir.ino
			c, err = e.putDirBlocks(l)
		}
	case disk.TypeSymlink:
		if len(n.Target) <= maxFastTarget {
			in.Size = uint64(len(n.Target))
			copy(in.Block[:], n.Target)
		} else {
			c, err = e.stream(bytes.NewReader([]byte(n.Target)), int64(len(n.Target)))
		}
	case disk.TypeChar, disk.TypeBlock:
		in.PutDevice(n.Major, n.Minor)
	}
	if err != nil {
		return err
	}
	raw := make([]byte, e.fs.geo.inodeSize)
	in.Encode(raw)
	if k := n.Mode & disk.TypeMask; k == disk.TypeRegular || k == disk.TypeDir || len(n.Target) > maxFastTarget {
		if err := e.setContent(raw, made, c); err != nil {
			return err
		}
	}
	if err := e.storeInode(ino, unused, raw); err != nil {
		return err
	}
	if err := e.setXattrs(ino, n.Xattrs); err != nil {
		return err
	}
	entry := dirEntry{name: name, ino: ino, fileType: disk.DirFileType(n.Mode)}
	if old != nil {
		if err := e.relinkName(dir, &entry); err != nil {
			return err
		}
		return e.drop(old)
	}
	if err := e.linkName(dir, &entry); err != nil {
		return err
	}
	if n.isDir() {
		return e.addLinks(dir.ino, 1)
	}
	return nil
}

// storeInode puts a new inode into the table, of which that block was perhaps
// never cleared.
func (e *Editor) storeInode(ino uint32, unused bool, raw []byte) error {
	block, offset, err := e.fs.inodeAt(ino)
	if err != nil {
		return err
	}
	get := e.change
	if unused {
		get = e.replace
	}
	b, err := get(block)
	if err != nil {
		return err
	}
	copy(b[offset:], raw)
	if e.fs.geo.csum {
		disk.SealInode(b[offset:][:len(raw)], ino, e.fs.geo.seed)
	}
	return nil
}

// stream writes content into blocks that are free in the image, where nothing
// refers to them yet. Blocks of zeros become holes.
func (e *Editor) stream(r io.Reader, sizeBytes int64) (*Content, error) {
	c := &Content{size: sizeBytes}
	if sizeBytes == 0 {
		return c, nil
	}
	if err := e.begin(); err != nil {
		return nil, err
	}
	bs := e.fs.geo.blockSize
	buf := make([]byte, 1<<20)
	logical := uint32(0)
	for left := sizeBytes; left > 0; {
		n := int(min(left, int64(len(buf))))
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return nil, readError(sizeBytes, sizeBytes-left, err)
		}
		left -= int64(n)
		padded := ceilDiv(n, bs) * bs
		clear(buf[n:padded])
		unit := granule(len(c.extents)) * bs
		isZero := func(at int) bool {
			part := buf[at:min(at+unit, padded)]
			return bytes.Equal(part, zeros[:len(part)])
		}
		for at := 0; at < padded; {
			from := at
			if isZero(at) {
				at = min(at+unit, padded)
				logical += uint32((at - from) / bs)
				continue
			}
			for at < padded && !isZero(at) {
				at = min(at+unit, padded)
			}
			for data := buf[from:at]; len(data) > 0; {
				got, err := e.blocks.take(uint64(len(data) / bs))
				if err != nil {
					return nil, fmt.Errorf("content of %d bytes, %d of them placed: %w", sizeBytes, c.blocks()*uint64(bs), err)
				}
				part := data[:int(got.length)*bs]
				if _, err := e.img.WriteAt(part, int64(got.start)*int64(bs)); err != nil {
					return nil, fmt.Errorf("image: writing at block %d: %w", got.start, err)
				}
				c.add(logical, got.start, uint32(got.length))
				logical += uint32(got.length)
				data = data[len(part):]
			}
		}
	}
	var probe [1]byte
	if n, err := r.Read(probe[:]); n > 0 {
		return nil, fmt.Errorf("content of %d bytes: input is longer", sizeBytes)
	} else if err != nil && err != io.EOF {
		return nil, fmt.Errorf("content of %d bytes: after its end: %w", sizeBytes, err)
	}
	return c, nil
}

// setContent makes an inode hold c, whose map it writes.
func (e *Editor) setContent(raw []byte, n *inode, c *Content) error {
	f := e.fs
	var root [60]byte
	blocks := c.blocks()
	flags := le.Uint32(raw[disk.InodeFlagsAt:]) &^ (disk.InodeExtents | disk.InodeInlineData | disk.InodeHugeFile)
	if f.super.Incompat&disk.IncompatExtents != 0 {
		flags |= disk.InodeExtents
		var tree []uint64
		for range f.geo.treeBlocks(len(c.extents)) {
			r, err := e.blocks.take(1)
			if err != nil {
				return err
			}
			tree = append(tree, r.start)
		}
		blocks += uint64(len(tree))
		var err error
		root, err = f.geo.putTree(c.extents, tree, f.geo.inodeSeed(n.ino, le.Uint32(raw[disk.InodeGenerationAt:])), e.replace)
		if err != nil {
			return err
		}
	} else {
		m := &blockMap{e: e}
		for _, x := range c.extents {
			for i := range x.length {
				if err := m.set(uint64(x.logical+i), x.start+uint64(i)); err != nil {
					return err
				}
			}
		}
		root = m.root
		blocks += m.blocks
	}
	if n.kind() == disk.TypeRegular && c.size >= 1<<31 {
		if err := e.addFeatures(0, disk.ROCompatLargeFile); err != nil {
			return err
		}
	}
	sectors := blocks * uint64(f.geo.blockSize/512)
	sectors += e.otherSectors(raw)
	if sectors >= 1<<32 {
		if f.super.ROCompat&disk.ROCompatHugeFile == 0 {
			return fmt.Errorf("file of %d blocks: more than a file system without huge_file holds", blocks)
		}
		le.PutUint16(raw[disk.InodeBlocksHiAt:], uint16(sectors>>32))
	}
	le.PutUint32(raw[disk.InodeBlocksAt:], uint32(sectors))
	le.PutUint32(raw[disk.InodeFlagsAt:], flags)
	le.PutUint32(raw[disk.InodeSizeAt:], uint32(c.size))
	if n.kind() == disk.TypeRegular || f.super.Incompat&disk.IncompatLargeDir != 0 {
		le.PutUint32(raw[disk.InodeSizeHiAt:], uint32(c.size>>32))
	}
	copy(raw[disk.InodeBlockAt:], root[:])
	return nil
}

// otherSectors is what an inode's count has of its xattrs.
func (e *Editor) otherSectors(raw []byte) uint64 {
	n := uint64(0)
	if le.Uint32(raw[disk.InodeXattrBlockAt:]) != 0 || le.Uint16(raw[disk.InodeXattrHiAt:]) != 0 {
		n = uint64(e.fs.geo.blockSize / 512)
	}
	return n + e.fs.valueSectors(&inode{raw: raw})
}

// addFeatures sets features that what is written needs and any kernel knows,
// as the kernel itself would (ext4_update_dynamic_rev of fs/ext4/super.c).
func (e *Editor) addFeatures(compat, roCompat uint32) error {
	f := e.fs
	if f.super.Compat&compat == compat && f.super.ROCompat&roCompat == roCompat {
		return nil
	}
	b, err := e.change(f.superBlock())
	if err != nil {
		return err
	}
	s := b[disk.SuperblockOffset%f.geo.blockSize:]
	f.super.Compat |= compat
	f.super.ROCompat |= roCompat
	if f.super.Revision == 0 {
		f.super.Revision = 1
		le.PutUint32(s[disk.SuperRevisionAt:], 1)
		le.PutUint32(s[disk.SuperFirstInoAt:], f.super.FirstIno)
		le.PutUint16(s[disk.SuperInodeSizeAt:], f.super.InodeSize)
	}
	le.PutUint32(s[disk.SuperCompatAt:], f.super.Compat)
	le.PutUint32(s[disk.SuperROCompatAt:], f.super.ROCompat)
	return nil
}

// blockMap builds the block map of ext2 and ext3, block by block in order.
type blockMap struct {
	e      *Editor
	root   [60]byte
	blocks uint64 // of the map itself
}

// set makes logical block at lie at block.
func (m *blockMap) set(logical, block uint64) error {
	const direct = 12
	pointers := uint64(m.e.fs.geo.blockSize / 4)
	slot := m.root[:]
	if logical < direct {
		le.PutUint32(slot[4*logical:], uint32(block))
		return nil
	}
	at, span, level := logical-direct, pointers, 1
	for ; at >= span; level++ {
		if level == 3 {
			return fmt.Errorf("block %d of a file: beyond what a file system without extents holds", logical)
		}
		at -= span
		span *= pointers
	}
	slot = slot[4*(direct+level-1):]
	for ; level > 0; level-- {
		next := uint64(le.Uint32(slot))
		if next == 0 {
			r, err := m.e.blocks.take(1)
			if err != nil {
				return err
			}
			if _, err := m.e.replace(r.start); err != nil {
				return err
			}
			m.blocks++
			next = r.start
			le.PutUint32(slot, uint32(next))
		}
		span /= pointers
		slot = m.e.fs.dev.changed[next][4*(at/span):]
		at %= span
	}
	le.PutUint32(slot, uint32(block))
	return nil
}

// putDirBlocks writes a directory into fresh blocks.
func (e *Editor) putDirBlocks(l *dirLayout) (*Content, error) {
	c := &Content{size: int64(l.blocks) * int64(e.fs.geo.blockSize)}
	for i := 0; i < l.blocks; {
		r, err := e.blocks.take(uint64(l.blocks - i))
		if err != nil {
			return nil, err
		}
		c.add(uint32(i), r.start, uint32(r.length))
		for j := range r.length {
			b, err := e.replace(r.start + j)
			if err != nil {
				return nil, err
			}
			l.put(b, i)
			i++
		}
	}
	return c, nil
}

// setXattrs replaces all xattrs of an inode that has no inline data.
func (e *Editor) setXattrs(ino uint32, set map[string][]byte) error {
	n, err := e.fs.inode(ino)
	if err != nil {
		return err
	}
	before := e.otherSectors(n.raw)
	if err := e.releaseXattrs(n); err != nil {
		return err
	}
	room := e.fs.xattrRoom(n.raw)
	x, err := e.fs.geo.encodeXattrsOf(n.fastLink(), set, room)
	if err != nil {
		return err
	}
	block := uint64(0)
	if x != nil {
		if err := e.addFeatures(disk.CompatExtAttr, 0); err != nil {
			return err
		}
		for i := range x.large {
			if err := e.putValue(x, i, ino); err != nil {
				return err
			}
		}
		if x.block != nil {
			r, err := e.blocks.take(1)
			if err != nil {
				return err
			}
			b, err := e.replace(r.start)
			if err != nil {
				return err
			}
			x.put(&e.fs.geo, b, r.start)
			block = r.start
		}
	}
	return e.changeInode(ino, func(raw []byte) error {
		if room > 0 {
			body := raw[e.fs.geo.inodeSize-room:]
			clear(body)
			if x != nil {
				copy(body, x.body)
			}
		}
		sectors := uint64(le.Uint32(raw[disk.InodeBlocksAt:])) | uint64(le.Uint16(raw[disk.InodeBlocksHiAt:]))<<32
		le.PutUint32(raw[disk.InodeXattrBlockAt:], uint32(block))
		if e.fs.super.Incompat&disk.Incompat64bit != 0 {
			le.PutUint16(raw[disk.InodeXattrHiAt:], uint16(block>>32))
		}
		if !n.has(disk.InodeHugeFile) {
			sectors += e.otherSectors(raw) - before
		}
		le.PutUint32(raw[disk.InodeBlocksAt:], uint32(sectors))
		le.PutUint16(raw[disk.InodeBlocksHiAt:], uint16(sectors>>32))
		return nil
	})
}

// putValue makes the inode that holds large value i of a set.
func (e *Editor) putValue(x *xattrSet, i int, owner uint32) error {
	value := x.large[i].value
	ino, unused, err := e.blocks.takeInode(owner, false)
	if err != nil {
		return err
	}
	c := &Content{size: int64(len(value))}
	bs := e.fs.geo.blockSize
	for rest, logical := value, uint32(0); len(rest) > 0; {
		r, err := e.blocks.take(uint64(ceilDiv(len(rest), bs)))
		if err != nil {
			return err
		}
		for j := range r.length {
			b, err := e.replace(r.start + j)
			if err != nil {
				return err
			}
			rest = rest[copy(b, rest):]
		}
		c.add(logical, r.start, uint32(r.length))
		logical += uint32(r.length)
	}
	hash := disk.CRC32C(e.fs.geo.seed, value)
	in := disk.Inode{
		Mode: disk.TypeRegular | 0o600, Links: 1, Flags: disk.InodeEA,
		Atime: disk.Timestamp{Sec: hash}, Version: 1, Birth: e.now,
	}
	raw := make([]byte, e.fs.geo.inodeSize)
	in.Encode(raw)
	if err := e.setContent(raw, &inode{ino: ino, mode: in.Mode}, c); err != nil {
		return err
	}
	if err := e.storeInode(ino, unused, raw); err != nil {
		return err
	}
	x.link(i, ino, hash)
	return nil
}

// uninline moves the data of an inode into blocks.
func (e *Editor) uninline(n *inode) error {
	set, err := e.fs.xattrs(n)
	if err != nil {
		return err
	}
	var c *Content
	if n.isDir() {
		list, err := e.fs.list(n)
		if err != nil {
			return err
		}
		parent, err := e.fs.parent(n)
		if err != nil {
			return err
		}
		return e.rebuild(n, parent, list)
	}
	data, err := e.fs.inlineData(n)
	if err != nil {
		return err
	}
	if uint64(len(data)) < n.size {
		return corrupt("inode %d: %d bytes inline, not %d", n.ino, len(data), n.size)
	}
	if c, err = e.stream(bytes.NewReader(data[:n.size]), int64(n.size)); err != nil {
		return err
	}
	return e.moveOut(n, c, set)
}

// moveOut gives an inode with inline data content in blocks, and its xattrs
// the room that the data had.
func (e *Editor) moveOut(n *inode, c *Content, set map[string][]byte) error {
	err := e.changeInode(n.ino, func(raw []byte) error {
		// The xattr that held the data goes; what held the others is
		// released with them.
		return e.setContent(raw, n, c)
	})
	if err != nil {
		return err
	}
	return e.setXattrs(n.ino, set)
}
