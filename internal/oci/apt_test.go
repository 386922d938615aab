package oci

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/internal/apt"
)

func TestParsePackages(t *testing.T) {
	got, err := ParsePackages("list", strings.NewReader("# tools\r\nvim\r\n\n  git  # versions\ng++\nlibc6:i386\nvim\n"))
	if want := []string{"vim", "git", "g++", "libc6:i386"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
	for in, want := range map[string]string{
		"": "no package in it", "# only\n": "no package in it", "--option\n": "not a package name", "a b\n": "line 1", "ok\nvim=1.0\n": "line 2",
		"Vim\n": "not a package name", "a\n": "not a package name", "x,y\n": "not a package name", "x;rm\n": "not a package name", "?essential\n": "not a package name",
		"apt-\n": "not a package name", "apt+\n": "not a package name", "ab/stable\n": "not a package name", "vim:I386\n": "not a package name",
		strings.Repeat("a", maxPackageListBytes+1): "more than 1048576 bytes",
	} {
		_, err := ParsePackages("my list", strings.NewReader(in))
		e, ok := errors.AsType[*banger.Error](err)
		if !ok || !strings.Contains(e.Message, want) || !strings.Contains(e.Message, `"my list"`) {
			t.Errorf("%q: error %v, want %q", clip(in), err, want)
		}
	}
}

func FuzzParsePackages(f *testing.F) {
	f.Add([]byte("vim\n# x\r\ngit:amd64"))
	f.Add([]byte("-o\nx=1"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := ParsePackages("fuzz", bytes.NewReader(raw))
		if err != nil {
			return
		}
		for _, p := range list {
			if p == "" || strings.HasPrefix(p, "-") || strings.ContainsAny(p, " ,=/*?~\"'\n\r\t()|&;$") {
				t.Errorf("package %q", p)
			}
		}
		again, err := ParsePackages("fuzz", strings.NewReader(strings.Join(list, "\n")))
		if err != nil || !slices.Equal(again, list) {
			t.Errorf("%q, then %q, %v", list, again, err)
		}
	})
}

func TestAptSources(t *testing.T) {
	const key = "/usr/share/keyrings/debian-archive-keyring.gpg"
	all := func(string) bool { return true }
	deb822 := "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: " + key + "\n\n" +
		"Types: deb deb-src\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n xyz\n\n" +
		"Types: deb\nURIs: https://somebody.example/debian\nSuites: bookworm\nComponents: main\nSigned-By: /etc/apt/keyrings/somebody.gpg\n\n" +
		"Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: trixie\nComponents: main\n"
	oneLine := "# deb http://commented.example/debian trixie main\ndeb [arch=amd64 signed-by=/etc/apt/keyrings/x.gpg] https://x.example/debian trixie main\ndeb cdrom:[Debian]/ trixie main\ndeb http://deb.example/debian trixie main # local\n"
	host := append(apt.ParseDeb822([]byte(deb822)), apt.ParseList([]byte(oneLine))...)
	for _, tt := range []struct {
		suite string
		host  []apt.Source
		want  []string
	}{
		{"bookworm", host, []string{
			"deb [signed-by=" + key + "] http://mirror.example/debian bookworm main contrib",
			"deb [signed-by=" + key + "] http://mirror.example/debian bookworm-updates main contrib",
			"deb [signed-by=" + key + "] http://mirror.example/debian-security bookworm-security main"}},
		{"trixie", host, []string{"deb [signed-by=" + key + "] http://deb.example/debian trixie main"}},
		{"bookworm", nil, []string{
			"deb [signed-by=" + key + "] http://deb.debian.org/debian bookworm main",
			"deb [signed-by=" + key + "] http://deb.debian.org/debian bookworm-updates main",
			"deb [signed-by=" + key + "] http://deb.debian.org/debian-security bookworm-security main"}},
		{"sid", nil, []string{"deb [signed-by=" + key + "] http://deb.debian.org/debian sid main"}},
	} {
		got, err := aptLines("i", tt.suite, tt.host, all)
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, %v, want %q", tt.suite, got, err, tt.want)
		}
	}
	_, err := aptLines("apt:noble", "noble", nil, func(p string) bool { return strings.Contains(p, "debian") })
	wantError(t, "no key", err, banger.CodeUnavailable, "the archive key of ubuntu is not on this host")
	_, err = aptLines("apt:nowhere", "nowhere", nil, all)
	wantError(t, "no suite", err, banger.CodeNotFound, "no suite that is known")
}

func TestAptResolve(t *testing.T) {
	_, err := (&Source{Packages: []string{"vim"}}).Resolve(t.Context(), ref(t, "debian"))
	wantError(t, "packages for a registry image", err, banger.CodeUsage, "apt: images only")
	_, err = (&Source{Packages: []string{"--x"}}).Resolve(t.Context(), ref(t, "apt:bookworm"))
	wantError(t, "an option as a package", err, banger.CodeUsage, "not a package name")
	_, err = (&Source{Platform: "linux/s390x"}).Resolve(t.Context(), ref(t, "apt:bookworm"))
	wantError(t, "platform", err, banger.CodeUsage, "cannot be built for")
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	_, err = (&Source{}).Resolve(t.Context(), ref(t, "apt:bookworm"))
	wantError(t, "no mmdebstrap", err, banger.CodeUnavailable, "mmdebstrap is not installed")
	t.Setenv("PATH", path)
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		missing(t, "mmdebstrap is not installed")
	}
	names := map[string]bool{}
	for _, p := range [][]string{nil, {"vim"}, {"vim", "git"}, {"git", "vim", "git"}, {"dbus"}} {
		img, err := (&Source{Packages: p}).Resolve(t.Context(), ref(t, "apt:bookworm"))
		if err != nil {
			t.Fatal(err)
		}
		names[img.Name] = true
	}
	if len(names) != 3 || !names["apt:bookworm"] {
		t.Errorf("names %v", names)
	}
}

func TestAptFilter(t *testing.T) {
	for name, want := range map[string]bool{
		"./etc/machine-id": true, "./etc/hostname": false, "./etc/resolv.conf": false, "./etc/ssh/ssh_host_rsa_key": false, "./etc/ssh/ssh_config": true,
		"./var/cache/apt/pkgcache.bin": false, "./var/lib/apt/lists/lock": false, "./var/log/dpkg.log": false, "./var/log/apt/term.log": false, "./var/log/btmp": true,
		"./var/lib/systemd/random-seed": false, "./usr/bin/env": true,
	} {
		e := &entry{name: name, typ: modeRegular, size: 5}
		if aptFilter(e) != want || name == "./etc/machine-id" && e.size != 0 {
			t.Errorf("%s: kept %v", name, !want)
		}
	}
	if !aptFilter(&entry{name: "./var/cache/apt/", typ: modeDir}) {
		t.Error("a folder was left out")
	}
}

// fakeMmdebstrap puts a script in the place of mmdebstrap.
func fakeMmdebstrap(t *testing.T, script string) {
	t.Helper()
	d := t.TempDir()
	if err := os.WriteFile(d+"/mmdebstrap", []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", d+":"+os.Getenv("PATH"))
}

func TestAptRun(t *testing.T) {
	if !keyringExists(keyringDir + "/debian-archive-keyring.gpg") {
		missing(t, "debian-archive-keyring is not installed")
	}
	raw := tarOf(t, []te{dir("etc"), f("etc/machine-id", "abc"), f("etc/hostname", "host"), f("etc/motd", "x")})
	file := t.TempDir() + "/x.tar"
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(ctx context.Context, script string) (*Tree[int], *memSink, error) {
		fakeMmdebstrap(t, script)
		img, err := (&Source{}).Resolve(ctx, ref(t, "apt:bookworm"))
		if err != nil {
			t.Fatal(err)
		}
		sink := &memSink{}
		tree, err := Squash(ctx, img, sink)
		return tree, sink, err
	}
	tree, sink, err := run(t.Context(), "cat "+file)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := dump(tree, sink), []string{"/ 40755 0", "/etc 40755 0", `/etc/machine-id 100644 0 ""`, `/etc/motd 100644 0 "x"`}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for _, tt := range []struct {
		script, err, detail string
		code                banger.Code
	}{
		{"cat " + file + "; echo E: it broke >&2; exit 25", "mmdebstrap: exit status 25", "E: it broke", banger.CodeUnavailable},
		{"echo 'E: Unable to locate package nosuch' >&2; exit 1", `no package "nosuch" in bookworm`, "", banger.CodeNotFound},
		{"echo 'NO_PUBKEY 0123' >&2; exit 1", "archive key of bookworm", "", banger.CodeUnavailable},
		{"head -c 1000000 /dev/zero | tr '\\0' x >&2; echo LAST >&2; exit 1", "mmdebstrap: exit status 1", "xxxLAST", banger.CodeUnavailable},
		{"head -c 1024 " + file, "cut short", "", banger.CodeInvalid},
	} {
		_, _, err := run(t.Context(), tt.script)
		wantError(t, tt.script, err, tt.code, tt.err)
		if e, ok := errors.AsType[*banger.Error](err); ok && (!strings.Contains(e.Detail, tt.detail) || len(e.Detail) > 2*aptTailBytes) {
			t.Errorf("%s: detail of %d bytes: %q", tt.script, len(e.Detail), clip(e.Detail))
		}
	}
	// A cancel ends its children too.
	before := runtime.NumGoroutine()
	mark := t.TempDir() + "/mark"
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, _, err = run(ctx, "(sleep 3; touch "+mark+") & wait")
	wantError(t, "cancelled", err, banger.CodeCanceled, "deadline")
	waitGoroutines(t, before)
	time.Sleep(3500 * time.Millisecond)
	if _, err := os.Stat(mark); err == nil {
		t.Error("a child outlived the cancel")
	}
}

// What the filter leaves out decides nothing: not even the identity of what is
// made of the rest.
func TestAptDigest(t *testing.T) {
	if !keyringExists(keyringDir + "/debian-archive-keyring.gpg") {
		missing(t, "debian-archive-keyring is not installed")
	}
	digest := func(entries ...te) string {
		t.Helper()
		file := t.TempDir() + "/x.tar"
		if err := os.WriteFile(file, tarOf(t, entries), 0o600); err != nil {
			t.Fatal(err)
		}
		fakeMmdebstrap(t, "cat "+file)
		img, err := (&Source{}).Resolve(t.Context(), ref(t, "apt:bookworm"))
		if err != nil {
			t.Fatal(err)
		}
		tree, err := Squash(t.Context(), img, &memSink{})
		if err != nil {
			t.Fatal(err)
		}
		return tree.InputDigest
	}
	base := []te{dir("etc"), f("etc/motd", "x"), f("etc/machine-id", "abc"), f("etc/hostname", "host"), dir("etc/ssh"), f("etc/ssh/ssh_host_rsa_key", "one")}
	want := digest(base...)
	if got := digest(dir("etc"), f("etc/motd", "x"), f("etc/machine-id", ""), dir("etc/ssh"), f("etc/ssh/ssh_host_rsa_key", "another"), f("etc/ssh/ssh_host_dsa_key", "")); got != want {
		t.Errorf("%s, another host gives %s", want, got)
	}
	seen := map[string]string{want: "the same"}
	for name, changed := range map[string]te{
		"content": f("etc/motd", "y"), "size": f("etc/motd", "xx"), "name": f("etc/mote", "x"), "mode": moded(f("etc/motd", "x"), 0o600),
		"owner": owned(f("etc/motd", "x"), 7), "type": dir("etc/motd"), "symlink": sym("etc/motd", "x"), "another target": sym("etc/motd", "y"),
	} {
		entries := slices.Clone(base)
		entries[1] = changed
		got := digest(entries...)
		if other, ok := seen[got]; ok {
			t.Errorf("%s and %s: %s", name, other, got)
		}
		seen[got] = name
	}
}
