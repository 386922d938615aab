package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"banger/internal/wire"
)

const (
	// maxAccountFileBytes bounds /etc/passwd and /etc/group. Larger files
	// belong to directory services, which a static binary cannot ask anyway.
	maxAccountFileBytes = 4 << 20
	// maxGroups bounds the supplementary groups of a session; the kernel's
	// own limit is NGROUPS_MAX, 65536.
	maxGroups = 1024
	// maxID is the largest uid or gid; 2^32-1 means "unchanged" to the kernel.
	maxID = 1<<32 - 2
)

// An account is whom a session runs as.
type account struct {
	Name   string // "" for an id without a name
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary
	Home   string   // never empty
	Shell  string   // "" where the files name none
}

// A passwdEntry is one line of /etc/passwd, see passwd(5).
type passwdEntry struct {
	name, home, shell string
	uid, gid          uint32
}

// parsePasswd returns the first entry that match accepts. Lines that are not
// of the format are skipped, as the C libraries do.
func parsePasswd(data []byte, match func(passwdEntry) bool) (passwdEntry, bool) {
	for line := range bytes.Lines(data) {
		f := strings.Split(strings.TrimRight(string(line), "\r\n"), ":")
		if len(f) < 7 || f[0] == "" || f[0][0] == '#' {
			continue
		}
		uid, ok1 := parseID(f[2])
		gid, ok2 := parseID(f[3])
		if !ok1 || !ok2 {
			continue
		}
		e := passwdEntry{name: f[0], uid: uid, gid: gid, home: f[5], shell: f[6]}
		if match(e) {
			return e, true
		}
	}
	return passwdEntry{}, false
}

// groupsOf returns the ids of the groups that list name as a member, and the
// id of the group called find, see group(5).
func groupsOf(data []byte, name, find string) (member []uint32, found uint32, ok bool) {
	for line := range bytes.Lines(data) {
		f := strings.Split(strings.TrimRight(string(line), "\r\n"), ":")
		if len(f) < 4 || f[0] == "" || f[0][0] == '#' {
			continue
		}
		gid, valid := parseID(f[2])
		if !valid {
			continue
		}
		if !ok && find != "" && f[0] == find {
			found, ok = gid, true
		}
		if name == "" || len(member) == maxGroups {
			continue
		}
		for m := range strings.SplitSeq(f[3], ",") {
			if m == name {
				member = append(member, gid)
				break
			}
		}
	}
	return member, found, ok
}

// parseID reads a uid or gid: decimal digits only, no sign.
func parseID(s string) (uint32, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > maxID {
		return 0, false
	}
	return uint32(n), true
}

// lookupAccount finds spec (NAME, UID, NAME:GROUP, UID:GID or empty) in the
// account files below root. As in Docker, a number that no line has is taken
// as it is, and naming a group drops the supplementary ones. Errors are
// *wire.Error.
func lookupAccount(root, spec string) (account, error) {
	user, group, hasGroup := strings.Cut(spec, ":")
	if user == "" {
		user = "root"
	}
	passwd, err := readAccounts(filepath.Join(root, "/etc/passwd"))
	if err != nil {
		return account{}, &wire.Error{Code: wire.ErrNoUser, Message: fmt.Sprintf("user %q: %v", user, err)}
	}
	a := account{Home: "/"}
	uid, numeric := parseID(user)
	e, ok := parsePasswd(passwd, func(e passwdEntry) bool { return e.name == user })
	if !ok && numeric {
		e, ok = parsePasswd(passwd, func(e passwdEntry) bool { return e.uid == uid })
	}
	switch {
	case ok:
		a = account{Name: e.name, UID: e.uid, GID: e.gid, Home: e.home, Shell: e.shell}
	case numeric:
		a.UID = uid
	case user == "root":
		a.Name = "root"
	default:
		return account{}, &wire.Error{Code: wire.ErrNoUser, Message: fmt.Sprintf("user %q: not in the guest's /etc/passwd", user)}
	}
	if a.UID == 0 && !ok {
		if fi, err := os.Stat(filepath.Join(root, "/root")); err == nil && fi.IsDir() {
			a.Home = "/root"
		}
	}
	if !strings.HasPrefix(a.Home, "/") {
		a.Home = "/"
	}

	groups, err := readAccounts(filepath.Join(root, "/etc/group"))
	if err != nil {
		return account{}, &wire.Error{Code: wire.ErrNoUser, Message: fmt.Sprintf("group %q: %v", group, err)}
	}
	member, gid, found := groupsOf(groups, a.Name, group)
	if !hasGroup || group == "" {
		a.Groups = member
		return a, nil
	}
	if !found {
		if gid, found = parseID(group); !found {
			return account{}, &wire.Error{Code: wire.ErrNoUser, Message: fmt.Sprintf("group %q: not in the guest's /etc/group", group)}
		}
	}
	a.GID = gid
	return a, nil
}

// processGroups is the list for setgroups(2): the group itself, then the
// supplementary ones, as initgroups(3) has it.
func (a account) processGroups() []uint32 {
	groups := []uint32{a.GID}
	for _, g := range a.Groups {
		if g != a.GID {
			groups = append(groups, g)
		}
	}
	return groups
}

// readAccounts reads an account file; one that is missing is empty.
func readAccounts(path string) ([]byte, error) {
	data, err := readBounded(path, maxAccountFileBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}
