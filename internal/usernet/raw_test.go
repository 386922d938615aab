package usernet

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// A rawIP sends packets that no stack would: to and from whatever addresses.
type rawIP struct {
	g          *guest
	src4, src6 netip.Addr
	port       uint16
}

func (g *guest) rawIP() *rawIP {
	return &rawIP{g: g, src4: g.addr.IPv4.Addr(), src6: g.addr.IPv6.Addr(), port: 40000}
}

// send wraps a payload that begins with ports or an ICMP header and has its
// checksum at the given place.
func (r *rawIP) send(dst netip.Addr, proto byte, payload []byte, sumAt int) {
	src := r.src4
	kind := uint16(etherIPv4)
	if dst.Is6() { // a mapped one too: it goes as it stands
		src, kind = r.src6, etherIPv6
	}
	payload[sumAt], payload[sumAt+1] = 0, 0
	if proto == protoICMP {
		binary.BigEndian.PutUint16(payload[sumAt:], checksum(payload))
	} else {
		binary.BigEndian.PutUint16(payload[sumAt:], checksum(pseudo(src, dst, proto, len(payload)), payload))
	}
	r.g.send(frameTo(gatewayMAC, r.g.addr.MAC, kind, ipPacket(src, dst, proto, defaultTTL, payload)))
}

func (r *rawIP) ports(dst uint16, size int) []byte {
	r.port++
	b := make([]byte, size)
	binary.BigEndian.PutUint16(b, r.port)
	binary.BigEndian.PutUint16(b[2:], dst)
	return b
}

func (r *rawIP) syn(dst netip.Addr, port uint16) {
	b := r.ports(port, 20)
	b[12], b[13] = 5<<4, 2 // no options; SYN
	binary.BigEndian.PutUint16(b[14:], 65535)
	r.send(dst, protoTCP, b, 16)
}

func (r *rawIP) datagram(dst netip.Addr, port uint16, text string) {
	b := append(r.ports(port, udpBytes), text...)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	r.send(dst, protoUDP, b, 6)
}

func (r *rawIP) echo(dst netip.Addr) {
	b := make([]byte, 16)
	proto := byte(protoICMP)
	if b[0] = icmpEcho; dst.Is6() {
		b[0], proto = icmp6Echo, protoICMPv6
	}
	r.send(dst, proto, b, 2)
}

// settle waits until all that was sent has been dealt with: frames are handled
// in order, and the gateway answers a ping after them.
func (r *rawIP) settle(t testing.TB) {
	t.Helper()
	if err := r.g.ping(r.g.addr.Gateway4.String(), promptly); err != nil {
		t.Fatalf("the gateway: %v", err)
	}
	time.Sleep(20 * time.Millisecond) // connections are dialled in goroutines of their own
}

// lookupAll returns the addresses of a name.
func (g *guest) lookupAll(name string) (out []netip.Addr) {
	g.t.Helper()
	for _, kind := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
		m, err := g.lookup(name, kind)
		if err != nil {
			g.t.Fatalf("%s: %v", name, err)
		}
		for _, r := range m.Answers {
			switch b := r.Body.(type) {
			case *dnsmessage.AResource:
				out = append(out, netip.AddrFrom4(b.A))
			case *dnsmessage.AAAAResource:
				out = append(out, netip.AddrFrom16(b.AAAA))
			}
		}
	}
	return out
}

func (g *guest) mustLookup(name string) []netip.Addr {
	g.t.Helper()
	out := g.lookupAll(name)
	if len(out) == 0 {
		g.t.Fatalf("%s has no address", name)
	}
	return out
}
