package usernet

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// 200 sequences of hostile frames, after which this guest's port still serves,
// and another VM noticed nothing.
func TestHostileFrames(t *testing.T) {
	w := newWorld(t)
	w.wan.serveEcho(t, net.JoinHostPort(inet4, "80"))
	leakCheck(t)
	bad, good := newNetwork(t, "bad", 0, "none,group:lab"), newNetwork(t, "good", 1, "public,group:lab")
	g, other := newGuest(t, bad), newGuest(t, good)
	if err := join(t, bad, good); err != nil {
		t.Fatal(err)
	}
	r := seeded(t)
	attacks := []func(){
		func() { g.send(randomBytes(r, r.IntN(ethernetBytes))) },                   // runts
		func() { g.send(randomBytes(r, bad.link.maxFrameBytes()+1+r.IntN(1000))) }, // giants
		func() { g.send(randomBytes(r, r.IntN(2000))) },                            // noise
		func() { g.send(nil) }, // nothing
		func() { f := randomBytes(r, 60); copy(f[6:], g.addr.MAC[:]); g.send(f) },                    // noise from the right MAC
		func() { g.send(arpRequest(bad.link, MAC{2, 9}, g.addr.IPv4.Addr(), g.addr.Gateway4)) },      // ARP as another
		func() { g.send(arpRequest(bad.link, g.addr.MAC, g.addr.Gateway4, g.addr.Gateway4)) },        // ARP as the gateway
		func() { g.send(arpRequest(bad.link, g.addr.MAC, other.addr.IPv4.Addr(), g.addr.Gateway4)) }, // ARP as another VM
		func() { g.send(dhcpFrame(bad.link, byte(r.IntN(256)), nil)) },                               // DHCP of every kind
		func() {
			g.send(dhcpFrame(bad.link, dhcpRequest, func(b []byte) []byte { return append(b, randomBytes(r, 100)...) }))
		},
		func() { g.send(solicitation(bad.link, g.addr.Gateway6, g.addr.Gateway6, 255)) },
		func() { // a packet whose header is broken in one place
			p := udpPacket(g.addr.IPv4.Addr(), netip.MustParseAddr(inet4), 20)
			p[r.IntN(len(p))] ^= byte(1 + r.IntN(255))
			g.send(frameTo(gatewayMAC, g.addr.MAC, etherIPv4, p))
		},
		func() { // as another VM, to it
			g.send(frameTo(gatewayMAC, g.addr.MAC, etherIPv4, udpPacket(other.addr.IPv4.Addr(), other.addr.Gateway4, 20)))
		},
		func() { // fragments that never end
			p := ipPacket(g.addr.IPv6.Addr(), g.addr.Gateway6, protoFragment, 64, append([]byte{protoUDP, 0, byte(r.IntN(256)), byte(r.IntN(256))&^7 | 1, byte(r.IntN(256)), 0, 0, 0}, make([]byte, 64)...))
			g.send(frameTo(gatewayMAC, g.addr.MAC, etherIPv6, p))
		},
		func() { p := g.rawIP(); p.port = uint16(r.IntN(60000)); p.syn(g.addr.Gateway4, 53) }, // SYNs that lead nowhere
		func() { p := g.rawIP(); p.datagram(g.addr.Gateway4, 53, string(randomBytes(r, 40))) },
		func() { g.rawIP().echo(other.addr.IPv6.Addr()) },
	}
	for sequence := range 200 {
		for range 1 + r.IntN(20) {
			attacks[r.IntN(len(attacks))]()
		}
		if sequence%20 == 0 {
			if err := g.ping(g.addr.Gateway4.String(), promptly); err != nil {
				t.Fatalf("after sequence %d the gateway is silent: %v", sequence, err)
			}
			exchangeBytes(t, other.mustDial(net.JoinHostPort(inet4, "80")), 64<<10)
		}
	}
	exchangeBytes(t, other.mustDial(net.JoinHostPort(inet4, "80")), 4<<20)
	for what, n := range good.Stats().Dropped {
		t.Errorf("the other VM lost %d frames: %s", n, what)
	}
	if len(good.Log()) > 0 {
		t.Errorf("the other VM's log: %+v", good.Log())
	}
	for _, what := range []string{"runt", "giant", "source-mac", "arp", "dhcp", "spoofed-source", "malformed"} {
		if bad.Stats().Dropped[what] == 0 {
			t.Errorf("no frame was dropped as %s: %v", what, bad.Stats().Dropped)
		}
	}
	if s := w.seen.strangers(inet4, wanHost4); len(s) > 0 {
		t.Errorf("packets went to %v", s)
	}
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	fill(b, r)
	return b
}

// A VMM that sends no frames loses its port, and nothing else happens.
func TestBadVMM(t *testing.T) {
	needNamespace(t)
	leakCheck(t)
	n := newNetwork(t, "one", 0, "")
	for name, row := range map[string]struct {
		bytes []byte
		ends  bool // the VMM goes then
	}{
		"an impossible length":      {[]byte{0xff, 0xff, 0xff, 0xff}, false},
		"one past the longest":      {append(binary.BigEndian.AppendUint32(nil, maxClaimBytes+1), make([]byte, maxClaimBytes+1)...), false},
		"half a length":             {[]byte{0, 0}, true},
		"a frame that does not end": {[]byte{0, 0, 0, 60, 1, 2, 3}, true},
	} {
		ours, theirs := socketPair(t)
		if err := n.Attach(ours); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_, _ = theirs.Write(row.bytes)
		if row.ends {
			_ = theirs.(*net.UnixConn).CloseWrite()
		}
		_ = theirs.SetReadDeadline(time.Now().Add(promptly))
		if _, err := theirs.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: the port stays: %v", name, err)
		}
		theirs.Close()
		for began := time.Now(); n.Attached(); time.Sleep(time.Millisecond) {
			if time.Since(began) > promptly {
				t.Fatalf("%s: still attached", name)
			}
		}
	}
	g := newGuest(t, n) // and the next one is served
	if err := g.ping(g.addr.Gateway4.String(), promptly); err != nil {
		t.Error(err)
	}
}

// A connection that the guest begins and never completes ends with it.
func TestHalfOpen(t *testing.T) {
	w := newWorld(t)
	w.wan.serveEcho(t, net.JoinHostPort(inet4, "80"))
	n := newNetwork(t, "one", 0, "")
	ours, theirs := socketPair(t)
	if err := n.Attach(ours); err != nil {
		t.Fatal(err)
	}
	// No stack is at this end that could answer with a reset.
	(&guest{t: t, n: n, conn: theirs, addr: n.link.addr}).rawIP().syn(netip.MustParseAddr(inet4), 80)
	_ = theirs.SetReadDeadline(time.Now().Add(promptly))
	if _, err := theirs.Read(make([]byte, 100)); err != nil {
		t.Fatalf("no answer to a SYN: %v", err)
	}
	theirs.Close()
	for began := time.Now(); n.Attached(); time.Sleep(time.Millisecond) {
		if time.Since(began) > promptly {
			t.Fatal("the port stays")
		}
	}
}

// A guest that takes nothing, however much is sent to it, costs a bounded
// amount of memory and stalls nobody.
func TestStuckGuest(t *testing.T) {
	w := newWorld(t)
	w.wan.serve(t, net.JoinHostPort(inet4, "80"), func(c *net.TCPConn) {
		for block := make([]byte, 64<<10); ; {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	})
	w.wan.serveEcho(t, net.JoinHostPort(inet4, "81"))
	stuck, good := newNetwork(t, "stuck", 0, "public,group:lab"), newNetwork(t, "good", 1, "public,group:lab")
	if err := join(t, stuck, good); err != nil {
		t.Fatal(err)
	}
	g, other := newGuest(t, stuck), newGuest(t, good)
	// The guest's own buffers are not what is measured.
	small := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcp.MinBufferSize, Max: tcp.MinBufferSize}
	if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &small); err != nil {
		t.Fatal(err)
	}
	before := heapBytes()
	var conns []net.Conn
	for range 200 {
		conns = append(conns, g.mustDial(net.JoinHostPort(inet4, "80")))
	}
	g.rawMu.Lock() // from here on the guest reads no frame
	defer g.rawMu.Unlock()
	flooded := make(chan struct{})
	go func() { // the other VM sends what it can
		defer close(flooded)
		p := udpPacket(other.addr.IPv4.Addr(), g.addr.IPv4.Addr(), 30000)
		for range 2000 {
			other.send(frameTo(gatewayMAC, other.addr.MAC, etherIPv4, p))
		}
	}()
	<-flooded
	exchangeBytes(t, other.mustDial(net.JoinHostPort(inet4, "81")), 4<<20)
	const limit = 128 << 20
	if used := heapBytes() - before; used > limit {
		t.Errorf("%d MiB in use, the limit is %d", used>>20, limit>>20)
	} else {
		t.Logf("%d MiB in use for 200 flows into a stuck guest", used>>20)
	}
	if s := stuck.Stats().Dropped; s["queue-full"] == 0 {
		t.Errorf("nothing was dropped: %v", s)
	}
	for _, c := range conns {
		_ = c
	}
}

func heapBytes() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse)
}

// A flood of new flows is bounded: old datagram flows give way, connections
// past the limit are refused.
func TestFloods(t *testing.T) {
	w := newWorld(t)
	w.wan.serveUDP(t, net.JoinHostPort(inet4, "80"))
	w.wan.serveEcho(t, net.JoinHostPort(inet4, "80"))
	n := newNetwork(t, "one", 0, "")
	g := newGuest(t, n)
	k := g.rawIP()
	for range 3 * maxUDPFlows {
		k.datagram(netip.MustParseAddr(inet4), 80, "x")
	}
	for range 3 * maxPings {
		k.echo(netip.MustParseAddr(inet4)) // one identifier: one socket
	}
	for i := range 3 * maxPings {
		b := make([]byte, 16)
		b[0] = icmpEcho
		binary.BigEndian.PutUint16(b[4:], uint16(i))
		k.send(netip.MustParseAddr(inet4), protoICMP, b, 2)
	}
	k.settle(t)
	p := n.current()
	p.udpMu.Lock()
	flows := len(p.udp)
	p.udpMu.Unlock()
	p.pingMu.Lock()
	pings := len(p.pings)
	p.pingMu.Unlock()
	if flows != maxUDPFlows || pings != maxPings {
		t.Errorf("%d datagram flows and %d pings, the limits are %d and %d", flows, pings, maxUDPFlows, maxPings)
	}
	if n.Stats().Refused == 0 {
		t.Error("nothing was refused")
	}
	exchangeBytes(t, g.mustDial(net.JoinHostPort(inet4, "80")), 1<<20)
}

func TestBudget(t *testing.T) {
	r := seeded(t)
	var b budget
	var shares []int
	sum := 0
	for range 20000 {
		if r.IntN(3) > 0 && len(shares) < maxTCPFlows {
			s := b.take()
			if s < minShareBytes || s > maxShareBytes {
				t.Fatalf("a share of %d", s)
			}
			shares, sum = append(shares, s), sum+s
		} else if len(shares) > 0 {
			i := r.IntN(len(shares))
			b.give(shares[i])
			sum -= shares[i]
			shares = slices.Delete(shares, i, i+1)
		}
		if sum > budgetBytes+len(shares)*minShareBytes {
			t.Fatalf("%d flows have %d bytes", len(shares), sum)
		}
	}
	if first := (&budget{}).take(); first != maxShareBytes {
		t.Errorf("the first flow gets %d", first)
	}
}

func TestDenialLog(t *testing.T) {
	l := newDenialLog(nil)
	at := func(i int) time.Time { return time.Unix(int64(i), 0) }
	for i := range 3 * maxDenials {
		l.add(at(i), Denial{Proto: "tcp", Reason: fmt.Sprint(i)})
		l.add(at(i+1), Denial{Proto: "tcp", Reason: fmt.Sprint(i)})
	}
	all := l.all()
	if len(all) != maxDenials || len(l.at) != maxDenials {
		t.Fatalf("%d entries, %d keys", len(all), len(l.at))
	}
	for i, d := range all {
		if want := fmt.Sprint(2*maxDenials + i); d.Reason != want || d.Count != 2 || d.Last.Sub(d.First) != time.Second {
			t.Fatalf("entry %d: %+v", i, d)
		}
	}
	select {
	case <-l.changed:
	default:
		t.Error("nobody is told")
	}
	// It goes on where an earlier one ended.
	next := newDenialLog(append([]Denial{{Reason: "gives way"}}, all...))
	if got := next.all(); !reflect.DeepEqual(got, all) {
		t.Errorf("%d entries, %d before; the first is %+v", len(got), len(all), got[0])
	}
	next.add(at(5000), all[0])
	if got := next.all(); len(got) != maxDenials || got[0].Count != 3 || got[0].First != all[0].First || got[0].Last != at(5000) {
		t.Errorf("the first is %+v, before %+v", got[0], all[0])
	}
}
