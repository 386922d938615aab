package kernel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"banger"
	"banger/internal/store"

	"github.com/ProtonMail/go-crypto/openpgp"
)

func openFake(t *testing.T, f *fakeArchive) (*Kernels, *store.Store) {
	s := openStore(t)
	ks := Open(s)
	ks.archive = func() (*archive, error) { return f.archive(), nil }
	return ks, s
}

func TestPullFakeMirror(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(*fakeArchive)
	}{
		{"xz", func(f *fakeArchive) {}},
		{"zstd, below usr", func(f *fakeArchive) { f.deb = fakeKernelDeb(t, ".zst", "usr/", testRelease) }},
		{"gzip", func(f *fakeArchive) { f.deb = fakeKernelDeb(t, ".gz", "", testRelease) }},
		{"uncompressed", func(f *fakeArchive) { f.deb = fakeKernelDeb(t, "", "", testRelease) }},
		{"no by-hash", func(f *fakeArchive) { f.byHash = false }},
		{"no Valid-Until", func(f *fakeArchive) { delete(f.release, "Valid-Until") }},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFakeArchive(t)
			row.change(f)
			ks, _ := openFake(t, f.build())
			k, err := ks.Pull(t.Context(), "bookworm", nil)
			if err != nil {
				t.Fatal(err)
			}
			if k.Version != testRelease || k.Source != "debian:bookworm" || k.Package != fakePackage+" 6.1.199-1" || !k.Default {
				t.Errorf("got %+v", k)
			}
			checkFakeKernel(t, k)
		})
	}
}

// checkFakeKernel looks at the files of a kernel made from fakeModules.
func checkFakeKernel(t *testing.T, k *Kernel) {
	t.Helper()
	vmlinux, err := os.ReadFile(k.Vmlinux)
	if err != nil || !bytes.Equal(vmlinux, fakeVmlinux(k.Version, true)) {
		t.Errorf("vmlinux: %d bytes, %v", len(vmlinux), err)
	}
	want := "/modules/00-virtio_ring.ko /modules/01-virtio.ko /modules/02-helper_mod.ko /modules/03-virtio_blk.ko /modules/04-overlay.ko"
	if got := strings.Join(k.LoadModules(), " "); got != want {
		t.Errorf("boot modules:\n got %s\nwant %s", got, want)
	}
	root := checkDrive(t, k)
	for _, row := range []struct{ what, want string }{
		{"virtio_blk", "virtio_ring virtio helper_mod virtio_blk"},
		{"virtio:d00000002vffff", "virtio_ring virtio helper_mod virtio_blk"},
		{"helper:any-thing-z", "helper_mod"},
		{"fs-overlay", "overlay"},
		{"symbol:virtio_add", "virtio_ring virtio"},
		{"fs-ext4", "builtin:ext4"},
		{"virtio_mmio", "builtin:virtio_mmio"},
	} {
		if got, err := showDepends(t, root, k.Version, row.what); err != nil || strings.Join(got, " ") != row.want {
			t.Errorf("modprobe %s: loads %q, want %q (%v)", row.what, got, row.want, err)
		}
	}
	devname, err := os.ReadFile(filepath.Join(root, "lib/modules", k.Version, "modules.devname"))
	if err != nil || !strings.HasSuffix(string(devname), "\nhelper_mod help/er c10:77\n") {
		t.Errorf("modules.devname: %q, %v", devname, err)
	}
}

// replace changes what is served at a path.
func (f *fakeArchive) replace(path string, change func([]byte) []byte) {
	data, ok := f.files[path]
	if !ok {
		f.t.Fatalf("no file %s", path)
	}
	f.files[path] = change(bytes.Clone(data))
}

func (f *fakeArchive) packagesPath(suite, base string) string {
	for path := range f.files {
		if strings.HasPrefix(path, "/"+base+"/dists/"+suite+"/") && strings.Contains(path, "by-hash") {
			return path
		}
	}
	f.t.Fatal("no by-hash file")
	return ""
}

func flipMiddle(b []byte) []byte { b[len(b)/2] ^= 1; return b }

func TestPullRefuses(t *testing.T) {
	const (
		inRelease = "/debian/dists/bookworm/InRelease"
		security  = "/security/dists/bookworm-security/InRelease"
		deb       = "/security/" + fakeDebPath
	)
	endless := func(w http.ResponseWriter, r *http.Request) {
		block := bytes.Repeat([]byte("-----BEGIN PGP SIGNED MESSAGE-----\n"), 1000)
		for {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}
	type change = func(f *fakeArchive)
	before := func(g change) change { return func(f *fakeArchive) { g(f); f.build() } }
	after := func(g change) change { return func(f *fakeArchive) { f.build(); g(f) } }
	edit := func(path string, g func([]byte) []byte) change {
		return after(func(f *fakeArchive) { f.replace(path, g) })
	}
	handle := func(path string, h http.HandlerFunc) change {
		return after(func(f *fakeArchive) { f.handlers[path] = h })
	}
	truncate := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }
	for _, row := range []struct {
		name   string
		change change
		is     error  // or
		says   string // part of the message
		code   banger.Code
	}{
		// signature
		{"wrong key", after(func(f *fakeArchive) { f.key = newKey(t, f.now, 0) }), errUnknownSigner, "", banger.CodeInvalid},
		{"not signed", edit(inRelease, func(b []byte) []byte { return []byte("Codename: bookworm\n") }), errNotSigned, "", banger.CodeInvalid},
		{"security not signed", edit(security, func(b []byte) []byte { return []byte("Codename: bookworm\n") }), errNotSigned, "", banger.CodeInvalid},
		{"changed text", edit(inRelease, func(b []byte) []byte { return bytes.Replace(b, []byte("Origin: D"), []byte("Origin: E"), 1) }), errBadSignature, "", banger.CodeInvalid},
		{"text before", edit(inRelease, func(b []byte) []byte { return append([]byte("Codename: x\n"), b...) }), errOutsideText, "", banger.CodeInvalid},
		{"text after", edit(inRelease, func(b []byte) []byte { return append(b, "Codename: x\n"...) }), errOutsideText, "", banger.CodeInvalid},
		{"two messages", edit(inRelease, func(b []byte) []byte { return append(b, b...) }), errOutsideText, "", banger.CodeInvalid},
		{"text between header and message", edit(inRelease, func(b []byte) []byte {
			return bytes.Replace(b, []byte("Hash: "), []byte("NotDashEscaped: yes\nHash: "), 1)
		}), errNotSigned, "", banger.CodeInvalid},
		{"expired key", before(func(f *fakeArchive) {
			f.key = newKey(t, f.now.AddDate(0, 0, -30), 24*time.Hour)
			f.key.PrimaryKey.CreationTime = f.now.AddDate(0, 0, -30)
		}), errExpiredKey, "", banger.CodeInvalid},
		// framing cut at several points
		{"cut in the first line", edit(inRelease, truncate(20)), errNotSigned, "", banger.CodeInvalid},
		{"cut in the text", edit(inRelease, truncate(200)), errTruncated, "", banger.CodeInvalid},
		{"cut in the signature", edit(inRelease, func(b []byte) []byte { return b[:len(b)-60] }), errTruncated, "", banger.CodeInvalid},
		{"cut in the last line", edit(inRelease, func(b []byte) []byte { return b[:len(b)-8] }), errTruncated, "", banger.CodeInvalid},
		{"empty InRelease", edit(inRelease, truncate(0)), errNotSigned, "", banger.CodeInvalid},
		// what is signed, but not right
		{"too old", before(func(f *fakeArchive) { f.release["Valid-Until"] = "Mon, 01 Jun 2026 11:59:59 UTC" }), errStale, "", banger.CodeInvalid},
		{"Valid-Until is no date", before(func(f *fakeArchive) { f.release["Valid-Until"] = "tomorrow" }), nil, "is no date", banger.CodeInvalid},
		{"from the future", before(func(f *fakeArchive) { f.release["Date"] = "Tue, 02 Jun 2026 12:00:01 UTC" }), errFuture, "", banger.CodeInvalid},
		{"no date", before(func(f *fakeArchive) { delete(f.release, "Date") }), nil, "is no date", banger.CodeInvalid},
		{"another suite", after(func(f *fakeArchive) {
			f.suite("trixie", "debian", "")
			f.files[inRelease] = f.files["/debian/dists/trixie/InRelease"]
		}), errWrongSuite, "", banger.CodeInvalid},
		{"security of another suite", after(func(f *fakeArchive) { f.files[security] = f.files[inRelease] }), errWrongSuite, "", banger.CodeInvalid},
		{"lists no Packages", after(func(f *fakeArchive) {
			f.files[inRelease] = clearSign(t, f.key, "Codename: bookworm\nDate: Mon, 01 Jun 2026 10:00:00 UTC\nSHA256:\n", f.now)
		}), nil, "lists no main/binary-amd64/Packages.xz", banger.CodeInvalid},
		{"Packages over the limit", after(func(f *fakeArchive) {
			f.files[inRelease] = clearSign(t, f.key, fmt.Sprintf("Codename: bookworm\nDate: Mon, 01 Jun 2026 10:00:00 UTC\nSHA256:\n %064d %d main/binary-amd64/Packages.xz\n", 0, maxPackagesBytes+1), f.now)
			f.files["/debian/dists/bookworm/main/binary-amd64/Packages.xz"] = []byte("x")
		}), nil, "the limit is", banger.CodeInvalid},
		// index and package
		{"changed Packages", after(func(f *fakeArchive) { f.replace(f.packagesPath("bookworm", "debian"), flipMiddle) }), nil, "SHA-256 differs", banger.CodeInvalid},
		{"short Packages", after(func(f *fakeArchive) {
			f.replace(f.packagesPath("bookworm", "debian"), func(b []byte) []byte { return b[:len(b)-1] })
		}), nil, "the signed index says", banger.CodeInvalid},
		{"changed package", edit(deb, flipMiddle), nil, "SHA-256 differs", banger.CodeInvalid},
		{"short package", edit(deb, func(b []byte) []byte { return b[:len(b)/2] }), nil, "the signed index says", banger.CodeInvalid},
		{"long package", edit(deb, func(b []byte) []byte { return append(b, 0) }), nil, "the signed index says", banger.CodeInvalid},
		{"package without a kernel", before(func(f *fakeArchive) { f.deb = fakeDeb(t, ".xz", nil) }), nil, "no boot/vmlinuz-" + testRelease, banger.CodeInvalid},
		{"kernel of another release", before(func(f *fakeArchive) {
			f.deb = fakeDeb(t, ".xz", []testFile{{"./boot/vmlinuz-" + testRelease, fakeVmlinuz(t, "6.1.0-1")}})
		}), nil, `says it is "6.1.0-1"`, banger.CodeInvalid},
		{"module of another release", before(func(f *fakeArchive) {
			f.deb = fakeDeb(t, ".xz", []testFile{{"./boot/vmlinuz-" + testRelease, fakeVmlinuz(t, testRelease)},
				{"./lib/modules/" + testRelease + "/kernel/x.ko", fakeModule([]string{"vermagic=5.0 SMP"})}})
		}), nil, `is for kernel "5.0"`, banger.CodeInvalid},
		{"package is no archive", before(func(f *fakeArchive) { f.deb = []byte("<html>") }), nil, "not an ar archive", banger.CodeInvalid},
		// the wire
		{"no InRelease", after(func(f *fakeArchive) { delete(f.files, inRelease) }), errMissing, "", banger.CodeUnavailable},
		{"no package", after(func(f *fakeArchive) { delete(f.files, deb) }), errMissing, "", banger.CodeUnavailable},
		{"status 500", handle(inRelease, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) }), errUnreachable, "", banger.CodeUnavailable},
		{"endless InRelease", handle(inRelease, endless), nil, "more than", banger.CodeInvalid},
		{"endless package", handle(deb, endless), nil, "more than", banger.CodeInvalid},
		{"connection cut", handle(deb, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100000000")
			panic(http.ErrAbortHandler)
		}), errUnreachable, "", banger.CodeUnavailable},
		{"stalls", after(func(f *fakeArchive) {
			f.stall = time.Second
			f.handlers[inRelease] = func(w http.ResponseWriter, r *http.Request) {
				w.Write([]byte("x"))
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}
		}), errUnreachable, "", banger.CodeUnavailable},
		{"redirects for ever", handle(inRelease, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, 302) }), errUnreachable, "redirects", banger.CodeUnavailable},
		{"not there", after(func(f *fakeArchive) { f.srv.Close() }), errUnreachable, "", banger.CodeUnavailable},
	} {
		t.Run(row.name, func(t *testing.T) {
			f := newFakeArchive(t)
			row.change(f)
			ks, s := openFake(t, f)
			k, err := ks.Pull(t.Context(), "bookworm", nil)
			if err == nil {
				t.Fatalf("accepted: %+v", k)
			}
			if row.is != nil && !errors.Is(err, row.is) {
				t.Errorf("error %q is not %q", err, row.is)
			}
			if !strings.Contains(err.Error(), row.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q does not say %q on one line", err, row.says)
			}
			var be *banger.Error
			if !errors.As(err, &be) || be.Code != row.code {
				t.Errorf("error %q: code %v, want %v", err, be, row.code)
			}
			if row.code == banger.CodeUnavailable && !strings.Contains(be.Hint, "banger kernel import") {
				t.Errorf("hint %q", be.Hint)
			}
			nothingLeft(t, s)
		})
	}
}

// nothingLeft requires a store without kernels and without leftovers.
func nothingLeft(t *testing.T, s *store.Store) {
	t.Helper()
	for _, dir := range []string{s.Kernels(), filepath.Join(s.Root(), "tmp"), filepath.Join(s.Root(), "trash")} {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 0 {
			t.Errorf("%s: %v, %v", dir, entries, err)
		}
	}
}

func TestPullTwiceAtOnce(t *testing.T) {
	f := newFakeArchive(t).build()
	_, s := openFake(t, f)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			ks := Open(s) // as another process would
			ks.archive = func() (*archive, error) { return f.archive(), nil }
			if k, err := ks.Pull(t.Context(), "", nil); err != nil || k.Version != testRelease {
				t.Errorf("pull: %+v, %v", k, err)
			}
		})
	}
	wg.Wait()
	if n := f.count("/security/" + fakeDebPath); n != 1 {
		t.Errorf("the package was fetched %d times", n)
	}
}

// TestPullSameReleaseRebuilt: Debian may upload a release anew.
func TestPullSameReleaseRebuilt(t *testing.T) {
	f := newFakeArchive(t).build()
	ks, _ := openFake(t, f)
	if _, err := ks.Pull(t.Context(), "", nil); err != nil {
		t.Fatal(err)
	}
	f.suite("bookworm-security", "security", stanza(metaPackage, "6.1.199-2", fakePackage+" (= 6.1.199-2)", "pool/updates/m.deb", nil)+
		stanza(fakePackage, "6.1.199-2", "kmod", fakeDebPath, f.deb))
	k, err := ks.Pull(t.Context(), "", nil)
	if err != nil || k.Package != fakePackage+" 6.1.199-2" {
		t.Fatalf("got %+v, %v", k, err)
	}
	if list, err := ks.List(); err != nil || len(list) != 1 || !list[0].Default {
		t.Errorf("list: %v, %v", list, err)
	}
}

func TestPullPassesForeignMirrorsOver(t *testing.T) {
	good, foreign := newFakeArchive(t).build(), newFakeArchive(t).build() // signed by another key
	ks, _ := openFake(t, good)
	ks.archive = func() (*archive, error) {
		a := good.archive()
		a.mirrors.main = append([]string{"http://127.0.0.1:1/debian", foreign.srv.URL + "/debian", foreign.srv.URL + "/nothing"}, a.mirrors.main...)
		return a, nil
	}
	if k, err := ks.Pull(t.Context(), "", nil); err != nil || k.Version != testRelease {
		t.Errorf("got %+v, %v", k, err)
	}
}

func TestPullCanceled(t *testing.T) {
	f := newFakeArchive(t).build()
	ctx, cancel := context.WithCancel(t.Context())
	f.handlers["/security/"+fakeDebPath] = func(w http.ResponseWriter, r *http.Request) {
		w.Write(f.deb[:100])
		w.(http.Flusher).Flush()
		cancel()
		<-r.Context().Done()
	}
	ks, s := openFake(t, f)
	_, err := ks.Pull(ctx, "", nil)
	var be *banger.Error
	if !errors.As(err, &be) || be.Code != banger.CodeCanceled {
		t.Errorf("error %v", err)
	}
	nothingLeft(t, s)
}

func TestPasswordIsNotShown(t *testing.T) {
	f := newFakeArchive(t).build()
	_, err := f.archive().openRelease(t.Context(), []string{"http://user:secret@127.0.0.1:1/debian"}, "bookworm")
	if err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "user:xxxxx@127.0.0.1:1") {
		t.Errorf("error %v", err)
	}
}

func TestPullUnknownSuite(t *testing.T) {
	ks, _ := openFake(t, newFakeArchive(t))
	_, err := ks.Pull(t.Context(), "../sid", nil)
	var be *banger.Error
	if !errors.As(err, &be) || be.Code != banger.CodeUsage {
		t.Errorf("error %v", err)
	}
}

func TestRedirectFromHTTPS(t *testing.T) {
	f := newFakeArchive(t).build()
	up := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, f.srv.URL+r.URL.Path, http.StatusFound)
	}))
	t.Cleanup(up.Close)
	a := f.archive()
	a.client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: up.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
	_, err := a.openRelease(t.Context(), []string{up.URL + "/debian"}, "bookworm")
	if err == nil || !strings.Contains(err.Error(), "redirect from https") {
		t.Errorf("error %v", err)
	}
	down := httptest.NewServer(http.RedirectHandler(f.srv.URL+"/debian/dists/bookworm/InRelease", http.StatusFound))
	t.Cleanup(down.Close)
	if _, err := a.openRelease(t.Context(), []string{down.URL + "/debian"}, "bookworm"); err != nil {
		t.Errorf("redirect from http to http: %v", err)
	}
}

func TestEmbeddedKeys(t *testing.T) {
	ring, err := loadArchiveKeys()
	if err != nil || len(ring) != len(archiveKeys) {
		t.Fatalf("%d keys, %v", len(ring), err)
	}
	for _, k := range ring {
		if k.PrivateKey != nil {
			t.Error("a private key is embedded")
		}
		name := k.PrimaryIdentity()
		fpr := fmt.Sprintf("%x", k.PrimaryKey.Fingerprint)
		if want := archiveKeys[fpr]; name == nil || !strings.HasPrefix(name.Name, want) {
			t.Errorf("%s is of %v, the table says %q", fpr, name, want)
		}
	}
	short := map[string]string{}
	for fpr, name := range archiveKeys {
		if short[fpr] = name; len(short) == len(archiveKeys)-1 {
			break
		}
	}
	if _, err := readKeyring(archiveKeysArmored, short); err == nil {
		t.Error("a key that is not in the table was taken")
	}
	short["00"], short["01"] = "no such key", "no such key"
	if _, err := readKeyring(archiveKeysArmored, short); err == nil {
		t.Error("a missing key was not missed")
	}
}

// TestSecondSignatureCounts: an archive signs with an old and a new key.
func TestSecondSignatureCounts(t *testing.T) {
	f := newFakeArchive(t)
	other := newKey(t, f.now, 0)
	signed := clearSignBoth(t, other, f.key, "Codename: bookworm\n", f.now)
	for _, ring := range []openpgp.EntityList{{f.key}, {other}, {f.key, other}} {
		if _, err := verifyClearSigned(signed, ring, f.now); err != nil {
			t.Errorf("%d known keys: %v", len(ring), err)
		}
	}
	if _, err := verifyClearSigned(signed, openpgp.EntityList{newKey(t, f.now, 0)}, f.now); !errors.Is(err, errUnknownSigner) {
		t.Errorf("third key: %v", err)
	}
}
