package oci

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseACL(t *testing.T) {
	acl := func(entries ...aclEntry) string { return string(encodeACL(entries)) }
	obj := func(tag, perm uint16) aclEntry { return aclEntry{tag, perm, aclUndefinedID} }
	full := acl(obj(aclUserObj, 7), aclEntry{aclUser, 6, 1000}, obj(aclGroupObj, 5), aclEntry{aclGroup, 4, 7}, obj(aclMask, 6), obj(aclOther, 0))
	for _, row := range []struct{ name, text, want, err string }{
		{"star and libarchive", "user::rwx,group::r-x,mask::rw-,other::---,user:lisa:rw-:1000,group:staff:r--:7", full, ""},
		{"GNU tar", "user::rwx\nuser:1000:rw-\ngroup::r-x\ngroup:7:r--\nmask::rw-\nother::---\n", full, ""},
		{"short words", "u::rwx,u:1000:rw,g::rx,g:7:r,m::rw,o::", full, ""},
		{"a default ACL's prefix", "default:user::rwx,default:group::r-x,default:other::r-x", acl(obj(aclUserObj, 7), obj(aclGroupObj, 5), obj(aclOther, 5)), ""},
		{"remarks", "user::rwx\ngroup::r-x\t#effective:r--\nother::r-x", acl(obj(aclUserObj, 7), obj(aclGroupObj, 5), obj(aclOther, 5)), ""},
		{"the largest id", "user::rwx,user:x:r--:4294967295,group::r-x,mask::r--,other::r-x", acl(obj(aclUserObj, 7), aclEntry{aclUser, 4, 1<<32 - 1}, obj(aclGroupObj, 5), obj(aclMask, 4), obj(aclOther, 5)), ""},
		{"empty", "", acl(), ""},
		{"a name alone", "user::rwx,user:lisa:rw-,group::r-x,mask::rw-,other::---", "", "without a number"},
		{"an id past the largest", "user::rwx,user:x:r--:4294967296,group::r-x,mask::r--,other::r-x", "", "without a number"},
		{"no others", "user::rwx,group::r-x", "", "that every ACL has"},
		{"named without a mask", "user::rwx,user:1:rw-,group::r-x,other::---", "", "that every ACL has"},
		{"an entry twice", "user::rwx,user::r--,group::r-x,other::---", "", "twice"},
		{"a user twice", "user::rwx,user:1:r--,user:01:rwx,group::r-x,mask::rwx,other::---", "", "twice"},
		{"no permission", "user::rwz,group::r-x,other::---", "", `"user::rwz"`},
		{"no kind", "owner::rwx,group::r-x,other::---", "", `"owner::rwx"`},
		{"a named mask", "user::rwx,group::r-x,mask:1:rwx,other::---", "", `"mask:1:rwx"`},
		{"too many fields", "user::rwx:1:2,group::r-x,other::---", "", "ACL entry"},
		{"one field", "rwx", "", "ACL entry"},
		{"entries without end", strings.Repeat("user:1:r--,", maxACLEntries+1), "", "more than 1024"},
	} {
		got, err := parseACL(row.text)
		if row.err != "" {
			if err == nil || !strings.Contains(err.Error(), row.err) {
				t.Errorf("%s: %v, want %q", row.name, err, row.err)
			}
			continue
		}
		if err != nil || string(encodeACL(got)) != row.want {
			t.Errorf("%s: %x, %v, want %x", row.name, encodeACL(got), err, row.want)
		}
	}
	if _, err := parseACL("user:lisa:rwx"); !errors.Is(err, errACLName) {
		t.Error(err)
	}
}

// What GNU tar saves of real ACLs is what the kernel says of them.
func TestACLOfTar(t *testing.T) {
	dir := t.TempDir()
	file, sub, plain := filepath.Join(dir, "file"), filepath.Join(dir, "sub"), filepath.Join(dir, "plain")
	for _, path := range []string{file, plain} {
		if err := os.WriteFile(path, []byte("x"), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	obj := func(tag, perm uint16) aclEntry { return aclEntry{tag, perm, aclUndefinedID} }
	acl := encodeACL([]aclEntry{obj(aclUserObj, 6), {aclUser, 6, 123456}, {aclUser, 1, 123457}, obj(aclGroupObj, 4), {aclGroup, 7, 654321}, obj(aclMask, 5), obj(aclOther, 1)})
	minimal := encodeACL([]aclEntry{obj(aclUserObj, 7), obj(aclGroupObj, 4), obj(aclOther, 1)})
	for _, x := range []struct {
		path, name string
		value      []byte
	}{{file, "system.posix_acl_access", acl}, {sub, "system.posix_acl_default", acl}, {sub, "system.posix_acl_access", minimal}} {
		if err := unix.Lsetxattr(x.path, x.name, x.value, 0); err != nil {
			missing(t, "no POSIX ACLs in "+dir+": "+err.Error())
		}
	}
	out, err := exec.Command("tar", "--acls", "--numeric-owner", "-C", dir, "-cf", "-", "file", "sub", "plain").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(out, []byte("SCHILY.acl.access")) {
		missing(t, "this tar saves no ACLs")
	}
	tree, _, err := squashMem(t, memImage(t, nil, out))
	if err != nil || tree.Notes != nil {
		t.Fatalf("%v, %q", err, tree.Notes)
	}
	for _, path := range []string{file, sub, plain} {
		n := tree.Lookup(filepath.Base(path))
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil || uint32(n.Mode) != st.Mode {
			t.Errorf("%s: mode %o, the kernel's is %o, %v", path, n.Mode, st.Mode, err)
		}
		want, err := readXattrs(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(want) != len(n.Xattrs.All()) {
			t.Errorf("%s: %q, the kernel has %q", path, n.Xattrs.All(), want)
		}
		for k, v := range want {
			if !bytes.Equal(n.Xattrs.Get(k), v) {
				t.Errorf("%s: %s %x, the kernel has %x", path, k, n.Xattrs.Get(k), v)
			}
		}
	}
}

// What of a header cannot be applied is refused or noted, never passed over.
func TestRecords(t *testing.T) {
	one := func(typ byte, records map[string]string) (*Tree[int], error) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if typ == tar.TypeXGlobalHeader {
			if err := w.WriteHeader(&tar.Header{Typeflag: typ, Name: "g", PAXRecords: records}); err != nil {
				t.Fatal(err)
			}
			records = nil
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "x", Mode: 0o644, PAXRecords: records}); err != nil {
			t.Fatal(err)
		}
		w.Close()
		tree, _, err := squashMem(t, memImage(t, nil, b.Bytes()))
		return tree, err
	}
	const whole = "user::rwx,user:1:rw-,group::r-x,mask::rw-,other::---"
	raw := string(encodeACL([]aclEntry{{aclUserObj, 7, aclUndefinedID}, {aclGroupObj, 7, aclUndefinedID}, {aclOther, 7, aclUndefinedID}}))
	for _, row := range []struct {
		name        string
		typ         byte
		records     map[string]string
		notes, fail string
		check       func(n *Node[int]) bool
	}{
		{name: "a comment for all", typ: tar.TypeXGlobalHeader, records: map[string]string{"comment": "0123"}},
		{name: "an owner for all", typ: tar.TypeXGlobalHeader, records: map[string]string{"uid": "7"}, fail: `global header with "uid"`},
		{name: "ACL and mode", records: map[string]string{"SCHILY.acl.access": whole}, check: func(n *Node[int]) bool { return n.Mode == modeRegular|0o760 && len(n.Xattrs.All()) == 1 }},
		{name: "ACL and xattr", records: map[string]string{"SCHILY.acl.access": whole, "SCHILY.xattr.system.posix_acl_access": raw}, check: func(n *Node[int]) bool {
			return n.Mode == modeRegular|0o644 && string(n.Xattrs.Get("system.posix_acl_access")) == raw
		}},
		{name: "ACL of names", records: map[string]string{"SCHILY.acl.default": "user::rwx,user:a:rwx,group::rwx,mask::rwx,other::rwx"}, notes: "ACLs that name users or groups without their numbers left out (1)"},
		{name: "ACL that is none", records: map[string]string{"SCHILY.acl.access": "nonsense"}, fail: "ACL entry"},
		{name: "ACL of NFS", records: map[string]string{"SCHILY.acl.ace": "owner@:rwx::allow"}, notes: "PAX records of no meaning to Linux left out (1)"},
		{name: "file flags", records: map[string]string{"SCHILY.fflags": "uchg"}, notes: "PAX records of no meaning to Linux left out (1)"},
		{name: "what files are made of", records: map[string]string{"SCHILY.dev": "1", "SCHILY.ino": "2", "LIBARCHIVE.creationtime": "3"}},
		{name: "SELinux", records: map[string]string{"RHT.security.selinux": "a:b:c"}, check: func(n *Node[int]) bool { return string(n.Xattrs.Get("security.selinux")) == "a:b:c\x00" }},
	} {
		t.Run(row.name, func(t *testing.T) {
			tree, err := one(row.typ, row.records)
			if row.fail != "" {
				if err == nil || !strings.Contains(err.Error(), row.fail) {
					t.Errorf("%v, want %q", err, row.fail)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(tree.Notes, "; "); got != row.notes {
				t.Errorf("notes %q, want %q", got, row.notes)
			}
			if n := tree.Lookup("x"); row.check != nil && !row.check(n) {
				t.Errorf("%+v", n)
			}
		})
	}
}

func FuzzACL(f *testing.F) {
	f.Add("user::rwx,user:1000:rw-,group::r-x,group:7:r--,mask::rw-,other::---")
	f.Add("default:u::7,#,\n")
	f.Fuzz(func(t *testing.T, text string) {
		acl, err := parseACL(text)
		if err == nil && len(acl) > maxACLEntries {
			t.Errorf("%d entries", len(acl))
		}
		if err == nil && modeOfACL(acl)&^0o777 != 0 {
			t.Errorf("mode %o", modeOfACL(acl))
		}
	})
}
