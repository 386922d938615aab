package disk

import "encoding/binary"

// The journal's blocks (include/linux/jbd2.h), big endian.
const (
	JournalMagic            = 0xC03B3998
	JournalHeaderSize       = 12 // of every block but data: magic, type, sequence
	JournalChecksumAt       = 0xFC
	JournalCommitChecksumAt = 16
)

// JournalSuperChecksum is the checksum of a journal's superblock of 1024 bytes.
func JournalSuperChecksum(b []byte) uint32 {
	return crcWithout(^uint32(0), b[:SuperblockSize], JournalChecksumAt)
}

// JournalTailChecksum is that of a descriptor or revoke block, which ends with it.
func JournalTailChecksum(b []byte, seed uint32) uint32 { return crcWithout(seed, b, len(b)-4) }

// JournalCommitChecksum is that of a commit block.
func JournalCommitChecksum(b []byte, seed uint32) uint32 {
	return crcWithout(seed, b, JournalCommitChecksumAt)
}

// JournalBlockChecksum is what a tag holds for a block of a transaction.
func JournalBlockChecksum(b []byte, sequence, seed uint32) uint32 {
	var s [4]byte
	binary.BigEndian.PutUint32(s[:], sequence)
	return CRC32C(CRC32C(seed, s[:]), b)
}

// crcWithout is the checksum of b with the four bytes at an offset taken as zero.
func crcWithout(crc uint32, b []byte, at int) uint32 {
	crc = CRC32C(crc, b[:at])
	crc = CRC32C(crc, []byte{0, 0, 0, 0})
	return CRC32C(crc, b[at+4:])
}
