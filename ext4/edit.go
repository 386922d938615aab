package ext4

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"banger/ext4/internal/disk"
)

// An Editor changes a file system in an image. Its methods change what it
// shows of the image; the image itself is the same until they are all done,
// but for blocks that are free in it: see [Edit].
//
// Paths lead where they would for a process whose root is the image's: a
// symlinked directory is followed, inside the image. The last component of a
// path is never followed.
//
// A path that does not exist, a name that cannot be and the like are refused
// and change nothing. After any other error, such as [ErrNoSpace] in the
// middle of a file, every method fails with it, and so does the whole edit.
//
// An Editor is not safe for concurrent use.
type Editor struct {
	fs      *FS
	img     editImage
	blocks  *allocator
	journal *journal // nil: the file system has none
	now     disk.Timestamp
	broken  error
	begun   bool // something was written to the image
}

// editImage is what an Editor needs of an image.
type editImage interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Features that an edit keeps right.
const (
	editableCompat = 0x1 | disk.CompatHasJournal | disk.CompatExtAttr | disk.CompatResizeInode | disk.CompatDirIndex |
		disk.CompatSparse2 | disk.CompatFastCommit | 0x800 | disk.CompatOrphanFile
	editableIncompat = readableIncompat &^ disk.IncompatMMP
	editableROCompat = disk.ROCompatSparseSuper | disk.ROCompatLargeFile | disk.ROCompatHugeFile | disk.ROCompatGDTCsum |
		disk.ROCompatDirNlink | disk.ROCompatExtraIsize | disk.ROCompatMetadataCsum | disk.ROCompatProject | disk.ROCompatVerity
)

// newEditor opens an image for change.
func newEditor(img editImage, now time.Time) (*Editor, error) {
	stamp, err := timestamp(now)
	if err != nil {
		return nil, fmt.Errorf("time of the change: %w", err)
	}
	f, err := Open(img)
	if err != nil {
		return nil, err
	}
	e := &Editor{fs: f, img: img, now: stamp}
	s := &f.super
	if bad := disk.FeatureNames(s.Compat&^editableCompat, s.Incompat&^uint32(editableIncompat), s.ROCompat&^uint32(editableROCompat)); len(bad) > 0 {
		return nil, fmt.Errorf("feature %s: cannot be kept right by an edit: %w", strings.Join(bad, " "), errors.ErrUnsupported)
	}
	if s.State&disk.StateErrors != 0 {
		return nil, corrupt("the kernel has marked it as having errors: run e2fsck")
	}
	if s.State&disk.StateValid == 0 && s.Incompat&disk.IncompatRecover == 0 {
		return nil, errors.New("it is mounted, or was not unmounted: unmount it, or run e2fsck")
	}
	if s.Compat&disk.CompatHasJournal != 0 {
		if s.JournalIno == 0 {
			return nil, fmt.Errorf("external journal: %w", errors.ErrUnsupported)
		}
		if e.journal, err = f.openJournal(); err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
		if errno := int32(be.Uint32(e.journal.super[0x20:])); errno != 0 {
			return nil, corrupt("journal: the kernel has marked it with error %d: run e2fsck", errno)
		}
	}
	if e.blocks, err = newAllocator(f); err != nil {
		return nil, err
	}
	f.dev.changed = make(map[uint64][]byte)
	if err := e.clearOrphans(); err != nil {
		return nil, fmt.Errorf("orphan inodes: %w", err)
	}
	return e, nil
}

// FS shows the file system as the edit has made it so far. It is of no more use
// after the edit.
func (e *Editor) FS() *FS { return e.fs }

// change gives a block of metadata, to be written to.
func (e *Editor) change(block uint64) ([]byte, error) {
	if b := e.fs.dev.changed[block]; b != nil {
		return b, nil
	}
	b, err := e.fs.dev.block(block)
	if err != nil {
		return nil, err
	}
	b = bytes.Clone(b)
	e.fs.dev.changed[block] = b
	return b, nil
}

// replace gives a block of zeros in the place of one.
func (e *Editor) replace(block uint64) ([]byte, error) {
	if block >= e.fs.super.Blocks {
		return nil, corrupt("block %d: beyond the end", block)
	}
	b := make([]byte, e.fs.geo.blockSize)
	e.fs.dev.changed[block] = b
	return b, nil
}

// do runs one change. Only what check says leaves the Editor usable.
func (e *Editor) do(op, path string, check, change func() error) error {
	if e.broken != nil {
		return e.broken
	}
	if err := check(); err != nil {
		return pathError(op, path, err)
	}
	if err := change(); err != nil {
		e.broken = pathError(op, path, err)
		return e.broken
	}
	return nil
}

// Put gives in's attributes and the content of a regular file, exactly
// sizeBytes from content (nil if it is 0), the name path. What has that name
// already loses it, whatever it is but a directory; its other names keep it.
// A directory can be put only where there is nothing. Zero times mean that of
// the edit; in.Content must be nil.
func (e *Editor) Put(path string, in *Inode, content io.Reader, sizeBytes int64) error {
	var w *walk
	var n newInode
	return e.do("put", path, func() (err error) {
		if n, err = e.checkInode(in); err != nil {
			return err
		}
		if sizeBytes < 0 || sizeBytes > MaxFileBytes || sizeBytes > 0 && in.Mode&disk.TypeMask != disk.TypeRegular {
			return fmt.Errorf("content of %d bytes: %w", sizeBytes, fs.ErrInvalid)
		}
		if w, err = e.fs.walk(path, false); err != nil {
			return err
		}
		if w.name == "" {
			if old := w.last(); old.isDir() || n.isDir() {
				return fs.ErrExist
			}
		}
		return nil
	}, func() error { return e.put(w, &n, base(path), content, sizeBytes) })
}

// MkdirAll makes the directory path, and those above it that are missing, with
// the attributes of in. A symlink to a directory counts as one.
func (e *Editor) MkdirAll(path string, in *Inode) error {
	parts, err := splitPath(path)
	if err != nil {
		return pathError("mkdir", path, err)
	}
	if in.Mode&disk.TypeMask != disk.TypeDir {
		return pathError("mkdir", path, fs.ErrInvalid)
	}
	for i := range parts {
		part := strings.Join(parts[:i+1], "/")
		info, err := e.fs.Stat(part)
		switch {
		case err == nil && info.IsDir():
			continue
		case err == nil:
			return pathError("mkdir", part, errNotDir)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		if err := e.Put(part, in, nil, 0); err != nil {
			return err
		}
	}
	return nil
}

// Remove removes a name, and the object if it has no other. A directory must
// be empty.
func (e *Editor) Remove(path string) error { return e.remove("remove", path, false) }

// RemoveAll removes a name and, if it is a directory, all that is in it. It is
// no error if there is nothing.
func (e *Editor) RemoveAll(path string) error {
	err := e.remove("removeall", path, true)
	if errors.Is(err, fs.ErrNotExist) && e.broken == nil {
		return nil
	}
	return err
}

func (e *Editor) remove(op, path string, all bool) error {
	var w *walk
	return e.do(op, path, func() (err error) {
		if w, err = e.existing(path); err != nil {
			return err
		}
		if len(w.dirs) == 1 {
			return fmt.Errorf("the root: %w", fs.ErrInvalid)
		}
		if n := w.last(); n.isDir() && !all {
			list, err := e.fs.list(n)
			if err != nil {
				return err
			}
			if len(list) > 0 {
				return errors.New("directory not empty")
			}
		}
		return nil
	}, func() error {
		dir, n := w.dirs[len(w.dirs)-2], w.last()
		if err := e.unlinkName(dir, base(path)); err != nil {
			return err
		}
		if n.isDir() {
			if err := e.addLinks(dir.ino, -1); err != nil {
				return err
			}
		}
		return e.drop(n)
	})
}

// last is the inode that a walk found.
func (w *walk) last() *inode { return w.dirs[len(w.dirs)-1] }

// existing walks to what must be there.
func (e *Editor) existing(path string) (*walk, error) {
	w, err := e.fs.walk(path, false)
	if err == nil && w.name != "" {
		err = fs.ErrNotExist
	}
	return w, err
}

// attributes changes the inode that path names.
func (e *Editor) attributes(op, path string, check func(n *inode) error, change func(n *inode, raw []byte) error) error {
	var w *walk
	return e.do(op, path, func() (err error) {
		if w, err = e.existing(path); err == nil && check != nil {
			err = check(w.last())
		}
		return err
	}, func() error {
		return e.changeInode(w.last().ino, func(raw []byte) error {
			e.touch(raw, disk.InodeCtimeAt, disk.InodeCtimeExtraAt)
			return change(w.last(), raw)
		})
	})
}

// Chmod sets the twelve permission bits.
func (e *Editor) Chmod(path string, mode uint16) error {
	return e.attributes("chmod", path, func(*inode) error {
		if mode&^0o7777 != 0 {
			return fmt.Errorf("mode %#o: more than permission bits", mode)
		}
		return nil
	}, func(n *inode, raw []byte) error {
		le.PutUint16(raw[disk.InodeModeAt:], n.kind()|mode)
		return nil
	})
}

// Chown sets user and group.
func (e *Editor) Chown(path string, uid, gid uint32) error {
	return e.attributes("chown", path, nil, func(n *inode, raw []byte) error {
		le.PutUint16(raw[disk.InodeUIDAt:], uint16(uid))
		le.PutUint16(raw[disk.InodeUIDHiAt:], uint16(uid>>16))
		le.PutUint16(raw[disk.InodeGIDAt:], uint16(gid))
		le.PutUint16(raw[disk.InodeGIDHiAt:], uint16(gid>>16))
		return nil
	})
}

// Chtimes sets two times; a zero Time leaves one as it is. An inode of 128
// bytes holds seconds from 1901 to 2038 only, and refuses others.
func (e *Editor) Chtimes(path string, atime, mtime time.Time) error {
	var a, m disk.Timestamp
	return e.attributes("chtimes", path, func(n *inode) (err error) {
		for _, t := range [...]struct {
			time  time.Time
			stamp *disk.Timestamp
		}{{atime, &a}, {mtime, &m}} {
			if *t.stamp, err = timestamp(t.time); err != nil {
				return err
			}
			if len(n.raw) == disk.GoodOldInode && !t.time.IsZero() && (t.stamp.Extra&3 != 0 || t.stamp.Extra>>2 != 0) {
				return fmt.Errorf("time %s: inodes of this file system hold only whole seconds from 1901 to 2038", t.time.UTC().Format(time.RFC3339Nano))
			}
		}
		return nil
	}, func(n *inode, raw []byte) error {
		if !atime.IsZero() {
			setTime(raw, a, disk.InodeAtimeAt, disk.InodeAtimeExtraAt)
		}
		if !mtime.IsZero() {
			setTime(raw, m, disk.InodeMtimeAt, disk.InodeMtimeExtraAt)
		}
		return nil
	})
}

// SetXattrs replaces all xattrs of what path names. Values of system.posix_acl_*
// have the form of the system call.
func (e *Editor) SetXattrs(path string, set map[string][]byte) error {
	var w *walk
	return e.do("setxattr", path, func() (err error) {
		if w, err = e.existing(path); err != nil {
			return err
		}
		n := w.last()
		_, err = e.fs.geo.encodeXattrsOf(n.fastLink(), set, e.fs.xattrRoom(n.raw))
		return err
	}, func() error {
		n := w.last()
		if n.has(disk.InodeInlineData) {
			if err := e.uninline(n); err != nil {
				return err
			}
		}
		if err := e.setXattrs(n.ino, set); err != nil {
			return err
		}
		return e.changeInode(n.ino, func(raw []byte) error {
			e.touch(raw, disk.InodeCtimeAt, disk.InodeCtimeExtraAt)
			return nil
		})
	})
}

// xattrRoom is what an inode has for xattrs.
func (f *FS) xattrRoom(raw []byte) int {
	if disk.InodeExtra(raw) == 0 {
		return 0
	}
	return len(raw) - disk.GoodOldInode - disk.InodeExtra(raw)
}

// setTime puts a time into an inode, with as much of it as there is room for.
func setTime(raw []byte, t disk.Timestamp, at, extraAt int) {
	le.PutUint32(raw[at:], t.Sec)
	if extraAt+4 <= disk.GoodOldInode+disk.InodeExtra(raw) {
		le.PutUint32(raw[extraAt:], t.Extra)
	}
}

// touch sets a time of an inode to that of the edit, if it has one.
func (e *Editor) touch(raw []byte, at, extraAt int) {
	if e.now != (disk.Timestamp{}) {
		setTime(raw, e.now, at, extraAt)
	}
}

// changeInode changes an inode in place.
func (e *Editor) changeInode(ino uint32, change func(raw []byte) error) error {
	block, offset, err := e.fs.inodeAt(ino)
	if err != nil {
		return err
	}
	b, err := e.change(block)
	if err != nil {
		return err
	}
	raw := b[offset:][:e.fs.geo.inodeSize]
	if err := change(raw); err != nil {
		return err
	}
	if e.fs.geo.csum {
		disk.SealInode(raw, ino, e.fs.geo.seed)
	}
	return nil
}

// addLinks changes the link count of a directory (ext4_inc_count and
// ext4_dec_count of fs/ext4/namei.c): 1 means too many to count.
func (e *Editor) addLinks(ino uint32, delta int) error {
	return e.changeInode(ino, func(raw []byte) error {
		links := int(le.Uint16(raw[disk.InodeLinksAt:]))
		switch {
		case links == 1:
		case links+delta >= MaxLinks:
			if e.fs.super.ROCompat&disk.ROCompatDirNlink == 0 {
				return fmt.Errorf("more than %d directories in one", MaxLinks-2)
			}
			links = 1
		default:
			links += delta
		}
		le.PutUint16(raw[disk.InodeLinksAt:], uint16(links))
		return nil
	})
}

// drop takes one name away from an inode, which goes with the last.
func (e *Editor) drop(n *inode) error {
	if n.isDir() {
		list, err := e.fs.list(n)
		if err != nil {
			return err
		}
		for i := range list {
			child, err := e.fs.enter(n, &list[i])
			if err == nil {
				err = e.drop(child)
			}
			if err != nil {
				return fmt.Errorf("%q: %w", list[i].name, err)
			}
		}
		return e.release(n)
	}
	if n.links == 1 {
		return e.release(n)
	}
	return e.changeInode(n.ino, func(raw []byte) error {
		// Not n.links: another of its names may just have gone.
		links := le.Uint16(raw[disk.InodeLinksAt:]) - 1
		le.PutUint16(raw[disk.InodeLinksAt:], links)
		e.touch(raw, disk.InodeCtimeAt, disk.InodeCtimeExtraAt)
		return nil
	})
}

// release frees an inode and all it has.
func (e *Editor) release(n *inode) error {
	if err := e.releaseBlocks(n); err != nil {
		return err
	}
	if err := e.releaseXattrs(n); err != nil {
		return err
	}
	if err := e.blocks.freeInode(n.ino, n.isDir()); err != nil {
		return err
	}
	block, offset, err := e.fs.inodeAt(n.ino)
	if err != nil {
		return err
	}
	b, err := e.change(block)
	if err != nil {
		return err
	}
	clear(b[offset:][:e.fs.geo.inodeSize])
	return nil
}

// releaseBlocks frees what holds the content of an inode.
func (e *Editor) releaseBlocks(n *inode) error {
	if n.has(disk.InodeInlineData) {
		return nil
	}
	switch n.kind() {
	case disk.TypeRegular, disk.TypeDir:
	case disk.TypeSymlink:
		if n.fastLink() {
			return nil
		}
	default:
		return nil
	}
	return e.fs.eachRun(n, e.blocks.free)
}

// releaseXattrs frees what holds the xattrs of an inode.
func (e *Editor) releaseXattrs(n *inode) error {
	list, err := e.fs.bodyXattrs(n)
	if err != nil {
		return err
	}
	if n.xattrs != 0 {
		b, err := e.fs.xattrBlock(n)
		if err != nil {
			return err
		}
		if owners := le.Uint32(b[4:]); owners > 1 {
			if b, err = e.change(n.xattrs); err != nil {
				return err
			}
			le.PutUint32(b[4:], owners-1)
			if e.fs.geo.csum {
				disk.SealXattrBlock(b, n.xattrs, e.fs.geo.seed)
			}
		} else {
			inBlock, err := parseXattrs(b, disk.XattrBlockHeader, fmt.Sprintf("inode %d: xattr block", n.ino))
			if err != nil {
				return err
			}
			list = append(list, inBlock...)
			if err := e.blocks.free(n.xattrs, 1); err != nil {
				return err
			}
		}
	}
	for _, x := range list {
		if x.valueIno == 0 {
			continue
		}
		holder, err := e.fs.xattrInode(x.valueIno)
		if err != nil {
			return err
		}
		if err := e.releaseValue(holder); err != nil {
			return err
		}
	}
	return nil
}

// releaseValue takes one reference away from an inode that holds the value of
// an xattr (ext4_xattr_inode_update_ref of fs/ext4/xattr.c).
func (e *Editor) releaseValue(n *inode) error {
	refs := uint64(le.Uint32(n.raw[disk.InodeCtimeAt:]))<<32 | uint64(le.Uint32(n.raw[disk.InodeVersionAt:]))
	if refs <= 1 {
		return e.release(n)
	}
	return e.changeInode(n.ino, func(raw []byte) error {
		le.PutUint32(raw[disk.InodeCtimeAt:], uint32((refs-1)>>32))
		le.PutUint32(raw[disk.InodeVersionAt:], uint32(refs-1))
		return nil
	})
}

// clearOrphans does what the kernel does at the next mount: inodes that were
// removed while in use go, and files that were being cut are cut.
func (e *Editor) clearOrphans() error {
	if e.fs.super.LastOrphan == 0 {
		return nil
	}
	next := e.fs.super.LastOrphan
	for seen := uint32(0); next != 0; seen++ {
		if next < e.fs.super.FirstIno || next > e.fs.super.Inodes || seen > e.fs.super.Inodes {
			return corrupt("inode %d in their list", next)
		}
		n, err := e.fs.anyInode(next)
		if err != nil {
			return err
		}
		next = le.Uint32(n.raw[disk.InodeDtimeAt:])
		if n.links == 0 {
			if n.has(disk.InodeInlineData) && n.isDir() {
				n.size = inlineBytes
			}
			err = e.release(n)
		} else {
			err = e.truncate(n)
		}
		if err != nil {
			return err
		}
	}
	block := e.fs.superBlock()
	b, err := e.change(block)
	if err != nil {
		return err
	}
	le.PutUint32(b[disk.SuperblockOffset%e.fs.geo.blockSize+disk.SuperLastOrphanAt:], 0)
	return nil
}

// truncate frees what a file has beyond its size, by giving it a new map of
// the blocks it keeps.
func (e *Editor) truncate(n *inode) error {
	end := ceilDiv(n.size, uint64(e.fs.geo.blockSize))
	if n.has(disk.InodeInlineData) || n.kind() != disk.TypeRegular {
		return e.changeInode(n.ino, func(raw []byte) error {
			le.PutUint32(raw[disk.InodeDtimeAt:], 0)
			return nil
		})
	}
	kept := &Content{size: int64(n.size)}
	for at := uint64(0); at < end; {
		m, err := e.fs.mapBlock(n, at)
		if err != nil {
			return err
		}
		m.length = min(m.length, end-at)
		if m.start != 0 {
			kept.add(uint32(at), m.start, uint32(m.length))
		}
		at += m.length
	}
	keep := make([]run, len(kept.extents))
	for i, x := range kept.extents {
		keep[i] = run{x.start, uint64(x.length)}
	}
	slices.SortFunc(keep, func(a, b run) int { return cmp.Compare(a.start, b.start) })
	err := e.fs.eachRun(n, func(start, count uint64) error {
		for end := start + count; start < end; {
			i, found := slices.BinarySearchFunc(keep, start, run.where)
			if found {
				start = keep[i].end()
				continue
			}
			next := end
			if i < len(keep) {
				next = min(end, keep[i].start)
			}
			if err := e.blocks.free(start, next-start); err != nil {
				return err
			}
			start = next
		}
		return nil
	})
	if err != nil {
		return err
	}
	return e.changeInode(n.ino, func(raw []byte) error {
		le.PutUint32(raw[disk.InodeDtimeAt:], 0)
		return e.setContent(raw, n, kept)
	})
}
