package image

import (
	"archive/tar"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"banger"
	"banger/ext4"
)

// openFS reads an image file.
func openFS(t testing.TB, path string) *ext4.FS {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	img, err := ext4.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// smallBytes is enough for what tests hold, and quickly hashed.
const smallBytes = 16 << 20

// differences compares two images in all that counts.
func differences(t testing.TB, a, b *ext4.FS) (paths []string) {
	t.Helper()
	if err := ext4.Compare(a, b, ext4.DiffAll|ext4.DiffHoles, func(d ext4.Difference) bool {
		paths = append(paths, d.Path+": "+d.Aspect.String())
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return paths
}

// foreign makes a file system with the tool that others use, of the folder dir.
func foreign(t testing.TB, dir, size string, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "foreign.ext4")
	args = append(args, "-q", "-F", "-d", dir, path, size)
	if out, exit := tool(t, "mke2fs", args...); exit != 0 {
		t.Fatalf("mke2fs %q: %s", args, out)
	}
	return path
}

// someTree is a folder with a /root in it.
func someTree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, body := range map[string]string{"etc/hostname": "foreign", "root/.profile": "profile", "usr/bin/tool": strings.Repeat("tool", 10000)} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "root/.profile"), filepath.Join(dir, "root/.link")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func register(t testing.TB, im *Images, path, name string, seed *os.File) (*Image, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return im.Register(t.Context(), f, RegisterOptions{Name: name, Label: path, Agent: agentFile(t), Seed: seed})
}

// untouched fails the test if a file is not in the end what it was.
func untouched(t testing.TB, path string) {
	t.Helper()
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := shaOf(t, path)
	t.Cleanup(func() {
		after, err := os.Stat(path)
		if err != nil || !os.SameFile(before, after) || after.ModTime() != before.ModTime() || after.Mode() != before.Mode() || shaOf(t, path) != sum {
			t.Errorf("%s was changed: %v", path, err)
		}
	})
}

// Whatever made a file system, the base is all of it and the guest files.
func TestRegister(t *testing.T) {
	for _, row := range []struct {
		name string
		args []string
	}{
		{"ext4", []string{"-t", "ext4"}},
		{"ext4, blocks of 1 KiB", []string{"-t", "ext4", "-b", "1024"}},
		{"ext4 without a journal", []string{"-t", "ext4", "-O", "^has_journal"}},
		{"ext4 without checksums, bigalloc or 64 bits", []string{"-t", "ext4", "-O", "^metadata_csum,^64bit"}},
		{"ext3", []string{"-t", "ext3"}},
		{"ext2, inodes of 128 bytes", []string{"-t", "ext2", "-I", "128"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := foreign(t, someTree(t), "16M", row.args...)
			untouched(t, path)
			im, s := newImages(t)
			image, err := register(t, im, path, "foreign", nil)
			if err != nil {
				t.Fatal(err)
			}
			clean(t, image.Rootfs)
			clean(t, image.WorkSeed)
			if got := verityOf(t, image.Rootfs); got != image.BaseDigest {
				t.Errorf("base_digest %s, the file's is %s", image.BaseDigest, got)
			}
			base := openFS(t, image.Rootfs)
			if image.UUID != base.UUID() || image.UUID != openFS(t, path).UUID() || image.Digest != nil {
				t.Errorf("%+v", image)
			}
			for _, d := range differences(t, openFS(t, path), base) {
				at, _, _ := strings.Cut(d, ": ")
				if !strings.HasPrefix("usr/local/bin", at) && !strings.HasPrefix("etc/systemd/system", at) && at != "etc/modules-load.d" {
					t.Error(d)
				}
			}
			if got := content(t, image.Rootfs, "/"+guestAgentPath); got != agentText {
				t.Errorf("debugfs finds an agent of %d bytes", len(got))
			}
			if got := content(t, image.WorkSeed, "/.profile"); got != "profile" {
				t.Errorf("the seed's .profile is %q", got)
			}
			if left := inside(t, s, "tmp"); left != nil {
				t.Errorf("tmp/ has %q", left)
			}
		})
	}
}

// A planted agent loses, and takes nothing else with it.
func TestRegisterReplaces(t *testing.T) {
	evil := strings.Repeat("evil", 5000)
	for _, row := range []struct {
		name    string
		entries []entry
		agent   string
		keeps   string
	}{
		{"an agent", []entry{file(guestAgentPath, 0o6777, evil).owned(1000, 1000).with("user.x", "y")}, "", ""},
		{"a symlink to a victim", []entry{file("victim", 0o644, evil), symlink(guestAgentPath, "/victim")}, "", "/victim"},
		{"a hard link to a victim", []entry{file("victim", 0o666, evil), hardlink(guestAgentPath, "victim")}, "", "/victim"},
		{"a symlink out of the image", []entry{symlink(guestAgentPath, "../../../../../etc/passwd")}, "", ""},
		{"a directory", []entry{file(guestAgentPath+"/deep/er", 0o644, evil)}, "", ""},
		{"a device", []entry{{Header: tar.Header{Typeflag: tar.TypeBlock, Name: guestAgentPath, Devmajor: 8, Mode: 0o666}}}, "", ""},
		{"a parent that is a symlink", []entry{symlink("usr/local", "/opt/l"), dir("opt/l/", 0o755)}, "/opt/l/bin/banger-vsock-agent", ""},
		{"a parent that is a symlink above the root", []entry{symlink("usr/local", "../../../opt"), dir("opt/", 0o755)}, "/opt/bin/banger-vsock-agent", ""},
		{"a parent that is a dangling symlink", []entry{symlink("usr/local", "/none/at/all")}, "/none/at/all/bin/banger-vsock-agent", ""},
		{"dangling symlinks one behind the other", []entry{symlink("usr/local", "a/b"), symlink("usr/a", "../c"), symlink("c", "/d/e")}, "/d/e/b/bin/banger-vsock-agent", ""},
		{"wants that are a directory", []entry{file(guestWantsPath+"/x", 0o644, evil)}, "", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, path := buildTar(t, BuildOptions{SizeBytes: smallBytes}, row.entries...)
			im, _ := newImages(t)
			image, err := register(t, im, path, "x", nil)
			if err != nil {
				t.Fatal(err)
			}
			clean(t, image.Rootfs)
			if row.agent == "" {
				row.agent = "/" + guestAgentPath
			}
			out := debugfs(t, image.Rootfs, row.agent)
			for _, w := range []string{"Type: regular", "Mode:  0755", "User:     0   Group:     0 ", "Links: 1 "} {
				if !strings.Contains(out, w) || strings.Contains(out, "user.x") {
					t.Errorf("not %q:\n%s", w, out)
				}
			}
			if got := content(t, image.Rootfs, row.agent); got != agentText {
				t.Errorf("the agent has %d bytes", len(got))
			}
			if row.keeps != "" {
				if got := content(t, image.Rootfs, row.keeps); got != evil {
					t.Errorf("%s became %q", row.keeps, clip(got))
				}
			}
		})
	}
}

// What cannot be an image is refused, with the reason, and leaves nothing.
func TestRegisterRefuses(t *testing.T) {
	tree := someTree(t)
	if err := os.WriteFile(filepath.Join(tree, "one-more"), nil, 0o644); err != nil {
		t.Fatal(err) // with it there are 13 inodes left of 32
	}
	whole, err := os.ReadFile(foreign(t, tree, "16M", "-t", "ext4"))
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, data, 0o640); err != nil {
			t.Fatal(err)
		}
		return path
	}
	damaged := slices.Clone(whole)
	damaged[1024+0x28] ^= 0xff // inodes per group
	device := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(device, 0o755); err != nil {
		t.Fatal(err)
	}
	_, planted := buildTar(t, BuildOptions{SizeBytes: smallBytes}, entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "etc/hidden"}})
	_, loop := buildTar(t, BuildOptions{SizeBytes: smallBytes}, symlink("usr", "usr"))
	_, blocked := buildTar(t, BuildOptions{SizeBytes: smallBytes}, file("usr/local", 0o644, ""))
	if out, exit := tool(t, "debugfs", "-w", "-R", "mknod whiteout c 0 0", planted); exit != 0 {
		t.Fatal(out)
	}
	for _, row := range []struct {
		name, path string
		code       banger.Code
		words      []string
	}{
		{"nothing", write("empty", nil), banger.CodeInvalid, []string{"empty"}},
		{"text", write("text", []byte(strings.Repeat("no file system\n", 1000))), banger.CodeInvalid, nil},
		{"qcow2", write("q", append([]byte("QFI\xfb"), make([]byte, 8192)...)), banger.CodeInvalid, []string{"qcow2", "qemu-img"}},
		{"a folder", device, banger.CodeInvalid, []string{"regular"}},
		{"cut short", write("cut", whole[:len(whole)/2]), banger.CodeInvalid, []string{"cut short"}},
		{"damaged", write("damaged", damaged), banger.CodeInvalid, nil},
		{"no room", foreign(t, tree, "2M", "-t", "ext4", "-m", "0", "-O", "^has_journal"), banger.CodeInvalid, []string{"no room", "resize2fs"}},
		{"no inodes", foreign(t, tree, "16M", "-t", "ext4", "-b", "4096", "-N", "20"), banger.CodeInvalid, []string{"no room"}},
		{"a parent that leads to itself", loop, banger.CodeInvalid, []string{"symlinks"}},
		{"a parent that is a file", blocked, banger.CodeInvalid, []string{"not a directory"}},
		{"a whiteout of overlayfs", planted, banger.CodeInvalid, []string{`"whiteout"`, "0:0"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.name != "a folder" {
				untouched(t, row.path)
			}
			im, s := newImages(t)
			agent := agentFile(t)
			if row.name == "no room" {
				if err := os.WriteFile(agent.Name(), []byte(strings.Repeat("agent", 2<<20)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			f, err := os.Open(row.path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = im.Register(t.Context(), f, RegisterOptions{Name: "x", Label: row.path, Agent: agent})
			wantCode(t, err, row.code, append(row.words, row.path)...)
			nothing(t, s)
		})
	}
	for _, name := range []string{"", " ", "a b", "-x", "../x", "a\n", "\x1b[31m", strings.Repeat("x", 513)} {
		im, s := newImages(t)
		_, err := register(t, im, write("whole", whole), name, nil)
		wantCode(t, err, banger.CodeUsage, "--name")
		nothing(t, s)
	}
}

// Registered again: the same is the same; what changed is another base, and
// the name moves to it.
func TestRegisterAgain(t *testing.T) {
	path := foreign(t, someTree(t), "16M", "-t", "ext4")
	im, s := newImages(t)
	first, err := register(t, im, path, "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := register(t, im, path, "x", nil)
	if err != nil || again.ID != first.ID || again.BaseDigest != first.BaseDigest {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	if err := exec.Command("/usr/sbin/debugfs", "-w", "-R", "mkdir new", path).Run(); err != nil {
		t.Fatal(err)
	}
	second, err := register(t, im, path, "x", nil)
	if err != nil || second.ID == first.ID {
		t.Fatalf("a changed file: %+v, %v", second, err)
	}
	found, err := im.Find("x")
	if err != nil || found.ID != second.ID {
		t.Errorf("the name is of %+v, %v", found, err)
	}
	if got := verityOf(t, first.Rootfs); got != first.BaseDigest {
		t.Errorf("the base of before became %s", got)
	}
	// With a seed of its own.
	_, own := buildTar(t, BuildOptions{SizeBytes: smallBytes}, dir("./", 0o711).owned(5, 5), file("mine", 0o640, "mine").owned(5, 6))
	seed, err := os.Open(own)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Close()
	untouched(t, own)
	third, err := register(t, im, path, "x", seed)
	if err != nil {
		t.Fatal(err)
	}
	clean(t, third.WorkSeed)
	if third.ID == second.ID || content(t, third.WorkSeed, "/mine") != "mine" {
		t.Errorf("with a seed: %+v", third)
	}
	checkTop(t, third.WorkSeed, 0o711)
	// One that is no file system is an error.
	bad, err := os.Open("register_test.go")
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	_, err = register(t, im, path, "bad", bad)
	wantCode(t, err, banger.CodeInvalid, "work seed")
	if left := inside(t, s, "tmp"); left != nil {
		t.Errorf("tmp/ has %q", left)
	}
	if _, err := im.Find("bad"); banger.CodeOf(err) != banger.CodeNotFound {
		t.Error(err)
	}
}

// checkTop wants the root of a seed to be root's.
func checkTop(t testing.TB, path string, mode uint16) {
	t.Helper()
	info, err := openFS(t, path).Lstat(".")
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*ext4.Stat); st.UID != 0 || st.GID != 0 || st.Mode != modeDir|mode {
		t.Errorf("the top is %o of %d:%d", st.Mode, st.UID, st.GID)
	}
}

// A read back that finds anything else says so.
func TestCheckGuestFiles(t *testing.T) {
	_, good := buildTar(t, BuildOptions{SizeBytes: smallBytes, Agent: agentFile(t)}, dir("./", 0o755))
	guest, err := guestFileList(agentFile(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := checkGuestFiles(openFS(t, good), guest); err != nil {
		t.Fatal(err)
	}
	for name, command := range map[string]string{
		"gone":         "rm " + guestAgentPath,
		"mode":         "set_inode_field " + guestUnitPath + " mode 0100646",
		"owner":        "set_inode_field " + guestBootstrapPath + " uid 7",
		"size":         "set_inode_field " + guestAgentPath + " size 100",
		"a link":       "ln " + guestAgentPath + " second",
		"xattr":        "ea_set " + guestLoadPath + " user.x y",
		"another unit": "symlink " + guestNetWantsPath + "x /x",
	} {
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(good)
			if err != nil {
				t.Fatal(err)
			}
			bad := filepath.Join(t.TempDir(), "bad.ext4")
			if err := os.WriteFile(bad, data, 0o600); err != nil {
				t.Fatal(err)
			}
			if name == "a link" { // debugfs leaves the count to its user
				command = "set_inode_field " + guestAgentPath + " links_count 2"
			}
			if out, exit := tool(t, "debugfs", "-w", "-R", command, bad); exit != 0 {
				t.Fatal(out)
			}
			err = checkGuestFiles(openFS(t, bad), guest)
			if (err == nil) != (name == "another unit") {
				t.Error(err)
			}
			if name == "gone" && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		})
	}
}
