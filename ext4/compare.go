package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"time"

	"banger/ext4/internal/disk"
)

// A Tree is what Compare looks at. [*FS] is one. Paths are as for an FS; the
// Sys method of an [fs.FileInfo] gives a [*Stat], of which Compare does not
// look at Ino (but for telling which names are links of one object) and
// AllocatedBytes.
type Tree interface {
	// Open opens a regular file. If it is a [DataFinder], Compare does not
	// read its holes.
	Open(path string) (fs.File, error)
	// Lstat describes what path names, a symlink as such.
	Lstat(path string) (fs.FileInfo, error)
	ReadLink(path string) (string, error)
	// ReadDir lists a directory in the order of names.
	ReadDir(path string) ([]fs.DirEntry, error)
	// Xattrs gives all xattrs of what path names, a symlink's own; ACLs
	// have the form of the system call.
	Xattrs(path string) (map[string][]byte, error)
}

// A DataFinder tells where a file has data, as [FileReader.NextData] does.
type DataFinder interface {
	io.ReaderAt
	NextData(offset int64) (start, end int64, err error)
}

// Aspect is something that Compare compares.
type Aspect uint

const (
	DiffName    Aspect = 1 << iota // which names there are
	DiffType                       // of each
	DiffMode                       // the twelve permission bits
	DiffOwner                      // user and group
	DiffContent                    // of regular files, targets of symlinks
	DiffMtime                      // to the nanosecond
	DiffAtime                      //
	DiffCtime                      //
	DiffCrtime                     //
	DiffXattrs                     // names and values
	DiffLinks                      // which names are one object, and how many it has
	DiffDevice                     // numbers of devices
	DiffHoles                      // that files have data in the same blocks of 4 KiB
	lastAspect

	// DiffAll is all that makes two trees the same to whoever uses them.
	DiffAll = (lastAspect - 1) &^ (DiffAtime | DiffCtime | DiffCrtime | DiffHoles)
)

var aspectNames = [...]string{"name", "type", "mode", "owner", "content", "mtime", "atime", "ctime", "crtime", "xattrs", "links", "device", "holes"}

// String names the first aspect in a.
func (a Aspect) String() string {
	for i, name := range aspectNames {
		if a&(1<<i) != 0 {
			return name
		}
	}
	return "nothing"
}

// A Difference is one thing that is not the same in two trees. A and B say
// what it is in each, quoted and cut to a readable length.
type Difference struct {
	Path   string
	Aspect Aspect
	A, B   string
}

func (d Difference) String() string {
	return fmt.Sprintf("%q: %s: %s, not %s", d.Path, d.Aspect, d.A, d.B)
}

// Compare calls report for each difference between two trees in the aspects
// asked for, in the order of paths, until it gives false. A directory that is
// in one tree only is one difference. The error is the first one met in reading;
// it names the tree, a or b, and the path.
//
// Two trees of n objects take time for reading both and memory for n numbers.
func Compare(a, b Tree, aspects Aspect, report func(Difference) bool) error {
	c := &comparison{a: a, b: b, aspects: aspects, report: report, links: make(map[uint32]string), back: make(map[uint32]string)}
	if err := c.object("."); err != nil && err != errEnough {
		return err
	}
	return nil
}

type comparison struct {
	a, b    Tree
	aspects Aspect
	report  func(Difference) bool
	// links and back give the first path of objects with several names: of
	// a and of b, by number.
	links, back map[uint32]string
}

var errEnough = errors.New("enough")

// differ reports what differs, in an aspect that was asked for.
func (c *comparison) differ(path string, aspect Aspect, a, b any) error {
	if c.aspects&aspect == 0 || c.report(Difference{path, aspect, shown(a), shown(b)}) {
		return nil
	}
	return errEnough
}

// shown is how a value stands in a Difference.
func shown(v any) string {
	const most = 64
	var s string
	cut := false
	switch v := v.(type) {
	case string:
		s = fmt.Sprintf("%.*q", most, v)
		cut = len(v) > most
	case []byte:
		s = fmt.Sprintf("%.*q", most, v)
		cut = len(v) > most
	case nil:
		s = "none"
	case verbatim:
		s = string(v)
	default:
		s = fmt.Sprint(v)
	}
	if cut {
		s += "..."
	}
	return s
}

// verbatim is text of Compare's own.
type verbatim string

// lookUp reads what both trees have at a path.
func (c *comparison) lookUp(path string) (a, b *Stat, err error) {
	get := func(tree Tree, which string) *Stat {
		info, e := tree.Lstat(path)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("tree %s: %w", which, e))
			return nil
		}
		s, ok := info.Sys().(*Stat)
		if !ok {
			err = errors.Join(err, fmt.Errorf("tree %s: %q: Sys gives %T, not a *Stat", which, path, info.Sys()))
		}
		return s
	}
	return get(c.a, "a"), get(c.b, "b"), err
}

// object compares what both trees have at a path.
func (c *comparison) object(path string) error {
	a, b, err := c.lookUp(path)
	if err != nil {
		return err
	}
	const permissions = 0o7777
	kind := a.Mode & disk.TypeMask
	if kind != b.Mode&disk.TypeMask {
		return c.differ(path, DiffType, verbatim(fileMode(a.Mode).Type().String()), verbatim(fileMode(b.Mode).Type().String()))
	}
	if a.Mode != b.Mode {
		octal := func(m uint16) verbatim { return verbatim(fmt.Sprintf("%04o", m&permissions)) }
		err = errors.Join(err, c.differ(path, DiffMode, octal(a.Mode), octal(b.Mode)))
	}
	if a.UID != b.UID || a.GID != b.GID {
		owner := func(s *Stat) verbatim { return verbatim(fmt.Sprintf("%d:%d", s.UID, s.GID)) }
		err = errors.Join(err, c.differ(path, DiffOwner, owner(a), owner(b)))
	}
	for _, t := range [...]struct {
		aspect Aspect
		a, b   time.Time
	}{{DiffMtime, a.Mtime, b.Mtime}, {DiffAtime, a.Atime, b.Atime}, {DiffCtime, a.Ctime, b.Ctime}, {DiffCrtime, a.Crtime, b.Crtime}} {
		if !t.a.Equal(t.b) {
			when := func(t time.Time) verbatim { return verbatim(t.UTC().Format(time.RFC3339Nano)) }
			err = errors.Join(err, c.differ(path, t.aspect, when(t.a), when(t.b)))
		}
	}
	err = errors.Join(err, c.linksOf(path, a, b))
	if kind == disk.TypeChar || kind == disk.TypeBlock {
		if a.Major != b.Major || a.Minor != b.Minor {
			number := func(s *Stat) verbatim { return verbatim(fmt.Sprintf("%d:%d", s.Major, s.Minor)) }
			err = errors.Join(err, c.differ(path, DiffDevice, number(a), number(b)))
		}
	}
	if err == nil && c.aspects&DiffXattrs != 0 {
		err = c.xattrs(path)
	}
	if err != nil {
		if errors.Is(err, errEnough) {
			return errEnough
		}
		return err
	}
	switch kind {
	case disk.TypeDir:
		return c.directory(path)
	case disk.TypeSymlink:
		if c.aspects&DiffContent == 0 {
			return nil
		}
		ta, errA := c.a.ReadLink(path)
		tb, errB := c.b.ReadLink(path)
		if err := both(errA, errB); err != nil {
			return err
		}
		if ta != tb {
			return c.differ(path, DiffContent, ta, tb)
		}
	case disk.TypeRegular:
		if c.aspects&(DiffContent|DiffHoles) == 0 {
			return nil
		}
		if first := c.links[a.Ino]; a.Links > 1 && b.Links > 1 && first != path && first == c.back[b.Ino] {
			return nil // was compared under its first name
		}
		return c.content(path, a.SizeBytes, b.SizeBytes)
	}
	return nil
}

// both names the tree an error comes from.
func both(a, b error) error {
	if a != nil {
		a = fmt.Errorf("tree a: %w", a)
	}
	if b != nil {
		b = fmt.Errorf("tree b: %w", b)
	}
	return errors.Join(a, b)
}

// linksOf compares what other names an object has. The count of a directory
// says how many directories are in it, which its names say too; and file
// systems do not agree on it.
func (c *comparison) linksOf(path string, a, b *Stat) error {
	if a.Mode&disk.TypeMask == disk.TypeDir {
		return nil
	}
	var err error
	if a.Links != b.Links {
		err = c.differ(path, DiffLinks, a.Links, b.Links)
	}
	first := func(seen map[uint32]string, s *Stat) string {
		if s.Links <= 1 {
			return path
		}
		if seen[s.Ino] == "" {
			seen[s.Ino] = path
		}
		return seen[s.Ino]
	}
	fa, fb := first(c.links, a), first(c.back, b)
	if err == nil && fa != fb {
		linkTo := func(first string) any {
			if first == path {
				return verbatim("the first link")
			}
			return verbatim(fmt.Sprintf("a link to %q", first))
		}
		err = c.differ(path, DiffLinks, linkTo(fa), linkTo(fb))
	}
	return err
}

func (c *comparison) xattrs(path string) error {
	xa, errA := c.a.Xattrs(path)
	xb, errB := c.b.Xattrs(path)
	if err := both(errA, errB); err != nil {
		return err
	}
	names := maps.Clone(xa)
	if names == nil {
		names = make(map[string][]byte)
	}
	maps.Copy(names, xb)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		va, inA := xa[name]
		vb, inB := xb[name]
		if inA == inB && bytes.Equal(va, vb) {
			continue
		}
		value := func(v []byte, there bool) verbatim {
			if !there {
				return verbatim(fmt.Sprintf("no %q", name))
			}
			return verbatim(fmt.Sprintf("%q=%s", name, shown(v)))
		}
		if err := c.differ(path, DiffXattrs, value(va, inA), value(vb, inB)); err != nil {
			return err
		}
	}
	return nil
}

// directory compares names, then what they name.
func (c *comparison) directory(path string) error {
	la, errA := c.a.ReadDir(path)
	lb, errB := c.b.ReadDir(path)
	if err := both(errA, errB); err != nil {
		return err
	}
	for len(la) > 0 || len(lb) > 0 {
		var name string
		inA, inB := len(la) > 0, len(lb) > 0
		switch {
		case inA && inB && la[0].Name() < lb[0].Name():
			inB = false
		case inA && inB && la[0].Name() > lb[0].Name():
			inA = false
		}
		if inA {
			name, la = la[0].Name(), la[1:]
		}
		if inB {
			name, lb = lb[0].Name(), lb[1:]
		}
		full := name
		if path != "." {
			full = path + "/" + name
		}
		there := func(in bool) verbatim {
			if in {
				return "there"
			}
			return "missing"
		}
		var err error
		if inA && inB {
			err = c.object(full)
		} else {
			err = c.differ(full, DiffName, there(inA), there(inB))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// content compares the bytes of two files, but not those of holes in both.
func (c *comparison) content(path string, sizeA, sizeB int64) error {
	if sizeA != sizeB {
		return c.differ(path, DiffContent, verbatim(fmt.Sprintf("%d bytes", sizeA)), verbatim(fmt.Sprintf("%d bytes", sizeB)))
	}
	fa, errA := c.a.Open(path)
	if errA == nil {
		defer fa.Close()
	}
	fb, errB := c.b.Open(path)
	if errB == nil {
		defer fb.Close()
	}
	if err := both(errA, errB); err != nil {
		return err
	}
	at, err := firstDifference(fa, fb, sizeA)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	if at >= 0 {
		return c.differ(path, DiffContent, verbatim(fmt.Sprintf("one byte at %d", at)), verbatim("another"))
	}
	da, okA := fa.(DataFinder)
	db, okB := fb.(DataFinder)
	if c.aspects&DiffHoles == 0 || !okA || !okB {
		return nil
	}
	at, inA, err := firstHole(da, db, sizeA)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	if at >= 0 {
		what := map[bool]verbatim{true: verbatim(fmt.Sprintf("a hole at %d", at)), false: "data"}
		return c.differ(path, DiffHoles, what[inA], what[!inA])
	}
	return nil
}

// ranges walks the data of a file in pieces of whole blocks of 4 KiB.
type ranges struct {
	file       DataFinder
	size       int64
	start, end int64 // of the current piece; start == size at the end
}

const rangeBytes = 4096

func (r *ranges) next() error {
	from := r.end
	start, end, err := r.file.NextData(from)
	if err == io.EOF {
		r.start, r.end = r.size, r.size
		return nil
	}
	if err != nil {
		return err
	}
	r.start = max(start/rangeBytes*rangeBytes, from)
	for {
		r.end = min((end+rangeBytes-1)/rangeBytes*rangeBytes, r.size)
		if r.end == r.size {
			return nil
		}
		// Smaller blocks may go on within the same 4 KiB, or right after.
		start, end, err = r.file.NextData(r.end)
		if err == io.EOF || err == nil && start/rangeBytes*rangeBytes > r.end {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// firstHole finds where one file has a hole and the other has data, or gives
// -1.
func firstHole(a, b DataFinder, size int64) (at int64, inA bool, err error) {
	ra, rb := &ranges{file: a, size: size}, &ranges{file: b, size: size}
	for {
		if err := both(ra.next(), rb.next()); err != nil {
			return 0, false, err
		}
		switch {
		case ra.start != rb.start:
			return min(ra.start, rb.start), ra.start > rb.start, nil
		case ra.end != rb.end:
			return min(ra.end, rb.end), ra.end < rb.end, nil
		case ra.start == size:
			return -1, false, nil
		}
	}
}

// firstDifference gives the offset of the first byte that differs, or -1.
func firstDifference(a, b fs.File, size int64) (int64, error) {
	const chunk = 256 << 10
	ba, bb := make([]byte, min(chunk, size)), make([]byte, min(chunk, size))
	da, okA := a.(DataFinder)
	db, okB := b.(DataFinder)
	if !okA || !okB {
		for at := int64(0); at < size; at += int64(len(ba)) {
			n := min(int64(len(ba)), size-at)
			_, errA := io.ReadFull(a, ba[:n])
			_, errB := io.ReadFull(b, bb[:n])
			if err := both(errA, errB); err != nil {
				return 0, err
			}
			if i := unequal(ba[:n], bb[:n]); i >= 0 {
				return at + int64(i), nil
			}
		}
		return -1, nil
	}
	// What is data in either: reading a hole of the other gives zeros.
	for at := int64(0); at < size; {
		start, end := size, size
		for _, d := range [...]DataFinder{da, db} {
			s, e, err := d.NextData(at)
			if err == io.EOF {
				continue
			}
			if err != nil {
				return 0, err
			}
			if s < start {
				start, end = s, e
			}
		}
		for at = start; at < end; {
			n := min(int64(len(ba)), end-at)
			if err := both(readFullAt(da, ba[:n], at), readFullAt(db, bb[:n], at)); err != nil {
				return 0, err
			}
			if i := unequal(ba[:n], bb[:n]); i >= 0 {
				return at + int64(i), nil
			}
			at += n
		}
	}
	return -1, nil
}

func readFullAt(r io.ReaderAt, p []byte, offset int64) error {
	n, err := r.ReadAt(p, offset)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		return io.ErrUnexpectedEOF
	}
	return err
}

// unequal gives the first index at which two slices of a length differ, or -1.
func unequal(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}
