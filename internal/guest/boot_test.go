package guest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"banger/internal/wire"
)

// The tests of this file boot real guests under QEMU's emulator. They need a
// kernel: BANGER_TEST_VMLINUZ (a bzImage or vmlinux) and
// BANGER_TEST_MODULES_DIR (its lib/modules/VERSION folder).

const (
	bootLimit = 2 * time.Minute
	testToken = "not-a-secret-but-a-token"
)

// modulesNeeded, in their order; the rest of a Debian cloud kernel that is
// needed to reach the root is built in.
var modulesNeeded = []string{
	"drivers/virtio/virtio_ring.ko", "drivers/virtio/virtio.ko", "drivers/virtio/virtio_mmio.ko",
	"drivers/block/virtio_blk.ko", "drivers/char/virtio_console.ko", "fs/overlayfs/overlay.ko",
	"net/core/failover.ko", "drivers/net/net_failover.ko", "drivers/net/virtio_net.ko",
}

// missing skips a test for want of a tool, and fails where none may be missing.
func missing(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("NOT RUN: "+format, args...)
	}
	t.Skipf("NOT RUN: "+format, args...)
}

func needTool(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"", "/usr/sbin/", "/sbin/"} {
		if p, err := exec.LookPath(dir + name); err == nil {
			return p
		}
	}
	missing(t, "no %s on this machine", name)
	return ""
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// buildAgent builds the binary as it is released.
func buildAgent(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X banger/internal/guest.Version=test",
		"-o", path, "banger/cmd/banger-vsock-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return path
}

// A cpio writes the "newc" format of Documentation/driver-api/early-userspace/buffer-format.rst.
type cpio struct {
	bytes.Buffer
	ino int
}

func (c *cpio) add(name string, mode, rmajor, rminor int, data []byte) {
	c.ino++
	fmt.Fprintf(c, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, rmajor, rminor, len(name)+1, 0)
	c.WriteString(name + "\x00")
	c.pad()
	c.Write(data)
	c.pad()
}

func (c *cpio) pad() { c.Write(make([]byte, (4-c.Len()%4)%4)) }

// A vm is one guest of a test, and its disks, which outlive it.
type vm struct {
	t       *testing.T
	dir     string
	agent   string
	kernel  string
	modules string
	config  wire.BootConfig

	qemu    *exec.Cmd
	stop    context.CancelFunc
	done    chan struct{}
	console string
	mux     *yamux.Session
	started time.Time
}

// newVM makes the disks of a guest whose root is the tree at root.
func newVM(t *testing.T, root string) *vm {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest")
	}
	v := &vm{t: t, dir: t.TempDir(), kernel: os.Getenv("BANGER_TEST_VMLINUZ"), modules: os.Getenv("BANGER_TEST_MODULES_DIR")}
	if v.kernel == "" || v.modules == "" {
		missing(t, "BANGER_TEST_VMLINUZ and BANGER_TEST_MODULES_DIR name no kernel")
	}
	needTool(t, "qemu-system-x86_64")
	mke2fs := needTool(t, "mke2fs")
	v.agent = buildAgent(t)
	v.config = wire.BootConfig{Version: wire.Version, Token: testToken, Hostname: "testvm", Init: "auto"}
	workSeed := filepath.Join(v.dir, "seed")
	os.MkdirAll(workSeed, 0o700)
	os.WriteFile(filepath.Join(workSeed, "seeded"), []byte("work\n"), 0o600)
	kept := filepath.Join(v.dir, "modules")
	os.MkdirAll(filepath.Join(kept, "kernel"), 0o755)
	os.WriteFile(filepath.Join(kept, "modules.dep"), []byte("x\n"), 0o644)
	for _, d := range []struct {
		name, tree, size string
		uuid             *string
	}{
		{"base", root, "900M", &v.config.Base}, {"overlay", "", "256M", &v.config.Overlay},
		{"work", workSeed, "64M", &v.config.Work}, {"drive", kept, "16M", &v.config.Modules},
	} {
		var u [16]byte
		rand.Read(u[:])
		*d.uuid = fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
		args := []string{"-q", "-F", "-t", "ext4", "-U", *d.uuid}
		if d.tree != "" {
			args = append(args, "-d", d.tree)
		}
		run(t, mke2fs, append(args, v.disk(d.name), d.size)...)
	}
	return v
}

func (v *vm) disk(name string) string { return filepath.Join(v.dir, name+".ext4") }

func (v *vm) initramfs() string {
	var c cpio
	for _, d := range []string{"dev", "banger", "modules"} {
		c.add(d, 0o40755, 0, 0, nil)
	}
	c.add("dev/console", 0o20600, 5, 1, nil)
	c.add("dev/null", 0o20666, 1, 3, nil)
	agent, err := os.ReadFile(v.agent)
	if err != nil {
		v.t.Fatal(err)
	}
	c.add("init", 0o100755, 0, 0, agent)
	config := v.config
	for _, m := range modulesNeeded {
		data, err := os.ReadFile(filepath.Join(v.modules, "kernel", m))
		if err != nil {
			v.t.Fatal(err)
		}
		name := "modules/" + filepath.Base(m)
		c.add(name, 0o100644, 0, 0, data)
		config.LoadModules = append(config.LoadModules, "/"+name)
	}
	data, _ := json.Marshal(config)
	c.add(strings.TrimPrefix(wire.BootConfigPath, "/"), 0o100600, 0, 0, data)
	c.add("TRAILER!!!", 0, 0, 0, nil)
	path := filepath.Join(v.dir, "initramfs")
	if err := os.WriteFile(path, c.Bytes(), 0o600); err != nil {
		v.t.Fatal(err)
	}
	return path
}

// tscKHz is near enough for a guest that lives for seconds: without it the
// emulator's clock calibration hangs now and then.
func tscKHz() int {
	data, _ := os.ReadFile("/proc/cpuinfo")
	if m := regexp.MustCompile(`cpu MHz\s*: ([0-9.]+)`).FindSubmatch(data); m != nil {
		var mhz float64
		fmt.Sscan(string(m[1]), &mhz)
		return int(math.Round(mhz * 1000))
	}
	return 2000000
}

// start boots the guest and connects.
func (v *vm) start() {
	v.t.Helper()
	if runtime.GOARCH != "amd64" {
		missing(v.t, "these tests boot an amd64 guest")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	v.stop = cancel
	v.console = filepath.Join(v.dir, "console")
	os.Remove(v.console)
	sock := filepath.Join(v.dir, "a.sock")
	os.Remove(sock)
	args := []string{
		"-M", "microvm", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "512",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "file:" + v.console,
		"-kernel", v.kernel, "-initrd", v.initramfs(), "-append",
		fmt.Sprintf("console=ttyS0 reboot=t panic=-1 quiet loglevel=4 tsc=reliable tsc_early_khz=%d no_timer_check cryptomgr.notests", tscKHz()),
		"-chardev", "socket,id=ag,path=" + sock + ",server=on,wait=off",
		"-device", "virtio-serial-device", "-device", "virtserialport,chardev=ag,name=" + wire.PortName,
	}
	if n := v.config.Network; n != nil {
		// A card with nothing at its other end.
		args = append(args, "-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-device,netdev=net,mac="+n.MAC)
	}
	// Not in the order of the configuration: the UUIDs decide.
	for _, name := range []string{"work", "drive", "base", "overlay"} {
		ro := "off"
		if name == "base" || name == "drive" {
			ro = "on"
		}
		args = append(args, "-drive", fmt.Sprintf("id=%s,file=%s,format=raw,if=none,read-only=%s", name, v.disk(name), ro),
			"-device", "virtio-blk-device,drive="+name)
	}
	v.started = time.Now()
	v.qemu = exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	log, err := os.Create(filepath.Join(v.dir, "qemu.log"))
	if err != nil {
		v.t.Fatal(err)
	}
	v.qemu.Stdout, v.qemu.Stderr = log, log
	if err := v.qemu.Start(); err != nil {
		v.t.Fatal(err)
	}
	v.done = make(chan struct{})
	go func() { v.qemu.Wait(); log.Close(); close(v.done) }()
	v.t.Cleanup(func() {
		cancel()
		<-v.done
		if v.t.Failed() {
			data, _ := os.ReadFile(v.console)
			qlog, _ := os.ReadFile(log.Name())
			v.t.Logf("console:\n%s\n%s", data, qlog)
		}
	})
	v.connect(sock)
}

func (v *vm) connect(sock string) {
	v.t.Helper()
	var conn net.Conn
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if conn, err = net.Dial("unix", sock); err == nil {
			break
		}
	}
	if err != nil {
		v.t.Fatal(err)
	}
	var nonce [wire.NonceBytes]byte
	rand.Read(nonce[:])
	conn.SetDeadline(time.Now().Add(bootLimit))
	if err := wire.HandshakeHost(conn, nonce); err != nil {
		v.t.Fatalf("handshake: %v", err)
	}
	conn.SetDeadline(time.Time{})
	if v.mux, err = yamux.Client(conn, muxConfig()); err != nil {
		v.t.Fatal(err)
	}
}

// reconnect is a new host on the same guest: its sessions are hung up on.
func (v *vm) reconnect() {
	v.t.Helper()
	conn, r := v.ask(wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Args: []string{"sleep", "1234"}}})
	if r.Error != nil {
		v.t.Fatal(r.Error)
	}
	conn.SetDeadline(time.Time{})
	v.mux.Close()
	v.connect(filepath.Join(v.dir, "a.sock"))
	v.sh("for i in 1 2 3 4 5 6 7 8 9 10; do pidof sleep || exit 0; usleep 200000; done; exit 1")
}

// ask opens a stream with a request and returns it with the reply.
func (v *vm) ask(req wire.Request) (net.Conn, wire.Reply) {
	v.t.Helper()
	conn, err := v.mux.Open()
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(bootLimit))
	var number [4]byte
	binary.BigEndian.PutUint32(number[:], wire.AgentPort)
	conn.Write(number[:])
	req.Version, req.Token = wire.Version, cmpOr(req.Token, testToken)
	if err := wire.WriteMessage(conn, req); err != nil {
		v.t.Fatal(err)
	}
	var r wire.Reply
	if err := wire.ReadMessage(conn, &r); err != nil {
		v.t.Fatalf("%s: %v", req.Op, err)
	}
	return conn, r
}

// awaitStage returns the event of a stage, and all that came before it.
func (v *vm) awaitStage(stage string) []wire.BootEvent {
	v.t.Helper()
	conn, r := v.ask(wire.Request{Op: wire.OpBoot})
	if r.Error != nil {
		v.t.Fatal(r.Error)
	}
	var events []wire.BootEvent
	for {
		f, err := wire.ReadFrame(conn, make([]byte, wire.MaxFrameBytes))
		if err != nil || f.Type != wire.FrameEvent {
			v.t.Fatalf("boot: frame %d, %v after %v", f.Type, err, events)
		}
		var ev wire.BootEvent
		if err := json.Unmarshal(f.Payload, &ev); err != nil {
			v.t.Fatal(err)
		}
		events = append(events, ev)
		if ev.Stage == stage {
			v.t.Logf("%s after %v: %v", stage, time.Since(v.started).Round(time.Millisecond), events)
			return events
		}
		if ev.Stage == wire.StageFailed {
			v.t.Fatalf("boot failed: %v", events)
		}
	}
}

// exec runs a command to its end and returns what it wrote and its exit.
func (v *vm) exec(e wire.Exec) (string, wire.Exit) {
	v.t.Helper()
	conn, r := v.ask(wire.Request{Op: wire.OpExec, Exec: &e})
	if r.Error != nil {
		return r.Error.Message, wire.Exit{Code: -1}
	}
	var out strings.Builder
	for {
		f, err := wire.ReadFrame(conn, make([]byte, wire.MaxFrameBytes))
		if err != nil {
			v.t.Fatalf("exec %q: %v", e.Args, err)
		}
		if f.Type == wire.FrameExit {
			var x wire.Exit
			json.Unmarshal(f.Payload, &x)
			return out.String(), x
		}
		out.Write(f.Payload)
	}
}

func (v *vm) sh(script string) string {
	v.t.Helper()
	out, x := v.exec(wire.Exec{Args: []string{"/bin/sh", "-c", script}})
	if x.Code != 0 {
		v.t.Errorf("%s: exit %v: %s", script, x, out)
	}
	return out
}

// shutdown asks for the end and checks that the disks were given back clean.
func (v *vm) shutdown(grace time.Duration) {
	v.t.Helper()
	if _, r := v.ask(wire.Request{Op: wire.OpShutdown, Shutdown: &wire.Shutdown{GraceMs: grace.Milliseconds()}}); r.Error != nil {
		v.t.Fatal(r.Error)
	}
	v.awaitOff()
}

func (v *vm) awaitOff() {
	v.t.Helper()
	begin := time.Now()
	select {
	case <-v.done:
	case <-time.After(bootLimit):
		v.t.Fatal("the guest did not power off")
	}
	v.t.Logf("off after %v", time.Since(begin).Round(time.Millisecond))
	v.checkClean()
}

func (v *vm) checkClean() {
	v.t.Helper()
	for _, d := range []string{"overlay", "work"} {
		if bad := unclean(v.t, v.disk(d)); bad != "" {
			v.t.Errorf("%s disk: %s", d, bad)
		}
	}
}

// unclean says what is wrong with a file system.
func unclean(t *testing.T, path string) string {
	if out, err := exec.Command(needTool(t, "e2fsck"), "-fn", path).CombinedOutput(); err != nil {
		return fmt.Sprintf("e2fsck: %v\n%s", err, out)
	}
	if strings.Contains(run(t, needTool(t, "dumpe2fs"), "-h", path), "needs_recovery") {
		return "needs_recovery"
	}
	return ""
}

func (v *vm) baseSum() string {
	f, err := os.Open(v.disk("base"))
	if err != nil {
		v.t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil))
}

// busyboxRoot is a small root with a shell.
func busyboxRoot(t *testing.T) string {
	t.Helper()
	busybox := needTool(t, "busybox")
	root := t.TempDir()
	for _, d := range []string{"bin", "sbin", "etc", "usr/lib", "home/ann", "root", "tmp"} {
		os.MkdirAll(filepath.Join(root, d), 0o755)
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(root, "bin/busybox"), data, 0o755)
	for _, name := range strings.Fields(run(t, busybox, "--list")) {
		os.Symlink("/bin/busybox", filepath.Join(root, "bin", name))
	}
	os.Symlink("/bin/busybox", filepath.Join(root, "sbin/init"))
	os.Symlink("usr/lib", filepath.Join(root, "lib"))
	os.Chmod(filepath.Join(root, "tmp"), os.ModeSticky|0o777)
	os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n"), 0o644)
	os.WriteFile(filepath.Join(root, "etc/group"), []byte("root:x:0:\nann:x:1000:\naudio:x:29:ann\n"), 0o644)
	os.WriteFile(filepath.Join(root, "etc/fstab"), []byte("UUID=0000-dead / ext4 defaults 0 1\ntmpfs /tmp tmpfs defaults 0 0\n"), 0o644)
	return root
}

// TestBootReaper boots a root with a shell and no init to ask for.
func TestBootReaper(t *testing.T) {
	v := newVM(t, busyboxRoot(t))
	v.config.Network = testNetwork()
	before := v.baseSum()
	v.start()
	v.awaitStage(stageInit)

	if _, r := v.ask(wire.Request{Op: wire.OpExec, Token: "wrong", Exec: &wire.Exec{}}); r.Error == nil || r.Error.Code != wire.ErrDenied {
		t.Errorf("a wrong token: %v", r.Error)
	}
	_, r := v.ask(wire.Request{Op: wire.OpHello})
	if r.Hello == nil || !r.Hello.Booted || r.Hello.AgentVersion != "test" {
		t.Errorf("hello: %+v", r.Hello)
	}
	for _, c := range []struct{ script, want string }{
		{"cat /proc/1/comm", "exe\n"},
		{"hostname; cat /etc/hostname", "testvm\ntestvm\n"},
		{"cat /root/seeded", "work\n"},
		{"cat /lib/modules/$(uname -r)/modules.dep", "x\n"},
		{"readlink /lib; stat -c %a /tmp", "usr/lib\n1777\n"},
		{"grep -c banger: /etc/fstab", "1\n"},
		{"awk '{print $2}' /proc/mounts | grep -c banger", ""},
		{"grep ' / ' /proc/mounts | cut -d' ' -f1-3", "overlay / overlay\n"},
		{"cat /proc/cmdline | grep -c testvm", ""},
		{"ip addr show lo | grep -c 127.0.0.1", "1\n"},
		{"ip addr show eth0 | grep -o -e 'mtu [0-9]*' -e 'inet6* [0-9a-f.:/]*' | grep -v fe80", "mtu 65520\ninet 10.87.0.30/30\ninet6 fd62:616e:6765:7::2/64\n"},
		{"ip route | grep default", "default via 10.87.0.29 dev eth0 \n"},
		{"cat /etc/resolv.conf", "search banger corp.example\nnameserver 10.87.0.29\nnameserver fd62:616e:6765:7::1\n"},
		{"grep testvm /etc/hosts", "10.87.0.30\ttestvm.banger testvm # banger\n"},
		{"cat /proc/self/oom_score_adj; umask", "0\n0022\n"},
		{"ls /proc/self/fd | wc -l", "4\n"}, // 0, 1, 2 and ls's own
		{"echo data > /root/kept; ln /etc/passwd /etc/passwd2; stat -c %h /etc/passwd", "2\n"},
	} {
		out, _ := v.exec(wire.Exec{Args: []string{"sh", "-c", c.script}})
		if want := c.want; want == "" && out != "0\n" || want != "" && out != want {
			t.Errorf("%s: %q, want %q", c.script, out, want)
		}
	}
	if out, _ := v.exec(wire.Exec{Args: []string{"env"}}); out != "PATH="+defaultPath+"\nHOME=/root\nUSER=root\n" {
		t.Errorf("environment: %q", out)
	}
	// A user of the guest learns nothing of the agent's.
	out, x := v.exec(wire.Exec{User: "ann", Args: []string{"sh", "-c",
		`id; cd; pwd; a=$(pidof @banger-vsock-agent || ps -o pid,args | awk '/@banger/ && !/awk/ {print $1}'); cat /proc/$a/environ /proc/$a/fd/3 2>&1; kill -9 $a 2>&1; ls /run/banger 2>&1; grep -c ` + testToken + ` /proc/$a/cmdline`}})
	if !strings.Contains(out, "uid=1000(ann) gid=1000(ann) groups=29(audio)") || !strings.Contains(out, "/home/ann\n") ||
		strings.Count(out, "denied")+strings.Count(out, "not permitted") < 3 || strings.Contains(out, testToken) {
		t.Errorf("as ann: %v %s", x, out)
	}
	// Orphans are reaped: PID 1 has no zombie left.
	v.sh("for i in 1 2 3 4 5; do (sleep 0.1 &) ; done; sleep 0.5; ! grep -l 'State:.*Z' /proc/[0-9]*/status")
	// A command may take its time to end, and write meanwhile.
	if _, r := v.ask(wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Args: []string{"sh", "-c",
		"trap 'sleep 1; echo late > /root/late; exit' TERM; while :; do sleep 0.1; done"}}}); r.Error != nil {
		t.Fatal(r.Error)
	}
	v.sh("sleep 0.5")
	v.shutdown(20 * time.Second)
	if v.baseSum() != before {
		t.Error("the base image was written to")
	}

	// The same disks again: what was written is there, and the image's own
	// poweroff ends as clean as ours.
	v.start()
	v.awaitStage(stageInit)
	if out := v.sh("cat /root/kept /root/late; ls /etc/passwd2"); out != "data\nlate\n/etc/passwd2\n" {
		t.Errorf("after a restart: %q", out)
	}
	if out := v.sh("/run/initramfs/shutdown; echo $?"); out != "0\n" {
		t.Errorf("the unit in banger's own boot: %q", out)
	}
	v.reconnect()
	v.exec(wire.Exec{Args: []string{"sh", "-c", "(sleep 0.3; poweroff) >/dev/null 2>&1 </dev/null &"}})
	v.awaitOff()
	v.start()
	v.awaitStage(stageInit)
	v.exec(wire.Exec{Args: []string{"sh", "-c", "(sleep 0.3; reboot) >/dev/null 2>&1 </dev/null &"}})
	v.awaitOff()
}

// TestUncleanIsSeen cuts the power: the check that the other tests rely on
// must complain.
func TestUncleanIsSeen(t *testing.T) {
	v := newVM(t, busyboxRoot(t))
	v.start()
	v.awaitStage(stageInit)
	v.sh("echo x > /root/x; sync")
	v.stop()
	<-v.done
	if unclean(t, v.disk("work")) == "" {
		t.Error("a work disk whose power was cut counts as clean")
	}
}

// TestBootBusyboxInit runs busybox's own init, which the image's command names.
func TestBootBusyboxInit(t *testing.T) {
	v := newVM(t, busyboxRoot(t))
	v.config.Cmd = []string{"/sbin/init"}
	v.start()
	events := v.awaitStage(stageInit)
	if got := events[len(events)-1].Detail; got != string(kindBusybox) {
		t.Errorf("init: %q", got)
	}
	if out := v.sh("cat /proc/1/comm"); out != "init\n" {
		t.Errorf("PID 1 is %q", out)
	}
	v.sh("echo x > /root/x; echo y > /y")
	v.shutdown(20 * time.Second)
}

// TestBootScratch boots an image that is one file.
func TestBootScratch(t *testing.T) {
	root := t.TempDir()
	data, err := os.ReadFile(buildAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(root, "prog"), data, 0o755)
	v := newVM(t, root)
	v.config.Entrypoint = []string{"/prog"}
	v.start()
	v.awaitStage(stageInit)
	if out, x := v.exec(wire.Exec{Args: []string{"/prog", "--version"}}); x.Code != 0 || out != program+" test\n" {
		t.Errorf("%v %q", x, out)
	}
	if out, x := v.exec(wire.Exec{}); x.Code != -1 || !strings.Contains(out, "the image has none") {
		t.Errorf("a shell in scratch: %v %q", x, out)
	}
	v.shutdown(2 * time.Second)
}

// TestBootFails boots without one disk: the host must learn which.
func TestBootFails(t *testing.T) {
	v := newVM(t, busyboxRoot(t))
	v.config.Init = "image"
	os.Remove(filepath.Join(v.dir, "unused"))
	v.config.Cmd = nil
	v.config.Hostname = "not a name"
	v.start()
	conn, r := v.ask(wire.Request{Op: wire.OpBoot})
	if r.Error != nil {
		t.Fatal(r.Error)
	}
	for {
		f, err := wire.ReadFrame(conn, nil)
		if err != nil {
			t.Fatal(err)
		}
		var ev wire.BootEvent
		json.Unmarshal(f.Payload, &ev)
		if ev.Stage == wire.StageFailed {
			if ev.Detail != `hostname "not a name": not a host name` {
				t.Errorf("the reason: %q", ev.Detail)
			}
			break
		}
	}
	v.shutdown(time.Second)
	data, _ := os.ReadFile(v.console)
	if !strings.Contains(string(data), wire.ReadyLine) || !strings.Contains(string(data), program+`: hostname "not a name"`) {
		t.Errorf("console: %s", data)
	}
}

// debianVM is a guest with systemd: BANGER_TEST_DEBIAN_TAR is a root made by
// "mmdebstrap --variant=minbase --include=systemd-sysv,dbus,udev".
func debianVM(t *testing.T) *vm {
	t.Helper()
	tar := os.Getenv("BANGER_TEST_DEBIAN_TAR")
	if tar == "" {
		missing(t, "BANGER_TEST_DEBIAN_TAR names no root")
	}
	if os.Geteuid() != 0 {
		missing(t, "unpacking a root with its owners needs root")
	}
	root := t.TempDir()
	run(t, "tar", "-xpf", tar, "-C", root, "--exclude=./dev/*")
	os.WriteFile(filepath.Join(root, "etc/machine-id"), []byte("00112233445566778899aabbccddeeff\n"), 0o444)
	os.WriteFile(filepath.Join(root, "etc/fstab"), []byte("UUID=5f3c0f9e-0000-4000-8000-000000000000 /data ext4 defaults 0 2\n"), 0o644)
	v := newVM(t, root)
	v.config.Cmd = []string{"bash"}
	return v
}

// TestBootSystemd boots Debian twice on the same disks.
func TestBootSystemd(t *testing.T) {
	v := debianVM(t)
	v.config.Network = testNetwork()
	v.start()
	v.awaitStage(stageInit)
	if out := v.sh("hostname -I; getent hosts testvm; cat /etc/resolv.conf"); out != "10.87.0.30 fd62:616e:6765:7::2 \n"+
		"10.87.0.30      testvm.banger testvm\nsearch banger corp.example\nnameserver 10.87.0.29\nnameserver fd62:616e:6765:7::1\n" {
		t.Errorf("the network: %q", out)
	}
	if out := v.sh("cat /proc/1/comm; systemctl is-system-running; systemctl list-units --failed --no-legend; systemd-detect-virt --container || true"); !strings.HasPrefix(out, "systemd\nrunning\n") {
		t.Errorf("init: %q", out)
	}
	id := v.sh("cat /etc/machine-id")
	if len(id) != 33 || strings.HasPrefix(id, "00112233") {
		t.Errorf("machine-id: %q", id)
	}
	// An engine's own overlay works in its folder, and does not beside it.
	v.sh("cd /var/lib/docker && mkdir l u w m && mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m && umount m && echo kept > kept")
	v.sh("cd /var/tmp && mkdir l u w m && ! mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m 2>/dev/null")
	// The unit of the base stands down: the agent of the boot lives.
	v.sh("/run/initramfs/shutdown; test $? = 0")
	// A signal meant for everybody does not end the agent.
	v.sh("for p in /proc/[0-9]*; do grep -qs ^@banger $p/cmdline && kill -TERM ${p#/proc/}; done; sleep 0.5")
	v.sh("hostnamectl --static | grep -q testvm; echo x > /root/x; echo y > /y")
	v.shutdown(30 * time.Second)

	// Again: the identity stays; the image's own poweroff ends clean too.
	v.start()
	v.awaitStage(stageInit)
	if out := v.sh("cat /etc/machine-id /y /var/lib/docker/kept"); out != id+"y\nkept\n" {
		t.Errorf("after a restart: %q", out)
	}
	v.exec(wire.Exec{Args: []string{"systemctl", "poweroff"}})
	v.awaitOff()
}

// TestBootSystemdCut shuts down in the middle of the start, which systemd may
// not hear at first, and then without any grace.
func TestBootSystemdCut(t *testing.T) {
	v := debianVM(t)
	v.start()
	v.awaitStage(stageNetwork)
	v.shutdown(30 * time.Second)
	v.start()
	v.awaitStage(stageNetwork)
	v.shutdown(0)
}
