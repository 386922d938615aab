package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// readBounded reads a regular file of at most limit bytes. It never blocks on
// a FIFO and never touches a device: every path here may have been planted by
// an image.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, bare(path, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, bare(path, err)
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%q: not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, bare(path, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%q: more than %d bytes", path, limit)
	}
	return data, nil
}

// replaceFile puts a new regular file in the place of path, whatever is there
// (a symbolic link is replaced, not followed), but not of a directory.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	tmp := filepath.Join(filepath.Dir(path), ".banger."+filepath.Base(path))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return bare(tmp, err)
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return bare(path, err)
	}
	_, err = f.Write(data)
	if cerr := f.Chmod(mode); err == nil {
		err = cerr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return bare(path, err)
	}
	return nil
}

// bare says "path: reason" without the name of the system call, and keeps the
// cause for errors.Is.
func bare(subject string, err error) error {
	var pe *fs.PathError
	var le *os.LinkError
	var se *os.SyscallError
	switch {
	case errors.As(err, &pe):
		err = pe.Err
	case errors.As(err, &le):
		err = le.Err
	case errors.As(err, &se):
		err = se.Err
	}
	return fmt.Errorf("%q: %w", subject, err)
}

// maxLinks bounds the symbolic links that mkdirAll follows by hand, as many as
// the kernel follows in one path.
const maxLinks = 40

// mkdirAll makes a directory and its parents, root's own, mode 0755. Unlike
// os.MkdirAll it also makes what a dangling symbolic link on the way points
// to: a root may hold lib -> usr/lib and no usr/lib. The caller's root is the
// image's own, so no link leads out of it.
func mkdirAll(path string) error { return mkdirLinks(filepath.Clean(path), maxLinks) }

func mkdirLinks(path string, links int) error {
	if fi, err := os.Stat(path); err == nil {
		if !fi.IsDir() {
			return fmt.Errorf("%q: not a directory", path)
		}
		return nil
	}
	if links == 0 {
		return bare(path, unix.ELOOP)
	}
	if target, err := os.Readlink(path); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		return mkdirLinks(filepath.Clean(target), links-1)
	}
	if parent := filepath.Dir(path); parent != path {
		if err := mkdirLinks(parent, links-1); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return bare(path, err)
	}
	return nil
}

// resolveIn follows path inside the root directory, as a process chrooted
// there would, and returns the final target's path as seen inside, and what it
// is. Links never lead out: the kernel does the walk (openat2,
// RESOLVE_IN_ROOT).
func resolveIn(root, path string) (string, fs.FileInfo, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, bare(root, err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return "", nil, bare(path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", nil, bare(path, err)
	}
	top, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", dir))
	if err != nil {
		return "", nil, bare(root, err)
	}
	full, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", nil, bare(path, err)
	}
	inside, err := filepath.Rel(top, full)
	if err != nil {
		return "", nil, bare(path, err)
	}
	return filepath.Join("/", inside), fi, nil
}
