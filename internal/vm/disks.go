package vm

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"banger"
	"banger/ext4"
	"banger/internal/store"
)

// The directory modes that disks start with.
const (
	modeDir        = 0o040000
	overlayDirMode = modeDir | 0o755
	workDirMode    = modeDir | 0o700 // it becomes /root
)

// Disks are the UUIDs of a VM's own disks, as text.
type Disks struct {
	Overlay string `json:"overlay"`
	Work    string `json:"work"`
}

// MakeDisks makes the disks of a new VM in its folder. A disk that exists is
// an error, and stays as it is.
func MakeDisks(dir string) (d Disks, err error) {
	for _, disk := range []struct {
		uuid        *string
		file, label string
		sizeBytes   int64
		mode        uint16
	}{
		{&d.Overlay, store.VMOverlay, "overlay", banger.DefaultOverlayDiskBytes, overlayDirMode},
		{&d.Work, store.VMWork, "work", banger.DefaultWorkDiskBytes, workDirMode},
	} {
		uuid, err := createDisk(filepath.Join(dir, disk.file), disk.sizeBytes, disk.label, disk.mode)
		if err != nil {
			return d, fmt.Errorf("%s disk: %w", disk.label, err)
		}
		*disk.uuid = formatUUID(uuid)
	}
	return d, nil
}

// createDisk makes an empty ext4 file system in a new sparse file of
// sizeBytes and returns its UUID. The file is made durable; where anything
// fails it is removed. It costs the same whatever the size.
func createDisk(path string, sizeBytes int64, label string, rootMode uint16) (uuid [16]byte, err error) {
	// Exclusive: a disk that exists is never made again in its place.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return uuid, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			os.Remove(path)
		}
	}()
	uuid = newUUID()
	now := time.Now()
	root := &ext4.Inode{Mode: rootMode, Atime: now, Mtime: now, Ctime: now, Crtime: now}
	err = ext4.Format(f, ext4.Params{
		SizeBytes: sizeBytes,
		UUID:      uuid,
		HashSeed:  newUUID(),
		Label:     label,
		Time:      now,
	}, root)
	if err != nil {
		return uuid, fmt.Errorf("%s: %w", path, err)
	}
	return uuid, f.Sync()
}

// newUUID returns a random (version 4) UUID, RFC 9562 section 5.4.
func newUUID() (u [16]byte) {
	rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// formatUUID writes a UUID in the usual form of five groups.
func formatUUID(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
