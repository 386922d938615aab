package usernet

import (
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// join connects two networks as their supervisors do.
func join(t testing.TB, a, b *Network) error {
	t.Helper()
	left, right := socketPair(t)
	other := make(chan error, 1)
	go func() { other <- b.Peer(right) }()
	err := a.Peer(left)
	if berr := <-other; err == nil {
		err = berr
	}
	return err
}

func TestPeers(t *testing.T) {
	w := newWorld(t)
	leakCheck(t)
	one, two := newNetwork(t, "one", 0, "none,group:lab"), newNetwork(t, "two", 1, "public,group:x,group:lab")
	alone := newNetwork(t, "alone", 2, "public")
	g1, g2, g3 := newGuest(t, one), newGuest(t, two), newGuest(t, alone)
	for _, g := range []*guest{g1, g2, g3} {
		g.serve(80, func(c net.Conn) { _, _ = io.Copy(c, c); _ = c.(interface{ CloseWrite() error }).CloseWrite() })
		g.serveUDP(53)
	}
	if err := g1.ping(g2.addr.IPv4.Addr().String(), time.Second/2); err == nil {
		t.Error("a ping before they know each other")
	}
	if err := join(t, one, two); err != nil {
		t.Fatal(err)
	}
	if got := one.Peers(); !slices.Equal(got, []string{"two"}) {
		t.Errorf("peers %v", got)
	}
	for _, way := range []struct {
		from *guest
		to   string
	}{{g1, "two.banger"}, {g2, "one.banger"}} {
		for _, a := range way.from.mustLookup(way.to) {
			if err := way.from.ping(a.String(), promptly); err != nil {
				t.Errorf("ping %s (%v): %v", way.to, a, err)
			}
			exchangeBytes(t, way.from.mustDial(netip.AddrPortFrom(a, 80).String()), 8<<20)
			if got, err := way.from.askUDP(netip.AddrPortFrom(a, 53).String(), "hi", promptly); err != nil || got != "guest: hi" {
				t.Errorf("datagram to %s: %q, %v", way.to, got, err)
			}
			// Where nobody listens, the other VM itself says so.
			if _, err := way.from.dial(netip.AddrPortFrom(a, 81).String()); err == nil || !strings.Contains(err.Error(), "refused") {
				t.Errorf("a closed port of %s: %v", way.to, err)
			}
		}
	}
	// Who shares no group is no peer, and is not found.
	for _, n := range []*Network{one, two} {
		if err := join(t, n, alone); err == nil {
			t.Errorf("%s and alone are joined", n.name)
		}
	}
	if got := g3.lookupAll("one.banger"); got != nil {
		t.Errorf("alone finds one at %v", got)
	}
	g3.rawIP().syn(g1.addr.IPv4.Addr(), 80)
	g3.rawIP().settle(t)
	if !slices.ContainsFunc(alone.Log(), func(d Denial) bool { return strings.Contains(d.Flag, "group:NAME") }) {
		t.Errorf("the log: %+v", alone.Log())
	}
	if err := join(t, one, two); err == nil {
		t.Error("joined twice")
	}
	two.Unpeer("one")
	for began := time.Now(); len(one.Peers())+len(two.Peers()) > 0; time.Sleep(time.Millisecond) {
		if time.Since(began) > promptly {
			t.Fatalf("peers stay: %v %v", one.Peers(), two.Peers())
		}
	}
	if got := g1.lookupAll("two.banger"); got != nil {
		t.Errorf("two is still found: %v", got)
	}
	if err := join(t, one, two); err != nil {
		t.Errorf("again: %v", err)
	}
	if s := w.seen.strangers(); len(s) > 0 {
		t.Errorf("packets left the host for %v", s)
	}
}

// A supervisor that lies gets nothing through to the guest but from itself.
func TestPeerLies(t *testing.T) {
	needNamespace(t)
	n := newNetwork(t, "one", 0, "none,group:lab")
	g := newGuest(t, n)
	mine, _ := AddressesOf(0)
	theirs, _ := AddressesOf(1)
	third, _ := AddressesOf(2)
	good := peerHello{peerVersion, "two", theirs.IPv4.Addr(), theirs.IPv6.Addr(), []string{"lab"}}
	greet := func(text []byte) (net.Conn, error) {
		ours, other := socketPair(t)
		result := make(chan error, 1)
		go func() { result <- n.Peer(ours) }()
		_, _ = other.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
		return other, <-result
	}
	for name, change := range map[string]func(*peerHello){
		"another version":     func(h *peerHello) { h.Version++ },
		"no name":             func(h *peerHello) { h.Name = "" },
		"this VM's name":      func(h *peerHello) { h.Name = "one" },
		"the host's name":     func(h *peerHello) { h.Name = "host" },
		"a name with escapes": func(h *peerHello) { h.Name = "\x1b[2J" },
		"a public address":    func(h *peerHello) { h.IPv4 = netip.MustParseAddr(inet4) },
		"no address":          func(h *peerHello) { h.IPv6 = netip.Addr{} },
		"this VM's address":   func(h *peerHello) { h.IPv4 = mine.IPv4.Addr() },
		"the gateway's":       func(h *peerHello) { h.IPv6 = mine.Gateway6 },
		"no group":            func(h *peerHello) { h.Groups = nil },
		"another group":       func(h *peerHello) { h.Groups = []string{"other"} },
	} {
		h := good
		change(&h)
		text, _ := json.Marshal(h)
		if c, err := greet(text); err == nil {
			t.Errorf("%s is taken", name)
			c.Close()
		}
	}
	for name, text := range map[string][]byte{"no JSON": []byte("hello"), "too long": make([]byte, maxHelloBytes+1), "empty": {}} {
		if _, err := greet(text); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	text, _ := json.Marshal(good)
	c, err := greet(text)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go io.Copy(io.Discard, c)
	frames := g.listen()
	send := func(ip []byte) {
		_, _ = c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(ip))), ip...))
	}
	to4, to6 := mine.IPv4.Addr(), mine.IPv6.Addr()
	na := func() []byte {
		proto, m := icmpMessage(theirs.IPv6.Addr(), to6, append([]byte{icmp6Advertise}, make([]byte, 31)...))
		return ipPacket(theirs.IPv6.Addr(), to6, proto, 255, m)
	}
	lies := map[string][]byte{
		"nothing":              {},
		"as a third":           udpPacket(third.IPv4.Addr(), to4, 4),
		"as the gateway":       udpPacket(mine.Gateway4, to4, 4),
		"as this VM":           udpPacket(to4, to4, 4),
		"as the Internet":      udpPacket(netip.MustParseAddr(inet6), to6, 4),
		"to a third":           udpPacket(theirs.IPv4.Addr(), third.IPv4.Addr(), 4),
		"to the gateway":       udpPacket(theirs.IPv4.Addr(), mine.Gateway4, 4),
		"to all":               udpPacket(theirs.IPv4.Addr(), netip.MustParseAddr("255.255.255.255"), 4),
		"longer than it says":  append(udpPacket(theirs.IPv4.Addr(), to4, 4), 0),
		"shorter than it says": udpPacket(theirs.IPv4.Addr(), to4, 4)[:30],
		"of no version":        []byte("hello"),
		"neighbour discovery":  na(),
	}
	for _, ip := range lies {
		send(ip)
	}
	send(udpPacket(theirs.IPv4.Addr(), to4, 99)) // and one that is honest
	for {
		select {
		case f := <-frames:
			p, d := parseIPv4(f[ethernetBytes:])
			if d != dropNone || p.src != theirs.IPv4.Addr() || len(p.payload) != udpBytes+99 {
				t.Fatalf("the guest got % x", f)
			}
		case <-time.After(promptly):
			t.Fatal("the honest packet does not come")
		}
		break
	}
	if s := n.Stats().Dropped; s["peer-source"] < 7 || s["ndp"] != 1 {
		t.Errorf("dropped %v", s)
	}
	// A length that cannot be ends it.
	_, _ = c.Write([]byte{0xff, 0xff, 0xff, 0xff})
	for began := time.Now(); len(n.Peers()) > 0; time.Sleep(time.Millisecond) {
		if time.Since(began) > promptly {
			t.Fatal("the peer stays")
		}
	}
}

// A TTL runs out, and the checksum of what goes on is right.
func TestHop(t *testing.T) {
	a, b := netip.MustParseAddr("10.87.0.2"), netip.MustParseAddr("10.87.0.6")
	for ttl := range 256 {
		p := ipPacket(a, b, protoUDP, byte(ttl), make([]byte, 8))
		ok := hop(p)
		if ok != (ttl > 1) {
			t.Errorf("TTL %d: %v", ttl, ok)
		}
		if q, d := parseIPv4(p); ok && (d != dropNone || int(q.ttl) != ttl-1) {
			t.Errorf("TTL %d became %d, %v", ttl, q.ttl, d)
		}
	}
}
