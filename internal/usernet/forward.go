package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"banger"
)

const (
	// MaxForwards bounds the ports of the host that lead to one VM.
	MaxForwards = 256
	// maxForwardConns bounds connections from the host into one VM.
	maxForwardConns = 1024
	maxForwardPeers = 256 // senders of one UDP forward; the rest is dropped
	guestTimeout    = 10 * time.Second
)

// A Forward is a port of the host that leads to one of the guest's.
type Forward struct {
	Proto string         `json:"proto"` // tcp or udp
	Host  netip.AddrPort `json:"host"`
	Guest uint16         `json:"guest"`
}

// ParseForward reads what -p takes: [IP:]HOST:GUEST[/udp]. Without an address
// it is 127.0.0.1. HOST 0 is a port that is free.
func ParseForward(text string) (Forward, error) {
	bad := func(reason string) (Forward, error) {
		return Forward{}, banger.Errorf(banger.CodeUsage, "port %q: %s", text, reason).
			WithHint("-p takes [IP:]HOST:GUEST[/tcp|/udp], for example 8080:80 or [::1]:5353:53/udp")
	}
	f := Forward{Proto: "tcp"}
	rest := text
	if before, proto, ok := strings.Cut(text, "/"); ok {
		if proto != "tcp" && proto != "udp" {
			return bad("it is neither tcp nor udp")
		}
		rest, f.Proto = before, proto
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return bad("there is no colon")
	}
	guest, err := parsePort(rest[i+1:])
	if err != nil {
		return bad(err.Error())
	}
	f.Guest = guest
	address, port := "127.0.0.1", rest[:i]
	if j := strings.LastIndexByte(port, ':'); j >= 0 {
		address, port = port[:j], port[j+1:]
		if inside, ok := strings.CutPrefix(address, "["); ok {
			if address, ok = strings.CutSuffix(inside, "]"); !ok {
				return bad("there is no ]")
			}
		} else if strings.Contains(address, ":") {
			return bad("an IPv6 address stands in brackets")
		}
	}
	addr, err := netip.ParseAddr(address)
	if err != nil || addr.Zone() != "" {
		return bad(fmt.Sprintf("%q is no address", address))
	}
	var host uint16
	if port != "0" {
		if host, err = parsePort(port); err != nil {
			return bad(err.Error())
		}
	}
	f.Host = netip.AddrPortFrom(addr.Unmap(), host)
	return f, nil
}

// String is the form that ParseForward reads.
func (f Forward) String() string {
	text := f.Host.String() + ":" + strconv.Itoa(int(f.Guest))
	if f.Proto == "udp" {
		text += "/udp"
	}
	return text
}

// same says whether two forwards take the same port of the host.
func (f Forward) same(g Forward) bool { return f.Proto == g.Proto && f.Host == g.Host }

// A forwarding is a Forward at work.
type forwarding struct {
	Forward
	stop func() // closes the socket and waits; established connections live on
}

// Forward opens a port of the host and returns what was opened: HOST 0 became
// a number. A port in use is a *banger.Error with CodeConflict that names who
// has it, where that can be seen.
func (n *Network) Forward(f Forward) (Forward, error) {
	n.forwardMu.Lock()
	defer n.forwardMu.Unlock()
	if n.closed() {
		return f, net.ErrClosed
	}
	if len(n.forwards) >= MaxForwards {
		return f, banger.Errorf(banger.CodeUsage, "port %v: the VM has %d ports already", f, MaxForwards)
	}
	for _, g := range n.forwards {
		if f.same(g.Forward) && f.Host.Port() != 0 {
			return f, banger.Errorf(banger.CodeConflict, "port %v: this VM has it already, for its port %d", f.Host, g.Guest)
		}
	}
	var out *forwarding
	var err error
	switch f.Proto {
	case "tcp":
		out, err = n.forwardTCP(f)
	case "udp":
		out, err = n.forwardUDP(f)
	default:
		return f, banger.Errorf(banger.CodeUsage, "port %v: %q is neither tcp nor udp", f, f.Proto)
	}
	if err != nil {
		return f, explainListen(f, err)
	}
	n.forwards = append(n.forwards, out)
	return out.Forward, nil
}

// Unforward closes a port that Forward opened.
func (n *Network) Unforward(f Forward) error {
	n.forwardMu.Lock()
	defer n.forwardMu.Unlock()
	i := slices.IndexFunc(n.forwards, func(g *forwarding) bool { return g.Forward == f })
	if i < 0 {
		return banger.Errorf(banger.CodeNotFound, "port %v: not forwarded", f)
	}
	n.forwards[i].stop()
	n.forwards = slices.Delete(n.forwards, i, i+1)
	return nil
}

// Forwards are the ports that are open.
func (n *Network) Forwards() []Forward {
	n.forwardMu.Lock()
	defer n.forwardMu.Unlock()
	out := make([]Forward, 0, len(n.forwards))
	for _, f := range n.forwards {
		out = append(out, f.Forward)
	}
	return out
}

func explainListen(f Forward, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		who := "another program"
		if name := portOwner(f); name != "" {
			who = name
		}
		return banger.Errorf(banger.CodeConflict, "port %v: %s has it", f.Host, who).
			WithHint("choose another port of the host, or end that program")
	case errors.Is(err, unix.EACCES):
		return banger.Errorf(banger.CodeUnavailable, "port %v: %w", f.Host, err).
			WithHint("ports below 1024 are root's; choose a higher one")
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return banger.Errorf(banger.CodeUnavailable, "port %v: the host has no such address", f.Host)
	}
	return banger.Errorf(banger.CodeUnavailable, "port %v: %w", f.Host, err)
}

func (n *Network) forwardTCP(f Forward) (*forwarding, error) {
	l, err := net.ListenTCP("tcp"+family(f.Host.Addr()), net.TCPAddrFromAddrPort(f.Host))
	if err != nil {
		return nil, err
	}
	f.Host = netip.AddrPortFrom(f.Host.Addr(), uint16(l.Addr().(*net.TCPAddr).Port))
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			host, err := l.AcceptTCP()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				time.Sleep(lingerTick) // out of descriptors, mostly
				continue
			}
			if n.inbound.Add(1) > maxForwardConns {
				n.inbound.Add(-1)
				host.Close()
				continue
			}
			go func() {
				defer n.inbound.Add(-1)
				n.relayInbound(host, f.Guest)
			}()
		}
	})
	return &forwarding{f, func() { l.Close(); accepting.Wait() }}, nil
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// relayInbound joins a connection from the host to a port of the guest.
func (n *Network) relayInbound(host *net.TCPConn, port uint16) {
	p := n.current()
	if p == nil || !p.begin() {
		_ = host.SetLinger(0)
		host.Close()
		return
	}
	defer p.work.Done()
	guest, err := p.dialGuest(p.ctx, port)
	if err != nil {
		_ = host.SetLinger(0) // a refusal there is a reset here
		host.Close()
		return
	}
	p.relay(guest, host)
}

// dialGuest connects to a port of the guest, over IPv4 and else over IPv6.
func (p *port) dialGuest(ctx context.Context, port uint16) (*guestConn, error) {
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	a := p.n.link.addr
	c, err := dialStack(ctx, p.stack, a.Gateway4, netip.AddrPortFrom(a.IPv4.Addr(), port))
	if err != nil && ctx.Err() == nil {
		c, err = dialStack(ctx, p.stack, a.Gateway6, netip.AddrPortFrom(a.IPv6.Addr(), port))
	}
	return c, err
}

// Join connects a connection of the host's, which it owns from then on, to a
// TCP port of the guest. It returns once the guest has accepted, or with the
// reason why not, unix.ECONNREFUSED among them; the connection is reset then.
// What the two say to each other passes from then on as through a Forward.
func (n *Network) Join(ctx context.Context, host *net.TCPConn, port uint16) (err error) {
	defer func() {
		if err != nil {
			_ = host.SetLinger(0)
			host.Close()
		}
	}()
	p := n.current()
	if p == nil || !p.begin() {
		return banger.Errorf(banger.CodeUnavailable, "network: the VM has no network card yet")
	}
	undo := func() { n.inbound.Add(-1); p.work.Done() }
	if n.inbound.Add(1) > maxForwardConns {
		undo()
		return banger.Errorf(banger.CodeUnavailable, "network: the VM has %d connections from the host already", maxForwardConns)
	}
	both, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.ctx, func() { cancel(context.Cause(p.ctx)) })()
	guest, err := p.dialGuest(both, port)
	if err != nil {
		undo()
		return err
	}
	go func() {
		defer undo()
		p.relay(guest, host)
	}()
	return nil
}

func (n *Network) forwardUDP(f Forward) (*forwarding, error) {
	c, err := net.ListenUDP("udp"+family(f.Host.Addr()), net.UDPAddrFromAddrPort(f.Host))
	if err != nil {
		return nil, err
	}
	f.Host = netip.AddrPortFrom(f.Host.Addr(), uint16(c.LocalAddr().(*net.UDPAddr).Port))
	u := &udpForward{n: n, conn: c, guest: f.Guest, senders: make(map[netip.AddrPort]*udpFlow)}
	var reading sync.WaitGroup
	reading.Go(u.serve)
	return &forwarding{f, func() { c.Close(); reading.Wait() }}, nil
}

// A udpForward gives each sender a flow of its own to the guest.
type udpForward struct {
	n     *Network
	conn  *net.UDPConn
	guest uint16

	mu      sync.Mutex
	senders map[netip.AddrPort]*udpFlow
}

// serve reads datagrams until the socket is closed, and ends the flows then.
func (u *udpForward) serve() {
	buf := make([]byte, maxDatagramBytes)
	var flows sync.WaitGroup
	for {
		size, from, err := u.conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			continue // an earlier answer was refused
		}
		u.mu.Lock()
		f := u.senders[from]
		if f == nil && len(u.senders) < maxForwardPeers {
			f = u.open(from, &flows)
		}
		u.mu.Unlock()
		if f != nil {
			f.touch()
			_ = f.guest.write(buf[:size])
		}
	}
	u.mu.Lock()
	for _, f := range u.senders {
		f.guest.close()
	}
	u.mu.Unlock()
	flows.Wait()
}

// open begins a flow from a sender; nil if the guest is not there. The caller
// holds mu.
func (u *udpForward) open(from netip.AddrPort, flows *sync.WaitGroup) *udpFlow {
	p := u.n.current()
	if p == nil || !p.begin() {
		return nil
	}
	a := p.n.link.addr
	src, dst := a.Gateway4, a.IPv4.Addr()
	if !u.conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap().Is4() {
		src, dst = a.Gateway6, a.IPv6.Addr()
	}
	wq := new(waiter.Queue)
	ep, terr := p.stack.NewEndpoint(udp.ProtocolNumber, protocolOf(dst), wq)
	if terr == nil {
		if terr = ep.Bind(tcpip.FullAddress{Addr: toStack(src)}); terr == nil {
			terr = ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: toStack(dst), Port: u.guest})
		}
		if terr != nil {
			ep.Close()
		}
	}
	if terr != nil {
		p.work.Done()
		return nil
	}
	f := &udpFlow{guest: newGuestDatagrams(wq, ep)}
	f.touch()
	u.senders[from] = f
	flows.Go(func() {
		defer p.work.Done()
		stop := context.AfterFunc(p.ctx, f.guest.close)
		defer stop()
		f.copyDatagrams(udpSender{u.conn, from}, f.guest)
		u.mu.Lock()
		delete(u.senders, from)
		u.mu.Unlock()
	})
	return f
}

// A udpSender is one that a forward's answers go to.
type udpSender struct {
	conn *net.UDPConn
	to   netip.AddrPort
}

func (s udpSender) write(b []byte) error {
	_, err := s.conn.WriteToUDPAddrPort(b, s.to)
	return err
}

const (
	maxProcNetBytes = 8 << 20
	maxProcFDs      = 100_000 // looked at
)

// portOwner names the process that has a port of the host, as far as this user
// can see: proc_net(5) has the inode of each socket, /proc/PID/fd who has it.
func portOwner(f Forward) string {
	for _, six := range []string{"", "6"} {
		data, err := readBounded("/proc/thread-self/net/"+f.Proto+six, maxProcNetBytes)
		if err != nil {
			continue
		}
		for _, inode := range socketInodes(string(data), f.Proto, f.Host) {
			if name := socketOwner(inode); name != "" {
				return name
			}
		}
	}
	return ""
}

// socketInodes finds the sockets that are in the way of an address.
func socketInodes(table, proto string, at netip.AddrPort) (out []string) {
	const listening = "0A"
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 10 || proto == "tcp" && f[3] != listening {
			continue
		}
		_, port, ok := strings.Cut(f[1], ":")
		if n, err := strconv.ParseUint(port, 16, 16); !ok || err != nil || uint16(n) != at.Port() {
			continue
		}
		out = append(out, f[9])
	}
	return out
}

func socketOwner(inode string) string {
	names, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, name := range names[:min(len(names), maxProcFDs)] {
		if target, err := os.Readlink(name); err == nil && target == "socket:["+inode+"]" {
			pid := strings.Split(name, "/")[2]
			comm, _ := readBounded("/proc/"+pid+"/comm", 64)
			return fmt.Sprintf("%q (process %s)", strings.TrimSpace(string(comm)), pid)
		}
	}
	return ""
}
