package vm

import (
	"errors"
	"fmt"
	"os"

	"banger"
	"banger/ext4"
)

// createWorkDisk is createDisk for a work disk: a fresh file system of its own
// size, filled with all that the work seed holds, whose root becomes /root. It
// takes the time that copying the seed's content takes. seed "" leaves the disk
// empty.
func createWorkDisk(path string, sizeBytes int64, seed string) (uuid [16]byte, err error) {
	if seed == "" {
		return createDisk(path, sizeBytes, "work", workDirMode)
	}
	f, err := os.Open(seed)
	if err != nil {
		return uuid, fmt.Errorf("work seed: %w", err)
	}
	defer f.Close()
	src, err := ext4.Open(f)
	if err != nil {
		return uuid, fmt.Errorf("work seed %s: %w", seed, err)
	}
	return newDisk(path, sizeBytes, "work", func(out *os.File, p ext4.Params) error {
		w, err := ext4.NewWriter(out, ext4.Options{MaxSizeBytes: sizeBytes})
		if err != nil {
			return err
		}
		if err := w.AddTree(".", src, "."); err != nil {
			return seedError(sizeBytes, err)
		}
		return seedError(sizeBytes, w.Finish(p))
	})
}

// seedError says so where the image's home is larger than the disk.
func seedError(sizeBytes int64, err error) error {
	if !errors.Is(err, ext4.ErrNoSpace) {
		return err
	}
	e := banger.Errorf(banger.CodeUsage, "the image's /root does not fit into a work disk of %d MiB: %w", sizeBytes>>20, err)
	var space *ext4.SpaceError
	if errors.As(err, &space) {
		e = e.WithHint("it needs at least %d MiB", (space.NeedBytes+1<<20-1)>>20)
	}
	return e
}
