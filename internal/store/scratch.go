package store

import (
	"os"
	"path/filepath"
)

// Scratch makes an empty file in the state folder that has no name: it is gone
// when the last who has it open is.
func (s *Store) Scratch() (*os.File, error) {
	tmp, err := s.TempDir("scratch")
	if err != nil {
		return nil, err
	}
	defer tmp.Remove()
	return os.OpenFile(filepath.Join(tmp.Path, "file"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}
