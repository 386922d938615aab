package oci

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger"

	"golang.org/x/sys/unix"
)

func rootfs(t testing.TB, in *os.File) (*Tree[int], *memSink, error) {
	t.Helper()
	s := &Source{Input: in}
	img, err := s.Resolve(t.Context(), ref(t, "rootfs:"+in.Name()))
	if err != nil {
		return nil, nil, err
	}
	return squashMem(t, img)
}

func TestRootfsTar(t *testing.T) {
	raw := tarOf(t, []te{dir("d"), f("d/x", "hello"), f(".wh.y", "a file like any other")})
	want := []string{"/ 40755 0", `/.wh.y 100644 0 "a file like any other"`, "/d 40755 0", `/d/x 100644 0 "hello"`}
	for name, stored := range map[string][]byte{"plain": raw, "gzip": gz(t, raw), "zstd": zst(t, raw)} {
		for _, pipe := range []bool{false, true} {
			path := filepath.Join(t.TempDir(), "x.tar")
			if err := os.WriteFile(path, stored, 0o600); err != nil {
				t.Fatal(err)
			}
			in, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			if pipe {
				in.Close()
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				in = r
				go func() { _, _ = w.Write(stored); w.Close() }()
			}
			tree, sink, err := rootfs(t, in)
			in.Close()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got := dump(tree, sink); !slices.Equal(got, want) || tree.InputDigest != sum(stored) {
				t.Errorf("%s: %q, digest %s", name, got, tree.InputDigest)
			}
		}
	}
	for name, tt := range map[string]struct {
		raw []byte
		err string
	}{
		"cut inside":         {raw[:1800], "cut short"},
		"cut at an entry":    {raw[:1024], "cut short"},
		"empty":              {nil, "cut short"},
		"garbage":            {[]byte(noise(3000)), "not a tar archive"},
		"xz":                 {[]byte("\xfd7zXZ\x00 and more"), "xz, which is not supported"},
		"gzip cut at member": {gz(t, raw[:1024]), "cut short"},
	} {
		path := filepath.Join(t.TempDir(), "x.tar")
		if err := os.WriteFile(path, tt.raw, 0o600); err != nil {
			t.Fatal(err)
		}
		in, _ := os.Open(path)
		_, _, err := rootfs(t, in)
		in.Close()
		wantError(t, name, err, banger.CodeInvalid, tt.err)
	}
}

// TestRootfsPipeCancel has a pipe on which nothing comes.
func TestRootfsPipeCancel(t *testing.T) {
	before := runtime.NumGoroutine()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	img, err := (&Source{Input: r}).Resolve(t.Context(), Reference{Kind: KindRootfs, Path: "-"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = Squash(ctx, img, &memSink{})
	wantError(t, "cancelled", err, banger.CodeCanceled, "deadline")
	waitGoroutines(t, before)
}

func TestRootfsDir(t *testing.T) {
	d := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(d, 0o750))
	must(os.Mkdir(d+"/sub", 0o755))
	must(os.WriteFile(d+"/sub/a", []byte("bytes"), 0o644))
	must(os.Chmod(d+"/sub/a", 0o4755))
	must(os.Link(d+"/sub/a", d+"/b"))
	must(os.Symlink("/etc/passwd", d+"/link"))
	must(os.Symlink("/etc", d+"/etc"))
	must(os.WriteFile(d+"/sparse", nil, 0o600))
	must(os.Truncate(d+"/sparse", 1<<20))
	must(unix.Mkfifo(d+"/fifo", 0o600))
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(err)
	must(unix.Bind(sock, &unix.SockaddrUnix{Name: d + "/sock"}))
	unix.Close(sock)
	xattr := unix.Setxattr(d+"/sub", "user.note", []byte("hi"), 0) == nil
	must(os.Chtimes(d+"/sub/a", time.Unix(1, 2), time.Unix(-3, 4)))
	root := os.Geteuid() == 0
	if root {
		must(unix.Mknod(d+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		must(os.Chown(d+"/b", 3_000_000_000, 7))
	}
	walk := func() (*Tree[int], *memSink) {
		t.Helper()
		in, err := os.Open(d)
		must(err)
		defer in.Close()
		tree, sink, err := rootfs(t, in)
		must(err)
		return tree, sink
	}
	tree, sink := walk()
	a := tree.Lookup("sub/a")
	if a == nil || a != tree.Lookup("b") || a.Nlink != 2 || a.Mode&0o777 != 0o755 || string(sink.files[a.Content]) != "bytes" || a.Mtime != (Time{-3, 4}) {
		t.Errorf("file %+v", a)
	}
	if root && (a.UID != 3_000_000_000 || a.GID != 7) {
		t.Errorf("owner %d:%d", a.UID, a.GID)
	}
	if n := tree.Lookup("null"); root && (n == nil || n.Major != 1 || n.Minor != 3 || n.Type() != modeChar) {
		t.Errorf("device %+v", n)
	}
	if n := tree.Lookup("etc"); n.Target != "/etc" || tree.Lookup("etc/passwd") != nil {
		t.Errorf("a symlink was followed: %+v", n)
	}
	if n := tree.Lookup("/"); n.Mode != modeDir|0o750 {
		t.Errorf("root %+v", n)
	}
	if tree.Lookup("fifo").Type() != modeFIFO || tree.Lookup("sock").Type() != modeSocket || tree.Lookup("sparse").SizeBytes != 1<<20 {
		t.Error("FIFO, socket or sparse file wrong")
	}
	if xattr && string(tree.Lookup("sub").Xattrs.Get("user.note")) != "hi" {
		t.Errorf("xattrs %q", tree.Lookup("sub").Xattrs.All())
	}
	again, _ := walk()
	if again.InputDigest != tree.InputDigest || !digestPattern.MatchString(tree.InputDigest) {
		t.Errorf("digests %s and %s", tree.InputDigest, again.InputDigest)
	}
	// Each of these must change the digest.
	for name, change := range map[string]func() error{
		"content":  func() error { return os.WriteFile(d+"/b", []byte("BYTES"), 0o644) },
		"mode":     func() error { return os.Chmod(d+"/sub", 0o700) },
		"time":     func() error { return os.Chtimes(d+"/sub", time.Unix(1, 2), time.Unix(9, 9)) },
		"name":     func() error { return os.Rename(d+"/link", d+"/link2") },
		"unlinked": func() error { return os.Remove(d + "/b") },
	} {
		before, _ := walk()
		must(change())
		if after, _ := walk(); after.InputDigest == before.InputDigest {
			t.Errorf("the digest does not depend on %s", name)
		}
	}
}

func TestRootfsDirUnreadable(t *testing.T) {
	d := t.TempDir()
	if err := os.WriteFile(d+"/secret", nil, 0); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	done := make(chan error)
	go func() {
		if os.Geteuid() == 0 {
			// Root reads everything: this thread becomes somebody else and, never
			// unlocked, goes with its goroutine.
			runtime.LockOSThread()
			_, _, _ = syscall.RawSyscall(syscall.SYS_SETFSUID, 65534, 0, 0)
		}
		_, _, err := rootfs(t, in)
		done <- err
	}()
	wantError(t, "unreadable file", <-done, banger.CodeInvalid, `entry "/secret": permission denied`)
}

func TestRootfsDirChanges(t *testing.T) {
	d := t.TempDir()
	if err := os.WriteFile(d+"/gone", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w := &walker{ctx: t.Context()}
	var st unix.Stat_t
	if err := unix.Lstat(d+"/gone", &st); err != nil {
		t.Fatal(err)
	}
	st.Ino++
	fd, err := unix.Open(d, unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := w.open(fd, "gone", 0, &st); err != errChanged {
		t.Errorf("another inode under its name: error %v", err)
	}
}

// TestOverlayfs unpacks layers the way an engine does and lets the kernel join
// them.
func TestOverlayfs(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, "overlayfs needs root")
	}
	for _, tt := range squashShapes {
		if !slices.Contains([]string{"overwritten file with another link keeps its bytes there", "whiteout of a directory", "opaque before", "opaque after", "directory over file", "file over directory",
			"directory over symlink", "symlink over directory", "directories merge, metadata of the upper", "removed and put back", "whiteout of a symlink leaves its target", "setuid and sticky"}, tt.name) {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			// Upper layers need another file system than an overlay below.
			base := t.TempDir()
			var script strings.Builder
			fmt.Fprintf(&script, "set -e; umask 0; mount -t tmpfs tmpfs %s; cd %s; mkdir m empty\n", base, base)
			lowers := ""
			for i, l := range tt.layers {
				fmt.Fprintf(&script, "mkdir l%d\n", i)
				lowers = fmt.Sprintf("l%d:", i) + lowers
				for _, e := range l {
					p := fmt.Sprintf("l%d/%s", i, e.name)
					d, b := filepath.Split(p)
					switch {
					case b == ".wh..wh..opq":
						fmt.Fprintf(&script, "(umask 022; mkdir -p %s); setfattr -n trusted.overlay.opaque -v y %s\n", d, d)
					case strings.HasPrefix(b, ".wh."):
						fmt.Fprintf(&script, "mknod %s%s c 0 0\n", d, b[4:])
					case e.typ == '5':
						fmt.Fprintf(&script, "mkdir -p %s; chown %d:%d %s; chmod %o %s\n", p, e.uid, e.uid, p, e.mode, p)
					case e.typ == '2':
						fmt.Fprintf(&script, "ln -s '%s' %s\n", e.link, p)
					case e.typ == '1':
						fmt.Fprintf(&script, "ln l%d/%s %s\n", i, e.link, p)
					default:
						fmt.Fprintf(&script, "printf %%s '%s' > %s; chmod %o %s\n", e.body, p, e.mode, p)
					}
				}
			}
			script.WriteString("mount -t overlay overlay -o lowerdir=" + lowers + "empty m; cd m; tar -cf - .\n")
			if _, err := exec.LookPath("setfattr"); err != nil && strings.Contains(script.String(), "setfattr") {
				missing(t, "setfattr is not installed")
			}
			cmd := exec.Command("unshare", "-m", "sh", "-c", script.String())
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				missing(t, fmt.Sprintf("overlayfs: %v: %s", err, stderr.String()))
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			go func() { _, _ = io.Copy(w, bytes.NewReader(out)); w.Close() }()
			kernel, ksink, err := rootfs(t, r)
			if err != nil {
				t.Fatal(err)
			}
			var tars [][]byte
			for _, l := range tt.layers {
				tars = append(tars, tarOf(t, l))
			}
			ours, osink, err := squashMem(t, memImage(t, nil, tars...))
			if err != nil {
				t.Fatal(err)
			}
			// The root's own metadata is the mount's.
			if got, want := dump(ours, osink)[1:], dump(kernel, ksink)[1:]; !slices.Equal(got, want) {
				t.Errorf("ours   %q\nkernel %q", got, want)
			}
		})
	}
}
