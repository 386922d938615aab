package ext4

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"banger/ext4/internal/disk"
)

// ErrNoInodes is wrapped by the error of an edit for which no inode is left.
var ErrNoInodes = errors.New("no inode left in the image")

// allocator hands out and takes back blocks and inodes of an image that is
// being edited. What the image has in use stays untouched until the change is
// committed: a block that the edit frees is not given out again by it.
type allocator struct {
	fs     *FS
	groups map[uint64]*group
	system []run  // blocks of superblocks, descriptors, bitmaps and inode tables, sorted
	goal   uint64 // group to look in first for blocks
	left   uint64 // blocks that can be given out
}

// group is a block group of which something has been looked at.
type group struct {
	desc    disk.GroupDesc
	before  []byte // block bitmap as the image has it
	blocks  []byte // and as it will be
	inodes  []byte // inode bitmap as it will be; nil if not read
	changed bool
}

func newAllocator(f *FS) (*allocator, error) {
	a := &allocator{fs: f, groups: make(map[uint64]*group)}
	return a, a.findSystem()
}

// findSystem lists the blocks that no file may own.
func (a *allocator) findSystem() error {
	f, s := a.fs, &a.fs.super
	bs := uint64(f.geo.blockSize)
	table := ceilDiv(uint64(s.InodesPerGroup)*uint64(s.InodeSize), bs)
	perBlock := bs / uint64(s.DescSize)
	gdt := ceilDiv(f.groups, perBlock)
	list := []run{{0, uint64(s.FirstDataBlock) + 1}}
	for g := range f.groups {
		d, err := f.desc(g)
		if err != nil {
			return err
		}
		a.left += uint64(d.FreeBlocks)
		list = append(list, run{d.BlockBitmap, 1}, run{d.InodeBitmap, 1}, run{d.InodeTable, table})
		list = append(list, run{f.groupStart(g), f.superBlocks(g, gdt, perBlock)})
	}
	slices.SortFunc(list, func(a, b run) int { return cmp.Compare(a.start, b.start) })
	for _, r := range list {
		if r.length == 0 {
			continue
		}
		if n := len(a.system); n > 0 && a.system[n-1].end() >= r.start {
			a.system[n-1].length = max(a.system[n-1].end(), r.end()) - a.system[n-1].start
		} else {
			a.system = append(a.system, r)
		}
	}
	return nil
}

// superBlocks is what a group's superblock, descriptors and the room reserved
// for more of them take at its start (fs/ext4/balloc.c, ext4_num_base_meta_blocks).
func (f *FS) superBlocks(g, gdt, perBlock uint64) uint64 {
	s := &f.super
	n := uint64(0)
	if f.groupHasSuper(g) {
		n = 1
	}
	meta := g / perBlock // block of descriptors that this group is in
	if s.Incompat&disk.IncompatMetaBG == 0 || meta < uint64(s.FirstMetaBG) {
		if n > 0 {
			if s.Incompat&disk.IncompatMetaBG != 0 {
				gdt = uint64(s.FirstMetaBG)
			}
			n += gdt + uint64(s.ReservedGDT)
		}
		return n
	}
	if at := g % perBlock; at <= 1 || at == perBlock-1 {
		n++ // a copy of its block of descriptors
	}
	return n
}

// where tells whether a run lies before a block, has it, or lies after it.
func (r run) where(block uint64) int {
	switch {
	case r.end() <= block:
		return -1
	case r.start > block:
		return 1
	}
	return 0
}

// isSystem tells whether any of n blocks at start is one that no file may own.
func (a *allocator) isSystem(start, n uint64) bool {
	i, found := slices.BinarySearchFunc(a.system, start, run.where)
	return found || i < len(a.system) && a.system[i].start < start+n
}

// groupBlocks is the number of blocks in a group.
func (f *FS) groupBlocks(g uint64) uint64 {
	return min(uint64(f.super.BlocksPerGroup), f.super.Blocks-f.groupStart(g))
}

// group reads a group's descriptor and block bitmap.
func (a *allocator) group(n uint64) (*group, error) {
	if g := a.groups[n]; g != nil {
		return g, nil
	}
	f := a.fs
	d, err := f.desc(n)
	if err != nil {
		return nil, err
	}
	g := &group{desc: d}
	size := f.groupBlocks(n)
	if f.hasUninit() && d.Flags&disk.GroupBlockUninit != 0 {
		g.before = make([]byte, f.geo.blockSize)
		first := f.groupStart(n)
		for _, r := range a.system {
			if r.start < first+size && r.end() > first {
				from, to := max(r.start, first), min(r.end(), first+size)
				setBits(g.before, int(from-first), int(to-from))
			}
		}
		setBits(g.before, int(size), 8*f.geo.blockSize-int(size))
	} else {
		b, err := f.dev.block(d.BlockBitmap)
		if err != nil {
			return nil, fmt.Errorf("group %d: block bitmap: %w", n, err)
		}
		if f.geo.csum && f.bitmapCsum(b[:f.super.BlocksPerGroup/8]) != d.BlockBitmapCsum {
			return nil, corrupt("group %d: block bitmap: its checksum does not match", n)
		}
		g.before = b
	}
	g.blocks = bytes.Clone(g.before)
	a.groups[n] = g
	return g, nil
}

// bitmapCsum is a bitmap's checksum, of which descriptors of 32 bytes hold half.
func (f *FS) bitmapCsum(b []byte) uint32 {
	crc := disk.BitmapCsum(f.geo.seed, b)
	if f.super.DescSize < disk.DescSize {
		crc &= 0xFFFF
	}
	return crc
}

// hasUninit tells whether groups can say that their bitmaps are not there yet.
func (f *FS) hasUninit() bool {
	return f.super.ROCompat&(disk.ROCompatGDTCsum|disk.ROCompatMetadataCsum) != 0
}

// inodeBitmap reads a group's inode bitmap, if it has not been.
func (a *allocator) inodeBitmap(n uint64, g *group) error {
	if g.inodes != nil {
		return nil
	}
	f := a.fs
	if f.hasUninit() && g.desc.Flags&disk.GroupInodeUninit != 0 {
		g.inodes = make([]byte, f.geo.blockSize)
		per := int(f.super.InodesPerGroup)
		setBits(g.inodes, per, 8*f.geo.blockSize-per)
		return nil
	}
	b, err := f.dev.block(g.desc.InodeBitmap)
	if err != nil {
		return fmt.Errorf("group %d: inode bitmap: %w", n, err)
	}
	if f.geo.csum && f.bitmapCsum(b[:f.super.InodesPerGroup/8]) != g.desc.InodeBitmapCsum {
		return corrupt("group %d: inode bitmap: its checksum does not match", n)
	}
	g.inodes = bytes.Clone(b)
	return nil
}

func bit(b []byte, i int) bool { return b[i/8]&(1<<(i%8)) != 0 }

// take gives a run of up to n blocks. It is found in the group of the last
// one, or the next that has any.
func (a *allocator) take(n uint64) (run, error) {
	for i := range a.fs.groups {
		number := (a.goal + i) % a.fs.groups
		g, err := a.group(number)
		if err != nil {
			return run{}, err
		}
		if g.desc.FreeBlocks == 0 {
			continue
		}
		if r := g.findRun(int(a.fs.groupBlocks(number)), int(min(n, 1<<15))); r.length > 0 {
			setBits(g.blocks, int(r.start), int(r.length))
			if uint64(g.desc.FreeBlocks) < r.length {
				return run{}, corrupt("group %d: fewer free blocks in its descriptor than in its bitmap", number)
			}
			g.desc.FreeBlocks -= uint32(r.length)
			a.left -= min(a.left, r.length)
			g.changed = true
			a.goal = number
			r.start += a.fs.groupStart(number)
			if a.isSystem(r.start, r.length) {
				return run{}, corrupt("group %d: its bitmap has blocks free that are not", number)
			}
			return r, nil
		}
	}
	return run{}, fmt.Errorf("%w: %d bytes are free, less what the edit has freed", ErrNoSpace, a.left*uint64(a.fs.geo.blockSize))
}

// findRun finds the first run of want free blocks, or the longest shorter one.
// Free are those that were free before and still are.
func (g *group) findRun(size, want int) (best run) {
	for i := 0; i < size; {
		if i%8 == 0 && g.blocks[i/8]|g.before[i/8] == 0xFF {
			i += 8
			continue
		}
		if bit(g.blocks, i) || bit(g.before, i) {
			i++
			continue
		}
		from := i
		for i < size && i-from < want && !bit(g.blocks, i) && !bit(g.before, i) {
			i++
		}
		if n := uint64(i - from); n > best.length {
			best = run{uint64(from), n}
		}
		if i-from == want {
			return best
		}
	}
	return best
}

// fresh tells whether a block was free in the image: it may be written at
// once, since nothing there refers to it.
func (a *allocator) fresh(block uint64) (bool, error) {
	if block < uint64(a.fs.super.FirstDataBlock) {
		return false, nil
	}
	at := block - uint64(a.fs.super.FirstDataBlock)
	g, err := a.group(at / uint64(a.fs.super.BlocksPerGroup))
	if err != nil {
		return false, err
	}
	return !bit(g.before, int(at%uint64(a.fs.super.BlocksPerGroup))), nil
}

// free takes n blocks at start back.
func (a *allocator) free(start, n uint64) error {
	if !a.fs.validBlock(start, n) || a.isSystem(start, n) {
		return corrupt("blocks %d to %d: a file has them, but they are not for files", start, start+n)
	}
	for n > 0 {
		at := start - uint64(a.fs.super.FirstDataBlock)
		number := at / uint64(a.fs.super.BlocksPerGroup)
		g, err := a.group(number)
		if err != nil {
			return err
		}
		first := int(at % uint64(a.fs.super.BlocksPerGroup))
		count := int(min(n, uint64(a.fs.super.BlocksPerGroup)-uint64(first)))
		for i := first; i < first+count; i++ {
			if !bit(g.blocks, i) {
				return corrupt("block %d: a file has it, but it is free", start+uint64(i-first))
			}
		}
		clearBits(g.blocks, first, count)
		for i := range uint64(count) {
			// What was to be written there must not be: the block may be
			// given out again, for data that is written at once.
			delete(a.fs.dev.changed, start+i)
			if !bit(g.before, first+int(i)) {
				a.left++
			}
		}
		g.desc.FreeBlocks += uint32(count)
		g.changed = true
		start, n = start+uint64(count), n-uint64(count)
	}
	return nil
}

// takeInode gives the number of a free inode, near that of its parent, and
// whether its place in the table was never used: it may hold anything then.
func (a *allocator) takeInode(parent uint32, isDir bool) (ino uint32, unused bool, err error) {
	per := uint64(a.fs.super.InodesPerGroup)
	home := uint64(parent-1) / per
	for i := range a.fs.groups {
		number := (home + i) % a.fs.groups
		g, err := a.group(number)
		if err != nil {
			return 0, false, err
		}
		if g.desc.FreeInodes == 0 {
			continue
		}
		if err := a.inodeBitmap(number, g); err != nil {
			return 0, false, err
		}
		at := 0
		if number == 0 {
			at = int(a.fs.super.FirstIno) - 1
		}
		for ; at < int(per) && bit(g.inodes, at); at++ {
		}
		if at == int(per) {
			return 0, false, corrupt("group %d: fewer free inodes in its bitmap than in its descriptor", number)
		}
		if number*per+uint64(at) >= uint64(a.fs.super.Inodes) {
			continue
		}
		setBits(g.inodes, at, 1)
		g.changed = true
		g.desc.FreeInodes--
		if isDir {
			g.desc.UsedDirs++
		}
		if a.fs.hasUninit() {
			used := int(per) - int(min(uint64(g.desc.UnusedInodes), per))
			perBlock := a.fs.geo.blockSize / a.fs.geo.inodeSize
			unused = g.desc.Flags&disk.GroupInodeZeroed == 0 && at >= used && at/perBlock*perBlock >= used
			if at >= used {
				g.desc.UnusedInodes = uint32(int(per) - at - 1)
			}
		}
		return uint32(number*per) + uint32(at) + 1, unused, nil
	}
	return 0, false, ErrNoInodes
}

// freeInode takes an inode back.
func (a *allocator) freeInode(ino uint32, isDir bool) error {
	per := a.fs.super.InodesPerGroup
	number := uint64((ino - 1) / per)
	g, err := a.group(number)
	if err != nil {
		return err
	}
	if err := a.inodeBitmap(number, g); err != nil {
		return err
	}
	at := int((ino - 1) % per)
	if !bit(g.inodes, at) {
		return corrupt("inode %d: a directory names it, but it is free", ino)
	}
	clearBits(g.inodes, at, 1)
	g.desc.FreeInodes++
	if isDir && g.desc.UsedDirs > 0 {
		g.desc.UsedDirs--
	}
	g.changed = true
	return nil
}

// store writes bitmaps and descriptors of changed groups into the edit.
func (a *allocator) store(e *Editor) error {
	f := a.fs
	for number, g := range a.groups {
		if !g.changed {
			continue
		}
		g.desc.Flags &^= disk.GroupBlockUninit
		b, err := e.replace(g.desc.BlockBitmap)
		if err != nil {
			return err
		}
		copy(b, g.blocks)
		g.desc.BlockBitmapCsum = f.csumOr(g.blocks[:f.super.BlocksPerGroup/8], g.desc.BlockBitmapCsum)
		if g.inodes != nil {
			g.desc.Flags &^= disk.GroupInodeUninit
			if b, err = e.replace(g.desc.InodeBitmap); err != nil {
				return err
			}
			copy(b, g.inodes)
			g.desc.InodeBitmapCsum = f.csumOr(g.inodes[:f.super.InodesPerGroup/8], g.desc.InodeBitmapCsum)
		}
		block, offset := f.descAt(number)
		b, err = e.change(block)
		if err != nil {
			return err
		}
		raw := b[offset:][:f.super.DescSize]
		disk.UpdateGroupDesc(raw, &g.desc)
		disk.PutDescChecksum(raw, f.descChecksum(raw, number))
	}
	return nil
}

// csumOr is a bitmap's checksum, or the old value where there are none.
func (f *FS) csumOr(b []byte, old uint32) uint32 {
	if !f.geo.csum {
		return old
	}
	return f.bitmapCsum(b)
}
