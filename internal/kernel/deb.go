package kernel

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

const (
	arMagic       = "!<arch>\n"
	arHeaderBytes = 60
	maxArMembers  = 16
	maxTarEntries = 100_000
	maxTarBytes   = 8 << 30 // of one data.tar, uncompressed

	maxVmlinuzBytes    = 256 << 20
	maxModuleBytes     = 64 << 20 // one module, uncompressed
	maxModules         = 20_000
	maxAllModulesBytes = 4 << 30

	// maxWindowBytes bounds what a decompressor keeps. xz -9 and zstd -22, which
	// kernels use, need 64 and 128 MiB.
	maxWindowBytes = 128 << 20
)

// openData finds the data member of a .deb (deb(5): an ar archive of
// debian-binary, control.tar.*, data.tar.*) and returns its tar stream.
func openData(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic := make([]byte, len(arMagic))
	if _, err := io.ReadFull(br, magic); err != nil || string(magic) != arMagic {
		return nil, errors.New("deb: not an ar archive")
	}
	for i := range maxArMembers {
		name, size, err := readArHeader(br)
		if err == io.EOF {
			return nil, errors.New("deb: no data.tar member")
		}
		if err != nil {
			return nil, err
		}
		if (i == 0) != (name == "debian-binary") {
			return nil, fmt.Errorf("deb: member %d is %q", i+1, name)
		}
		if i == 0 {
			version := make([]byte, min(size, 64))
			if _, err := io.ReadFull(br, version); err != nil {
				return nil, fmt.Errorf("deb: debian-binary: %w", noEOF(err))
			}
			if !bytes.HasPrefix(version, []byte("2.")) {
				return nil, fmt.Errorf("deb: format version %q, known is 2", bytes.TrimSpace(version))
			}
			size -= int64(len(version))
		}
		if strings.HasPrefix(name, "data.tar") {
			return decompressor(io.LimitReader(br, size), strings.TrimPrefix(name, "data.tar"))
		}
		// Members start at even offsets. The last one's padding may be missing.
		if _, err := io.CopyN(io.Discard, br, size+size&1); err != nil {
			return nil, fmt.Errorf("deb: member %q: %w", name, noEOF(err))
		}
	}
	return nil, fmt.Errorf("deb: no data.tar among the first %d members", maxArMembers)
}

// readArHeader reads one member header; io.EOF means that the archive ends.
func readArHeader(r io.Reader) (name string, size int64, err error) {
	var h [arHeaderBytes]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if err == io.EOF {
			return "", 0, err
		}
		return "", 0, fmt.Errorf("deb: member header: %w", noEOF(err))
	}
	if h[58] != '`' || h[59] != '\n' {
		return "", 0, errors.New("deb: member header: bad magic")
	}
	name = strings.TrimSuffix(strings.TrimRight(string(h[:16]), " "), "/")
	n, err := strconv.ParseUint(strings.TrimRight(string(h[48:58]), " "), 10, 40)
	if err != nil {
		return "", 0, fmt.Errorf("deb: member %q: size %q is no number", name, h[48:58])
	}
	return name, int64(n), nil
}

// decompressor opens a stream by its file name extension: "", .gz, .xz, .zst.
func decompressor(r io.Reader, ext string) (io.ReadCloser, error) {
	switch ext {
	case "":
		return io.NopCloser(r), nil
	case ".gz":
		return gzip.NewReader(r)
	case ".xz":
		br := bufio.NewReaderSize(r, 64<<10)
		if err := checkXZWindow(br); err != nil {
			return nil, err
		}
		xr, err := xz.NewReader(br)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(xr), nil
	case ".zst":
		zr, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderMaxWindow(maxWindowBytes), zstd.WithDecoderMaxMemory(maxTarBytes))
		if err != nil {
			return nil, err
		}
		return zr.IOReadCloser(), nil
	}
	return nil, fmt.Errorf("compression %q: not supported", ext)
}

// checkXZWindow looks at the first block header of an .xz stream (format
// 1.1.0, 3.1 and 5.3.1) and refuses a dictionary over maxWindowBytes, which
// the decoder would allocate at once. (A later block that asks for more gets
// address space; it can touch no more of it than it unpacks to.)
func checkXZWindow(br *bufio.Reader) error {
	// Stream header 12 bytes; block header: size, flags, [compressed size],
	// [uncompressed size], then filters: id, size of properties, properties.
	head, err := br.Peek(12 + 64)
	if len(head) < 12+8 {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("xz: %w", err)
	}
	block := head[12:]
	if block[0] == 0 {
		return nil // an index: no block at all
	}
	flags, at := block[1], 2
	for _, present := range []bool{flags&0x40 != 0, flags&0x80 != 0} {
		for present && at < len(block) {
			present = block[at]&0x80 != 0
			at++
		}
	}
	for range flags&3 + 1 {
		if at+2 >= len(block) {
			return errors.New("xz: block header too long")
		}
		id, n := block[at], int(block[at+1])
		if id == 0x21 { // LZMA2: one byte of dictionary size
			bits := uint(block[at+2] & 0x3f)
			if bits > 40 || (2|uint64(bits&1))<<(bits/2+11) > maxWindowBytes {
				return fmt.Errorf("xz: dictionary over %d bytes", maxWindowBytes)
			}
			return nil
		}
		at += 2 + n
	}
	return nil // the decoder names the filter that it does not know
}

// noEOF turns the end of the input in the middle of something into an error
// that says so.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A debKernel is what a kernel package holds: the boot image, in memory, and
// the files of its module folder, handed to the add function as they come.
// Names of the package never become names on the host.
type debKernel struct {
	release string
	vmlinuz []byte
}

// readKernelDeb reads the package of the kernel with that release. add is
// called for each regular file below lib/modules/RELEASE (or
// usr/lib/modules/RELEASE) with its path below that.
func readKernelDeb(r io.Reader, release string, add func(name string, size int64, r io.Reader) error) (*debKernel, error) {
	data, err := openData(r)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	limited := &io.LimitedReader{R: data, N: maxTarBytes + 1}
	tr := tar.NewReader(limited)
	k := &debKernel{release: release}
	for range maxTarEntries {
		h, err := tr.Next()
		switch {
		case limited.N == 0:
			return nil, fmt.Errorf("deb: data.tar over %d bytes", int64(maxTarBytes))
		case err == io.EOF:
			if k.vmlinuz == nil {
				return nil, fmt.Errorf("deb: no boot/vmlinuz-%s", release)
			}
			return k, nil
		case err != nil:
			return nil, fmt.Errorf("deb: data.tar: %w", noEOF(err))
		case h.Typeflag != tar.TypeReg:
			continue
		}
		name := path.Clean("/" + h.Name)[1:]
		if name == "boot/vmlinuz-"+release {
			if k.vmlinuz != nil {
				return nil, fmt.Errorf("deb: %q twice", name)
			}
			if h.Size > maxVmlinuzBytes {
				return nil, fmt.Errorf("deb: %q: %d bytes, the limit is %d", name, h.Size, maxVmlinuzBytes)
			}
			if k.vmlinuz, err = io.ReadAll(tr); err != nil {
				return nil, fmt.Errorf("deb: %q: %w", name, noEOF(err))
			}
			continue
		}
		below, ok := strings.CutPrefix(strings.TrimPrefix(name, "usr/"), "lib/modules/"+release+"/")
		if !ok {
			continue
		}
		if err := add(below, h.Size, tr); err != nil {
			return nil, fmt.Errorf("deb: %q: %w", name, err)
		}
	}
	return nil, fmt.Errorf("deb: more than %d entries", maxTarEntries)
}
