// Package gzip reads gzip streams (RFC 1952, RFC 1951), which most layers are,
// faster than the libraries do: inflating is the largest part of every pull.
package gzip

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// ErrCorrupt is what every error is that the stream itself is to blame for,
// but for its being cut short: that is io.ErrUnexpectedEOF.
var ErrCorrupt = errors.New("gzip: damaged stream")

const (
	windowBytes = 32 << 10 // how far back a match may reach, RFC 1951 section 2
	inputBytes  = 64 << 10
	maxMatch    = 258
)

// MaxHeaderBytes is the most that extra field, name and comment of one member
// may be together, the zeros behind the two among them. None of them is of use
// here.
const MaxHeaderBytes = 128 << 10

// state is where in a stream a Reader stands.
//
//	header ──> block ──> stored ──┐
//	  ^          │ ^───> coded  ──┤ (end of the block)
//	  │          │ └──────────────┘
//	  └─trailer<─┘ (after the last block)
type state uint8

const (
	atHeader state = iota
	atBlock
	inStored
	inCoded
	atTrailer
)

// A Reader inflates the members of a gzip stream, one after the other, and
// checks the length and CRC of each. It inflates into the caller's buffer, all
// of which it may use: the larger that is, the faster it goes, and below
// 32 KiB it is slow. An error comes with no bytes, after those before it.
//
// It uses about 120 KiB, whatever the stream says.
type Reader struct {
	src    io.Reader
	srcErr error // what src ended with
	in     [inputBytes]byte
	r, w   int // in[r:w] is still to be read

	// The next bits, from the lowest on: nbits of them, zeros above.
	bits  uint64
	nbits uint

	state    state
	last     bool // the block is the last of its member
	stored   int  // bytes left of a stored block
	length   int  // of a match of which a part did not fit
	distance int

	// The member's bytes before the caller's buffer, as far as a match may
	// reach.
	window  [windowBytes]byte
	windowN int
	base    int // where the member's bytes begin in the caller's buffer

	crc     uint32
	size    uint32
	members int
	err     error

	litlen  [litlenRoom]entry
	dist    [distRoom]entry
	fixed   bool // the tables are those of the fixed codes
	lengths [maxLitlen + maxDist]uint8
	precode [1 << precodeBits]entry
}

// NewReader starts to read a stream. Nothing is read yet.
func NewReader(src io.Reader) *Reader { return &Reader{src: src} }

// Read inflates as much as p holds, unless the stream ends before that.
func (z *Reader) Read(p []byte) (int, error) {
	if z.err != nil || len(p) == 0 {
		return 0, z.err
	}
	z.base = 0
	summed, n := 0, 0
	for n < len(p) && z.err == nil {
		switch z.state {
		case atHeader:
			z.err = z.header()
			z.crc, z.size, z.windowN, z.base, summed = 0, 0, 0, n, n
		case atBlock:
			z.err = z.block()
		case inStored:
			n = z.copyStored(p, n)
		case inCoded:
			n = z.inflate(p, n)
		case atTrailer:
			z.sum(p[summed:n])
			summed = n
			z.err = z.trailer()
		}
	}
	z.sum(p[summed:n])
	z.remember(p[z.base:n])
	if n == 0 {
		return 0, z.err
	}
	return n, nil
}

func (z *Reader) sum(b []byte) {
	z.crc = crc32.Update(z.crc, crc32.IEEETable, b)
	z.size += uint32(len(b))
}

// remember keeps the end of what was inflated for the matches to come.
func (z *Reader) remember(b []byte) {
	if len(b) >= windowBytes {
		z.windowN = copy(z.window[:], b[len(b)-windowBytes:])
		return
	}
	if drop := z.windowN + len(b) - windowBytes; drop > 0 {
		copy(z.window[:], z.window[drop:z.windowN])
		z.windowN -= drop
	}
	z.windowN += copy(z.window[z.windowN:], b)
}

// fill reads on in the source, until at least one more byte is there. It says
// whether one is.
func (z *Reader) fill() bool {
	if z.srcErr != nil {
		return false
	}
	z.w = copy(z.in[:], z.in[z.r:z.w])
	z.r = 0
	for tries := 0; ; tries++ {
		n, err := z.src.Read(z.in[z.w:])
		z.w += n
		z.srcErr = err
		if n > 0 {
			return true
		}
		if err != nil {
			return false
		}
		if tries == 100 {
			z.srcErr = io.ErrNoProgress
			return false
		}
	}
}

// ended is the error of a stream that ends too early.
func (z *Reader) ended() error {
	if z.srcErr == nil || z.srcErr == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return z.srcErr
}

// refill takes whole bytes in, up to at least 56 bits or all there are. Never
// 64: the fast loop shifts by nbits.
func (z *Reader) refill() {
	for z.nbits < 56 && (z.r < z.w || z.fill()) {
		z.bits |= uint64(z.in[z.r]) << z.nbits
		z.r++
		z.nbits += 8
	}
}

// take removes up to 32 bits.
func (z *Reader) take(n uint) (uint32, error) {
	if z.nbits < n {
		if z.refill(); z.nbits < n {
			return 0, z.ended()
		}
	}
	v := uint32(z.bits & (1<<n - 1))
	z.bits >>= n
	z.nbits -= n
	return v, nil
}

func (z *Reader) align() {
	z.bits >>= z.nbits & 7
	z.nbits &^= 7
}

// magic is what each member begins with, the method (deflate) behind it.
const magic = "\x1f\x8b\x08"

// Flags of a member's header, RFC 1952 section 2.3.1.
const (
	flagHeaderCRC = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4
	flagsReserved = 0xe0
)

// header reads that of a member, or the end of the stream.
func (z *Reader) header() error {
	if z.refill(); z.nbits == 0 && z.members > 0 && z.srcErr == io.EOF {
		return io.EOF
	}
	var sum uint32
	var one [1]uint8
	next := func() (uint8, error) {
		v, err := z.take(8)
		one[0] = uint8(v)
		sum = crc32.Update(sum, crc32.IEEETable, one[:])
		return one[0], err
	}
	var fixed [10]uint8
	for i := range fixed {
		var err error
		if fixed[i], err = next(); err != nil {
			return err
		}
		// At once: a few bytes of garbage are no header that is cut short.
		if i < len(magic) && fixed[i] != magic[i] {
			return ErrCorrupt
		}
	}
	flags := fixed[3]
	if flags&flagsReserved != 0 {
		return ErrCorrupt
	}
	left := MaxHeaderBytes
	skip := func(done func(b uint8) bool) error {
		for left > 0 {
			left--
			if b, err := next(); err != nil || done(b) {
				return err
			}
		}
		return ErrCorrupt
	}
	if flags&flagExtra != 0 {
		low, err := next()
		if err != nil {
			return err
		}
		high, err := next()
		if err != nil {
			return err
		}
		if n := int(high)<<8 | int(low); n > 0 {
			if err := skip(func(uint8) bool { n--; return n == 0 }); err != nil {
				return err
			}
		}
	}
	for _, flag := range []uint8{flagName, flagComment} {
		if flags&flag != 0 {
			if err := skip(func(b uint8) bool { return b == 0 }); err != nil {
				return err
			}
		}
	}
	if flags&flagHeaderCRC != 0 {
		want := sum & 0xffff
		got, err := z.take(16)
		if err != nil {
			return err
		}
		if got != want {
			return ErrCorrupt
		}
	}
	z.state = atBlock
	return nil
}

// trailer checks what stands at the end of a member.
func (z *Reader) trailer() error {
	z.align()
	crc, err := z.take(32)
	if err != nil {
		return err
	}
	size, err := z.take(32)
	if err != nil {
		return err
	}
	if crc != z.crc || size != z.size {
		return ErrCorrupt
	}
	z.members++
	z.state = atHeader
	return nil
}

// block reads the header of a block, RFC 1951 section 3.2.3.
func (z *Reader) block() error {
	if z.last {
		z.last = false
		z.state = atTrailer
		return nil
	}
	v, err := z.take(3)
	if err != nil {
		return err
	}
	z.last = v&1 != 0
	switch v >> 1 {
	case 0:
		z.align()
		v, err := z.take(32)
		if err != nil {
			return err
		}
		if v&0xffff != ^v>>16 {
			return ErrCorrupt
		}
		z.stored = int(v & 0xffff)
		z.state = inStored
		return nil
	case 1:
		z.state = inCoded
		return z.fixedCodes()
	case 2:
		z.state = inCoded
		return z.dynamicCodes()
	}
	return ErrCorrupt
}

// copyStored goes on with a stored block into p[n:] and returns where it ends.
func (z *Reader) copyStored(p []byte, n int) int {
	for z.stored > 0 && n < len(p) {
		if z.nbits > 0 {
			p[n] = uint8(z.bits)
			z.bits >>= 8
			z.nbits -= 8
			n++
			z.stored--
			continue
		}
		if z.r == z.w && !z.fill() {
			z.err = z.ended()
			return n
		}
		m := copy(p[n:], z.in[z.r:min(z.w, z.r+z.stored)])
		z.r += m
		n += m
		z.stored -= m
	}
	if z.stored == 0 {
		z.state = atBlock
	}
	return n
}

func load64(b []byte, i int) uint64     { return binary.LittleEndian.Uint64(b[i:]) }
func store64(b []byte, i int, v uint64) { binary.LittleEndian.PutUint64(b[i:], v) }
