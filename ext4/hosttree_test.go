//go:build linux

package ext4

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"banger/ext4/internal/disk"
)

// hostTree is what the kernel shows of a mounted image.
type hostTree string

func (h hostTree) full(path string) string { return filepath.Join(string(h), path) }

func (h hostTree) Lstat(path string) (fs.FileInfo, error) {
	info, err := os.Lstat(h.full(path))
	if err != nil {
		return nil, err
	}
	return hostInfo{info}, nil
}

func (h hostTree) ReadLink(path string) (string, error)          { return os.Readlink(h.full(path)) }
func (h hostTree) ReadDir(path string) ([]fs.DirEntry, error)    { return os.ReadDir(h.full(path)) }
func (h hostTree) Xattrs(path string) (map[string][]byte, error) { return xattrsOf(h.full(path)) }

func (h hostTree) Open(path string) (fs.File, error) {
	f, err := os.Open(h.full(path))
	if err != nil {
		return nil, err
	}
	return hostFile{f}, nil
}

type hostInfo struct{ fs.FileInfo }

func (i hostInfo) Sys() any {
	st := i.FileInfo.Sys().(*syscall.Stat_t)
	when := func(t syscall.Timespec) time.Time { return time.Unix(t.Sec, t.Nsec) }
	s := &Stat{
		Ino: uint32(st.Ino), Mode: uint16(st.Mode), UID: st.Uid, GID: st.Gid, Links: uint32(st.Nlink), SizeBytes: st.Size,
		AllocatedBytes: st.Blocks * 512, Atime: when(st.Atim), Mtime: when(st.Mtim), Ctime: when(st.Ctim),
	}
	if k := s.Mode & disk.TypeMask; k == disk.TypeChar || k == disk.TypeBlock {
		s.Major = uint32(st.Rdev >> 8 & 0xFFF)
		s.Minor = uint32(st.Rdev&0xFF | st.Rdev>>12&0xFFF00)
	}
	return s
}

type hostFile struct{ *os.File }

func (f hostFile) NextData(offset int64) (start, end int64, err error) {
	const seekData, seekHole = 3, 4
	if start, err = f.Seek(offset, seekData); err != nil {
		if errors.Is(err, syscall.ENXIO) {
			err = io.EOF
		}
		return 0, 0, err
	}
	end, err = f.Seek(start, seekHole)
	return start, end, err
}

// differences compares two trees whole.
func differences(a, b Tree, aspects Aspect) (list []string, err error) {
	err = Compare(a, b, aspects, func(d Difference) bool {
		list = append(list, d.String())
		return len(list) < 20
	})
	return list, err
}

// seenByKernel are the aspects in which an image must read as it mounts.
const seenByKernel = DiffAll | DiffAtime | DiffCtime | DiffHoles
