package image

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// The memory of a process that builds: up to memoryTargetBytes the collector
// keeps it there, which most images fit in with ease. What needs more gets it,
// and a fourth more for garbage: at a fixed limit the collector would do
// nothing but collect.
const (
	memoryTargetBytes = 100 << 20
	memoryBesideBytes = 20 << 20 // what the runtime has that is no heap
)

// LimitMemory sets the soft limit of this process's memory, and again after
// each collection.
func LimitMemory() {
	debug.SetMemoryLimit(memoryTargetBytes)
	// What nothing leads to is found by each collection.
	type unreachable struct{ _ *int } // with a pointer: what has none may share its memory
	var collected func(*unreachable)
	collected = func(u *unreachable) {
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(live)
		n := int64(live[0].Value.Uint64())
		debug.SetMemoryLimit(max(memoryTargetBytes, n+n/4+memoryBesideBytes))
		runtime.SetFinalizer(u, collected)
	}
	runtime.SetFinalizer(new(unreachable), collected)
}
