package usernet

import (
	"encoding/binary"
	"sync"
	"time"
)

// ackDelay is how long an acknowledgement waits for something to travel with.
// RFC 9293 3.8.6.3 lets it wait for 500 ms; here a server of this host has
// answered by then, and nobody else notices.
const ackDelay = 300 * time.Microsecond

// An ackHolder keeps bare acknowledgements from the guest for a moment.
// Netstack acknowledges what a guest sends at once, and the answer, which would
// have said the same, comes right behind it: two packets for one, each an
// interrupt in a guest. One acknowledgement is held at a time:
//
//	none ── bare ACK ──▶ held ── the flow's next packet acknowledges more,
//	 ▲                    │      or as much and carries something: it is dropped
//	 └────────────────────┤
//	                      ├── another flow's packet: it goes first
//	                      ├── the same once more (the guest must see each
//	                      │   duplicate, RFC 5681 3.2): both go
//	                      └── ackDelay later: it goes
//
// An acknowledgement that takes the place of another has the rest of its time.
type ackHolder struct {
	out func(parts ...[]byte) // sends a frame

	mu    sync.Mutex
	held  []byte // a frame; empty if there is none
	tcp   tcpHead
	timer *time.Timer
}

func newAckHolder(out func(parts ...[]byte)) *ackHolder {
	a := &ackHolder{out: out}
	a.timer = time.AfterFunc(time.Hour, a.flush)
	a.timer.Stop()
	return a
}

// send takes a frame of head and an IP packet, in parts.
func (a *ackHolder) send(frame ...[]byte) {
	t, ok := tcpHeadOf(frame[1:])
	a.mu.Lock()
	defer a.mu.Unlock()
	again := false
	if len(a.held) > 0 {
		same := ok && t.flow == a.tcp.flow && t.flags&tcpACK != 0
		more := int32(t.ack - a.tcp.ack)
		switch {
		case same && more > 0 && t.bare:
			a.hold(t, frame)
			return
		case same && (more > 0 || more == 0 && !t.bare):
			a.drop()
		default:
			again = same
			a.out(a.held)
			a.drop()
		}
	}
	if t.bare && !again {
		a.hold(t, frame)
		a.timer.Reset(ackDelay)
		return
	}
	a.out(frame...)
}

func (a *ackHolder) hold(t tcpHead, frame [][]byte) {
	a.tcp, a.held = t, a.held[:0]
	for _, part := range frame {
		a.held = append(a.held, part...)
	}
}

func (a *ackHolder) drop() {
	a.held = a.held[:0]
	a.timer.Stop() // or it would wake somebody for nothing
}

// flush sends what is held. It may come late, and then to another one, which
// goes early.
func (a *ackHolder) flush() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.held) > 0 {
		a.out(a.held)
		a.drop()
	}
}

const (
	tcpBytes = 20
	tcpACK   = 0x10
	// maxBareBytes is a TCP header with timestamps. What is longer tells of
	// holes (SACK).
	maxBareBytes = tcpBytes + 12
)

// tcpHead is what the holder knows of a packet of netstack's own making.
type tcpHead struct {
	flow  [36]byte // addresses and ports
	ack   uint32
	flags byte
	bare  bool // nothing but an acknowledgement
}

// tcpHeadOf reads the headers of an IP packet, if it is of TCP.
func tcpHeadOf(ip [][]byte) (t tcpHead, ok bool) {
	var b [ipv6Bytes + maxBareBytes]byte
	n, size := 0, 0
	for _, part := range ip {
		n += copy(b[n:], part)
		size += len(part)
	}
	at, proto := ipv4Bytes, b[9]
	if b[0]>>4 == 6 {
		at, proto = ipv6Bytes, b[6]
		copy(t.flow[:], b[8:40])
	} else {
		copy(t.flow[:], b[12:20])
	}
	if proto != protoTCP || b[0] != 0x45 && b[0]>>4 != 6 {
		return t, false
	}
	tcp := b[at:]
	copy(t.flow[32:], tcp[:4])
	t.ack = binary.BigEndian.Uint32(tcp[8:])
	t.flags = tcp[13]
	t.bare = t.flags == tcpACK && size <= at+maxBareBytes && size == at+int(tcp[12]>>4)*4
	return t, true
}
