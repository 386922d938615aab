package disk

import "encoding/binary"

// File type bits of Inode.Mode.
const (
	TypeMask    = 0xF000
	TypeFIFO    = 0x1000
	TypeChar    = 0x2000
	TypeDir     = 0x4000
	TypeBlock   = 0x6000
	TypeRegular = 0x8000
	TypeSymlink = 0xA000
	TypeSocket  = 0xC000
)

// DirFileType gives the byte that directory entries hold for a mode, 0 if
// the mode has no known type.
func DirFileType(mode uint16) byte {
	switch mode & TypeMask {
	case TypeRegular:
		return 1
	case TypeDir:
		return 2
	case TypeChar:
		return 3
	case TypeBlock:
		return 4
	case TypeFIFO:
		return 5
	case TypeSocket:
		return 6
	case TypeSymlink:
		return 7
	}
	return 0
}

// Flags of an Inode.
const (
	InodeIndexed = 0x1000   // directory with an htree
	InodeExtents = 0x80000  // Block holds the root of an extent tree
	InodeEA      = 0x200000 // holds the value of an xattr
)

// Timestamp is a time as an inode holds it: the low 32 bits of the seconds,
// and nanoseconds with two more bits of seconds.
type Timestamp struct{ Sec, Extra uint32 }

// First and last second that a Timestamp holds.
const (
	MinTime = -1 << 31
	MaxTime = 1<<34 - 1<<31 - 1
)

// MakeTimestamp encodes a time between MinTime and MaxTime.
func MakeTimestamp(sec int64, nsec uint32) Timestamp {
	epoch := uint32((sec-int64(int32(sec)))>>32) & 3
	return Timestamp{uint32(sec), nsec<<2 | epoch}
}

// Inode is struct ext4_inode.
type Inode struct {
	Mode                       uint16
	UID, GID, Links            uint32
	Size                       uint64 // bytes
	Sectors                    uint64 // of 512 bytes, with metadata
	Flags                      uint32
	Generation                 uint32
	Version                    uint64 // i_version; the references of an EA inode
	Atime, Ctime, Mtime, Birth Timestamp
	Block                      [60]byte
	XattrBlock                 uint64
	Xattrs                     []byte // magic and entries of the body, or nil
}

// Encode writes an inode of len(b) bytes, 128 or at least 160, without its
// checksum. One of 128 has no room for xattrs, nanoseconds and a birth time.
func (n *Inode) Encode(b []byte) {
	clear(b)
	le.PutUint16(b[0x00:], n.Mode)
	le.PutUint16(b[0x02:], uint16(n.UID))
	le.PutUint32(b[0x04:], uint32(n.Size))
	le.PutUint32(b[0x08:], n.Atime.Sec)
	le.PutUint32(b[0x0C:], n.Ctime.Sec)
	le.PutUint32(b[0x10:], n.Mtime.Sec)
	le.PutUint16(b[0x18:], uint16(n.GID))
	le.PutUint16(b[0x1A:], uint16(n.Links))
	le.PutUint32(b[0x1C:], uint32(n.Sectors))
	le.PutUint32(b[0x20:], n.Flags)
	le.PutUint32(b[0x24:], uint32(n.Version))
	copy(b[0x28:0x64], n.Block[:])
	le.PutUint32(b[0x64:], n.Generation)
	le.PutUint32(b[0x68:], uint32(n.XattrBlock))
	le.PutUint32(b[0x6C:], uint32(n.Size>>32))
	le.PutUint16(b[0x74:], uint16(n.Sectors>>32))
	le.PutUint16(b[0x76:], uint16(n.XattrBlock>>32))
	le.PutUint16(b[0x78:], uint16(n.UID>>16))
	le.PutUint16(b[0x7A:], uint16(n.GID>>16))
	if len(b) == GoodOldInode {
		return
	}
	le.PutUint16(b[0x80:], ExtraIsize)
	le.PutUint32(b[0x84:], n.Ctime.Extra)
	le.PutUint32(b[0x88:], n.Mtime.Extra)
	le.PutUint32(b[0x8C:], n.Atime.Extra)
	le.PutUint32(b[0x90:], n.Birth.Sec)
	le.PutUint32(b[0x94:], n.Birth.Extra)
	le.PutUint32(b[0x98:], uint32(n.Version>>32))
	copy(b[GoodOldInode+ExtraIsize:], n.Xattrs)
}

// SealInode writes the checksum of the encoded inode b (ext4_inode_csum_set),
// of which half has a place only in an inode that is larger than 128 bytes.
func SealInode(b []byte, ino, fsSeed uint32) {
	const low, high, highEnd = 0x7C, 0x82, 0x84
	wide := len(b) > GoodOldInode && GoodOldInode+int(le.Uint16(b[0x80:])) >= highEnd
	le.PutUint16(b[low:], 0)
	if wide {
		le.PutUint16(b[high:], 0)
	}
	crc := CRC32C(InodeSeed(fsSeed, ino, le.Uint32(b[0x64:])), b)
	le.PutUint16(b[low:], uint16(crc))
	if wide {
		le.PutUint16(b[high:], uint16(crc>>16))
	}
}

// PutDevice encodes a device number into Block, in the old form where it fits
// and else in the new one. major takes 12 bits, minor 20.
func (n *Inode) PutDevice(major, minor uint32) {
	if major < 256 && minor < 256 {
		le.PutUint32(n.Block[0:], major<<8|minor)
		return
	}
	le.PutUint32(n.Block[4:], minor&0xFF|major<<8|(minor&^0xFF)<<12)
}

// PutJournalSuperblock encodes the superblock of an empty journal of blocks
// blocks into a block. Checksums of version 3 and 64-bit block numbers are
// what the kernel would switch on at the first mount.
func PutJournalSuperblock(b []byte, blocks uint32, uuid [16]byte) {
	const (
		magic          = 0xC03B3998
		superblockV2   = 4
		incompat64bit  = 0x2
		incompatCsumV3 = 0x10
		checksumCRC32C = 4
		checksumAt     = 0xFC
	)
	be := binary.BigEndian
	b = b[:SuperblockSize]
	clear(b)
	be.PutUint32(b[0x00:], magic)
	be.PutUint32(b[0x04:], superblockV2)
	be.PutUint32(b[0x0C:], BlockSize)
	be.PutUint32(b[0x10:], blocks)
	be.PutUint32(b[0x14:], 1) // first block of the log
	be.PutUint32(b[0x18:], 1) // first commit
	be.PutUint32(b[0x28:], incompat64bit|incompatCsumV3)
	copy(b[0x30:], uuid[:])
	be.PutUint32(b[0x40:], 1) // users
	b[0x50] = checksumCRC32C
	be.PutUint32(b[checksumAt:], CRC32C(^uint32(0), b))
}
