package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest/guestops"
	"banger/internal/wire"
)

// helperVar makes the test binary start a machine from its description and
// wait to be killed.
const helperVar = "BANGER_TEST_START_MACHINE"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == confineArg {
		fmt.Fprintln(os.Stderr, Confined(os.Args[2:]))
		os.Exit(1)
	}
	if text := os.Getenv(helperVar); text != "" {
		var machine vmm.Machine
		err := json.Unmarshal([]byte(text), &machine)
		if err == nil {
			var p vmm.Process
			if p, err = confined().Start(context.Background(), machine); err == nil {
				fmt.Println(p.PID())
				time.Sleep(time.Minute)
			}
		}
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// confineArg makes the test binary the launcher.
const confineArg = "confine"

// confined is the driver as banger uses it.
func confined() *Driver {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return New(self, confineArg)
}

// tcgMachine is a test machine that asks for TCG, and so never for a probe.
func tcgMachine(tb testing.TB) vmm.Machine {
	m := testMachine(tb)
	m.Accel = banger.AccelTCG
	return m
}

func startProcess(t *testing.T, d *Driver, m vmm.Machine) *process {
	t.Helper()
	p, err := d.Start(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(); <-p.Done() })
	return p.(*process)
}

// TestDiesWithCaller kills the calling process, which cannot do anything about
// it, and requires that QEMU goes too.
func TestDiesWithCaller(t *testing.T) {
	text, err := json.Marshal(tcgMachine(t))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperVar+"="+string(text))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	pid, perr := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || perr != nil {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("helper said %q: %v", line, err)
	}
	if err := syscall.Kill(pid, 0); err != nil {
		t.Errorf("before: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	// An orphan is reaped by whoever adopts it, maybe late: a zombie is dead.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			break
		}
		if time.Now().After(end) {
			syscall.Kill(pid, syscall.SIGKILL)
			t.Fatalf("qemu outlives its caller: %s", stat)
		}
	}
}

// TestOutlivesThread starts from a thread that ends at once, which the
// parent-death signal must not notice.
func TestOutlivesThread(t *testing.T) {
	m := tcgMachine(t)
	started := make(chan vmm.Process)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		p, err := confined().Start(context.Background(), m)
		if err != nil {
			t.Error(err)
		}
		started <- p
	}()
	p := <-started
	if p == nil {
		return
	}
	defer func() { p.Kill(); <-p.Done() }()
	select {
	case <-p.Done():
		t.Errorf("ended with the thread: %+v", p.Exit())
	case <-time.After(300 * time.Millisecond):
	}
}

// TestConfinement looks at the process as the kernel sees it.
func TestConfinement(t *testing.T) {
	// A descriptor that is not close-on-exec, as one inherited would be.
	// Its number is above those that QEMU's own descriptors take.
	file, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stray, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD, 200)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stray)
	m := tcgMachine(t)
	folder := t.TempDir()
	ro, rw := filepath.Join(folder, "ro"), filepath.Join(folder, "rw")
	for _, path := range []string{ro, rw} {
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.Drives = []vmm.Drive{{Path: ro, ReadOnly: true}, {Path: rw}}
	p := startProcess(t, confined(), m)
	proc := fmt.Sprintf("/proc/%d/", p.PID())

	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	if p.Info().Sandbox && !strings.Contains(string(status), "\nSeccomp:\t2\n") {
		t.Error("the system call filter is not on")
	}
	if p.Info().Version == "" || p.Info().Program == "" {
		t.Errorf("info: %+v", p.Info())
	}
	if group, err := syscall.Getpgid(p.PID()); err != nil || group != p.PID() {
		t.Errorf("process group %d, %v", group, err)
	}
	limits, err := os.ReadFile(proc + "limits")
	if err != nil || !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0") {
		t.Errorf("core files: %s %v", limits, err)
	}
	if env, err := os.ReadFile(proc + "environ"); err != nil || string(env) != "LC_ALL=C\x00PATH="+os.Getenv("PATH")+"\x00" {
		t.Errorf("environment %q, %v", env, err)
	}
	if cwd, err := os.Readlink(proc + "cwd"); err != nil || cwd != "/" {
		t.Errorf("folder %q, %v", cwd, err)
	}

	entries, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	modes := make(map[string][]string)
	for _, e := range entries {
		target, err := os.Readlink(proc + "fd/" + e.Name())
		if err != nil {
			continue // closed meanwhile
		}
		kind, _, _ := strings.Cut(target, ":")
		switch {
		case kind == "socket" || kind == "pipe" || kind == "anon_inode", target == "/dev/null",
			target == m.Boot.Kernel, target == m.Boot.Initrd, target == ro, target == rw:
		default:
			t.Errorf("descriptor %s is %q, which is not of this machine", e.Name(), target)
		}
		info, err := os.ReadFile(proc + "fdinfo/" + e.Name())
		if err == nil {
			for line := range strings.Lines(string(info)) {
				if flags, ok := strings.CutPrefix(line, "flags:\t"); ok {
					modes[target] = append(modes[target], flags[len(flags)-2:len(flags)-1])
				}
			}
		}
	}
	if got := strings.Join(modes[ro], ""); got == "" || strings.Trim(got, "0") != "" {
		t.Errorf("access modes of the read-only drive: %q, want only 0", got)
	}
	if got := strings.Join(modes[rw], ""); !strings.Contains(got, "2") {
		t.Errorf("access modes of the other drive: %q", got)
	}
}

// TestForeignEnd ends QEMU behind the driver's back: that is a crash, and what
// QEMU printed says why.
func TestForeignEnd(t *testing.T) {
	for _, row := range []struct {
		signal syscall.Signal
		code   int
		output string
	}{
		{syscall.SIGKILL, -1, ""},
		{syscall.SIGSEGV, -1, ""},
		{syscall.SIGTERM, 0, "terminating on signal 15"},
	} {
		d := confined()
		if row.signal == syscall.SIGSEGV {
			// The first process of a name space takes no such signal from
			// outside, only a fault of its own.
			d = New()
		}
		p := startProcess(t, d, tcgMachine(t))
		if err := syscall.Kill(p.PID(), row.signal); err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.Done():
		case <-time.After(10 * time.Second):
			t.Fatalf("%v: not done", row.signal)
		}
		if e := p.Exit(); e.Cause != vmm.CauseCrashed || e.Code != row.code || !strings.Contains(e.Output, row.output) {
			t.Errorf("%v: %+v", row.signal, e)
		}
	}
}

// TestBrokenMonitor gives up a QEMU whose monitor cannot be understood.
func TestBrokenMonitor(t *testing.T) {
	p := startProcess(t, confined(), tcgMachine(t))
	p.abort("the test says so")
	<-p.Done()
	if e := p.Exit(); e.Cause != vmm.CauseCrashed || !strings.Contains(e.Output, "the test says so") {
		t.Errorf("%+v", e)
	}
}

func TestBadKernel(t *testing.T) {
	m := tcgMachine(t)
	m.Boot.Kernel = filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(m.Boot.Kernel, []byte("\x7fELF, but not really"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := confined().Start(t.Context(), m)
	if err == nil {
		p.Kill()
		<-p.Done()
		t.Fatal("started")
	}
	if !strings.HasPrefix(err.Error(), "qemu: exited with code 1: \"") {
		t.Errorf("error: %v", err)
	}
}

// fakeProgram puts a shell script in the place of QEMU.
func fakeProgram(t *testing.T, script string) *Driver {
	t.Helper()
	path := filepath.Join(t.TempDir(), program)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	d := New()
	d.program = path
	return d
}

// TestBadProgram starts what is not, or not wholly, QEMU.
func TestBadProgram(t *testing.T) {
	m := tcgMachine(t)
	for _, row := range []struct {
		name, script, want string
		code               banger.Code
	}{
		{"bad option", "echo first; echo 'qemu: no such option' >&2; exit 3", `qemu: exited with code 3: "qemu: no such option"`, banger.CodeUnavailable},
		{"silent", "exit 0", "qemu: exited with code 0 and printed nothing", banger.CodeUnavailable},
		{"signal", "kill -9 $$", "qemu: ended by signal: killed and printed nothing", banger.CodeUnavailable},
		{"escapes", `printf 'a\033[31mb\n'; exit 1`, `qemu: exited with code 1: "a\x1b[31mb"`, banger.CodeUnavailable},
		{"no memory", "echo cannot set up guest memory: Cannot allocate memory; exit 1", "Cannot allocate memory", banger.CodeUnavailable},
		{"locked", "echo 'Failed to get \"write\" lock'; exit 1", "lock", banger.CodeConflict},
		{"no lock", "echo 'qemu: -blockdev {\"a\":1}: no such driver'; exit 1", `code 1: "no such driver"`, banger.CodeUnavailable},
		{"much", "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo end; exit 1", `"end"`, banger.CodeUnavailable},
		{"no seccomp", `case "$*" in *-sandbox*) echo "-sandbox: not in this build"; exit 1;; esac; echo second try; exit 1`, "second try", banger.CodeUnavailable},
	} {
		t.Run(row.name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			d := fakeProgram(t, row.script)
			_, err := d.Start(t.Context(), m)
			var b *banger.Error
			if !errors.As(err, &b) || b.Code != row.code || !strings.Contains(b.Message, row.want) {
				t.Errorf("error: %v, want %s %q", err, row.code, row.want)
			}
			if d.noSandbox.Load() != (row.name == "no seccomp") {
				t.Errorf("without a sandbox: %v", d.noSandbox.Load())
			}
			// The one that closed Done may still be on its way out.
			for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
				}
			}
		})
	}

	t.Run("stuck", func(t *testing.T) {
		d := fakeProgram(t, "echo waiting; exec sleep 60")
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := d.Start(ctx, m)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting") {
			t.Errorf("error: %v", err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("took %v", took)
		}
	})
	t.Run("missing", func(t *testing.T) {
		d := New()
		d.program = "qemu-system-not-here"
		_, err := d.Start(t.Context(), m)
		var b *banger.Error
		if !errors.As(err, &b) || b.Code != banger.CodeUnavailable || !strings.Contains(b.Hint, "qemu-system-x86") {
			t.Errorf("error: %v", err)
		}
	})
	t.Run("not a program", func(t *testing.T) {
		d := New()
		d.program = filepath.Join(t.TempDir(), program)
		if err := os.WriteFile(d.program, []byte("\x00\x01"), 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Start(t.Context(), m); err == nil {
			t.Error("started")
		}
		if _, err := d.Probe(t.Context(), banger.AccelTCG); err == nil {
			t.Error("probed")
		}
	})
	t.Run("not qemu", func(t *testing.T) {
		_, err := fakeProgram(t, "echo GNU bash").Probe(t.Context(), banger.AccelTCG)
		if err == nil || !strings.Contains(err.Error(), "GNU bash") {
			t.Errorf("error: %v", err)
		}
	})
}

// TestAccel has every answer of the probe meet every wish.
func TestAccel(t *testing.T) {
	_, err := exec.LookPath(program)
	need(t, err == nil, program)
	yes := kvmResult{works: true, reason: "it runs"}
	no := kvmResult{reason: "it is slow", hint: "join the kvm group"}
	for _, row := range []struct {
		probe kvmResult
		ask   banger.Accel
		want  banger.Accel // "" for CodeUnavailable
	}{
		{yes, banger.AccelAuto, banger.AccelKVM}, {yes, "", banger.AccelKVM}, {yes, banger.AccelKVM, banger.AccelKVM}, {yes, banger.AccelTCG, banger.AccelTCG},
		{no, banger.AccelAuto, banger.AccelTCG}, {no, "", banger.AccelTCG}, {no, banger.AccelKVM, ""}, {no, banger.AccelTCG, banger.AccelTCG},
	} {
		d := New()
		d.probe = func() kvmResult { return row.probe }
		info, err := d.Probe(t.Context(), row.ask)
		if row.want == "" {
			var b *banger.Error
			if !errors.As(err, &b) || b.Code != banger.CodeUnavailable || !strings.Contains(b.Message, no.reason) ||
				!strings.Contains(b.Hint, "--accel tcg") || !strings.Contains(b.Hint, no.hint) {
				t.Errorf("%q with %+v: %v", row.ask, row.probe, err)
			}
			continue
		}
		if err != nil || info.Accel != row.want || info.Reason == "" || info.Version == "" {
			t.Errorf("%q with %+v: %+v, %v", row.ask, row.probe, info, err)
		}
	}
}

// TestRefusalsNameNumbers requires both numbers in what is out of bounds by one.
func TestRefusalsNameNumbers(t *testing.T) {
	total, err := hostMemoryBytes()
	if err != nil {
		t.Fatal(err)
	}
	total -= total % (1 << 20)
	for _, row := range []struct {
		change func(*vmm.Machine)
		want   []string // nil for none
	}{
		{func(m *vmm.Machine) { m.CPUs = maxCPUs }, nil},
		{func(m *vmm.Machine) { m.CPUs = maxCPUs + 1 }, []string{"289", "288"}},
		{func(m *vmm.Machine) { m.MemoryBytes = minMemoryBytes }, nil},
		{func(m *vmm.Machine) { m.MemoryBytes = minMemoryBytes - 1<<20 }, []string{"66060288", "67108864"}},
		{func(m *vmm.Machine) { m.MemoryBytes = total }, nil},
		{func(m *vmm.Machine) { m.MemoryBytes = total + 1<<20 }, []string{fmt.Sprint(total>>20 + 1), fmt.Sprint(total >> 20)}},
		{func(m *vmm.Machine) { m.Drives = make([]vmm.Drive, maxDrives) }, nil},
		{func(m *vmm.Machine) { m.Drives = make([]vmm.Drive, maxDrives+1) }, []string{"17", "16"}},
		{func(m *vmm.Machine) { m.ID = "0123456789AB" }, []string{"0123456789AB"}},
		{func(m *vmm.Machine) { m.ID = "0123456789a,id=x" }, []string{"id=x"}},
		{func(m *vmm.Machine) { m.Boot.Args = []string{strings.Repeat("x", maxCommandLineBytes)} }, []string{"2047"}},
	} {
		m := vmm.Machine{ID: "0123456789ab", CPUs: 1, MemoryBytes: 256 << 20}
		row.change(&m)
		err := check(m)
		if (err == nil) != (row.want == nil) {
			t.Errorf("%+v: %v", m, err)
		}
		for _, word := range row.want {
			if err != nil && !strings.Contains(err.Error(), word) {
				t.Errorf("%v: lacks %q", err, word)
			}
		}
	}
}

// TestMachineLimits has QEMU itself confirm the limits that are given as its.
func TestMachineLimits(t *testing.T) {
	m := tcgMachine(t)
	folder := t.TempDir()
	for i := range maxDrives {
		path := filepath.Join(folder, strconv.Itoa(i))
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		m.Drives = append(m.Drives, vmm.Drive{Path: path})
	}
	startProcess(t, confined(), m)
	out, err := exec.Command(program, "-M", "microvm", "-display", "none", "-nodefaults", "-smp", strconv.Itoa(maxCPUs+1)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), strconv.Itoa(maxCPUs)) {
		t.Errorf("%d CPUs: %v, %s", maxCPUs+1, err, out)
	}
}

func TestPanicked(t *testing.T) {
	const panics = "[    1.5] Kernel panic - not syncing: sysrq triggered crash\r\n"
	for text, want := range map[string]bool{
		"":                              false,
		panics:                          true,
		"Kernel panic - not syncing: x": true,
		"\rKernel panic - not syncing: x\r\n[ 2.0] more\r\n": true,
		"he said: Kernel panic - not syncing: x\n":           false,
		panics + "[    2.0] reboot: Restarting system\r\n":   false,
		"[    2.0] reboot: Restarting system\r\n" + panics:   true,
		"[no time stamp Kernel panic - not syncing\n":        false,
		strings.Repeat("[", 1<<16) + "\n" + panics:           true,
	} {
		if got := panicked([]byte(text)); got != want {
			t.Errorf("%.80q: %v", text, got)
		}
	}
}

func TestTail(t *testing.T) {
	for _, piece := range []int{1, 3, 9, 10, 11, 25, 100} {
		for total := range 60 {
			x := tail{limit: 10}
			text := strings.Repeat("0123456789abc", 5)[:total]
			for rest := text; rest != ""; {
				n := min(piece, len(rest))
				x.Write([]byte(rest[:n]))
				rest = rest[n:]
			}
			if got, want := string(x.Bytes()), text[max(0, total-10):]; got != want {
				t.Fatalf("%d bytes in pieces of %d: %q, want %q", total, piece, got, want)
			}
			if cap(x.buf) > 20 {
				t.Fatalf("%d bytes are kept", cap(x.buf))
			}
		}
	}
}

// TestFullDisk lets the host's disk be full: the guest stands still, its write
// is neither lost nor acknowledged, and it goes on when there is space.
func TestFullDisk(t *testing.T) {
	m := tcgMachine(t)
	need(t, os.Getuid() == 0, "root, to mount a small tmpfs")
	folder := t.TempDir()
	if err := unix.Mount("tmpfs", folder, "tmpfs", 0, "size=64k"); err != nil {
		need(t, false, "a tmpfs: "+err.Error())
	}
	defer unix.Unmount(folder, unix.MNT_DETACH)
	disk, filler := filepath.Join(folder, "disk"), filepath.Join(folder, "filler")
	if err := os.WriteFile(disk, []byte("small"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 4<<20); err != nil {
		t.Fatal(err)
	}
	m.Drives = []vmm.Drive{{Path: disk}}
	p := startProcess(t, confined(), m)
	ask := dialAsk(t, p)
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	wrote := make(chan error, 1)
	go func() { _, err := ask("write small kept"); wrote <- err }()
	for end := time.Now().Add(time.Minute); !p.paused(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the VM does not stand still")
		}
	}
	select {
	case err := <-wrote:
		t.Fatalf("write to a full disk: %v", err)
	case <-time.After(2 * spaceRetry): // over at least one retry
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-wrote:
		if err != nil {
			t.Errorf("write when there is space again: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the VM does not go on")
	}
	data, err := os.ReadFile(disk)
	if err != nil || !strings.HasPrefix(string(data[guestops.WriteOffset:]), "kept") {
		t.Errorf("the disk holds %q, %v", data[guestops.WriteOffset:][:16], err)
	}
}

// dialAsk opens a stream to the test guest.
func dialAsk(tb testing.TB, p vmm.Process) func(string) (string, error) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := p.DialGuest(ctx, wire.AgentPort)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	r := bufio.NewReader(conn)
	return func(request string) (string, error) { return guestops.Ask(conn, r, request) }
}

var _ net.Conn = (*stream)(nil)

// BenchmarkStart is from the call of Start to the first answer of the agent.
func BenchmarkStart(b *testing.B) {
	m := testMachine(b)
	d := New()
	info, err := d.Probe(b.Context(), m.Accel)
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("QEMU %s, %s: %s", info.Version, info.Accel, info.Reason)
	for b.Loop() {
		p, err := d.Start(b.Context(), m)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := dialAsk(b, p)("port"); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		p.Kill()
		<-p.Done()
		b.StartTimer()
	}
}

// BenchmarkStream is the way of bytes to the guest and back.
func BenchmarkStream(b *testing.B) {
	p, err := confined().Start(b.Context(), testMachine(b))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { p.Kill(); <-p.Done() }()
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	conn, err := p.DialGuest(ctx, wire.AgentPort)
	if err != nil {
		b.Fatal(err)
	}
	r := bufio.NewReaderSize(conn, 256<<10)
	if _, err := guestops.Ask(conn, r, "echo"); err != nil {
		b.Fatal(err)
	}
	block := make([]byte, 256<<10)
	b.SetBytes(int64(len(block)))
	go func() {
		for {
			if _, err := conn.Write(block); err != nil {
				return
			}
		}
	}()
	for b.Loop() {
		for n := 0; n < len(block); {
			k, err := r.Discard(min(len(block)-n, r.Size()))
			if err != nil {
				b.Fatal(err)
			}
			n += k
		}
	}
}
