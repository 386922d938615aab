package ext4

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// claim takes the image for this process, as long as f is open.
func claim(f *os.File, info os.FileInfo) error {
	// QEMU holds locks of this kind, of the open file and not of the
	// process, on single bytes of its disks; so does another edit.
	const setLock = 37 // F_OFD_SETLK of include/uapi/asm-generic/fcntl.h
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	switch err := syscall.FcntlFlock(f.Fd(), setLock, &lock); {
	case errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w: another process has locked it", ErrInUse)
	case err != nil && !errors.Is(err, syscall.ENOLCK) && !errors.Is(err, syscall.EINVAL):
		return fmt.Errorf("lock: %w", err)
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, name := range backing {
		path, err := os.ReadFile(name)
		if err != nil {
			continue // detached meanwhile
		}
		other, err := os.Stat(strings.TrimSuffix(string(path), "\n"))
		if err == nil && os.SameFile(info, other) {
			return fmt.Errorf("%w: %s is attached to it", ErrInUse, strings.Split(name, "/")[3])
		}
	}
	return nil
}

// keepOwner gives the copy of an image the image's owner.
func keepOwner(f *os.File, info os.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) == os.Geteuid() && int(st.Gid) == os.Getegid() {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}
