package kernel

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
)

// FuzzInRelease: whatever the framing, text is returned only if the key signed
// exactly that text.
func FuzzInRelease(f *testing.F) {
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	key := newKey(f, now, 0)
	text := "Codename: bookworm\nDate: Mon, 01 Jun 2026 10:00:00 UTC\n- dashed\nSHA256:\n x\n"
	signed := clearSign(f, key, text, now)
	f.Add(signed)
	f.Add(append(bytes.Clone(signed), signed...))
	f.Add(bytes.ReplaceAll(signed, []byte("\n"), []byte("\r\n")))
	f.Add(bytes.Replace(signed, []byte("Hash: "), []byte("Hash: SHA1\nHash: "), 1))
	f.Add(signed[:len(signed)/2])
	f.Add([]byte(beginSigned + "\n\n" + beginSignature + "\n\n" + endSignature))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := verifyClearSigned(data, openpgp.EntityList{key}, now)
		if err == nil && strings.TrimRight(string(got), "\n") != strings.TrimRight(text, "\n") {
			t.Errorf("taken as signed: %q", got)
		}
	})
}

func FuzzRelease(f *testing.F) {
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	f.Add([]byte("Codename: bookworm\nDate: Mon, 01 Jun 2026 10:00:00 UTC\nValid-Until: Mon, 08 Jun 2026 10:00:00 UTC\nSHA256:\n " + strings.Repeat("0a", 32) + " 17 main/binary-amd64/Packages.xz\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseRelease(data, "bookworm", now)
		if err != nil {
			return
		}
		for name, e := range r.files {
			if e.sizeBytes < 0 {
				t.Errorf("%q: size %d", name, e.sizeBytes)
			}
		}
	})
}

func FuzzPackages(f *testing.F) {
	f.Add([]byte(stanza("linux-image-6.1.0-9-cloud-amd64", "6.1.99-1", "kmod", "pool/x.deb", nil) + stanza(metaPackage, "1", "linux-image-6.1.0-9-cloud-amd64 (= 6.1.99-1)", "pool/y.deb", nil)))
	f.Add([]byte("Package:\n Version\n\n\n:\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		pkgs, err := parsePackages(bytes.NewReader(data), "linux-image-")
		if err != nil {
			return
		}
		p, release, err := chooseKernel(pkgs)
		if err == nil && (checkRelease(release) != nil || strings.Contains(p.filename, "..") || !strings.HasPrefix(p.filename, "pool/")) {
			t.Errorf("chose release %q, file %q", release, p.filename)
		}
	})
}

func FuzzMirrors(f *testing.F) {
	f.Add("http://one.example/debian", "bookworm")
	f.Add("ftp://one.example?x", "bookworm-security")
	f.Fuzz(func(t *testing.T, uri, suite string) {
		var m mirrors
		m.add(uri, suite)
		for _, uri := range append(m.main, m.security...) {
			if !strings.HasPrefix(strings.ToLower(uri), "http") || strings.ContainsAny(uri, " \n\x00") {
				t.Errorf("mirror %q", uri)
			}
		}
	})
}

func FuzzDeb(f *testing.F) {
	f.Add(fakeKernelDeb(f, "", "", testRelease))
	f.Add(fakeKernelDeb(f, ".gz", "usr/", testRelease))
	f.Add(fakeDeb(f, ".xz", []testFile{{"boot/vmlinuz-" + testRelease, []byte("k")}}))
	f.Add(fakeDeb(f, ".zst", []testFile{{"lib/modules/" + testRelease + "/../x.ko", []byte("k")}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		readKernelDeb(bytes.NewReader(data), testRelease, func(name string, size int64, r io.Reader) error {
			want, err := wantFile(name, size)
			if err == nil && want && (strings.Contains("/"+name+"/", "/../") || strings.HasPrefix(name, "/")) {
				t.Errorf("module file %q", name)
			}
			return err
		})
	})
}

func FuzzKernelImage(f *testing.F) {
	elf := fakeVmlinux(testRelease, true)
	f.Add(elf)
	f.Add(fakeVmlinuz(f, testRelease))
	for _, ext := range []string{".lz4", ".xz", ".gz"} {
		f.Add(fakeBzImage(testRelease, withSize(compress(f, ext, elf), len(elf))))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, release, err := unpackKernel(data); err == nil && checkRelease(release) != nil {
			t.Errorf("release %q", release)
		}
	})
}

func FuzzModule(f *testing.F) {
	for _, file := range fakeModules(f, testRelease, "") {
		f.Add(file.data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseModule("kernel/x.ko", data, testRelease)
		if err != nil {
			return
		}
		ix, err := newModuleIndex([]*module{m}, map[string][]byte{"modules.order": data, "modules.builtin": data, "modules.builtin.modinfo": data})
		if err != nil {
			return
		}
		lists, err := ix.lists()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range lists {
			if l.name == "modules.dep" && bytes.Count(l.data, []byte("\n")) != 1 {
				t.Errorf("modules.dep of one module: %q", l.data)
			}
			if strings.HasSuffix(l.name, ".bin") {
				readKeyIndex(t, l.data)
			}
		}
	})
}
