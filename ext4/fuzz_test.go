//go:build linux

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"banger/ext4/internal/disk"
)

// bareFS is a file system of 1 KiB blocks without checksums; data is its
// blocks from number 2 on.
func bareFS(data []byte, incompat uint32) *FS {
	const bs = 1024
	data = data[:min(len(data), 256*bs)]
	image := make([]byte, (len(data)+bs-1)/bs*bs+2*bs)
	copy(image[2*bs:], data)
	f := &FS{dev: &blockDevice{r: bytes.NewReader(image)}, groups: 1}
	f.super = disk.Super{
		Inodes: 1000, Blocks: uint64(len(image) / bs), FirstDataBlock: 1, BlocksPerGroup: 8192, InodesPerGroup: 1000, InodeSize: 256,
		FirstIno: 11, DescSize: 32, Compat: disk.CompatDirIndex, Incompat: disk.IncompatFiletype | incompat,
	}
	f.geo = geometry{blockSize: bs, inodeSize: 256, filetype: true, dirIndex: true, hash: dirHash{version: hashHalfMD4, state: hashSeed([16]byte{})}}
	f.dev.reset(bs, f.super.Blocks)
	return f
}

// bareInode is an inode whose content is n blocks from block 2 on.
func bareInode(mode uint16, n int) *inode {
	raw := make([]byte, 256)
	in := disk.Inode{Mode: mode, Links: 1, Flags: disk.InodeExtents, Size: uint64(n) * 1024}
	disk.PutExtentHeader(in.Block[:], 1, disk.ExtentsInInode, 0)
	disk.PutExtent(in.Block[:], 0, 0, uint32(n), 2)
	in.Encode(raw)
	return &inode{ino: 12, raw: raw, mode: mode, links: 1, flags: in.Flags, size: in.Size}
}

func FuzzSuperblock(f *testing.F) {
	image := new(memory)
	w, err := NewWriter(image, Options{})
	must(f, err)
	c, err := w.Place(strings.NewReader("some bytes"), 10)
	must(f, err)
	must(f, w.Add("file", &Inode{Mode: 0o100644, Content: c}))
	must(f, w.Finish(params(mib)))
	f.Add(image.data[1024:2048])
	f.Add(image.data[:1024])
	f.Fuzz(func(t *testing.T, super []byte) {
		data := bytes.Clone(image.data)
		b := data[1024:2048]
		clear(b)
		copy(b, super)
		disk.SealSuper(b)
		visitImage(t, data)
	})
}

func FuzzExtents(f *testing.F) {
	leaf := make([]byte, 60+1024)
	disk.PutExtentHeader(leaf, 2, disk.ExtentsInInode, 0)
	disk.PutExtent(leaf, 0, 0, 1, 2)
	disk.PutExtent(leaf, 1, 5, 1, 2)
	f.Add(leaf, uint32(5), true)
	deep := make([]byte, 60+2048)
	disk.PutExtentHeader(deep, 1, disk.ExtentsInInode, 1)
	disk.PutExtentIndex(deep, 0, 0, 2)
	disk.PutExtentHeader(deep[60:], 2, disk.ExtentsInBlock(1024), 0)
	disk.PutExtent(deep[60:], 0, 0, 2, 2)
	disk.PutExtent(deep[60:], 1, 9, 1, 3)
	f.Add(deep, uint32(9), true)
	mapped := make([]byte, 60+3072)
	le.PutUint32(mapped[4:], 3)
	le.PutUint32(mapped[48:], 2)
	le.PutUint32(mapped[52:], 4)
	le.PutUint32(mapped[60:], 3)
	f.Add(mapped, uint32(400), false)
	f.Fuzz(func(t *testing.T, data []byte, at uint32, extents bool) {
		if len(data) < 60 {
			return
		}
		fsys := bareFS(data[60:], disk.IncompatExtents)
		n := bareInode(disk.TypeRegular|0o644, 0)
		copy(n.iblock(), data[:60])
		if n.size = 1 << 40; !extents {
			n.flags, n.size = 0, 1<<34
		}
		m, err := fsys.mapBlock(n, uint64(at))
		sane(t, err)
		if err == nil && (m.length == 0 || m.start != 0 && !fsys.validBlock(m.start, m.length)) {
			t.Fatalf("block %d: %+v of %d", at, m, fsys.super.Blocks)
		}
		r := &FileReader{fs: fsys, inode: n}
		offset := int64(0)
		for range 2000 {
			start, end, err := r.NextData(offset)
			if err != nil {
				sane(t, err)
				break
			}
			if start < offset || end <= start {
				t.Fatalf("data from %d to %d after %d", start, end, offset)
			}
			_, err = r.ReadAt(make([]byte, min(end-start, 10_000)), start)
			sane(t, err)
			offset = end
		}
		// A caller that takes no block twice comes to an end.
		seen := map[uint64]bool{}
		sane(t, fsys.eachRun(n, func(start, count uint64) error {
			if !fsys.validBlock(start, count) {
				return ErrCorrupt
			}
			for i := range count {
				if seen[start+i] {
					return ErrCorrupt
				}
				seen[start+i] = true
			}
			return nil
		}))
	})
}

// listAndLookUp requires that names that are listed are found, and no others.
func listAndLookUp(t *testing.T, fsys *FS, dir *inode) {
	t.Helper()
	list, err := fsys.list(dir)
	sane(t, err)
	_, err = fsys.parent(dir)
	sane(t, err)
	for i := range list {
		e, err := fsys.lookup(dir, list[i].name)
		sane(t, err)
		if err == nil && (e.ino != list[i].ino || fsys.geo.filetype && e.fileType != list[i].fileType) {
			t.Fatalf("%q: listed as %+v, found as %+v", list[i].name, list[i], e)
		}
		if err != nil && !fsys.indexed(dir) {
			t.Fatalf("%q: listed, but: %v", list[i].name, err)
		}
	}
	_, err = fsys.lookup(dir, "no such name")
	sane(t, err)
}

// smallDir is a directory of so many names, in blocks of 1 KiB.
func smallDir(f testing.TB, n int) []byte {
	g := bareFS(nil, 0).geo
	var entries []dirEntry
	for i := range n {
		entries = append(entries, dirEntry{name: fmt.Sprintf("name-%d", i), ino: uint32(20 + i), fileType: 1})
	}
	l, err := g.layoutDir(entries)
	must(f, err)
	l.self, l.parent = 12, 2
	data := make([]byte, l.blocks*1024)
	for i := range l.blocks {
		l.put(data[i*1024:][:1024], i)
	}
	return data
}

func FuzzDirectory(f *testing.F) {
	f.Add(smallDir(f, 0))
	f.Add(smallDir(f, 30))
	f.Fuzz(func(t *testing.T, data []byte) {
		fsys := bareFS(data, 0)
		listAndLookUp(t, fsys, bareInode(disk.TypeDir|0o755, int(fsys.super.Blocks)-2))
	})
}

func FuzzIndex(f *testing.F) {
	f.Add(smallDir(f, 100), false)
	f.Add(smallDir(f, 3000), true)
	f.Fuzz(func(t *testing.T, data []byte, large bool) {
		fsys := bareFS(data, 0)
		if large {
			fsys.super.Incompat |= disk.IncompatLargeDir
		}
		dir := bareInode(disk.TypeDir|0o755, int(fsys.super.Blocks)-2)
		dir.flags |= disk.InodeIndexed
		listAndLookUp(t, fsys, dir)
	})
}

func FuzzXattrs(f *testing.F) {
	const room = 96
	g := bareFS(nil, 0).geo
	set, err := g.encodeXattrs(map[string][]byte{"user.a": []byte("1"), aclAccess: fullACL, "user.long": make([]byte, 300), "trusted.x": nil}, room)
	must(f, err)
	block := make([]byte, 1024)
	set.put(&g, block, 2)
	f.Add(set.body, block)
	read := func(body, block []byte) (map[string][]byte, error) {
		fsys := bareFS(block, disk.IncompatEAInode)
		n := bareInode(disk.TypeRegular|0o644, 1)
		copy(n.raw[disk.GoodOldInode+disk.ExtraIsize:], body)
		if len(block) > 0 {
			n.xattrs = 2
		}
		return fsys.xattrs(n)
	}
	f.Fuzz(func(t *testing.T, body, block []byte) {
		set, err := read(body, block)
		sane(t, err)
		if err != nil {
			return
		}
		// What was read can be written, if the kernel would take it, and
		// reads the same again.
		x, err := g.encodeXattrs(set, room)
		if err != nil || x == nil {
			return
		}
		again := []byte(nil)
		if x.block != nil {
			again = make([]byte, 1024)
			x.put(&g, again, 2)
		}
		back, err := read(x.body, again)
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range set {
			if (name == aclAccess || name == aclDefault) && len(value) <= 4 {
				continue // an ACL that says nothing
			}
			if !bytes.Equal(back[name], value) {
				t.Fatalf("%q: %q, not %q", name, back[name], value)
			}
		}
	})
}

func FuzzInlineData(f *testing.F) {
	raw := bareInode(disk.TypeRegular|0o644, 0).raw
	copy(raw[disk.InodeBlockAt:], "sixty bytes and")
	body := raw[disk.GoodOldInode+disk.ExtraIsize:]
	le.PutUint32(body, disk.XattrMagic)
	body[4], body[5] = 4, systemIndex
	le.PutUint16(body[6:], 40)
	le.PutUint32(body[12:], 8)
	copy(body[20:], "data")
	copy(body[44:], "the rest")
	f.Add(raw, uint32(68), false)
	f.Add(raw, uint32(60), true)
	f.Fuzz(func(t *testing.T, raw []byte, size uint32, isDir bool) {
		fsys := bareFS(nil, disk.IncompatInlineData)
		n := bareInode(disk.TypeRegular|0o644, 0)
		copy(n.raw, raw)
		n.flags, n.size = disk.InodeInlineData, uint64(size)
		if disk.GoodOldInode+disk.InodeExtra(n.raw) > len(n.raw) {
			return // refused when the inode is read
		}
		if isDir {
			n.mode = disk.TypeDir | 0o755
			listAndLookUp(t, fsys, n)
			return
		}
		file, err := fsys.openFile(n)
		sane(t, err)
		if err != nil {
			return
		}
		b, err := io.ReadAll(file)
		sane(t, err)
		if err == nil && len(b) != int(size) {
			t.Fatalf("%d bytes of %d", len(b), size)
		}
	})
}

// smallJournal is a journal of 16 blocks with one transaction in it.
func smallJournal(f testing.TB, incompat uint32) []byte {
	m := &memImage{data: make([]byte, 40*1024), synced: make([]byte, 40*1024)}
	fsys := bareFS(make([]byte, 38*1024), 0)
	fsys.dev.r = m
	j := &journal{fs: fsys, inode: bareInode(disk.TypeRegular|0o600, 16), super: make([]byte, 1024), incompat: incompat, first: 1, end: 16, sequence: 5}
	disk.PutJournalSuperblock(j.super, 16, testUUID)
	be.PutUint32(j.super[0x0C:], 1024)
	be.PutUint32(j.super[0x28:], incompat)
	j.seed = disk.CRC32C(^uint32(0), testUUID[:])
	e := &Editor{fs: fsys, img: m, journal: j}
	escaped := make([]byte, 1024)
	be.PutUint32(escaped, disk.JournalMagic)
	must(f, e.log([]uint64{20, 21, 25}, map[uint64][]byte{20: bytes.Repeat([]byte("a"), 1024), 21: escaped, 25: bytes.Repeat([]byte("b"), 1024)}))
	must(f, e.writeJournalSuper(1))
	return m.data[2*1024 : 18*1024]
}

func FuzzJournal(f *testing.F) {
	f.Add(smallJournal(f, journalHas64bit|journalHasCsumV3))
	f.Add(smallJournal(f, journalHas64bit|journalHasCsumV2))
	f.Add(smallJournal(f, 0))
	f.Fuzz(func(t *testing.T, data []byte) {
		fsys := bareFS(data, 0)
		n := int(fsys.super.Blocks) - 2
		if n == 0 {
			return
		}
		j := &journal{fs: fsys, inode: bareInode(disk.TypeRegular|0o600, n)}
		if err := j.open(); err != nil {
			sane(t, err)
			return
		}
		r, err := j.recover()
		sane(t, err)
		if err != nil || r == nil {
			return
		}
		b := make([]byte, 1024)
		for block := range r.blocks {
			if found, err := r.read(block, b); !found || err != nil || block >= fsys.super.Blocks {
				t.Fatalf("block %d: %v, %v", block, found, err)
			}
		}
	})
}

// The seeds of the fuzz targets are whole: what they hold is found.
func TestSeeds(t *testing.T) {
	for _, incompat := range []uint32{0, journalHas64bit | journalHasCsumV2, journalHas64bit | journalHasCsumV3} {
		fsys := bareFS(smallJournal(t, incompat), 0)
		fsys.super.Blocks = 40
		fsys.dev.blocks = 40
		j := &journal{fs: fsys, inode: bareInode(disk.TypeRegular|0o600, 16)}
		must(t, j.open())
		r, err := j.recover()
		must(t, err)
		if len(r.blocks) != 3 || !r.blocks[21].escaped || r.next != 6 {
			t.Errorf("journal with features %#x: %+v", incompat, r)
		}
	}
	for _, n := range []int{0, 30, 100, 3000} {
		fsys := bareFS(smallDir(t, n), 0)
		dir := bareInode(disk.TypeDir|0o755, int(fsys.super.Blocks)-2)
		if n > 60 {
			dir.flags |= disk.InodeIndexed
		}
		list, err := fsys.list(dir)
		must(t, err)
		if len(list) != n {
			t.Errorf("directory of %d: %d listed", n, len(list))
		}
		for _, e := range list {
			if _, err := fsys.lookup(dir, e.name); err != nil {
				t.Errorf("directory of %d: %q: %v", n, e.name, err)
			}
		}
	}
}

// Few bytes of image claim a file of terabytes: they cost nothing to list and
// skip, and reading all that is there ends.
func TestHostileMap(t *testing.T) {
	data := make([]byte, 60+1024)
	for i := range 15 {
		le.PutUint32(data[4*i:], 2)
	}
	for i := range 256 {
		le.PutUint32(data[60+4*i:], 2) // the block of pointers is all its own children
	}
	fsys := bareFS(data[60:], 0)
	n := bareInode(disk.TypeRegular|0o644, 0)
	copy(n.iblock(), data[:60])
	n.flags, n.size = 0, 16<<30
	n16 := int64(0)
	file := &FileReader{fs: fsys, inode: n}
	read, err := io.Copy(io.Discard, io.LimitReader(file, 1<<20))
	if n16 = read; err == nil || !errors.Is(err, ErrCorrupt) || n16 > 10<<10 {
		t.Errorf("%d bytes read of an image of 3 KiB, %v", n16, err)
	}
	taken := 0
	err = fsys.eachRun(n, func(start, count uint64) error {
		if taken++; taken > 1 {
			return errNoSuch
		}
		return nil
	})
	if !errors.Is(err, errNoSuch) {
		t.Errorf("eachRun: %v", err)
	}
}

var errNoSuch = errors.New("twice")
