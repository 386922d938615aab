package usernet

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"banger"
)

// tcpPair is two ends of a connection on the loopback.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

func TestJoin(t *testing.T) {
	needNamespace(t)
	leakCheck(t)
	n := newNetwork(t, "one", 0, "none")
	ours, theirs := tcpPair(t)
	if err := n.Join(t.Context(), theirs, 80); banger.CodeOf(err) != banger.CodeUnavailable {
		t.Errorf("without a guest: %v", err)
	}
	wantReset := func(what string, c net.Conn) {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(promptly))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the other end reads %v", what, err)
		}
		c.Close()
	}
	wantReset("without a guest", ours)
	g := newGuest(t, n)
	g.serve(80, func(c net.Conn) { _, _ = io.Copy(c, c); _ = c.(interface{ CloseWrite() error }).CloseWrite() })
	ours, theirs = tcpPair(t)
	if err := n.Join(t.Context(), theirs, 80); err != nil {
		t.Fatal(err)
	}
	exchangeBytes(t, ours, 4<<20)
	ours, theirs = tcpPair(t)
	if err := n.Join(t.Context(), theirs, 79); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a closed port: %v", err)
	}
	wantReset("a closed port", ours)
	ours, theirs = tcpPair(t)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Join(gone, theirs, 80); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody wants it any more: %v", err)
	}
	wantReset("nobody wants it any more", ours)
	ours, theirs = tcpPair(t)
	if err := n.Join(t.Context(), theirs, 80); err != nil {
		t.Fatal(err)
	}
	n.Close()
	wantReset("the network ends", ours)
	if got := n.inbound.Load(); got != 0 {
		t.Errorf("%d connections are counted that have ended", got)
	}
}
