package vm

import (
	"bytes"
	"strings"
	"sync"

	"banger/internal/wire"
)

// consoleTailBytes is how much of a guest's console is kept in memory, to be
// shown with an error. The whole of it is in the VM's console log.
const consoleTailBytes = 64 << 10

// A Console keeps the end of what a guest wrote, in memory that grows with
// the text up to its limit and no further. Write never blocks and never fails.
type Console struct {
	mu    sync.Mutex
	limit int
	buf   []byte // a ring once it is full
	next  int    // where the next byte goes, when full
	full  bool

	// kernelUp is closed when the first process of the guest announced
	// itself. The line may arrive in any pieces, so the end of the last
	// write is kept.
	kernelUp chan struct{}
	seen     bool
	tail     []byte
}

// NewConsole returns a console that keeps limitBytes.
func NewConsole(limitBytes int) *Console {
	return &Console{limit: limitBytes, kernelUp: make(chan struct{})}
}

func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.seen {
		c.tail = append(c.tail, p...)
		if bytes.Contains(c.tail, []byte(wire.ReadyLine)) {
			c.seen, c.tail = true, nil
			close(c.kernelUp)
		} else if n := len(c.tail) - len(wire.ReadyLine); n > 0 {
			c.tail = append(c.tail[:0], c.tail[n:]...)
		}
	}
	n := len(p)
	if len(p) > c.limit {
		p = p[len(p)-c.limit:]
	}
	if !c.full {
		fit := min(len(p), c.limit-len(c.buf))
		c.buf = append(c.buf, p[:fit]...)
		p = p[fit:]
		c.full = len(c.buf) == c.limit
	}
	for len(p) > 0 {
		k := copy(c.buf[c.next:], p)
		c.next = (c.next + k) % c.limit
		p = p[k:]
	}
	return n, nil
}

// KernelUp is closed once the guest's first process has announced itself.
func (c *Console) KernelUp() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kernelUp
}

// expectKernel waits for the first process anew: the VM starts again.
func (c *Console) expectKernel() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kernelUp, c.seen, c.tail = make(chan struct{}), false, nil
}

// Bytes returns what is kept, oldest first. It is untrusted.
func (c *Console) Bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.full {
		return bytes.Clone(c.buf)
	}
	return append(bytes.Clone(c.buf[c.next:]), c.buf[:c.next]...)
}

// LastLines returns at most n lines from the end, without line ends and
// without empty ones. They are untrusted: escape them before a terminal.
func (c *Console) LastLines(n int) []string {
	const maxLineBytes = 500
	text := c.Bytes()
	if len(text) > 64<<10 {
		text = text[len(text)-64<<10:]
	}
	var lines []string
	for line := range strings.SplitSeq(string(text), "\n") {
		line = strings.TrimRight(line, "\r \t")
		if line == "" {
			continue
		}
		lines = append(lines, line[:min(len(line), maxLineBytes)])
	}
	return lines[max(0, len(lines)-n):]
}
