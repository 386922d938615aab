package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io/fs"
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
)

// hostileVar makes TestHostileImages the process that reads hostile images.
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

// atoms are what an attacker puts into a layer. outside is a path on the host
// that must not change.
func atoms(outside string) [][]entry {
	victim := outside + "/victim"
	up := strings.Repeat("../", 20)
	evil := func(name string) entry { return file(name, 0o6777, "evil") }
	typed := func(typ byte, name string, major, minor int64) entry {
		return entry{Header: tar.Header{Typeflag: typ, Name: name, Devmajor: major, Devminor: minor, Mode: 0o666}}
	}
	list := [][]entry{
		{evil(up + victim)},
		{evil(victim)},
		{evil("a/../../" + up + victim)},
		{symlink("out", outside), evil("out/victim")},
		{symlink("up", up), evil("up" + victim)},
		{symlink("one", ".."), symlink("one/two", ".."), evil("one/two" + victim)},
		{symlink("a", "b"), symlink("b", "c"), symlink("c", outside), evil("a/victim")},
		{symlink("loop", "loop"), evil("loop/x")},
		{hardlink("h", victim)},
		{hardlink("h", up+victim)},
		{symlink("s", victim), hardlink("h", "s"), evil("h")},
		{hardlink("h", "h")},
		{hardlink("h1", "h2"), hardlink("h2", "h1")},
		{dir("d/", 0o755), hardlink("h", "d")},
		{evil(".wh..")},
		{evil(".wh...")},
		{evil(".wh.")},
		{evil("../.wh.victim")},
		{symlink("out", outside), evil("out/.wh.victim"), evil("out/.wh..wh..opq")},
		{evil(".wh..wh..opq")},
		{evil(".wh.a/b")},
		{evil(".wh..wh.plnk/1")},
		{typed(tar.TypeBlock, "disk", 8, 0)},
		{typed(tar.TypeChar, "whiteout", 0, 0)},
		{typed(tar.TypeFifo, "fifo", 0, 0)},
		{typed('V', "volume", 0, 0)},
		{evil("x").owned(1<<31, 1<<32-1)},
		{entry{tar.Header{Typeflag: tar.TypeReg, Name: "uid", Uid: -1, Format: tar.FormatGNU}, "x"}},
		{evil("past").at(time.Unix(-1<<40, 0))},
		{evil("future").at(time.Unix(1<<40, 999999999))},
		{evil("x").with("trusted.overlay.opaque", "y")},
		{evil("x").with("user.overlay.metacopy", "")},
		{evil("x").with("security.capability", "nonsense")},
		{evil("x").with("system.posix_acl_access", "nonsense")},
		{evil("x").with("user.large", strings.Repeat("x", 70_000))},
		{evil("x/y"), evil("x"), dir("x/", 0o755), symlink("x", "y")},
		{evil("usr"), evil("usr/local/bin/banger-vsock-agent")},
		{evil("usr/local")},
		{symlink("etc", "etc")},
		{symlink("etc/systemd/system", outside)},
		{symlink("usr/local/bin/banger-vsock-agent", victim)},
		{symlink("root", outside), symlink("root/.profile", victim)},
		{symlink("lost+found", outside)},
		{evil("lost+found/x")},
		{evil(strings.Repeat("d/", 2000) + "x")},
		{evil(strings.Repeat("d/", 2100) + "x")},
		{evil(strings.Repeat("n", 255))},
		{evil(strings.Repeat("n", 256))},
		{symlink("long", strings.Repeat("t", 4095))},
		{symlink("long", strings.Repeat("t", 4096))},
		{symlink("nothing", "")},
	}
	for _, name := range []string{
		"\n!touch " + victim + "2", "$(touch " + victim + "2)", "`touch " + victim + "2`", "\"'; touch x; '\"", "%s%n", "-rf", "\x1b]0;title\a", "\x1b[2J",
		"\u202egnp.exe", "a\tb", "\xff\xfe", "\r", " ", "*", "~", "#", "|cat", "&&x", "C:\\x", ".", "./.", "dump <1> " + victim,
	} {
		list = append(list, []entry{evil(name)}, []entry{symlink("s", name)}, []entry{dir("etc/"+strings.ReplaceAll(name, "/", "_")+"/", 0o755)})
	}
	return list
}

// hostileStream damages what a layer would be, or not.
func hostileStream(r *rand.Rand, raw []byte) []byte {
	switch r.IntN(8) {
	case 0:
		return raw[:r.IntN(len(raw))]
	case 1:
		return append(slices.Clone(raw), make([]byte, r.IntN(5000))...)
	case 2:
		return append(slices.Clone(raw), raw...)
	case 3:
		raw = slices.Clone(raw)
		raw[r.IntN(len(raw))] ^= 1 << r.IntN(8)
	}
	return raw
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

// TestHostileImages pulls images of attacks, mixed at random, in a process that
// may start no program, and looks at what is around the store.
func TestHostileImages(t *testing.T) {
	if dir := os.Getenv(hostileVar); dir != "" {
		readHostile(t, dir)
		return
	}
	// In memory where that is possible: hundreds of images are made durable.
	dir, err := os.MkdirTemp("/dev/shm", "banger-hostile-")
	if err != nil {
		dir = t.TempDir()
	}
	defer os.RemoveAll(dir)
	run := func(env ...string) (string, error) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestHostileImages$", "-test.v")
		cmd.Env = append(append(os.Environ(), hostileVar+"="+dir), env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	out, err := run()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "IMAGE_SEED") || strings.Contains(line, "accepted") {
			t.Log(strings.TrimSpace(line))
		}
	}
	// The guard is one: a program that is started ends the process.
	if out, err := run(hostileVar + "_EXEC=1"); err == nil || !strings.Contains(err.Error(), "bad system call") {
		t.Errorf("a process that starts a program: %v\n%s", err, out)
	}
}

func readHostile(t *testing.T, dir string) {
	if err := forbidExec(); err != nil {
		t.Fatal(err)
	}
	if os.Getenv(hostileVar+"_EXEC") != "" {
		_ = exec.Command("/bin/true").Run()
		return
	}
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
	all := atoms(outside)
	before := snapshot(t, canary, state)
	accepted := 0
	for i := range count + len(all) {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		var layers [][]byte
		if i < len(all) { // each by itself first
			layers = [][]byte{tarOf(t, all[i]...)}
		} else {
			for range 1 + r.IntN(3) {
				var mixed []entry
				for range 1 + r.IntN(6) {
					mixed = append(mixed, all[r.IntN(len(all))]...)
				}
				if r.IntN(3) == 0 {
					r.Shuffle(len(mixed), func(i, j int) { mixed[i], mixed[j] = mixed[j], mixed[i] })
				}
				layers = append(layers, hostileStream(r, tarOf(t, mixed...)))
			}
		}
		l := newLayout(t)
		l.add("a", layers...)
		src, ref := l.reference("a")
		src.Blobs = &blobs{Blobs: s.Blobs()}
		ctx, cancel := context.WithTimeout(t.Context(), hostileLimit)
		image, err := im.Pull(ctx, src, ref, PullOptions{Name: "x", Agent: agentFile(t)})
		cancel()
		switch {
		case ctx.Err() == context.DeadlineExceeded:
			t.Fatalf("image %d: not done in %s", i, hostileLimit)
		case err == nil:
			accepted++
			if accepted%4 == 0 {
				if v := verify(t, im, "x", agentFile(t)); v.Differences != nil {
					t.Errorf("image %d: %q", i, v.Differences)
				}
			}
			if err := im.Remove(t.Context(), image.Name); err != nil {
				t.Errorf("image %d: %v", i, err)
			}
		case !strings.HasPrefix(err.Error(), "image \""), strings.ContainsAny(err.Error(), "\x1b\a\n\r\u202e\xff"):
			t.Errorf("image %d: the error %q", i, err)
		}
		nothing(t, s)
		if after := snapshot(t, canary, state); !slices.Equal(before, after) {
			t.Fatalf("image %d: around the store\n%s\nbecame\n%s", i, strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d of %d images accepted", accepted, count+len(all))
	if accepted < 20 || accepted == count+len(all) {
		t.Errorf("%d of %d images accepted", accepted, count+len(all))
	}
	if _, err := im.Prune(t.Context()); err != nil {
		t.Error(err)
	}
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
