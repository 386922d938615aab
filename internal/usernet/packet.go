package usernet

import (
	"encoding/binary"
	"net/netip"
)

// Sizes and numbers of the protocols whose headers we read and write ourselves.
const (
	ethernetBytes = 14
	vlanBytes     = 4 // QEMU passes tagged frames; we refuse them as unknown
	ipv4Bytes     = 20
	ipv6Bytes     = 40
	udpBytes      = 8
	icmpBytes     = 8
	arpBytes      = 28

	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherIPv6 = 0x86dd

	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoFragment = 44
	protoICMPv6   = 58

	icmpUnreachable = 3
	icmpEcho        = 8
	icmpEchoReply   = 0
	icmpTimeout     = 11
	icmpParameter   = 12

	icmp6Unreachable = 1
	icmp6TooBig      = 2
	icmp6Timeout     = 3
	icmp6Parameter   = 4
	icmp6Echo        = 128
	icmp6EchoReply   = 129
	icmp6Solicit     = 135 // neighbour solicitation, RFC 4861
	icmp6Advertise   = 136

	defaultTTL = 64
	ndpTTL     = 255
)

var broadcastMAC = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// checksum is the Internet checksum (RFC 1071) over parts as if they were one;
// only the last part may be odd.
func checksum(parts ...[]byte) uint16 {
	var sum uint64
	for _, b := range parts {
		for len(b) >= 2 {
			sum += uint64(binary.BigEndian.Uint16(b))
			b = b[2:]
		}
		if len(b) == 1 {
			sum += uint64(b[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// pseudo is the pseudo header of both IP versions (RFC 9293, RFC 8200), which
// sum to the same for equal fields.
func pseudo(src, dst netip.Addr, proto byte, size int) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(size))
	return append(b, 0, 0, 0, proto)
}

// ethernetFrame begins a frame to the guest.
func ethernetFrame(dst MAC, kind uint16) []byte {
	b := append(make([]byte, 0, 256), dst[:]...)
	b = append(b, gatewayMAC[:]...)
	return binary.BigEndian.AppendUint16(b, kind)
}

// ipPacket is an IP packet around a payload. Both addresses are of one family.
func ipPacket(src, dst netip.Addr, proto, ttl byte, payload []byte) []byte {
	var b []byte
	if src.Is4() {
		b = make([]byte, ipv4Bytes, ipv4Bytes+len(payload))
		b[0], b[8], b[9] = 0x45, ttl, proto
		binary.BigEndian.PutUint16(b[2:], uint16(ipv4Bytes+len(payload)))
		binary.BigEndian.PutUint16(b[6:], 0x4000) // don't fragment
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(b[10:], checksum(b))
	} else {
		b = make([]byte, ipv6Bytes, ipv6Bytes+len(payload))
		b[0], b[6], b[7] = 0x60, proto, ttl
		binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
	}
	return append(b, payload...)
}

// icmpMessage completes an ICMP or ICMPv6 message whose checksum is not set.
func icmpMessage(src, dst netip.Addr, m []byte) (proto byte, _ []byte) {
	m[2], m[3] = 0, 0
	if src.Is4() {
		binary.BigEndian.PutUint16(m[2:], checksum(m))
		return protoICMP, m
	}
	binary.BigEndian.PutUint16(m[2:], checksum(pseudo(src, dst, protoICMPv6, len(m)), m))
	return protoICMPv6, m
}

// prohibited tells the sender of a packet that it may not go where it wants
// (RFC 1812 5.2.7.1, RFC 4443 3.1). It comes from the gateway.
func prohibited(p packet, gateway netip.Addr) []byte {
	// Never about an ICMP error (RFC 1122 3.2.2); the callers answer nothing else.
	m := make([]byte, icmpBytes, icmpBytes+len(p.ip))
	room := 576 - ipv4Bytes - icmpBytes
	if p.src.Is4() {
		m[0], m[1] = icmpUnreachable, 13
	} else {
		m[0], m[1], room = icmp6Unreachable, 1, 1280-ipv6Bytes-icmpBytes
	}
	m = append(m, p.ip[:min(len(p.ip), room)]...)
	proto, m := icmpMessage(gateway, p.src, m)
	return ipPacket(gateway, p.src, proto, defaultTTL, m)
}

// A packet is an IP packet whose header was checked.
type packet struct {
	ip       []byte // the whole packet, nothing after it
	src, dst netip.Addr
	proto    byte // of the payload, after a fragment header
	payload  []byte
	fragment bool // a part of a larger packet
	ttl      byte
}

// port is the destination port of TCP and UDP, 0 for all else.
func (p packet) port() uint16 {
	if (p.proto == protoTCP || p.proto == protoUDP) && !p.fragment && len(p.payload) >= 4 {
		return binary.BigEndian.Uint16(p.payload[2:])
	}
	return 0
}

// parseIPv4 reads a packet at the start of b (RFC 791). Options are refused:
// nothing that guests do needs them, and they steer routing.
func parseIPv4(b []byte) (packet, drop) {
	if len(b) < ipv4Bytes || b[0] != 0x45 {
		if len(b) >= ipv4Bytes && b[0]>>4 == 4 && b[0]&15 > 5 {
			return packet{}, dropOptions
		}
		return packet{}, dropMalformed
	}
	size := int(binary.BigEndian.Uint16(b[2:]))
	if size < ipv4Bytes || size > len(b) || checksum(b[:ipv4Bytes]) != 0 {
		return packet{}, dropMalformed
	}
	return packet{
		ip:  b[:size],
		src: netip.AddrFrom4([4]byte(b[12:])), dst: netip.AddrFrom4([4]byte(b[16:])),
		proto: b[9], ttl: b[8], payload: b[ipv4Bytes:size],
		fragment: binary.BigEndian.Uint16(b[6:])&0x3fff != 0,
	}, dropNone
}

// parseIPv6 reads a packet at the start of b (RFC 8200). Of extension headers
// it takes the fragment header alone.
func parseIPv6(b []byte) (packet, drop) {
	if len(b) < ipv6Bytes || b[0]>>4 != 6 {
		return packet{}, dropMalformed
	}
	size := ipv6Bytes + int(binary.BigEndian.Uint16(b[4:]))
	if size > len(b) {
		return packet{}, dropMalformed
	}
	p := packet{
		ip:  b[:size],
		src: netip.AddrFrom16([16]byte(b[8:])), dst: netip.AddrFrom16([16]byte(b[24:])),
		proto: b[6], ttl: b[7], payload: b[ipv6Bytes:size],
	}
	if p.proto == protoFragment {
		if len(p.payload) < 8 {
			return packet{}, dropMalformed
		}
		p.fragment, p.proto, p.payload = true, p.payload[0], p.payload[8:]
	}
	switch p.proto {
	case protoTCP, protoUDP, protoICMPv6:
		return p, dropNone
	}
	return packet{}, dropOptions
}
