package image

import (
	"path"
	"strings"

	"banger/internal/oci"
)

// Trimming masks units of systemd that have nothing to do in a microVM and take
// half of the time in which an image comes up. It is part of what a base is,
// like the guest files: a symlink to /dev/null in /etc/systemd/system for each
// (systemd.unit(5)). `systemctl unmask UNIT` in a guest brings one back there.
//
// An image that is not trimmed starts all that its author made it start.
//
// A trimmed base is for microVMs. Something else that boots it finds the agent
// and the network, whose modules the guest files name, and no login on a console
// and no driver for other hardware.

// needless are the units that trimming masks.
var needless = []string{
	// Devices: what there is was there from the start, with its node from
	// devtmpfs and its driver in the kernel. What comes later udev sees.
	"systemd-udev-trigger.service", "systemd-udev-settle.service",
	// Nodes that load their module when they are opened: the agent made them.
	"kmod-static-nodes.service",
	// Modules on suspicion: a guest has no GPU and no EFI, and the kernel
	// loads the others when they are asked for.
	"modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@configfs.service",
	"modprobe@dm_mod.service", "modprobe@loop.service", "modprobe@fuse.service",
	// Logins at a keyboard: there is none, and a shell is a session of the
	// agent's. The serial line is for the console's log.
	"getty@tty1.service", "serial-getty@ttyS0.service", "console-getty.service",
	"keyboard-setup.service", "console-setup.service", "systemd-vconsole-setup.service",
	// Snapshots of logical volumes, to check file systems on them.
	"e2scrub_reap.service", "e2scrub_all.timer",
	// The seed of the last boot: the VMM gives randomness from the first
	// instruction on, and a seed in an image is the same in every VM.
	"systemd-random-seed.service",
}

const (
	unitFolder = "etc/systemd/system"
	maskTarget = "/dev/null"
)

// vendorUnitFolders are where packages put units.
var vendorUnitFolders = []string{"usr/lib/systemd/system", "lib/systemd/system"}

// trimmable are those of the needless units that an image has, and that it has
// not chosen itself what to do with. there says whether it has a path, whatever
// that is.
func trimmable(there func(path string) bool) (units []string) {
	for _, unit := range needless {
		if there(path.Join(unitFolder, unit)) {
			continue
		}
		for _, folder := range vendorUnitFolders {
			if there(path.Join(folder, unit)) || there(path.Join(folder, template(unit))) {
				units = append(units, unit)
				break
			}
		}
	}
	return units
}

// template is the unit file of an instance: getty@tty1.service is one of
// getty@.service.
func template(unit string) string {
	name, instance, ok := strings.Cut(unit, "@")
	if !ok {
		return unit
	}
	return name + "@" + path.Ext(instance)
}

// masks are the guest files that mask units.
func masks(units []string) (files []guestFile) {
	for _, unit := range units {
		files = append(files, guestFile{path: path.Join(unitFolder, unit), mode: modeSymlink | 0o777, target: maskTarget})
	}
	return files
}

// noteTrimmed says how a trim went that had nothing to do.
func noteTrimmed(units []string) []string {
	if len(units) == 0 {
		return []string{"nothing to trim: it has none of the units of systemd that would be masked"}
	}
	return nil
}

// TrimmedByDefault says whether an image is trimmed unless the user says
// otherwise: one that was made here, for a microVM, is.
func TrimmedByDefault(ref oci.Reference) bool { return ref.Kind == oci.KindApt }

// NameOf is the full name under which the base of a reference is kept, "" where
// it has none. Of the trimmed and the untrimmed base the one that is not the
// default says so.
func NameOf(src *oci.Source, ref oci.Reference, trim bool) string {
	return trimName(src.Name(ref), ref, trim)
}

func trimName(name string, ref oci.Reference, trim bool) string {
	switch {
	case name == "" || trim == TrimmedByDefault(ref):
		return name
	case trim:
		return name + "+trimmed"
	}
	return name + "+untrimmed"
}
