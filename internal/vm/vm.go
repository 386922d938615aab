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
const (
	bootTimeoutKVM = 60 * time.Second
	bootTimeoutTCG = 180 * time.Second
)

// The steps of a stop: the guest's own shutdown, then the VMM's, then kill.
// The agent uses the last part of the guest's time to put the disks in order
// itself where the image's init is too slow or does not listen.
const (
	stopGuest     = 10 * time.Second
	stopInitGrace = 7 * time.Second
	stopVMM       = 5 * time.Second
)

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

	mu    sync.Mutex
	state banger.State // changed by to alone
	stage banger.Stage // the last one reached
	proc  vmm.Process  // nil before the VMM was spawned
	guest string       // the last event of the guest's side of the boot
}

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

// Start boots the VM and returns when the network stage is reached. If it
// fails, or ctx ends, nothing is left running and the error names the last
// stage reached and holds the end of the console.
func (v *VM) Start(ctx context.Context) error {
	if s := v.State(); !accept(s, RequestStart) {
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s already", v.id, s)
	}
	info, err := v.cfg.Driver.Probe(ctx, v.cfg.Spec.Accel)
	if err != nil {
		return err
	}
	if err := v.to(evStart); err != nil {
		return err
	}
	limit := bootTimeoutKVM
	if info.Accel == banger.AccelTCG {
		limit = bootTimeoutTCG
	}
	bootCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = v.boot(bootCtx, info)
	if err == nil {
		return v.to(evBooted)
	}
	err = v.bootError(ctx, bootCtx, err, limit)
	v.mu.Lock()
	proc := v.proc
	v.mu.Unlock()
	if proc != nil {
		proc.Kill()
		<-proc.Done()
	}
	v.removeRun()
	v.to(evFailed)
	return err
}

// boot spawns the VMM and follows the guest up to the network stage.
func (v *VM) boot(ctx context.Context, info vmm.Info) error {
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
		Accel:       info.Accel,
		Boot:        vmm.Boot{Kernel: v.cfg.Kernel.Vmlinux, Initrd: initramfs},
		Drives:      drives,
		Console:     v.console,
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
		v.mu.Lock()
		v.guest = ev.Stage
		v.mu.Unlock()
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
	if user.Err() != nil {
		return &banger.Error{Code: banger.CodeCanceled, Err: context.Cause(user),
			Message: fmt.Sprintf("boot: canceled after the stage %q", stage)}
	}
	var known *banger.Error
	if proc == nil && errors.As(err, &known) {
		return err // the driver said what it needs
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
func (v *VM) Done() <-chan struct{} { return v.proc.Done() }

// EndError says how the VMM ended, once Done is closed, as the error of what
// was cut off by it.
func (v *VM) EndError() error {
	e := banger.Errorf(banger.CodeGuest, "VM %s: it ended before the command did: %s", v.id, describe(v.proc.Exit()))
	if lines := v.console.LastLines(20); len(lines) > 0 {
		e.Detail = "the console ends:\n" + strings.Join(lines, "\n")
	}
	return e
}

// Stop ends a running VM: the guest gets stopGuest, then the VMM stopVMM,
// then it is killed. clean says that the guest itself powered off, so that
// its file systems are in order. ctx cuts the guest's time short. Stopping
// what is stopped is clean and does nothing.
func (v *VM) Stop(ctx context.Context) (clean bool, err error) {
	s := v.State()
	if !accept(s, RequestStop) {
		return false, banger.Errorf(banger.CodeConflict, "VM %s: it is %s", v.id, s)
	}
	if s != banger.StateRunning && s != banger.StatePaused {
		return true, nil
	}
	if s == banger.StatePaused {
		resumeCtx, cancel := context.WithTimeout(ctx, stopVMM)
		v.proc.Resume(resumeCtx) // where it fails the guest stays silent and is ended below
		cancel()
	}
	if err := v.to(evStop); err != nil {
		return false, err
	}
	guestCtx, cancel := context.WithTimeout(ctx, stopGuest)
	defer cancel()
	conn, _, askErr := v.ask(guestCtx, wire.Request{Op: wire.OpShutdown,
		Shutdown: &wire.Shutdown{GraceMs: stopInitGrace.Milliseconds()}})
	if askErr == nil {
		conn.Close()
		select {
		case <-v.proc.Done():
		case <-guestCtx.Done():
		}
	}
	if !isDone(v.proc) {
		vmmCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopVMM)
		v.proc.Quit(vmmCtx) // an error leaves it running, and it is killed below
		select {
		case <-v.proc.Done():
		case <-vmmCtx.Done():
		}
		cancel()
	}
	if !isDone(v.proc) {
		v.proc.Kill()
		<-v.proc.Done()
	}
	v.removeRun()
	if err := v.to(evExited); err != nil {
		return false, err
	}
	return v.proc.Exit().Cause == vmm.CauseGuestOff, nil
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
