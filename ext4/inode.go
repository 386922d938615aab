package ext4

import (
	"errors"
	"fmt"
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
	// that the system call gives and takes. All of an inode's xattrs must
	// fit in 88 bytes of the inode and one block.
	Xattrs map[string][]byte
	// Content of a regular file, from Place; nil if it is empty.
	Content *Content

	writer *Writer
	node   *node
}

// node is what a Writer keeps of an Inode.
type node struct {
	mode         uint16
	timesSet     uint8 // bit i: times[i] is not Params.Time
	uid, gid     uint32
	links        uint32 // names of anything but a directory
	ino          uint32 // set by survey
	major, minor uint32
	times        [4]disk.Timestamp // atime, mtime, ctime, crtime
	target       string
	xattrs       *xattrSet
	content      *Content // of a file; of directories and symlinks while Finish runs
	dir          *directory
}

func (n *node) isDir() bool { return n.mode&disk.TypeMask == disk.TypeDir }

// longTarget tells whether a symlink's target takes a block of its own.
func (n *node) longTarget() bool { return len(n.target) > 59 }

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

// newNode checks an Inode and takes what is needed of it. Errors are reasons
// without a subject.
func newNode(in *Inode) (*node, error) {
	n := &node{mode: in.Mode, uid: in.UID, gid: in.GID}
	for i, t := range [...]time.Time{in.Atime, in.Mtime, in.Ctime, in.Crtime} {
		stamp, err := timestamp(t)
		if err != nil {
			return nil, fmt.Errorf("time %s: %w", t.UTC().Format(time.RFC3339), err)
		}
		if !t.IsZero() {
			n.times[i] = stamp
			n.timesSet |= 1 << i
		}
	}
	kind := in.Mode & disk.TypeMask
	if in.Content != nil && kind != disk.TypeRegular {
		return nil, errors.New("has content but is not a regular file")
	}
	if in.Target != "" && kind != disk.TypeSymlink {
		return nil, errors.New("has a target but is not a symlink")
	}
	switch kind {
	case disk.TypeRegular, disk.TypeFIFO, disk.TypeSocket:
		n.content = in.Content
	case disk.TypeDir:
		n.dir = &directory{entries: make(map[string]*node)}
	case disk.TypeSymlink:
		switch {
		case in.Target == "":
			return nil, errors.New("symlink target: empty")
		case len(in.Target) > MaxTargetBytes:
			return nil, fmt.Errorf("symlink target: %d bytes, more than %d", len(in.Target), MaxTargetBytes)
		case strings.IndexByte(in.Target, 0) >= 0:
			return nil, errors.New("symlink target: holds a NUL")
		}
		n.target = strings.Clone(in.Target)
	case disk.TypeChar, disk.TypeBlock:
		if in.Major >= 1<<12 || in.Minor >= 1<<20 {
			return nil, fmt.Errorf("device %d:%d: more than 12 and 20 bits", in.Major, in.Minor)
		}
		n.major, n.minor = in.Major, in.Minor
	default:
		return nil, fmt.Errorf("mode %#o: no file type known to ext4", in.Mode)
	}
	var err error
	n.xattrs, err = writerGeometry.encodeXattrs(in.Xattrs, xattrBodySize)
	return n, err
}

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

// directory is what a node has when it is one.
type directory struct {
	parent  *node
	entries map[string]*node // without the dot entries
	subdirs int
	layout  *dirLayout // set by survey
}

// links is the link count as the kernel would have it.
func (d *directory) links() uint32 {
	if n := uint32(d.subdirs) + 2; n < MaxLinks {
		return n
	}
	return 1 // dir_nlink: too many to count
}

// lostFoundBlocks is what mke2fs gives lost+found, so that e2fsck need
// not allocate when it has something to put there.
const lostFoundBlocks = 4
