package vm

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/internal/vmm/vmmtest"
	"banger/internal/wire"
)

func TestListeners(t *testing.T) {
	setLimits(t)
	var answer func(conn net.Conn)
	v, _ := started(t, agent{raw: func(_ *vmmtest.FakeGuest, conn net.Conn, req wire.Request) bool {
		if req.Op == wire.OpSockets {
			answer(conn)
		}
		return req.Op == wire.OpSockets
	}}, vmmtest.Options{})
	list := func(sockets ...wire.Socket) func(net.Conn) {
		return func(conn net.Conn) {
			wire.WriteMessage(conn, wire.Reply{Version: wire.Version, Sockets: &wire.Sockets{List: sockets}})
		}
	}
	says := func(text string) func(net.Conn) { return func(conn net.Conn) { conn.Write([]byte(message(text))) } }
	at := netip.MustParseAddrPort
	good := wire.Socket{Proto: "tcp", Local: at("0.0.0.0:80"), PID: 9, Process: "web"}

	answer = list(good, wire.Socket{Proto: "udp", Local: at("[::]:53")}, wire.Socket{Proto: "tcp", Local: at("[::ffff:127.0.0.1]:1"), PID: 1, Process: strings.Repeat("\x1b\u00e9", 40)},
		wire.Socket{Proto: "tcp", Local: at("0.0.0.0:80"), PID: 8, Process: "web"}, wire.Socket{Proto: "tcp", Local: at("0.0.0.0:80"), PID: 8, Process: "other"})
	got, more, err := v.Listeners(t.Context())
	want := []banger.Listener{
		{Protocol: "tcp", Addr: netip.MustParseAddr("127.0.0.1"), Port: 1, PID: 1, Process: strings.Repeat("\x1b\u00e9", 21) + "\x1b"},
		{Protocol: "tcp", Addr: netip.IPv4Unspecified(), Port: 80, PID: 8, Process: "other"},
		{Protocol: "tcp", Addr: netip.IPv4Unspecified(), Port: 80, PID: 8, Process: "web"},
		{Protocol: "udp", Addr: netip.IPv6Unspecified(), Port: 53},
	}
	if err != nil || more || !slices.Equal(got, want) {
		t.Errorf("%+v, %v, %v", got, more, err)
	}
	answer = list()
	if got, more, err := v.Listeners(t.Context()); err != nil || more || got == nil || len(got) != 0 {
		t.Errorf("nobody: %+v, %v, %v", got, more, err)
	}
	for n, wantMore := range map[int]bool{wire.MaxSockets: false, wire.MaxSockets + 1: true, 8000: true} {
		var many []wire.Socket
		for i := range n {
			many = append(many, wire.Socket{Proto: "tcp", Local: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(i+1))})
		}
		answer = list(many...)
		if got, more, err := v.Listeners(t.Context()); err != nil || more != wantMore || len(got) != min(n, wire.MaxSockets) {
			t.Errorf("%d: %d, more: %v, %v", n, len(got), more, err)
		}
	}
	for what, f := range map[string]func(net.Conn){
		"another protocol": list(good, wire.Socket{Proto: "\x1b", Local: at("0.0.0.0:80")}),
		"no port":          list(wire.Socket{Proto: "tcp", Local: at("0.0.0.0:0")}),
		"no address":       list(wire.Socket{Proto: "tcp"}),
		"a zone":           list(wire.Socket{Proto: "tcp", Local: at("[fe80::1%\x1b]:80")}),
		"no process":       list(wire.Socket{Proto: "tcp", Local: at("0.0.0.0:80"), PID: -1}),
		"no list":          says(`{"version":1}`),
		"a port too large": says(`{"version":1,"sockets":{"list":[{"proto":"tcp","local":"0.0.0.0:65536"}]}}`),
		"no JSON":          says(`{"version":1,"sockets":{"list":[{`),
		"a refusal":        says(`{"version":1,"error":{"code":"invalid","message":"request \"sockets\": not known"}}`),
		"too long":         func(conn net.Conn) { conn.Write([]byte("\xff\xff\xff\xff")) },
		"nothing":          func(net.Conn) {},
		"silence":          silent,
	} {
		answer = f
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		got, _, err := v.Listeners(ctx)
		cancel()
		if err == nil || got != nil || len(err.Error()) > 300 || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%s: %+v, %v", what, got, fmt.Sprintf("%.300q", err))
		}
	}
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := v.Listeners(t.Context()); banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("paused: %v", err)
	}
	if err := v.Kill(); err != nil {
		t.Fatal(err)
	}
}
