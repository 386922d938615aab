package kernel

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/internal/store"
)

// writeModules puts a module folder on disk, with the symlinks and files that
// stand in a real one.
func writeModules(t *testing.T, dir, release, ext string) {
	t.Helper()
	files := append(fakeModules(t, release, ext), testFile{"modules.dep", []byte("stale")}, testFile{"vdso/vdso.so", []byte("x")})
	for _, f := range files {
		name := filepath.Join(dir, f.name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, f.data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"build": "/usr/src/linux", "kernel/evil.ko": "/etc/passwd", "kernel/up": "../.."} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
}

func openBytes(t *testing.T, data []byte) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return openPath(t, name)
}

func openPath(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func wantCode(t *testing.T, err error, code banger.Code, says string) {
	t.Helper()
	var be *banger.Error
	if !errors.As(err, &be) || be.Code != code || !strings.Contains(err.Error(), says) {
		t.Errorf("error %v (%+v), want code %s and %q", err, be, code, says)
	}
}

func TestImport(t *testing.T) {
	for _, row := range []struct{ name, ext, open string }{
		{"the folder itself", "", "lib/modules/" + testRelease},
		{"its parent", "", "lib/modules"},
		{"xz", ".xz", "lib/modules"},
		{"zstd", ".zst", "lib/modules"},
		{"gzip", ".gz", "lib/modules"},
	} {
		t.Run(row.name, func(t *testing.T) {
			root := t.TempDir()
			writeModules(t, filepath.Join(root, "lib/modules", testRelease), testRelease, row.ext)
			ks := Open(openStore(t))
			k, err := ks.Import(t.Context(), openBytes(t, fakeVmlinuz(t, testRelease)), openPath(t, filepath.Join(root, row.open)))
			if err != nil {
				t.Fatal(err)
			}
			if k.Source != "import" || !k.Default {
				t.Errorf("got %+v", k)
			}
			if row.ext == ".gz" { // kmod may be built without zlib
				checkDrive(t, k)
			} else {
				checkFakeKernel(t, k)
			}
			// What boots is uncompressed, whatever the drive holds.
			boot, err := os.ReadFile(filepath.Join(k.dir, bootDir, "00-virtio_ring.ko"))
			if err != nil || !bytes.HasPrefix(boot, []byte("\x7fELF")) {
				t.Errorf("boot module: %.4q, %v", boot, err)
			}
		})
	}
}

func TestImportSameBytesSameDrive(t *testing.T) {
	var sums [][]byte
	var uuids []string
	for range 2 {
		dir := t.TempDir()
		writeModules(t, dir, testRelease, "")
		os.Chtimes(filepath.Join(dir, "modules.order"), time.Time{}, time.Now().Add(-time.Hour))
		k, err := Open(openStore(t)).Import(t.Context(), openBytes(t, fakeVmlinuz(t, testRelease)), openPath(t, dir))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(k.Modules)
		if err != nil {
			t.Fatal(err)
		}
		sums, uuids = append(sums, b), append(uuids, k.ModulesUUID)
	}
	if !bytes.Equal(sums[0], sums[1]) || uuids[0] != uuids[1] {
		t.Errorf("two drives of the same modules differ: %s, %s", uuids[0], uuids[1])
	}
	// What the other tests rely on: a damaged drive is noticed.
	sums[0][1024+0x68] ^= 1 // the superblock's UUID
	name := filepath.Join(t.TempDir(), "damaged")
	if err := os.WriteFile(name, sums[0], 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(needTool(t, "e2fsck"), "-fn", name).CombinedOutput(); err == nil {
		t.Errorf("e2fsck is content with a damaged drive:\n%s", out)
	}
}

func TestImportRefuses(t *testing.T) {
	good := fakeVmlinuz(t, testRelease)
	folder := func(fill func(dir string)) string {
		dir := t.TempDir()
		fill(dir)
		return dir
	}
	for _, row := range []struct {
		name    string
		image   []byte
		modules string
		code    banger.Code
		says    string
	}{
		{"no kernel", []byte("#!/bin/sh\n"), "", banger.CodeInvalid, "neither a bzImage nor an ELF file"},
		{"two releases, not this one", good, folder(func(dir string) {
			writeModules(t, dir+"/1.0", "1.0", "")
			writeModules(t, dir+"/2.0", "2.0", "")
		}), banger.CodeInvalid, "neither a folder of modules"},
		{"one release, not this one", good, folder(func(dir string) { writeModules(t, dir+"/1.0", "1.0", "") }), banger.CodeInvalid, `is for kernel "1.0"`},
		{"empty folder", good, t.TempDir(), banger.CodeInvalid, "neither a folder of modules"},
		{"folder without modules", good, folder(func(dir string) { os.Mkdir(dir+"/kernel", 0o755) }), banger.CodeInvalid, "no modules in it"},
		{"damaged module", good, folder(func(dir string) {
			writeModules(t, dir, testRelease, "")
			os.WriteFile(dir+"/kernel/bad.ko", []byte("\x7fELF"), 0o644)
		}), banger.CodeInvalid, `module "kernel/bad.ko": not a 64-bit`},
		{"damaged compression", good, folder(func(dir string) {
			writeModules(t, dir, testRelease, "")
			os.WriteFile(dir+"/kernel/bad.ko.xz", []byte("\xfd7zXZ\x00 and no more"), 0o644)
		}), banger.CodeInvalid, `module "kernel/bad.ko.xz"`},
		{"a file for a folder", good, "/etc/passwd", banger.CodeInvalid, "module folder"},
		{"blank in a name", good, folder(func(dir string) {
			writeModules(t, dir, testRelease, "")
			os.WriteFile(dir+"/kernel/a b.ko", nil, 0o644)
		}), banger.CodeInvalid, "module path"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := openStore(t)
			var modules *os.File
			if row.modules != "" {
				modules = openPath(t, row.modules)
			}
			_, err := Open(s).Import(t.Context(), openBytes(t, row.image), modules)
			wantCode(t, err, row.code, row.says)
			nothingLeft(t, s)
		})
	}
	t.Run("a folder for an image", func(t *testing.T) {
		_, err := Open(openStore(t)).Import(t.Context(), openPath(t, t.TempDir()), nil)
		wantCode(t, err, banger.CodeInvalid, "not a regular file")
	})
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s := openStore(t)
		_, err := Open(s).Import(ctx, openBytes(t, good), nil)
		wantCode(t, err, banger.CodeCanceled, "")
		nothingLeft(t, s)
	})
}

func TestDefaultAndRemove(t *testing.T) {
	f := newFakeArchive(t).build()
	ks, s := openFake(t, f)
	_, err := ks.Get("")
	wantCode(t, err, banger.CodeNotFound, "there is none yet")
	var be *banger.Error
	if errors.As(err, &be); be.Hint != "banger kernel pull" {
		t.Errorf("hint %q", be.Hint)
	}
	imported := func(release string) *Kernel {
		t.Helper()
		k, err := ks.Import(t.Context(), openBytes(t, fakeVmlinuz(t, release)), nil)
		if err != nil {
			t.Fatal(err)
		}
		if k.Modules != "" || k.ModulesUUID != "" || len(k.LoadModules()) != 0 {
			t.Errorf("without modules: %+v", k)
		}
		return k
	}
	wantDefault := func(release string) {
		t.Helper()
		k, err := ks.Get("")
		if err != nil || k.Version != release || !k.Default {
			t.Errorf("default: %+v, %v, want %s", k, err, release)
		}
		list, err := ks.List()
		n := 0
		for _, k := range list {
			if k.Default {
				n++
			}
		}
		if n != 1 || err != nil {
			t.Errorf("%d defaults, %v", n, err)
		}
	}
	imported("5.1")
	wantDefault("5.1")
	imported("5.2")
	wantDefault("5.1")
	if k, err := ks.Pull(t.Context(), "", nil); err != nil || k.Default {
		t.Errorf("a pull took the place of an imported default: %+v, %v", k, err)
	}
	wantDefault("5.1")
	_, err = ks.Import(t.Context(), openBytes(t, fakeVmlinuz(t, "5.1")), nil)
	wantCode(t, err, banger.CodeConflict, "is there already")
	for _, release := range []string{"5.1", "5.2"} {
		if err := ks.Remove(t.Context(), release); err != nil {
			t.Fatal(err)
		}
	}
	wantDefault(testRelease)
	if _, err := ks.Pull(t.Context(), "", nil); err != nil { // names it on disk
		t.Fatal(err)
	}

	// A newer kernel of the default's suite moves the default; of another not.
	newer := func(suite, release string) {
		t.Helper()
		f.deb = fakeKernelDeb(t, ".gz", "", release)
		name, path := "linux-image-"+release, "pool/updates/"+release+".deb"
		f.suite(suite, "debian", "")
		f.suite(suite+"-updates", "debian", "")
		f.suite(suite+"-security", "security", stanza(metaPackage, "9-1", name, "pool/updates/m.deb", nil)+stanza(name, "9-1", "kmod", path, f.deb))
		f.files["/security/"+path] = f.deb
		if _, err := ks.Pull(t.Context(), suite, nil); err != nil {
			t.Fatal(err)
		}
	}
	newer("trixie", "6.12.1+deb13-cloud-amd64")
	wantDefault(testRelease)
	newer("bookworm", "6.1.0-100-cloud-amd64")
	wantDefault("6.1.0-100-cloud-amd64")

	// An imported release is not overwritten by a pull.
	if err := ks.Remove(t.Context(), "6.1.0-100-cloud-amd64"); err != nil {
		t.Fatal(err)
	}
	imported("6.1.0-100-cloud-amd64")
	_, err = ks.Pull(t.Context(), "bookworm", nil)
	wantCode(t, err, banger.CodeConflict, "an imported kernel has that release")

	wantCode(t, ks.Remove(t.Context(), "4.0"), banger.CodeNotFound, "not found")
	wantCode(t, ks.Remove(t.Context(), "../vms"), banger.CodeUsage, "kernel release")
	_, err = ks.Get("../x")
	wantCode(t, err, banger.CodeNotFound, "not found")

	// A broken one is named, hides no other, and can be removed.
	record := filepath.Join(s.Kernel(testRelease), recordFile)
	for name, damage := range map[string]func() error{
		"garbage":      func() error { return os.WriteFile(record, []byte("{"), 0o600) },
		"newer schema": func() error { return store.WriteJSON(record, recordSchema+1, struct{}{}) },
		"other kernel": func() error { return store.WriteJSON(record, recordSchema, record2("1.0", "")) },
		"boot module":  func() error { return store.WriteJSON(record, recordSchema, record2(testRelease, "../../x")) },
		"no record":    func() error { return os.Remove(record) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		list, err := ks.List()
		if err == nil || !strings.Contains(err.Error(), testRelease) || len(list) != 2 {
			t.Errorf("%s: %d kernels, %v", name, len(list), err)
		}
		if _, err := ks.Get(testRelease); err == nil {
			t.Errorf("%s: a broken kernel was returned", name)
		}
		if _, err := ks.Get("6.12.1+deb13-cloud-amd64"); err != nil {
			t.Errorf("%s: hides another: %v", name, err)
		}
		store.WriteJSON(record, recordSchema, record2(testRelease, ""))
	}
	// A default that is broken is an error, not a reason to boot another.
	if err := ks.writeDefault(testRelease); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if k, err := ks.Get(""); err == nil {
		t.Errorf("in place of a broken default: %+v", k)
	}
	if err := ks.Remove(t.Context(), testRelease); err != nil {
		t.Error(err)
	}
	if k, err := ks.Get(""); err != nil || !k.Default {
		t.Errorf("after its removal: %+v, %v", k, err)
	}
	if _, err := os.Stat(s.Kernel(testRelease)); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func record2(version, boot string) record {
	r := record{Version: version, Source: sourceImport}
	if boot != "" {
		r.BootModules = []string{boot}
	}
	return r
}

func testKernelWithBoot(t *testing.T, files ...testFile) *Kernel {
	t.Helper()
	k := &Kernel{dir: t.TempDir()}
	os.Mkdir(filepath.Join(k.dir, bootDir), 0o700)
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(k.dir, bootDir, f.name), f.data, 0o600); err != nil {
			t.Fatal(err)
		}
		k.boot = append(k.boot, f.name)
	}
	return k
}

// TestInitramfs reads the archives back with the real cpio.
func TestInitramfs(t *testing.T) {
	cpio := needTool(t, "cpio")
	for size := int64(1); size <= 5; size++ { // every padding
		agent, boot := bytes.Repeat([]byte("a"), int(size)), bytes.Repeat([]byte("b"), int(size-1))
		k := testKernelWithBoot(t, testFile{"00-x.ko", bytes.Repeat([]byte("m"), int(size+1))}, testFile{"01-yy.ko", nil})
		var out, again bytes.Buffer
		if err := k.WriteInitramfs(&out, bytes.NewReader(agent), size, boot); err != nil {
			t.Fatal(err)
		}
		k.WriteInitramfs(&again, bytes.NewReader(agent), size, boot)
		if !bytes.Equal(out.Bytes(), again.Bytes()) {
			t.Error("not the same bytes twice")
		}
		if out.Len()%4 != 0 {
			t.Errorf("length %d is not a multiple of 4", out.Len())
		}
		// cpio stops at the first trailer; the kernel goes on behind it.
		end := bytes.Index(out.Bytes(), []byte(cpioTrailer)) + len(cpioTrailer) + 1
		end = (end + 3) &^ 3
		first, second := out.Bytes()[:end], out.Bytes()[end:]
		dir := t.TempDir()
		for _, archive := range [][]byte{first, second} {
			cmd := exec.Command(cpio, "-im", "--quiet", "--no-absolute-filenames")
			cmd.Dir, cmd.Stdin = dir, bytes.NewReader(archive)
			if msg, err := cmd.CombinedOutput(); err != nil || len(msg) != 0 {
				t.Fatalf("cpio: %v\n%s", err, msg)
			}
			cmd = exec.Command(cpio, "-tv", "--quiet")
			cmd.Stdin = bytes.NewReader(archive)
			list, err := cmd.CombinedOutput()
			if err != nil || strings.Contains(string(list), "cpio:") {
				t.Fatalf("cpio: %v\n%s", err, list)
			}
		}
		for name, want := range map[string]struct {
			data []byte
			mode fs.FileMode
		}{
			"init":             {agent, 0o755},
			"modules/00-x.ko":  {bytes.Repeat([]byte("m"), int(size+1)), 0o644},
			"modules/01-yy.ko": {nil, 0o644},
			"banger/boot.json": {boot, 0o600},
		} {
			got, err := os.ReadFile(filepath.Join(dir, name))
			st, _ := os.Stat(filepath.Join(dir, name))
			if err != nil || !bytes.Equal(got, want.data) || st.Mode() != want.mode || st.ModTime().Unix() != 0 {
				t.Errorf("%s: %q, %v, %v", name, got, st, err)
			}
		}
		for _, name := range []string{"dev", "proc", "sys", "banger", "modules"} {
			if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode() != fs.ModeDir|0o755 {
				t.Errorf("%s: %v, %v", name, st, err)
			}
		}
	}
}

// TestInitramfsHeader fixes the bytes of a header and of what follows it.
func TestInitramfsHeader(t *testing.T) {
	for _, row := range []struct {
		name string
		size int
		want string // after the magic
	}{
		// 110 + name + NUL is padded to a multiple of four: 1 -> 112, 2 -> 116, 5 -> 116, 6 -> 120
		{"a", 0, "00000001000081a40000000000000000000000010000000000000000" + strings.Repeat("0", 32) + "0000000200000000a\x00"},
		{"ab", 1, "00000001000081a40000000000000000000000010000000000000001" + strings.Repeat("0", 32) + "0000000300000000ab\x00\x00\x00\x00x\x00\x00\x00"},
		{"abcde", 4, "00000001000081a40000000000000000000000010000000000000004" + strings.Repeat("0", 32) + "0000000600000000abcde\x00xxxx"},
		{"abcdef", 5, "00000001000081a40000000000000000000000010000000000000005" + strings.Repeat("0", 32) + "0000000700000000abcdef\x00\x00\x00\x00xxxxx\x00\x00\x00"},
	} {
		var out bytes.Buffer
		c := &cpioWriter{w: &out}
		c.entry(row.name, cpioFile|0o644, int64(row.size), bytes.NewReader(bytes.Repeat([]byte("x"), row.size)))
		if got := out.String(); got != "070701"+row.want || c.err != nil {
			t.Errorf("%s:\n got %q\nwant %q\n%v", row.name, got, "070701"+row.want, c.err)
		}
	}
}

func TestInitramfsRefuses(t *testing.T) {
	k := testKernelWithBoot(t)
	var out bytes.Buffer
	agent := []byte("agent")
	for _, row := range []struct {
		name string
		size int64
		boot []byte
		says string
	}{
		{"agent longer than said", 4, nil, "longer than 4 bytes"},
		{"agent shorter than said", 6, nil, "ends after 5 of 6"},
		{"no agent", 0, nil, "agent of 0 bytes"},
		{"agent over the limit", maxAgentBytes + 1, nil, "agent of"},
		{"boot config over the limit", 5, make([]byte, maxBootConfigBytes+1), "boot config of"},
	} {
		err := k.WriteInitramfs(&out, bytes.NewReader(agent), row.size, row.boot)
		if err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", row.name, err)
		}
	}
	if err := k.WriteInitramfs(&out, bytes.NewReader(agent), 5, make([]byte, maxBootConfigBytes)); err != nil {
		t.Error(err)
	}
	k.boot = []string{"00-gone.ko"}
	if err := k.WriteInitramfs(&out, bytes.NewReader(agent), 5, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing module: %v", err)
	}
}
