package oci

import (
	"archive/tar"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
)

const (
	paxSchilyXattr     = "SCHILY.xattr."
	paxLibarchiveXattr = "LIBARCHIVE.xattr."    // URL-encoded name, base64 value
	paxSELinux         = "RHT.security.selinux" // GNU tar: security.selinux without its NUL
)

var errCutShort = errors.New("the tar archive is cut short")

// readTar feeds every entry of one tar to add and reads r to its end, so that
// who hashes the stream sees all of it. trailing is how many bytes other than
// zero came after the end of the archive. ended tells whether the end was
// marked or the stream just stopped between two entries.
func readTar(r io.Reader, add addFunc) (trailing int64, ended bool, err error) {
	mark := &endMark{r: r}
	tr := tar.NewReader(mark)
	var e entry
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, false, tarError(mark, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			// git-archive writes one with a comment. What is about all the files that
			// follow cannot be applied, and must not be passed over.
			for k := range h.PAXRecords {
				if k != "comment" {
					return 0, false, fmt.Errorf("global header with %q, which is not supported", clip(k))
				}
			}
			continue
		}
		if err := entryOf(&e, h); err != nil {
			return 0, false, entryError(h.Name, err)
		}
		if err := add(&e, tr); err != nil {
			return 0, false, tarError(mark, err)
		}
	}
	ended = mark.zeros
	trailing, err = drain(mark.r)
	return trailing, ended, err
}

// tarError prefers what broke the stream over what the parser made of it.
func tarError(m *endMark, err error) error {
	if m.err != nil && m.err != io.EOF {
		return m.err
	}
	switch {
	case errors.Is(err, tar.ErrHeader):
		return errors.New("not a tar archive, or a damaged one")
	case errors.Is(err, tar.ErrFieldTooLong):
		return errors.New("a header field of the tar archive is longer than 1 MiB") // archive/tar's limit
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errCutShort
	}
	return err
}

// endMark remembers whether the last block read was zeros.
type endMark struct {
	r     io.Reader
	zeros bool
	err   error
}

func (m *endMark) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if n > 0 {
		m.zeros = n <= 512 && allZero(p[:n])
	}
	if err != nil {
		m.err = err
	}
	return n, err
}

func allZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// drain reads r to its end and counts the bytes that are not zero.
func drain(r io.Reader) (nonZero int64, err error) {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		for _, c := range buf[:n] {
			if c != 0 {
				nonZero++
			}
		}
		if err == io.EOF {
			return nonZero, nil
		}
		if err != nil {
			return nonZero, err
		}
	}
}

// entryOf translates a header. Checks of values are the builder's.
func entryOf(e *entry, h *tar.Header) error {
	*e = entry{
		name: h.Name, mode: h.Mode, uid: int64(h.Uid), gid: int64(h.Gid), major: h.Devmajor, minor: h.Devminor,
		mtime: timeOf(h.ModTime),
	}
	if !h.AccessTime.IsZero() {
		t := timeOf(h.AccessTime)
		e.atime = &t
	}
	if !h.ChangeTime.IsZero() {
		t := timeOf(h.ChangeTime)
		e.ctime = &t
	}
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		e.typ, e.size = modeRegular, h.Size
	case tar.TypeLink:
		e.target = h.Linkname
		return nil
	case tar.TypeSymlink:
		e.typ, e.target = modeSymlink, h.Linkname
	case tar.TypeChar:
		e.typ = modeChar
	case tar.TypeBlock:
		e.typ = modeBlock
	case tar.TypeDir:
		e.typ = modeDir
	case tar.TypeFifo:
		e.typ = modeFIFO
	default:
		return fmt.Errorf("tar entry of type %q, which is not supported", h.Typeflag)
	}
	if err := paxXattrs(e, h.PAXRecords); err != nil {
		return err
	}
	if err := e.applyACLs(h.PAXRecords); err != nil {
		return err
	}
	for k := range h.PAXRecords {
		if !knownRecord(k) {
			e.notes = append(e.notes, "PAX records of no meaning to Linux left out")
			break
		}
	}
	return nil
}

// knownRecord says whether a PAX record was applied, or says nothing that a
// file system could hold.
func knownRecord(k string) bool {
	for _, prefix := range []string{paxSchilyXattr, paxLibarchiveXattr, "GNU.sparse."} {
		if strings.HasPrefix(k, prefix) {
			return true
		}
	}
	switch k {
	case "path", "linkpath", "size", "uid", "gid", "uname", "gname", "mtime", "atime", "ctime", // POSIX pax
		"charset", "hdrcharset", "comment",
		"SCHILY.acl.access", "SCHILY.acl.default", paxSELinux,
		"SCHILY.devmajor", "SCHILY.devminor", "SCHILY.dev", "SCHILY.ino", "SCHILY.nlink", "SCHILY.realsize", "SCHILY.filetype",
		"LIBARCHIVE.creationtime":
		return true
	}
	return false
}

// paxXattrs collects xattrs in both spellings; where both are there (libarchive
// writes both) the plain one counts.
func paxXattrs(e *entry, records map[string]string) error {
	for k, v := range records {
		if name, ok := strings.CutPrefix(k, paxSchilyXattr); ok {
			e.setXattr(name, []byte(v))
			continue
		}
		coded, ok := strings.CutPrefix(k, paxLibarchiveXattr)
		if !ok {
			continue
		}
		name, err := url.PathUnescape(coded)
		if err != nil {
			return fmt.Errorf("xattr name %q: %w", clip(coded), err)
		}
		if _, plain := records[paxSchilyXattr+name]; plain {
			continue
		}
		value, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
		if err != nil {
			return fmt.Errorf("xattr %q: value is not base64", clip(name))
		}
		e.setXattr(name, value)
	}
	if v, ok := records[paxSELinux]; ok && e.xattrs["security.selinux"] == nil {
		e.setXattr("security.selinux", append([]byte(v), 0))
	}
	return nil
}

func (e *entry) setXattr(name string, value []byte) {
	if e.xattrs == nil {
		e.xattrs = make(map[string][]byte)
	}
	e.xattrs[name] = value
}
