package daemon

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/vm"
)

// What a VM can be, as far as the model cares.
type fate int

const (
	absent fate = iota
	rests
	runs
)

// A modelVM is what one client knows of its VM: everything it may be, since a
// call that was cut off may have happened or not.
type modelVM struct {
	name string
	id   string
	may  []fate
	did  []string // since the last time it was compared
}

func (m *modelVM) is(f fate)       { m.may = []fate{f} }
func (m *modelVM) might(f fate)    { m.may = append(m.may, f) }
func (m *modelVM) can(f fate) bool { return slices.Contains(m.may, f) }

// chaos is what the clients and the killer share.
type chaos struct {
	*world
	deaths atomic.Int64 // odd while processes are being killed
	hit    atomic.Bool  // supervisors are killed in this round: whatever runs may not any more
}

// chaosRounds is how often something is killed; more with BANGER_CHAOS_ROUNDS.
func chaosRounds(t *testing.T) int {
	n := 100
	if testing.Short() {
		n = 10
	}
	if text := os.Getenv("BANGER_CHAOS_ROUNDS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// Ten clients do what clients do, while daemons, supervisors and the clients'
// own connections are killed at random. After each round everything is what
// the clients' models say: what was reported made is there and whole, what was
// reported removed is gone, what runs has one VMM, and nothing else does.
func TestChaos(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	c := &chaos{world: newWorld(t, 0)}
	const clients = 10
	var models []*modelVM
	var rngs []*rand.Rand
	for i := range clients {
		models = append(models, &modelVM{name: fmt.Sprintf("vm%d", i), may: []fate{absent}})
		rngs = append(rngs, rand.New(rand.NewPCG(seed, uint64(i+1))))
	}
	counts := map[string]int{}
	for round := range chaosRounds(t) {
		var wg sync.WaitGroup
		until := time.Now().Add(time.Duration(20+rng.IntN(60)) * time.Millisecond)
		for i, m := range models {
			wg.Go(func() {
				for time.Now().Before(until) && !t.Failed() && c.step(t, m, rngs[i]) {
				}
			})
		}
		time.Sleep(time.Duration(rng.IntN(50)) * time.Millisecond)
		victim := []string{"daemon", "supervisor", "both", "supervisors"}[rng.IntN(4)]
		counts[victim]++
		c.hit.Store(victim != "daemon")
		c.deaths.Add(1)
		if victim != "supervisor" && victim != "supervisors" {
			for _, pid := range c.processes("serve") {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if victim != "daemon" {
			pids := c.processes("supervise")
			if victim != "supervisors" && len(pids) > 0 {
				pids = []int{pids[rng.IntN(len(pids))]}
			}
			for _, pid := range pids {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		c.deaths.Add(1)
		wg.Wait()
		if victim != "daemon" {
			for _, m := range models {
				if m.can(runs) {
					m.might(rests)
				}
			}
		}
		c.hit.Store(false)
		c.compare(t, round, victim, models)
		if t.Failed() {
			t.Log(c.log())
			return
		}
	}
	t.Logf("killed: %v", counts)
	for _, m := range models {
		if !m.can(absent) {
			c.must(api.MethodRemove, api.VMParams{Name: m.name, Force: true}, nil)
		}
	}
	c.atRest()
}

// step is one request of a client, and what its model makes of the answer. It
// is false for a client that died in it: what it asked for may go on for a
// while.
func (c *chaos) step(t *testing.T, m *modelVM, rng *rand.Rand) (alive bool) {
	before := c.deaths.Load()
	maybe := func() {
		if c.hit.Load() && m.can(runs) && !m.can(rests) {
			m.might(rests)
		}
	}
	defer maybe()
	ops := []string{"create", "start", "start", "stop", "kill", "rm", "rm -f", "exec"}
	op := ops[rng.IntN(len(ops))]
	// One in ten calls is cut off in the middle, as by kill -9 of its client.
	cut := time.Duration(-1)
	if rng.IntN(10) == 0 {
		cut = time.Duration(rng.IntN(20)) * time.Millisecond
	}
	var v banger.VM
	var err error
	after := rests
	expect := map[fate]banger.Code{} // the refusal of each fate
	switch op {
	case "create":
		expect = map[fate]banger.Code{rests: banger.CodeConflict, runs: banger.CodeConflict}
		err = c.cutCall(cut, api.MethodCreate, api.CreateParams{Name: m.name, Prepared: c.prep}, &v)
	case "start":
		after, expect = runs, map[fate]banger.Code{absent: banger.CodeNotFound}
		err = c.cutCall(cut, api.MethodStart, api.VMParams{Name: m.name}, &v)
	case "stop":
		expect = map[fate]banger.Code{absent: banger.CodeNotFound}
		err = c.cutCall(cut, api.MethodStop, api.VMParams{Name: m.name, TimeoutMs: -1}, &v)
	case "kill":
		expect = map[fate]banger.Code{absent: banger.CodeNotFound, rests: banger.CodeConflict}
		err = c.cutCall(cut, api.MethodKill, api.VMParams{Name: m.name}, &v)
	case "rm":
		after, expect = absent, map[fate]banger.Code{absent: banger.CodeNotFound, runs: banger.CodeConflict}
		err = c.cutCall(cut, api.MethodRemove, api.VMParams{Name: m.name}, &v)
	case "rm -f":
		after, expect = absent, map[fate]banger.Code{absent: banger.CodeNotFound}
		err = c.cutCall(cut, api.MethodRemove, api.VMParams{Name: m.name, Force: true}, &v)
	case "exec":
		after, expect = runs, map[fate]banger.Code{absent: banger.CodeNotFound}
		_, _, err = c.exec(m.name, true, "exit", "0")
	}
	m.did = append(m.did, fmt.Sprintf("%s: %s (cut %v, deaths %d to %d): %v", time.Now().Format("05.000"), op, cut, before, c.deaths.Load(), err))
	disturbed := cut >= 0 || before%2 == 1 || c.deaths.Load() != before
	if err == nil {
		if op == "create" {
			if !m.can(absent) {
				t.Errorf("%s was made twice", m.name)
			}
			m.id = v.ID
		}
		m.is(after)
		if disturbed && after == runs {
			m.might(rests) // its supervisor may have been killed since
		}
		return cut < 0
	}
	if disturbed {
		if op == "create" {
			m.id = "" // it may be another one now
		}
		if after == runs && !m.can(rests) && !m.can(runs) {
			return cut < 0 // there was nothing to start
		}
		if m.can(runs) {
			m.might(rests) // on the way from one to the other
		}
		m.might(after)
		return cut < 0
	}
	maybe()
	var left []fate
	for _, f := range m.may {
		if code, refused := expect[f]; refused && banger.CodeOf(err) == code {
			left = append(left, f)
		}
	}
	if len(left) > 0 {
		m.may = left
		return true
	}
	t.Errorf("%s of %s, which may be %v: %v (%s)", op, m.name, m.may, err, banger.CodeOf(err))
	return false
}

// cutCall makes a call whose connection breaks after a while; -1: it does not.
func (c *chaos) cutCall(cut time.Duration, method string, params, result any) error {
	if cut < 0 {
		return c.call(method, params, result)
	}
	conn, err := api.Dial(store.Run(c.home), store.DaemonSocket)
	if err != nil {
		return c.call(method, params, result) // no daemon: nothing to cut
	}
	// Half of the end of a connection: the daemon sees all of it, and this
	// client sees when the daemon is done with it.
	timer := time.AfterFunc(cut, func() { conn.CloseWrite() })
	defer timer.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return api.NewClient(conn).Call(ctx, method, params, nil, result, nil, nil)
}

// compare holds the models against what there is. A model that allows more than
// one thing learns which it is.
func (c *chaos) compare(t *testing.T, round int, victim string, models []*modelVM) {
	t.Helper()
	var all map[string]banger.VM
	// What was under way comes to an end by itself.
	steady := func() bool {
		all = c.list()
		for _, v := range all {
			if v.State != banger.StateRunning && !vm.Rests(v.State) {
				return false
			}
		}
		left, err := c.s.Leftovers()
		ids, idsErr := c.s.VMIDs()
		return err == nil && len(left) == 0 && idsErr == nil && len(ids) == len(all) && len(c.processes("supervise")) == count(all) && len(c.processes("sleep")) == count(all)
	}
	for end := time.Now().Add(patience); !steady(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			left, _ := c.s.Leftovers()
			t.Errorf("round %d (%s): it does not come to rest: %+v, supervisors %v, VMMs %v, left %q",
				round, victim, all, c.processes("supervise"), c.processes("sleep"), left)
			return
		}
	}
	for _, m := range models {
		v, there := all[m.name]
		is := absent
		if there {
			is = rests
		}
		if v.State == banger.StateRunning {
			is = runs
		}
		if !m.can(is) {
			t.Errorf("round %d (%s): %s is %d (%s, %q), may be %v; it did\n%s", round, victim, m.name, is, v.State, v.Reason, m.may, strings.Join(m.did, "\n"))
			continue
		}
		if there && m.id != "" && m.id != v.ID && !m.can(absent) {
			t.Errorf("round %d (%s): %s is another VM: %s, was %s", round, victim, m.name, v.ID, m.id)
		}
		m.id = v.ID
		m.is(is)
		m.did = nil
		if !there {
			continue
		}
		for _, name := range []string{store.VMOverlay, store.VMWork} {
			if st, err := os.Stat(filepath.Join(c.s.VM(v.ID), name)); err != nil || st.Size() != banger.DefaultWorkDiskBytes {
				t.Errorf("round %d: %s: %v, %v", round, m.name, st, err)
			}
		}
		if is == runs && !slices.Contains(c.processes("sleep"), v.PID) {
			t.Errorf("round %d: %s runs without its VMM, process %d", round, m.name, v.PID)
		}
	}
	if len(all) > len(models) {
		t.Errorf("round %d: %d VMs: %+v", round, len(all), all)
	}
	if n := len(c.processes("serve")); n != 1 {
		t.Errorf("round %d: %d daemons", round, n)
	}
}

// count is how many of them run.
func count(all map[string]banger.VM) (n int) {
	for _, v := range all {
		if v.State == banger.StateRunning {
			n++
		}
	}
	return n
}
