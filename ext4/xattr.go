package ext4

import (
	"bytes"
	"cmp"
	"crypto/sha256"
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
	body  []byte    // for the inode itself, from its magic on; or nil
	block []byte    // for a block, without checksum, without the free middle; or nil
	tail  []byte    // the values of that block, which end where it ends
	large []eaValue // values that lie in inodes of their own: see link
	// What those values add to i_blocks of the inode, as if they were its own.
	largeSectors uint64
}

// eaValue is a value for an EA inode (the ea_inode feature).
type eaValue struct {
	value  []byte // the caller's
	inBody bool   // its entry is in the body, else in the block
	entry  int    // offset of the entry there
}

// link makes large value i the one that EA inode ino holds. hash is the
// CRC32C of the value, seeded with the geometry's seed.
func (s *xattrSet) link(i int, ino, hash uint32) {
	v := s.large[i]
	e := s.block
	if v.inBody {
		e = s.body
	}
	e = e[v.entry:]
	le.PutUint32(e[4:], ino)
	h := hashBytes(0, e[disk.XattrEntryHeader:][:e[0]])
	le.PutUint32(e[12:], hashWord(h, hash))
}

// put writes the xattr block, to lie at block at, into the zeroed b.
func (s *xattrSet) put(g *geometry, b []byte, at uint64) {
	copy(b, s.block)
	copy(b[len(b)-len(s.tail):], s.tail)
	var hash uint32 // ext4_xattr_rehash
	for e := s.block[disk.XattrBlockHeader:]; len(e) > 0; e = e[xattrEntrySize(int(e[0])):] {
		hash = hashWord(hash, le.Uint32(e[12:]))
	}
	le.PutUint32(b[12:], hash)
	if g.csum {
		disk.SealXattrBlock(b, at, g.seed)
	}
}

type xattr struct {
	index byte
	name  string // without what index stands for
	value []byte
	large bool // the value goes to an EA inode
}

func xattrEntrySize(name int) int { return disk.XattrEntryHeader + align4(name) }

func (x *xattr) entrySize() int { return xattrEntrySize(len(x.name)) }

func (x *xattr) size() int {
	if x.large {
		return x.entrySize()
	}
	return x.entrySize() + align4(len(x.value))
}

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

// encodeXattrs turns named values into what goes to disk. The body of the
// inode, where bodySize bytes follow its fixed fields, is filled first, in the
// order of the block. Where that and the block are too small, the largest
// values go to EA inodes. nil means that there is nothing to write.
func (g *geometry) encodeXattrs(set map[string][]byte, bodySize int) (*xattrSet, error) {
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
	if len(list) == 0 {
		return nil, nil
	}
	// The kernel looks names up in a block in this order.
	slices.SortFunc(list, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	})
	const (
		bodyOverhead = 4 + 4 // magic, end mark
		endMark      = 4
	)
	inBody, inBlock, err := g.divideXattrs(list, bodySize-bodyOverhead, g.blockSize-disk.XattrBlockHeader-endMark)
	if err != nil {
		return nil, err
	}
	s := new(xattrSet)
	if inBody != nil {
		s.body = make([]byte, bodySize)
		le.PutUint32(s.body, disk.XattrMagic)
		s.putEntries(g, s.body, 4, 4, inBody)
	}
	if inBlock != nil {
		b := make([]byte, g.blockSize)
		le.PutUint32(b[0:], disk.XattrMagic)
		le.PutUint32(b[4:], 1) // owners
		le.PutUint32(b[8:], 1) // blocks
		entries, values := s.putEntries(g, b, 0, disk.XattrBlockHeader, inBlock)
		s.block = bytes.Clone(b[:entries])
		s.tail = bytes.Clone(b[values:])
	}
	return s, nil
}

// encodeXattrsOf is encodeXattrs, for a symlink with its target in the inode if
// fast. e2fsck takes any i_blocks of one without an xattr block for those of
// the target (ext2fs_inode_has_valid_blocks2), so with values in EA inodes,
// which count there, it must have that block.
func (g *geometry) encodeXattrsOf(fast bool, set map[string][]byte, bodySize int) (*xattrSet, error) {
	x, err := g.encodeXattrs(set, bodySize)
	if err == nil && x != nil && fast && x.block == nil && len(x.large) > 0 {
		return g.encodeXattrs(set, 0)
	}
	return x, err
}

// divideXattrs says what goes where, marking large values.
func (g *geometry) divideXattrs(list []xattr, bodyRoom, blockRoom int) (inBody, inBlock []xattr, err error) {
	entries := 0
	for i := range list {
		entries += list[i].entrySize()
	}
	for {
		inBody, inBlock = nil, nil
		bodyUsed, blockUsed := 0, 0
		largest := -1
		for i, x := range list {
			if !x.large && len(x.value) > 4 && (largest < 0 || len(x.value) > len(list[largest].value)) {
				largest = i
			}
			if bodyUsed+x.size() <= bodyRoom {
				inBody = append(inBody, x)
				bodyUsed += x.size()
			} else {
				inBlock = append(inBlock, x)
				blockUsed += x.size()
			}
		}
		switch {
		case blockUsed <= blockRoom:
			return inBody, inBlock, nil
		case !g.eaInode:
			return nil, nil, fmt.Errorf("xattrs: %d bytes beyond what the inode holds, more than the %d of one block", blockUsed, blockRoom)
		case largest < 0 || entries > bodyRoom+blockRoom:
			return nil, nil, fmt.Errorf("xattrs: names of %d bytes, more than the %d of the inode and one block", entries, max(bodyRoom, 0)+blockRoom)
		}
		list[largest].large = true
	}
}

// putEntries writes entries upwards from offset at and values downwards from
// the end of area. Offsets of values count from base in a block and from the
// first entry in a body; entries in a block carry a hash, those in a body none
// but for large values, as the kernel has it.
func (s *xattrSet) putEntries(g *geometry, area []byte, base, at int, list []xattr) (entriesEnd, valuesStart int) {
	end := len(area)
	for _, x := range list {
		e := area[at:]
		if x.large {
			s.large = append(s.large, eaValue{x.value, base > 0, at})
			s.largeSectors += uint64(ceilDiv(len(x.value), g.blockSize) * g.blockSize / disk.SectorSize)
		} else if len(x.value) > 0 {
			end -= align4(len(x.value))
			copy(area[end:], x.value)
			le.PutUint16(e[2:], uint16(end-base))
		}
		e[0], e[1] = byte(len(x.name)), x.index
		le.PutUint32(e[8:], uint32(len(x.value)))
		copy(e[disk.XattrEntryHeader:], x.name)
		if base == 0 {
			le.PutUint32(e[12:], x.hash())
		}
		at += x.entrySize()
	}
	return at, end
}

// hash is ext4_xattr_hash_entry.
func (x *xattr) hash() uint32 {
	h := hashBytes(0, x.name)
	for v := x.value; len(v) > 0; {
		var word [4]byte
		v = v[copy(word[:], v):]
		h = hashWord(h, le.Uint32(word[:]))
	}
	return h
}

func hashBytes[T string | []byte](h uint32, name T) uint32 {
	for i := range len(name) {
		h = h<<5 ^ h>>27 ^ uint32(name[i])
	}
	return h
}

func hashWord(h, word uint32) uint32 { return h<<16 ^ h>>16 ^ word }

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
		case len(value) > MaxXattrBytes:
			return xattr{}, fmt.Errorf("value of %d bytes, more than %d", len(value), MaxXattrBytes)
		}
		return xattr{index: p.index, name: rest, value: value}, nil
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
	if len(v) > MaxXattrBytes {
		return nil, fmt.Errorf("acl of %d bytes, more than %d", len(v), MaxXattrBytes)
	}
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

// storedXattrs is an xattrSet as a Writer keeps it: what the free middles
// leave, in text.
type storedXattrs struct {
	at                                      uint32 // in text: body, its tail, block, its tail
	body, bodyTail, block, blockTail, nRefs uint16 // bytes; number of refs
	refs                                    uint32 // first in eaInodes.refs
}

// eaRef says that a large value is that of an EA inode.
type eaRef struct {
	eaValue        // without the value
	inode   uint32 // in eaInodes
}

// eaInode holds one large value for every inode that has it.
type eaInode struct {
	sum     [sha256.Size]byte
	content storedContent
	crc     uint32 // of the value, unseeded
	refs    uint64 // not 0
}

type eaInodes struct {
	inodes  []eaInode
	refs    []eaRef
	byValue map[[sha256.Size]byte]uint32
}

const maxEAInodes = 1 << 19

// keepXattrs stores a set and places its large values. It gives one more than
// the index.
func (w *Writer) keepXattrs(s *xattrSet) (uint32, error) {
	if len(w.ea.inodes)+len(s.large) > maxEAInodes {
		return 0, fmt.Errorf("xattrs: more than %d large values in one image", maxEAInodes)
	}
	k := storedXattrs{refs: uint32(len(w.ea.refs))}
	for _, v := range s.large {
		i, err := w.keepValue(v.value)
		if err != nil {
			w.forgetValues(k.refs)
			return 0, err
		}
		v.value = nil
		w.ea.refs = append(w.ea.refs, eaRef{v, i})
		w.ea.inodes[i].refs++
		k.nRefs++
	}
	var body, bodyTail []byte
	if s.body != nil {
		at := 4
		for s.body[at] != 0 || s.body[at+1] != 0 {
			at += xattrEntrySize(int(s.body[at]))
		}
		body, bodyTail = s.body[:at], bytes.TrimLeft(s.body[at:], "\x00")
	}
	k.body, k.bodyTail, k.block, k.blockTail = uint16(len(body)), uint16(len(bodyTail)), uint16(len(s.block)), uint16(len(s.tail))
	k.at = w.names.text.put(string(body), string(bodyTail), string(s.block), string(s.tail))
	return w.xattrs.add(k) + 1, nil
}

// keepValue places a value, which no hole may interrupt, once.
func (w *Writer) keepValue(value []byte) (uint32, error) {
	sum := sha256.Sum256(value)
	if i, ok := w.ea.byValue[sum]; ok {
		return i, nil
	}
	c := newContent(w, int64(len(value)))
	if err := w.placeWhole(c, value); err != nil {
		return 0, err
	}
	w.live += c.blocks()
	if w.ea.byValue == nil {
		w.ea.byValue = make(map[[sha256.Size]byte]uint32)
	}
	i := uint32(len(w.ea.inodes))
	w.ea.byValue[sum] = i
	w.ea.inodes = append(w.ea.inodes, eaInode{sum: sum, content: storedContent{c.size, c.extents}, crc: disk.CRC32C(0, value)})
	return i, nil
}

// forgetValues takes back refs from the given one on. The values that nothing
// refers to any more are the last.
func (w *Writer) forgetValues(refs uint32) {
	for _, ref := range w.ea.refs[refs:] {
		w.ea.inodes[ref.inode].refs--
	}
	w.ea.refs = w.ea.refs[:refs]
	for n := len(w.ea.inodes); n > 0 && w.ea.inodes[n-1].refs == 0; n-- {
		last := &w.ea.inodes[n-1]
		delete(w.ea.byValue, last.sum)
		w.live -= uint64(ceilDiv(last.content.size, disk.BlockSize))
		w.ea.inodes = w.ea.inodes[:n-1]
	}
}

// load gives back what keepXattrs stored, with its large values linked: inode
// numbers of EA inodes count from firstEA.
func (w *Writer) loadXattrs(index uint32, g *geometry, firstEA uint32) *xattrSet {
	k := w.xattrs.at(index - 1)
	at := k.at
	next := func(n uint16) []byte {
		if n == 0 {
			return nil
		}
		at += uint32(n)
		return []byte(w.names.text.get(at-uint32(n), int(n)))
	}
	s := new(xattrSet)
	body, bodyTail := next(k.body), next(k.bodyTail)
	s.block, s.tail = next(k.block), next(k.blockTail)
	if len(body) > 0 {
		s.body = make([]byte, xattrBodySize)
		copy(s.body, body)
		copy(s.body[xattrBodySize-len(bodyTail):], bodyTail)
	}
	for i, ref := range w.ea.refs[k.refs:][:k.nRefs] {
		s.large = append(s.large, ref.eaValue)
		s.largeSectors += uint64(ceilDiv(w.ea.inodes[ref.inode].content.size, disk.BlockSize) * disk.SectorsPerBlock)
		s.link(i, firstEA+ref.inode, w.ea.inodes[ref.inode].hash(g))
	}
	return s
}

// hash is the CRC32C of the value with the file system's seed, which was not
// known when the value was placed: the seed's part is that of as many zeros.
func (e *eaInode) hash(g *geometry) uint32 {
	return e.crc ^ disk.CRC32C(g.seed, zeros[:e.content.size])
}
