package usernet

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// promptly is for what happens at once, on a busy machine.
const promptly = 10 * time.Second

// socketPair is what a driver shares with a VMM.
func socketPair(t testing.TB) (ours, theirs net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		if conns[i], err = fdConn(fd); err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

// A guest is another netstack at the other end of the port, with a link layer
// as real guests have it: it asks with ARP and NDP.
type guest struct {
	t     testing.TB
	n     *Network
	conn  net.Conn
	link  *channel.Endpoint
	stack *stack.Stack
	addr  Addresses

	writeMu sync.Mutex
	rawMu   sync.Mutex
	raw     chan []byte // frames to the guest, while somebody wants them
}

// newNetwork makes a network whose guest is VM number num.
func newNetwork(t testing.TB, name string, num int, policy string, change ...func(*Config)) *Network {
	t.Helper()
	p, err := ParsePolicy(policy)
	if err != nil {
		t.Fatal(err)
	}
	a, err := AddressesOf(num)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Name: name, Addresses: a, Policy: p, Resolver: refusingResolver{}}
	for _, f := range change {
		f(&cfg)
	}
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

type refusingResolver struct{}

func (refusingResolver) Exchange(context.Context, []byte) ([]byte, error) {
	return nil, fmt.Errorf("no resolver in this test")
}

// newGuest attaches a guest.
func newGuest(t testing.TB, n *Network) *guest {
	t.Helper()
	ours, theirs := socketPair(t)
	if err := n.Attach(ours); err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, n: n, conn: theirs, addr: n.link.addr}
	t.Cleanup(func() { theirs.Close() })
	g.link = channel.New(4096, uint32(n.link.mtu)+header.EthernetMinimumSize, tcpip.LinkAddress(g.addr.MAC[:]))
	g.link.LinkEPCapabilities = stack.CapabilityResolutionRequired
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	t.Cleanup(g.stack.Destroy)
	sack := tcpip.TCPSACKEnabled(true)
	g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	if err := g.stack.CreateNIC(1, ethernet.New(g.link)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []netip.Prefix{g.addr.IPv4, g.addr.IPv6} {
		a := tcpip.ProtocolAddress{Protocol: protocolOf(p.Addr()),
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(p.Addr()), PrefixLen: p.Bits()}}
		if err := g.stack.AddProtocolAddress(1, a, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	g.stack.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, Gateway: toStack(g.addr.Gateway4), NIC: 1},
		{Destination: header.IPv6EmptySubnet, Gateway: toStack(g.addr.Gateway6), NIC: 1},
	})
	go g.pumpOut()
	go g.pumpIn()
	return g
}

func (g *guest) pumpOut() {
	for {
		p := g.link.ReadContext(g.t.Context())
		if p == nil {
			return
		}
		v := p.ToView()
		g.send(v.AsSlice())
		v.Release()
		p.DecRef()
	}
}

// send puts a frame on the wire, whatever it holds.
func (g *guest) send(frame []byte) {
	g.writeMu.Lock()
	defer g.writeMu.Unlock()
	_ = g.conn.SetWriteDeadline(time.Now().Add(promptly))
	_, _ = g.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...))
}

func (g *guest) pumpIn() {
	for {
		var head [4]byte
		if _, err := io.ReadFull(g.conn, head[:]); err != nil {
			return
		}
		frame := make([]byte, binary.BigEndian.Uint32(head[:]))
		if _, err := io.ReadFull(g.conn, frame); err != nil {
			return
		}
		g.rawMu.Lock()
		if g.raw != nil {
			select {
			case g.raw <- frame:
			default:
			}
		}
		g.rawMu.Unlock()
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
		g.link.InjectInbound(0, p)
		p.DecRef()
	}
}

// listen collects frames to the guest from now on.
func (g *guest) listen() chan []byte {
	c := make(chan []byte, 1024)
	g.rawMu.Lock()
	g.raw = c
	g.rawMu.Unlock()
	return c
}

func (g *guest) dialContext(ctx context.Context, to string) (net.Conn, error) {
	a := netip.MustParseAddrPort(to)
	return gonet.DialContextTCP(ctx, g.stack, tcpip.FullAddress{NIC: 1, Addr: toStack(a.Addr()), Port: a.Port()}, protocolOf(a.Addr()))
}

// dial connects over TCP.
func (g *guest) dial(to string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(g.t.Context(), promptly)
	defer cancel()
	return g.dialContext(ctx, to)
}

func (g *guest) mustDial(to string) net.Conn {
	g.t.Helper()
	c, err := g.dial(to)
	if err != nil {
		g.t.Fatalf("%s: %v; the log: %+v", to, err, g.n.Log())
	}
	return c
}

func (g *guest) dialUDP(to string) net.Conn {
	g.t.Helper()
	a := netip.MustParseAddrPort(to)
	c, err := gonet.DialUDP(g.stack, nil, &tcpip.FullAddress{NIC: 1, Addr: toStack(a.Addr()), Port: a.Port()}, protocolOf(a.Addr()))
	if err != nil {
		g.t.Fatal(err)
	}
	return c
}

// askUDP sends a datagram and waits for an answer.
func (g *guest) askUDP(to, text string, wait time.Duration) (string, error) {
	g.t.Helper()
	c := g.dialUDP(to)
	defer c.Close()
	if _, err := c.Write([]byte(text)); err != nil {
		return "", err
	}
	_ = c.SetReadDeadline(time.Now().Add(wait))
	buf := make([]byte, 64<<10)
	n, err := c.Read(buf)
	return string(buf[:n]), err
}

// serve accepts TCP in the guest.
func (g *guest) serve(port uint16, f func(net.Conn)) {
	g.t.Helper()
	for _, a := range []netip.Addr{g.addr.IPv4.Addr(), g.addr.IPv6.Addr()} {
		l, err := gonet.ListenTCP(g.stack, tcpip.FullAddress{NIC: 1, Addr: toStack(a), Port: port}, protocolOf(a))
		if err != nil {
			g.t.Fatal(err)
		}
		g.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					f(c)
				}()
			}
		}()
	}
}

// serveUDP answers datagrams in the guest with "guest: " and themselves.
func (g *guest) serveUDP(port uint16) {
	g.t.Helper()
	for _, a := range []netip.Addr{g.addr.IPv4.Addr(), g.addr.IPv6.Addr()} {
		c, err := gonet.DialUDP(g.stack, &tcpip.FullAddress{NIC: 1, Addr: toStack(a), Port: port}, nil, protocolOf(a))
		if err != nil {
			g.t.Fatal(err)
		}
		g.t.Cleanup(func() { c.Close() })
		go func() {
			buf := make([]byte, 64<<10)
			for {
				n, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = c.WriteTo(append([]byte("guest: "), buf[:n]...), from)
			}
		}()
	}
}

// ping sends an echo request and waits for its answer: nil, or what came.
func (g *guest) ping(to string, wait time.Duration) error {
	g.t.Helper()
	a := netip.MustParseAddr(to)
	proto, kind := icmp.ProtocolNumber4, byte(icmpEcho)
	if a.Is6() {
		proto, kind = icmp.ProtocolNumber6, icmp6Echo
	}
	wq := new(waiter.Queue)
	ep, err := g.stack.NewEndpoint(proto, protocolOf(a), wq)
	if err != nil {
		g.t.Fatal(err)
	}
	defer ep.Close()
	if err := ep.Connect(tcpip.FullAddress{NIC: 1, Addr: toStack(a)}); err != nil {
		return fmt.Errorf("%s", err)
	}
	c := gonet.NewUDPConn(wq, ep)
	m := append([]byte{kind, 0, 0, 0, 0, 0, 0, 7}, "how far is it"...)
	if _, err := c.Write(m); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(wait))
	buf := make([]byte, 2048)
	n, rerr := c.Read(buf)
	if rerr != nil {
		return rerr
	}
	if string(buf[icmpBytes:n]) != "how far is it" {
		return fmt.Errorf("answered %q", buf[:n])
	}
	return nil
}

// lookup asks the gateway's DNS.
func (g *guest) lookup(name string, kind dnsmessage.Type) (dnsmessage.Message, error) {
	g.t.Helper()
	q := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 4711, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name + "."), Type: kind, Class: dnsmessage.ClassINET}},
	}
	b, err := q.Pack()
	if err != nil {
		g.t.Fatal(err)
	}
	text, err := g.askUDP(netip.AddrPortFrom(g.addr.Gateway4, dnsPort).String(), string(b), promptly)
	if err != nil {
		return dnsmessage.Message{}, err
	}
	var m dnsmessage.Message
	if err := m.Unpack([]byte(text)); err != nil {
		return m, err
	}
	if m.ID != 4711 {
		g.t.Errorf("%s: answered with id %d", name, m.ID)
	}
	return m, nil
}

func fdConn(fd int) (net.Conn, error) {
	f := newFile(fd)
	defer f.Close()
	return net.FileConn(f)
}

func newFile(fd int) *os.File { return os.NewFile(uintptr(fd), "socket") }
