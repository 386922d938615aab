package qemu

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// rdtsc reads the time stamp counter after all earlier instructions.
func rdtsc() uint64

const (
	// tscSpan is how long the counter is watched. Both ends are known to some
	// 50 ns, so the error is about 10 parts in a million.
	tscSpan = 10 * time.Millisecond
	// tscTries is how often one instant is taken; the narrowest counts.
	tscTries = 32
	// No x86-64 processor's counter runs outside these.
	minTSCKHz = 500_000
	maxTSCKHz = 10_000_000
)

// hostTSCKHz is the frequency of the host's time stamp counter, which is what
// a guest reads under QEMU's TCG on an x86-64 host. Without being told, Linux
// calibrates it against an emulated timer and on a busy host fails: it then
// hangs at boot. Measured rather than taken from /proc/cpuinfo, whose figure
// is the rounded clock of the moment.
var hostTSCKHz = sync.OnceValues(measureTSC)

func measureTSC() (int, error) {
	t0, c0, err := instant()
	if err != nil {
		return 0, err
	}
	time.Sleep(tscSpan)
	t1, c1, err := instant()
	if err != nil {
		return 0, err
	}
	if c1 <= c0 || t1 <= t0 {
		return 0, fmt.Errorf("tsc: went from %d to %d in %d ns", c0, c1, t1-t0)
	}
	khz := float64(c1-c0) * 1e6 / float64(t1-t0)
	if khz < minTSCKHz || khz > maxTSCKHz {
		return 0, fmt.Errorf("tsc: measured %.0f kHz, which no processor has", khz)
	}
	return int(khz + 0.5), nil
}

// instant pairs CLOCK_MONOTONIC_RAW, in nanoseconds, with the counter. The
// clock is read between two readings of the counter; of several tries the one
// where those are nearest was disturbed least.
func instant() (ns int64, count uint64, err error) {
	best := ^uint64(0)
	for range tscTries {
		var ts unix.Timespec
		before := rdtsc()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
			return 0, 0, fmt.Errorf("clock: %w", err)
		}
		after := rdtsc()
		if after >= before && after-before < best {
			best = after - before
			ns, count = ts.Nano(), before+(after-before)/2
		}
	}
	return ns, count, nil
}
