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
	Disks  Disks

	Rootfs   string   // the base image
	RootUUID [16]byte // of its file system
	Kernel   *kernel.Kernel
	Agent    string // path of the guest binary
	Driver   vmm.Driver

	// NIC is the machine's network card, and Network what the guest is told of
	// it; nil for none.
	NIC     *vmm.NIC
	Network *wire.Network

	// Grace is what the image's init gets to shut down; 0 is stopInitGrace,
	// which is also the most.
	Grace time.Duration

	// OnStage is told of each stage as it is reached, from the goroutine that
	// calls Start.
	OnStage func(banger.Stage)

	// Life is what was recorded of the VM before; Save records every change,
	// before the act where the change is a decision. It may be nil.
	Life Life
	Save func(Life) error
	// ConsoleLog gets what the guest writes to its console; nil for nobody.
	// It must not block.
	ConsoleLog io.Writer
}

// A VM is one virtual machine that this process owns. Its methods may be
// called from any goroutine.
type VM struct {
	id      string
	cfg     Config
	token   string
	console *Console

	stops sync.Mutex // held by Stop and Kill: of two at once the second finds the VM stopped

	mu       sync.Mutex
	life     Life          // its State is changed by move alone
	proc     vmm.Process   // of the last start; nil before the VMM was spawned
	stopBoot func()        // ends the boot that is under way
	bootOver chan struct{} // closed when the boot is done with
	changed  chan struct{} // closed and replaced when the state changes
}

// errStopped is the cause of the end of a boot that Stop ended.
var errStopped = errors.New("stopped on request")

// Complete fills in what a spec leaves out. id gives a host its name.
func Complete(spec banger.Spec, id string) banger.Spec {
	if spec.CPUs == 0 {
		spec.CPUs = min(banger.DefaultCPUs, runtime.NumCPU())
	}
	if spec.MemoryBytes == 0 {
		spec.MemoryBytes = banger.DefaultMemoryBytes
	}
	if spec.Accel == "" {
		spec.Accel = banger.AccelAuto
	}
	if spec.Init == "" {
		spec.Init = "auto"
	}
	if spec.Hostname == "" {
		spec.Hostname = "banger-" + id
	}
	return spec
}

// New is the VM that Create made, at rest. The caller holds it.
func New(cfg Config) *VM {
	cfg.Spec = Complete(cfg.Spec, cfg.ID)
	if cfg.Grace == 0 || cfg.Grace > stopInitGrace {
		cfg.Grace = stopInitGrace
	}
	if cfg.Life.State == "" {
		cfg.Life = Life{State: banger.StateCreated, Stage: banger.StageDisks}
	}
	var secret [32]byte
	rand.Read(secret[:]) // never fails
	return &VM{
		id:      cfg.ID,
		cfg:     cfg,
		token:   hex.EncodeToString(secret[:]),
		console: NewConsole(consoleTailBytes),
		life:    cfg.Life,
		changed: make(chan struct{}),
	}
}

// State is the VM's state now; it may be another by the time it is looked at.
func (v *VM) State() banger.State { return v.Life().State }

// Life is what became of the VM up to now.
func (v *VM) Life() Life {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.life
}

// Console is the end of what the guest wrote to its console.
func (v *VM) Console() *Console { return v.console }

// to moves the VM along an edge of the state machine and records it. reason is
// kept with the state.
func (v *VM) to(e event, reason string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.move(e, reason)
}

// move is to for who holds mu. A start that cannot be recorded does not
// happen. Every other change is true whether it can be recorded or not: a full
// disk keeps no VM from ending.
func (v *VM) move(e event, reason string) error {
	s, err := next(v.life.State, e)
	if err != nil {
		return err
	}
	was := v.life
	v.life.State, v.life.Reason, v.life.Detail = s, reason, ""
	now := time.Now().UTC().Truncate(time.Millisecond)
	switch {
	case e == evStart:
		v.life.Started, v.life.Ended, v.life.Exit, v.life.Restarts = &now, nil, nil, 0
	case e == evReboot:
		v.life.Restarts++
	case s == banger.StateFailed:
		v.life.Detail = v.consoleEnd()
	}
	if e == evStart || e == evReboot {
		v.life.Stage, v.proc = banger.StageDisks, nil
	}
	if Rests(s) {
		v.life.Ended = &now
		v.life.VMM, v.life.Supervisor, v.life.Confinement, v.life.Ports = nil, nil, nil, nil
	}
	if err := v.save(); err != nil && e == evStart {
		v.life = was
		return err
	}
	close(v.changed)
	v.changed = make(chan struct{})
	return nil
}

// save records the life; the caller holds mu.
func (v *VM) save() error {
	if v.cfg.Save == nil {
		return nil
	}
	return v.cfg.Save(v.life)
}

// record changes what is recorded beside the state. What cannot be written now
// is written with the next change.
func (v *VM) record(change func(*Life)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	change(&v.life)
	v.save()
}

// Note has Save called with the life as it is: what is recorded beside it has
// changed.
func (v *VM) Note() { v.record(func(*Life) {}) }

func (v *VM) reached(s banger.Stage) {
	v.mu.Lock()
	v.life.Stage = s
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

// Start boots the VM and returns when a stage is reached: the network stage,
// or the init stage where the image's init is to be waited for too. If it
// fails, or ctx ends, or a Stop comes, nothing is left running (the VM has
// failed, or is stopped where it was canceled or stopped) and the error names the last stage reached; unless it was the user who ended it, it holds
// the end of the console too.
func (v *VM) Start(ctx context.Context, until banger.Stage) error {
	if s := v.State(); !accept(s, RequestStart) {
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s already", v.id, s)
	}
	return v.start(ctx, evStart, until)
}

// start boots, at first or again.
func (v *VM) start(ctx context.Context, e event, until banger.Stage) error {
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
	if err := v.move(e, ""); err != nil {
		v.mu.Unlock()
		if _, known := errors.AsType[*banger.Error](err); known || errors.Is(err, noSpace) {
			return err
		}
		return banger.Errorf(banger.CodeConflict, "VM %s: %w", v.id, err)
	}
	v.stopBoot, v.bootOver = func() { stopBoot(errStopped) }, over
	v.console.expectKernel()
	v.mu.Unlock()

	err := v.boot(bootCtx, accel, until)
	if err == nil {
		if err = v.to(evBooted, ""); err == nil {
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
	if v.life.State == banger.StateStarting && errors.Is(ctx.Err(), context.Canceled) {
		v.move(evStop, "") // whoever wanted it has gone: that is no failure
	}
	if v.life.State == banger.StateStopping {
		v.move(evExited, "")
	} else {
		v.move(evFailed, err.Error())
	}
	return err
}

// boot spawns the VMM and follows the guest up to a stage.
func (v *VM) boot(ctx context.Context, accel banger.Accel, until banger.Stage) error {
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
		NIC:     v.cfg.NIC,
		Console: tee{v.console, v.cfg.ConsoleLog},
	})
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.proc = proc
	v.mu.Unlock()
	info := proc.Info()
	v.record(func(l *Life) {
		l.Driver, l.Accel, l.Confinement = info.Driver, info.Accel, info.Confinement
		l.VMM, _ = ProcessOf(proc.PID()) // one that has ended already is not there to be found
	})
	v.reached(banger.StageSpawned)

	select {
	case <-v.console.KernelUp():
		v.reached(banger.StageKernel)
	case <-proc.Done():
		return errors.New("the VMM ended")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return v.followBoot(ctx, until)
}

// A tee writes to a VM's console and to its log, if it has one.
type tee struct {
	console *Console
	log     io.Writer
}

func (t tee) Write(p []byte) (int, error) {
	if t.log != nil {
		t.log.Write(p)
	}
	return t.console.Write(p)
}

// writeInitramfs makes the file that the guest starts from: the agent, the
// modules that reach the root, and what is this VM's alone.
func (v *VM) writeInitramfs(path string) error {
	config, err := json.Marshal(wire.BootConfig{
		Version:     wire.Version,
		Token:       v.token,
		Hostname:    v.cfg.Spec.Hostname,
		Base:        formatUUID(v.cfg.RootUUID),
		Overlay:     v.cfg.Disks.Overlay,
		Work:        v.cfg.Disks.Work,
		Modules:     v.cfg.Kernel.ModulesUUID,
		Network:     v.cfg.Network,
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

// followBoot reads the guest's own account of its boot, up to a stage.
func (v *VM) followBoot(ctx context.Context, until banger.Stage) error {
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
			if until != banger.StageInit {
				return nil
			}
		case string(banger.StageInit):
			v.reached(banger.StageInit)
			return nil
		}
	}
	return fmt.Errorf("agent: boot: more than %d events", maxEvents)
}

// bootError turns whatever ended a boot into one error with the last stage
// reached and the end of the console.
func (v *VM) bootError(user, boot context.Context, err error, limit time.Duration) error {
	v.mu.Lock()
	stage, proc := v.life.Stage, v.proc
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
	if e.Detail = v.consoleEnd(); e.Detail == "" {
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

// consoleEnd is the end of the console in words, "" if nothing was written.
func (v *VM) consoleEnd() string {
	lines := v.console.LastLines(20)
	if len(lines) == 0 {
		return ""
	}
	return "the console ends:\n" + strings.Join(lines, "\n")
}

// Reboots of a guest's own are followed, but not for ever: one that comes back
// so soon, so often, is not getting anywhere.
const (
	rebootWindow = time.Minute
	maxReboots   = 5 // within the window
)

// Follow waits until the VM is at rest. A VMM that ends unasked is settled: a
// guest that asked for a reset is started again, one that powered off has
// stopped, and what else ends a VMM is a failure. It is called once after each
// Start that succeeded.
func (v *VM) Follow(ctx context.Context) {
	var reboots []time.Time
	for {
		v.mu.Lock()
		s, proc, changed := v.life.State, v.proc, v.changed
		v.mu.Unlock()
		switch {
		case Rests(s):
			return
		case s != banger.StateRunning && s != banger.StatePaused:
			<-changed // whoever is at it settles it
			continue
		}
		select {
		case <-proc.Done():
		case <-changed:
			continue
		}
		v.stops.Lock() // a Stop that was first has the say
		again := false
		if v.process() == proc {
			again = v.ended(proc, &reboots)
		}
		v.stops.Unlock()
		if again {
			// An error is in the record, and the state at rest.
			if err := v.start(ctx, evReboot, banger.StageNetwork); err != nil {
				v.to(evFailed, err.Error()) // where it did not come to a start
			}
		}
	}
}

// ended settles a VM whose VMM ended unasked, and says whether it is to be
// started again.
func (v *VM) ended(proc vmm.Process, reboots *[]time.Time) (again bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s := v.life.State; s != banger.StateRunning && s != banger.StatePaused {
		return false
	}
	v.removeRun()
	x := proc.Exit()
	switch {
	case v.life.State == banger.StatePaused:
	case x.Cause == vmm.CauseGuestOff:
		v.move(evExited, describe(x))
		return false
	case x.Cause == vmm.CauseGuestReboot:
		now := time.Now()
		*reboots = append(*reboots, now)
		if len(*reboots) > maxReboots {
			*reboots = (*reboots)[1:]
		}
		if len(*reboots) < maxReboots || now.Sub((*reboots)[0]) > rebootWindow {
			return true
		}
		v.move(evFailed, fmt.Sprintf("the guest rebooted %d times within %v", maxReboots, rebootWindow))
		return false
	}
	v.move(evFailed, "the VMM ended: "+describe(x))
	return false
}

// WaitRunning waits until the VM that broke a session is settled; true when it
// runs again, false when it is at rest or ctx ended.
func (v *VM) WaitRunning(ctx context.Context) bool {
	for {
		v.mu.Lock()
		s, proc, changed := v.life.State, v.proc, v.changed
		v.mu.Unlock()
		switch {
		case Rests(s):
			return false
		case s == banger.StateRunning && !isDone(proc):
			// A stream can break a little before its VMM is known to have ended.
			select {
			case <-proc.Done():
				continue
			case <-changed:
				continue
			case <-time.After(endWait):
				return true
			case <-ctx.Done():
				return false
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// SetExit records how the main command ended.
func (v *VM) SetExit(code int) { v.record(func(l *Life) { l.Exit = &code }) }

// Pause stops the guest's CPUs and Resume lets them go on.
func (v *VM) Pause(ctx context.Context) error {
	return v.setPaused(ctx, RequestPause, evPaused, vmm.Process.Pause)
}

// Resume is the way back from Pause.
func (v *VM) Resume(ctx context.Context) error {
	return v.setPaused(ctx, RequestResume, evResumed, vmm.Process.Resume)
}

func (v *VM) setPaused(ctx context.Context, r Request, e event, do func(vmm.Process, context.Context) error) error {
	v.stops.Lock()
	defer v.stops.Unlock()
	if s := v.State(); !accept(s, r) {
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s, so there is nothing to %s", v.id, s, r)
	}
	if err := do(v.process(), ctx); err != nil {
		return fmt.Errorf("VM %s: %s: %w", v.id, r, err)
	}
	return v.to(e, "")
}

// Kill ends a VM at once: its guest is not asked. Killing what is at rest does
// nothing.
func (v *VM) Kill() error {
	v.mu.Lock()
	s, proc, bootOver := v.life.State, v.proc, v.bootOver
	mine := s == banger.StateRunning || s == banger.StatePaused
	switch {
	case s == banger.StateStarting:
		v.move(evStop, "")
		v.stopBoot()
	case mine:
		v.move(evStop, "") // from here on the end is no surprise to Follow
	}
	v.mu.Unlock()
	switch {
	case Rests(s):
		return nil
	case s == banger.StateStarting, proc == nil:
		<-bootOver
		return nil
	}
	err := kill(proc)
	if err != nil {
		err = fmt.Errorf("VM %s: %w", v.id, err)
	}
	switch {
	case !mine: // a Stop is at it, and has what it waits for
		return err
	case err != nil:
		v.to(evFailed, err.Error())
		return err
	}
	v.removeRun()
	if err := v.to(evExited, "killed on request"); err != nil && !Rests(v.State()) {
		return err
	}
	return nil
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
	s, proc, bootOver := v.life.State, v.proc, v.bootOver
	if s == banger.StateStarting {
		err = v.move(evStop, "")
		v.stopBoot()
	}
	v.mu.Unlock()
	switch {
	case !accept(s, RequestStop):
		return false, banger.Errorf(banger.CodeConflict, "VM %s: it is %s", v.id, s)
	case s == banger.StateStarting, s == banger.StateStopping: // the latter by a Kill
		<-bootOver
		return false, err
	case s != banger.StateRunning && s != banger.StatePaused:
		return true, nil
	case isDone(proc): // unasked, or by a Kill
		return v.stopEnded(s, proc)
	}
	if s == banger.StatePaused {
		resumeCtx, cancel := context.WithTimeout(ctx, stopVMM)
		proc.Resume(resumeCtx) // where it fails the guest stays silent and is ended below
		cancel()
	}
	if err := v.to(evStop, ""); err != nil {
		v.awaitRest() // a Kill was faster
		return false, nil
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
			v.to(evFailed, err.Error())
			return false, fmt.Errorf("VM %s: %w", v.id, err)
		}
	}
	v.removeRun()
	clean, reason := proc.Exit().Cause == vmm.CauseGuestOff, ""
	if !clean {
		reason = "the guest did not power off by itself"
	}
	return clean, v.to(evExited, reason)
}

// stopEnded is Stop for a VM whose VMM has ended already, which was in state s
// when Stop looked. A Kill may have ended it, and then settles it.
func (v *VM) stopEnded(s banger.State, proc vmm.Process) (clean bool, err error) {
	v.mu.Lock()
	if v.life.State != s {
		v.mu.Unlock()
		v.awaitRest()
		return false, nil
	}
	defer v.mu.Unlock()
	v.removeRun()
	x := proc.Exit()
	if s == banger.StateRunning && (x.Cause == vmm.CauseGuestOff || x.Cause == vmm.CauseGuestReboot) {
		return x.Cause == vmm.CauseGuestOff, v.move(evExited, "")
	}
	return false, v.move(evFailed, "the VMM ended: "+describe(x))
}

// awaitRest waits for who is ending the VM.
func (v *VM) awaitRest() {
	for {
		v.mu.Lock()
		s, changed := v.life.State, v.changed
		v.mu.Unlock()
		if Rests(s) {
			return
		}
		<-changed
	}
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
