// Package qemu is the driver for QEMU's microvm machine on x86-64 Linux, with
// KVM where that works and TCG elsewhere.
//
// QEMU is given descriptors, not paths: drives as descriptor sets, kernel and
// initrd by /proc/self/fd, and one end of a socket pair each for the agent
// channel, the console and QMP. So no path can be misread as an option, every
// file is checked before anything is spawned, a read-only drive is one whose
// descriptor cannot write, no socket lies in the file system, and RunDir stays
// empty.
package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/vmm"
	"banger/internal/wire"
)

const (
	program    = "qemu-system-x86_64"
	driverName = "qemu"
	// agentDevice is the id of the virtio-serial port in QMP's events.
	agentDevice = "agent"

	// maxCPUs is what the microvm machine takes.
	maxCPUs = 288
	// minMemoryBytes is what a distribution's kernel needs to come up at all.
	minMemoryBytes = 64 << 20
	// maxDrives is how many of microvm's virtio-mmio slots are used for
	// drives; the others are for the channel, the random generator and network.
	maxDrives = 16
	// minMTU is what virtio-net's device takes (QEMU, hw/net/virtio-net.c), and
	// maxMTU what IPv4 packets have at most.
	minMTU, maxMTU = 68, 65535
	// maxCommandLineBytes is COMMAND_LINE_SIZE of Linux on x86, less its NUL.
	maxCommandLineBytes = 2048 - 1

	// probeTimeout bounds one run of the program for its version.
	probeTimeout      = 5 * time.Second
	maxProbeBytes     = 4 << 10
	maxMeminfoBytes   = 16 << 10
	sandboxArg        = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
	firstInheritedFD  = 3
	sandboxDenialWord = "sandbox" // in what a QEMU built without seccomp prints
)

// A Driver starts machines on QEMU. It may be used from any goroutine.
type Driver struct {
	program   string
	launcher  []string // see New
	probe     func() kvmResult
	noSandbox atomic.Bool // this QEMU was built without seccomp
}

// New makes a driver for the QEMU found in PATH when it is needed. launcher is
// a command that calls Confined with the arguments that follow it; QEMU is
// started through it. Without one QEMU is not confined but by its own filter.
func New(launcher ...string) *Driver {
	return &Driver{program: program, launcher: launcher, probe: probeKVM}
}

var _ vmm.Driver = (*Driver)(nil)

// Probe runs the program once for its version.
func (d *Driver) Probe(ctx context.Context, accel banger.Accel) (vmm.Info, error) {
	info, err := d.find(accel)
	if err != nil {
		return vmm.Info{}, err
	}
	// Options are taken in order: without support the first one ends it.
	out, err := runProgram(ctx, info.Program, "-sandbox", sandboxArg, "-version")
	info.Sandbox = err == nil
	if err != nil {
		if out, err = runProgram(ctx, info.Program, "-version"); err != nil {
			return vmm.Info{}, banger.Errorf(banger.CodeUnavailable, "qemu: %s does not run: %w", info.Program, err).
				WithHint("reinstall QEMU; %s -version must work", info.Program)
		}
	}
	first, _, _ := strings.Cut(out, "\n")
	rest, ok := strings.CutPrefix(first, "QEMU emulator version ")
	if !ok {
		return vmm.Info{}, banger.Errorf(banger.CodeUnavailable, "qemu: %s answers %q, which is not a version of QEMU", info.Program, first)
	}
	info.Version, _, _ = strings.Cut(rest, " ")
	return info, nil
}

// find resolves the program and the accelerator.
func (d *Driver) find(accel banger.Accel) (vmm.Info, error) {
	path, err := exec.LookPath(d.program)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return vmm.Info{}, banger.Errorf(banger.CodeUnavailable, "qemu: %s is not in PATH", d.program).
			WithHint("install QEMU for x86-64: the package qemu-system-x86 (Debian, Ubuntu: apt install qemu-system-x86; Fedora: dnf install qemu-system-x86)")
	}
	info := vmm.Info{Driver: driverName, Program: path}
	switch accel {
	case banger.AccelTCG:
		info.Accel, info.Reason = banger.AccelTCG, "asked for by name"
	case banger.AccelKVM:
		r := d.probe()
		if !r.works {
			hint := "--accel tcg runs it in software, slower and without isolation"
			if r.hint != "" {
				hint = r.hint + "; or " + hint
			}
			return vmm.Info{}, banger.Errorf(banger.CodeUnavailable, "kvm: %s", r.reason).WithHint("%s", hint)
		}
		info.Accel, info.Reason = banger.AccelKVM, r.reason
	case banger.AccelAuto, "":
		r := d.probe()
		info.Accel, info.Reason = banger.AccelTCG, r.reason
		if r.works {
			info.Accel = banger.AccelKVM
		} else if r.hint != "" {
			info.Reason += " (" + r.hint + ")"
		}
	default:
		return vmm.Info{}, banger.Errorf(banger.CodeUsage, "accel: %q is none of auto, kvm, tcg", accel)
	}
	return info, nil
}

// runProgram returns what the program prints, bounded in time and length.
func runProgram(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env, cmd.Dir = environment(), "/"
	cmd.WaitDelay = time.Second
	out := tail{limit: maxProbeBytes}
	cmd.Stdout = &out
	err := cmd.Run()
	return string(out.Bytes()), err
}

// environment is what QEMU gets: messages in English, and PATH for a wrapper.
func environment() []string {
	return []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
}

// Start implements vmm.Driver. All descriptors of the calling process are
// marked close-on-exec, since what the process itself inherited is not.
func (d *Driver) Start(ctx context.Context, m vmm.Machine) (vmm.Process, error) {
	if err := check(m); err != nil {
		return nil, err
	}
	info, err := d.find(m.Accel)
	if err != nil {
		return nil, err
	}
	for {
		sandbox := !d.noSandbox.Load()
		info.Sandbox = sandbox
		p, err := d.start(ctx, m, info)
		// A QEMU without seccomp says so at once; asking it beforehand would
		// cost every start the time of one more process.
		var early *earlyExit
		if sandbox && errors.As(err, &early) && strings.Contains(early.output, sandboxDenialWord) {
			d.noSandbox.Store(true)
			continue
		}
		if err != nil {
			return nil, err
		}
		return p, nil
	}
}

// check refuses what no QEMU here could run.
func check(m vmm.Machine) error {
	if len(m.ID) != 12 || strings.Trim(m.ID, "0123456789abcdef") != "" {
		return banger.Errorf(banger.CodeInternal, "machine: id %q is not 12 hex digits", m.ID)
	}
	if m.CPUs < 1 || m.CPUs > maxCPUs {
		return banger.Errorf(banger.CodeUsage, "cpus: %d asked, QEMU's microvm takes 1 to %d", m.CPUs, maxCPUs)
	}
	if m.MemoryBytes < minMemoryBytes {
		return banger.Errorf(banger.CodeUsage, "memory: %d bytes asked, the least is %d (64 MiB)", m.MemoryBytes, int64(minMemoryBytes))
	}
	if m.MemoryBytes%(1<<20) != 0 {
		return banger.Errorf(banger.CodeUsage, "memory: %d bytes asked, which is not a multiple of 1 MiB", m.MemoryBytes)
	}
	total, err := hostMemoryBytes()
	if err != nil {
		return err
	}
	if m.MemoryBytes > total {
		return banger.Errorf(banger.CodeUnavailable, "memory: %d MiB asked, the host has %d MiB", m.MemoryBytes>>20, total>>20).
			WithHint("ask for less with -m")
	}
	if n := m.NIC; n != nil && (n.Attach == nil || n.MAC[0]&1 != 0 || n.MTU < minMTU || n.MTU > maxMTU) {
		return banger.Errorf(banger.CodeInternal, "network card: MAC %v, MTU %d", net.HardwareAddr(n.MAC[:]), n.MTU)
	}
	if len(m.Drives) > maxDrives {
		return banger.Errorf(banger.CodeUsage, "drives: %d asked, QEMU's microvm takes %d", len(m.Drives), maxDrives)
	}
	if n := len(commandLine(m, 0)); n > maxCommandLineBytes {
		return banger.Errorf(banger.CodeUsage, "kernel command line: %d bytes, Linux takes %d", n, maxCommandLineBytes)
	}
	return nil
}

// hostMemoryBytes is MemTotal of /proc/meminfo (proc(5)).
func hostMemoryBytes() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("host memory: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, maxMeminfoBytes))
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "MemTotal:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 53)
			if err != nil {
				return 0, fmt.Errorf("host memory: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("host memory: /proc/meminfo has no MemTotal")
}

// An earlyExit is a QEMU that ended before its guest began.
type earlyExit struct {
	err    error
	output string
}

func (e *earlyExit) Error() string { return e.err.Error() }

// start spawns one QEMU and brings it to its first guest instruction.
func (d *Driver) start(ctx context.Context, m vmm.Machine, info vmm.Info) (_ *process, err error) {
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	tscKHz := 0
	if info.Accel == banger.AccelTCG {
		if tscKHz, err = hostTSCKHz(); err != nil {
			return nil, err
		}
	}
	var in inherited
	defer in.close()
	p := &process{
		info: info, console: m.Console,
		consoleTail: tail{limit: consoleTailBytes}, outputTail: tail{limit: vmm.MaxOutputBytes},
		reaped: make(chan struct{}), done: make(chan struct{}),
	}
	var opened []io.Closer // of the host's ends, until watch owns them
	defer func() {
		if err != nil {
			for _, c := range opened {
				c.Close()
			}
		}
	}()

	args, err := arguments(m, info, tscKHz, &in)
	if err != nil {
		return nil, err
	}
	ends := make(map[string]net.Conn)
	for _, name := range []string{"agent", "console", "qmp"} {
		conn, fd, err := in.socket()
		if err != nil {
			return nil, fmt.Errorf("qemu: %s: %w", name, err)
		}
		opened = append(opened, conn)
		ends[name] = conn
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d", name, fd))
	}
	args = append(args,
		"-device", "virtio-serial-device,max_ports=2",
		"-device", "virtserialport,chardev=agent,id="+agentDevice+",name="+wire.PortName,
		"-serial", "chardev:console",
		"-mon", "chardev=qmp,mode=control")
	var frames net.Conn // ours until it is attached
	if m.NIC != nil {
		conn, fd, err := in.socket()
		if err != nil {
			return nil, fmt.Errorf("qemu: network card: %w", err)
		}
		frames = conn
		args = append(args, networkCard(*m.NIC, fd)...)
	}
	defer func() {
		if frames != nil {
			frames.Close()
		}
	}()

	printed, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	defer theirs.Close()
	opened = append(opened, printed)

	p.serial, p.printed = ends["console"], printed
	p.monitor = newMonitor(ends["qmp"], p.onEvent)
	p.channel = newChannel(ends["agent"], p.paused)
	spawn := func(isolated bool) (rep *reportPipe, err error) {
		p.cmd = &exec.Cmd{
			Path: info.Program, Args: append([]string{info.Program}, args...),
			Env: environment(), Dir: "/",
			Stdout: theirs, Stderr: theirs, ExtraFiles: slices.Clone(in.files),
			// Own process group: a terminal's Ctrl-C is not for QEMU.
			SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true},
		}
		var names []string
		if len(d.launcher) > 0 {
			if rep, err = in.launched(p.cmd, d.launcher, m); err != nil {
				return nil, err
			}
			defer rep.theirs.Close()
			if isolated {
				names = isolate(p.cmd.SysProcAttr)
			}
		}
		if err := unix.CloseRange(firstInheritedFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) {
			return nil, fmt.Errorf("descriptors: %w", err)
		}
		if err := p.spawn(); err != nil {
			rep.close()
			return nil, err
		}
		if rep != nil {
			rep.names = names
		}
		return rep, nil
	}
	told, err := spawn(true)
	var unshared string
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES) {
		// The host allows no name spaces to an ordinary user.
		unshared = fmt.Sprintf("namespaces: %v", errors.Unwrap(err))
		told, err = spawn(false)
	}
	if err != nil {
		return nil, banger.Errorf(banger.CodeUnavailable, "qemu: %s does not start: %w", info.Program, err)
	}
	in.close()
	theirs.Close()
	opened = nil
	p.watch()

	// QEMU starts stopped, so no event can be missed.
	if p.info.Confinement, err = told.read(ctx); err == nil {
		p.info.Confinement.Seccomp = info.Sandbox
		if unshared != "" {
			p.info.Confinement.Missing = append(p.info.Confinement.Missing, unshared)
		}
		err = p.monitor.negotiate(ctx)
	}
	if err == nil {
		p.info.Version = p.monitor.version
		if frames != nil {
			err, frames = m.NIC.Attach(frames), nil
		}
	}
	if err == nil {
		err = p.monitor.execute(ctx, "cont", nil)
	}
	if err == nil {
		return p, nil
	}
	ended := errors.Is(err, vmm.ErrEnded)
	if ended {
		// It closed the connection, so it is about to end.
		select {
		case <-p.done:
		case <-time.After(exitLimit):
			ended = false
		case <-ctx.Done():
			ended, err = false, context.Cause(ctx)
		}
	}
	_ = p.Kill()
	<-p.done
	if ended {
		return nil, p.explain(m)
	}
	if e := p.Exit().Output; e != "" {
		return nil, fmt.Errorf("qemu: %w (it printed %q)", err, e)
	}
	return nil, fmt.Errorf("qemu: %w", err)
}

// A reportPipe is where the launcher tells what it achieved. Nil stands for no
// launcher.
type reportPipe struct {
	ours, theirs *os.File
	names        []string // of the name spaces that were asked for
}

// launched makes cmd one of the launcher, which becomes what cmd was.
func (in *inherited) launched(cmd *exec.Cmd, launcher []string, m vmm.Machine) (*reportPipe, error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	l := launch{ReportFD: firstInheritedFD + len(in.files), Files: in.reopened}
	for _, d := range m.Drives {
		if st, err := os.Stat(d.Path); err == nil && !d.ReadOnly {
			l.FileBytes = max(l.FileBytes, st.Size())
		}
	}
	text, err := json.Marshal(l)
	if err != nil {
		panic("qemu: " + err.Error()) // plain data always marshals
	}
	cmd.Args = slices.Concat(launcher, []string{string(text)}, cmd.Args)
	cmd.Path = launcher[0]
	cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
	return &reportPipe{ours: ours, theirs: theirs}, nil
}

func (r *reportPipe) close() {
	if r != nil {
		r.ours.Close()
	}
}

// read waits until the launcher has become QEMU, or has said why not.
func (r *reportPipe) read(ctx context.Context) (*banger.Confinement, error) {
	if r == nil {
		return &banger.Confinement{Namespaces: []string{}, Limits: []string{}, Missing: []string{"no launcher was given to the driver"}}, nil
	}
	defer r.close()
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { r.ours.SetReadDeadline(time.Unix(1, 0)) })()
	data, err := io.ReadAll(io.LimitReader(r.ours, maxReportBytes))
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("launcher: %w", err)
	}
	// A second report is the failure of the exec after the first.
	var last report
	dec := json.NewDecoder(bytes.NewReader(data))
	for n := 0; ; n++ {
		var next report
		if err := dec.Decode(&next); err == io.EOF && n > 0 {
			break
		} else if err != nil {
			return nil, fmt.Errorf("launcher: it told nothing (%w)", err)
		}
		last = next
	}
	if last.Error != "" {
		return nil, fmt.Errorf("launcher: %s", last.Error)
	}
	c := &last.Confinement
	c.Namespaces = append([]string{}, r.names...)
	c.Missing = append([]string{}, c.Missing...) // a list in JSON, where nothing is missing too
	return c, nil
}

// explain turns an early end into an error whose next step is known where the
// reason is.
func (p *process) explain(m vmm.Machine) error {
	early := &earlyExit{err: p.endedEarly(), output: p.Exit().Output}
	e := banger.Errorf(banger.CodeUnavailable, "%w", early)
	switch {
	case strings.Contains(early.output, `" lock`): // -device …,drive=NODE: Failed to get "write" lock
		e = banger.Errorf(banger.CodeConflict, "%w", early)
		for i, d := range m.Drives {
			if strings.Contains(early.output, "drive="+nodeName(i)+":") {
				e.Message = fmt.Sprintf("drive: %q is in use", d.Path)
			}
		}
		e.WithHint("another VM or program uses the file: stop it first")
	case strings.Contains(early.output, "Cannot allocate memory") || strings.Contains(early.output, "cannot set up guest memory"):
		e.WithHint("the host has too little free memory: stop another VM or ask for less with -m")
	}
	e.Detail = early.output
	return e
}

// nodeName names a drive towards QEMU.
func nodeName(drive int) string { return fmt.Sprintf("drive%d", drive) }

// arguments builds the command line but for the character devices, opening
// the machine's files on the way.
func arguments(m vmm.Machine, info vmm.Info, tscKHz int, in *inherited) ([]string, error) {
	args := []string{
		"-name", "banger-" + m.ID,
		"-M", "microvm,acpi=on,dump-guest-core=off",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
		"-global", "virtio-mmio.force-legacy=false",
		"-m", fmt.Sprintf("%dM", m.MemoryBytes>>20),
		"-smp", strconv.Itoa(m.CPUs),
	}
	if info.Accel == banger.AccelKVM {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		// One thread for all vCPUs. With one each, a vCPU can go on running the
		// old translation of code that another has just patched: Linux patches
		// its static branches that way, and a guest with systemd stood still for
		// good in one of a dozen boots, both vCPUs at a patched branch.
		args = append(args, "-accel", "tcg,thread=single", "-cpu", "max")
	}
	if info.Sandbox {
		args = append(args, "-sandbox", sandboxArg)
	}
	kernel, err := in.open("kernel", m.Boot.Kernel, true)
	if err != nil {
		return nil, err
	}
	in.reopened = append(in.reopened, kernel)
	args = append(args, "-kernel", fmt.Sprintf("/proc/self/fd/%d", kernel), "-append", commandLine(m, tscKHz))
	if m.Boot.Initrd != "" {
		initrd, err := in.open("initrd", m.Boot.Initrd, true)
		if err != nil {
			return nil, err
		}
		in.reopened = append(in.reopened, initrd)
		args = append(args, "-initrd", fmt.Sprintf("/proc/self/fd/%d", initrd))
	}
	args = append(args, "-device", "virtio-rng-device")
	for i, drive := range m.Drives {
		fd, err := in.open("drive", drive.Path, drive.ReadOnly)
		if err != nil {
			return nil, err
		}
		node := nodeName(i)
		args = append(args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, fd),
			"-blockdev", blockdev(node, fd, drive.ReadOnly),
			"-device", "virtio-blk-device,drive="+node)
	}
	return args, nil
}

// blockdev describes a raw file in JSON. The page cache is used and flushes
// reach the file; what the guest trims becomes holes; a full disk stops the
// guest until there is space (see stoppedByItself), as virtio-blk's default
// is. Locks are those of open file descriptions, so they hold however the
// descriptor came to QEMU.
func blockdev(node string, set int, readOnly bool) string {
	discard := "unmap"
	if readOnly {
		discard = "ignore"
	}
	type cache struct {
		Direct  bool `json:"direct"`
		NoFlush bool `json:"no-flush"`
	}
	type file struct {
		Driver   string `json:"driver"`
		Filename string `json:"filename"`
		Locking  string `json:"locking"`
		ReadOnly bool   `json:"read-only"`
		AutoRO   bool   `json:"auto-read-only"`
		Discard  string `json:"discard"`
		Cache    cache  `json:"cache"`
	}
	type raw struct {
		Driver   string `json:"driver"`
		NodeName string `json:"node-name"`
		ReadOnly bool   `json:"read-only"`
		AutoRO   bool   `json:"auto-read-only"`
		Discard  string `json:"discard"`
		Cache    cache  `json:"cache"`
		File     file   `json:"file"`
	}
	text, err := json.Marshal(raw{
		Driver: "raw", NodeName: node, ReadOnly: readOnly, Discard: discard,
		File: file{Driver: "file", Filename: fmt.Sprintf("/dev/fdset/%d", set), Locking: "on", ReadOnly: readOnly, Discard: discard},
	})
	if err != nil {
		panic("qemu: " + err.Error()) // plain data always marshals
	}
	return string(text)
}

// networkCard describes a card whose frames go through a stream socket. There
// is no vhost and no offload: every frame is whole, with its checksums.
func networkCard(nic vmm.NIC, fd int) []string {
	return []string{
		"-netdev", fmt.Sprintf("stream,id=net,server=off,addr.type=fd,addr.str=%d", fd),
		"-device", fmt.Sprintf("virtio-net-device,netdev=net,mac=%v,host_mtu=%d", net.HardwareAddr(nic.MAC[:]), nic.MTU),
	}
}

// commandLine joins the platform's words and the machine's. A panic and a
// reboot both reset by triple fault, which QEMU takes as the end.
func commandLine(m vmm.Machine, tscKHz int) string {
	words := []string{"console=ttyS0", "reboot=t", "panic=-1", "no_timer_check", "quiet", "loglevel=4"}
	if tscKHz != 0 {
		words = append(words, "tsc=reliable", fmt.Sprintf("tsc_early_khz=%d", tscKHz))
	}
	return strings.Join(append(words, m.Boot.Args...), " ")
}

// inherited collects the descriptors that QEMU gets, in the order of their
// numbers there.
type inherited struct {
	files    []*os.File
	reopened []int // numbers of those that QEMU opens again by name
}

// add returns the number f has in QEMU.
func (in *inherited) add(f *os.File) int {
	in.files = append(in.files, f)
	return firstInheritedFD + len(in.files) - 1
}

// open opens a regular file. Nothing else is waited for or given to QEMU.
func (in *inherited) open(what, path string, readOnly bool) (int, error) {
	if !filepath.IsAbs(path) {
		return 0, banger.Errorf(banger.CodeInternal, "%s: path %q is not absolute", what, path)
	}
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|syscall.O_NONBLOCK, 0)
	if err != nil {
		code := banger.CodeUnavailable
		if errors.Is(err, os.ErrNotExist) {
			code = banger.CodeNotFound
		}
		return 0, banger.Errorf(code, "%s: %w", what, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = banger.Errorf(banger.CodeInvalid, "%s: %q is not a regular file", what, path)
	}
	if err != nil {
		f.Close()
		return 0, err
	}
	return in.add(f), nil
}

// socket makes a socket pair: one end for the host, the other for QEMU.
func (in *inherited) socket() (net.Conn, int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "qemu"), os.NewFile(uintptr(fds[1]), "qemu")
	conn, err := net.FileConn(ours)
	ours.Close() // FileConn has its own
	if err != nil {
		theirs.Close()
		return nil, 0, fmt.Errorf("socket pair: %w", err)
	}
	return conn, in.add(theirs), nil
}

// close closes the host's copies.
func (in *inherited) close() {
	for _, f := range in.files {
		f.Close()
	}
}
