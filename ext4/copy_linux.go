package ext4

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

const openNonblock = syscall.O_NONBLOCK

// createUnnamed makes a file in the directory that has no name: the kernel
// frees it with its last descriptor, however the process ends, and after a
// power cut when it mounts.
func createUnnamed(dir *os.Root) (*os.File, error) {
	const oTmpfile = 0x400000 | syscall.O_DIRECTORY // asm-generic/fcntl.h; with O_EXCL it could not be linked
	f, err := dir.OpenFile(".", os.O_RDWR|oTmpfile, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(fdPath(f)); err != nil { // no /proc: it could not be linked
		f.Close()
		return nil, err
	}
	return f, nil
}

// linkUnnamed gives such a file its name, which must be new. open(2) says how:
// AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH.
func linkUnnamed(f, dir *os.File, name string) error {
	const (
		atFDCWD         = -0x64
		atSymlinkFollow = 0x400
	)
	oldPath, err := syscall.BytePtrFromString(fdPath(f))
	if err != nil {
		return err
	}
	newName, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	cwd := atFDCWD
	if _, _, errno := syscall.Syscall6(syscall.SYS_LINKAT, uintptr(cwd), uintptr(unsafe.Pointer(oldPath)),
		dir.Fd(), uintptr(unsafe.Pointer(newName)), atSymlinkFollow, 0); errno != 0 {
		return errno
	}
	return nil
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// reflink makes dst share all blocks of src (ioctl_ficlone(2)).
func reflink(dst, src *os.File) error {
	const ficlone = 0x40049409 // _IOW(0x94, 9, int), linux/fs.h; mips and ppc refuse it
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, dst.Fd(), ficlone, src.Fd()); errno != 0 {
		return errno
	}
	return nil
}

// nextData gives the bounds of the first data at or after a place, io.EOF if
// there is none. It moves the file's offset.
func nextData(f *os.File, at int64) (start, end int64, err error) {
	const seekData, seekHole = 3, 4 // linux/fs.h
	start, err = f.Seek(at, seekData)
	if errors.Is(err, syscall.ENXIO) {
		return 0, 0, io.EOF
	}
	if err == nil {
		end, err = f.Seek(start, seekHole)
	}
	return start, end, err
}

// hasHoles tells whether a file has fewer blocks than its size asks for.
func hasHoles(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Blocks*512 < info.Size() // 512 on every file system
}
