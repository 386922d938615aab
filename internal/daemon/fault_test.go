package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/store/storetest"
	"banger/internal/usernet"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest"
)

// A vmChange is one, in a folder whose daemon is m.
type vmChange struct {
	name    string
	crashed bool   // begins where a daemon and its supervisors died
	makes   string // the VM of that name
	lives   string // the record of that VM's life may be any that is at rest
	do      func(ctx context.Context, m *manager) error
}

// What changes the folders of VMs, each done in a process that is stopped before
// every operation on a file. The daemon has been started there; a supervisor is
// in the same process, and its VM has no VMM.
var vmChanges = []vmChange{
	{name: "create", makes: "new", do: func(ctx context.Context, m *manager) error {
		return makeFault(ctx, m, api.CreateParams{Name: "new", Prepared: preparedOf("seed")}, false)
	}},
	{name: "create from an empty seed, to go when it stops", makes: "new", do: func(ctx context.Context, m *manager) error {
		return makeFault(ctx, m, api.CreateParams{Name: "new", Ephemeral: true, Prepared: preparedOf("empty")}, false)
	}},
	{name: "create without a seed", makes: "new", do: func(ctx context.Context, m *manager) error {
		return makeFault(ctx, m, api.CreateParams{Name: "new", Prepared: preparedOf("base")}, false)
	}},
	{name: "create for a run", makes: "new", do: func(ctx context.Context, m *manager) error {
		return makeFault(ctx, m, api.CreateParams{Name: "new", Ephemeral: true, Prepared: preparedOf("seed")}, true)
	}},
	{name: "ports", do: func(ctx context.Context, m *manager) error {
		e, err := m.sound("work")
		if err != nil {
			return err
		}
		by, err := parsePorts([]string{"18080:80"})
		if err != nil {
			return err
		}
		_, err = m.changeRecordedPorts(ctx, e, by, func(_, by []usernet.Forward) ([]usernet.Forward, error) { return by, nil })
		return err
	}},
	{name: "start and stop", lives: "work", do: func(ctx context.Context, m *manager) error {
		return superviseFault(ctx, m, 0, func(sup *supervisor) error {
			_, err := sup.v.Stop(ctx)
			return err
		})
	}},
	{name: "start, pause, resume and kill", lives: "work", do: func(ctx context.Context, m *manager) error {
		return superviseFault(ctx, m, 0, func(sup *supervisor) error {
			if err := errors.Join(sup.v.Pause(ctx), sup.v.Resume(ctx)); err != nil {
				return err
			}
			return sup.v.Kill()
		})
	}},
	{name: "start that fails", lives: "work", do: func(ctx context.Context, m *manager) error {
		err := superviseFault(ctx, m, 2, nil)
		if err != nil && strings.Contains(err.Error(), "told to fail") {
			return nil
		}
		return errors.Join(errors.New("it did not fail as it should"), err)
	}},
	{name: "rm", do: func(ctx context.Context, m *manager) error { return removeFault(ctx, m, "drop") }},
	{name: "rm of one that runs", lives: "work", do: func(ctx context.Context, m *manager) error {
		err := superviseFault(ctx, m, 0, func(sup *supervisor) error {
			return errors.Join(vm.MarkRemoving(m.store, sup.rec.ID), sup.v.Kill())
		})
		if err != nil {
			return err
		}
		return removeFault(ctx, m, "work")
	}},
	{name: "the next start", crashed: true, do: func(context.Context, *manager) error { return nil }},
}

// Images of the campaign by what their work seed is: "base" has none.
var imagesOfFaults = map[string]string{"base": worldImage, "seed": "aabb00000002", "empty": "aabb00000003"}

func preparedOf(name string) api.Prepared {
	return api.Prepared{Image: name, ImageID: imagesOfFaults[name], Kernel: "1.2.3"}
}

func makeFault(ctx context.Context, m *manager, p api.CreateParams, ofRun bool) error {
	_, err := m.make(ctx, p, ofRun)
	return err
}

func removeFault(ctx context.Context, m *manager, name string) error {
	e, err := m.sound(name)
	if err != nil {
		return err
	}
	return m.remove(ctx, e, false)
}

// superviseFault is what a supervisor does with the VM "work": it boots it, and
// then do ends it.
func superviseFault(ctx context.Context, m *manager, failAt int, do func(*supervisor) error) error {
	e, err := m.sound("work")
	if err != nil {
		return err
	}
	hold, err := m.store.HoldVM(e.id)
	if err != nil {
		return err
	}
	defer hold.Close()
	sup := &supervisor{store: m.store, leased: make(chan struct{}), over: make(chan struct{})}
	release, err := sup.open(m.store, e.id, func() (vmm.Driver, error) {
		return vmmtest.NewFake(vmmtest.Options{Serve: fakeGuest, FailAt: failAt}), nil
	})
	if err != nil {
		return err
	}
	defer release()
	endLog := sup.keepNetLog()
	defer endLog()
	if err := sup.v.Start(ctx, banger.StageNetwork); err != nil {
		return err
	}
	return do(sup)
}

// openVMs is the start of a daemon on a state folder, as far as files go.
func openVMs(ctx context.Context, root string) (*manager, error) {
	s, err := store.Open(root)
	if err != nil {
		return nil, err
	}
	return newManager(ctx, ctx, openRooms(s))
}

// sameEachTime makes a change where the clock begins at the same time and the
// random numbers are the same each time, so that what it makes is the same to
// the byte. A VM that runs has goroutines of its own, which cannot be held to
// that, and makes nothing anew.
func (c *vmChange) sameEachTime(t *testing.T, seed uint64, m *manager) (err error) {
	if c.makes == "" {
		return c.do(t.Context(), m)
	}
	synctest.Test(t, func(t *testing.T) {
		cryptotest.SetGlobalRandom(t, seed)
		err = c.do(t.Context(), m)
	})
	return err
}

var lifeTimes = regexp.MustCompile(`"(started|ended)": "[^"]*"`)

// A vmSweep is one change, done once without any fault, and what it made of
// what.
type vmSweep struct {
	*vmChange
	template     string
	known        *storetest.Prints
	ids          map[string]string // of the VMs of the template, by name
	start, final storetest.Contents
	rests        banger.State // how the one rests that lives; "" where it is gone
	tried        map[string]bool
}

// vmFiles are all that may stand in the folder of a VM at rest.
var vmFiles = []string{store.VMRecord, store.VMLife, store.VMOverlay, store.VMWork, store.VMOutput, store.VMConsole, store.VMNetLog}

// of tells what is in the folders of VMs, less what they logged. The life of
// one that may be in any state is left out.
func (sw *vmSweep) of(t *testing.T, root string) storetest.Contents {
	t.Helper()
	out := storetest.Contents{}
	for path, is := range sw.known.Of(t, root) {
		rest, ok := strings.CutPrefix(path, "vms/")
		if !ok || rest == "" || strings.HasSuffix(path, ".log") || filepath.Base(path) == store.VMNetLog ||
			sw.lives != "" && rest == sw.ids[sw.lives]+"/"+store.VMLife {
			continue
		}
		out[rest] = is
	}
	return out
}

// check requires of the folder of a daemon that was cut off from the change, or
// in which the change failed, that the next daemon finds each VM whole or gone,
// and no disk written to or made again; that nothing half made is left; and
// that the change can be made again.
func (sw *vmSweep) check(t *testing.T, root string, done bool) (problem string) {
	t.Helper()
	m, err := openVMs(t.Context(), root)
	if err != nil {
		return fmt.Sprintf("open: %v", err)
	}
	if problem := sw.whole(t, m, root, done); problem != "" {
		return problem
	}
	// A record of a VM that ends may be lost to a fault, and then its supervisor
	// died; that it began is recorded before it does.
	if done && sw.rests != "" && sw.state(m) == banger.StateCreated {
		return "it was done, and there is no word of it"
	}
	id := fmt.Sprint(sw.of(t, root), sw.state(m))
	if sw.tried[id] {
		return ""
	}
	sw.tried[id] = true
	err = sw.do(t.Context(), m)
	_, missing := m.find(sw.makes)
	already := banger.CodeOf(err) == banger.CodeNotFound && sw.makes == "" ||
		banger.CodeOf(err) == banger.CodeConflict && sw.makes != "" && missing == nil
	if err != nil && !already {
		return fmt.Sprintf("again: %v", err)
	}
	if m, err = openVMs(t.Context(), root); err != nil {
		return fmt.Sprintf("open in the end: %v", err)
	}
	if problem := sw.whole(t, m, root, true); problem != "" {
		return "in the end: " + problem
	}
	if s := sw.state(m); s != sw.rests {
		return fmt.Sprintf("in the end it is %q, want %q", s, sw.rests)
	}
	return ""
}

// state is the one of the VM that lives, "" where it is gone or there is none.
func (sw *vmSweep) state(m *manager) banger.State {
	e, err := m.find(sw.lives)
	if err != nil {
		return ""
	}
	return e.life.State
}

// whole looks at what a daemon has found at its start. done: the change was
// made.
func (sw *vmSweep) whole(t *testing.T, m *manager, root string, done bool) (problem string) {
	t.Helper()
	if left, err := m.store.Leftovers(); err != nil || left != nil {
		return fmt.Sprintf("left over: %q, %v", left, err)
	}
	now := sw.of(t, root)
	byName := map[string]string{}
	for id, e := range m.byID {
		if e.broken != nil {
			return fmt.Sprintf("VM %s: %v", id, e.broken)
		}
		byName[e.rec.Name] = id
		if rec, life, err := vm.Load(m.store, id); err != nil || !vm.Rests(life.State) || life.State != e.life.State ||
			life.Supervisor != nil || life.VMM != nil || life.Ports != nil {
			return fmt.Sprintf("VM %s (%s): %+v, %v", rec.Name, id, life, err)
		}
		entries, err := os.ReadDir(m.store.VM(id))
		if err != nil {
			return err.Error()
		}
		for _, entry := range entries {
			if !slices.Contains(vmFiles, entry.Name()) {
				return fmt.Sprintf("VM %s has a file %s", e.rec.Name, entry.Name())
			}
		}
	}
	for path := range now {
		if id, _, _ := strings.Cut(path, "/"); m.byID[id] == nil {
			return fmt.Sprintf("%s is of no VM", path)
		}
	}
	// What there is was there, or is what becomes of it.
	for path, is := range now {
		id, file, _ := strings.Cut(path, "/")
		before, was := sw.start[path]
		after, stays := sw.final[path]
		switch {
		case is == before && was || is == after && stays:
		case !was && !stays && m.byID[id].rec.Name == sw.makes: // with another id, at a second try
			if problem := freshVM(m, m.byID[id].rec); problem != "" {
				return fmt.Sprintf("VM %s: %s", id, problem)
			}
		default:
			return fmt.Sprintf("%s is %q, was %q and becomes %q", path, is, before, after)
		}
		if file != store.VMOverlay && file != store.VMWork || !was {
			continue
		}
		var here, there syscall.Stat_t
		if err := errors.Join(syscall.Lstat(filepath.Join(root, "vms", path), &here), syscall.Lstat(filepath.Join(sw.template, "vms", path), &there)); err != nil {
			return err.Error()
		}
		if here.Ino != there.Ino {
			return fmt.Sprintf("%s is another file", path)
		}
	}
	for path := range sw.start {
		_, stays := sw.final[path]
		id, _, _ := strings.Cut(path, "/")
		if _, ok := now[path]; !ok && (stays || m.byID[id] != nil) {
			return fmt.Sprintf("%s is lost", path)
		}
	}
	for path := range sw.final {
		_, ok := now[path]
		id, _, _ := strings.Cut(path, "/")
		if _, was := sw.start[path]; !ok && !was && m.byID[id] != nil {
			return fmt.Sprintf("VM %s is half there: it has no %s", id, path)
		}
	}
	if done {
		for path, is := range sw.final {
			_, was := sw.start[path]
			if now[path] != is && (was || byName[sw.makes] == "") { // it may have another id
				return fmt.Sprintf("it was done, and %s is %q, not %q", path, now[path], is)
			}
		}
		for path := range now {
			if id, _, _ := strings.Cut(path, "/"); sw.final[path] == "" && !strings.HasSuffix(path, "/") && m.byID[id].rec.Name != sw.makes {
				return fmt.Sprintf("it was done, and %s is there", path)
			}
		}
	}
	return ""
}

// freshVM says what is wrong with a VM that was just made.
func freshVM(m *manager, r vm.Record) string {
	for file, uuid := range map[string]string{store.VMOverlay: r.Disks.Overlay, store.VMWork: r.Disks.Work} {
		f, err := os.Open(filepath.Join(m.store.VM(r.ID), file))
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		disk, err := ext4.Open(f)
		if err != nil {
			return fmt.Sprintf("%s: %v", file, err)
		}
		im, err := m.images.ByID(r.ImageID)
		if err != nil {
			return err.Error()
		}
		if file == store.VMWork && im.WorkSeed != "" {
			f, err := os.Open(im.WorkSeed)
			if err != nil {
				return err.Error()
			}
			defer f.Close()
			seed, err := ext4.Open(f)
			if err != nil {
				return err.Error()
			}
			problem := ""
			if err := ext4.Compare(seed, disk, ext4.DiffAll, func(d ext4.Difference) bool {
				if d.Path != "lost+found" { // each file system has its own
					problem = fmt.Sprintf("%s: %v", file, d)
				}
				return problem == ""
			}); err != nil || problem != "" {
				return fmt.Sprint(problem, err)
			}
		}
		u := disk.UUID()
		if got := fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]); got != uuid {
			return fmt.Sprintf("%s has the UUID %s, its record says %s", file, got, uuid)
		}
	}
	return ""
}

// plantSeed gives a copy of the world's image another id, a name and a seed of
// these files.
func plantSeed(t *testing.T, s *store.Store, name string, files ...string) {
	t.Helper()
	id := imagesOfFaults[name]
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(s.Image(id), 0o700))
	check(os.WriteFile(filepath.Join(s.Image(id), store.ImageRootfs), []byte("base"), 0o400))
	check(store.WriteJSON(filepath.Join(s.Image(id), store.ImageRecord), 1, map[string]any{
		"id": id, "uuid": strings.Repeat("ab", 16), "config": banger.ImageConfig{Cmd: []string{"/bin/sh"}}}))
	f, err := os.Create(filepath.Join(s.Image(id), store.ImageWorkSeed))
	check(err)
	defer f.Close()
	w, err := ext4.NewWriter(f, ext4.Options{})
	check(err)
	check(w.Add(".", &ext4.Inode{Mode: 0o040700}))
	for _, file := range files {
		c, err := w.Place(strings.NewReader(strings.Repeat(file, 10_000)), int64(10_000*len(file)))
		check(err)
		check(w.Add(file, &ext4.Inode{Mode: 0o100644, Content: c}))
	}
	check(w.Finish(ext4.Params{SizeBytes: 8 << 20, UUID: [16]byte{1}}))
}

// plantCrash makes the folder that a daemon and its supervisors leave which end
// all at once, in the middle of what they do.
func plantCrash(t *testing.T, m *manager) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	gone := &vm.Process{PID: 1 << 22, Start: 1, Boot: "x"}
	put := func(name string, ephemeral, ofRun bool, life vm.Life, files ...string) {
		t.Helper()
		e, err := m.make(t.Context(), api.CreateParams{Name: name, Ephemeral: ephemeral, Prepared: preparedOf("base")}, ofRun)
		check(err)
		check(vm.SaveLife(m.store, e.id, life))
		for _, file := range files {
			path := filepath.Join(m.store.VM(e.id), file)
			check(os.MkdirAll(filepath.Dir(path), 0o700))
			check(os.WriteFile(path, []byte("{"), 0o600))
		}
	}
	running := vm.Life{State: banger.StateRunning, Supervisor: gone, VMM: gone}
	put("rests", false, false, vm.Life{State: banger.StateStopped}, ".life.json.123", ".vm.json.45", store.VMOutput)
	put("runs", false, false, running, "run/"+store.VMInitramfs, store.SupervisorSocket, store.VMConsole)
	put("stops", false, false, vm.Life{State: banger.StateStopping, Supervisor: gone}, "run/"+store.VMInitramfs)
	put("goes", false, false, running, store.VMRemoving, "run/"+store.VMInitramfs)
	put("ran", true, false, running)
	put("session", true, true, vm.Life{State: banger.StateCreated})
	for _, file := range []string{"tmp/vm-0123456789ab-cd/" + store.VMOverlay, "tmp/vm-0123456789ab-cd/.vm.json.1", "trash/0123456789ac-cd/" + store.VMOverlay} {
		path := filepath.Join(m.store.Root(), file)
		check(os.MkdirAll(filepath.Dir(path), 0o700))
		check(os.WriteFile(path, []byte("x"), 0o600))
	}
}

// TestFaults makes each change of VMs with a fault at each of its operations on
// files. Then the next daemon starts, as after any end of the one before.
func TestFaults(t *testing.T) {
	log.SetOutput(io.Discard) // what start-up finds
	defer log.SetOutput(os.Stderr)
	if storetest.Child(t, func(change, root string) (func() error, error) {
		m, err := openVMs(t.Context(), root)
		tries := uint64(0)
		return func() error {
			for _, c := range vmChanges {
				if c.name == change {
					tries++
					return c.sameEachTime(t, tries, m)
				}
			}
			return fmt.Errorf("no such change: %s", change)
		}, err
	}) {
		return
	}
	r := storetest.Rand(t)
	work := storetest.Dir(t)

	// The folder that most begin with: three VMs at rest.
	template, crashed := filepath.Join(work, "template"), filepath.Join(work, "crashed")
	var managers []*manager
	for _, root := range []string{template, crashed} {
		s, err := store.Open(root)
		if err != nil {
			t.Fatal(err)
		}
		(&world{t: t}).plant(s)
		plantSeed(t, s, "seed", "a", "bc")
		plantSeed(t, s, "empty")
		m, err := openVMs(t.Context(), root)
		if err != nil {
			t.Fatal(err)
		}
		managers = append(managers, m)
	}
	ids := map[string]string{}
	for _, name := range []string{"keep", "work", "drop"} {
		e, err := managers[0].make(t.Context(), api.CreateParams{Name: name, Prepared: preparedOf("seed")}, false)
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = e.id
		if err := os.WriteFile(filepath.Join(managers[0].store.VM(e.id), store.VMConsole), []byte("before\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	plantCrash(t, managers[1])

	for row, c := range vmChanges {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			from := template
			if c.crashed {
				from = crashed
			}
			sw := &vmSweep{vmChange: &c, template: from, ids: ids, tried: map[string]bool{},
				known: storetest.NewPrints(func(data []byte) []byte { return lifeTimes.ReplaceAll(data, nil) })}
			whole := filepath.Join(work, fmt.Sprint(row))
			storetest.LinkTree(t, from, whole)
			m, err := openVMs(t.Context(), whole)
			if err != nil {
				t.Fatal(err)
			}
			sw.start = sw.of(t, whole)
			if err := c.sameEachTime(t, 1, m); err != nil {
				t.Fatal(err)
			}
			if m, err = openVMs(t.Context(), whole); err != nil {
				t.Fatal(err)
			}
			sw.final, sw.rests = sw.of(t, whole), sw.state(m)
			campaign := &storetest.Campaign{Change: c.name, Row: row, From: from, Work: work, Again: true, Check: sw.check}
			tried := campaign.Run(t, r)
			t.Logf("%s, %d folders gone on with; %s", tried, len(sw.tried), time.Since(begin).Round(time.Millisecond))
		})
	}
}
