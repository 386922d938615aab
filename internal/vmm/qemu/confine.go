package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"banger"
)

// QEMU is started by way of a program of ours, the launcher, which gives up
// what QEMU has no use for and then becomes QEMU: the new name spaces come
// from the clone that made it, limits and Landlock from itself, the filter of
// system calls from QEMU's own -sandbox. It tells what it achieved on a pipe
// that the exec closes.

const (
	// maxReportBytes bounds what the launcher tells.
	maxReportBytes = 64 << 10
	// maxOpenFiles is more than QEMU needs for its drives and sockets.
	maxOpenFiles = 1024
	// proofPath is a file that every user may read, and a confined VMM not.
	proofPath = "/etc/passwd"
)

// A launch tells the launcher what to do. It is an argument of its own, as
// JSON.
type launch struct {
	ReportFD  int   `json:"report_fd"`
	Files     []int `json:"files"`      // descriptors that QEMU opens again by /proc/self/fd
	FileBytes int64 `json:"file_bytes"` // RLIMIT_FSIZE: the largest file it may write to
}

// A report is the launcher's answer.
type report struct {
	Error       string             `json:"error,omitempty"`
	Confinement banger.Confinement `json:"confinement"`
}

// nameSpaces are what a VMM gets its own of: it sees no process, no network,
// no shared memory and no privilege of the host's.
var nameSpaces = []struct {
	name string
	flag uintptr
}{
	{"user", unix.CLONE_NEWUSER}, {"net", unix.CLONE_NEWNET}, {"pid", unix.CLONE_NEWPID},
	{"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS},
}

// isolate asks for new name spaces, in which the user is nobody but itself.
func isolate(attr *syscall.SysProcAttr) (names []string) {
	for _, ns := range nameSpaces {
		attr.Cloneflags |= ns.flag
		names = append(names, ns.name)
	}
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}
	return names
}

// share takes the request of isolate back.
func share(attr *syscall.SysProcAttr) {
	attr.Cloneflags, attr.UidMappings, attr.GidMappings = 0, nil, nil
}

// Confined is the launcher: args are the launch, then the program and its
// arguments. It returns only when it fails, and has told the driver then.
func Confined(args []string) error {
	runtime.LockOSThread() // what is given up is given up by this thread, which becomes QEMU
	var l launch
	if len(args) < 2 {
		return errors.New("confine: no program")
	}
	if err := json.Unmarshal([]byte(args[0]), &l); err != nil {
		return fmt.Errorf("confine: %w", err)
	}
	unix.CloseOnExec(l.ReportFD)
	tell := func(r report) {
		if data, err := json.Marshal(r); err == nil {
			unix.Write(l.ReportFD, data) // below the size of a pipe's buffer
		}
	}
	c, err := confine(l, args[1])
	if err == nil {
		tell(report{Confinement: c})
		err = syscall.Exec(args[1], args[1:], os.Environ())
	}
	tell(report{Error: err.Error()})
	return fmt.Errorf("confine: %w", err)
}

// confine gives up what QEMU does not need, and proves it.
func confine(l launch, program string) (c banger.Confinement, err error) {
	// The exec of another program keeps this; it is set again for the case
	// that entering a user name space has cleared it (prctl(2)).
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return c, fmt.Errorf("parent death signal: %w", err)
	}
	for _, limit := range []struct {
		name string
		what int
		max  uint64
	}{
		{"core", unix.RLIMIT_CORE, 0}, // a core file would hold the guest's memory
		{"nofile", unix.RLIMIT_NOFILE, maxOpenFiles},
		{"fsize", unix.RLIMIT_FSIZE, uint64(l.FileBytes)},
	} {
		var now syscall.Rlimit
		if err := syscall.Getrlimit(limit.what, &now); err != nil {
			return c, fmt.Errorf("limit %s: %w", limit.name, err)
		}
		max := min(limit.max, now.Max)
		if err := syscall.Setrlimit(limit.what, &syscall.Rlimit{Cur: max, Max: max}); err != nil {
			return c, fmt.Errorf("limit %s: %w", limit.name, err)
		}
		c.Limits = append(c.Limits, fmt.Sprintf("%s %d", limit.name, max))
	}
	c.Limits = append(c.Limits, cgroupLimits("/proc/self/cgroup", "/sys/fs/cgroup")...)
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return c, fmt.Errorf("no new privileges: %w", err)
	}
	c.NoNewPrivs = true
	if c.LandlockABI, err = landlock(l, program); err != nil {
		return c, fmt.Errorf("landlock: %w", err)
	}
	if c.LandlockABI == 0 {
		c.Missing = append(c.Missing, "landlock: this kernel has none, or it is off")
		return c, nil
	}
	f, err := os.Open(proofPath)
	if err == nil {
		f.Close()
		return c, fmt.Errorf("%s can be read after all", proofPath)
	}
	if !errors.Is(err, unix.EACCES) {
		return c, fmt.Errorf("the proof is none: %w", err)
	}
	c.Proof = fmt.Sprintf("%v", err)
	return c, nil
}

// cgroupLimits are the limits of the cgroup (version 2) that this process is
// in: set by whoever made its scope, and inherited.
func cgroupLimits(self, root string) (limits []string) {
	const maxBytes = 64 << 10
	read := func(path string) string {
		f, err := os.Open(path)
		if err != nil {
			return ""
		}
		defer f.Close()
		data, _ := io.ReadAll(io.LimitReader(f, maxBytes))
		return strings.TrimSpace(string(data))
	}
	for line := range strings.Lines(read(self)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok || strings.Contains(path, "..") {
			continue
		}
		for _, name := range []string{"memory.max", "pids.max", "cpu.max"} {
			if v := read(filepath.Join(root, path, name)); v != "" && !strings.HasPrefix(v, "max") {
				limits = append(limits, name+" "+v)
			}
		}
	}
	return limits
}

// Rights of Landlock by the version of its interface that brought them
// (include/uapi/linux/landlock.h).
const (
	landlockRead  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	landlockV1    = 1<<13 - 1
	landlockRefer = unix.LANDLOCK_ACCESS_FS_REFER     // 2
	landlockTrunc = unix.LANDLOCK_ACCESS_FS_TRUNCATE  // 3
	landlockIoctl = unix.LANDLOCK_ACCESS_FS_IOCTL_DEV // 5
	landlockTCP   = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	landlockScope = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
)

// landlock confines this thread, and what it becomes, to the files that a
// dynamically linked QEMU reads, the devices that it drives, and the files
// that it was given. It returns the version of the kernel's interface, 0 where
// there is none.
func landlock(l launch, program string) (abi int, err error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno == unix.ENOSYS || errno == unix.EOPNOTSUPP {
		return 0, nil
	}
	if errno != 0 {
		return 0, errno
	}
	abi = int(v)
	attr := unix.LandlockRulesetAttr{Handled_access_fs: landlockV1}
	size := unsafe.Sizeof(attr.Handled_access_fs)
	if abi >= 2 {
		attr.Handled_access_fs |= landlockRefer
	}
	if abi >= 3 {
		attr.Handled_access_fs |= landlockTrunc
	}
	if abi >= 4 {
		attr.Handled_access_net = landlockTCP
		size += unsafe.Sizeof(attr.Handled_access_net)
	}
	if abi >= 5 {
		attr.Handled_access_fs |= landlockIoctl
	}
	if abi >= 6 {
		attr.Scoped = landlockScope
		size += unsafe.Sizeof(attr.Scoped)
	}
	set, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return 0, errno
	}
	defer unix.Close(int(set))
	allow := func(fd int, access uint64) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			access &^= unix.LANDLOCK_ACCESS_FS_READ_DIR
		}
		rule := unix.LandlockPathBeneathAttr{Allowed_access: access & attr.Handled_access_fs, Parent_fd: int32(fd)}
		_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, set, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	const (
		read  = landlockRead
		run   = read | unix.LANDLOCK_ACCESS_FS_EXECUTE
		drive = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | landlockIoctl
	)
	// A program outside /usr brings its libraries and firmware beside it, as
	// PREFIX/bin/qemu does.
	prefix := "/usr"
	if real, err := filepath.EvalSymlinks(program); err == nil {
		if dir := filepath.Dir(filepath.Dir(real)); dir != "/" {
			prefix = dir
		}
	}
	for _, p := range []struct {
		path   string
		access uint64
	}{
		{"/usr", run}, {"/lib", run}, {"/lib64", run}, {"/bin", run}, {prefix, run}, {"/etc/ld.so.cache", read},
		{"/proc/self", read}, {"/proc/cpuinfo", read}, {"/proc/meminfo", read}, {"/proc/stat", read}, {"/proc/sys/vm", read},
		{"/sys/devices/system", read},
		{"/dev/null", drive}, {"/dev/urandom", drive}, {"/dev/random", drive}, {"/dev/kvm", drive},
	} {
		fd, err := unix.Open(p.path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
			continue // then QEMU cannot have it either
		}
		if err != nil {
			return 0, fmt.Errorf("%s: %w", p.path, err)
		}
		err = allow(fd, p.access)
		unix.Close(fd)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", p.path, err)
		}
	}
	for _, fd := range l.Files {
		if err := allow(fd, read); err != nil {
			return 0, fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, set, 0, 0); errno != 0 {
		return 0, errno
	}
	return abi, nil
}
