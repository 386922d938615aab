package oci

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"slices"
	"time"

	"banger"

	"golang.org/x/sys/unix"
)

// resolveRootfs tells a directory from a tar. Neither has whiteouts: a file
// named .wh.x in it is a file.
func (s *Source) resolveRootfs(img *Image) error {
	if s.Input == nil {
		return banger.Errorf(banger.CodeInternal, "image %q: it was not opened", img.Name)
	}
	st, err := s.Input.Stat()
	if err != nil {
		return banger.Errorf(banger.CodeInvalid, "image %q: %w", img.Name, pathReason(err))
	}
	if st.IsDir() {
		img.stream = func(ctx context.Context, p *progress, add addFunc) (string, []string, error) {
			w := &walker{ctx: ctx, add: add, progress: p, label: img.Name, sum: sha256.New(), links: make(map[inodeID]string)}
			return w.run(s.Input)
		}
		return nil
	}
	img.tar = &blob{label: "tar", sizeBytes: -1, open: func(ctx context.Context, _ *progress) (io.ReadCloser, error) {
		return &patientReader{ctx: ctx, f: s.Input, poll: !st.Mode().IsRegular()}, nil
	}}
	return nil
}

// pollInterval is how long a read of a pipe goes on after a cancel.
const pollInterval = 100 * time.Millisecond

// patientReader reads a file that may be a pipe, stops when ctx is done and
// leaves the file open, since it is its caller's.
type patientReader struct {
	ctx  context.Context
	f    *os.File
	poll bool
}

func (r *patientReader) Read(p []byte) (int, error) {
	if r.poll {
		fds := []unix.PollFd{{Fd: int32(r.f.Fd()), Events: unix.POLLIN}}
		for {
			if r.ctx.Err() != nil {
				return 0, context.Cause(r.ctx)
			}
			n, err := unix.Poll(fds, int(pollInterval/time.Millisecond))
			if err != nil && err != unix.EINTR {
				return 0, err
			}
			if n > 0 {
				break
			}
		}
	}
	n, err := r.f.Read(p)
	if err != nil && err != io.EOF {
		err = pathReason(err)
	}
	return n, err
}

func (r *patientReader) Close() error { return nil }

type inodeID struct{ dev, ino uint64 }

// walker feeds a directory tree to add, in the order of names, without
// following a symlink and without leaving its file system. All access is
// relative to descriptors of folders.
type walker struct {
	ctx      context.Context
	add      addFunc
	progress *progress
	label    string
	sum      hash.Hash
	links    map[inodeID]string // inodes with several names
	dev      uint64
	done     int64
	mounts   int
}

func (w *walker) run(dir *os.File) (string, []string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return "", nil, err
	}
	w.dev = st.Dev
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, entryError("/", err)
	}
	if err := w.inode(fd, ".", "/", &st); err != nil {
		unix.Close(fd)
		return "", nil, err
	}
	if err := w.dir(fd, ""); err != nil {
		return "", nil, err
	}
	var notes []string
	if w.mounts > 0 {
		notes = append(notes, fmt.Sprintf("contents of folders other file systems are mounted on left out (%d)", w.mounts))
	}
	return digestOf(w.sum), notes, nil
}

// dir walks one folder and closes fd.
func (w *walker) dir(fd int, path string) error {
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return entryError(path+"/", pathReason(err))
	}
	slices.Sort(names)
	for _, name := range names {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		full := path + "/" + name
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return entryError(full, err)
		}
		if err := w.inode(fd, name, full, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		if uint64(st.Dev) != w.dev {
			w.mounts++
			continue
		}
		sub, err := w.open(fd, name, unix.O_DIRECTORY, &st)
		if err != nil {
			return entryError(full, err)
		}
		if err := w.dir(sub, full); err != nil {
			return err
		}
	}
	return nil
}

var errChanged = errors.New("changed while it was read")

// open opens name in the folder dirfd and makes sure that it is still what
// st says.
func (w *walker) open(dirfd int, name string, flags int, st *unix.Stat_t) (int, error) {
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return -1, err
	}
	var now unix.Stat_t
	if err := unix.Fstat(fd, &now); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if now.Dev != st.Dev || now.Ino != st.Ino {
		unix.Close(fd)
		return -1, errChanged
	}
	return fd, nil
}

// inode adds one entry, without what is in it if it is a folder.
func (w *walker) inode(dirfd int, name, path string, st *unix.Stat_t) error {
	e := &entry{
		name: path, typ: uint16(st.Mode & unix.S_IFMT), mode: int64(st.Mode & modePerm),
		uid: int64(st.Uid), gid: int64(st.Gid), mtime: Time{Sec: st.Mtim.Sec, Nsec: int32(st.Mtim.Nsec)},
	}
	id := inodeID{uint64(st.Dev), st.Ino}
	if e.typ != modeDir && st.Nlink > 1 {
		if first, ok := w.links[id]; ok {
			e.typ, e.target = 0, first
			w.record(e)
			return w.add(e, nil)
		}
		w.links[id] = path
	}
	var err error
	if e.xattrs, err = readXattrs(fmt.Sprintf("/proc/self/fd/%d/%s", dirfd, name)); err != nil {
		return entryError(path, err)
	}
	switch e.typ {
	case modeSymlink:
		buf := make([]byte, MaxTargetBytes+1)
		n, err := unix.Readlinkat(dirfd, name, buf)
		if err != nil {
			return entryError(path, err)
		}
		e.target = string(buf[:n])
	case modeChar, modeBlock:
		e.major, e.minor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case modeRegular:
		return w.regular(dirfd, name, e, st)
	}
	w.record(e)
	return w.add(e, nil)
}

func (w *walker) regular(dirfd int, name string, e *entry, st *unix.Stat_t) error {
	fd, err := w.open(dirfd, name, 0, st)
	if err != nil {
		return entryError(e.name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	e.size = st.Size
	w.record(e)
	body := &fileBody{w: w, r: f, left: e.size}
	if err := w.add(e, body); err != nil {
		return err
	}
	if n, err := f.Read(make([]byte, 1)); n > 0 || err != io.EOF {
		return entryError(e.name, errChanged)
	}
	return nil
}

// fileBody is a file's bytes, as many as were announced.
type fileBody struct {
	w    *walker
	r    io.Reader
	left int64
}

func (b *fileBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	if b.w.ctx.Err() != nil {
		return 0, context.Cause(b.w.ctx)
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.r.Read(p)
	b.w.sum.Write(p[:n])
	b.left -= int64(n)
	b.w.done += int64(n)
	b.w.progress.report("fetch", b.w.label, b.w.done, 0)
	if err == io.EOF {
		return n, errChanged
	}
	if err != nil {
		err = pathReason(err)
	}
	return n, err
}

func (w *walker) record(e *entry) { recordEntry(w.sum, e) }

// recordEntry adds an entry to the digest of an input: fields with their
// lengths, so that no two trees give one sequence of bytes.
func recordEntry(sum hash.Hash, e *entry) {
	num := func(v int64) { _ = binary.Write(sum, binary.LittleEndian, v) }
	str := func(s string) { num(int64(len(s))); _, _ = io.WriteString(sum, s) }
	str(e.name)
	for _, v := range []int64{int64(e.typ), e.mode, e.uid, e.gid, e.major, e.minor, e.size, e.mtime.Sec, int64(e.mtime.Nsec)} {
		num(v)
	}
	str(e.target)
	num(int64(len(e.xattrs)))
	for _, k := range slices.Sorted(maps.Keys(e.xattrs)) {
		str(k)
		str(string(e.xattrs[k]))
	}
	// Only tars have these; a negative number is no length of a next name.
	for i, t := range []*Time{e.atime, e.ctime} {
		if t != nil {
			num(int64(-1 - i))
			num(t.Sec)
			num(int64(t.Nsec))
		}
	}
}

// readXattrs returns all xattrs of path itself; a symlink there is not followed.
func readXattrs(path string) (map[string][]byte, error) {
	buf := make([]byte, MaxXattrBytes)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("its xattrs: %w", err)
	}
	xattrs := make(map[string][]byte)
	value := make([]byte, MaxXattrBytes)
	for name := range bytes.SplitSeq(bytes.TrimSuffix(buf[:n], []byte{0}), []byte{0}) {
		m, err := unix.Lgetxattr(path, string(name), value)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("xattr %q: %w", name, err)
		}
		xattrs[string(name)] = bytes.Clone(value[:m])
	}
	return xattrs, nil
}
