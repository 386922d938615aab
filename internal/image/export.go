package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"banger"
	"banger/ext4"
	"banger/internal/oci"
)

// ExportBase writes an image that was not made of layers as an archive of one
// layer: all that is in its base but the guest files, which every base gets.
func (im *Images) ExportBase(ctx context.Context, image *Image, out io.Writer) error {
	f, err := os.Open(image.Rootfs)
	if err != nil {
		return err
	}
	defer f.Close()
	base, err := ext4.Open(f)
	if err != nil {
		return banger.Errorf(banger.CodeInvalid, "image %q: %w", image.Name, err)
	}
	return oci.ExportTar(ctx, out, image.Name, image.Platform, image.Config, func(w io.Writer) error {
		return writeTar(ctx, w, base)
	})
}

// guestPaths are what writeTar leaves out.
var guestPaths = []string{
	guestAgentPath, guestBootstrapPath, guestUnitPath, guestNetUnitPath, guestLoadPath, guestWantsPath, guestNetWantsPath,
}

// tarTypes are the types of entries by S_IFMT.
var tarTypes = map[uint16]byte{
	modeRegular: tar.TypeReg, modeDir: tar.TypeDir, modeSymlink: tar.TypeSymlink,
	modeChar: tar.TypeChar, 0o060000: tar.TypeBlock, 0o010000: tar.TypeFifo,
}

// writeTar writes all that is in a file system, its top directory first, the
// same each time. A socket is left out, as every tar does: it is nothing
// without its process.
func writeTar(ctx context.Context, out io.Writer, base *ext4.FS) error {
	w := tar.NewWriter(out)
	linked := map[uint32]string{} // first names of inodes with several
	err := fs.WalkDir(base, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if slices.Contains(guestPaths, path) {
			return nil
		}
		if strings.HasPrefix(d.Name(), ".wh.") {
			return fmt.Errorf("entry %q: in a layer its name means that something is removed", path)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*ext4.Stat)
		if !ok {
			return fmt.Errorf("entry %q: of an unknown kind", path)
		}
		typ, ok := tarTypes[st.Mode&modeType]
		if !ok {
			return nil
		}
		h := &tar.Header{
			Typeflag: typ, Name: path, Mode: int64(st.Mode & 0o7777), Uid: int(st.UID), Gid: int(st.GID),
			ModTime: st.Mtime, AccessTime: st.Atime, ChangeTime: st.Ctime,
			Devmajor: int64(st.Major), Devminor: int64(st.Minor), Format: tar.FormatPAX,
		}
		switch first := linked[st.Ino]; {
		case typ == tar.TypeDir:
			h.Name += "/"
		case first != "":
			return w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: path, Linkname: first, Format: tar.FormatPAX})
		case st.Links > 1:
			linked[st.Ino] = path
		}
		xattrs, err := base.Xattrs(path)
		if err != nil {
			return err
		}
		for name, value := range xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+name] = string(value)
		}
		if typ == tar.TypeSymlink {
			if h.Linkname, err = base.ReadLink(path); err != nil {
				return err
			}
		}
		if typ != tar.TypeReg {
			return w.WriteHeader(h)
		}
		h.Size = st.SizeBytes
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		f, err := base.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
	if err != nil {
		return err
	}
	return w.Close()
}
