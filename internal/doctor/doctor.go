// Package doctor looks at what a host gives banger: named checks, each with
// what was found and what to do about it. It changes nothing, on the host or in
// the state folder.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
)

const (
	// Free space of the state folder below which no image can be built, and
	// below which it will not be long until then.
	leastFreeBytes = 1 << 30
	lowFreeBytes   = 10 << 30
	// maxKnobBytes bounds a file of /proc or /sys that holds one value.
	maxKnobBytes = 4 << 10
	// maxNamed is how many of a kind are named before "and N more".
	maxNamed = 3
)

// A Host is what is looked at, and how the rooms that the checks do not know
// are asked.
type Host struct {
	// Root stands before the paths of the host's own files; "" for the host.
	Root     string
	Store    *store.Store
	Probe    func(context.Context, banger.Accel) (vmm.Info, error)
	Kernel   func() (version string, err error)             // the default one
	Daemon   func() (version string, err error)             // the resident one, if it runs
	Programs func() (versions map[string]string, err error) // of the companions
}

// Checks does all checks at once and returns them in a fixed order. A check
// that cannot find out says that.
func (h Host) Checks(ctx context.Context) []banger.Check {
	checks := []struct {
		name string
		do   func(context.Context) banger.Check
	}{
		{"programs", h.programs},
		{"qemu", h.qemu},
		{"kvm", h.kvm},
		{"kernel", h.kernel},
		{"user-namespaces", h.userNamespaces},
		{"landlock", h.landlock},
		{"tun", h.tun},
		{"cgroups", h.cgroups},
		{"linger", h.linger},
		{"space", h.space},
		{"sockets", h.sockets},
		{"state", h.state},
	}
	out := make([]banger.Check, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() {
			out[i] = c.do(ctx)
			out[i].Name = c.name
		})
	}
	wg.Wait()
	return out
}

func ok(format string, args ...any) banger.Check {
	return banger.Check{State: banger.CheckOK, Found: fmt.Sprintf(format, args...)}
}

func warn(fix, format string, args ...any) banger.Check {
	return banger.Check{State: banger.CheckWarn, Found: fmt.Sprintf(format, args...), Fix: fix}
}

func fail(fix, format string, args ...any) banger.Check {
	return banger.Check{State: banger.CheckFail, Found: fmt.Sprintf(format, args...), Fix: fix}
}

// failed makes a check of an error, whose hint is the fix.
func failed(err error) banger.Check {
	c := fail("", "%v", err)
	if e, known := errors.AsType[*banger.Error](err); known {
		c.Fix = e.Hint
	}
	return c
}

// knob reads a file that holds one value; "" where it is not there.
func (h Host) knob(path string) string {
	f, err := os.Open(h.Root + path)
	if err != nil {
		return ""
	}
	defer f.Close()
	data, _ := io.ReadAll(io.LimitReader(f, maxKnobBytes))
	return strings.TrimSpace(string(data))
}

func (h Host) programs(context.Context) banger.Check {
	versions, err := h.Programs()
	if err != nil {
		return failed(err)
	}
	all := map[string]bool{}
	var words []string
	for _, name := range slices.Sorted(maps.Keys(versions)) {
		all[versions[name]] = true
		words = append(words, name+" "+versions[name])
	}
	if len(all) > 1 {
		return fail("install the three programs again together", "%s: not of one release", strings.Join(words, ", "))
	}
	return ok("%s", strings.Join(words, ", "))
}

func (h Host) qemu(ctx context.Context) banger.Check {
	info, err := h.Probe(ctx, banger.AccelTCG)
	if err != nil {
		return failed(err)
	}
	if !info.Sandbox {
		return warn("install a QEMU that was built with seccomp", "%s %s, which cannot filter its own system calls", info.Program, info.Version)
	}
	return ok("%s %s", info.Program, info.Version)
}

func (h Host) kvm(ctx context.Context) banger.Check {
	info, err := h.Probe(ctx, banger.AccelKVM)
	if err != nil {
		c := failed(err)
		c.State = banger.CheckWarn
		c.Found += ": guests are emulated, slowly, and are no boundary"
		return c
	}
	return ok("guest code runs: %s", info.Reason)
}

func (h Host) kernel(context.Context) banger.Check {
	version, err := h.Kernel()
	if banger.CodeOf(err) == banger.CodeNotFound || errors.Is(err, fs.ErrNotExist) {
		return warn("banger kernel pull", "none is in the store yet; the first run gets one")
	}
	if err != nil {
		return failed(err)
	}
	return ok("%s", version)
}

func (h Host) userNamespaces(context.Context) banger.Check {
	const fix = "allow them to banger: an AppArmor profile for bangerd with `userns,`, or `sysctl kernel.apparmor_restrict_unprivileged_userns=0` for all programs"
	// Tried, not read: what forbids them differs between distributions.
	cmd := exec.Command("/proc/self/exe", "--version")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}},
	}
	err := cmd.Run()
	if err == nil {
		return ok("a user and a network name space can be made")
	}
	why := fmt.Sprintf("none can be made (%v)", err)
	switch {
	case h.knob("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
		return warn(fix, "%s: AppArmor forbids them to ordinary users", why)
	case h.knob("/proc/sys/user/max_user_namespaces") == "0":
		return warn("sysctl user.max_user_namespaces=15000", "%s: their number is limited to 0", why)
	case h.knob("/proc/sys/kernel/unprivileged_userns_clone") == "0":
		return warn("sysctl kernel.unprivileged_userns_clone=1", "%s: the kernel forbids them to ordinary users", why)
	}
	return warn(fix, "%s", why)
}

func (h Host) landlock(context.Context) banger.Check {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(nil)), 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return warn("boot a kernel with Landlock (5.13 or newer, lsm=landlock,...)", "this kernel has none (%v): a VMM may read what you may", errno)
	}
	return ok("version %d of its interface", abi)
}

func (h Host) tun(context.Context) banger.Check {
	const path = "/dev/net/tun"
	f, err := os.OpenFile(h.Root+path, os.O_RDWR, 0)
	if err != nil {
		return warn("modprobe tun; chmod 0666 "+path, "%v: QEMU needs none, Firecracker does", err)
	}
	f.Close()
	return ok("%s can be opened", path)
}

func (h Host) cgroups(context.Context) banger.Check {
	fix := "log in by way of systemd, so that your user manager can give scopes"
	own := ""
	for line := range strings.Lines(h.knob("/proc/self/cgroup")) {
		if path, is := strings.CutPrefix(strings.TrimSpace(line), "0::"); is {
			own = path
		}
	}
	controllers := h.knob("/sys/fs/cgroup/cgroup.controllers")
	switch {
	case controllers == "":
		return warn(fix, "no unified hierarchy (version 2) at /sys/fs/cgroup: VMs are limited by rlimits")
	case !h.userManager():
		return warn(fix, "version 2 with %s, and no user manager of systemd: VMs are limited by rlimits", controllers)
	}
	return ok("version 2 with %s; VMs get scopes beside %s", controllers, own)
}

// userManager says whether systemd's user manager can be asked for scopes.
func (h Host) userManager() bool {
	run := os.Getenv("XDG_RUNTIME_DIR")
	if run == "" {
		return false
	}
	_, err := os.Stat(filepath.Join(h.Root, run, "systemd", "private"))
	return err == nil
}

func (h Host) linger(context.Context) banger.Check {
	if !h.userManager() {
		return ok("no user manager of systemd: VMs run in sessions of their own and outlive a logout")
	}
	u, err := user.Current()
	if err != nil {
		return warn("", "who you are cannot be found out: %v", err)
	}
	if _, err := os.Stat(filepath.Join(h.Root, "/var/lib/systemd/linger", filepath.Base(u.Username))); err != nil {
		return warn("loginctl enable-linger "+u.Username, "off for %s: VMs end when you log out", u.Username)
	}
	return ok("on for %s: VMs outlive a logout", u.Username)
}

func (h Host) space(context.Context) banger.Check {
	dir := h.Store.Root()
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	for errors.Is(err, unix.ENOENT) && dir != "/" {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &st)
	}
	if err != nil {
		return fail("", "%s: %v", dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	const fix = "remove VMs and images that are not needed: banger ls, banger image ls"
	text := fmt.Sprintf("%d MiB free at %s", free>>20, dir)
	switch {
	case free < leastFreeBytes:
		return fail(fix, "%s", text)
	case free < lowFreeBytes:
		return warn(fix, "%s", text)
	}
	return ok("%s", text)
}

func (h Host) sockets(context.Context) banger.Check {
	root := h.Store.Root()
	var st unix.Stat_t
	switch err := unix.Stat(root, &st); {
	case errors.Is(err, unix.ENOENT):
		return ok("%s is not there yet; the first command makes it", root)
	case err != nil:
		return fail("BANGER_HOME names another state folder", "%s: %v", root, err)
	case int(st.Uid) != os.Geteuid():
		return fail("BANGER_HOME names another state folder", "%s belongs to uid %d", root, st.Uid)
	case st.Mode&0o022 != 0:
		return fail("chmod 0700 "+root, "others may write to %s", root)
	}
	socket := filepath.Join(store.Run(root), store.DaemonSocket)
	version, err := h.Daemon()
	switch {
	case err == nil:
		return ok("the daemon %s answers at %s", version, socket)
	case errors.Is(err, fs.ErrNotExist):
		return ok("no daemon runs; %s is made when one is needed", socket)
	case errors.Is(err, syscall.ECONNREFUSED):
		return ok("no daemon runs; %s is left of one that was killed, and will be made anew", socket)
	}
	return fail(fmt.Sprintf("kill $(pgrep -u %d -x bangerd); running VMs go on and are found again", os.Geteuid()), "%s: %v", socket, err)
}

func (h Host) state(context.Context) banger.Check {
	if _, err := os.Stat(h.Store.Root()); errors.Is(err, fs.ErrNotExist) {
		return ok("there is none yet")
	}
	ids, err := h.Store.VMIDs()
	if err != nil {
		return fail("", "%v", err)
	}
	var broken, orphans []string
	for _, id := range ids {
		rec, life, err := vm.Load(h.Store, id)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // removed meanwhile
		case err != nil:
			broken = append(broken, err.Error())
			continue
		}
		if vm.Rests(life.State) {
			continue
		}
		if hold, err := h.Store.HoldVM(id); err == nil {
			hold.Close()
			orphans = append(orphans, fmt.Sprintf("%s (%s)", rec.Name, life.State))
		}
	}
	if len(broken) > 0 {
		return fail("put the records back from a backup; the disks are untouched. `banger rm -f ID` removes a VM with them", "%s", named(broken))
	}
	left, err := h.Store.Leftovers()
	if err != nil {
		return fail("", "%v", err)
	}
	var words []string
	if len(orphans) > 0 {
		words = append(words, "VMs whose supervisor died: "+named(orphans))
	}
	if len(left) > 0 {
		words = append(words, "half made or half deleted: "+named(left))
	}
	if len(words) > 0 {
		return warn("any command that needs the daemon cleans up: banger ls", "%s", strings.Join(words, "; "))
	}
	return ok("%d VMs, all records readable", len(ids))
}

func named(list []string) string {
	if len(list) <= maxNamed {
		return strings.Join(list, "; ")
	}
	return fmt.Sprintf("%s; and %d more", strings.Join(list[:maxNamed], "; "), len(list)-maxNamed)
}
