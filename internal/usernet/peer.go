package usernet

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"banger"
)

// VMs reach each other over packets between their supervisors: one stream
// socket for each pair, on which either side first says who it is, in JSON,
// and then sends IP packets, each of both after its length in 32 bits,
// big-endian. Each side has its own policy, and both must allow it.
const (
	peerVersion    = 1
	maxPeers       = 64
	maxHelloBytes  = 16 << 10
	helloTimeout   = 5 * time.Second
	maxPeerPackets = 64 << 10 // bytes of one packet
)

// A peerHello is what one network tells another of itself.
type peerHello struct {
	Version int        `json:"version"`
	Name    string     `json:"name"`
	IPv4    netip.Addr `json:"ipv4"`
	IPv6    netip.Addr `json:"ipv6"`
	Groups  []string   `json:"groups"`
}

// A peer is another VM that this one may reach.
type peer struct {
	peerHello
	conn  net.Conn
	queue *sendQueue
	done  chan struct{}
}

// Peer joins this network to another VM's. conn is a stream to that VM's
// network, whose Peer was called with the other end: a unix socket of the same
// user, which the caller has checked. Peer owns conn and returns when both
// have agreed; the packets flow until one side is closed. A VM that shares no
// group with this one is refused.
func (n *Network) Peer(conn net.Conn) error {
	p, err := n.greet(conn)
	if err == nil {
		err = n.addPeer(p)
	}
	if err != nil {
		conn.Close()
		return err
	}
	return nil
}

// greet exchanges hellos.
func (n *Network) greet(conn net.Conn) (*peer, error) {
	_ = conn.SetDeadline(time.Now().Add(helloTimeout))
	a := n.link.addr
	hello, err := json.Marshal(peerHello{peerVersion, n.name, a.IPv4.Addr(), a.IPv6.Addr(), n.policy.Groups})
	if err != nil {
		return nil, err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(hello))), hello...))
		sent <- err
	}()
	p := &peer{conn: conn, queue: newSendQueue(), done: make(chan struct{})}
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, fmt.Errorf("network: peer: %w", err)
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxHelloBytes {
		return nil, fmt.Errorf("network: peer: a greeting of %d bytes, the limit is %d", size, maxHelloBytes)
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(conn, text); err != nil {
		return nil, fmt.Errorf("network: peer: %w", err)
	}
	if err := <-sent; err != nil {
		return nil, fmt.Errorf("network: peer: %w", err)
	}
	if err := json.Unmarshal(text, &p.peerHello); err != nil {
		return nil, fmt.Errorf("network: peer: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	return p, n.checkHello(p.peerHello)
}

// checkHello refuses a peer that is not what a VM of ours can be.
func (n *Network) checkHello(h peerHello) error {
	a := n.link.addr
	switch {
	case h.Version != peerVersion:
		return fmt.Errorf("network: peer: version %d, this is %d", h.Version, peerVersion)
	case !validName(h.Name) || len(h.Name) > 63 || h.Name == n.name || h.Name == hostName:
		return fmt.Errorf("network: peer: the name %q", h.Name)
	case !h.IPv4.Is4() || !vmBlock4.Contains(h.IPv4) || !vmBlock6.Contains(h.IPv6):
		return fmt.Errorf("network: peer %s: %v and %v are no addresses of VMs", h.Name, h.IPv4, h.IPv6)
	case a.IPv4.Masked().Contains(h.IPv4) || a.IPv6.Masked().Contains(h.IPv6):
		return fmt.Errorf("network: peer %s: it has this VM's addresses", h.Name)
	case !n.policy.SharesGroup(h.Groups):
		return banger.Errorf(banger.CodeConflict, "network: %s and %s share no group", n.name, h.Name).
			WithHint("give both --net …,group:NAME with the same name")
	}
	return nil
}

func (n *Network) addPeer(p *peer) error {
	n.peerMu.Lock()
	defer n.peerMu.Unlock()
	if n.closed() {
		return net.ErrClosed
	}
	if len(n.peers) >= maxPeers {
		return fmt.Errorf("network: %d peers, there can be no more", maxPeers)
	}
	for _, old := range n.peers {
		if old.Name == p.Name || old.IPv4 == p.IPv4 || old.IPv6 == p.IPv6 {
			return fmt.Errorf("network: peer %s: %s is there already", p.Name, old.Name)
		}
	}
	n.peers = append(n.peers, p)
	var loops sync.WaitGroup
	loops.Go(func() {
		_ = n.fromPeer(p)
		p.queue.close()
		p.conn.Close()
	})
	loops.Go(func() {
		_ = p.queue.writeTo(p.conn)
		p.conn.Close()
	})
	go func() {
		loops.Wait()
		n.peerMu.Lock()
		n.peers = slices.DeleteFunc(n.peers, func(q *peer) bool { return q == p })
		n.peerMu.Unlock()
		close(p.done)
	}()
	return nil
}

// Unpeer ends the way to the VM of that name, if there is one.
func (n *Network) Unpeer(name string) {
	n.peerMu.RLock()
	i := slices.IndexFunc(n.peers, func(p *peer) bool { return p.Name == name })
	var p *peer
	if i >= 0 {
		p = n.peers[i]
	}
	n.peerMu.RUnlock()
	if p != nil {
		p.conn.Close()
		<-p.done
	}
}

// Peers are the names of the VMs that this one reaches, sorted.
func (n *Network) Peers() []string {
	n.peerMu.RLock()
	defer n.peerMu.RUnlock()
	var out []string
	for _, p := range n.peers {
		out = append(out, p.Name)
	}
	slices.Sort(out)
	return out
}

// peerAt finds the peer with an address.
func (n *Network) peerAt(a netip.Addr) *peer {
	n.peerMu.RLock()
	defer n.peerMu.RUnlock()
	for _, p := range n.peers {
		if a == p.IPv4 || a == p.IPv6 {
			return p
		}
	}
	return nil
}

// toPeer passes a packet of the guest's on to another VM. Its source is the
// guest's own, which inspect saw to.
func (n *Network) toPeer(from *port, in packet) {
	p := n.peerAt(in.dst)
	if p == nil {
		if _, err := n.decide(flow{protoName(in.proto), in.destination()}); err != nil {
			n.tellProhibited(from, in)
		}
		return
	}
	if !hop(in.ip) {
		n.dropped[dropExpired].Add(1)
		return
	}
	if !p.queue.add(in.ip) {
		n.dropped[dropPeerFull].Add(1)
	}
}

// tellProhibited answers a packet that may be answered.
func (n *Network) tellProhibited(to *port, in packet) {
	gateway := n.link.addr.Gateway4
	if in.src.Is6() {
		gateway = n.link.addr.Gateway6
	}
	isError := (in.proto == protoICMP || in.proto == protoICMPv6) &&
		(len(in.payload) == 0 || in.payload[0] != icmpEcho && in.payload[0] != icmp6Echo)
	if !isError && !in.fragment {
		to.sendPacket(prohibited(in, gateway))
	}
}

// hop takes one off the TTL of a packet (RFC 1624, RFC 8200); false if that
// was the last.
func hop(ip []byte) bool {
	if ip[0]>>4 == 6 {
		if ip[7] <= 1 {
			return false
		}
		ip[7]--
		return true
	}
	if ip[8] <= 1 {
		return false
	}
	ip[8]--
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], checksum(ip[:ipv4Bytes]))
	return true
}

var errPeer = errors.New("network: the peer sends no packets")

// fromPeer takes packets of another VM's to the guest: whole ones, from that
// VM's addresses to this one's, and nothing else.
func (n *Network) fromPeer(p *peer) error {
	r := bufio.NewReaderSize(p.conn, readBytes)
	for {
		head, err := r.Peek(4)
		if err != nil {
			return err
		}
		size := binary.BigEndian.Uint32(head)
		if size > maxPeerPackets {
			return errPeer
		}
		_, _ = r.Discard(4)
		ip, err := r.Peek(int(size))
		if err != nil {
			return err
		}
		if to := n.current(); to != nil {
			if d := n.checkPeerPacket(p.peerHello, ip); d != dropNone {
				n.dropped[d].Add(1)
			} else {
				to.sendPacket(ip)
			}
		}
		_, _ = r.Discard(int(size))
	}
}

// checkPeerPacket is the receiver's side of the policy.
func (n *Network) checkPeerPacket(from peerHello, ip []byte) drop {
	if len(ip) == 0 {
		return dropRunt
	}
	if len(ip) > n.link.mtu {
		return dropGiant
	}
	parse := parseIPv4
	if ip[0]>>4 == 6 {
		parse = parseIPv6
	}
	in, d := parse(ip)
	switch {
	case d != dropNone:
		return d
	case len(in.ip) != len(ip):
		return dropMalformed
	case in.src != from.IPv4 && in.src != from.IPv6:
		return dropPeerSource
	case in.dst != n.link.addr.IPv4.Addr() && in.dst != n.link.addr.IPv6.Addr():
		return dropPeerSource
	case in.proto == protoICMPv6 && !in.fragment && len(in.payload) > 0 && in.payload[0] >= 130 && in.payload[0] != 128 && in.payload[0] != 129:
		return dropNDP // what belongs to a link
	}
	return dropNone
}
