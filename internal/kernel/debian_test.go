package kernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"banger/internal/store"
)

// needTool returns the path of a program, or skips the test; where CI is set a
// missing program is a failure.
func needTool(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p
		}
	}
	skipOrFail(t, "program "+name+" is not here")
	return ""
}

func skipOrFail(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal("CI=true, but " + reason)
	}
	t.Skip("SKIPPED: " + reason)
}

func openStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestPullDebian pulls both suites from Debian's mirror and looks at the
// result with the real tools.
func TestPullDebian(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED: -short")
	}
	if os.Getenv("http_proxy") == "" && os.Getenv("HTTP_PROXY") == "" {
		conn, err := net.DialTimeout("tcp", "deb.debian.org:80", 5*time.Second)
		if err != nil {
			skipOrFail(t, "deb.debian.org does not answer: "+err.Error())
		}
		conn.Close()
	}
	ks := Open(openStore(t))
	for _, suite := range Suites {
		t.Run(suite, func(t *testing.T) { testPulled(t, ks, suite) })
	}
	if k, err := ks.Get(""); err != nil || k.Source != "debian:"+DefaultSuite {
		t.Errorf("default kernel: %+v, %v", k, err)
	}
}

func testPulled(t *testing.T, ks *Kernels, suite string) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	var stages []string
	k, err := ks.Pull(ctx, suite, func(p Progress) {
		if len(stages) == 0 || stages[len(stages)-1] != p.Stage {
			stages = append(stages, p.Stage)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s in %v", k.Package, time.Since(start))
	if !slices.Equal(stages, []string{"index", "download", "unpack"}) {
		t.Errorf("stages of progress: %q", stages)
	}
	again, err := ks.Pull(ctx, suite, func(p Progress) {
		if p.Stage != "index" {
			t.Errorf("second pull does it again: %+v", p)
		}
	})
	if err != nil || again.Version != k.Version || !again.Created.Equal(k.Created) {
		t.Fatalf("second pull: %+v, %v", again, err)
	}
	names := strings.Join(k.LoadModules(), " ")
	want := []string{"virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net", "overlay"}
	if suite == "bookworm" { // built in since
		want = append([]string{"virtio_ring", "virtio", "virtio_console"}, want...)
	}
	for _, m := range want {
		if !strings.Contains(names, "-"+m+".ko") {
			t.Errorf("boot modules lack %s: %s", m, names)
		}
	}
	if len(k.LoadModules()) != len(want) {
		t.Errorf("%d boot modules, want %d: %s", len(k.LoadModules()), len(want), names)
	}
	root := checkDrive(t, k)
	compareWithDepmod(t, root, k.Version)
	checkModprobe(t, root, k.Version)
	checkBoot(t, k)
}

// checkDrive runs the modules drive through e2fsck and copies it out with
// debugfs, to the place below the returned folder where modprobe looks.
func checkDrive(t *testing.T, k *Kernel) (root string) {
	t.Helper()
	if out, err := exec.Command(needTool(t, "e2fsck"), "-fn", k.Modules).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	out, err := exec.Command(needTool(t, "dumpe2fs"), "-h", k.Modules).CombinedOutput()
	if err != nil {
		t.Fatalf("dumpe2fs: %v\n%s", err, out)
	}
	if !bytes.Contains(out, []byte(k.ModulesUUID)) || bytes.Contains(out, []byte("has_journal")) {
		t.Errorf("want the UUID %s and no journal:\n%s", k.ModulesUUID, out)
	}
	root = t.TempDir()
	dir := filepath.Join(root, "lib/modules", k.Version)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err = exec.Command(needTool(t, "debugfs"), "-R", "rdump / "+dir, k.Modules).CombinedOutput()
	if err != nil {
		t.Fatalf("debugfs: %v\n%s", err, out)
	}
	return root
}

// compareWithDepmod runs the real depmod on a copy of a module folder. The
// indexes that libkmod reads must be the same: those without freedom of order
// to the byte, the others line by line.
func compareWithDepmod(t *testing.T, root, version string) {
	t.Helper()
	depmod := needTool(t, "depmod")
	ours := filepath.Join(root, "lib/modules", version)
	other := t.TempDir()
	theirs := filepath.Join(other, "lib/modules", version)
	if err := os.CopyFS(theirs, os.DirFS(ours)); err != nil {
		t.Fatal(err)
	}
	lists, _ := filepath.Glob(theirs + "/modules.*")
	for _, l := range lists {
		if !slices.Contains(shippedLists, filepath.Base(l)) {
			os.Remove(l)
		}
	}
	if out, err := exec.Command(depmod, "-b", other, version).CombinedOutput(); err != nil {
		t.Fatalf("depmod: %v\n%s", err, out)
	}
	read := func(dir, name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		}
		return b
	}
	for _, name := range []string{"modules.dep", "modules.softdep", "modules.devname", "modules.alias", "modules.symbols"} {
		a, b := sortedLines(read(ours, name), name), sortedLines(read(theirs, name), name)
		if !slices.Equal(a, b) {
			t.Errorf("%s: differs from depmod's: %s", name, firstDifference(a, b))
		}
	}
	for _, name := range []string{"modules.alias.bin", "modules.builtin.bin", "modules.builtin.alias.bin", "modules.symbols.bin"} {
		if a, b := read(ours, name), read(theirs, name); !bytes.Equal(a, b) {
			t.Errorf("%s: differs from depmod's (%d and %d bytes)", name, len(a), len(b))
		}
	}
	a, b := readKeyIndex(t, read(ours, "modules.dep.bin")), readKeyIndex(t, read(theirs, "modules.dep.bin"))
	if !slices.Equal(a, b) || len(a) < 100 {
		t.Errorf("modules.dep.bin: differs from depmod's: %s", firstDifference(a, b))
	}
}

// sortedLines also sorts the words of modules.dep, in which any order that
// has needs behind what needs them is right.
func sortedLines(data []byte, name string) []string {
	lines := strings.Split(string(data), "\n")
	if name == "modules.dep" {
		for i, l := range lines {
			words := strings.Fields(l)
			slices.Sort(words)
			lines[i] = strings.Join(words, " ")
		}
	}
	slices.Sort(lines)
	return lines
}

// readKeyIndex lists a libkmod index as "key: words in order".
func readKeyIndex(t testing.TB, b []byte) (lines []string) {
	t.Helper()
	be := binary.BigEndian
	text := func(at int) string { s, _, _ := bytes.Cut(b[at:], []byte{0}); return string(s) }
	var walk func(node uint32, key string)
	walk = func(node uint32, key string) {
		at := int(node & maxKeyIndexBytes)
		if node&keyNodePrefix != 0 {
			key += text(at)
			at += len(text(at)) + 1
		}
		if node&keyNodeChildren != 0 {
			first, last := b[at], b[at+1]
			at += 2
			for c := int(first); c <= int(last); c++ {
				if child := be.Uint32(b[at:]); child != 0 {
					walk(child, key+string(rune(c)))
				}
				at += 4
			}
		}
		if node&keyNodeValues != 0 {
			n := be.Uint32(b[at:])
			at += 4
			for range n {
				words := strings.Fields(text(at + 4))
				slices.Sort(words)
				lines = append(lines, key+": "+strings.Join(words, " "))
				at += 4 + len(text(at+4)) + 1
			}
		}
	}
	walk(be.Uint32(b[8:]), "")
	return lines
}

func firstDifference(a, b []string) string {
	for _, l := range a {
		if !slices.Contains(b, l) {
			return "only ours: " + l
		}
	}
	for _, l := range b {
		if !slices.Contains(a, l) {
			return "only depmod's: " + l
		}
	}
	return "repeated lines"
}

// checkModprobe asks the real modprobe for what guests need, by name and by
// alias, and requires that it fails once the indexes are damaged.
func checkModprobe(t *testing.T, root, version string) {
	t.Helper()
	ask := func(what string) ([]string, error) { return showDepends(t, root, version, what) }
	for _, row := range []struct {
		what string
		want string // in the order of loading
	}{
		{"bridge", "llc stp bridge"},
		{"overlay", "overlay"},
		{"tun", "tun"},
		{"rtnl-link-bridge", "llc stp bridge"},
		{"char-major-10-200", "tun"},
		{"nf_tables", "crc32c_intel libcrc32c nfnetlink nf_tables"},
		{"ext4", "builtin:ext4"},
		{"fs-ext4", "builtin:ext4"},
	} {
		got, err := ask(row.what)
		g, w := slices.Clone(got), strings.Fields(row.want)
		if row.what == "nf_tables" { // the order of its needs is free
			slices.Sort(g[:max(len(g)-1, 0)])
		}
		if err != nil || !slices.Equal(g, w) {
			t.Errorf("modprobe %s: loads %q, want %q (%v)", row.what, got, w, err)
		}
	}
	for _, name := range []string{"modules.dep.bin", "modules.alias.bin"} {
		if err := os.Truncate(filepath.Join(root, "lib/modules", version, name), 40); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := ask("bridge"); err == nil {
		t.Errorf("modprobe of truncated indexes: loads %q, want an error", got)
	}
}

// showDepends returns what modprobe would load, in order.
func showDepends(t *testing.T, root, version, what string) ([]string, error) {
	t.Helper()
	out, err := exec.Command(needTool(t, "modprobe"), "-d", root, "-S", version, "--show-depends", what).CombinedOutput()
	var names []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "insmod" {
			names = append(names, moduleName(f[1]))
		} else if len(f) > 1 && f[0] == "builtin" {
			names = append(names, "builtin:"+f[1])
		}
	}
	return names, err
}

// checkBoot starts the kernel in QEMU with an initramfs of its own and the
// modules drive, and waits until the guest has loaded a module from there.
func checkBoot(t *testing.T, k *Kernel) {
	t.Helper()
	qemu := needTool(t, "qemu-system-x86_64")
	dir := t.TempDir()
	build := exec.Command(needTool(t, "go"), "build", "-o", dir+"/init", "./testdata/bootinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	agent, err := os.ReadFile(dir + "/init")
	if err != nil {
		t.Fatal(err)
	}
	boot, _ := json.Marshal(map[string]any{"Release": k.Version, "Want": "bridge", "Modules": k.LoadModules()})
	var initramfs bytes.Buffer
	if err := k.WriteInitramfs(&initramfs, bytes.NewReader(agent), int64(len(agent)), boot); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/initramfs", initramfs.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	start := time.Now()
	cmd := exec.CommandContext(ctx, qemu, "-M", "microvm", "-accel", "tcg", "-cpu", "max", "-m", "512", "-no-reboot",
		"-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio",
		"-kernel", k.Vmlinux, "-initrd", dir+"/initramfs",
		"-append", "console=ttyS0 reboot=t panic=-1 quiet loglevel=4 no_timer_check cryptomgr.notests "+tscFlags(t),
		"-drive", "if=none,id=m,format=raw,readonly=on,file="+k.Modules, "-device", "virtio-blk-device,drive=m")
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("bootinit: all is well")) {
		t.Fatalf("boot: %v\n%s", err, out)
	}
	t.Logf("booted in %v", time.Since(start))
}

// tscFlags tell a guest under TCG the frequency of its clock, which is the
// host's: without them it may hang while it measures.
func tscFlags(t *testing.T) string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(info), "cpu MHz")
	_, rest, _ = strings.Cut(rest, ":")
	mhz, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
	if f, err := strconv.ParseFloat(mhz, 64); err == nil {
		return fmt.Sprintf("tsc=reliable tsc_early_khz=%.0f", f*1000)
	}
	return ""
}
