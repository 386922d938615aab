// Package usernet is the network of a VM in user space. A Network has the
// guest's Ethernet at one end and sockets of the host at the other; what
// passes, it decides itself, on the address, at every dial.
//
//	          Attach                                       Policy
//	guest ==> port ==> link.inspect ==> netstack ==> decide ==> sockets of the host
//	            |          '--> ARP, NDP, DHCP answered here       ^
//	            '== Peer ==> another VM's Network       Forward ---'
//
// What is pure is apart from what does I/O: Policy, link, the codecs of DNS
// and DHCP and the judgement on routes hold no socket and no lock.
//
// The guest is hostile. Every queue, table and buffer has a limit that is a
// named constant, a guest that floods or does not read hurts itself alone, and
// nothing it sends is taken for more than it is: it has one MAC and two
// addresses, pinned. It is the only package that knows netstack.
package usernet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// DefaultMTU is what one frame of virtio-net carries at most: TCP with the
	// guest ends here, so no MTU of the world outside matters to it.
	DefaultMTU = 65520
	minMTU     = 1280 // IPv6's least (RFC 8200 5)
	maxMTU     = 65520
)

// Config is what a Network is made from.
type Config struct {
	Name      string // of the VM; NAME.banger is its host name
	Addresses Addresses
	MTU       int // of the guest's link; 0 is DefaultMTU
	Policy    Policy
	// Log is what an earlier network of the VM denied; its own goes on from it.
	Log []Denial

	// Resolver answers names that are not VMs'. Nil is HostResolver.
	Resolver Resolver
	// Route says how the host sends to an address. Nil asks the kernel.
	Route func(netip.Addr) (Route, error)
}

// A Network serves one VM, through all its starts. Its methods may be called
// from any goroutine.
type Network struct {
	name     string
	link     *link
	policy   Policy
	resolver Resolver
	route    func(netip.Addr) (Route, error)
	now      func() time.Time

	answers answers
	denials *denialLog

	received, sent, refused atomic.Uint64
	dropped                 [drops]atomic.Uint64

	portMu  sync.Mutex
	port    *port // nil without a VMM
	isDone  bool
	inbound atomic.Int64

	forwardMu sync.Mutex
	forwards  []*forwarding

	peerMu sync.RWMutex
	peers  []*peer
}

// New makes a network that nothing is attached to yet. Its policy is in force
// before a guest can send.
func New(cfg Config) (*Network, error) {
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.MTU < minMTU || cfg.MTU > maxMTU {
		return nil, fmt.Errorf("network: MTU %d, it is from %d to %d", cfg.MTU, minMTU, maxMTU)
	}
	if !validName(cfg.Name) || len(cfg.Name) > 63 {
		return nil, fmt.Errorf("network: the VM's name %q is no host name", cfg.Name)
	}
	if err := cfg.Addresses.check(); err != nil {
		return nil, err
	}
	if cfg.Resolver == nil {
		cfg.Resolver = HostResolver()
	}
	if cfg.Route == nil {
		cfg.Route = routeOf
	}
	cfg.Policy.normalise()
	return &Network{
		name: cfg.Name,
		link: &link{addr: cfg.Addresses, local: gatewayLinkLocal, mtu: cfg.MTU,
			dhcp: dhcpOptions{hostname: cfg.Name, domain: Domain}},
		policy: cfg.Policy, resolver: cfg.Resolver, route: cfg.Route, now: time.Now,
		denials: newDenialLog(cfg.Log),
	}, nil
}

// attachWait is how long the next VMM waits for the end of the one before it,
// which has gone and is being cleared away.
const attachWait = 2 * time.Second

// Attach gives the network its guest: a stream of frames from and to a VMM, as
// QEMU's -netdev stream has it. The network owns conn. There is one at a time;
// when it ends, what the guest had open ends with it and another may come.
func (n *Network) Attach(conn net.Conn) error {
	if p := n.current(); p != nil {
		select {
		case <-p.done:
		case <-time.After(attachWait):
		}
	}
	n.portMu.Lock()
	defer n.portMu.Unlock()
	if n.isDone || n.port != nil {
		conn.Close()
		if n.isDone {
			return net.ErrClosed
		}
		return errors.New("network: a VMM is attached already")
	}
	p, err := newPort(n, conn)
	if err != nil {
		return err
	}
	n.port = p
	return nil
}

// Attached says whether a VMM is at the other end now.
func (n *Network) Attached() bool { return n.current() != nil }

// detached is called by a port that has ended.
func (n *Network) detached(p *port) {
	n.portMu.Lock()
	if n.port == p {
		n.port = nil
	}
	n.portMu.Unlock()
}

func (n *Network) current() *port {
	n.portMu.Lock()
	defer n.portMu.Unlock()
	return n.port
}

func (n *Network) closed() bool {
	n.portMu.Lock()
	defer n.portMu.Unlock()
	return n.isDone
}

// Close ends everything: the port, the forwards, the ways to other VMs. When
// it returns, nothing of the network runs.
func (n *Network) Close() error {
	n.portMu.Lock()
	p := n.port
	n.isDone = true
	n.portMu.Unlock()
	n.forwardMu.Lock()
	for _, f := range n.forwards {
		f.stop()
	}
	n.forwards = nil
	n.forwardMu.Unlock()
	n.peerMu.RLock()
	peers := append([]*peer(nil), n.peers...)
	n.peerMu.RUnlock()
	for _, q := range peers {
		q.conn.Close()
		<-q.done
	}
	if p != nil {
		p.close()
	}
	return nil
}

// Log is what the guest was denied, oldest first, at most maxDenials entries.
func (n *Network) Log() []Denial { return n.denials.all() }

// Denied gives a token when the log has changed since the last one was taken.
func (n *Network) Denied() <-chan struct{} { return n.denials.changed }

func (n *Network) deny(d Denial) { n.denials.add(n.now(), d) }

// Stats counts frames and what became of them.
type Stats struct {
	Received uint64 `json:"received"` // frames from the guest
	Sent     uint64 `json:"sent"`     // frames queued for the guest
	Refused  uint64 `json:"refused"`  // flows over the limit
	// Dropped counts frames by reason; reasons that did not occur are missing.
	Dropped map[string]uint64 `json:"dropped"`
	Flows   int64             `json:"flows"` // open TCP connections to the outside
}

// Stats counts since the network was made.
func (n *Network) Stats() Stats {
	s := Stats{Received: n.received.Load(), Sent: n.sent.Load(), Refused: n.refused.Load(), Dropped: make(map[string]uint64)}
	for d := range n.dropped {
		if count := n.dropped[d].Load(); count > 0 {
			s.Dropped[drop(d).String()] = count
		}
	}
	if p := n.current(); p != nil {
		s.Flows = p.tcpFlows.Load()
	}
	return s
}

// addressesOf resolves a name below Domain; nil if there is no such VM, or
// none that this one may reach.
func (n *Network) addressesOf(name string) []netip.Addr {
	switch name {
	case hostName:
		return []netip.Addr{n.link.addr.Gateway4, n.link.addr.Gateway6}
	case n.name:
		return []netip.Addr{n.link.addr.IPv4.Addr(), n.link.addr.IPv6.Addr()}
	}
	n.peerMu.RLock()
	defer n.peerMu.RUnlock()
	for _, p := range n.peers {
		if p.Name == name {
			return []netip.Addr{p.IPv4, p.IPv6}
		}
	}
	return nil
}

// nameOf is the reverse of addressesOf; "" if there is none.
func (n *Network) nameOf(a netip.Addr) string {
	switch a {
	case n.link.addr.Gateway4, n.link.addr.Gateway6:
		return hostName
	case n.link.addr.IPv4.Addr(), n.link.addr.IPv6.Addr():
		return n.name
	}
	if p := n.peerAt(a); p != nil {
		return p.Name
	}
	return ""
}

// readBounded reads a whole file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
