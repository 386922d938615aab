package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"banger/ext4/internal/disk"
)

// rawEntry is a directory entry as it lies on disk. fileType is 0 where the
// file system has none there.
type rawEntry struct {
	name     string
	ino      uint32
	fileType byte
}

// dirBlocks gives the blocks of a directory that hold entries, in the order
// of its index if it has one (Documentation/filesystems/ext4/directory.rst).
// Not one block is asked for twice, whatever the index says.
type dirBlocks struct {
	fs    *FS
	dir   *inode
	count uint64     // of blocks in the directory
	next  uint64     // without an index
	deep  int        // levels of the index under its root
	path  []dirIndex // from its root to where the walk is
	seen  uint64     // blocks it named so far
	begun bool
	at    uint64 // where in the image the block lies that was read last
}

// dirIndex is a node of the index, being walked.
type dirIndex struct {
	block   []byte // entries from its first on
	at      int
	count   int
	version byte // of the hash; of the root only
}

func (f *FS) dirBlocks(dir *inode) (*dirBlocks, error) {
	bs := uint64(f.geo.blockSize)
	d := &dirBlocks{fs: f, dir: dir, count: dir.size / bs}
	if dir.size == 0 || dir.size%bs != 0 || d.count > f.super.Blocks {
		return nil, corrupt("directory %d: of %d bytes", dir.ino, dir.size)
	}
	return d, nil
}

// indexed tells whether a directory has an htree.
func (f *FS) indexed(dir *inode) bool {
	return dir.has(disk.InodeIndexed) && f.geo.dirIndex && !dir.has(disk.InodeInlineData)
}

// dirBlock reads a block of a directory, unverified.
func (f *FS) dirBlock(dir *inode, logical uint64) ([]byte, error) {
	m, err := f.mapBlock(dir, logical)
	if err != nil {
		return nil, err
	}
	if m.start == 0 {
		return nil, corrupt("directory %d: a hole at block %d", dir.ino, logical)
	}
	return f.dev.block(m.start)
}

// leaf reads a block with entries and checks its checksum.
func (f *FS) leaf(dir *inode, logical uint64) ([]byte, error) {
	b, err := f.dirBlock(dir, logical)
	if err != nil || !f.geo.csum {
		return b, err
	}
	at := len(b) - disk.DirTailSize
	t := b[at:]
	if le.Uint32(t) != 0 || le.Uint16(t[4:]) != disk.DirTailSize || t[6] != 0 || t[7] != 0xDE ||
		le.Uint32(t[8:]) != disk.CRC32C(f.geo.inodeSeed(dir.ino, dir.generation()), b[:at]) {
		return nil, corrupt("directory %d: block %d: its checksum does not match", dir.ino, logical)
	}
	return b[:at], nil
}

// index reads a node of the index. The root tells how many levels of inner
// nodes lie under it.
func (f *FS) index(dir *inode, logical uint64) (node dirIndex, levels int, err error) {
	b, err := f.dirBlock(dir, logical)
	if err != nil {
		return node, 0, err
	}
	at := disk.IndexNodeAt
	if logical == 0 {
		at = disk.IndexRootAt
		info := b[24:]
		levels = int(info[6])
		most := 1
		if f.super.Incompat&disk.IncompatLargeDir != 0 {
			most = 2
		}
		if info[5] != 8 || le.Uint32(info) != 0 || info[4] > hashTEA || levels > most {
			return node, 0, corrupt("directory %d: root of its index", dir.ino)
		}
	} else if le.Uint32(b) != 0 || int(le.Uint16(b[4:])) != len(b) {
		return node, 0, corrupt("directory %d: block %d: not a node of the index", dir.ino, logical)
	}
	limit, count := int(le.Uint16(b[at:])), int(le.Uint16(b[at+2:]))
	room := f.geo.indexNodeLimit()
	if logical == 0 {
		room = f.geo.indexRootLimit()
	}
	if count == 0 || count > limit || limit > room {
		return node, 0, corrupt("directory %d: block %d: index of %d of %d entries", dir.ino, logical, count, limit)
	}
	if f.geo.csum {
		tail := b[at+limit*disk.IndexEntrySize:][:8]
		crc := disk.CRC32C(f.geo.inodeSeed(dir.ino, dir.generation()), b[:at+count*disk.IndexEntrySize])
		crc = disk.CRC32C(disk.CRC32C(crc, tail[:4]), []byte{0, 0, 0, 0})
		if crc != le.Uint32(tail[4:]) {
			return node, 0, corrupt("directory %d: block %d: checksum of its index does not match", dir.ino, logical)
		}
	}
	node = dirIndex{block: b[at:], count: count, version: b[28]}
	for i := 1; i < count; i++ {
		if node.from(i) < node.from(i-1) {
			return node, 0, corrupt("directory %d: block %d: index out of order", dir.ino, logical)
		}
	}
	return node, levels, nil
}

// from is the least hash under entry i, child its block.
func (x *dirIndex) from(i int) uint32 {
	if i == 0 {
		return 0 // there are the counts instead
	}
	return le.Uint32(x.block[i*disk.IndexEntrySize:])
}

func (x *dirIndex) child(i int) uint64 {
	return uint64(le.Uint32(x.block[i*disk.IndexEntrySize+4:]) & 0x0FFFFFFF)
}

func (d *dirBlocks) leaf(logical uint64) ([]byte, error) {
	m, err := d.fs.mapBlock(d.dir, logical)
	if err != nil {
		return nil, err
	}
	d.at = m.start
	return d.fs.leaf(d.dir, logical)
}

// read gives the next block of entries, or io.EOF.
func (d *dirBlocks) read() ([]byte, error) {
	if !d.fs.indexed(d.dir) {
		if d.next == d.count {
			return nil, io.EOF
		}
		d.next++
		return d.leaf(d.next - 1)
	}
	if !d.begun {
		d.begun = true
		root, levels, err := d.fs.index(d.dir, 0)
		if err != nil {
			return nil, err
		}
		d.deep, d.path = levels, append(d.path, root)
	}
	for {
		depth := len(d.path) - 1
		if depth < 0 {
			return nil, io.EOF
		}
		node := &d.path[depth]
		if node.at == node.count {
			d.path = d.path[:depth]
			continue
		}
		child := node.child(node.at)
		node.at++
		if d.seen++; child == 0 || child >= d.count || d.seen >= d.count {
			return nil, corrupt("directory %d: its index names block %d, of %d", d.dir.ino, child, d.count)
		}
		if depth == d.deep {
			return d.leaf(child)
		}
		inner, _, err := d.fs.index(d.dir, child)
		if err != nil {
			return nil, err
		}
		d.path = append(d.path, inner)
	}
}

// parseEntries calls yield for each entry in a block, without the dot
// entries, until it gives false. Names in what it gets are part of b.
func (f *FS) parseEntries(dir *inode, b []byte, yield func(name []byte, at int, ino uint32, fileType byte) bool) error {
	filetype := f.geo.filetype
	for at := 0; at < len(b); {
		e := b[at:]
		if len(e) < disk.DirEntryHeader {
			return corrupt("directory %d: %d bytes after the last entry", dir.ino, len(e))
		}
		size, length := int(le.Uint16(e[4:])), int(e[6])
		ino := le.Uint32(e)
		if size < disk.DirEntryHeader || size%4 != 0 || size > len(e) || ino != 0 && disk.DirEntryHeader+length > size {
			return corrupt("directory %d: entry of %d bytes with a name of %d", dir.ino, size, length)
		}
		this := at
		at += size
		if ino == 0 {
			continue
		}
		name := e[disk.DirEntryHeader:][:length]
		if length <= 2 && (string(name) == "." || string(name) == "..") {
			continue
		}
		if length == 0 || length > MaxNameBytes || bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0 {
			return corrupt("directory %d: the name %q", dir.ino, name)
		}
		fileType := byte(0)
		if filetype {
			fileType = e[7]
		}
		if !yield(name, this, ino, fileType) {
			return nil
		}
	}
	return nil
}

// entries calls yield for each block of entries. The blocks of a directory
// that lies in its inode are the two parts of it.
func (f *FS) entries(dir *inode, yield func(block []byte) error) error {
	if dir.has(disk.InodeInlineData) {
		b, err := f.inlineData(dir)
		if err != nil {
			return err
		}
		if len(b) < inlineDirBytes {
			return corrupt("directory %d: %d bytes inline", dir.ino, len(b))
		}
		if err := yield(b[4:inlineDirBytes]); err != nil || len(b) == inlineDirBytes {
			return err
		}
		return yield(b[inlineDirBytes:])
	}
	blocks, err := f.dirBlocks(dir)
	if err != nil {
		return err
	}
	for {
		b, err := blocks.read()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = yield(b)
		}
		if err != nil {
			return err
		}
	}
}

// parent is what ".." of a directory says.
func (f *FS) parent(dir *inode) (uint32, error) {
	if dir.has(disk.InodeInlineData) {
		return le.Uint32(dir.iblock()), nil
	}
	b, err := f.dirBlock(dir, 0)
	if err != nil {
		return 0, err
	}
	if !f.indexed(dir) {
		if b, err = f.leaf(dir, 0); err != nil {
			return 0, err
		}
	}
	dot := b
	size := int(le.Uint16(dot[4:]))
	if size < 12 || size > len(b)-12 || size%4 != 0 || dot[6] != 1 || dot[8] != '.' || le.Uint32(dot) != dir.ino {
		return 0, corrupt("directory %d: its first entry is not itself", dir.ino)
	}
	dots := b[size:]
	if dots[6] != 2 || dots[8] != '.' || dots[9] != '.' {
		return 0, corrupt("directory %d: its second entry is not its parent", dir.ino)
	}
	return le.Uint32(dots), nil
}

// list reads all entries, in the order of names. A name twice, or two names
// for one directory, are damage.
func (f *FS) list(dir *inode) ([]rawEntry, error) {
	var list []rawEntry
	err := f.entries(dir, func(b []byte) error {
		return f.parseEntries(dir, b, func(name []byte, _ int, ino uint32, fileType byte) bool {
			list = append(list, rawEntry{string(name), ino, fileType})
			return true
		})
	})
	if err == nil {
		err = f.findTypes(list)
	}
	if err != nil {
		return nil, err
	}
	dirs := make(map[uint32]bool)
	for i := range list {
		if ino := list[i].ino; list[i].fileType == fileTypeDir {
			if dirs[ino] {
				return nil, corrupt("directory %d: two names for directory %d", dir.ino, ino)
			}
			dirs[ino] = true
		}
	}
	slices.SortFunc(list, func(a, b rawEntry) int { return strings.Compare(a.name, b.name) })
	for i := 1; i < len(list); i++ {
		if list[i].name == list[i-1].name {
			return nil, corrupt("directory %d: the name %q twice", dir.ino, list[i].name)
		}
	}
	return list, nil
}

const fileTypeDir = 2 // EXT4_FT_DIR

// findTypes fills in the types that a directory does not hold.
func (f *FS) findTypes(list []rawEntry) error {
	for i := range list {
		if list[i].fileType != 0 {
			continue
		}
		n, err := f.named(list[i].ino)
		if err != nil {
			return fmt.Errorf("entry %q: %w", list[i].name, err)
		}
		list[i].fileType = disk.DirFileType(n.mode)
	}
	return nil
}

// errFound ends a search.
var errFound = errors.New("found")

// lookup finds one name.
func (f *FS) lookup(dir *inode, name string) (*rawEntry, error) {
	var found *rawEntry
	search := func(b []byte) error {
		err := f.parseEntries(dir, b, func(n []byte, _ int, ino uint32, fileType byte) bool {
			if string(n) == name {
				found = &rawEntry{name, ino, fileType}
			}
			return found == nil
		})
		if err == nil && found != nil {
			err = errFound
		}
		return err
	}
	var err error
	if f.indexed(dir) {
		err = f.searchIndex(dir, name, func(_ uint64, b []byte) error { return search(b) })
	} else {
		err = f.entries(dir, search)
	}
	switch {
	case err == errFound:
		return found, nil
	case err != nil:
		return nil, err
	}
	return nil, fs.ErrNotExist
}

// searchIndex calls search for the blocks in which an htree may have a name:
// one, and those after it that the hash goes on in.
func (f *FS) searchIndex(dir *inode, name string, search func(block uint64, b []byte) error) error {
	blocks, err := f.dirBlocks(dir)
	if err != nil {
		return err
	}
	node, levels, err := f.index(dir, 0)
	if err != nil {
		return err
	}
	hash := f.geo.hash
	hash.version = node.version
	want := hash.sum(name).major
	blocks.begun, blocks.deep = true, levels
	for {
		// The last entry that starts at or before the hash. One where the
		// hash goes on is odd, and so after it.
		for node.at = node.count - 1; node.from(node.at) > want; node.at-- {
		}
		blocks.path = append(blocks.path, node)
		if len(blocks.path) > levels {
			break
		}
		child := node.child(node.at)
		if child == 0 || child >= blocks.count {
			return corrupt("directory %d: its index names block %d, of %d", dir.ino, child, blocks.count)
		}
		blocks.path[len(blocks.path)-1].at++
		if node, _, err = f.index(dir, child); err != nil {
			return err
		}
	}
	for first := true; ; first = false {
		if !first && !blocks.goesOn(want) {
			return nil
		}
		b, err := blocks.read()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = search(blocks.at, b)
		}
		if err != nil {
			return err
		}
	}
}

// goesOn tells whether the next block of a walk begins with the hash that the
// one before ended with.
func (d *dirBlocks) goesOn(hash uint32) bool {
	for depth := len(d.path) - 1; depth >= 0; depth-- {
		if node := &d.path[depth]; node.at < node.count {
			return node.from(node.at) == hash|1
		}
	}
	return false
}

// dirEntryInfo is an fs.DirEntry.
type dirEntryInfo struct {
	fs  *FS
	dir *inode
	raw rawEntry
}

func (e *dirEntryInfo) Name() string      { return e.raw.name }
func (e *dirEntryInfo) IsDir() bool       { return e.raw.fileType == fileTypeDir }
func (e *dirEntryInfo) Type() fs.FileMode { return typeMode(e.raw.fileType) }
func (e *dirEntryInfo) String() string    { return fs.FormatDirEntry(e) }

func (e *dirEntryInfo) Info() (fs.FileInfo, error) {
	n, err := e.fs.enter(e.dir, &e.raw)
	if err != nil {
		return nil, pathError("lstat", e.raw.name, err)
	}
	return &fileInfo{e.raw.name, e.fs.stat(n)}, nil
}

// dirFile is an open directory.
type dirFile struct {
	fs     *FS
	dir    *inode
	path   string
	closed bool

	blocks *dirBlocks
	parts  [][]byte // what is left of a directory in its inode
	ready  []fs.DirEntry
	end    bool
}

func (d *dirFile) Stat() (fs.FileInfo, error) {
	if d.closed {
		return nil, pathError("stat", d.path, fs.ErrClosed)
	}
	return &fileInfo{base(d.path), d.fs.stat(d.dir)}, nil
}

func (d *dirFile) Read([]byte) (int, error) { return 0, pathError("read", d.path, errIsDir) }

func (d *dirFile) Close() error {
	if d.closed {
		return pathError("close", d.path, fs.ErrClosed)
	}
	d.closed = true
	return nil
}

// ReadDir with n > 0 gives the entries as they lie on disk, a block's worth in
// memory at a time, and leaves it to the caller to see a name twice; else all
// that are left, in the order of names.
func (d *dirFile) ReadDir(n int) ([]fs.DirEntry, error) {
	if d.closed {
		return nil, pathError("readdir", d.path, fs.ErrClosed)
	}
	var out []fs.DirEntry
	for n <= 0 || len(out) < n {
		if len(d.ready) == 0 {
			if d.end {
				break
			}
			if err := d.fill(); err != nil {
				return out, pathError("readdir", d.path, err)
			}
			continue
		}
		take := len(d.ready)
		if n > 0 {
			take = min(take, n-len(out))
		}
		out = append(out, d.ready[:take]...)
		d.ready = d.ready[take:]
	}
	if n <= 0 {
		slices.SortFunc(out, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
		return out, nil
	}
	if len(out) == 0 {
		return nil, io.EOF
	}
	return out, nil
}

// fill reads the next block of entries.
func (d *dirFile) fill() error {
	var b []byte
	var err error
	switch {
	case d.dir.has(disk.InodeInlineData):
		if d.parts == nil {
			d.parts = [][]byte{}
			err = d.fs.entries(d.dir, func(b []byte) error { d.parts = append(d.parts, b); return nil })
		}
		if err == nil && len(d.parts) == 0 {
			d.end = true
			return nil
		}
		if err == nil {
			b, d.parts = d.parts[0], d.parts[1:]
		}
	default:
		if d.blocks == nil {
			d.blocks, err = d.fs.dirBlocks(d.dir)
		}
		if err == nil {
			b, err = d.blocks.read()
		}
	}
	if err == io.EOF {
		d.end = true
		return nil
	}
	if err != nil {
		return err
	}
	var list []rawEntry
	if err := d.fs.parseEntries(d.dir, b, func(name []byte, _ int, ino uint32, fileType byte) bool {
		list = append(list, rawEntry{string(name), ino, fileType})
		return true
	}); err != nil {
		return err
	}
	if err := d.fs.findTypes(list); err != nil {
		return err
	}
	for i := range list {
		d.ready = append(d.ready, &dirEntryInfo{d.fs, d.dir, list[i]})
	}
	return nil
}
