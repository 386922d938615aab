package gzip

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// naive is the reader that is plainly right: a bit at a time from a slice, no
// table, no window but all that came. It gives what comes before the error, up
// to limit bytes. io.EOF is the end of a whole stream.
func naive(stream []byte, limit int) (out []byte, err error) {
	z := &naiveReader{in: stream, limit: limit}
	err = z.read()
	return z.out, err
}

// naiveLimit is the error of a stream that gives more than the limit.
var naiveLimit = errors.New("more than the limit")

type naiveReader struct {
	in    []byte
	at    int // the next bit
	out   []byte
	limit int
	begin int // of the member, in out

	longName bool // one that compress/gzip refuses
}

func (z *naiveReader) read() (err error) {
	defer func() {
		r := recover()
		if stop, ok := r.(naiveStop); ok {
			err = stop.error
		} else if r != nil {
			panic(r)
		}
	}()
	for {
		z.member()
		if z.at == len(z.in)*8 {
			return io.EOF
		}
	}
}

// naiveStop is what the error is thrown as.
type naiveStop struct{ error }

// corrupt says why: the boundary tests look at it.
func (z *naiveReader) corrupt(why string) { panic(naiveStop{fmt.Errorf("%w: %s", ErrCorrupt, why)}) }

func (z *naiveReader) bit() int {
	if z.at == len(z.in)*8 {
		panic(naiveStop{io.ErrUnexpectedEOF})
	}
	v := z.in[z.at/8] >> (z.at % 8) & 1
	z.at++
	return int(v)
}

func (z *naiveReader) take(n int) (v int) {
	for i := range n {
		v |= z.bit() << i
	}
	return v
}

func (z *naiveReader) put(b byte) {
	if len(z.out) == z.limit {
		panic(naiveStop{naiveLimit})
	}
	z.out = append(z.out, b)
}

func (z *naiveReader) member() {
	start := z.at / 8
	for _, want := range []int{0x1f, 0x8b, 8} {
		if z.take(8) != want {
			z.corrupt("no member")
		}
	}
	flags := z.take(8)
	z.take(6 * 8)
	if flags > 31 {
		z.corrupt("reserved flags")
	}
	left := MaxHeaderBytes
	next := func() int {
		if left == 0 {
			z.corrupt("long header")
		}
		left--
		return z.take(8)
	}
	if flags&4 != 0 {
		for range z.take(16) {
			next()
		}
	}
	for _, flag := range []int{8, 16} {
		if flags&flag != 0 {
			start := left
			for next() != 0 {
			}
			z.longName = z.longName || start-left > 512
		}
	}
	if flags&2 != 0 {
		sum := crc32.ChecksumIEEE(z.in[start : z.at/8])
		if z.take(16) != int(sum&0xffff) {
			z.corrupt("header CRC")
		}
	}
	z.begin = len(z.out)
	z.deflate()
	z.at = (z.at + 7) &^ 7
	crc, size := z.take(32), z.take(32)
	data := z.out[z.begin:]
	if crc != int(crc32.ChecksumIEEE(data)) {
		z.corrupt("CRC")
	}
	if size != len(data)&0xffffffff {
		z.corrupt("size")
	}
}

func (z *naiveReader) deflate() {
	for last := 0; last == 0; {
		last = z.bit()
		switch z.take(2) {
		case 0:
			z.at = (z.at + 7) &^ 7
			n, not := z.take(16), z.take(16)
			if n+not != 0xffff || n&not != 0 {
				z.corrupt("stored length")
			}
			for range n {
				z.put(byte(z.take(8)))
			}
		case 1:
			lit, dist := fixedLengths()
			z.coded(newNaiveCode(lit), newNaiveCode(dist))
		case 2:
			z.dynamic()
		case 3:
			z.corrupt("block type")
		}
	}
}

// fixedLengths are those of RFC 1951 section 3.2.6.
func fixedLengths() (lit, dist []uint8) {
	for _, run := range [][2]int{{144, 8}, {112, 9}, {24, 7}, {8, 8}} {
		for range run[0] {
			lit = append(lit, uint8(run[1]))
		}
	}
	for range 32 {
		dist = append(dist, 5)
	}
	return lit, dist
}

func (z *naiveReader) dynamic() {
	nlit, ndist, npre := z.take(5)+257, z.take(5)+1, z.take(4)+4
	if nlit > 286 {
		z.corrupt("many literals")
	}
	if ndist > 30 {
		z.corrupt("many distances")
	}
	pre := make([]uint8, 19)
	for _, s := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}[:npre] {
		pre[s] = uint8(z.take(3))
	}
	code := newNaiveCode(pre)
	if code == nil {
		z.corrupt("code of lengths")
	}
	var lengths []uint8
	again := func(n uint8, times int) {
		for range times {
			lengths = append(lengths, n)
		}
		if len(lengths) > nlit+ndist {
			z.corrupt("too many lengths")
		}
	}
	for len(lengths) < nlit+ndist {
		switch s := z.symbol(code); s {
		default:
			again(uint8(s), 1)
		case 16:
			if len(lengths) == 0 {
				z.corrupt("repeat of nothing")
			}
			again(lengths[len(lengths)-1], 3+z.take(2))
		case 17:
			again(0, 3+z.take(3))
		case 18:
			again(0, 11+z.take(7))
		}
	}
	if lengths[256] == 0 {
		z.corrupt("no end of block")
	}
	lit, dist := newNaiveCode(lengths[:nlit]), newNaiveCode(lengths[nlit:])
	if lit == nil {
		z.corrupt("code of literals")
	}
	if dist == nil {
		z.corrupt("code of distances")
	}
	z.coded(lit, dist)
}

func (z *naiveReader) coded(lit, dist *naiveCode) {
	// RFC 1951 section 3.2.5, as it is printed.
	lengthBase := []int{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	lengthExtra := []int{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
	distBase := []int{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577}
	distExtra := []int{0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13}
	for {
		s := z.symbol(lit)
		if s == 256 {
			return
		}
		if s < 256 {
			z.put(byte(s))
			continue
		}
		if s -= 257; s >= len(lengthBase) {
			z.corrupt("length symbol")
		}
		length := lengthBase[s] + z.take(lengthExtra[s])
		if s = z.symbol(dist); s >= len(distBase) {
			z.corrupt("distance symbol")
		}
		distance := distBase[s] + z.take(distExtra[s])
		if distance > len(z.out)-z.begin {
			z.corrupt("distance")
		}
		for range length {
			z.put(z.out[len(z.out)-distance])
		}
	}
}

// A naiveCode maps the bits of a code, a 1 before them, to its symbol.
type naiveCode struct {
	symbols []int16 // -1: none
	longest int
}

// newNaiveCode is nil for a code that is not allowed.
func newNaiveCode(lengths []uint8) *naiveCode {
	c := &naiveCode{}
	used, codes := 0, 0 // of 1<<15
	for _, n := range lengths {
		if n > 0 {
			used += 1 << (15 - n)
			codes++
			c.longest = max(c.longest, int(n))
		}
	}
	if used != 1<<15 && !(codes == 0 || codes == 1 && c.longest == 1) {
		return nil
	}
	c.symbols = make([]int16, 2<<c.longest)
	for i := range c.symbols {
		c.symbols[i] = -1
	}
	code := 0
	for n := 1; n <= c.longest; n++ {
		code <<= 1
		for s, m := range lengths {
			if int(m) == n {
				c.symbols[1<<n|code] = int16(s)
				code++
			}
		}
	}
	return c
}

func (z *naiveReader) symbol(c *naiveCode) int {
	code := 1
	for range max(1, c.longest) {
		code = code<<1 | z.bit()
		if code < len(c.symbols) && c.symbols[code] >= 0 {
			return int(c.symbols[code])
		}
	}
	z.corrupt("no such code")
	return 0
}
