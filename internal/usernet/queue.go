package usernet

import (
	"encoding/binary"
	"io"
	"sync"
)

// maxQueueBytes bounds what waits for a guest or another VM that does not
// read; what comes on top is dropped, as on any wire that is full.
const maxQueueBytes = 2 << 20

// A sendQueue is a bounded queue of frames, each after its length in 32 bits,
// big-endian, as QEMU's stream sockets have them (net/stream.c). Any number of
// goroutines add, and none ever waits for the reader; one goroutine writes.
type sendQueue struct {
	mu      sync.Mutex
	pending []byte
	closed  bool
	wake    chan struct{} // one slot
}

func newSendQueue() *sendQueue { return &sendQueue{wake: make(chan struct{}, 1)} }

// add appends the frame that the parts make; false means that it was dropped.
func (q *sendQueue) add(parts ...[]byte) bool {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	q.mu.Lock()
	if q.closed || len(q.pending)+4+size > maxQueueBytes {
		q.mu.Unlock()
		return false
	}
	q.pending = binary.BigEndian.AppendUint32(q.pending, uint32(size))
	for _, p := range parts {
		q.pending = append(q.pending, p...)
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return true
}

func (q *sendQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// writeTo writes what is added until the queue is closed or w fails. Many
// small frames become one write.
func (q *sendQueue) writeTo(w io.Writer) error {
	var spare []byte
	for range q.wake {
		q.mu.Lock()
		out, closed := q.pending, q.closed
		q.pending = spare[:0]
		q.mu.Unlock()
		if closed {
			return nil
		}
		if len(out) > 0 {
			if _, err := w.Write(out); err != nil {
				return err
			}
		}
		spare = out
	}
	return nil
}
