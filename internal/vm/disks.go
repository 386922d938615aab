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

// MakeDisks makes the disks of a new VM in its folder; the work disk is filled
// from workSeed, or empty where that is "". A disk that exists is an error, and
// stays as it is.
func MakeDisks(dir, workSeed string) (d Disks, err error) {
	overlay, err := createDisk(filepath.Join(dir, store.VMOverlay), banger.DefaultOverlayDiskBytes, "overlay", overlayDirMode)
	if err != nil {
		return d, fmt.Errorf("overlay disk: %w", err)
	}
	work, err := createWorkDisk(filepath.Join(dir, store.VMWork), banger.DefaultWorkDiskBytes, workSeed)
	if err != nil {
		return d, fmt.Errorf("work disk: %w", err)
	}
	return Disks{Overlay: formatUUID(overlay), Work: formatUUID(work)}, nil
}

// createDisk makes an empty ext4 file system in a new sparse file of
// sizeBytes and returns its UUID. The file is made durable; where anything
// fails it is removed. It costs the same whatever the size.
func createDisk(path string, sizeBytes int64, label string, rootMode uint16) (uuid [16]byte, err error) {
	return newDisk(path, sizeBytes, label, func(f *os.File, p ext4.Params) error {
		root := &ext4.Inode{Mode: rootMode, Atime: p.Time, Mtime: p.Time, Ctime: p.Time, Crtime: p.Time}
		return ext4.Format(f, p, root)
	})
}

// newDisk makes a file system in a new file, with write.
func newDisk(path string, sizeBytes int64, label string, write func(*os.File, ext4.Params) error) (uuid [16]byte, err error) {
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
	err = write(f, ext4.Params{
		SizeBytes: sizeBytes,
		UUID:      uuid,
		HashSeed:  newUUID(),
		Label:     label,
		Time:      time.Now(),
	})
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
