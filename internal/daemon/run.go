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
	"banger/internal/vm"
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

// prepare finds an image and a kernel, and gets what is not in the store.
func (d *daemon) prepare(ctx context.Context, c *api.Call) (any, error) {
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	return d.prepared(ctx, c, r, true)
}

// prepared is what prepare and the resident daemon, which gets nothing, share.
func (d *daemon) prepared(ctx context.Context, c *api.Call, r *rooms, get bool) (any, error) {
	var p api.PrepareParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	t := newTrace(c)
	src, ref, err := d.source(c, p.Source)
	if err != nil {
		return nil, err
	}
	k, err := r.kernels.Get(p.Kernel)
	if get && p.Kernel == "" && banger.CodeOf(err) == banger.CodeNotFound {
		t.mark()
		k, err = d.pullKernel(ctx, c, r, kernel.DefaultSuite)
		if err != nil {
			return nil, fmt.Errorf("no kernel is in the store yet, and none could be had: %w", err)
		}
		t.next("kernel pull")
	}
	if err != nil {
		return nil, err
	}
	t.mark()
	text := p.Source.Reference
	if len(src.Packages) > 0 {
		text = "" // what has that name alone is another image
	}
	trim := trimOf(p.Source, ref)
	name := image.NameOf(src, ref, trim)
	im, err := r.lookUp(name, text)
	if err == nil && p.Source.Trim != nil && im.Trimmed != trim {
		// Found by what the user called it, and not what is asked for. What is
		// a reference as well can be had anew.
		code := banger.CodeUsage
		if im.Name == src.Name(ref) {
			code = banger.CodeNotFound
		}
		im, err = nil, banger.Errorf(code, "image %q: what is in the store is not what --trim=%v asks for", im.Name, trim).
			WithHint("leave --trim out, or get it once more under another name, with --trim=%v", trim)
	}
	switch {
	case err == nil:
		t.next("resolve")
	case !get || banger.CodeOf(err) != banger.CodeNotFound:
		return nil, err
	case name == "":
		return nil, banger.Errorf(banger.CodeUsage, "image %q: it has no name of its own", ref).
			WithHint("pull it under one: `banger image pull --name NAME %s`, then `banger run NAME`", ref)
	default:
		if im, err = d.pull(ctx, c, r, src, ref, image.PullOptions{Trim: trim, OnStep: t.step}); err != nil {
			return nil, err
		}
	}
	return api.Prepared{Image: im.Name, ImageID: im.ID, Kernel: k.Version}, nil
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

// mainOf is the main command of a VM: what the image starts, with what the
// user gave in place of its Cmd. Without a command of the user's, an image
// that only starts a shell, and one whose own init is asked for, have none.
func mainOf(config banger.ImageConfig, spec banger.Spec) []string {
	if len(spec.Command) == 0 && (spec.Init == "image" || len(config.Entrypoint) == 0 && len(config.Cmd) > 0 && wire.IsShell(config.Cmd)) {
		return nil
	}
	return command(config, spec.Command)
}

// fill completes a session by what the image says.
func fill(exec wire.Exec, config banger.ImageConfig) wire.Exec {
	exec.Env = slices.Concat(config.Env, exec.Env)
	if exec.User == "" {
		exec.User = config.User
	}
	if exec.Dir == "" {
		exec.Dir = config.WorkingDir
	}
	return exec
}

// session runs a command and passes its frames on until it exits.
func session(ctx context.Context, c *api.Call, v *vm.VM, config banger.ImageConfig, exec wire.Exec) (wire.Exit, error) {
	var exit wire.Exit
	t := newTrace(c)
	exec = fill(exec, config)
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
			return exit, sessionError(ctx, s, err)
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
func sessionError(ctx context.Context, s *vm.Session, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var known *banger.Error
	if errors.As(err, &known) {
		return err
	}
	select {
	case <-s.Done():
		return s.EndError()
	case <-time.After(vmEndWait):
		return &banger.Error{Code: banger.CodeGuest, Message: err.Error(), Err: err}
	}
}
