package usernet

import (
	"encoding/binary"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxPings = 64 // of one VM: pairs of an address and an identifier
	pingIdle = 30 * time.Second
)

// A pingKey is what an echo's answer is known by.
type pingKey struct {
	dst netip.Addr
	id  uint16
}

// A ping is a socket of the kind that lets ordinary users ping (icmp(7)). The
// kernel chooses the identifier on the wire and hands back only its answers.
type ping struct {
	f    *os.File
	used time.Time // under pingMu
}

// relayPing passes an echo request on, if the policy and the host allow it.
// The guest is told when they do not.
func (p *port) relayPing(in packet) {
	key := pingKey{in.dst, binary.BigEndian.Uint16(in.payload[4:])}
	p.pingMu.Lock()
	e := p.pings[key]
	if e != nil {
		e.used = time.Now()
	}
	full := e == nil && len(p.pings) >= maxPings
	p.pingMu.Unlock()
	if full {
		p.n.refused.Add(1)
		return
	}
	if e == nil {
		var err error
		if e, err = p.openPing(key); err != nil {
			gateway := p.n.link.addr.Gateway4
			if in.src.Is6() {
				gateway = p.n.link.addr.Gateway6
			}
			p.sendPacket(prohibited(in, gateway))
			return
		}
	}
	m := append([]byte(nil), in.payload...)
	m[2], m[3] = 0, 0
	_, _ = e.f.Write(m) // the kernel sets identifier and checksum
}

// openPing decides, opens the socket and starts to pass its answers back.
func (p *port) openPing(key pingKey) (*ping, error) {
	to, err := p.n.decide(flow{"icmp", netip.AddrPortFrom(key.dst, 0)})
	if err != nil {
		return nil, err
	}
	var fd int
	var addr unix.Sockaddr
	flags := unix.SOCK_DGRAM | unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
	if to.Addr().Is4() {
		fd, err = unix.Socket(unix.AF_INET, flags, unix.IPPROTO_ICMP)
		addr = &unix.SockaddrInet4{Addr: to.Addr().As4()}
	} else {
		fd, err = unix.Socket(unix.AF_INET6, flags, unix.IPPROTO_ICMPV6)
		addr = &unix.SockaddrInet6{Addr: to.Addr().As16()}
	}
	if err != nil {
		if err == unix.EACCES || err == unix.EPERM {
			p.n.deny(Denial{Proto: "icmp", To: netip.AddrPortFrom(key.dst, 0),
				Reason: "the host lets this user send no pings (sysctl net.ipv4.ping_group_range)"})
		}
		return nil, err
	}
	if err := unix.Connect(fd, addr); err != nil {
		unix.Close(fd)
		return nil, err
	}
	e := &ping{f: os.NewFile(uintptr(fd), "ping"), used: time.Now()}
	p.pingMu.Lock()
	p.pings[key] = e
	p.pingMu.Unlock()
	p.work.Go(func() {
		e.pump(p, key)
		p.pingMu.Lock()
		delete(p.pings, key)
		p.pingMu.Unlock()
		e.f.Close()
	})
	return e, nil
}

// pump passes answers back until there has been nothing to answer for a while.
func (e *ping) pump(p *port, key pingKey) {
	src, dst := key.dst, p.n.link.addr.IPv4.Addr()
	if src.Is6() {
		dst = p.n.link.addr.IPv6.Addr()
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-p.ctx.Done():
			_ = e.f.SetDeadline(time.Unix(1, 0))
		case <-ended:
		}
	}()
	buf := make([]byte, maxPumpBytes)
	for {
		_ = e.f.SetReadDeadline(time.Now().Add(pingIdle))
		if p.ctx.Err() != nil {
			return
		}
		n, err := e.f.Read(buf)
		if err != nil {
			p.pingMu.Lock()
			busy := os.IsTimeout(err) && time.Since(e.used) < pingIdle
			p.pingMu.Unlock()
			if busy {
				continue
			}
			return
		}
		if n < icmpBytes || n+ipv6Bytes > p.n.link.mtu || buf[0] != icmpEchoReply && buf[0] != icmp6EchoReply {
			continue
		}
		m := buf[:n]
		binary.BigEndian.PutUint16(m[4:], key.id)
		proto, m := icmpMessage(src, dst, m)
		p.sendPacket(ipPacket(src, dst, proto, defaultTTL, m))
	}
}
