package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/usernet"
	"banger/internal/vm"
)

const (
	// minIDPrefix is how much of an id is needed to mean a VM by it.
	minIDPrefix = 4
	// adoptPause is between two tries to reach a supervisor that holds its VM
	// and does not answer (yet).
	adoptPause    = 20 * time.Millisecond
	adoptPauseMax = time.Second
	// settleLimit is how long a supervisor may take from its last word to its
	// end.
	settleLimit = 30 * time.Second
	// maxNotes bounds what is kept to be told to the next client.
	maxNotes = 100
)

// A manager knows every VM of a state folder. It makes and removes them, and
// starts the supervisors; what a VM does while it runs is its supervisor's.
//
// Of a VM at rest the manager holds the VM's record in memory. Of one that is
// supervised it reads the record anew, and a watcher waits for the end of the
// supervisor to settle it.
type manager struct {
	*rooms
	ctx      context.Context // ends with the daemon
	retiring context.Context // ends when the daemon is asked to go

	mu     sync.Mutex
	byID   map[string]*entry
	byName map[string]*entry // also names whose VM is being made
	notes  []string          // what start-up found, for the first client
}

// An entry is one VM.
type entry struct {
	id  string
	rec vm.Record // does not change, but for Spec.Ports, which are to be read anew
	net int       // rec.Net, from before there is a record; under manager.mu
	// broken is why the records cannot be read. Nothing is done with such a VM
	// but showing it and, when forced, removing it.
	broken error

	// ops is held over what makes, starts or removes the VM. It is a channel
	// so that who waits can give up.
	ops chan struct{}

	mu      sync.Mutex
	life    vm.Life                 // the truth while there is no supervisor
	rested  chan struct{}           // closed when the supervisor's end is settled; nil: there is none
	cancel  context.CancelCauseFunc // of the start that is under way
	leaving int                     // more than 0: it is being removed, or was
}

func newEntry(id string) *entry { return &entry{id: id, ops: make(chan struct{}, 1)} }

// lock takes ops.
func (e *entry) lock(ctx context.Context) error {
	select {
	case e.ops <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (e *entry) unlock() { <-e.ops }

// name is what a user calls it.
func (e *entry) name() string {
	if e.rec.Name != "" {
		return e.rec.Name
	}
	return e.id
}

// newManager reads all records, takes up the VMs that run, and finishes or
// undoes what was under way when the daemon before this one ended.
func newManager(ctx, retiring context.Context, r *rooms) (*manager, error) {
	m := &manager{rooms: r, ctx: ctx, retiring: retiring, byID: map[string]*entry{}, byName: map[string]*entry{}}
	for _, what := range r.store.Swept() {
		if rest, ok := strings.CutPrefix(what, "tmp/vm-"); ok && len(rest) >= 12 {
			m.note("VM %s: its creation had not ended and was undone", rest[:12])
		}
		if rest, ok := strings.CutPrefix(what, "trash/"); ok && len(rest) >= 12 {
			m.note("%s: its removal had not ended and was finished", rest[:12])
		}
	}
	ids, err := r.store.VMIDs()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		// What one VM's folder does not allow keeps no other VM from its user.
		if err := m.takeUp(id); err != nil {
			m.note("VM %s: %v", id, err)
			m.mu.Lock()
			if m.byID[id] == nil {
				m.byID[id] = newEntry(id)
			}
			m.byID[id].broken = err
			m.mu.Unlock()
		}
	}
	return m, nil
}

func (m *manager) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.byID)
}

// note keeps a line for the log and for the next client.
func (m *manager) note(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	log.Print(line)
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.notes) < maxNotes {
		m.notes = append(m.notes, line)
	}
}

// told wraps a handler so that its client hears what start-up found.
func (m *manager) told(h api.Handler) api.Handler {
	return func(ctx context.Context, c *api.Call) (any, error) {
		m.mu.Lock()
		notes := m.notes
		m.notes = nil
		m.mu.Unlock()
		for _, n := range notes {
			c.Emit(api.Event{Notice: n})
		}
		return h(ctx, c)
	}
}

// takeUp brings one VM of the folder under this manager.
func (m *manager) takeUp(id string) error {
	e := newEntry(id)
	hold, err := m.store.HoldVM(id)
	supervised := errors.Is(err, store.ErrHeld)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil && !supervised:
		return err
	case err == nil:
		defer hold.Close()
	}
	e.rec, e.life, e.broken = vm.Load(m.store, id)
	if errors.Is(e.broken, fs.ErrNotExist) && !supervised {
		if _, err := os.Lstat(m.store.VM(id)); err != nil {
			return nil
		}
	}
	m.mu.Lock()
	m.byID[id] = e
	e.net = e.rec.Net
	if e.broken == nil {
		if other := m.byName[e.rec.Name]; other != nil {
			e.broken = fmt.Errorf("VM %s: the VM %s has the name %q too", id, other.id, e.rec.Name)
		} else {
			m.byName[e.rec.Name] = e
		}
	}
	m.mu.Unlock()
	switch {
	case e.broken != nil:
		m.note("VM %s: %v", id, e.broken)
	case supervised:
		e.rested = make(chan struct{})
		if vm.IsRemoving(m.store, id) {
			e.leaving++
		}
		go m.adopt(e)
	case vm.IsRemoving(m.store, id), e.rec.Ephemeral && (e.rec.OfRun || e.life.State != banger.StateCreated):
		if _, err := vm.Settle(m.store, id, &e.life); err != nil {
			return err
		}
		if err := m.drop(e); err != nil {
			return err
		}
		if e.rec.Ephemeral {
			m.note("VM %s: whoever ran it is gone, and so is the VM", e.rec.Name)
		} else {
			m.note("VM %s: its removal had not ended and was finished", e.rec.Name)
		}
	default:
		found, err := vm.Settle(m.store, id, &e.life)
		if err != nil && found == "" {
			return err
		}
		if err != nil {
			m.note("VM %s: its record is not up to date: %v", e.rec.Name, err)
		}
		if found != "" {
			m.note("VM %s: %s; it is %s now", e.rec.Name, found, e.life.State)
		}
	}
	return nil
}

// drop deletes a VM that the caller holds and that nothing runs of.
func (m *manager) drop(e *entry) error {
	if err := m.store.Remove(m.store.VM(e.id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.byID, e.id)
	if m.byName[e.rec.Name] == e {
		delete(m.byName, e.rec.Name)
	}
	return nil
}

// adopt watches the supervisor of another daemon's. It may still be starting,
// so that it does not listen yet, or has gone deaf: as long as it holds its VM
// the VM is its own.
func (m *manager) adopt(e *entry) {
	if e.leaving > 0 {
		go func() {
			if err := m.removeNow(m.ctx, e, true); err == nil {
				m.note("VM %s: its removal had not ended and was finished", e.rec.Name)
			}
		}()
	}
	for pause := adoptPause; m.ctx.Err() == nil; pause = min(2*pause, adoptPauseMax) {
		hold, err := m.store.HoldVM(e.id)
		if err == nil {
			hold.Close()
			break
		}
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if c, err := m.supervisorOf(e); err == nil {
			c.Call(m.ctx, supervisorWait, api.None{}, nil, &api.None{}, nil, nil)
			pause = adoptPause
		}
		select {
		case <-time.After(pause):
		case <-m.ctx.Done():
		}
	}
	if m.ctx.Err() == nil {
		m.settled(e)
	}
}

// supervisorOf connects to the supervisor of a VM, and to no other process:
// the one that listens must be the one of the record, started when it says.
func (m *manager) supervisorOf(e *entry) (*api.Client, error) {
	life, err := vm.LoadLife(m.store, e.id)
	if err != nil {
		return nil, err
	}
	c, err := dialSupervisor(m.store, e.id, life)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", e.name(), err)
	}
	return c, nil
}

// dialSupervisor connects to the supervisor that a life names, and to no other
// process.
func dialSupervisor(s *store.Store, id string, life vm.Life) (*api.Client, error) {
	if life.Supervisor == nil || !life.Supervisor.Alive() {
		return nil, errors.New("it has no supervisor (any more)")
	}
	conn, err := api.Dial(s.VM(id), store.SupervisorSocket)
	if err != nil {
		return nil, err
	}
	if pid, err := api.Peer(conn); err != nil || pid != life.Supervisor.PID {
		conn.Close()
		return nil, fmt.Errorf("process %d listens on its socket, its supervisor is %d (%v)", pid, life.Supervisor.PID, err)
	}
	return api.NewClient(conn), nil
}

// settled takes a VM back whose supervisor has ended: its record is brought to
// rest, and an ephemeral VM goes.
func (m *manager) settled(e *entry) {
	var hold *os.File
	var err error
	for end := time.Now().Add(settleLimit); ; time.Sleep(5 * time.Millisecond) {
		hold, err = m.store.HoldVM(e.id)
		if !errors.Is(err, store.ErrHeld) || time.Now().After(end) {
			break
		}
	}
	var life vm.Life
	if err == nil {
		if life, err = vm.LoadLife(m.store, e.id); err == nil {
			found, settleErr := vm.Settle(m.store, e.id, &life)
			if found != "" && !e.rec.Ephemeral {
				log.Printf("VM %s: %s", e.rec.Name, found)
			}
			if settleErr != nil {
				log.Printf("VM %s: %v", e.rec.Name, settleErr)
			}
		}
	}
	if hold != nil {
		hold.Close()
	}
	e.mu.Lock()
	if err == nil {
		e.life = life
	} else if !errors.Is(err, fs.ErrNotExist) {
		log.Printf("VM %s: %v", e.rec.Name, err)
		e.life.State, e.life.Reason = banger.StateFailed, err.Error()
	}
	rested := e.rested
	e.rested = nil
	ephemeral := e.rec.Ephemeral
	if ephemeral {
		e.leaving++
	}
	e.mu.Unlock()
	close(rested)
	if ephemeral {
		if err := m.removeNow(m.ctx, e, true); err != nil && banger.CodeOf(err) != banger.CodeNotFound && m.ctx.Err() == nil {
			log.Printf("VM %s: %v", e.rec.Name, err)
		}
	}
}

// look is what a VM is at, and the channel that closes when its supervisor's
// end is settled; nil where there is no supervisor.
func (m *manager) look(e *entry) (life vm.Life, rested chan struct{}) {
	e.mu.Lock()
	life, rested = e.life, e.rested
	e.mu.Unlock()
	if rested == nil {
		return life, nil
	}
	if now, err := vm.LoadLife(m.store, e.id); err == nil {
		life = now
	}
	return life, rested
}

// find means a VM by its name, its id, or the beginning of its id.
func (m *manager) find(text string) (*entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.byName[text]; e != nil && m.byID[e.id] == e {
		return e, nil
	}
	var found *entry
	if len(text) >= minIDPrefix && strings.Trim(text, "0123456789abcdef") == "" {
		for id, e := range m.byID {
			if strings.HasPrefix(id, text) {
				if found != nil {
					return nil, banger.Errorf(banger.CodeUsage, "VM %q: more than one id begins so", text)
				}
				found = e
			}
		}
	}
	if found == nil {
		return nil, banger.Errorf(banger.CodeNotFound, "VM %q: there is none of that name", text).WithHint("`banger ls` shows them")
	}
	return found, nil
}

// sound is find for what needs a VM that can be worked with.
func (m *manager) sound(text string) (*entry, error) {
	e, err := m.find(text)
	if err == nil {
		err = e.check()
	}
	return e, err
}

// check refuses what cannot be worked with.
func (e *entry) check() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.leaving > 0 {
		return banger.Errorf(banger.CodeNotFound, "VM %q: it was removed", e.name())
	}
	if e.broken != nil {
		return (&banger.Error{Code: banger.CodeInvalid, Message: e.broken.Error(), Err: e.broken}).
			WithHint("its disks are untouched; put the record back, or `banger rm -f %s` removes all of it", e.id)
	}
	return nil
}

// reserve finds a free name for a VM that is being made, and keeps it. A name
// whose VM is being removed is waited for.
func (m *manager) reserve(ctx context.Context, name string) (*entry, string, error) {
	e := newEntry(store.NewID())
	for {
		m.mu.Lock()
		given := name
		for given == "" || name == "" && m.byName[given] != nil {
			given = madeUpName()
		}
		other := m.byName[given]
		if other == nil {
			err := m.number(e)
			if err == nil {
				m.byName[given] = e
			}
			m.mu.Unlock()
			return e, given, err
		}
		m.mu.Unlock()
		other.mu.Lock()
		leaving := other.leaving > 0
		other.mu.Unlock()
		if !leaving {
			return nil, "", banger.Errorf(banger.CodeConflict, "VM %q: the name is taken", name).
				WithHint("`banger rm %s` removes that VM; `banger start %s` starts it", name, name)
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		}
	}
}

// number gives a VM that is being made the first number that is free for its
// addresses. The caller holds mu.
func (m *manager) number(e *entry) error {
	taken := make(map[int]bool)
	for _, all := range []map[string]*entry{m.byID, m.byName} {
		for _, other := range all {
			taken[other.net] = true
		}
	}
	for n := 1; n < usernet.MaxVMs; n++ {
		if !taken[n] {
			e.net = n
			return nil
		}
	}
	return banger.Errorf(banger.CodeUnavailable, "network: no addresses are left for another VM").WithHint("`banger rm` removes VMs")
}

// make makes a VM: the name first, then the disks with the records in one
// step, and the VM can be found. Whatever fails, nothing of it is left.
func (m *manager) make(ctx context.Context, p api.CreateParams, ofRun bool) (e *entry, err error) {
	if p.Name != "" {
		if err := vm.CheckName(p.Name); err != nil {
			return nil, err
		}
	}
	if err := checkSpec(p.Spec); err != nil {
		return nil, err
	}
	im, err := m.images.ByID(p.Prepared.ImageID)
	if err != nil {
		return nil, err
	}
	// Held until the VM can be found: nobody removes the image in between.
	release, err := m.images.Hold(im)
	if err != nil {
		return nil, err
	}
	defer release()
	k, err := m.kernels.Get(p.Prepared.Kernel)
	if err != nil {
		return nil, err
	}
	if err := checkNetwork(p.Spec); err != nil {
		return nil, err
	}
	made, name, err := m.reserve(ctx, p.Name)
	if err != nil {
		return nil, err
	}
	e = made
	defer func() {
		if err != nil {
			m.mu.Lock()
			delete(m.byName, name)
			m.mu.Unlock()
		}
	}()
	spec := p.Spec
	spec.Image = p.Prepared.Image
	if spec.Hostname == "" && p.Name != "" {
		spec.Hostname = p.Name
	}
	e.rec = vm.Record{
		ID: e.id, Name: name, Ephemeral: p.Ephemeral, OfRun: ofRun, Spec: vm.Complete(spec, e.id),
		ImageID: im.ID, RootUUID: fmt.Sprintf("%x", im.UUID), Kernel: k.Version,
		Config: im.Config, Main: mainOf(im.Config, spec), Net: made.net,
	}
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	if err := vm.Create(m.store, &e.rec, im.WorkSeed); err != nil {
		return nil, err
	}
	if _, err := m.kernels.Get(k.Version); err != nil { // removed before the VM could be found
		m.store.Remove(m.store.VM(e.id))
		return nil, err
	}
	e.life = vm.Life{State: banger.StateCreated, Stage: banger.StageDisks}
	m.mu.Lock()
	m.byID[e.id] = e
	m.mu.Unlock()
	return e, nil
}

// errStopAsked is the cause of the end of a start that a stop ended.
var errStopAsked = &banger.Error{Code: banger.CodeCanceled, Message: "start: a stop was asked for"}

// start brings a VM to run. One that runs already is left alone.
func (m *manager) start(ctx context.Context, e *entry, p startParams, emit func(api.Event)) error {
	if err := e.lock(ctx); err != nil {
		return err
	}
	defer e.unlock()
	for {
		if err := e.check(); err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		life, rested := m.look(e)
		switch {
		case rested == nil:
			return m.boot(ctx, e, p, emit)
		case life.Supervisor != nil && !life.Supervisor.Alive():
			// Its end is about to be settled.
		case life.State == banger.StateRunning && !p.Bare:
			// The record is written while the supervisor decides: ask it.
			if s, err := m.stateOf(ctx, e); err == nil && s == banger.StateRunning {
				return nil
			}
		case life.State == banger.StateRunning, life.State == banger.StatePaused:
			return banger.Errorf(banger.CodeConflict, "VM %s: it is %s", e.name(), life.State).WithHint("`banger resume %s`, or `banger stop %s`", e.name(), e.name())
		}
		// It is on its way to rest, or being started by a supervisor that a
		// daemon before this one left: see what becomes of it.
		select {
		case <-rested:
		case <-time.After(adoptPauseMax / 10):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// boot starts a supervisor and has it boot the VM; the caller has e.ops.
func (m *manager) boot(ctx context.Context, e *entry, p startParams, emit func(api.Event)) error {
	up := false
	watch := func(ev api.Event) { up = true; emit(ev) }
	wrap := scoped(e.rec)
	err := m.bootIn(ctx, e, wrap, p, watch)
	if wrap != nil && !up && errors.Is(err, api.ErrGone) {
		// The user manager is there and gives no scope.
		log.Printf("VM %s: no scope (%v); its supervisor gets a session of its own", e.name(), err)
		return m.bootIn(ctx, e, nil, p, watch)
	}
	return err
}

func (m *manager) bootIn(ctx context.Context, e *entry, wrap []string, p startParams, emit func(api.Event)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	conn, theirs, err := api.Pair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	cmd, said, err := m.supervisorCommand(e, wrap, theirs)
	if err != nil {
		conn.Close()
		return err
	}
	defer said.Close()
	e.mu.Lock()
	e.cancel = cancel
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		e.cancel = nil
		e.mu.Unlock()
	}()
	if err := cmd.Start(); err != nil {
		conn.Close()
		return fmt.Errorf("VM %s: supervisor: %w", e.name(), err)
	}
	theirs.Close()
	rested := make(chan struct{})
	e.mu.Lock()
	e.rested = rested
	e.mu.Unlock()
	go func() {
		cmd.Wait()
		if m.ctx.Err() == nil {
			m.settled(e)
		}
	}()
	err = api.NewClient(conn).Call(ctx, supervisorStart, p, nil, &api.None{}, emit, nil)
	if err == nil {
		return nil
	}
	// It ends by itself, since it has nothing to supervise.
	select {
	case <-rested:
	case <-m.ctx.Done():
		return context.Cause(m.ctx)
	}
	if cause := context.Cause(ctx); cause == error(errStopAsked) {
		return cause
	}
	if errors.Is(err, api.ErrGone) {
		text, _ := os.ReadFile(said.Name())
		return &banger.Error{Code: banger.CodeInternal, Err: err, Detail: string(text[:min(len(text), 4<<10)]),
			Message: fmt.Sprintf("VM %s: its supervisor died", e.name())}
	}
	return err
}

// supervisorCommand is the process of a supervisor: in a session of its own,
// with nothing of the daemon's but the one connection and a file for its last
// words.
func (m *manager) supervisorCommand(e *entry, wrap []string, conn *os.File) (*exec.Cmd, *os.File, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	said, err := os.OpenFile(filepath.Join(m.store.VM(e.id), store.VMSupervisor), os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, nil, err
	}
	args := append(wrap, self, "supervise", e.id)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "BANGER_HOME="+m.store.Root())
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = said, said
	cmd.ExtraFiles = []*os.File{conn} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd, said, nil
}

// ask makes one short call to the supervisor of a VM.
func (m *manager) ask(ctx context.Context, e *entry, method string, params any, files []*os.File) error {
	c, err := m.supervisorOf(e)
	if err == nil {
		err = c.Call(ctx, method, params, files, &api.None{}, nil, nil)
	}
	if err != nil && banger.CodeOf(err) == banger.CodeInternal {
		// It may have ended by itself, or have been ended, in between.
		life, _ := m.look(e)
		if !vm.Rests(life.State) && life.Supervisor != nil && !life.Supervisor.Alive() {
			return banger.Errorf(banger.CodeGuest, "VM %s: its supervisor died", e.name())
		}
		if vm.Rests(life.State) {
			return banger.Errorf(banger.CodeGuest, "VM %s: it is %s by now: %s", e.name(), life.State, life.Reason)
		}
	}
	return err
}

// stateOf asks the supervisor of a VM for its state.
func (m *manager) stateOf(ctx context.Context, e *entry) (s banger.State, err error) {
	c, err := m.supervisorOf(e)
	if err != nil {
		return "", err
	}
	return s, c.Call(ctx, supervisorState, api.None{}, nil, &s, nil, nil)
}

// stop brings a VM to rest; timeoutMs is what its guest gets, -1 the default.
// It does not wait for a start that is under way, but ends it.
func (m *manager) stop(ctx context.Context, e *entry, timeoutMs int64) error {
	return m.bringDown(ctx, e, func() error {
		return m.ask(ctx, e, supervisorStop, stopParams{TimeoutMs: timeoutMs}, nil)
	})
}

// kill brings a VM to rest at once. A supervisor that does not answer is ended
// too, and its VMM with it.
func (m *manager) kill(ctx context.Context, e *entry) error {
	return m.bringDown(ctx, e, func() error {
		askCtx, cancel := context.WithTimeout(ctx, settleLimit)
		defer cancel()
		err := m.ask(askCtx, e, supervisorKill, api.None{}, nil)
		if err == nil {
			return nil
		}
		life, loadErr := vm.LoadLife(m.store, e.id)
		if loadErr != nil || life.Supervisor == nil {
			return err
		}
		log.Printf("VM %s: %v; ending its supervisor, process %d", e.name(), err, life.Supervisor.PID)
		return life.Supervisor.Kill()
	})
}

func (m *manager) bringDown(ctx context.Context, e *entry, down func() error) error {
	e.mu.Lock()
	rested, cancel := e.rested, e.cancel
	e.mu.Unlock()
	if cancel != nil {
		cancel(errStopAsked)
		// The start holds ops until all of it is undone.
		if err := e.lock(ctx); err != nil {
			return err
		}
		e.unlock()
		return nil
	}
	if rested == nil {
		return nil // at rest already
	}
	err := down()
	if err != nil {
		// It may have come to rest by itself meanwhile.
		if life, _ := m.look(e); !vm.Rests(life.State) {
			select {
			case <-rested:
			case <-time.After(100 * time.Millisecond):
				return err
			}
		}
	}
	select {
	case <-rested:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// remove deletes a VM. One that runs is refused unless force kills it first.
func (m *manager) remove(ctx context.Context, e *entry, force bool) error {
	if err := e.check(); err != nil && (!force || e.broken == nil) {
		return err
	}
	life, rested := m.look(e)
	if rested != nil && vm.Rests(life.State) {
		// Its supervisor has said its last word and is on its way out.
		select {
		case <-rested:
			rested = nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if rested != nil && !force {
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s", e.name(), life.State).
			WithHint("stop it first, or `banger rm -f %s` does both", e.name())
	}
	return m.removeNow(ctx, e, force)
}

// removeNow deletes a VM, and ends it first if it runs and force allows that.
// From here on nobody finds it; if it cannot be done after all, it is there
// again. Who comes second waits for the first.
func (m *manager) removeNow(ctx context.Context, e *entry, force bool) (err error) {
	e.mu.Lock()
	e.leaving++ // nothing starts it from here on, but for what has begun already
	e.mu.Unlock()
	defer func() {
		if err != nil {
			e.mu.Lock()
			e.leaving--
			e.mu.Unlock()
		}
	}()
	for {
		if _, rested := m.look(e); rested != nil {
			if !force {
				return banger.Errorf(banger.CodeConflict, "VM %s: it was started meanwhile", e.name())
			}
			if err := vm.MarkRemoving(m.store, e.id); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if err := m.kill(ctx, e); err != nil {
				return errors.Join(err, vm.UnmarkRemoving(m.store, e.id))
			}
		}
		if err := e.lock(ctx); err != nil {
			return err
		}
		if _, rested := m.look(e); rested == nil {
			break
		}
		e.unlock()
	}
	defer e.unlock()
	m.mu.Lock()
	there := m.byID[e.id] == e
	m.mu.Unlock()
	if !there {
		return banger.Errorf(banger.CodeNotFound, "VM %q: it was removed", e.name())
	}
	hold, err := m.holdResting(ctx, e)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if hold != nil {
		defer hold.Close()
	}
	return m.drop(e)
}

// holdResting takes the hold on a VM that has no supervisor of this daemon's.
// One that a daemon before this one started and that never heard of it takes
// the hold for a moment, finds its daemon gone, and ends.
func (m *manager) holdResting(ctx context.Context, e *entry) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		hold, err := m.store.HoldVM(e.id)
		if !errors.Is(err, store.ErrHeld) {
			return hold, err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// show is a VM as the user sees it.
func (m *manager) show(e *entry) banger.VM {
	if e.broken != nil {
		return banger.VM{ID: e.id, Name: e.id, State: banger.StateFailed, Reason: e.broken.Error(), Disks: []banger.Disk{}, Ports: []banger.Port{}, Addresses: []string{}}
	}
	life, rested := m.look(e)
	r := e.rec
	out := banger.VM{
		Name: r.Name, ID: r.ID, State: life.State, Reason: life.Reason,
		Image: r.Spec.Image, ImageID: r.ImageID, Kernel: r.Kernel,
		Driver: life.Driver, Accel: life.Accel, CPUs: r.Spec.CPUs, MemoryBytes: r.Spec.MemoryBytes,
		Command: r.Main, ExitCode: life.Exit, Ephemeral: r.Ephemeral,
		Ports: []banger.Port{}, Addresses: []string{}, Created: r.Created, Started: life.Started, Confinement: life.Confinement,
	}
	if out.Accel == "" {
		out.Accel = r.Spec.Accel
	}
	out.Ports = append(out.Ports, life.Ports...)
	if a, err := usernet.AddressesOf(r.Net); err == nil && r.Net > 0 {
		out.Addresses = []string{a.IPv4.Addr().String(), a.IPv6.Addr().String()}
	}
	if p, err := policyOf(r.Spec); err == nil {
		out.Net = p.String()
	}
	if rested != nil && life.VMM != nil {
		out.PID = life.VMM.PID
	}
	dir := m.store.VM(r.ID)
	out.Disks = []banger.Disk{}
	for role, path := range map[string]string{
		"base":    filepath.Join(m.store.Image(r.ImageID), store.ImageRootfs),
		"overlay": filepath.Join(dir, store.VMOverlay), "work": filepath.Join(dir, store.VMWork),
	} {
		d := banger.Disk{Path: path, Role: role}
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err == nil {
			d.SizeBytes, d.AllocatedBytes = st.Size, st.Blocks*512
		}
		out.Disks = append(out.Disks, d)
	}
	slices.SortFunc(out.Disks, func(a, b banger.Disk) int { return strings.Compare(a.Role, b.Role) })
	return out
}

// all is every VM that is not being removed, the newest first.
func (m *manager) all() []*entry {
	m.mu.Lock()
	list := make([]*entry, 0, len(m.byID))
	for _, e := range m.byID {
		e.mu.Lock()
		if e.leaving == 0 {
			list = append(list, e)
		}
		e.mu.Unlock()
	}
	m.mu.Unlock()
	slices.SortFunc(list, func(a, b *entry) int {
		if c := b.rec.Created.Compare(a.rec.Created); c != 0 {
			return c
		}
		return strings.Compare(a.id, b.id)
	})
	return list
}
