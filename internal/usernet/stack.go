package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	nicID = 1
	// timeWait is short: the other side is one guest on a wire that keeps
	// order, and a thousand short connections should not leave a thousand
	// endpoints for a minute.
	timeWait = time.Second
	finWait  = 20 * time.Second
	// maxConnecting bounds TCP connections that are being set up.
	maxConnecting = 256
)

// A wire is netstack's view of the guest: IP packets go out to it and come in
// from it. There is no link layer, so netstack keeps no neighbours and a guest
// cannot play with them.
type wire struct {
	mtu        uint32
	out        func(ipv6 bool, parts [][]byte)
	dispatcher stack.NetworkDispatcher // set once, before the first packet
}

func (w *wire) MTU() uint32                             { return w.mtu }
func (w *wire) SetMTU(uint32)                           {}
func (w *wire) MaxHeaderLength() uint16                 { return 0 }
func (w *wire) LinkAddress() tcpip.LinkAddress          { return "" }
func (w *wire) SetLinkAddress(tcpip.LinkAddress)        {}
func (w *wire) IsAttached() bool                        { return w.dispatcher != nil }
func (w *wire) Wait()                                   {}
func (w *wire) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (w *wire) AddHeader(*stack.PacketBuffer)           {}
func (w *wire) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (w *wire) Close()                                  {}
func (w *wire) SetOnCloseAction(func())                 {}
func (w *wire) Attach(d stack.NetworkDispatcher)        { w.dispatcher = d }
func (w *wire) Capabilities() stack.LinkEndpointCapabilities {
	// The wire is memory of this host.
	return stack.CapabilityRXChecksumOffload
}

// WritePackets never waits: the queue behind it is bounded and drops.
func (w *wire) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	for _, p := range list.AsSlice() {
		w.out(p.NetworkProtocolNumber == ipv6.ProtocolNumber, p.AsSlices())
	}
	return list.Len(), nil
}

// deliver hands a copy of an IP packet to the stack.
func (w *wire) deliver(ip []byte) {
	proto := tcpip.NetworkProtocolNumber(ipv4.ProtocolNumber)
	if ip[0]>>4 == 6 {
		proto = ipv6.ProtocolNumber
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(ip)})
	w.dispatcher.DeliverNetworkPacket(proto, p)
	p.DecRef()
}

// newStack makes a netstack that answers at the gateway's addresses and takes
// packets to every other one.
func newStack(l *link, w *wire) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	fail := func(what string, err tcpip.Error) (*stack.Stack, error) {
		s.Destroy()
		return nil, fmt.Errorf("network: %s: %s", what, err)
	}
	moderate, sack := tcpip.TCPModerateReceiveBufferOption(false), tcpip.TCPSACKEnabled(true)
	wait, linger := tcpip.TCPTimeWaitTimeoutOption(timeWait), tcpip.TCPLingerTimeoutOption(finWait)
	control := tcpip.CongestionControlOption("cubic")
	for _, option := range []tcpip.SettableTransportProtocolOption{
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: maxShareBytes, Max: maxShareBytes},
		&tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: maxShareBytes, Max: maxShareBytes},
		&moderate, &sack, &wait, &linger, &control,
	} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return fail("TCP", err)
		}
	}
	if err := s.CreateNIC(nicID, w); err != nil {
		return fail("interface", err)
	}
	for _, a := range []tcpip.ProtocolAddress{
		{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(l.addr.Gateway4), PrefixLen: 32}},
		{Protocol: ipv6.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(l.addr.Gateway6), PrefixLen: 128}},
	} {
		if err := s.AddProtocolAddress(nicID, a, stack.AddressProperties{}); err != nil {
			return fail("address", err)
		}
	}
	if err := s.SetPromiscuousMode(nicID, true); err != nil {
		return fail("interface", err)
	}
	if err := s.SetSpoofing(nicID, true); err != nil {
		return fail("interface", err)
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID}})
	return s, nil
}

func toStack(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func fromStack(a tcpip.Address, port uint16) netip.AddrPort {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(addr, port)
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// A guestConn is a TCP connection with the guest, whose endpoint stays within
// reach: gonet's own Close is always a polite one.
type guestConn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

func newGuestConn(wq *waiter.Queue, ep tcpip.Endpoint) *guestConn {
	ep.SocketOptions().SetDelayOption(false)
	return &guestConn{gonet.NewTCPConn(wq, ep), ep}
}

// segmentBytes is what netstack puts into a packet of the connection at most:
// it leaves room for all the options that TCP can have.
func (c *guestConn) segmentBytes(mtu int) int {
	const optionBytes = 40
	if to, ok := c.RemoteAddr().(*net.TCPAddr); ok && to.IP.To4() == nil {
		return mtu - ipv6Bytes - tcpBytes - optionBytes
	}
	return mtu - ipv4Bytes - tcpBytes - optionBytes
}

// resize sets both buffers.
func (c *guestConn) resize(bytes int) {
	c.ep.SocketOptions().SetReceiveBufferSize(int64(bytes), true)
	c.ep.SocketOptions().SetSendBufferSize(int64(bytes), true)
}

// unacknowledged is how many bytes the guest has not taken yet.
func (c *guestConn) unacknowledged() int {
	n, err := c.ep.GetSockOptInt(tcpip.SendQueueSizeOption)
	if err != nil {
		return 0
	}
	return n
}

// dialStack connects to the guest from the gateway's address.
func dialStack(ctx context.Context, s *stack.Stack, from netip.Addr, to netip.AddrPort) (*guestConn, error) {
	wq := new(waiter.Queue)
	ep, terr := s.NewEndpoint(tcp.ProtocolNumber, protocolOf(to.Addr()), wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	entry, writable := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr = ep.Bind(tcpip.FullAddress{Addr: toStack(from)})
	if terr == nil {
		terr = ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: toStack(to.Addr()), Port: to.Port()})
	}
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Abort()
			return nil, context.Cause(ctx)
		case <-writable:
		}
		terr = ep.LastError()
	}
	if terr != nil {
		ep.Abort()
		err := errors.New(terr.String())
		if _, refused := terr.(*tcpip.ErrConnectionRefused); refused {
			err = unix.ECONNREFUSED
		}
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	return newGuestConn(wq, ep), nil
}
