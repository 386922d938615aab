package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

const (
	maxVmlinuxBytes = 512 << 20
	maxReleaseBytes = 64
	lz4BlockBytes   = 8 << 20 // of every block of a legacy LZ4 frame
)

var releasePattern = regexp.MustCompile(`^[0-9][A-Za-z0-9._+~-]{0,63}$`)

// checkRelease refuses a kernel release (uname -r) that must not become a file
// name. Linux's own start with a number.
func checkRelease(release string) error {
	if !releasePattern.MatchString(release) || strings.Contains(release, "..") {
		return fmt.Errorf("kernel release %q: not 1 to %d characters of [A-Za-z0-9._+~-] starting with a digit", release, maxReleaseBytes)
	}
	return nil
}

// unpackKernel makes the uncompressed ELF image of a kernel from a bzImage, or
// takes an ELF image as it is, and returns it with the kernel's release. The
// image must be x86-64 and have a PVH entry, which every VMM here starts at.
func unpackKernel(image []byte) (vmlinux []byte, release string, err error) {
	if bytes.HasPrefix(image, []byte("\x7fELF")) {
		vmlinux = image
		release, err = releaseOfELF(image)
	} else {
		vmlinux, release, err = unpackBzImage(image)
	}
	if err != nil {
		return nil, "", err
	}
	if err := checkRelease(release); err != nil {
		return nil, "", err
	}
	if err := checkPVH(vmlinux); err != nil {
		return nil, "", err
	}
	return vmlinux, release, nil
}

// Offsets of the x86 boot protocol's setup header, in the first sector or two
// (Documentation/arch/x86/boot.rst).
const (
	offSetupSects    = 0x1f1
	offBootFlag      = 0x1fe
	offMagic         = 0x202
	offProtocol      = 0x206
	offKernelVersion = 0x20e
	offPayloadOffset = 0x248
	offPayloadLength = 0x24c
	setupHeaderBytes = 0x250
	sectorBytes      = 512
)

// unpackBzImage decompresses the payload of a bzImage.
func unpackBzImage(image []byte) (vmlinux []byte, release string, err error) {
	le := binary.LittleEndian
	if len(image) < setupHeaderBytes || le.Uint16(image[offBootFlag:]) != 0xaa55 || string(image[offMagic:offMagic+4]) != "HdrS" {
		return nil, "", errors.New("kernel image: neither a bzImage nor an ELF file")
	}
	if v := le.Uint16(image[offProtocol:]); v < 0x208 {
		return nil, "", fmt.Errorf("kernel image: boot protocol %d.%02d has no payload fields, 2.08 has", v>>8, v&0xff)
	}
	setupSects := int64(image[offSetupSects])
	if setupSects == 0 {
		setupSects = 4 // by the protocol
	}
	start := (setupSects+1)*sectorBytes + int64(le.Uint32(image[offPayloadOffset:]))
	size := int64(le.Uint32(image[offPayloadLength:]))
	if size < 8 || start+size > int64(len(image)) {
		return nil, "", fmt.Errorf("kernel image: payload of %d bytes at %d is outside the file of %d bytes", size, start, len(image))
	}
	at := int64(le.Uint16(image[offKernelVersion:])) + sectorBytes
	if at == sectorBytes || at >= int64(len(image)) {
		return nil, "", errors.New("kernel image: no version text")
	}
	release = firstWord(image[at:])
	vmlinux, err = unpackPayload(image[start : start+size])
	return vmlinux, release, err
}

// firstWord returns the text up to the first blank or NUL, at most one byte
// longer than a release may be.
func firstWord(b []byte) string {
	b = b[:min(len(b), maxReleaseBytes+1)]
	if i := bytes.IndexAny(b, " \t\n\x00"); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// Compressions of a payload by their first bytes
// (scripts/extract-vmlinux). Those with a nil decoder are named in the refusal.
var payloadFormats = []struct {
	name, magic string
	decode      func([]byte) ([]byte, error)
}{
	{"LZ4", "\x02\x21\x4c\x18", unpackLZ4},
	{"gzip", "\x1f\x8b\x08", unpackGzip},
	{"zstd", "\x28\xb5\x2f\xfd", unpackZstd},
	{"xz", "\xfd7zXZ\x00", unpackXZ},
	{"ELF", "\x7fELF", func(b []byte) ([]byte, error) { return b, nil }},
	{"LZMA", "\x5d\x00\x00", nil},
	{"bzip2", "BZh", nil},
	{"LZO", "\x89LZO", nil},
}

// unpackPayload decompresses a bzImage's payload. Its last four bytes are the
// size of the result in every compressed format (gzip's own trailer is that).
func unpackPayload(payload []byte) ([]byte, error) {
	for _, f := range payloadFormats {
		if !bytes.HasPrefix(payload, []byte(f.magic)) {
			continue
		}
		if f.decode == nil {
			return nil, fmt.Errorf("kernel image: payload is %s, which is not supported", f.name)
		}
		out, err := f.decode(payload)
		if err != nil {
			return nil, fmt.Errorf("kernel image: %s payload: %w", f.name, noEOF(err))
		}
		want := binary.LittleEndian.Uint32(payload[len(payload)-4:])
		if f.name != "ELF" && uint64(len(out)) != uint64(want) {
			return nil, fmt.Errorf("kernel image: %s payload: unpacks to %d bytes, its end says %d", f.name, len(out), want)
		}
		return out, nil
	}
	return nil, fmt.Errorf("kernel image: payload of an unknown kind (starts with % x)", payload[:8])
}

// unpackLZ4 reads the legacy LZ4 frame: after the magic, blocks of a 32-bit
// size and that many bytes, each of 8 MiB or less when unpacked. (The frame
// has no end mark of its own, so the size that follows must be cut off.)
func unpackLZ4(p []byte) ([]byte, error) {
	p = p[4 : len(p)-4]
	var out []byte
	block := make([]byte, lz4BlockBytes)
	for len(p) > 0 {
		if len(p) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		n := binary.LittleEndian.Uint32(p)
		if p = p[4:]; uint64(n) > uint64(len(p)) {
			return nil, io.ErrUnexpectedEOF
		}
		m, err := lz4.UncompressBlock(p[:n], block)
		if err != nil {
			return nil, err
		}
		if len(out)+m > maxVmlinuxBytes {
			return nil, errTooLarge
		}
		out = append(out, block[:m]...)
		p = p[n:]
	}
	return out, nil
}

var errTooLarge = fmt.Errorf("unpacks to more than %d bytes", maxVmlinuxBytes)

func unpackGzip(p []byte) ([]byte, error) {
	zr, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		return nil, err
	}
	zr.Multistream(false) // padding may follow
	return readLimited(zr)
}

func unpackZstd(p []byte) ([]byte, error) {
	zr, err := zstd.NewReader(bytes.NewReader(p[:len(p)-4]), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderMaxWindow(maxWindowBytes), zstd.WithDecoderMaxMemory(maxVmlinuxBytes))
	if err != nil {
		return nil, err
	}
	defer zr.Close()
	return readLimited(zr)
}

func unpackXZ(p []byte) ([]byte, error) {
	xr, err := decompressor(bytes.NewReader(p[:len(p)-4]), ".xz")
	if err != nil {
		return nil, err
	}
	return readLimited(xr)
}

func readLimited(r io.Reader) ([]byte, error) {
	out, err := io.ReadAll(io.LimitReader(r, maxVmlinuxBytes+1))
	if err != nil {
		return nil, err
	}
	if len(out) > maxVmlinuxBytes {
		return nil, errTooLarge
	}
	return out, nil
}

// releaseOfELF finds the banner "Linux version RELEASE (...) ..." that every
// kernel holds. The format string of /proc/version starts alike, with a %s.
func releaseOfELF(image []byte) (string, error) {
	mark := []byte("Linux version ")
	for rest := image; ; {
		i := bytes.Index(rest, mark)
		if i < 0 {
			return "", errors.New("kernel image: no \"Linux version\" text in the ELF file")
		}
		rest = rest[i+len(mark):]
		if release := firstWord(rest); checkRelease(release) == nil {
			return release, nil
		}
	}
}

const (
	elfHeaderBytes     = 64
	elfProgHeaderBytes = 56
	elfMachineX86_64   = 62
	elfTypeExec        = 2
	elfTypeDyn         = 3
	elfSegmentNote     = 4
	// XEN_ELFNOTE_PHYS32_ENTRY (include/xen/interface/elfnote.h): the 32-bit
	// physical address of the PVH entry.
	xenNotePhys32Entry = 18
)

// checkPVH requires an x86-64 ELF file with a PVH entry note. It reads the
// few fields itself: debug/elf is not made for hostile files.
func checkPVH(image []byte) error {
	le := binary.LittleEndian
	if len(image) < elfHeaderBytes || string(image[:4]) != "\x7fELF" || image[4] != 2 || image[5] != 1 {
		return errors.New("kernel image: not a 64-bit little-endian ELF file")
	}
	if t, m := le.Uint16(image[16:]), le.Uint16(image[18:]); (t != elfTypeExec && t != elfTypeDyn) || m != elfMachineX86_64 {
		return fmt.Errorf("kernel image: not an x86-64 executable (ELF type %d, machine %d)", t, m)
	}
	at, entry, count := le.Uint64(image[32:]), le.Uint16(image[54:]), le.Uint16(image[56:])
	if entry != elfProgHeaderBytes {
		return fmt.Errorf("kernel image: program headers of %d bytes", entry)
	}
	for i := range uint64(count) {
		h, ok := slice(image, at+i*elfProgHeaderBytes, elfProgHeaderBytes)
		if !ok {
			return errors.New("kernel image: program headers outside the file")
		}
		if le.Uint32(h) != elfSegmentNote {
			continue
		}
		notes, ok := slice(image, le.Uint64(h[8:]), le.Uint64(h[32:]))
		if !ok {
			return errors.New("kernel image: notes outside the file")
		}
		if hasPVHNote(notes) {
			return nil
		}
	}
	return errors.New("kernel image: no PVH entry note (built without CONFIG_PVH)")
}

func hasPVHNote(notes []byte) bool {
	le := binary.LittleEndian
	for len(notes) >= 12 {
		nameSize, descSize, kind := uint64(le.Uint32(notes)), uint64(le.Uint32(notes[4:])), le.Uint32(notes[8:])
		name, ok := slice(notes, 12, nameSize)
		if !ok {
			return false
		}
		desc := 12 + (nameSize+3)&^3
		if _, ok := slice(notes, desc, descSize); !ok {
			return false
		}
		if kind == xenNotePhys32Entry && string(name) == "Xen\x00" && descSize >= 4 {
			return true
		}
		notes = notes[min(desc+(descSize+3)&^3, uint64(len(notes))):]
	}
	return false
}

// slice returns b[at:at+size] if that is inside b.
func slice(b []byte, at, size uint64) ([]byte, bool) {
	if at > uint64(len(b)) || size > uint64(len(b))-at {
		return nil, false
	}
	return b[at : at+size], true
}
