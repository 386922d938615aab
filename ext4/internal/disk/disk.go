// Package disk holds the on-disk structures of ext4 as this module writes
// them: sizes, offsets, flags and checksums, and no decisions. Names and
// layouts follow fs/ext4/ext4.h, fs/ext4/xattr.h and include/linux/jbd2.h of
// the Linux kernel. Everything is little endian but the journal, which is big
// endian.
package disk

import (
	"encoding/binary"
	"hash/crc32"
)

// The one geometry this module writes.
const (
	BlockSize        = 4096 // bytes
	SectorSize       = 512  // bytes, the unit of i_blocks
	SectorsPerBlock  = BlockSize / SectorSize
	BlocksPerGroup   = 8 * BlockSize // one bitmap block's worth
	InodeSize        = 256           // bytes
	InodesPerBlock   = BlockSize / InodeSize
	MaxInodesInGroup = 8 * BlockSize
	DescSize         = 64 // bytes, with the 64bit feature
	DescsPerBlock    = BlockSize / DescSize
	SuperblockSize   = 1024 // bytes
	SuperblockOffset = 1024 // of the primary, in block 0; backups start their block
	ExtraIsize       = 32   // bytes of the inode past the first 128 in use by fixed fields
)

// Inode numbers with a fixed meaning.
const (
	RootIno    = 2
	JournalIno = 8
	FirstIno   = 11 // first one free for files
)

// Features.
const (
	CompatHasJournal = 0x4
	CompatExtAttr    = 0x8
	CompatDirIndex   = 0x20

	IncompatFiletype = 0x2
	IncompatExtents  = 0x40
	Incompat64bit    = 0x80
	IncompatFlexBG   = 0x200
	IncompatEAInode  = 0x400

	ROCompatSparseSuper  = 0x1
	ROCompatLargeFile    = 0x2
	ROCompatHugeFile     = 0x8
	ROCompatDirNlink     = 0x20
	ROCompatExtraIsize   = 0x40
	ROCompatMetadataCsum = 0x400
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC32C continues a checksum the way the kernel's crc32c does: no inversion
// before or after. A fresh one starts from ^uint32(0).
func CRC32C(crc uint32, p []byte) uint32 {
	return ^crc32.Update(^crc, castagnoli, p)
}

// CRC32CUint32 continues crc over v as four little-endian bytes.
func CRC32CUint32(crc, v uint32) uint32 {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	return CRC32C(crc, b[:])
}

// FSSeed is the checksum seed of a whole file system.
func FSSeed(uuid [16]byte) uint32 { return CRC32C(^uint32(0), uuid[:]) }

// InodeSeed is the checksum seed of everything that belongs to one inode.
func InodeSeed(fsSeed, ino, generation uint32) uint32 {
	return CRC32CUint32(CRC32CUint32(fsSeed, ino), generation)
}

var le = binary.LittleEndian

// SealDirBlock writes the 12-byte checksum tail of a directory leaf, the block b.
func SealDirBlock(b []byte, inodeSeed uint32) {
	at := len(b) - DirTailSize
	t := b[at:]
	clear(t)
	le.PutUint16(t[4:], DirTailSize)
	t[7] = DirTailType
	le.PutUint32(t[8:], CRC32C(inodeSeed, b[:at]))
}

// SealIndexBlock writes the checksum behind the index entries of an htree
// root or node. The entries start at offset countAt; count of at most limit
// of them are in use.
func SealIndexBlock(b []byte, countAt, count, limit int, inodeSeed uint32) {
	t := b[countAt+limit*IndexEntrySize:][:IndexTailSize]
	clear(t)
	crc := CRC32C(inodeSeed, b[:countAt+count*IndexEntrySize])
	crc = CRC32C(crc, t) // the reserved word, then the checksum as zero
	le.PutUint32(t[4:], crc)
}

// SealExtentBlock writes the checksum of an extent tree block b, behind the
// last entry it has room for.
func SealExtentBlock(b []byte, inodeSeed uint32) {
	at := extentSize * (1 + ExtentsInBlock(len(b)))
	le.PutUint32(b[at:], CRC32C(inodeSeed, b[:at]))
}

// SealXattrBlock writes the checksum of the xattr block b that lies at block.
func SealXattrBlock(b []byte, block uint64, fsSeed uint32) {
	var at [8]byte
	le.PutUint64(at[:], block)
	le.PutUint32(b[16:], 0)
	le.PutUint32(b[16:], CRC32C(CRC32C(fsSeed, at[:]), b))
}

// Directory blocks.
const (
	DirTailSize    = 12
	DirTailType    = 0xDE // file type of the tail, that no real entry has
	DirEntryHeader = 8    // bytes before the name
	IndexEntrySize = 8    // hash and block
	IndexRootAt    = 32   // offset of count and limit in an htree root
	IndexNodeAt    = 8    // and in an inner node
	IndexTailSize  = 8    // checksum behind the last possible entry of an index
	HashHalfMD4    = 1    // s_def_hash_version; signed or not says the superblock
	SignedHash     = 0x01 // s_flags
	UnsignedHash   = 0x02
)

// PutDirEntry encodes an entry that takes recLen bytes, of which the field
// holds at most 32 KiB as they are. fileType is 0 without the filetype feature.
func PutDirEntry(b []byte, ino uint32, recLen int, fileType byte, name string) {
	le.PutUint32(b, ino)
	le.PutUint16(b[4:], uint16(recLen))
	b[6] = byte(len(name))
	b[7] = fileType
	copy(b[DirEntryHeader:], name)
}

// PutIndexRootInfo encodes struct dx_root_info, which follows the two dot entries.
func PutIndexRootInfo(b []byte, hashVersion byte, levels int) {
	b[24+4] = hashVersion
	b[24+5] = 8 // its own length
	b[24+6] = byte(levels)
}

// PutIndexEntry encodes entry i of an index whose entries start at offset
// countAt. Entry 0 has no hash: count and limit lie there.
func PutIndexEntry(b []byte, countAt, i int, hash, block uint32) {
	e := b[countAt+i*IndexEntrySize:]
	if i > 0 {
		le.PutUint32(e, hash)
	}
	le.PutUint32(e[4:], block)
}

// PutIndexCount encodes struct dx_countlimit.
func PutIndexCount(b []byte, countAt, count, limit int) {
	le.PutUint16(b[countAt:], uint16(limit))
	le.PutUint16(b[countAt+2:], uint16(count))
}

// Extent trees.
const (
	ExtentsInInode = 4
	MaxExtentLen   = 32768 // blocks; more means "unwritten"
	extentMagic    = 0xF30A
	extentSize     = 12
)

// ExtentsInBlock is the number of entries of an extent tree block; where there
// are checksums, one lies in what remains.
func ExtentsInBlock(blockSize int) int { return (blockSize - extentSize) / extentSize }

// PutExtentHeader encodes struct ext4_extent_header.
func PutExtentHeader(b []byte, entries, max, depth int) {
	le.PutUint16(b, extentMagic)
	le.PutUint16(b[2:], uint16(entries))
	le.PutUint16(b[4:], uint16(max))
	le.PutUint16(b[6:], uint16(depth))
	le.PutUint32(b[8:], 0)
}

// PutExtent encodes leaf entry i behind the header at b.
func PutExtent(b []byte, i int, logical uint32, length uint32, physical uint64) {
	e := b[extentSize*(i+1):]
	le.PutUint32(e, logical)
	le.PutUint16(e[4:], uint16(length))
	le.PutUint16(e[6:], uint16(physical>>32))
	le.PutUint32(e[8:], uint32(physical))
}

// PutExtentIndex encodes index entry i behind the header at b: the child
// block holds what starts at logical.
func PutExtentIndex(b []byte, i int, logical uint32, child uint64) {
	e := b[extentSize*(i+1):]
	le.PutUint32(e, logical)
	le.PutUint32(e[4:], uint32(child))
	le.PutUint16(e[8:], uint16(child>>32))
	le.PutUint16(e[10:], 0)
}

// Xattrs.
const (
	XattrMagic       = 0xEA020000
	XattrBlockHeader = 32  // bytes
	XattrEntryHeader = 16  // bytes before the name
	GoodOldInode     = 128 // bytes of an inode before i_extra_isize
)
