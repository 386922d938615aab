package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"

	"banger/ext4/internal/disk"
)

// The journal (Documentation/filesystems/ext4/journal.rst, fs/jbd2). All of
// it is big endian.
var be = binary.BigEndian

const (
	journalDescriptor = 1 // h_blocktype
	journalCommit     = 2
	journalSuper1     = 3
	journalSuper2     = 4
	journalRevoke     = 5

	journalHasRevoke      = 0x1 // incompatible features
	journalHas64bit       = 0x2
	journalHasAsyncCommit = 0x4
	journalHasCsumV2      = 0x8
	journalHasCsumV3      = 0x10
	journalHasFastCommit  = 0x20

	tagEscaped  = 0x1 // the block began with the journal's magic number
	tagSameUUID = 0x2
	tagLast     = 0x8

	// maxRecovered bounds the blocks of a replay, and those it revokes: each
	// costs some 40 bytes of memory. It is what a journal of 2 GiB holds.
	maxRecovered = 1 << 19
)

// journal is a journal inside the image.
type journal struct {
	fs       *FS
	inode    *inode
	super    []byte // the 1024 bytes of its superblock
	incompat uint32
	first    uint32 // block of the log, within the journal
	end      uint32 // first block after the log
	start    uint32 // block where the oldest transaction starts; 0: nothing to replay
	sequence uint32 // of that transaction
	seed     uint32
}

// csum tells whether blocks of the log have checksums.
func (j *journal) csum() bool { return j.incompat&(journalHasCsumV2|journalHasCsumV3) != 0 }

// openJournal finds the journal and judges its superblock.
func (f *FS) openJournal() (*journal, error) {
	n, err := f.inode(f.super.JournalIno)
	if err != nil {
		return nil, err
	}
	if n.kind() != disk.TypeRegular || n.has(disk.InodeInlineData) {
		return nil, corrupt("inode %d: not a journal", n.ino)
	}
	j := &journal{fs: f, inode: n}
	return j, j.open()
}

func (j *journal) open() error {
	s, err := j.block(0)
	if err != nil {
		return err
	}
	s = s[:disk.SuperblockSize]
	kind := be.Uint32(s[4:])
	if be.Uint32(s) != disk.JournalMagic || kind != journalSuper1 && kind != journalSuper2 {
		return corrupt("its superblock is none")
	}
	if kind == journalSuper2 {
		j.incompat = be.Uint32(s[0x28:])
	}
	j.super = s
	j.first, j.end = be.Uint32(s[0x14:]), be.Uint32(s[0x10:])
	j.start, j.sequence = be.Uint32(s[0x1C:]), be.Uint32(s[0x18:])
	j.seed = disk.CRC32C(^uint32(0), s[0x30:0x40])
	bs := j.fs.geo.blockSize
	const known = journalHasRevoke | journalHas64bit | journalHasAsyncCommit | journalHasCsumV2 | journalHasCsumV3 | journalHasFastCommit
	switch {
	case j.incompat&^known != 0:
		return fmt.Errorf("feature %#x: %w", j.incompat&^known, errors.ErrUnsupported)
	case j.csum() && disk.JournalSuperChecksum(s) != be.Uint32(s[disk.JournalChecksumAt:]):
		return corrupt("the checksum of its superblock does not match")
	case be.Uint32(s[0x0C:]) != uint32(bs):
		return corrupt("blocks of %d bytes", be.Uint32(s[0x0C:]))
	case uint64(j.end) > j.inode.size/uint64(bs) || j.first == 0 || j.first >= j.end:
		return corrupt("log of blocks %d to %d", j.first, j.end)
	}
	if j.incompat&journalHasFastCommit != 0 {
		fast := be.Uint32(s[0x54:])
		if fast == 0 {
			fast = 256
		}
		if fast < 2 || fast >= j.end-j.first {
			return corrupt("%d blocks for fast commits", fast)
		}
		j.end -= fast
	}
	if j.start != 0 && (j.start < j.first || j.start >= j.end) {
		return corrupt("its log starts at block %d", j.start)
	}
	return nil
}

// place finds where a block of the journal lies in the image.
func (j *journal) place(n uint32) (uint64, error) {
	m, err := j.fs.mapBlock(j.inode, uint64(n))
	if err == nil && m.start == 0 {
		err = corrupt("a hole at block %d", n)
	}
	return m.start, err
}

// block reads a block of the journal.
func (j *journal) block(n uint32) ([]byte, error) {
	at, err := j.place(n)
	if err != nil {
		return nil, err
	}
	b := make([]byte, j.fs.geo.blockSize)
	return b, j.fs.dev.readRaw(at, b)
}

// after is the block that follows n in the log, which is a ring.
func (j *journal) after(n uint32) uint32 {
	if n++; n == j.end {
		return j.first
	}
	return n
}

// recovery is what a journal has to replay: for blocks of the file system,
// where in the image the block lies that takes its place.
type recovery struct {
	dev    *blockDevice
	blocks map[uint64]logged
	next   uint32 // the sequence of the transaction after the last one
}

type logged struct {
	at      uint64
	escaped bool
}

// read reads block n from the log, if it is there.
func (r *recovery) read(n uint64, p []byte) (found bool, err error) {
	l, ok := r.blocks[n]
	if !ok {
		return false, nil
	}
	if err := r.dev.readRaw(l.at, p); err != nil {
		return false, err
	}
	if l.escaped {
		be.PutUint32(p, disk.JournalMagic)
	}
	return true, nil
}

// A transaction is one of the log: its blocks from start to before commit.
type transaction struct {
	sequence      uint32
	start, commit uint32
}

// recover reads the log as fs/jbd2/recovery.c does: find the last transaction
// that is whole, then what they revoke, then what they write. It gives nil if
// there is nothing.
func (j *journal) recover() (*recovery, error) {
	if j.start == 0 {
		return nil, nil
	}
	if j.incompat&journalHasAsyncCommit != 0 {
		return nil, fmt.Errorf("asynchronous commits need recovery: %w", errors.ErrUnsupported)
	}
	list, err := j.transactions()
	if err != nil {
		return nil, err
	}
	r := &recovery{dev: j.fs.dev, blocks: make(map[uint64]logged), next: j.sequence + uint32(len(list))}
	if err := j.refuseFastCommits(r.next); err != nil {
		return nil, err
	}
	revoked := make(map[uint64]uint32)
	for _, t := range list {
		err := j.eachBlock(t, func(kind uint32, b []byte, _ uint32) error {
			if kind != journalRevoke {
				return nil
			}
			return j.revokes(b, func(block uint64) error {
				if len(revoked) >= maxRecovered {
					return fmt.Errorf("more than %d revoked blocks: %w", maxRecovered, errors.ErrUnsupported)
				}
				revoked[block] = t.sequence
				return nil
			})
		})
		if err != nil {
			return nil, err
		}
	}
	for _, t := range list {
		err := j.eachBlock(t, func(kind uint32, b []byte, at uint32) error {
			if kind != journalDescriptor {
				return nil
			}
			_, err := j.tags(b, func(tag tag) error {
				at = j.after(at)
				if last, ok := revoked[tag.block]; ok && int32(t.sequence-last) <= 0 {
					return nil
				}
				return j.take(r, t.sequence, at, tag)
			})
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return r, nil
}

// take adds one block to a recovery.
func (j *journal) take(r *recovery, sequence, at uint32, tag tag) error {
	if tag.block >= j.fs.super.Blocks {
		return corrupt("transaction %d: writes block %d", sequence, tag.block)
	}
	if len(r.blocks) >= maxRecovered {
		return fmt.Errorf("more than %d blocks to replay: %w", maxRecovered, errors.ErrUnsupported)
	}
	place, err := j.place(at)
	if err != nil {
		return err
	}
	if j.csum() {
		b := make([]byte, j.fs.geo.blockSize)
		if err := j.fs.dev.readRaw(place, b); err != nil {
			return err
		}
		if !tag.checksumOK(j, sequence, b) {
			return corrupt("transaction %d: the checksum of block %d does not match", sequence, tag.block)
		}
	}
	r.blocks[tag.block] = logged{place, tag.flags&tagEscaped != 0}
	return nil
}

// transactions finds those that are whole. The log may not be longer than the
// journal.
func (j *journal) transactions() (list []transaction, err error) {
	at, seen := j.start, uint32(0)
	t := transaction{sequence: j.sequence, start: at}
	for seen < j.end-j.first {
		b, err := j.block(at)
		if err != nil {
			return nil, err
		}
		if be.Uint32(b) != disk.JournalMagic || be.Uint32(b[8:]) != t.sequence {
			break
		}
		kind := be.Uint32(b[4:])
		if kind == journalCommit {
			if !j.commitOK(b) {
				break
			}
			t.commit = at
			list = append(list, t)
			at = j.after(at)
			seen++
			t = transaction{sequence: t.sequence + 1, start: at}
			continue
		}
		if kind != journalDescriptor && kind != journalRevoke || !j.tailOK(b) {
			break
		}
		count := 0
		if kind == journalDescriptor {
			if count, err = j.tags(b, func(tag) error { return nil }); err != nil {
				return nil, err
			}
		}
		for range count + 1 {
			at = j.after(at)
			seen++
		}
	}
	return list, nil
}

// eachBlock calls do for the descriptor and revoke blocks of a transaction
// that is whole.
func (j *journal) eachBlock(t transaction, do func(kind uint32, b []byte, at uint32) error) error {
	for at := t.start; at != t.commit; {
		b, err := j.block(at)
		if err != nil {
			return err
		}
		kind := be.Uint32(b[4:])
		if err := do(kind, b, at); err != nil {
			return err
		}
		count := 0
		if kind == journalDescriptor {
			if count, err = j.tags(b, func(tag) error { return nil }); err != nil {
				return err
			}
		}
		for range count + 1 {
			at = j.after(at)
		}
	}
	return nil
}

// tailOK checks a descriptor or revoke block.
func (j *journal) tailOK(b []byte) bool {
	return !j.csum() || disk.JournalTailChecksum(b, j.seed) == be.Uint32(b[len(b)-4:])
}

func (j *journal) commitOK(b []byte) bool {
	return !j.csum() || disk.JournalCommitChecksum(b, j.seed) == be.Uint32(b[disk.JournalCommitChecksumAt:])
}

// tag is an entry of a descriptor block.
type tag struct {
	block    uint64
	flags    uint32
	checksum uint32
}

func (t *tag) checksumOK(j *journal, sequence uint32, b []byte) bool {
	crc := disk.JournalBlockChecksum(b, sequence, j.seed)
	if j.incompat&journalHasCsumV3 == 0 {
		crc &= 0xFFFF
	}
	return crc == t.checksum
}

// tagSize is journal_tag_bytes of fs/jbd2/journal.c.
func (j *journal) tagSize() int {
	if j.incompat&journalHasCsumV3 != 0 {
		return 16
	}
	size := 8
	if j.incompat&journalHas64bit != 0 {
		size += 4
	}
	if j.incompat&journalHasCsumV2 != 0 {
		size += 2
	}
	return size
}

// tags calls do for each tag of a descriptor block, and counts them.
func (j *journal) tags(b []byte, do func(tag) error) (count int, err error) {
	const uuidBytes = 16
	size, end := j.tagSize(), len(b)
	if j.csum() {
		end -= 4
	}
	for at := disk.JournalHeaderSize; at+size <= end; count++ {
		e := b[at:]
		var t tag
		t.block = uint64(be.Uint32(e))
		if j.incompat&journalHasCsumV3 != 0 {
			t.flags = be.Uint32(e[4:])
			t.checksum = be.Uint32(e[12:])
		} else {
			t.checksum = uint32(be.Uint16(e[4:]))
			t.flags = uint32(be.Uint16(e[6:]))
		}
		if j.incompat&journalHas64bit != 0 {
			t.block |= uint64(be.Uint32(e[8:])) << 32
		}
		if at += size; t.flags&tagSameUUID == 0 {
			at += uuidBytes
		}
		if err := do(t); err != nil {
			return count, err
		}
		if t.flags&tagLast != 0 {
			return count + 1, nil
		}
	}
	return count, nil
}

// revokes calls do for each block number in a revoke block.
func (j *journal) revokes(b []byte, do func(block uint64) error) error {
	size, room := 4, len(b)
	if j.incompat&journalHas64bit != 0 {
		size = 8
	}
	if j.csum() {
		room -= 4
	}
	used := int(be.Uint32(b[disk.JournalHeaderSize:]))
	if used < disk.JournalHeaderSize+4 || used > room {
		return corrupt("revoke block of %d bytes", used)
	}
	for at := disk.JournalHeaderSize + 4; at+size <= used; at += size {
		block := uint64(be.Uint32(b[at:]))
		if size == 8 {
			block = be.Uint64(b[at:])
		}
		if err := do(block); err != nil {
			return err
		}
	}
	return nil
}

// refuseFastCommits looks whether fast commits follow the last transaction.
func (j *journal) refuseFastCommits(next uint32) error {
	if j.incompat&journalHasFastCommit == 0 {
		return nil
	}
	const headTag = 9            // EXT4_FC_TAG_HEAD of fs/ext4/fast_commit.h
	b, err := j.block(j.end + 1) // the block between is never used (j_fc_first)
	if err != nil {
		return err
	}
	if le.Uint16(b) == headTag && le.Uint32(b[8:]) == next {
		return fmt.Errorf("fast commits need recovery: %w", errors.ErrUnsupported)
	}
	return nil
}
