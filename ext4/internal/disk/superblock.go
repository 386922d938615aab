package disk

// Superblock holds the fields of struct ext4_super_block that differ between
// file systems of this module; Encode knows the rest.
type Superblock struct {
	Inodes, FreeInodes         uint32
	Blocks, Reserved, Free     uint64
	InodesPerGroup             uint32
	WriteTime, MakeTime, Check int64 // seconds since 1970, 40 bits
	GroupNr                    uint16
	Compat, Incompat, ROCompat uint32
	UUID                       [16]byte
	Label                      [16]byte
	HashSeed                   [16]byte
	HashFlag                   uint32 // SignedHash or UnsignedHash
	JournalIno                 uint32 // 0: none
	JournalBlock               [60]byte
	JournalSize                uint64 // bytes
	KBytesWritten              uint64
	Overhead                   uint32 // blocks that no file can ever have
}

// Values of Superblock fields.
const (
	superMagic       = 0xEF53
	stateClean       = 1
	errorsContinue   = 1
	dynamicRevision  = 1
	mountXattrUser   = 0x4
	mountACL         = 0x8
	checksumCRC32C   = 1
	journalInBackup  = 1 // s_jnl_backup_type: the journal inode's blocks are kept
	logGroupsPerFlex = 4
)

// Encode writes the 1024 bytes, checksum included.
func (s *Superblock) Encode(b []byte) {
	b = b[:SuperblockSize]
	clear(b)
	le.PutUint32(b[0x00:], s.Inodes)
	le.PutUint32(b[0x04:], uint32(s.Blocks))
	le.PutUint32(b[0x08:], uint32(s.Reserved))
	le.PutUint32(b[0x0C:], uint32(s.Free))
	le.PutUint32(b[0x10:], s.FreeInodes)
	le.PutUint32(b[0x18:], 2) // log2(BlockSize) - 10
	le.PutUint32(b[0x1C:], 2) // clusters are blocks
	le.PutUint32(b[0x20:], BlocksPerGroup)
	le.PutUint32(b[0x24:], BlocksPerGroup)
	le.PutUint32(b[0x28:], s.InodesPerGroup)
	le.PutUint32(b[0x30:], uint32(s.WriteTime))
	le.PutUint16(b[0x36:], 0xFFFF) // no check after so many mounts
	le.PutUint16(b[0x38:], superMagic)
	le.PutUint16(b[0x3A:], stateClean)
	le.PutUint16(b[0x3C:], errorsContinue)
	le.PutUint32(b[0x40:], uint32(s.Check))
	le.PutUint32(b[0x4C:], dynamicRevision)
	le.PutUint32(b[0x54:], FirstIno)
	le.PutUint16(b[0x58:], InodeSize)
	le.PutUint16(b[0x5A:], s.GroupNr)
	le.PutUint32(b[0x5C:], s.Compat)
	le.PutUint32(b[0x60:], s.Incompat)
	le.PutUint32(b[0x64:], s.ROCompat)
	copy(b[0x68:], s.UUID[:])
	copy(b[0x78:], s.Label[:])
	le.PutUint32(b[0xE0:], s.JournalIno)
	copy(b[0xEC:], s.HashSeed[:])
	b[0xFC] = HashHalfMD4
	le.PutUint16(b[0xFE:], DescSize)
	le.PutUint32(b[0x100:], mountXattrUser|mountACL)
	le.PutUint32(b[0x108:], uint32(s.MakeTime))
	if s.JournalIno != 0 {
		b[0xFD] = journalInBackup
		copy(b[0x10C:], s.JournalBlock[:])
		le.PutUint32(b[0x148:], uint32(s.JournalSize>>32))
		le.PutUint32(b[0x14C:], uint32(s.JournalSize))
	}
	le.PutUint32(b[0x150:], uint32(s.Blocks>>32))
	le.PutUint32(b[0x154:], uint32(s.Reserved>>32))
	le.PutUint32(b[0x158:], uint32(s.Free>>32))
	le.PutUint16(b[0x15C:], ExtraIsize)
	le.PutUint16(b[0x15E:], ExtraIsize)
	le.PutUint32(b[0x160:], s.HashFlag)
	b[0x174] = logGroupsPerFlex
	b[0x175] = checksumCRC32C
	le.PutUint64(b[0x178:], s.KBytesWritten)
	le.PutUint32(b[0x248:], s.Overhead)
	b[0x274] = byte(s.WriteTime >> 32)
	b[0x276] = byte(s.MakeTime >> 32)
	b[0x277] = byte(s.Check >> 32)
	le.PutUint32(b[0x3FC:], CRC32C(^uint32(0), b[:0x3FC]))
}

// Flags of a GroupDesc.
const (
	GroupInodeUninit = 0x1 // inode bitmap and table are not there yet
	GroupBlockUninit = 0x2 // block bitmap is not there yet
	GroupInodeZeroed = 0x4 // inode table reads as zeros where unused
)

// GroupDesc is struct ext4_group_desc.
type GroupDesc struct {
	BlockBitmap, InodeBitmap, InodeTable uint64
	FreeBlocks, FreeInodes, UsedDirs     uint32
	UnusedInodes                         uint32 // at the end of the table
	Flags                                uint16
	BlockBitmapCsum, InodeBitmapCsum     uint32
}

// Encode writes the 64 bytes of group, checksum included.
func (d *GroupDesc) Encode(b []byte, group, fsSeed uint32) {
	b = b[:DescSize]
	clear(b)
	le.PutUint32(b[0x00:], uint32(d.BlockBitmap))
	le.PutUint32(b[0x04:], uint32(d.InodeBitmap))
	le.PutUint32(b[0x08:], uint32(d.InodeTable))
	le.PutUint16(b[0x0C:], uint16(d.FreeBlocks))
	le.PutUint16(b[0x0E:], uint16(d.FreeInodes))
	le.PutUint16(b[0x10:], uint16(d.UsedDirs))
	le.PutUint16(b[0x12:], d.Flags)
	le.PutUint16(b[0x18:], uint16(d.BlockBitmapCsum))
	le.PutUint16(b[0x1A:], uint16(d.InodeBitmapCsum))
	le.PutUint16(b[0x1C:], uint16(d.UnusedInodes))
	le.PutUint32(b[0x20:], uint32(d.BlockBitmap>>32))
	le.PutUint32(b[0x24:], uint32(d.InodeBitmap>>32))
	le.PutUint32(b[0x28:], uint32(d.InodeTable>>32))
	le.PutUint16(b[0x2C:], uint16(d.FreeBlocks>>16))
	le.PutUint16(b[0x2E:], uint16(d.FreeInodes>>16))
	le.PutUint16(b[0x30:], uint16(d.UsedDirs>>16))
	le.PutUint16(b[0x32:], uint16(d.UnusedInodes>>16))
	le.PutUint16(b[0x38:], uint16(d.BlockBitmapCsum>>16))
	le.PutUint16(b[0x3A:], uint16(d.InodeBitmapCsum>>16))
	le.PutUint16(b[0x1E:], uint16(CRC32C(CRC32CUint32(fsSeed, group), b)))
}

// BitmapCsum is the checksum a GroupDesc holds for a bitmap.
func BitmapCsum(fsSeed uint32, bitmap []byte) uint32 { return CRC32C(fsSeed, bitmap) }
