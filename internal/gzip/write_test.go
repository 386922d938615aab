package gzip

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"math/rand/v2"
	"slices"
)

// A writer makes streams by hand, right ones and wrong ones, and keeps what
// they should inflate to.
type writer struct {
	out   []byte
	free  uint   // bits of the last byte that are not used yet
	data  []byte // what all of it inflates to
	begin int    // of the member, in data

	lit, dist         []uint8 // lengths of the block's codes
	litCode, distCode []uint
}

func (w *writer) bits(v uint, n uint) {
	for ; n > 0; n-- {
		if w.free == 0 {
			w.out = append(w.out, 0)
			w.free = 8
		}
		w.out[len(w.out)-1] |= byte(v&1) << (8 - w.free)
		w.free--
		v >>= 1
	}
}

// code writes a code, its first bit highest.
func (w *writer) code(code uint, n uint8) {
	if n == 0 {
		panic("no such code")
	}
	w.bits(uint(bits.Reverse16(uint16(code))>>(16-n)), uint(n))
}

func (w *writer) align()         { w.free = 0 }
func (w *writer) bytes(b []byte) { w.align(); w.out = append(w.out, b...) }

// codes gives each symbol its code, RFC 1951 section 3.2.2.
func codes(lengths []uint8) []uint {
	out := make([]uint, len(lengths))
	code := uint(0)
	for n := uint8(1); n <= 15; n++ {
		code <<= 1
		for s, m := range lengths {
			if m == n {
				out[s] = code
				code++
			}
		}
	}
	return out
}

// member begins one without any field.
func (w *writer) member() { w.header(0, nil, nil, nil) }

// header begins a member. Fields are nil for none; the CRC of the header is
// written if the flag for it is set.
func (w *writer) header(flags byte, extra, name, comment []byte) {
	w.align()
	start := len(w.out)
	if extra != nil {
		flags |= flagExtra
	}
	if name != nil {
		flags |= flagName
	}
	if comment != nil {
		flags |= flagComment
	}
	w.bytes([]byte{0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 5, 6})
	if extra != nil {
		w.out = binary.LittleEndian.AppendUint16(w.out, uint16(len(extra)))
		w.out = append(w.out, extra...)
	}
	if name != nil {
		w.out = append(append(w.out, name...), 0)
	}
	if comment != nil {
		w.out = append(append(w.out, comment...), 0)
	}
	if flags&flagHeaderCRC != 0 {
		w.out = binary.LittleEndian.AppendUint16(w.out, uint16(crc32.ChecksumIEEE(w.out[start:])))
	}
	w.begin = len(w.data)
}

// trailer ends a member.
func (w *writer) trailer() { w.wrongTrailer(0, 0) }

func (w *writer) wrongTrailer(crc, size uint32) {
	w.align()
	data := w.data[w.begin:]
	w.out = binary.LittleEndian.AppendUint32(w.out, crc32.ChecksumIEEE(data)^crc)
	w.out = binary.LittleEndian.AppendUint32(w.out, uint32(len(data))^size)
}

const (
	more = 0
	last = 1

	typeStored  = 0
	typeFixed   = 1
	typeDynamic = 2
)

func (w *writer) block(last, kind uint) { w.bits(last|kind<<1, 3) }

func (w *writer) stored(last uint, data []byte) {
	w.block(last, typeStored)
	w.align()
	w.bits(uint(len(data)), 16)
	w.bits(uint(^uint16(len(data))), 16)
	w.bytes(data)
	w.data = append(w.data, data...)
}

// fixed begins a block of the fixed codes.
func (w *writer) fixed(last uint) {
	w.block(last, typeFixed)
	w.setCodes(fixedLengths())
}

func (w *writer) setCodes(lit, dist []uint8) {
	w.lit, w.dist = lit, dist
	w.litCode, w.distCode = codes(lit), codes(dist)
}

// dynamic begins a block of the codes with these lengths, each of which it
// writes as it is.
func (w *writer) dynamic(last uint, lit, dist []uint8) {
	p := w.precode(last, len(lit), len(dist), plainPrecode)
	for _, n := range slices.Concat(lit, dist) {
		p.length(n)
	}
	w.setCodes(lit, dist)
}

// dynamicRepeats writes the lengths by another code and with the repeats that
// chance chooses.
func (w *writer) dynamicRepeats(r *rand.Rand, last uint, lit, dist []uint8) {
	p := w.precode(last, len(lit), len(dist), wholeCode(r, precodeCount, precodeBits))
	all := slices.Concat(lit, dist)
	for i := 0; i < len(all); {
		run := 1
		for i+run < len(all) && all[i+run] == all[i] {
			run++
		}
		most := 1 + r.IntN(run)
		switch {
		case all[i] == 0 && most >= 11 && r.IntN(8) > 0:
			most = min(most, 138)
			p.zeros2(uint(most))
		case all[i] == 0 && most >= 3 && r.IntN(8) > 0:
			most = min(most, 10)
			p.zeros(uint(most))
		case i > 0 && all[i] == all[i-1] && most >= 3:
			most = min(most, 6)
			p.again(uint(most))
		default:
			most = 1
			p.length(all[i])
		}
		i += most
	}
	w.setCodes(lit, dist)
}

// plainPrecode can say everything: 13 codes of 4 bits and 6 of 5.
var plainPrecode = []uint8{4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5}

// A precodeWriter writes the lengths of a block's codes.
type precodeWriter struct {
	w       *writer
	lengths []uint8
	codes   []uint
}

func (w *writer) precode(last uint, nlit, ndist int, lengths []uint8) precodeWriter {
	w.block(last, typeDynamic)
	w.bits(uint(nlit-257), 5)
	w.bits(uint(ndist-1), 5)
	w.bits(19-4, 4)
	for _, s := range precodeOrder {
		w.bits(uint(lengths[s]), 3)
	}
	return precodeWriter{w, lengths, codes(lengths)}
}

func (p precodeWriter) symbol(s uint8, extra, n uint) {
	p.w.code(p.codes[s], p.lengths[s])
	p.w.bits(extra, n)
}

func (p precodeWriter) length(n uint8)    { p.symbol(n, 0, 0) }
func (p precodeWriter) again(times uint)  { p.symbol(16, times-3, 2) }
func (p precodeWriter) zeros(times uint)  { p.symbol(17, times-3, 3) }
func (p precodeWriter) zeros2(times uint) { p.symbol(18, times-11, 7) }

// zerosAll writes as many as are wanted.
func (p precodeWriter) zerosAll(n int) {
	for ; n > 138; n -= 138 {
		p.zeros2(138)
	}
	for range n {
		p.length(0)
	}
}

// lits writes what data is as literals.
func (w *writer) lits(data ...byte) {
	for _, b := range data {
		w.code(w.litCode[b], w.lit[b])
	}
	w.data = append(w.data, data...)
}

func (w *writer) end() { w.code(w.litCode[256], w.lit[256]) }

// match writes one and adds what it means. One that reaches back too far means
// nothing.
func (w *writer) match(length, distance int) {
	s, base, extra := lengthSymbol(length)
	w.code(w.litCode[s], w.lit[s])
	w.bits(uint(length-base), extra)
	s, base, extra = distSymbol(distance)
	w.code(w.distCode[s], w.dist[s])
	w.bits(uint(distance-base), extra)
	if distance > len(w.data)-w.begin {
		return
	}
	for range length {
		w.data = append(w.data, w.data[len(w.data)-distance])
	}
}

// lengthSymbol counts up from length 3, symbol 257: eight without extra bits,
// then four of each number of them. 258 has one of its own.
func lengthSymbol(length int) (symbol, base int, extra uint) {
	if length == maxMatch {
		return 285, maxMatch, 0
	}
	symbol, base = 257, 3
	for {
		extra = uint(max(0, (symbol-257)/4-1))
		if length < base+1<<extra {
			return symbol, base, extra
		}
		base += 1 << extra
		symbol++
	}
}

// distSymbol counts up from distance 1: four without extra bits, then two of
// each number of them.
func distSymbol(distance int) (symbol, base int, extra uint) {
	base = 1
	for {
		extra = uint(max(0, symbol/2-1))
		if distance < base+1<<extra {
			return symbol, base, extra
		}
		base += 1 << extra
		symbol++
	}
}

// wholeCode gives n symbols, at least two, lengths of up to most bits that make
// a whole code: it splits one leaf of the tree after the other, often the
// last.
func wholeCode(r *rand.Rand, n int, most uint8) []uint8 {
	leaves := []uint8{1, 1}
	for len(leaves) < n {
		i := r.IntN(len(leaves))
		if r.IntN(3) > 0 {
			i = len(leaves) - 1
		}
		if leaves[i] == most {
			continue
		}
		leaves[i]++
		leaves = append(leaves, leaves[i])
	}
	r.Shuffle(n, func(i, j int) { leaves[i], leaves[j] = leaves[j], leaves[i] })
	return leaves
}
