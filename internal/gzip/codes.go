package gzip

import "math/bits"

// The codes of RFC 1951 section 3.2.
const (
	maxLitlen    = 288 // 286 and 287 have a code among the fixed ones and no meaning
	maxDist      = 32  // so have 30 and 31
	maxCodeBits  = 15
	endOfBlock   = 256
	precodeCount = 19
	precodeBits  = 7
)

// A table is looked up by the next litlenBits or distBits bits; what a longer
// code begins with leads to a second one, behind it. The rooms are powers of
// two not below the most that any code needs: 2,342 and 402 entries, as zlib's
// "enough" counts them.
const (
	litlenBits = 11
	litlenRoom = 4096
	distBits   = 8
	distRoom   = 512
)

// An entry says what a code stands for.
//
//	bits 0-7    to consume: the code and the extra bits behind it
//	bits 8-11   the code alone; of a link the bits that the second table is looked up by
//	bits 12-15  kind; 0 is a length or distance
//	bits 16-31  literal, or base of length or distance, or where the second table begins
type entry uint32

const (
	kindLiteral entry = 1 << 12
	kindEnd     entry = 1 << 13
	kindLink    entry = 1 << 14
	kindBad     entry = 1 << 15
	kindSpecial       = kindEnd | kindLink | kindBad
)

func (e entry) consume() uint  { return uint(uint8(e)) }
func (e entry) codeBits() uint { return uint(e>>8) & 15 }
func (e entry) value() int     { return int(e >> 16) }

// What each symbol stands for: its entry without the code's own bits.
var (
	litlenSymbols  [maxLitlen]entry
	distSymbols    [maxDist]entry
	precodeSymbols [precodeCount]entry
)

func init() {
	for i := range 256 {
		litlenSymbols[i] = kindLiteral | entry(i)<<16
	}
	litlenSymbols[endOfBlock] = kindEnd
	base := 3
	for i := range 28 {
		extra := max(0, i/4-1)
		litlenSymbols[257+i] = entry(base)<<16 | entry(extra)
		base += 1 << extra
	}
	litlenSymbols[285] = maxMatch << 16
	litlenSymbols[286], litlenSymbols[287] = kindBad, kindBad
	base = 1
	for i := range 30 {
		extra := max(0, i/2-1)
		distSymbols[i] = entry(base)<<16 | entry(extra)
		base += 1 << extra
	}
	distSymbols[30], distSymbols[31] = kindBad, kindBad
	for i := range precodeCount {
		precodeSymbols[i] = entry(i) << 16
	}
}

// build makes the table of the code that gives each symbol so many bits. As in
// zlib, a code must be whole, or a single one of one bit, or none at all. (For
// the code of the lengths zlib wants the first; with either of the others all
// lengths are the same, which those of 257 symbols or more cannot be.)
func build(table []entry, tableBits uint, lengths []uint8, symbols []entry) bool {
	var count [maxCodeBits + 1]int
	for _, n := range lengths {
		count[n]++
	}
	count[0] = 0
	longest := maxCodeBits
	for longest > 0 && count[longest] == 0 {
		longest--
	}
	left := 1 // codes not given yet
	var next [maxCodeBits + 2]int
	for n := 1; n <= maxCodeBits; n++ {
		if left = left<<1 - count[n]; left < 0 {
			return false
		}
		next[n+1] = next[n] + count[n]
	}
	if left > 0 {
		if longest > 1 {
			return false
		}
		table[0], table[1] = kindBad|1, kindBad|1
	}
	var sorted [maxLitlen]uint16 // symbols by the length of their code
	for s, n := range lengths {
		if n != 0 {
			sorted[next[n]] = uint16(s)
			next[n]++
		}
	}
	// Codes count up, and are stored with their first bit lowest. Those of up
	// to tableBits fill a table that doubles with each bit more.
	code := uint(0)
	i := 0
	for n := uint(1); n <= min(tableBits, uint(longest)); n++ {
		code <<= 1
		for range count[n] {
			s := symbols[sorted[i]]
			table[reverse(code, n)] = s + entry(n) | entry(n)<<8
			code++
			i++
		}
		if n < tableBits {
			copy(table[1<<n:2<<n], table[:1<<n])
		}
	}
	for n := uint(longest) + 1; n < tableBits; n++ {
		copy(table[1<<n:2<<n], table[:1<<n])
	}
	// The others share second tables by their first tableBits bits.
	end := uint(1) << tableBits
	prefix, start, subBits := ^uint(0), uint(0), uint(0)
	for n := tableBits + 1; n <= uint(longest); n++ {
		code <<= 1
		for left := count[n]; left > 0; left-- {
			r := reverse(code, n)
			if p := r & (1<<tableBits - 1); p != prefix {
				// As large as the longest code that begins so: until the
				// codes in order of length fill it.
				prefix, start, subBits = p, end, n-tableBits
				for room := 1<<subBits - left; room > 0 && tableBits+subBits < uint(longest); {
					subBits++
					room = room<<1 - count[tableBits+subBits]
				}
				end += 1 << subBits
				table[p] = kindLink | entry(start)<<16 | entry(subBits)<<8 | entry(tableBits)
			}
			e := symbols[sorted[i]] + entry(n-tableBits) | entry(n-tableBits)<<8
			for at := r >> tableBits; at < 1<<subBits; at += 1 << (n - tableBits) {
				table[start+at] = e
			}
			code++
			i++
		}
	}
	return true
}

// reverse turns the n lowest bits around.
func reverse(code, n uint) uint { return uint(bits.Reverse16(uint16(code)) >> (16 - n)) }

// fixedCodes sets the tables of a block of type 1.
func (z *Reader) fixedCodes() error {
	if z.fixed {
		return nil
	}
	z.fixed = true
	var lengths [maxLitlen]uint8
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		default:
			lengths[i] = 8
		}
	}
	build(z.litlen[:], litlenBits, lengths[:], litlenSymbols[:])
	for i := range maxDist {
		lengths[i] = 5
	}
	build(z.dist[:], distBits, lengths[:maxDist], distSymbols[:])
	return nil
}

// precodeOrder is that in which the lengths of the code of the lengths stand,
// RFC 1951 section 3.2.7.
var precodeOrder = [precodeCount]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamicCodes reads the codes of a block of type 2.
func (z *Reader) dynamicCodes() error {
	z.fixed = false
	v, err := z.take(14)
	if err != nil {
		return err
	}
	nlit, ndist, npre := int(v&31)+257, int(v>>5&31)+1, int(v>>10)+4
	if nlit > 286 || ndist > 30 {
		return ErrCorrupt
	}
	var pre [precodeCount]uint8
	for _, s := range precodeOrder[:npre] {
		v, err := z.take(3)
		if err != nil {
			return err
		}
		pre[s] = uint8(v)
	}
	if !build(z.precode[:], precodeBits, pre[:], precodeSymbols[:]) {
		return ErrCorrupt
	}
	lengths := z.lengths[:nlit+ndist]
	for i := 0; i < len(lengths); {
		if z.nbits < precodeBits+7 {
			z.refill()
		}
		e := z.precode[z.bits&(1<<precodeBits-1)]
		if e&kindBad != 0 {
			return ErrCorrupt
		}
		if z.nbits < e.consume() {
			return z.ended()
		}
		z.bits >>= e.consume()
		z.nbits -= e.consume()
		symbol := e.value()
		if symbol < 16 {
			lengths[i] = uint8(symbol)
			i++
			continue
		}
		var again uint8
		var extra uint
		var times int
		switch symbol {
		case 16:
			if i == 0 {
				return ErrCorrupt
			}
			again, extra, times = lengths[i-1], 2, 3
		case 17:
			extra, times = 3, 3
		case 18:
			extra, times = 7, 11
		}
		v, err := z.take(extra)
		if err != nil {
			return err
		}
		if times += int(v); times > len(lengths)-i {
			return ErrCorrupt
		}
		for range times {
			lengths[i] = again
			i++
		}
	}
	// A block that cannot end is none.
	if lengths[endOfBlock] == 0 ||
		!build(z.litlen[:], litlenBits, lengths[:nlit], litlenSymbols[:]) ||
		!build(z.dist[:], distBits, lengths[nlit:], distSymbols[:]) {
		return ErrCorrupt
	}
	return nil
}
