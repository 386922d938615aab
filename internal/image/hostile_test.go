package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"banger/internal/oci"
	"banger/internal/store"
)

// hostileVar, a folder, makes a test the process that reads hostile images.
const hostileVar = "BANGER_TEST_HOSTILE"

// hostileLimit is how long one image may take.
const hostileLimit = 5 * time.Second

// forbidExec kills this process when it makes another or becomes another
// program: seccomp(2), on x86-64.
func forbidExec() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	equal := func(nr, jt, jf int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jt: uint8(jt), Jf: uint8(jf)}
	}
	const argument0 = 16 // offset of the low half in struct seccomp_data
	filter := []unix.SockFilter{
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0), // the number of the call
		equal(unix.SYS_EXECVE, 7, 0),
		equal(unix.SYS_EXECVEAT, 6, 0),
		equal(unix.SYS_FORK, 5, 0),
		equal(unix.SYS_VFORK, 4, 0),
		equal(unix.SYS_CLONE3, 5, 0), // cannot be looked into: the C library goes on to clone
		equal(unix.SYS_CLONE, 0, 3),  // which makes threads too
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, argument0),
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.CLONE_THREAD, Jt: 1, Jf: 0},
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_KILL_PROCESS),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)),
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := syscall.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return errno
	}
	return nil
}

// An atom is one thing that an attacker puts into a layer. taken says that an
// image of it alone is an image; else want is of the reason.
type atom struct {
	name    string
	want    string
	entries []entry
}

// atoms are all of them. outside is a path on the host that must not change.
func atoms(outside string) []atom {
	victim := outside + "/victim"
	up := strings.Repeat("../", 20)
	evil := func(name string) entry { return file(name, 0o6777, "evil") }
	typed := func(typ byte, name string, major, minor int64) entry {
		return entry{Header: tar.Header{Typeflag: typ, Name: name, Devmajor: major, Devminor: minor, Mode: 0o666}}
	}
	list := []atom{
		{"path up and out", `".." in its path`, []entry{evil(up + victim)}},
		{"absolute path", "", []entry{evil(victim)}},
		{"path down, up and out", `".." in its path`, []entry{evil("a/../../" + up + victim)}},
		{"file through a symlink out", "", []entry{symlink("out", outside), evil("out/victim")}},
		{"file through a symlink up", "", []entry{symlink("up", up), evil("up" + victim)}},
		{"file through a chain up", "", []entry{symlink("one", ".."), symlink("one/two", ".."), evil("one/two" + victim)}},
		{"file through three symlinks", "", []entry{symlink("a", "b"), symlink("b", "c"), symlink("c", outside), evil("a/victim")}},
		{"file through a symlink to itself", "too many levels of symbolic links", []entry{symlink("loop", "loop"), evil("loop/x")}},
		{"hard link to a path of the host", "which is not there", []entry{hardlink("h", victim)}},
		{"hard link up and out", `".." in its path`, []entry{hardlink("h", up+victim)}},
		{"write through a hard link to a symlink", "", []entry{symlink("s", victim), hardlink("h", "s"), evil("h")}},
		{"hard link to itself", "hard link to itself", []entry{hardlink("h", "h")}},
		{"hard links in a circle", "which is not there", []entry{hardlink("h1", "h2"), hardlink("h2", "h1")}},
		{"hard link to a directory", "a directory", []entry{dir("d/", 0o755), hardlink("h", "d")}},
		{"whiteout of .", "whiteout of nothing that can be removed", []entry{evil(".wh..")}},
		{"whiteout of ..", "whiteout of nothing that can be removed", []entry{evil(".wh...")}},
		{"whiteout of nothing", "whiteout of nothing that can be removed", []entry{evil(".wh.")}},
		{"whiteout outside", `".." in its path`, []entry{evil("../.wh.victim")}},
		{"whiteouts through a symlink out", "", []entry{symlink("out", outside), evil("out/.wh.victim"), evil("out/.wh..wh..opq")}},
		{"opaque root", "", []entry{evil(".wh..wh..opq")}},
		{"below a whiteout", "below a whiteout", []entry{evil(".wh.a/b")}},
		{"aufs's own", "", []entry{evil(".wh..wh.plnk/1")}},
		{"block device", "", []entry{typed(tar.TypeBlock, "disk", 8, 0)}},
		{"device 0:0, overlayfs's whiteout", "character device 0:0", []entry{typed(tar.TypeChar, "whiteout", 0, 0)}},
		{"FIFO", "", []entry{typed(tar.TypeFifo, "fifo", 0, 0)}},
		{"entry of an unknown type", "tar entry of type 'V'", []entry{typed('V', "volume", 0, 0)}},
		{"owner past 2^31", "", []entry{evil("x").owned(1<<31, 1<<32-1)}},
		{"owner -1", "uid -1", []entry{{tar.Header{Typeflag: tar.TypeReg, Name: "uid", Uid: -1, Format: tar.FormatGNU}, "x"}}},
		{"time before ext4's", "not between 1901-12-13 and 2446-05-10", []entry{evil("past").at(time.Unix(-1<<40, 0))}},
		{"time after ext4's", "not between 1901-12-13 and 2446-05-10", []entry{evil("future").at(time.Unix(1<<40, 999999999))}},
		{"xattr of overlayfs, trusted", "", []entry{evil("x").with("trusted.overlay.opaque", "y")}},
		{"xattr of overlayfs, user", "", []entry{evil("x").with("user.overlay.metacopy", "")}},
		{"capability that is none", "", []entry{evil("x").with("security.capability", "nonsense")}},
		{"ACL that is none", "not a whole number of entries", []entry{evil("x").with("system.posix_acl_access", "nonsense")}},
		{"xattr of 70,000 bytes", "xattrs of more than 65536 bytes", []entry{evil("x").with("user.large", strings.Repeat("x", 70_000))}},
		{"one name of four types", "listed both as a directory", []entry{evil("x/y"), evil("x"), dir("x/", 0o755), symlink("x", "y")}},
		{"file above the agent", "a parent is not a directory", []entry{evil("usr"), evil("usr/local/bin/banger-vsock-agent")}},
		{"file for the agent's folder", "no place for a guest file", []entry{evil("usr/local")}},
		{"/etc in a circle", "too many levels of symbolic links", []entry{symlink("etc", "etc")}},
		{"units' folder out", "", []entry{symlink("etc/systemd/system", outside)}},
		{"agent out", "", []entry{symlink("usr/local/bin/banger-vsock-agent", victim)}},
		{"/root out", "", []entry{symlink("root", outside), symlink("root/.profile", victim)}},
		{"lost+found out", "", []entry{symlink("lost+found", outside)}},
		{"file in lost+found", "", []entry{evil("lost+found/x")}},
		{"path of 4001 bytes", "", []entry{evil(strings.Repeat("d/", 2000) + "x")}},
		{"path of 4201 bytes", "path longer than 4096 bytes", []entry{evil(strings.Repeat("d/", 2100) + "x")}},
		{"name of 255 bytes", "", []entry{evil(strings.Repeat("n", 255))}},
		{"name of 256 bytes", "name longer than 255 bytes", []entry{evil(strings.Repeat("n", 256))}},
		{"target of 4095 bytes", "", []entry{symlink("long", strings.Repeat("t", 4095))}},
		{"target of 4096 bytes", "longer than 4095 bytes", []entry{symlink("long", strings.Repeat("t", 4096))}},
		{"symlink to nothing", "symlink to nothing", []entry{symlink("nothing", "")}},
	}
	for i, name := range metanames(victim) {
		want := ""
		if name == "." || name == "./." {
			want = "the root of an image must be a directory"
		}
		list = append(list,
			atom{fmt.Sprintf("file %q", name), want, []entry{evil(name)}},
			atom{fmt.Sprintf("symlink to %q", name), "", []entry{symlink(fmt.Sprint("s", i), name)}},
			atom{fmt.Sprintf("directory %q", name), "", []entry{dir("etc/"+strings.ReplaceAll(name, "/", "_")+"/", 0o755)}})
	}
	return list
}

// metanames are names that mean something to a shell, a terminal, a format, a
// flag parser or debugfs, and nothing to banger.
func metanames(victim string) []string {
	return []string{
		"\n!touch " + victim + "2", "$(touch " + victim + "2)", "`touch " + victim + "2`", "\"'; touch x; '\"", "%s%n", "-rf", "\x1b]0;title\a", "\x1b[2J",
		"\u202egnp.exe", "a\tb", "\xff\xfe", "\r", " ", "*", "~", "#", "|cat", "&&x", "C:\\x", ".", "./.", "dump <1> " + victim,
	}
}

// hostileStream damages what a layer would be, or not, before it is stored or
// after, and says how.
func hostileStream(t *testing.T, r *rand.Rand, raw []byte) (s storedLayer, how string) {
	kind := []string{"gzip", "zstd", ""}[r.IntN(3)]
	store := func(raw []byte) storedLayer { return storeLayer(t, kind, raw) }
	how = map[string]string{"gzip": "gzip, ", "zstd": "zstd, ", "": "no compression, "}[kind]
	switch r.IntN(14) {
	case 0:
		return store(raw[:r.IntN(len(raw))]), how + "tar truncated"
	case 1:
		return store(append(slices.Clone(raw), make([]byte, r.IntN(5000))...)), how + "zeros after the tar"
	case 2:
		return store(append(slices.Clone(raw), raw...)), how + "tar twice"
	case 3:
		raw = slices.Clone(raw)
		raw[r.IntN(len(raw))] ^= 1 << r.IntN(8)
		return store(raw), how + "a bit of the tar"
	case 4:
		s := store(raw)
		s.data = s.data[:r.IntN(len(s.data))]
		return s, how + "stream truncated"
	case 5:
		s := store(raw)
		s.data = append(slices.Clone(s.data), "trailing"...)
		return s, how + "bytes after the stream"
	case 6:
		s := store(raw)
		s.data = append(slices.Clone(s.data), s.data...)
		s.diffID = sum(append(slices.Clone(raw), raw...))
		return s, how + "stream twice"
	case 7:
		s := store(raw)
		s.data = slices.Clone(s.data)
		s.data[r.IntN(len(s.data))] ^= 1 << r.IntN(8)
		return s, how + "a bit of the stream"
	}
	return store(raw), how + "whole"
}

// snapshot is everything that can be told of a folder's files from outside, but
// for those below skip.
func snapshot(t *testing.T, dir, skip string) (lines []string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if p == skip {
			return fs.SkipDir
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("%q %o %d:%d %d", p, st.Mode, st.Uid, st.Gid, st.Ino)
		if p != dir { // the state folder itself comes and goes in it
			s += fmt.Sprintf(" %d links %d bytes %v %v", st.Nlink, st.Size, st.Mtim, st.Ctim)
		}
		if d.Type().IsRegular() {
			s += " " + shaOf(t, p)
		}
		lines = append(lines, s)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return lines
}

// guarded runs do in a process that may start no program, and then looks at
// whether that is so.
func guarded(t *testing.T, do func()) {
	t.Helper()
	const exec0 = "start a program"
	if dir := os.Getenv(hostileVar); dir != "" {
		if err := forbidExec(); err != nil {
			t.Fatal(err)
		}
		if dir == exec0 {
			_ = exec.Command("/bin/true").Run()
			return
		}
		do()
		return
	}
	// In memory where that is possible: hundreds of images are made durable.
	dir, err := os.MkdirTemp("/dev/shm", "banger-hostile-")
	if err != nil {
		dir = t.TempDir()
	}
	defer os.RemoveAll(dir)
	run := func(dir string) (string, error) {
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), hostileVar+"="+dir)
		if filepath.IsAbs(dir) {
			cmd.Env = append(cmd.Env, "TMPDIR="+dir)
		}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	out, err := run(dir)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "IMAGE_SEED") || strings.Contains(line, "accepted") || strings.Contains(line, "taken") {
			t.Log(strings.TrimSpace(line))
		}
	}
	// The guard is one: a program that is started ends the process.
	if out, err := run(exec0); err == nil || !strings.Contains(err.Error(), "bad system call") {
		t.Errorf("a process that starts a program: %v\n%s", err, out)
	}
}

// TestHostileImages pulls images of attacks, mixed at random, in a process that
// may start no program, and looks at what is around the store.
func TestHostileImages(t *testing.T) {
	guarded(t, func() { readHostile(t, os.Getenv(hostileVar)) })
}

func readHostile(t *testing.T, dir string) {
	count := 150
	if s := os.Getenv("IMAGE_HOSTILE"); s != "" {
		count, _ = strconv.Atoi(s)
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("IMAGE_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("IMAGE_SEED=%d", seed)
	canary := filepath.Join(dir, "canary")
	outside := filepath.Join(canary, "outside")
	if err := os.MkdirAll(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"victim", "second"} {
		if err := os.WriteFile(filepath.Join(outside, name), []byte("mine"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	state := filepath.Join(canary, "state")
	im, s := openStore(t, state)
	im.baseBytes = smallBytes
	agent := agentFile(t)
	all := atoms(outside)
	before := snapshot(t, canary, state)
	accepted := 0
	counts := map[string]int{}
	for i := range count + len(all) {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		var layers []storedLayer
		what := "mixed"
		if i < len(all) { // each by itself first
			what = all[i].name
			layers = []storedLayer{storeLayer(t, "gzip", tarOf(t, all[i].entries...))}
			counts["an atom alone"]++
		} else {
			for range 1 + r.IntN(3) {
				var mixed []entry
				for range 1 + r.IntN(6) {
					mixed = append(mixed, all[r.IntN(len(all))].entries...)
				}
				if r.IntN(3) == 0 {
					counts["layers in another order"]++
					r.Shuffle(len(mixed), func(i, j int) { mixed[i], mixed[j] = mixed[j], mixed[i] })
				}
				s, how := hostileStream(t, r, tarOf(t, mixed...))
				layers = append(layers, s)
				counts["layer: "+how]++
			}
			counts[fmt.Sprint("mixed, layers: ", len(layers))]++
		}
		l := newLayout(t)
		l.addStored("a", layers...)
		src, ref := l.reference("a")
		src.Blobs = &blobs{Blobs: s.Blobs()}
		ctx, cancel := context.WithTimeout(t.Context(), hostileLimit)
		image, err := im.Pull(ctx, src, ref, PullOptions{Name: "x", Agent: agent})
		cancel()
		src.Input.Close() // there are 20,000 of them in make soak
		if i < len(all) && (err == nil) != (all[i].want == "") || err != nil && i < len(all) && !strings.Contains(err.Error(), all[i].want) {
			t.Errorf("%s: %v, want %q", what, err, all[i].want)
		}
		switch {
		case ctx.Err() == context.DeadlineExceeded:
			t.Fatalf("image %d (%s): not done in %s", i, what, hostileLimit)
		case err == nil:
			accepted++
			if accepted%4 == 0 {
				// All that can be done with an image, in the process that may
				// start no program.
				if v := verify(t, im, "x", agent); v.Differences != nil {
					t.Errorf("image %d (%s): %q", i, what, v.Differences)
				}
				if err := useAll(t, im, s, image); err != nil {
					t.Errorf("image %d (%s): %v", i, what, err)
				}
			}
			if err := im.Remove(t.Context(), image.Name); err != nil {
				t.Errorf("image %d: %v", i, err)
			}
		case !strings.HasPrefix(err.Error(), "image \""), strings.ContainsAny(err.Error(), "\x1b\a\n\r\u202e\xff"):
			t.Errorf("image %d (%s): the error %q", i, what, err)
		}
		nothing(t, s)
		if after := snapshot(t, canary, state); !slices.Equal(before, after) {
			t.Fatalf("image %d (%s): around the store\n%s\nbecame\n%s", i, what, strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
		if t.Failed() && i >= len(all) {
			return
		}
	}
	for _, what := range slices.Sorted(maps.Keys(counts)) {
		t.Logf("accepted or not, %s: %d", what, counts[what])
	}
	t.Logf("%d of %d images accepted", accepted, count+len(all))
	if accepted < 20 || accepted == count+len(all) {
		t.Errorf("%d of %d images accepted", accepted, count+len(all))
	}
	if len(counts) < 20 && count >= 150 {
		t.Errorf("only %d ways were tried", len(counts))
	}
	if _, err := im.Prune(t.Context()); err != nil {
		t.Error(err)
	}
}

// useAll tags, lists, finds, exports and tells the history of an image, and
// reads what was exported again.
func useAll(t *testing.T, im *Images, s *store.Store, image *Image) error {
	ctx := t.Context()
	if _, err := im.Tag(ctx, image.Name, "tagged"); err != nil {
		return err
	}
	if list, err := im.List(); err != nil || len(list) != 2 {
		return fmt.Errorf("list: %d, %w", len(list), err)
	}
	if err := im.Remove(ctx, "tagged"); err != nil {
		return err
	}
	src := func() *oci.Source { return &oci.Source{Blobs: &blobs{Blobs: s.Blobs()}} }
	steps, err := src().History(ctx, image.Name, *image.Digest)
	if err != nil || len(steps) == 0 {
		return fmt.Errorf("history: %d steps, %w", len(steps), err)
	}
	from := src()
	stored, err := from.Stored(ctx, image.Name, *image.Digest)
	if err != nil {
		return err
	}
	path := filepath.Join(t.TempDir(), "export.tar")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := from.Export(ctx, f, stored, image.Name); err != nil {
		return err
	}
	again, ref := reference(t, "docker-archive:"+path, path)
	defer again.Input.Close()
	got, err := again.Resolve(ctx, ref)
	if err != nil || len(got.Layers) != len(stored.Layers) {
		return fmt.Errorf("exported and read again: %w", err)
	}
	return nil
}

// The snapshot sees what it is there for.
func TestSnapshotSees(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	seen := [][]string{snapshot(t, dir, "")}
	for name, change := range map[string]func() error{
		"bytes":  func() error { return os.WriteFile(path, []byte("evil"), 0o644) },
		"mode":   func() error { return os.Chmod(path, 0o600) },
		"a link": func() error { return os.Link(path, filepath.Join(dir, "g")) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		now := snapshot(t, dir, "")
		if slices.ContainsFunc(seen, func(s []string) bool { return slices.Equal(s, now) }) {
			t.Errorf("%s: not seen", name)
		}
		seen = append(seen, now)
	}
}
