package usernet

import (
	"encoding/binary"
	"net/netip"
)

// A drop is the reason why a frame went no further.
type drop int

const (
	dropNone        drop = iota
	dropRunt             // shorter than an Ethernet header
	dropGiant            // longer than the MTU allows
	dropSource           // not from the guest's MAC
	dropDestination      // to a MAC that is nobody's here
	dropEtherType        // neither IP nor ARP
	dropARP              // no honest question for the gateway
	dropMalformed        // a header that contradicts itself
	dropOptions          // IP options, extension headers, unknown protocols
	dropSpoofed          // a source address that is not the guest's
	dropMulticast        // to many
	dropNowhere          // to an address that cannot be a destination
	dropNDP              // no honest question for the gateway
	dropDHCP             // not a request that is answered
	dropICMP             // an ICMP type that guests have no use for
	dropExpired          // its TTL is used up
	dropFull             // the queue to the guest is full
	dropPeerFull         // the queue to another VM is full
	dropPeerSource       // from another VM, with an address that is not its own
	drops                // how many there are
)

var dropNames = [drops]string{
	dropRunt: "runt", dropGiant: "giant", dropSource: "source-mac", dropDestination: "destination-mac",
	dropEtherType: "ethertype", dropARP: "arp", dropMalformed: "malformed", dropOptions: "ip-options",
	dropSpoofed: "spoofed-source", dropMulticast: "multicast", dropNowhere: "no-destination", dropNDP: "ndp",
	dropDHCP: "dhcp", dropICMP: "icmp-type", dropExpired: "ttl", dropFull: "queue-full",
	dropPeerFull: "peer-queue-full", dropPeerSource: "peer-source",
}

func (d drop) String() string { return dropNames[d] }

// What inspect found a frame to be.
type action int

const (
	actDrop    action = iota
	actReply          // seen.reply is the answer, a frame
	actDeliver        // TCP, UDP, errors, and all that is for the gateway: to the stack
	actEcho           // a ping of something beyond the gateway
	actPeer           // to an address of another VM's, if there is one
)

// seen is the judgement on one frame.
type seen struct {
	action action
	drop   drop
	packet packet // for actDeliver, actEcho, actPeer, dropSpoofed, dropNowhere
	reply  []byte
}

// A link is what the port knows of its guest. It is never written to after it
// was made.
//
//	frame -> Ethernet checks -> ARP, NDP, DHCP ----------------> reply
//	                         -> IP checks -> source is pinned -> deliver, echo, peer
//
// So what lies behind sees IP packets of sane shape from this guest's own two
// addresses, and no link layer at all.
type link struct {
	addr  Addresses
	local netip.Addr // the gateway's link-local address
	mtu   int
	dhcp  dhcpOptions
}

// maxFrameBytes is the longest frame that is looked at.
func (l *link) maxFrameBytes() int { return l.mtu + ethernetBytes + vlanBytes }

// inspect judges a frame from the guest. It does no I/O and keeps nothing;
// the result points into the frame.
func (l *link) inspect(frame []byte) seen {
	switch {
	case len(frame) < ethernetBytes:
		return seen{drop: dropRunt}
	case len(frame) > l.maxFrameBytes():
		return seen{drop: dropGiant}
	case MAC(frame[6:]) != l.addr.MAC:
		return seen{drop: dropSource}
	}
	dst, kind, body := MAC(frame), binary.BigEndian.Uint16(frame[12:]), frame[ethernetBytes:]
	toGateway := dst == gatewayMAC
	if !toGateway && dst[0]&1 == 0 {
		return seen{drop: dropDestination}
	}
	switch kind {
	case etherARP:
		return l.arp(body)
	case etherIPv4:
		p, d := parseIPv4(body)
		if d != dropNone {
			return seen{drop: d}
		}
		if isDHCP(p) {
			return l.answerDHCP(p)
		}
		return l.route(p, toGateway)
	case etherIPv6:
		p, d := parseIPv6(body)
		if d != dropNone {
			return seen{drop: d}
		}
		if p.proto == protoICMPv6 && !p.fragment && len(p.payload) >= icmpBytes {
			switch kind := p.payload[0]; {
			case kind == icmp6Solicit:
				return l.solicited(p)
			case kind >= 130 && kind <= 137 || kind == 143: // the rest of NDP and MLD
				return seen{drop: dropNDP}
			}
		}
		return l.route(p, toGateway)
	}
	return seen{drop: dropEtherType}
}

// route decides where a packet goes that is neither ours to answer nor broken.
func (l *link) route(p packet, toGateway bool) seen {
	out := seen{packet: p}
	switch {
	case p.src != l.addr.IPv4.Addr() && p.src != l.addr.IPv6.Addr():
		out.drop = dropSpoofed
		if p.src.IsLinkLocalUnicast() || p.src.IsUnspecified() {
			out.drop = dropNowhere // a kernel that looks for its address, not a spoof
		}
		return out
	case !toGateway || p.dst.IsMulticast():
		return seen{drop: dropMulticast}
	case p.dst.IsUnspecified(), p.dst.IsLoopback(), p.dst == p.src, p.dst.Is4() && p.dst.As4()[0] >= 240,
		p.dst.IsLinkLocalUnicast() && p.dst.Is6(), p.dst.Is4In6():
		out.drop = dropNowhere
		return out
	}
	gateway := p.dst == l.addr.Gateway4 || p.dst == l.addr.Gateway6
	if !gateway && (vmBlock4.Contains(p.dst) || vmBlock6.Contains(p.dst)) {
		out.action = actPeer
		return out
	}
	switch p.proto {
	case protoTCP, protoUDP:
		out.action = actDeliver
		return out
	case protoICMP, protoICMPv6:
		if p.fragment || len(p.payload) < icmpBytes || (p.proto == protoICMP) != p.src.Is4() {
			return seen{drop: dropICMP}
		}
		kind := p.payload[0]
		switch {
		case p.proto == protoICMP && kind == icmpEcho, p.proto == protoICMPv6 && kind == icmp6Echo:
			if out.action = actEcho; gateway {
				out.action = actDeliver
			}
			return out
		case p.proto == protoICMP && (kind == icmpUnreachable || kind == icmpTimeout || kind == icmpParameter),
			p.proto == protoICMPv6 && kind >= icmp6Unreachable && kind <= icmp6Parameter:
			out.action = actDeliver
			return out
		}
		return seen{drop: dropICMP}
	}
	return seen{drop: dropOptions}
}

// arp answers who has the gateway's address (RFC 826). Everything else is
// either of no use to an honest guest or a game: who one is, is pinned.
func (l *link) arp(b []byte) seen {
	const request, reply = 1, 2
	gateway := l.addr.Gateway4.As4()
	if len(b) < arpBytes || binary.BigEndian.Uint64(b) != 1<<48|etherIPv4<<32|6<<24|4<<16|request ||
		MAC(b[8:]) != l.addr.MAC || [4]byte(b[24:]) != gateway {
		return seen{drop: dropARP}
	}
	// A probe (RFC 5227) has no sender address yet.
	if sender := netip.AddrFrom4([4]byte(b[14:])); sender != l.addr.IPv4.Addr() && !sender.IsUnspecified() {
		return seen{drop: dropSpoofed}
	}
	out := ethernetFrame(l.addr.MAC, etherARP)
	out = binary.BigEndian.AppendUint64(out, 1<<48|etherIPv4<<32|6<<24|4<<16|reply)
	out = append(append(out, gatewayMAC[:]...), gateway[:]...)
	out = append(out, b[8:18]...)
	return seen{action: actReply, reply: out}
}

// solicited answers a neighbour solicitation for one of the gateway's
// addresses (RFC 4861 7.2.4).
func (l *link) solicited(p packet) seen {
	const solicitBytes = icmpBytes + 16
	if p.ttl != ndpTTL || p.payload[1] != 0 || len(p.payload) < solicitBytes ||
		checksum(pseudo(p.src, p.dst, protoICMPv6, len(p.payload)), p.payload) != 0 {
		return seen{drop: dropNDP}
	}
	target := netip.AddrFrom16([16]byte(p.payload[icmpBytes:]))
	if target != l.addr.Gateway6 && target != l.local {
		return seen{drop: dropNDP} // its own duplicate address detection, mostly
	}
	if p.src != l.addr.IPv6.Addr() && !p.src.IsLinkLocalUnicast() {
		return seen{drop: dropSpoofed}
	}
	m := make([]byte, solicitBytes+8)
	m[0], m[4] = icmp6Advertise, 0xe0 // router, solicited, override
	copy(m[icmpBytes:], target.AsSlice())
	m[solicitBytes], m[solicitBytes+1] = 2, 1 // target link-layer address, 8 bytes
	copy(m[solicitBytes+2:], gatewayMAC[:])
	proto, m := icmpMessage(target, p.src, m)
	return seen{action: actReply, reply: append(ethernetFrame(l.addr.MAC, etherIPv6), ipPacket(target, p.src, proto, ndpTTL, m)...)}
}
