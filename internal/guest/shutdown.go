package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// exitRoot is where systemd goes back to when all is stopped: it pivots
	// there and runs /shutdown (systemd.io/INITRD_INTERFACE). The reaper does
	// the same.
	exitRoot = "/run/initramfs"
	// oldRoot is then where the guest's root is.
	oldRoot = "/oldroot"

	askAgain      = time.Second // between two requests to PID 1
	killRounds    = 50          // of killPause each, until processes are gone
	killPause     = 10 * time.Millisecond
	unmountRounds = 50
	unmountPause  = 100 * time.Millisecond
	// readOnlyTimeout bounds the wait for the kernel to have written back all
	// superblocks read-only.
	readOnlyTimeout = 10 * time.Second
	syncTimeout     = 30 * time.Second

	maxMountInfoBytes = 16 << 20
	maxCmdlineBytes   = 4 << 10
	maxOptionsBytes   = 4 << 10
)

// installShutdown puts the agent where systemd looks for the last program.
func installShutdown() error {
	if err := mountAt("tmpfs", exitRoot, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700,size=32m"); err != nil {
		return err
	}
	for _, d := range []string{oldRoot, "/proc", "/sys", "/dev", "/run"} {
		if err := mkdirAll(exitRoot + d); err != nil {
			return err
		}
	}
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		return bare("/proc/self/exe", err)
	}
	defer in.Close()
	path := filepath.Join(exitRoot, shutdownName)
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return bare(path, err)
	}
	_, err = io.Copy(out, in)
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	return bareNil(path, err)
}

// pivotToShutdown leaves the guest's root for exitRoot, as systemd does.
func pivotToShutdown() error {
	if err := mountAt("proc", exitRoot+"/proc", "proc", 0, ""); err != nil {
		return err
	}
	if err := mountAt("devtmpfs", exitRoot+"/dev", "devtmpfs", 0, ""); err != nil {
		return err
	}
	// pivot_root(2) refuses shared mounts; a program may have made them so.
	unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "")
	if err := os.Chdir(exitRoot); err != nil {
		return bare(exitRoot, err)
	}
	if err := unix.PivotRoot(".", "."+oldRoot); err != nil {
		return fmt.Errorf("pivot: %w", bare(exitRoot, err))
	}
	if err := unix.Chroot("."); err != nil {
		return bare("/", err)
	}
	return bareNil("/", os.Chdir("/"))
}

// lastProcess is /shutdown: nothing runs any more but what nobody could stop.
// It gives the disks back clean and ends the machine.
func lastProcess(verb string) {
	unix.Mount("proc", "/proc", "proc", 0, "") // busy where it is there already
	unix.Kill(-1, unix.SIGKILL)
	for range killRounds {
		if !reapAll() && len(processes()) <= 1 {
			break
		}
		time.Sleep(killPause)
	}
	swapOff()
	var left []mount
	for range unmountRounds {
		if left = unmountBelow(oldRoot); len(left) == 0 {
			break
		}
		reapAll()
		time.Sleep(unmountPause)
	}
	for _, m := range left {
		complain(fmt.Errorf("unmount %s: %w", m.kind, bare(m.at, unix.EBUSY)))
	}
	finish(verb)
}

// finish writes back what is left and ends the machine; it never returns.
func finish(verb string) {
	syncBounded()
	if !disksReadOnly() {
		remountAllReadOnly()
	}
	cmd := unix.LINUX_REBOOT_CMD_POWER_OFF
	switch verb {
	case "reboot":
		cmd = unix.LINUX_REBOOT_CMD_RESTART
	case "kexec":
		unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC) // returns where no kernel is loaded
		cmd = unix.LINUX_REBOOT_CMD_RESTART
	}
	complain(fmt.Errorf("%s: %w", verb, unix.Reboot(cmd)))
	select {}
}

// A mount is one line of /proc/PID/mountinfo (proc_pid_mountinfo(5)).
type mount struct{ at, kind, source string }

// parseMounts reads a mountinfo, in the order of mounting.
func parseMounts(r io.Reader) []mount {
	var mounts []mount
	sc := bufio.NewScanner(io.LimitReader(r, maxMountInfoBytes))
	sc.Buffer(nil, maxMountInfoBytes)
	for sc.Scan() {
		left, right, ok := strings.Cut(sc.Text(), " - ")
		l, rf := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(rf) < 2 {
			continue
		}
		mounts = append(mounts, mount{at: fstabUnescape(l[4]), kind: rf[0], source: rf[1]})
	}
	return mounts
}

// holdsDisk says whether a file system keeps a disk's superblock in use. The
// rest can be detached without waiting for whoever uses it.
func holdsDisk(kind string) bool {
	switch kind {
	case "proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "ramfs", "cgroup", "cgroup2", "mqueue", "hugetlbfs",
		"securityfs", "debugfs", "tracefs", "configfs", "pstore", "bpf", "autofs", "binfmt_misc", "nsfs", "fusectl", "efivarfs":
		return false
	}
	return true
}

// unmountBelow tries once to unmount everything at and below a directory, the
// newest first, and returns what is left.
func unmountBelow(root string) []mount {
	var left []mount
	all := listMounts()
	for i := len(all) - 1; i >= 0; i-- {
		m := all[i]
		if m.at != root && !strings.HasPrefix(m.at, root+"/") {
			continue
		}
		flags := unix.UMOUNT_NOFOLLOW
		if !holdsDisk(m.kind) {
			flags |= unix.MNT_DETACH
		}
		if err := unix.Unmount(m.at, flags); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			left = append(left, m)
		}
	}
	return left
}

func listMounts() []mount {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	return parseMounts(f)
}

func swapOff() {
	data, err := readBounded("/proc/swaps", maxMountInfoBytes)
	if err != nil {
		return
	}
	for i, line := range strings.Split(string(data), "\n") {
		if f := strings.Fields(line); i > 0 && len(f) > 0 {
			name, err := unix.BytePtrFromString(fstabUnescape(f[0]))
			if err == nil {
				unix.Syscall(unix.SYS_SWAPOFF, uintptr(unsafe.Pointer(name)), 0, 0)
			}
		}
	}
}

// syncBounded writes back what the kernel holds, but does not wait for ever
// for a disk that does not answer.
func syncBounded() {
	done := make(chan struct{})
	go func() { unix.Sync(); close(done) }()
	select {
	case <-done:
	case <-time.After(syncTimeout):
	}
}

// remountAllReadOnly makes the kernel remount every disk read-only, also those
// that no mount in this name space shows any more (the overlay's own), so that
// their superblocks ask for no recovery. Documentation/admin-guide/sysrq.rst.
func remountAllReadOnly() {
	if err := pressSysrq("u"); err != nil {
		complain(err)
		return
	}
	for end := time.Now().Add(readOnlyTimeout); time.Now().Before(end); time.Sleep(killPause) {
		if disksReadOnly() {
			return
		}
	}
	complain(errors.New("disks: not all could be made read-only"))
}

// sysrq is open in an agent from its start: an init that shuts down may have
// made /proc read-only by the time it is needed.
var sysrq *os.File

func openSysrq() (*os.File, error) {
	const path = "/proc/sysrq-trigger"
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return nil, bare(path, err)
	}
	return f, nil
}

func pressSysrq(key string) error {
	f := sysrq
	if f == nil {
		var err error
		if f, err = openSysrq(); err != nil {
			return err
		}
		defer f.Close()
	}
	_, err := f.WriteString(key)
	return bareNil(f.Name(), err)
}

// disksReadOnly says whether no ext4 in this guest is writable any more. The
// kernel shows each under /proc/fs/ext4 until its last mount is gone.
func disksReadOnly() bool {
	files, err := filepath.Glob("/proc/fs/ext4/*/options")
	if err != nil {
		return false
	}
	for _, f := range files {
		data, err := readOptions(f)
		if err == nil && !strings.HasPrefix(data, "ro\n") {
			return false
		}
	}
	return true
}

func readOptions(path string) (string, error) {
	data, err := readBounded(path, maxOptionsBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return "ro\n", nil // gone meanwhile
	}
	return string(data), err
}

// processes lists the processes of the guest, without the kernel's threads.
func processes() []int {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	var pids []int
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		// A kernel thread and a zombie have no program (proc_pid_exe(5)).
		if _, err := os.Readlink("/proc/" + n + "/exe"); err == nil || pid == os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

func commandLine(pid int) string {
	data, _ := readBounded(fmt.Sprintf("/proc/%d/cmdline", pid), maxCmdlineBytes)
	return string(data)
}

// A shutdowner ends the guest on the host's request, by way of PID 1 as long
// as that goes.
type shutdowner struct {
	kind initKind
	once sync.Once
}

// ending is set once the host has asked an init for the end that will leave
// the overlay mounted.
var ending atomic.Bool

// start begins the shutdown and returns. Later requests change nothing.
func (d *shutdowner) start(grace time.Duration) {
	d.once.Do(func() {
		ending.Store(d.kind == kindBusybox || d.kind == kindOpenRC)
		go d.run(grace)
	})
}

func (d *shutdowner) run(grace time.Duration) {
	os.WriteFile(filepath.Join(runDir, graceFile), fmt.Appendf(nil, "%d\n", grace.Milliseconds()), 0o600)
	deadline := time.Now().Add(grace)
	if d.kind != kindOther {
		// A systemd that has only just started drops the signal: ask again.
		// When all goes well the agent is killed inside this loop.
		for time.Now().Before(deadline) {
			d.ask()
			time.Sleep(min(askAgain, time.Until(deadline)))
		}
	}
	forcePowerOff()
}

// ask asks PID 1, in the way of its kind, to power off.
func (d *shutdowner) ask() {
	switch d.kind {
	case kindSystemd, kindReaper:
		unix.Kill(1, sigPowerOff)
	case kindBusybox:
		unix.Kill(1, unix.SIGUSR2)
	case kindOpenRC:
		fd, err := unix.Open("/run/openrc/init.ctl", unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			unix.Kill(1, unix.SIGTERM)
			return
		}
		unix.Write(fd, []byte("poweroff"))
		unix.Close(fd)
	}
}

// onTerminate is called when somebody sends the agent SIGTERM. While the guest
// ends on the host's request, that is an init which ends every process, the
// agent's too a moment later, and then powers off without unmounting the
// overlay: the last chance to give the disks back clean.
func onTerminate() {
	if !ending.Load() || !terminated.CompareAndSwap(false, true) {
		return
	}
	go func() {
		time.Sleep(terminatePause)
		syncBounded()
		remountAllReadOnly()
	}()
}

var terminated atomic.Bool

// terminatePause lets the others write their last; busybox gives one second.
const terminatePause = 600 * time.Millisecond

// forcePowerOff is the last resort: everything but PID 1 and the agent is
// killed, the disks are made read-only, and the machine goes off.
func forcePowerOff() {
	me := os.Getpid()
	for range killRounds {
		left := 0
		for _, pid := range processes() {
			if pid != 1 && pid != me {
				unix.Kill(pid, unix.SIGKILL)
				left++
			}
		}
		if left == 0 {
			break
		}
		time.Sleep(killPause)
	}
	flushAndPowerOff()
}

// flushAndPowerOff makes the disks clean, whoever still runs, and ends the
// machine.
func flushAndPowerOff() {
	syncBounded()
	remountAllReadOnly()
	finish("poweroff")
}
