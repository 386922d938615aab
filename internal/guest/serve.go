package guest

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// requestTimeout bounds the request at the head of a stream.
	requestTimeout = 10 * time.Second
	// maxStreams bounds open streams, maxSessions the sessions among them, so
	// that hello, boot and shutdown are heard when the sessions are used up.
	maxStreams  = 512
	maxSessions = 256
	// maxGrace bounds the time that a shutdown may give to the image's init.
	maxGrace = 10 * time.Minute
)

// A stream is one connection from the host.
type stream interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
}

// A server answers requests. It is the same in an agent, in a first process
// whose boot failed, and in a foreign boot.
type server struct {
	token    string // empty: only hello (and boot, when open is set) is answered
	open     bool   // the token is unknown: the boot events need none
	journal  *journal
	shutdown func(grace time.Duration) // returns at once; nil where the guest is not ours

	protected bool // from the kernel's memory killer
	forking   sync.Mutex
	sessions  slots
	streams   slots
}

func newServer(token string, j *journal) *server {
	return &server{
		token: token, journal: j,
		sessions: make(slots, maxSessions), streams: make(slots, maxStreams),
	}
}

// slots is a counting semaphore that never waits.
type slots chan struct{}

func (s slots) take() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s slots) give() { <-s }

// serve answers the request on one stream and closes it.
func (s *server) serve(conn stream) {
	defer conn.Close()
	if !s.streams.take() {
		return
	}
	defer s.streams.give()
	conn.SetReadDeadline(time.Now().Add(requestTimeout))
	var req wire.Request
	if err := wire.ReadMessage(conn, &req); err != nil {
		if !errors.Is(err, io.EOF) {
			reply(conn, refuse(wire.ErrInvalid, "request: %v", err), nil)
		}
		return
	}
	conn.SetReadDeadline(time.Time{})
	if req.Version != wire.Version {
		reply(conn, refuse(wire.ErrVersion, "request: protocol version %d, this agent speaks %d", req.Version, wire.Version), nil)
		return
	}
	if !s.allowed(&req) {
		reply(conn, refuse(wire.ErrDenied, "request %q: no or a wrong token", req.Op), nil)
		return
	}
	switch req.Op {
	case wire.OpHello:
		reply(conn, nil, s.hello())
	case wire.OpBoot:
		if reply(conn, nil, nil) == nil {
			s.serveBoot(conn)
		}
	case wire.OpExec:
		s.serveExec(conn, req.Exec)
	case wire.OpSockets:
		list := waitingSockets()
		wire.WriteMessage(conn, wire.Reply{Version: wire.Version, Sockets: &list})
	case wire.OpShutdown:
		s.serveShutdown(conn, req.Shutdown)
	default:
		reply(conn, refuse(wire.ErrInvalid, "request %q: not known", req.Op), nil)
	}
}

// allowed says whether the request's token is enough for what it asks. The
// comparison takes the same time whatever the token is.
func (s *server) allowed(req *wire.Request) bool {
	if req.Op == wire.OpHello || req.Op == wire.OpBoot && s.open {
		return true
	}
	want, got := sha256.Sum256([]byte(s.token)), sha256.Sum256([]byte(req.Token))
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1 && s.token != ""
}

// reply writes the answer; cause, when it is not nil, is a *wire.Error or
// becomes one.
func reply(conn stream, cause error, h *wire.Hello) error {
	r := wire.Reply{Version: wire.Version, Hello: h}
	if cause != nil && !errors.As(cause, &r.Error) {
		r.Error = &wire.Error{Code: wire.ErrInternal, Message: cause.Error()}
	}
	return wire.WriteMessage(conn, r)
}

func (s *server) hello() *wire.Hello {
	return &wire.Hello{
		AgentVersion:  Version,
		KernelRelease: kernelRelease(),
		UptimeMs:      uptime().Milliseconds(),
		Booted:        s.journal.reached(stageNetwork),
	}
}

// serveBoot streams the events of the boot until the host closes.
func (s *server) serveBoot(conn stream) {
	gone := make(chan struct{})
	go func() { // the host has nothing to say here
		var b [1]byte
		conn.Read(b[:])
		close(gone)
	}()
	for i := 0; ; i++ {
		ev, ok := s.journal.wait(i, gone)
		if !ok {
			return
		}
		data, err := json.Marshal(ev)
		if err != nil || wire.WriteFrame(conn, wire.FrameEvent, data) != nil {
			return
		}
	}
}

func (s *server) serveExec(conn stream, e *wire.Exec) {
	if e == nil {
		reply(conn, refuse(wire.ErrInvalid, "exec: nothing to run"), nil)
		return
	}
	if !s.sessions.take() {
		reply(conn, refuse(wire.ErrInternal, "exec: %d sessions are open, no more are allowed", maxSessions), nil)
		return
	}
	defer s.sessions.give()
	x, err := s.startSession(conn, e)
	if err != nil {
		reply(conn, err, nil)
		return
	}
	// A reply that cannot be written shows in run as a broken stream.
	reply(conn, nil, nil)
	x.run()
}

func (s *server) serveShutdown(conn stream, req *wire.Shutdown) {
	if s.shutdown == nil {
		reply(conn, refuse(wire.ErrInvalid, "shutdown: this guest was not booted by banger"), nil)
		return
	}
	var grace time.Duration
	if req != nil && req.GraceMs > 0 {
		grace = time.Duration(min(req.GraceMs, maxGrace.Milliseconds())) * time.Millisecond
	}
	reply(conn, nil, nil)
	s.shutdown(grace)
}

// A journal holds the events of a boot, and wakes whoever waits for more.
type journal struct {
	mu     sync.Mutex
	events []wire.BootEvent
	grown  chan struct{} // closed and replaced at every event
}

// maxEvents bounds what a journal takes over from its parent: a boot has some
// eight stages.
const maxEvents = 64

func newJournal(events []wire.BootEvent) *journal {
	return &journal{events: events[:min(len(events), maxEvents)], grown: make(chan struct{})}
}

func (j *journal) add(stage, detail string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.events = append(j.events, wire.BootEvent{Stage: stage, UptimeMs: uptime().Milliseconds(), Detail: detail})
	close(j.grown)
	j.grown = make(chan struct{})
}

func (j *journal) reached(stage string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, ev := range j.events {
		if ev.Stage == stage {
			return true
		}
	}
	return false
}

// wait returns event number i as soon as it exists; false when gone is closed.
func (j *journal) wait(i int, gone <-chan struct{}) (wire.BootEvent, bool) {
	for {
		j.mu.Lock()
		if i < len(j.events) {
			defer j.mu.Unlock()
			return j.events[i], true
		}
		grown := j.grown
		j.mu.Unlock()
		select {
		case <-grown:
		case <-gone:
			return wire.BootEvent{}, false
		}
	}
}

// uptime is the guest's, since its kernel started.
func uptime() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}

func kernelRelease() string {
	var u unix.Utsname
	unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:])
}
