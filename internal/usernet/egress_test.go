package usernet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// A zone is a Resolver with answers that a test changes as it likes.
type zone struct {
	mu    sync.Mutex
	addrs map[string][]string
	asked []string
}

func (z *zone) set(name string, addrs ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.addrs == nil {
		z.addrs = make(map[string][]string)
	}
	z.addrs[name] = addrs
}

func (z *zone) questions() []string {
	z.mu.Lock()
	defer z.mu.Unlock()
	return slices.Clone(z.asked)
}

func (z *zone) Exchange(_ context.Context, query []byte) ([]byte, error) {
	var q dnsmessage.Message
	if err := q.Unpack(query); err != nil {
		return nil, err
	}
	name := strings.ToLower(strings.TrimSuffix(q.Questions[0].Name.String(), "."))
	z.mu.Lock()
	defer z.mu.Unlock()
	z.asked = append(z.asked, name)
	addrs, ok := z.addrs[name]
	q.Response, q.RecursionAvailable = true, true
	q.Additionals = nil
	if !ok {
		q.RCode = dnsmessage.RCodeNameError
	}
	for _, text := range addrs {
		a := netip.MustParseAddr(text)
		h := dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 1}
		switch {
		case a.Is4() && q.Questions[0].Type == dnsmessage.TypeA:
			q.Answers = append(q.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
		case a.Is6() && q.Questions[0].Type == dnsmessage.TypeAAAA:
			q.Answers = append(q.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	return q.Pack()
}

// hostile are the addresses that no guest may reach unasked, with what stands
// there. Every one of them would answer: it is on the host, or a namespace
// beside it has it, with listeners.
var hostile = []struct{ what, addr string }{
	{"host loopback", "127.0.0.1"},
	{"host loopback, another", "127.1.2.3"},
	{"host loopback v6", "::1"},
	{"host by 0.0.0.0", "0.0.0.0"},
	{"host by ::", "::"},
	{"host's LAN address", lanHost4},
	{"host's LAN address v6", lanHost6},
	{"host's public address", wanHost4},
	{"host's public address v6", wanHost6},
	{"LAN", lanPeer4},
	{"LAN v6", lanPeer6},
	{"public v6 on the host's link", onLink6},
	{"the host's gateway", "203.0.113.1"},
	{"private, far away", farPrivate},
	{"private 172.16/12", "172.16.5.5"},
	{"private CGNAT, a cloud's metadata", "100.100.100.200"},
	{"private ULA", "fc00::5"},
	{"metadata", "169.254.169.254"},
	{"metadata v6", "fd00:ec2::254"},
	{"Azure's platform", "168.63.129.16"},
	{"Oracle's metadata", "192.0.0.192"},
	{"v4-mapped loopback", "::ffff:127.0.0.1"},
	{"v4-mapped LAN", "::ffff:192.168.77.9"},
	{"NAT64 of metadata", "64:ff9b::a9fe:a9fe"},
	{"NAT64 of the LAN", "64:ff9b::c0a8:4d09"},
	{"NAT64, local", "64:ff9b:1::5"},
	{"6to4 of the LAN", "2002:c0a8:4d09::1"},
	{"another VM", "10.87.9.2"},
	{"broadcast", "255.255.255.255"},
	{"LAN broadcast", "192.168.77.255"},
	{"multicast", "224.0.0.251"},
	{"multicast v6", "ff02::fb"},
	{"class E", "240.0.0.1"},
}

// No packet of a guest's leaves for what it is not allowed, whatever way it
// tries: all packets on every wire of the host are looked at.
func TestEgress(t *testing.T) {
	w := newWorld(t)
	served := map[*place][]string{
		nil:   {"0.0.0.0:80", "[::]:81"},
		w.lan: {"0.0.0.0:80", "[::]:81"},
		w.wan: {"0.0.0.0:80", "[::]:81"},
	}
	for place, addrs := range served {
		for _, a := range addrs {
			place.serve(t, a, func(c *net.TCPConn) { fmt.Fprintf(c, "reached") })
			place.serveUDP(t, a)
		}
	}
	names := &zone{}
	names.set("good.example", inet4, inet6)
	names.set("loop.example", "127.0.0.1", "::1")
	names.set("meta.example", "169.254.169.254")
	names.set("lan.example", lanPeer4, onLink6)
	for _, policy := range []string{"public", "allow:good.example,loop.example,meta.example,lan.example"} {
		t.Run(policy, func(t *testing.T) {
			n := newNetwork(t, "one", 0, policy, func(c *Config) { c.Resolver = names })
			g := newGuest(t, n)
			k := g.rawIP()
			for _, h := range hostile {
				a := netip.MustParseAddr(h.addr)
				t.Run(h.what, func(t *testing.T) {
					before := len(n.Log())
					for _, port := range []uint16{80, 81} {
						k.syn(a, port)
						k.datagram(a, port, "hello")
					}
					k.echo(a)
					k.settle(t)
					if !a.IsMulticast() && h.addr != "::" && !a.Is4In6() && len(n.Log()) == before {
						t.Errorf("nothing in the log: %+v", n.Log())
					}
					for _, d := range n.Log() {
						if d.Reason == "" || d.Count == 0 || d.First.IsZero() {
							t.Errorf("a poor entry: %+v", d)
						}
					}
				})
			}
			// A name is worth no more than its address, before and after it changes.
			for _, name := range []string{"loop.example", "meta.example", "lan.example"} {
				for _, a := range g.mustLookup(name) {
					k.syn(a, 80)
					k.syn(a, 81)
				}
				k.settle(t)
			}
			for _, a := range g.mustLookup("good.example") {
				port := uint16(80)
				if a.Is6() {
					port = 81
				}
				c, err := g.dial(netip.AddrPortFrom(a, port).String())
				if err != nil {
					t.Errorf("good.example (%v): %v", a, err)
					continue
				}
				c.Close()
			}
			names.set("good.example", "127.0.0.1") // rebinding
			defer names.set("good.example", inet4, inet6)
			for _, a := range g.mustLookup("good.example") {
				k.syn(a, 80)
			}
			k.settle(t)
			// The sender is who it is.
			spoof := g.rawIP()
			spoof.src4, spoof.src6 = netip.MustParseAddr(lanHost4), netip.MustParseAddr(wanHost6)
			spoof.syn(netip.MustParseAddr(otherInet4), 80)
			spoof.datagram(netip.MustParseAddr(otherInet4), 80, "hello")
			spoof.datagram(netip.MustParseAddr("2001:db8:100::8"), 81, "hello")
			spoof.settle(t)
			if n.Stats().Dropped["spoofed-source"] < 3 || !slices.ContainsFunc(n.Log(), func(d Denial) bool { return d.Proto == "spoof" && d.From.String() == lanHost4 }) {
				t.Errorf("spoofed packets: %+v %+v", n.Stats(), n.Log())
			}
		})
	}
	// Only where it was allowed to go: everything else on the wires is an error.
	if s := w.seen.strangers(inet4, inet6, wanHost4, wanHost6); len(s) > 0 {
		t.Errorf("packets went to %v", s)
	}
	if w.seen.sent(netipAddr(inet4)) == 0 || w.seen.sent(netipAddr(inet6)) == 0 {
		t.Error("the recorder sees nothing: this test proves nothing")
	}
}

// A scan of the host from the guest finds nothing, on any of its addresses.
func TestPortScan(t *testing.T) {
	w := newWorld(t)
	var nowhere *place
	for _, port := range []int{22, 53, 80, 631, 5432, 8080} {
		nowhere.serve(t, fmt.Sprintf("[::]:%d", port), func(c *net.TCPConn) {})
	}
	n := newNetwork(t, "one", 0, "full", func(c *Config) { c.Policy.HostPorts = []uint16{8080} })
	g := newGuest(t, n)
	open := make(map[string]bool)
	for _, a := range []string{g.addr.Gateway4.String(), g.addr.Gateway6.String(), lanHost4, lanHost6, wanHost4, wanHost6} {
		ports := []int{22, 53, 80, 631, 5432, 8080}
		if a == g.addr.Gateway4.String() {
			for p := 1; p <= 1024; p++ {
				ports = append(ports, p)
			}
		}
		for _, p := range ports {
			if c, err := g.dial(net.JoinHostPort(a, fmt.Sprint(p))); err == nil {
				open[net.JoinHostPort(a, fmt.Sprint(p))] = true
				c.Close()
			}
		}
	}
	// DNS is our own; 8080 was asked for.
	for _, a := range []string{g.addr.Gateway4.String(), g.addr.Gateway6.String()} {
		for _, p := range []string{"53", "8080"} {
			if !open[net.JoinHostPort(a, p)] {
				t.Errorf("%s port %s does not answer", a, p)
			}
			delete(open, net.JoinHostPort(a, p))
		}
	}
	if len(open) > 0 {
		t.Errorf("open: %v", open)
	}
	if n := len(n.Log()); n != maxDenials {
		t.Errorf("%d entries in the log, the limit is %d", n, maxDenials)
	}
	if s := w.seen.strangers("127.0.0.1"); len(s) > 0 {
		t.Errorf("packets went to %v", s)
	}
}

// What is asked for works, and no more than that.
func TestAllowed(t *testing.T) {
	w := newWorld(t)
	hello := func(c *net.TCPConn) { fmt.Fprint(c, "hello") }
	w.lan.serve(t, "0.0.0.0:80", hello)
	w.lan.serve(t, "0.0.0.0:81", hello)
	w.wan.serve(t, "0.0.0.0:80", hello)
	w.wan.serve(t, "0.0.0.0:81", hello)
	var host *place
	host.serve(t, "127.0.0.1:8080", hello)
	host.serveUDP(t, "127.0.0.1:8080")
	host.serve(t, "[::1]:8081", hello)
	names := &zone{}
	names.set("lan.example", lanPeer4)
	names.set("good.example", inet4)
	names.set("other.example", otherInet4)
	for _, row := range []struct {
		policy    string
		hostPorts []uint16
		yes, no   string
	}{
		{"full", nil, lanPeer4 + ":80 " + inet4 + ":80 " + farPrivate + ":80", "169.254.169.254:80 " + lanHost4 + ":80"},
		{"none", nil, "", lanPeer4 + ":80 " + inet4 + ":80"},
		{"public,allow:192.168.77.9:80", nil, lanPeer4 + ":80 " + inet4 + ":80", lanPeer4 + ":81 " + farPrivate + ":80"},
		{"allow:192.168.77.0/24", nil, lanPeer4 + ":80 " + lanPeer4 + ":81", inet4 + ":80 " + lanHost4 + ":80"},
		{"public,allow:169.254.169.254:80", nil, "169.254.169.254:80", "169.254.169.254:81"},
		{"allow:good.example:80", nil, "good.example:80", "good.example:81 other.example:80 " + otherInet4 + ":80"},
		{"allow:*.example", nil, "good.example:80 other.example:81", "lan.example:80"},
		{"none", []uint16{8080, 8081}, "host.banger:8080 host.banger:8081", "host.banger:80 " + lanHost4 + ":8080"},
	} {
		t.Run(row.policy, func(t *testing.T) {
			n := newNetwork(t, "one", 0, row.policy, func(c *Config) { c.Resolver, c.Policy.HostPorts = names, row.hostPorts })
			g := newGuest(t, n)
			try := func(to string) error {
				host, port, _ := net.SplitHostPort(to)
				addr, err := netip.ParseAddr(host)
				if err != nil {
					addrs := g.lookupAll(host)
					if len(addrs) == 0 {
						return fmt.Errorf("%s: no address", host)
					}
					addr = addrs[0]
				}
				c, err := g.dial(net.JoinHostPort(addr.String(), port))
				if err != nil {
					return err
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(promptly))
				buf := make([]byte, 5)
				if _, err := c.Read(buf); err != nil || string(buf) != "hello" {
					return fmt.Errorf("read %q, %v", buf, err)
				}
				return nil
			}
			for _, to := range strings.Fields(row.yes) {
				if err := try(to); err != nil {
					t.Errorf("%s: %v; %+v", to, err, n.Log())
				}
			}
			for _, to := range strings.Fields(row.no) {
				before := len(n.Log())
				if err := try(to); err == nil {
					t.Errorf("%s answers", to)
				} else if len(n.Log()) == before {
					t.Errorf("%s: nothing in the log", to)
				}
			}
		})
	}
	// An address that was allowed by its name is not another one's.
	n := newNetwork(t, "one", 0, "none", func(c *Config) { c.Policy.HostPorts = []uint16{8080} })
	g := newGuest(t, n)
	if got, err := g.askUDP(netip.AddrPortFrom(g.addr.Gateway4, 8080).String(), "x", promptly); err != nil || got != "re: x" {
		t.Errorf("a datagram to a service of the host: %q, %v", got, err)
	}
	if got, err := g.askUDP(netip.AddrPortFrom(g.addr.Gateway4, 8082).String(), "x", time.Second/2); err == nil {
		t.Errorf("a datagram to another: %q", got)
	}
}

// Where little is allowed, names are not a way out either.
func TestNamesAreRefused(t *testing.T) {
	needNamespace(t)
	names := &zone{}
	names.set("good.example", inet4)
	for policy, want := range map[string]string{"none": "", "allow:good.example": "good.example", "public": "good.example secret.evil.example"} {
		names.asked = nil
		n := newNetwork(t, "one", 0, policy, func(c *Config) { c.Resolver = names })
		g := newGuest(t, n)
		for _, name := range []string{"good.example", "secret.evil.example"} {
			if _, err := g.lookup(name, dnsmessage.TypeA); err != nil {
				t.Fatal(err)
			}
		}
		if got := strings.Join(names.questions(), " "); got != want {
			t.Errorf("%s: the resolver was asked for %q, want %q", policy, got, want)
		}
		if policy != "public" && !slices.ContainsFunc(n.Log(), func(d Denial) bool { return d.Proto == "dns" && d.Names[0] == "secret.evil.example" && d.Flag != "" }) {
			t.Errorf("%s: %+v", policy, n.Log())
		}
	}
}
