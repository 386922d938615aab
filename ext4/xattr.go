package ext4

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"banger/ext4/internal/disk"
)

var le = binary.LittleEndian

// xattrSet holds the encoded xattrs of one inode.
type xattrSet struct {
	body  []byte // for the inode itself, from its magic on; or nil
	block []byte // for a block, without checksum, without the free middle; or nil
	tail  []byte // the values of that block, which end where it ends
	at    uint64 // where the block lies; set by Finish
}

// put writes the xattr block into the zeroed b.
func (s *xattrSet) put(b []byte, fsSeed uint32) {
	copy(b, s.block)
	copy(b[disk.BlockSize-len(s.tail):], s.tail)
	disk.SealXattrBlock(b, s.at, fsSeed)
}

type xattr struct {
	index byte
	name  string // without what index stands for
	value []byte
}

func (x *xattr) entrySize() int { return disk.XattrEntryHeader + align4(len(x.name)) }
func (x *xattr) size() int      { return x.entrySize() + align4(len(x.value)) }

func align4(n int) int { return (n + 3) &^ 3 }

// xattrPrefixes are the name indexes of fs/ext4/xattr.h that a name can have.
var xattrPrefixes = [...]struct {
	index  byte
	prefix string
}{{1, "user."}, {4, "trusted."}, {6, "security."}}

const (
	aclAccess, aclDefault           = "system.posix_acl_access", "system.posix_acl_default"
	aclAccessIndex, aclDefaultIndex = 2, 3
)

// encodeXattrs turns named values into what goes to disk. The inode's own
// room is filled first, in the order of the block.
func encodeXattrs(set map[string][]byte) (*xattrSet, error) {
	if len(set) == 0 {
		return nil, nil
	}
	list := make([]xattr, 0, len(set))
	for name, value := range set {
		x, err := newXattr(name, value)
		if err != nil {
			return nil, fmt.Errorf("xattr %q: %w", name, err)
		}
		if x.index != 0 {
			list = append(list, x)
		}
	}
	// The kernel looks names up in a block in this order.
	slices.SortFunc(list, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	})
	const (
		bodySize  = disk.InodeSize - disk.InodeXattrAt
		bodyRoom  = bodySize - 4 - 4 // magic, end mark
		blockRoom = disk.BlockSize - disk.XattrBlockHeader - 4
	)
	var inBody, inBlock []xattr
	bodyUsed, blockUsed := 0, 0
	for _, x := range list {
		if bodyUsed+x.size() <= bodyRoom {
			inBody = append(inBody, x)
			bodyUsed += x.size()
		} else {
			inBlock = append(inBlock, x)
			blockUsed += x.size()
		}
	}
	if blockUsed > blockRoom {
		return nil, fmt.Errorf("xattrs: %d bytes beyond what the inode holds, more than the %d of one block", blockUsed, blockRoom)
	}
	s := new(xattrSet)
	if inBody != nil {
		s.body = make([]byte, bodySize)
		le.PutUint32(s.body, disk.XattrMagic)
		putXattrs(s.body[4:], s.body[4:], inBody, bodySize-4, false)
	}
	if inBlock != nil {
		b := make([]byte, disk.BlockSize)
		le.PutUint32(b[0:], disk.XattrMagic)
		le.PutUint32(b[4:], 1) // owners
		le.PutUint32(b[8:], 1) // blocks
		entries, values, hash := putXattrs(b, b[disk.XattrBlockHeader:], inBlock, disk.BlockSize, true)
		le.PutUint32(b[12:], hash)
		s.block = bytes.Clone(b[:disk.XattrBlockHeader+entries])
		s.tail = bytes.Clone(b[values:])
	}
	if s.body == nil && s.block == nil {
		return nil, nil
	}
	return s, nil
}

// putXattrs writes entries upwards from entryArea and values downwards from
// end, whose offsets count from base. Entries in a block carry a hash, those
// in an inode none, as the kernel has it.
func putXattrs(base, entryArea []byte, list []xattr, end int, hashed bool) (entries, values int, blockHash uint32) {
	e := entryArea
	for _, x := range list {
		if len(x.value) > 0 {
			end -= align4(len(x.value))
			copy(base[end:], x.value)
			le.PutUint16(e[2:], uint16(end))
		}
		e[0], e[1] = byte(len(x.name)), x.index
		le.PutUint32(e[8:], uint32(len(x.value)))
		copy(e[disk.XattrEntryHeader:], x.name)
		if hashed {
			h := x.hash()
			le.PutUint32(e[12:], h)
			blockHash = blockHash<<16 ^ blockHash>>16 ^ h
		}
		entries += x.entrySize()
		e = e[x.entrySize():]
	}
	return entries, end, blockHash
}

// hash is ext4_xattr_hash_entry.
func (x *xattr) hash() (h uint32) {
	for i := range len(x.name) {
		h = h<<5 ^ h>>27 ^ uint32(x.name[i])
	}
	for v := x.value; len(v) > 0; {
		var word [4]byte
		v = v[copy(word[:], v):]
		h = h<<16 ^ h>>16 ^ le.Uint32(word[:])
	}
	return h
}

// newXattr gives the zero xattr for an ACL that says nothing.
func newXattr(name string, value []byte) (xattr, error) {
	switch name {
	case aclAccess, aclDefault:
		acl, err := encodeACL(value)
		if err != nil || acl == nil {
			return xattr{}, err
		}
		if name == aclAccess {
			return xattr{index: aclAccessIndex, value: acl}, nil
		}
		return xattr{index: aclDefaultIndex, value: acl}, nil
	}
	for _, p := range xattrPrefixes {
		rest, ok := strings.CutPrefix(name, p.prefix)
		switch {
		case !ok:
			continue
		case rest == "":
			return xattr{}, errors.New("nothing after the prefix")
		case len(name) > MaxNameBytes:
			return xattr{}, fmt.Errorf("name of %d bytes, more than %d", len(name), MaxNameBytes)
		case strings.IndexByte(rest, 0) >= 0:
			return xattr{}, errors.New("name holds a NUL")
		}
		return xattr{p.index, strings.Clone(rest), value}, nil
	}
	return xattr{}, errors.New("not in the namespaces user, trusted, security, and not an acl")
}

// encodeACL turns a POSIX ACL from its system call form
// (include/uapi/linux/posix_acl_xattr.h) to the shorter one on disk
// (fs/ext4/acl.h). It accepts what posix_acl_valid does; nil means that the
// ACL has no entries.
func encodeACL(v []byte) ([]byte, error) {
	const (
		callVersion, callEntry         = 2, 8
		diskVersion                    = 1
		userObj, user, groupObj, group = 0x01, 0x02, 0x04, 0x08
		mask, other                    = 0x10, 0x20
	)
	if len(v) < 4 || (len(v)-4)%callEntry != 0 {
		return nil, fmt.Errorf("acl of %d bytes: not a whole number of entries", len(v))
	}
	if version := le.Uint32(v); version != callVersion {
		return nil, fmt.Errorf("acl version %d: not 2", version)
	}
	if len(v) == 4 {
		return nil, nil
	}
	acl := le.AppendUint32(nil, diskVersion)
	last, seen := uint16(0), uint16(0)
	for e := v[4:]; len(e) > 0; e = e[callEntry:] {
		tag, perm, id := le.Uint16(e), le.Uint16(e[2:]), le.Uint32(e[4:])
		named := tag == user || tag == group
		switch {
		case tag == 0 || tag > other || tag&(tag-1) != 0:
			return nil, fmt.Errorf("acl tag %#x: unknown", tag)
		case perm > 7:
			return nil, fmt.Errorf("acl permission %#x: more than rwx", perm)
		case tag < last || tag == last && !named:
			return nil, fmt.Errorf("acl tag %#x: out of order or twice", tag)
		case named && id == ^uint32(0):
			return nil, fmt.Errorf("acl id %d: not a user or group", id)
		}
		last, seen = tag, seen|tag
		acl = le.AppendUint16(acl, tag)
		acl = le.AppendUint16(acl, perm)
		if named {
			acl = le.AppendUint32(acl, id)
		}
	}
	need := uint16(userObj | groupObj | other)
	if seen&(user|group) != 0 {
		need |= mask
	}
	if seen&need != need {
		return nil, errors.New("acl: an entry for owner, group, mask or others is missing")
	}
	return acl, nil
}
