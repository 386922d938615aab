package usernet

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	maxTCPFlows = 4096 // of one VM
	maxUDPFlows = 512  // of one VM; the one unused for longest gives way
	dialTimeout = 30 * time.Second
	// udpIdle is RFC 4787's least but for DNS, which is not forwarded here.
	udpIdle = 2 * time.Minute
	// udpQueueBytes is what may wait for a UDP flow's goroutine.
	udpQueueBytes = 128 << 10
	// lingerTime is how long what was written may wait for a guest that does
	// not take it, after both sides have closed.
	lingerTime = 30 * time.Second
	lingerTick = 50 * time.Millisecond

	minPumpBytes = 4 << 10
	maxPumpBytes = 64 << 10

	maxDatagramBytes = 64 << 10
)

var errDenied = errors.New("network: not allowed")

func protoName(proto byte) string {
	switch proto {
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	}
	return "icmp"
}

func (p packet) destination() netip.AddrPort { return netip.AddrPortFrom(p.dst, p.port()) }

// decide says whether a flow may leave, and logs it if not. The address to
// dial is the one that was judged.
func (n *Network) decide(f flow) (netip.AddrPort, error) {
	addrs := meant(f.dst.Addr())
	for _, addr := range addrs {
		route, err := n.route(addr)
		if err != nil {
			return netip.AddrPort{}, err // without the kernel's word nothing leaves
		}
		names := n.answers.names(n.now(), addr)
		v := n.policy.judge(f, addr, kindOf(addr, route), names)
		if v.allow {
			continue
		}
		if !v.quiet {
			n.deny(Denial{Proto: f.proto, To: f.dst, Names: names, Reason: v.reason, Flag: v.flag})
		}
		return netip.AddrPort{}, errDenied
	}
	return netip.AddrPortFrom(addrs[0], f.dst.Port()), nil
}

// dial is the one way out to the host's network.
func (n *Network) dial(ctx context.Context, f flow) (net.Conn, error) {
	var d net.Dialer
	if f.dst.Addr() == n.link.addr.Gateway4 || f.dst.Addr() == n.link.addr.Gateway6 {
		if !slices.Contains(n.policy.HostPorts, f.dst.Port()) {
			n.deny(Denial{Proto: f.proto, To: f.dst, Names: []string{hostName + "." + Domain}, Reason: "a service of the host",
				Flag: "--allow-host " + strconv.Itoa(int(f.dst.Port()))})
			return nil, errDenied
		}
		var last error
		for _, loopback := range []string{"127.0.0.1", "::1"} {
			c, err := d.DialContext(ctx, f.proto, net.JoinHostPort(loopback, strconv.Itoa(int(f.dst.Port()))))
			if err == nil {
				return c, nil
			}
			last = err
		}
		return nil, last
	}
	to, err := n.decide(f)
	if err != nil {
		return nil, err
	}
	return d.DialContext(ctx, f.proto, to.String())
}

// acceptTCP handles a SYN, in a goroutine of its own. The guest's connection
// is accepted once the real one is: a refusal there is a refusal here.
func (p *port) acceptTCP(r *tcp.ForwarderRequest) {
	if !p.begin() {
		r.Complete(false)
		return
	}
	defer p.work.Done()
	if p.tcpFlows.Add(1) > maxTCPFlows {
		p.tcpFlows.Add(-1)
		p.n.refused.Add(1)
		r.Complete(true)
		return
	}
	defer p.tcpFlows.Add(-1)
	id := r.ID()
	ctx, cancel := context.WithTimeout(p.ctx, dialTimeout)
	defer cancel()
	host, err := p.n.dial(ctx, flow{"tcp", fromStack(id.LocalAddress, id.LocalPort)})
	if err != nil {
		r.Complete(true)
		return
	}
	wq := new(waiter.Queue)
	ep, terr := r.CreateEndpoint(wq)
	r.Complete(false)
	if terr != nil {
		host.Close()
		return
	}
	p.relay(newGuestConn(wq, ep), host.(*net.TCPConn))
}

// A half is what one side of a relayed connection can do.
type half interface {
	io.ReadWriter
	CloseWrite() error
}

// relay joins two connections until both directions have ended, and closes
// both. The end of one direction is passed on as such.
func (p *port) relay(guest *guestConn, host *net.TCPConn) {
	share := p.budget.take()
	defer p.budget.give(share)
	guest.resize(share)
	stop := context.AfterFunc(p.ctx, func() {
		guest.ep.Abort()
		_ = host.SetLinger(0)
		host.Close()
	})
	defer stop()
	limit := min(max(share/8, minPumpBytes), maxPumpBytes)
	broken := make(chan error, 2)
	go func() { broken <- pump(host, guest, limit) }()
	// Each write is sent at once: what is a little more than the guest's
	// packets hold would be one more of them.
	whole := limit
	if most := guest.segmentBytes(p.n.link.mtu); most < limit {
		whole -= limit % most
	}
	go func() { broken <- pump(guest, host, whole) }()
	err := <-broken
	if err != nil {
		// One side is gone: the other learns it as a reset.
		guest.ep.Abort()
		_ = host.SetLinger(0)
		host.Close()
		<-broken
		return
	}
	if <-broken != nil {
		guest.ep.Abort()
		_ = host.SetLinger(0)
	}
	host.Close()
	// The buffer is the flow's until the guest has taken what is in it.
	for began := time.Now(); guest.unacknowledged() > 0; time.Sleep(lingerTick) {
		if time.Since(began) > lingerTime || p.ctx.Err() != nil {
			guest.ep.Abort()
			return
		}
	}
	guest.Close()
}

// pump copies until the end of from, and then ends to. Its buffer grows with
// what comes.
func pump(to, from half, limit int) error {
	buf := make([]byte, minPumpBytes)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return to.CloseWrite()
		case err != nil:
			return err
		case n == len(buf) && len(buf) < limit:
			buf = make([]byte, min(2*len(buf), limit))
		}
	}
}

// A udpFlow is one pair of addresses that datagrams go between.
type udpFlow struct {
	guest *guestDatagrams
	host  *hostDatagrams // nil where the socket is the forward's, for all its senders
	used  atomic.Int64   // Unix nanoseconds
}

func (f *udpFlow) touch()     { f.used.Store(time.Now().UnixNano()) }
func (f *udpFlow) idle() bool { return time.Since(time.Unix(0, f.used.Load())) >= udpIdle }

func (f *udpFlow) close() {
	f.guest.close()
	if f.host != nil {
		f.host.close()
	}
}

// A datagramReader is where the datagrams of a flow come from. To wait without
// a buffer is what keeps hundreds of silent flows cheap.
type datagramReader interface {
	// wait returns nil when there is a datagram to read or the socket is at
	// its end, and os.ErrDeadlineExceeded after udpIdle.
	wait() error
	// read reads one without waiting; unix.EAGAIN if there is none after all.
	read(b []byte) (int, error)
}

// A datagramWriter is where they go.
type datagramWriter interface{ write(b []byte) error }

// datagrams are buffers for one datagram each, held only while there is one.
var datagrams = sync.Pool{New: func() any { b := make([]byte, maxDatagramBytes); return &b }}

// hostDatagrams is a connected socket of the host's.
type hostDatagrams struct{ conn *net.UDPConn }

func (h *hostDatagrams) wait() error {
	_ = h.conn.SetReadDeadline(time.Now().Add(udpIdle))
	raw, err := h.conn.SyscallConn()
	if err != nil {
		return err
	}
	var peeked error
	err = raw.Read(func(fd uintptr) bool {
		_, _, peeked = unix.Recvfrom(int(fd), nil, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return peeked != unix.EAGAIN
	})
	return cmp.Or(err, peeked)
}

func (h *hostDatagrams) read(b []byte) (int, error) { return h.conn.Read(b) }
func (h *hostDatagrams) write(b []byte) error       { _, err := h.conn.Write(b); return err }
func (h *hostDatagrams) close()                     { h.conn.Close() }

// guestDatagrams is a connected endpoint of the stack's.
type guestDatagrams struct {
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	once   sync.Once
	closed chan struct{}
}

func newGuestDatagrams(wq *waiter.Queue, ep tcpip.Endpoint) *guestDatagrams {
	ep.SocketOptions().SetReceiveBufferSize(udpQueueBytes, false)
	return &guestDatagrams{ep: ep, wq: wq, closed: make(chan struct{})}
}

func (g *guestDatagrams) wait() error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	g.wq.EventRegister(&entry)
	defer g.wq.EventUnregister(&entry)
	if g.ep.Readiness(waiter.ReadableEvents) != 0 {
		return nil
	}
	timer := time.NewTimer(udpIdle)
	defer timer.Stop()
	select {
	case <-ready:
		return nil
	case <-g.closed:
		return net.ErrClosed
	case <-timer.C:
		return os.ErrDeadlineExceeded
	}
}

func (g *guestDatagrams) read(b []byte) (int, error) {
	w := tcpip.SliceWriter(b)
	res, err := g.ep.Read(&w, tcpip.ReadOptions{})
	if _, ok := err.(*tcpip.ErrWouldBlock); ok {
		return 0, unix.EAGAIN
	}
	if err != nil {
		return 0, errors.New(err.String())
	}
	return res.Count, nil
}

func (g *guestDatagrams) write(b []byte) error {
	_, err := g.ep.Write(bytes.NewReader(b), tcpip.WriteOptions{})
	if err != nil {
		return errors.New(err.String())
	}
	return nil
}

func (g *guestDatagrams) close() {
	g.once.Do(func() {
		close(g.closed)
		g.ep.Close()
	})
}

// acceptUDP handles the first datagram of a flow. False makes the stack answer
// that the port cannot be reached.
func (p *port) acceptUDP(r *udp.ForwarderRequest) bool {
	id := r.ID()
	p.udpMu.Lock()
	defer p.udpMu.Unlock()
	if len(p.udp) >= maxUDPFlows {
		p.evictUDP()
	}
	// Connecting a datagram socket sends nothing and does not wait.
	host, err := p.n.dial(p.ctx, flow{"udp", fromStack(id.LocalAddress, id.LocalPort)})
	if err != nil {
		return false
	}
	wq := new(waiter.Queue)
	ep, terr := r.CreateEndpoint(wq)
	if terr != nil {
		host.Close()
		return true // another datagram was quicker
	}
	f := &udpFlow{guest: newGuestDatagrams(wq, ep), host: &hostDatagrams{host.(*net.UDPConn)}}
	if !p.begin() {
		f.close()
		return true
	}
	f.touch()
	p.udp[id] = f
	go func() {
		defer p.work.Done()
		p.relayDatagrams(f)
		p.udpMu.Lock()
		if p.udp[id] == f {
			delete(p.udp, id)
		}
		p.udpMu.Unlock()
	}()
	return true
}

// evictUDP makes room for one more. The caller holds udpMu.
func (p *port) evictUDP() {
	var oldest *udpFlow
	var at stack.TransportEndpointID
	for id, f := range p.udp {
		if oldest == nil || f.used.Load() < oldest.used.Load() {
			oldest, at = f, id
		}
	}
	delete(p.udp, at)
	oldest.close()
}

// relayDatagrams copies both ways until the flow is closed or idle.
func (p *port) relayDatagrams(f *udpFlow) {
	stop := context.AfterFunc(p.ctx, f.close)
	defer stop()
	var back sync.WaitGroup
	back.Go(func() { f.copyDatagrams(f.guest, f.host) })
	f.copyDatagrams(f.host, f.guest)
	back.Wait()
}

// copyDatagrams copies one way, and closes the flow.
func (f *udpFlow) copyDatagrams(to datagramWriter, from datagramReader) {
	defer f.close()
	for {
		err := from.wait()
		if errors.Is(err, os.ErrDeadlineExceeded) && !f.idle() {
			continue // the other direction is busy
		}
		if err != nil {
			return
		}
		buf := datagrams.Get().(*[]byte)
		size, err := from.read(*buf)
		if err == nil {
			// A datagram that does not fit the other side is lost, as on any way.
			_ = to.write((*buf)[:size])
			f.touch()
		}
		datagrams.Put(buf)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return
		}
	}
}

// listenDNS serves DNS at the gateway's addresses.
func (p *port) listenDNS() error {
	for _, addr := range []netip.Addr{p.n.link.addr.Gateway4, p.n.link.addr.Gateway6} {
		at := tcpip.FullAddress{NIC: nicID, Addr: toStack(addr), Port: dnsPort}
		u, err := gonet.DialUDP(p.stack, &at, nil, protocolOf(addr))
		if err != nil {
			return err
		}
		l, err := gonet.ListenTCP(p.stack, at, protocolOf(addr))
		if err != nil {
			return err
		}
		context.AfterFunc(p.ctx, func() { u.Close(); l.Close() })
		p.work.Go(func() { p.serveDNSDatagrams(u) })
		p.work.Go(func() { p.serveDNSStreams(l) })
	}
	return nil
}

func (p *port) serveDNSDatagrams(u *gonet.UDPConn) {
	buf := make([]byte, maxDNSBytes)
	for {
		size, from, err := u.ReadFrom(buf)
		if err != nil {
			return
		}
		select {
		case p.queries <- struct{}{}:
		default:
			continue // the guest asks again, and slower
		}
		message := slices.Clone(buf[:size])
		p.work.Go(func() {
			defer func() { <-p.queries }()
			if out := p.n.answerDNS(p.ctx, message, true); out != nil {
				_, _ = u.WriteTo(out, from)
			}
		})
	}
}

func (p *port) serveDNSStreams(l *gonet.TCPListener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		select {
		case p.dnsConns <- struct{}{}:
		default:
			c.Close()
			continue
		}
		p.work.Go(func() {
			defer func() { <-p.dnsConns }()
			p.n.serveDNSConn(p.ctx, c)
		})
	}
}
