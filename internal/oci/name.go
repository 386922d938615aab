package oci

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
)

// Name is the full name under which what ref names is kept: that of the
// reference, with a suffix where options change what is built. It is "" for
// what has no name of its own. Nothing is looked up.
func (s *Source) Name(ref Reference) string {
	switch ref.Kind {
	case KindRootfs, KindArchive:
		return ""
	case KindApt:
		if extra := extraPackages(s.Packages); len(extra) > 0 {
			sum := sha256.Sum256([]byte("packages\n" + strings.Join(extra, "\n")))
			return ref.String() + "+" + hex.EncodeToString(sum[:4])
		}
	}
	return ref.String()
}

// extraPackages are those beyond what every apt image has, sorted, once each.
func extraPackages(list []string) []string {
	extra := slices.DeleteFunc(slices.Clone(list), func(name string) bool { return slices.Contains(aptBase, name) })
	slices.Sort(extra)
	return slices.Compact(extra)
}
