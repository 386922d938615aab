package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"strings"

	"banger/ext4/internal/disk"
)

// A Writer makes one file system. It is not safe for concurrent use.
//
// After an error of the File every call fails with it. After an error of
// Place's reader or of Add's arguments the Writer goes on as if that call had
// not been made.
type Writer struct {
	out       *output
	maxBlocks uint64
	gdtRoom   uint64   // blocks kept free for descriptors after each superblock
	supers    []uint64 // first blocks of groups with a superblock below maxBlocks
	nextSuper int      // supers[nextSuper] is the first one not below cursor
	cursor    uint64   // where the next data block goes
	placed    uint64   // data blocks in all contents, dead or not
	live      uint64   // those of contents that are not dead

	nodes    table[node]
	names    names
	extras   table[extra]
	contents table[storedContent]
	xattrs   table[storedXattrs]
	ea       eaInodes
	lastPath string // directory of the last Add
	lastDir  uint32 // in dirs
	finished bool
	probe    [1]byte    // reads what should not be there
	surveyed *survey    // of the tree as it is, or nil
	scratch  []dirEntry // of one block of a directory
}

// NewWriter starts an image in f, whose content is lost. The caller keeps f:
// the Writer neither syncs nor closes it.
func NewWriter(f File, opts Options) (*Writer, error) {
	size := opts.MaxSizeBytes
	if size == 0 {
		size = defaultMaxSizeBytes
	}
	if size < MinImageBytes || size > MaxImageBytes {
		return nil, fmt.Errorf("largest image size %d: not between %d and %d", size, MinImageBytes, int64(MaxImageBytes))
	}
	if !isEmpty(f) {
		if err := f.Truncate(0); err != nil {
			return nil, fmt.Errorf("image: %w", err)
		}
	}
	w := &Writer{out: newOutput(f), maxBlocks: uint64(size) / disk.BlockSize}
	groups := ceilDiv(w.maxBlocks, disk.BlocksPerGroup)
	w.gdtRoom = ceilDiv(groups, disk.DescsPerBlock)
	for g := range groups {
		if hasSuper(g) {
			w.supers = append(w.supers, g*disk.BlocksPerGroup)
		}
	}
	w.names.seed = maphash.MakeSeed()
	w.nodes.add(node{mode: disk.TypeDir | 0o755, a: w.names.dirs.add(dir{node: rootNode, parent: rootNode})})
	w.nodes.add(node{mode: disk.TypeDir | 0o700, a: w.names.dirs.add(dir{node: madeNode, parent: rootNode})})
	w.names.link(rootDir, lostFoundName, madeNode)
	w.skipSuper()
	return w, nil
}

// isEmpty tells whether f is known to have no bytes. Truncating such a file is
// not free: ext4 then writes all of it out when it is closed (auto_da_alloc).
func isEmpty(f File) bool {
	s, ok := f.(interface{ Stat() (fs.FileInfo, error) })
	if !ok {
		return false
	}
	info, err := s.Stat()
	return err == nil && info.Mode().IsRegular() && info.Size() == 0
}

// hasSuper tells whether a group holds a superblock under sparse_super.
func hasSuper(group uint64) bool {
	if group <= 1 {
		return true
	}
	for _, base := range [...]uint64{3, 5, 7} {
		n := base
		for n < group {
			n *= base
		}
		if n == group {
			return true
		}
	}
	return false
}

// skipSuper moves the cursor past a superblock and its descriptors, if it
// stands at one, and gives the number of blocks up to the next.
func (w *Writer) skipSuper() uint64 {
	if w.nextSuper < len(w.supers) && w.cursor == w.supers[w.nextSuper] {
		w.cursor += 1 + w.gdtRoom
		w.nextSuper++
	}
	end := w.maxBlocks
	if w.nextSuper < len(w.supers) {
		end = w.supers[w.nextSuper]
	}
	if w.cursor >= end {
		return 0
	}
	return end - w.cursor
}

func (w *Writer) usable() error {
	if w.finished {
		return errors.New("image: already finished")
	}
	return w.out.err
}

var zeros [256 * disk.BlockSize]byte

// granule is the smallest hole, in blocks, that a file with so many extents
// still gets. It grows, so that a file of alternating blocks cannot cost an
// extent (16 bytes of memory) for each of them.
func granule(extents int) int { return 1 << min(extents/4096, 8) }

// Place streams exactly sizeBytes from r into the image; fewer or more are an
// error. Blocks of zeros become holes. Content that is in no Inode when Finish
// is called is dropped.
func (w *Writer) Place(r io.Reader, sizeBytes int64) (*Content, error) {
	if err := w.usable(); err != nil {
		return nil, err
	}
	if sizeBytes < 0 || sizeBytes > MaxFileBytes {
		return nil, fmt.Errorf("content of %d bytes: not between 0 and %d", sizeBytes, int64(MaxFileBytes))
	}
	c := newContent(w, sizeBytes)
	err := w.stream(c, r)
	w.placed += c.blocks()
	if err != nil {
		return nil, err
	}
	w.live += c.blocks()
	return c, nil
}

func (w *Writer) stream(c *Content, r io.Reader) error {
	// Reads smaller than this are not worth saving a flush for.
	const goodRead = 64 << 10
	logical := uint32(0)
	holes, _ := r.(holeSkipper)
	for left := c.size; left > 0; {
		if holes != nil {
			n, err := holes.skipHole()
			if err != nil {
				return readError(c.size, c.size-left, err)
			}
			if left -= n; left == 0 {
				break
			}
			logical += uint32(n / disk.BlockSize)
		}
		run := w.skipSuper()
		if run == 0 {
			return fmt.Errorf("content of %d bytes: %w: the largest size allowed is %d", c.size, ErrNoSpace, w.maxBlocks*disk.BlockSize)
		}
		unit := granule(len(c.extents)) * disk.BlockSize
		whole := ceilDiv(left, disk.BlockSize) * disk.BlockSize
		buf, err := w.out.room(w.cursor, int(min(whole, int64(max(goodRead, unit)))))
		if err != nil {
			return err
		}
		n := int(min(int64(len(buf)), left, int64(min(run, outputBytes/disk.BlockSize))*disk.BlockSize))
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return readError(c.size, c.size-left, err)
		}
		left -= int64(n)
		padded := ceilDiv(n, disk.BlockSize) * disk.BlockSize
		clear(buf[n:padded])
		kept := 0
		for at := 0; at < padded; at += unit {
			part := buf[at:min(at+unit, padded)]
			blocks := uint32(len(part) / disk.BlockSize)
			if !bytes.Equal(part, zeros[:len(part)]) {
				if at != kept {
					copy(buf[kept:], part)
				}
				c.add(logical, w.cursor, blocks)
				w.cursor += uint64(blocks)
				kept += len(part)
			}
			logical += blocks
		}
		w.out.commit(kept)
	}
	switch n, err := io.ReadFull(r, w.probe[:]); {
	case n > 0:
		return fmt.Errorf("content of %d bytes: input is longer", c.size)
	case err != io.EOF:
		return fmt.Errorf("content of %d bytes: after its end: %w", c.size, err)
	}
	return nil
}

// A holeSkipper is a reader that knows where it has zeros only. Between reads
// of whole blocks skipHole goes over those that begin there, as many whole
// blocks as they are or all up to the end, and says how many bytes that were.
type holeSkipper interface {
	skipHole() (bytes int64, err error)
}

// placeWhole places bytes without looking for holes.
func (w *Writer) placeWhole(c *Content, b []byte) error {
	for logical := uint32(0); len(b) > 0; logical++ {
		if w.skipSuper() == 0 {
			return fmt.Errorf("%w: the largest size allowed is %d", ErrNoSpace, w.maxBlocks*disk.BlockSize)
		}
		block, err := w.out.block(w.cursor)
		if err != nil {
			return err
		}
		b = b[copy(block, b):]
		c.add(logical, w.cursor, 1)
		w.cursor++
		w.placed++
	}
	return nil
}

func readError(size, before int64, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("content of %d bytes: input is shorter: %w", size, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("content of %d bytes: after %d: %w", size, before, err)
}

// Discard gives up content; its bytes will not be in the finished image.
// Discarding twice, or nil, or the content of an Inode that was added, does
// nothing.
func (w *Writer) Discard(c *Content) {
	if c == nil || c.state != contentFree || c.writer != w {
		return
	}
	w.live -= c.blocks()
	c.state, c.extents = contentDead, nil
}

// UsedBytes is the room taken by contents that are not discarded.
func (w *Writer) UsedBytes() int64 { return int64(w.live) * disk.BlockSize }

// Add gives n the name path: clean, relative to the root, separated by
// slashes, its parent added before it. "/", "." and "" are the root directory
// itself, whose attributes may be given once at any time.
//
// Names are arbitrary bytes but for slash and NUL; every refusal names the path.
func (w *Writer) Add(path string, n *Inode) error {
	if err := w.usable(); err != nil {
		return err
	}
	if err := w.add(path, n); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	w.surveyed = nil
	return nil
}

func (w *Writer) add(path string, in *Inode) error {
	if in.writer != nil && in.writer != w {
		return errors.New("inode belongs to another image")
	}
	if w.names.text.full() {
		return errors.New("too many names, targets and xattrs for one image")
	}
	if path == "" || path == "/" || path == "." {
		return w.setRoot(in)
	}
	parent, name, err := w.locate(path)
	if err != nil {
		return err
	}
	if in.writer != nil {
		n := w.nodes.at(in.node)
		switch {
		case n.isDir():
			return errors.New("a directory cannot have a second name")
		case n.links >= MaxLinks:
			return fmt.Errorf("more than %d links to one file", MaxLinks)
		}
		n.links++
		w.names.insert(parent, name, in.node)
		return nil
	}
	n, err := w.newNode(in)
	if err != nil {
		return err
	}
	if n.isDir() {
		d := w.names.dirs.at(parent)
		d.subdirs++
		n.a = w.names.dirs.add(dir{node: w.nodes.len(), parent: d.node})
	} else {
		n.links = 1
	}
	in.writer, in.node = w, w.nodes.add(n)
	w.names.insert(parent, name, in.node)
	return nil
}

func (w *Writer) setRoot(in *Inode) error {
	if in.writer != nil {
		return errors.New("inode has a name already")
	}
	if in.Mode&disk.TypeMask != disk.TypeDir {
		return errors.New("the root must be a directory")
	}
	n, err := w.newNode(in)
	if err != nil {
		return err
	}
	root := w.nodes.at(rootNode)
	n.a = root.a
	*root = n
	in.writer, in.node = w, rootNode
	return nil
}

// locate finds the directory, by its index in dirs, that a new path goes to.
func (w *Writer) locate(path string) (parent uint32, name string, err error) {
	parent = rootDir
	dir := ""
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		if dir, name = path[:i], path[i+1:]; dir == "" {
			return 0, "", errors.New("absolute path")
		}
	} else {
		name = path
	}
	if err := checkName(name); err != nil {
		return 0, "", err
	}
	if dir != "" && dir == w.lastPath {
		parent = w.lastDir
	} else if dir != "" {
		for part := range strings.SplitSeq(dir, "/") {
			if err := checkName(part); err != nil {
				return 0, "", err
			}
			child, ok := w.names.lookup(parent, part)
			switch {
			case !ok:
				return 0, "", fmt.Errorf("parent %q was not added", part)
			case !w.nodes.at(child).isDir():
				return 0, "", fmt.Errorf("parent %q is not a directory", part)
			}
			parent = w.nodes.at(child).a
		}
		w.lastPath, w.lastDir = strings.Clone(dir), parent
	}
	if _, ok := w.names.lookup(parent, name); ok {
		return 0, "", errors.New("exists already")
	}
	return parent, name, nil
}
