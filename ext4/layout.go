package ext4

import (
	"fmt"
	"math/bits"

	"banger/ext4/internal/disk"
)

// run is a run of blocks of the image.
type run struct{ start, length uint64 }

func (r run) end() uint64 { return r.start + r.length }

// survey is what Finish must know of the tree before it can choose a size.
type survey struct {
	hash      dirHash
	lostFound bool   // nobody added one, so it is made: the first inode
	inodes    uint64 // used ones, reserved ones included
	gaps      []run  // not owned by any file, below end; superblocks included
	end       uint64 // first block after the last one owned by a file
	owned     uint64 // blocks owned by files
	needBlock uint64 // blocks for directories, extent trees, symlinks and xattrs, but:
	bigDirs   []int  // blocks of directories that may need an extent tree
}

// ino is the inode number of a node.
func (s *survey) ino(n uint32) uint32 {
	switch {
	case n == rootNode:
		return disk.RootIno
	case s.lostFound:
		return disk.FirstIno + n - madeNode
	}
	return disk.FirstIno + n - madeNode - 1
}

// survey measures the directories and finds the gaps. Its result holds until
// the next Add, and for one way of hashing names.
func (w *Writer) survey(p *Params) (*survey, error) {
	hash := p.dirHash()
	if w.surveyed != nil && w.surveyed.hash == hash {
		return w.surveyed, nil
	}
	_, exists := w.names.lookup(rootDir, lostFoundName)
	s := &survey{hash: hash, lostFound: !exists}
	s.inodes = uint64(s.ino(w.nodes.len())) - 1 + uint64(len(w.ea.inodes))
	if err := w.surveyDirs(s); err != nil {
		return nil, err
	}
	owned := make(bitmap, w.cursor/64+1)
	own := func(extents []extent) {
		s.needBlock += uint64(writerGeometry.treeBlocks(len(extents)))
		for _, e := range extents {
			owned.set(e.start, uint64(e.length))
			s.owned += uint64(e.length)
		}
	}
	for i := range w.nodes.len() {
		n := w.nodes.at(i)
		var x *extra
		if n.extra&extraMask != 0 {
			x = w.extras.at(n.extra&extraMask - 1)
			if x.xattrs != 0 && w.xattrs.at(x.xattrs-1).block > 0 {
				s.needBlock++
			}
		}
		switch {
		case n.longTarget():
			s.needBlock++
		case n.mode&disk.TypeMask != disk.TypeRegular:
		case x != nil && x.content != 0:
			own(w.contents.at(x.content - 1).extents)
		case n.b > 0:
			blocks := ceilDiv(uint64(n.b), disk.BlockSize)
			owned.set(uint64(n.a), blocks)
			s.owned += blocks
		}
	}
	for i := range w.ea.inodes {
		own(w.ea.inodes[i].content.extents)
	}
	s.gaps, s.end = owned.gaps()
	w.surveyed = s
	return s, nil
}

// surveyDirs counts the blocks of all directories. Names are sorted only where
// that decides on the number, and left in that order.
func (w *Writer) surveyDirs(s *survey) error {
	g := writerGeometry
	g.hash = s.hash
	for i := range w.names.dirs.len() {
		d := w.names.dirs.at(i)
		switch {
		case i == madeDir && !s.lostFound:
			continue
		case i == madeDir:
			d.blocks = lostFoundBlocks
		case w.indexed(d):
			w.names.sort(d, &g.hash)
			l, err := g.divideDir(true, w.names.in(d, !s.lostFound))
			if err != nil {
				return err
			}
			d.blocks = uint32(l.blocks)
		default:
			d.blocks = 1
		}
		s.needBlock += uint64(d.blocks)
		if d.blocks > disk.ExtentsInInode {
			s.bigDirs = append(s.bigDirs, int(d.blocks))
		}
	}
	return nil
}

// indexed tells whether a directory gets an htree. The root counts lost+found
// whoever brings it, or twice.
func (w *Writer) indexed(d *dir) bool { return writerGeometry.indexes(d.bytes) }

// bitmap has one bit for each block.
type bitmap []uint64

func (b bitmap) set(from, n uint64) {
	for ; n > 0; n-- {
		if from%64 == 0 && n >= 64 {
			b[from/64] = ^uint64(0)
			from, n = from+64, n-63
			continue
		}
		b[from/64] |= 1 << (from % 64)
		from++
	}
}

// next gives the first bit from at on that is set, or is not; the number of
// bits if there is none.
func (b bitmap) next(at uint64, set bool) uint64 {
	for i := at / 64; i < uint64(len(b)); i++ {
		word := b[i]
		if !set {
			word = ^word
		}
		if i == at/64 {
			word &= ^uint64(0) << (at % 64)
		}
		if word != 0 {
			return i*64 + uint64(bits.TrailingZeros64(word))
		}
	}
	return uint64(len(b)) * 64
}

// gaps gives the runs of clear bits below end, the first one after all set bits.
func (b bitmap) gaps() (gaps []run, end uint64) {
	for {
		start := b.next(end, true)
		if start == uint64(len(b))*64 {
			return gaps, end
		}
		if start > end {
			gaps = append(gaps, run{end, start - end})
		}
		end = b.next(start, false)
	}
}

const lostFoundName = "lost+found"

const (
	minJournalBlocks = 1024
	maxJournalBlocks = 10_240_000
)

// journalSizes are those of mke2fs (ext2fs_default_journal_size), largest first.
var journalSizes = [...]struct{ from, journal uint64 }{ // in blocks
	{32768 << 10, 262144},
	{16384 << 10, 131072},
	{8192 << 10, 65536},
	{4096 << 10, 32768},
	{512 << 10, 16384},
	{256 << 10, 8192},
	{32768, 4096},
	{smallestJournaled, minJournalBlocks},
}

const smallestJournaled = 2048 // blocks of the image

// layout says where everything goes in an image of one size.
type layout struct {
	blocks  uint64 // of the file system
	groups  uint64
	perGrp  uint64 // inodes in a group
	table   uint64 // blocks of a group's inode table
	gdt     uint64 // blocks of group descriptors
	journal uint64 // blocks, 0: none
	// Groups from own on hold their bitmaps and inode table themselves, so
	// that the kernel can tell their block bitmap from the descriptor
	// alone and nothing need be written. Groups before it are full of file
	// bytes; theirs lie elsewhere (flex_bg).
	own   uint64
	moved []groupPlace // of groups below own
	free  []run
}

type groupPlace struct{ blockBitmap, inodeBitmap, table uint64 }

// overhead is the number of blocks a group's superblock and descriptors take.
func (l *layout) overhead(group uint64) uint64 {
	if hasSuper(group) {
		return 1 + l.gdt
	}
	return 0
}

func (l *layout) groupEnd(group uint64) uint64 {
	return min((group+1)*disk.BlocksPerGroup, l.blocks)
}

func (l *layout) place(group uint64) groupPlace {
	if group < l.own {
		return l.moved[group]
	}
	at := group*disk.BlocksPerGroup + l.overhead(group)
	return groupPlace{at, at + 1, at + 2}
}

// untouched is the number of free blocks of a group in which nothing lies but
// what always does.
func (l *layout) untouched(group uint64) uint64 {
	return l.groupEnd(group) - group*disk.BlocksPerGroup - l.overhead(group) - 2 - l.table
}

// measure sets all sizes; false if so many inodes cannot be.
func (l *layout) measure(p *Params, blocks, usedInodes uint64) bool {
	l.blocks = blocks
	want := uint64(p.Inodes)
	if want == 0 {
		ratio := uint64(p.InodeRatio)
		if ratio == 0 {
			ratio = 16384
			if blocks < 512<<20/disk.BlockSize {
				ratio = 4096
			}
		}
		want = blocks * disk.BlockSize / ratio
	}
	want = max(want, usedInodes)
	for {
		l.groups = ceilDiv(l.blocks, disk.BlocksPerGroup)
		l.gdt = ceilDiv(l.groups, disk.DescsPerBlock)
		most := min(disk.MaxInodesInGroup, (1<<32-1)/l.groups/disk.InodesPerBlock*disk.InodesPerBlock)
		l.perGrp = min(ceilDiv(ceilDiv(want, l.groups), disk.InodesPerBlock)*disk.InodesPerBlock, most)
		l.table = l.perGrp / disk.InodesPerBlock
		if l.perGrp*l.groups < max(usedInodes, uint64(p.Inodes)) {
			return false
		}
		// As mke2fs, leave alone a last group that would be all metadata.
		tail := l.blocks % disk.BlocksPerGroup
		if l.groups == 1 || tail == 0 || tail >= l.overhead(l.groups-1)+2+l.table+50 {
			return true
		}
		l.blocks -= tail
	}
}

// newLayout lays out an image of so many blocks, or gives nil if that is too
// small.
func newLayout(p *Params, s *survey, blocks uint64) *layout {
	l := new(layout)
	if !l.measure(p, blocks, s.inodes) || s.end > l.blocks {
		return nil
	}
	l.own = min(ceilDiv(s.end, disk.BlocksPerGroup), l.groups)
	l.free = make([]run, 0, len(s.gaps)+int(l.groups))
	// The gaps, less the superblocks and descriptors in them.
	for _, gap := range s.gaps {
		for gap.length > 0 {
			g := gap.start / disk.BlocksPerGroup
			if first := g*disk.BlocksPerGroup + l.overhead(g); gap.start < first {
				cut := min(first-gap.start, gap.length)
				gap.start, gap.length = gap.start+cut, gap.length-cut
				continue
			}
			n := min(gap.length, l.groupEnd(g)-gap.start)
			l.free = append(l.free, run{gap.start, n})
			gap.start, gap.length = gap.start+n, gap.length-n
		}
	}
	if l.own > 0 {
		if end := l.groupEnd(l.own - 1); end > s.end {
			l.free = append(l.free, run{s.end, end - s.end})
		}
	}
	for g := l.own; g < l.groups; g++ {
		first, end := l.place(g).table+l.table, l.groupEnd(g)
		if first > end {
			return nil
		}
		l.free = append(l.free, run{first, end - first})
	}
	if !l.moveMetadata() {
		return nil
	}
	var free uint64
	for _, r := range l.free {
		free += r.length
	}
	need := s.needBlock
	for _, blocks := range s.bigDirs {
		need += l.worstTree(uint64(blocks))
	}
	if need > free || !l.chooseJournal(p, free-need) {
		return nil
	}
	return l
}

// moveMetadata places what groups below own cannot hold themselves.
func (l *layout) moveMetadata() bool {
	l.moved = make([]groupPlace, l.own)
	at := 0
	for g := range l.moved {
		for at < len(l.free) && l.free[at].length < l.table {
			at++
		}
		if at == len(l.free) {
			return false
		}
		l.moved[g].table = l.free[at].takeFront(l.table)
	}
	at = 0
	single := func() (uint64, bool) {
		for at < len(l.free) && l.free[at].length == 0 {
			at++
		}
		if at == len(l.free) {
			return 0, false
		}
		return l.free[at].takeFront(1), true
	}
	var ok1, ok2 bool
	for g := range l.moved {
		m := &l.moved[g]
		m.blockBitmap, ok1 = single()
		m.inodeBitmap, ok2 = single()
		if !ok1 || !ok2 {
			return false
		}
	}
	return true
}

// takeFront gives the first block of n that it takes away.
func (r *run) takeFront(n uint64) uint64 {
	at := r.start
	r.start, r.length = r.start+n, r.length-n
	return at
}

// worstTree is an upper bound of the tree blocks of an object of so many
// blocks that is yet to be allocated: one extent from each free run.
func (l *layout) worstTree(blocks uint64) uint64 {
	return uint64(writerGeometry.treeBlocks(int(min(blocks, uint64(len(l.free))+blocks/disk.MaxExtentLen+1))))
}

func (l *layout) chooseJournal(p *Params, room uint64) bool {
	fits := func(n uint64) bool { return n+l.worstTree(n) <= room }
	switch {
	case p.JournalBytes < 0 || p.JournalBytes == 0 && l.blocks < smallestJournaled:
		return true
	case p.JournalBytes > 0:
		l.journal = uint64(p.JournalBytes) / disk.BlockSize
		return fits(l.journal)
	}
	for _, size := range journalSizes {
		if l.blocks >= size.from && fits(size.journal) {
			l.journal = size.journal
			return true
		}
	}
	return false
}

// fit is newLayout, but it leaves a partial last group unused if that alone
// makes things fit: one more group costs metadata for all.
func fit(p *Params, s *survey, blocks uint64) *layout {
	l := newLayout(p, s, blocks)
	if tail := blocks % disk.BlocksPerGroup; l == nil && tail > 0 && blocks > tail {
		l = newLayout(p, s, blocks-tail)
	}
	return l
}

// MinSizeBytes is the least Params.SizeBytes that Finish would accept now
// with the other fields of p; it accepts anything larger too, up to
// Options.MaxSizeBytes. The error is a *SpaceError if even that is too small.
// It costs about as much as sorting all names, once until the next change.
func (w *Writer) MinSizeBytes(p Params) (int64, error) {
	if err := w.usable(); err != nil {
		return 0, err
	}
	if err := p.check(); err != nil {
		return 0, err
	}
	s, err := w.survey(&p)
	if err != nil {
		return 0, err
	}
	return w.minSize(&p, s)
}

func (w *Writer) minSize(p *Params, s *survey) (int64, error) {
	least := func(low uint64) uint64 {
		high := low
		for fit(p, s, high) == nil {
			if high == w.maxBlocks {
				return 0
			}
			low, high = high+1, min(2*high, w.maxBlocks)
		}
		for low < high {
			if mid := (low + high) / 2; fit(p, s, mid) == nil {
				low = mid + 1
			} else {
				high = mid
			}
		}
		return high
	}
	n := least(min(max(s.end, MinImageBytes/disk.BlockSize), w.maxBlocks))
	// The first size with a journal needs more than the one before it.
	if n != 0 && n < smallestJournaled && p.JournalBytes == 0 && w.maxBlocks >= smallestJournaled && fit(p, s, smallestJournaled) == nil {
		n = least(smallestJournaled)
	}
	if n == 0 {
		return 0, &SpaceError{SizeBytes: int64(w.maxBlocks) * disk.BlockSize}
	}
	return int64(n) * disk.BlockSize, nil
}

// layoutFor is the layout of an accepted SizeBytes.
func (w *Writer) layoutFor(p *Params, s *survey) (*layout, error) {
	if p.SizeBytes < MinImageBytes || uint64(p.SizeBytes)/disk.BlockSize > w.maxBlocks {
		return nil, fmt.Errorf("image of %d bytes: not between %d and %d", p.SizeBytes, MinImageBytes, w.maxBlocks*disk.BlockSize)
	}
	l := fit(p, s, uint64(p.SizeBytes)/disk.BlockSize)
	if l == nil {
		need, _ := w.minSize(p, s)
		return nil, &SpaceError{SizeBytes: p.SizeBytes, NeedBytes: need}
	}
	return l, nil
}
