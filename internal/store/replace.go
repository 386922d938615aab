package store

import (
	"errors"
	"os"
	"path/filepath"
)

// ReplaceFile makes a file of a Temp durable and gives it the name of another
// in the store, in one step: who opens that name finds the old or the new, and
// who has the old one open keeps it.
func (s *Store) ReplaceFile(made, final string) error {
	if err := syncDir(made); err != nil {
		return err
	}
	if err := os.Rename(made, final); err != nil {
		return err
	}
	return errors.Join(syncDir(filepath.Dir(final)), syncDir(filepath.Dir(made)))
}
