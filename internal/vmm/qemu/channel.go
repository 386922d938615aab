package qemu

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"banger/internal/vmm"
	"banger/internal/wire"
)

const (
	// maxStreams bounds the streams of one machine that are open, being
	// opened, or closed but not yet told to the guest.
	maxStreams = 256
	// streamWindowBytes is what a guest may send on one stream before it is
	// read, so the most that one stream holds in memory.
	streamWindowBytes = 1 << 20
	// stallLimit is how long a running guest may leave bytes unread before the
	// session is given up. Time in which the VMM is paused does not count.
	stallLimit = 30 * time.Second
	// streamLinger is how long a stream closed here waits for the guest to
	// close its end.
	streamLinger = 30 * time.Second
)

// A channel is the host's end of the virtio-serial port: handshakes, yamux
// sessions, streams.
//
// The port has no connections, and QEMU does not pass a close by the guest on
// to the socket. It does tell every opening and closing of the port as an
// event, late at times but with the time of the change. So a handshake is
// begun when the port is opened, begun again when it is opened again, and a
// session ends with the first change that is younger than it.
type channel struct {
	conn   net.Conn
	paused func() bool
	stall  time.Duration // stallLimit, shorter in tests
	slots  chan struct{} // maxStreams tokens

	mu      sync.Mutex
	open    bool           // the guest has the port open
	since   time.Time      // changes before this are known already
	kick    chan struct{}  // closed and replaced at every change of the port
	guest   *guestConn     // of the session, or of the last one
	session *yamux.Session // nil while there is none
	news    chan struct{}  // closed and replaced when session changes
	ended   bool
	over    chan struct{} // closed with ended
	wg      sync.WaitGroup
}

func newChannel(conn net.Conn, paused func() bool) *channel {
	return &channel{
		conn: conn, paused: paused, stall: stallLimit, slots: make(chan struct{}, maxStreams),
		kick: make(chan struct{}), news: make(chan struct{}), over: make(chan struct{}),
	}
}

// spawn runs f unless the channel has ended, in which case it returns false.
// end waits for what was spawned.
func (c *channel) spawn(f func()) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	c.wg.Go(f)
	return true
}

// end closes the channel and waits until nothing of it runs any more.
func (c *channel) end() {
	c.mu.Lock()
	if !c.ended {
		c.ended = true
		close(c.over)
	}
	c.mu.Unlock()
	c.conn.Close()
	c.wg.Wait()
}

// portChanged takes in that the guest opened or closed the port at a time.
func (c *channel) portChanged(open bool, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open = open
	if at.Before(c.since) {
		return
	}
	close(c.kick)
	c.kick = make(chan struct{})
	if c.guest != nil {
		c.guest.cut = true
	}
	_ = c.conn.SetDeadline(time.Unix(1, 0)) // wakes whoever reads or writes
}

// serve makes one session after the other. It returns when the channel ends.
func (c *channel) serve() {
	for {
		kick, ok := c.begin()
		if !ok {
			return
		}
		err := c.handshake()
		if err == nil {
			c.run()
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue // the port has changed
		}
		// The guest said something else, or QEMU is gone. Only a change of the
		// port, or the end, gives reason to try again.
		select {
		case <-kick:
		case <-c.over:
			return
		}
	}
}

// begin waits until the guest has the port open and makes the connection
// usable for a new handshake. The channel it returns is closed at the next
// change of the port.
func (c *channel) begin() (<-chan struct{}, bool) {
	for {
		c.mu.Lock()
		kick, open := c.kick, c.open
		if open {
			c.since = time.Now()
			_ = c.conn.SetDeadline(time.Time{})
		}
		c.mu.Unlock()
		select {
		case <-c.over:
			return nil, false
		default:
		}
		if open {
			return kick, true
		}
		select {
		case <-kick:
		case <-c.over:
			return nil, false
		}
	}
}

func (c *channel) handshake() error {
	var nonce [wire.NonceBytes]byte
	rand.Read(nonce[:]) // never fails: crypto/rand
	return wire.HandshakeHost(c.conn, nonce)
}

// run makes a session of the connection and returns when it has ended.
func (c *channel) run() {
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive = false // it would end the session in a pause
	cfg.StreamOpenTimeout = 0   // as would this
	// The limit is stallLimit, in guestConn; this one knows of no pause.
	cfg.ConnectionWriteTimeout = 1 << 62
	cfg.StreamCloseTimeout = streamLinger
	cfg.MaxStreamWindowSize = streamWindowBytes
	cfg.LogOutput = io.Discard
	conn := &guestConn{c: c, ready: make(chan struct{})}
	c.mu.Lock()
	c.since = time.Now()
	c.guest = conn
	c.mu.Unlock()
	session, err := yamux.Client(conn, cfg)
	if err != nil {
		panic("qemu: the yamux configuration does not hold: " + err.Error())
	}
	// Said before anything is read: a stream that the guest opens is refused
	// with a reset from the first one on.
	if session.GoAway() == nil {
		conn.start()
		c.publish(session)
		select {
		case <-session.CloseChan():
		case <-c.over:
		}
		c.publish(nil)
	}
	session.Close() // waits for its goroutines
}

func (c *channel) publish(s *yamux.Session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.session = s
	close(c.news)
	c.news = make(chan struct{})
}

// dial opens a stream to a service of the agent.
func (c *channel) dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-c.over:
		return nil, vmm.ErrEnded
	case <-ctx.Done():
		return nil, c.notReached(ctx)
	default:
	}
	select {
	case c.slots <- struct{}{}:
	case <-c.over:
		return nil, vmm.ErrEnded
	case <-ctx.Done():
		return nil, fmt.Errorf("agent: %d streams are open: %w", maxStreams, context.Cause(ctx))
	}
	for {
		c.mu.Lock()
		session, news := c.session, c.news
		c.mu.Unlock()
		if session != nil {
			s, abandoned, err := c.openStream(ctx, session, port)
			if err == nil {
				return s, nil
			}
			if abandoned {
				return nil, c.notReached(ctx)
			}
			if !session.IsClosed() {
				<-c.slots
				return nil, fmt.Errorf("agent: %w", err)
			}
		}
		select {
		case <-news:
		case <-c.over:
			<-c.slots
			return nil, vmm.ErrEnded
		case <-ctx.Done():
			<-c.slots
			return nil, c.notReached(ctx)
		}
	}
}

// notReached says how far the agent is.
func (c *channel) notReached(ctx context.Context) error {
	c.mu.Lock()
	open, session := c.open, c.session
	c.mu.Unlock()
	state := "has not opened its port"
	switch {
	case c.paused():
		state = "cannot answer, the VM is paused"
	case session != nil:
		state = "takes no stream"
	case open:
		state = "has not answered the handshake"
	}
	return fmt.Errorf("agent: %s: %w", state, context.Cause(ctx))
}

// openStream opens a stream, which a guest that reads nothing can delay for
// as long as it likes. When ctx ends first the attempt is abandoned: it goes
// on, holding the caller's slot, until it can be undone.
func (c *channel) openStream(ctx context.Context, session *yamux.Session, port uint32) (s *stream, abandoned bool, err error) {
	type opened struct {
		s   *yamux.Stream
		err error
	}
	result := make(chan opened) // without room: either it is taken or ctx is over
	ok := c.spawn(func() {
		s, err := session.OpenStream()
		if err == nil {
			var service [4]byte
			binary.BigEndian.PutUint32(service[:], port)
			if _, err = s.Write(service[:]); err != nil {
				s.Close()
			}
		}
		select {
		case result <- opened{s, err}:
		case <-ctx.Done():
			if err == nil {
				s.Close()
			}
			<-c.slots
		}
	})
	if !ok {
		<-session.CloseChan() // the end closes the session too
		return nil, false, yamux.ErrSessionShutdown
	}
	select {
	case r := <-result:
		if r.err != nil {
			return nil, false, r.err
		}
		return &stream{Stream: r.s, c: c, session: session}, false, nil
	case <-ctx.Done():
		return nil, true, context.Cause(ctx)
	}
}

// A stream is a yamux stream that behaves as other net.Conns do: its Close
// never waits for the guest, its errors are those of package net, and a
// session that breaks is never taken for an orderly end.
type stream struct {
	*yamux.Stream
	c       *channel
	session *yamux.Session
	closed  atomic.Bool
}

func (s *stream) Read(p []byte) (int, error) {
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.Stream.Read(p)
	return n, s.plain(err)
}

func (s *stream) Write(p []byte) (int, error) {
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.Stream.Write(p)
	return n, s.plain(err)
}

// plain translates an error of yamux, which reports io.EOF for every stream of
// a session that broke.
func (s *stream) plain(err error) error {
	switch {
	case err == nil:
		return nil
	case s.closed.Load():
		return net.ErrClosed
	case errors.Is(err, io.EOF) && s.session.IsClosed():
		return io.ErrUnexpectedEOF
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	}
	return err
}

// Close wakes readers and writers and tells the guest in the background.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	_ = s.SetDeadline(time.Unix(1, 0))
	finish := func() {
		s.Stream.Close()
		<-s.c.slots
	}
	if !s.c.spawn(finish) {
		finish() // the session is over: nothing is sent
	}
	return nil
}

// A guestConn is the channel's connection for the length of one session.
type guestConn struct {
	c     *channel
	check frameCheck
	once  sync.Once
	ready chan struct{} // closed when reading may begin
	cut   bool          // no more writes; guarded by c.mu
}

func (g *guestConn) start() { g.once.Do(func() { close(g.ready) }) }

func (g *guestConn) Read(p []byte) (int, error) {
	<-g.ready
	n, err := g.c.conn.Read(p)
	if cerr := g.check.take(p[:n]); cerr != nil {
		return 0, cerr
	}
	return n, err
}

// Write fails when the guest takes nothing for stallLimit while it runs.
func (g *guestConn) Write(p []byte) (int, error) {
	total := 0
	for {
		g.c.mu.Lock()
		if g.cut {
			g.c.mu.Unlock()
			return total, net.ErrClosed
		}
		_ = g.c.conn.SetWriteDeadline(time.Now().Add(g.c.stall))
		g.c.mu.Unlock()
		n, err := g.c.conn.Write(p[total:])
		total += n
		if errors.Is(err, os.ErrDeadlineExceeded) && (n > 0 || g.c.paused()) {
			continue
		}
		return total, err
	}
}

// Close ends the session and keeps the connection for the next one.
func (g *guestConn) Close() error {
	g.c.mu.Lock()
	g.cut = true
	_ = g.c.conn.SetDeadline(time.Unix(1, 0))
	g.c.mu.Unlock()
	g.start()
	return nil
}

// A frameCheck follows yamux's frames (its spec.md) and refuses what the agent
// never sends and yamux does not bound: it answers each ping from a new
// goroutine, however many there are.
type frameCheck struct {
	head [12]byte
	n    int    // bytes of head that are there
	body uint32 // bytes of the frame's body that are still to come
}

func (f *frameCheck) take(p []byte) error {
	const typeData, typePing = 0, 2
	for len(p) > 0 {
		if f.body > 0 {
			k := min(int(f.body), len(p))
			f.body -= uint32(k)
			p = p[k:]
			continue
		}
		k := copy(f.head[f.n:], p)
		f.n += k
		p = p[k:]
		if f.n < len(f.head) {
			return nil
		}
		f.n = 0
		switch f.head[1] {
		case typeData:
			f.body = binary.BigEndian.Uint32(f.head[8:])
		case typePing:
			return errors.New("agent: sent a ping, which no agent does")
		}
	}
	return nil
}
