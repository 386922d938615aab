//go:build linux

package ext4

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"

	"banger/ext4/internal/disk"
	"banger/ext4/internal/e2fs"
)

// Our encoders take the place of the kernel's in a file system of any shape:
// what it wrote for a large directory, a file in pieces and an xattr block is
// written over, and then e2fsck and the kernel must find all that was there.
func TestGeometries(t *testing.T) {
	md4 := dirHash{version: hashHalfMD4}
	for _, c := range []struct {
		row  string
		mkfs []string
		hash dirHash
	}{
		{row: "as mke2fs makes it", mkfs: []string{"-b", "4096"}, hash: md4},
		{row: "1 KiB blocks", mkfs: []string{"-b", "1024"}, hash: md4},
		{row: "2 KiB blocks", mkfs: []string{"-b", "2048"}, hash: md4},
		{row: "inodes of 128", mkfs: []string{"-b", "4096", "-I", "128"}, hash: md4},
		{row: "inodes of 128, 1 KiB blocks, no checksums", mkfs: []string{"-b", "1024", "-I", "128", "-O", "^metadata_csum,^64bit"}, hash: md4},
		{row: "inodes of 1024", mkfs: []string{"-b", "1024", "-I", "1024"}, hash: md4},
		{row: "inodes of 4096", mkfs: []string{"-b", "4096", "-I", "4096"}, hash: md4},
		{row: "no checksums", mkfs: []string{"-b", "4096", "-O", "^metadata_csum"}, hash: md4},
		{row: "no file types", mkfs: []string{"-b", "2048", "-O", "^filetype"}, hash: md4},
		{row: "no index", mkfs: []string{"-b", "1024", "-O", "^dir_index"}, hash: md4},
		{row: "tea", mkfs: []string{"-b", "1024"}, hash: dirHash{version: hashTEA}},
		{row: "legacy", mkfs: []string{"-b", "1024"}, hash: dirHash{version: hashLegacy}},
		{row: "half md4, unsigned", mkfs: []string{"-b", "1024"}, hash: dirHash{version: hashHalfMD4, unsigned: true}},
		{row: "tea, unsigned", mkfs: []string{"-b", "2048"}, hash: dirHash{version: hashTEA, unsigned: true}},
		{row: "legacy, unsigned", mkfs: []string{"-b", "4096"}, hash: dirHash{version: hashLegacy, unsigned: true}},
	} {
		t.Run(c.row, func(t *testing.T) {
			image := newImage(t).Name()
			must(t, os.Truncate(image, 64<<20))
			args := append([]string{"-q", "-F", "-t", "ext4", "-N", "5000"}, append(c.mkfs, image)...)
			if out, exit := e2fs.Run(t, "mke2fs", args...); exit != 0 {
				t.Fatalf("mke2fs: exit %d\n%s", exit, out)
			}
			flag := "1"
			if c.hash.unsigned {
				flag = "2"
			}
			e2fs.Run(t, "tune2fs", "-E", "hash_alg="+[...]string{"legacy", "half_md4", "tea"}[c.hash.version], image)
			e2fs.Run(t, "debugfs", "-w", "-R", "ssv flags "+flag, image)
			replaced(t, image, c.hash)
		})
	}
}

func replaced(t *testing.T, image string, hash dirHash) {
	const names, pieces = 2500, 200
	xattrs := map[string][]byte{"user.short": []byte("s"), "user.long": bytes.Repeat([]byte("long"), 150), "trusted.\xff": nil, "security.x": []byte("12345")}
	dir, unmount := e2fs.Mount(t, image, "rw")
	must(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	var entries []dirEntry
	for i := range names {
		path := filepath.Join(dir, "d", highBytes(i))
		must(t, os.WriteFile(path, nil, 0o644))
		var st syscall.Stat_t
		must(t, syscall.Lstat(path, &st))
		entries = append(entries, dirEntry{name: highBytes(i), ino: uint32(st.Ino), fileType: 1})
	}
	for i := range 600 { // room that ours does not need
		must(t, os.WriteFile(filepath.Join(dir, "d", decimal(i)), nil, 0o644))
	}
	for i := range 600 {
		must(t, os.Remove(filepath.Join(dir, "d", decimal(i))))
	}
	f, err := os.Create(filepath.Join(dir, "pieces"))
	must(t, err)
	for i := range pieces {
		_, err := f.WriteAt([]byte{byte(i) | 1}, int64(i)*8192)
		must(t, err)
	}
	must(t, f.Close())
	must(t, os.WriteFile(filepath.Join(dir, "x"), nil, 0o644))
	for name, value := range xattrs {
		must(t, syscall.Setxattr(filepath.Join(dir, "x"), name, value, 0))
	}
	inodeOf := func(name string) uint32 {
		var st syscall.Stat_t
		must(t, syscall.Lstat(filepath.Join(dir, name), &st))
		return uint32(st.Ino)
	}
	dirIno, fileIno, xattrIno := inodeOf("d"), inodeOf("pieces"), inodeOf("x")
	unmount()
	e2fs.Clean(t, image)

	super := make([]byte, disk.SuperblockSize)
	raw, err := os.OpenFile(image, os.O_RDWR, 0)
	must(t, err)
	defer raw.Close()
	_, err = raw.ReadAt(super, disk.SuperblockOffset)
	must(t, err)
	if got := super[0xFC]; got != hash.version {
		t.Fatalf("hash version %d, not %d", got, hash.version)
	}
	hash.state = hashSeed([16]byte(super[0xEC:0xFC]))
	g := geometry{
		blockSize: 1024 << le.Uint32(super[0x18:]),
		inodeSize: int(le.Uint16(super[0x58:])),
		csum:      le.Uint32(super[0x64:])&disk.ROCompatMetadataCsum != 0,
		filetype:  le.Uint32(super[0x60:])&disk.IncompatFiletype != 0,
		dirIndex:  le.Uint32(super[0x5C:])&disk.CompatDirIndex != 0,
		seed:      disk.FSSeed([16]byte(super[0x68:0x78])),
		hash:      hash,
	}
	write := func(block uint64, b []byte) {
		_, err := raw.WriteAt(b, int64(block)*int64(g.blockSize))
		must(t, err)
	}

	inodeAt := func(ino uint32) int64 {
		out, _ := e2fs.Run(t, "debugfs", "-R", fmt.Sprintf("imap <%d>", ino), image)
		m := regexp.MustCompile(`block (\d+), offset 0x([0-9a-f]+)`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("%s", out)
		}
		block, _ := strconv.ParseInt(m[1], 10, 64)
		offset, _ := strconv.ParseInt(m[2], 16, 64)
		return block*int64(g.blockSize) + offset
	}
	inode := func(ino uint32) []byte {
		b := make([]byte, g.inodeSize)
		_, err := raw.ReadAt(b, inodeAt(ino))
		must(t, err)
		return b
	}

	// The directory. Our leaves are full, so there are blocks to give up.
	in := inode(dirIno)
	if sealed := bytes.Clone(in); g.csum {
		if disk.SealInode(sealed, dirIno, g.seed); !bytes.Equal(sealed, in) {
			t.Error("the checksum of an inode is not the kernel's")
		}
	}
	blocks, _ := extentsOf(t, image, "d")
	l, err := g.layoutDir(entries)
	must(t, err)
	if l.indexed != g.dirIndex {
		t.Errorf("indexed: %v", l.indexed)
	}
	var at []uint64
	for _, e := range blocks {
		for i := range uint64(e.length) {
			at = append(at, e.start+i)
		}
	}
	if l.blocks >= len(at) {
		t.Fatalf("%d blocks where the kernel has %d", l.blocks, len(at))
	}
	l.self, l.parent, l.generation = dirIno, disk.RootIno, le.Uint32(in[0x64:])
	for i := range l.blocks {
		b := make([]byte, g.blockSize)
		l.put(b, i)
		write(at[i], b)
	}
	flags := disk.InodeExtents
	if l.indexed {
		flags |= disk.InodeIndexed
	}
	for _, command := range []string{fmt.Sprintf("punch d %d", l.blocks), fmt.Sprintf("sif d size %d", l.blocks*g.blockSize), fmt.Sprintf("sif d flags %d", flags)} {
		e2fs.Run(t, "debugfs", "-w", "-R", command, image)
	}

	// The file: the kernel's blocks of its tree are full, too.
	in = inode(fileIno)
	extents, tree := extentsOf(t, image, "pieces")
	if len(extents) != pieces || len(tree) != g.treeBlocks(len(extents)) {
		t.Fatalf("%d extents, %d blocks of the tree", len(extents), len(tree))
	}
	b := make([]byte, g.blockSize)
	last := uint64(0)
	root, err := g.putTree(extents, tree, g.inodeSeed(fileIno, le.Uint32(in[0x64:])), func(block uint64) ([]byte, error) {
		if last != 0 {
			write(last, b)
		}
		clear(b)
		last = block
		return b, nil
	})
	must(t, err)
	write(last, b)
	if used := 12 * (1 + len(tree)); !bytes.Equal(root[:used], in[0x28:][:used]) {
		t.Errorf("root of the extent tree is %x, not %x", root[:used], in[0x28:][:used])
	}

	// Xattrs, in the body and in the block.
	in = inode(xattrIno)
	bodySize := 0
	if g.inodeSize > disk.GoodOldInode {
		bodySize = g.inodeSize - disk.GoodOldInode - int(le.Uint16(in[0x80:]))
	}
	set, err := g.encodeXattrs(xattrs, bodySize)
	must(t, err)
	block := uint64(le.Uint32(in[0x68:]))
	if (set.block != nil) != (block != 0) || (set.body != nil) != (bodySize > 0) {
		t.Fatalf("block: %v, the kernel's %d; body: %v of %d", set.block != nil, block, set.body != nil, bodySize)
	}
	if block != 0 {
		b := make([]byte, g.blockSize)
		set.put(&g, b, block)
		write(block, b)
	}
	if bodySize > 0 {
		copy(in[g.inodeSize-bodySize:], set.body)
		if g.csum {
			disk.SealInode(in, xattrIno, g.seed)
		}
		_, err := raw.WriteAt(in, inodeAt(xattrIno))
		must(t, err)
	}

	e2fs.Clean(t, image)
	dir, unmount = e2fs.Mount(t, image, "rw")
	var st syscall.Stat_t
	for _, e := range entries {
		if err := syscall.Lstat(filepath.Join(dir, "d", e.name), &st); err != nil || uint32(st.Ino) != e.ino {
			t.Fatalf("%q: inode %d, not %d: %v", e.name, st.Ino, e.ino, err)
		}
	}
	got, err := xattrsOf(filepath.Join(dir, "x"))
	must(t, err)
	if !maps.EqualFunc(got, xattrs, bytes.Equal) {
		t.Errorf("xattrs are %q", got)
	}
	for i := range 300 { // and goes on with what we wrote
		must(t, os.WriteFile(filepath.Join(dir, "d", fmt.Sprintf("new-%d", i)), nil, 0o644))
		must(t, os.Remove(filepath.Join(dir, "d", highBytes(i))))
	}
	unmount()
	e2fs.Clean(t, image)
}

// extentsOf gives the extents of an object and the blocks of their tree.
func extentsOf(t *testing.T, image, path string) (extents []extent, tree []uint64) {
	t.Helper()
	out, _ := e2fs.Run(t, "debugfs", "-R", "ex "+path, image)
	for _, m := range regexp.MustCompile(`(?m)^ *(\d+)/ *(\d+) +\d+/ *\d+ +(\d+) - +\d+ +(\d+) (?:- +\d+)? +(\d+)`).FindAllStringSubmatch(out, -1) {
		var n [6]uint64
		for i := range m[1:] {
			n[i], _ = strconv.ParseUint(m[1+i], 10, 64)
		}
		if n[0] < n[1] {
			tree = append(tree, n[3])
		} else {
			extents = append(extents, extent{uint32(n[2]), uint32(n[4]), n[3]})
		}
	}
	return extents, tree
}
