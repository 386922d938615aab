package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// maxConfigBytes bounds the boot configuration, which the host wrote.
	maxConfigBytes = 1 << 20

	// Where the first process joins the root, in the initramfs.
	baseMount    = "/banger/base"
	overlayMount = "/banger/overlay"
	rootMount    = "/banger/root"

	// overlayOptions keep hard links whole and let lower directories be
	// renamed (Documentation/filesystems/overlayfs.rst).
	overlayOptions = "index=on,redirect_dir=on,metacopy=off"
)

// firstProcess is PID 1 of the initramfs. It does not return: it becomes the
// image's init or the reaper, or serves the host the reason why not.
func firstProcess() {
	announce()
	b := &boot{journal: newJournal(nil)}
	b.journal.add(stageKernel, "")
	init, err := b.run()
	if err == nil {
		err = b.handOver(init)
	}
	b.fail(err)
}

// A boot is the state of one start of this guest.
type boot struct {
	config      *wire.BootConfig // nil until it was read
	journal     *journal
	disks       []disk
	overlayDisk *os.File // its root directory, outside the guest's root
	direct      []int    // per directFolders: a mount of its place on the overlay disk
}

// run brings the guest from the bare initramfs to a finished root, in which it
// then stands, and chooses its init.
func (b *boot) run() (initChoice, error) {
	os.Setenv("PATH", defaultPath)
	if err := mountKernel("/"); err != nil {
		return initChoice{}, err
	}
	if err := b.readConfig(); err != nil {
		return initChoice{}, err
	}
	for _, path := range b.config.LoadModules {
		if err := loadModule(path); err != nil {
			return initChoice{}, fmt.Errorf("module %w", err)
		}
	}
	b.journal.add(stageModules, fmt.Sprintf("%d loaded", len(b.config.LoadModules)))

	want := []string{b.config.Base, b.config.Overlay, b.config.Work, b.config.Modules}
	for i, what := range []string{"base", "overlay", "work"} {
		if want[i] == "" {
			return initChoice{}, fmt.Errorf("boot configuration: no UUID for the %s disk", what)
		}
	}
	devs, all, err := findDisks(want, diskTimeout, func() []disk { return listDisks("/sys/block", "/dev") })
	if err != nil {
		return initChoice{}, err
	}
	b.disks = all
	b.journal.add(stageDisks, "")

	if err := b.joinRoot(devs[0], devs[1]); err != nil {
		return initChoice{}, err
	}
	if err := enterRoot(); err != nil {
		return initChoice{}, err
	}
	// From here on / is the image's own root.
	if err := mountRuntime(); err != nil {
		return initChoice{}, err
	}
	if err := mountAt(devs[2], "/root", "ext4", 0, ""); err != nil {
		return initChoice{}, fmt.Errorf("work disk: %w", err)
	}
	if devs[3] != "" {
		at := filepath.Join("/lib/modules", kernelRelease())
		if err := mountAt(devs[3], at, "ext4", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
			return initChoice{}, fmt.Errorf("modules drive: %w", err)
		}
		if devname, err := readBounded(filepath.Join(at, "modules.devname"), maxDevnameBytes); err == nil {
			staticNodes(devname, "/dev")
		}
	}
	if err := installShutdown(); err != nil {
		return initChoice{}, err
	}
	b.journal.add(stageRoot, "")

	init, err := chooseInit("/", b.config)
	if err != nil {
		return init, err
	}
	if err := b.personalise(init); err != nil {
		return init, err
	}
	if err := b.bindDirect(init); err != nil {
		return init, err
	}
	if init.Kind == kindSystemd {
		mountForSystemd()
	}
	if init.Kind == kindReaper {
		// An image's init mounts this itself, in the version it wants.
		err := mountAt("cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "nsdelegate")
		if err != nil {
			complain(err) // sessions work without
		}
	}
	return init, nil
}

// maxDevnameBytes bounds modules.devname, of which a distribution's has a few
// dozen lines.
const maxDevnameBytes = 1 << 20

// staticNodes makes the device nodes whose opening loads a module: the lines
// "MODULE NODE cMAJOR:MINOR" of modules.devname. Without them a guest has no
// /dev/fuse and no /dev/net/tun before something else has loaded the module.
func staticNodes(devname []byte, dev string) {
	for line := range strings.Lines(string(devname)) {
		f := strings.Fields(line)
		if len(f) != 3 || strings.HasPrefix(f[0], "#") || !fs.ValidPath(f[1]) || len(f[2]) < 2 {
			continue
		}
		kind := map[byte]uint32{'c': unix.S_IFCHR, 'b': unix.S_IFBLK}[f[2][0]]
		major, minor, ok := strings.Cut(f[2][1:], ":")
		ma, err1 := strconv.ParseUint(major, 10, 12)
		mi, err2 := strconv.ParseUint(minor, 10, 20)
		if kind == 0 || !ok || err1 != nil || err2 != nil {
			continue
		}
		path := filepath.Join(dev, f[1])
		mode := uint32(0o600)
		switch f[1] { // as udev's rules have them, for everybody
		case "fuse", "net/tun":
			mode = 0o666
		}
		if mkdirAll(filepath.Dir(path)) == nil && unix.Mknod(path, kind|mode, int(unix.Mkdev(uint32(ma), uint32(mi)))) == nil {
			unix.Chmod(path, mode) // whatever the umask was
		}
	}
}

// mountForSystemd mounts what systemd has a unit for each, which would start a
// program each. The units are active all the same. What a kernel does not have
// is left out, as systemd would.
func mountForSystemd() {
	for _, m := range []struct {
		at, kind string
		flags    uintptr
		data     string
	}{
		{"/dev/hugepages", "hugetlbfs", 0, "pagesize=2M"},
		{"/dev/mqueue", "mqueue", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/sys/kernel/debug", "debugfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/sys/kernel/tracing", "tracefs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	} {
		if strings.HasPrefix(m.at, "/dev/") {
			os.Mkdir(m.at, 0o755)
		}
		unix.Mount(m.kind, m.at, m.kind, m.flags, m.data)
	}
}

// readConfig reads the boot configuration and removes it: it holds the token.
func (b *boot) readConfig() error {
	data, err := readBounded(wire.BootConfigPath, maxConfigBytes)
	if err != nil {
		return fmt.Errorf("boot configuration: %w", err)
	}
	os.Remove(wire.BootConfigPath)
	c := new(wire.BootConfig)
	if err := json.Unmarshal(data, c); err != nil {
		return fmt.Errorf("boot configuration: %w", err)
	}
	if c.Version != wire.Version {
		return fmt.Errorf("boot configuration: protocol version %d, this agent speaks %d", c.Version, wire.Version)
	}
	if c.Token == "" {
		return errors.New("boot configuration: no token")
	}
	b.config = c
	return nil
}

// loadModule gives a module to the kernel and frees its file. One that is there
// already is fine.
func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return bare(path, err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return bare(path, err)
	}
	os.Remove(path)
	return nil
}

// mountKernel mounts the kernel's own file systems below root.
func mountKernel(root string) error {
	for _, m := range []struct {
		source, at, kind string
		flags            uintptr
		data             string
	}{
		{"proc", "proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	} {
		if err := mountAt(m.source, filepath.Join(root, m.at), m.kind, m.flags, m.data); err != nil {
			return err
		}
	}
	return nil
}

// mountAt mounts on a directory that it makes if it is missing. A file system
// of the kernel's own that is there already is fine; a disk that is busy is not.
func mountAt(source, at, kind string, flags uintptr, data string) error {
	if err := mkdirAll(at); err != nil {
		return err
	}
	if err := unix.Mount(source, at, kind, flags, data); err != nil && (err != unix.EBUSY || holdsDisk(kind)) {
		return fmt.Errorf("mount %s: %w", kind, bare(at, err))
	}
	return nil
}

// joinRoot mounts base and overlay disk and joins them at rootMount.
func (b *boot) joinRoot(base, overlay string) error {
	if err := mountAt(base, baseMount, "ext4", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("base image: %w", err)
	}
	if err := mountAt(overlay, overlayMount, "ext4", 0, ""); err != nil {
		return fmt.Errorf("overlay disk: %w", err)
	}
	upper, work := overlayMount+"/upper", overlayMount+"/work"
	// The upper is the root directory of the guest: it takes after the base's.
	if err := os.Mkdir(upper, 0o755); err == nil {
		var st unix.Stat_t
		if err := unix.Stat(baseMount, &st); err != nil {
			return bare(baseMount, err)
		}
		if err := os.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
			return bare(upper, err)
		}
		if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
			return bare(upper, err)
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("overlay disk: %w", bare(upper, err))
	}
	if err := mkdirAll(work); err != nil {
		return fmt.Errorf("overlay disk: %w", err)
	}
	var err error
	if b.overlayDisk, err = os.Open(overlayMount); err != nil {
		return bare(overlayMount, err)
	}
	for i := range directFolders {
		at := fmt.Sprintf("%s/direct/%d", overlayMount, i)
		if err := mkdirAll(at); err != nil {
			return fmt.Errorf("overlay disk: %w", err)
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("overlay disk: %w", bare(at, err))
		}
		b.direct = append(b.direct, fd)
	}
	options := "lowerdir=" + baseMount + ",upperdir=" + upper + ",workdir=" + work + "," + overlayOptions
	return mountAt("overlay", rootMount, "overlay", 0, options)
}

// directFolders lie on the overlay disk's own ext4 and not in the overlay:
// container engines put overlays of their own there, and the kernel takes no
// overlay as the upper of another. Their place on the disk is their index, so
// the order never changes.
var directFolders = []string{"/var/lib/docker", "/var/lib/containerd", "/var/lib/containers"}

// bindDirect mounts directFolders where the image has such a folder, or is a
// system of its own in which an engine may be installed later. A folder that
// the image has put something in stays as it is.
func (b *boot) bindDirect(init initChoice) error {
	for i, at := range directFolders {
		names, err := os.ReadDir(at)
		wanted := err == nil || init.Kind != kindReaper
		if _, err := os.Stat(filepath.Dir(at)); err != nil || !wanted || len(names) > 0 {
			unix.Close(b.direct[i])
			continue
		}
		if err := mkdirAll(at); err != nil {
			return err
		}
		err = unix.MoveMount(b.direct[i], "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
		unix.Close(b.direct[i])
		if err != nil {
			return bare(at, err)
		}
	}
	return nil
}

// enterRoot makes the joined root the root. The two disks below it leave the
// mount table and live on inside the overlay, which gives them back when it is
// unmounted itself.
func enterRoot() error {
	for _, at := range []string{"/proc", "/sys", "/dev"} {
		// Moved, not made anew: what was opened there stays reachable.
		to := rootMount + at
		if err := mkdirIn(rootMount, at); err != nil {
			return err
		}
		if err := moveInto(at, to); err != nil {
			return err
		}
	}
	for _, at := range []string{baseMount, overlayMount} {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			return bare(at, err)
		}
	}
	if err := os.Chdir(rootMount); err != nil {
		return bare(rootMount, err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return bare("/", err)
	}
	if err := unix.Chroot("."); err != nil {
		return bare("/", err)
	}
	return bareNil("/", os.Chdir("/"))
}

func bareNil(subject string, err error) error {
	if err == nil {
		return nil
	}
	return bare(subject, err)
}

// mkdirIn makes root/name a directory. An image whose /proc, /sys or /dev is a
// symbolic link would send the mount outside: the link is replaced.
func mkdirIn(root, name string) error {
	path := filepath.Join(root, name)
	fi, err := os.Lstat(path)
	if err == nil && !fi.IsDir() {
		if err := os.Remove(path); err != nil {
			return bare(path, err)
		}
		err = fs.ErrNotExist
	} else if err == nil {
		return nil
	}
	return bareNil(path, os.Mkdir(path, 0o755))
}

func moveInto(from, to string) error {
	return bareNil(to, unix.Mount(from, to, "", unix.MS_MOVE, ""))
}

// mountRuntime mounts what every Linux program expects, now in the image's
// root.
func mountRuntime() error {
	for _, m := range []struct {
		source, at, kind string
		flags            uintptr
		data             string
	}{
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755,size=20%,nr_inodes=800k"},
	} {
		if m.at == "/run" {
			if err := mkdirIn("/", "run"); err != nil {
				return err
			}
		}
		if err := mountAt(m.source, m.at, m.kind, m.flags, m.data); err != nil {
			return err
		}
	}
	// devtmpfs has none of the links that udev would make.
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil && !errors.Is(err, fs.ErrExist) {
			return bare("/dev/"+name, err)
		}
	}
	if err := os.Mkdir(runDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return bare(runDir, err)
	}
	for _, d := range []struct {
		path string
		mode uint32
	}{{"/tmp", 0o1777}, {"/etc", 0o755}, {"/var", 0o755}, {"/root", 0o700}} {
		if _, err := os.Lstat(d.path); err == nil {
			continue
		}
		if err := unix.Mkdir(d.path, 0); err != nil {
			return bare(d.path, err)
		}
		if err := unix.Chmod(d.path, d.mode); err != nil {
			return bare(d.path, err)
		}
	}
	return nil
}

// handOver starts the agent and becomes init. It returns only on failure, and
// then the agent has not been told yet.
func (b *boot) handOver(init initChoice) error {
	if err := bringUpLoopback(); err != nil {
		return err
	}
	if err := b.configureNetwork(); err != nil {
		return err
	}
	told, err := startAgent(agentOrder{Token: b.config.Token, Init: init, Events: b.journal.events})
	if err != nil {
		return err
	}
	if b.overlayDisk != nil {
		b.overlayDisk.Close()
	}
	if err := openStdio(); err != nil {
		complain(err)
	}
	// The agent reads the pipe to its end, which comes when exec closes it.
	err = init.exec()
	fmt.Fprint(told, err)
	told.Close()
	complain(err)
	// The agent reports the failure; PID 1 has to live on for it.
	err = syscall.Exec("/proc/self/exe", []string{reaperName}, initEnv)
	complain(err)
	reap()
	return err
}

// initEnv is the environment of PID 1: the kernel's own, and a PATH.
var initEnv = []string{"HOME=/", "TERM=linux", "PATH=" + defaultPath}

// exec becomes the chosen init.
func (c initChoice) exec() error {
	path := c.Path
	if c.Kind == kindReaper {
		path = "/proc/self/exe"
	}
	return fmt.Errorf("init: %w", bare(path, syscall.Exec(path, c.Args, initEnv)))
}

// openStdio gives init the console as its standard streams.
func openStdio() error {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return bare("/dev/console", err)
	}
	for i := range 3 {
		if err := unix.Dup3(fd, i, 0); err != nil {
			return bare("/dev/console", err)
		}
	}
	return nil
}

// bringUpLoopback sets the interface lo up; the kernel gives it its addresses.
func bringUpLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

// fail is the end of a boot that cannot go on: the reason goes to the console
// and to whoever asks on the channel, until the host ends the VM.
func (b *boot) fail(cause error) {
	complain(cause)
	b.journal.add(wire.StageFailed, strings.TrimSpace(cause.Error()))
	token := ""
	if b.config != nil {
		token = b.config.Token
	}
	s := newServer(token, b.journal)
	s.open = b.config == nil
	s.shutdown = func(time.Duration) { go flushAndPowerOff() }
	s.serveChannel(func() {})
}
