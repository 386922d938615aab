package ext4

import (
	"fmt"

	"banger/ext4/internal/disk"
)

// Finish writes everything but the file bytes, which are there already, and
// makes the file Params.SizeBytes long. An error that wraps ErrNoSpace, or
// refuses p or the tree, leaves the Writer as it was; after one of the File the
// image is worthless. After success the Writer is of no more use.
func (w *Writer) Finish(p Params) error {
	if err := w.usable(); err != nil {
		return err
	}
	if err := p.check(); err != nil {
		return err
	}
	s, err := w.survey(p.HashSeed)
	if err != nil {
		return err
	}
	l, err := w.layoutFor(&p, s)
	if err != nil {
		return err
	}
	w.finished = true
	f := &finisher{
		out:    w.out,
		tables: newOutput(w.out.f),
		p:      &p,
		s:      s,
		l:      l,
		geo:    writerGeometry,
		dirs:   make([]uint32, l.groups),
	}
	f.geo.seed = disk.FSSeed(p.UUID)
	f.geo.hash = dirHash{version: hashHalfMD4, state: hashSeed(p.HashSeed)}
	f.now, _ = timestamp(p.Time)
	if err := w.sweep(s, p.SizeBytes); err != nil {
		return err
	}
	return f.write(w.root)
}

// sweep erases what no file owns in the end and sets the size of the file.
func (w *Writer) sweep(s *survey, sizeBytes int64) error {
	if err := w.out.flush(); err != nil {
		return err
	}
	if w.placed > s.owned {
		for _, gap := range s.gaps {
			if gap.start == 0 {
				cut := min(1+w.gdtRoom, gap.length) // nothing was ever written there
				gap.start, gap.length = gap.start+cut, gap.length-cut
			}
			if gap.length == 0 {
				continue
			}
			if err := w.out.erase(gap.start, gap.length); err != nil {
				return err
			}
		}
	}
	for _, size := range [...]int64{int64(s.end) * disk.BlockSize, sizeBytes} {
		if err := w.out.f.Truncate(size); err != nil {
			w.out.err = fmt.Errorf("image: setting its size: %w", err)
			return w.out.err
		}
	}
	return nil
}

// finisher writes one file system by its layout.
type finisher struct {
	out    *output // blocks of files
	tables *output // inode tables
	p      *Params
	s      *survey
	l      *layout
	geo    geometry
	now    disk.Timestamp
	dirs   []uint32 // directories by group of their inode
	at     int      // first of l.free that may have blocks left

	table      []byte // the block of the inode table being filled
	freeBlocks uint64
	super      disk.Superblock
}

func (f *finisher) write(root *node) error {
	f.super = disk.Superblock{
		Blocks:         f.l.blocks,
		Reserved:       f.l.blocks / 100 * uint64(f.p.ReservedBlocksPercent),
		InodesPerGroup: uint32(f.l.perGrp),
		Compat:         disk.CompatExtAttr | disk.CompatDirIndex,
		Incompat:       disk.IncompatFiletype | disk.IncompatExtents | disk.Incompat64bit | disk.IncompatFlexBG,
		ROCompat: disk.ROCompatSparseSuper | disk.ROCompatLargeFile | disk.ROCompatHugeFile |
			disk.ROCompatDirNlink | disk.ROCompatExtraIsize | disk.ROCompatMetadataCsum,
		UUID:     f.p.UUID,
		HashSeed: f.p.HashSeed,
		HashFlag: disk.SignedHash,
	}
	copy(f.super.Label[:], f.p.Label)
	if !f.p.Time.IsZero() {
		sec := max(f.p.Time.Unix(), 0) // these fields have no sign
		f.super.MakeTime, f.super.WriteTime, f.super.Check = sec, sec, sec
	}
	if err := f.writeInodes(root); err != nil {
		return err
	}
	if err := f.tables.flush(); err != nil {
		return err
	}
	return f.writeGroups()
}

// writeInodes writes all inodes in order, and what belongs to them before each.
func (f *finisher) writeInodes(root *node) error {
	for ino := uint32(1); ino < disk.FirstIno; ino++ {
		var in disk.Inode
		var err error
		switch {
		case ino == disk.RootIno:
			in, err = f.inode(root)
		case ino == disk.JournalIno && f.l.journal > 0:
			in, err = f.journal()
		default:
			_, err = f.slot(ino) // stays zero
			if err != nil {
				return err
			}
			continue
		}
		if err == nil {
			err = f.putInode(&in, ino)
		}
		if err != nil {
			return err
		}
	}
	for _, n := range f.s.inodes {
		in, err := f.inode(n)
		if err == nil {
			err = f.putInode(&in, n.ino)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// slot gives the 256 bytes of an inode. Inodes come in order.
func (f *finisher) slot(ino uint32) ([]byte, error) {
	index := uint64(ino - 1)
	group, within := index/f.l.perGrp, index%f.l.perGrp
	if within%disk.InodesPerBlock == 0 {
		var err error
		f.table, err = f.tables.block(f.l.place(group).table + within/disk.InodesPerBlock)
		if err != nil {
			return nil, err
		}
	}
	return f.table[within%disk.InodesPerBlock*disk.InodeSize:][:disk.InodeSize], nil
}

func (f *finisher) putInode(in *disk.Inode, ino uint32) error {
	b, err := f.slot(ino)
	if err != nil {
		return err
	}
	in.Encode(b)
	disk.SealInode(b, ino, f.geo.seed)
	if in.Mode&disk.TypeMask == disk.TypeDir {
		f.dirs[uint64(ino-1)/f.l.perGrp]++
	}
	return nil
}

// inode makes the inode of n after writing its blocks.
func (f *finisher) inode(n *node) (in disk.Inode, err error) {
	in = disk.Inode{Mode: n.mode, UID: n.uid, GID: n.gid, Links: n.links}
	for i, t := range [...]*disk.Timestamp{&in.Atime, &in.Mtime, &in.Ctime, &in.Birth} {
		*t = f.now
		if n.timesSet&(1<<i) != 0 {
			*t = n.times[i]
		}
	}
	seed := f.geo.inodeSeed(n.ino, 0)
	switch kind := n.mode & disk.TypeMask; {
	case kind == disk.TypeRegular:
		c := n.content
		if c == nil {
			c = new(Content)
		}
		for range f.geo.treeBlocks(len(c.extents)) {
			c.tree = append(c.tree, f.take(1, 1).start)
		}
		err = f.putContent(&in, c, seed)
	case kind == disk.TypeDir:
		d := n.dir.layout
		d.g = &f.geo
		c := f.allocate(uint64(d.blocks), 1)
		if err = f.putDir(d, c.extents); err == nil {
			err = f.putContent(&in, c, seed)
		}
		if d.indexed {
			in.Flags |= disk.InodeIndexed
		}
		n.dir.layout = nil
	case n.longTarget():
		c := f.allocate(1, 1)
		c.size = int64(len(n.target))
		var b []byte
		if b, err = f.out.block(c.extents[0].start); err == nil {
			copy(b, n.target)
			err = f.putContent(&in, c, seed)
		}
	case kind == disk.TypeSymlink:
		in.Size = uint64(len(n.target))
		copy(in.Block[:], n.target)
	case kind == disk.TypeChar || kind == disk.TypeBlock:
		in.PutDevice(n.major, n.minor)
	}
	if x := n.xattrs; err == nil && x != nil {
		in.Xattrs = x.body
		if x.block != nil {
			in.XattrBlock = f.take(1, 1).start
			in.Sectors += disk.SectorsPerBlock
			var b []byte
			if b, err = f.out.block(in.XattrBlock); err == nil {
				x.put(&f.geo, b, in.XattrBlock)
			}
		}
	}
	return in, err
}

// putContent makes in hold c, whose tree blocks it writes.
func (f *finisher) putContent(in *disk.Inode, c *Content, seed uint32) (err error) {
	in.Size = uint64(c.size)
	in.Sectors = (c.blocks() + uint64(len(c.tree))) * disk.SectorsPerBlock
	in.Flags |= disk.InodeExtents
	in.Block, err = f.geo.putTree(c.extents, c.tree, seed, f.out.block)
	return err
}

// putDir writes a directory to the blocks it was given.
func (f *finisher) putDir(d *dirLayout, extents []extent) error {
	i := 0
	for _, e := range extents {
		for at := range uint64(e.length) {
			b, err := f.out.block(e.start + at)
			if err != nil {
				return err
			}
			d.put(b, i)
			i++
		}
	}
	return nil
}

// journal makes the journal's inode. Only its superblock is written: the rest
// of an empty journal may be anything, and here is zero.
func (f *finisher) journal() (in disk.Inode, err error) {
	// Better far away than in pieces.
	const goodRun = 1024
	c := f.allocate(f.l.journal, goodRun)
	in = disk.Inode{Mode: disk.TypeRegular | 0o600, Links: 1, Atime: f.now, Mtime: f.now, Ctime: f.now, Birth: f.now}
	b, err := f.out.block(c.extents[0].start)
	if err != nil {
		return in, err
	}
	disk.PutJournalSuperblock(b, uint32(f.l.journal), f.p.UUID)
	if err := f.putContent(&in, c, f.geo.inodeSeed(disk.JournalIno, 0)); err != nil {
		return in, err
	}
	f.super.Compat |= disk.CompatHasJournal
	f.super.JournalIno = disk.JournalIno
	f.super.JournalBlock = in.Block
	f.super.JournalSize = in.Size
	return in, nil
}

// allocate makes an object of so many blocks, with the tree blocks it needs,
// from free runs of at least goodRun blocks as long as there are any.
func (f *finisher) allocate(blocks, goodRun uint64) *Content {
	c := &Content{size: int64(blocks) * disk.BlockSize}
	for logical := uint64(0); logical < blocks; {
		r := f.take(blocks-logical, goodRun)
		if r.length == 0 {
			goodRun = 1
			continue
		}
		c.add(uint32(logical), r.start, uint32(r.length))
		logical += r.length
	}
	for range f.geo.treeBlocks(len(c.extents)) {
		c.tree = append(c.tree, f.take(1, 1).start)
	}
	return c
}

// take gives up to n blocks from the first free run of at least goodRun, or
// none. The layout has seen to it that with goodRun 1 there is one.
func (f *finisher) take(n, goodRun uint64) run {
	free := f.l.free
	for f.at < len(free) && free[f.at].length == 0 {
		f.at++
	}
	for i := f.at; i < len(free); i++ {
		if r := &free[i]; r.length >= max(1, min(n, goodRun)) {
			n = min(n, r.length)
			return run{r.takeFront(n), n}
		}
	}
	if goodRun == 1 {
		panic("ext4: the layout promised a block that is not there")
	}
	return run{}
}

// freeByGroup gives each group's free runs: the free list is sorted and no
// run in it crosses groups.
func (f *finisher) freeByGroup(group uint64) []run {
	free, end := f.l.free, f.l.groupEnd(group)
	from := f.at
	for f.at < len(free) && free[f.at].start < end {
		f.at++
	}
	return free[from:f.at]
}

// writeGroups writes bitmaps, descriptors and superblocks, the primary last:
// before that nothing will take the image for a file system.
func (f *finisher) writeGroups() error {
	l := f.l
	usedInodes := disk.FirstIno - 1 + uint64(len(f.s.inodes))
	overhead := l.journal
	table := make([]byte, l.gdt*disk.BlockSize)
	f.at = 0
	for g := range l.groups {
		place := l.place(g)
		d := disk.GroupDesc{
			BlockBitmap: place.blockBitmap,
			InodeBitmap: place.inodeBitmap,
			InodeTable:  place.table,
			UsedDirs:    f.dirs[g],
			Flags:       disk.GroupInodeZeroed,
		}
		runs := f.freeByGroup(g)
		for _, r := range runs {
			d.FreeBlocks += uint32(r.length)
		}
		f.freeBlocks += uint64(d.FreeBlocks)
		// The last group may need padding in its bitmap, so it has one.
		if g > 0 && g >= l.own && g != l.groups-1 && uint64(d.FreeBlocks) == l.untouched(g) {
			d.Flags |= disk.GroupBlockUninit
		} else {
			b, err := f.out.block(place.blockBitmap)
			if err != nil {
				return err
			}
			setBits(b, 0, disk.BlocksPerGroup)
			for _, r := range runs {
				clearBits(b, int(r.start%disk.BlocksPerGroup), int(r.length))
			}
			d.BlockBitmapCsum = disk.BitmapCsum(f.geo.seed, b)
		}
		used := min(usedInodes-min(usedInodes, g*l.perGrp), l.perGrp)
		d.FreeInodes = uint32(l.perGrp - used)
		d.UnusedInodes = d.FreeInodes
		if used == 0 {
			d.Flags |= disk.GroupInodeUninit
		} else {
			b, err := f.out.block(place.inodeBitmap)
			if err != nil {
				return err
			}
			setBits(b, 0, int(used))
			setBits(b, int(l.perGrp), disk.MaxInodesInGroup-int(l.perGrp))
			d.InodeBitmapCsum = disk.BitmapCsum(f.geo.seed, b[:l.perGrp/8])
		}
		d.Encode(table[g*disk.DescSize:], uint32(g), f.geo.seed)
		overhead += l.overhead(g) + 2 + l.table
	}
	s := &f.super
	s.Inodes = uint32(l.perGrp * l.groups)
	s.FreeInodes = s.Inodes - uint32(usedInodes)
	s.Free = f.freeBlocks
	s.Overhead = uint32(overhead)
	if err := f.out.flush(); err != nil {
		return err
	}
	s.KBytesWritten = (f.out.written + f.tables.written) * (disk.BlockSize / 1024)
	for g := l.groups - 1; g > 0; g-- {
		if hasSuper(g) {
			s.GroupNr = uint16(g)
			if err := f.putSuper(g*disk.BlocksPerGroup, 0, table); err != nil {
				return err
			}
		}
	}
	s.GroupNr = 0
	return f.putSuper(0, disk.SuperblockOffset, table)
}

// putSuper writes the descriptors and then the superblock before them.
func (f *finisher) putSuper(block, offset uint64, table []byte) error {
	for i := uint64(0); i < f.l.gdt; i++ {
		b, err := f.out.block(block + 1 + i)
		if err != nil {
			return err
		}
		copy(b, table[i*disk.BlockSize:])
	}
	if err := f.out.flush(); err != nil {
		return err
	}
	b, err := f.out.block(block)
	if err != nil {
		return err
	}
	f.super.Encode(b[offset:])
	return f.out.flush()
}

func setBits(b []byte, from, n int) {
	for ; n > 0 && from%8 != 0; from, n = from+1, n-1 {
		b[from/8] |= 1 << (from % 8)
	}
	for ; n >= 8; from, n = from+8, n-8 {
		b[from/8] = 0xFF
	}
	for ; n > 0; from, n = from+1, n-1 {
		b[from/8] |= 1 << (from % 8)
	}
}

func clearBits(b []byte, from, n int) {
	for ; n > 0 && from%8 != 0; from, n = from+1, n-1 {
		b[from/8] &^= 1 << (from % 8)
	}
	for ; n >= 8; from, n = from+8, n-8 {
		b[from/8] = 0
	}
	for ; n > 0; from, n = from+1, n-1 {
		b[from/8] &^= 1 << (from % 8)
	}
}
