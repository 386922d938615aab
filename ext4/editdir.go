package ext4

import (
	"errors"
	"io"
	"io/fs"

	"banger/ext4/internal/disk"
)

// Names in directories. One that has room takes a name where it is; else it is
// written anew into other blocks, whole, as a Writer writes one.

// eachLeaf calls do for each block of entries of a directory that is not
// inline, with its place, until it gives true.
func (e *Editor) eachLeaf(dir *inode, do func(block uint64, b []byte) (bool, error)) error {
	blocks, err := e.fs.dirBlocks(dir)
	if err != nil {
		return err
	}
	for {
		b, err := blocks.read()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if done, err := do(blocks.at, b); done || err != nil {
			return err
		}
	}
}

// findEntry gives the block with the entry of a name, its offset there, and
// that of the entry before it in the block, or -1.
func (e *Editor) findEntry(dir *inode, name string) (block uint64, at, before int, err error) {
	look := func(place uint64, b []byte) (bool, error) {
		last := -1
		found := false
		err := e.fs.parseEntries(dir, b, func(n []byte, offset int, _ uint32, _ byte) bool {
			if string(n) == name {
				block, at, found = place, offset, true
			}
			return !found
		})
		if !found || err != nil {
			return false, err
		}
		for i := 0; i < at; i += int(le.Uint16(b[i+4:])) {
			last = i
		}
		before = last
		return true, nil
	}
	if e.fs.indexed(dir) {
		err = e.fs.searchIndex(dir, name, func(place uint64, b []byte) error {
			done, err := look(place, b)
			if done {
				return errFound
			}
			return err
		})
		if err == errFound {
			return block, at, before, nil
		}
	} else {
		found := false
		err = e.eachLeaf(dir, func(place uint64, b []byte) (bool, error) {
			done, err := look(place, b)
			found = done
			return done, err
		})
		if err == nil && found {
			return block, at, before, nil
		}
	}
	if err == nil {
		err = fs.ErrNotExist
	}
	return 0, 0, 0, err
}

// changeLeaf changes a block of entries.
func (e *Editor) changeLeaf(dir *inode, block uint64, change func(b []byte)) error {
	b, err := e.change(block)
	if err != nil {
		return err
	}
	change(b)
	if e.fs.geo.csum {
		disk.SealDirBlock(b, e.fs.geo.inodeSeed(dir.ino, dir.generation()))
	}
	return nil
}

// touchDir notes that the names in a directory have changed.
func (e *Editor) touchDir(dir *inode) error {
	return e.changeInode(dir.ino, func(raw []byte) error {
		e.touch(raw, disk.InodeCtimeAt, disk.InodeCtimeExtraAt)
		e.touch(raw, disk.InodeMtimeAt, disk.InodeMtimeExtraAt)
		return nil
	})
}

// unlinkName removes a name as ext4_generic_delete_entry does.
func (e *Editor) unlinkName(dir *inode, name string) error {
	if dir.has(disk.InodeInlineData) {
		return e.rewrite(dir, func(list []rawEntry) []rawEntry {
			for i := range list {
				if list[i].name == name {
					return append(list[:i], list[i+1:]...)
				}
			}
			return list
		})
	}
	block, at, before, err := e.findEntry(dir, name)
	if err != nil {
		return err
	}
	err = e.changeLeaf(dir, block, func(b []byte) {
		if before < 0 {
			le.PutUint32(b[at:], 0)
			return
		}
		le.PutUint16(b[before+4:], le.Uint16(b[before+4:])+le.Uint16(b[at+4:]))
	})
	if err != nil {
		return err
	}
	return e.touchDir(dir)
}

// relinkName makes a name that is there mean another inode.
func (e *Editor) relinkName(dir *inode, entry *dirEntry) error {
	if dir.has(disk.InodeInlineData) {
		return e.rewrite(dir, func(list []rawEntry) []rawEntry {
			for i := range list {
				if list[i].name == entry.name {
					list[i] = rawEntry{entry.name, entry.ino, entry.fileType}
				}
			}
			return list
		})
	}
	block, at, _, err := e.findEntry(dir, entry.name)
	if err != nil {
		return err
	}
	err = e.changeLeaf(dir, block, func(b []byte) {
		le.PutUint32(b[at:], entry.ino)
		if e.fs.geo.filetype {
			b[at+7] = entry.fileType
		}
	})
	if err != nil {
		return err
	}
	return e.touchDir(dir)
}

// linkName adds a name that is not there.
func (e *Editor) linkName(dir *inode, entry *dirEntry) error {
	if !dir.has(disk.InodeInlineData) {
		added, err := e.addInPlace(dir, entry)
		if err != nil {
			return err
		}
		if added {
			return e.touchDir(dir)
		}
	}
	return e.rewrite(dir, func(list []rawEntry) []rawEntry {
		return append(list, rawEntry{entry.name, entry.ino, entry.fileType})
	})
}

// addInPlace adds a name to a block that has room for it, if there is one: any
// in a list, the one for its hash in an htree.
func (e *Editor) addInPlace(dir *inode, entry *dirEntry) (added bool, err error) {
	need := dirEntrySize(len(entry.name))
	try := func(block uint64, b []byte) (bool, error) {
		for at := 0; at < len(b); {
			size := int(le.Uint16(b[at+4:]))
			used := 0
			if le.Uint32(b[at:]) != 0 {
				used = dirEntrySize(int(b[at+6]))
			}
			if size-used < need {
				at += size
				continue
			}
			return true, e.changeLeaf(dir, block, func(b []byte) {
				if used > 0 {
					le.PutUint16(b[at+4:], uint16(used))
				}
				fileType := entry.fileType
				if !e.fs.geo.filetype {
					fileType = 0
				}
				disk.PutDirEntry(b[at+used:], entry.ino, size-used, fileType, entry.name)
			})
		}
		return false, nil
	}
	// The entries were judged when the name was looked up in them.
	if !e.fs.indexed(dir) {
		err = e.eachLeaf(dir, func(block uint64, b []byte) (bool, error) {
			added, err = try(block, b)
			return added, err
		})
		return added, err
	}
	err = e.fs.searchIndex(dir, entry.name, func(block uint64, b []byte) error {
		done, err := try(block, b)
		if done {
			added = true
		}
		if err == nil {
			err = errFound // only the first block is surely the right one
		}
		return err
	})
	if err == errFound {
		err = nil
	}
	return added, err
}

// rewrite changes the list of a directory and writes it anew.
func (e *Editor) rewrite(dir *inode, change func([]rawEntry) []rawEntry) error {
	list, err := e.fs.list(dir)
	if err != nil {
		return err
	}
	parent, err := e.fs.parent(dir)
	if err != nil {
		return err
	}
	if err := e.rebuild(dir, parent, change(list)); err != nil {
		return err
	}
	return e.touchDir(dir)
}

// rebuild writes a directory into other blocks and frees those it had.
func (e *Editor) rebuild(dir *inode, parent uint32, list []rawEntry) error {
	entries := make([]dirEntry, len(list))
	for i, raw := range list {
		entries[i] = dirEntry{name: raw.name, ino: raw.ino, fileType: raw.fileType}
	}
	l, err := e.fs.geo.layoutDir(entries)
	if err != nil {
		return err
	}
	l.self, l.parent, l.generation = dir.ino, parent, dir.generation()
	inline := dir.has(disk.InodeInlineData)
	var set map[string][]byte
	if inline {
		set, err = e.fs.xattrs(dir)
	} else {
		err = e.fs.eachRun(dir, e.blocks.free)
	}
	if err != nil {
		return err
	}
	c, err := e.putDirBlocks(l)
	if err != nil {
		return err
	}
	finish := func(raw []byte) error {
		flags := le.Uint32(raw[disk.InodeFlagsAt:]) &^ disk.InodeIndexed
		if l.indexed {
			flags |= disk.InodeIndexed
		}
		le.PutUint32(raw[disk.InodeFlagsAt:], flags)
		return nil
	}
	if inline {
		if err := e.moveOut(dir, c, set); err != nil {
			return err
		}
		return e.changeInode(dir.ino, finish)
	}
	return e.changeInode(dir.ino, func(raw []byte) error {
		return errors.Join(e.setContent(raw, dir, c), finish(raw))
	})
}
