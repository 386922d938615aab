package usernet

import "sync"

// Buffers of TCP flows come out of one budget for each VM. The first flows get
// large buffers and the thousandth small ones, so that speed is there for who
// needs it and no number of flows takes much more than the budget.
const (
	budgetBytes   = 32 << 20
	maxShareBytes = 512 << 10
	minShareBytes = 8 << 10
	budgetParts   = 16 // a new flow gets at most that part of what is left
)

// A budget hands out shares. The sum of all is at most budgetBytes, and
// minShareBytes for each flow beyond.
type budget struct {
	mu   sync.Mutex
	used int
}

// take returns a share, to be given back.
func (b *budget) take() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	share := min(max((budgetBytes-b.used)/budgetParts, minShareBytes), maxShareBytes)
	b.used += share
	return share
}

func (b *budget) give(share int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= share
}
