package usernet

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"banger"
)

func TestParsePolicy(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "public",
		"public":                           "public",
		"full":                             "full",
		"none":                             "none",
		"group:lab":                        "public,group:lab",
		"none,group:lab,group:a-1":         "none,group:a-1,group:lab",
		"allow:deb.debian.org":             "none,allow:deb.debian.org",
		"allow:Deb.Debian.Org.:443":        "none,allow:deb.debian.org:443",
		"allow:*.example.com:443,b.org":    "none,allow:*.example.com:443,allow:b.org",
		"public,allow:10.1.2.3:5432":       "public,allow:10.1.2.3:5432",
		"allow:10.1.2.3/8":                 "none,allow:10.0.0.0/8",
		"allow:10.0.0.0/8:443":             "none,allow:10.0.0.0/8:443",
		"allow:2001:db8::1":                "none,allow:2001:db8::1",
		"allow:[2001:db8::1]:22":           "none,allow:[2001:db8::1]:22",
		"allow:[2001:db8::]":               "none,allow:2001:db8::",
		"allow:[2001:db8::/32]:22":         "none,allow:[2001:db8::/32]:22",
		"allow:::ffff:10.1.2.3":            "none,allow:10.1.2.3",
		"allow:a.b,a.b,allow:a.b":          "none,allow:a.b",
		"allow:a.b,public":                 "public,allow:a.b",
		"allow:" + strings.Repeat("a", 63): "none,allow:" + strings.Repeat("a", 63),
		"allow:h:65535":                    "none,allow:h:65535",
	} {
		p, err := ParsePolicy(text)
		if err != nil || p.String() != want {
			t.Errorf("%q: %q, %v; want %q", text, p, err, want)
		}
	}
	for name, text := range map[string]string{
		"no mode":              "publik",
		"two modes":            "public,none",
		"an empty item":        "public,",
		"a name without allow": "example.com",
		"a mode ends allow":    "allow:a.b,public,c.d",
		"port 0":               "allow:a.b:0",
		"port 65536":           "allow:a.b:65536",
		"port +1":              "allow:a.b:+1",
		"port 01":              "allow:a.b:01",
		"no port":              "allow:a.b:",
		"a label of 64":        "allow:" + strings.Repeat("a", 64),
		"a number for a name":  "allow:10.1",
		"hex for a name":       "allow:0x7f000001",
		"a zone":               "allow:fe80::1%eth0",
		"no bracket":           "allow:[2001:db8::1",
		"mapped prefix":        "allow:::ffff:0:0/96",
		"a star inside":        "allow:a.*.b",
		"a star alone":         "allow:*",
		"a blank":              "allow:a b",
		"a group in capitals":  "group:Lab",
		"an empty group":       "group:",
		"too long":             "allow:" + strings.Repeat("a.", maxPolicyBytes),
		"too many":             "allow:" + strings.TrimSuffix(strings.Repeat("10.0.0.1,10.0.0.2,", maxRules), ","),
	} {
		if p, err := ParsePolicy(text); banger.CodeOf(err) != banger.CodeUsage {
			t.Errorf("%s: %q became %v, %v", name, text[:min(len(text), 60)], p, err)
		}
	}
}

// checkPolicyText is what holds for every text.
func checkPolicyText(t *testing.T, text string) {
	p, err := ParsePolicy(text)
	if err != nil {
		return
	}
	again, err := ParsePolicy(p.String())
	if err != nil || !reflect.DeepEqual(p, again) {
		t.Fatalf("%q is %q, and that is %+v, %v", text, p, again, err)
	}
}

func FuzzParsePolicy(f *testing.F) {
	for _, text := range []string{"", "public", "none,group:a", "allow:a.b:1,10.0.0.0/8,[2001:db8::/32]:5,*.c"} {
		f.Add(text)
	}
	f.Fuzz(checkPolicyText)
}

func TestJudge(t *testing.T) {
	const public, lan, private, metadata = "198.51.100.7", "192.168.77.9", "10.1.2.3", "169.254.169.254"
	for _, row := range []struct {
		policy, addr string
		kind         kind
		names        string
		allow        bool
	}{
		{"public", public, kindPublic, "", true},
		{"public", lan, kindLAN, "", false},
		{"public", private, kindPrivate, "", false},
		{"public", metadata, kindLinkLocal, "", false},
		{"public", "127.0.0.1", kindHost, "", false},
		{"public", "10.87.0.6", kindVM, "", false},
		{"public", "224.0.0.1", kindNowhere, "", false},
		{"public", public, kindUnrouted, "", false},
		{"full", public, kindPublic, "", true},
		{"full", lan, kindLAN, "", true},
		{"full", private, kindPrivate, "", true},
		{"full", metadata, kindLinkLocal, "", false},
		{"full", "127.0.0.1", kindHost, "", false},
		{"full", "10.87.0.6", kindVM, "", false},
		{"full", "224.0.0.1", kindNowhere, "", false},
		{"none", public, kindPublic, "", false},
		{"none", lan, kindLAN, "", false},
		{"public,allow:10.1.2.3", private, kindPrivate, "", true},
		{"public,allow:10.1.2.3:80", private, kindPrivate, "", true},
		{"public,allow:10.1.2.3:81", private, kindPrivate, "", false},
		{"public,allow:10.1.2.4", private, kindPrivate, "", false},
		{"allow:0.0.0.0/0", public, kindPublic, "", true},
		{"allow:0.0.0.0/0", lan, kindLAN, "", true},
		{"allow:0.0.0.0/0", metadata, kindLinkLocal, "", false},
		{"allow:0.0.0.0/0", "127.0.0.1", kindHost, "", false},
		{"allow:0.0.0.0/0", "10.87.0.6", kindVM, "", false},
		{"allow:169.254.0.0/15", metadata, kindLinkLocal, "", false},
		{"allow:169.254.0.0/16", metadata, kindLinkLocal, "", true},
		{"allow:169.254.169.254", metadata, kindLinkLocal, "", true},
		{"allow:127.0.0.1", "127.0.0.1", kindHost, "", false},
		{"allow:a.b", public, kindPublic, "", false},
		{"allow:a.b", public, kindPublic, "a.b", true},
		{"allow:a.b", public, kindPublic, "x.y a.b", true},
		{"allow:a.b", public, kindPublic, "x.a.b", false},
		{"allow:a.b:80", public, kindPublic, "a.b", true},
		{"allow:a.b:81", public, kindPublic, "a.b", false},
		{"allow:*.a.b", public, kindPublic, "x.a.b", true},
		{"allow:*.a.b", public, kindPublic, "a.b", false},
		{"allow:*.a.b", public, kindPublic, "xa.b", false},
		// Rebinding: a name never opens what only an address may.
		{"allow:a.b", lan, kindLAN, "a.b", false},
		{"allow:a.b", private, kindPrivate, "a.b", false},
		{"allow:a.b", metadata, kindLinkLocal, "a.b", false},
		{"allow:a.b", "127.0.0.1", kindHost, "a.b", false},
	} {
		p, err := ParsePolicy(row.policy)
		if err != nil {
			t.Fatal(err)
		}
		addr := netip.MustParseAddr(row.addr)
		f := flow{"tcp", netip.AddrPortFrom(addr, 80)}
		v := p.judge(f, addr, row.kind, strings.Fields(row.names))
		if v.allow != row.allow || !v.allow && v.reason == "" {
			t.Errorf("%+v: %+v", row, v)
		}
	}
}

// The flag in a denial, taken as it stands, allows the flow, and no verdict
// depends on the order of rules.
func TestFlagsAllow(t *testing.T) {
	r := seeded(t)
	policies := []string{"public", "none", "allow:a.b", "public,allow:10.0.0.0/9:80", "none,group:lab,allow:*.c.d:443"}
	tried := 0
	for range 5000 {
		p, err := ParsePolicy(policies[r.IntN(len(policies))])
		if err != nil {
			t.Fatal(err)
		}
		addr := randomAddr(r)
		k := kindOf(addr, Route(r.IntN(5)))
		f := flow{"tcp", netip.AddrPortFrom(addr, uint16(1+r.IntN(65535)))}
		var names []string
		if r.IntN(2) == 0 {
			names = []string{fmt.Sprintf("n%d.example.com", r.IntN(10))}
		}
		v := p.judge(f, addr, k, names)
		flag, ok := strings.CutPrefix(v.flag, "--net ")
		if v.allow || !ok || k == kindVM {
			continue
		}
		tried++
		q, err := ParsePolicy(flag)
		if err != nil {
			t.Fatalf("%s: %v", v.flag, err)
		}
		if again := q.judge(f, addr, k, names); !again.allow {
			t.Fatalf("%v %v %v: %q does not allow it: %+v", addr, k, names, v.flag, again)
		}
		slices.Reverse(q.Prefixes)
		slices.Reverse(q.Names)
		if again := q.judge(f, addr, k, names); !again.allow {
			t.Fatalf("%q depends on the order of its rules", v.flag)
		}
	}
	if tried < 500 {
		t.Errorf("only %d flags tried", tried)
	}
}

func randomAddr(r *rand.Rand) netip.Addr {
	all := slices.Concat(nowherePrefixes, hostPrefixes, linkLocalPrefixes, privatePrefixes, []netip.Prefix{vmBlock4, vmBlock6},
		prefixes("0.0.0.0/0", "::/0", "198.51.100.0/24", "2001:db8::/32"))
	p := all[r.IntN(len(all))]
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= byte(r.IntN(2)) << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
