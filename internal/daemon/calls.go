package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/wire"
)

// What the API of the resident daemon does with one VM each.

// one wraps what acts on one VM: it is found, and shown as it is afterwards.
func (m *manager) one(f func(ctx context.Context, c *api.Call, e *entry, p api.VMParams) error) api.Handler {
	return func(ctx context.Context, c *api.Call) (any, error) {
		p := api.VMParams{TimeoutMs: -1}
		if err := c.Params(&p); err != nil {
			return nil, err
		}
		e, err := m.find(p.Name)
		if err != nil {
			return nil, err
		}
		if err := e.check(); err != nil && !p.Force {
			return nil, err
		}
		if err := f(ctx, c, e, p); err != nil {
			return nil, err
		}
		return m.show(e), nil
	}
}

func (m *manager) create(ctx context.Context, c *api.Call) (any, error) {
	var p api.CreateParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	e, err := m.make(ctx, p, false)
	if err != nil {
		return nil, err
	}
	return m.show(e), nil
}

func (m *manager) startCall(ctx context.Context, c *api.Call, e *entry, p api.VMParams) error {
	return m.start(ctx, e, startParams{Wait: p.Wait}, c.Emit)
}

func (m *manager) stopCall(ctx context.Context, _ *api.Call, e *entry, p api.VMParams) error {
	return m.stop(ctx, e, p.TimeoutMs)
}

func (m *manager) restartCall(ctx context.Context, c *api.Call, e *entry, p api.VMParams) error {
	if err := m.stop(ctx, e, p.TimeoutMs); err != nil {
		return err
	}
	return m.start(ctx, e, startParams{Wait: p.Wait}, c.Emit)
}

func (m *manager) killCall(ctx context.Context, _ *api.Call, e *entry, _ api.VMParams) error {
	if _, rested := m.look(e); rested == nil {
		return banger.Errorf(banger.CodeConflict, "VM %s: it does not run", e.name())
	}
	return m.kill(ctx, e)
}

func (m *manager) pauseCall(ctx context.Context, _ *api.Call, e *entry, _ api.VMParams) error {
	return m.askRunning(ctx, e, vm.RequestPause, supervisorPause)
}

func (m *manager) resumeCall(ctx context.Context, _ *api.Call, e *entry, _ api.VMParams) error {
	return m.askRunning(ctx, e, vm.RequestResume, supervisorResume)
}

func (m *manager) askRunning(ctx context.Context, e *entry, r vm.Request, method string) error {
	if life, _ := m.look(e); !vm.Accept(life.State, r) {
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s, so there is nothing to %s", e.name(), life.State, r)
	}
	return m.ask(ctx, e, method, api.None{}, nil)
}

func (m *manager) removeCall(ctx context.Context, _ *api.Call, e *entry, p api.VMParams) error {
	return m.remove(ctx, e, p.Force)
}

func (m *manager) inspectCall(context.Context, *api.Call, *entry, api.VMParams) error { return nil }

// attachCall hands the connection in the call's file to the VM's supervisor.
func (m *manager) attachCall(ctx context.Context, c *api.Call, e *entry, p api.VMParams) error {
	f, err := c.File(0)
	if err != nil {
		return err
	}
	if p.Start {
		if err := m.start(ctx, e, startParams{Wait: p.Wait}, c.Emit); err != nil {
			return err
		}
	}
	if life, _ := m.look(e); !vm.Accept(life.State, vm.RequestExec) {
		hint := fmt.Sprintf("`banger start %s`", e.name())
		if life.State == banger.StatePaused {
			hint = fmt.Sprintf("`banger resume %s`", e.name())
		}
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s, so it runs no commands", e.name(), life.State).WithHint("%s", hint)
	}
	return m.ask(ctx, e, supervisorServe, serveParams{}, []*os.File{f})
}

// errRetiring ends the daemon's part of a run: the daemon goes, and the session
// stays. What is left to do at its end is the client's.
var errRetiring = banger.Errorf(banger.CodeUnavailable, "daemon: it makes way for another")

// run makes a VM that lives as long as one session of the client's, on the
// connection in the call's file. The daemon hands that to the supervisor, so
// the session outlives the daemon.
func (m *manager) run(ctx context.Context, c *api.Call) (any, error) {
	var p api.RunParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	f, err := c.File(0)
	if err != nil {
		return nil, err
	}
	t := newTrace(c)
	e, err := m.make(ctx, p.Create, true)
	if err != nil {
		return nil, err
	}
	t.next("disks")
	base := time.Since(t.start).Microseconds()
	err = m.start(ctx, e, startParams{Wait: p.Wait, Bare: true}, func(ev api.Event) {
		if ev.Stage != nil {
			ev.Stage.StartUs += base
			ev.Stage.EndUs += base
		}
		c.Emit(ev)
	})
	if err == nil {
		err = m.ask(ctx, e, supervisorServe, serveParams{Lease: true}, []*os.File{f})
	}
	if err == nil {
		shown := m.show(e)
		c.Emit(api.Event{VM: &shown})
		_, rested := m.look(e)
		// Until the client says that it is done, or the VM is.
		for waiting := rested != nil; waiting; {
			select {
			case frame, ok := <-c.Input:
				waiting = ok && frame.Type != wire.FrameStdinEOF
			case <-rested:
				waiting = false
			case <-ctx.Done():
				waiting = false
			case <-m.retiring.Done():
				return nil, errRetiring
			}
		}
	}
	if m.ctx.Err() != nil {
		return nil, errRetiring
	}
	// What was asked for is over: whoever asked may be gone.
	after := context.WithoutCancel(ctx)
	t.mark()
	stopErr := m.stop(after, e, -1)
	t.next("stop")
	if e.rec.Ephemeral {
		if rmErr := m.removeNow(after, e, true); rmErr != nil && banger.CodeOf(rmErr) != banger.CodeNotFound {
			stopErr = errors.Join(stopErr, rmErr)
		}
	}
	if err = errors.Join(err, stopErr); err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return api.None{}, err
}

func (m *manager) list(context.Context, *api.Call) (any, error) {
	out := api.VMs{VMs: []banger.VM{}}
	for _, e := range m.all() {
		out.VMs = append(out.VMs, m.show(e))
	}
	return out, nil
}

// logs sends a log of a VM, running or not.
func (m *manager) logs(ctx context.Context, c *api.Call) (any, error) {
	var p api.LogParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	e, err := m.sound(p.Name)
	if err != nil {
		return nil, err
	}
	name := store.VMOutput
	if p.Console {
		name = store.VMConsole
	} else if len(e.rec.Main) == 0 {
		c.Emit(api.Event{Notice: fmt.Sprintf("VM %s has no main command; --console shows its console", e.name())})
	}
	var more func() bool
	if p.Follow {
		more = func() bool { _, rested := m.look(e); return rested != nil }
	}
	return api.None{}, vm.ReadLog(ctx, filepath.Join(m.store.VM(e.id), name), more, func(b []byte) error {
		return c.Send(wire.Frame{Type: wire.FrameStdout, Payload: b})
	})
}

// stats reads the counters of running VMs.
func (m *manager) stats(_ context.Context, c *api.Call) (any, error) {
	var names []string
	if err := c.Params(&names); err != nil {
		return nil, err
	}
	var list []*entry
	for _, name := range names {
		e, err := m.find(name)
		if err != nil {
			return nil, err
		}
		if err := e.check(); err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	if len(names) == 0 {
		list = m.all()
	}
	out := api.StatsList{Stats: []api.Stats{}}
	for _, e := range list {
		life, rested := m.look(e)
		if rested == nil || life.VMM == nil {
			if len(names) > 0 {
				return nil, banger.Errorf(banger.CodeConflict, "VM %s: it is %s, so it uses nothing", e.name(), life.State)
			}
			continue
		}
		s := api.Stats{Name: e.rec.Name, ID: e.id, CPUs: e.rec.Spec.CPUs, LimitBytes: e.rec.Spec.MemoryBytes}
		for _, d := range m.show(e).Disks {
			if d.Role != "base" {
				s.AllocatedBytes += d.AllocatedBytes
			}
		}
		if err := readUsage(life.VMM, &s); err == nil { // else it ended just now
			out.Stats = append(out.Stats, s)
		}
	}
	return out, nil
}

// readUsage reads what a process used, of /proc (proc_pid_stat(5) fields 14
// and 15, proc_pid_statm(5), proc_pid_io(5)).
func readUsage(p *vm.Process, s *api.Stats) error {
	const maxBytes, ticksPerSecond = 16 << 10, 100 // USER_HZ of every Linux that Go runs on
	read := func(name string) ([]byte, error) {
		f, err := os.Open(fmt.Sprintf("/proc/%d/%s", p.PID, name))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return io.ReadAll(io.LimitReader(f, maxBytes))
	}
	stat, err := read("stat")
	if err != nil {
		return err
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 13 {
		return errors.New("stat: too few fields")
	}
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			return err
		}
		ticks += n
	}
	s.CPUNs = ticks * int64(time.Second) / ticksPerSecond
	statm, err := read("statm")
	if err != nil {
		return err
	}
	if fields := bytes.Fields(statm); len(fields) > 1 {
		pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
		if err != nil {
			return err
		}
		s.MemoryBytes = pages * int64(os.Getpagesize())
	}
	if io, err := read("io"); err == nil { // a confined process may not be looked at so closely
		for line := range bytes.Lines(io) {
			key, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(": "))
			n, _ := strconv.ParseInt(string(value), 10, 64)
			switch string(key) {
			case "read_bytes":
				s.ReadBytes = n
			case "write_bytes":
				s.WrittenBytes = n
			}
		}
	}
	if !p.Alive() {
		return errors.New("it is another process")
	}
	return nil
}

// scoped is the beginning of a supervisor's command by which systemd's user
// manager, if this user has one, puts it in a scope of its own: then neither
// the end of the daemon's unit nor a logout of a lingering user ends it, and
// the scope limits the memory. Nil: the session of its own has to do.
func scoped(rec vm.Record) []string {
	run := os.Getenv("XDG_RUNTIME_DIR")
	if run == "" {
		return nil
	}
	if _, err := os.Stat(filepath.Join(run, "systemd", "private")); err != nil {
		return nil
	}
	systemdRun, err := exec.LookPath("systemd-run")
	if err != nil {
		return nil
	}
	return []string{
		systemdRun, "--user", "--scope", "--quiet", "--collect", "--unit=banger-" + rec.ID,
		"--property=MemoryMax=" + strconv.FormatInt(rec.Spec.MemoryBytes+vmOverheadBytes, 10),
		"--property=TasksMax=" + strconv.Itoa(maxTasks), "--",
	}
}

const (
	// vmOverheadBytes is what a VM may use beside its guest's memory: the VMM,
	// its translated code, the supervisor, and the page cache of its disks.
	vmOverheadBytes = 2 << 30
	maxTasks        = 1024
)

// madeUpName is a name for a VM whose user gave none.
func madeUpName() string {
	return madeUp[0][rand.IntN(len(madeUp[0]))] + "-" + madeUp[1][rand.IntN(len(madeUp[1]))] + "-" + strconv.Itoa(rand.IntN(1000))
}

var madeUp = [2][]string{
	{"amber", "bold", "brisk", "calm", "clear", "crisp", "deep", "eager", "early", "fair", "fast", "fresh", "gentle", "glad", "grand",
		"green", "keen", "kind", "light", "lucky", "mild", "neat", "noble", "plain", "proud", "quick", "quiet", "ready", "sharp", "steady", "swift", "warm"},
	{"badger", "beech", "brook", "cedar", "cliff", "cove", "crane", "delta", "elm", "falcon", "fern", "finch", "fjord", "harbor", "heron",
		"juniper", "lake", "larch", "lynx", "maple", "marten", "meadow", "otter", "pine", "raven", "reef", "ridge", "river", "stone", "tern", "valley", "willow"},
}
