// Package vm is the life of a VM: its state machine, its disks, its boot, its
// sessions and its end. It knows the driver contract and no driver, base
// images and no image store.
package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"banger"
	"banger/internal/kernel"
	"banger/internal/store"
	"banger/internal/vmm"
	"banger/internal/wire"
)

// Time limits of a boot, by accelerator.
var (
	bootTimeoutKVM = 60 * time.Second
	bootTimeoutTCG = 180 * time.Second
)

// The steps of a stop: the guest's own shutdown, then the VMM's, then kill.
// The agent uses the last part of the guest's time to put the disks in order
// itself where the image's init is too slow or does not listen.
var (
	stopGuest     = 10 * time.Second
	stopInitGrace = 7 * time.Second
	stopVMM       = 5 * time.Second
)

// A kill that does nothing is tried again, killTries times in all.
const killTries = 5

var killWait = time.Second

// endWait is how long a broken stream waits to learn that it was the end of
// the VMM.
var endWait = 2 * time.Second

// Config is everything that a new VM is made from. The files belong to the
// caller and must outlive the VM.
type Config struct {
	ID     string
	Store  *store.Store
	Spec   banger.Spec // defaults are filled in by New
	Config banger.ImageConfig

	Rootfs   string   // the base image
	RootUUID [16]byte // of its file system
	Kernel   *kernel.Kernel
	Agent    string // path of the guest binary
	Driver   vmm.Driver

	// Grace is what the image's init gets to shut down; 0 is stopInitGrace,
	// which is also the most.
	Grace time.Duration

	// OnStage is told of each stage as it is reached, from the goroutine that
	// calls New or Start.
	OnStage func(banger.Stage)
}

// A VM is one virtual machine that this process owns. Its methods may be
// called from any goroutine.
type VM struct {
	id      string
	cfg     Config
	token   string
	console *Console
	overlay [16]byte // UUIDs of the disks
	work    [16]byte

	stops sync.Mutex // held by Stop: of two at once the second finds the VM stopped

	mu       sync.Mutex
	state    banger.State  // changed by move alone
	stage    banger.Stage  // the last one reached
	proc     vmm.Process   // of the last start; nil before the VMM was spawned
	stopBoot func()        // ends the boot that is under way
	bootOver chan struct{} // closed when Start is done with it
}

// errStopped is the cause of the end of a boot that Stop ended.
var errStopped = errors.New("stopped on request")

// New makes the disks of a VM in its folder, which the caller holds and
// removes if New fails.
func New(cfg Config) (*VM, error) {
	if cfg.Spec.CPUs == 0 {
		cfg.Spec.CPUs = min(banger.DefaultCPUs, runtime.NumCPU())
	}
	if cfg.Spec.MemoryBytes == 0 {
		cfg.Spec.MemoryBytes = banger.DefaultMemoryBytes
	}
	if cfg.Spec.Accel == "" {
		cfg.Spec.Accel = banger.AccelAuto
	}
	if cfg.Spec.Init == "" {
		cfg.Spec.Init = "auto"
	}
	if cfg.Grace == 0 || cfg.Grace > stopInitGrace {
		cfg.Grace = stopInitGrace
	}
	if cfg.Spec.Hostname == "" {
		cfg.Spec.Hostname = "banger-" + cfg.ID
	}
	var secret [32]byte
	rand.Read(secret[:]) // never fails
	v := &VM{
		id:      cfg.ID,
		cfg:     cfg,
		token:   hex.EncodeToString(secret[:]),
		console: NewConsole(ConsoleBytes),
		state:   banger.StateCreated,
		stage:   banger.StageBuilt,
	}
	dir := cfg.Store.VM(cfg.ID)
	var err error
	if v.overlay, err = createDisk(filepath.Join(dir, store.VMOverlay), banger.DefaultOverlayDiskBytes, "overlay", overlayDirMode); err != nil {
		return nil, fmt.Errorf("overlay disk: %w", err)
	}
	if v.work, err = createDisk(filepath.Join(dir, store.VMWork), banger.DefaultWorkDiskBytes, "work", workDirMode); err != nil {
		return nil, fmt.Errorf("work disk: %w", err)
	}
	v.reached(banger.StageDisks)
	return v, nil
}

// State is the VM's state now; it may be another by the time it is looked at.
func (v *VM) State() banger.State {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state
}

// Console is what the guest wrote to its console.
func (v *VM) Console() *Console { return v.console }

// to moves the VM along an edge of the state machine.
func (v *VM) to(e event) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.move(e)
}

// move is to for who holds mu.
func (v *VM) move(e event) error {
	s, err := next(v.state, e)
	if err != nil {
		return err
	}
	v.state = s
	return nil
}

func (v *VM) reached(s banger.Stage) {
	v.mu.Lock()
	v.stage = s
	v.mu.Unlock()
	if v.cfg.OnStage != nil {
		v.cfg.OnStage(s)
	}
}

// process is the VMM of the last start, nil before it was spawned.
func (v *VM) process() vmm.Process {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.proc
}

// Start boots the VM and returns when the network stage is reached. If it
// fails, or ctx ends, or a Stop comes, nothing is left running and the error
// names the last stage reached; unless it was the user who ended it, it holds
// the end of the console too.
func (v *VM) Start(ctx context.Context) error {
	if s := v.State(); !accept(s, RequestStart) {
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s already", v.id, s)
	}
	accel := v.cfg.Spec.Accel
	if accel == banger.AccelAuto {
		info, err := v.cfg.Driver.Probe(ctx, accel)
		if err != nil {
			return err
		}
		accel = info.Accel
	}
	limit := bootTimeoutKVM
	if accel == banger.AccelTCG {
		limit = bootTimeoutTCG
	}
	began := time.Now()
	bootCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if end, ok := bootCtx.Deadline(); ok { // the caller's own may be earlier
		limit = end.Sub(began).Round(time.Millisecond)
	}
	bootCtx, stopBoot := context.WithCancelCause(bootCtx)
	defer stopBoot(nil)
	over := make(chan struct{})
	defer close(over)

	v.mu.Lock()
	if err := v.move(evStart); err != nil {
		v.mu.Unlock()
		return banger.Errorf(banger.CodeConflict, "VM %s: %w", v.id, err)
	}
	v.stage, v.proc = banger.StageDisks, nil
	v.stopBoot, v.bootOver = func() { stopBoot(errStopped) }, over
	v.console.expectKernel()
	v.mu.Unlock()

	err := v.boot(bootCtx, accel)
	if err == nil {
		if err = v.to(evBooted); err == nil {
			return nil
		}
	}
	err = v.bootError(ctx, bootCtx, err, limit)
	if proc := v.process(); proc != nil {
		if killErr := kill(proc); killErr != nil {
			err = fmt.Errorf("%w; %w", err, killErr)
		}
	}
	v.removeRun()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.state == banger.StateStopping {
		v.move(evExited)
	} else {
		v.move(evFailed)
	}
	return err
}

// boot spawns the VMM and follows the guest up to the network stage.
func (v *VM) boot(ctx context.Context, accel banger.Accel) error {
	run := v.cfg.Store.VMRun(v.id)
	if err := os.Mkdir(run, 0o700); err != nil {
		return err
	}
	initramfs := filepath.Join(run, store.VMInitramfs)
	if err := v.writeInitramfs(initramfs); err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	dir := v.cfg.Store.VM(v.id)
	drives := []vmm.Drive{
		{Path: v.cfg.Rootfs, ReadOnly: true},
		{Path: filepath.Join(dir, store.VMOverlay)},
		{Path: filepath.Join(dir, store.VMWork)},
	}
	if v.cfg.Kernel.Modules != "" {
		drives = append(drives, vmm.Drive{Path: v.cfg.Kernel.Modules, ReadOnly: true})
	}
	proc, err := v.cfg.Driver.Start(ctx, vmm.Machine{
		ID:          v.id,
		RunDir:      run,
		CPUs:        v.cfg.Spec.CPUs,
		MemoryBytes: v.cfg.Spec.MemoryBytes,
		Accel:       accel,
		Boot: vmm.Boot{
			Kernel: v.cfg.Kernel.Vmlinux, Initrd: initramfs,
			// The kernel's self-tests of its ciphers take a fifth of an
			// emulated boot and tell nothing about this machine.
			Args: []string{"cryptomgr.notests"},
		},
		Drives:  drives,
		Console: v.console,
	})
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.proc = proc
	v.mu.Unlock()
	v.reached(banger.StageSpawned)

	select {
	case <-v.console.KernelUp():
		v.reached(banger.StageKernel)
	case <-proc.Done():
		return errors.New("the VMM ended")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return v.followBoot(ctx)
}

// writeInitramfs makes the file that the guest starts from: the agent, the
// modules that reach the root, and what is this VM's alone.
func (v *VM) writeInitramfs(path string) error {
	config, err := json.Marshal(wire.BootConfig{
		Version:     wire.Version,
		Token:       v.token,
		Hostname:    v.cfg.Spec.Hostname,
		Base:        formatUUID(v.cfg.RootUUID),
		Overlay:     formatUUID(v.overlay),
		Work:        formatUUID(v.work),
		Modules:     v.cfg.Kernel.ModulesUUID,
		LoadModules: v.cfg.Kernel.LoadModules(),
		Init:        v.cfg.Spec.Init,
		Entrypoint:  v.cfg.Config.Entrypoint,
		Cmd:         v.cfg.Config.Cmd,
	})
	if err != nil {
		return err
	}
	agent, err := os.Open(v.cfg.Agent)
	if err != nil {
		return err
	}
	defer agent.Close()
	st, err := agent.Stat()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := v.cfg.Kernel.WriteInitramfs(f, agent, st.Size(), config); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// followBoot reads the guest's own account of its boot.
func (v *VM) followBoot(ctx context.Context) error {
	conn, _, err := v.ask(ctx, wire.Request{Op: wire.OpBoot})
	if err != nil {
		return err
	}
	defer conn.Close()
	v.reached(banger.StageAgent)
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	// A boot has a dozen events; a guest that sends more is not booting.
	const maxEvents = 1000
	buf := make([]byte, wire.MaxFrameBytes)
	for range maxEvents {
		f, err := wire.ReadFrame(conn, buf)
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("agent: boot: %w", err)
		}
		var ev wire.BootEvent
		if f.Type != wire.FrameEvent {
			return fmt.Errorf("agent: boot: unexpected frame type %d", f.Type)
		}
		if err := json.Unmarshal(f.Payload, &ev); err != nil {
			return fmt.Errorf("agent: boot: %w", err)
		}
		switch ev.Stage {
		case wire.StageFailed:
			return fmt.Errorf("the guest cannot go on: %s", ev.Detail)
		case string(banger.StageNetwork):
			v.reached(banger.StageNetwork)
			return nil
		}
	}
	return fmt.Errorf("agent: boot: more than %d events", maxEvents)
}

// bootError turns whatever ended a boot into one error with the last stage
// reached and the end of the console.
func (v *VM) bootError(user, boot context.Context, err error, limit time.Duration) error {
	v.mu.Lock()
	stage, proc := v.stage, v.proc
	v.mu.Unlock()
	if cause := context.Cause(boot); errors.Is(cause, errStopped) || errors.Is(user.Err(), context.Canceled) {
		return &banger.Error{Code: banger.CodeCanceled, Err: cause,
			Message: fmt.Sprintf("boot: canceled after the stage %q", stage)}
	}
	var known *banger.Error
	if proc == nil && errors.As(err, &known) {
		return err // the driver said what it needs
	}
	if proc != nil && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, vmm.ErrEnded)) {
		// Streams break before the end of the VMM is known.
		select {
		case <-proc.Done():
		case <-boot.Done():
		case <-time.After(endWait):
		}
	}
	e := banger.Errorf(banger.CodeGuest, "boot: stopped after the stage %q: %w", stage, err)
	if boot.Err() != nil {
		e = banger.Errorf(banger.CodeTimeout, "boot: no answer from the guest for %v after the stage %q", limit, stage)
	} else if proc != nil {
		select {
		case <-proc.Done():
			e = banger.Errorf(banger.CodeGuest, "boot: the VMM ended after the stage %q: %s", stage, describe(proc.Exit()))
		default:
		}
	}
	if lines := v.console.LastLines(20); len(lines) > 0 {
		e.Detail = "the console ends:\n" + strings.Join(lines, "\n")
	} else {
		e.Detail = "the console is empty"
	}
	return e.WithHint("if it is slow rather than stuck, give it more memory with -m, or see the console above")
}

// describe says in a clause how a VMM ended.
func describe(x vmm.Exit) string {
	switch x.Cause {
	case vmm.CauseGuestOff:
		return "the guest powered off"
	case vmm.CauseGuestReboot:
		return "the guest asked for a reboot"
	case vmm.CauseGuestPanic:
		return "the guest's kernel panicked"
	case vmm.CauseQuit, vmm.CauseKilled:
		return "it was ended"
	}
	last := strings.TrimSpace(x.Output)
	if i := strings.LastIndexByte(last, '\n'); i >= 0 {
		last = last[i+1:]
	}
	if last == "" {
		return fmt.Sprintf("it crashed (exit code %d)", x.Code)
	}
	return fmt.Sprintf("exit code %d: %s", x.Code, last)
}

// Done is closed when the VMM is gone. Only after a Start that succeeded.
func (v *VM) Done() <-chan struct{} { return v.process().Done() }

// EndError says how the VMM ended, once Done is closed, as the error of what
// was cut off by it.
func (v *VM) EndError() error {
	e := banger.Errorf(banger.CodeGuest, "VM %s: it ended before the command did: %s", v.id, describe(v.process().Exit()))
	if lines := v.console.LastLines(20); len(lines) > 0 {
		e.Detail = "the console ends:\n" + strings.Join(lines, "\n")
	}
	return e
}

// Stop ends a VM: the guest gets stopGuest, then the VMM stopVMM, then it is
// killed. A boot that is under way is ended, and Start returns an error of
// CodeCanceled. clean says that the guest itself powered off, so that its file
// systems are in order. ctx cuts the guest's time short. Stopping what is
// stopped is clean and does nothing.
func (v *VM) Stop(ctx context.Context) (clean bool, err error) {
	v.stops.Lock()
	defer v.stops.Unlock()
	v.mu.Lock()
	s, proc, bootOver := v.state, v.proc, v.bootOver
	if s == banger.StateStarting {
		err = v.move(evStop)
		v.stopBoot()
	}
	v.mu.Unlock()
	switch {
	case !accept(s, RequestStop):
		return false, banger.Errorf(banger.CodeConflict, "VM %s: it is %s", v.id, s)
	case s == banger.StateStarting:
		<-bootOver
		return false, err
	case s != banger.StateRunning && s != banger.StatePaused:
		return true, nil
	case isDone(proc): // unasked
		v.removeRun()
		if clean = s == banger.StateRunning && proc.Exit().Cause == vmm.CauseGuestOff; clean {
			return true, v.to(evExited)
		}
		return false, v.to(evFailed)
	}
	if s == banger.StatePaused {
		resumeCtx, cancel := context.WithTimeout(ctx, stopVMM)
		proc.Resume(resumeCtx) // where it fails the guest stays silent and is ended below
		cancel()
	}
	if err := v.to(evStop); err != nil {
		return false, err
	}
	guestCtx, cancel := context.WithTimeout(ctx, stopGuest)
	defer cancel()
	conn, _, askErr := v.ask(guestCtx, wire.Request{Op: wire.OpShutdown,
		Shutdown: &wire.Shutdown{GraceMs: v.cfg.Grace.Milliseconds()}})
	if askErr == nil {
		conn.Close()
		select {
		case <-proc.Done():
		case <-guestCtx.Done():
		}
	}
	if !isDone(proc) {
		vmmCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopVMM)
		proc.Quit(vmmCtx) // an error leaves it running, and it is killed below
		select {
		case <-proc.Done():
		case <-vmmCtx.Done():
		}
		cancel()
	}
	if !isDone(proc) {
		if err := kill(proc); err != nil {
			v.to(evFailed)
			return false, fmt.Errorf("VM %s: %w", v.id, err)
		}
	}
	v.removeRun()
	if err := v.to(evExited); err != nil {
		return false, err
	}
	return proc.Exit().Cause == vmm.CauseGuestOff, nil
}

// kill ends a VMM and waits for its end.
func kill(p vmm.Process) error {
	var err error
	for range killTries {
		err = p.Kill()
		select {
		case <-p.Done():
			return nil
		case <-time.After(killWait):
		}
	}
	if err == nil {
		err = errors.New("it does not end")
	}
	return fmt.Errorf("kill of the VMM process %d: %w", p.PID(), err)
}

func isDone(p vmm.Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// removeRun removes what a VM needs only while it runs.
func (v *VM) removeRun() { os.RemoveAll(v.cfg.Store.VMRun(v.id)) }
