package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/api"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm/qemu"
	"banger/internal/wire"
)

// hostReserveBytes is what a VM must leave of the host's memory.
const hostReserveBytes = 256 << 20

// ephemeralGrace is what the services of a VM get to end when nothing of the
// VM will be kept. The disks are put in order all the same.
const ephemeralGrace = time.Second

// trace turns the ends of steps into the waterfall of a run.
type trace struct {
	c     *api.Call
	start time.Time

	mu   sync.Mutex
	last time.Time // end of the step before
}

func newTrace(c *api.Call) *trace {
	now := time.Now()
	return &trace{c: c, start: now, last: now}
}

// step reports a step that took from start to end.
func (t *trace) step(name string, start, end time.Time) {
	t.c.Emit(api.Event{Stage: &api.Stage{
		Name:    name,
		StartUs: start.Sub(t.start).Microseconds(),
		EndUs:   end.Sub(t.start).Microseconds(),
	}})
}

// next reports a step that began where the one before ended.
func (t *trace) next(name string) {
	t.mu.Lock()
	start, end := t.last, time.Now()
	t.last = end
	t.mu.Unlock()
	t.step(name, start, end)
}

// mark begins the next step now.
func (t *trace) mark() {
	t.mu.Lock()
	t.last = time.Now()
	t.mu.Unlock()
}

// run makes an ephemeral VM, runs one session in it, and leaves nothing of it.
func (d *daemon) run(ctx context.Context, c *api.Call) (result any, err error) {
	var p api.RunParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	t := newTrace(c)
	if err := checkSpec(p.Spec); err != nil {
		return nil, err
	}
	driver := qemu.New()
	info, err := driver.Probe(ctx, p.Spec.Accel)
	if err != nil {
		return nil, err
	}
	p.Spec.Accel = info.Accel // found out once
	if info.Accel == banger.AccelTCG {
		c.Emit(api.Event{Notice: fmt.Sprintf("no KVM (%s): the VM is emulated, slowly, and is no boundary against what runs in it", info.Reason)})
	}
	agent, err := api.Companion(api.AgentProgram)
	if err != nil {
		return nil, err
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	t.mark()
	im, k, err := d.imageAndKernel(ctx, c, r, p, t)
	if err != nil {
		return nil, err
	}
	release, err := r.images.Hold(im)
	if err != nil {
		return nil, err
	}
	defer release()
	args := command(im.Config, p.Command)

	id := store.NewID()
	hold, err := r.store.HoldVM(id)
	if err != nil {
		return nil, err
	}
	defer func() {
		// The folder goes before the hold: nobody else may find it abandoned.
		if rmErr := r.store.Remove(r.store.VM(id)); err == nil && rmErr != nil {
			err = rmErr
		}
		hold.Close()
	}()
	t.mark()
	v, err := vm.New(vm.Config{
		ID: id, Store: r.store, Spec: p.Spec, Config: im.Config,
		Rootfs: im.Rootfs, RootUUID: im.UUID, Kernel: k, Agent: agent, Driver: driver, Grace: ephemeralGrace,
		OnStage: func(s banger.Stage) { t.next(stepOf[s]) },
	})
	if err != nil {
		return nil, err
	}
	if err := v.Start(ctx); err != nil {
		return nil, err
	}
	exit, err := d.session(ctx, c, v, p, im.Config, args, t)
	t.mark()
	clean, stopErr := v.Stop(context.WithoutCancel(ctx))
	t.next("stop")
	if err != nil {
		return nil, err
	}
	if stopErr != nil {
		return nil, stopErr
	}
	return api.RunResult{Exit: exit, Clean: clean}, nil
}

// stepOf names the step of the waterfall that ends with a stage.
var stepOf = map[banger.Stage]string{
	banger.StageDisks:   "disks",
	banger.StageSpawned: "VMM",
	banger.StageKernel:  "kernel",
	banger.StageAgent:   "agent",
	banger.StageNetwork: "network",
}

// checkSpec refuses what this host cannot give, before anything is fetched.
func checkSpec(s banger.Spec) error {
	if s.CPUs < 0 {
		return banger.Errorf(banger.CodeUsage, "cpus: %d is no number of CPUs", s.CPUs)
	}
	if s.MemoryBytes < 0 {
		return banger.Errorf(banger.CodeUsage, "memory: %d bytes is no size", s.MemoryBytes)
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return fmt.Errorf("host memory: %w", err)
	}
	hostBytes := int64(si.Totalram) * int64(si.Unit)
	if limit := hostBytes - hostReserveBytes; s.MemoryBytes > limit {
		return banger.Errorf(banger.CodeUnavailable, "memory: %d MiB asked for, the host has %d MiB", s.MemoryBytes>>20, hostBytes>>20).
			WithHint("ask for at most %d MiB with -m", limit>>20)
	}
	switch s.Init {
	case "", "auto", "image", "agent":
	default:
		return banger.Errorf(banger.CodeUsage, "init %q: it is auto, image or agent", s.Init)
	}
	switch s.Accel {
	case "", banger.AccelAuto, banger.AccelKVM, banger.AccelTCG:
	default:
		return banger.Errorf(banger.CodeUsage, "accel %q: it is auto, kvm or tcg", s.Accel)
	}
	return nil
}

// imageAndKernel finds the image and the kernel, and gets what is not there.
func (d *daemon) imageAndKernel(ctx context.Context, c *api.Call, r *rooms, p api.RunParams, t *trace) (*image.Image, *kernel.Kernel, error) {
	src, ref, err := d.source(c, p.Source)
	if err != nil {
		return nil, nil, err
	}
	k, err := r.kernels.Get(p.Spec.Kernel)
	if p.Spec.Kernel == "" && banger.CodeOf(err) == banger.CodeNotFound {
		start := time.Now()
		k, err = d.pullKernel(ctx, c, r, kernel.DefaultSuite)
		if err != nil {
			return nil, nil, fmt.Errorf("no kernel is in the store yet, and none could be had: %w", err)
		}
		t.step("kernel pull", start, time.Now())
	}
	if err != nil {
		return nil, nil, err
	}
	start := time.Now()
	text := p.Source.Reference
	if len(src.Packages) > 0 {
		text = "" // what has that name alone is another image
	}
	im, err := r.lookUp(src.Name(ref), text)
	if banger.CodeOf(err) != banger.CodeNotFound {
		t.step("resolve", start, time.Now())
		return im, k, err
	}
	if src.Name(ref) == "" {
		return nil, nil, banger.Errorf(banger.CodeUsage, "image %q: it has no name of its own", ref).
			WithHint("pull it under one: `banger image pull --name NAME %s`, then `banger run NAME`", ref)
	}
	im, err = d.pull(ctx, c, r, src, ref, "", t.step)
	return im, k, err
}

// inits are commands that are PID 1 or nothing.
var inits = []string{"init", "systemd", "openrc-init"}

// command decides what the session runs. What the user gave takes the place
// of the image's Cmd, as in Docker. An empty list asks the agent for the
// user's login shell.
func command(config banger.ImageConfig, given []string) []string {
	own := slices.Concat(config.Entrypoint, config.Cmd)
	isInit := len(own) > 0 && slices.Contains(inits, path.Base(own[0]))
	switch {
	case len(given) > 0 && isInit:
		return given // the image's command is PID 1 already
	case len(given) > 0:
		return slices.Concat(config.Entrypoint, given)
	case isInit, len(own) == 0:
		return nil
	}
	return own
}

// session runs the command and passes its frames on until it exits.
func (d *daemon) session(ctx context.Context, c *api.Call, v *vm.VM, p api.RunParams, config banger.ImageConfig, args []string, t *trace) (wire.Exit, error) {
	var exit wire.Exit
	exec := p.Session
	exec.Args = args
	exec.Env = slices.Concat(config.Env, exec.Env)
	if exec.User == "" {
		exec.User = config.User
	}
	if exec.Dir == "" {
		exec.Dir = config.WorkingDir
	}
	t.mark()
	s, err := v.Exec(ctx, exec)
	if err != nil {
		return exit, err
	}
	defer s.Close()
	t.next("exec")
	// The end of the call ends the session, whatever it waits for.
	defer context.AfterFunc(ctx, func() { s.Close() })()
	c.Emit(api.Event{Started: true})
	go func() {
		broken := false
		for f := range c.Input { // to its end, so that a cancel behind it is always read
			if !broken {
				broken = s.Send(f) != nil
			}
		}
	}()
	for first := true; ; {
		f, err := s.Recv()
		if err != nil {
			return exit, d.sessionError(ctx, v, err)
		}
		if first && f.Type != wire.FrameCredit {
			t.next("first byte")
			first = false
		}
		if f.Type == wire.FrameExit {
			return exit, json.Unmarshal(f.Payload, &exit)
		}
		if err := c.Send(f); err != nil {
			return exit, err
		}
	}
}

// vmEndWait is how long the end of a session waits to learn that it was the
// end of the VM.
const vmEndWait = 2 * time.Second

// sessionError says why a session broke off.
func (d *daemon) sessionError(ctx context.Context, v *vm.VM, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var known *banger.Error
	if errors.As(err, &known) {
		return err
	}
	select {
	case <-v.Done():
		return v.EndError()
	case <-time.After(vmEndWait):
		return &banger.Error{Code: banger.CodeGuest, Message: err.Error(), Err: err}
	}
}
