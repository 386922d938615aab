package usernet

import (
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel is asked about routes that it was really given.
func TestRouteOf(t *testing.T) {
	newWorld(t)
	ip(t, "route add 198.51.100.64/26 dev lan") // on the link, without an address of ours
	ip(t, "route add unreachable 198.51.100.128/26")
	ip(t, "route add blackhole 198.51.100.192/26")
	ip(t, "route add prohibit 203.0.114.0/24")
	ip(t, "route add 203.0.115.0/24 nexthop via 203.0.113.1 dev wan nexthop via 203.0.113.3 dev wan")
	ip(t, "route add 203.0.116.0/24 nexthop via 203.0.113.1 dev wan nexthop dev lan")
	ip(t, "route add 203.0.117.0/24 via inet6 2001:db8:113::1 dev wan")
	ip(t, "-6 route add 2001:db8:115::/48 nexthop via 2001:db8:113::1 dev wan nexthop via 2001:db8:113::3 dev wan")
	ip(t, "-6 route add unreachable 2001:db8:114::/48")
	ip(t, "nexthop add id 7 via 203.0.113.1 dev wan")
	ip(t, "nexthop add id 8 dev lan")
	ip(t, "route add 203.0.118.0/24 nhid 7")
	ip(t, "route add 203.0.119.0/24 nhid 8")
	rows := map[string]Route{
		"127.0.0.1": RouteLocal, "127.9.9.9": RouteLocal, "::1": RouteLocal,
		lanHost4: RouteLocal, wanHost4: RouteLocal, lanHost6: RouteLocal, wanHost6: RouteLocal,
		lanPeer4: RouteOnLink, lanPeer6: RouteOnLink, onLink6: RouteOnLink, "203.0.113.1": RouteOnLink, "2001:db8:113::1": RouteOnLink,
		"192.168.77.255": RouteBroadcast, "203.0.113.255": RouteBroadcast, "255.255.255.255": RouteBroadcast, "224.0.0.251": RouteBroadcast,
		inet4: RouteGateway, inet6: RouteGateway, "169.254.169.254": RouteGateway, farPrivate: RouteGateway,
		"198.51.100.65": RouteOnLink, "198.51.100.129": RouteNone, "198.51.100.193": RouteNone, "203.0.114.1": RouteNone, "2001:db8:114::1": RouteNone,
		"203.0.115.5": RouteGateway, "203.0.116.5": RouteOnLink, "203.0.117.5": RouteGateway, "2001:db8:115::5": RouteGateway,
		"203.0.118.5": RouteGateway, "203.0.119.5": RouteOnLink,
	}
	ask := func(t *testing.T) {
		for text, want := range rows {
			if got, err := routeOf(netip.MustParseAddr(text)); err != nil || got != want {
				t.Errorf("%s: %d, %v; want %d", text, got, err, want)
			}
		}
	}
	t.Run("main table", ask)
	// Kernels can be told to show next hop objects by their number alone.
	if err := os.WriteFile("/proc/sys/net/ipv4/nexthop_compat_mode", []byte("0"), 0); err == nil {
		t.Run("next hop objects", ask)
		_ = os.WriteFile("/proc/sys/net/ipv4/nexthop_compat_mode", []byte("1"), 0)
	}
	// Policy routing is part of the kernel's answer.
	ip(t, "route add 198.51.100.8/32 dev lan table 99")
	ip(t, "rule add to 198.51.100.8/32 lookup 99")
	t.Cleanup(func() { exec.Command("ip", "rule", "del", "to", "198.51.100.8/32", "lookup", "99").Run() })
	if got, err := routeOf(netip.MustParseAddr("198.51.100.8")); err != nil || got != RouteOnLink {
		t.Errorf("policy routing: %d, %v", got, err)
	}
}

// A tunnel that takes everything is the way out; what it takes besides is a
// network of the host's.
func TestRouteThroughTunnel(t *testing.T) {
	needNamespace(t)
	if out, err := exec.Command("ip", "tuntap", "add", "dev", "tunnel", "mode", "tun").CombinedOutput(); err != nil {
		missing(t, "a TUN device: "+string(out))
	}
	t.Cleanup(func() { exec.Command("ip", "link", "del", "tunnel").Run() })
	ip(t, "addr add 203.0.113.9/32 dev tunnel")
	ip(t, "link set tunnel up")
	ip(t, "route add 198.51.100.0/24 dev tunnel")
	check := func(text string, want Route) {
		t.Helper()
		if got, err := routeOf(netip.MustParseAddr(text)); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", text, got, err, want)
		}
	}
	check("192.0.2.1", RouteNone)
	ip(t, "route add 128.0.0.0/1 dev tunnel")
	check("192.0.2.1", RouteGateway)
	check("12.0.0.1", RouteNone)
	ip(t, "route add default dev tunnel")
	check("12.0.0.1", RouteGateway)
	check("198.51.100.1", RouteOnLink)
	check("203.0.113.9", RouteLocal)
	ip(t, "link add flat type veth peer name flat2")
	t.Cleanup(func() { exec.Command("ip", "link", "del", "flat").Run() })
	ip(t, "link set flat up")
	ip(t, "link set flat2 up")
	ip(t, "route change default dev flat") // everything on an Ethernet: all of it may be the LAN
	check("12.0.0.1", RouteOnLink)
}

func FuzzJudgeRoute(f *testing.F) {
	b, err := netlink(routeRequest(netip.MustParseAddr("127.0.0.1"), unix.RTM_F_FIB_MATCH))
	if err == nil {
		f.Add(b, true)
	}
	f.Fuzz(func(t *testing.T, b []byte, matched bool) {
		_, _ = judgeRoute(b, matched, func(int) bool { return true })
		_, _ = netlinkBody(b)
	})
}
