package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"slices"
	"time"

	"banger/ext4"
)

const (
	driveLabel    = "banger-modules"
	driveMaxBytes = maxAllModulesBytes + (1 << 30)
)

// driveTime is the time of everything on a modules drive, so that the same
// modules always give the same bytes.
var driveTime = time.Date(2000, time.January, 1, 0, 0, 0, 0, time.UTC)

// A bootModule is a module for the initramfs, uncompressed.
type bootModule struct {
	name string // NN-NAME.ko
	data []byte
}

// writeDrive writes the modules drive of a tree to f: an ext4 file system,
// meant to be read only, whose root is the module folder. It returns the drive's
// UUID, which is derived from the content, and the modules for the initramfs.
func writeDrive(ctx context.Context, f *os.File, tree *moduleTree, release string) (uuid string, boot []bootModule, err error) {
	w, err := ext4.NewWriter(f, ext4.Options{MaxSizeBytes: driveMaxBytes})
	if err != nil {
		return "", nil, fmt.Errorf("modules drive: %w", err)
	}
	d := &driveWriter{w: w, folders: map[string]bool{".": true}}
	d.hash.hash = sha256.New()
	if err := w.Add("/", &ext4.Inode{Mode: 0o040755}); err != nil {
		return "", nil, fmt.Errorf("modules drive: %w", err)
	}
	var modules []*module
	files := make(map[string]treeFile)
	lists := make(map[string][]byte)
	for _, tf := range tree.files {
		if err := ctx.Err(); err != nil {
			return "", nil, err
		}
		raw, err := tree.read(tf)
		if err != nil {
			return "", nil, fmt.Errorf("module file %q: %w", tf.path, noEOF(err))
		}
		if err := d.add(tf.path, raw); err != nil {
			return "", nil, err
		}
		if _, _, ok := moduleExt(tf.path); !ok {
			lists[tf.path] = raw
			continue
		}
		plain, err := plainModule(tf.path, raw)
		if err != nil {
			return "", nil, err
		}
		m, err := parseModule(tf.path, plain, release)
		if err != nil {
			return "", nil, err
		}
		modules = append(modules, m)
		files[tf.path] = tf
	}
	ix, err := newModuleIndex(modules, lists)
	if err != nil {
		return "", nil, err
	}
	made, err := ix.lists()
	if err != nil {
		return "", nil, err
	}
	for _, l := range made {
		if err := d.add(l.name, l.data); err != nil {
			return "", nil, err
		}
	}
	for i, m := range ix.bootOrder() {
		raw, err := tree.read(files[m.path])
		if err != nil {
			return "", nil, fmt.Errorf("module file %q: %w", m.path, noEOF(err))
		}
		plain, err := plainModule(m.path, raw)
		if err != nil {
			return "", nil, err
		}
		boot = append(boot, bootModule{fmt.Sprintf("%02d-%s.ko", i, m.name), plain})
	}
	uuid, err = d.finish()
	return uuid, boot, err
}

type driveWriter struct {
	w       *ext4.Writer
	hash    contentHash
	folders map[string]bool
}

// add puts a file and the folders above it on the drive.
func (d *driveWriter) add(name string, data []byte) error {
	if err := d.addFolder(path.Dir(name)); err != nil {
		return err
	}
	d.hash.add(name, data)
	c, err := d.w.Place(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return fmt.Errorf("modules drive: %w", err)
	}
	if err := d.w.Add(name, &ext4.Inode{Mode: 0o100644, Content: c}); err != nil {
		return fmt.Errorf("modules drive: %w", err)
	}
	return nil
}

func (d *driveWriter) addFolder(name string) error {
	if d.folders[name] {
		return nil
	}
	if err := d.addFolder(path.Dir(name)); err != nil {
		return err
	}
	d.folders[name] = true
	if err := d.w.Add(name, &ext4.Inode{Mode: 0o040755}); err != nil {
		return fmt.Errorf("modules drive: %w", err)
	}
	return nil
}

// finish writes the smallest file system that holds everything: nothing will
// be added.
func (d *driveWriter) finish() (uuid string, err error) {
	id := d.hash.uuid("uuid")
	p := ext4.Params{
		Inodes:       1, // no more than are used
		UUID:         id,
		HashSeed:     d.hash.uuid("hash seed"),
		Label:        driveLabel,
		Time:         driveTime,
		JournalBytes: -1,
	}
	if p.SizeBytes, err = d.w.MinSizeBytes(p); err == nil {
		err = d.w.Finish(p)
	}
	if err != nil {
		return "", fmt.Errorf("modules drive: %w", err)
	}
	return formatUUID(id), nil
}

// A contentHash is over the names and bytes of files, in order.
type contentHash struct{ hash hash.Hash }

func (h *contentHash) add(name string, data []byte) {
	var lengths [16]byte
	binary.BigEndian.PutUint64(lengths[:], uint64(len(name)))
	binary.BigEndian.PutUint64(lengths[8:], uint64(len(data)))
	h.hash.Write(lengths[:])
	io.WriteString(h.hash, name)
	h.hash.Write(data)
}

// uuid derives an identifier for one purpose, in the form of a version 8 UUID
// (RFC 9562, section 5.8).
func (h *contentHash) uuid(purpose string) (id [16]byte) {
	sum := sha256.Sum256(slices.Concat(h.hash.Sum(nil), []byte(purpose)))
	copy(id[:], sum[:])
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id
}

// formatUUID writes a UUID as text, in lower case.
func formatUUID(id [16]byte) string {
	s := hex.EncodeToString(id[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
