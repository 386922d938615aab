package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/vm"
)

// residue is all that a daemon could lose over time.
type residue struct {
	descriptors, files int
}

func (w *world) residue() residue {
	w.t.Helper()
	pids := w.processes("serve")
	if len(pids) != 1 {
		w.t.Fatalf("daemons: %v", pids)
	}
	proc := fmt.Sprintf("/proc/%d/", pids[0])
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		w.t.Fatal(err)
	}
	var r residue
	r.descriptors = len(fds)
	filepath.WalkDir(w.home, func(string, os.DirEntry, error) error { r.files++; return nil })
	return r
}

// Fifty lives of a VM leave the daemon and the state folder as they were.
func TestNothingLeaks(t *testing.T) {
	w := newWorld(t, 0)
	life := func() {
		w.create("dev", banger.Spec{})
		w.do(api.MethodStart, "dev")
		if _, _, err := w.exec("dev", false, "exit", "0"); err != nil {
			t.Error(err)
		}
		w.do(api.MethodStop, "dev")
		w.do(api.MethodRemove, "dev")
	}
	life() // what is made once and stays
	w.atRest()
	before := w.residue()
	for range 50 {
		life()
	}
	w.atRest()
	var after residue
	// Descriptors of ended calls go a moment after their answers.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if after = w.residue(); after == before || time.Now().After(end) {
			break
		}
	}
	if after != before {
		t.Errorf("before %+v, after 50 lives %+v", before, after)
	}
	// The check sees what stays.
	w.create("dev", banger.Spec{})
	if now := w.residue(); now.files <= before.files {
		t.Errorf("a VM more, and %+v", now)
	}
}

// fill puts n VMs at rest into a state folder that no daemon has open.
func (w *world) fill(n int) {
	w.t.Helper()
	made := w.create("template", banger.Spec{})
	w.killDaemon()
	rec, life, err := vm.Load(w.s, made.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 1; i < n; i++ {
		rec.ID, rec.Name = fmt.Sprintf("%012x", i), fmt.Sprintf("vm-%d", i)
		dir := w.s.VM(rec.ID)
		if err := os.Mkdir(dir, 0o700); err != nil {
			w.t.Fatal(err)
		}
		for _, name := range []string{store.VMOverlay, store.VMWork} {
			f, err := os.Create(filepath.Join(dir, name))
			if err == nil {
				err = f.Truncate(banger.DefaultWorkDiskBytes)
			}
			if err != nil {
				w.t.Fatal(err)
			}
			f.Close()
		}
		if err := store.WriteJSON(filepath.Join(dir, store.VMRecord), 1, rec); err != nil {
			w.t.Fatal(err)
		}
		if err := vm.SaveLife(w.s, rec.ID, life); err != nil {
			w.t.Fatal(err)
		}
	}
}

// Aims: a list of 1,000 VMs at rest in 100 ms, a daemon that starts with them
// in 1 s.
func BenchmarkThousandVMs(b *testing.B) {
	w := newWorld(b, 0)
	const n = 1000
	w.fill(n)
	b.Run("start", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			w.killDaemon()
			b.StartTimer()
			c, err := api.Connect(Version)
			if err != nil {
				b.Fatal(err)
			}
			if err := c.Call(b.Context(), api.MethodInspect, api.VMParams{Name: "vm-1"}, nil, &banger.VM{}, nil, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ls", func(b *testing.B) {
		for b.Loop() {
			if got := len(w.list()); got != n {
				b.Fatalf("%d VMs", got)
			}
		}
	})
}

// Aim: a supervisor of a VM that idles is resident with 25 MiB. What the fake
// has in place of a VMM is in it.
func BenchmarkSupervisorMemory(b *testing.B) {
	w := newWorld(b, 0)
	w.create("dev", banger.Spec{})
	for b.Loop() {
		w.do(api.MethodStart, "dev")
		var kib int
		for _, pid := range w.processes("supervise") {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil {
				b.Fatal(err)
			}
			for line := range strings.Lines(string(status)) {
				if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
					kib, _ = strconv.Atoi(strings.Fields(rest)[0])
				}
			}
		}
		b.ReportMetric(float64(kib)/1024, "MiB")
		w.do(api.MethodStop, "dev")
	}
}
