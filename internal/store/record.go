package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// maxRecordBytes bounds a JSON record. The largest holds an image's
// configuration, whose own limit is below this.
const maxRecordBytes = 16 << 20

// halfWritten begins the name of a file that is being written, and no other's.
const halfWritten = "."

func isHalfWritten(name string) bool { return strings.HasPrefix(name, halfWritten) }

// WriteFile replaces the file at path: whoever reads it, even after a power
// cut, finds the old bytes or the new ones.
func WriteFile(path string, data []byte, perm fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, halfWritten+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

// A record is what every JSON file of the store looks like: the schema's
// version beside the fields of the value itself.
type schemaOnly struct {
	Schema int `json:"schema"`
}

// ErrSchema is wrapped by the errors of ReadJSON for a record of a version
// that this program does not know.
var ErrSchema = errors.New("unknown schema version")

// WriteJSON replaces the record at path, atomically. v must encode as an
// object and have no field named "schema". What would be too large to be read
// again is refused.
func WriteJSON(path string, schema int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(body) < 2 || body[0] != '{' {
		return fmt.Errorf("record %s: not an object", path)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, `{"schema":%d`, schema)
	if len(body) > 2 {
		out.WriteByte(',')
	}
	out.Write(body[1:])
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, out.Bytes(), "", "  "); err != nil {
		return err
	}
	pretty.WriteByte('\n')
	if pretty.Len() > maxRecordBytes {
		return fmt.Errorf("record %s: %d bytes, the limit is %d", path, pretty.Len(), maxRecordBytes)
	}
	return WriteFile(path, pretty.Bytes(), 0o600)
}

// ReadJSON reads the record at path into v. A record that is missing gives
// fs.ErrNotExist; one that is unreadable, or of another schema version, gives
// an error that says what was found. It is never taken for an empty one.
func ReadJSON(path string, schema int, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecordBytes+1))
	if err != nil {
		return err
	}
	if len(data) > maxRecordBytes {
		return fmt.Errorf("record %s: larger than %d bytes", path, maxRecordBytes)
	}
	var found schemaOnly
	if err := json.Unmarshal(data, &found); err != nil {
		return fmt.Errorf("record %s: %w", path, err)
	}
	if found.Schema != schema {
		return fmt.Errorf("record %s: %w: found %d, this banger knows %d", path, ErrSchema, found.Schema, schema)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("record %s: %w", path, err)
	}
	return nil
}

// syncTree makes every file and folder below dir durable. Only files and
// folders stand in the store.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && !d.Type().IsRegular() {
			return fmt.Errorf("%s: %v has no place in the store", path, d.Type())
		}
		return syncDir(path)
	})
}

// syncDir makes the names in a folder (or the bytes of a file) durable.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("fsync %s: %w", path, err)
	}
	return nil
}
