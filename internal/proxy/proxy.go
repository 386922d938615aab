// Package proxy takes programs of the host to VMs: SOCKS 5 (RFC 1928) and HTTP
// (RFC 9110, 9112) on one port, told apart by a connection's first byte.
//
//	client ==> accept ==> first byte 5 -----> SOCKS ---> CONNECT --.
//	                      any other --> HTTP --> CONNECT -----------+-> Dial ==> VM
//	                                        '--> absolute URL ------'
//
// It resolves no name and opens no connection of its own: Dial decides what
// there is to reach. The client may be any program of this host, a web page
// in a browser among them.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"banger"
)

var ( // but for tests constants
	// maxConns bounds connections of clients; the next one waits for its turn.
	maxConns = 512
	// requestTimeout bounds the request at the head of a connection, and
	// dialTimeout what becomes of it.
	requestTimeout = 10 * time.Second
	dialTimeout    = 30 * time.Second
)

const (
	// acceptPause is after an Accept that failed: out of descriptors, mostly.
	acceptPause = 50 * time.Millisecond

	// notePause is how long the same complaint is not made again, and maxNotes
	// how many are remembered for that.
	notePause = time.Minute
	maxNotes  = 256
)

// Config is what a proxy is made of.
type Config struct {
	// Dial connects to a port of a VM. The host is what the client sent: up to
	// 255 bytes of anything. The code of an error says what the client hears:
	// CodeUsage for what must not be reached, CodeNotFound, CodeConflict for a
	// VM that does not run, CodeUnavailable for a port that is closed,
	// CodeTimeout.
	Dial func(ctx context.Context, host string, port uint16) (*net.TCPConn, error)
	// Note is told in a line what clients were refused: SOCKS has no words for
	// reasons. Untrusted text.
	Note func(line string)
}

// A proxy is one listener's.
type proxy struct {
	Config
	slots chan struct{} // one token for each connection
	http  *httpSide

	mu    sync.Mutex
	noted map[string]time.Time
}

// Serve takes connections until ctx ends, which is no error, and ends those
// that are open then. It owns the listener.
func Serve(ctx context.Context, l *net.TCPListener, cfg Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &proxy{Config: cfg, slots: make(chan struct{}, maxConns), noted: make(map[string]time.Time)}
	p.http = newHTTPSide(ctx, p, l.Addr())
	var work sync.WaitGroup
	work.Go(p.http.serve)
	work.Go(func() { <-ctx.Done(); l.Close() })
	var err error
	for {
		p.slots <- struct{}{}
		var conn *net.TCPConn
		if conn, err = l.AcceptTCP(); err == nil {
			work.Go(func() { p.take(ctx, conn) })
			continue
		}
		<-p.slots
		if ctx.Err() != nil {
			err = nil
			break
		}
		if errors.Is(err, net.ErrClosed) {
			break
		}
		time.Sleep(acceptPause)
	}
	cancel()
	p.http.close()
	work.Wait()
	return err
}

// take serves one connection, and returns when it is over.
func (p *proxy) take(ctx context.Context, conn *net.TCPConn) {
	defer func() { <-p.slots }()
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { abort(conn) })()
	conn.SetDeadline(time.Now().Add(requestTimeout))
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		return
	}
	if first[0] == socksVersion {
		p.serveSOCKS(ctx, conn)
		return
	}
	conn.SetDeadline(time.Time{}) // net/http has its own
	p.http.take(conn, first[0])
}

// dial is Dial within its time, and notes what failed.
func (p *proxy) dial(ctx context.Context, host string, port uint16) (*net.TCPConn, error) {
	limited, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := p.Dial(limited, host, port)
	switch {
	case err == nil || ctx.Err() != nil: // nobody wants it any more
		return conn, err
	case limited.Err() != nil:
		err = banger.Errorf(banger.CodeTimeout, "%.100q port %d: no connection within %v", host, port, dialTimeout)
	}
	p.note(err)
	return nil, err
}

// note passes on a complaint, unless it was made a moment ago.
func (p *proxy) note(err error) {
	line := err.Error()
	now := time.Now()
	p.mu.Lock()
	last, known := p.noted[line]
	again := known && now.Sub(last) < notePause
	if !again {
		if len(p.noted) >= maxNotes {
			clear(p.noted)
		}
		p.noted[line] = now
	}
	p.mu.Unlock()
	if !again {
		p.Note(line)
	}
}

// explain is an error and its next step, in lines.
func explain(err error) string {
	text := fmt.Sprintf("banger: %v\n", err)
	var e *banger.Error
	if errors.As(err, &e) && e.Hint != "" {
		text += "hint: " + e.Hint + "\n"
	}
	return text
}

// abort closes a connection so that the other end learns that it broke.
func abort(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}

// join passes bytes both ways until both directions have ended. The end of one
// is passed on as such, and a break as a reset.
func join(a, b *net.TCPConn) {
	ended := make(chan error, 2)
	half := func(to, from *net.TCPConn) {
		_, err := io.Copy(to, from)
		if err == nil {
			err = to.CloseWrite()
		}
		ended <- err
	}
	go half(a, b)
	go half(b, a)
	for range 2 {
		if <-ended != nil {
			abort(a)
			abort(b)
		}
	}
	a.Close()
	b.Close()
}
