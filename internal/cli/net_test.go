package cli

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"banger"
	"banger/internal/api"
)

func TestPortRows(t *testing.T) {
	yes, no := true, false
	port := func(proto string, host, guest uint16, listening *bool) api.Port {
		return api.Port{Port: banger.Port{Protocol: proto, HostAddr: "127.0.0.1", HostPort: host, GuestPort: guest}, Listening: listening}
	}
	at := func(proto, local, process string, reach api.Reach, forwarded bool) api.Listener {
		a := netip.MustParseAddrPort(local)
		return api.Listener{Listener: banger.Listener{Protocol: proto, Addr: a.Addr(), Port: a.Port(), Process: process}, Reach: reach, Forwarded: forwarded}
	}
	lines := func(p api.Ports) string {
		var b strings.Builder
		for _, row := range portRows("web", p) {
			fmt.Fprintln(&b, strings.Join(row, " | "))
		}
		return b.String()
	}
	rest := api.Ports{Ports: []api.Port{port("tcp", 8080, 80, nil), {Port: banger.Port{Protocol: "udp", HostAddr: "::1", HostPort: 0, GuestPort: 53}}}}
	if got, want := lines(rest), "HOST | GUEST\n127.0.0.1:8080 | 80/tcp\n[::1]:0 | 53/udp\n"; got != want {
		t.Errorf("at rest:\n%s", got)
	}
	runs := api.Ports{
		Ports: []api.Port{port("tcp", 8080, 80, &yes), port("tcp", 8081, 81, &no), port("udp", 5353, 53, &yes), port("tcp", 9, 9, &yes)},
		Listeners: []api.Listener{
			at("tcp", "0.0.0.0:80", "nginx", api.ReachPort, true), at("tcp", "[::]:80", "nginx", api.ReachPort, true),
			at("tcp", "127.0.0.1:81", "db", api.ReachLoopback, false), at("udp", "10.87.0.6:53", "", api.ReachPort, true),
			at("tcp", "172.17.0.1:2375", "dockerd", api.ReachOther, false),
			at("tcp", "[::]:22", "sshd", api.ReachPort, false), at("udp", "0.0.0.0:1023", "x", api.ReachPort, false), at("tcp", "0.0.0.0:1024", "y", api.ReachPort, false),
			at("tcp", "0.0.0.0:9", "a", api.ReachPort, true), at("tcp", "0.0.0.0:9", "b", api.ReachPort, true), at("tcp", "0.0.0.0:9", "c", api.ReachPort, true),
			at("tcp", "0.0.0.0:9", "d", api.ReachPort, true), at("tcp", "0.0.0.0:9", "e", api.ReachPort, true),
		},
	}
	const want = `HOST | GUEST | LISTENER | NOTE
127.0.0.1:8080 | 80/tcp | nginx
127.0.0.1:8081 | 81/tcp | - | nothing listens there
127.0.0.1:5353 | 53/udp | unknown on 10.87.0.6
127.0.0.1:9 | 9/tcp | a, b, c, d, ...
- | 81/tcp | db on 127.0.0.1 | of the guest itself: no port of the host leads there
- | 2375/tcp | dockerd on 172.17.0.1 | at an address that no port of the host leads to
- | 22/tcp | sshd | banger ports add web 8022:22
- | 1023/udp | x | banger ports add web 9023:1023/udp
- | 1024/tcp | y | banger ports add web 1024:1024
`
	if got := lines(runs); got != want {
		t.Errorf("running:\n%s\nwant:\n%s", got, want)
	}
}
