package usernet

import (
	"net/netip"
	"slices"
	"testing"
)

func TestAddressesOf(t *testing.T) {
	seen := make(map[any]int)
	for n := range MaxVMs {
		a, err := AddressesOf(n)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.check(); err != nil {
			t.Fatal(err)
		}
		if !vmBlock4.Contains(a.IPv4.Addr()) || !vmBlock6.Contains(a.IPv6.Addr()) {
			t.Fatalf("%d: %+v is outside the block", n, a)
		}
		for _, x := range []any{a.MAC, a.IPv4.Addr(), a.IPv6.Addr(), a.Gateway4, a.Gateway6, a.IPv4.Masked(), a.IPv6.Masked()} {
			if other, ok := seen[x]; ok {
				t.Fatalf("%d and %d both have %v", n, other, x)
			}
			seen[x] = n
		}
	}
	for _, n := range []int{-1, MaxVMs} {
		if a, err := AddressesOf(n); err == nil {
			t.Errorf("%d: %+v", n, a)
		}
	}
}

func TestMeant(t *testing.T) {
	for text, want := range map[string][]string{
		"198.51.100.7":                  {"198.51.100.7"},
		"::ffff:127.0.0.1":              {"127.0.0.1"},
		"::":                            {"::"},
		"::1":                           {"::1"},
		"::127.0.0.1":                   {"::7f00:1", "127.0.0.1"},
		"64:ff9b::a9fe:a9fe":            {"64:ff9b::a9fe:a9fe", "169.254.169.254"},
		"64:ff9b::1:a9fe:a9fe":          {"64:ff9b::1:a9fe:a9fe"}, // one past the /96
		"::ffff:0:10.0.0.1":             {"::ffff:0:a00:1", "10.0.0.1"},
		"2002:7f00:1::":                 {"2002:7f00:1::", "127.0.0.1"},
		"2001:0:1:2:3:4:80ff:fffe":      {"2001:0:1:2:3:4:80ff:fffe", "127.0.0.1"},
		"2001:db8::5efe:c0a8:1":         {"2001:db8::5efe:c0a8:1", "192.168.0.1"},
		"2001:db8::200:5efe:c0a8:1":     {"2001:db8::200:5efe:c0a8:1", "192.168.0.1"},
		"2001:db8::1:5efe:c0a8:1":       {"2001:db8::1:5efe:c0a8:1"},
		"2001:db8:1234:5678:9abc::ffff": {"2001:db8:1234:5678:9abc::ffff"},
	} {
		var got []string
		for _, a := range meant(netip.MustParseAddr(text)) {
			got = append(got, a.String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s is meant for %v, want %v", text, got, want)
		}
	}
}

// Rows are the ends of the ranges and one past them; the route says public.
func TestKindOf(t *testing.T) {
	for text, want := range map[string]kind{
		"0.0.0.0": kindHost, "0.255.255.255": kindHost, "1.0.0.0": kindPublic,
		"9.255.255.255": kindPublic, "10.0.0.0": kindPrivate, "10.255.255.255": kindPrivate, "11.0.0.0": kindPublic,
		"10.86.255.255": kindPrivate, "10.87.0.0": kindVM, "10.87.255.255": kindVM, "10.88.0.0": kindPrivate,
		"100.63.255.255": kindPublic, "100.64.0.0": kindPrivate, "100.127.255.255": kindPrivate, "100.128.0.0": kindPublic,
		"126.255.255.255": kindPublic, "127.0.0.0": kindHost, "127.255.255.255": kindHost, "128.0.0.0": kindPublic,
		"168.63.129.15": kindPublic, "168.63.129.16": kindLinkLocal, "168.63.129.17": kindPublic,
		"169.253.255.255": kindPublic, "169.254.0.0": kindLinkLocal, "169.254.255.255": kindLinkLocal, "169.255.0.0": kindPublic,
		"172.15.255.255": kindPublic, "172.16.0.0": kindPrivate, "172.31.255.255": kindPrivate, "172.32.0.0": kindPublic,
		"192.0.0.0": kindPrivate, "192.0.0.255": kindPrivate, "192.0.1.0": kindPublic,
		"192.0.2.1": kindPublic, "198.51.100.1": kindPublic, "203.0.113.1": kindPublic, // documentation
		"192.167.255.255": kindPublic, "192.168.0.0": kindPrivate, "192.168.255.255": kindPrivate, "192.169.0.0": kindPublic,
		"223.255.255.255": kindPublic, "224.0.0.0": kindNowhere, "239.255.255.255": kindNowhere,
		"240.0.0.0": kindNowhere, "255.255.255.255": kindNowhere,
		"::": kindHost, "::1": kindHost, "::2": kindPublic,
		"fbff::": kindPublic, "fc00::": kindPrivate, "fdff::": kindPrivate, "fe00::": kindPublic,
		"fd62:616e:6764::": kindPrivate, "fd62:616e:6765::": kindVM, "fd62:616e:6766::": kindPrivate,
		"fe7f::": kindPublic, "fe80::": kindLinkLocal, "febf::": kindLinkLocal, "fec0::": kindPrivate, "feff::": kindPrivate, "ff00::": kindNowhere,
		"64:ff9b:1::": kindPrivate, "64:ff9b:2::": kindPublic, "2001:db8::1": kindPublic,
	} {
		if got := kindOf(netip.MustParseAddr(text), RouteGateway); got != want {
			t.Errorf("%s: %d, want %d", text, got, want)
		}
	}
	public := netip.MustParseAddr("198.51.100.7")
	for route, want := range map[Route]kind{RouteNone: kindUnrouted, RouteLocal: kindHost, RouteOnLink: kindLAN, RouteGateway: kindPublic, RouteBroadcast: kindNowhere} {
		if got := kindOf(public, route); got != want {
			t.Errorf("route %d: %d, want %d", route, got, want)
		}
	}
	// The host is the host, whatever range its address is from.
	for _, a := range []string{"10.1.2.3", "169.254.1.1", "10.87.0.2", "fd00::1"} {
		if got := kindOf(netip.MustParseAddr(a), RouteLocal); got != kindHost {
			t.Errorf("%s as the host's own: %d", a, got)
		}
	}
	if got := kindOf(netip.Addr{}, RouteGateway); got != kindNowhere {
		t.Errorf("no address: %d", got)
	}
}
