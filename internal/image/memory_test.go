package image

import (
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// The limit grows with what is alive and comes back when it is not, in a
// process of its own.
func TestLimitMemory(t *testing.T) {
	const childVar = "BANGER_TEST_LIMIT"
	if os.Getenv(childVar) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestLimitMemory$")
		cmd.Env = append(os.Environ(), childVar+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	LimitMemory()
	until := func(what string, ok func(limit int64) bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			runtime.GC()
			limit := debug.SetMemoryLimit(-1)
			if ok(limit) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: the limit is %d MiB", what, limit>>20)
			}
		}
	}
	until("at first", func(limit int64) bool { return limit == memoryTargetBytes })
	large := make([]byte, 200<<20)
	until("with 200 MiB alive", func(limit int64) bool { return limit >= 200<<20*5/4 && limit < 400<<20 })
	runtime.KeepAlive(large)
	large = nil
	until("without", func(limit int64) bool { return limit == memoryTargetBytes })
}
