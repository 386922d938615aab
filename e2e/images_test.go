package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The images that the scripts use are made here from Debian's own packages
// and served by a real registry on loopback.

// entry is one member of a layer.
type entry struct {
	name, body, link string
	typ              byte
	mode             int64
	uid, gid         int
	pax              map[string]string
}

func dir(name string) entry { return entry{name: name + "/", typ: tar.TypeDir, mode: 0o755} }
func file(name, body string, mode int64) entry {
	return entry{name: name, body: body, typ: tar.TypeReg, mode: mode}
}
func symlink(name, target string) entry {
	return entry{name: name, link: target, typ: tar.TypeSymlink, mode: 0o777}
}

// layerOf makes an uncompressed layer of entries.
func layerOf(entries ...entry) ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.name, Typeflag: e.typ, Mode: e.mode, Uid: e.uid, Gid: e.gid,
			Linkname: e.link, Size: int64(len(e.body)), ModTime: time.Unix(1700000000, 0), PAXRecords: e.pax,
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(tw, e.body); err != nil {
			return nil, err
		}
	}
	err := tw.Close()
	return buf.Bytes(), err
}

// compress names how a layer travels.
type compression string

const (
	plain compression = "plain"
	gz    compression = "gzip"
	zst   compression = "zstd"
)

var mediaOf = map[compression]types.MediaType{plain: types.OCIUncompressedLayer, gz: types.OCILayer, zst: types.OCILayerZStd}

// imageOf makes an image of uncompressed layers.
func imageOf(c compression, config v1.Config, layers ...[]byte) (v1.Image, error) {
	var all []v1.Layer
	for _, data := range layers {
		l, err := packed(c, data)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return imageOfLayers(config, all...)
}

func imageOfLayers(config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Config = "linux", "amd64", config
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		return nil, err
	}
	for _, l := range layers {
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return nil, err
		}
	}
	return img, nil
}

func packed(c compression, data []byte) (*layer, error) {
	l := &layer{plain: data, media: mediaOf[c], raw: data}
	var out bytes.Buffer
	switch c {
	case gz:
		w := gzip.NewWriter(&out)
		w.Write(data)
		w.Close()
		l.raw = out.Bytes()
	case zst:
		cmd := exec.Command("zstd", "-q", "-c")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &out, os.Stderr
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		l.raw = out.Bytes()
	}
	return l, nil
}

// layer is a layer with its bytes as given: nothing is compressed again.
type layer struct {
	raw, plain []byte
	media      types.MediaType
}

func (l *layer) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.raw))
	return h, err
}
func (l *layer) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.plain))
	return h, err
}
func (l *layer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.raw)), nil
}
func (l *layer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.plain)), nil
}
func (l *layer) Size() (int64, error)                { return int64(len(l.raw)), nil }
func (l *layer) MediaType() (types.MediaType, error) { return l.media, nil }

// busyboxLayers make a root of busybox without an init, and a layer above it
// that overwrites, hides and links what is below.
func busyboxLayers() (below, above []byte, err error) {
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, nil, fmt.Errorf("%w (Debian's package busybox-static has it)", err)
	}
	entries := []entry{
		dir("bin"), dir("etc"), dir("usr"), dir("usr/bin"), dir("home"),
		{name: "home/user/", typ: tar.TypeDir, mode: 0o700, uid: 1000, gid: 1000},
		file("bin/busybox", string(busybox), 0o755),
		file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n", 0o644),
		file("etc/group", "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n", 0o644),
		file("etc/old", "old\n", 0o644),
		file("etc/gone", "gone\n", 0o644),
		{name: "etc/oldlink", link: "etc/old", typ: tar.TypeLink, mode: 0o644},
		symlink("link", "usr/bin"),
	}
	for _, applet := range []string{"sh", "ls", "cat", "id", "env", "pwd", "uname", "sleep", "df", "mount", "stat", "dd", "sha256sum",
		"tr", "kill", "poweroff", "reboot", "ps", "grep", "wc", "true", "false", "echo", "seq", "hostname", "touch", "sync", "stty", "head", "trap"} {
		entries = append(entries, symlink("bin/"+applet, "busybox"))
	}
	if below, err = layerOf(entries...); err != nil {
		return nil, nil, err
	}
	above, err = layerOf(
		file("etc/old", "new\n", 0o644),
		file("etc/.wh.gone", "", 0),
		file("link/tool", "#!/bin/sh\necho tool\n", 0o755), // through the symlink, to usr/bin
		file("etc/owned", "x", 0o4750),
		entry{name: "etc/caps", typ: tar.TypeReg, mode: 0o755, uid: 7, gid: 8,
			pax: map[string]string{"SCHILY.xattr.user.note": "kept"}},
	)
	return below, above, err
}

// registry is a docker-registry of Debian's on a loopback port.
type registry struct {
	addr string
	cmd  *exec.Cmd
}

// startRegistry starts one with its files below dir, or with what is there
// already and cannot be changed.
func startRegistry(dir string, readOnly bool) (*registry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	l.Close()
	text := fmt.Sprintf("version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: %s\n  maintenance:\n    readonly:\n      enabled: %v\nhttp:\n  addr: %s\n",
		filepath.Join(dir, "registry"), readOnly, addr)
	cmd := exec.Command("docker-registry", "serve", "/dev/stdin")
	cmd.Stdin = strings.NewReader(text)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r := &registry{addr: addr, cmd: cmd}
	for range 100 {
		resp, err := http.Get("http://" + addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			return r, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.stop()
	return nil, errors.New("docker-registry: no answer within 10 s")
}

func (r *registry) stop() {
	r.cmd.Process.Kill()
	r.cmd.Wait()
}

func (r *registry) push(repository string, img v1.Image) error {
	ref, err := name.ParseReference(r.addr+"/"+repository, name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(ref, img)
}

// writeLayout writes an OCI layout folder with one image.
func writeLayout(dir string, img v1.Image) error {
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "latest"}))
}
