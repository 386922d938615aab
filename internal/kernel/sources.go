package kernel

import (
	"net/url"
	"slices"
	"strings"

	"banger/internal/apt"
)

// maxMirrors bounds the mirrors of one kind, tried in order.
const maxMirrors = 16

// Debian's own addresses, used where the host names no mirror.
var (
	defaultMirrors         = []string{"http://deb.debian.org/debian"}
	defaultSecurityMirrors = []string{"http://security.debian.org/debian-security", "http://deb.debian.org/debian-security"}
)

// mirrors says where the two Debian archives may be found, in the order in
// which to ask. What they answer is verified, so order is not trust.
type mirrors struct {
	main     []string // holds SUITE and SUITE-updates
	security []string // holds SUITE-security
}

// hostMirrors puts the mirrors that the host's own apt sources below dir
// (normally /etc/apt) name before Debian's own.
func hostMirrors(dir string) mirrors {
	var m mirrors
	for _, s := range apt.Sources(dir) {
		m.add(s.URI, s.Suite)
	}
	for _, uri := range defaultMirrors {
		appendMirror(&m.main, uri)
	}
	for _, uri := range defaultSecurityMirrors {
		appendMirror(&m.security, uri)
	}
	return m
}

// add takes an entry whose suite is one of Debian's. A third party's archive
// may use the same suite names; it is found out by its signature.
func (m *mirrors) add(uri, suite string) {
	codename, kind, _ := strings.Cut(suite, "-")
	if !slices.Contains(Suites, codename) {
		return
	}
	switch kind {
	case "", "updates":
		appendMirror(&m.main, uri)
	case "security":
		appendMirror(&m.security, uri)
	}
}

// appendMirror adds an http or https address, once.
func appendMirror(list *[]string, uri string) {
	u, err := url.Parse(uri)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || strings.ContainsAny(uri, " \t\r\n\x00") {
		return
	}
	if uri = strings.TrimRight(uri, "/"); len(*list) < maxMirrors && !slices.Contains(*list, uri) {
		*list = append(*list, uri)
	}
}
