package ext4

import (
	"io"

	"banger/ext4/internal/disk"
)

// AddTree adds to w what src has at from, as at: a file, or a directory with
// all that is in it. Everything comes along as it is: content without its
// holes, owners, modes, times with the change and birth time, xattrs, devices,
// and links between names that are both in it. The parent of at was added
// before; "." adds the root's own attributes and its entries, but for a
// directory lost+found.
//
// A name that w has already is an error, as for Add.
func (w *Writer) AddTree(at string, src *FS, from string) error {
	n, err := src.resolve(from, false)
	if err != nil {
		return pathError("addtree", from, err)
	}
	t := &treeCopy{w: w, src: src, links: make(map[uint32]*Inode)}
	return t.add(at, from, n)
}

type treeCopy struct {
	w     *Writer
	src   *FS
	links map[uint32]*Inode // of objects with several names, by number in src
}

func (t *treeCopy) add(at, from string, n *inode) error {
	if in := t.links[n.ino]; in != nil {
		return t.w.Add(at, in)
	}
	in, err := t.describe(n)
	if err != nil {
		return pathError("addtree", from, err)
	}
	if err := t.w.Add(at, in); err != nil {
		t.w.Discard(in.Content)
		return err
	}
	if !n.isDir() {
		if n.links > 1 {
			t.links[n.ino] = in
		}
		return nil
	}
	list, err := t.src.list(n)
	if err != nil {
		return pathError("addtree", from, err)
	}
	for i := range list {
		e := &list[i]
		child, err := t.src.enter(n, e)
		if err != nil {
			return pathError("addtree", from, err)
		}
		if at == "." && e.name == lostFoundName && child.isDir() {
			continue
		}
		if err := t.add(join(at, e.name), join(from, e.name), child); err != nil {
			return err
		}
	}
	return nil
}

// describe makes an Inode of one that was read, with its content placed.
func (t *treeCopy) describe(n *inode) (*Inode, error) {
	s := t.src.stat(n)
	in := &Inode{
		Mode: s.Mode, UID: s.UID, GID: s.GID, Major: s.Major, Minor: s.Minor,
		Atime: s.Atime, Mtime: s.Mtime, Ctime: s.Ctime, Crtime: s.Crtime,
	}
	var err error
	if in.Xattrs, err = t.src.xattrs(n); err != nil {
		return nil, err
	}
	switch n.kind() {
	case disk.TypeSymlink:
		in.Target, err = t.src.target(n)
	case disk.TypeRegular:
		if n.size == 0 {
			break
		}
		var file *FileReader
		if file, err = t.src.openFile(n); err == nil {
			in.Content, err = t.w.Place(&dataReader{file: file}, int64(n.size))
		}
	}
	return in, err
}

// dataReader reads a file for a Writer, and spares it the holes.
type dataReader struct {
	file *FileReader
	end  int64 // of the data that the file is at
}

func (r *dataReader) Read(p []byte) (int, error) { return r.file.Read(p) }

func (r *dataReader) skipHole() (int64, error) {
	at := r.file.at
	if at < r.end {
		return 0, nil
	}
	start, end, err := r.file.NextData(at)
	if err == io.EOF {
		start, end = r.file.size(), r.file.size()
	} else if err != nil {
		return 0, err
	}
	if r.end = end; start < r.file.size() {
		start = max(start/disk.BlockSize*disk.BlockSize, at)
	}
	r.file.at = start
	return start - at, nil
}
