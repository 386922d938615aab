package kernel

import (
	"bufio"
	"bytes"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	maxSourcesFiles     = 256
	maxSourcesFileBytes = 1 << 20
	maxFieldBytes       = 16 << 10 // of a field, from where on lines are not added
	maxMirrors          = 16       // of one kind, tried in order
)

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

// hostMirrors reads the apt sources below dir (normally /etc/apt) and puts
// the mirrors found there before Debian's own. What cannot be read or
// understood is passed over: the file is somebody else's.
func hostMirrors(dir string) mirrors {
	var m mirrors
	files := []string{filepath.Join(dir, "sources.list")}
	if entries, err := os.ReadDir(filepath.Join(dir, "sources.list.d")); err == nil {
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); ext == ".list" || ext == ".sources" {
				files = append(files, filepath.Join(dir, "sources.list.d", e.Name()))
			}
		}
	}
	for _, name := range files[:min(len(files), maxSourcesFiles)] {
		data, err := readSmallFile(name, maxSourcesFileBytes)
		if err != nil {
			continue
		}
		if filepath.Ext(name) == ".sources" {
			m.readDeb822(data)
		} else {
			m.readOneLine(data)
		}
	}
	for _, uri := range defaultMirrors {
		appendMirror(&m.main, uri)
	}
	for _, uri := range defaultSecurityMirrors {
		appendMirror(&m.security, uri)
	}
	return m
}

// readSmallFile reads a regular file of at most limit bytes.
func readSmallFile(name string, limit int64) ([]byte, error) {
	st, err := os.Stat(name) // a FIFO must not be opened: it would block
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return nil, os.ErrInvalid
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// readDeb822 reads a *.sources file (sources.list(5), deb822 style).
func (m *mirrors) readDeb822(data []byte) {
	for _, stanza := range deb822Stanzas(data) {
		if !slices.Contains(strings.Fields(stanza["types"]), "deb") {
			continue
		}
		switch strings.ToLower(strings.TrimSpace(stanza["enabled"])) {
		case "no", "false", "without", "off", "disable":
			continue
		}
		for _, uri := range strings.Fields(stanza["uris"]) {
			for _, suite := range strings.Fields(stanza["suites"]) {
				m.add(uri, suite)
			}
		}
	}
}

// readOneLine reads a *.list file: "deb [options] URI SUITE COMPONENT...".
func (m *mirrors) readOneLine(data []byte) {
	sc := bufio.NewScanner(bytes.NewReader(data))
	for sc.Scan() { // an overlong line ends the reading
		line, _, _ := strings.Cut(sc.Text(), "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == "" || (rest[0] != ' ' && rest[0] != '\t' && rest[0] != '[') {
			continue
		}
		if rest = strings.TrimSpace(rest); strings.HasPrefix(rest, "[") {
			if _, rest, ok = strings.Cut(rest, "]"); !ok {
				continue
			}
		}
		if fields := strings.Fields(rest); len(fields) >= 2 {
			m.add(fields[0], fields[1])
		}
	}
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
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return
	}
	if uri = strings.TrimRight(uri, "/"); len(*list) < maxMirrors && !slices.Contains(*list, uri) {
		*list = append(*list, uri)
	}
}

// deb822Stanzas splits a small control file into its stanzas: field names in
// lower case, continuation lines joined with a newline. Lines that are none of
// that are passed over.
func deb822Stanzas(data []byte) []map[string]string {
	var stanzas []map[string]string
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
				stanzas = append(stanzas, stanza)
			}
			field = strings.ToLower(strings.TrimSpace(name))
			stanza[field] = strings.TrimSpace(value)
		}
	}
	return stanzas
}
