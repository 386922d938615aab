package usernet

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// exchangeBytes sends bytes to an echo and requires the same back, with the end
// of one direction known at the other.
func exchangeBytes(t testing.TB, c net.Conn, size int) {
	t.Helper()
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(6 * promptly))
	sum, stream := sha256.New(), rand.NewChaCha8([32]byte{byte(size)})
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.MultiWriter(c, sum), io.LimitReader(stream, int64(size)))
		if err == nil {
			err = c.(interface{ CloseWrite() error }).CloseWrite()
		}
		sent <- err
	}()
	got := sha256.New()
	n, err := io.Copy(got, c)
	if werr := <-sent; werr != nil {
		t.Errorf("sending %d bytes: %v", size, werr)
	}
	if err != nil || n != int64(size) || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
		t.Errorf("%d of %d bytes came back, %v; equal: %v", n, size, err, bytes.Equal(got.Sum(nil), sum.Sum(nil)))
	}
}

// leakCheck requires that what the test started has ended.
func leakCheck(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		var now int
		for began := time.Now(); time.Since(began) < promptly; time.Sleep(10 * time.Millisecond) {
			if now = runtime.NumGoroutine(); now <= before {
				return
			}
		}
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before\n%s", now, before, buf[:runtime.Stack(buf, true)])
	})
}

func TestOutbound(t *testing.T) {
	w := newWorld(t)
	for _, a := range []string{inet4, inet6} {
		w.wan.serveEcho(t, net.JoinHostPort(a, "80"))
		w.wan.serveUDP(t, net.JoinHostPort(a, "5000"))
	}
	leakCheck(t)
	n := newNetwork(t, "one", 0, "")
	g := newGuest(t, n)
	for _, a := range []string{inet4, inet6} {
		for _, size := range []int{0, 1, 1 << 10, 32 << 20} {
			exchangeBytes(t, g.mustDial(net.JoinHostPort(a, "80")), size)
		}
		for _, size := range []int{1, 1400, 9000, 65000} {
			text := strings.Repeat("x", size)
			if got, err := g.askUDP(net.JoinHostPort(a, "5000"), text, promptly); err != nil || got != "re: "+text {
				t.Errorf("%s: a datagram of %d bytes: %d came back, %v", a, size, len(got), err)
			}
		}
		if err := g.ping(a, promptly); err != nil {
			t.Errorf("ping %s: %v", a, err)
		}
		// A port where nobody is: refused at once, as the real one is.
		if _, err := g.dial(net.JoinHostPort(a, "81")); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: a closed port: %v", a, err)
		}
	}
	for _, a := range []string{g.addr.Gateway4.String(), g.addr.Gateway6.String()} {
		if err := g.ping(a, promptly); err != nil {
			t.Errorf("ping gateway %s: %v", a, err)
		}
	}
	if log := n.Log(); len(log) > 0 {
		t.Errorf("denied: %+v", log)
	}
}

// The end of one direction leaves the other open, both ways.
func TestHalfClose(t *testing.T) {
	w := newWorld(t)
	heard := make(chan string, 1)
	w.wan.serve(t, net.JoinHostPort(inet4, "80"), func(c *net.TCPConn) {
		_, _ = c.Write([]byte("first"))
		_ = c.CloseWrite()
		all, _ := io.ReadAll(c)
		heard <- string(all)
	})
	g := newGuest(t, newNetwork(t, "one", 0, ""))
	c := g.mustDial(net.JoinHostPort(inet4, "80"))
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(promptly))
	if all, err := io.ReadAll(c); err != nil || string(all) != "first" {
		t.Fatalf("read %q, %v", all, err)
	}
	if _, err := c.Write([]byte("after the end")); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if got := <-heard; got != "after the end" {
		t.Errorf("the server heard %q", got)
	}
}

// A reset passes through as a reset, and not as an end.
func TestReset(t *testing.T) {
	w := newWorld(t)
	w.wan.serve(t, net.JoinHostPort(inet4, "80"), func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	g := newGuest(t, newNetwork(t, "one", 0, ""))
	c := g.mustDial(net.JoinHostPort(inet4, "80"))
	defer c.Close()
	_, _ = c.Write([]byte("x"))
	_ = c.SetDeadline(time.Now().Add(promptly))
	if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("read after a reset: %v", err)
	}
}

func TestThousandsOfConnections(t *testing.T) {
	w := newWorld(t)
	w.wan.serveEcho(t, net.JoinHostPort(inet4, "80"))
	n := newNetwork(t, "one", 0, "")
	g := newGuest(t, n)
	const open, rounds = 1000, 3
	for range rounds {
		var group sync.WaitGroup
		limit := make(chan struct{}, 100)
		conns := make([]net.Conn, open)
		for i := range open {
			limit <- struct{}{}
			group.Go(func() {
				defer func() { <-limit }()
				c, err := g.dial(net.JoinHostPort(inet4, "80"))
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				conns[i] = c
			})
		}
		group.Wait()
		if t.Failed() {
			return
		}
		if got := n.Stats().Flows; got != open {
			t.Errorf("%d flows, want %d", got, open)
		}
		for i, c := range conns {
			text := fmt.Sprint("number ", i)
			_ = c.SetDeadline(time.Now().Add(promptly))
			if _, err := c.Write([]byte(text)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 64)
			if got, err := c.Read(buf); err != nil || string(buf[:got]) != text {
				t.Fatalf("connection %d: %q, %v", i, buf[:got], err)
			}
			c.Close()
		}
		for began := time.Now(); n.Stats().Flows > 0; time.Sleep(10 * time.Millisecond) {
			if time.Since(began) > promptly {
				t.Fatalf("%d flows stay", n.Stats().Flows)
			}
		}
	}
	if used := n.current().budget.used; used != 0 {
		t.Errorf("%d bytes of the budget stay taken", used)
	}
}

// A guest that starts again finds none of its flows, and the same policy.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	ended := make(chan error, 1)
	w.wan.serve(t, net.JoinHostPort(inet4, "80"), func(c *net.TCPConn) {
		_, err := c.Read(make([]byte, 1))
		ended <- err
	})
	w.lan.serveEcho(t, net.JoinHostPort(lanPeer4, "80"))
	leakCheck(t)
	n := newNetwork(t, "one", 0, "")
	for i := range 3 {
		g := newGuest(t, n)
		g.mustDial(net.JoinHostPort(inet4, "80"))
		if _, err := g.dial(net.JoinHostPort(lanPeer4, "80")); err == nil {
			t.Error("the LAN answers")
		}
		if ours, _ := socketPair(t); i == 0 && n.Attach(ours) == nil {
			t.Error("two VMMs at once")
		}
		g.conn.Close()
		select {
		case err := <-ended:
			if err == nil {
				t.Error("bytes came")
			}
		case <-time.After(promptly):
			t.Fatal("a flow outlives its guest")
		}
		// The next one comes at once, as when a guest reboots.
	}
	if w.seen.sent(netipAddr(lanPeer4)) > 0 {
		t.Error("packets reached the LAN")
	}
}

func netipAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

// TestSegmentBytes writes to the guest as much as a packet can hold, which
// becomes one, and a byte more, which becomes two.
func TestSegmentBytes(t *testing.T) {
	for _, mtu := range []int{1500, DefaultMTU} {
		n := newNetwork(t, "one", 0, "", func(c *Config) { c.MTU = mtu })
		g := newGuest(t, n)
		got := make(chan int, 1000)
		g.serve(7, func(c net.Conn) {
			buf := make([]byte, 2*DefaultMTU)
			for {
				m, err := c.Read(buf)
				if err != nil {
					return
				}
				got <- m
			}
		})
		for _, way := range []struct{ from, to netip.Addr }{
			{g.addr.Gateway4, g.addr.IPv4.Addr()}, {g.addr.Gateway6, g.addr.IPv6.Addr()},
		} {
			c, err := dialStack(t.Context(), n.current().stack, way.from, netip.AddrPortFrom(way.to, 7))
			if err != nil {
				t.Fatal(err)
			}
			most := c.segmentBytes(mtu)
			write := func(size int) {
				if _, err := c.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				for left := size; left > 0; {
					left -= <-got
				}
			}
			write(256 << 10) // the guest's window opens
			for _, row := range []struct {
				bytes   int
				packets uint64
			}{{1, 1}, {most, 1}, {most + 1, 2}, {2 * most, 2}} {
				// The guest's window may split one write; not all of them.
				least := ^uint64(0)
				for range 5 {
					n.current().acks.flush()
					before := n.Stats().Sent
					write(row.bytes)
					least = min(least, n.Stats().Sent-before)
				}
				if least != row.packets {
					t.Errorf("MTU %d, to %s: %d bytes went in %d packets, want %d", mtu, way.to, row.bytes, least, row.packets)
				}
			}
			c.Close()
		}
	}
}
