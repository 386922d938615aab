package ext4

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"banger/ext4/internal/disk"
)

// How an edit reaches the image, all or nothing.
//
// Data goes at once to blocks that are free in the image. Metadata is changed
// in memory. At the end, with a sync of the image between the steps:
//
//	1  new blocks of metadata, which are free ones too; the superblock with
//	   needs_recovery; the changed blocks as a transaction in the journal,
//	   which is empty still, so that nobody reads it        -> state is old
//	2  the journal's superblock names the transaction       -> state is new
//	3  the changed blocks in their places                   -> as before
//	4  the journal's superblock names nothing               -> as before
//	5  the superblock without needs_recovery                -> as before
//
// Step 2 writes 1 KiB. Whatever stops the edit, the kernel, e2fsck and Open
// see the old state before it and the new one after it.
//
// A journal that had something to replay is replayed first, in place, before
// anything is written: its transactions are the state that the edit starts
// from.

// begin writes to the image what its own journal had still to replay. It is
// called before the first write of any edit.
func (e *Editor) begin() error {
	if e.begun {
		return nil
	}
	e.begun = true
	r := e.fs.dev.journal
	if r == nil {
		return nil
	}
	bs := e.fs.geo.blockSize
	b := make([]byte, bs)
	for _, block := range slices.Sorted(maps.Keys(r.blocks)) {
		if _, err := r.read(block, b); err != nil {
			return err
		}
		if block == e.fs.superBlock() {
			e.setRecover(b, true) // until the journal is empty
		}
		if err := e.write(block, b); err != nil {
			return err
		}
	}
	if err := e.sync(); err != nil {
		return err
	}
	e.journal.sequence = r.next
	if err := e.writeJournalSuper(0); err != nil {
		return err
	}
	e.fs.dev.journal = nil
	e.fs.dev.reset(bs, e.fs.super.Blocks)
	return nil
}

func (e *Editor) write(block uint64, b []byte) error {
	if _, err := e.img.WriteAt(b, int64(block)*int64(e.fs.geo.blockSize)); err != nil {
		return fmt.Errorf("image: writing at block %d: %w", block, err)
	}
	return nil
}

func (e *Editor) sync() error {
	if err := e.img.Sync(); err != nil {
		return fmt.Errorf("image: sync: %w", err)
	}
	return nil
}

// setRecover sets or clears needs_recovery in the block of the superblock.
func (e *Editor) setRecover(b []byte, on bool) {
	s := b[disk.SuperblockOffset%e.fs.geo.blockSize:][:disk.SuperblockSize]
	incompat := le.Uint32(s[disk.SuperIncompatAt:]) &^ disk.IncompatRecover
	if on {
		incompat |= disk.IncompatRecover
	}
	le.PutUint32(s[disk.SuperIncompatAt:], incompat)
	if e.fs.geo.csum {
		disk.SealSuper(s)
	}
}

// writeJournalSuper makes the journal's superblock name the transaction at
// block start of the journal, or none, and waits until it is on disk.
func (e *Editor) writeJournalSuper(start uint32) error {
	j := e.journal
	be.PutUint32(j.super[0x18:], j.sequence)
	be.PutUint32(j.super[0x1C:], start)
	if j.csum() {
		be.PutUint32(j.super[disk.JournalChecksumAt:], disk.JournalSuperChecksum(j.super))
	}
	at, err := j.place(0)
	if err != nil {
		return err
	}
	if err := e.write(at, j.super); err != nil {
		return err
	}
	return e.sync()
}

// finish completes the change in memory: bitmaps, descriptors, superblock.
func (e *Editor) finish() error {
	if err := e.blocks.store(e); err != nil {
		return err
	}
	f := e.fs
	var freeBlocks, freeInodes uint64
	for g := range f.groups {
		d, err := f.desc(g)
		if err != nil {
			return err
		}
		freeBlocks += uint64(d.FreeBlocks)
		freeInodes += uint64(d.FreeInodes)
	}
	b, err := e.change(f.superBlock())
	if err != nil {
		return err
	}
	s := b[disk.SuperblockOffset%f.geo.blockSize:][:disk.SuperblockSize]
	le.PutUint32(s[disk.SuperFreeBlocksAt:], uint32(freeBlocks))
	if f.super.Incompat&disk.Incompat64bit != 0 {
		le.PutUint32(s[disk.SuperFreeBlocksHiAt:], uint32(freeBlocks>>32))
	}
	le.PutUint32(s[disk.SuperFreeInodesAt:], uint32(freeInodes))
	if e.now != (disk.Timestamp{}) {
		if sec, _ := e.now.Time(); sec >= 0 { // this field has no sign
			le.PutUint32(s[disk.SuperWriteTimeAt:], uint32(sec))
			s[disk.SuperWriteTimeHiAt] = byte(sec >> 32)
		}
	}
	if f.geo.csum {
		disk.SealSuper(s)
	}
	return nil
}

// errTooLarge says that a change does not fit the journal.
var errTooLarge = errors.New("more than the journal holds")

// commit makes the change by the journal. It gives errTooLarge, and has
// written nothing that counts, if that has no room for it.
func (e *Editor) commit() error {
	if err := e.finish(); err != nil {
		return err
	}
	changed := e.fs.dev.changed
	var fresh, inPlace []uint64
	for _, block := range slices.Sorted(maps.Keys(changed)) {
		isFresh, err := e.blocks.fresh(block)
		if err != nil {
			return err
		}
		if isFresh {
			fresh = append(fresh, block)
		} else {
			inPlace = append(inPlace, block)
		}
	}
	if e.journal == nil || e.journal.needs(len(inPlace)) > uint64(e.journal.end-e.journal.first) {
		return errTooLarge
	}
	if err := e.begin(); err != nil {
		return err
	}
	superBlock := e.fs.superBlock()
	for _, block := range fresh {
		if err := e.write(block, changed[block]); err != nil {
			return err
		}
	}
	old := make([]byte, e.fs.geo.blockSize)
	if err := e.fs.dev.readRaw(superBlock, old); err != nil {
		return err
	}
	e.setRecover(old, true)
	if err := e.write(superBlock, old); err != nil {
		return err
	}
	e.setRecover(changed[superBlock], true)
	if err := e.log(inPlace, changed); err != nil {
		return err
	}
	if err := e.sync(); err != nil { // step 1
		return err
	}
	if err := e.writeJournalSuper(e.journal.first); err != nil { // step 2
		return err
	}
	for _, block := range inPlace {
		if err := e.write(block, changed[block]); err != nil {
			return err
		}
	}
	if err := e.sync(); err != nil { // step 3
		return err
	}
	e.journal.sequence++
	if err := e.writeJournalSuper(0); err != nil { // step 4
		return err
	}
	e.setRecover(changed[superBlock], false)
	if err := e.write(superBlock, changed[superBlock]); err != nil {
		return err
	}
	return e.sync() // step 5
}

// apply writes the change into another copy of the image, which nobody uses
// yet, and leaves that without anything to replay.
func (e *Editor) apply(img editImage) error {
	e.img = img
	if e.fs.dev.journal != nil {
		e.begun = false
		if err := e.begin(); err != nil {
			return err
		}
	}
	changed := e.fs.dev.changed
	e.setRecover(changed[e.fs.superBlock()], false)
	for _, block := range slices.Sorted(maps.Keys(changed)) {
		if err := e.write(block, changed[block]); err != nil {
			return err
		}
	}
	return e.sync()
}

// tagsInBlock is the number of blocks that one descriptor block describes. All
// but the first tag leave out the UUID.
func (j *journal) tagsInBlock() int {
	const uuidBytes = 16
	room := j.fs.geo.blockSize - disk.JournalHeaderSize - uuidBytes
	if j.csum() {
		room -= 4
	}
	return room / j.tagSize()
}

// needs is the number of blocks of the log that a transaction of n takes.
func (j *journal) needs(n int) uint64 {
	return uint64(n + ceilDiv(n, j.tagsInBlock()) + 1)
}

// log writes a transaction at the start of the log, which is empty.
func (e *Editor) log(blocks []uint64, data map[uint64][]byte) error {
	j := e.journal
	next := j.first
	put := func(b []byte) error {
		at, err := j.place(next)
		if err != nil {
			return err
		}
		next++
		return e.write(at, b)
	}
	header := func(kind uint32) []byte {
		b := make([]byte, e.fs.geo.blockSize)
		be.PutUint32(b, disk.JournalMagic)
		be.PutUint32(b[4:], kind)
		be.PutUint32(b[8:], j.sequence)
		return b
	}
	for group := range slices.Chunk(blocks, j.tagsInBlock()) {
		b := header(journalDescriptor)
		at := disk.JournalHeaderSize
		copies := make([][]byte, len(group))
		for i, block := range group {
			t := tag{block: block}
			copies[i] = data[block]
			if be.Uint32(copies[i]) == disk.JournalMagic {
				copies[i] = slices.Clone(copies[i])
				be.PutUint32(copies[i], 0)
				t.flags |= tagEscaped
			}
			if i > 0 {
				t.flags |= tagSameUUID
			}
			if i == len(group)-1 {
				t.flags |= tagLast
			}
			j.putTag(b[at:], t, copies[i])
			if at += j.tagSize(); i == 0 {
				at += copy(b[at:], j.super[0x30:0x40])
			}
		}
		if j.csum() {
			be.PutUint32(b[len(b)-4:], disk.JournalTailChecksum(b, j.seed))
		}
		if err := put(b); err != nil {
			return err
		}
		for _, c := range copies {
			if err := put(c); err != nil {
				return err
			}
		}
	}
	b := header(journalCommit)
	sec, nsec := e.now.Time()
	be.PutUint64(b[0x30:], uint64(sec))
	be.PutUint32(b[0x38:], nsec)
	if j.csum() {
		be.PutUint32(b[disk.JournalCommitChecksumAt:], disk.JournalCommitChecksum(b, j.seed))
	}
	return put(b)
}

// putTag encodes what tags decodes.
func (j *journal) putTag(b []byte, t tag, data []byte) {
	be.PutUint32(b, uint32(t.block))
	if j.incompat&journalHas64bit != 0 {
		be.PutUint32(b[8:], uint32(t.block>>32))
	}
	crc := uint32(0)
	if j.csum() {
		crc = disk.JournalBlockChecksum(data, j.sequence, j.seed)
	}
	if j.incompat&journalHasCsumV3 != 0 {
		be.PutUint32(b[4:], t.flags)
		be.PutUint32(b[12:], crc)
		return
	}
	be.PutUint16(b[4:], uint16(crc))
	be.PutUint16(b[6:], uint16(t.flags))
}
