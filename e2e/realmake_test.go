package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// Real images, made of Debian's packages by Debian's tools: mmdebstrap and
// dpkg-deb make the trees, GNU tar, setfacl and setcap what is rare in them,
// gzip and zstd the blobs. What is done here is to cut trees into layers.
//
// They are made once and kept as the storage of a registry, under a name that
// is the hash of this file: a change here makes them anew.

// A realImage is one image of the set, in two forms.
type realImage struct {
	name   string
	config v1.Config
	layers []string // files of uncompressed tars, lowest first
}

const (
	suite = "bookworm"
	// realEpoch is SOURCE_DATE_EPOCH for the trees: the files that two of them
	// share have the same times. 2023-11-14T22:13:20Z.
	realEpoch = 1700000000
	// attrLayers is how many layers the image of attributes has.
	attrLayers = 100
	// attrSeed decides what the layers of attributes hold.
	attrSeed = 20231114
)

// realTrees are Debian roots, each made of the smallest and these packages.
var realTrees = map[string]string{
	"systemd": "systemd-sysv,dbus,udev,openssh-server,nginx-light",
	"python":  "python3",
	"gcc":     "build-essential",
	"attrs":   "libcap2-bin,acl,attr,iputils-ping",
}

// realSet is what is in the cache: the storage folder of a registry, and for
// every image and form the blobs of its layers.
type realSet struct {
	storage string
	Blobs   map[string][]string `json:"blobs"` // "name:form" to digests, lowest layer first
}

// realImages gives the set, made anew where it is not in the cache.
func realImages(t *testing.T) *realSet {
	t.Helper()
	for _, p := range []string{"mmdebstrap", "dpkg-deb", "tar", "gzip", "zstd", "setfacl", "setcap", "mke2fs", "docker-registry"} {
		needProgram(t, p)
	}
	if os.Geteuid() != 0 {
		missing(t, "owners and devices need root")
	}
	source, err := os.ReadFile("realmake_test.go")
	if err != nil {
		t.Fatal(err)
	}
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	key := sha256.Sum256(append(source, runtime.Version()...))
	folder := filepath.Join(cache, "real", hex.EncodeToString(key[:8]))
	set := new(realSet)
	if data, err := os.ReadFile(filepath.Join(folder, "set.json")); err == nil {
		if err := json.Unmarshal(data, set); err != nil {
			t.Fatal(err)
		}
	} else {
		begin := time.Now()
		old, _ := filepath.Glob(filepath.Join(cache, "real", "*"))
		for _, o := range old { // of another version of this file, or half made
			os.RemoveAll(o)
		}
		tmp := folder + ".tmp"
		if err := os.MkdirAll(tmp, 0o700); err != nil {
			t.Fatal(err)
		}
		makeReal(t, tmp, set)
		data, err := json.Marshal(set)
		if err == nil {
			err = os.WriteFile(filepath.Join(tmp, "set.json"), data, 0o600)
		}
		if err == nil {
			err = os.Rename(tmp, folder)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("made in %v", time.Since(begin).Round(time.Second))
	}
	set.storage = filepath.Join(folder, "registry")
	return set
}

// makeReal makes all images and pushes them into a registry below folder.
func makeReal(t *testing.T, folder string, set *realSet) {
	t.Helper()
	scratch := scratchFS(t, "8G")
	last := time.Now()
	done := func(what string) {
		t.Logf("%s in %.1f s", what, time.Since(last).Seconds())
		last = time.Now()
	}
	base := filepath.Join(scratch, "base.tar")
	must(t, bootstrap(base))
	above := make(map[string]string) // the layer that makes a tree of the base
	var wait sync.WaitGroup
	turn := make(chan bool, runtime.NumCPU())
	for name, packages := range realTrees {
		above[name] = filepath.Join(scratch, name+".layer")
		wait.Go(func() {
			turn <- true
			defer func() { <-turn }()
			tree := filepath.Join(scratch, name+".tar")
			args := []string{"--include=" + packages}
			if name != "systemd" { // whose packages need an order that only apt knows
				args = append(args, "--variant=custom", "--setup-hook=tar-in "+base+" /")
			}
			err := bootstrap(tree, args...)
			if err == nil {
				err = diffTar(above[name], base, tree)
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			os.Remove(tree)
		})
	}
	wait.Wait()
	if t.Failed() {
		t.FailNow()
	}
	done("trees")
	write := func(name string, entries ...entry) string {
		out := filepath.Join(scratch, name+".layer")
		data, err := layerOf(entries...)
		if err == nil {
			err = os.WriteFile(out, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

	busybox := filepath.Join(scratch, "busybox.layer")
	must(t, unpackPackage(scratch, "busybox-static", busybox))
	// Sorted: GNU tar gives a folder its time when it leaves it.
	applets := []entry{dir("."), dir("etc"), file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644),
		dir("root"), dir("sbin"), symlink("sbin/init", "../bin/busybox"), dir("bin")}
	for _, a := range []string{"sh", "ls", "cat", "id", "uname", "sha256sum", "wc", "mount", "poweroff"} {
		applets = append(applets, symlink("bin/"+a, "busybox"))
	}
	prog := filepath.Join(scratch, "prog")
	must(t, build(prog, "./testdata/prog"))
	binary, err := os.ReadFile(prog)
	must(t, err)

	images := []realImage{
		{"busybox", v1.Config{Cmd: []string{"/bin/sh"}}, []string{busybox, write("applets", applets...)}},
		{"static", v1.Config{Entrypoint: []string{"/prog"}}, []string{write("static", dir("."), file("prog", string(binary), 0o755))}},
		{"systemd", v1.Config{Cmd: []string{"/sbin/init"}, Env: env, StopSignal: "SIGRTMIN+3"}, []string{base, above["systemd"]}},
		{"python", v1.Config{Cmd: []string{"python3"}, Env: env}, []string{base, above["python"]}},
		{"gcc", v1.Config{Cmd: []string{"/bin/bash"}, Env: env}, []string{base, above["gcc"]}},
		{"attrs", v1.Config{Cmd: []string{"/bin/bash"}, Env: env}, append([]string{base, above["attrs"]}, attributeLayers(t, scratch)...)},
	}
	if n := len(images[5].layers); n != attrLayers {
		t.Fatalf("attrs: %d layers", n)
	}

	done("layers")
	reg, err := startRegistry(folder, false)
	must(t, err)
	defer reg.stop()
	set.Blobs = make(map[string][]string)
	blobs := packAll(t, images)
	done("blobs")
	for _, im := range images {
		for _, form := range []compression{gz, zst} {
			tag := im.name + ":" + string(form)
			var layers []v1.Layer
			for _, file := range im.layers {
				l := blobs[file][form]
				layers = append(layers, l)
				set.Blobs[tag] = append(set.Blobs[tag], l.digest.String())
			}
			img, err := imageOfLayers(im.config, layers...)
			must(t, err)
			must(t, reg.push("real/"+tag, img))
		}
	}
	done("images")
}

// bootstrap makes a Debian root as a tar, slim as distributions' images are.
func bootstrap(file string, more ...string) error {
	args := []string{"--quiet", "--mode=unshare", "--variant=minbase", "--format=tar", "--skip=output/dev", "--dpkgopt=force-unsafe-io"}
	for _, left := range []string{"doc/*", "man/*", "locale/*", "info/*"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+left)
	}
	args = append(args, more...)
	cmd := exec.Command("mmdebstrap", append(args, suite, "-")...)
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &said
	cmd.Env = append(os.Environ(), fmt.Sprint("SOURCE_DATE_EPOCH=", realEpoch))
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap: %w\n%s", err, said.Bytes())
	}
	return nil
}

// unpackPackage writes the files of a package of Debian's as a tar.
func unpackPackage(scratch, name, out string) error {
	folder := filepath.Join(scratch, "deb-"+name)
	if err := os.Mkdir(folder, 0o777); err != nil {
		return err
	}
	script := `cd "$1" && { apt-get -q download "$2" || { apt-get -q update && apt-get -q download "$2"; }; } >&2 && dpkg-deb --fsys-tarfile ./*.deb >"$3"`
	if said, err := exec.Command("sh", "-c", script, "sh", folder, name, out).CombinedOutput(); err != nil {
		return fmt.Errorf("package %s: %w\n%s", name, err, said)
	}
	return nil
}

// member is what two tars are compared by.
type member struct {
	header string
	sum    [32]byte
}

// readMembers calls f for every member of a tar, and returns what is in it.
func readMembers(file string, f func(h *tar.Header, m member, body []byte) error) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	r := tar.NewReader(in)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		body, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		records := maps.Clone(h.PAXRecords)
		m := member{sum: sha256.Sum256(body)}
		m.header = fmt.Sprint(h.Typeflag, h.Linkname, h.Size, h.Mode, h.Uid, h.Gid, h.ModTime.UnixNano(), h.Devmajor, h.Devminor)
		for _, k := range slices.Sorted(maps.Keys(records)) {
			m.header += fmt.Sprintf(" %s=%q", k, records[k])
		}
		if err := f(h, m, body); err != nil {
			return err
		}
	}
}

// diffTar writes the layer that makes full of lower: what is new or changed
// with the directories above it, and whiteouts for what is gone.
func diffTar(out, lower, full string) error {
	was := make(map[string]member)
	if err := readMembers(lower, func(h *tar.Header, m member, _ []byte) error {
		was[path.Clean(h.Name)] = m
		return nil
	}); err != nil {
		return err
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	gone := maps.Clone(was)
	folders := make(map[string]*tar.Header)
	written := make(map[string]bool)
	var parents func(name string) error
	parents = func(name string) error {
		above := path.Dir(name)
		if name == "." || written[above] {
			return nil
		}
		if err := parents(above); err != nil {
			return err
		}
		written[above] = true
		if folders[above] == nil {
			return fmt.Errorf("%s: its folder was not listed before it", name)
		}
		return w.WriteHeader(folders[above])
	}
	err = readMembers(full, func(h *tar.Header, m member, body []byte) error {
		name := path.Clean(h.Name)
		delete(gone, name)
		if h.Typeflag == tar.TypeDir {
			folders[name] = h
		}
		same := was[name] == m
		if h.Typeflag == tar.TypeLink { // of a file that is another now, it is another too
			same = same && !written[path.Clean(h.Linkname)]
		}
		if same || written[name] {
			return nil
		}
		if err := parents(name); err != nil {
			return err
		}
		written[name] = true
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(body)
		return err
	})
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(gone)) {
		if _, above := gone[path.Dir(name)]; above {
			continue
		}
		if err := parents(name); err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: "./" + path.Join(path.Dir(name), ".wh."+path.Base(name)), Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(realEpoch, 0)}); err != nil {
			return err
		}
	}
	return w.Close()
}

// packAll compresses the layers of all images, in both forms, on all cores.
func packAll(t *testing.T, images []realImage) map[string]map[compression]*fileLayer {
	t.Helper()
	blobs := make(map[string]map[compression]*fileLayer)
	var wait sync.WaitGroup
	turn := make(chan bool, runtime.NumCPU())
	for _, im := range images {
		for _, file := range im.layers {
			if blobs[file] != nil {
				continue
			}
			blobs[file] = make(map[compression]*fileLayer)
			for _, form := range []compression{gz, zst} {
				l := &fileLayer{media: mediaOf[form], path: file + "." + string(form)}
				blobs[file][form] = l
				wait.Go(func() {
					turn <- true
					defer func() { <-turn }()
					if err := l.pack(form, file); err != nil {
						t.Errorf("%s: %v", l.path, err)
					}
				})
			}
		}
	}
	wait.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return blobs
}

// fileLayer is a layer whose bytes are a file.
type fileLayer struct {
	path           string
	digest, diffID v1.Hash
	sizeBytes      int64
	media          types.MediaType
}

// pack compresses with the tool that people use.
func (l *fileLayer) pack(form compression, file string) (err error) {
	out, err := os.Create(l.path)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(string(form), "-q", "-c", file)
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := cmd.Run(); err != nil {
		return err
	}
	if l.digest, l.sizeBytes, err = hashFile(l.path); err != nil {
		return err
	}
	l.diffID, _, err = hashFile(file)
	return err
}

func hashFile(path string) (v1.Hash, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return v1.Hash{}, 0, err
	}
	defer f.Close()
	return v1.SHA256(f)
}

func (l *fileLayer) Digest() (v1.Hash, error)             { return l.digest, nil }
func (l *fileLayer) DiffID() (v1.Hash, error)             { return l.diffID, nil }
func (l *fileLayer) Compressed() (io.ReadCloser, error)   { return os.Open(l.path) }
func (l *fileLayer) Uncompressed() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }
func (l *fileLayer) Size() (int64, error)                 { return l.sizeBytes, nil }
func (l *fileLayer) MediaType() (types.MediaType, error)  { return l.media, nil }

// attributeLayers makes layers of all that a file system can say of a file,
// below /attrs: one that stays as it is, for the guest to look at, and the rest
// by chance, with what is below hidden, replaced and put back.
func attributeLayers(t *testing.T, scratch string) (files []string) {
	t.Helper()
	r := rand.New(rand.NewPCG(attrSeed, 0))
	there := map[string]byte{} // the paths by chance so far, and what they are
	for i := range attrLayers - 2 {
		root := filepath.Join(scratch, fmt.Sprintf("attr%02d", i))
		top := filepath.Join(root, "attrs")
		must(t, os.MkdirAll(top, 0o755))
		var before []entry // what no tool packs: whiteouts, and links to what is below
		if i == 0 {
			fixedAttributes(t, top)
		} else {
			before = chanceAttributes(t, r, top, there)
		}
		// One time for all folders: the tools have just changed them.
		when := time.Unix(realEpoch+int64(i), int64(r.IntN(1e9)))
		must(t, filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				err = os.Chtimes(p, when, when)
			}
			return err
		}))
		must(t, os.Chtimes(root, time.Unix(realEpoch, 0), time.Unix(realEpoch, 0)))
		file := root + ".layer"
		f, err := os.Create(file)
		must(t, err)
		w := tar.NewWriter(f)
		for _, e := range before {
			must(t, w.WriteHeader(&tar.Header{Name: e.name, Typeflag: e.typ, Linkname: e.link, Mode: 0o644, ModTime: time.Unix(realEpoch, 0)}))
		}
		must(t, w.Flush()) // and no end: GNU tar's archive follows
		cmd := exec.Command("tar", "--create", "--format=pax", "--pax-option=delete=atime,delete=ctime", "--sort=name", "--numeric-owner",
			"--xattrs", "--xattrs-include=*", "--acls", "--sparse", "-C", root, ".")
		cmd.Stdout, cmd.Stderr = f, os.Stderr
		must(t, cmd.Run())
		must(t, f.Close())
		files = append(files, file)
	}
	return files
}

// fixedAttributes is what the guest is asked about.
func fixedAttributes(t *testing.T, top string) {
	t.Helper()
	script := `set -e; cd "$1"; mkdir fixed fixed/one fixed/two fixed/acl; cd fixed
printf capped >capped; chmod 755 capped; setcap cap_net_bind_service,cap_net_raw+ep capped
printf setuid >setuid; chown 1000:1001 setuid; chmod 6755 setuid
setfacl -m u:1000:rwx,g:1001:r-x,m::rwx acl; setfacl -d -m u:1000:rw-,g::r--,o::--- acl
printf acl >acl/file; setfacl -b acl/file; setfacl -m u:1000:r-- acl/file
printf linked >one/name; ln one/name two/name; ln two/name third
setfattr -n user.note -v kept one/name
mknod null c 1 3; mknod loop b 7 70000; mkfifo fifo; ln -s ../../etc/passwd link
truncate -s 5M sparse; printf end >>sparse
touch -d '1965-04-03 02:01:00.123456789 UTC' old; touch -d '2100-01-02 03:04:05.987654321 UTC' new; chown 3000000000:3000000001 new`
	out, err := exec.Command("sh", "-c", script, "sh", top).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// chanceAttributes fills one layer below top and updates what there is.
func chanceAttributes(t *testing.T, r *rand.Rand, top string, there map[string]byte) (before []entry) {
	t.Helper()
	pick := func(want func(byte) bool) string {
		var of []string
		for _, p := range slices.Sorted(maps.Keys(there)) {
			if want(there[p]) {
				of = append(of, p)
			}
		}
		if len(of) == 0 {
			return ""
		}
		return of[r.IntN(len(of))]
	}
	isDir := func(k byte) bool { return k == 'd' }
	drop := func(p string) {
		for q := range there {
			if q == p || strings.HasPrefix(q, p+"/") {
				delete(there, q)
			}
		}
	}
	// Parents come with their entry, as every engine writes them, with
	// attributes of this layer's own.
	var mkdir func(p string)
	mkdir = func(p string) {
		if p == "." || p == "" {
			return
		}
		mkdir(path.Dir(p))
		full := filepath.Join(top, p)
		if err := os.Mkdir(full, 0o755); err != nil {
			return
		}
		if there[p] != 'd' {
			drop(p)
		}
		there[p] = 'd'
		decorate(t, r, full, 'd')
	}
	linked := "" // a file below that is linked to must stay in this layer
	hidden := map[string]bool{}
	whiteout := func(name string) {
		before = append(before, entry{name: path.Join("attrs", name), typ: tar.TypeReg})
		mkdir(path.Dir(name))
	}
	for range 1 + r.IntN(3) {
		switch p := pick(func(byte) bool { return true }); {
		case p == "" || hidden[p]:
		case r.IntN(4) == 0 && there[p] == 'd':
			whiteout(path.Join(p, ".wh..wh..opq"))
			for q := range there {
				if strings.HasPrefix(q, p+"/") {
					delete(there, q)
				}
			}
			hidden[p] = true
		case r.IntN(2) == 0:
			whiteout(path.Join(path.Dir(p), ".wh."+path.Base(p)))
			drop(p)
			hidden[p] = true
		}
	}
	// Links to a file of a layer below.
	if p := pick(func(k byte) bool { return k == 'f' }); p != "" && r.IntN(2) == 0 {
		name := fmt.Sprintf("below%d", r.IntN(20))
		if _, taken := there[name]; !taken {
			before = append(before, entry{name: "attrs/" + name, typ: tar.TypeLink, link: "attrs/" + p})
			linked = p
			there[name] = 'l' // chosen for nothing else: a layer of its own could not link to it
		}
	}
	var mine []string // regular files of this layer
	for range 4 + r.IntN(8) {
		in := ""
		if r.IntN(3) > 0 {
			in = pick(isDir)
		}
		p := path.Join(in, fmt.Sprintf("%c%d", 'a'+r.IntN(4), r.IntN(4)))
		full := filepath.Join(top, p)
		if _, err := os.Lstat(full); err == nil || strings.Count(p, "/") > 5 || there[p] == 'l' ||
			linked != "" && strings.HasPrefix(linked+"/", p+"/") {
			continue
		}
		mkdir(path.Dir(p))
		kind := "fffffdddlscbp"[r.IntN(13)]
		if kind != 'd' || there[p] != 'd' {
			drop(p)
		}
		switch kind {
		case 'f':
			body := make([]byte, r.IntN(3)*r.IntN(40_000))
			for i := range body {
				body[i] = byte(r.IntN(4)) // half of what they are when compressed
			}
			must(t, os.WriteFile(full, body, 0o600))
			mine = append(mine, full)
		case 'd':
			mkdir(p)
			continue
		case 'l': // a hard link, to another folder as often as not
			if len(mine) == 0 {
				continue
			}
			must(t, os.Link(mine[r.IntN(len(mine))], full))
			there[p] = 'l'
			continue
		case 's':
			must(t, os.Symlink(strings.Repeat("x/", r.IntN(60))+"target", full))
		case 'c':
			must(t, unix.Mknod(full, unix.S_IFCHR|0o600, int(unix.Mkdev(uint32(1+r.IntN(4095)), uint32(r.IntN(1<<20))))))
		case 'b':
			must(t, unix.Mknod(full, unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(1+r.IntN(4095)), uint32(r.IntN(1<<20))))))
		case 'p':
			must(t, unix.Mkfifo(full, 0o600))
		}
		there[p] = kind
		decorate(t, r, full, kind)
	}
	return before
}

// decorate gives a file owner, mode, ACLs, xattrs and a time by chance.
func decorate(t *testing.T, r *rand.Rand, full string, kind byte) {
	t.Helper()
	ids := []int{0, 1, 1000, 65534, 70000, 3000000000}
	must(t, os.Lchown(full, ids[r.IntN(6)], ids[r.IntN(6)]))
	if kind != 's' {
		must(t, unix.Chmod(full, uint32(r.IntN(0o10000))))
	}
	if kind == 'd' || kind == 'f' {
		if r.IntN(3) == 0 {
			value := make([]byte, r.IntN(3000))
			for i := range value {
				value[i] = byte(r.Uint32())
			}
			must(t, unix.Setxattr(full, fmt.Sprintf("user.x%d", r.IntN(9)), value, 0))
		}
		if r.IntN(4) == 0 {
			must(t, unix.Setxattr(full, "trusted.banger", []byte("kept"), 0))
		}
		if r.IntN(3) == 0 {
			run(t, "setfacl", "-m", fmt.Sprintf("u:%d:r-x,g:%d:-w-", 1000+r.IntN(9), r.IntN(70000)), full)
		}
	}
	if kind == 'd' && r.IntN(3) == 0 {
		run(t, "setfacl", "-d", "-m", fmt.Sprintf("u:%d:rwx,o::---", 1000+r.IntN(9)), full)
	}
	if kind == 'f' && r.IntN(3) == 0 {
		run(t, "setcap", []string{"cap_net_raw+ep", "cap_chown,cap_kill=eip", "cap_sys_admin+i"}[r.IntN(3)], full)
	}
	when := unix.Timespec{Sec: r.Int64N(4_000_000_000) - 1_000_000_000, Nsec: r.Int64N(1e9)}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, full, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
