package qemu

import (
	"encoding/binary"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestProbe tries this host's KVM for real, several times: whatever the answer
// is, it comes in time, is always the same, and leaves no descriptor behind.
func TestProbe(t *testing.T) {
	runKVMProbe("/dev/kvm", 1) // the runtime opens descriptors of its own for the first timer
	fds := countFDs(t)
	var first kvmResult
	for i := range 4 {
		began := time.Now()
		r := runKVMProbe("/dev/kvm", probeLoops)
		took := time.Since(began)
		if i == 0 {
			first = r
			t.Logf("works %v after %v: %s", r.works, took, r.reason)
		}
		if took > probeLimit+500*time.Millisecond {
			t.Errorf("took %v", took)
		}
		if r.works != first.works || r.reason == "" || strings.ContainsAny(r.reason, "\n") {
			t.Errorf("answer %d: %+v, the first was %+v", i, r, first)
		}
	}
	if now := countFDs(t); now != fds {
		t.Errorf("%d descriptors, %d before", now, fds)
	}
	if probeKVM() != probeKVM() {
		t.Error("the answer is not kept")
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestProbeDevice tries devices that are not what they should be.
func TestProbeDevice(t *testing.T) {
	if r := runKVMProbe("/nonexistent/kvm", 1); r.works || !strings.Contains(r.reason, "does not exist") || r.hint == "" {
		t.Errorf("no device: %+v", r)
	}
	if r := runKVMProbe("/dev/null", 1); r.works || !strings.Contains(r.reason, "not a KVM device") {
		t.Errorf("another device: %+v", r)
	}
	if os.Getuid() != 0 {
		return // no way to a device that exists and may not be opened
	}
	device := t.TempDir() + "/kvm"
	if err := os.WriteFile(device, nil, 0); err != nil {
		t.Fatal(err)
	}
	denied := make(chan kvmResult)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		_ = unix.Setfsuid(65534)
		denied <- (&kvmProbe{device: device, loops: 1}).run()
	}()
	if r := <-denied; r.works || !strings.Contains(r.hint, "kvm group") {
		t.Errorf("no permission: %+v", r)
	}
}

// TestProbeGoesOnTooLong needs a KVM of any speed: a loop that no processor
// ends in time must be interrupted.
func TestProbeGoesOnTooLong(t *testing.T) {
	if r := runKVMProbe("/dev/kvm", 1); !r.works && !strings.Contains(r.reason, "too slow") {
		t.Skipf("SKIPPED, also in CI: a host need not have KVM: %s", r.reason)
	}
	began := time.Now()
	r := runKVMProbe("/dev/kvm", 1<<31-1)
	if took := time.Since(began); r.works || !strings.Contains(r.reason, "longer") || took < probeCPULimit || took > probeLimit {
		t.Errorf("after %v: %+v", took, r)
	}
}

func TestJudge(t *testing.T) {
	const loops = 1_000_000
	limit := 2 * loops * time.Second / minKVMRate
	for _, row := range []struct {
		exit  uint32
		port  uint16
		took  time.Duration
		works bool
	}{
		{kvmExitIO, guestPort, 0, true},
		{kvmExitIO, guestPort, limit, true},
		{kvmExitIO, guestPort, limit + limit/1000, false},
		{kvmExitIO, guestPort + 1, 0, false},
		{kvmExitHLT, guestPort, 0, false},
		{kvmExitShutdown, guestPort, 0, false},
		{kvmExitInternalError, guestPort, 0, false},
		{99, guestPort, 0, false},
	} {
		state := make([]byte, 64)
		binary.LittleEndian.PutUint32(state[kvmRunExitReason:], row.exit)
		binary.LittleEndian.PutUint16(state[kvmRunIOPort:], row.port)
		if r := judge(state, loops, row.took); r.works != row.works || r.reason == "" {
			t.Errorf("exit %d port %d after %v: %+v, want %v", row.exit, row.port, row.took, r, row.works)
		}
	}
}

func TestHostTSC(t *testing.T) {
	first, err := measureTSC()
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		khz, err := measureTSC()
		if err != nil {
			t.Fatal(err)
		}
		// One in ten thousand is ten times what an idle host gives.
		if d := khz - first; d*d > (first/10_000)*(first/10_000) {
			t.Errorf("%d kHz, then %d kHz", first, khz)
		}
	}
}
