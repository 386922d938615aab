package oci

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// POSIX ACLs come in a tar as text (star's SCHILY.acl.access and .default,
// which GNU tar and libarchive write too) or as the xattr itself. The xattr is
// that of linux/posix_acl_xattr.h: a version, and entries of tag, permissions
// and id.
const (
	aclVersion     = 2
	aclUserObj     = 0x01
	aclUser        = 0x02
	aclGroupObj    = 0x04
	aclGroup       = 0x08
	aclMask        = 0x10
	aclOther       = 0x20
	aclUndefinedID = 1<<32 - 1
	maxACLEntries  = 1024
)

type aclEntry struct {
	tag, perm uint16
	id        uint32
}

// errACLName says that an ACL cannot be applied, which is no error of the tar.
var errACLName = errors.New("it names a user or group without a number")

// parseACL reads an ACL as text: entries like user:lisa:rw-:1000, separated by
// commas or line ends. Numbers count, names do not: what they mean is known
// only in the finished image.
func parseACL(text string) ([]aclEntry, error) {
	var acl []aclEntry
	for part := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		part, _, _ = strings.Cut(part, "#")
		part = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(part), "default:"))
		if part == "" {
			continue
		}
		if len(acl) == maxACLEntries {
			return nil, fmt.Errorf("ACL of more than %d entries", maxACLEntries)
		}
		bad := fmt.Errorf("ACL entry %q", clip(part))
		fields := strings.Split(part, ":")
		if len(fields) == 2 { // mask:rwx and other:rwx, as Solaris writes them
			fields = []string{fields[0], "", fields[1]}
		}
		if len(fields) < 3 || len(fields) > 4 {
			return nil, bad
		}
		e := aclEntry{id: aclUndefinedID}
		for _, c := range fields[2] {
			bit := strings.IndexRune("xwr", c)
			if c != '-' && bit < 0 {
				return nil, bad
			}
			if bit >= 0 {
				e.perm |= 1 << bit
			}
		}
		named := fields[1] != ""
		switch kind := fields[0]; {
		case (kind == "user" || kind == "u") && named:
			e.tag = aclUser
		case kind == "user" || kind == "u":
			e.tag = aclUserObj
		case (kind == "group" || kind == "g") && named:
			e.tag = aclGroup
		case kind == "group" || kind == "g":
			e.tag = aclGroupObj
		case (kind == "mask" || kind == "m") && !named:
			e.tag = aclMask
		case (kind == "other" || kind == "o") && !named:
			e.tag = aclOther
		default:
			return nil, bad
		}
		if named {
			number := fields[1]
			if len(fields) == 4 {
				number = fields[3]
			}
			id, err := strconv.ParseUint(number, 10, 32)
			if err != nil {
				return nil, errACLName
			}
			e.id = uint32(id)
		}
		acl = append(acl, e)
	}
	slices.SortFunc(acl, func(a, b aclEntry) int { return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.id, b.id)) })
	return acl, checkACL(acl)
}

// checkACL wants what the kernel's posix_acl_valid wants.
func checkACL(acl []aclEntry) error {
	if len(acl) == 0 {
		return nil
	}
	var seen, named uint16
	for i, e := range acl {
		if i > 0 && acl[i-1].tag == e.tag && acl[i-1].id == e.id {
			return errors.New("ACL with an entry twice")
		}
		seen |= e.tag
		named |= e.tag & (aclUser | aclGroup)
	}
	if need := uint16(aclUserObj | aclGroupObj | aclOther); seen&need != need || named != 0 && seen&aclMask == 0 {
		return errors.New("ACL without an entry that every ACL has")
	}
	return nil
}

// encodeACL makes the xattr's value.
func encodeACL(acl []aclEntry) []byte {
	b := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range acl {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// modeOfACL is the permission bits that an access ACL gives a file: the group's
// are those of the mask, if there is one.
func modeOfACL(acl []aclEntry) (mode int64) {
	var group, mask int64 = 0, -1
	for _, e := range acl {
		switch e.tag {
		case aclUserObj:
			mode |= int64(e.perm) << 6
		case aclGroupObj:
			group = int64(e.perm)
		case aclMask:
			mask = int64(e.perm)
		case aclOther:
			mode |= int64(e.perm)
		}
	}
	if mask >= 0 {
		group = mask
	}
	return mode | group<<3
}

// applyACLs turns the text forms into xattrs, as an extraction would: the mode
// follows the ACL, and an ACL that says no more than a mode is one. The xattr
// itself, where it is there too, counts.
func (e *entry) applyACLs(records map[string]string) error {
	for _, form := range []struct{ key, xattr string }{
		{"SCHILY.acl.access", "system.posix_acl_access"},
		{"SCHILY.acl.default", "system.posix_acl_default"},
	} {
		text, ok := records[form.key]
		if _, raw := e.xattrs[form.xattr]; !ok || raw {
			continue
		}
		acl, err := parseACL(text)
		if errors.Is(err, errACLName) {
			e.notes = append(e.notes, "ACLs that name users or groups without their numbers left out")
			continue
		}
		if err != nil {
			return err
		}
		access := form.xattr == "system.posix_acl_access"
		if access && len(acl) > 0 {
			e.mode = e.mode&^0o777 | modeOfACL(acl)
		}
		if len(acl) > 3 || !access && len(acl) > 0 {
			e.setXattr(form.xattr, encodeACL(acl))
		}
	}
	return nil
}
