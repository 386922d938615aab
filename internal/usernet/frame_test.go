package usernet

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
)

func testLink(t testing.TB) *link {
	t.Helper()
	a, err := AddressesOf(3)
	if err != nil {
		t.Fatal(err)
	}
	return &link{addr: a, local: gatewayLinkLocal, mtu: 1500, dhcp: dhcpOptions{hostname: "three", domain: Domain}}
}

func frameTo(dst, src MAC, kind uint16, body []byte) []byte {
	b := append(append([]byte(nil), dst[:]...), src[:]...)
	return append(binary.BigEndian.AppendUint16(b, kind), body...)
}

// arpRequest asks who has an address.
func arpRequest(l *link, sender MAC, from, target netip.Addr) []byte {
	b := binary.BigEndian.AppendUint64(nil, 1<<48|etherIPv4<<32|6<<24|4<<16|1)
	b = append(append(b, sender[:]...), from.AsSlice()...)
	b = append(append(b, make([]byte, 6)...), target.AsSlice()...)
	return frameTo(broadcastMAC, l.addr.MAC, etherARP, b)
}

func solicitation(l *link, from, target netip.Addr, ttl byte) []byte {
	m := append([]byte{icmp6Solicit, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
	m = append(append(m, 1, 1), l.addr.MAC[:]...)
	to := netip.MustParseAddr("ff02::1:ff00:1")
	proto, m := icmpMessage(from, to, m)
	return frameTo(MAC{0x33, 0x33, 0xff, 0, 0, 1}, l.addr.MAC, etherIPv6, ipPacket(from, to, proto, ttl, m))
}

func dhcpFrame(l *link, kind byte, change func(b []byte) []byte) []byte {
	b := make([]byte, dhcpFixedBytes)
	b[0], b[1], b[2] = 1, 1, 6
	copy(b[4:], "xid!")
	copy(b[28:], l.addr.MAC[:])
	binary.BigEndian.PutUint32(b[236:], dhcpCookie)
	b = append(b, optMessage, 1, kind)
	if change != nil {
		b = change(b)
	}
	b = append(b, optEnd)
	udp := binary.BigEndian.AppendUint16(nil, dhcpClientPort)
	udp = binary.BigEndian.AppendUint16(udp, dhcpServerPort)
	udp = binary.BigEndian.AppendUint16(udp, uint16(udpBytes+len(b)))
	udp = append(append(udp, 0, 0), b...)
	return frameTo(broadcastMAC, l.addr.MAC, etherIPv4,
		ipPacket(netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), protoUDP, defaultTTL, udp))
}

func udpPacket(src, dst netip.Addr, size int) []byte {
	b := make([]byte, udpBytes+size)
	binary.BigEndian.PutUint16(b, 1234)
	binary.BigEndian.PutUint16(b[2:], 80)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	return ipPacket(src, dst, protoUDP, defaultTTL, b)
}

func TestInspect(t *testing.T) {
	l := testLink(t)
	mine4, mine6, far := l.addr.IPv4.Addr(), l.addr.IPv6.Addr(), netip.MustParseAddr(inet4)
	other := MAC{2, 0, 0, 0, 0, 9}
	local := netip.MustParseAddr("fe80::7")
	plain := udpPacket(mine4, far, 4)
	ipv4 := func(change func(b []byte)) []byte {
		b := slices.Clone(plain)
		change(b)
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], checksum(b[:ipv4Bytes]))
		return frameTo(gatewayMAC, l.addr.MAC, etherIPv4, b)
	}
	icmp := func(src, dst netip.Addr, kind byte) []byte {
		proto, m := icmpMessage(src, dst, append([]byte{kind}, make([]byte, 15)...))
		ether := uint16(etherIPv4)
		if src.Is6() {
			ether = etherIPv6
		}
		return frameTo(gatewayMAC, l.addr.MAC, ether, ipPacket(src, dst, proto, defaultTTL, m))
	}
	ip4, ip6 := uint16(etherIPv4), uint16(etherIPv6)
	for _, row := range []struct {
		name   string
		frame  []byte
		action action
		drop   drop
	}{
		{"nothing", nil, actDrop, dropRunt},
		{"13 bytes", make([]byte, 13), actDrop, dropRunt},
		{"14 bytes of zero", make([]byte, 14), actDrop, dropSource},
		{"the longest", frameTo(gatewayMAC, l.addr.MAC, ip4, append(slices.Clone(plain), make([]byte, 1504-len(plain))...)), actDeliver, 0},
		{"one byte more", frameTo(gatewayMAC, l.addr.MAC, ip4, make([]byte, 1505)), actDrop, dropGiant},
		{"from another MAC", frameTo(gatewayMAC, other, ip4, plain), actDrop, dropSource},
		{"to another MAC", frameTo(other, l.addr.MAC, ip4, plain), actDrop, dropDestination},
		{"VLAN tag", frameTo(gatewayMAC, l.addr.MAC, 0x8100, plain), actDrop, dropEtherType},
		{"LLDP", frameTo(MAC{1, 0x80, 0xc2, 0, 0, 0xe}, l.addr.MAC, 0x88cc, plain), actDrop, dropEtherType},

		{"ARP", arpRequest(l, l.addr.MAC, mine4, l.addr.Gateway4), actReply, 0},
		{"ARP probe", arpRequest(l, l.addr.MAC, netip.IPv4Unspecified(), l.addr.Gateway4), actReply, 0},
		{"ARP for another", arpRequest(l, l.addr.MAC, mine4, netip.MustParseAddr("10.87.0.5")), actDrop, dropARP},
		{"ARP for itself", arpRequest(l, l.addr.MAC, mine4, mine4), actDrop, dropARP},
		{"ARP as another MAC", arpRequest(l, other, mine4, l.addr.Gateway4), actDrop, dropARP},
		{"ARP as another address", arpRequest(l, l.addr.MAC, far, l.addr.Gateway4), actDrop, dropSpoofed},
		{"ARP as the gateway", arpRequest(l, l.addr.MAC, l.addr.Gateway4, l.addr.Gateway4), actDrop, dropSpoofed},
		{"ARP cut short", arpRequest(l, l.addr.MAC, mine4, l.addr.Gateway4)[:ethernetBytes+27], actDrop, dropARP},

		{"NDP", solicitation(l, mine6, l.addr.Gateway6, 255), actReply, 0},
		{"NDP from link-local", solicitation(l, local, l.addr.Gateway6, 255), actReply, 0},
		{"NDP for fe80::1", solicitation(l, local, gatewayLinkLocal, 255), actReply, 0},
		{"NDP from afar", solicitation(l, mine6, l.addr.Gateway6, 254), actDrop, dropNDP},
		{"NDP for itself", solicitation(l, netip.IPv6Unspecified(), mine6, 255), actDrop, dropNDP},
		{"NDP as another", solicitation(l, netip.MustParseAddr(inet6), l.addr.Gateway6, 255), actDrop, dropSpoofed},
		{"router advertisement", icmp(mine6, l.addr.Gateway6, 134), actDrop, dropNDP},
		{"redirect", icmp(mine6, l.addr.Gateway6, 137), actDrop, dropNDP},
		{"MLD", icmp(mine6, l.addr.Gateway6, 143), actDrop, dropNDP},

		{"IPv4", frameTo(gatewayMAC, l.addr.MAC, ip4, plain), actDeliver, 0},
		{"IPv4 with padding", frameTo(gatewayMAC, l.addr.MAC, ip4, append(slices.Clone(plain), 0, 0, 0)), actDeliver, 0},
		{"IPv4 cut short", frameTo(gatewayMAC, l.addr.MAC, ip4, plain[:len(plain)-1]), actDrop, dropMalformed},
		{"IPv4 of 19 bytes", frameTo(gatewayMAC, l.addr.MAC, ip4, plain[:19]), actDrop, dropMalformed},
		{"IPv4 of length 19", ipv4(func(b []byte) { b[3] = 19 }), actDrop, dropMalformed},
		{"IPv4 with a wrong sum", frameTo(gatewayMAC, l.addr.MAC, ip4, append([]byte{0x45, 1}, plain[2:]...)), actDrop, dropMalformed},
		{"IPv4 with options", ipv4(func(b []byte) { b[0] = 0x46 }), actDrop, dropOptions},
		{"IPv4 with a short header", ipv4(func(b []byte) { b[0] = 0x44 }), actDrop, dropMalformed},
		{"IPv6 as IPv4", ipv4(func(b []byte) { b[0] = 0x65 }), actDrop, dropMalformed},
		{"IPv4 fragment", ipv4(func(b []byte) { b[6], b[7] = 0x20, 1 }), actDeliver, 0},
		{"IPv4, unknown protocol", ipv4(func(b []byte) { b[9] = 47 }), actDrop, dropOptions},
		{"IPv4 spoofed", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(far, far, 4)), actDrop, dropSpoofed},
		{"IPv4 from the gateway", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(l.addr.Gateway4, far, 4)), actDrop, dropSpoofed},
		{"IPv4 from nobody", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(netip.IPv4Unspecified(), far, 4)), actDrop, dropNowhere},
		{"IPv4 from link-local", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(netip.MustParseAddr("169.254.1.1"), far, 4)), actDrop, dropNowhere},
		{"IPv4 to multicast", frameTo(MAC{1, 0, 0x5e, 0, 0, 0xfb}, l.addr.MAC, ip4, udpPacket(mine4, netip.MustParseAddr("224.0.0.251"), 4)), actDrop, dropMulticast},
		{"IPv4 to all", frameTo(broadcastMAC, l.addr.MAC, ip4, udpPacket(mine4, far, 4)), actDrop, dropMulticast},
		{"IPv4 to broadcast", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(mine4, netip.MustParseAddr("255.255.255.255"), 4)), actDrop, dropNowhere},
		{"IPv4 to 239.255.255.255", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(mine4, netip.MustParseAddr("239.255.255.255"), 4)), actDrop, dropMulticast},
		{"IPv4 to 240.0.0.0", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(mine4, netip.MustParseAddr("240.0.0.0"), 4)), actDrop, dropNowhere},
		{"IPv4 to loopback", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(mine4, netip.MustParseAddr("127.0.0.1"), 4)), actDrop, dropNowhere},
		{"IPv4 to itself", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(mine4, mine4, 4)), actDrop, dropNowhere},
		{"IPv4 to another VM", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(mine4, netip.MustParseAddr("10.87.9.2"), 4)), actPeer, 0},
		{"IPv4 to the gateway", frameTo(gatewayMAC, l.addr.MAC, ip4, udpPacket(mine4, l.addr.Gateway4, 4)), actDeliver, 0},

		{"IPv6", frameTo(gatewayMAC, l.addr.MAC, ip6, udpPacket(mine6, netip.MustParseAddr(inet6), 4)), actDeliver, 0},
		{"IPv6 cut short", frameTo(gatewayMAC, l.addr.MAC, ip6, udpPacket(mine6, netip.MustParseAddr(inet6), 4)[:50]), actDrop, dropMalformed},
		{"IPv6 spoofed", frameTo(gatewayMAC, l.addr.MAC, ip6, udpPacket(netip.MustParseAddr(inet6), netip.MustParseAddr(inet6), 4)), actDrop, dropSpoofed},
		{"IPv6 from link-local", frameTo(gatewayMAC, l.addr.MAC, ip6, udpPacket(local, netip.MustParseAddr(inet6), 4)), actDrop, dropNowhere},
		{"IPv6 to link-local", frameTo(gatewayMAC, l.addr.MAC, ip6, udpPacket(mine6, local, 4)), actDrop, dropNowhere},
		{"IPv6 to a mapped address", frameTo(gatewayMAC, l.addr.MAC, ip6, udpPacket(mine6, netip.MustParseAddr("::ffff:127.0.0.1"), 4)), actDrop, dropNowhere},
		{"IPv6 to another VM", frameTo(gatewayMAC, l.addr.MAC, ip6, udpPacket(mine6, netip.MustParseAddr("fd62:616e:6765:99::2"), 4)), actPeer, 0},
		{"IPv6, hop by hop", frameTo(gatewayMAC, l.addr.MAC, ip6, ipPacket(mine6, netip.MustParseAddr(inet6), 0, 64, make([]byte, 16))), actDrop, dropOptions},
		{"IPv6, routing header", frameTo(gatewayMAC, l.addr.MAC, ip6, ipPacket(mine6, netip.MustParseAddr(inet6), 43, 64, make([]byte, 16))), actDrop, dropOptions},
		{"IPv6 fragment", frameTo(gatewayMAC, l.addr.MAC, ip6, ipPacket(mine6, netip.MustParseAddr(inet6), 44, 64, append([]byte{protoUDP, 0, 0, 1, 0, 0, 0, 0}, make([]byte, 8)...))), actDeliver, 0},
		{"IPv6 fragment of NDP", frameTo(gatewayMAC, l.addr.MAC, ip6, ipPacket(mine6, l.addr.Gateway6, 44, 255, append([]byte{protoICMPv6, 0, 0, 1, 0, 0, 0, 0}, make([]byte, 8)...))), actDrop, dropICMP},
		{"IPv6 fragment in a fragment", frameTo(gatewayMAC, l.addr.MAC, ip6, ipPacket(mine6, l.addr.Gateway6, 44, 255, append([]byte{protoFragment, 0, 0, 1, 0, 0, 0, 0}, make([]byte, 8)...))), actDrop, dropOptions},
		{"IPv6 fragment of 7 bytes", frameTo(gatewayMAC, l.addr.MAC, ip6, ipPacket(mine6, l.addr.Gateway6, 44, 255, make([]byte, 7))), actDrop, dropMalformed},

		{"ping", icmp(mine4, far, icmpEcho), actEcho, 0},
		{"ping of the gateway", icmp(mine4, l.addr.Gateway4, icmpEcho), actDeliver, 0},
		{"ping, IPv6", icmp(mine6, netip.MustParseAddr(inet6), icmp6Echo), actEcho, 0},
		{"echo reply", icmp(mine4, far, icmpEchoReply), actDrop, dropICMP},
		{"timestamp request", icmp(mine4, far, 13), actDrop, dropICMP},
		{"ICMP redirect", icmp(mine4, l.addr.Gateway4, 5), actDrop, dropICMP},
		{"unreachable", icmp(mine4, far, icmpUnreachable), actDeliver, 0},
		{"packet too big", icmp(mine6, netip.MustParseAddr(inet6), icmp6TooBig), actDeliver, 0},
		{"ICMPv6 in IPv4", ipv4(func(b []byte) { b[9] = protoICMPv6; b[20] = icmp6Echo }), actDrop, dropICMP},

		{"DHCP discover", dhcpFrame(l, dhcpDiscover, nil), actReply, 0},
		{"DHCP release", dhcpFrame(l, 7, nil), actDrop, dropDHCP},
		{"DHCP offer", dhcpFrame(l, dhcpOffer, nil), actDrop, dropDHCP},
		{"DHCP as another MAC", dhcpFrame(l, dhcpDiscover, func(b []byte) []byte { b[33]++; return b }), actDrop, dropDHCP},
		{"DHCP to another server", dhcpFrame(l, dhcpRequest, func(b []byte) []byte { return append(b, optServer, 4, 10, 0, 0, 1) }), actDrop, dropDHCP},
		{"DHCP without cookie", dhcpFrame(l, dhcpDiscover, func(b []byte) []byte { b[236]++; return b }), actDrop, dropDHCP},
		{"DHCP option past the end", dhcpFrame(l, dhcpDiscover, func(b []byte) []byte { return append(b, optHostname, 200) }), actDrop, dropDHCP},
		{"DHCP, padding", dhcpFrame(l, dhcpDiscover, func(b []byte) []byte { return append(b, make([]byte, 900)...) }), actReply, 0},
		{"DHCP, too many options", dhcpFrame(l, dhcpDiscover, func(b []byte) []byte { return append(bytes.Repeat([]byte{77, 0}, 100), b...) }), actDrop, dropDHCP},
	} {
		s := l.inspect(row.frame)
		if s.action != row.action || s.action == actDrop && s.drop != row.drop {
			t.Errorf("%s: action %d, drop %v; want %d, %v", row.name, s.action, s.drop, row.action, row.drop)
		}
		checkSeen(t, l, row.frame, s)
	}
}

// checkSeen is what holds for every frame.
func checkSeen(t *testing.T, l *link, frame []byte, s seen) {
	t.Helper()
	switch s.action {
	case actDrop:
		if s.drop <= dropNone || s.drop >= drops || s.drop.String() == "" {
			t.Fatalf("dropped for %d", s.drop)
		}
	case actReply:
		if len(s.reply) < ethernetBytes || len(s.reply) > l.mtu+ethernetBytes || MAC(s.reply[6:]) != gatewayMAC ||
			MAC(s.reply) != l.addr.MAC && MAC(s.reply) != broadcastMAC {
			t.Fatalf("reply % x", s.reply)
		}
		// A reply is a packet that our own rules for packets accept.
		switch body := s.reply[ethernetBytes:]; binary.BigEndian.Uint16(s.reply[12:]) {
		case etherIPv4:
			if p, d := parseIPv4(body); d != dropNone || len(p.ip) != len(body) {
				t.Fatalf("reply: %v % x", d, body)
			}
		case etherIPv6:
			if p, d := parseIPv6(body); d != dropNone || len(p.ip) != len(body) {
				t.Fatalf("reply: %v % x", d, body)
			}
		case etherARP:
		default:
			t.Fatalf("reply of type %x", s.reply[12:14])
		}
	case actDeliver, actEcho, actPeer:
		p := s.packet
		if p.src != l.addr.IPv4.Addr() && p.src != l.addr.IPv6.Addr() || p.dst.IsMulticast() || p.dst.IsLoopback() || p.dst.IsUnspecified() {
			t.Fatalf("from %v to %v went through", p.src, p.dst)
		}
		if len(p.ip) == 0 || len(p.ip) > l.mtu+vlanBytes || !bytes.Contains(frame, p.ip) {
			t.Fatalf("a packet of %d bytes out of a frame of %d", len(p.ip), len(frame))
		}
		switch p.proto {
		case protoTCP, protoUDP, protoICMP, protoICMPv6:
		default:
			if s.action != actPeer {
				t.Fatalf("protocol %d went through", p.proto)
			}
		}
	}
}

func FuzzInspect(f *testing.F) {
	l := testLink(f)
	f.Add(arpRequest(l, l.addr.MAC, l.addr.IPv4.Addr(), l.addr.Gateway4))
	f.Add(solicitation(l, l.addr.IPv6.Addr(), l.addr.Gateway6, 255))
	f.Add(dhcpFrame(l, dhcpRequest, nil))
	f.Add(frameTo(gatewayMAC, l.addr.MAC, etherIPv4, udpPacket(l.addr.IPv4.Addr(), netip.MustParseAddr(inet4), 4)))
	f.Add(frameTo(gatewayMAC, l.addr.MAC, etherIPv6, udpPacket(l.addr.IPv6.Addr(), netip.MustParseAddr(inet6), 4)))
	f.Fuzz(func(t *testing.T, frame []byte) {
		for _, whole := range []bool{true, false} {
			if !whole && len(frame) >= 12 { // get past the first check
				frame = slices.Clone(frame)
				copy(frame, gatewayMAC[:])
				copy(frame[6:], l.addr.MAC[:])
			}
			before := slices.Clone(frame)
			checkSeen(t, l, frame, l.inspect(frame))
			if !bytes.Equal(before, frame) {
				t.Fatal("inspect wrote to the frame")
			}
		}
	})
}

func FuzzDHCP(f *testing.F) {
	l := testLink(f)
	f.Add(dhcpFrame(l, dhcpDiscover, nil)[ethernetBytes+ipv4Bytes+udpBytes:])
	f.Fuzz(func(t *testing.T, b []byte) {
		m, ok := parseDHCP(b)
		if !ok {
			return
		}
		kind := l.dhcpReplyTo(m)
		if kind == 0 {
			return
		}
		out := l.encodeDHCP(m, kind)
		if len(out) < minDHCPBytes || len(out) > 576 || out[0] != 2 || out[len(out)-1] != 0 && out[len(out)-1] != optEnd {
			t.Fatalf("% x", out)
		}
	})
}

// A checksum over parts is the one over the whole.
func TestChecksum(t *testing.T) {
	r := seeded(t)
	for range 1000 {
		b := make([]byte, r.IntN(200))
		fill(b, r)
		var want uint32
		for i, x := range b {
			want += uint32(x) << (8 * (1 - i%2))
		}
		for want > 0xffff {
			want = want>>16 + want&0xffff
		}
		cut := r.IntN(len(b)+1) &^ 1
		if got := checksum(b[:cut], b[cut:]); got != ^uint16(want) {
			t.Fatalf("% x cut at %d: %x, want %x", b, cut, got, ^uint16(want))
		}
	}
}
