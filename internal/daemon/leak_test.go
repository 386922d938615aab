package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/vm"
)

// residue is all that a daemon could lose over time.
type residue struct {
	descriptors, goroutines, files int
}

// residue is that of a daemon inside this process.
func (w *world) residue() residue {
	w.t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		w.t.Fatal(err)
	}
	r := residue{descriptors: len(fds), goroutines: runtime.NumGoroutine()}
	filepath.WalkDir(w.home, func(string, os.DirEntry, error) error { r.files++; return nil })
	return r
}

// Fifty lives of a VM leave the daemon and the state folder as they were. The
// daemon is in this process, where its goroutines can be counted.
func TestNothingLeaks(t *testing.T) {
	w := newWorld(t, 0)
	t.Setenv(idleEnv, "10s")
	defer func(d time.Duration) { idleLimit = d }(idleLimit)
	up, over := make(chan error, 1), make(chan error, 1)
	go func() { over <- serve(fakeDriver, func(err error) { up <- err }) }()
	if err := <-up; err != nil {
		t.Fatal(err)
	}
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
	settle := func(want residue) (now residue) {
		// What serves a call ends a moment after its answer.
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			runtime.GC() // what only waits to be collected is not lost
			if now = w.residue(); now == want || time.Now().After(end) {
				return now
			}
		}
	}
	before := settle(residue{})
	for range 50 {
		life()
	}
	w.atRest()
	after := settle(before)
	if after.descriptors > before.descriptors || after.goroutines > before.goroutines || after.files != before.files {
		t.Errorf("before %+v, after 50 lives %+v", before, after)
	}
	// The check sees what stays.
	w.create("dev", banger.Spec{})
	w.do(api.MethodStart, "dev")
	if now := w.residue(); now.files <= before.files || now.goroutines <= before.goroutines {
		t.Errorf("a VM that runs, and %+v, before %+v", now, before)
	}
	w.must(api.MethodRemove, api.VMParams{Name: "dev", Force: true}, nil)
	syscall.Kill(os.Getpid(), syscall.SIGTERM) // it asks the daemon to go, and no one else listens
	if err := <-over; err != nil {
		t.Error(err)
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
