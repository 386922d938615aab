package usernet

import (
	"fmt"
	"net/netip"
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// Addresses are what one VM has, and nobody else. A VM is alone in its subnet
// with its gateway, so that every other VM is beyond the gateway: guests route
// to each other and never ask for each other's MAC.
type Addresses struct {
	MAC      MAC          // of the guest
	IPv4     netip.Prefix // of the guest; its bits are the subnet's
	Gateway4 netip.Addr
	IPv6     netip.Prefix
	Gateway6 netip.Addr
}

// Domain is where VMs have their names: NAME.banger.
const Domain = "banger"

// gatewayLinkLocal is the address that routers have on a link (RFC 4291 2.5.6).
var gatewayLinkLocal = netip.MustParseAddr("fe80::1")

// MaxVMs is how many VMs AddressesOf has addresses for.
const MaxVMs = 1 << 14

// VMs have their addresses in these blocks; on the host's own network the same
// addresses may mean something else, which guests then cannot reach.
var (
	vmBlock4 = netip.MustParsePrefix("10.87.0.0/16")
	vmBlock6 = netip.MustParsePrefix("fd62:616e:6765::/48")
)

// gatewayMAC is the same for every VM: no two gateways share a link.
var gatewayMAC = MAC{0x02, 0x62, 0x61, 0x6e, 0x67, 0x65}

// AddressesOf gives VM number n, from 0 to MaxVMs-1, its addresses: a /30 and
// a /64 of its own.
func AddressesOf(n int) (Addresses, error) {
	if n < 0 || n >= MaxVMs {
		return Addresses{}, fmt.Errorf("network: no addresses for VM number %d, there are %d", n, MaxVMs)
	}
	four := vmBlock4.Addr().As4()
	four[2], four[3] = byte(n>>6), byte(n<<2)
	six := vmBlock6.Addr().As16()
	six[6], six[7] = byte(n>>8), byte(n)
	host := func(last byte) (netip.Addr, netip.Addr) {
		a, b := four, six
		a[3] |= last
		b[15] = last
		return netip.AddrFrom4(a), netip.AddrFrom16(b)
	}
	gateway4, gateway6 := host(1)
	guest4, guest6 := host(2)
	return Addresses{
		MAC:  MAC{0x02, 0x62, 0x61, 0x00, byte(n >> 8), byte(n)},
		IPv4: netip.PrefixFrom(guest4, 30), Gateway4: gateway4,
		IPv6: netip.PrefixFrom(guest6, 64), Gateway6: gateway6,
	}, nil
}

// check refuses addresses that no guest could use.
func (a Addresses) check() error {
	switch {
	case !a.IPv4.Addr().Is4() || !a.IPv4.Masked().Contains(a.Gateway4) || a.IPv4.Addr() == a.Gateway4:
		return fmt.Errorf("network: IPv4 address %v with gateway %v", a.IPv4, a.Gateway4)
	case !a.IPv6.Addr().Is6() || a.IPv6.Addr().Is4In6() || !a.IPv6.Masked().Contains(a.Gateway6) || a.IPv6.Addr() == a.Gateway6:
		return fmt.Errorf("network: IPv6 address %v with gateway %v", a.IPv6, a.Gateway6)
	case a.MAC[0]&1 != 0 || a.MAC == (MAC{}) || a.MAC == gatewayMAC:
		return fmt.Errorf("network: MAC %v", a.MAC)
	}
	return nil
}

// A kind is what an address is, seen from the host.
type kind int

const (
	kindPublic    kind = iota // beyond a gateway
	kindLAN                   // on a network of the host's own
	kindPrivate               // RFC 1918, RFC 4193, RFC 6598 and the like
	kindLinkLocal             // RFC 3927, RFC 4291: cloud metadata stands there
	kindHost                  // the host itself
	kindVM                    // another VM
	kindNowhere               // nothing one can have a conversation with
	kindUnrouted              // the host knows no way
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, p := range list {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

var (
	nowherePrefixes = prefixes("224.0.0.0/4", "240.0.0.0/4", "ff00::/8")
	hostPrefixes    = prefixes("0.0.0.0/8", "127.0.0.0/8", "::/127")
	// Azure's platform answers at a public address what others answer at a
	// link-local one.
	linkLocalPrefixes = prefixes("169.254.0.0/16", "fe80::/10", "168.63.129.16/32")
	privatePrefixes   = prefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
		"192.0.0.0/24", // RFC 6890; metadata of one cloud
		"fc00::/7", "fec0::/10",
		"64:ff9b:1::/48") // RFC 8215: translators of the network one is in
)

func within(a netip.Addr, list []netip.Prefix) bool {
	for _, p := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// Translators' prefixes: behind such an address is an IPv4 address, at the
// given byte.
var embeddings = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},    // NAT64, RFC 6052
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12}, // SIIT, RFC 2765
	{netip.MustParsePrefix("2002::/16"), 2},        // 6to4, RFC 3056
	{netip.MustParsePrefix("::/96"), 12},           // IPv4-compatible, RFC 4291
}

// meant returns every address that a packet to a may be meant for: a without
// its IPv4 mapping, and the IPv4 address inside, if any. All must be allowed.
// The first one is the one to dial.
func meant(a netip.Addr) []netip.Addr {
	a = a.Unmap().WithZone("")
	out := []netip.Addr{a}
	if !a.Is6() || a.IsUnspecified() || a.IsLoopback() {
		return out
	}
	b := a.As16()
	for _, e := range embeddings {
		if e.prefix.Contains(a) {
			out = append(out, netip.AddrFrom4([4]byte(b[e.at:])))
		}
	}
	if b[8]&^0x02 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe { // ISATAP, RFC 5214
		out = append(out, netip.AddrFrom4([4]byte(b[12:])))
	}
	// Teredo (RFC 4380) has the client's address inverted.
	if b[0] == 0x20 && b[1] == 0x01 && b[2] == 0 && b[3] == 0 {
		out = append(out, netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}))
	}
	return out
}

// kindOf judges an address without IPv4 mapping by what it is and by how the
// host's kernel would send to it.
func kindOf(a netip.Addr, r Route) kind {
	switch {
	case !a.IsValid() || within(a, nowherePrefixes) || r == RouteBroadcast:
		return kindNowhere
	case within(a, hostPrefixes) || r == RouteLocal:
		return kindHost
	case within(a, linkLocalPrefixes):
		return kindLinkLocal
	case vmBlock4.Contains(a) || vmBlock6.Contains(a):
		return kindVM
	case within(a, privatePrefixes):
		return kindPrivate
	case r == RouteOnLink:
		return kindLAN
	case r == RouteGateway:
		return kindPublic
	}
	return kindUnrouted
}
