package disk

import "bytes"

// Features of file systems that others make. Each list is by bit, with the
// name e2fsprogs has for it.
const (
	CompatFastCommit  = 0x400
	CompatSparse2     = 0x200
	CompatOrphanFile  = 0x1000
	CompatResizeInode = 0x10

	IncompatRecover    = 0x4
	IncompatMetaBG     = 0x10
	IncompatMMP        = 0x100
	IncompatCsumSeed   = 0x2000
	IncompatLargeDir   = 0x4000
	IncompatInlineData = 0x8000

	ROCompatGDTCsum  = 0x10
	ROCompatBigalloc = 0x200
	ROCompatProject  = 0x2000
	ROCompatVerity   = 0x8000
)

var compatNames = map[uint32]string{
	0x1: "dir_prealloc", 0x2: "imagic_inodes", 0x4: "has_journal", 0x8: "ext_attr", 0x10: "resize_inode", 0x20: "dir_index",
	0x40: "lazy_bg", 0x100: "snapshot_bitmap", 0x200: "sparse_super2", 0x400: "fast_commit", 0x800: "stable_inodes", 0x1000: "orphan_file",
}

var incompatNames = map[uint32]string{
	0x1: "compression", 0x2: "filetype", 0x4: "needs_recovery", 0x8: "journal_dev", 0x10: "meta_bg", 0x40: "extent", 0x80: "64bit",
	0x100: "mmp", 0x200: "flex_bg", 0x400: "ea_inode", 0x1000: "dirdata", 0x2000: "metadata_csum_seed", 0x4000: "large_dir",
	0x8000: "inline_data", 0x10000: "encrypt", 0x20000: "casefold",
}

var roCompatNames = map[uint32]string{
	0x1: "sparse_super", 0x2: "large_file", 0x8: "huge_file", 0x10: "uninit_bg", 0x20: "dir_nlink", 0x40: "extra_isize", 0x80: "snapshot",
	0x100: "quota", 0x200: "bigalloc", 0x400: "metadata_csum", 0x800: "replica", 0x1000: "read-only", 0x2000: "project",
	0x4000: "shared_blocks", 0x8000: "verity", 0x10000: "orphan_present",
}

// Super is what a reader or editor takes from struct ext4_super_block of any
// file system. Sizes are in the units that their names say.
type Super struct {
	Inodes                     uint32
	Blocks                     uint64
	FirstDataBlock             uint32
	LogBlockSize               uint32
	BlocksPerGroup             uint32
	InodesPerGroup             uint32
	Magic, State               uint16
	Revision                   uint32
	FirstIno                   uint32
	InodeSize                  uint16
	Compat, Incompat, ROCompat uint32
	UUID                       [16]byte
	ReservedGDT                uint16
	JournalIno, LastOrphan     uint32
	HashSeed                   [16]byte
	HashVersion                byte
	DescSize                   uint16
	FirstMetaBG                uint32
	Flags                      uint32
	ChecksumType               byte
	BackupGroups               [2]uint32
	ChecksumSeed               uint32
}

// Values of Super fields.
const (
	SuperMagic     = superMagic
	StateValid     = 0x1
	StateErrors    = 0x2
	ChecksumCRC32C = checksumCRC32C
)

// Offsets of superblock fields that an editor changes in place.
const (
	SuperFreeBlocksAt   = 0x0C
	SuperFreeInodesAt   = 0x10
	SuperWriteTimeAt    = 0x30
	SuperRevisionAt     = 0x4C
	SuperFirstInoAt     = 0x54
	SuperInodeSizeAt    = 0x58
	SuperCompatAt       = 0x5C
	SuperIncompatAt     = 0x60
	SuperROCompatAt     = 0x64
	SuperLastOrphanAt   = 0xE8
	SuperFreeBlocksHiAt = 0x158
	SuperWriteTimeHiAt  = 0x274
	superChecksumAt     = 0x3FC
)

// DecodeSuper reads the 1024 bytes of a superblock and judges nothing.
func DecodeSuper(b []byte) (s Super) {
	s.Inodes = le.Uint32(b[0x00:])
	s.Blocks = uint64(le.Uint32(b[0x04:]))
	s.FirstDataBlock = le.Uint32(b[0x14:])
	s.LogBlockSize = le.Uint32(b[0x18:])
	s.BlocksPerGroup = le.Uint32(b[0x20:])
	s.InodesPerGroup = le.Uint32(b[0x28:])
	s.Magic = le.Uint16(b[0x38:])
	s.State = le.Uint16(b[0x3A:])
	s.Revision = le.Uint32(b[0x4C:])
	s.FirstIno, s.InodeSize = FirstIno, 128 // revision 0 has no such fields
	if s.Revision >= dynamicRevision {
		s.FirstIno = le.Uint32(b[0x54:])
		s.InodeSize = le.Uint16(b[0x58:])
		s.Compat = le.Uint32(b[0x5C:])
		s.Incompat = le.Uint32(b[0x60:])
		s.ROCompat = le.Uint32(b[0x64:])
	}
	copy(s.UUID[:], b[0x68:])
	s.ReservedGDT = le.Uint16(b[0xCE:])
	s.JournalIno = le.Uint32(b[0xE0:])
	s.LastOrphan = le.Uint32(b[0xE8:])
	copy(s.HashSeed[:], b[0xEC:])
	s.HashVersion = b[0xFC]
	s.DescSize = 32
	if s.Incompat&Incompat64bit != 0 {
		s.DescSize = le.Uint16(b[0xFE:])
		s.Blocks |= uint64(le.Uint32(b[0x150:])) << 32
	}
	s.FirstMetaBG = le.Uint32(b[0x104:])
	s.Flags = le.Uint32(b[0x160:])
	s.ChecksumType = b[0x175]
	s.BackupGroups = [2]uint32{le.Uint32(b[0x24C:]), le.Uint32(b[0x250:])}
	s.ChecksumSeed = le.Uint32(b[0x270:])
	return s
}

// SuperChecksumOK tells whether the checksum of a superblock that has one is
// right.
func SuperChecksumOK(b []byte) bool {
	return le.Uint32(b[superChecksumAt:]) == CRC32C(^uint32(0), b[:superChecksumAt])
}

// SealSuper writes the checksum of a superblock.
func SealSuper(b []byte) {
	le.PutUint32(b[superChecksumAt:], CRC32C(^uint32(0), b[:superChecksumAt]))
}

// FeatureNames gives the names of the features set in each word, as
// e2fsprogs has them; a bit nobody knows is named by its number.
func FeatureNames(compat, incompat, roCompat uint32) (names []string) {
	for _, set := range [...]struct {
		bits  uint32
		names map[uint32]string
		kind  string
	}{{compat, compatNames, "C"}, {incompat, incompatNames, "I"}, {roCompat, roCompatNames, "R"}} {
		for bit := range 32 {
			mask := uint32(1) << bit
			if set.bits&mask == 0 {
				continue
			}
			name := set.names[mask]
			if name == "" {
				name = "FEATURE_" + set.kind + string('0'+byte(bit/10)) + string('0'+byte(bit%10))
			}
			names = append(names, name)
		}
	}
	return names
}

// DecodeGroupDesc reads a descriptor of 32 bytes, or of 64 or more.
func DecodeGroupDesc(b []byte) (d GroupDesc) {
	d.BlockBitmap = uint64(le.Uint32(b[0x00:]))
	d.InodeBitmap = uint64(le.Uint32(b[0x04:]))
	d.InodeTable = uint64(le.Uint32(b[0x08:]))
	d.FreeBlocks = uint32(le.Uint16(b[0x0C:]))
	d.FreeInodes = uint32(le.Uint16(b[0x0E:]))
	d.UsedDirs = uint32(le.Uint16(b[0x10:]))
	d.Flags = le.Uint16(b[0x12:])
	d.BlockBitmapCsum = uint32(le.Uint16(b[0x18:]))
	d.InodeBitmapCsum = uint32(le.Uint16(b[0x1A:]))
	d.UnusedInodes = uint32(le.Uint16(b[0x1C:]))
	if len(b) >= DescSize {
		d.BlockBitmap |= uint64(le.Uint32(b[0x20:])) << 32
		d.InodeBitmap |= uint64(le.Uint32(b[0x24:])) << 32
		d.InodeTable |= uint64(le.Uint32(b[0x28:])) << 32
		d.FreeBlocks |= uint32(le.Uint16(b[0x2C:])) << 16
		d.FreeInodes |= uint32(le.Uint16(b[0x2E:])) << 16
		d.UsedDirs |= uint32(le.Uint16(b[0x30:])) << 16
		d.UnusedInodes |= uint32(le.Uint16(b[0x32:])) << 16
		d.BlockBitmapCsum |= uint32(le.Uint16(b[0x38:])) << 16
		d.InodeBitmapCsum |= uint32(le.Uint16(b[0x3A:])) << 16
	}
	return d
}

// UpdateGroupDesc writes back the counts, flags and bitmap checksums of d into
// a descriptor of any size; everything else in it stays.
func UpdateGroupDesc(b []byte, d *GroupDesc) {
	le.PutUint16(b[0x0C:], uint16(d.FreeBlocks))
	le.PutUint16(b[0x0E:], uint16(d.FreeInodes))
	le.PutUint16(b[0x10:], uint16(d.UsedDirs))
	le.PutUint16(b[0x12:], d.Flags)
	le.PutUint16(b[0x18:], uint16(d.BlockBitmapCsum))
	le.PutUint16(b[0x1A:], uint16(d.InodeBitmapCsum))
	le.PutUint16(b[0x1C:], uint16(d.UnusedInodes))
	if len(b) >= DescSize {
		le.PutUint16(b[0x2C:], uint16(d.FreeBlocks>>16))
		le.PutUint16(b[0x2E:], uint16(d.FreeInodes>>16))
		le.PutUint16(b[0x30:], uint16(d.UsedDirs>>16))
		le.PutUint16(b[0x32:], uint16(d.UnusedInodes>>16))
		le.PutUint16(b[0x38:], uint16(d.BlockBitmapCsum>>16))
		le.PutUint16(b[0x3A:], uint16(d.InodeBitmapCsum>>16))
	}
}

const descChecksumAt = 0x1E

// DescChecksum is the checksum of a group descriptor under metadata_csum
// (fs/ext4/super.c, ext4_group_desc_csum).
func DescChecksum(b []byte, group, fsSeed uint32) uint16 {
	crc := CRC32C(CRC32CUint32(fsSeed, group), b[:descChecksumAt])
	crc = CRC32C(crc, []byte{0, 0})
	return uint16(CRC32C(crc, b[descChecksumAt+2:]))
}

// DescChecksum16 is the same under uninit_bg, a CRC-16.
func DescChecksum16(b []byte, group uint32, uuid [16]byte) uint16 {
	var number [4]byte
	le.PutUint32(number[:], group)
	crc := crc16(^uint16(0), uuid[:])
	crc = crc16(crc, number[:])
	crc = crc16(crc, b[:descChecksumAt])
	return crc16(crc, b[descChecksumAt+2:])
}

// StoredDescChecksum is the checksum a group descriptor carries.
func StoredDescChecksum(b []byte) uint16 { return le.Uint16(b[descChecksumAt:]) }

// PutDescChecksum sets it.
func PutDescChecksum(b []byte, crc uint16) { le.PutUint16(b[descChecksumAt:], crc) }

// crc16 is the kernel's: polynomial 0x8005, bits reversed.
func crc16(crc uint16, p []byte) uint16 {
	for _, c := range p {
		crc ^= uint16(c)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xA001
			} else {
				crc >>= 1
			}
		}
	}
	return crc
}

// More flags of an Inode.
const (
	InodeEncrypt    = 0x800
	InodeHugeFile   = 0x40000
	InodeInlineData = 0x10000000
	InodeCasefold   = 0x40000000
)

// Offsets of inode fields that an editor changes in place.
const (
	InodeModeAt       = 0x00
	InodeUIDAt        = 0x02
	InodeSizeAt       = 0x04
	InodeAtimeAt      = 0x08
	InodeCtimeAt      = 0x0C
	InodeMtimeAt      = 0x10
	InodeDtimeAt      = 0x14
	InodeGIDAt        = 0x18
	InodeLinksAt      = 0x1A
	InodeBlocksAt     = 0x1C
	InodeFlagsAt      = 0x20
	InodeVersionAt    = 0x24
	InodeBlockAt      = 0x28
	InodeGenerationAt = 0x64
	InodeXattrBlockAt = 0x68
	InodeSizeHiAt     = 0x6C
	InodeBlocksHiAt   = 0x74
	InodeXattrHiAt    = 0x76
	InodeUIDHiAt      = 0x78
	InodeGIDHiAt      = 0x7A
	InodeExtraAt      = 0x80
	InodeCtimeExtraAt = 0x84
	InodeMtimeExtraAt = 0x88
	InodeAtimeExtraAt = 0x8C
	InodeCrtimeAt     = 0x90
	InodeCrtimeXAt    = 0x94
)

// InodeExtra is i_extra_isize, 0 for inodes of 128 bytes. It may be more than
// the inode holds: the caller checks.
func InodeExtra(b []byte) int {
	if len(b) <= GoodOldInode {
		return 0
	}
	return int(le.Uint16(b[InodeExtraAt:]))
}

// InodeChecksumOK tells whether an inode's checksum is right.
func InodeChecksumOK(b []byte, ino, fsSeed uint32) bool {
	sealed := bytes.Clone(b)
	SealInode(sealed, ino, fsSeed)
	return bytes.Equal(sealed, b)
}

// Time is the second and nanosecond that a Timestamp means (fs/ext4/ext4.h,
// ext4_decode_extra_time).
func (t Timestamp) Time() (sec int64, nsec uint32) {
	return int64(int32(t.Sec)) + int64(t.Extra&3)<<32, t.Extra >> 2
}

// DecodeDevice is the inverse of PutDevice on the 60 bytes of i_block.
func DecodeDevice(block []byte) (major, minor uint32) {
	if old := le.Uint32(block); old != 0 {
		return old >> 8 & 0xFF, old & 0xFF
	}
	v := le.Uint32(block[4:])
	return v >> 8 & 0xFFF, v&0xFF | v>>12&0xFFF00
}

// ExtentMagic opens every node of an extent tree.
const ExtentMagic = extentMagic

// ExtentSize is the size of an entry of a node, and of its header.
const ExtentSize = extentSize

// ExtentHeader is struct ext4_extent_header.
type ExtentHeader struct{ Magic, Entries, Max, Depth uint16 }

// DecodeExtentHeader reads the first 12 bytes of a node.
func DecodeExtentHeader(b []byte) ExtentHeader {
	return ExtentHeader{le.Uint16(b), le.Uint16(b[2:]), le.Uint16(b[4:]), le.Uint16(b[6:])}
}

// DecodeExtent reads entry i of a leaf. length is as stored: more than
// MaxExtentLen means unwritten.
func DecodeExtent(b []byte, i int) (logical uint32, length uint16, physical uint64) {
	e := b[extentSize*(i+1):]
	return le.Uint32(e), le.Uint16(e[4:]), uint64(le.Uint16(e[6:]))<<32 | uint64(le.Uint32(e[8:]))
}

// DecodeExtentIndex reads entry i of an inner node.
func DecodeExtentIndex(b []byte, i int) (logical uint32, child uint64) {
	e := b[extentSize*(i+1):]
	return le.Uint32(e), uint64(le.Uint16(e[8:]))<<32 | uint64(le.Uint32(e[4:]))
}
