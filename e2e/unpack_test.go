package e2e

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What an image is, by means that are not ours: GNU tar unpacks its layers one
// over the other onto an ext4 that mke2fs made, the whiteouts are followed by
// the lines below, and the kernel says what is there.

// missing skips a test for want of something, and fails where none may be.
func missing(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("NOT RUN: "+format, args...)
	}
	t.Skipf("NOT RUN: "+format, args...)
}

func needProgram(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		missing(t, "%s is not installed (`make test` installs it as root)", name)
	}
}

// mountImage mounts an image file by a loop device and gives the folder.
func mountImage(t *testing.T, image, options string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "ext4", "-o", "loop,"+options, image, dir).CombinedOutput(); err != nil {
		missing(t, "mount: %s", out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

// scratchFS is an empty file system that keeps all that Linux knows of a file,
// which a temporary folder need not.
func scratchFS(t *testing.T, size string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "scratch")
	run(t, "mke2fs", "-q", "-t", "ext4", "-I", "256", "-E", "lazy_itable_init=1,lazy_journal_init=1", image, size)
	return mountImage(t, image, "rw,noatime")
}

// unpack applies layers, lowest first, to the empty folder root. Each is a file
// as it came from the registry.
func unpack(t *testing.T, root string, form compression, layers []string) {
	t.Helper()
	plain := filepath.Join(t.TempDir(), "layer")
	for i, file := range layers {
		out, err := os.Create(plain)
		must(t, err)
		cmd := exec.Command(string(form), "-q", "-d", "-c")
		in, err := os.Open(file)
		must(t, err)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, os.Stderr
		must(t, cmd.Run())
		in.Close()
		must(t, out.Close())
		rawACLs, err := makeRoom(root, plain)
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		args := []string{"--extract", "--file", plain, "-C", root, "--preserve-permissions", "--same-owner", "--numeric-owner",
			"--xattrs", "--xattrs-include=*", "--exclude=.wh.*", "--no-wildcards-match-slash", "--warning=no-timestamp"}
		if !rawACLs { // with it tar takes ACLs by their text alone
			args = append(args, "--acls")
		}
		run(t, append([]string{"tar"}, args...)...)
	}
}

// makeRoom removes from root what a layer hides, and what of it tar would not
// replace by itself: another kind of thing, and the xattrs of a directory. It
// says whether the layer has ACLs as xattrs and not as text.
func makeRoom(root, layer string) (rawACLs bool, err error) {
	in, err := os.Open(layer)
	if err != nil {
		return false, err
	}
	defer in.Close()
	r := tar.NewReader(in)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return rawACLs, nil
		}
		if err != nil {
			return rawACLs, err
		}
		for k := range h.PAXRecords {
			rawACLs = rawACLs || strings.HasPrefix(k, "SCHILY.xattr.system.posix_acl_")
		}
		full := filepath.Join(root, h.Name)
		dir, base := path.Split(full)
		if base == ".wh..wh..opq" {
			below, err := os.ReadDir(dir)
			if err != nil && !os.IsNotExist(err) {
				return rawACLs, err
			}
			for _, e := range below {
				if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
					return rawACLs, err
				}
			}
			continue
		}
		if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
			if err := os.RemoveAll(filepath.Join(dir, hidden)); err != nil {
				return rawACLs, err
			}
			continue
		}
		fi, err := os.Lstat(full)
		if err != nil {
			continue
		}
		if isDir := h.Typeflag == tar.TypeDir; fi.IsDir() != isDir {
			err = os.RemoveAll(full)
		} else if isDir {
			var names []string
			if names, err = xattrNames(full); err == nil {
				for _, name := range names {
					if err := unix.Lremovexattr(full, name); err != nil {
						return rawACLs, err
					}
				}
			}
		}
		if err != nil {
			return rawACLs, err
		}
	}
}

func xattrNames(file string) (names []string, err error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(file, buf)
	for name := range strings.SplitSeq(string(buf[:max(n, 0)]), "\x00") {
		if name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, err
}

// listing says all of what is below root that an image decides, by path.
func listing(root string) (map[string]string, error) {
	list := make(map[string]string)
	first := make(map[uint64]string) // of the inodes with several names
	buf := make([]byte, 64<<10)
	err := filepath.WalkDir(root, func(full string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(full, root), "/")
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("mode %o owner %d:%d mtime %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f, err := os.Open(full)
			if err != nil {
				return err
			}
			h := sha256.New()
			_, err = io.Copy(h, f)
			f.Close()
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" size %d sha256 %x", st.Size, h.Sum(nil))
		case unix.S_IFLNK:
			target, err := os.Readlink(full)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" -> %q", target)
		case unix.S_IFCHR, unix.S_IFBLK:
			s += fmt.Sprintf(" device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if first[st.Ino] == "" {
				first[st.Ino] = name // the walk is sorted, so it is the same on both sides
			}
			s += fmt.Sprintf(" links %d with %q", st.Nlink, first[st.Ino])
		}
		names, err := xattrNames(full)
		if err != nil {
			return err
		}
		for _, x := range names {
			n, err := unix.Lgetxattr(full, x, buf)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %s=%s", x, hex.EncodeToString(buf[:n]))
		}
		list[name] = s
		return nil
	})
	return list, err
}

// What every base has beside its image (docs/hacking.md shows the agent in it).
var guestPaths = []string{
	"usr/local/bin/banger-vsock-agent",
	"usr/local/libexec/banger-network-bootstrap",
	"etc/systemd/system/banger-vsock-agent.service",
	"etc/systemd/system/banger-network.service",
	"etc/systemd/system/multi-user.target.wants/banger-vsock-agent.service",
	"etc/systemd/system/multi-user.target.wants/banger-network.service",
	"etc/modules-load.d/banger-vsock.conf",
}

// compareLists gives the differences between what a base has and what it is to
// have. The guest files are to be there, and only they and their folders may be
// there besides.
func compareLists(base, want map[string]string) (differences []string) {
	base = maps.Clone(base)
	delete(base, "lost+found")
	for _, g := range guestPaths {
		if base[g] == "" {
			differences = append(differences, fmt.Sprintf("guest file %q is not there", g))
		}
		delete(base, g)
		for dir := path.Dir(g); dir != "."; dir = path.Dir(dir) {
			if _, ours := want[dir]; !ours && strings.HasPrefix(base[dir], "mode 40755 owner 0:0 ") {
				delete(base, dir)
			}
		}
	}
	for name, s := range want {
		if got, ok := base[name]; !ok {
			differences = append(differences, fmt.Sprintf("%q is not there: %s", name, s))
		} else if got != s {
			differences = append(differences, fmt.Sprintf("%q\n  has  %s\n  want %s", name, got, s))
		}
		delete(base, name)
	}
	for name, s := range base {
		differences = append(differences, fmt.Sprintf("%q is there: %s", name, s))
	}
	slices.Sort(differences)
	return differences
}

// A comparison that sees nothing is none: each aspect is changed once.
func TestListingSees(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, "owners and devices need root")
	}
	needProgram(t, "setfacl")
	needProgram(t, "setcap")
	root := filepath.Join(scratchFS(t, "64M"), "root")
	must(t, os.Mkdir(root, 0o755))
	// What was not given a time has the same one, whatever was done to it.
	list := func() map[string]string {
		t.Helper()
		run(t, "find", root, "!", "-name", "old", "-exec", "touch", "-h", "-d", "@5", "{}", "+")
		list, err := listing(root)
		must(t, err)
		return list
	}
	reset := func() map[string]string {
		t.Helper()
		must(t, os.RemoveAll(root))
		must(t, os.Mkdir(root, 0o755))
		fixedAttributes(t, root)
		return list()
	}
	base := func(list map[string]string) map[string]string {
		list = maps.Clone(list)
		for _, g := range guestPaths {
			list[g] = "mode 100644 owner 0:0 "
			for dir := path.Dir(g); dir != "."; dir = path.Dir(dir) {
				list[dir] = "mode 40755 owner 0:0 mtime 0"
			}
		}
		return list
	}
	want := reset()
	if d := compareLists(base(want), want); d != nil {
		t.Fatalf("the same: %q", d)
	}
	for name, script := range map[string]string{
		"nothing":         "",
		"content":         "printf kapped | dd of=capped conv=notrunc status=none; setcap cap_net_bind_service,cap_net_raw+ep capped",
		"size":            "truncate -s +1 sparse",
		"mode":            "chmod 4755 setuid",
		"owner":           "chown -h 5 link",
		"time":            "touch -d '1965-04-03 02:01:00.123456788 UTC' old",
		"xattr":           "setfattr -n user.note -v lost one/name",
		"xattr more":      "setfattr -n user.more -v x old",
		"capability":      "setcap -r capped",
		"access ACL":      "setfacl -m u:1000:rw- acl/file",
		"default ACL":     "setfacl -k acl",
		"link":            "rm third; cp -a one/name third",
		"device":          "rm null; mknod null c 1 4",
		"type":            "rm fifo; mkdir fifo",
		"target":          "ln -sfn ../../etc/group link",
		"a name less":     "rm -r acl",
		"a name more":     "touch more",
		"a folder of one": "chmod 700 two",
	} {
		reset()
		run(t, "sh", "-c", "set -e; cd "+root+"/fixed; "+script)
		if d := compareLists(base(list()), want); (len(d) == 0) != (name == "nothing") {
			t.Errorf("%s: %q", name, d)
		}
	}
	less := base(want)
	delete(less, guestPaths[0])
	if d := compareLists(less, want); len(d) != 1 {
		t.Errorf("without a guest file: %q", d)
	}
}
