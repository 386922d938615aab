package apt

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestParseList(t *testing.T) {
	for line, want := range map[string][]Source{
		"deb http://m/debian bookworm main contrib\n":        {{"http://m/debian", "bookworm", []string{"main", "contrib"}, ""}},
		"deb\t[arch=amd64 signed-by=/k.gpg] http://m s main": {{"http://m", "s", []string{"main"}, "/k.gpg"}},
		"deb[trusted=yes] http://m s main":                   {{"http://m", "s", []string{"main"}, ""}},
		"deb http://m ./":                                    {{"http://m", "./", []string{}, ""}},
		"deb http://m s main # local":                        {{"http://m", "s", []string{"main"}, ""}},
		"# deb http://m s main":                              nil,
		"deb-src http://m s main":                            nil,
		"debug http://m s main":                              nil,
		"deb [signed-by=/k http://m s main":                  nil,
		"deb http://m":                                       nil,
		"deb":                                                nil,
		"":                                                   nil,
		"deb http://a s main\r\nrpm http://b\ndeb http://c t x": {{"http://a", "s", []string{"main"}, ""}, {"http://c", "t", []string{"x"}, ""}},
	} {
		if got := ParseList([]byte(line)); !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\n got %q\nwant %q", line, got, want)
		}
	}
}

func TestParseDeb822(t *testing.T) {
	main := []string{"main"}
	for text, want := range map[string][]Source{
		"Types: deb\nURIs: http://a http://b\nSuites: s s-updates\nComponents: main\nSigned-By: /k.gpg\n": {
			{"http://a", "s", main, "/k.gpg"}, {"http://a", "s-updates", main, "/k.gpg"},
			{"http://b", "s", main, "/k.gpg"}, {"http://b", "s-updates", main, "/k.gpg"}},
		"types: deb-src deb\n# remark\nuris:\n http://a\n http://b\nsuites: s\ncomponents: main\r\n": {
			{"http://a", "s", main, ""}, {"http://b", "s", main, ""}},
		"Types: deb\nURIs: http://a\nSuites: s\nComponents: main\nSigned-By:\n -----BEGIN\n .\n x\n": {{"http://a", "s", main, ""}},
		"Types: deb\nEnabled: no\nURIs: http://a\nSuites: s\nComponents: main\n":                     nil,
		"Types: deb-src\nURIs: http://a\nSuites: s\nComponents: main\n":                              nil,
		"Types: deb\nURIs: http://a\n\nSuites: s\nComponents: main\n":                                nil, // two stanzas
		"no field\n x\n": nil,
	} {
		if got := ParseDeb822([]byte(text)); !reflect.DeepEqual(got, want) {
			t.Errorf("%q:\n got %q\nwant %q", text, got, want)
		}
	}
}

func TestSources(t *testing.T) {
	dir := t.TempDir()
	if got := Sources(filepath.Join(dir, "nothing")); got != nil {
		t.Errorf("nothing there: %q", got)
	}
	os.Mkdir(filepath.Join(dir, "sources.list.d"), 0o755)
	for name, text := range map[string]string{
		"sources.list":               "deb http://a s main\n",
		"sources.list.d/b.sources":   "Types: deb\nURIs: http://b\nSuites: s\nComponents: main\n",
		"sources.list.d/c.list":      "deb http://c s main\n",
		"sources.list.d/d.list.save": "deb http://d s main\n",
		"sources.list.d/e.list":      "#" + strings.Repeat("x", maxFileBytes) + "\ndeb http://e s main\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, s := range Sources(dir) {
		got = append(got, s.URI)
	}
	if want := "http://a http://b http://c"; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzSources(f *testing.F) {
	f.Add([]byte("deb [signed-by=/k] http://m s main\n"))
	f.Add([]byte("Types: deb\nURIs: http://m\nSuites: s\nComponents: main\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, s := range append(ParseList(data), ParseDeb822(data)...) {
			if s.URI == "" || s.Suite == "" || strings.ContainsAny(s.URI+s.Suite, " \t\n") {
				t.Errorf("%q", s)
			}
		}
	})
}
