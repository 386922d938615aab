package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/wire"
)

// One life by way of the API: daemon and supervisor are processes of their own.
func TestLife(t *testing.T) {
	w := newWorld(t, 0)
	v := w.create("dev", banger.Spec{})
	if v.State != banger.StateCreated || v.Name != "dev" || v.Image != "base" || v.Kernel != "1.2.3" || v.CPUs < 1 ||
		v.MemoryBytes != banger.DefaultMemoryBytes || len(v.Disks) != 3 || v.Ports == nil || v.PID != 0 || v.Started != nil || v.Ephemeral {
		t.Errorf("created: %+v", v)
	}
	for _, d := range v.Disks {
		if st, err := os.Stat(d.Path); err != nil || st.Size() != d.SizeBytes {
			t.Errorf("disk %+v: %v", d, err)
		}
	}
	w.atRest("dev")
	v = w.do(api.MethodStart, "dev")
	if v.State != banger.StateRunning || v.Driver != "fake" || v.Started == nil || v.PID == 0 {
		t.Errorf("started: %+v", v)
	}
	if got := w.processes("sleep"); len(got) != 1 || got[0] != v.PID {
		t.Errorf("VMMs %v, it says %d", got, v.PID)
	}
	if again := w.do(api.MethodStart, v.ID); again.PID != v.PID {
		t.Errorf("started twice: %+v", again)
	}
	if out, code, err := w.exec("dev", false, "echo", "hello"); out != "hello\n" || code != 0 || err != nil {
		t.Errorf("exec: %q, %d, %v", out, code, err)
	}
	if v = w.do(api.MethodPause, v.ID[:6]); v.State != banger.StatePaused {
		t.Errorf("paused: %+v", v)
	}
	if _, _, err := w.exec("dev", true, "exit", "0"); banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("exec in a VM that is paused: %v", err)
	}
	if v = w.do(api.MethodResume, "dev"); v.State != banger.StateRunning {
		t.Errorf("resumed: %+v", v)
	}
	err := w.call(api.MethodRemove, api.VMParams{Name: "dev"}, nil)
	if banger.CodeOf(err) != banger.CodeConflict || !strings.Contains(err.(*banger.Error).Hint, "rm -f dev") {
		t.Errorf("rm of what runs: %v", err)
	}
	pid := v.PID
	if v = w.do(api.MethodRestart, "dev"); v.State != banger.StateRunning || v.PID == pid {
		t.Errorf("restarted: %+v, before it was %d", v, pid)
	}
	if v = w.do(api.MethodStop, "dev"); v.State != banger.StateStopped || v.PID != 0 || v.Reason != "" {
		t.Errorf("stopped: %+v", v)
	}
	w.do(api.MethodStop, "dev") // again: nothing to do
	w.atRest("dev")
	if out, _, err := w.exec("dev", false, "echo", "x"); out != "" || banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("exec that must not start it: %q, %v", out, err)
	}
	if out, code, err := w.exec("dev", true, "exit", "42"); out != "" || code != 42 || err != nil {
		t.Errorf("exec that starts it: %q, %d, %v", out, code, err)
	}
	if v = w.do(api.MethodKill, "dev"); v.State != banger.StateStopped || !strings.Contains(v.Reason, "killed") {
		t.Errorf("killed: %+v", v)
	}
	if err := w.call(api.MethodKill, api.VMParams{Name: "dev"}, nil); banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("killed at rest: %v", err)
	}
	w.do(api.MethodRemove, "dev")
	w.atRest()
	for _, method := range []string{api.MethodStart, api.MethodStop, api.MethodInspect, api.MethodRemove, api.MethodPause, api.MethodLogs} {
		if err := w.call(method, api.VMParams{Name: "dev"}, nil); banger.CodeOf(err) != banger.CodeNotFound {
			t.Errorf("%s of what is gone: %v", method, err)
		}
	}
	// Forced, what runs goes too.
	w.create("dev", banger.Spec{})
	w.do(api.MethodStart, "dev")
	w.must(api.MethodRemove, api.VMParams{Name: "dev", Force: true}, nil)
	w.atRest()
}

// What a guest does by itself shows in its record.
func TestGuestsEnd(t *testing.T) {
	w := newWorld(t, 0)
	w.create("dev", banger.Spec{})
	for _, c := range []struct {
		does   string
		state  banger.State
		reason string
	}{
		{"poweroff", banger.StateStopped, "powered off"},
		{"panic", banger.StateFailed, "panicked"},
	} {
		w.exec("dev", true, c.does)
		w.until(c.does, func() bool { return vm.Rests(w.list()["dev"].State) })
		if v := w.list()["dev"]; v.State != c.state || !strings.Contains(v.Reason, c.reason) {
			t.Errorf("%s: %s, %q", c.does, v.State, v.Reason)
		}
		w.atRest("dev")
	}
	// A supervisor that is asked to end ends the VM in order.
	w.do(api.MethodStart, "dev")
	for _, pid := range w.processes("supervise") {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	w.until("it stops", func() bool { return vm.Rests(w.list()["dev"].State) })
	if v := w.list()["dev"]; v.State != banger.StateStopped || v.Reason != "" {
		t.Errorf("SIGTERM: %s, %q", v.State, v.Reason)
	}
	w.atRest("dev")
	// A reset starts it again; one too many does not.
	w.do(api.MethodStart, "dev")
	first := w.processes("supervise")
	defer func() {
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(w.home, "vms/*", store.VMSupervisor))
			for _, l := range logs {
				text, _ := os.ReadFile(l)
				t.Logf("%s: %s", l, text)
			}
		}
	}()
	for n := range 4 {
		before := w.list()["dev"].PID
		w.exec("dev", false, "reboot")
		w.until("it runs again", func() bool {
			v := w.list()["dev"]
			return v.State == banger.StateRunning && v.PID != 0 && v.PID != before
		})
		if now := w.processes("supervise"); len(now) != 1 || now[0] != first[0] {
			t.Fatalf("reboot %d: supervisors %v, at first %v", n, now, first)
		}
	}
	w.exec("dev", false, "reboot")
	w.until("it gives up", func() bool { return w.list()["dev"].State == banger.StateFailed })
	if v := w.list()["dev"]; !strings.Contains(v.Reason, "rebooted 5 times") {
		t.Errorf("it says %q", v.Reason)
	}
	w.atRest("dev")
}

// The main command runs with the VM, is logged, and its end is the VM's.
func TestMainCommand(t *testing.T) {
	w := newWorld(t, 0)
	read := func(p api.LogParams) string {
		t.Helper()
		var out strings.Builder
		c, err := api.Connect(Version)
		if err != nil {
			t.Fatal(err)
		}
		err = c.Call(t.Context(), api.MethodLogs, p, nil, &api.None{}, nil, func(f wire.Frame) error { out.Write(f.Payload); return nil })
		if err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	w.create("short", banger.Spec{Command: []string{"echo", "said"}})
	w.do(api.MethodStart, "short")
	w.until("it stops", func() bool { return w.list()["short"].State == banger.StateStopped })
	if v := w.list()["short"]; v.ExitCode == nil || *v.ExitCode != 0 {
		t.Errorf("its end: %+v", v)
	}
	if got := read(api.LogParams{Name: "short"}); got != "said\n" {
		t.Errorf("its log is %q", got)
	}
	if got := read(api.LogParams{Name: "short", Console: true}); !strings.Contains(got, wire.ReadyLine) {
		t.Errorf("its console is %q", got)
	}
	w.create("bad", banger.Spec{Command: []string{"exit", "7"}})
	w.do(api.MethodStart, "bad")
	w.until("it stops", func() bool { return w.list()["bad"].State == banger.StateStopped })
	if v := w.list()["bad"]; v.ExitCode == nil || *v.ExitCode != 7 {
		t.Errorf("its end: %+v", v)
	}
	// What cannot be started is told, and tried once.
	for code, want := range map[wire.ErrorCode]int{wire.ErrNotFound: 127, wire.ErrNotExecutable: 126, wire.ErrNoUser: 125} {
		w.create("refused", banger.Spec{Command: []string{"refuse", string(code)}})
		w.do(api.MethodStart, "refused")
		w.until("it stops", func() bool { return w.list()["refused"].State == banger.StateStopped })
		if v := w.list()["refused"]; v.ExitCode == nil || *v.ExitCode != want {
			t.Errorf("%s: %+v", code, v)
		}
		if got := read(api.LogParams{Name: "refused"}); got != "banger: the agent refuses\n" {
			t.Errorf("%s: its log is %q", code, got)
		}
		w.do(api.MethodRemove, "refused")
	}
	// A new start runs it anew, and what is followed ends with the VM.
	w.create("long", banger.Spec{Command: []string{"sleep"}})
	w.do(api.MethodStart, "long")
	followed := make(chan string)
	go func() { followed <- read(api.LogParams{Name: "long", Follow: true}) }()
	w.until("it has said something", func() bool { return read(api.LogParams{Name: "long"}) == "asleep\n" })
	before := w.list()["long"].PID
	w.exec("long", false, "reboot")
	w.until("it runs again", func() bool {
		v := w.list()["long"]
		return v.State == banger.StateRunning && v.PID != before && read(api.LogParams{Name: "long"}) == "asleep\nasleep\n"
	})
	if v := w.do(api.MethodStop, "long"); v.State != banger.StateStopped || v.ExitCode == nil || *v.ExitCode != 143 {
		t.Errorf("stopped: %+v", v)
	}
	if got := <-followed; got != "asleep\nasleep\n" {
		t.Errorf("followed: %q", got)
	}
	w.atRest("short", "bad", "long")
}

// A VM that is removed when it stops, whoever stops it.
func TestEphemeral(t *testing.T) {
	w := newWorld(t, 0)
	for _, end := range []string{"stop", "poweroff", "kill", "supervisor", "daemon and supervisor"} {
		w.must(api.MethodCreate, api.CreateParams{Name: "gone", Ephemeral: true, Prepared: w.prep}, nil)
		w.do(api.MethodStart, "gone")
		switch end {
		case "stop":
			w.do(api.MethodStop, "gone")
		case "kill":
			w.do(api.MethodKill, "gone")
		case "poweroff":
			w.exec("gone", false, "poweroff")
		case "daemon and supervisor":
			w.killDaemon()
			fallthrough
		case "supervisor":
			for _, pid := range w.processes("supervise") {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		w.until(end+": it is gone", func() bool { w.list(); ids, err := w.s.VMIDs(); return err == nil && len(ids) == 0 })
		w.atRest()
	}
}

// runVM makes the call of `banger run`; the session is the returned client's.
func (w *world) runVM(ctx context.Context, name string, ephemeral bool) (up <-chan banger.VM, over <-chan error, session *net.UnixConn, daemon *api.Client) {
	w.t.Helper()
	ours, theirs, err := api.Pair()
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := api.Connect(Version)
	if err != nil {
		w.t.Fatal(err)
	}
	upC, overC := make(chan banger.VM, 1), make(chan error, 1)
	go func() {
		defer theirs.Close()
		overC <- c.Call(ctx, api.MethodRun, api.RunParams{Create: api.CreateParams{Name: name, Ephemeral: ephemeral, Prepared: w.prep}},
			[]*os.File{theirs}, &api.None{}, func(e api.Event) {
				if e.VM != nil {
					upC <- *e.VM
				}
			}, nil)
	}()
	return upC, overC, ours, c
}

// A run leaves nothing of a VM without a name, and one with a name at rest:
// whether the client ends it, goes away, or the guest does.
func TestRun(t *testing.T) {
	w := newWorld(t, 0)
	for _, end := range []string{"done", "gone", "cancel", "poweroff"} {
		t.Run(end, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			up, over, conn, daemon := w.runVM(ctx, "", true)
			v := <-up
			args := []string{"echo", "x"}
			if end == "poweroff" {
				args = []string{"poweroff"}
			}
			var out string
			var result api.ExecResult
			err := api.NewClient(conn).Call(t.Context(), api.MethodExec, api.ExecParams{Session: wire.Exec{Args: args}}, nil, &result, nil, func(f wire.Frame) error {
				out += string(f.Payload)
				return nil
			})
			if (err == nil) != (end != "poweroff") {
				t.Errorf("session: %q, %v", out, err)
			}
			switch end {
			case "done":
				daemon.Send(wire.FrameStdinEOF, nil)
			case "cancel":
				daemon.Cancel()
			case "gone":
				cancel()
			}
			err = <-over
			if want := map[string]banger.Code{"done": "", "poweroff": "", "cancel": banger.CodeCanceled, "gone": banger.CodeCanceled}[end]; banger.CodeOf(err) != want {
				t.Errorf("run of %s: %v, want %q", v.Name, err, want)
			}
			w.atRest()
		})
	}
	up, over, conn, daemon := w.runVM(t.Context(), "kept", false)
	<-up
	conn.Close()
	daemon.Send(wire.FrameStdinEOF, nil)
	if err := <-over; err != nil {
		t.Error(err)
	}
	w.atRest("kept")
}

// A session outlives the daemon, and the VM of a run outlives neither.
func TestRunWithoutDaemon(t *testing.T) {
	w := newWorld(t, 0)
	up, over, conn, _ := w.runVM(t.Context(), "", true)
	v := <-up
	asleep := make(chan bool, 1)
	ended := make(chan error, 1)
	client := api.NewClient(conn)
	go func() {
		ended <- client.Call(t.Context(), api.MethodExec, api.ExecParams{Session: wire.Exec{Args: []string{"sleep"}}}, nil, &api.ExecResult{}, nil,
			func(wire.Frame) error { asleep <- true; return nil })
	}()
	<-asleep
	w.killDaemon()
	if err := <-over; !errors.Is(err, api.ErrGone) {
		t.Errorf("the daemon's part: %v", err)
	}
	if all := w.list(); all[v.Name].State != banger.StateRunning || all[v.Name].PID != v.PID {
		t.Errorf("adopted: %+v", all)
	}
	select {
	case err := <-ended:
		t.Fatalf("the session ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	client.Cancel()
	if err := <-ended; banger.CodeOf(err) != banger.CodeCanceled {
		t.Errorf("session: %v", err)
	}
	w.until("the VM is gone", func() bool { w.list(); ids, err := w.s.VMIDs(); return err == nil && len(ids) == 0 })
	w.atRest()
}

// Whatever is killed, running VMs are found again: none lost, none doubled.
func TestAdopt(t *testing.T) {
	w := newWorld(t, 0)
	const n = 5
	pids := map[string]int{}
	for i := range n {
		name := fmt.Sprintf("vm%d", i)
		w.create(name, banger.Spec{})
		pids[name] = w.do(api.MethodStart, name).PID
	}
	for range 3 {
		w.killDaemon()
		all := w.list()
		for name, pid := range pids {
			if v := all[name]; v.State != banger.StateRunning || v.PID != pid {
				t.Errorf("%s: %s, process %d, want %d", name, v.State, v.PID, pid)
			}
			w.do(api.MethodStart, name) // runs already
		}
		if got := len(w.processes("supervise")); got != n {
			t.Errorf("%d supervisors", got)
		}
	}
	if out, _, err := w.exec("vm0", false, "echo", "still"); out != "still\n" || err != nil {
		t.Errorf("exec after it was adopted: %q, %v", out, err)
	}
	w.do(api.MethodStop, "vm0")
	w.do(api.MethodPause, "vm1")

	// A supervisor that is killed takes its VMM along, and the VM says why;
	// whether a daemon is there to see it or not.
	victim := func(name string) int {
		life, err := vm.LoadLife(w.s, w.list()[name].ID)
		if err != nil || life.Supervisor == nil {
			t.Fatalf("%s: %+v, %v", name, life, err)
		}
		return life.Supervisor.PID
	}
	syscall.Kill(victim("vm2"), syscall.SIGKILL)
	w.until("vm2 is seen to fail", func() bool { return w.list()["vm2"].State == banger.StateFailed })
	pid := victim("vm3")
	w.killDaemon()
	syscall.Kill(pid, syscall.SIGKILL)
	var events []api.Event
	var out api.VMs
	events, err := w.callWith(t.Context(), api.MethodList, api.None{}, nil, &out)
	if err != nil || len(events) != 1 || !strings.Contains(events[0].Notice, "VM vm3: its supervisor died while the VM was running; it is failed now") {
		t.Errorf("the first client hears %+v, %v", events, err)
	}
	all := w.list()
	for name, want := range map[string]banger.State{"vm0": "stopped", "vm1": "paused", "vm2": "failed", "vm3": "failed", "vm4": "running"} {
		if all[name].State != want {
			t.Errorf("%s is %s, want %s", name, all[name].State, want)
		}
	}
	for _, name := range []string{"vm2", "vm3"} {
		if v := all[name]; !strings.Contains(v.Reason, "its supervisor died") || v.PID != 0 {
			t.Errorf("%s: %+v", name, v)
		}
	}
	if got := w.processes("sleep"); len(got) != 2 {
		t.Errorf("VMMs: %v", got)
	}
	for name := range pids {
		w.must(api.MethodRemove, api.VMParams{Name: name, Force: true}, nil)
	}
	w.atRest()
}

// A process that merely has the number of a supervisor is left alone.
func TestForeignProcess(t *testing.T) {
	w := newWorld(t, 0)
	v := w.create("dev", banger.Spec{})
	foreign := childOf(t)
	now, err := vm.ProcessOf(foreign)
	if err != nil {
		t.Fatal(err)
	}
	then := *now
	then.Start--
	w.killDaemon()
	life := vm.Life{State: banger.StateRunning, Supervisor: &then, VMM: &then}
	if err := vm.SaveLife(w.s, v.ID, life); err != nil {
		t.Fatal(err)
	}
	if got := w.list()["dev"]; got.State != banger.StateFailed {
		t.Errorf("it is %s", got.State)
	}
	w.must(api.MethodRemove, api.VMParams{Name: "dev", Force: true}, nil)
	if now, err := vm.ProcessOf(foreign); err != nil || now.Start != then.Start+1 {
		t.Errorf("the foreign process: %+v, %v", now, err)
	}
	// The very process is ended, so that the check above can fail.
	if err := now.Kill(); err != nil || vmIsThere(foreign) {
		t.Errorf("the process itself: %v", err)
	}
}

// What start-up finishes or undoes.
func TestStartUp(t *testing.T) {
	w := newWorld(t, 0)
	kept := w.create("kept", banger.Spec{})
	leaving := w.create("leaving", banger.Spec{})
	w.do(api.MethodStart, "leaving")
	w.must(api.MethodCreate, api.CreateParams{Name: "ephemeral", Ephemeral: true, Prepared: w.prep}, nil)
	w.must(api.MethodCreate, api.CreateParams{Name: "not-yet", Ephemeral: true, Prepared: w.prep}, nil)
	w.do(api.MethodStart, "ephemeral")
	w.killDaemon()
	for _, pid := range w.processes("supervise") {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	// A process that ends has no arguments any more while it has its files still.
	w.until("no supervisor, and no VM held", func() bool {
		ids, err := w.s.VMIDs()
		for _, id := range ids {
			hold, holdErr := w.s.HoldVM(id)
			if err = errors.Join(err, holdErr); holdErr == nil {
				hold.Close()
			}
		}
		return err == nil && len(w.processes("supervise")) == 0
	})
	if err := vm.MarkRemoving(w.s, leaving.ID); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"tmp/vm-0123456789ab-x", "trash/ba9876543210-x"} {
		if err := os.MkdirAll(filepath.Join(w.home, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var out api.VMs
	events, err := w.callWith(t.Context(), api.MethodList, api.None{}, nil, &out)
	if err != nil {
		t.Fatal(err)
	}
	w.until("the marked VM is gone", func() bool { _, err := os.Lstat(w.s.VM(leaving.ID)); return errors.Is(err, fs.ErrNotExist) })
	var said []string
	for _, e := range events {
		said = append(said, e.Notice)
	}
	for _, want := range []string{"0123456789ab: its creation", "ba9876543210", "ephemeral"} {
		if !strings.Contains(strings.Join(said, "\n"), want) {
			t.Errorf("nobody was told of %q: %q", want, said)
		}
	}
	w.atRest("kept", "not-yet")
	if v := w.list()["kept"]; v.ID != kept.ID || v.State != banger.StateCreated {
		t.Errorf("kept: %+v", v)
	}
}

// A record that cannot be read is told, is nobody's empty VM, and keeps the
// others from nothing.
func TestBrokenRecords(t *testing.T) {
	w := newWorld(t, 0)
	for _, c := range []struct{ name, file, text, want string }{
		{"cut", store.VMRecord, `{"schema":1,"id":"`, "unexpected end"},
		{"empty", store.VMRecord, "", "unexpected end"},
		{"newer", store.VMLife, `{"schema":2,"state":"stopped"}`, "found 2, this banger knows 1"},
		{"no-such-state", store.VMLife, `{"schema":1,"state":"dreaming"}`, `no such state: "dreaming"`},
		{"of-another", store.VMRecord, `{"schema":1,"id":"000000000000","name":"x"}`, `of the VM "000000000000"`},
		{"missing", store.VMLife, "-", "has no life.json"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := w.create(c.name, banger.Spec{})
			w.create("other", banger.Spec{})
			w.killDaemon()
			path := filepath.Join(w.s.VM(v.ID), c.file)
			var err error
			if c.text == "-" {
				err = os.Remove(path)
			} else {
				err = os.WriteFile(path, []byte(c.text), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			all := w.list()
			if len(all) != 2 || all["other"].State != banger.StateCreated {
				t.Fatalf("there are %+v", all)
			}
			if got := all[v.ID]; got.State != banger.StateFailed || !strings.Contains(got.Reason, c.want) {
				t.Errorf("shown as %+v, want %q", got, c.want)
			}
			for _, method := range []string{api.MethodStart, api.MethodInspect, api.MethodRemove} {
				if err := w.call(method, api.VMParams{Name: v.ID}, nil); banger.CodeOf(err) != banger.CodeInvalid || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%s: %v", method, err)
				}
			}
			if text, err := os.ReadFile(path); c.text != "-" && (err != nil || string(text) != c.text) {
				t.Errorf("the record is now %q, %v", text, err)
			}
			if _, err := os.Stat(filepath.Join(w.s.VM(v.ID), store.VMWork)); err != nil {
				t.Error(err)
			}
			// Something may need the image: nobody knows.
			if _, err := call(t, api.MethodImageRemove, api.Named{Name: "base"}, nil, nil); err == nil {
				t.Error("the image was removed")
			}
			for _, name := range []string{v.ID, "other"} {
				w.must(api.MethodRemove, api.VMParams{Name: name, Force: true}, nil)
			}
			w.atRest()
		})
	}
}

// An image and a kernel stay as long as a VM was made of them, running or not.
func TestNeeded(t *testing.T) {
	w := newWorld(t, 0)
	w.create("dev", banger.Spec{})
	_, err := call(t, api.MethodImageRemove, api.Named{Name: "base"}, nil, &banger.Image{})
	wantCode(t, err, banger.CodeConflict, "dev")
	_, err = call(t, api.MethodKernelRemove, api.Named{Name: "1.2.3"}, nil, &api.None{})
	wantCode(t, err, banger.CodeConflict, "dev")
	w.do(api.MethodRemove, "dev")
	if _, err := call(t, api.MethodKernelRemove, api.Named{Name: "1.2.3"}, nil, &api.None{}); err != nil {
		t.Error(err)
	}
	if _, err := call(t, api.MethodImageRemove, api.Named{Name: "base"}, nil, &banger.Image{}); err != nil {
		t.Error(err)
	}
	err = w.call(api.MethodCreate, api.CreateParams{Name: "dev", Prepared: w.prep}, nil)
	if banger.CodeOf(err) != banger.CodeNotFound {
		t.Errorf("made of what is gone: %v", err)
	}
	w.atRest()
}

// Of many that want a name one gets it.
func TestOneWinner(t *testing.T) {
	w := newWorld(t, 0)
	const clients, names = 100, 10
	var mu sync.Mutex
	won := map[string]int{}
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			name := fmt.Sprintf("name%d", i%names)
			var v banger.VM
			err := w.call(api.MethodCreate, api.CreateParams{Name: name, Prepared: w.prep}, &v)
			mu.Lock()
			defer mu.Unlock()
			if err == nil && v.Name == name {
				won[name]++
			} else if banger.CodeOf(err) != banger.CodeConflict {
				t.Errorf("%s: %+v, %v", name, v, err)
			}
		})
	}
	wg.Wait()
	if len(w.processes("serve")) != 1 {
		t.Errorf("daemons: %v", w.processes("serve"))
	}
	var all []string
	for i := range names {
		name := fmt.Sprintf("name%d", i)
		all = append(all, name)
		if won[name] != 1 {
			t.Errorf("%s was given to %d", name, won[name])
		}
	}
	w.atRest(all...)
}

// A stop ends a start that is under way.
func TestStopBeatsStart(t *testing.T) {
	w := newWorld(t, 0)
	w.create("dev", banger.Spec{})
	for delay := range 8 {
		result := make(chan error, 1)
		go func() { result <- w.call(api.MethodStart, api.VMParams{Name: "dev"}, nil) }()
		time.Sleep(time.Duration(delay) * 4 * time.Millisecond)
		w.do(api.MethodStop, "dev")
		if err := <-result; err != nil && banger.CodeOf(err) != banger.CodeCanceled {
			t.Errorf("after %d: %v", delay, err)
		}
		w.do(api.MethodStop, "dev") // the start may have come after the stop
		w.atRest("dev")
	}
}

// Each call of the driver fails in turn: no process, no socket, no lock and no
// file is left, and the record tells the truth.
func TestFailAt(t *testing.T) {
	const calls = 5 // Probe, Start, DialGuest: boot, exec, stop
	for i := 1; i <= calls; i++ {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			w := newWorld(t, i)
			w.create("dev", banger.Spec{})
			startErr := w.call(api.MethodStart, api.VMParams{Name: "dev"}, nil)
			if (startErr != nil) != (i <= 3) {
				t.Errorf("start: %v", startErr)
			}
			if startErr == nil {
				_, _, err := w.exec("dev", false, "exit", "0")
				if (err != nil) != (i == 4) {
					t.Errorf("exec: %v", err)
				}
				w.do(api.MethodStop, "dev")
			}
			w.atRest("dev")
			v := w.list()["dev"]
			switch {
			case i == 1 && v.State != banger.StateCreated,
				(i == 2 || i == 3) && (v.State != banger.StateFailed || !strings.Contains(v.Reason, "told to fail")),
				i > 3 && v.State != banger.StateStopped:
				t.Errorf("call %d failed, and the VM is %s: %q", i, v.State, v.Reason)
			}
			w.do(api.MethodRemove, "dev")
			w.atRest()
		})
	}
}

// childOf starts a process that is none of banger's, and ends it with the test.
func childOf(t *testing.T) int {
	t.Helper()
	p, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{Env: []string{}})
	if err != nil {
		t.Fatal(err)
	}
	go p.Wait()
	t.Cleanup(func() { p.Kill() })
	return p.Pid
}

// The daemon goes when nothing is to do, and when a client of another release
// comes; VMs run on.
func TestDaemonGoes(t *testing.T) {
	w := newWorld(t, 0)
	t.Setenv(idleEnv, "200ms")
	v := w.create("dev", banger.Spec{})
	pid := w.do(api.MethodStart, v.Name).PID
	w.until("the idle daemon goes", func() bool { return len(w.processes("serve")) == 0 })
	if _, err := os.Lstat(filepath.Join(store.Run(w.home), store.DaemonSocket)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its socket: %v", err)
	}
	if !vmIsThere(pid) {
		t.Error("the VMM went too")
	}
	t.Setenv(idleEnv, "1m")
	if got := w.list()["dev"]; got.PID != pid {
		t.Errorf("found again: %+v", got)
	}
	before := w.processes("serve")
	conn, err := api.Dial(store.Run(w.home), store.DaemonSocket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	self, err := api.Companion(api.DaemonProgram)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		hello api.Hello
		stale bool
	}{
		{api.Hello{}, false}, {api.Hello{Version: Version}, false}, {api.Hello{Version: Version, Program: self}, false},
		{api.Hello{Version: "of another release"}, true}, {api.Hello{Version: Version, Program: "/bin/sh"}, true},
		{api.Hello{Version: Version, Program: "/nonexistent"}, true},
	} {
		conn, err := api.Dial(store.Run(w.home), store.DaemonSocket)
		if err != nil {
			t.Fatal(err)
		}
		var hello api.Hello
		if err := api.NewClient(conn).Call(t.Context(), api.MethodHello, c.hello, nil, &hello, nil, nil); err != nil || hello.Version != Version || hello.Stale != c.stale {
			t.Errorf("hello %+v: %+v, %v", c.hello, hello, err)
		}
		if c.stale {
			w.until("the daemon makes way", func() bool { return len(w.processes("serve")) == 0 })
		}
		if got := w.list()["dev"]; got.PID != pid {
			t.Errorf("found again: %+v", got)
		}
		now := w.processes("serve")
		if len(now) != 1 || (now[0] != before[0]) != c.stale {
			t.Errorf("hello %+v: daemons %v, before %v", c.hello, now, before)
		}
		before = now
	}
	// A socket that was removed is made again.
	if err := os.RemoveAll(store.Run(w.home)); err != nil {
		t.Fatal(err)
	}
	w.until("the socket is there again", func() bool {
		conn, err := api.Dial(store.Run(w.home), store.DaemonSocket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	if st, err := os.Lstat(filepath.Join(store.Run(w.home), store.DaemonSocket)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", st, err)
	}
	if st, err := os.Lstat(store.Run(w.home)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("its folder: %v, %v", st, err)
	}
	if len(w.processes("serve")) != 1 {
		t.Errorf("daemons: %v", w.processes("serve"))
	}
	w.must(api.MethodRemove, api.VMParams{Name: "dev", Force: true}, nil)
	w.atRest()
}

// Where systemd's user manager is, a supervisor gets a scope of its own; where
// it only seems to be, a session of its own.
func TestScope(t *testing.T) {
	for _, works := range []bool{true, false} {
		t.Run(fmt.Sprint(works), func(t *testing.T) {
			w := newWorld(t, 0)
			run, bin := t.TempDir(), t.TempDir()
			t.Setenv("XDG_RUNTIME_DIR", run)
			t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			if err := os.MkdirAll(filepath.Join(run, "systemd"), 0o700); err != nil {
				t.Fatal(err)
			}
			script := "#!/bin/sh\necho \"$*\" >> " + bin + "/args\n"
			if works {
				script += `while [ "$1" != -- ]; do shift; done; shift; exec "$@"`
			} else {
				script += "echo no bus >&2; exit 1"
			}
			for path, text := range map[string]string{run + "/systemd/private": "", bin + "/systemd-run": script + "\n"} {
				if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			v := w.create("dev", banger.Spec{MemoryBytes: 512 << 20})
			w.do(api.MethodStart, "dev")
			args, err := os.ReadFile(bin + "/args")
			want := fmt.Sprintf("--user --scope --quiet --collect --unit=banger-%s --property=MemoryMax=%d --property=TasksMax=1024 -- ", v.ID, 512<<20+vmOverheadBytes)
			if err != nil || !strings.HasPrefix(string(args), want) || !strings.HasSuffix(string(args), " supervise "+v.ID+"\n") {
				t.Errorf("it was called with %q, %v; want %q", args, err, want)
			}
			pids := w.processes("supervise")
			if len(pids) != 1 {
				t.Fatalf("supervisors: %v\n%s", pids, w.log())
			}
			// Either way it is no part of the daemon's session.
			mine, err := syscall.Getpgid(pids[0])
			if err != nil || mine != pids[0] {
				t.Errorf("its process group is %d, %v; it is %d", mine, err, pids[0])
			}
			w.do(api.MethodStop, "dev")
			w.atRest("dev")
		})
	}
}

// A socket that systemd listens on is served, and left to it.
func TestSocketActivation(t *testing.T) {
	w := newWorld(t, 0)
	t.Setenv(idleEnv, "300ms")
	if err := os.MkdirAll(store.Run(w.home), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := api.Listen(store.Run(w.home), store.DaemonSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	program, err := api.Companion(api.DaemonProgram)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is started anew, with the same socket
		cmd := exec.Command("sh", "-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec "+program+" serve")
		cmd.ExtraFiles = []*os.File{socket}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if got := len(w.list()); got != 0 {
			t.Errorf("%d VMs", got)
		}
		if pids := w.processes("serve"); len(pids) != 1 || pids[0] != cmd.Process.Pid {
			t.Errorf("daemons %v, started %d", pids, cmd.Process.Pid)
		}
		if err := cmd.Wait(); err != nil { // it is idle
			t.Error(err)
		}
		if _, err := os.Lstat(filepath.Join(store.Run(w.home), store.DaemonSocket)); err != nil {
			t.Errorf("the socket is systemd's: %v", err)
		}
	}
}

// On a full disk nothing new is made and nothing is lost; what runs can be
// stopped, and what is there removed.
func TestFullDisk(t *testing.T) {
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=4m,mode=0700"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("cannot test: a small tmpfs: %v", err)
		}
		t.Skipf("NOT TESTED: a small tmpfs: %v", err)
	}
	w := newWorldIn(t, filepath.Join(small, "state"), 0)
	defer func() { // after the processes, which hold it
		w.end()
		unix.Unmount(small, unix.MNT_DETACH)
	}()
	kept, added := freePort(t), freePort(t)
	w.create("runs", banger.Spec{Ports: []string{fmt.Sprintf("%d:80", kept)}})
	w.do(api.MethodStart, "runs")
	w.create("rests", banger.Spec{})
	ballast, err := os.Create(filepath.Join(small, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 4096); err == nil; {
		_, err = ballast.Write(block)
	}
	ballast.Close()
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	wantCode(t, w.call(api.MethodCreate, api.CreateParams{Name: "new", Prepared: w.prep}, nil), banger.CodeNoSpace)
	if err := w.call(api.MethodStart, api.VMParams{Name: "rests"}, nil); err == nil {
		t.Error("a start that cannot be recorded")
	}
	// Ports that cannot be recorded are not opened or closed either.
	for name, port := range map[string]int{"runs": added, "rests": added} {
		ports := api.PortParams{Name: name, Ports: []string{fmt.Sprintf("%d:81", port)}}
		wantCode(t, w.call(api.MethodPortAdd, ports, nil), banger.CodeNoSpace)
	}
	wantCode(t, w.call(api.MethodPortRm, api.PortParams{Name: "runs", Ports: []string{fmt.Sprintf("%d:80", kept)}}, nil), banger.CodeNoSpace)
	w.wantPorts("on a full disk", "runs", fmt.Sprintf("%d:80", kept))
	w.wantPorts("on a full disk", "rests")
	if !isOpen(kept) || isOpen(added) {
		t.Errorf("on a full disk: open is what was %v, what was to come %v", isOpen(kept), isOpen(added))
	}
	if v := w.list(); len(v) != 2 || v["runs"].State != banger.StateRunning || v["rests"].State != banger.StateCreated {
		t.Errorf("there are %+v", v)
	}
	w.killDaemon()
	if v := w.list(); len(v) != 2 || v["runs"].State != banger.StateRunning || v["rests"].State != banger.StateCreated {
		t.Errorf("a new daemon finds %+v", v)
	}
	w.do(api.MethodStop, "runs")
	w.until("nothing runs", func() bool { return len(w.processes("supervise")) == 0 && len(w.processes("sleep")) == 0 })
	if v := w.list()["runs"]; !vm.Rests(v.State) {
		t.Errorf("stopped: %+v", v)
	}
	w.do(api.MethodRemove, "rests")
	w.do(api.MethodRemove, "runs")
	w.atRest()
	if err := os.Remove(ballast.Name()); err != nil {
		t.Fatal(err)
	}
	w.create("new", banger.Spec{})
	w.do(api.MethodStart, "new")
	w.must(api.MethodRemove, api.VMParams{Name: "new", Force: true}, nil)
	w.atRest()
}

// A daemon that is asked to go goes at once, whatever sessions there are.
func TestRetireUnderASession(t *testing.T) {
	w := newWorld(t, 0)
	up, over, conn, _ := w.runVM(t.Context(), "", true)
	v := <-up
	client := api.NewClient(conn)
	asleep, ended := make(chan bool, 1), make(chan error, 1)
	go func() {
		ended <- client.Call(t.Context(), api.MethodExec, api.ExecParams{Session: wire.Exec{Args: []string{"sleep"}}}, nil, &api.ExecResult{}, nil,
			func(wire.Frame) error { asleep <- true; return nil })
	}()
	<-asleep
	began := time.Now()
	for _, pid := range w.processes("serve") {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	if err := <-over; banger.CodeOf(err) != banger.CodeUnavailable {
		t.Errorf("the daemon's part: %v", err)
	}
	w.until("the daemon is gone", func() bool { return len(w.processes("serve")) == 0 })
	if took := time.Since(began); took > retireLimit {
		t.Errorf("it took %v", took)
	}
	if got := w.list()[v.Name]; got.PID != v.PID {
		t.Errorf("the next one finds %+v", got)
	}
	client.Cancel()
	<-ended
	w.until("the VM is gone", func() bool { w.list(); ids, err := w.s.VMIDs(); return err == nil && len(ids) == 0 })
	w.atRest()
}

// A VM whose folder cannot be worked with is shown as it is, and keeps no
// other from its user.
func TestFolderThatResists(t *testing.T) {
	w := newWorld(t, 0)
	stuck := w.create("stuck", banger.Spec{})
	w.create("fine", banger.Spec{})
	w.killDaemon()
	dir := w.s.VM(stuck.ID)
	records := map[string][]byte{}
	for _, name := range []string{store.VMRecord, store.VMLife} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		records[name] = data
	}
	// What is mounted on cannot be renamed, as its removal would.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=0700"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("cannot test: a mount: %v", err)
		}
		t.Skipf("NOT TESTED: a mount: %v", err)
	}
	mounted := true
	defer func() {
		if mounted {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	}()
	for name, data := range records {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := vm.MarkRemoving(w.s, stuck.ID); err != nil {
		t.Fatal(err)
	}
	all := w.list()
	if len(all) != 2 || all["fine"].State != banger.StateCreated || !strings.Contains(all[stuck.ID].Reason, "busy") {
		t.Errorf("there are %+v", all)
	}
	w.do(api.MethodStart, "fine")
	w.do(api.MethodStop, "fine")
	wantCode(t, w.call(api.MethodStart, api.VMParams{Name: "stuck"}, nil), banger.CodeInvalid, "busy")
	w.killDaemon()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	w.atRest("fine", "stuck")
}
