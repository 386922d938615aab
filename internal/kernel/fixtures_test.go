package kernel

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

const testRelease = "6.1.0-99-cloud-amd64"

// compress packs b by file name extension; ".lz4" is the legacy frame.
func compress(t testing.TB, ext string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch ext {
	case "":
		return b
	case ".gz":
		w = gzip.NewWriter(&out)
	case ".xz":
		w, err = xz.NewWriter(&out)
	case ".zst":
		w, err = zstd.NewWriter(&out)
	case ".lz4":
		out.WriteString("\x02\x21\x4c\x18")
		for block := range slices.Chunk(b, lz4BlockBytes) {
			packed := make([]byte, lz4.CompressBlockBound(len(block)))
			n, err := lz4.CompressBlock(block, packed, nil)
			if err != nil || n == 0 {
				t.Fatal("lz4: ", n, err)
			}
			out.Write(binary.LittleEndian.AppendUint32(nil, uint32(n)))
			out.Write(packed[:n])
		}
		return out.Bytes()
	default:
		t.Fatalf("extension %q", ext)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// fakeVmlinux is an ELF executable of nothing but notes and a banner.
func fakeVmlinux(release string, pvh bool) []byte {
	le := binary.LittleEndian
	b := make([]byte, elfHeaderBytes+elfProgHeaderBytes)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], elfTypeExec)
	le.PutUint16(b[18:], elfMachineX86_64)
	le.PutUint64(b[32:], elfHeaderBytes)
	le.PutUint16(b[54:], elfProgHeaderBytes)
	le.PutUint16(b[56:], 1)
	note := func(kind uint32, name string, desc []byte) (n []byte) {
		n = le.AppendUint32(n, uint32(len(name)+1))
		n = le.AppendUint32(n, uint32(len(desc)))
		n = le.AppendUint32(n, kind)
		n = append(n, name...)
		n = append(n, make([]byte, 4-len(name)&3)...)
		return append(n, desc...)
	}
	notes := note(6, "Xen", []byte("linux\x00\x00\x00"))
	if pvh {
		notes = append(notes, note(xenNotePhys32Entry, "Xen", []byte{0, 0, 0, 1, 0, 0, 0, 0})...)
	}
	ph := b[elfHeaderBytes:]
	le.PutUint32(ph, elfSegmentNote)
	le.PutUint64(ph[8:], uint64(len(b)))
	le.PutUint64(ph[32:], uint64(len(notes)))
	b = append(b, notes...)
	b = append(b, "Linux version %s (%s)\x00Linux version "+release+" (debian-kernel@lists.debian.org)\x00"...)
	return append(b, bytes.Repeat([]byte("kernel text "), 2000)...)
}

// fakeBzImage wraps a payload, which must have its size at its end, as the
// kernel's own build does.
func fakeBzImage(release string, payload []byte) []byte {
	le := binary.LittleEndian
	const sects, payloadOffset = 4, 0x40
	b := make([]byte, (sects+1)*sectorBytes+payloadOffset)
	b[offSetupSects] = sects
	le.PutUint16(b[offBootFlag:], 0xaa55)
	copy(b[offMagic:], "HdrS")
	le.PutUint16(b[offProtocol:], 0x20f)
	le.PutUint16(b[offKernelVersion:], 0x200)
	copy(b[0x400:], release+" (debian-kernel@lists.debian.org) #1 SMP\x00")
	le.PutUint32(b[offPayloadOffset:], payloadOffset)
	le.PutUint32(b[offPayloadLength:], uint32(len(payload)))
	return append(append(b, payload...), "trailing bytes"...)
}

func withSize(packed []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(slices.Clone(packed), uint32(size))
}

func fakeVmlinuz(t testing.TB, release string) []byte {
	elf := fakeVmlinux(release, true)
	return fakeBzImage(release, withSize(compress(t, ".zst", elf), len(elf)))
}

// fakeModule is an ELF object with a .modinfo section and exported symbols.
func fakeModule(info []string, exports ...string) []byte {
	le := binary.LittleEndian
	modinfo := []byte(strings.Join(info, "\x00") + "\x00")
	strtab, symtab := []byte{0}, make([]byte, elfSymbolBytes)
	for _, e := range exports {
		symtab = le.AppendUint32(symtab, uint32(len(strtab)))
		symtab = append(symtab, make([]byte, elfSymbolBytes-4)...)
		strtab = append(strtab, "__ksymtab_"+e+"\x00"...)
	}
	shstrtab := []byte("\x00.modinfo\x00.symtab\x00.strtab\x00.shstrtab\x00")
	b := make([]byte, elfHeaderBytes)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], elfTypeRel)
	le.PutUint16(b[18:], elfMachineX86_64)
	var headers [5][elfSectionBytes]byte
	for i, s := range []struct {
		name string
		data []byte
	}{{".modinfo", modinfo}, {".symtab", symtab}, {".strtab", strtab}, {".shstrtab", shstrtab}} {
		h := headers[i+1][:]
		le.PutUint32(h, uint32(bytes.Index(shstrtab, []byte(s.name+"\x00"))))
		le.PutUint32(h[4:], 1)
		le.PutUint64(h[24:], uint64(len(b)))
		le.PutUint64(h[32:], uint64(len(s.data)))
		if s.name == ".symtab" {
			le.PutUint32(h[40:], 3)
		}
		b = append(b, s.data...)
	}
	le.PutUint64(b[40:], uint64(len(b)))
	le.PutUint16(b[58:], elfSectionBytes)
	le.PutUint16(b[60:], 5)
	le.PutUint16(b[62:], 4)
	for _, h := range headers {
		b = append(b, h[:]...)
	}
	return b
}

// A testFile is one file of a package or folder.
type testFile struct {
	name string
	data []byte
}

// fakeModules is a small module folder: three modules that need each other,
// one that boots, and the shipped lists.
func fakeModules(t testing.TB, release, ext string) []testFile {
	magic := "vermagic=" + release + " SMP mod_unload "
	ko := func(info []string, exports ...string) []byte {
		return compress(t, ext, fakeModule(append(info, magic), exports...))
	}
	return []testFile{
		{"kernel/drivers/virtio/virtio_ring.ko" + ext, ko([]string{"depends=", "name=virtio_ring"}, "vring_new")},
		{"kernel/drivers/virtio/virtio.ko" + ext, ko([]string{"depends=virtio_ring", "name=virtio"}, "virtio_add")},
		{"kernel/drivers/block/virtio_blk.ko" + ext, ko([]string{"depends=virtio,virtio_ring", "alias=virtio:d00000002v*", "softdep=pre: helper-mod"})},
		{"kernel/lib/helper-mod.ko" + ext, ko([]string{"depends=", "alias=helper:*-[a-z]", "alias=devname:help/er", "alias=char-major-10-77"})},
		{"kernel/fs/overlayfs/overlay.ko" + ext, ko([]string{"depends=", "alias=fs-overlay"})},
		{"kernel/net/bridge/bridge.ko" + ext, ko([]string{"depends="})},
		{"modules.order", []byte("kernel/drivers/virtio/virtio_ring.ko\nkernel/drivers/virtio/virtio.ko\nkernel/drivers/block/virtio_blk.ko\nkernel/fs/overlayfs/overlay.ko\n")},
		{"modules.builtin", []byte("kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio_mmio.ko\n")},
		{"modules.builtin.modinfo", []byte("ext4.alias=fs-ext4\x00ext4.license=GPL\x00")},
	}
}

// arMember encodes one member of an ar archive.
func arMember(name string, data []byte) []byte {
	b := fmt.Appendf(nil, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", name, 0, 0, 0, "100644", len(data))
	b = append(b, data...)
	if len(data)%2 == 1 {
		b = append(b, '\n')
	}
	return b
}

func fakeTar(t testing.TB, files []testFile) []byte {
	t.Helper()
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	for _, f := range files {
		if err := tw.WriteHeader(&tar.Header{Name: f.name, Size: int64(len(f.data)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func fakeDeb(t testing.TB, ext string, files []testFile) []byte {
	return slices.Concat([]byte(arMagic), arMember("debian-binary", []byte("2.0\n")),
		arMember("control.tar"+ext, compress(t, ext, fakeTar(t, nil))),
		arMember("data.tar"+ext, compress(t, ext, fakeTar(t, files))))
}

// fakeKernelDeb is a kernel package with its module folder below prefix.
func fakeKernelDeb(t testing.TB, ext, prefix, release string) []byte {
	files := []testFile{{"./boot/vmlinuz-" + release, fakeVmlinuz(t, release)}, {"./usr/share/doc/x", []byte("x")}}
	for _, f := range fakeModules(t, release, "") {
		files = append(files, testFile{"./" + prefix + "lib/modules/" + release + "/" + f.name, f.data})
	}
	return fakeDeb(t, ext, files)
}

// newKey makes a signing key, made an hour before the given time.
func newKey(t testing.TB, now time.Time, lifetime time.Duration) *openpgp.Entity {
	t.Helper()
	e, err := openpgp.NewEntity("Test Archive Key", "", "test@example.org", &packet.Config{
		Algorithm:       packet.PubKeyAlgoEdDSA,
		Time:            func() time.Time { return now.Add(-time.Hour) },
		KeyLifetimeSecs: uint32(lifetime / time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func clearSign(t testing.TB, key *openpgp.Entity, text string, when time.Time) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := clearsign.Encode(&out, key.PrivateKey, &packet.Config{Time: func() time.Time { return when }})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, text)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return append(out.Bytes(), '\n')
}

// A fakeArchive is a Debian mirror on loopback. Its fields may be changed
// before build is called, and files and handlers after that.
type fakeArchive struct {
	t        testing.TB
	now      time.Time
	key      *openpgp.Entity
	deb      []byte
	release  map[string]string // field -> value, for every suite
	byHash   bool
	stall    time.Duration
	files    map[string][]byte
	handlers map[string]http.HandlerFunc
	hits     sync.Map // path -> *atomic.Int64
	srv      *httptest.Server
}

const (
	fakePackage = "linux-image-" + testRelease
	fakeDebPath = "pool/updates/main/l/linux/" + fakePackage + "_6.1.199-1_amd64.deb"
)

// fakeNow is the time at every mirror.
var fakeNow = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

func newFakeArchive(t testing.TB) *fakeArchive {
	now := fakeNow
	f := &fakeArchive{
		t: t, now: now, key: newKey(t, now, 0), byHash: true, stall: time.Minute,
		release: map[string]string{
			"Date":        "Mon, 01 Jun 2026 10:00:00 UTC",
			"Valid-Until": "Mon, 08 Jun 2026 10:00:00 UTC",
		},
		files:    make(map[string][]byte),
		handlers: make(map[string]http.HandlerFunc),
	}
	f.deb = fakeKernelDeb(t, ".xz", "", testRelease)
	f.srv = httptest.NewServer(f)
	t.Cleanup(f.srv.Close)
	return f
}

func (f *fakeArchive) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n, _ := f.hits.LoadOrStore(r.URL.Path, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
	if h := f.handlers[r.URL.Path]; h != nil {
		h(w, r)
		return
	}
	data, ok := f.files[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Write(data)
}

func (f *fakeArchive) count(path string) int64 {
	n, ok := f.hits.Load(path)
	if !ok {
		return 0
	}
	return n.(*atomic.Int64).Load()
}

func stanza(name, version, depends, filename string, data []byte) string {
	return fmt.Sprintf("Package: %s\nSource: linux\nVersion: %s\nArchitecture: amd64\nDepends: %s\nDescription: x\n folded: line\nFilename: %s\nSize: %d\nSHA256: %x\n\n",
		name, version, depends, filename, len(data), sha256.Sum256(data))
}

// build fills files: an old kernel in bookworm, nothing in bookworm-updates, a
// newer one in bookworm-security.
func (f *fakeArchive) build() *fakeArchive {
	old := "linux-image-6.1.0-9-cloud-amd64"
	f.suite("bookworm", "debian", stanza(metaPackage, "6.1.99-1", old+" (= 6.1.99-1)", "pool/main/m.deb", nil)+
		stanza(old, "6.1.99-1", "kmod", "pool/main/old.deb", nil)+
		stanza("zsh", "5.9-4", "libc6", "pool/main/z/zsh.deb", nil))
	f.suite("bookworm-updates", "debian", "")
	f.suite("bookworm-security", "security", stanza(metaPackage, "6.1.199-1", fakePackage+" (= 6.1.199-1)", "pool/updates/m.deb", nil)+
		stanza(fakePackage, "6.1.199-1", "kmod, linux-base (>= 4.3~)", fakeDebPath, f.deb))
	f.files["/security/"+fakeDebPath] = f.deb
	return f
}

func (f *fakeArchive) releaseText(suite string, packages []byte) string {
	var text strings.Builder
	fmt.Fprintf(&text, "Origin: Debian\nSuite: test\nCodename: %s\n", suite)
	for _, k := range slices.Sorted(maps.Keys(f.release)) {
		fmt.Fprintf(&text, "%s: %s\n", k, f.release[k])
	}
	if f.byHash {
		text.WriteString("Acquire-By-Hash: yes\n")
	}
	fmt.Fprintf(&text, "MD5Sum:\n 0123 17 ignored\nSHA256:\n %x %d main/binary-amd64/Packages.xz\n", sha256.Sum256(packages), len(packages))
	return text.String()
}

func (f *fakeArchive) suite(suite, base, packages string) {
	packed := compress(f.t, ".xz", []byte(packages))
	dir := "/" + base + "/dists/" + suite + "/"
	f.files[dir+"main/binary-amd64/Packages.xz"] = packed
	if f.byHash {
		f.files[dir+fmt.Sprintf("main/binary-amd64/by-hash/SHA256/%x", sha256.Sum256(packed))] = packed
	}
	f.files[dir+"InRelease"] = clearSign(f.t, f.key, f.releaseText(suite, packed), f.now)
}

// archive is the client's view.
func (f *fakeArchive) archive() *archive {
	return f.client(f.srv.URL, openpgp.EntityList{f.key})
}

// client is that of a mirror at url, which may be another process's.
func (f *fakeArchive) client(url string, keys openpgp.EntityList) *archive {
	return &archive{
		mirrors: mirrors{main: []string{url + "/debian"}, security: []string{url + "/security"}},
		keys:    keys,
		client:  newClient(),
		now:     func() time.Time { return f.now },
		stall:   f.stall,
	}
}

// clearSignBoth signs with two keys.
func clearSignBoth(t testing.TB, a, b *openpgp.Entity, text string, when time.Time) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := clearsign.EncodeMulti(&out, []*packet.PrivateKey{a.PrivateKey, b.PrivateKey}, &packet.Config{Time: func() time.Time { return when }})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, text)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
