package image

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"banger/ext4"
	"banger/internal/oci"
)

// Guest files are what every base image holds so that it also comes up under
// another VMM, kernel and boot path. In banger's own boot the agent of the
// initramfs is already running, and these stand down when they find it.
//
//go:embed guestfiles
var guestFiles embed.FS

const (
	guestAgentPath     = "usr/local/bin/banger-vsock-agent"
	guestBootstrapPath = "usr/local/libexec/banger-network-bootstrap"
	guestUnitPath      = "etc/systemd/system/banger-vsock-agent.service"
	guestNetUnitPath   = "etc/systemd/system/banger-network.service"
	guestWantsPath     = "etc/systemd/system/multi-user.target.wants/banger-vsock-agent.service"
	guestNetWantsPath  = "etc/systemd/system/multi-user.target.wants/banger-network.service"
	guestLoadPath      = "etc/modules-load.d/banger-vsock.conf"
)

// maxAgentBytes bounds the agent's binary: ten times what it is.
const maxAgentBytes = 32 << 20

// A guestFile is a file (or a symlink, if it has a target) of root:root.
type guestFile struct {
	path      string // inside the image
	mode      uint16
	target    string
	content   io.ReaderAt
	sizeBytes int64
}

// guestFileList is the guest files, with the agent of this release.
func guestFileList(agent *os.File) ([]guestFile, error) {
	st, err := agent.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() == 0 || st.Size() > maxAgentBytes {
		return nil, fmt.Errorf("guest agent %s: %d bytes is no agent", agent.Name(), st.Size())
	}
	files := []guestFile{{path: guestAgentPath, mode: modeRegular | 0o755, content: agent, sizeBytes: st.Size()}}
	for _, f := range []struct {
		path string
		mode uint16
	}{
		{guestBootstrapPath, 0o755},
		{guestUnitPath, 0o644},
		{guestNetUnitPath, 0o644},
		{guestLoadPath, 0o644},
	} {
		data, err := guestFiles.ReadFile("guestfiles/" + path.Base(f.path))
		if err != nil {
			return nil, err
		}
		files = append(files, guestFile{path: f.path, mode: modeRegular | f.mode, content: bytes.NewReader(data), sizeBytes: int64(len(data))})
	}
	return append(files,
		guestFile{path: guestWantsPath, mode: modeSymlink | 0o777, target: "/" + guestUnitPath},
		guestFile{path: guestNetWantsPath, mode: modeSymlink | 0o777, target: "/" + guestNetUnitPath}), nil
}

// putGuestFiles puts the guest files into a tree in place of whatever the image
// has there, and returns their nodes. Parents are resolved inside the image.
func putGuestFiles[C any](t *oci.Tree[C], sink oci.Sink[C], files []guestFile) (map[*oci.Node[C]]bool, error) {
	nodes := make(map[*oci.Node[C]]bool)
	for _, f := range files {
		n := &oci.Node[C]{Mode: f.mode, Target: f.target, SizeBytes: f.sizeBytes}
		if f.target == "" {
			var err error
			if n.Content, err = sink.Place(io.NewSectionReader(f.content, 0, f.sizeBytes), f.sizeBytes); err != nil {
				return nil, fmt.Errorf("guest file %s: %w", f.path, err)
			}
		}
		if err := t.Put(f.path, n); err != nil {
			return nil, err
		}
		nodes[n] = true
	}
	return nodes, nil
}

// editGuestFiles is putGuestFiles for a file system that exists.
func editGuestFiles(e *ext4.Editor, files []guestFile) error {
	for _, f := range files {
		if err := makeParents(e, path.Dir(f.path), maxParentLinks); err != nil {
			return err
		}
		if info, err := e.FS().Lstat(f.path); err == nil && info.IsDir() {
			if err := e.RemoveAll(f.path); err != nil {
				return err
			}
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		var content io.Reader
		if f.sizeBytes > 0 {
			content = io.NewSectionReader(f.content, 0, f.sizeBytes)
		}
		if err := e.Put(f.path, &ext4.Inode{Mode: f.mode, Target: f.target}, content, f.sizeBytes); err != nil {
			return err
		}
	}
	return nil
}

// maxParentLinks is how many dangling symlinks may lead to the parent of a
// guest file.
const maxParentLinks = 8

// makeParents makes the directory dir and what is missing above it. Where a
// symlink leads to nothing its target is made, inside the image.
func makeParents(e *ext4.Editor, dir string, links int) error {
	var at string
	for part := range strings.SplitSeq(dir, "/") {
		at = path.Join(at, part)
		if _, err := e.FS().Stat(at); err == nil {
			continue // if it is no directory the next step says so
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := e.FS().Lstat(at); errors.Is(err, fs.ErrNotExist) {
			if err := e.Put(at, &ext4.Inode{Mode: modeDir | 0o755}, nil, 0); err != nil {
				return err
			}
			continue
		}
		target, err := e.FS().ReadLink(at)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(target, "/") {
			target = path.Join("/", path.Dir(at), target)
		}
		target = strings.TrimPrefix(path.Clean(target), "/")
		if links == 0 || target == "" {
			return fmt.Errorf("%s: too many symlinks that lead to nothing", at)
		}
		if err := makeParents(e, target, links-1); err != nil {
			return err
		}
		if _, err := e.FS().Stat(at); err != nil {
			return err // it leads elsewhere after all
		}
	}
	return nil
}

// checkGuestFiles reads the guest files back out of a base, with the reader and
// not with what wrote them, and compares every byte and attribute.
func checkGuestFiles(base *ext4.FS, files []guestFile) error {
	for _, f := range files {
		if err := checkGuestFile(base, f); err != nil {
			return fmt.Errorf("guest file %s: read back: %w", f.path, err)
		}
	}
	return nil
}

func checkGuestFile(base *ext4.FS, f guestFile) error {
	info, err := base.Lstat(f.path)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*ext4.Stat)
	if !ok {
		return errors.New("no attributes")
	}
	if st.Mode != f.mode || st.UID != 0 || st.GID != 0 || st.Links != 1 {
		return fmt.Errorf("mode %o of %d:%d with %d names, want %o of 0:0 with one", st.Mode, st.UID, st.GID, st.Links, f.mode)
	}
	xattrs, err := base.Xattrs(f.path)
	if err != nil {
		return err
	}
	if len(xattrs) > 0 {
		return errors.New("it has xattrs")
	}
	if f.target != "" {
		target, err := base.ReadLink(f.path)
		if err == nil && target != f.target {
			err = fmt.Errorf("it leads to %q", target)
		}
		return err
	}
	if st.SizeBytes != f.sizeBytes {
		return fmt.Errorf("%d bytes, want %d", st.SizeBytes, f.sizeBytes)
	}
	file, err := base.Open(f.path)
	if err != nil {
		return err
	}
	defer file.Close()
	same, err := sameBytes(file, io.NewSectionReader(f.content, 0, f.sizeBytes))
	if err == nil && !same {
		err = errors.New("other bytes than were written")
	}
	return err
}

// sameBytes reads two streams to the end of the shorter one.
func sameBytes(a, b io.Reader) (bool, error) {
	bufA, bufB := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := io.ReadFull(a, bufA)
		m, errB := io.ReadFull(b, bufB)
		if n != m || !bytes.Equal(bufA[:n], bufB[:m]) {
			return false, nil
		}
		ended := func(err error) bool { return err == io.EOF || err == io.ErrUnexpectedEOF }
		if ended(errA) && ended(errB) {
			return true, nil
		}
		if err := errors.Join(errA, errB); err != nil {
			return false, err
		}
	}
}
