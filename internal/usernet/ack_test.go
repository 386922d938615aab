package usernet

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// tcpPacket is an IP packet with a TCP header of so many bytes of options.
func tcpPacket(from, to netip.AddrPort, ack uint32, flags byte, options, size int) []byte {
	b := make([]byte, tcpBytes+options+size)
	binary.BigEndian.PutUint16(b, from.Port())
	binary.BigEndian.PutUint16(b[2:], to.Port())
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = byte(tcpBytes+options)/4<<4, flags
	return ipPacket(from.Addr(), to.Addr(), protoTCP, defaultTTL, b)
}

// in splits a packet as netstack gives it: headers and payload.
func in(packet []byte, sizes ...int) [][]byte {
	parts := [][]byte{[]byte("ethernet head!")}
	for _, n := range sizes {
		n = min(n, len(packet))
		parts, packet = append(parts, packet[:n]), packet[n:]
	}
	return append(parts, packet)
}

// wireOf is a holder and what came out of it, as one string a frame.
func wireOf() (*ackHolder, func() []string) {
	var mu sync.Mutex
	var sent []string
	a := newAckHolder(func(parts ...[]byte) {
		mu.Lock()
		defer mu.Unlock()
		frame := ""
		for _, p := range parts {
			frame += string(p)
		}
		sent = append(sent, frame)
	})
	return a, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(sent)
	}
}

func TestAcks(t *testing.T) {
	const fin, syn, rst, psh = 1, 2, 4, 8
	server, guest := netip.MustParseAddrPort("203.0.113.9:80"), netip.MustParseAddrPort("10.0.0.2:4000")
	other := netip.MustParseAddrPort("203.0.113.9:81")
	server6, guest6 := netip.MustParseAddrPort("[2001:db8::9]:80"), netip.MustParseAddrPort("[fd00::2]:4000")
	ack := func(n uint32) []byte { return tcpPacket(server, guest, n, tcpACK, 12, 0) }
	data := func(n uint32) []byte { return tcpPacket(server, guest, n, tcpACK|psh, 12, 1) }
	udp := udpPacket(server.Addr(), guest.Addr(), 20)
	for _, row := range []struct {
		name  string
		in    [][]byte
		out   []int // of in
		later []int // and when the time is up
	}{
		{"alone", [][]byte{ack(1)}, nil, []int{0}},
		{"without options", [][]byte{tcpPacket(server, guest, 1, tcpACK, 0, 0)}, nil, []int{0}},
		{"with more than timestamps", [][]byte{tcpPacket(server, guest, 1, tcpACK, 16, 0)}, []int{0}, nil},
		{"over IPv6", [][]byte{tcpPacket(server6, guest6, 1, tcpACK, 12, 0), tcpPacket(server6, guest6, 1, tcpACK, 12, 1)}, []int{1}, nil},
		{"over IPv6, with more than timestamps", [][]byte{tcpPacket(server6, guest6, 1, tcpACK, 16, 0)}, []int{0}, nil},
		{"then the answer", [][]byte{ack(1), data(1)}, []int{1}, nil},
		{"then an answer that acknowledges more", [][]byte{ack(1), data(2)}, []int{1}, nil},
		{"then an answer that acknowledges less", [][]byte{ack(2), data(1)}, []int{0, 1}, nil},
		{"then more of it", [][]byte{ack(1), ack(2)}, nil, []int{1}},
		{"more of it, past 2^32", [][]byte{ack(1<<32 - 1), ack(0)}, nil, []int{1}},
		{"less of it, past 2^32", [][]byte{ack(0), ack(1<<32 - 1)}, []int{0, 1}, nil},
		{"the same again", [][]byte{ack(1), ack(1)}, []int{0, 1}, nil},
		{"three times the same", [][]byte{ack(1), ack(1), ack(1)}, []int{0, 1}, []int{2}},
		{"then less", [][]byte{ack(2), ack(1)}, []int{0, 1}, nil},
		{"then a hole", [][]byte{ack(1), tcpPacket(server, guest, 1, tcpACK, 24, 0)}, []int{1}, nil},
		{"then the end", [][]byte{ack(1), tcpPacket(server, guest, 1, tcpACK|fin, 12, 0)}, []int{1}, nil},
		{"then a reset", [][]byte{ack(1), tcpPacket(server, guest, 1, tcpACK|rst, 0, 0)}, []int{1}, nil},
		{"then a reset that acknowledges nothing", [][]byte{ack(1), tcpPacket(server, guest, 5, rst, 0, 0)}, []int{0, 1}, nil},
		{"a handshake", [][]byte{tcpPacket(server, guest, 1, tcpACK|syn, 12, 0)}, []int{0}, nil},
		{"then another connection", [][]byte{ack(1), tcpPacket(other, guest, 9, tcpACK, 12, 1)}, []int{0, 1}, nil},
		{"then another's acknowledgement", [][]byte{ack(1), tcpPacket(other, guest, 9, tcpACK, 12, 0)}, []int{0}, []int{1}},
		{"then another server's", [][]byte{ack(1), tcpPacket(netip.MustParseAddrPort("203.0.113.8:80"), guest, 1, tcpACK, 12, 1)}, []int{0, 1}, nil},
		{"then another server's over IPv6", [][]byte{tcpPacket(server6, guest6, 1, tcpACK, 12, 0), tcpPacket(netip.MustParseAddrPort("[2001:db8::8]:80"), guest6, 1, tcpACK, 12, 1)}, []int{0, 1}, nil},
		{"data without a push", [][]byte{tcpPacket(server, guest, 1, tcpACK, 0, 5)}, []int{0}, nil},
		{"then the other way round", [][]byte{ack(1), tcpPacket(guest, server, 9, tcpACK, 12, 1)}, []int{0, 1}, nil},
		{"then a datagram", [][]byte{ack(1), udp}, []int{0, 1}, nil},
		{"a datagram", [][]byte{udp}, []int{0}, nil},
		{"nothing of a packet", [][]byte{{}, {0x45}, {0x60}, make([]byte, ipv4Bytes+tcpBytes-1)}, []int{0, 1, 2, 3}, nil},
		{"a fragment's header", [][]byte{ack(1)[:ipv4Bytes+tcpBytes-1]}, []int{0}, nil},
	} {
		for _, sizes := range [][]int{nil, {20, 32}, {40, 32}, {52}, {1, 1, 1}} {
			synctest.Test(t, func(t *testing.T) { // no time passes but by sleeping
				a, sent := wireOf()
				var frames []string
				for _, packet := range row.in {
					frames = append(frames, "ethernet head!"+string(packet))
					a.send(in(packet, sizes...)...)
				}
				check := func(when string, numbers ...int) {
					t.Helper()
					var want []string
					for _, n := range numbers {
						want = append(want, frames[n])
					}
					if got := sent(); !slices.Equal(got, want) {
						t.Errorf("%s, in parts of %v, %s: %d frames %x, want %v", row.name, sizes, when, len(got), got, numbers)
					}
				}
				check("at once", row.out...)
				time.Sleep(ackDelay - 1)
				synctest.Wait()
				check("just before the end", row.out...)
				time.Sleep(1)
				synctest.Wait()
				check("in the end", slices.Concat(row.out, row.later)...)
			})
		}
	}
}

// TestAckDelay holds that an acknowledgement does not wait longer because
// others take its place.
func TestAckDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, to := netip.MustParseAddrPort("203.0.113.9:80"), netip.MustParseAddrPort("10.0.0.2:4000")
		a, sent := wireOf()
		began := time.Now()
		for n := uint32(0); len(sent()) == 0; n++ {
			a.send(in(tcpPacket(from, to, n, tcpACK, 12, 0))...)
			time.Sleep(ackDelay / 7)
			synctest.Wait()
		}
		if took := time.Since(began); took < ackDelay || took > ackDelay*8/7 {
			t.Errorf("the first went after %v", took)
		}
		// And one that is held after another was dropped has all of its time.
		a.flush()
		a.send(in(tcpPacket(from, to, 100, tcpACK, 12, 0))...)
		time.Sleep(ackDelay / 2)
		a.send(in(tcpPacket(from, to, 100, tcpACK, 12, 1))...)
		before := len(sent())
		a.send(in(tcpPacket(from, to, 101, tcpACK, 12, 0))...)
		time.Sleep(ackDelay - 1)
		synctest.Wait()
		if n := len(sent()) - before; n != 0 {
			t.Errorf("%d frames before its time", n)
		}
		time.Sleep(1)
		synctest.Wait()
		if n := len(sent()) - before; n != 1 {
			t.Errorf("%d frames at its time", n)
		}
	})
}

// TestAcksRandom holds that of all that comes nothing is missing but bare
// acknowledgements that the next packet of their flow makes needless, and that
// what is left is in order.
func TestAcksRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	guest := netip.MustParseAddrPort("10.0.0.2:4000")
	dropped := 0
	for range 2000 {
		a, sent := wireOf()
		type packet struct {
			flow  uint16
			ack   uint32
			bare  bool
			frame string
		}
		var all []packet
		acks := []uint32{0, 1<<32 - 2, 7}
		for n := range 1 + r.IntN(30) {
			p := packet{flow: uint16(r.IntN(3)), bare: r.IntN(3) > 0}
			acks[p.flow] += uint32(r.IntN(3))
			p.ack = acks[p.flow]
			size := 0
			if !p.bare {
				size = 1 + r.IntN(9)
			}
			b := tcpPacket(netip.AddrPortFrom(netip.MustParseAddr("203.0.113.9"), p.flow), guest, p.ack, tcpACK, 12, size)
			binary.BigEndian.PutUint16(b[4:], uint16(n)) // no two are the same
			p.frame = "ethernet head!" + string(b)
			all = append(all, p)
			a.send(in(b, 52)...)
			if r.IntN(5) == 0 {
				a.flush()
			}
		}
		a.flush()
		out := sent()
		for i, p := range all {
			if len(out) > 0 && out[0] == p.frame {
				out = out[1:]
				continue
			}
			dropped++
			next := slices.IndexFunc(all[i+1:], func(q packet) bool { return q.flow == p.flow })
			if !p.bare || next < 0 {
				t.Fatalf("packet %d of %d is missing or out of order", i, len(all))
			}
			if q := all[i+1+next]; int32(q.ack-p.ack) < 0 || q.ack == p.ack && q.bare {
				t.Fatalf("packet %d of %d is missing, and %d says less or the same", i, len(all), i+1+next)
			}
		}
		if len(out) > 0 {
			t.Fatalf("%d frames more than came", len(out))
		}
	}
	if dropped == 0 {
		t.Error("none was dropped")
	}
	t.Logf("%d dropped", dropped)
}
