package e2e

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/yamux"

	"banger/ext4"
	"banger/internal/kernel"
	"banger/internal/store"
	"banger/internal/wire"
)

// TestCompare prints our figures beside the rivals', measured in turn in one
// run. `make bench` runs it; it has no opinion and no time limit of its own.
func TestCompare(t *testing.T) {
	if os.Getenv("BANGER_BENCH") == "" {
		t.Skip("make bench runs this")
	}
	t.Run("build", compareBuild)
	t.Run("start", compareStart)
	t.Run("systemd", compareSystemd)
	t.Run("network", compareNetwork)
}

// benchRounds is how often each contender runs; BANGER_BENCH_ROUNDS changes it.
var benchRounds = func() int {
	if n, err := strconv.Atoi(os.Getenv("BANGER_BENCH_ROUNDS")); err == nil && n > 0 {
		return n
	}
	return 5
}()

// cost is what one run of a command took, children included.
type cost struct{ wall, cpu time.Duration }

func measure(t *testing.T, name string, args ...string) cost {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = benchEnv(t)
	start := time.Now()
	out, err := cmd.CombinedOutput()
	wall := time.Since(start)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return cost{wall, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
}

var benchHome string

func benchEnv(t *testing.T) []string {
	t.Helper()
	if benchHome == "" {
		dir, err := cacheDir()
		if err != nil {
			t.Fatal(err)
		}
		benchHome = dir
	}
	return append(os.Environ(), "BANGER_HOME="+benchHome)
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// contender is one way to do a thing.
type contender struct {
	name string
	run  func() cost
	all  []cost
}

// race runs the contenders in turn and prints medians, as ratios to the first.
func race(t *testing.T, title string, rounds int, contenders []*contender) {
	for range rounds {
		for _, c := range contenders {
			c.all = append(c.all, c.run())
		}
	}
	fmt.Printf("\n%s, medians of %d in turn\n", title, rounds)
	fmt.Printf("%-44s %9s %9s %7s %7s\n", "", "wall s", "CPU s", "wall", "CPU")
	var base cost
	for i, c := range contenders {
		var wall, cpu []time.Duration
		for _, x := range c.all {
			wall, cpu = append(wall, x.wall), append(cpu, x.cpu)
		}
		m := cost{median(wall), median(cpu)}
		if i == 0 {
			base = m
		}
		fmt.Printf("%-44s %9.3f %9.3f %6.2fx %6.2fx\n", c.name, m.wall.Seconds(), m.cpu.Seconds(),
			m.wall.Seconds()/base.wall.Seconds(), m.cpu.Seconds()/base.cpu.Seconds())
	}
}

// compareBuild takes images of one layer from a registry to a finished base:
// ours beside what any way must do at least, and beside the ways of others.
func compareBuild(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: owners of an unpacked tree need root")
	}
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	unpack := buildUnpack(t, cache)
	const small = "systemd-sysv,dbus,udev,openssh-server,git,perl,python3,man-db,curl"
	for _, image := range []struct{ name, packages string }{
		{"bench", small},
		// The same tar as that of the file system's own benchmark.
		{"bench-large", "systemd-sysv,dbus,udev,perl,python3,git,man-db,curl,build-essential,vim-runtime,golang-1.19-src,linux-headers-amd64,python3-sympy,node-typescript,libboost1.81-dev"},
	} {
		tarball := filepath.Join(cache, image.name+".tar")
		if _, err := os.Stat(tarball); err != nil {
			partial := filepath.Join(cache, image.name+".partial.tar")
			run(t, "mmdebstrap", "--quiet", "--mode=unshare", "--variant=minbase", "--include="+image.packages, "bookworm", partial)
			if err := os.Rename(partial, tarball); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range []compression{gz, zst} {
			t.Run(image.name+"-"+string(c), func(t *testing.T) { compareBuildOf(t, unpack, image.name, tarball, c) })
		}
	}
}

// buildUnpack builds testdata/unpack outside this module, with the inflaters
// that ours has.
func buildUnpack(t *testing.T, cache string) string {
	t.Helper()
	source, err := os.ReadFile("testdata/unpack/main.go")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(cache, fmt.Sprintf("unpack-%x", sha256.Sum256(source)))
	if _, err := os.Stat(program); err == nil {
		return program
	}
	version := strings.TrimSpace(run(t, "go", "list", "-m", "-f", "{{.Version}}", "github.com/klauspost/compress"))
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module unpack\n\ngo 1.26\n", "main.go": string(source)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{
		{"get", "github.com/Microsoft/hcsshim/ext4/tar2ext4@v0.15.0"},
		{"get", "github.com/klauspost/compress@" + version},
		{"build", "-o", program, "."},
	} {
		run(t, append([]string{"env", "-C", dir, "go"}, args...)...)
	}
	return program
}

func compareBuildOf(t *testing.T, unpack, name, tarball string, c compression) {
	data, err := os.ReadFile(tarball)
	if err != nil {
		t.Fatal(err)
	}
	img, err := imageOf(c, v1.Config{Cmd: []string{"/bin/bash"}}, data)
	if err != nil {
		t.Fatal(err)
	}
	repository := name + "-" + string(c)
	if err := world.registry.push(repository+":latest", img); err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	diffID, err := layers[0].DiffID()
	if err != nil {
		t.Fatal(err)
	}
	packed, err := layers[0].Size()
	if err != nil {
		t.Fatal(err)
	}
	url := fmt.Sprintf("http://%s/v2/%s/blobs/%s", world.registry.addr, repository, digest)
	out, tree, home := filepath.Join(t.TempDir(), "out"), filepath.Join(t.TempDir(), "tree"), t.TempDir()
	if err := os.Chmod(home, 0o700); err != nil {
		t.Fatal(err)
	}
	fresh := func(args ...string) func() cost {
		return func() cost {
			for _, dir := range []string{out, tree, filepath.Join(home, "images"), filepath.Join(home, "blobs")} {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			syscall.Sync()
			return measure(t, args[0], args[1:]...)
		}
	}
	mode := func(mode string) func() cost {
		return fresh(unpack, mode, url, digest.String(), diffID.String(), string(c), out)
	}
	sizeMiB := len(data)*5/4>>20 + 64
	decompress := map[compression]string{gz: "gzip -dc", zst: "zstd -qdc"}[c]
	fmt.Printf("\n%s: %d MiB of tar, %d MiB of %s", name, len(data)>>20, packed>>20, c)
	data, img = nil, nil
	race(t, "from the registry to a finished base", benchRounds, []*contender{
		{name: "model: pull, verify, inflate, write once", run: mode("model")},
		{name: "pull and inflate to nowhere", run: mode("nowhere")},
		{name: "banger image pull, its store empty", run: fresh("env", "BANGER_HOME="+home,
			filepath.Join(world.bin, "banger"), "image", "pull", world.registry.addr+"/"+repository+":latest")},
		{name: "pull, verify, inflate, tar2ext4", run: mode("tar2ext4")},
		{name: "pull, inflate, tar -x, mke2fs -d", run: fresh("sh", "-c", fmt.Sprintf(
			"set -e; mkdir %[1]s; curl -sf %[2]s | %[3]s | tar -C %[1]s -x --numeric-owner; mke2fs -q -t ext4 -N 200000 -d %[1]s %[4]s %[5]dM",
			tree, url, decompress, out, sizeMiB))},
	})
}

// compareStart times a warm `banger run` from its start to the first output of
// a command beside QEMU alone with the same kernel, initramfs and disks.
func compareStart(t *testing.T) {
	ref := world.registry.addr + "/busybox:gzip"
	banger := filepath.Join(world.bin, "banger")
	measure(t, banger, "run", ref, "--", "true") // warm
	bare := newBare(t, ref, nil)
	var stages [][]stage
	race(t, "start to the first output of a command", 2*benchRounds+1, []*contender{
		{name: "QEMU alone, to the first exec", run: func() cost { return bare.firstExec(t) }},
		{name: "banger run, all of it up to the exec", run: func() cost {
			s := traced(t, banger, ref)
			stages = append(stages, s)
			var end int64
			for _, x := range s {
				if x.Name == "first byte" {
					end = x.EndUs
				}
			}
			return cost{wall: time.Duration(end) * time.Microsecond, cpu: 1}
		}},
	})
	fmt.Println("\nwaterfall of a warm run, medians (ms)")
	for i, s := range stages[0] {
		var took []time.Duration
		for _, run := range stages {
			took = append(took, time.Duration(run[i].EndUs-run[i].StartUs)*time.Microsecond)
		}
		fmt.Printf("  %-12s %8.1f\n", s.Name, float64(median(took).Microseconds())/1000)
	}
}

// compareSystemd times a Debian with systemd up to its last unit, beside the
// same image trimmed.
func compareSystemd(t *testing.T) {
	tarball := os.Getenv("BANGER_TEST_DEBIAN_TAR")
	if tarball == "" {
		t.Skip("SKIPPED: no tar of Debian (make test has one)")
	}
	banger := filepath.Join(world.bin, "banger")
	up := func(name string, flags ...string) func() cost {
		args := append([]string{"image", "pull", "--name", name}, flags...)
		measure(t, banger, append(args, "rootfs:"+tarball)...)
		return func() cost {
			c := measure(t, banger, "run", "--wait", "init", name, "--", "true")
			return cost{wall: c.wall, cpu: 1} // the VMM is no child of the command's
		}
	}
	race(t, "systemd up to its last unit, and down again", benchRounds, []*contender{
		{name: "all units that Debian starts", run: up("bench-systemd")},
		{name: "trimmed", run: up("bench-systemd-trimmed", "--trim")},
	})
}

type stage struct {
	Name    string `json:"name"`
	StartUs int64  `json:"start_us"`
	EndUs   int64  `json:"end_us"`
}

func traced(t *testing.T, banger, ref string) (stages []stage) {
	t.Helper()
	cmd := exec.Command(banger, "run", "--trace", "--json", ref, "--", "echo", "up")
	cmd.Env = benchEnv(t)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	for line := range strings.Lines(stderr.String()) {
		var s stage
		if json.Unmarshal([]byte(line), &s) == nil && s.Name != "" {
			stages = append(stages, s)
		}
	}
	return stages
}

// bare is QEMU by hand: nothing of banger's host side but the bytes it boots.
type bare struct {
	Vmlinux, Modules, Base string
	Initramfs              string // with the agent and what it is told
	Token                  string
}

// newBare prepares guests of an image; with a network card if network is given.
func newBare(t *testing.T, ref string, network *wire.Network) bare {
	t.Helper()
	out, err := exec.Command("env", append(benchEnv(t)[len(os.Environ()):], filepath.Join(world.bin, "banger"), "image", "inspect", "--json", ref)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	var im struct{ Rootfs string }
	if err := json.Unmarshal(out, &im); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(benchHome)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kernel.Open(s).Get("")
	if err != nil {
		t.Fatal(err)
	}
	b := bare{Vmlinux: k.Vmlinux, Modules: k.Modules, Base: im.Rootfs,
		Initramfs: filepath.Join(t.TempDir(), "initramfs"), Token: strings.Repeat("ab", 32)}
	agent, err := os.Open(filepath.Join(world.bin, "banger-vsock-agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	st, err := agent.Stat()
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(wire.BootConfig{
		Version: wire.Version, Token: b.Token, Hostname: "bare", Network: network,
		Base: uuidOf(t, b.Base), Overlay: "00000000-0000-0000-0000-000000000001", Work: "00000000-0000-0000-0000-000000000002",
		Modules: k.ModulesUUID, LoadModules: k.LoadModules(), Init: "agent",
	})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(b.Initramfs)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.WriteInitramfs(f, agent, st.Size(), config); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return b
}

func uuidOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var u [16]byte
	if _, err := f.ReadAt(u[:], 1024+0x68); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// A bareGuest is one that runs.
type bareGuest struct {
	bare
	t   *testing.T
	mux *yamux.Session
}

// start boots a guest with new disks, and returns when its network is there.
// The guest ends with the test, or by stop.
func (b bare) start(t *testing.T, more ...string) (g *bareGuest, stop func()) {
	t.Helper()
	dir := t.TempDir()
	for i, name := range []string{"overlay", "work"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		id := [16]byte{15: byte(i + 1)}
		if err := ext4.Format(f, ext4.Params{SizeBytes: 16 << 30, UUID: id, HashSeed: id, Time: time.Unix(1, 0)}, nil); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	sock := filepath.Join(dir, "agent.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	args := []string{"-M", "microvm", "-accel", "tcg,thread=single", "-cpu", "max", "-m", "1024", "-smp", "2", "-nodefaults", "-no-user-config",
		"-display", "none", "-no-reboot", "-kernel", b.Vmlinux, "-initrd", b.Initramfs,
		"-append", fmt.Sprintf("console=ttyS0 quiet loglevel=4 reboot=t panic=-1 no_timer_check cryptomgr.notests tsc=reliable tsc_early_khz=%d", hostTSC(t)),
		"-serial", "file:" + filepath.Join(dir, "console"),
		"-chardev", "socket,id=ag,path=" + sock, "-device", "virtio-serial-device", "-device", "virtserialport,chardev=ag,name=" + wire.PortName}
	for i, d := range []string{b.Base, filepath.Join(dir, "overlay"), filepath.Join(dir, "work"), b.Modules} {
		ro := ""
		if i == 0 || i == 3 {
			ro = ",readonly=on"
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=d%d,format=raw,file=%s%s", i, d, ro), "-device", fmt.Sprintf("virtio-blk-device,drive=d%d", i))
	}
	cmd := exec.Command("qemu-system-x86_64", append(args, more...)...)
	said := &output{}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() { cmd.Process.Kill(); cmd.Wait() })
	t.Cleanup(stop)
	_ = l.(*net.UnixListener).SetDeadline(time.Now().Add(time.Minute))
	conn, err := l.Accept()
	if err != nil {
		t.Fatalf("QEMU: %v\n%s", err, said.String())
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
	var nonce [wire.NonceBytes]byte
	rand.Read(nonce[:])
	if err := wire.HandshakeHost(conn, nonce); err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Time{})
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.LogOutput = io.Discard
	g = &bareGuest{bare: b, t: t}
	if g.mux, err = yamux.Client(conn, config); err != nil {
		t.Fatal(err)
	}
	boot := g.ask(wire.Request{Op: wire.OpBoot})
	defer boot.Close()
	for {
		f, err := wire.ReadFrame(boot, nil)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(f.Payload), `"network"`) {
			return g, stop
		}
	}
}

// ask makes a request of the agent, which it must grant.
func (g *bareGuest) ask(req wire.Request) net.Conn {
	g.t.Helper()
	s, err := g.mux.Open()
	if err != nil {
		g.t.Fatal(err)
	}
	req.Version, req.Token = wire.Version, g.Token
	var reply wire.Reply
	if err := binary.Write(s, binary.BigEndian, wire.AgentPort); err != nil {
		g.t.Fatal(err)
	}
	if err := wire.WriteMessage(s, req); err != nil {
		g.t.Fatal(err)
	}
	if err := wire.ReadMessage(s, &reply); err != nil {
		g.t.Fatal(err)
	}
	if reply.Error != nil {
		g.t.Fatal(reply.Error)
	}
	return s
}

// exec starts a command and returns the stream of its frames.
func (g *bareGuest) exec(args ...string) net.Conn {
	g.t.Helper()
	return g.ask(wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Args: args, Env: []string{"PATH=/bin"}}})
}

// firstExec is what a start costs up to the first output of a command.
func (b bare) firstExec(t *testing.T) cost {
	t.Helper()
	start := time.Now()
	g, stop := b.start(t)
	defer stop()
	s := g.exec("echo", "up")
	if f, err := wire.ReadFrame(s, nil); err != nil || f.Type != wire.FrameStdout {
		t.Fatalf("exec: frame %v, %v", f.Type, err)
	}
	return cost{wall: time.Since(start), cpu: 1}
}

// hostTSC is the kHz that the kernel of this host counts with.
func hostTSC(t *testing.T) int {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var mips float64
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "bogomips" {
			fmt.Sscanf(strings.TrimSpace(v), "%f", &mips)
			return int(mips * 500)
		}
	}
	t.Fatal("/proc/cpuinfo: no bogomips")
	return 0
}
