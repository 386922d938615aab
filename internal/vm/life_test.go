package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger"
	"banger/internal/store"
	"banger/internal/vmm/vmmtest"
	"banger/internal/wire"
)

// A model says in a few lines what a VM does with a request, or with what its
// guest does: the state afterwards, and whether the request is refused.
type model struct {
	state banger.State
	boots int // of machines
}

func (m *model) apply(op string) (refused bool) {
	runs := m.state == banger.StateRunning || m.state == banger.StatePaused
	switch op {
	case "start":
		if runs {
			return true
		}
		m.state, m.boots = banger.StateRunning, m.boots+1
	case "stop", "kill":
		if runs {
			m.state = banger.StateStopped
		}
	case "pause":
		if m.state != banger.StateRunning {
			return true
		}
		m.state = banger.StatePaused
	case "resume":
		if m.state != banger.StatePaused {
			return true
		}
		m.state = banger.StateRunning
	case "exec":
		return m.state != banger.StateRunning
	case "power off":
		switch m.state {
		case banger.StateRunning:
			m.state = banger.StateStopped
		case banger.StatePaused:
			m.state = banger.StateFailed // a guest that stands still does not power off
		}
	case "reboot":
		switch m.state {
		case banger.StateRunning:
			m.boots++
		case banger.StatePaused:
			m.state = banger.StateFailed
		}
	case "panic", "crash":
		if runs {
			m.state = banger.StateFailed
		}
	}
	return false
}

// Random requests and random ends: the VM and the model agree after each, and
// so does what is recorded.
func TestRequestsAgainstModel(t *testing.T) {
	setLimits(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	ops := []string{"start", "start", "start", "stop", "kill", "pause", "resume", "exec", "power off", "reboot", "panic", "crash"}
	for round := range 40 {
		f := vmmtest.NewFake(vmmtest.Options{Serve: agent{}.serve})
		saved := Life{State: banger.StateCreated}
		v, _ := newVM(t, f, func(cfg *Config) { cfg.Save = func(l Life) error { saved = l; return nil } })
		m := &model{state: banger.StateCreated}
		var did []string
		var follows sync.WaitGroup
		reboots := 0
		for range 25 {
			op := ops[rng.IntN(len(ops))]
			if op == "reboot" {
				// The limit of reboots has a test of its own.
				if reboots++; reboots >= maxReboots {
					continue
				}
			}
			did = append(did, op)
			refused := m.apply(op)
			var err error
			guests := f.Guests()
			guest := func(end func(*vmmtest.FakeGuest)) {
				if len(guests) > 0 && !isDone(guests[len(guests)-1]) {
					end(guests[len(guests)-1])
				}
			}
			switch op {
			case "start":
				if Rests(v.State()) {
					follows.Wait() // the one before is on its way out
				}
				if err = v.Start(t.Context(), banger.StageNetwork); err == nil {
					reboots = 0 // Follow counts anew
					follows.Go(func() { v.Follow(context.Background()) })
				}
			case "stop":
				_, err = v.Stop(t.Context())
			case "kill":
				err = v.Kill()
			case "pause":
				err = v.Pause(t.Context())
			case "resume":
				err = v.Resume(t.Context())
			case "exec":
				var s *Session
				if s, err = v.Exec(t.Context(), wire.Exec{}); err == nil {
					s.Close()
				}
			case "power off":
				guest((*vmmtest.FakeGuest).PowerOff)
			case "reboot":
				guest((*vmmtest.FakeGuest).Reboot)
			case "panic":
				guest((*vmmtest.FakeGuest).Panic)
			case "crash":
				guest(func(g *vmmtest.FakeGuest) { g.Crash("x") })
			}
			if (err != nil) != refused || refused && banger.CodeOf(err) != banger.CodeConflict {
				t.Fatalf("round %d, %q: %v, the model refuses: %v", round, did, err, refused)
			}
			agree := func() bool {
				v.mu.Lock()
				defer v.mu.Unlock()
				return v.life.State == m.state && len(f.Guests()) == m.boots && saved.State == m.state
			}
			for end := time.Now().Add(wait); !agree(); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("round %d, %q: it is %s (%s), recorded %s, %d machines; the model says %+v",
						round, did, v.State(), v.Life().Reason, saved.State, len(f.Guests()), *m)
				}
			}
			running := 0
			for _, g := range f.Guests() {
				if !isDone(g) {
					running++
				}
			}
			if want := btoi(!Rests(m.state)); running != want {
				t.Fatalf("round %d, %q: %s with %d machines", round, did, m.state, running)
			}
		}
		v.Kill()
		follows.Wait()
		if !Rests(v.State()) {
			t.Errorf("at the end it is %s", v.State())
		}
		state := v.State()
		nothingRuns(t, v, f, state)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// A start that cannot be recorded does not happen; everything else does.
func TestRecordThatCannotBeWritten(t *testing.T) {
	full := errors.New("no room")
	var err error
	v, f := fake(t, agent{}, vmmtest.Options{})
	v.cfg.Save = func(Life) error { return err }
	err = full
	if got := v.Start(t.Context(), banger.StageNetwork); !errors.Is(got, full) {
		t.Errorf("start: %v", got)
	}
	nothingRuns(t, v, f, banger.StateCreated)
	err = nil
	if err := v.Start(t.Context(), banger.StageNetwork); err != nil {
		t.Fatal(err)
	}
	err = full
	if clean, err := v.Stop(t.Context()); err != nil || !clean {
		t.Errorf("stop: %v, %v", clean, err)
	}
	nothingRuns(t, v, f, banger.StateStopped)
}

// A start is on record before anything is spawned, and a stop before the
// guest is asked.
func TestRecordedBeforeTheAct(t *testing.T) {
	var mu sync.Mutex
	var log []string
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		log = append(log, fmt.Sprintf(format, args...))
	}
	a := agent{shutdown: func(g *vmmtest.FakeGuest, _ net.Conn) { say("asked to power off"); g.PowerOff() }}
	f := vmmtest.NewFake(vmmtest.Options{Serve: a.serve, OnStart: func(*vmmtest.FakeGuest) { say("spawned") }})
	v, _ := newVM(t, f, func(cfg *Config) {
		cfg.Save = func(l Life) error { say("%s", l.State); return nil }
	})
	if err := v.Start(t.Context(), banger.StageNetwork); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := "starting, spawned, starting, running, stopping, asked to power off, stopped"
	if got := strings.Join(log, ", "); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestWaitForInit(t *testing.T) {
	setLimits(t)
	up := make(chan struct{})
	a := agent{boot: func(_ *vmmtest.FakeGuest, conn net.Conn) {
		tell(conn, wire.BootEvent{Stage: "network"})
		<-up
		tell(conn, wire.BootEvent{Stage: "init"})
	}}
	v, _ := fake(t, a, vmmtest.Options{})
	result := make(chan error, 1)
	go func() { result <- v.Start(t.Context(), banger.StageInit) }()
	select {
	case err := <-result:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(up)
	if err := <-result; err != nil || v.Life().Stage != banger.StageInit {
		t.Errorf("%v, stage %s", err, v.Life().Stage)
	}
	v.Stop(t.Context())
	// A guest that never says so is too slow, and the stage says where it was.
	v, f := fake(t, agent{boot: func(_ *vmmtest.FakeGuest, conn net.Conn) {
		tell(conn, wire.BootEvent{Stage: "network"})
		silent(conn)
	}}, vmmtest.Options{})
	if err := v.Start(t.Context(), banger.StageInit); banger.CodeOf(err) != banger.CodeTimeout || !strings.Contains(err.Error(), `"network"`) {
		t.Errorf("got %v", err)
	}
	nothingRuns(t, v, f, banger.StateFailed)
	if !strings.Contains(v.Life().Reason, `"network"`) || v.Life().Detail == "" {
		t.Errorf("recorded: %+v", v.Life())
	}
}

func newStore(t testing.TB) *store.Store {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCreate(t *testing.T) {
	s := newStore(t)
	r := Record{ID: store.NewID(), Name: "dev", Spec: banger.Spec{CPUs: 3, Command: []string{"a", "\x1b"}}, ImageID: "aabb00000001", Main: []string{"m"}}
	if err := Create(s, &r, ""); err != nil {
		t.Fatal(err)
	}
	got, life, err := Load(s, r.ID)
	if err != nil || !reflect.DeepEqual(got, r) || life.State != banger.StateCreated || r.Disks.Overlay == r.Disks.Work || r.Created.IsZero() {
		t.Errorf("read %+v, %+v, %v; want %+v", got, life, err, r)
	}
	again := Record{ID: r.ID, Name: "other"}
	if err := Create(s, &again, ""); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made again: %v", err)
	}
	if now, _, err := Load(s, r.ID); err != nil || !reflect.DeepEqual(now, r) {
		t.Errorf("after that: %+v, %v", now, err)
	}
	for _, bad := range []Record{{ID: "x", Name: "dev"}, {ID: store.NewID(), Name: ""}, {ID: store.NewID(), Name: "../x"}} {
		if err := Create(s, &bad, ""); err == nil {
			t.Errorf("%+v was made", bad)
		}
	}
	if left, err := s.Leftovers(); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	// A life with a very long reason can be read again.
	if err := SaveLife(s, r.ID, Life{State: banger.StateFailed, Reason: strings.Repeat("r", 1<<20), Detail: strings.Repeat("\x00", 1<<20)}); err != nil {
		t.Error(err)
	}
	if l, err := LoadLife(s, r.ID); err != nil || l.State != banger.StateFailed {
		t.Errorf("%+v, %v", l.State, err)
	}
	if _, _, err := Load(s, store.NewID()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a VM that is not there: %v", err)
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "0": true, "a-": true, "dev-1": true, strings.Repeat("a", 63): true, strings.Repeat("a", 64): false,
		"": false, "-a": false, "A": false, "a_b": false, "a.b": false, "a b": false, "é": false, "a\n": false, "../a": false, "a\x00": false,
		"0123456789ab": false, "0123456789a": true, "0123456789abc": true, "0123456789ag": true,
	} {
		if err := CheckName(name); (err == nil) != ok || err != nil && banger.CodeOf(err) != banger.CodeUsage {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestSettleRecord(t *testing.T) {
	s := newStore(t)
	r := Record{ID: store.NewID(), Name: "dev"}
	if err := Create(s, &r, ""); err != nil {
		t.Fatal(err)
	}
	child, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	go child.Wait()
	defer child.Kill()
	vmm, err := ProcessOf(child.Pid)
	if err != nil {
		t.Fatal(err)
	}
	life := Life{State: banger.StateRunning, VMM: vmm, Supervisor: vmm}
	for _, file := range []string{store.SupervisorSocket} {
		if err := os.WriteFile(filepath.Join(s.VM(r.ID), file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(s.VMRun(r.ID), "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	found, err := Settle(s, r.ID, &life)
	if err != nil || !strings.Contains(found, "while the VM was running") || life.State != banger.StateFailed || life.VMM != nil || life.Ended == nil {
		t.Errorf("%q, %v, %+v", found, err, life)
	}
	if vmm.Alive() {
		t.Error("the VMM lives on")
	}
	if now, err := LoadLife(s, r.ID); err != nil || now.State != banger.StateFailed {
		t.Errorf("recorded: %+v, %v", now, err)
	}
	for _, name := range []string{store.SupervisorSocket, "run"} {
		if _, err := os.Lstat(filepath.Join(s.VM(r.ID), name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	before, err := os.Stat(filepath.Join(s.VM(r.ID), store.VMLife))
	if err != nil {
		t.Fatal(err)
	}
	if found, err := Settle(s, r.ID, &life); found != "" || err != nil {
		t.Errorf("settled twice: %q, %v", found, err)
	}
	if after, err := os.Stat(filepath.Join(s.VM(r.ID), store.VMLife)); err != nil || !os.SameFile(before, after) {
		t.Errorf("what is at rest was written again: %v", err)
	}
}

func TestProcessIdentity(t *testing.T) {
	me, err := ProcessOf(os.Getpid())
	if err != nil || !me.Alive() || me.PID != os.Getpid() || me.Boot == "" {
		t.Fatalf("%+v, %v", me, err)
	}
	for name, other := range map[string]Process{
		"an earlier start": {me.PID, me.Start - 1, me.Boot}, "another boot": {me.PID, me.Start, "x"}, "no such process": {1 << 23, me.Start, me.Boot},
	} {
		if other.Alive() {
			t.Errorf("%s is alive", name)
		}
		if err := other.Kill(); err != nil { // and this test lives on
			t.Errorf("%s: %v", name, err)
		}
	}
	child, err := os.StartProcess("/bin/sleep", []string{"a) b (sleep", "1000"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	p, err := ProcessOf(child.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Error(err)
	}
	if p.Alive() { // a zombie is dead
		t.Error("it lives on")
	}
	if err := p.Kill(); err != nil {
		t.Errorf("killed again: %v", err)
	}
	if _, err := ProcessOf(child.Pid); err == nil {
		t.Error("a zombie can be found")
	}
	if err := syscall.Kill(os.Getpid(), 0); err != nil {
		t.Error(err)
	}
}

// Whatever is written in whatever pieces, a log holds the end of it, within
// its limit, and a reader that follows misses nothing.
func TestLog(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for round := range 50 {
		path := filepath.Join(t.TempDir(), "log")
		limit := int64(2 + rng.IntN(2000))
		var all []byte
		l, err := openLog(path, limit)
		if err != nil {
			t.Fatal(err)
		}
		for range rng.IntN(60) {
			piece := make([]byte, rng.IntN(300))
			for i := range piece {
				piece[i] = byte(rng.IntN(256))
			}
			if n, err := l.Write(piece); n != len(piece) || err != nil {
				t.Fatalf("wrote %d of %d, %v", n, len(piece), err)
			}
			all = append(all, piece...)
			if rng.IntN(10) == 0 { // the next start of the VM
				l.Close()
				if l, err = openLog(path, limit); err != nil {
					t.Fatal(err)
				}
			}
		}
		l.Close()
		var got []byte
		if err := ReadLog(t.Context(), path, nil, func(b []byte) error { got = append(got, b...); return nil }); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(string(all), string(got)) || int64(len(got)) > limit || int64(len(got)) < min(int64(len(all)), limit/2) {
			t.Fatalf("round %d, limit %d: of %d bytes %d are kept, the end: %v", round, limit, len(all), len(got), strings.HasSuffix(string(all), string(got)))
		}
	}
	if err := ReadLog(t.Context(), filepath.Join(t.TempDir(), "none"), nil, func([]byte) error { return errors.New("something") }); err != nil {
		t.Errorf("a log that is not there: %v", err)
	}
}

func TestFollowLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var mu sync.Mutex
	over := false
	var got strings.Builder
	done := make(chan error, 1)
	go func() {
		done <- ReadLog(t.Context(), path, func() bool { mu.Lock(); defer mu.Unlock(); return !over }, func(b []byte) error {
			mu.Lock()
			defer mu.Unlock()
			got.Write(b)
			return nil
		})
	}()
	l, err := openLog(path, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i := range 8 {
		text := fmt.Sprintf("%03d %s\n", i, strings.Repeat("x", 300))
		want.WriteString(text)
		l.Write([]byte(text))
		// A reader that keeps up misses nothing, however often the log turns.
		for end := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
			mu.Lock()
			n := got.Len()
			mu.Unlock()
			if n == want.Len() {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("after %d lines: %d of %d bytes", i, n, want.Len())
			}
		}
	}
	l.Write([]byte("last"))
	mu.Lock()
	over = true
	mu.Unlock()
	if err := <-done; err != nil || got.String() != want.String()+"last" {
		t.Errorf("%d of %d bytes, %v", got.Len(), want.Len()+4, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if err := ReadLog(ctx, path, func() bool { return true }, func([]byte) error { return nil }); err != cause {
		t.Errorf("got %v", err)
	}
}

// A stop and a kill at once, and the guest's own end: whoever is first, the VM
// comes to rest and nobody is told of an error.
func TestStopAndKillAtOnce(t *testing.T) {
	setLimits(t)
	for round := range 60 {
		v, f := started(t, agent{}, vmmtest.Options{})
		var wg sync.WaitGroup
		wg.Go(func() { v.Follow(context.Background()) })
		wg.Go(func() {
			time.Sleep(time.Duration(round%6) * 50 * time.Microsecond)
			if _, err := v.Stop(t.Context()); err != nil {
				t.Errorf("stop: %v", err)
			}
		})
		wg.Go(func() {
			time.Sleep(time.Duration(round/6%5) * 50 * time.Microsecond)
			if err := v.Kill(); err != nil {
				t.Errorf("kill: %v", err)
			}
		})
		if round%2 == 0 {
			wg.Go(func() { f.Guests()[0].PowerOff() })
		}
		wg.Wait()
		if s := v.State(); !Rests(s) {
			t.Errorf("round %d: it is %s", round, s)
		}
		nothingRuns(t, v, f, v.State())
	}
}
