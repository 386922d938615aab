package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestDebVersions orders versions by Debian Policy 5.6.12, and asks the real
// dpkg where it is there.
func TestDebVersions(t *testing.T) {
	rows := []struct {
		a, b string
		want int
	}{
		{"1.0", "1.0", 0},
		{"1.0", "1.0-0", 0},
		{"0:1.0", "1.0", 0},
		{"1:0.1", "9.9", 1},
		{"1.01", "1.1", 0},
		{"1.9", "1.10", -1},
		{"1.0~rc1", "1.0", -1},
		{"1.0~~", "1.0~~a", -1},
		{"1.0~~a", "1.0~", -1},
		{"1.0~", "1.0", -1},
		{"1.0", "1.0a", -1},
		{"1.0a", "1.0+", -1},
		{"1.0+b", "1.0.b", -1},
		{"1.0A", "1.0a", -1},
		{"1.0-1", "1.0-2", -1},
		{"1.0-1", "1.0-1+deb12u1", -1},
		{"1.0-1~bpo12+1", "1.0-1", -1},
		{"1.2-3-4", "1.2-3-5", -1},
		{"6.1.99-1", "6.1.176-1", -1},
		{"6.1.192-1", "6.1.192-2", -1},
		{"6.12.107-1", "6.1.192-2", 1},
		{"1.00000000000000000000000000000000000000001", "1.1", 0},
		{"1.99999999999999999999999999999", "1.100000000000000000000000000000", -1},
	}
	dpkg, _ := exec.LookPath("dpkg")
	for _, row := range rows {
		if got := compareDebVersions(row.a, row.b); got != row.want {
			t.Errorf("compare %s and %s: %d, want %d", row.a, row.b, got, row.want)
		}
		if got := compareDebVersions(row.b, row.a); got != -row.want {
			t.Errorf("compare %s and %s: %d, want %d", row.b, row.a, got, -row.want)
		}
		if dpkg != "" {
			op := map[int]string{-1: "lt", 0: "eq", 1: "gt"}[row.want]
			if err := exec.Command(dpkg, "--compare-versions", row.a, op, row.b).Run(); err != nil {
				t.Errorf("dpkg does not say %s %s %s", row.a, op, row.b)
			}
		}
	}
	for _, bad := range []string{"", "a1", "-1", "1.0-", "x:1", "2147483648:1", "1 0", "1/0", "1.0\n", "1.é", strings.Repeat("1", maxVersionBytes+1)} {
		if _, err := parseDebVersion(bad); err == nil {
			t.Errorf("version %q was taken", bad)
		}
	}
	if _, err := parseDebVersion(strings.Repeat("1", maxVersionBytes)); err != nil {
		t.Error(err)
	}
	if compareDebVersions("a", "1") != -1 || compareDebVersions("1", "a") != 1 || compareDebVersions("a", "b") != 0 {
		t.Error("a version that does not parse is not the oldest")
	}
}

func TestHostMirrors(t *testing.T) {
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "sources.list.d"), 0o755)
	for name, text := range map[string]string{
		"sources.list": "# deb http://comment/debian bookworm main\n" +
			"deb http://one.example/debian/ bookworm main # trailing\n" +
			"deb [arch=amd64 signed-by=/x y] https://two.example/debian-security trixie-security main\n" +
			"deb-src http://source.example/debian bookworm main\n" +
			"debhttp://glued.example bookworm main\ndeb http://short.example\n" +
			"deb cdrom:[Debian] bookworm main\ndeb file:/srv/debian bookworm main\ndeb http:///nohost bookworm main\n" +
			"deb http://other.example/debian sid main\ndeb http://ubuntu.example/ubuntu noble main\n",
		"sources.list.d/a.sources": "Types: deb deb-src\nURIs: http://three.example/debian\n http://four.example/debian\nSuites: bookworm\n bookworm-updates bookworm-backports\nComponents: main\n\n" +
			"Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: bookworm\n\n" +
			"types: deb\nuris: http://one.example/debian\nsuites: bookworm-security\nnonsense\n",
		"sources.list.d/b.list":          "deb http://one.example/debian bookworm-updates main\r\n",
		"sources.list.d/c.list.disabled": "deb http://disabled.example/debian bookworm main\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := exec.Command("mkfifo", filepath.Join(dir, "sources.list.d", "fifo.list")).Run(); err != nil {
		t.Log("no mkfifo: ", err)
	}
	m := hostMirrors(dir)
	wantMain := append([]string{"http://one.example/debian", "http://three.example/debian", "http://four.example/debian"}, defaultMirrors...)
	wantSecurity := append([]string{"https://two.example/debian-security", "http://one.example/debian"}, defaultSecurityMirrors...)
	if !slices.Equal(m.main, wantMain) || !slices.Equal(m.security, wantSecurity) {
		t.Errorf("mirrors:\n%q\n%q", m.main, m.security)
	}
	if m := hostMirrors(filepath.Join(dir, "nothing")); !slices.Equal(m.main, defaultMirrors) || !slices.Equal(m.security, defaultSecurityMirrors) {
		t.Errorf("without sources: %+v", m)
	}
}

func TestUnpackKernel(t *testing.T) {
	const release = "6.1.0-9-cloud-amd64"
	elf := fakeVmlinux(release, true)
	big := append(slices.Clone(elf), make([]byte, lz4BlockBytes)...) // two LZ4 blocks
	le := binary.LittleEndian
	edit := func(b []byte, f func([]byte)) []byte { b = slices.Clone(b); f(b); return b }
	zst := fakeVmlinuz(t, release)
	for _, row := range []struct {
		name  string
		image []byte
		want  []byte
		says  string
	}{
		{"LZ4", fakeBzImage(release, withSize(compress(t, ".lz4", elf), len(elf))), elf, ""},
		{"LZ4, two blocks", fakeBzImage(release, withSize(compress(t, ".lz4", big), len(big))), big, ""},
		{"gzip", fakeBzImage(release, compress(t, ".gz", elf)), elf, ""}, // its own trailer is the size
		{"zstd", zst, elf, ""},
		{"xz", fakeBzImage(release, withSize(compress(t, ".xz", elf), len(elf))), elf, ""},
		{"uncompressed payload", fakeBzImage(release, elf), elf, ""},
		{"ELF", elf, elf, ""},

		{"LZMA", fakeBzImage(release, withSize([]byte("\x5d\x00\x00\x00\x01"), 1)), nil, "payload is LZMA, which is not supported"},
		{"bzip2", fakeBzImage(release, withSize([]byte("BZh91AY"), 1)), nil, "payload is bzip2, which"},
		{"LZO", fakeBzImage(release, withSize([]byte("\x89LZO\x00"), 1)), nil, "payload is LZO, which"},
		{"unknown payload", fakeBzImage(release, []byte("12345678")), nil, "unknown kind"},
		{"wrong size at the end", fakeBzImage(release, withSize(compress(t, ".xz", elf), len(elf)+1)), nil, "its end says"},
		{"LZ4 cut", fakeBzImage(release, withSize(compress(t, ".lz4", elf)[:200], len(elf))), nil, "LZ4 payload: "},
		{"LZ4 block one byte short", fakeBzImage(release, withSize(edit(compress(t, ".lz4", elf), func(b []byte) { le.PutUint32(b[4:], le.Uint32(b[4:])+1) }), len(elf))), nil, "unexpected EOF"},
		{"zstd cut", fakeBzImage(release, withSize(compress(t, ".zst", elf)[:50], len(elf))), nil, "zstd payload: "},
		{"xz cut", fakeBzImage(release, withSize(compress(t, ".xz", elf)[:50], len(elf))), nil, "xz payload: "},
		{"gzip damaged", fakeBzImage(release, edit(compress(t, ".gz", elf), func(b []byte) { b[len(b)-6] ^= 1 })), nil, "gzip payload: "},

		{"empty", nil, nil, "neither a bzImage nor an ELF file"},
		{"header one byte short", zst[:setupHeaderBytes-1], nil, "neither a bzImage"},
		{"header only", zst[:setupHeaderBytes], nil, "outside the file"},
		{"no boot flag", edit(zst, func(b []byte) { b[offBootFlag] = 0 }), nil, "neither a bzImage"},
		{"no HdrS", edit(zst, func(b []byte) { b[offMagic] = 'h' }), nil, "neither a bzImage"},
		{"protocol 2.07", edit(zst, func(b []byte) { le.PutUint16(b[offProtocol:], 0x207) }), nil, "boot protocol 2.07"},
		{"payload to the end of 4 GiB", edit(zst, func(b []byte) { le.PutUint32(b[offPayloadOffset:], 1<<32-1) }), nil, "outside the file"},
		{"payload of 4 GiB", edit(zst, func(b []byte) { le.PutUint32(b[offPayloadLength:], 1<<32-1) }), nil, "outside the file"},
		{"payload of 7 bytes", edit(zst, func(b []byte) { le.PutUint32(b[offPayloadLength:], 7) }), nil, "outside the file"},
		{"version outside", edit(zst, func(b []byte) { le.PutUint16(b[offKernelVersion:], 0xffff) }), nil, "no version text"},
		{"no version", edit(zst, func(b []byte) { le.PutUint16(b[offKernelVersion:], 0) }), nil, "no version text"},
		{"release with a slash", fakeBzImage("6/../../x", elf), nil, `kernel release "6/../../x"`},
		{"release with dots", fakeBzImage("6..1", elf), nil, "kernel release"},
		{"release not a number", fakeBzImage("default", elf), nil, "kernel release"},
		{"release of 64", fakeBzImage("6"+strings.Repeat("x", 63), elf), elf, ""},
		{"release of 65", fakeBzImage("6"+strings.Repeat("x", 64), elf), nil, "kernel release"},

		{"no PVH note", fakeVmlinux(release, false), nil, "no PVH entry note"},
		{"32-bit ELF", edit(elf, func(b []byte) { b[4] = 1 }), nil, "not a 64-bit"},
		{"ELF of another machine", edit(elf, func(b []byte) { b[18] = 183 }), nil, "not an x86-64 executable"},
		{"ELF object", edit(elf, func(b []byte) { b[16] = elfTypeRel }), nil, "not an x86-64 executable"},
		{"program headers outside", edit(elf, func(b []byte) { le.PutUint64(b[32:], 1<<63) }), nil, "program headers outside"},
		{"notes outside", edit(elf, func(b []byte) { le.PutUint64(b[elfHeaderBytes+32:], 1<<63) }), nil, "notes outside"},
		{"note size of 4 GiB", edit(elf, func(b []byte) { le.PutUint32(b[elfHeaderBytes+elfProgHeaderBytes:], 1<<32-1) }), nil, "no PVH entry note"},
		{"ELF without a banner", edit(elf, func(b []byte) { copy(b[bytes.LastIndex(b, []byte("Linux v")):], "linux") }), nil, `no "Linux version" text`},
		{"ELF header only", elf[:elfHeaderBytes], nil, `no "Linux version" text`},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, rel, err := unpackKernel(row.image)
			if row.says != "" {
				if err == nil || !strings.Contains(err.Error(), row.says) {
					t.Errorf("error %v, want one that says %q", err, row.says)
				}
				return
			}
			if err != nil || !bytes.Equal(got, row.want) || checkRelease(rel) != nil {
				t.Errorf("%d bytes, release %q, %v", len(got), rel, err)
			}
		})
	}
}

func TestReadKernelDeb(t *testing.T) {
	good := fakeKernelDeb(t, ".xz", "", testRelease)
	hostile := func(names ...string) []byte {
		files := []testFile{{"./boot/vmlinuz-" + testRelease, []byte("k")}}
		for _, n := range names {
			files = append(files, testFile{n, []byte("x")})
		}
		return fakeDeb(t, ".gz", files)
	}
	member := func(header string) []byte {
		return append([]byte(arMagic), append(arMember("debian-binary", []byte("2.0\n")), header...)...)
	}
	for _, row := range []struct {
		name string
		deb  []byte
		want []string // paths added
		says string
	}{
		{"good", good, []string{"kernel/drivers/block/virtio_blk.ko"}, ""},
		{"names that climb", hostile("../../etc/passwd", "/lib/modules/../../x.ko", "./lib/modules/"+testRelease+"/../../../x.ko", "lib/modules/other/x.ko"), nil, ""},
		{"climbs and comes back", hostile("./x/../lib/modules/" + testRelease + "/a.ko"), []string{"a.ko"}, ""},
		{"two kernels", hostile("boot/vmlinuz-" + testRelease), nil, "twice"},
		{"empty", nil, nil, "not an ar archive"},
		{"magic only", []byte(arMagic), nil, "no data.tar member"},
		{"no debian-binary", append([]byte(arMagic), arMember("data.tar", nil)...), nil, `member 1 is "data.tar"`},
		{"format 3.0", append([]byte(arMagic), arMember("debian-binary", []byte("3.0\n"))...), nil, "format version"},
		{"bzip2", append(member(""), arMember("data.tar.bz2", nil)...), nil, `compression ".bz2": not supported`},
		{"size is no number", member(fmt.Sprintf("%-48s%-10s`\n", "data.tar", "-1")), nil, "is no number"},
		{"no member magic", member(fmt.Sprintf("%-48s%-10s``", "data.tar", "1")), nil, "bad magic"},
		{"header cut", member("data.tar"), nil, "unexpected EOF"},
		{"skipped member cut", member(fmt.Sprintf("%-48s%-10s`\n", "control.tar", "9999999999")), nil, "unexpected EOF"},
		{"too many members", append(member(""), bytes.Repeat(arMember("x", nil), maxArMembers)...), nil, "no data.tar among"},
		{"data cut", good[:len(good)-300], nil, "data.tar"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var got []string
			_, err := readKernelDeb(bytes.NewReader(row.deb), testRelease, func(name string, size int64, r io.Reader) error {
				got = append(got, name)
				return nil
			})
			if row.says != "" {
				if err == nil || !strings.Contains(err.Error(), row.says) {
					t.Errorf("error %v, want one that says %q", err, row.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range row.want {
				if !slices.Contains(got, w) {
					t.Errorf("%q is missing in %q", w, got)
				}
			}
			if len(row.want) == 0 && len(got) != 0 {
				t.Errorf("took %q", got)
			}
		})
	}
}

func TestXZWindow(t *testing.T) {
	b := compress(t, ".xz", []byte("text"))
	at := bytes.Index(b[12:], []byte{0x21, 1}) + 12 + 2
	for bits, ok := range map[byte]bool{0: true, 30: true, 31: false, 40: false, 63: false} { // 30 is 128 MiB, 31 is 192 MiB
		b[at] = bits
		_, err := decompressor(bytes.NewReader(b), ".xz")
		refused := err != nil && strings.Contains(err.Error(), "dictionary over")
		if refused == ok {
			t.Errorf("dictionary size %d: %v", bits, err)
		}
	}
}

func TestPackagesLimits(t *testing.T) {
	one := stanza("linux-image-x", "1", "", "pool/x.deb", nil)
	for _, row := range []struct {
		name, text string
		want       int
		says       string
	}{
		{"none", "", 0, ""},
		{"one", one, 1, ""},
		{"no end of line", strings.TrimRight(one, "\n"), 1, ""},
		{"another package", strings.ReplaceAll(one, "linux-image-x", "zsh"), 0, ""},
		{"another architecture", strings.Replace(one, "amd64", "arm64", 1), 0, ""},
		{"carriage returns", strings.ReplaceAll(one, "\n", "\r\n"), 1, ""},
		{"line at the limit", one[:len(one)-1] + "X: " + strings.Repeat("x", maxPackagesLineBytes-4) + "\n", 1, ""},
		{"line past the limit", one[:len(one)-1] + "X: " + strings.Repeat("x", maxPackagesLineBytes-2) + "\n", 0, "a line longer than"},
		{"packages at the limit", strings.Repeat(one, maxPackageStanzas), maxPackageStanzas, ""},
		{"packages past the limit", strings.Repeat(one, maxPackageStanzas+1), 0, "more than"},
		{"field twice", strings.Replace(one, "Size: 0", "Size: 0\nSize: 1", 1), 0, "twice"},
		{"file name climbs", strings.Replace(one, "pool/x", "pool/../x", 1), 0, "file name"},
		{"file name elsewhere", strings.Replace(one, "pool/x", "http://x/pool", 1), 0, "file name"},
		{"bad size", strings.Replace(one, "Size: 0", "Size: -1", 1), 0, "size"},
		{"bad hash", strings.Replace(one, "SHA256: ", "SHA256: 0", 1), 0, "SHA-256"},
		{"bad version", strings.Replace(one, "Version: 1", "Version: x", 1), 0, "version"},
	} {
		got, err := parsePackages(strings.NewReader(row.text), "linux-image-")
		if row.says != "" {
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("%s: error %v, want one that says %q", row.name, err, row.says)
			}
		} else if err != nil || len(got) != row.want {
			t.Errorf("%s: %d packages, %v", row.name, len(got), err)
		}
	}
}

func TestChooseKernel(t *testing.T) {
	meta := func(version, depends string) debPackage {
		return debPackage{name: metaPackage, version: version, depends: depends}
	}
	img := func(name, version string) debPackage {
		return debPackage{name: "linux-image-" + name + "-cloud-amd64", version: version}
	}
	dep := func(name string) string { return "linux-image-" + name + "-cloud-amd64" }
	for _, row := range []struct {
		name       string
		pkgs       []debPackage
		want, says string
	}{
		{"exact version", []debPackage{meta("2", dep("6.1.0-2")+" (= 6.1.2-1)"), img("6.1.0-2", "6.1.2-2"), img("6.1.0-2", "6.1.2-1")}, "6.1.2-1", ""},
		{"newest meta", []debPackage{meta("6.1.9-1", dep("6.1.0-1")), meta("6.1.10-1", "kmod, "+dep("6.1.0-2")), img("6.1.0-1", "9"), img("6.1.0-2", "1")}, "1", ""},
		{"plus in the release", []debPackage{meta("1", dep("6.12.107+deb13")+" (= 6.12.107-1)"), img("6.12.107+deb13", "6.12.107-1")}, "6.12.107-1", ""},
		{"unsigned", []debPackage{meta("1", dep("6.1.0-2")), {name: dep("6.1.0-2") + "-unsigned", version: "3"}}, "3", ""},
		{"no meta", []debPackage{img("6.1.0-2", "1")}, "", "not in the archive"},
		{"no image", []debPackage{meta("1", dep("6.1.0-2"))}, "", "not in the archive"},
		{"image of another version", []debPackage{meta("1", dep("6.1.0-2")+" (= 5)"), img("6.1.0-2", "4")}, "", "not in the archive"},
		{"depends on something else", []debPackage{meta("1", "linux-image-amd64, kmod")}, "", "depends on no kernel image"},
		{"release that climbs", []debPackage{meta("1", "linux-image-6../../x-cloud-amd64")}, "", "depends on no kernel image"},
	} {
		got, _, err := chooseKernel(row.pkgs)
		if row.says != "" {
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("%s: error %v", row.name, err)
			}
		} else if err != nil || got.version != row.want {
			t.Errorf("%s: %+v, %v", row.name, got, err)
		}
	}
}

func TestModuleIndex(t *testing.T) {
	mod := func(path, depends string, softdeps ...string) *module {
		m := &module{name: moduleName(path), path: path, softdeps: softdeps}
		for d := range strings.SplitSeq(depends, ",") {
			if d != "" {
				m.depends = append(m.depends, d)
			}
		}
		return m
	}
	if _, err := newModuleIndex([]*module{mod("a.ko", "b"), mod("b.ko", "c"), mod("c.ko", "a")}, nil); err == nil || !strings.Contains(err.Error(), "depends on itself") {
		t.Errorf("circle: %v", err)
	}
	ix, err := newModuleIndex([]*module{
		mod("kernel/overlay.ko", "gone"), mod("kernel/x.ko", ""), mod("updates/dkms/overlay.ko", "x", "pre: virtio_blk y post: z"),
		mod("kernel/virtio_blk.ko", ""), mod("kernel/z.ko", "", "pre: overlay"),
	}, map[string][]byte{"modules.builtin": []byte("kernel/y.ko\n")})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range ix.bootOrder() {
		got = append(got, m.path)
	}
	if want := "kernel/virtio_blk.ko kernel/x.ko updates/dkms/overlay.ko kernel/z.ko"; strings.Join(got, " ") != want {
		t.Errorf("boot order %q, want %s", got, want)
	}
	for alias, want := range map[string]string{"a-b": "a_b", "a-[x-y]-b": "a_[x-y]_b", "[": "", "]": "", "a[b": "", "": ""} {
		if got, ok := normalizeAlias(alias); got != want || ok != (want != "" || alias == "") {
			t.Errorf("alias %q: %q, %v", alias, got, ok)
		}
	}
	for _, row := range []struct {
		name string
		size int64
		want bool
		err  bool
	}{
		{"kernel/a.ko", maxModuleBytes, true, false},
		{"kernel/a.ko", maxModuleBytes + 1, false, true},
		{"kernel/a.ko.xz", 1, true, false},
		{"kernel/a.txt", 1 << 60, false, false},
		{"modules.order", maxIndexBytes, true, false},
		{"modules.order", maxIndexBytes + 1, false, true},
		{"modules.dep", 1, false, false}, // made anew
		{"kernel/a b.ko", 1, false, true},
		{"kernel/a\n.ko", 1, false, true},
		{"kernel//a.ko", 1, false, true},
		{"../a.ko", 1, false, true},
		{strings.Repeat("a", maxPathBytes-3) + ".ko", 1, true, false},
		{strings.Repeat("a", maxPathBytes-2) + ".ko", 1, false, true},
	} {
		if got, err := wantFile(row.name, row.size); got != row.want || (err != nil) != row.err {
			t.Errorf("file %.40q of %d bytes: %v, %v", row.name, row.size, got, err)
		}
	}
}

func TestReleaseDates(t *testing.T) {
	want := time.Date(2026, 7, 1, 9, 5, 7, 0, time.UTC)
	for _, s := range []string{"Wed, 01 Jul 2026 09:05:07 UTC", "Wed, 1 Jul 2026 09:05:07 UTC", "Wed, 01 Jul 2026 09:05:07 +0000", "Wed, 01 Jul 2026 11:05:07 +0200"} {
		if got, err := parseReleaseDate(s); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}
