package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"banger/internal/vmm"
)

const (
	// maxQMPLineBytes bounds one message of QEMU's monitor. Those asked for
	// here are below 1 KiB.
	maxQMPLineBytes = 64 << 10
	// qmpTimeout bounds every command, whatever the caller's context says: a
	// VMM that takes longer is stuck.
	qmpTimeout = 30 * time.Second
)

// A monitor speaks QMP (docs/interop/qmp-spec.txt of QEMU) over one end of a
// socket pair. QEMU answers in order; answers are matched by id all the same,
// so that one nobody waits for any more is dropped.
type monitor struct {
	conn    net.Conn
	onEvent func(qmpEvent) // called by the reader; must not wait for a command
	version string         // from the greeting

	greeting chan qmpMessage // has room for it: it may come before anybody waits
	send     chan struct{}   // one token: who holds it writes
	ended    chan struct{}   // closed when the reader has ended

	mu     sync.Mutex
	nextID uint64
	wait   map[uint64]chan qmpMessage
	err    error // why the reader ended
}

// A qmpMessage is a greeting, an answer or an event.
type qmpMessage struct {
	QMP *struct {
		Version struct {
			QEMU struct{ Major, Minor, Micro int }
		}
	}
	ID     *uint64
	Return json.RawMessage
	Error  *struct{ Desc string }
	qmpEvent
}

// A qmpEvent is something QEMU tells without being asked.
type qmpEvent struct {
	Event     string
	Data      json.RawMessage
	Timestamp struct{ Seconds, Microseconds int64 }
}

// at is when the event happened, which may be a while before it is told.
func (e qmpEvent) at() time.Time {
	return time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*int64(time.Microsecond))
}

func newMonitor(conn net.Conn, onEvent func(qmpEvent)) *monitor {
	m := &monitor{
		conn: conn, onEvent: onEvent,
		send: make(chan struct{}, 1), ended: make(chan struct{}),
		greeting: make(chan qmpMessage, 1),
	}
	// The greeting counts as the answer to command 0.
	m.wait = map[uint64]chan qmpMessage{0: m.greeting}
	return m
}

// read takes in messages until the connection ends or talks nonsense.
func (m *monitor) read() {
	r := bufio.NewReaderSize(m.conn, maxQMPLineBytes)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			err = fmt.Errorf("a message over %d bytes", maxQMPLineBytes)
		}
		var msg qmpMessage
		if err == nil {
			err = json.Unmarshal(line, &msg)
		}
		if err != nil {
			m.mu.Lock()
			m.err = err
			m.mu.Unlock()
			close(m.ended)
			m.conn.Close()
			return
		}
		switch {
		case msg.Event != "":
			m.onEvent(msg.qmpEvent)
		case msg.QMP != nil:
			m.answer(0, msg)
		case msg.ID != nil:
			m.answer(*msg.ID, msg)
		}
	}
}

func (m *monitor) answer(id uint64, msg qmpMessage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ch, ok := m.wait[id]; ok {
		delete(m.wait, id)
		ch <- msg // has room for one, and only one is ever sent
	}
}

// negotiate takes the greeting and leaves negotiation mode.
func (m *monitor) negotiate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	msg, err := m.await(ctx, 0, m.greeting)
	if err != nil {
		return fmt.Errorf("qmp greeting: %w", err)
	}
	if msg.QMP == nil {
		return errors.New("qmp greeting: an answer came first")
	}
	v := msg.QMP.Version.QEMU
	m.version = fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
	return m.execute(ctx, "qmp_capabilities", nil)
}

// execute runs a command and decodes what it returns into result, unless that
// is nil. It returns vmm.ErrEnded once QEMU has closed the connection.
func (m *monitor) execute(ctx context.Context, command string, result any) error {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	select {
	case m.send <- struct{}{}:
	case <-m.ended:
		return m.why(command)
	case <-ctx.Done():
		return fmt.Errorf("qmp %s: %w", command, context.Cause(ctx))
	}
	m.mu.Lock()
	m.nextID++
	id, ch := m.nextID, make(chan qmpMessage, 1)
	m.wait[id] = ch
	m.mu.Unlock()

	deadline, _ := ctx.Deadline()
	err := m.conn.SetWriteDeadline(deadline)
	if err == nil {
		_, err = fmt.Fprintf(m.conn, `{"execute":%q,"id":%d}`+"\n", command, id)
	}
	<-m.send
	if err != nil {
		m.forget(id)
		select {
		case <-m.ended:
			return m.why(command)
		case <-ctx.Done():
		}
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	msg, err := m.await(ctx, id, ch)
	switch {
	case errors.Is(err, vmm.ErrEnded):
		return m.why(command)
	case err != nil:
		return fmt.Errorf("qmp %s: %w", command, err)
	case msg.Error != nil:
		return fmt.Errorf("qmp %s: %q", command, msg.Error.Desc)
	case result != nil:
		return json.Unmarshal(msg.Return, result)
	}
	return nil
}

func (m *monitor) await(ctx context.Context, id uint64, ch chan qmpMessage) (qmpMessage, error) {
	select {
	case msg := <-ch:
		return msg, nil
	case <-m.ended:
		// The answer may have come as the last thing.
		select {
		case msg := <-ch:
			return msg, nil
		default:
			return qmpMessage{}, vmm.ErrEnded
		}
	case <-ctx.Done():
		m.forget(id)
		return qmpMessage{}, context.Cause(ctx)
	}
}

func (m *monitor) forget(id uint64) {
	m.mu.Lock()
	delete(m.wait, id)
	m.mu.Unlock()
}

func (m *monitor) why(command string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Errorf("qmp %s: %w (%v)", command, vmm.ErrEnded, m.err)
}
