package usernet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger"
)

func TestParseForward(t *testing.T) {
	for text, want := range map[string]string{
		"8080:80":              "tcp 127.0.0.1:8080 80",
		"8080:80/tcp":          "tcp 127.0.0.1:8080 80",
		"53:53/udp":            "udp 127.0.0.1:53 53",
		"0:80":                 "tcp 127.0.0.1:0 80",
		"65535:65535":          "tcp 127.0.0.1:65535 65535",
		"0.0.0.0:8080:80":      "tcp 0.0.0.0:8080 80",
		"[::1]:8080:80/udp":    "udp [::1]:8080 80",
		"[::ffff:1.2.3.4]:1:2": "tcp 1.2.3.4:1 2",
	} {
		f, err := ParseForward(text)
		if got := fmt.Sprint(f.Proto, " ", f.Host, " ", f.Guest); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
	for _, text := range []string{"", "80", ":80", "80:", "80:0", "65536:80", "80:65536", "-1:80", "08:80", "80:80/sctp", "80:80/",
		"::1:80:80", "[::1:80:80", "localhost:80:80", "[fe80::1%lo]:80:80", "1.2.3:80:80", "80:80:80:80", " 80:80"} {
		if f, err := ParseForward(text); banger.CodeOf(err) != banger.CodeUsage {
			t.Errorf("%q became %v, %v", text, f, err)
		}
	}
}

func FuzzParseForward(f *testing.F) {
	f.Add("[::1]:1:2/udp")
	f.Fuzz(func(t *testing.T, text string) {
		if a, err := ParseForward(text); err == nil {
			if b, err := ParseForward(a.String()); err != nil || a != b {
				t.Fatalf("%q is %q, and that %v, %v", text, a, b, err)
			}
		}
	})
}

func mustForward(t testing.TB, n *Network, text string) Forward {
	t.Helper()
	f, err := ParseForward(text)
	if err != nil {
		t.Fatal(err)
	}
	if f, err = n.Forward(f); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestForward(t *testing.T) {
	needNamespace(t)
	leakCheck(t)
	n := newNetwork(t, "one", 0, "none")
	early := mustForward(t, n, "0:80") // before there is a guest
	if c, err := net.Dial("tcp", early.Host.String()); err == nil {
		_ = c.SetDeadline(time.Now().Add(promptly))
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("without a guest: %v", err)
		}
		c.Close()
	}
	g := newGuest(t, n)
	g.serve(80, func(c net.Conn) { _, _ = io.Copy(c, c); _ = c.(interface{ CloseWrite() error }).CloseWrite() })
	g.serveUDP(5353)
	forwards := []Forward{early, mustForward(t, n, "[::1]:0:80"), mustForward(t, n, "0.0.0.0:0:80")}
	for _, f := range forwards {
		c, err := net.Dial("tcp", f.Host.String())
		if err != nil {
			t.Fatal(err)
		}
		exchangeBytes(t, c, 4<<20)
	}
	for _, text := range []string{"0:5353/udp", "[::1]:0:5353/udp"} {
		f := mustForward(t, n, text)
		for _, sender := range []string{"a", "b"} {
			c, err := net.Dial("udp", f.Host.String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(promptly))
			for range 2 {
				if _, err := c.Write([]byte(sender)); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 100)
				if got, err := c.Read(buf); err != nil || string(buf[:got]) != "guest: "+sender {
					t.Errorf("%v: %q, %v", f, buf[:got], err)
				}
			}
		}
	}
	// Nobody listens there: the caller learns it.
	closed := mustForward(t, n, "0:81")
	c, err := net.Dial("tcp", closed.Host.String())
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(promptly))
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a closed port of the guest: %v", err)
	}

	// A connection lives on when its port goes.
	c, err = net.Dial("tcp", early.Host.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(promptly))
	_, _ = c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := n.Unforward(early); err != nil {
		t.Fatal(err)
	}
	if err := n.Unforward(early); banger.CodeOf(err) != banger.CodeNotFound {
		t.Errorf("unforwarded twice: %v", err)
	}
	if _, err := net.Dial("tcp", early.Host.String()); err == nil {
		t.Error("the port is still open")
	}
	_, _ = c.Write([]byte("y"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Errorf("an open connection after Unforward: %v", err)
	}
	if got := len(n.Forwards()); got != 5 {
		t.Errorf("%d forwards, want 5: %v", got, n.Forwards())
	}
}

// Flows that are open do not keep their network from ending.
func TestForwardUDPEnds(t *testing.T) {
	newWorld(t)
	leakCheck(t)
	n := newNetwork(t, "one", 0, "")
	g := newGuest(t, n)
	g.serveUDP(5000)
	f, err := n.Forward(Forward{Proto: "udp", Host: netip.MustParseAddrPort("127.0.0.1:0"), Guest: 5000})
	if err != nil {
		t.Fatal(err)
	}
	for range maxForwardPeers {
		c, err := net.Dial("udp", f.Host.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(promptly))
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	g.conn.Close() // the VMM goes
	done := make(chan struct{})
	go func() { n.Close(); close(done) }()
	select {
	case <-done:
	case <-time.After(promptly):
		t.Fatal("the network does not end")
	}
}

func TestForwardConflicts(t *testing.T) {
	needNamespace(t)
	n := newNetwork(t, "one", 0, "")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for _, f := range []Forward{
		{"tcp", l.Addr().(*net.TCPAddr).AddrPort(), 80},
		{"udp", u.LocalAddr().(*net.UDPAddr).AddrPort(), 80},
	} {
		_, err := n.Forward(f)
		if banger.CodeOf(err) != banger.CodeConflict || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
			t.Errorf("%v: %v does not name this process", f, err)
		}
	}
	f := mustForward(t, n, "0:80")
	f.Guest = 81
	if _, err := n.Forward(f); banger.CodeOf(err) != banger.CodeConflict || !strings.Contains(err.Error(), "this VM") {
		t.Errorf("twice: %v", err)
	}
	if _, err := n.Forward(Forward{"tcp", netip.MustParseAddrPort("192.0.2.77:80"), 80}); banger.CodeOf(err) != banger.CodeUnavailable {
		t.Errorf("an address of somebody else: %v", err)
	}
	for i := 1; i < MaxForwards; i++ {
		mustForward(t, n, "0:80")
	}
	if _, err := n.Forward(Forward{"tcp", netip.MustParseAddrPort("127.0.0.1:0"), 80}); banger.CodeOf(err) != banger.CodeUsage {
		t.Errorf("port %d: %v", MaxForwards+1, err)
	}
	n.Close()
	if _, err := n.Forward(Forward{"tcp", netip.MustParseAddrPort("127.0.0.1:0"), 80}); err == nil {
		t.Error("after Close")
	}
}
