package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"banger/internal/vmm"
	"banger/internal/wire"
)

// testChannel makes a channel and the guest's end of its port.
func testChannel(t *testing.T) (*channel, net.Conn) {
	t.Helper()
	before := runtime.NumGoroutine()
	var in inherited
	ours, _, err := in.socket()
	if err != nil {
		t.Fatal(err)
	}
	guest, err := net.FileConn(in.files[0])
	if err != nil {
		t.Fatal(err)
	}
	in.close()
	c := newChannel(ours, func() bool { return false })
	served := make(chan struct{})
	go func() { defer close(served); c.serve() }()
	t.Cleanup(func() {
		c.end()
		<-served
		guest.Close()
		for end := time.Now().Add(3 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				buf := make([]byte, 1<<20)
				t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
		}
		if n := len(c.slots); n != 0 {
			t.Errorf("%d slots are still taken", n)
		}
	})
	return c, guest
}

// shake opens the port and does the guest's side of the handshake.
func shake(t *testing.T, c *channel, guest net.Conn) {
	t.Helper()
	c.portChanged(true, time.Now())
	_ = guest.SetDeadline(time.Now().Add(5 * time.Second))
	if err := wire.HandshakeGuest(guest); err != nil {
		t.Fatal(err)
	}
	_ = guest.SetDeadline(time.Time{})
}

func serveYamux(t *testing.T, conn io.ReadWriteCloser) *yamux.Session {
	t.Helper()
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive = false
	cfg.LogOutput = io.Discard
	s, err := yamux.Server(conn, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// keepOpen leaves the guest's end open when a session ends, as the port is.
type keepOpen struct{ net.Conn }

func (k keepOpen) Close() error { return k.SetDeadline(time.Unix(1, 0)) }

func dialFor(c *channel, d time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return c.dial(ctx, wire.AgentPort)
}

// TestChannelPortChanges follows what QEMU tells of the port, late news
// included.
func TestChannelPortChanges(t *testing.T) {
	c, guest := testChannel(t)
	if _, err := dialFor(c, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), "has not opened its port") {
		t.Errorf("dial with the port closed: %v", err)
	}
	// An agent that takes the first hello and dies; the next one gets its own.
	c.portChanged(true, time.Now())
	if _, err := io.ReadFull(guest, make([]byte, 30)); err != nil {
		t.Fatal(err)
	}
	if _, err := dialFor(c, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), "handshake") {
		t.Errorf("dial without a handshake: %v", err)
	}
	shake(t, c, guest)
	session := serveYamux(t, keepOpen{guest})
	conn, err := dialFor(c, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	// News older than the session does not end it.
	c.portChanged(false, time.Now().Add(-time.Minute))
	c.portChanged(true, time.Now().Add(-time.Minute))
	s, err := session.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatalf("stream after old news: %v", err)
	}
	// Younger news does.
	session.Close()
	_ = guest.SetDeadline(time.Time{})
	c.portChanged(false, time.Now())
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("stream of a closed port: %v", err)
	}
	conn.Close()
	shake(t, c, guest)
	session = serveYamux(t, keepOpen{guest})
	defer session.Close()
	if conn, err = dialFor(c, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// TestChannelHostile lets the guest say after the handshake what no agent
// says. It must cost bounded memory, and the next agent must get through.
func TestChannelHostile(t *testing.T) {
	frame := func(typ byte, flags uint16, id, length uint32) []byte {
		b := make([]byte, 12)
		b[1] = typ
		binary.BigEndian.PutUint16(b[2:], flags)
		binary.BigEndian.PutUint32(b[4:], id)
		binary.BigEndian.PutUint32(b[8:], length)
		return b
	}
	for name, say := range map[string][]byte{
		"pings":               bytes.Repeat(frame(2, 1, 0, 7), 100_000),
		"streams opened":      bytes.Repeat(frame(1, 1, 2, 0), 100_000),
		"data for no stream":  bytes.Repeat(append(frame(0, 0, 9, 64), make([]byte, 64)...), 10_000),
		"huge length":         frame(0, 0, 1, 1<<32-1),
		"another version":     {9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9},
		"unknown type":        frame(7, 0, 0, 0),
		"go away":             frame(3, 0, 0, 1),
		"zeros":               make([]byte, 1<<20),
		"ends within a frame": frame(1, 0, 0, 0)[:5],
	} {
		t.Run(name, func(t *testing.T) {
			c, guest := testChannel(t)
			shake(t, c, guest)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			most := 0
			said := make(chan struct{})
			go func() {
				defer close(said)
				_ = guest.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
				_, _ = guest.Write(say) // what it is answered is not read
			}()
			for running := true; running; {
				select {
				case <-said:
					running = false
				case <-time.After(time.Millisecond):
					most = max(most, runtime.NumGoroutine())
				}
			}
			runtime.ReadMemStats(&after)
			if most > 50 {
				t.Errorf("%d goroutines", most)
			}
			if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > 16<<20 {
				t.Errorf("%d bytes more in use", grown)
			}
			// The next agent: what is left unread goes first, as at the port.
			c.portChanged(false, time.Now())
			drained := make([]byte, 1<<20)
			_ = guest.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			for {
				if _, err := guest.Read(drained); err != nil {
					break
				}
			}
			shake(t, c, guest)
			session := serveYamux(t, keepOpen{guest})
			defer session.Close()
			conn, err := dialFor(c, 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
		})
	}
}

// TestChannelRefusesStreams opens streams as a guest that does not care for
// having been told to open none: each is reset.
func TestChannelRefusesStreams(t *testing.T) {
	c, guest := testChannel(t)
	shake(t, c, guest)
	const windowUpdate, goAway, syn, rst = 1, 3, 1, 8
	_ = guest.SetDeadline(time.Now().Add(5 * time.Second))
	head := make([]byte, 12)
	if _, err := io.ReadFull(guest, head); err != nil || head[1] != goAway {
		t.Fatalf("the first frame is %x, %v", head, err)
	}
	for id := byte(2); id < 20; id += 2 {
		if _, err := guest.Write([]byte{0, windowUpdate, 0, syn, 0, 0, 0, id, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(guest, head); err != nil || head[1] != windowUpdate || head[3] != rst || head[7] != id {
			t.Errorf("stream %d was answered with %x, %v", id, head, err)
		}
	}
}

// TestChannelJunk bounds what may come before the handshake's answer.
func TestChannelJunk(t *testing.T) {
	c, guest := testChannel(t)
	c.portChanged(true, time.Now())
	go func() {
		_ = guest.SetWriteDeadline(time.Now().Add(5 * time.Second))
		for block := make([]byte, 64<<10); ; {
			if _, err := guest.Write(block); err != nil {
				return // nobody takes it any more
			}
		}
	}()
	if _, err := dialFor(c, time.Second); err == nil {
		t.Error("dial to a guest that sends zeros")
	}
}

// TestChannelDeaf has a guest that answers the handshake and then reads
// nothing. Streams and dials are bounded, nothing of the caller waits, and
// after the stall limit the session is given up.
func TestChannelDeaf(t *testing.T) {
	c, guest := testChannel(t)
	c.stall = 2 * time.Second
	shake(t, c, guest)
	conn, err := dialFor(c, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	other, err := dialFor(c, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() {
		for {
			if _, err := conn.Write(make([]byte, 200<<10)); err != nil {
				wrote <- err
				return
			}
			// The stream's window is not what stops it.
			c.mu.Lock()
			session := c.session
			c.mu.Unlock()
			if session == nil {
				wrote <- nil
				return
			}
			go session.Ping()
		}
	}()
	began := time.Now()
	time.Sleep(100 * time.Millisecond)
	other.Close()
	for range 10 {
		if s, err := dialFor(c, 5*time.Millisecond); err == nil {
			s.Close()
		}
	}
	if took := time.Since(began); took > 1500*time.Millisecond {
		t.Errorf("10 dials and closes took %v", took)
	}
	select {
	case <-wrote:
	case <-time.After(20 * time.Second):
		t.Error("a write to a deaf guest outlives the stall limit")
	}
	conn.Close()
}

func TestChannelStreamLimit(t *testing.T) {
	c, guest := testChannel(t)
	shake(t, c, guest)
	session := serveYamux(t, keepOpen{guest})
	defer session.Close()
	go func() {
		for {
			s, err := session.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(io.Discard, s); s.Close() }()
		}
	}()
	var conns []net.Conn
	for i := range maxStreams {
		conn, err := dialFor(c, 5*time.Second)
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		conns = append(conns, conn)
	}
	if _, err := dialFor(c, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), fmt.Sprint(maxStreams)) {
		t.Errorf("stream %d: %v", maxStreams, err)
	}
	conns[0].Close()
	conns[0].Close() // gives back one slot, not two
	conn, err := dialFor(c, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dialFor(c, 50*time.Millisecond); err == nil {
		t.Errorf("closing one stream made room for two")
	}
	for _, conn := range append(conns, conn) {
		conn.Close()
	}
}

func TestChannelEnd(t *testing.T) {
	c, guest := testChannel(t)
	shake(t, c, guest)
	conn, err := dialFor(c, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read past the deadline: %v", err)
	}
	_ = conn.SetReadDeadline(time.Time{})
	c.end()
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read after the end: %v", err)
	}
	if _, err := conn.Write(make([]byte, 1)); err == nil {
		t.Error("write after the end: no error")
	}
	if _, err := dialFor(c, time.Minute); !errors.Is(err, vmm.ErrEnded) {
		t.Errorf("dial after the end: %v", err)
	}
	conn.Close()
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
}

// FuzzFrameCheck requires the same verdict however the bytes are cut.
func FuzzFrameCheck(f *testing.F) {
	f.Add([]byte{0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7}, uint8(5))
	f.Add([]byte("\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x03abc\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x07"), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, step uint8) {
		var whole, cut frameCheck
		want := whole.take(data)
		var got error
		for rest := data; len(rest) > 0 && got == nil; {
			n := min(len(rest), int(step)+1)
			got = cut.take(rest[:n])
			rest = rest[n:]
		}
		if (got == nil) != (want == nil) {
			t.Errorf("whole: %v; in pieces of %d: %v", want, int(step)+1, got)
		}
	})
}
