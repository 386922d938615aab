// Package apt reads the host's apt sources, sources.list(5): where this host
// gets its packages is the best guess at a mirror that it can reach. Whatever
// a mirror answers is verified by who asks it; nothing here is trusted.
package apt

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	maxFiles      = 256
	maxFileBytes  = 1 << 20
	maxFieldBytes = 16 << 10 // of a deb822 field, from where on lines are not added
)

// A Source is one suite of one archive of binary packages.
type Source struct {
	URI        string
	Suite      string
	Components []string
	SignedBy   string // path of a keyring, or ""; a key written out counts as ""
}

// Sources reads the sources below dir (normally /etc/apt), in the order of
// their files. What cannot be read or understood is passed over: the files are
// somebody else's.
func Sources(dir string) []Source {
	names := []string{filepath.Join(dir, "sources.list")}
	if entries, err := os.ReadDir(filepath.Join(dir, "sources.list.d")); err == nil {
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); ext == ".list" || ext == ".sources" {
				names = append(names, filepath.Join(dir, "sources.list.d", e.Name()))
			}
		}
	}
	var all []Source
	for _, name := range names[:min(len(names), maxFiles)] {
		data, err := readFile(name)
		if err != nil {
			continue
		}
		if filepath.Ext(name) == ".sources" {
			all = append(all, ParseDeb822(data)...)
		} else {
			all = append(all, ParseList(data)...)
		}
	}
	return all
}

// readFile reads a regular file of at most maxFileBytes.
func readFile(name string) ([]byte, error) {
	st, err := os.Stat(name) // a FIFO must not be opened: it would block
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFileBytes {
		return nil, os.ErrInvalid
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFileBytes))
}

// ParseList reads the one-line style: "deb [options] URI SUITE COMPONENT...".
func ParseList(data []byte) []Source {
	var all []Source
	for line := range strings.Lines(string(data)) {
		line, _, _ := strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == "" || (rest[0] != ' ' && rest[0] != '\t' && rest[0] != '[') {
			continue
		}
		s := Source{}
		if rest = strings.TrimSpace(rest); strings.HasPrefix(rest, "[") {
			options, after, ok := strings.Cut(rest[1:], "]")
			if !ok {
				continue
			}
			for o := range strings.FieldsSeq(options) {
				if path, ok := strings.CutPrefix(o, "signed-by="); ok {
					s.SignedBy = path
				}
			}
			rest = after
		}
		fields := strings.Fields(rest)
		if len(fields) < 2 {
			continue
		}
		s.URI, s.Suite, s.Components = fields[0], fields[1], fields[2:]
		all = append(all, s)
	}
	return all
}

// ParseDeb822 reads the style of *.sources files.
func ParseDeb822(data []byte) []Source {
	var all []Source
	for _, stanza := range stanzas(data) {
		if !slices.Contains(strings.Fields(stanza["types"]), "deb") {
			continue
		}
		switch strings.ToLower(strings.TrimSpace(stanza["enabled"])) {
		case "no", "false", "without", "off", "disable":
			continue
		}
		signedBy := stanza["signed-by"]
		if strings.Contains(signedBy, "\n") {
			signedBy = ""
		}
		for _, uri := range strings.Fields(stanza["uris"]) {
			for _, suite := range strings.Fields(stanza["suites"]) {
				all = append(all, Source{URI: uri, Suite: suite, Components: strings.Fields(stanza["components"]), SignedBy: signedBy})
			}
		}
	}
	return all
}

// stanzas splits a control file: field names in lower case, continuation lines
// joined with a newline. Lines that are none of that are passed over.
func stanzas(data []byte) []map[string]string {
	var all []map[string]string
	var stanza map[string]string
	var field string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			stanza, field = nil, ""
		case line[0] == ' ' || line[0] == '\t':
			if field != "" && len(stanza[field]) < maxFieldBytes {
				stanza[field] += "\n" + strings.TrimSpace(line)
			}
		default:
			name, value, ok := strings.Cut(line, ":")
			if !ok {
				field = ""
				continue
			}
			if stanza == nil {
				stanza = make(map[string]string)
				all = append(all, stanza)
			}
			field = strings.ToLower(strings.TrimSpace(name))
			stanza[field] = strings.TrimSpace(value)
		}
	}
	return all
}
