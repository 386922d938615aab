package usernet

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const (
	// maxClaimBytes is the longest frame that a VMM passes on (QEMU's
	// NET_BUFSIZE). One that claims more has lost its place in the stream.
	maxClaimBytes = 68<<10 + 1<<10
	// readBytes holds any frame, or many small ones.
	readBytes = 256 << 10
)

// A port is one connection to a VMM and everything that lives no longer than
// it: the stack with its flows. A guest that starts again finds nothing of its
// former self.
//
//	VMM -> read loop -> link.inspect -> reply ---------------------> queue
//	                                 -> stack -> flows -> the host    |
//	                                 -> ping, other VMs               |
//	VMM <- write loop <---------------------------------------------- queue
//
// The read loop is one goroutine and does its work itself, so a guest that
// floods slows itself down. Whatever is sent to the guest is queued, and
// dropped when the guest does not take it.
type port struct {
	n     *Network
	conn  net.Conn
	queue *sendQueue
	acks  *ackHolder
	wire  *wire
	stack *stack.Stack

	ctx  context.Context // ends with the port
	stop context.CancelCauseFunc
	done chan struct{} // closed when nothing of the port runs

	budget   budget
	tcpFlows atomic.Int64
	beginMu  sync.Mutex     // begin against the end
	work     sync.WaitGroup // flows and servers

	udpMu sync.Mutex
	udp   map[stack.TransportEndpointID]*udpFlow

	pingMu sync.Mutex
	pings  map[pingKey]*ping

	queries  chan struct{} // one token for each DNS query under way
	dnsConns chan struct{}
}

// newPort starts to serve conn, which it owns from then on, also when it fails.
func newPort(n *Network, conn net.Conn) (*port, error) {
	p := &port{
		n: n, conn: conn, queue: newSendQueue(), done: make(chan struct{}),
		udp: make(map[stack.TransportEndpointID]*udpFlow), pings: make(map[pingKey]*ping),
		queries: make(chan struct{}, maxDNSQueries), dnsConns: make(chan struct{}, maxDNSConns),
	}
	p.ctx, p.stop = context.WithCancelCause(context.Background())
	p.acks = newAckHolder(p.sendFrame)
	p.wire = &wire{mtu: uint32(n.link.mtu), out: p.send}
	var err error
	if p.stack, err = newStack(n.link, p.wire); err != nil {
		conn.Close()
		return nil, err
	}
	p.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(p.stack, maxShareBytes, maxConnecting, p.acceptTCP).HandlePacket)
	p.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(p.stack, p.acceptUDP).HandlePacket)
	if err := p.listenDNS(); err != nil {
		p.stack.Destroy()
		conn.Close()
		return nil, err
	}
	var loops sync.WaitGroup
	loops.Go(func() {
		err := p.read()
		p.stop(err)
		p.queue.close()
		conn.Close()
	})
	loops.Go(func() {
		if err := p.queue.writeTo(conn); err != nil {
			p.stop(err)
			conn.Close()
		}
	})
	go func() {
		loops.Wait()
		p.beginMu.Lock()
		p.stop(net.ErrClosed)
		p.beginMu.Unlock()
		p.stack.Close() // aborts every endpoint, so that flows end
		p.work.Wait()
		p.stack.Destroy()
		n.detached(p)
		close(p.done)
	}()
	return p, nil
}

// begin counts one more piece of work of the port, unless the port has ended.
// The caller calls work.Done.
func (p *port) begin() bool {
	p.beginMu.Lock()
	defer p.beginMu.Unlock()
	if p.ctx.Err() != nil {
		return false
	}
	p.work.Add(1)
	return true
}

func (p *port) close() {
	p.stop(net.ErrClosed)
	p.queue.close()
	p.conn.Close()
	<-p.done
}

// errClaim ends a port whose VMM claims a frame of impossible length.
var errClaim = errors.New("network: the VMM sends no frames")

// read takes frames from the VMM until it goes.
func (p *port) read() error {
	r := bufio.NewReaderSize(p.conn, readBytes)
	for {
		head, err := r.Peek(4)
		if err != nil {
			return err
		}
		size := binary.BigEndian.Uint32(head)
		if size > maxClaimBytes {
			return fmt.Errorf("%w: a length of %d", errClaim, size)
		}
		_, _ = r.Discard(4)
		frame, err := r.Peek(int(size))
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		p.handle(frame)
		_, _ = r.Discard(int(size))
	}
}

// handle does what is to be done with one frame, which is the reader's again
// when it returns.
func (p *port) handle(frame []byte) {
	p.n.received.Add(1)
	s := p.n.link.inspect(frame)
	switch s.action {
	case actDrop:
		p.n.dropped[s.drop].Add(1)
		switch s.drop {
		case dropSpoofed:
			p.n.deny(Denial{Proto: "spoof", From: s.packet.src, Reason: "a source address that is not this VM's"})
		case dropNowhere:
			if s.packet.src == p.n.link.addr.IPv4.Addr() || s.packet.src == p.n.link.addr.IPv6.Addr() {
				p.n.decide(flow{protoName(s.packet.proto), s.packet.destination()})
			}
		}
	case actReply:
		p.sendFrame(s.reply)
	case actDeliver:
		p.wire.deliver(s.packet.ip)
	case actEcho:
		p.relayPing(s.packet)
	case actPeer:
		p.n.toPeer(p, s.packet)
	}
}

// send queues an IP packet for the guest.
func (p *port) send(ipv6 bool, parts [][]byte) {
	var head [ethernetBytes]byte
	copy(head[:], p.n.link.addr.MAC[:])
	copy(head[6:], gatewayMAC[:])
	binary.BigEndian.PutUint16(head[12:], etherIPv4)
	if ipv6 {
		binary.BigEndian.PutUint16(head[12:], etherIPv6)
	}
	all := make([][]byte, 0, 8)
	all = append(append(all, head[:]), parts...)
	p.acks.send(all...)
}

func (p *port) sendFrame(parts ...[]byte) {
	if !p.queue.add(parts...) {
		p.n.dropped[dropFull].Add(1)
		return
	}
	p.n.sent.Add(1)
}

// sendPacket queues an IP packet that we made ourselves.
func (p *port) sendPacket(ip []byte) { p.send(ip[0]>>4 == 6, [][]byte{ip}) }
