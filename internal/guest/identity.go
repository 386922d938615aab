package guest

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxEtcFileBytes bounds /etc/fstab, /etc/hosts and /etc/machine-id.
	maxEtcFileBytes = 1 << 20
	// maxHostnameBytes is the kernel's HOST_NAME_MAX.
	maxHostnameBytes = 64

	// bornName is a file on the overlay disk, outside the guest's root: this
	// VM has its own identity already.
	bornName = "banger-born"

	fstabMask = "# banger: no such device: "
)

// personalise makes the image's root this VM's own. Everything is written
// through the overlay, so the base stays as it is.
func (b *boot) personalise(init initChoice) error {
	name := b.config.Hostname
	if name != "" {
		if !validHostname(name) {
			return fmt.Errorf("hostname %q: not a host name", name)
		}
		if err := unix.Sethostname([]byte(name)); err != nil {
			return fmt.Errorf("hostname %q: %w", name, err)
		}
		if err := keepFile("/etc/hostname", name+"\n"); err != nil {
			return err
		}
	} else {
		name = "localhost"
	}
	if err := b.nameSelf(name); err != nil {
		return err
	}
	if err := b.nameNetwork(); err != nil {
		return err
	}
	if err := b.freshMachineID(init); err != nil {
		return err
	}
	if init.Kind == kindSystemd {
		if err := dropForeign(""); err != nil {
			return err
		}
		if err := maskStaticNodes("/"); err != nil {
			return err
		}
	}
	return b.maskFstab()
}

// foreign are the guest files of a base by which it is reached where something
// else boots it. In this guest the agent runs already.
var foreign = []string{
	"/etc/modules-load.d/banger-vsock.conf",
	"/etc/systemd/system/multi-user.target.wants/banger-vsock-agent.service",
	"/etc/systemd/system/multi-user.target.wants/banger-network.service",
}

// dropForeign removes them from this VM's own layer.
func dropForeign(root string) error {
	for _, path := range foreign {
		if err := os.Remove(root + path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return bare(path, err)
		}
	}
	return nil
}

// maskStaticNodes masks a unit that fails in an image without kmod, until the
// guest stops. It makes nodes by the list on the modules drive, which its author
// did not count on, and which the agent has made.
func maskStaticNodes(root string) error {
	if _, fi, err := resolveIn(root, "/bin/kmod"); err == nil && fi.Mode().IsRegular() {
		return nil
	}
	path := filepath.Join(root, "run/systemd/system/kmod-static-nodes.service")
	if err := mkdirAll(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.Symlink("/dev/null", path); err != nil && !errors.Is(err, fs.ErrExist) {
		return bare(path, err)
	}
	return nil
}

// keepFile writes a file unless it is like that already.
func keepFile(path, text string) error {
	if data, err := readBounded(path, maxEtcFileBytes); err == nil && string(data) == text {
		return nil
	}
	return replaceFile(path, []byte(text), 0o644)
}

func validHostname(s string) bool {
	return s != "" && len(s) <= maxHostnameBytes && s[0] != '-' && s[0] != '.' &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.") == ""
}

// freshMachineID gives a VM of a systemd image its own machine-id(5) at its
// first start: the one in an image would be the same in every VM of it. Later
// starts keep it, also one that the user has set.
func (b *boot) freshMachineID(init initChoice) error {
	const path = "/etc/machine-id"
	data, err := readBounded(path, maxEtcFileBytes)
	if err != nil && init.Kind != kindSystemd {
		return nil // no systemd, no machine-id
	}
	disk := int(b.overlayDisk.Fd())
	var st unix.Stat_t
	born := unix.Fstatat(disk, bornName, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
	if born && err == nil && len(bytes.TrimSpace(data)) == 32 {
		return nil
	}
	var id [16]byte
	rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a version 4 UUID, as machine-id(5) suggests
	if err := replaceFile(path, fmt.Appendf(nil, "%x\n", id), 0o444); err != nil {
		return err
	}
	fd, err := unix.Openat(disk, bornName, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("overlay disk: %w", bare(bornName, err))
	}
	return unix.Close(fd)
}

// maskFstab comments out the entries whose device is not there.
func (b *boot) maskFstab() error {
	const path = "/etc/fstab"
	data, err := readBounded(path, maxEtcFileBytes)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			complain(err)
		}
		return nil
	}
	masked := maskedFstab(data, func(source string) bool { return b.deviceThere(source) })
	if bytes.Equal(masked, data) {
		return nil
	}
	return replaceFile(path, masked, 0o644)
}

// deviceThere says whether what fstab(5) names as a device exists in this
// guest. Only banger's own drives do, which carry an ext4 each and no
// partition table; udev's links do not exist yet.
func (b *boot) deviceThere(source string) bool {
	match := func(f func(disk) bool) bool { return slices.ContainsFunc(b.disks, f) }
	tag, value, tagged := strings.Cut(source, "=")
	if !tagged || strings.HasPrefix(source, "/") {
		tag = ""
		if v, ok := strings.CutPrefix(source, "/dev/disk/by-uuid/"); ok {
			tag, value = "UUID", v
		} else if v, ok := strings.CutPrefix(source, "/dev/disk/by-label/"); ok {
			tag, value = "LABEL", v
		}
	}
	value = strings.Trim(value, `"`)
	switch tag {
	case "UUID":
		return match(func(d disk) bool { return d.uuid == strings.ToLower(value) })
	case "LABEL":
		return match(func(d disk) bool { return value != "" && d.label == value })
	case "":
		_, err := os.Stat(source)
		return err == nil
	}
	return false
}

// maskedFstab returns fstab with fstabMask before every entry that would make
// a boot wait for a device that there says is missing, and before an entry for
// / on a device, which is not ours. Everything else stays byte for byte.
func maskedFstab(data []byte, there func(source string) bool) []byte {
	var out bytes.Buffer
	for line := range bytes.Lines(data) {
		if fstabLineDead(string(line), there) {
			out.WriteString(fstabMask)
		}
		out.Write(line)
	}
	return out.Bytes()
}

func fstabLineDead(line string, there func(string) bool) bool {
	f := strings.Fields(line)
	if len(f) < 3 || strings.HasPrefix(f[0], "#") {
		return false
	}
	source, kind := fstabUnescape(f[0]), f[2]
	if len(f) > 3 && slices.Contains(strings.Split(f[3], ","), "noauto") {
		return false
	}
	switch {
	case kind == "swap" && strings.HasPrefix(source, "/"):
	case strings.HasPrefix(source, "/dev/"):
	case strings.HasPrefix(source, "UUID="), strings.HasPrefix(source, "LABEL="),
		strings.HasPrefix(source, "PARTUUID="), strings.HasPrefix(source, "PARTLABEL="), strings.HasPrefix(source, "ID="):
	default:
		return false // tmpfs, proc, a bind, a network share
	}
	return f[1] == "/" || !there(source)
}

// fstabUnescape decodes the octal escapes of fstab(5).
func fstabUnescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
