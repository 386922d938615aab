package vmmtest

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest/guestops"
	"banger/internal/wire"
)

// fakeMachine describes a machine whose kernel and initrd only have to be
// there.
func fakeMachine(tb testing.TB) vmm.Machine {
	tb.Helper()
	folder := tb.TempDir()
	for _, name := range []string{"vmlinux", "initrd"} {
		if err := os.WriteFile(filepath.Join(folder, name), nil, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	run := filepath.Join(folder, "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		tb.Fatal(err)
	}
	return vmm.Machine{
		ID: "0123456789ab", RunDir: run, CPUs: 1, MemoryBytes: 256 << 20, Accel: banger.AccelAuto,
		Boot: vmm.Boot{Kernel: filepath.Join(folder, "vmlinux"), Initrd: filepath.Join(folder, "initrd")},
	}
}

func TestConformance(t *testing.T) {
	for name, opt := range map[string]Options{"agent at once": {}, "late agent": {AgentDelay: 50 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			fake := NewFake(opt) // one for all, so that drives are locked between machines
			Run(t, Harness{
				New:         func(testing.TB) vmm.Driver { return fake },
				Machine:     fakeMachine,
				BootTimeout: 10 * time.Second,
			})
		})
	}
}

// TestFailAt lets every call fail in turn, and only that one.
func TestFailAt(t *testing.T) {
	want := []string{"Probe", "Start", "DialGuest", "Pause", "Resume", "Quit", "Kill"}
	for i := range len(want) + 2 {
		why := errors.New("why")
		fake := NewFake(Options{FailAt: i, FailErr: why})
		ctx := t.Context()
		var errs []error
		_, err := fake.Probe(ctx, banger.AccelAuto)
		errs = append(errs, err)
		p, err := fake.Start(ctx, fakeMachine(t))
		errs = append(errs, err)
		if err == nil {
			_, err := p.DialGuest(ctx, wire.AgentPort)
			errs = append(errs, err, p.Pause(ctx), p.Resume(ctx), p.Quit(ctx), p.Kill())
			p.Kill()
			<-p.Done()
		}
		for n, err := range errs {
			if failed := n+1 == i; failed != errors.Is(err, why) || !failed && err != nil {
				t.Errorf("fail at %d: call %d gave %v", i, n+1, err)
			}
		}
		if calls := fake.Calls(); !slices.Equal(calls[:min(len(errs), len(want))], want[:len(errs)]) {
			t.Errorf("calls %v", calls)
		}
	}
}

// TestFakeOptions tries what a test can make of a guest beside the suite.
func TestFakeOptions(t *testing.T) {
	out := new(console)
	m := fakeMachine(t)
	m.Console = out
	var told *FakeGuest
	fake := NewFake(Options{
		Console: "booting\n", AgentDelay: -1, Deaf: true,
		OnStart: func(g *FakeGuest) { told = g },
		Serve: func(g *FakeGuest, port uint32, conn net.Conn) {
			conn.Write([]byte(g.Machine().ID + "\n"))
			conn.Close()
		},
	})
	p, err := fake.Start(t.Context(), m)
	if err != nil || told == nil || fake.Guests()[0] != told {
		t.Fatal(err, told)
	}
	ctx, cancel := context.WithTimeout(t.Context(), shortWait)
	defer cancel()
	if _, err := p.DialGuest(ctx, wire.AgentPort); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial to no agent: %v", err)
	}
	told.StartAgent()
	conn, err := p.DialGuest(t.Context(), wire.AgentPort)
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadString('\n'); line != m.ID+"\n" {
		t.Errorf("the guest said %q, %v", line, err)
	}
	if err := p.Quit(t.Context()); err != nil {
		t.Error(err)
	}
	select {
	case <-p.Done():
		t.Error("a deaf VMM quit")
	case <-time.After(shortWait):
	}
	told.Crash(strings.Repeat("x", vmm.MaxOutputBytes) + "the end")
	<-p.Done()
	if e := p.Exit(); e.Cause != vmm.CauseCrashed || e.Code != 1 || len(e.Output) != vmm.MaxOutputBytes || !strings.HasSuffix(e.Output, "the end") {
		t.Errorf("exit %s %d %q", e.Cause, e.Code, e.Output)
	}
	if out.String() != "booting\n" {
		t.Errorf("console %q", out)
	}
}

// TestGuestopsRefuses requires the complaint of a guest asked for nonsense.
func TestGuestopsRefuses(t *testing.T) {
	fake := NewFake(Options{})
	p, err := fake.Start(t.Context(), fakeMachine(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Kill(); <-p.Done() }()
	for _, request := range []string{"", "fly", "flood many", "read none", "write none x", "trim none"} {
		conn, err := p.DialGuest(t.Context(), wire.AgentPort)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := guestops.Ask(conn, bufio.NewReader(conn), request); err == nil {
			t.Errorf("%q: no complaint", request)
		}
		conn.Close()
	}
}
