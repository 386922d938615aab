package usernet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"banger"
)

// A Mode is what a policy allows before its rules.
type Mode string

const (
	ModeFull   Mode = "full"   // whatever the host can reach, but the host itself and link-local addresses
	ModePublic Mode = "public" // what lies beyond the host's gateways and is no private address
	ModeNone   Mode = "none"   // nothing
)

const (
	maxPolicyBytes = 8 << 10
	maxRules       = 256 // of each kind
)

// A Policy says where a guest may connect to. The zero Policy allows nothing.
type Policy struct {
	Mode     Mode
	Names    []NameRule
	Prefixes []PrefixRule
	// Groups: VMs that share one reach each other.
	Groups []string
	// HostPorts are services on the host's loopback that the guest reaches at
	// its gateway, by the name host.banger. TCP and UDP.
	HostPorts []uint16
}

// A NameRule allows the addresses that our own DNS answered for a name, and
// that answer. Port 0 is every port. "*.example.com" is every name below it.
type NameRule struct {
	Name string
	Port uint16
}

// A PrefixRule allows addresses. Port 0 is every port.
type PrefixRule struct {
	Prefix netip.Prefix
	Port   uint16
}

// ParsePolicy reads what --net takes, a list with commas between: at most one
// mode; after "allow:", names and addresses, each with an optional port; after
// "group:", a group. Without a mode it is none where something is allowed by
// name, and else public.
//
//	public
//	public,allow:10.1.2.3:5432
//	allow:deb.debian.org,*.example.com:443,[2001:db8::/32]:22
//	none,group:lab
func ParsePolicy(text string) (Policy, error) {
	bad := func(format string, args ...any) (Policy, error) {
		return Policy{}, banger.Errorf(banger.CodeUsage, "--net: "+format, args...).
			WithHint("--net takes full, public, none, allow:HOST[:PORT], allow:CIDR[:PORT] and group:NAME, with commas between")
	}
	if len(text) > maxPolicyBytes {
		return bad("%d bytes, the limit is %d", len(text), maxPolicyBytes)
	}
	var p Policy
	if text == "" {
		p.Mode = ModePublic
		return p, nil
	}
	allowing := false
	for item := range strings.SplitSeq(text, ",") {
		if mode := Mode(item); mode == ModeFull || mode == ModePublic || mode == ModeNone {
			if p.Mode != "" {
				return bad("%q and %q: there can be one", p.Mode, mode)
			}
			p.Mode, allowing = mode, false
			continue
		}
		if name, ok := strings.CutPrefix(item, "group:"); ok {
			if !validGroup(name) {
				return bad("group %q: a name has a-z, 0-9 and -, at most 63", name)
			}
			p.Groups, allowing = append(p.Groups, name), false
			continue
		}
		rest, ok := strings.CutPrefix(item, "allow:")
		if !ok && !allowing {
			return bad("%q is no mode", item)
		}
		allowing = true
		if err := p.allow(rest); err != nil {
			return bad("%w", err)
		}
	}
	if p.Mode == "" {
		p.Mode = ModePublic
		if len(p.Names)+len(p.Prefixes) > 0 {
			p.Mode = ModeNone
		}
	}
	if len(p.Names) > maxRules || len(p.Prefixes) > maxRules || len(p.Groups) > maxRules {
		return bad("more than %d rules", maxRules)
	}
	p.normalise()
	return p, nil
}

// normalise makes equal policies equal values.
func (p *Policy) normalise() {
	slices.SortFunc(p.Names, func(a, b NameRule) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Port, b.Port))
	})
	slices.SortFunc(p.Prefixes, func(a, b PrefixRule) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()), cmp.Compare(a.Port, b.Port))
	})
	slices.Sort(p.Groups)
	slices.Sort(p.HostPorts)
	p.Names, p.Prefixes = slices.Compact(p.Names), slices.Compact(p.Prefixes)
	p.Groups, p.HostPorts = slices.Compact(p.Groups), slices.Compact(p.HostPorts)
}

// allow adds one rule.
func (p *Policy) allow(item string) error {
	what, port, err := splitPort(item)
	if err != nil {
		return err
	}
	if prefix, err := netip.ParsePrefix(what); err == nil {
		if prefix.Addr().Is4In6() {
			return fmt.Errorf("%q: write it as IPv4", item)
		}
		p.Prefixes = append(p.Prefixes, PrefixRule{prefix.Masked(), port})
		return nil
	}
	if addr, err := netip.ParseAddr(what); err == nil {
		if addr.Zone() != "" {
			return fmt.Errorf("%q: an address with a zone means something on the host only", item)
		}
		addr = addr.Unmap()
		p.Prefixes = append(p.Prefixes, PrefixRule{netip.PrefixFrom(addr, addr.BitLen()), port})
		return nil
	}
	name := strings.TrimSuffix(strings.ToLower(what), ".")
	if !validName(strings.TrimPrefix(name, "*.")) {
		return fmt.Errorf("%q is neither a host name nor an address", item)
	}
	p.Names = append(p.Names, NameRule{name, port})
	return nil
}

// splitPort takes HOST, HOST:PORT, CIDR:PORT or [IPv6]:PORT apart.
func splitPort(s string) (string, uint16, error) {
	what, port := s, ""
	if rest, ok := strings.CutPrefix(s, "["); ok {
		inside, after, closed := strings.Cut(rest, "]")
		if !closed {
			return "", 0, fmt.Errorf("%q: no ]", s)
		}
		what = inside
		if after != "" {
			if port, ok = strings.CutPrefix(after, ":"); !ok || port == "" {
				return "", 0, fmt.Errorf("%q: after ] comes :PORT", s)
			}
		}
	} else if strings.Count(s, ":") == 1 {
		what, port, _ = strings.Cut(s, ":")
		if port == "" {
			return "", 0, fmt.Errorf("%q: no port after the colon", s)
		}
	}
	if port == "" {
		return what, 0, nil
	}
	n, err := parsePort(port)
	if err != nil {
		return "", 0, fmt.Errorf("%q: %w", s, err)
	}
	return what, n, nil
}

// parsePort reads a port number from 1 to 65535, in the one way it is written.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '0' || s[0] == '+' {
		return 0, fmt.Errorf("port %q is not from 1 to 65535", s)
	}
	return uint16(n), nil
}

func validGroup(s string) bool {
	return s != "" && len(s) <= 63 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// validName takes host names as they are written in lower case: letters,
// digits, - and _ in labels of at most 63 and 253 in all (RFC 1123). A name
// whose last label is a number looks like an address and is none.
func validName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	last := ""
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" || label[0] == '-' {
			return false
		}
		last = label
	}
	return strings.Trim(last, "0123456789") != "" && !strings.HasPrefix(last, "0x")
}

// String is the value for --net that ParsePolicy reads back. HostPorts are
// another flag's.
func (p Policy) String() string {
	items := []string{string(cmp.Or(p.Mode, ModeNone))}
	for _, r := range p.Names {
		items = append(items, "allow:"+withPort(r.Name, r.Port))
	}
	for _, r := range p.Prefixes {
		items = append(items, "allow:"+r.String())
	}
	for _, g := range p.Groups {
		items = append(items, "group:"+g)
	}
	return strings.Join(items, ",")
}

func (r PrefixRule) String() string {
	text := r.Prefix.String()
	if r.Prefix.IsSingleIP() {
		text = r.Prefix.Addr().String()
	}
	if r.Prefix.Addr().Is6() && r.Port != 0 {
		text = "[" + text + "]"
	}
	return withPort(text, r.Port)
}

func withPort(s string, port uint16) string {
	if port == 0 {
		return s
	}
	return s + ":" + strconv.Itoa(int(port))
}

// SharesGroup says whether a VM in those groups and one with this policy may
// reach each other.
func (p Policy) SharesGroup(groups []string) bool {
	return slices.ContainsFunc(p.Groups, func(g string) bool { return slices.Contains(groups, g) })
}

// AnyName says whether the guest may ask for every name, because it may reach
// any public address. Where it may not, names other than the allowed ones are
// refused too: a question is a message to whoever answers it.
func (p Policy) anyName() bool { return p.Mode == ModeFull || p.Mode == ModePublic }

// allowsName says whether the guest may ask for a name in lower case.
func (p Policy) allowsName(name string) bool {
	return p.anyName() || slices.ContainsFunc(p.Names, func(r NameRule) bool { return r.matches(name) })
}

func (r NameRule) matches(name string) bool {
	if below, ok := strings.CutPrefix(r.Name, "*"); ok {
		return len(name) > len(below) && strings.HasSuffix(name, below)
	}
	return name == r.Name
}

// A flow is what a guest wants: from its own address to dst.
type flow struct {
	proto string // tcp, udp, icmp
	dst   netip.AddrPort
}

// A verdict is a policy's answer. Reason and flag are for people.
type verdict struct {
	allow  bool
	quiet  bool   // nothing to log: the host could not do it either
	reason string // why not
	flag   string // what would allow it; "" if nothing does
}

// judge decides about one address that the flow is meant for, given what kind
// it is and for which names our DNS has answered it. It does no I/O.
func (p Policy) judge(f flow, addr netip.Addr, k kind, names []string) verdict {
	port := f.dst.Port()
	listed := slices.ContainsFunc(p.Prefixes, func(r PrefixRule) bool {
		if !r.Prefix.Contains(addr) || r.Port != 0 && r.Port != port {
			return false
		}
		// 0.0.0.0/0 is not a wish to hand out the cloud's credentials.
		return k != kindLinkLocal || slices.ContainsFunc(linkLocalPrefixes, func(l netip.Prefix) bool {
			return l.Contains(r.Prefix.Addr()) && r.Prefix.Bits() >= l.Bits()
		})
	})
	name, named := "", false
	for _, n := range names {
		if slices.ContainsFunc(p.Names, func(r NameRule) bool { return r.matches(n) && (r.Port == 0 || r.Port == port) }) {
			name, named = n, true
			break
		}
	}
	add := func() string { return "--net " + p.with(addr, port, names, k).String() }
	switch k {
	case kindNowhere:
		return verdict{reason: "no address to connect to"}
	case kindHost:
		flag := ""
		if port != 0 {
			flag = fmt.Sprintf("--allow-host %d, and then the name host.banger", port)
		}
		return verdict{reason: "the host itself", flag: flag}
	case kindVM:
		return verdict{reason: "another VM, or none", flag: "--net " + p.String() + ",group:NAME, for both VMs"}
	case kindUnrouted:
		return verdict{quiet: true, reason: "the host has no route to it"}
	case kindLinkLocal:
		if listed {
			return verdict{allow: true}
		}
		return verdict{reason: "a link-local address, where clouds keep metadata and credentials", flag: add()}
	case kindPrivate, kindLAN:
		if listed || p.Mode == ModeFull {
			return verdict{allow: true}
		}
		reason := "a private address"
		if k == kindLAN {
			reason = "on a network of the host's own"
		}
		if named {
			reason += ", which the rule for " + name + " does not open"
		}
		return verdict{reason: reason, flag: add()}
	}
	if listed || named || p.Mode == ModeFull || p.Mode == ModePublic {
		return verdict{allow: true}
	}
	return verdict{reason: "not in the list of what is allowed", flag: add()}
}

// with is the policy with one rule more, the narrowest for that flow.
func (p Policy) with(addr netip.Addr, port uint16, names []string, k kind) Policy {
	p.Names, p.Prefixes = slices.Clone(p.Names), slices.Clone(p.Prefixes)
	if k == kindPublic && len(names) > 0 {
		p.Names = append(p.Names, NameRule{names[0], port})
	} else {
		p.Prefixes = append(p.Prefixes, PrefixRule{netip.PrefixFrom(addr, addr.BitLen()), port})
	}
	p.normalise()
	return p
}
