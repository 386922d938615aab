//go:build !linux

package ext4

import (
	"errors"
	"io/fs"
	"os"
)

// Elsewhere a copy is made block by block under a temporary name.

const openNonblock = 0

func createUnnamed(dir *os.Root) (*os.File, error)           { return nil, errors.ErrUnsupported }
func linkUnnamed(f, dir *os.File, name string) error         { return errors.ErrUnsupported }
func reflink(dst, src *os.File) error                        { return errors.ErrUnsupported }
func nextData(*os.File, int64) (start, end int64, err error) { return 0, 0, errors.ErrUnsupported }
func hasHoles(fs.FileInfo) bool                              { return false }
