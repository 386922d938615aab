package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
)

// The log of a VM outlives its starts, and its supervisor's death but for the
// last moments.
func TestNetLogStays(t *testing.T) {
	w := newWorld(t, 0)
	v := w.create("web", banger.Spec{})
	log := func() string {
		t.Helper()
		var out api.NetLog
		w.must(api.MethodNetLog, api.Named{Name: "web"}, &out)
		if out.Denials == nil {
			t.Error("the list is null")
		}
		var lines []string
		for _, d := range out.Denials {
			lines = append(lines, fmt.Sprintf("%s %v %d", d.Proto, d.From, d.Count))
		}
		return strings.Join(lines, ", ")
	}
	spoof := func(n string) {
		t.Helper()
		if _, code, err := w.exec("web", true, "spoof", n); code != 0 || err != nil {
			t.Fatal(code, err)
		}
	}
	if got := log(); got != "" {
		t.Errorf("never started: %q", got)
	}
	spoof("1")
	const one, both = "spoof 2001:db8::1 1", "spoof 2001:db8::1 2, spoof 2001:db8::2 1"
	w.until("it is logged", func() bool { return log() == one })
	spoof("2")
	spoof("1")
	w.until("all is logged", func() bool { return log() == both })
	w.do(api.MethodStop, "web")
	w.killDaemon()
	if got := log(); got != both {
		t.Errorf("stopped: %q", got)
	}
	w.do(api.MethodStart, "web")
	if got := log(); got != both {
		t.Errorf("at the next start: %q", got)
	}
	// The first change of a start is written at once.
	spoof("3")
	path := filepath.Join(w.s.VM(v.ID), store.VMNetLog)
	w.until("it is written", func() bool { text, _ := os.ReadFile(path); return strings.Contains(string(text), "2001:db8::3") })
	for _, pid := range w.processes("supervise") {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	w.until("its end is seen", func() bool { return w.do(api.MethodInspect, "web").State == banger.StateFailed })
	const three = both + ", spoof 2001:db8::3 1"
	if got := log(); got != three {
		t.Errorf("after the supervisor's death: %q", got)
	}
	w.atRest("web")
	// What cannot be read is told, and hinders no start.
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantCode(t, w.call(api.MethodNetLog, api.Named{Name: "web"}, nil), banger.CodeInternal, store.VMNetLog)
	spoof("4")
	w.until("it begins anew", func() bool { return log() == "spoof 2001:db8::4 1" })
	w.must(api.MethodRemove, api.VMParams{Name: "web", Force: true}, nil)
	w.atRest()
}
