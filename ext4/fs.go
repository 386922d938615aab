package ext4

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"banger/ext4/internal/disk"
)

// An FS reads an ext2, ext3 or ext4 file system out of an image. It is an
// [fs.FS] with everything that goes with one, and with names of arbitrary
// bytes: unlike [fs.ValidPath] asks for, they need not be UTF-8.
//
// Nothing is ever written. If the image was not unmounted, what its journal
// has to replay is replayed in memory.
//
// The image is taken for hostile. Whatever it holds, a call ends with data or
// an error, in time and memory bounded by the size of the image; only the
// zeros of a hole are as long as the image says (see [FileReader.NextData]).
//
// An FS is safe for concurrent use.
type FS struct {
	dev    *blockDevice
	super  disk.Super
	groups uint64 // block groups
	geo    geometry
}

var (
	_ fs.ReadDirFS  = (*FS)(nil)
	_ fs.ReadFileFS = (*FS)(nil)
	_ fs.StatFS     = (*FS)(nil)
	_ fs.ReadLinkFS = (*FS)(nil)
)

// Features of others that reading copes with. An unknown ro_compat feature
// is one that readers need not know.
const readableIncompat = disk.IncompatFiletype | disk.IncompatRecover | disk.IncompatMetaBG | disk.IncompatExtents |
	disk.Incompat64bit | disk.IncompatMMP | disk.IncompatFlexBG | disk.IncompatEAInode | disk.IncompatCsumSeed |
	disk.IncompatLargeDir | disk.IncompatInlineData

const (
	maxLinksFollowed = 40   // symlinks in one path (MAXSYMLINKS of include/linux/namei.h)
	maxPathBytes     = 4096 // of one path or target (PATH_MAX)
)

// Open reads an image whose first byte is that of r. Block sizes of 1, 2 and
// 4 KiB are known, and every feature of e2fsprogs 1.47 but compression,
// encryption, casefolding, an external journal and fast commits that wait to
// be replayed: the error names the one in the way, and wraps
// [errors.ErrUnsupported]. Damage wraps [ErrCorrupt].
func Open(r io.ReaderAt) (*FS, error) {
	f := &FS{dev: &blockDevice{r: r}}
	b := make([]byte, disk.SuperblockSize)
	if n, err := r.ReadAt(b, disk.SuperblockOffset); n < len(b) {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil, corrupt("image: too short for a superblock")
		}
		return nil, fmt.Errorf("image: reading the superblock: %w", err)
	}
	if err := f.setSuper(b); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	f.dev.reset(f.geo.blockSize, f.super.Blocks)
	if f.super.Incompat&disk.IncompatRecover != 0 {
		if err := f.replay(); err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
	}
	root, err := f.inode(disk.RootIno)
	if err != nil {
		return nil, err
	}
	if !root.isDir() {
		return nil, corrupt("inode %d: the root is not a directory", disk.RootIno)
	}
	return f, nil
}

// replay finds what the journal has to say and reads the superblock again as
// it is after that.
func (f *FS) replay() error {
	if f.super.JournalIno == 0 {
		return fmt.Errorf("an external one needs recovery: %w", errors.ErrUnsupported)
	}
	j, err := f.openJournal()
	if err != nil {
		return err
	}
	found, err := j.recover()
	if err != nil || found == nil {
		return err
	}
	f.dev.journal = found
	f.dev.reset(f.geo.blockSize, f.super.Blocks)
	b, err := f.superblock()
	if err != nil {
		return err
	}
	before := f.super
	if err := f.setSuper(b); err != nil {
		return fmt.Errorf("replayed superblock: %w", err)
	}
	if s := &f.super; s.LogBlockSize != before.LogBlockSize || s.Blocks != before.Blocks || s.InodesPerGroup != before.InodesPerGroup ||
		s.BlocksPerGroup != before.BlocksPerGroup || s.DescSize != before.DescSize || s.InodeSize != before.InodeSize {
		return corrupt("replayed superblock: another geometry")
	}
	return nil
}

// superblock gives the 1024 bytes as they are now.
func (f *FS) superblock() ([]byte, error) {
	bs := uint64(f.geo.blockSize)
	b, err := f.dev.block(disk.SuperblockOffset / bs)
	if err != nil {
		return nil, err
	}
	return b[disk.SuperblockOffset%bs:][:disk.SuperblockSize], nil
}

// setSuper judges a superblock and takes it.
func (f *FS) setSuper(b []byte) error {
	s := disk.DecodeSuper(b)
	if s.Magic != disk.SuperMagic {
		return corrupt("magic number %#04x: not an ext2, ext3 or ext4 file system", s.Magic)
	}
	if bad := s.Incompat &^ readableIncompat; bad != 0 {
		return fmt.Errorf("feature %s: %w", strings.Join(disk.FeatureNames(0, bad, 0), " "), errors.ErrUnsupported)
	}
	if s.LogBlockSize > 2 {
		if s.LogBlockSize > 6 {
			return corrupt("block size 2^%d KiB", s.LogBlockSize)
		}
		return fmt.Errorf("block size %d KiB: %w", 1<<s.LogBlockSize, errors.ErrUnsupported)
	}
	bs := uint64(1024) << s.LogBlockSize
	csum := s.ROCompat&disk.ROCompatMetadataCsum != 0
	switch {
	case csum && s.ChecksumType != disk.ChecksumCRC32C:
		return fmt.Errorf("checksum type %d: %w", s.ChecksumType, errors.ErrUnsupported)
	case csum && !disk.SuperChecksumOK(b):
		return corrupt("its checksum does not match")
	case s.Revision > 1:
		return fmt.Errorf("revision %d: %w", s.Revision, errors.ErrUnsupported)
	case s.InodeSize < disk.GoodOldInode || uint64(s.InodeSize) > bs || s.InodeSize&(s.InodeSize-1) != 0:
		return corrupt("inodes of %d bytes", s.InodeSize)
	case s.DescSize&(s.DescSize-1) != 0 || s.DescSize < 32 || uint64(s.DescSize) > bs,
		s.Incompat&disk.Incompat64bit != 0 && s.DescSize < disk.DescSize:
		return corrupt("group descriptors of %d bytes", s.DescSize)
	case s.BlocksPerGroup == 0 || s.InodesPerGroup == 0 || uint64(s.InodesPerGroup) > 8*bs:
		return corrupt("groups of %d blocks and %d inodes", s.BlocksPerGroup, s.InodesPerGroup)
	case s.ROCompat&disk.ROCompatBigalloc == 0 && uint64(s.BlocksPerGroup) > 8*bs:
		return corrupt("groups of %d blocks", s.BlocksPerGroup)
	case uint64(s.FirstDataBlock) != 1024/bs && s.ROCompat&disk.ROCompatBigalloc == 0:
		return corrupt("first data block %d", s.FirstDataBlock)
	case s.Blocks <= uint64(s.FirstDataBlock) || s.Blocks > 1<<48:
		return corrupt("%d blocks", s.Blocks)
	}
	groups := ceilDiv(s.Blocks-uint64(s.FirstDataBlock), uint64(s.BlocksPerGroup))
	if groups > 1<<32-1 || uint64(s.Inodes) > groups*uint64(s.InodesPerGroup) || s.Inodes < disk.FirstIno-1 {
		return corrupt("%d inodes in %d groups of %d", s.Inodes, groups, s.InodesPerGroup)
	}
	f.super, f.groups = s, groups
	f.geo = geometry{
		blockSize: int(bs),
		inodeSize: int(s.InodeSize),
		csum:      csum,
		seed:      disk.FSSeed(s.UUID),
		filetype:  s.Incompat&disk.IncompatFiletype != 0,
		dirIndex:  s.Compat&disk.CompatDirIndex != 0,
		eaInode:   s.Incompat&disk.IncompatEAInode != 0,
		hash:      dirHash{version: s.HashVersion, unsigned: s.Flags&disk.UnsignedHash != 0, state: hashSeed(s.HashSeed)},
	}
	if s.Incompat&disk.IncompatCsumSeed != 0 {
		f.geo.seed = s.ChecksumSeed
	}
	return nil
}

// validBlock tells whether a file or structure may own n blocks at start.
func (f *FS) validBlock(start, n uint64) bool {
	return start > uint64(f.super.FirstDataBlock) && start < f.super.Blocks && n <= f.super.Blocks-start
}

// descAt gives the block and offset of a group's descriptor
// (fs/ext4/super.c, descriptor_loc).
func (f *FS) descAt(group uint64) (block uint64, offset int) {
	s := &f.super
	perBlock := uint64(f.geo.blockSize / int(s.DescSize))
	at, offset := group/perBlock, int(group%perBlock)*int(s.DescSize)
	if s.Incompat&disk.IncompatMetaBG == 0 || at < uint64(s.FirstMetaBG) {
		return disk.SuperblockOffset/uint64(f.geo.blockSize) + 1 + at, offset
	}
	first := at * perBlock
	block = f.groupStart(first)
	if f.groupHasSuper(first) {
		block++
	}
	if first == 0 && f.super.FirstDataBlock == 0 && f.geo.blockSize == disk.SuperblockOffset {
		block++ // bigalloc: the superblock is in the second block of the first cluster
	}
	return block, offset
}

func (f *FS) groupStart(group uint64) uint64 {
	return uint64(f.super.FirstDataBlock) + group*uint64(f.super.BlocksPerGroup)
}

// groupHasSuper tells whether a group begins with a copy of the superblock.
func (f *FS) groupHasSuper(group uint64) bool {
	s := &f.super
	switch {
	case group == 0:
		return true
	case s.Compat&disk.CompatSparse2 != 0:
		return group == uint64(s.BackupGroups[0]) || group == uint64(s.BackupGroups[1])
	case s.ROCompat&disk.ROCompatSparseSuper == 0:
		return true
	}
	return hasSuper(group)
}

// desc reads a group descriptor.
func (f *FS) desc(group uint64) (d disk.GroupDesc, err error) {
	block, offset := f.descAt(group)
	b, err := f.dev.block(block)
	if err != nil {
		return d, fmt.Errorf("group %d: descriptor: %w", group, err)
	}
	raw := b[offset:][:f.super.DescSize]
	d = disk.DecodeGroupDesc(raw)
	if f.descChecksum(raw, group) != disk.StoredDescChecksum(raw) {
		return d, corrupt("group %d: descriptor: its checksum does not match", group)
	}
	table := ceilDiv(uint64(f.super.InodesPerGroup)*uint64(f.super.InodeSize), uint64(f.geo.blockSize))
	if !f.validBlock(d.InodeTable, table) || !f.validBlock(d.BlockBitmap, 1) || !f.validBlock(d.InodeBitmap, 1) {
		return d, corrupt("group %d: descriptor: names blocks outside the file system", group)
	}
	return d, nil
}

// descChecksum is what a descriptor's checksum should be; without one, what
// it is.
func (f *FS) descChecksum(raw []byte, group uint64) uint16 {
	switch {
	case f.geo.csum:
		return disk.DescChecksum(raw, uint32(group), f.geo.seed)
	case f.super.ROCompat&disk.ROCompatGDTCsum != 0:
		return disk.DescChecksum16(raw, uint32(group), f.super.UUID)
	}
	return disk.StoredDescChecksum(raw)
}

// inode is an inode as read.
type inode struct {
	ino    uint32
	raw    []byte // all of it; must not be written to
	mode   uint16
	links  uint16
	flags  uint32
	size   uint64 // bytes
	blocks uint64 // in use, in units of 512 bytes, with metadata
	xattrs uint64 // block of xattrs, or 0
}

func (n *inode) kind() uint16      { return n.mode & disk.TypeMask }
func (n *inode) isDir() bool       { return n.kind() == disk.TypeDir }
func (n *inode) has(f uint32) bool { return n.flags&f != 0 }
func (n *inode) iblock() []byte    { return n.raw[disk.InodeBlockAt:][:60] }

// fastLink tells whether a symlink's target lies in the inode in place of a map
// (ext4_inode_is_fast_symlink of fs/ext4/inode.c).
func (n *inode) fastLink() bool {
	return n.kind() == disk.TypeSymlink && n.size <= maxFastTarget && !n.has(disk.InodeExtents|disk.InodeInlineData)
}

func (n *inode) generation() uint32 { return le.Uint32(n.raw[disk.InodeGenerationAt:]) }

// inodeAt gives the block and offset of an inode.
func (f *FS) inodeAt(ino uint32) (block uint64, offset int, err error) {
	if ino == 0 || ino > f.super.Inodes {
		return 0, 0, corrupt("inode %d: there are only %d", ino, f.super.Inodes)
	}
	d, err := f.desc(uint64(ino-1) / uint64(f.super.InodesPerGroup))
	if err != nil {
		return 0, 0, err
	}
	at := uint64(ino-1) % uint64(f.super.InodesPerGroup) * uint64(f.super.InodeSize)
	bs := uint64(f.geo.blockSize)
	return d.InodeTable + at/bs, int(at % bs), nil
}

// inode reads any inode that is in use.
func (f *FS) inode(ino uint32) (*inode, error) {
	n, err := f.anyInode(ino)
	if err == nil && n.links == 0 {
		return nil, corrupt("inode %d: not in use", ino)
	}
	return n, err
}

// xattrsAt is the block of xattrs that an inode names.
func (f *FS) xattrsAt(raw []byte) uint64 {
	block := uint64(le.Uint32(raw[disk.InodeXattrBlockAt:]))
	if f.super.Incompat&disk.Incompat64bit != 0 {
		block |= uint64(le.Uint16(raw[disk.InodeXattrHiAt:])) << 32
	}
	return block
}

// anyInode reads an inode that may have no name left.
func (f *FS) anyInode(ino uint32) (*inode, error) {
	block, offset, err := f.inodeAt(ino)
	if err != nil {
		return nil, err
	}
	b, err := f.dev.block(block)
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", ino, err)
	}
	raw := b[offset:][:f.super.InodeSize]
	if f.geo.csum && !disk.InodeChecksumOK(raw, ino, f.geo.seed) {
		return nil, corrupt("inode %d: its checksum does not match", ino)
	}
	n := &inode{
		ino: ino, raw: raw,
		mode:   le.Uint16(raw[disk.InodeModeAt:]),
		links:  le.Uint16(raw[disk.InodeLinksAt:]),
		flags:  le.Uint32(raw[disk.InodeFlagsAt:]),
		size:   uint64(le.Uint32(raw[disk.InodeSizeAt:])),
		blocks: uint64(le.Uint32(raw[disk.InodeBlocksAt:])),
		xattrs: f.xattrsAt(raw),
	}
	if n.kind() == disk.TypeRegular || f.super.Incompat&disk.IncompatLargeDir != 0 {
		n.size |= uint64(le.Uint32(raw[disk.InodeSizeHiAt:])) << 32
	}
	if f.super.ROCompat&disk.ROCompatHugeFile != 0 {
		n.blocks |= uint64(le.Uint16(raw[disk.InodeBlocksHiAt:])) << 32
		if n.has(disk.InodeHugeFile) {
			n.blocks *= uint64(f.geo.blockSize / 512)
		}
	}
	extra := disk.InodeExtra(raw)
	switch {
	case disk.GoodOldInode+extra > len(raw) || extra%4 != 0:
		return nil, corrupt("inode %d: %d extra bytes", ino, extra)
	case n.size > (1<<32-1)*uint64(f.geo.blockSize): // block numbers have 32 bits
		return nil, corrupt("inode %d: %d bytes", ino, n.size)
	case n.has(disk.InodeEncrypt):
		return nil, fmt.Errorf("inode %d: encrypted: %w", ino, errors.ErrUnsupported)
	case n.has(disk.InodeCasefold):
		return nil, fmt.Errorf("inode %d: casefolded: %w", ino, errors.ErrUnsupported)
	case n.has(disk.InodeInlineData) && f.super.Incompat&disk.IncompatInlineData == 0:
		return nil, corrupt("inode %d: inline data without the feature", ino)
	case n.has(disk.InodeExtents) && n.has(disk.InodeInlineData):
		return nil, corrupt("inode %d: both extents and inline data", ino)
	case n.xattrs != 0 && !f.validBlock(n.xattrs, 1):
		return nil, corrupt("inode %d: xattr block %d", ino, n.xattrs)
	case disk.DirFileType(n.mode) == 0:
		return nil, corrupt("inode %d: mode %#o", ino, n.mode)
	}
	return n, nil
}

// named reads an inode that a directory names: none of the reserved ones.
func (f *FS) named(ino uint32) (*inode, error) {
	if ino < f.super.FirstIno {
		return nil, corrupt("inode %d: reserved, but a directory names it", ino)
	}
	n, err := f.inode(ino)
	if err == nil && n.has(disk.InodeEA) {
		return nil, corrupt("inode %d: holds an xattr, but a directory names it", ino)
	}
	return n, err
}

// Stat is what the Sys method of an FS's [fs.FileInfo] gives, as a *Stat.
type Stat struct {
	Ino       uint32
	Mode      uint16 // file type (S_IFMT) and the twelve permission bits
	UID, GID  uint32
	Links     uint32 // 1 for a directory with too many to count
	SizeBytes int64
	// AllocatedBytes counts what the object takes with its metadata, as
	// st_blocks does.
	AllocatedBytes int64
	// Atime and the others have nanoseconds where the inode has room for
	// them. Crtime is the zero Time where it has none.
	Atime, Mtime, Ctime, Crtime time.Time
	// Major and Minor of a device.
	Major, Minor uint32
}

func (f *FS) stat(n *inode) *Stat {
	raw := n.raw
	s := &Stat{
		Ino: n.ino, Mode: n.mode, Links: uint32(n.links), SizeBytes: int64(n.size), AllocatedBytes: int64(n.blocks * 512),
		UID: uint32(le.Uint16(raw[disk.InodeUIDAt:])) | uint32(le.Uint16(raw[disk.InodeUIDHiAt:]))<<16,
		GID: uint32(le.Uint16(raw[disk.InodeGIDAt:])) | uint32(le.Uint16(raw[disk.InodeGIDHiAt:]))<<16,
	}
	extra := disk.InodeExtra(raw)
	when := func(at, extraAt int) time.Time {
		t := disk.Timestamp{Sec: le.Uint32(raw[at:])}
		if extraAt+4 <= disk.GoodOldInode+extra {
			t.Extra = le.Uint32(raw[extraAt:])
		}
		sec, nsec := t.Time()
		return time.Unix(sec, int64(nsec))
	}
	s.Atime = when(disk.InodeAtimeAt, disk.InodeAtimeExtraAt)
	s.Ctime = when(disk.InodeCtimeAt, disk.InodeCtimeExtraAt)
	s.Mtime = when(disk.InodeMtimeAt, disk.InodeMtimeExtraAt)
	if disk.InodeCrtimeAt+4 <= disk.GoodOldInode+extra {
		s.Crtime = when(disk.InodeCrtimeAt, disk.InodeCrtimeXAt)
	}
	if k := n.kind(); k == disk.TypeChar || k == disk.TypeBlock {
		s.Major, s.Minor = disk.DecodeDevice(n.iblock())
	}
	return s
}

// fileInfo is an fs.FileInfo, and an fs.DirEntry that was looked up.
type fileInfo struct {
	name string
	stat *Stat
}

func (i *fileInfo) Name() string       { return i.name }
func (i *fileInfo) Size() int64        { return i.stat.SizeBytes }
func (i *fileInfo) Mode() fs.FileMode  { return fileMode(i.stat.Mode) }
func (i *fileInfo) ModTime() time.Time { return i.stat.Mtime }
func (i *fileInfo) IsDir() bool        { return i.stat.Mode&disk.TypeMask == disk.TypeDir }
func (i *fileInfo) Sys() any           { return i.stat }
func (i *fileInfo) String() string     { return fs.FormatFileInfo(i) }

// fileMode is the mode of an inode in Go's terms.
func fileMode(mode uint16) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	if mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	return m | typeMode(disk.DirFileType(mode))
}

// typeMode is what a directory entry says of the type.
func typeMode(fileType byte) fs.FileMode {
	switch fileType {
	case 2:
		return fs.ModeDir
	case 3:
		return fs.ModeDevice | fs.ModeCharDevice
	case 4:
		return fs.ModeDevice
	case 5:
		return fs.ModeNamedPipe
	case 6:
		return fs.ModeSocket
	case 7:
		return fs.ModeSymlink
	}
	return 0
}

// splitPath checks a path as fs.ValidPath does, but for UTF-8.
func splitPath(path string) ([]string, error) {
	if path == "." {
		return nil, nil
	}
	if path == "" || len(path) > maxPathBytes {
		return nil, fs.ErrInvalid
	}
	parts := strings.Split(path, "/")
	for _, part := range parts {
		if part == "" || part == "." || part == ".." || strings.IndexByte(part, 0) >= 0 {
			return nil, fs.ErrInvalid
		}
	}
	return parts, nil
}

// resolve finds what a path names, the way the kernel would with the root of
// the image as its root. The last symlink is followed only if asked.
func (f *FS) resolve(path string, follow bool) (*inode, error) {
	w, err := f.walk(path, follow)
	if err != nil {
		return nil, err
	}
	if w.name != "" {
		return nil, fs.ErrNotExist
	}
	return w.dirs[len(w.dirs)-1], nil
}

// A walk is a path followed to its end.
type walk struct {
	// dirs are the inodes from the root to where the path led. All but the
	// last are directories.
	dirs []*inode
	// name is the last component if there is no such entry in the last of
	// dirs, which is a directory then; else it is empty.
	name string
}

// walk follows a path. A last component that does not exist is no error.
func (f *FS) walk(path string, follow bool) (*walk, error) {
	todo, err := splitPath(path)
	if err != nil {
		return nil, err
	}
	root, err := f.inode(disk.RootIno)
	if err != nil {
		return nil, err
	}
	w := &walk{dirs: []*inode{root}}
	for links := 0; len(todo) > 0; {
		dir := w.dirs[len(w.dirs)-1]
		part := todo[0]
		todo = todo[1:]
		if !dir.isDir() {
			return nil, errNotDir
		}
		switch part {
		case "", ".": // in a target
			continue
		case "..":
			if len(w.dirs) > 1 {
				w.dirs = w.dirs[:len(w.dirs)-1]
			}
			continue
		}
		if len(part) > MaxNameBytes {
			return nil, fmt.Errorf("name of %d bytes, more than %d", len(part), MaxNameBytes)
		}
		child, err := f.child(dir, part)
		if errors.Is(err, fs.ErrNotExist) && len(todo) == 0 {
			w.name = part
			return w, nil
		}
		if err != nil {
			return nil, err
		}
		if child.kind() != disk.TypeSymlink || len(todo) == 0 && !follow {
			w.dirs = append(w.dirs, child)
			continue
		}
		if links++; links > maxLinksFollowed {
			return nil, errors.New("too many symlinks")
		}
		target, err := f.target(child)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(target, "/") {
			w.dirs = w.dirs[:1]
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return w, nil
}

var errNotDir = errors.New("not a directory")

// child looks up one name, and sees to it that no directory is reached twice.
func (f *FS) child(dir *inode, name string) (*inode, error) {
	e, err := f.lookup(dir, name)
	if err != nil {
		return nil, err
	}
	return f.enter(dir, e)
}

// enter reads the inode of an entry of dir. A directory must know dir as its
// parent: as it has one ".." only, and dir.list refuses two names for it, no
// walk from the root meets it twice, so none goes in circles.
func (f *FS) enter(dir *inode, e *rawEntry) (*inode, error) {
	n, err := f.named(e.ino)
	if err != nil {
		return nil, fmt.Errorf("entry %q: %w", e.name, err)
	}
	if e.fileType != 0 && e.fileType != disk.DirFileType(n.mode) {
		return nil, corrupt("entry %q: another type than inode %d", e.name, e.ino)
	}
	if n.isDir() {
		parent, err := f.parent(n)
		if err != nil {
			return nil, fmt.Errorf("entry %q: %w", e.name, err)
		}
		if parent != dir.ino {
			return nil, corrupt("entry %q: directory %d belongs in directory %d", e.name, n.ino, parent)
		}
	}
	return n, nil
}

// target reads a symlink.
func (f *FS) target(n *inode) (string, error) {
	if n.size == 0 || n.size >= maxPathBytes {
		return "", corrupt("inode %d: symlink of %d bytes", n.ino, n.size)
	}
	b := make([]byte, n.size)
	if n.fastLink() {
		copy(b, n.iblock())
	} else {
		file, err := f.openFile(n)
		if err != nil {
			return "", err
		}
		if _, err := file.ReadAt(b, 0); err != nil && err != io.EOF {
			return "", err
		}
	}
	for i, c := range b {
		if c == 0 {
			return "", corrupt("inode %d: symlink of %d bytes with a NUL at %d", n.ino, n.size, i)
		}
	}
	return string(b), nil
}

func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// Open opens a file or directory, following symlinks within the image: an
// absolute target starts at the image's root, and ".." ends there. Regular
// files are a *[FileReader], which is an io.ReaderAt and io.Seeker; directories are
// an [fs.ReadDirFile]. What is neither opens, and reads as empty.
func (f *FS) Open(path string) (fs.File, error) {
	n, err := f.resolve(path, true)
	if err != nil {
		return nil, pathError("open", path, err)
	}
	if n.isDir() {
		return &dirFile{fs: f, dir: n, path: path}, nil
	}
	file, err := f.openFile(n)
	if err != nil {
		return nil, pathError("open", path, err)
	}
	file.path = path
	return file, nil
}

// Stat describes what a path leads to.
func (f *FS) Stat(path string) (fs.FileInfo, error) { return f.info("stat", path, true) }

// Lstat describes what a path names, a symlink as such.
func (f *FS) Lstat(path string) (fs.FileInfo, error) { return f.info("lstat", path, false) }

func (f *FS) info(op, path string, follow bool) (fs.FileInfo, error) {
	n, err := f.resolve(path, follow)
	if err != nil {
		return nil, pathError(op, path, err)
	}
	return &fileInfo{base(path), f.stat(n)}, nil
}

// ReadLink gives the target of a symlink.
func (f *FS) ReadLink(path string) (string, error) {
	n, err := f.resolve(path, false)
	if err == nil && n.kind() != disk.TypeSymlink {
		err = fs.ErrInvalid
	}
	var target string
	if err == nil {
		target, err = f.target(n)
	}
	return target, pathError("readlink", path, err)
}

// ReadDir lists a directory in the order of names. It takes memory for all of
// it; a *dirFile's ReadDir need not.
func (f *FS) ReadDir(path string) ([]fs.DirEntry, error) {
	n, err := f.resolve(path, true)
	if err == nil && !n.isDir() {
		err = errNotDir
	}
	if err != nil {
		return nil, pathError("readdir", path, err)
	}
	list, err := f.list(n)
	if err != nil {
		return nil, pathError("readdir", path, err)
	}
	entries := make([]fs.DirEntry, len(list))
	for i := range list {
		entries[i] = &dirEntryInfo{fs: f, dir: n, raw: list[i]}
	}
	return entries, nil
}

// MaxReadFileBytes is what ReadFile reads at most: it takes the size of a file
// from the image, and a few bytes of image can claim terabytes.
const MaxReadFileBytes = 16 << 20

// ReadFile gives the bytes of a file of at most MaxReadFileBytes.
func (f *FS) ReadFile(path string) ([]byte, error) {
	n, err := f.resolve(path, true)
	if err == nil {
		switch {
		case n.isDir():
			err = errors.New("is a directory")
		case n.size > MaxReadFileBytes:
			err = fmt.Errorf("%d bytes, more than %d: open it to read in parts", n.size, MaxReadFileBytes)
		}
	}
	if err != nil {
		return nil, pathError("readfile", path, err)
	}
	file, err := f.openFile(n)
	if err != nil {
		return nil, pathError("readfile", path, err)
	}
	b, err := io.ReadAll(file)
	return b, pathError("readfile", path, err)
}

// Xattrs gives the xattrs of what a path names, a symlink's own. A
// system.posix_acl_* has the form of the system call, as in [Inode]. The map
// is nil if there are none.
func (f *FS) Xattrs(path string) (map[string][]byte, error) {
	n, err := f.resolve(path, false)
	if err != nil {
		return nil, pathError("listxattr", path, err)
	}
	set, err := f.xattrs(n)
	return set, pathError("listxattr", path, err)
}

// UUID is the one in the superblock.
func (f *FS) UUID() [16]byte { return f.super.UUID }

// SizeBytes is the size of the file system; its image may be longer.
func (f *FS) SizeBytes() int64 { return int64(f.super.Blocks) * int64(f.geo.blockSize) }

// Features gives the names of all features, as dumpe2fs prints them.
func (f *FS) Features() []string {
	return disk.FeatureNames(f.super.Compat, f.super.Incompat, f.super.ROCompat)
}
