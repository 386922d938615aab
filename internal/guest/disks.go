package guest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// The ext4 superblock: fs/ext4/ext4.h, struct ext4_super_block.
	superOffset    = 1024
	superBytes     = 1024
	superMagicAt   = 0x38
	superMagic     = 0xEF53
	superUUIDAt    = 0x68
	superLabelAt   = 0x78
	superLabelSize = 16

	// diskTimeout bounds the wait for block devices to appear. Emulated
	// machines probe them in well under a second.
	diskTimeout = 20 * time.Second
	diskPause   = 5 * time.Millisecond
	// maxDisks bounds how many block devices are looked at.
	maxDisks = 256
)

// A disk is a block device with an ext4 on it.
type disk struct {
	dev   string // /dev/...
	uuid  string
	label string
}

// listDisks reads the superblock of every block device below sysBlock whose
// node is in dev. Devices without an ext4 are left out.
func listDisks(sysBlock, dev string) []disk {
	d, err := os.Open(sysBlock)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(maxDisks)
	var disks []disk
	for _, name := range names {
		path := filepath.Join(dev, name)
		if uuid, label, err := readSuper(path); err == nil {
			disks = append(disks, disk{path, uuid, label})
		}
	}
	return disks
}

// readSuper returns the UUID, in the usual form, and the label of the ext4 on
// a device.
func readSuper(path string) (uuid, label string, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", "", bare(path, err)
	}
	defer f.Close()
	var sb [superBytes]byte
	if _, err := f.ReadAt(sb[:], superOffset); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return "", "", bare(path, err)
	}
	if binary.LittleEndian.Uint16(sb[superMagicAt:]) != superMagic {
		return "", "", fmt.Errorf("%q: no ext4 superblock", path)
	}
	u := sb[superUUIDAt : superUUIDAt+16]
	name, _, _ := bytes.Cut(sb[superLabelAt:superLabelAt+superLabelSize], []byte{0})
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]), string(name), nil
}

// findDisks waits until every one of the wanted UUIDs is on exactly one device,
// and returns the devices in the same order, and all disks there are. An empty
// UUID gives an empty device.
func findDisks(want []string, timeout time.Duration, list func() []disk) ([]string, []disk, error) {
	deadline := time.Now().Add(timeout)
	for {
		disks := list()
		devs, err := matchDisks(want, disks)
		if err == nil {
			return devs, disks, nil
		}
		if time.Now().After(deadline) {
			return nil, disks, err
		}
		time.Sleep(diskPause)
	}
}

func matchDisks(want []string, disks []disk) ([]string, error) {
	devs := make([]string, len(want))
	for i, uuid := range want {
		if uuid == "" {
			continue
		}
		for _, d := range disks {
			if d.uuid != uuid {
				continue
			}
			if devs[i] != "" {
				return nil, fmt.Errorf("disk %s: both %s and %s have this UUID", uuid, devs[i], d.dev)
			}
			devs[i] = d.dev
		}
		if devs[i] == "" {
			return nil, fmt.Errorf("disk %s: no block device has an ext4 with this UUID (%d devices with one)", uuid, len(disks))
		}
	}
	return devs, nil
}
