package ext4

import (
	"fmt"
	"slices"

	"banger/ext4/internal/disk"
)

// run is a run of blocks of the image.
type run struct{ start, length uint64 }

func (r run) end() uint64 { return r.start + r.length }

// survey is what Finish must know of the tree before it can choose a size.
type survey struct {
	hashSeed  [16]byte
	inodes    []*node // inodes[i] is inode FirstIno+i
	gaps      []run   // not owned by any file, below end; superblocks included
	end       uint64  // first block after the last one owned by a file
	owned     uint64  // blocks owned by files
	needBlock uint64  // blocks for directories, extent trees, symlinks and xattrs, but:
	bigDirs   []int   // blocks of directories that may need an extent tree
}

// survey numbers the inodes, arranges the directories and finds the gaps. Its
// result holds until the next Add, and for one hash seed.
func (w *Writer) survey(hashSeedBytes [16]byte) (*survey, error) {
	if w.surveyed != nil && w.surveyed.hashSeed == hashSeedBytes {
		return w.surveyed, nil
	}
	s := &survey{hashSeed: hashSeedBytes, inodes: make([]*node, 0, len(w.nodes)+1)}
	w.root.ino = disk.RootIno
	if w.root.dir.entries[lostFoundName] == nil {
		s.inodes = append(s.inodes, &node{mode: disk.TypeDir | 0o700, dir: &directory{parent: w.root}})
	}
	made := len(s.inodes) == 1
	s.inodes = append(s.inodes, w.nodes...)
	g := writerGeometry
	g.hash = dirHash{version: hashHalfMD4, state: hashSeed(hashSeedBytes)}
	var owned []run
	visit := func(n *node) error {
		if n.dir != nil {
			entries := make([]dirEntry, 0, len(n.dir.entries))
			for name, child := range n.dir.entries {
				entries = append(entries, dirEntry{name: name, ino: child.ino, fileType: disk.DirFileType(child.mode)})
			}
			l, err := g.layoutDir(entries)
			if err != nil {
				return err
			}
			if n == s.inodes[0] && made {
				l.blocks = lostFoundBlocks
			}
			l.self, l.parent = n.ino, n.dir.parent.ino
			n.dir.layout = l
			n.links = n.dir.links()
			s.needBlock += uint64(l.blocks)
			if l.blocks > disk.ExtentsInInode {
				s.bigDirs = append(s.bigDirs, l.blocks)
			}
		} else if c := n.content; c != nil {
			s.needBlock += uint64(writerGeometry.treeBlocks(len(c.extents)))
			for _, e := range c.extents {
				owned = append(owned, run{e.start, uint64(e.length)})
			}
		}
		if n.longTarget() {
			s.needBlock++
		}
		if n.xattrs != nil && n.xattrs.block != nil {
			s.needBlock++
		}
		return nil
	}
	if made {
		// lost+found is part of the root only for as long as this survey:
		// the caller may still add one.
		w.root.dir.entries[lostFoundName] = s.inodes[0]
		w.root.dir.subdirs++
		defer func() {
			delete(w.root.dir.entries, lostFoundName)
			w.root.dir.subdirs--
		}()
	}
	for i, n := range s.inodes {
		n.ino = uint32(disk.FirstIno + i)
	}
	if err := visit(w.root); err != nil {
		return nil, err
	}
	for _, n := range s.inodes {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(owned, func(a, b run) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
	for _, r := range owned {
		if r.start > s.end {
			s.gaps = append(s.gaps, run{s.end, r.start - s.end})
		}
		s.end = r.end()
		s.owned += r.length
	}
	w.surveyed = s
	return s, nil
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
	if !l.measure(p, blocks, disk.FirstIno-1+uint64(len(s.inodes))) || s.end > l.blocks {
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
	s, err := w.survey(p.HashSeed)
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
