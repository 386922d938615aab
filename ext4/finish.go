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
	s, err := w.survey(&p)
	if err != nil {
		return err
	}
	l, err := w.layoutFor(&p, s)
	if err != nil {
		return err
	}
	w.finished = true
	f := &finisher{
		w:      w,
		out:    w.out,
		tables: newOutput(w.out.f),
		p:      &p,
		s:      s,
		l:      l,
		geo:    writerGeometry,
		dirs:   make([]uint32, l.groups),
	}
	f.geo.seed = disk.FSSeed(p.UUID)
	f.geo.hash = s.hash
	f.now, _ = timestamp(p.Time)
	if err := w.sweep(s, p.SizeBytes); err != nil {
		return err
	}
	return f.write()
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
	w      *Writer
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

func (f *finisher) write() error {
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
	if f.p.UnsignedHash {
		f.super.HashFlag = disk.UnsignedHash
	}
	if len(f.w.ea.inodes) > 0 {
		f.super.Incompat |= disk.IncompatEAInode
	}
	copy(f.super.Label[:], f.p.Label)
	if !f.p.Time.IsZero() {
		sec := max(f.p.Time.Unix(), 0) // these fields have no sign
		f.super.MakeTime, f.super.WriteTime, f.super.Check = sec, sec, sec
	}
	if err := f.writeInodes(); err != nil {
		return err
	}
	if err := f.tables.flush(); err != nil {
		return err
	}
	return f.writeGroups()
}

// writeInodes writes all inodes in order, and what belongs to them before each.
func (f *finisher) writeInodes() error {
	for ino := uint32(1); ino < disk.FirstIno; ino++ {
		var err error
		switch {
		case ino == disk.RootIno:
			err = f.putNode(rootNode)
		case ino == disk.JournalIno && f.l.journal > 0:
			err = f.putJournal()
		default:
			_, err = f.slot(ino) // stays zero
		}
		if err != nil {
			return err
		}
	}
	n := f.w.nodes.len()
	for i := uint32(madeNode); i < n; i++ {
		if i == madeNode && !f.s.lostFound {
			continue
		}
		if err := f.putNode(i); err != nil {
			return err
		}
	}
	for i := range f.w.ea.inodes {
		if err := f.putEAInode(&f.w.ea.inodes[i], f.s.ino(n)+uint32(i)); err != nil {
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

// putNode writes an inode of the tree after its blocks.
func (f *finisher) putNode(index uint32) error {
	n, ino := f.w.nodes.at(index), f.s.ino(index)
	in := disk.Inode{Mode: n.mode, UID: n.uid, GID: n.gid, Links: uint32(n.links)}
	x := &extra{times: [4]disk.Timestamp{n.mtime, n.mtime, n.mtime, n.mtime}}
	if i := n.extra & extraMask; i != 0 {
		x = f.w.extras.at(i - 1)
	}
	for i, t := range [...]*disk.Timestamp{&in.Atime, &in.Mtime, &in.Ctime, &in.Birth} {
		if *t = f.now; n.timeSet(i) {
			*t = x.times[i]
		}
	}
	var err error
	switch kind := n.mode & disk.TypeMask; kind {
	case disk.TypeRegular:
		if x.content != 0 {
			err = f.putContent(&in, f.w.contents.at(x.content-1), ino)
			break
		}
		c := storedContent{size: int64(n.b)}
		if n.b > 0 {
			c.extents = []extent{{0, ceilDiv(n.b, disk.BlockSize), uint64(n.a)}}
		}
		err = f.putContent(&in, &c, ino)
	case disk.TypeDir:
		err = f.putDir(&in, n.a, ino)
	case disk.TypeSymlink:
		target := f.w.names.text.get(n.a, int(n.b))
		if in.Size = uint64(n.b); !n.longTarget() {
			copy(in.Block[:], target)
			break
		}
		at := f.take(1, 1).start
		var b []byte
		if b, err = f.out.block(at); err == nil {
			copy(b, target)
			err = f.putContent(&in, &storedContent{int64(n.b), []extent{{0, 1, at}}}, ino)
		}
	case disk.TypeChar, disk.TypeBlock:
		in.PutDevice(n.a, n.b)
	}
	if err == nil && x.xattrs != 0 {
		err = f.putXattrs(&in, x.xattrs)
	}
	if err != nil {
		return err
	}
	return f.putInode(&in, ino)
}

func (f *finisher) putXattrs(in *disk.Inode, index uint32) error {
	set := f.w.loadXattrs(index, &f.geo, f.s.ino(f.w.nodes.len()))
	in.Xattrs = set.body
	in.Sectors += set.largeSectors
	if set.block == nil {
		return nil
	}
	in.XattrBlock = f.take(1, 1).start
	in.Sectors += disk.SectorsPerBlock
	b, err := f.out.block(in.XattrBlock)
	if err == nil {
		set.put(&f.geo, b, in.XattrBlock)
	}
	return err
}

// putDir makes in the inode of a directory, whose blocks it writes.
func (f *finisher) putDir(in *disk.Inode, dir, ino uint32) error {
	d := f.w.names.dirs.at(dir)
	var l *dirLayout
	var err error
	next := f.w.names.walk(d, !f.s.lostFound)
	list := func(n int) []dirEntry {
		f.w.scratch = f.w.scratch[:0]
		for e := next(); e != nil; e = next() {
			f.w.scratch = append(f.w.scratch, dirEntry{f.w.names.nameOf(e), f.s.ino(e.child), disk.DirFileType(f.w.nodes.at(e.child).mode)})
			if len(f.w.scratch) == n {
				break
			}
		}
		return f.w.scratch
	}
	if f.w.indexed(d) { // survey has sorted it, and one leaf at a time is enough
		if l, err = f.geo.divideDir(true, f.w.names.in(d, !f.s.lostFound)); err == nil {
			l.entries = func(leaf int) []dirEntry { return list(l.leaves[leaf].entries) }
		}
	} else {
		l, err = f.geo.layoutDir(list(int(d.entries)))
	}
	if err != nil {
		return err
	}
	l.self, l.parent, l.blocks = ino, f.s.ino(d.parent), int(d.blocks)
	subdirs := d.subdirs
	if dir == rootDir && f.s.lostFound {
		subdirs++
	}
	in.Links = dirLinks(subdirs)
	return f.putDirBlocks(in, l)
}

func (f *finisher) putDirBlocks(in *disk.Inode, l *dirLayout) error {
	c := f.allocate(uint64(l.blocks), 1)
	if l.indexed {
		in.Flags |= disk.InodeIndexed
	}
	i := 0
	for _, e := range c.extents {
		for at := range uint64(e.length) {
			b, err := f.out.block(e.start + at)
			if err != nil {
				return err
			}
			l.put(b, i)
			i++
		}
	}
	return f.putContent(in, c, l.self)
}

// putEAInode writes the inode of a large xattr value. Its reference count and
// the value's hash lie in fields that mean something else elsewhere
// (ext4_xattr_inode_set_ref and _set_hash of fs/ext4/xattr.c).
func (f *finisher) putEAInode(e *eaInode, ino uint32) error {
	in := disk.Inode{
		Mode:    disk.TypeRegular | 0o600,
		Links:   1,
		Flags:   disk.InodeEA,
		Atime:   disk.Timestamp{Sec: e.hash(&f.geo)},
		Ctime:   disk.Timestamp{Sec: uint32(e.refs >> 32)},
		Version: e.refs & (1<<32 - 1),
		Birth:   f.now,
	}
	if err := f.putContent(&in, &e.content, ino); err != nil {
		return err
	}
	return f.putInode(&in, ino)
}

// putContent makes in hold c, after writing the blocks of its extent tree.
func (f *finisher) putContent(in *disk.Inode, c *storedContent, ino uint32) (err error) {
	var tree []uint64
	for range f.geo.treeBlocks(len(c.extents)) {
		tree = append(tree, f.take(1, 1).start)
	}
	blocks := uint64(len(tree))
	for _, e := range c.extents {
		blocks += uint64(e.length)
	}
	in.Size = uint64(c.size)
	in.Sectors = blocks * disk.SectorsPerBlock
	in.Flags |= disk.InodeExtents
	in.Block, err = f.geo.putTree(c.extents, tree, f.geo.inodeSeed(ino, 0), f.out.block)
	return err
}

// putJournal writes the journal's inode. Only its superblock is written: the
// rest of an empty journal may be anything, and here is zero.
func (f *finisher) putJournal() error {
	// Better far away than in pieces.
	const goodRun = 1024
	c := f.allocate(f.l.journal, goodRun)
	in := disk.Inode{Mode: disk.TypeRegular | 0o600, Links: 1, Atime: f.now, Mtime: f.now, Ctime: f.now, Birth: f.now}
	b, err := f.out.block(c.extents[0].start)
	if err != nil {
		return err
	}
	disk.PutJournalSuperblock(b, uint32(f.l.journal), f.p.UUID)
	if err := f.putContent(&in, c, disk.JournalIno); err != nil {
		return err
	}
	f.super.Compat |= disk.CompatHasJournal
	f.super.JournalIno = disk.JournalIno
	f.super.JournalBlock = in.Block
	f.super.JournalSize = in.Size
	return f.putInode(&in, disk.JournalIno)
}

// allocate makes an object of so many blocks from free runs of at least goodRun
// blocks as long as there are any.
func (f *finisher) allocate(blocks, goodRun uint64) *storedContent {
	var c Content
	for logical := uint64(0); logical < blocks; {
		r := f.take(blocks-logical, goodRun)
		if r.length == 0 {
			goodRun = 1
			continue
		}
		c.add(uint32(logical), r.start, uint32(r.length))
		logical += r.length
	}
	return &storedContent{int64(blocks) * disk.BlockSize, c.extents}
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
	usedInodes := f.s.inodes
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
