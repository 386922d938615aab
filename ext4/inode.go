package ext4

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"banger/ext4/internal/disk"
)

// An Inode describes one object of the file system. It is read by Add and
// may be changed or forgotten afterwards; added under a second name the same
// *Inode is a hard link to the first, whatever its fields say by then.
// An Inode belongs to the Writer it was first added to.
type Inode struct {
	// Mode holds the file type (S_IFMT) and the twelve permission bits.
	Mode     uint16
	UID, GID uint32
	// Times have nanoseconds and lie between 1901-12-13 and 2446-05-10.
	// The zero Time means Params.Time. The kernel is right about all of
	// them; e2fsck takes 2310-04-04 to 2378-04-22 for times before 1970,
	// as ancient kernels wrote them, and offers to change them.
	Atime, Mtime, Ctime, Crtime time.Time
	// Target of a symlink, 1 to MaxTargetBytes bytes without NUL.
	Target string
	// Major (12 bits) and Minor (20 bits) of a device.
	Major, Minor uint32
	// Xattrs by full name. The value of a system.posix_acl_* is the one
	// that the system call gives and takes. 88 bytes lie in the inode, then
	// one block; where those are too small, the largest values lie in inodes
	// of their own (the ea_inode feature), and only names and small values
	// must fit. A value has at most MaxXattrBytes.
	Xattrs map[string][]byte
	// Content of a regular file, from Place; nil if it is empty.
	Content *Content

	writer *Writer // that it was added to
	node   uint32  // there
}

// errTimeRange is part of the message of every refused time.
var errTimeRange = errors.New("not between 1901-12-13 and 2446-05-10")

func timestamp(t time.Time) (disk.Timestamp, error) {
	if t.IsZero() {
		return disk.Timestamp{}, nil
	}
	sec := t.Unix()
	if sec < disk.MinTime || sec > disk.MaxTime {
		return disk.Timestamp{}, errTimeRange
	}
	return disk.MakeTimestamp(sec, uint32(t.Nanosecond())), nil
}

// check refuses what no inode can be, whatever file system it is for. The
// times are atime, mtime, ctime and crtime. Errors are reasons without a
// subject.
func (in *Inode) check() (times [4]disk.Timestamp, err error) {
	for i, t := range [...]time.Time{in.Atime, in.Mtime, in.Ctime, in.Crtime} {
		if times[i], err = timestamp(t); err != nil {
			return times, fmt.Errorf("time %s: %w", t.UTC().Format(time.RFC3339), err)
		}
	}
	kind := in.Mode & disk.TypeMask
	if in.Content != nil && kind != disk.TypeRegular {
		return times, errors.New("has content but is not a regular file")
	}
	if in.Target != "" && kind != disk.TypeSymlink {
		return times, errors.New("has a target but is not a symlink")
	}
	switch kind {
	case disk.TypeRegular, disk.TypeDir, disk.TypeFIFO, disk.TypeSocket:
	case disk.TypeSymlink:
		switch {
		case in.Target == "":
			return times, errors.New("symlink target: empty")
		case len(in.Target) > MaxTargetBytes:
			return times, fmt.Errorf("symlink target: %d bytes, more than %d", len(in.Target), MaxTargetBytes)
		case strings.IndexByte(in.Target, 0) >= 0:
			return times, errors.New("symlink target: holds a NUL")
		}
	case disk.TypeChar, disk.TypeBlock:
		if in.Major >= 1<<12 || in.Minor >= 1<<20 {
			return times, fmt.Errorf("device %d:%d: more than 12 and 20 bits", in.Major, in.Minor)
		}
	default:
		return times, fmt.Errorf("mode %#o: no file type known to ext4", in.Mode)
	}
	return times, nil
}

// newNode checks an Inode and keeps what is needed of it; that of a directory
// has no index in dirs yet. Errors are reasons without a subject, and leave
// the Writer as it was.
func (w *Writer) newNode(in *Inode) (node, error) {
	n := node{mode: in.Mode, uid: in.UID, gid: in.GID}
	times, err := in.check()
	if err != nil {
		return n, err
	}
	rare := extra{times: times}
	n.mtime = times[1]
	timesDiffer := false
	for i, t := range [...]time.Time{in.Atime, in.Mtime, in.Ctime, in.Crtime} {
		if !t.IsZero() {
			n.extra |= 1 << (extraBits + i)
			timesDiffer = timesDiffer || times[i] != n.mtime
		}
	}
	switch in.Mode & disk.TypeMask {
	case disk.TypeRegular:
		if c := in.Content; c != nil {
			switch {
			case c.writer != w:
				return n, errors.New("content belongs to another image")
			case c.state == contentDead:
				return n, errors.New("content was discarded")
			case c.state == contentOwned:
				return n, errors.New("content belongs to another file")
			}
		}
	case disk.TypeChar, disk.TypeBlock:
		n.a, n.b = in.Major, in.Minor
	}
	fast := in.Target != "" && len(in.Target) <= maxFastTarget
	set, err := writerGeometry.encodeXattrsOf(fast, in.Xattrs, xattrBodySize)
	if err != nil {
		return n, err
	}
	if w.nodes.len() >= maxNodes || w.extras.len() >= extraMask-1 {
		return n, errors.New("too many inodes for one image")
	}
	if set != nil {
		if rare.xattrs, err = w.keepXattrs(set); err != nil {
			return n, err
		}
	}
	// Nothing is refused from here on.
	if in.Target != "" {
		n.a, n.b = w.names.text.put(in.Target), uint32(len(in.Target))
	}
	if c := in.Content; c != nil {
		if start, ok := c.plain(); ok {
			n.a, n.b = start, uint32(c.size)
		} else {
			rare.content = w.contents.add(storedContent{c.size, slices.Clone(c.extents)}) + 1
		}
		c.state, c.extents = contentOwned, nil
	}
	if timesDiffer || rare.xattrs != 0 || rare.content != 0 {
		n.extra |= w.extras.add(rare) + 1
	}
	return n, nil
}

// maxNodes leaves room for the inodes that nobody adds: those with a fixed
// number, lost+found, and one for each of the largest number of EA inodes.
const maxNodes = 1<<32 - 1<<20

// checkName refuses names that no directory entry can have.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("empty name in path")
	case name == "." || name == "..":
		return errors.New("dot name in path")
	case len(name) > MaxNameBytes:
		return fmt.Errorf("name of %d bytes, more than %d", len(name), MaxNameBytes)
	case strings.IndexByte(name, 0) >= 0:
		return errors.New("name holds a NUL")
	}
	return nil
}

// xattrBodySize is what an inode of the Writer has behind its fixed fields.
const xattrBodySize = disk.InodeSize - disk.GoodOldInode - disk.ExtraIsize

// lostFoundBlocks is what mke2fs gives lost+found, so that e2fsck need
// not allocate when it has something to put there.
const lostFoundBlocks = 4
