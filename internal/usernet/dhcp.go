package usernet

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"time"
)

// DHCP (RFC 2131, RFC 2132) for guests that insist on it. There is one client
// and one address, so there is no state: every question has the same answer.
const (
	dhcpServerPort = 67
	dhcpClientPort = 68
	dhcpFixedBytes = 240 // up to and with the cookie
	dhcpCookie     = 0x63825363
	// minDHCPBytes: some clients take nothing shorter, as in BOOTP (RFC 1542 2.1).
	minDHCPBytes = 300
	// dhcpLease is long: the address is the VM's for life.
	dhcpLease = 24 * time.Hour
	// maxDHCPOptions bounds the walk through a request's options.
	maxDHCPOptions = 64
)

const (
	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpAck      = 5
	dhcpNak      = 6
	dhcpInform   = 8

	optSubnet      = 1
	optRouter      = 3
	optDNS         = 6
	optHostname    = 12
	optDomain      = 15
	optMTU         = 26
	optRequestedIP = 50
	optLease       = 51
	optMessage     = 53
	optServer      = 54
	optEnd         = 255
)

// dhcpOptions are what a lease says besides the addresses.
type dhcpOptions struct {
	hostname string
	domain   string
}

func isDHCP(p packet) bool {
	return p.proto == protoUDP && !p.fragment && len(p.payload) >= udpBytes &&
		binary.BigEndian.Uint16(p.payload) == dhcpClientPort && p.port() == dhcpServerPort
}

// A dhcpMessage is what the server reads of a request.
type dhcpMessage struct {
	kind      byte
	xid       [4]byte
	flags     uint16
	client    netip.Addr // ciaddr
	hardware  MAC
	requested netip.Addr // invalid if there is none
	server    netip.Addr
}

// parseDHCP reads a request; ok is false for all that is not one.
func parseDHCP(b []byte) (m dhcpMessage, ok bool) {
	if len(b) < dhcpFixedBytes || b[0] != 1 || b[1] != 1 || b[2] != 6 || binary.BigEndian.Uint32(b[236:]) != dhcpCookie {
		return m, false
	}
	m.xid, m.flags = [4]byte(b[4:]), binary.BigEndian.Uint16(b[10:])
	m.client, m.hardware = netip.AddrFrom4([4]byte(b[12:])), MAC(b[28:])
	options := b[dhcpFixedBytes:]
	for range maxDHCPOptions {
		if len(options) == 0 || options[0] == optEnd {
			break
		}
		if options[0] == 0 { // padding, which may be long
			options = bytes.TrimLeft(options, "\x00")
			continue
		}
		if len(options) < 2 || len(options) < 2+int(options[1]) {
			return m, false
		}
		code, value := options[0], options[2:2+int(options[1])]
		options = options[2+len(value):]
		switch {
		case code == optMessage && len(value) == 1:
			m.kind = value[0]
		case code == optRequestedIP && len(value) == 4:
			m.requested = netip.AddrFrom4([4]byte(value))
		case code == optServer && len(value) == 4:
			m.server = netip.AddrFrom4([4]byte(value))
		}
	}
	return m, m.kind != 0
}

// dhcpReplyTo decides: the kind of answer, or 0 for none.
func (l *link) dhcpReplyTo(m dhcpMessage) byte {
	mine := l.addr.IPv4.Addr()
	if m.hardware != l.addr.MAC || m.server.IsValid() && m.server != l.addr.Gateway4 {
		return 0
	}
	switch m.kind {
	case dhcpDiscover:
		return dhcpOffer
	case dhcpRequest:
		want := m.requested
		if !want.IsValid() {
			want = m.client
		}
		if want != mine {
			return dhcpNak
		}
		return dhcpAck
	case dhcpInform:
		if m.client == mine {
			return dhcpAck
		}
	}
	return 0
}

// answerDHCP answers one datagram to the DHCP port.
func (l *link) answerDHCP(p packet) seen {
	if p.src != l.addr.IPv4.Addr() && !p.src.IsUnspecified() {
		return seen{drop: dropSpoofed, packet: p}
	}
	m, ok := parseDHCP(p.payload[udpBytes:])
	if !ok {
		return seen{drop: dropDHCP}
	}
	kind := l.dhcpReplyTo(m)
	if kind == 0 {
		return seen{drop: dropDHCP}
	}
	body := l.encodeDHCP(m, kind)
	// To the address where the client has one; else to all, since it may have
	// none yet, and it is alone on its link.
	to := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	mac := broadcastMAC
	if m.client == l.addr.IPv4.Addr() && kind != dhcpNak {
		to, mac = m.client, l.addr.MAC
	}
	udp := make([]byte, udpBytes, udpBytes+len(body))
	binary.BigEndian.PutUint16(udp, dhcpServerPort)
	binary.BigEndian.PutUint16(udp[2:], dhcpClientPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(udpBytes+len(body)))
	udp = append(udp, body...)
	binary.BigEndian.PutUint16(udp[6:], checksum(pseudo(l.addr.Gateway4, to, protoUDP, len(udp)), udp))
	return seen{action: actReply, reply: append(ethernetFrame(mac, etherIPv4), ipPacket(l.addr.Gateway4, to, protoUDP, defaultTTL, udp)...)}
}

func (l *link) encodeDHCP(m dhcpMessage, kind byte) []byte {
	b := make([]byte, dhcpFixedBytes, minDHCPBytes)
	b[0], b[1], b[2] = 2, 1, 6
	copy(b[4:], m.xid[:])
	binary.BigEndian.PutUint16(b[10:], m.flags)
	gateway := l.addr.Gateway4.AsSlice()
	copy(b[28:], m.hardware[:])
	binary.BigEndian.PutUint32(b[236:], dhcpCookie)
	option := func(code byte, value ...byte) {
		if len(value) > 0 && len(value) < 256 {
			b = append(append(b, code, byte(len(value))), value...)
		}
	}
	option(optMessage, kind)
	option(optServer, gateway...)
	if kind != dhcpNak {
		copy(b[12:16], m.client.AsSlice())
		if m.kind != dhcpInform {
			copy(b[16:20], l.addr.IPv4.Addr().AsSlice())
			option(optLease, binary.BigEndian.AppendUint32(nil, uint32(dhcpLease/time.Second))...)
		}
		copy(b[20:24], gateway)
		option(optSubnet, binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-l.addr.IPv4.Bits()))...)
		option(optRouter, gateway...)
		option(optDNS, gateway...)
		option(optMTU, binary.BigEndian.AppendUint16(nil, uint16(l.mtu))...)
		option(optHostname, []byte(l.dhcp.hostname)...)
		option(optDomain, []byte(l.dhcp.domain)...)
	}
	b = append(b, optEnd)
	return append(b, make([]byte, max(0, minDHCPBytes-len(b)))...)
}
