package ext4

import "banger/ext4/internal/disk"

// geometry is what the encoding of an object depends on beside the object
// itself. A file system has one from its superblock; encoders share nothing else.
type geometry struct {
	blockSize int    // bytes: 1024, 2048 or 4096
	inodeSize int    // bytes: 128 to blockSize
	csum      bool   // metadata_csum
	seed      uint32 // checksum seed of the file system; also hashes values in EA inodes
	filetype  bool   // directory entries hold a file type
	dirIndex  bool   // directories of more than one block get an htree
	eaInode   bool   // xattr values may lie in inodes of their own
	hash      dirHash
}

// writerGeometry is that of every image a Writer makes; seed and hash are
// missing.
var writerGeometry = geometry{
	blockSize: disk.BlockSize,
	inodeSize: disk.InodeSize,
	csum:      true,
	filetype:  true,
	eaInode:   true,
	dirIndex:  true,
}

// inodeSeed is the checksum seed of what belongs to one inode.
func (g *geometry) inodeSeed(ino, generation uint32) uint32 {
	return disk.InodeSeed(g.seed, ino, generation)
}

// dirRoom is the number of bytes that entries have in a directory block.
func (g *geometry) dirRoom() int {
	if g.csum {
		return g.blockSize - disk.DirTailSize
	}
	return g.blockSize
}

// indexTail is what the checksum takes of a block of an htree index.
func (g *geometry) indexTail() int {
	if g.csum {
		return disk.IndexTailSize
	}
	return 0
}

// indexRootLimit is the number of entries of an htree's root (dx_root_limit
// of fs/ext4/namei.c).
func (g *geometry) indexRootLimit() int {
	return (g.blockSize - disk.IndexRootAt - g.indexTail()) / disk.IndexEntrySize
}

// indexNodeLimit is that of the nodes below (dx_node_limit).
func (g *geometry) indexNodeLimit() int {
	return (g.blockSize - disk.IndexNodeAt - g.indexTail()) / disk.IndexEntrySize
}

// extentsInBlock is the number of entries of an extent tree block
// (ext4_ext_space_block of fs/ext4/extents.c); the checksum lies in what remains.
func (g *geometry) extentsInBlock() int { return disk.ExtentsInBlock(g.blockSize) }
