package vm

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"banger"
	"banger/internal/kernel"
	"banger/internal/store"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest"
	"banger/internal/wire"
)

// wait bounds whatever must happen soon.
const wait = 20 * time.Second

// setLimits makes the time limits of this test short.
func setLimits(t *testing.T) {
	t.Helper()
	for limit, short := range map[*time.Duration]time.Duration{
		&bootTimeoutTCG: 2 * time.Second, &replyTimeout: time.Second, &stopGuest: time.Second,
		&stopVMM: 200 * time.Millisecond, &killWait: 50 * time.Millisecond, &endWait: 500 * time.Millisecond,
	} {
		old := *limit
		*limit = short
		t.Cleanup(func() { *limit = old })
	}
}

// An agent is the guest's side of the protocol. A nil part does what a good
// guest does.
type agent struct {
	boot     func(g *vmmtest.FakeGuest, conn net.Conn) // after the reply
	exec     func(g *vmmtest.FakeGuest, conn net.Conn, e *wire.Exec)
	shutdown func(g *vmmtest.FakeGuest, conn net.Conn)
	raw      func(g *vmmtest.FakeGuest, conn net.Conn, req wire.Request) bool // instead of all; false: not this one
}

func (a agent) serve(g *vmmtest.FakeGuest, port uint32, conn net.Conn) {
	defer conn.Close()
	var req wire.Request
	if port != wire.AgentPort || wire.ReadMessage(conn, &req) != nil || req.Version != wire.Version || len(req.Token) != 64 {
		return
	}
	if a.raw != nil && a.raw(g, conn, req) {
		return
	}
	if req.Op != wire.OpExec || a.exec == nil {
		admit(conn)
	}
	switch req.Op {
	case wire.OpBoot:
		if a.boot != nil {
			a.boot(g, conn)
			return
		}
		for _, stage := range []string{"kernel", "modules", "disks", "root", "agent", "network"} {
			tell(conn, wire.BootEvent{Stage: stage})
		}
	case wire.OpExec:
		if a.exec != nil {
			a.exec(g, conn, req.Exec)
			return
		}
		wire.WriteFrame(conn, wire.FrameStdout, []byte("out"))
		exit(conn, `{"code":0}`)
	case wire.OpShutdown:
		if a.shutdown != nil {
			a.shutdown(g, conn)
			return
		}
		g.PowerOff()
	}
}

func admit(conn net.Conn) { wire.WriteMessage(conn, wire.Reply{Version: wire.Version}) }

func tell(conn net.Conn, e wire.BootEvent) error {
	data, _ := json.Marshal(e)
	return wire.WriteFrame(conn, wire.FrameEvent, data)
}

func exit(conn net.Conn, text string) { wire.WriteFrame(conn, wire.FrameExit, []byte(text)) }

// message is text as a message on the wire.
func message(text string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(len(text)))) + text
}

// silent waits until the other side goes.
func silent(conn net.Conn) { io.Copy(io.Discard, conn) }

// newVM makes a VM on a driver, with its folder in a store of its own.
func newVM(t *testing.T, driver vmm.Driver, change func(*Config)) (*VM, *store.Store) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"rootfs", "vmlinux", "agent", "modules"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := store.Open(filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	id := store.NewID()
	if err := os.Mkdir(s.VM(id), 0o700); err != nil {
		t.Fatal(err)
	}
	disks, err := MakeDisks(s.VM(id), "")
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		ID: id, Store: s, Driver: driver, Disks: disks,
		Rootfs: filepath.Join(dir, "rootfs"),
		Agent:  filepath.Join(dir, "agent"),
		Kernel: &kernel.Kernel{Kernel: banger.Kernel{Vmlinux: filepath.Join(dir, "vmlinux"), Modules: filepath.Join(dir, "modules")}},
	}
	if change != nil {
		change(&cfg)
	}
	return New(cfg), s
}

// fake makes a VM whose guest is a.
func fake(t *testing.T, a agent, opt vmmtest.Options) (*VM, *vmmtest.Fake) {
	t.Helper()
	opt.Serve = a.serve
	f := vmmtest.NewFake(opt)
	v, _ := newVM(t, f, nil)
	return v, f
}

// started is fake after a good boot.
func started(t *testing.T, a agent, opt vmmtest.Options) (*VM, *vmmtest.Fake) {
	t.Helper()
	v, f := fake(t, a, opt)
	if err := v.Start(t.Context(), banger.StageNetwork); err != nil {
		t.Fatal(err)
	}
	return v, f
}

// nothingRuns checks that a VM holds its disks and nothing else.
func nothingRuns(t *testing.T, v *VM, f *vmmtest.Fake, state banger.State) {
	t.Helper()
	if got := v.State(); got != state {
		t.Errorf("the VM is %s, want %s", got, state)
	}
	for i, g := range f.Guests() {
		if !isDone(g) {
			t.Errorf("machine %d still runs", i)
		}
	}
	entries, err := os.ReadDir(v.cfg.Store.VM(v.id))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if !slices.Equal(names, []string{store.VMOverlay, store.VMWork}) {
		t.Errorf("its folder holds %q", names)
	}
}

func TestLife(t *testing.T) {
	var stages []banger.Stage
	opt := vmmtest.Options{Serve: agent{}.serve}
	f := vmmtest.NewFake(opt)
	v, s := newVM(t, f, func(cfg *Config) {
		cfg.Spec.Hostname = "name"
		cfg.OnStage = func(s banger.Stage) { stages = append(stages, s) }
	})
	nothingRuns(t, v, f, banger.StateCreated)
	base, err := os.ReadFile(v.cfg.Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 2 { // a VM that was stopped starts again
		stages = stages[:0]
		if err := v.Start(t.Context(), banger.StageNetwork); err != nil {
			t.Fatalf("start %d: %v", round, err)
		}
		if v.State() != banger.StateRunning {
			t.Errorf("the VM is %s", v.State())
		}
		want := []banger.Stage{banger.StageSpawned, banger.StageKernel, banger.StageAgent, banger.StageNetwork}
		if !slices.Equal(stages, want) {
			t.Errorf("stages %q, want %q", stages, want)
		}
		m := f.Guests()[round].Machine()
		if m.ID != v.id || m.RunDir != s.VMRun(v.id) || m.Accel != banger.AccelTCG ||
			m.CPUs != min(banger.DefaultCPUs, runtime.NumCPU()) || m.MemoryBytes != banger.DefaultMemoryBytes {
			t.Errorf("machine %+v", m)
		}
		drives := []vmm.Drive{
			{Path: v.cfg.Rootfs, ReadOnly: true}, {Path: filepath.Join(s.VM(v.id), store.VMOverlay)},
			{Path: filepath.Join(s.VM(v.id), store.VMWork)}, {Path: v.cfg.Kernel.Modules, ReadOnly: true},
		}
		if !slices.Equal(m.Drives, drives) {
			t.Errorf("drives %+v, want %+v", m.Drives, drives)
		}
		initramfs, err := os.ReadFile(m.Boot.Initrd)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range []string{`"hostname":"name"`, `"init":"auto"`, v.token, v.cfg.Disks.Overlay, v.cfg.Disks.Work} {
			if !strings.Contains(string(initramfs), part) {
				t.Errorf("the initramfs has no %s", part)
			}
		}
		if words := strings.Join(m.Boot.Args, " "); strings.Contains(words, v.token) {
			t.Errorf("the token is on the command line: %s", words)
		}
		if err := v.Start(t.Context(), banger.StageNetwork); banger.CodeOf(err) != banger.CodeConflict {
			t.Errorf("started twice: %v", err)
		}
		select {
		case <-v.process().Done():
			t.Error("done while it runs")
		default:
		}
		clean, err := v.Stop(t.Context())
		if err != nil || !clean {
			t.Errorf("stop: clean %v, %v", clean, err)
		}
		<-v.process().Done()
		nothingRuns(t, v, f, banger.StateStopped)
		if clean, err := v.Stop(t.Context()); err != nil || !clean {
			t.Errorf("stopped again: clean %v, %v", clean, err)
		}
	}
	if now, err := os.ReadFile(v.cfg.Rootfs); err != nil || string(now) != string(base) {
		t.Errorf("the base image changed: %v", err)
	}
	if _, err := v.Exec(t.Context(), wire.Exec{}); banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("exec in a VM that is stopped: %v", err)
	}
}

func TestDisksAreNeverReplaced(t *testing.T) {
	v, _ := fake(t, agent{}, vmmtest.Options{})
	before, err := os.Stat(filepath.Join(v.cfg.Store.VM(v.id), store.VMWork))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := MakeDisks(v.cfg.Store.VM(v.id), ""); !errors.Is(err, os.ErrExist) {
		t.Errorf("made again: %v", err)
	}
	after, err := os.Stat(filepath.Join(v.cfg.Store.VM(v.id), store.VMWork))
	if err != nil || !os.SameFile(before, after) || !before.ModTime().Equal(after.ModTime()) {
		t.Errorf("the work disk was touched: %v", err)
	}
}

// Each call of the driver fails in turn: nothing stays, and the state is true.
func TestFailAt(t *testing.T) {
	setLimits(t)
	stubborn := agent{shutdown: func(_ *vmmtest.FakeGuest, conn net.Conn) { silent(conn) }}
	live := func(t *testing.T, v *VM) (startErr, execErr, stopErr error) {
		if startErr = v.Start(t.Context(), banger.StageNetwork); startErr != nil {
			return
		}
		var s *Session
		if s, execErr = v.Exec(t.Context(), wire.Exec{}); execErr == nil {
			s.Close()
		}
		_, stopErr = v.Stop(t.Context())
		return
	}
	v, f := fake(t, stubborn, vmmtest.Options{Deaf: true})
	if a, b, c := live(t, v); a != nil || b != nil || c != nil {
		t.Fatal(a, b, c)
	}
	calls := f.Calls()
	want := []string{"Probe", "Start", "DialGuest", "DialGuest", "DialGuest", "Quit", "Kill"}
	if !slices.Equal(calls, want) {
		t.Fatalf("calls %q, want %q", calls, want)
	}
	for i, call := range calls {
		t.Run(fmt.Sprintf("%d %s", i+1, call), func(t *testing.T) {
			t.Parallel()
			failure := errors.New("it fails")
			v, f := fake(t, stubborn, vmmtest.Options{Deaf: true, FailAt: i + 1, FailErr: failure})
			startErr, execErr, stopErr := live(t, v)
			if stopErr != nil {
				t.Errorf("stop: %v", stopErr)
			}
			state := banger.StateStopped
			switch i + 1 {
			case 1:
				state = banger.StateCreated
			case 2, 3:
				state = banger.StateFailed
			}
			if (startErr != nil) != (i < 3) || (execErr != nil) != (i == 3) {
				t.Errorf("start: %v, exec: %v", startErr, execErr)
			}
			if err := errors.Join(startErr, execErr); i < 4 && !errors.Is(err, failure) {
				t.Errorf("%v does not tell the cause", err)
			}
			nothingRuns(t, v, f, state)
			// What failed can be tried again.
			if err := v.Start(t.Context(), banger.StageNetwork); err != nil {
				t.Errorf("start again: %v", err)
			}
			if _, err := v.Stop(t.Context()); err != nil {
				t.Errorf("stop again: %v", err)
			}
			nothingRuns(t, v, f, banger.StateStopped)
		})
	}
}

// A VMM that cannot be killed is said to be there, within bounds.
type immortal struct {
	*vmmtest.FakeGuest
}

func (immortal) Kill() error { return errors.New("no such luck") }

type immortals struct{ *vmmtest.Fake }

func (d immortals) Start(ctx context.Context, m vmm.Machine) (vmm.Process, error) {
	p, err := d.Fake.Start(ctx, m)
	if err != nil {
		return nil, err
	}
	return immortal{p.(*vmmtest.FakeGuest)}, nil
}

func TestKillThatFails(t *testing.T) {
	setLimits(t)
	f := vmmtest.NewFake(vmmtest.Options{Deaf: true, Serve: agent{shutdown: func(_ *vmmtest.FakeGuest, c net.Conn) { silent(c) }}.serve})
	v, _ := newVM(t, immortals{f}, nil)
	if err := v.Start(t.Context(), banger.StageNetwork); err != nil {
		t.Fatal(err)
	}
	clean, err := v.Stop(t.Context())
	if clean || err == nil || !strings.Contains(err.Error(), "no such luck") || v.State() != banger.StateFailed {
		t.Errorf("clean %v, %v, the VM is %s", clean, err, v.State())
	}
	f.Guests()[0].Kill()
}

func TestBootThatFails(t *testing.T) {
	setLimits(t)
	hostileReply := func(data string) agent {
		return agent{raw: func(_ *vmmtest.FakeGuest, conn net.Conn, _ wire.Request) bool {
			conn.Write([]byte(data))
			silent(conn)
			return true
		}}
	}
	frames := func(send func(net.Conn)) agent {
		return agent{boot: func(_ *vmmtest.FakeGuest, conn net.Conn) { send(conn); silent(conn) }}
	}
	ending := func(end func(*vmmtest.FakeGuest)) agent {
		return agent{boot: func(g *vmmtest.FakeGuest, conn net.Conn) { end(g); silent(conn) }}
	}
	const console = "one\n" + wire.ReadyLine + "\nlast words\x1b[31m"
	for _, c := range []struct {
		name  string
		agent agent
		opt   vmmtest.Options
		code  banger.Code
		stage banger.Stage
		want  string
	}{
		{"no first process", agent{}, vmmtest.Options{Console: "Linux version"}, banger.CodeTimeout, banger.StageSpawned, "2s"},
		{"no agent", agent{}, vmmtest.Options{AgentDelay: -1}, banger.CodeTimeout, banger.StageKernel, "2s"},
		{"an agent that never replies", agent{raw: func(_ *vmmtest.FakeGuest, c net.Conn, _ wire.Request) bool { silent(c); return true }},
			vmmtest.Options{}, banger.CodeGuest, banger.StageKernel, "i/o timeout"},
		{"an agent that hangs up", agent{raw: func(*vmmtest.FakeGuest, net.Conn, wire.Request) bool { return true }},
			vmmtest.Options{}, banger.CodeGuest, banger.StageKernel, "EOF"},
		{"no events", frames(func(net.Conn) {}), vmmtest.Options{}, banger.CodeTimeout, banger.StageAgent, "2s"},
		{"a failed event", frames(func(c net.Conn) { tell(c, wire.BootEvent{Stage: wire.StageFailed, Detail: "no \x1b disk"}) }),
			vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "the guest cannot go on: no \x1b disk"},
		{"an orderly end too early", agent{boot: func(_ *vmmtest.FakeGuest, c net.Conn) { tell(c, wire.BootEvent{Stage: "root"}) }},
			vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "EOF"},
		{"endless events", frames(func(c net.Conn) {
			for tell(c, wire.BootEvent{Stage: "modules"}) == nil {
			}
		}), vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "more than 1000 events"},
		{"a slow drip", frames(func(c net.Conn) {
			for tell(c, wire.BootEvent{Stage: "modules"}) == nil {
				time.Sleep(10 * time.Millisecond)
			}
		}), vmmtest.Options{}, banger.CodeTimeout, banger.StageAgent, "2s"},
		{"an oversize frame", frames(func(c net.Conn) { c.Write([]byte{byte(wire.FrameEvent), 0, 1, 0, 1}) }),
			vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "the limit is 65536"},
		{"half a frame", frames(func(c net.Conn) { c.Write([]byte{byte(wire.FrameEvent), 0, 0}) }),
			vmmtest.Options{}, banger.CodeTimeout, banger.StageAgent, "2s"},
		{"a wrong frame", frames(func(c net.Conn) { wire.WriteFrame(c, wire.FrameStdout, []byte(`{"stage":"network"}`)) }),
			vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "unexpected frame type 2"},
		{"garbage", frames(func(c net.Conn) { wire.WriteFrame(c, wire.FrameEvent, []byte("\xff")) }),
			vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "invalid character"},
		{"a reply of 4 GiB", hostileReply("\xff\xff\xff\xff"), vmmtest.Options{}, banger.CodeGuest, banger.StageKernel, "the limit is 1048576"},
		{"a reply that is none", hostileReply(message("[]")), vmmtest.Options{}, banger.CodeGuest, banger.StageKernel, "cannot unmarshal"},
		{"a reply of another version", hostileReply(message(`{"version":9}`)), vmmtest.Options{}, banger.CodeGuest, banger.StageKernel, "version 9"},
		{"a refusal", hostileReply(message(`{"version":1,"error":{"code":"x","message":"not \u001b you"}}`)), vmmtest.Options{}, banger.CodeGuest, banger.StageKernel, "agent: boot: not \x1b you"},
		{"the guest powers off", ending((*vmmtest.FakeGuest).PowerOff), vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "the guest powered off"},
		{"the guest reboots", ending((*vmmtest.FakeGuest).Reboot), vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "the guest asked for a reboot"},
		{"the kernel panics", ending((*vmmtest.FakeGuest).Panic), vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "the guest's kernel panicked"},
		{"the VMM crashes", ending(func(g *vmmtest.FakeGuest) { g.Crash("first\nqemu: boom\n") }), vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "exit code 1: qemu: boom"},
		{"the VMM crashes without a word", ending(func(g *vmmtest.FakeGuest) { g.Crash("") }), vmmtest.Options{}, banger.CodeGuest, banger.StageAgent, "it crashed (exit code 1)"},
		{"the kernel panics before its first process", agent{},
			vmmtest.Options{Console: "panic", OnStart: (*vmmtest.FakeGuest).Panic}, banger.CodeGuest, banger.StageSpawned, "the guest's kernel panicked"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.opt.Console == "" {
				c.opt.Console = console
			}
			v, f := fake(t, c.agent, c.opt)
			err := v.Start(t.Context(), banger.StageNetwork)
			var e *banger.Error
			if !errors.As(err, &e) || e.Code != c.code {
				t.Fatalf("got %s: %v", banger.CodeOf(err), err)
			}
			if !strings.Contains(e.Message, fmt.Sprintf("after the stage %q", c.stage)) || !strings.Contains(e.Message, c.want) {
				t.Errorf("%q names no stage %q or no %q", e.Message, c.stage, c.want)
			}
			lines := strings.Split(strings.TrimSuffix(c.opt.Console, "\n"), "\n")
			if !strings.HasSuffix(e.Detail, "\n"+lines[len(lines)-1]) || e.Hint == "" {
				t.Errorf("detail %q, hint %q", e.Detail, e.Hint)
			}
			nothingRuns(t, v, f, banger.StateFailed)
			if clean, err := v.Stop(t.Context()); err != nil || !clean {
				t.Errorf("stop of what failed: %v, %v", clean, err)
			}
			nothingRuns(t, v, f, banger.StateFailed)
		})
	}
}

// What the driver or the host says about itself is not the guest's fault.
func TestBootWithoutWhatItNeeds(t *testing.T) {
	t.Run("the kernel", func(t *testing.T) {
		f := vmmtest.NewFake(vmmtest.Options{})
		v, _ := newVM(t, f, func(cfg *Config) { cfg.Kernel.Vmlinux = "/nonexistent" })
		if err := v.Start(t.Context(), banger.StageNetwork); banger.CodeOf(err) != banger.CodeNotFound {
			t.Errorf("got %s: %v", banger.CodeOf(err), err)
		}
		nothingRuns(t, v, f, banger.StateFailed)
	})
	t.Run("the agent", func(t *testing.T) {
		f := vmmtest.NewFake(vmmtest.Options{})
		v, _ := newVM(t, f, func(cfg *Config) { cfg.Agent = "/nonexistent" })
		if err := v.Start(t.Context(), banger.StageNetwork); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
		nothingRuns(t, v, f, banger.StateFailed)
	})
	t.Run("an accelerator", func(t *testing.T) {
		f := vmmtest.NewFake(vmmtest.Options{})
		v, _ := newVM(t, f, func(cfg *Config) { cfg.Spec.Accel = banger.AccelKVM })
		if err := v.Start(t.Context(), banger.StageNetwork); banger.CodeOf(err) != banger.CodeUnavailable {
			t.Errorf("got %v", err)
		}
		nothingRuns(t, v, f, banger.StateFailed)
	})
}

// The end of the caller's context ends a boot wherever it is.
func TestBootEndsWithItsContext(t *testing.T) {
	for name, make := range map[banger.Stage]func() (agent, vmmtest.Options){
		banger.StageSpawned: func() (agent, vmmtest.Options) { return agent{}, vmmtest.Options{Console: "x"} },
		banger.StageKernel:  func() (agent, vmmtest.Options) { return agent{}, vmmtest.Options{AgentDelay: -1} },
		banger.StageAgent: func() (agent, vmmtest.Options) {
			return agent{boot: func(_ *vmmtest.FakeGuest, c net.Conn) { silent(c) }}, vmmtest.Options{}
		},
	} {
		t.Run("canceled at "+string(name), func(t *testing.T) {
			v, f := fake(t, first(make()), second(make()))
			cause := errors.New("enough")
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
			err := v.Start(ctx, banger.StageNetwork)
			if banger.CodeOf(err) != banger.CodeCanceled || !errors.Is(err, cause) || !strings.Contains(err.Error(), string(name)) {
				t.Errorf("got %v", err)
			}
			nothingRuns(t, v, f, banger.StateStopped)
		})
		t.Run("too late at "+string(name), func(t *testing.T) {
			v, f := fake(t, first(make()), second(make()))
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			err := v.Start(ctx, banger.StageNetwork)
			var e *banger.Error
			if !errors.As(err, &e) || e.Code != banger.CodeTimeout || !strings.Contains(err.Error(), string(name)) || e.Detail == "" {
				t.Errorf("got %v", err)
			}
			nothingRuns(t, v, f, banger.StateFailed)
		})
		t.Run("stopped at "+string(name), func(t *testing.T) {
			v, f := fake(t, first(make()), second(make()))
			result := goStart(t, v)
			time.Sleep(50 * time.Millisecond)
			if clean, err := v.Stop(t.Context()); err != nil || clean {
				t.Errorf("stop: clean %v, %v", clean, err)
			}
			nothingRuns(t, v, f, banger.StateStopped) // at once: Stop has waited
			if err := <-result; banger.CodeOf(err) != banger.CodeCanceled {
				t.Errorf("start: %v", err)
			}
		})
	}
}

func first(a agent, _ vmmtest.Options) agent            { return a }
func second(_ agent, o vmmtest.Options) vmmtest.Options { return o }

func goStart(t *testing.T, v *VM) <-chan error {
	t.Helper()
	result := make(chan error, 1)
	go func() { result <- v.Start(t.Context(), banger.StageNetwork) }()
	for deadline := time.Now().Add(wait); v.State() == banger.StateCreated; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not start")
		}
	}
	return result
}

// A second start owes nothing to the first: not its stages, its console's
// mark or its VMM.
func TestStartAgain(t *testing.T) {
	t.Run("without a first process", func(t *testing.T) {
		starts := 0
		v, f := started(t, agent{}, vmmtest.Options{Console: "booting\n", OnStart: func(g *vmmtest.FakeGuest) {
			if starts++; starts == 1 {
				g.Print(wire.ReadyLine)
			}
		}})
		v.Stop(t.Context())
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := v.Start(ctx, banger.StageNetwork); err == nil || !strings.Contains(err.Error(), `after the stage "spawned"`) {
			t.Errorf("got %v", err)
		}
		nothingRuns(t, v, f, banger.StateFailed)
	})
	t.Run("without a VMM", func(t *testing.T) {
		missing := banger.Errorf(banger.CodeNotFound, "vmlinux: gone")
		v, f := started(t, agent{}, vmmtest.Options{FailAt: 6, FailErr: missing})
		v.Stop(t.Context())
		if err := v.Start(t.Context(), banger.StageNetwork); err != error(missing) {
			t.Errorf("got %v after %q", err, f.Calls())
		}
		nothingRuns(t, v, f, banger.StateFailed)
	})
}

// A late process is known to have ended a little after its streams broke.
type late struct {
	*vmmtest.FakeGuest
	done chan struct{}
}

func (p late) Done() <-chan struct{} { return p.done }

type lates struct{ *vmmtest.Fake }

func (d lates) Start(ctx context.Context, m vmm.Machine) (vmm.Process, error) {
	p, err := d.Fake.Start(ctx, m)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		<-p.Done()
		time.Sleep(100 * time.Millisecond)
		close(done)
	}()
	return late{p.(*vmmtest.FakeGuest), done}, nil
}

func TestBootWaitsForTheReason(t *testing.T) {
	f := vmmtest.NewFake(vmmtest.Options{Serve: agent{boot: func(g *vmmtest.FakeGuest, conn net.Conn) {
		g.Panic()
		silent(conn)
	}}.serve})
	v, _ := newVM(t, lates{f}, nil)
	if err := v.Start(t.Context(), banger.StageNetwork); err == nil || !strings.Contains(err.Error(), "the guest's kernel panicked") {
		t.Errorf("got %v", err)
	}
	nothingRuns(t, v, f, banger.StateFailed)
}

// Stop beats start, whenever it comes.
func TestStopWhileStarting(t *testing.T) {
	for delay := range 30 {
		v, f := fake(t, agent{}, vmmtest.Options{})
		result := goStart(t, v)
		time.Sleep(time.Duration(delay) * 200 * time.Microsecond)
		if _, err := v.Stop(t.Context()); err != nil {
			t.Errorf("stop: %v", err)
		}
		if err := <-result; err != nil && banger.CodeOf(err) != banger.CodeCanceled {
			t.Errorf("start: %v", err)
		}
		nothingRuns(t, v, f, banger.StateStopped)
	}
}

func TestStartOnce(t *testing.T) {
	v, f := fake(t, agent{}, vmmtest.Options{})
	var wg sync.WaitGroup
	results := make(chan error, 10)
	for range cap(results) {
		wg.Go(func() { results <- v.Start(t.Context(), banger.StageNetwork) })
	}
	wg.Wait()
	close(results)
	worked := 0
	for err := range results {
		if err == nil {
			worked++
		} else if banger.CodeOf(err) != banger.CodeConflict {
			t.Errorf("got %v", err)
		}
	}
	if worked != 1 || len(f.Guests()) != 1 {
		t.Errorf("%d starts worked, %d machines run", worked, len(f.Guests()))
	}
	v.Stop(t.Context())
	nothingRuns(t, v, f, banger.StateStopped)
}

func TestStop(t *testing.T) {
	setLimits(t)
	for _, c := range []struct {
		name     string
		shutdown func(*vmmtest.FakeGuest, net.Conn)
		deaf     bool
		before   func(*testing.T, *VM, *vmmtest.FakeGuest)
		clean    bool
		state    banger.State
		cause    vmm.Cause
	}{
		{"a good guest", nil, false, nil, true, banger.StateStopped, vmm.CauseGuestOff},
		{"a guest that takes its time", func(g *vmmtest.FakeGuest, _ net.Conn) { time.Sleep(30 * time.Millisecond); g.PowerOff() },
			false, nil, true, banger.StateStopped, vmm.CauseGuestOff},
		{"a guest that ignores it", func(_ *vmmtest.FakeGuest, c net.Conn) { silent(c) }, false, nil, false, banger.StateStopped, vmm.CauseQuit},
		{"a VMM that ignores it too", func(_ *vmmtest.FakeGuest, c net.Conn) { silent(c) }, true, nil, false, banger.StateStopped, vmm.CauseKilled},
		{"a guest that panics", func(g *vmmtest.FakeGuest, _ net.Conn) { g.Panic() }, false, nil, false, banger.StateStopped, vmm.CauseGuestPanic},
		{"no agent any more", nil, false, func(_ *testing.T, _ *VM, g *vmmtest.FakeGuest) { g.StopAgent() }, false, banger.StateStopped, vmm.CauseQuit},
		{"paused", nil, false, pause, true, banger.StateStopped, vmm.CauseGuestOff},
		{"paused, and a guest that ignores it", func(_ *vmmtest.FakeGuest, c net.Conn) { silent(c) }, false, pause, false, banger.StateStopped, vmm.CauseQuit},
		{"ended by its guest", nil, false, end((*vmmtest.FakeGuest).PowerOff), true, banger.StateStopped, vmm.CauseGuestOff},
		{"rebooted by its guest", nil, false, end((*vmmtest.FakeGuest).Reboot), false, banger.StateStopped, vmm.CauseGuestReboot},
		{"panicked", nil, false, end((*vmmtest.FakeGuest).Panic), false, banger.StateFailed, vmm.CauseGuestPanic},
		{"crashed", nil, false, end(func(g *vmmtest.FakeGuest) { g.Crash("x") }), false, banger.StateFailed, vmm.CauseCrashed},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			v, f := started(t, agent{shutdown: c.shutdown}, vmmtest.Options{Deaf: c.deaf})
			g := f.Guests()[0]
			if c.before != nil {
				c.before(t, v, g)
			}
			began := time.Now()
			clean, err := v.Stop(t.Context())
			if err != nil || clean != c.clean {
				t.Errorf("clean %v, %v", clean, err)
			}
			if took := time.Since(began); took > wait {
				t.Errorf("it took %v", took)
			}
			if got := g.Exit().Cause; got != c.cause {
				t.Errorf("it ended by %s, want %s", got, c.cause)
			}
			nothingRuns(t, v, f, c.state)
		})
	}
}

func pause(t *testing.T, v *VM, g *vmmtest.FakeGuest) {
	t.Helper()
	if err := errors.Join(g.Pause(t.Context()), v.to(evPaused, "")); err != nil {
		t.Fatal(err)
	}
}

func end(how func(*vmmtest.FakeGuest)) func(*testing.T, *VM, *vmmtest.FakeGuest) {
	return func(_ *testing.T, v *VM, g *vmmtest.FakeGuest) {
		how(g)
		<-v.process().Done()
	}
}

// The caller's context ends the guest's time, not the stop.
func TestStopInAHurry(t *testing.T) {
	v, f := started(t, agent{shutdown: func(_ *vmmtest.FakeGuest, c net.Conn) { silent(c) }}, vmmtest.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	began := time.Now()
	clean, err := v.Stop(ctx)
	if err != nil || clean {
		t.Errorf("clean %v, %v", clean, err)
	}
	if took := time.Since(began); took > stopGuest/2 {
		t.Errorf("it took %v", took)
	}
	nothingRuns(t, v, f, banger.StateStopped)
}

func TestStopByMany(t *testing.T) {
	v, f := started(t, agent{}, vmmtest.Options{})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, err := v.Stop(t.Context()); err != nil {
				t.Errorf("stop: %v", err)
			}
			nothingRuns(t, v, f, banger.StateStopped) // for each of them
		})
	}
	wg.Wait()
}

func TestStopOfWhatDoesNotRun(t *testing.T) {
	v, f := fake(t, agent{}, vmmtest.Options{})
	if clean, err := v.Stop(t.Context()); err != nil || !clean {
		t.Errorf("created: clean %v, %v", clean, err)
	}
	nothingRuns(t, v, f, banger.StateCreated)
	if err := v.to(evDelete, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Stop(t.Context()); banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("deleting: %v", err)
	}
	if err := v.Start(t.Context(), banger.StageNetwork); banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("deleting: %v", err)
	}
}

func TestSession(t *testing.T) {
	var got []string
	v, _ := started(t, agent{exec: func(_ *vmmtest.FakeGuest, conn net.Conn, e *wire.Exec) {
		admit(conn)
		got = append(got, strings.Join(e.Args, " "))
		wire.WriteFrame(conn, wire.FrameCredit, binary.BigEndian.AppendUint32(nil, 7))
		for {
			f, err := wire.ReadFrame(conn, nil)
			if err != nil {
				return
			}
			got = append(got, fmt.Sprintf("%d:%s", f.Type, f.Payload))
			if f.Type == wire.FrameStdinEOF {
				break
			}
		}
		wire.WriteFrame(conn, wire.FrameStdout, []byte("out"))
		wire.WriteFrame(conn, wire.FrameStderr, []byte("err"))
		exit(conn, `{"code":255,"signal":"KILL"}`)
		wire.WriteFrame(conn, wire.FrameStdout, []byte("after the end"))
	}}, vmmtest.Options{})
	s, err := v.Exec(t.Context(), wire.Exec{Args: []string{"a", "b"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []wire.Frame{
		{Type: wire.FrameStdin, Payload: []byte("in")}, {Type: wire.FrameResize, Payload: []byte("{}")},
		{Type: wire.FrameSignal, Payload: []byte("INT")}, {Type: wire.FrameStdinEOF},
	} {
		if err := s.Send(f); err != nil {
			t.Error(err)
		}
	}
	for _, ft := range []wire.FrameType{0, wire.FrameStdout, wire.FrameStderr, wire.FrameExit, wire.FrameEvent, wire.FrameCredit, 64, 68, 255} {
		if err := s.Send(wire.Frame{Type: ft}); err == nil {
			t.Errorf("frame type %d went to the guest", ft)
		}
	}
	for _, want := range []string{"9:\x00\x00\x00\x07", "2:out", "3:err", `7:{"code":255,"signal":"KILL"}`} {
		f, err := s.Recv()
		if have := fmt.Sprintf("%d:%s", f.Type, f.Payload); err != nil || have != want {
			t.Errorf("received %q, %v; want %q", have, err, want)
		}
	}
	for range 2 {
		if _, err := s.Recv(); err != io.EOF {
			t.Errorf("after the exit: %v", err)
		}
	}
	s.Close()
	if want := []string{"a b", "1:in", "5:{}", "6:INT", "4:"}; !slices.Equal(got, want) {
		t.Errorf("the guest got %q, want %q", got, want)
	}
	v.Stop(t.Context())
}

func TestHostileSession(t *testing.T) {
	frame := func(ft wire.FrameType, text string) func(net.Conn) {
		return func(c net.Conn) { wire.WriteFrame(c, ft, []byte(text)) }
	}
	raw := func(text string) func(net.Conn) { return func(c net.Conn) { c.Write([]byte(text)) } }
	for _, c := range []struct {
		name string
		tty  bool
		send func(net.Conn)
		want string // "": it is fine
	}{
		{"exit code 0", false, frame(wire.FrameExit, `{"code":0}`), ""},
		{"exit code 255", false, frame(wire.FrameExit, `{"code":255}`), ""},
		{"exit code 256", false, frame(wire.FrameExit, `{"code":256}`), "is no exit code"},
		{"exit code -1", false, frame(wire.FrameExit, `{"code":-1}`), "is no exit code"},
		{"exit code 2^40", false, frame(wire.FrameExit, `{"code":1099511627776}`), "is no exit code"},
		{"exit code 1e99", false, frame(wire.FrameExit, `{"code":1e99}`), "exit"},
		{"an exit that is text", false, frame(wire.FrameExit, `{"code":"0"}`), "exit"},
		{"an exit that is garbage", false, frame(wire.FrameExit, "\xff"), "exit"},
		{"an empty exit", false, frame(wire.FrameExit, ""), "exit"},
		{"a frame of 64 KiB", false, frame(wire.FrameStdout, strings.Repeat("x", wire.MaxFrameBytes)), ""},
		{"a frame of 64 KiB+1", false, raw("\x02\x00\x01\x00\x01"), "the limit is 65536"},
		{"a frame of 4 GiB", false, raw("\x02\xff\xff\xff\xff"), "the limit is 65536"},
		{"half a frame", false, raw("\x02\x00\x00\x00\x09x"), "went away"},
		{"half a head", false, raw("\x02\x00"), "went away"},
		{"nothing", false, raw(""), "went away"},
		{"stderr", false, frame(wire.FrameStderr, "x"), ""},
		{"stderr with a terminal", true, frame(wire.FrameStderr, "x"), "unexpected frame type 3"},
		{"stdin", false, frame(wire.FrameStdin, "x"), "unexpected frame type 1"},
		{"a signal", false, frame(wire.FrameSignal, "KILL"), "unexpected frame type 6"},
		{"a boot event", false, frame(wire.FrameEvent, `{"stage":"network"}`), "unexpected frame type 8"},
		{"a frame of the API", false, frame(66, `{}`), "unexpected frame type 66"},
		{"type 0", false, frame(0, ""), "unexpected frame type 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, _ := started(t, agent{exec: func(_ *vmmtest.FakeGuest, conn net.Conn, _ *wire.Exec) {
				admit(conn)
				c.send(conn)
			}}, vmmtest.Options{})
			e := wire.Exec{}
			if c.tty {
				e.TTY = &wire.Window{Rows: 1, Cols: 1}
			}
			s, err := v.Exec(t.Context(), e)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			_, err = s.Recv()
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) || err == io.EOF {
				t.Errorf("got %v, want %q", err, c.want)
			}
			v.Stop(t.Context())
		})
	}
}

func TestExecRefused(t *testing.T) {
	for code, want := range map[wire.ErrorCode]banger.Code{
		wire.ErrNotFound: banger.CodeCommandNotFound, wire.ErrNotExecutable: banger.CodeCommandNotExecutable,
		wire.ErrDenied: banger.CodeGuest, wire.ErrNoUser: banger.CodeGuest, wire.ErrVersion: banger.CodeGuest, "anything": banger.CodeGuest,
	} {
		v, _ := started(t, agent{exec: func(_ *vmmtest.FakeGuest, conn net.Conn, _ *wire.Exec) {
			wire.WriteMessage(conn, wire.Reply{Version: wire.Version, Error: &wire.Error{Code: code, Message: "x: no"}})
		}}, vmmtest.Options{})
		_, err := v.Exec(t.Context(), wire.Exec{Args: []string{"x"}})
		var refusal *wire.Error
		if banger.CodeOf(err) != want || !errors.As(err, &refusal) || refusal.Code != code || err.Error() != "x: no" {
			t.Errorf("%s: %s, %v", code, banger.CodeOf(err), err)
		}
		v.Stop(t.Context())
	}
}

// An agent that hangs holds nobody up for longer than the context or the
// limit of a reply.
func TestExecWithoutAnswer(t *testing.T) {
	hang := agent{exec: func(_ *vmmtest.FakeGuest, conn net.Conn, _ *wire.Exec) { silent(conn) }}
	t.Run("context", func(t *testing.T) {
		v, _ := started(t, hang, vmmtest.Options{})
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		began := time.Now()
		if _, err := v.Exec(ctx, wire.Exec{}); err == nil || time.Since(began) > replyTimeout/2 {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		ctx, cancelNow := context.WithCancel(t.Context())
		cancelNow()
		if _, err := v.Exec(ctx, wire.Exec{}); err == nil {
			t.Error("a context that has ended asks all the same")
		}
		v.Stop(t.Context())
	})
	t.Run("limit", func(t *testing.T) {
		setLimits(t)
		v, _ := started(t, hang, vmmtest.Options{})
		if _, err := v.Exec(t.Context(), wire.Exec{}); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		v.Stop(t.Context())
	})
}

// A session is cut off when the VM ends, and says why.
func TestSessionBrokenByTheEnd(t *testing.T) {
	v, f := started(t, agent{exec: func(_ *vmmtest.FakeGuest, conn net.Conn, _ *wire.Exec) {
		admit(conn)
		silent(conn)
	}}, vmmtest.Options{})
	s, err := v.Exec(t.Context(), wire.Exec{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	g := f.Guests()[0]
	g.Print("Kernel panic: \x1b[31m\n")
	time.AfterFunc(20*time.Millisecond, g.Panic)
	if _, err := s.Recv(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
	select {
	case <-v.process().Done():
	case <-time.After(wait):
		t.Fatal("the VM does not end")
	}
	var e *banger.Error
	if err := s.EndError(); !errors.As(err, &e) || e.Code != banger.CodeGuest ||
		!strings.Contains(e.Message, "the guest's kernel panicked") || !strings.Contains(e.Detail, "Kernel panic: \x1b[31m") {
		t.Errorf("got %v", err)
	}
	if _, err := v.Exec(t.Context(), wire.Exec{}); !errors.Is(err, vmm.ErrEnded) {
		t.Errorf("exec after the end: %v", err)
	}
	if _, err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	nothingRuns(t, v, f, banger.StateFailed)
}

func TestSendAndRecvAtOnce(t *testing.T) {
	const n = 200
	v, _ := started(t, agent{exec: func(_ *vmmtest.FakeGuest, conn net.Conn, _ *wire.Exec) {
		admit(conn)
		for {
			f, err := wire.ReadFrame(conn, nil)
			if err != nil || f.Type == wire.FrameStdinEOF {
				break
			}
			wire.WriteFrame(conn, wire.FrameStdout, f.Payload)
		}
		exit(conn, `{"code":3}`)
	}}, vmmtest.Options{})
	s, err := v.Exec(t.Context(), wire.Exec{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	go func() {
		for i := range n {
			s.Send(wire.Frame{Type: wire.FrameStdin, Payload: fmt.Appendf(nil, "%d", i)})
		}
		s.Send(wire.Frame{Type: wire.FrameStdinEOF})
	}()
	for i := range n {
		if f, err := s.Recv(); err != nil || string(f.Payload) != fmt.Sprint(i) {
			t.Fatalf("frame %d: %q, %v", i, f.Payload, err)
		}
	}
	if f, err := s.Recv(); err != nil || f.Type != wire.FrameExit {
		t.Errorf("got %v, %v", f, err)
	}
	v.Stop(t.Context())
}
