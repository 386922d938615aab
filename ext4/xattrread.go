package ext4

import (
	"bytes"
	"fmt"

	"banger/ext4/internal/disk"
)

const (
	inlineBytes    = 60       // of data in i_block
	inlineDirBytes = 60       // the parent's number and the entries after it
	maxXattrBytes  = 64 << 10 // of one value (XATTR_SIZE_MAX of include/uapi/linux/limits.h)

	systemIndex = 7 // "system."; its only name is inlineName
	inlineName  = "data"
)

// rawXattr is an xattr as it lies on disk
// (Documentation/filesystems/ext4/attributes.rst).
type rawXattr struct {
	index    byte
	name     []byte
	value    []byte // nil if it lies in an inode of its own
	valueIno uint32
	size     uint32
}

// parseXattrs reads entries from b[from:]; offsets of values count from base.
func parseXattrs(base []byte, from int, where string) (list []rawXattr, err error) {
	for at := from; ; {
		if at+4 > len(base) {
			return nil, corrupt("%s: entries run over its end", where)
		}
		if le.Uint32(base[at:]) == 0 {
			return list, nil
		}
		if at+disk.XattrEntryHeader > len(base) {
			return nil, corrupt("%s: entries run over its end", where)
		}
		e := base[at:]
		x := rawXattr{index: e[1], valueIno: le.Uint32(e[4:]), size: le.Uint32(e[8:])}
		next := at + disk.XattrEntryHeader + align4(int(e[0]))
		if next > len(base) {
			return nil, corrupt("%s: a name runs over its end", where)
		}
		x.name = e[disk.XattrEntryHeader:][:e[0]]
		if bytes.IndexByte(x.name, 0) >= 0 {
			return nil, corrupt("%s: the name %q", where, x.name)
		}
		switch offset := int(le.Uint16(e[2:])); {
		case x.size > maxXattrBytes:
			return nil, corrupt("%s: value of %d bytes", where, x.size)
		case x.valueIno != 0:
		case x.size == 0:
			x.value = []byte{}
		case offset > len(base) || int(x.size) > len(base)-offset:
			return nil, corrupt("%s: a value runs over its end", where)
		default:
			x.value = base[offset:][:x.size]
		}
		list = append(list, x)
		at = next
	}
}

// bodyXattrs reads those in the inode itself.
func (f *FS) bodyXattrs(n *inode) ([]rawXattr, error) {
	at := disk.GoodOldInode + disk.InodeExtra(n.raw)
	if len(n.raw) == disk.GoodOldInode || disk.InodeExtra(n.raw) == 0 || len(n.raw)-at < 8 || le.Uint32(n.raw[at:]) != disk.XattrMagic {
		return nil, nil
	}
	return parseXattrs(n.raw[at+4:], 0, fmt.Sprintf("inode %d: xattrs", n.ino))
}

// xattrBlock reads an xattr block and judges its header.
func (f *FS) xattrBlock(n *inode) ([]byte, error) {
	b, err := f.dev.block(n.xattrs)
	if err != nil {
		return nil, err
	}
	if le.Uint32(b) != disk.XattrMagic || le.Uint32(b[8:]) != 1 || le.Uint32(b[4:]) == 0 {
		return nil, corrupt("inode %d: xattrs: block %d is not one of xattrs", n.ino, n.xattrs)
	}
	if f.geo.csum {
		var at [8]byte
		le.PutUint64(at[:], n.xattrs)
		crc := disk.CRC32C(disk.CRC32C(f.geo.seed, at[:]), b[:16])
		if disk.CRC32C(disk.CRC32C(crc, []byte{0, 0, 0, 0}), b[20:]) != le.Uint32(b[16:]) {
			return nil, corrupt("inode %d: xattrs: block %d: its checksum does not match", n.ino, n.xattrs)
		}
	}
	return b, nil
}

// rawXattrs reads all entries, of the inode and of its block.
func (f *FS) rawXattrs(n *inode) ([]rawXattr, error) {
	list, err := f.bodyXattrs(n)
	if err != nil || n.xattrs == 0 {
		return list, err
	}
	b, err := f.xattrBlock(n)
	if err != nil {
		return nil, err
	}
	more, err := parseXattrs(b, disk.XattrBlockHeader, fmt.Sprintf("inode %d: xattr block", n.ino))
	return append(list, more...), err
}

// xattrs reads all names and values, but for the inline data.
func (f *FS) xattrs(n *inode) (map[string][]byte, error) {
	list, err := f.rawXattrs(n)
	if err != nil {
		return nil, err
	}
	var set map[string][]byte
	for _, x := range list {
		if x.index == systemIndex && string(x.name) == inlineName {
			continue
		}
		name, err := xattrName(x.index, x.name)
		if err != nil {
			return nil, fmt.Errorf("inode %d: xattrs: %w", n.ino, err)
		}
		value, err := f.xattrValue(n, &x)
		if err != nil {
			return nil, fmt.Errorf("xattr %q: %w", name, err)
		}
		if x.index == aclAccessIndex || x.index == aclDefaultIndex {
			if value, err = decodeACL(value); err != nil {
				return nil, fmt.Errorf("inode %d: xattr %q: %w", n.ino, name, err)
			}
		}
		if _, twice := set[name]; twice {
			return nil, corrupt("inode %d: xattr %q twice", n.ino, name)
		}
		if set == nil {
			set = make(map[string][]byte)
		}
		set[name] = value
	}
	return set, nil
}

// xattrName is the full name of an entry.
func xattrName(index byte, rest []byte) (string, error) {
	switch index {
	case aclAccessIndex, aclDefaultIndex:
		if len(rest) > 0 {
			return "", corrupt("an acl with the name %q", rest)
		}
		if index == aclAccessIndex {
			return aclAccess, nil
		}
		return aclDefault, nil
	}
	for _, p := range xattrPrefixes {
		if p.index == index && len(rest) > 0 {
			return p.prefix + string(rest), nil
		}
	}
	return "", corrupt("name %q with prefix number %d", rest, index)
}

// xattrValue gives a copy of a value, wherever it lies.
func (f *FS) xattrValue(n *inode, x *rawXattr) ([]byte, error) {
	if x.valueIno == 0 {
		return append(make([]byte, 0, len(x.value)), x.value...), nil
	}
	holder, err := f.xattrInode(x.valueIno)
	if err != nil {
		return nil, err
	}
	if holder.size != uint64(x.size) {
		return nil, corrupt("inode %d: holds %d bytes, not %d", holder.ino, holder.size, x.size)
	}
	file, err := f.openFile(holder)
	if err != nil {
		return nil, err
	}
	value := make([]byte, x.size)
	if x.size > 0 {
		if _, err := file.ReadAt(value, 0); err != nil {
			return nil, err
		}
	}
	// fs/ext4/xattr.c, ext4_xattr_inode_verify_hashes: an older form names
	// its only owner instead.
	hash := le.Uint32(holder.raw[disk.InodeAtimeAt:])
	old := le.Uint32(holder.raw[disk.InodeMtimeAt:]) == n.ino && holder.generation() == n.generation()
	if !old && disk.CRC32C(f.geo.seed, value) != hash {
		return nil, corrupt("inode %d: the hash of its value does not match", holder.ino)
	}
	return value, nil
}

// valueSectors is what the values of an inode that lie in inodes of their own
// add to its count of blocks, in units of 512 bytes.
func (f *FS) valueSectors(n *inode) (sectors uint64) {
	list, err := f.bodyXattrs(n)
	if n.xattrs = f.xattrsAt(n.raw); err == nil && n.xattrs != 0 {
		list, err = f.rawXattrs(n)
	}
	if err != nil {
		return 0 // said where they are read
	}
	for _, x := range list {
		if x.valueIno != 0 {
			sectors += ceilDiv(uint64(x.size), uint64(f.geo.blockSize)) * uint64(f.geo.blockSize/512)
		}
	}
	return sectors
}

// xattrInode reads an inode that holds a value.
func (f *FS) xattrInode(ino uint32) (*inode, error) {
	if f.super.Incompat&disk.IncompatEAInode == 0 || ino < f.super.FirstIno {
		return nil, corrupt("inode %d: cannot hold an xattr", ino)
	}
	n, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	if !n.has(disk.InodeEA) || n.kind() != disk.TypeRegular {
		return nil, corrupt("inode %d: holds no xattr", ino)
	}
	return n, nil
}

// inlineData gives the data in an inode: 60 bytes, and what its xattr
// "system.data" adds.
func (f *FS) inlineData(n *inode) ([]byte, error) {
	list, err := f.bodyXattrs(n)
	if err != nil {
		return nil, err
	}
	for _, x := range list {
		if x.index != systemIndex || string(x.name) != inlineName {
			continue
		}
		if x.valueIno != 0 {
			return nil, corrupt("inode %d: inline data in another inode", n.ino)
		}
		data := append(make([]byte, 0, inlineBytes+len(x.value)), n.iblock()...)
		return append(data, x.value...), nil
	}
	return nil, corrupt("inode %d: inline data without its xattr", n.ino)
}

// decodeACL turns a POSIX ACL from its form on disk to that of the system call.
func decodeACL(v []byte) ([]byte, error) {
	const (
		diskVersion, callVersion = 1, 2
		user, group              = 0x02, 0x08
		noID                     = ^uint32(0)
	)
	if len(v) < 4 || le.Uint32(v) != diskVersion {
		return nil, corrupt("not an acl")
	}
	acl := le.AppendUint32(make([]byte, 0, 2*len(v)), callVersion)
	for e := v[4:]; len(e) > 0; {
		if len(e) < 4 {
			return nil, corrupt("acl of %d bytes", len(v))
		}
		tag := le.Uint16(e)
		acl = append(acl, e[:4]...)
		e = e[4:]
		if tag != user && tag != group {
			acl = le.AppendUint32(acl, noID)
			continue
		}
		if len(e) < 4 {
			return nil, corrupt("acl of %d bytes", len(v))
		}
		acl = append(acl, e[:4]...)
		e = e[4:]
	}
	return acl, nil
}
