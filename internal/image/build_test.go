package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/oci"
)

// missing skips the test for want of something, loudly, or fails it in CI.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("cannot test: %s", what)
	}
	t.Skipf("NOT TESTED: %s", what)
}

// tool runs a program of the host and gives its output, both streams.
func tool(t testing.TB, name string, args ...string) (output string, exit int) {
	t.Helper()
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err != nil {
			path, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	if err != nil {
		missing(t, name+" is not installed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC", "DEBUGFS_PAGER=cat", "PAGER=cat")
	out, err := cmd.CombinedOutput()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatalf("%s %q: %v", name, args, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

var fsckSummary = regexp.MustCompile(`^.*: \d+/\d+ files \([0-9.]+% non-contiguous\), \d+/\d+ blocks$`)

// fsck gives all that e2fsck has to say against an image, "" if it is clean.
func fsck(t testing.TB, image string) (complaints string) {
	t.Helper()
	out, exit := tool(t, "e2fsck", "-fn", image)
	passes := 0
	for line := range strings.Lines(out) {
		switch line = strings.TrimSpace(line); {
		case strings.HasPrefix(line, "Pass "):
			passes++
		case line == "" || strings.HasPrefix(line, "e2fsck ") || fsckSummary.MatchString(line):
		default:
			complaints += line + "\n"
		}
	}
	if exit != 0 || passes != 5 {
		complaints += fmt.Sprintf("e2fsck: exit %d after %d passes\n", exit, passes)
	}
	return complaints
}

// clean requires an image that e2fsck has nothing to say about.
func clean(t testing.TB, image string) {
	t.Helper()
	if out := fsck(t, image); out != "" {
		t.Fatalf("e2fsck -fn:\n%s", out)
	}
}

// mounted mounts an image read-only and gives the folder.
func mounted(t testing.TB, image string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "mounting needs root")
	}
	dir := t.TempDir()
	if out, exit := tool(t, "mount", "-t", "ext4", "-o", "loop,ro", image, dir); exit != 0 {
		missing(t, "mount: "+strings.TrimSpace(out))
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

// An entry is one thing in a layer: a header and, for a file, its bytes.
type entry struct {
	tar.Header
	body string
}

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}}
}

func file(name string, mode int64, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, body}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

func (e entry) owned(uid, gid int) entry { e.Uid, e.Gid = uid, gid; return e }

func (e entry) at(m time.Time) entry { e.ModTime, e.Format = m, tar.FormatPAX; return e }

func (e entry) with(xattr, value string) entry {
	records := map[string]string{"SCHILY.xattr." + xattr: value}
	for k, v := range e.PAXRecords {
		records[k] = v
	}
	e.PAXRecords, e.Format = records, tar.FormatPAX
	return e
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A layout is an OCI image layout that is being written.
type layout struct {
	t         testing.TB
	dir       string
	manifests []map[string]any
}

func newLayout(t testing.TB) *layout {
	l := &layout{t: t, dir: t.TempDir()}
	l.write("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return l
}

func (l *layout) write(name string, data []byte) {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		l.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func sum(data []byte) string {
	h := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(h[:])
}

func (l *layout) blob(mediaType string, data []byte) map[string]any {
	l.t.Helper()
	digest := sum(data)
	l.write("blobs/sha256/"+strings.TrimPrefix(digest, "sha256:"), data)
	return map[string]any{"mediaType": mediaType, "digest": digest, "size": len(data)}
}

func (l *layout) json(mediaType string, v any) map[string]any {
	l.t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.blob(mediaType, data)
}

// add puts an image of gzipped layers under a tag and returns the digests of
// its manifest and of its layers.
func (l *layout) add(tag string, layers ...[]byte) (manifest string, blobs []string) {
	l.t.Helper()
	var stored []storedLayer
	for _, raw := range layers {
		stored = append(stored, storeLayer(l.t, "gzip", raw))
	}
	return l.addStored(tag, stored...)
}

// A storedLayer is a layer as it lies in a registry.
type storedLayer struct {
	kind   string // gzip, zstd or "" for none
	data   []byte
	diffID string
}

func storeLayer(t testing.TB, kind string, raw []byte) storedLayer {
	t.Helper()
	s := storedLayer{kind: kind, data: raw, diffID: sum(raw)}
	switch kind {
	case "gzip":
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		w.Write(raw)
		w.Close()
		s.data = b.Bytes()
	case "zstd":
		w, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		s.data = w.EncodeAll(raw, nil)
	}
	return s
}

func (l *layout) addStored(tag string, layers ...storedLayer) (manifest string, blobs []string) {
	l.t.Helper()
	var diffIDs []string
	var descriptors []map[string]any
	for _, s := range layers {
		media := "application/vnd.oci.image.layer.v1.tar"
		if s.kind != "" {
			media += "+" + s.kind
		}
		d := l.blob(media, s.data)
		diffIDs = append(diffIDs, s.diffID)
		descriptors = append(descriptors, d)
		blobs = append(blobs, d["digest"].(string))
	}
	config := l.json("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Cmd": []string{"/bin/" + tag}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	m := l.json("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": descriptors,
	})
	m["annotations"] = map[string]string{"org.opencontainers.image.ref.name": tag}
	l.manifests = append(l.manifests, m)
	data, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": l.manifests})
	if err != nil {
		l.t.Fatal(err)
	}
	l.write("index.json", data)
	return m["digest"].(string), blobs
}

// reference parses what a user would write and opens what it names.
func reference(t testing.TB, text, path string) (*oci.Source, oci.Reference) {
	t.Helper()
	ref, err := oci.ParseReference(text)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &oci.Source{Input: f}, ref
}

func (l *layout) reference(tag string) (*oci.Source, oci.Reference) {
	l.t.Helper()
	return reference(l.t, "oci:"+l.dir+":"+tag, l.dir)
}

// agentText stands in for the guest binary: more than a block, none of it zero.
var agentText = strings.Repeat("the guest binary\n", 1000)

func agentFile(t testing.TB) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(path, []byte(agentText), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// buildTo builds into a new file and gives its path.
func buildTo(t testing.TB, src *oci.Source, ref oci.Reference, opts BuildOptions) (*Built, string, error) {
	t.Helper()
	img, err := src.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "rootfs.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	b, err := Build(t.Context(), img, out, opts)
	return b, out.Name(), err
}

// buildTar builds a rootfs: image of one tar and requires a clean file system.
func buildTar(t testing.TB, opts BuildOptions, entries ...entry) (*Built, string) {
	t.Helper()
	b, path, err := buildRootfs(t, opts, tarOf(t, entries...))
	if err != nil {
		t.Fatal(err)
	}
	clean(t, path)
	return b, path
}

func buildRootfs(t testing.TB, opts BuildOptions, raw []byte) (*Built, string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	src, ref := reference(t, "rootfs:"+path, path)
	return buildTo(t, src, ref, opts)
}

// debugfs asks about a path in an image: its inode as stat prints it.
func debugfs(t testing.TB, image, path string) string {
	t.Helper()
	out, _ := tool(t, "debugfs", "-R", "stat "+path, image)
	return out
}

// content is the bytes of a file in an image, symlinks not followed.
func content(t testing.TB, image, path string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "dump")
	out, _ := tool(t, "debugfs", "-R", "dump "+path+" "+to, image)
	data, err := os.ReadFile(to)
	if err != nil {
		t.Fatalf("debugfs dump %s: %s", path, out)
	}
	return string(data)
}

func shaOf(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

func wantCode(t testing.TB, err error, code banger.Code, words ...string) {
	t.Helper()
	if banger.CodeOf(err) != code {
		t.Fatalf("got %q: %v, want %q", banger.CodeOf(err), err, code)
	}
	hint := ""
	if e, ok := errors.AsType[*banger.Error](err); ok {
		hint = e.Hint
	}
	for _, w := range words {
		if !strings.Contains(err.Error()+" "+hint, w) {
			t.Errorf("%v (hint %q): does not say %q", err, hint, w)
		}
	}
}

// What a layer says of an inode is what the kernel says of it afterwards.
func TestBuildReadBack(t *testing.T) {
	when := time.Date(2021, 3, 4, 5, 6, 7, 123456789, time.UTC)
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	atimed := file("atimed", 0o600, "x").at(when)
	atimed.AccessTime, atimed.ChangeTime = when.Add(time.Hour), when.Add(2*time.Hour)
	node := entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/x", Mode: 0o620, Devmajor: 4, Devminor: 300, Uid: 7, Gid: 8}}
	l := newLayout(t)
	l.add("a",
		tarOf(t,
			dir("./", 0o751).owned(3, 4).at(when),
			dir("bin/", 0o755), dir("tmp/", 0o1777), dir("dev/", 0o755), node,
			file("bin/su", 0o4755, "setuid").owned(0, 0).at(when),
			file("bin/ping", 0o755, "ping").with("security.capability", capability).with("user.note", "kept").owned(1000, 1<<32-2),
			file("one", 0o640, "linked").owned(5, 6), hardlink("bin/two", "one"), hardlink("three", "bin/two"),
			file("gone", 0o644, strings.Repeat("gone", 5000)), file("old", 0o644, "below"),
			symlink("lnk", "bin/su").owned(9, 9), atimed,
			file("big", 0o600, strings.Repeat("0123456789abcdef", 1<<16)),
			file("before", 0o600, "").at(time.Date(1960, 1, 1, 0, 0, 0, 0, time.UTC)),
		),
		tarOf(t, file(".wh.gone", 0, ""), file("old", 0o600, "above").owned(11, 12), file("odd\n\"name", 0o644, "odd")),
	)
	src, ref := l.reference("a")
	built, image, err := buildTo(t, src, ref, BuildOptions{})
	if err != nil {
		t.Fatal(err)
	}
	clean(t, image)
	// debugfs sees creation times too, and needs no root.
	if out := debugfs(t, image, "/bin/su"); !strings.Contains(out, "Mode:  04755") || strings.Count(out, "Thu Mar  4 05:06:07 2021") != 4 {
		t.Errorf("debugfs of /bin/su:\n%s", out)
	}
	root := mounted(t, image)
	type want struct {
		mode     uint32
		uid, gid uint32
		nlink    uint64
		body     string
	}
	rows := map[string]want{
		".":           {syscall.S_IFDIR | 0o751, 3, 4, 0, ""},
		"tmp":         {syscall.S_IFDIR | 0o1777, 0, 0, 0, ""},
		"bin/su":      {syscall.S_IFREG | 0o4755, 0, 0, 1, "setuid"},
		"bin/ping":    {syscall.S_IFREG | 0o755, 1000, 1<<32 - 2, 1, "ping"},
		"one":         {syscall.S_IFREG | 0o640, 5, 6, 3, "linked"},
		"bin/two":     {syscall.S_IFREG | 0o640, 5, 6, 3, "linked"},
		"three":       {syscall.S_IFREG | 0o640, 5, 6, 3, "linked"},
		"old":         {syscall.S_IFREG | 0o600, 11, 12, 1, "above"},
		"odd\n\"name": {syscall.S_IFREG | 0o644, 0, 0, 1, "odd"},
		"lnk":         {syscall.S_IFLNK | 0o777, 9, 9, 1, ""},
		"dev/x":       {syscall.S_IFCHR | 0o620, 7, 8, 1, ""},
		"big":         {syscall.S_IFREG | 0o600, 0, 0, 1, strings.Repeat("0123456789abcdef", 1<<16)},
	}
	inodes := map[string]uint64{}
	for path, w := range rows {
		var st syscall.Stat_t
		if err := syscall.Lstat(filepath.Join(root, path), &st); err != nil {
			t.Errorf("%q: %v", path, err)
			continue
		}
		inodes[path] = st.Ino
		if st.Mode != w.mode || st.Uid != w.uid || st.Gid != w.gid || w.nlink != 0 && uint64(st.Nlink) != w.nlink {
			t.Errorf("%q: mode %o of %d:%d with %d links, want %o of %d:%d with %d", path, st.Mode, st.Uid, st.Gid, st.Nlink, w.mode, w.uid, w.gid, w.nlink)
		}
		if st.Mode&syscall.S_IFMT == syscall.S_IFREG {
			if body, err := os.ReadFile(filepath.Join(root, path)); err != nil || string(body) != w.body {
				t.Errorf("%q: %d bytes, %v; want %d", path, len(body), err, len(w.body))
			}
		}
		if path == "dev/x" && (unix.Major(st.Rdev) != 4 || unix.Minor(st.Rdev) != 300) {
			t.Errorf("%q: device %d:%d", path, unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
	}
	if inodes["one"] != inodes["bin/two"] || inodes["one"] != inodes["three"] || inodes["one"] == inodes["old"] {
		t.Errorf("hard links are inodes %v", inodes)
	}
	if _, err := os.Lstat(filepath.Join(root, "gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a whiteout hides is there: %v", err)
	}
	if target, err := os.Readlink(filepath.Join(root, "lnk")); target != "bin/su" {
		t.Errorf("symlink to %q, %v", target, err)
	}
	for name, value := range map[string]string{"security.capability": capability, "user.note": "kept"} {
		buf := make([]byte, 100)
		n, err := unix.Lgetxattr(filepath.Join(root, "bin/ping"), name, buf)
		if err != nil || string(buf[:n]) != value {
			t.Errorf("xattr %s: %q, %v", name, buf[:max(n, 0)], err)
		}
	}
	var st syscall.Stat_t
	if err := syscall.Lstat(filepath.Join(root, "atimed"), &st); err != nil ||
		st.Mtim.Nano() != when.UnixNano() || st.Atim.Nano() != when.Add(time.Hour).UnixNano() || st.Ctim.Nano() != when.Add(2*time.Hour).UnixNano() {
		t.Errorf("times %v %v %v, %v", st.Atim, st.Mtim, st.Ctim, err)
	}
	if err := syscall.Lstat(filepath.Join(root, "before"), &st); err != nil || st.Mtim.Sec != time.Date(1960, 1, 1, 0, 0, 0, 0, time.UTC).Unix() {
		t.Errorf("a time before 1970 became %v, %v", st.Mtim, err)
	}
	count := 0
	filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if filepath.Base(path) != "lost+found" {
			count++
		}
		return err
	})
	if built.Entries != count {
		t.Errorf("%d entries reported, %d are there", built.Entries, count)
	}
}

// The oracle complains where there is something to complain about.
func TestFsckSees(t *testing.T) {
	_, image := buildTar(t, BuildOptions{}, file("a", 0o644, "text"))
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0x5a}, 4096+0x1e); err != nil { // checksum of the first group descriptor
		t.Fatal(err)
	}
	if fsck(t, image) == "" {
		t.Fatal("e2fsck is content with a broken group descriptor")
	}
}

func TestGuestFiles(t *testing.T) {
	unit, err := guestFiles.ReadFile("guestfiles/banger-vsock-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	load, err := guestFiles.ReadFile("guestfiles/banger-vsock.conf")
	if err != nil {
		t.Fatal(err)
	}
	evil := strings.Repeat("evil", 5000)
	rows := []struct {
		name    string
		entries []entry
		agent   string // where the agent is without symlinks
		keeps   map[string]string
	}{
		{name: "empty image", entries: []entry{dir("./", 0o755)}},
		{
			name: "usr/local/bin is a symlink out of usr", agent: "/elsewhere/banger-vsock-agent",
			entries: []entry{symlink("usr/local/bin", "/elsewhere"), dir("elsewhere/", 0o755), file("elsewhere/x", 0o644, "x")},
			keeps:   map[string]string{"/elsewhere/x": "x"},
		},
		{
			name: "usr/local/bin is a dangling symlink above the root", agent: "/out/there/banger-vsock-agent",
			entries: []entry{symlink("usr/local/bin", "../../../../../../out/there")},
		},
		{
			name:    "symlink at the agent's path",
			entries: []entry{file("victim", 0o644, "victim"), symlink("usr/local/bin/banger-vsock-agent", "/victim")},
			keeps:   map[string]string{"/victim": "victim"},
		},
		{
			name:    "hard link at the agent's path",
			entries: []entry{file("victim", 0o666, "victim").owned(7, 7), hardlink("usr/local/bin/banger-vsock-agent", "victim")},
			keeps:   map[string]string{"/victim": "victim"},
		},
		{
			name:    "setuid file of a user at the agent's path",
			entries: []entry{file("usr/local/bin/banger-vsock-agent", 0o6777, evil).owned(1000, 1000).with("user.x", "y")},
		},
		{
			name:    "directory at the unit's path",
			entries: []entry{file("etc/systemd/system/banger-vsock-agent.service/deep/er", 0o644, evil)},
		},
		{
			name:    "directory at the link's path",
			entries: []entry{file("etc/systemd/system/multi-user.target.wants/banger-vsock-agent.service/x", 0o644, evil)},
		},
		{
			name:    "device at the agent's path",
			entries: []entry{{Header: tar.Header{Typeflag: tar.TypeChar, Name: "usr/local/bin/banger-vsock-agent", Devmajor: 1, Devminor: 3, Mode: 0o666}}},
		},
		{
			name:    "merged usr",
			entries: []entry{symlink("lib", "usr/lib"), symlink("bin", "usr/bin"), dir("usr/lib/", 0o755), dir("usr/bin/", 0o755), symlink("usr/local", "lib/l")},
			agent:   "/usr/lib/l/bin/banger-vsock-agent",
		},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			_, image := buildTar(t, BuildOptions{Agent: agentFile(t)}, r.entries...)
			agent := r.agent
			if agent == "" {
				agent = "/" + guestAgentPath
			}
			for path, want := range map[string]struct{ mode, body string }{
				agent:               {"0755", agentText},
				"/" + guestUnitPath: {"0644", string(unit)},
				"/" + guestLoadPath: {"0644", string(load)},
			} {
				out := debugfs(t, image, path)
				for _, w := range []string{"Type: regular", "Mode:  " + want.mode, "User:     0   Group:     0 ", "Links: 1 "} {
					if !strings.Contains(out, w) {
						t.Errorf("%s: not %q:\n%s", path, w, out)
					}
				}
				if strings.Contains(out, "user.x") {
					t.Errorf("%s: has the xattrs of what it replaced:\n%s", path, out)
				}
				if got := content(t, image, path); got != want.body {
					t.Errorf("%s: %d bytes, want %d", path, len(got), len(want.body))
				}
			}
			if out := debugfs(t, image, "/"+guestWantsPath); !strings.Contains(out, `Fast link dest: "/`+guestUnitPath+`"`) && content(t, image, "/"+guestWantsPath) != "/"+guestUnitPath {
				t.Errorf("no symlink to the unit:\n%s", out)
			}
			for path, body := range r.keeps {
				if got := content(t, image, path); got != body {
					t.Errorf("%s became %q", path, got)
				}
			}
			// Without an agent nothing of it is there.
			_, bare := buildTar(t, BuildOptions{}, r.entries...)
			if out := debugfs(t, bare, "/"+guestLoadPath); !strings.Contains(out, "File not found") {
				t.Errorf("guest files though none were asked for:\n%s", out)
			}
		})
	}
	for _, n := range []int64{0, maxAgentBytes + 1} {
		f := agentFile(t)
		if err := os.Truncate(f.Name(), n); err != nil {
			t.Fatal(err)
		}
		if _, _, err := buildRootfs(t, BuildOptions{Agent: f}, tarOf(t, dir("./", 0o755))); err == nil || !strings.Contains(err.Error(), "is no agent") {
			t.Errorf("an agent of %d bytes: %v", n, err)
		}
	}
	_, _, err = buildRootfs(t, BuildOptions{Agent: agentFile(t)}, tarOf(t, symlink("usr", "usr")))
	wantCode(t, err, banger.CodeInvalid, "usr/local/bin", "symbolic links")
	_, _, err = buildRootfs(t, BuildOptions{Agent: agentFile(t)}, tarOf(t, file("usr/local", 0o644, "")))
	wantCode(t, err, banger.CodeInvalid, "usr/local/bin", "not a directory")
}

func TestBuildTwice(t *testing.T) {
	var entries []entry
	for i := range 3000 { // enough for an htree, whose order the seed decides
		entries = append(entries, file("d/"+strconv.Itoa(i), 0o644, strings.Repeat("x", i%5000)))
	}
	l := newLayout(t)
	l.add("a", tarOf(t, entries...), tarOf(t, file("d/.wh.17", 0, ""), file("d/18", 0o600, "new")))
	l.add("b", tarOf(t, entries...), tarOf(t, file("d/.wh.17", 0, ""), file("d/18", 0o600, "neu")))
	sums, ids := map[string]string{}, map[string][32]byte{}
	for _, run := range []string{"a", "a again", "b"} {
		tag, _, _ := strings.Cut(run, " ")
		src, ref := l.reference(tag)
		b, path, err := buildTo(t, src, ref, BuildOptions{SizeBytes: 64 << 20, Agent: agentFile(t)})
		if err != nil {
			t.Fatal(err)
		}
		clean(t, path)
		sums[run], ids[run] = shaOf(t, path), b.Identity
		if b.UUID[6]>>4 != 8 || b.UUID[8]>>6 != 2 {
			t.Errorf("UUID %x is not of version 8", b.UUID)
		}
	}
	if sums["a"] != sums["a again"] || ids["a"] != ids["a again"] {
		t.Errorf("two builds of one image differ: %v %v", sums, ids)
	}
	if sums["a"] == sums["b"] || ids["a"] == ids["b"] {
		t.Errorf("two images are one: %v %v", sums, ids)
	}
}

func TestBuildSize(t *testing.T) {
	small := tarOf(t, file("a", 0o644, "a"))
	b, path, err := buildRootfs(t, BuildOptions{}, small)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() != minBaseBytes || b.SizeBytes != minBaseBytes {
		t.Fatalf("a small image is %d bytes, reported as %d; want %d, %v", st.Size(), b.SizeBytes, minBaseBytes, err)
	}
	if alloc := st.Sys().(*syscall.Stat_t).Blocks * 512; alloc > 8<<20 {
		t.Errorf("a small image occupies %d bytes", alloc)
	}

	// What is really there decides, not what it says of itself: 900 MB of
	// bytes that are not zero, in a stream so that no file of it is needed.
	if testing.Short() {
		t.Log("the size by content is not tested with -short")
	} else {
		const contentBytes = 900 << 20
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		go func() {
			defer w.Close()
			tw := tar.NewWriter(w)
			tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "big", Mode: 0o600, Size: contentBytes})
			chunk := bytes.Repeat([]byte{1}, 1<<20)
			for range contentBytes >> 20 {
				tw.Write(chunk)
			}
			tw.Close()
		}()
		ref, err := oci.ParseReference("rootfs:-")
		if err != nil {
			t.Fatal(err)
		}
		b, path, err := buildTo(t, &oci.Source{Input: r}, ref, BuildOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if b.SizeBytes%baseStepBytes != 0 || b.SizeBytes < contentBytes+contentBytes/4 || b.SizeBytes > (contentBytes+64<<20)*5/4+baseStepBytes {
			t.Errorf("%d MiB of content became %d MiB", contentBytes>>20, b.SizeBytes>>20)
		}
		clean(t, path)
		os.Remove(path)
	}

	big := tarOf(t, file("a", 0o644, strings.Repeat("a", 40<<20)))
	_, _, err = buildRootfs(t, BuildOptions{SizeBytes: 32 << 20}, big)
	wantCode(t, err, banger.CodeUsage, "size: ", "MiB")
	e, _ := errors.AsType[*banger.Error](err)
	m := regexp.MustCompile(`at least (\d+) MiB`).FindStringSubmatch(e.Hint)
	if m == nil {
		t.Fatalf("hint %q has no size", e.Hint)
	}
	mib, _ := strconv.ParseInt(m[1], 10, 64)
	_, path, err = buildRootfs(t, BuildOptions{SizeBytes: mib << 20}, big)
	if err != nil {
		t.Fatalf("the size of the hint: %v", err)
	}
	clean(t, path)
	_, _, err = buildRootfs(t, BuildOptions{SizeBytes: (mib - 1) << 20}, big)
	wantCode(t, err, banger.CodeUsage)

	for _, size := range []int64{1 << 20, maxBaseBytes} {
		if b, path, err := buildRootfs(t, BuildOptions{SizeBytes: size}, small); err != nil || b.SizeBytes != size {
			t.Errorf("size %d: %v", size, err)
		} else if size == 1<<20 {
			clean(t, path)
		}
	}
	for _, size := range []int64{-1, 1, 1<<20 - 1, maxBaseBytes + 1, 1 << 62} {
		_, _, err := buildRootfs(t, BuildOptions{SizeBytes: size}, small)
		if banger.CodeOf(err) != banger.CodeUsage {
			t.Errorf("size %d: %q %v, want %q", size, banger.CodeOf(err), err, banger.CodeUsage)
		}
		if e, ok := errors.AsType[*banger.Error](err); ok && strings.Contains(e.Hint, "at least 0 ") {
			t.Errorf("size %d: hint %q", size, e.Hint)
		}
	}
}

// What a layer may say and ext4 cannot hold is the image's fault, by name.
func TestBuildRefuses(t *testing.T) {
	links := []entry{file("f", 0o644, "")}
	for i := range 65000 {
		links = append(links, hardlink(strconv.Itoa(i), "f"))
	}
	named := file("x", 0o644, "")
	for i := range 20 {
		named = named.with(fmt.Sprintf("user.%0245d", i), "")
	}
	for _, r := range []struct {
		name    string
		entries []entry
		words   []string
	}{
		{"65001 links", links, []string{"65000 links"}},
		{"xattr names of two blocks", []entry{named}, []string{`"x"`, "xattr"}},
		{"time past what ext4 holds", []entry{file("late", 0o644, "").at(time.Date(2446, 5, 11, 0, 0, 0, 0, time.UTC))}, []string{`"late"`, "2446"}},
	} {
		t.Run(r.name, func(t *testing.T) {
			_, _, err := buildRootfs(t, BuildOptions{}, tarOf(t, r.entries...))
			wantCode(t, err, banger.CodeInvalid, append(r.words, "image \"rootfs:")...)
		})
	}
	_, path := buildTar(t, BuildOptions{}, links[:65000]...)
	if out := debugfs(t, path, "/f"); !strings.Contains(out, "Links: 65000") {
		t.Errorf("65000 links:\n%s", out)
	}
}

const childEnv = "BANGER_TEST_CHILD_TAR"

// TestBuildMemory builds images of 100,000 entries, each in a process of its
// own with the memory limit of the daemon.
func TestBuildMemory(t *testing.T) {
	const entries = 100_000
	if path := os.Getenv(childEnv); path != "" {
		LimitMemory()
		src, ref := reference(t, "rootfs:"+path, path)
		b, _, err := buildTo(t, src, ref, BuildOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if b.Entries < entries {
			t.Fatalf("%d entries", b.Entries)
		}
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("\n%s\n", regexp.MustCompile(`VmHWM:\s+\d+ kB`).Find(status))
		return
	}
	for _, row := range []struct {
		name     string
		limitKiB int
		header   func(i int) *tar.Header
	}{
		// As distributions have it: folders, paths of some length, small files.
		{"ordinary", 128 << 10, func(i int) *tar.Header {
			d := fmt.Sprintf("usr/share/package-%04d/subfolder", i/50)
			if i%50 == 0 {
				return &tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}
			}
			return &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/a-file-name-%06d.txt", d, i), Mode: 0o644, Size: 10, ModTime: time.Unix(int64(i), 0)}
		}},
		// As nobody has it: long names, and an xattr on every file.
		{"hostile", 128 << 10, func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%0150d%06d", 0, i), Mode: 0o644, Size: 10,
				PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 40)}}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "many.tar")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			w := tar.NewWriter(f)
			for i := range entries {
				h := row.header(i)
				if err := w.WriteHeader(h); err != nil {
					t.Fatal(err)
				}
				if h.Size > 0 {
					fmt.Fprintf(w, "%010d", i)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestBuildMemory$")
			cmd.Env = append(os.Environ(), childEnv+"="+path)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(out)
			if m == nil {
				t.Fatalf("no peak in %q", out)
			}
			peak, _ := strconv.Atoi(string(m[1]))
			t.Logf("%d entries: %d MiB resident at most", entries, peak>>10)
			if peak > row.limitKiB {
				t.Errorf("%d entries need %d KiB, the limit is %d", entries, peak, row.limitKiB)
			}
		})
	}
}
