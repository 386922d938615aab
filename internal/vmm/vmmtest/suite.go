package vmmtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest/guestops"
	"banger/internal/wire"
)

// A Harness is what a driver's test gives the suite.
type Harness struct {
	New func(testing.TB) vmm.Driver
	// Machine describes a machine that boots a guest which does what package
	// guestops asks: its own folders and files every time, no drive, no
	// console. It skips the test where that cannot be.
	Machine func(testing.TB) vmm.Machine
	// BootTimeout is how long a start up to the agent's answer may take.
	BootTimeout time.Duration
	// Processes says that a VMM is a process of the host.
	Processes bool
}

const (
	// shortWait is for what must not happen: long enough to be seen.
	shortWait = 200 * time.Millisecond
	// promptly is for what must happen at once, on a busy machine.
	promptly = 10 * time.Second
	// endWait is for a VMM to end by itself.
	endWait = 60 * time.Second
)

// Run is the mandatory conformance suite: every promise of package vmm, tried.
func Run(t *testing.T, h Harness) {
	for _, part := range []struct {
		name string
		run  func(*testing.T, Harness)
	}{
		{"streams", testStreams},
		{"console", testConsole},
		{"pause", testPause},
		{"kill", testKill},
		{"quit", testQuit},
		{"causes", testCauses},
		{"waiting for the agent", testWaiting},
		{"agent restarts", testRestart},
		{"drives", testDrives},
		{"network card", testCard},
		{"start refuses", testRefusals},
		{"everything at once", testConcurrency},
	} {
		t.Run(part.name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			part.run(t, h)
			requireNoMoreGoroutines(t, before)
		})
	}
}

// A machineUnderTest is a started machine and what is known of it.
type machineUnderTest struct {
	t       *testing.T
	h       Harness
	m       vmm.Machine
	p       vmm.Process
	console *console
}

// boot starts a machine, and ends it with the test.
func boot(t *testing.T, h Harness, drives ...vmm.Drive) *machineUnderTest {
	t.Helper()
	return bootWith(t, h, func(m *vmm.Machine) { m.Drives = drives })
}

// bootWith is boot of a machine that the test has changed.
func bootWith(t *testing.T, h Harness, change func(*vmm.Machine)) *machineUnderTest {
	t.Helper()
	m := h.Machine(t)
	change(&m)
	u := &machineUnderTest{t: t, h: h, m: m, console: new(console)}
	u.m.Console = u.console
	p, err := h.New(t).Start(t.Context(), u.m)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	u.p = p
	return u
}

// kill ends the machine and requires that nothing is left of it.
func (u *machineUnderTest) kill() vmm.Exit {
	u.t.Helper()
	if err := u.p.Kill(); err != nil {
		u.t.Errorf("kill: %v", err)
	}
	return u.ended()
}

// ended waits for the end and requires what Done promises.
func (u *machineUnderTest) ended() vmm.Exit {
	u.t.Helper()
	select {
	case <-u.p.Done():
	case <-time.After(endWait):
		u.t.Errorf("not done within %v; the console says:\n%s", endWait, u.console)
		u.p.Kill()
		<-u.p.Done()
	}
	n := u.console.len()
	e := u.p.Exit()
	if e.Cause == "" || e.Time.IsZero() || time.Since(e.Time) > endWait || len(e.Output) > vmm.MaxOutputBytes {
		u.t.Errorf("exit when done: %+v", e)
	}
	if left, err := os.ReadDir(u.m.RunDir); err != nil || len(left) > 0 {
		u.t.Errorf("left in RunDir when done: %v %v", left, err)
	}
	if u.h.Processes {
		if err := syscall.Kill(u.p.PID(), 0); !errors.Is(err, syscall.ESRCH) {
			u.t.Errorf("process %d when done: %v", u.p.PID(), err)
		}
	}
	began := time.Now()
	if c, err := u.p.DialGuest(context.Background(), wire.AgentPort); !errors.Is(err, vmm.ErrEnded) {
		u.t.Errorf("dial after the end: %v, %v; want ErrEnded", c, err)
	}
	for what, f := range map[string]func(context.Context) error{"pause": u.p.Pause, "resume": u.p.Resume} {
		if err := f(context.Background()); !errors.Is(err, vmm.ErrEnded) {
			u.t.Errorf("%s after the end: %v, want ErrEnded", what, err)
		}
	}
	if err := u.p.Quit(context.Background()); err != nil {
		u.t.Errorf("quit after the end: %v", err)
	}
	if err := u.p.Kill(); err != nil {
		u.t.Errorf("kill after the end: %v", err)
	}
	if took := time.Since(began); took > promptly {
		u.t.Errorf("calls after the end took %v", took)
	}
	if again := u.p.Exit(); again != e {
		u.t.Errorf("exit changed from %+v to %+v", e, again)
	}
	if u.console.len() != n {
		u.t.Error("the console was written to after the end")
	}
	return e
}

// dial opens a stream, waiting for the boot.
func (u *machineUnderTest) dial() (net.Conn, *bufio.Reader) {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.t.Context(), u.h.BootTimeout)
	defer cancel()
	conn, err := u.p.DialGuest(ctx, wire.AgentPort)
	if err != nil {
		u.p.Kill()
		u.t.Fatalf("dial: %v; the console says:\n%s", err, u.console)
	}
	_ = conn.SetDeadline(time.Now().Add(u.h.BootTimeout))
	return conn, bufio.NewReader(conn)
}

// ask sends one request on a stream of its own.
func (u *machineUnderTest) ask(request string) (string, error) {
	u.t.Helper()
	conn, r := u.dial()
	defer conn.Close()
	return guestops.Ask(conn, r, request)
}

func (u *machineUnderTest) must(request string) string {
	u.t.Helper()
	text, err := u.ask(request)
	if err != nil {
		u.p.Kill()
		u.t.Fatalf("%s: %v; the console says:\n%s", request, err, u.console)
	}
	return text
}

// echo opens a stream on which bytes come back.
func (u *machineUnderTest) echo() (net.Conn, *bufio.Reader) {
	u.t.Helper()
	conn, r := u.dial()
	if _, err := guestops.Ask(conn, r, "echo"); err != nil {
		u.t.Fatalf("echo: %v", err)
	}
	return conn, r
}

func testStreams(t *testing.T, h Harness) {
	u := boot(t, h)
	defer u.kill()
	if e := u.p.Exit(); e != (vmm.Exit{}) {
		t.Errorf("exit of a running process: %+v", e)
	}
	if h.Processes {
		if err := syscall.Kill(u.p.PID(), 0); err != nil {
			t.Errorf("process %d: %v", u.p.PID(), err)
		}
	}
	if i := u.p.Info(); i.Driver == "" || i.Accel != banger.AccelKVM && i.Accel != banger.AccelTCG {
		t.Errorf("info: %+v", i)
	}
	for _, port := range []uint32{0, 1, wire.AgentPort, 1<<32 - 1} {
		ctx, cancel := context.WithTimeout(t.Context(), h.BootTimeout)
		conn, err := u.p.DialGuest(ctx, port)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		got, err := guestops.Ask(conn, bufio.NewReader(conn), "port")
		if err != nil || got != fmt.Sprint(port) {
			t.Errorf("service %d reached the guest as %q, %v", port, got, err)
		}
		conn.Close()
	}

	// Streams carry bytes side by side, and all of them.
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var group sync.WaitGroup
	for i := range 8 {
		conn, r := u.echo()
		group.Go(func() {
			defer conn.Close()
			data := make([]byte, 300<<10+i)
			fill := rand.New(rand.NewPCG(seed, uint64(i)))
			for j := range data {
				data[j] = byte(fill.Uint32())
			}
			sent := make(chan error, 1)
			go func() { _, err := conn.Write(data); sent <- err }()
			got := make([]byte, len(data))
			if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, data) {
				t.Errorf("stream %d: %d bytes do not come back: %v", i, len(data), err)
			}
			if err := <-sent; err != nil {
				t.Errorf("stream %d: write: %v", i, err)
			}
		})
	}
	group.Wait()

	// One that nobody reads does not hold up the others.
	stuck, _ := u.echo()
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		for block := make([]byte, 64<<10); ; {
			if _, err := stuck.Write(block); err != nil {
				return
			}
		}
	}()
	time.Sleep(shortWait)
	u.must("port")
	stuck.Close()
	<-flooded
	if _, err := stuck.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read of a closed stream: %v", err)
	}

	// A deadline holds.
	conn, _ := u.echo()
	_ = conn.SetReadDeadline(time.Now().Add(shortWait))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read past the deadline: %v", err)
	}
	conn.Close()

	// A machine without a network card has none.
	if text, err := u.ask("card"); err == nil {
		t.Errorf("there is a network card: %q", text)
	}

	// What the guest opens is refused.
	if _, err := u.ask("open"); err == nil || !strings.HasPrefix(err.Error(), "guest: ") {
		t.Errorf("a stream that the guest opened: %v, want its complaint", err)
	}
	u.must("port")

	// The end breaks streams, and not as if the guest had closed them.
	conn, _ = u.echo()
	read := make(chan error, 1)
	go func() { _, err := conn.Read(make([]byte, 1)); read <- err }()
	u.p.Kill()
	select {
	case err := <-read:
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read of a broken stream: %v", err)
		}
	case <-time.After(promptly):
		t.Error("a stream does not break with the end of the process")
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("second read of a broken stream: %v", err)
	}
}

func testConsole(t *testing.T, h Harness) {
	u := boot(t, h)
	defer u.kill()
	u.must("print hello from the console")
	u.console.waitFor(t, "hello from the console")
	if !strings.Contains(u.console.String(), wire.ReadyLine) {
		t.Errorf("the console lacks %q", wire.ReadyLine)
	}
	const flood = 128 << 10
	conn, r := u.dial()
	defer conn.Close()
	began := make(chan error, 1)
	go func() { _, err := guestops.Ask(conn, r, fmt.Sprint("flood ", flood)); began <- err }()
	u.must("port") // while it floods
	if err := <-began; err != nil {
		t.Fatal(err)
	}
	u.must("print last words")
	_, _ = u.ask("off") // the end may overtake the answer
	if e := u.ended(); e.Cause != vmm.CauseGuestOff {
		t.Errorf("cause %q, want %q", e.Cause, vmm.CauseGuestOff)
	}
	text := u.console.String()
	for i := range flood / 64 {
		if !strings.Contains(text, fmt.Sprintf("flood %056d", i)) {
			t.Fatalf("line %d of the flood is missing", i)
		}
	}
	if !strings.Contains(text, "last words") {
		t.Error("what was written last is missing")
	}
}

func testPause(t *testing.T, h Harness) {
	u := boot(t, h)
	defer u.kill()
	ctx := t.Context()
	conn, r := u.echo()
	for range 2 {
		if err := u.p.Pause(ctx); err != nil {
			t.Fatalf("pause: %v", err)
		}
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatalf("write in a pause: %v", err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(shortWait))
	if _, err := r.ReadByte(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a paused guest answered: %v", err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(h.BootTimeout))
	r.Reset(conn)

	// Neither opening nor closing streams waits for a paused guest.
	began := time.Now()
	for range 20 {
		short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		c, err := u.p.DialGuest(short, wire.AgentPort)
		cancel()
		if err == nil {
			c.Close()
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial in a pause: %v", err)
		}
	}
	if took := time.Since(began); took > promptly {
		t.Errorf("20 streams opened and closed in a pause took %v", took)
	}

	for range 2 {
		if err := u.p.Resume(ctx); err != nil {
			t.Fatalf("resume: %v", err)
		}
	}
	if b, err := r.ReadByte(); err != nil || b != 'x' {
		t.Errorf("after the pause the stream gives %q, %v", b, err)
	}
	conn.Close()
	u.must("port")

	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if err := u.p.Pause(canceled); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("pause with a cancelled context: %v", err)
	}
	if err := u.p.Pause(ctx); err != nil {
		t.Error(err)
	}
	if e := u.kill(); e.Cause != vmm.CauseKilled {
		t.Errorf("cause %q, want %q", e.Cause, vmm.CauseKilled)
	}
}

func testKill(t *testing.T, h Harness) {
	u := boot(t, h)
	u.must("port")
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			if err := u.p.Kill(); err != nil {
				t.Errorf("kill: %v", err)
			}
		})
	}
	group.Wait()
	e := u.ended()
	if e.Cause != vmm.CauseKilled || h.Processes && e.Code != -1 {
		t.Errorf("exit %+v, want killed, code -1", e)
	}
	u = boot(t, h) // ended before its guest is up
	if e := u.kill(); e.Cause != vmm.CauseKilled {
		t.Errorf("exit %+v, want killed", e)
	}
}

func testQuit(t *testing.T, h Harness) {
	disk := newDrive(t, "quit")
	u := boot(t, h, vmm.Drive{Path: disk})
	u.must("write quit kept")
	if err := u.p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := u.p.Quit(t.Context()); err != nil {
			t.Errorf("quit: %v", err)
		}
	}
	if e := u.ended(); e.Cause != vmm.CauseQuit || e.Code != 0 {
		t.Errorf("exit %+v, want quit, code 0", e)
	}
	if got := readSector(t, disk); got != "kept" {
		t.Errorf("the drive holds %q", got)
	}
}

// testCauses leaves guest-off to testConsole, killed and quit to theirs.
func testCauses(t *testing.T, h Harness) {
	for _, row := range []struct {
		ask  string
		want vmm.Cause
	}{
		{"reboot", vmm.CauseGuestReboot},
		{"panic", vmm.CauseGuestPanic},
	} {
		u := boot(t, h)
		// Only the kernel's own line at the end counts as a panic.
		u.must("print look, a Kernel panic - not syncing: not one")
		_, _ = u.ask(row.ask) // the end may overtake the answer
		if e := u.ended(); e.Cause != row.want {
			t.Errorf("%s: exit %+v, want %s; the console says:\n%s", row.ask, e, row.want, u.console)
		}
	}
}

func testWaiting(t *testing.T, h Harness) {
	u := boot(t, h)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if c, err := u.p.DialGuest(ctx, wire.AgentPort); !errors.Is(err, context.Canceled) {
		t.Errorf("dial with a cancelled context: %v, %v", c, err)
	}
	// A dial before there is an agent waits for it.
	u.must("port")

	_, _ = u.ask("hang") // which may overtake its own answer
	time.Sleep(shortWait)
	why := errors.New("a reason of the caller's")
	ctx, cancelCause := context.WithTimeoutCause(t.Context(), shortWait, why)
	c, err := u.p.DialGuest(ctx, wire.AgentPort)
	cancelCause()
	if err == nil {
		// An agent that takes streams and says nothing is allowed.
		_ = c.SetReadDeadline(time.Now().Add(shortWait))
		if _, err := guestops.Ask(c, bufio.NewReader(c), "port"); err == nil {
			t.Error("a hung guest answered")
		}
		c.Close()
	} else if !errors.Is(err, why) {
		t.Errorf("dial to a hung guest: %v, want the context's cause", err)
	}

	// Many wait, and the end wakes them all.
	errs := make(chan error, 16)
	for range cap(errs) {
		go func() {
			c, err := u.p.DialGuest(context.Background(), wire.AgentPort)
			if err == nil {
				_, err = c.Read(make([]byte, 1))
				if err != nil && !errors.Is(err, io.EOF) {
					err = vmm.ErrEnded
				}
				c.Close()
			}
			errs <- err
		}()
	}
	time.Sleep(shortWait)
	u.kill()
	for range cap(errs) {
		select {
		case err := <-errs:
			if !errors.Is(err, vmm.ErrEnded) {
				t.Errorf("dial when the process ended: %v", err)
			}
		case <-time.After(promptly):
			t.Fatal("a dial did not notice the end of the process")
		}
	}
}

func testRestart(t *testing.T, h Harness) {
	u := boot(t, h)
	defer u.kill()
	for range 3 {
		conn, _ := u.echo()
		_, _ = u.ask("restart")
		_ = conn.SetReadDeadline(time.Now().Add(promptly))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
			t.Errorf("stream of an agent that restarted: %v", err)
		}
		conn.Close()
		u.must("port")
	}
}

func testDrives(t *testing.T, h Harness) {
	base, one, two := newDrive(t, "base"), newDrive(t, "one"), newDrive(t, "two,x=\"y\"\n")
	// A path may hold anything; the drive is known by what is in it.
	before := digest(t, base)
	u := boot(t, h, vmm.Drive{Path: base, ReadOnly: true}, vmm.Drive{Path: one}, vmm.Drive{Path: two})
	defer u.kill()
	other := boot(t, h, vmm.Drive{Path: base, ReadOnly: true})
	defer other.kill()
	if _, err := u.ask("write base changed"); err == nil || !strings.HasPrefix(err.Error(), "guest: ") {
		t.Errorf("write to a read-only drive: %v, want the guest's complaint", err)
	}
	u.must("write one first")
	u.must("write two second")
	if got := other.must("read base"); got != "" {
		t.Errorf("base read as %q", got)
	}
	// A flush that the guest saw done is in the file, however the VMM ends.
	if got := readSector(t, one); got != "first" {
		t.Errorf("drive one holds %q", got)
	}

	// A file that is written to has one user, and no reader.
	for _, d := range []vmm.Drive{{Path: one}, {Path: one, ReadOnly: true}, {Path: base}} {
		m := h.Machine(t)
		m.Drives = []vmm.Drive{d}
		if p, err := h.New(t).Start(t.Context(), m); err == nil {
			p.Kill()
			<-p.Done()
			t.Errorf("drive %+v is in use, and start took it", d)
		} else if b := (*banger.Error)(nil); !errors.As(err, &b) || b.Code != banger.CodeConflict {
			t.Errorf("drive in use: %v, want code %s", err, banger.CodeConflict)
		} else if !strings.Contains(b.Message, fmt.Sprintf("%q", d.Path)) {
			t.Errorf("drive in use: %q does not name %q", b.Message, d.Path)
		}
	}

	// What the guest trims becomes a hole.
	full := allocated(t, two)
	u.must("trim two")
	if h.Processes {
		if now := allocated(t, two); full-now < guestops.TrimBytes {
			t.Errorf("trim of %d bytes: %d allocated before, %d after", guestops.TrimBytes, full, now)
		}
	}
	u.kill()
	other.kill()
	if got := readSector(t, two); got != "second" {
		t.Errorf("drive two holds %q", got)
	}
	if digest(t, base) != before {
		t.Error("the read-only drive's bytes changed")
	}
	// The lock goes with the process.
	u = boot(t, h, vmm.Drive{Path: one})
	if got := u.must("read one"); got != "first" {
		t.Errorf("drive one read as %q", got)
	}
	u.kill()
}

func testRefusals(t *testing.T, h Harness) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, row := range []struct {
		name   string
		ctx    context.Context
		change func(*vmm.Machine)
		code   banger.Code // "" for any error
	}{
		{"cpus 0", t.Context(), func(m *vmm.Machine) { m.CPUs = 0 }, banger.CodeUsage},
		{"cpus -1", t.Context(), func(m *vmm.Machine) { m.CPUs = -1 }, banger.CodeUsage},
		{"cpus a million", t.Context(), func(m *vmm.Machine) { m.CPUs = 1_000_000 }, banger.CodeUsage},
		{"memory 0", t.Context(), func(m *vmm.Machine) { m.MemoryBytes = 0 }, banger.CodeUsage},
		{"memory 1 byte over a MiB", t.Context(), func(m *vmm.Machine) { m.MemoryBytes++ }, banger.CodeUsage},
		{"memory over the host's", t.Context(), func(m *vmm.Machine) { m.MemoryBytes = 1 << 50 }, banger.CodeUnavailable},
		{"accel unknown", t.Context(), func(m *vmm.Machine) { m.Accel = "fast" }, banger.CodeUsage},
		{"kernel missing", t.Context(), func(m *vmm.Machine) { m.Boot.Kernel += ".not" }, banger.CodeNotFound},
		{"initrd missing", t.Context(), func(m *vmm.Machine) { m.Boot.Initrd += ".not" }, banger.CodeNotFound},
		{"drive missing", t.Context(), func(m *vmm.Machine) { m.Drives = []vmm.Drive{{Path: m.RunDir + "/not"}} }, banger.CodeNotFound},
		{"drive a folder", t.Context(), func(m *vmm.Machine) { m.Drives = []vmm.Drive{{Path: m.RunDir, ReadOnly: true}} }, banger.CodeInvalid},
		{"drive a device", t.Context(), func(m *vmm.Machine) { m.Drives = []vmm.Drive{{Path: "/dev/null"}} }, banger.CodeInvalid},
		{"context cancelled", canceled, func(*vmm.Machine) {}, ""},
	} {
		m := h.Machine(t)
		out := new(console)
		m.Console = out
		row.change(&m)
		began := time.Now()
		p, err := h.New(t).Start(row.ctx, m)
		if err == nil {
			p.Kill()
			<-p.Done()
			t.Errorf("%s: started", row.name)
			continue
		}
		if b := (*banger.Error)(nil); row.code != "" && (!errors.As(err, &b) || b.Code != row.code) {
			t.Errorf("%s: %v, want code %s", row.name, err, row.code)
		}
		if row.ctx == canceled && !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", row.name, err)
		}
		if took := time.Since(began); took > promptly {
			t.Errorf("%s: took %v", row.name, took)
		}
		if left, err := os.ReadDir(m.RunDir); err != nil || len(left) > 0 {
			t.Errorf("%s: left in RunDir: %v %v", row.name, left, err)
		}
		if out.len() > 0 {
			t.Errorf("%s: the console was written to", row.name)
		}
	}
	if _, err := h.New(t).Probe(t.Context(), "fast"); err == nil {
		t.Error("probe of an unknown accel: no error")
	}
	info, err := h.New(t).Probe(t.Context(), banger.AccelTCG)
	if err != nil || info.Driver == "" || info.Accel != banger.AccelTCG || info.Reason == "" {
		t.Errorf("probe: %+v, %v", info, err)
	}
}

// testConcurrency calls everything from everywhere; the race detector and the
// leak check judge.
func testConcurrency(t *testing.T, h Harness) {
	u := boot(t, h)
	u.must("port")
	var group sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range 8 {
		group.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
				switch (n + i) % 4 {
				case 0:
					_ = u.p.Pause(short)
				case 1:
					_ = u.p.Resume(short)
				default:
					if c, err := u.p.DialGuest(short, wire.AgentPort); err == nil {
						_ = c.SetDeadline(time.Now().Add(20 * time.Millisecond))
						_, _ = guestops.Ask(c, bufio.NewReader(c), "port")
						c.Close()
					}
				}
				u.p.Exit()
				u.p.Info()
				stop()
			}
		})
	}
	time.Sleep(time.Second)
	if e := u.kill(); e.Cause != vmm.CauseKilled {
		t.Errorf("exit %+v, want killed", e)
	}
	cancel()
	group.Wait()
}

// A console keeps what a guest writes.
type console struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

func (c *console) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.Len()
}

func (c *console) waitFor(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(promptly); !strings.Contains(c.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("the console lacks %q", text)
			return
		}
	}
}

// newDrive makes a file of 4 MiB without holes that begins with the first word
// of name.
func newDrive(t *testing.T, name string) string {
	t.Helper()
	marker, _, _ := strings.Cut(name, ",")
	data := bytes.Repeat([]byte{0xa5}, 4<<20)
	clear(data[:guestops.WriteOffset+guestops.SectorBytes])
	copy(data, marker)
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func readSector(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sector := data[guestops.WriteOffset:][:guestops.SectorBytes]
	return string(bytes.TrimRight(sector, "\x00"))
}

func digest(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(data)
}

// allocated is what a file occupies, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// requireNoMoreGoroutines waits for goroutines that are about to end and
// reports those that stay, by their stacks.
func requireNoMoreGoroutines(t *testing.T, before int) {
	t.Helper()
	for end := time.Now().Add(promptly); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			stacks := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
			stacks = slices.DeleteFunc(stacks, func(s string) bool { return strings.Contains(s, "testing.(*T).Run") })
			t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, strings.Join(stacks, "\n\n"))
			return
		}
	}
}

// testCard sends frames of many sizes through a network card and back.
func testCard(t *testing.T, h Harness) {
	mac := [6]byte{2, 0x62, 0x61, 0, 0, 7}
	host := [6]byte{2, 0, 0, 0, 0, 1}
	const mtu = 65520 // what IPv4 and the Ethernet header leave of 64 KiB
	attached := make(chan net.Conn, 2)
	u := bootWith(t, h, func(m *vmm.Machine) {
		m.NIC = &vmm.NIC{MAC: mac, MTU: mtu, Attach: func(c net.Conn) error { attached <- c; return nil }}
	})
	var conn net.Conn
	select {
	case conn = <-attached:
	default:
		t.Fatal("started, and nothing was attached")
	}
	defer conn.Close()
	if got, want := u.must("card"), fmt.Sprint(net.HardwareAddr(mac[:]), " ", mtu); got != want {
		t.Errorf("the guest's card is %q, want %q", got, want)
	}
	_ = conn.SetDeadline(time.Now().Add(u.h.BootTimeout))
	r := bufio.NewReaderSize(conn, 256<<10)
	// next skips what the guest's kernel says of its own accord.
	next := func() []byte {
		for {
			var head [4]byte
			if _, err := io.ReadFull(r, head[:]); err != nil {
				t.Fatalf("reading frames: %v", err)
			}
			frame := make([]byte, binary.BigEndian.Uint32(head[:]))
			if len(frame) > mtu+14 {
				t.Fatalf("a frame of %d bytes with an MTU of %d", len(frame), mtu)
			}
			if _, err := io.ReadFull(r, frame); err != nil {
				t.Fatalf("reading frames: %v", err)
			}
			if len(frame) >= 14 && frame[12] == guestops.EtherType>>8 && frame[13] == guestops.EtherType&0xff {
				return frame
			}
		}
	}
	send := func(frames ...[]byte) {
		var all []byte
		for _, f := range frames {
			all = append(binary.BigEndian.AppendUint32(all, uint32(len(f))), f...)
		}
		if _, err := conn.Write(all); err != nil {
			t.Fatalf("writing frames: %v", err)
		}
	}
	fill := rand.New(rand.NewPCG(uint64(mtu), 0))
	for _, size := range []int{46, 47, 100, mtu - 1, mtu} {
		payload := make([]byte, size)
		for i := range payload {
			payload[i] = byte(fill.Uint32())
		}
		// Several in one write, one of them not for this card.
		send(guestops.Frame(host, host, payload), guestops.Frame(mac, host, payload), guestops.Frame(mac, host, payload))
		for range 2 {
			if got := next(); !bytes.Equal(got, guestops.Frame(host, mac, payload)) {
				t.Errorf("a frame of %d bytes comes back with %d, or changed", size+14, len(got))
			}
		}
	}
	// A stream that nobody reads holds up the card and nothing else.
	u.must("frames 2000")
	u.must("port")
	if err := u.p.Pause(t.Context()); err != nil {
		t.Error(err)
	}
	if err := u.p.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	next()
	u.kill()
	_ = conn.SetDeadline(time.Now().Add(promptly))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the stream outlives the machine: %v", err)
	}

	// Who cannot attach has started nothing.
	m := h.Machine(t)
	refusal := errors.New("no network today")
	m.NIC = &vmm.NIC{MAC: mac, MTU: 1500, Attach: func(c net.Conn) error { c.Close(); return refusal }}
	if p, err := h.New(t).Start(t.Context(), m); !errors.Is(err, refusal) {
		t.Errorf("start: %v, want the refusal", err)
		if err == nil {
			p.Kill()
			<-p.Done()
		}
	}
}
