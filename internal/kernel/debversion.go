package kernel

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// A debVersion is a Debian package version, split (Debian Policy 5.6.12).
type debVersion struct {
	epoch              uint32
	upstream, revision string
}

const maxVersionBytes = 256

// parseDebVersion splits [epoch:]upstream[-revision] and refuses characters
// that policy does not allow there.
func parseDebVersion(s string) (debVersion, error) {
	var v debVersion
	if s == "" || len(s) > maxVersionBytes {
		return v, fmt.Errorf("version %q: empty or over %d bytes", s[:min(len(s), 64)], maxVersionBytes)
	}
	rest := s
	if e, after, ok := strings.Cut(s, ":"); ok {
		n, err := strconv.ParseUint(e, 10, 31)
		if err != nil {
			return v, fmt.Errorf("version %q: epoch is no number", s)
		}
		v.epoch, rest = uint32(n), after
	}
	v.upstream = rest
	if i := strings.LastIndexByte(rest, '-'); i >= 0 {
		v.upstream, v.revision = rest[:i], rest[i+1:]
		if v.revision == "" {
			return v, fmt.Errorf("version %q: empty revision", s)
		}
	}
	if v.upstream == "" || !isDigit(v.upstream[0]) {
		return v, fmt.Errorf("version %q: does not start with a digit", s)
	}
	for i := range len(rest) {
		if c := rest[i]; !isDigit(c) && !isLetter(c) && !strings.ContainsRune(".+-~:", rune(c)) {
			return v, fmt.Errorf("version %q: character %q", s, c)
		}
	}
	return v, nil
}

// compareDebVersions orders two valid versions as dpkg does: below 0 when a is
// the older. A version that does not parse is older than any that does.
func compareDebVersions(a, b string) int {
	va, errA := parseDebVersion(a)
	vb, errB := parseDebVersion(b)
	if errA != nil || errB != nil {
		return cmp.Compare(boolInt(errA == nil), boolInt(errB == nil))
	}
	return cmp.Or(
		cmp.Compare(va.epoch, vb.epoch),
		compareVersionPart(va.upstream, vb.upstream),
		compareVersionPart(va.revision, vb.revision),
	)
}

// compareVersionPart compares alternating runs of non-digits and digits.
func compareVersionPart(a, b string) int {
	for a != "" || b != "" {
		i, j := 0, 0
		for (i < len(a) && !isDigit(a[i])) || (j < len(b) && !isDigit(b[j])) {
			if c := cmp.Compare(versionOrder(a, i), versionOrder(b, j)); c != 0 {
				return c
			}
			i, j = i+1, j+1
		}
		a, b = a[min(i, len(a)):], b[min(j, len(b)):]
		na, restA := leadingDigits(a)
		nb, restB := leadingDigits(b)
		if c := cmp.Or(cmp.Compare(len(na), len(nb)), cmp.Compare(na, nb)); c != 0 {
			return c
		}
		a, b = restA, restB
	}
	return 0
}

// versionOrder ranks the character at i: "~" before the end of the part,
// letters before everything else.
func versionOrder(s string, i int) int {
	switch {
	case i >= len(s) || isDigit(s[i]):
		return 0
	case s[i] == '~':
		return -1
	case isLetter(s[i]):
		return int(s[i])
	}
	return int(s[i]) + 256
}

// leadingDigits returns the number at the start of s without leading zeros,
// and the rest.
func leadingDigits(s string) (number, rest string) {
	i := 0
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	return strings.TrimLeft(s[:i], "0"), s[i:]
}

func isDigit(c byte) bool  { return '0' <= c && c <= '9' }
func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
