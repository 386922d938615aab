package gzip

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"testing"
)

// A stream is one of a boundary, named by it.
type stream struct {
	name  string
	bytes []byte
	data  []byte // what comes of it, before the error if there is one
	why   string // it is refused: what the naive reader says. "" if it is whole
	std   string // "accepts" or "refuses" where compress/gzip does not do the same
}

// boundaries collects streams: what is last allowed, and what is first not.
type boundaries []stream

// streams are those of all boundaries.
func streams() []stream {
	var b boundaries
	b.distances()
	b.storedBlocks()
	b.fixedCodes()
	b.numbers()
	b.codesOfLengths()
	b.codesOfLiterals()
	b.codesOfDistances()
	b.longCodes()
	b.emptyBlocks()
	b.headers()
	b.trailers()
	b.members()
	return b
}

func (b *boundaries) whole(name, why string, build func(w *writer)) *stream {
	w := &writer{}
	build(w)
	*b = append(*b, stream{name: name, bytes: w.out, data: w.data, why: why})
	return &(*b)[len(*b)-1]
}

// body is what stands between header and trailer of the one member.
func (b *boundaries) body(name, why string, build func(w *writer)) {
	b.whole(name, why, func(w *writer) {
		w.member()
		build(w)
		w.trailer()
	})
}

// coded is what a block of the fixed codes says.
func (b *boundaries) coded(name, why string, build func(w *writer)) {
	b.body(name, why, func(w *writer) {
		w.fixed(last)
		build(w)
		w.end()
	})
}

// dynamic is what a block of those codes says.
func (b *boundaries) dynamic(name, why string, lit, dist []uint8, build func(w *writer)) {
	b.body(name, why, func(w *writer) {
		w.dynamic(last, lit, dist)
		if build != nil {
			build(w)
		}
		if w.lit[256] > 0 {
			w.end()
		}
	})
}

// raw is a block whose codes are written one by one.
func (b *boundaries) raw(name, why string, nlit, ndist int, pre []uint8, write func(p precodeWriter), build func(w *writer)) {
	b.body(name, why, func(w *writer) {
		write(w.precode(last, nlit, ndist, pre))
		if build != nil {
			build(w)
		}
	})
}

// headed is a short member with such a header.
func (b *boundaries) headed(name, why string, flags byte, extra, label, comment []byte) *stream {
	return b.whole(name, why, func(w *writer) {
		w.header(flags, extra, label, comment)
		w.stored(last, []byte("data"))
		w.trailer()
		if why != "" {
			w.data = nil
		}
	})
}

// Codes of 'a' and the end of the block; and of one length besides.
var (
	short     = with(make([]uint8, 257), 'a', 1, 256, 1)
	oneLength = with(make([]uint8, 258), 'a', 1, 256, 2, 257, 2)
)

// distances: how far back a match may reach, and how it overlaps itself.
func (b *boundaries) distances() {
	for _, n := range []int{1, 2, 7, 8, 16, 258, 5000} {
		for _, length := range []int{3, 258} {
			history := func(w *writer) { w.lits(text(6, n)...) }
			b.coded(fmt.Sprintf("match of %d from the first byte of %d", length, n), "", func(w *writer) {
				history(w)
				w.match(length, n)
				w.lits(noise(7, 2*fastOut)...)
				w.match(length, len(w.data))
			})
			b.coded(fmt.Sprintf("match of %d from before the first byte of %d", length, n), "distance", func(w *writer) {
				history(w)
				w.match(length, n+1)
			})
			b.coded(fmt.Sprintf("match of %d from before the first byte of %d, more behind", length, n), "distance", func(w *writer) {
				history(w)
				w.match(length, n+1)
				data := w.data
				w.lits(noise(7, 2*fastOut)...)
				w.data = data
			})
		}
	}
	b.coded("match first of all", "distance", func(w *writer) { w.match(3, 1) })
	for _, history := range []int{windowBytes - 1, windowBytes, windowBytes + 1, 2*windowBytes - 1, 3*windowBytes + 5} {
		why := ""
		if history < windowBytes {
			why = "distance"
		}
		for _, length := range []int{3, 258} {
			b.body(fmt.Sprintf("match of %d, distance 32768, behind %d bytes", length, history), why, func(w *writer) {
				for left := noise(8, history); len(left) > 0; left = left[min(len(left), 65535):] {
					w.stored(more, left[:min(len(left), 65535)])
				}
				w.fixed(last)
				w.match(length, windowBytes)
				w.end()
			})
			b.body(fmt.Sprintf("match of %d, distance 32767, behind %d bytes", length, history), "", func(w *writer) {
				for left := noise(8, history); len(left) > 0; left = left[min(len(left), 65535):] {
					w.stored(more, left[:min(len(left), 65535)])
				}
				w.fixed(last)
				w.match(length, windowBytes-1)
				w.lits(noise(9, 2*fastOut)...)
				w.match(length, 20_000)
				w.end()
			})
		}
	}
	for d := 1; d <= 17; d++ {
		for _, length := range []int{3, 7, 8, 9, 15, 16, 17, 24, 25, 257, 258} {
			b.coded(fmt.Sprintf("match of %d, distance %d", length, d), "", func(w *writer) {
				w.lits(noise(10, 20)...)
				w.match(length, d)
				w.lits(noise(11, 2*fastOut)...) // room for the fast loop
			})
		}
	}
	b.coded("every length and every distance", "", func(w *writer) {
		w.lits(noise(12, 1000)...)
		for i := 3; i <= 258; i++ {
			w.match(i, i)
		}
		for s := range 30 {
			base := int(distSymbols[s].value())
			w.match(3, base)
			w.match(4, base+1<<(distSymbols[s].consume())-1)
		}
		w.lits(noise(13, 2*fastOut)...)
	})

	b.coded("258 as 227 and 31 more", "", func(w *writer) {
		w.lits('a')
		w.code(w.litCode[284], w.lit[284])
		w.bits(31, 5)
		w.code(0, 5)
		w.data = append(w.data, bytes.Repeat([]byte("a"), 258)...)
	})
}

// storedBlocks, and the type that no block has.
func (b *boundaries) storedBlocks() {
	for _, n := range []int{0, 1, 2, 65534, 65535} {
		b.body(fmt.Sprintf("stored block of %d", n), "", func(w *writer) { w.stored(last, text(14, n)) })
	}
	for bit := range 16 {
		for _, half := range []string{"LEN", "NLEN"} {
			b.body(fmt.Sprintf("stored block, bit %d of %s wrong", bit, half), "stored length", func(w *writer) {
				w.block(last, typeStored)
				w.align()
				n, not := uint(5), uint(^uint16(5))
				if half == "LEN" {
					n ^= 1 << bit
				} else {
					not ^= 1 << bit
				}
				w.bits(n, 16)
				w.bits(not, 16)
				w.bytes([]byte("12345"))
			})
		}
	}
	for k := range 8 { // each literal from 144 on has 9 bits
		for _, padding := range []uint{0, 1} {
			b.body(fmt.Sprintf("stored blocks behind %d literals of 9 bits, padded by %d", k, padding), "", func(w *writer) {
				w.fixed(more)
				w.lits(noise(15, 2*fastOut)...)
				w.lits(bytes.Repeat([]byte{200}, k)...)
				w.end()
				for _, n := range []int{500, 1, 0, 500} { // the first from what the fast loop left
					w.block(more, typeStored)
					for w.free > 0 {
						w.bits(padding, 1)
					}
					w.bits(uint(n), 16)
					w.bits(uint(^uint16(n)), 16)
					data := text(16, n)
					w.bytes(data)
					w.data = append(w.data, data...)
				}
				w.fixed(last)
				w.match(30, 400)
				w.end()
				for w.free > 0 {
					w.bits(padding, 1) // before the trailer too
				}
			})
		}
	}
	b.body("block of type 3", "block type", func(w *writer) { w.block(last, 3) })
	b.body("block of type 3 behind another", "block type", func(w *writer) {
		w.stored(more, []byte("first"))
		w.block(more, 3)
	})
}

// fixedCodes that mean nothing.
func (b *boundaries) fixedCodes() {
	for _, s := range []int{285, 286, 287} {
		for _, behind := range []int{0, 2 * fastOut} {
			why := "length symbol"
			if s == 285 {
				why = ""
			}
			b.coded(fmt.Sprintf("fixed code of length %d, %d bytes behind", s, behind), why, func(w *writer) {
				w.lits('a')
				w.code(w.litCode[s], w.lit[s])
				w.code(0, 5) // distance 1
				if why == "" {
					w.data = append(w.data, bytes.Repeat([]byte("a"), 258)...)
				}
				data := w.data
				if w.lits(text(17, behind)...); why != "" {
					w.data = data
				}
			})
		}
	}
	for _, s := range []int{29, 30, 31} {
		for _, behind := range []int{0, 2 * fastOut} {
			why := "distance symbol"
			if s == 29 {
				why = "distance"
			}
			b.coded(fmt.Sprintf("fixed code of distance %d, %d bytes behind", s, behind), why, func(w *writer) {
				w.lits('a')
				w.code(w.litCode[257], w.lit[257])
				w.code(uint(s), 5)
				w.bits(0, 13)
				data := w.data
				w.lits(text(17, behind)...)
				w.data = data
			})
		}
	}
}

// numbers of codes in a dynamic block.
func (b *boundaries) numbers() {
	r := rand.New(rand.NewPCG(4, 2))
	someLits := func(w *writer) { w.lits(noise(18, 3*fastOut)...) }
	for n := 257; n <= 288; n++ {
		why := ""
		if n > 286 {
			why = "many literals"
		}
		b.dynamic(fmt.Sprintf("%d literals and lengths", n), why, wholeCode(r, n, 15), []uint8{1}, func(w *writer) {
			if why == "" {
				someLits(w)
			}
		})
	}
	for n := 2; n <= 32; n++ {
		why := ""
		if n > 30 {
			why = "many distances"
		}
		b.dynamic(fmt.Sprintf("%d distances", n), why, wholeCode(r, 286, 15), wholeCode(r, n, 15), func(w *writer) {
			if why == "" {
				someLits(w)
				w.match(3, 1)
				w.match(3, 2)
				someLits(w)
			}
		})
	}
}

// codesOfLengths: the code that the lengths of the others come in, and repeats.
func (b *boundaries) codesOfLengths() {
	// half is 'a' up to before the end of the block.
	half := func(p precodeWriter) {
		p.zerosAll(97)
		p.length(1)
		p.zerosAll(158)
	}
	b.raw("repeat of the length before first of all", "repeat of nothing", 257, 1, plainPrecode, func(p precodeWriter) { p.again(3) }, nil)
	for _, c := range []struct {
		name  string
		write func(p precodeWriter, n int)
		times []int // the fewest and the most
	}{
		{"zero is repeated by 17", func(p precodeWriter, n int) { p.zeros(uint(n)) }, []int{3, 10}},
		{"zero is repeated by 18", func(p precodeWriter, n int) { p.zeros2(uint(n)) }, []int{11, 138}},
		{"zero is repeated by 16", func(p precodeWriter, n int) { p.again(uint(n)) }, []int{3, 6}},
	} {
		for _, n := range c.times {
			for past, why := range []string{"", "too many lengths"} {
				ndist := 1
				nlit := min(286, 258+n-past-ndist) // 257 and a zero to repeat come before
				if left := 258 + n - past - nlit; left > 30 {
					continue // 138 have no room behind the end of the block
				} else if left > 0 {
					ndist = left
				}
				b.raw(fmt.Sprintf("%s %d times, %d past the end", c.name, n, past), why, nlit, ndist, plainPrecode, func(p precodeWriter) {
					half(p)
					p.length(1)
					p.length(0)
					c.write(p, n)
				}, func(w *writer) {
					w.setCodes(short, nil)
					if why == "" {
						w.lits([]byte("aaaa")...)
						w.end()
					}
				})
			}
		}
	}
	b.raw("zero is repeated by 18 138 times, to the end of block", "", 257, 1, plainPrecode, func(p precodeWriter) {
		p.zerosAll(97)
		p.length(1)
		p.zerosAll(20)
		p.zeros2(138)
		p.length(1)
		p.length(0)
	}, func(w *writer) {
		w.setCodes(short, nil)
		w.lits('a')
		w.end()
	})
	b.raw("zero is repeated by 18 138 times, over the end of block", "no end of block", 257, 1, plainPrecode, func(p precodeWriter) {
		p.zerosAll(97)
		p.length(1)
		p.zerosAll(22)
		p.zeros2(138)
	}, nil)
	b.raw("zero is repeated by 18 138 times, far past the end", "too many lengths", 257, 1, plainPrecode, func(p precodeWriter) {
		half(p)
		p.length(1)
		p.zeros2(138)
	}, nil)
	b.raw("a length is repeated 6 times, one past the end", "too many lengths", 257, 6, plainPrecode, func(p precodeWriter) {
		half(p)
		p.length(3)
		p.length(3)
		p.again(6)
	}, nil)
	b.raw("a length is repeated for all distances, whole", "", 258, 4, plainPrecode, func(p precodeWriter) {
		half(p)
		p.length(2)
		p.length(2)
		p.again(4)
	}, func(w *writer) {
		w.setCodes(oneLength, []uint8{2, 2, 2, 2})
		w.lits([]byte("aaaaaaaa")...)
		w.match(3, 4)
		w.end()
	})
	b.raw("a length is repeated for all distances, not whole", "code of distances", 258, 3, plainPrecode, func(p precodeWriter) {
		half(p)
		p.length(2)
		p.length(2)
		p.again(3)
	}, nil)
	b.raw("a length is repeated from literals into distances", "", 258, 2, plainPrecode, func(p precodeWriter) {
		// 256, 257 and both distances have 1 bit.
		p.zerosAll(256)
		p.length(1)
		p.again(3)
	}, func(w *writer) {
		w.setCodes(with(make([]uint8, 258), 256, 1, 257, 1), []uint8{1, 1})
		w.end()
	})
	b.raw("zeros are repeated from literals into distances", "", 258, 10, plainPrecode, func(p precodeWriter) {
		half(p)
		p.length(1)
		p.zeros2(11)
	}, func(w *writer) {
		w.setCodes(short, nil)
		w.lits([]byte("aaaaaaaa")...)
		w.end()
	})
	// Four lengths of codes, the fewest there can be, are of 16, 17, 18 and 0.
	b.body("four codes of lengths", "no end of block", func(w *writer) {
		w.block(last, typeDynamic)
		w.bits(0, 5)
		w.bits(0, 5)
		w.bits(0, 4)
		w.bits(0, 3)
		w.bits(0, 3)
		w.bits(1, 3)      // 18
		w.bits(1, 3)      // 0
		w.bits(1, 1)      // 18 is the second code
		w.bits(127, 7)    // 138
		w.bits(1, 1)      //
		w.bits(120-11, 7) // 258 in all
	})
	b.body("five codes of lengths, 256 literals of 8 bits", "", func(w *writer) {
		w.block(last, typeDynamic)
		w.bits(0, 5)
		w.bits(0, 5)
		w.bits(1, 4)
		w.bits(0, 3)
		w.bits(0, 3)
		w.bits(0, 3)
		w.bits(1, 3) // 0
		w.bits(1, 3) // 8
		lit := make([]uint8, 257)
		for i := range lit {
			if i != 255 {
				lit[i] = 8
			}
			w.bits(uint(lit[i]/8), 1)
		}
		w.bits(0, 1)
		w.setCodes(lit, nil)
		w.lits([]byte("by eight")...)
		w.end()
	})
	nothing := func(precodeWriter) {}
	b.raw("code of lengths: one code too many", "code of lengths", 257, 1, with(plainPrecode, 18, 4), nothing, nil)
	b.raw("code of lengths: far too many", "code of lengths", 257, 1, slices.Repeat([]uint8{1}, 19), nothing, nil)
	b.raw("code of lengths: one code missing", "code of lengths", 257, 1, with(plainPrecode, 18, 0), nothing, nil)
	b.raw("code of lengths: one code a bit too long", "code of lengths", 257, 1, with(plainPrecode, 18, 6), nothing, nil)
	b.raw("code of lengths: one code of two bits", "code of lengths", 257, 1, with(make([]uint8, 19), 8, 2), nothing, nil)
	b.raw("code of lengths: none", "no such code", 257, 1, make([]uint8, 19), nothing, nil)
	b.raw("code of lengths: one of one bit", "code of literals", 257, 30, with(make([]uint8, 19), 9, 1), func(p precodeWriter) {
		for range 257 + 30 {
			p.length(9)
		}
	}, nil)
	b.raw("code of lengths: the other of one bit", "no such code", 257, 30, with(make([]uint8, 19), 9, 1), func(p precodeWriter) {
		p.length(9)
		p.w.bits(1, 1)
	}, nil)
	b.raw("code of lengths: one of one bit, zeros", "no end of block", 257, 30, with(make([]uint8, 19), 18, 1), func(p precodeWriter) {
		p.zeros2(138)
		p.zeros2(138)
		p.zeros2(11)
	}, nil)
	b.raw("code of lengths: seven bits", "", 264, 1, with(make([]uint8, 19), 18, 1, 1, 2, 0, 3, 17, 4, 16, 5, 5, 6, 4, 7, 3, 7), func(p precodeWriter) {
		p.zeros2(97)
		p.length(1)
		p.zeros2(138)
		p.zeros(10)
		p.zeros(10)
		p.length(3) // 256
		p.length(3)
		p.length(3)
		p.length(4)
		p.length(4)
		p.zeros(3)
		p.length(1)
	}, func(w *writer) {
		w.setCodes(with(make([]uint8, 264), 'a', 1, 256, 3, 257, 3, 258, 3, 259, 4, 260, 4), []uint8{1})
		w.lits('a')
		w.match(3, 1)
		w.match(5, 1)
		w.match(6, 1)
		w.end()
	})
}

// codesOfLiterals and lengths.
func (b *boundaries) codesOfLiterals() {
	r := rand.New(rand.NewPCG(6, 2))
	whole286 := wholeCode(r, 286, 15)
	shortest := slices.Index(whole286, slices.Min(whole286[:256]))
	longest := slices.Index(whole286, 15)
	b.dynamic("no end of block", "no end of block", with(make([]uint8, 258), 'a', 1, 257, 1), []uint8{1}, nil)
	b.dynamic("no end of block, but bytes", "no end of block", with(make([]uint8, 257), 'a', 1, 'b', 1), []uint8{1}, func(w *writer) {
		w.lits([]byte("abababab")...)
		w.data = nil
	})
	b.dynamic("literals: one code too many", "code of literals", with(short, 'b', 15), []uint8{1}, nil)
	b.dynamic("literals: a code a bit too short", "code of literals", with(whole286, longest, 14), []uint8{1}, nil)
	b.dynamic("literals: a code missing", "code of literals", with(whole286, shortest, 0), []uint8{1}, nil)
	b.dynamic("literals: a long code missing", "code of literals", with(whole286, longest, 0), []uint8{1}, nil)
	b.dynamic("literals: end of block alone, of two bits", "code of literals", with(make([]uint8, 257), 256, 2), []uint8{1}, nil)
	b.dynamic("literals: end of block alone, of one bit", "", with(make([]uint8, 257), 256, 1), []uint8{1}, nil)
	b.dynamic("literals: end of block alone, the other code", "no such code", with(make([]uint8, 257), 256, 1), []uint8{1}, func(w *writer) { w.bits(1, 1) })
	b.body("literals: end of block alone, the other code, more behind", "no such code", func(w *writer) {
		w.dynamic(last, with(make([]uint8, 257), 256, 1), []uint8{1})
		w.bits(1, 1)
		w.bytes(noise(19, 100))
	})
}

// codesOfDistances, with and without bytes behind: the fast loop wants some.
func (b *boundaries) codesOfDistances() {
	for _, behind := range []int{0, 500} {
		many := bytes.Repeat([]byte("a"), behind)
		d := func(name, why string, dist []uint8, build func(w *writer)) {
			b.dynamic(fmt.Sprintf("distances: %s, %d bytes behind", name, behind), why, oneLength, dist, func(w *writer) {
				w.lits('a', 'a', 'a')
				if build != nil {
					build(w)
				} else if why != "" {
					w.data = nil
				}
				data := w.data
				if w.lits(many...); why != "" {
					w.data = data
				}
			})
		}
		matchOf := func(code, n uint) func(w *writer) {
			return func(w *writer) {
				w.code(w.litCode[257], w.lit[257])
				w.bits(code, n)
			}
		}
		d("one code too many", "code of distances", []uint8{1, 1, 15}, nil)
		d("a code missing", "code of distances", []uint8{1, 2}, nil)
		d("one of two bits", "code of distances", []uint8{2}, nil)
		d("one of 15 bits", "code of distances", []uint8{0, 0, 15}, nil)
		d("one of one bit", "", []uint8{0, 1}, func(w *writer) { w.match(3, 2) })
		d("one of one bit, the other code", "no such code", []uint8{0, 1}, matchOf(1, 1))
		d("one of one bit with extra bits, the other code", "no such code", with(make([]uint8, 30), 29, 1), matchOf(1, 1))
		d("two", "", []uint8{1, 1}, func(w *writer) { w.match(3, 1); w.match(3, 2) })
		d("none, no match", "", []uint8{0}, nil)
		d("none of 30, no match", "", make([]uint8, 30), nil)
		d("none, and a match", "no such code", []uint8{0}, matchOf(0, 1))
		d("none, and a match of ones", "no such code", []uint8{0}, matchOf(1, 1))
	}
}

// longCodes, and with them second tables of every size.
func (b *boundaries) longCodes() {
	r := rand.New(rand.NewPCG(8, 2))
	for i := range 40 {
		lit, dist := wholeCode(r, 286, 15), wholeCode(r, 30, 15)
		lit[256], lit[slices.Index(lit, 15)] = 15, lit[256]
		b.dynamic(fmt.Sprintf("codes of 15 bits, %d", i), "", lit, dist, func(w *writer) {
			for _, i := range r.Perm(256) {
				w.lits(byte(i))
			}
			w.lits(noise(20, fastOut)...)
			for length := 3; length <= 258; length++ {
				distance := 1 << r.IntN(15)
				w.match(length, min(len(w.data), distance+r.IntN(distance)))
			}
			w.lits(noise(21, 2*fastOut)...)
		})
	}
}

// emptyBlocks, and codes that follow others.
func (b *boundaries) emptyBlocks() {
	r := rand.New(rand.NewPCG(9, 2))
	for _, n := range []int{1, 2, 10_000} {
		b.body(fmt.Sprintf("%d empty blocks, stored", n), "", func(w *writer) {
			for range n - 1 {
				w.stored(more, nil)
			}
			w.stored(last, nil)
		})
		b.body(fmt.Sprintf("%d empty blocks, fixed", n), "", func(w *writer) {
			for range n - 1 {
				w.fixed(more)
				w.end()
			}
			w.fixed(last)
			w.end()
		})
		b.body(fmt.Sprintf("%d empty blocks between bytes", n), "", func(w *writer) {
			for i := range n {
				w.fixed(more)
				w.end()
				if i%2 == 0 {
					w.stored(more, nil)
				}
				if i%5 == 0 {
					w.fixed(more)
					w.lits(byte(i))
					w.end()
				}
			}
			w.fixed(last)
			w.match(3, 1)
			w.end()
		})
	}
	b.body("1000 empty blocks, dynamic, each of another code", "", func(w *writer) {
		for range 1000 {
			w.dynamic(more, wholeCode(r, 257+r.IntN(30), 15), wholeCode(r, 2+r.IntN(29), 15))
			w.end()
		}
		w.stored(last, nil)
	})
	b.body("fixed, dynamic, fixed", "", func(w *writer) {
		w.fixed(more)
		w.lits(noise(22, 50)...)
		w.end()
		w.dynamic(more, wholeCode(r, 286, 15), wholeCode(r, 30, 15))
		w.lits(noise(23, 50)...)
		w.end()
		w.fixed(last)
		w.lits(noise(24, 50)...)
		w.match(50, 100)
		w.end()
	})
}

// headers of members.
func (b *boundaries) headers() {
	for flags := range byte(32) {
		field := func(flag byte, s string) []byte {
			if flags&flag != 0 {
				return []byte(s)
			}
			return nil
		}
		b.headed(fmt.Sprintf("flags %#x", flags), "", flags, field(flagExtra, "extra"), field(flagName, "name"), field(flagComment, "comment"))
	}
	for bit := range 3 {
		b.headed(fmt.Sprintf("reserved flag %#x", 32<<bit), "reserved flags", 32<<bit, nil, nil, nil).std = "accepts"
	}
	b.headed("empty fields", "", flagHeaderCRC, []byte{}, []byte{}, []byte{})
	b.headed("extra field of 65535 bytes, zeros", "", flagHeaderCRC, make([]byte, 65535), nil, nil)
	b.headed("extra field of 65535 bytes", "", flagHeaderCRC, noise(25, 65535), []byte("name"), nil)
	// compress/gzip takes names of up to 511 bytes and the zero, the RFC any.
	long := func(n int) []byte { return bytes.Repeat([]byte("n"), n) }
	b.headed("name of 511 bytes", "", flagHeaderCRC, nil, long(511), nil)
	b.headed("name of 512 bytes", "", flagHeaderCRC, nil, long(512), nil).std = "refuses"
	b.headed("name of MaxHeaderBytes", "", flagHeaderCRC, nil, long(MaxHeaderBytes-1), nil).std = "refuses"
	b.headed("name of MaxHeaderBytes and one", "long header", flagHeaderCRC, nil, long(MaxHeaderBytes), nil)
	b.headed("comment of MaxHeaderBytes", "", 0, nil, nil, long(MaxHeaderBytes-1)).std = "refuses"
	b.headed("comment of MaxHeaderBytes and one", "long header", 0, nil, nil, long(MaxHeaderBytes))
	b.headed("fields of MaxHeaderBytes", "", flagHeaderCRC, long(65535), long(100), long(MaxHeaderBytes-65535-102)).std = "refuses"
	b.headed("fields of MaxHeaderBytes and one", "long header", flagHeaderCRC, long(65535), long(100), long(MaxHeaderBytes-65535-101))
	for at, name := range map[int]string{0: "first byte of magic", 1: "second byte of magic", 2: "method"} {
		for bit := range 8 {
			b.headed(fmt.Sprintf("%s wrong by bit %d", name, bit), "no member", 0, nil, nil, nil).bytes[at] ^= 1 << bit
		}
	}
	for bit := range 16 {
		s := b.headed(fmt.Sprintf("header CRC wrong by bit %d", bit), "header CRC", flagHeaderCRC, []byte("extra"), []byte("name"), []byte("comment"))
		s.bytes[10+2+5+5+8+bit/8] ^= 1 << (bit % 8)
	}
	for at := range 10 + 2 + 5 + 5 + 8 {
		if at < 4 || at == 10 || at == 11 || at == 21 || at == 29 {
			continue // says something else
		}
		b.headed(fmt.Sprintf("header CRC of another byte %d", at), "header CRC", flagHeaderCRC, []byte("extra"), []byte("name"), []byte("comment")).bytes[at] ^= 1
	}
}

// trailers of members.
func (b *boundaries) trailers() {
	for bit := range 32 {
		for _, c := range []struct {
			why       string
			crc, size uint32
		}{{"CRC", 1 << bit, 0}, {"size", 0, 1 << bit}} {
			b.whole(fmt.Sprintf("%s wrong by bit %d", c.why, bit), c.why, func(w *writer) {
				w.member()
				w.fixed(last)
				w.lits([]byte("data")...)
				w.end()
				w.wrongTrailer(c.crc, c.size)
			})
		}
	}
	b.whole("no trailer", "cut", func(w *writer) {
		w.member()
		w.stored(last, []byte("data"))
	})
}

// members, one behind the other, and what is none.
func (b *boundaries) members() {
	for _, n := range []int{2, 3, 2000} {
		b.whole(fmt.Sprintf("%d empty members", n), "", func(w *writer) {
			for range n {
				w.member()
				w.fixed(last)
				w.end()
				w.trailer()
			}
		})
	}
	for _, n := range []int{3, 1000, windowBytes, 2 * windowBytes} {
		two := func(name, why string, distance int) {
			b.whole(fmt.Sprintf("%s, behind one of %d bytes", name, n), why, func(w *writer) {
				w.member()
				for left := text(26, n); len(left) > 0; left = left[min(len(left), 60_000):] {
					w.stored(more, left[:min(len(left), 60_000)])
				}
				w.fixed(last)
				w.lits('a', 'b')
				w.end()
				w.trailer()
				w.header(0, nil, []byte("second"), nil)
				w.fixed(last)
				w.lits('1', '2')
				w.match(5, distance)
				data := w.data
				if w.lits(text(27, 2*fastOut)...); why != "" {
					w.data = data
				}
				w.end()
				w.trailer()
			})
		}
		two("second member, match from its first byte", "", 2)
		two("second member, match from before it", "distance", 3)
	}
	b.whole("second member with the CRC of both", "CRC", func(w *writer) {
		w.member()
		w.stored(last, []byte("first"))
		w.trailer()
		w.member()
		w.stored(last, []byte("second"))
		w.begin = 0
		w.trailer()
	})
	member := func(w *writer) {
		w.member()
		w.stored(last, []byte("data"))
		w.trailer()
	}
	for _, n := range []int{1, 2, 9, 10, 11, 512, 100_000} {
		b.whole(fmt.Sprintf("%d zeros behind", n), "no member", func(w *writer) { member(w); w.bytes(make([]byte, n)) })
		b.whole(fmt.Sprintf("%d bytes of garbage behind", n), "no member", func(w *writer) { member(w); w.bytes(text(28, n)) })
	}
	for n := 1; n < 10; n++ {
		b.whole(fmt.Sprintf("%d bytes of a member behind", n), "cut", func(w *writer) {
			member(w)
			w.bytes(append([]byte(magic), make([]byte, 7)...)[:n])
		})
	}
	b.whole("nothing at all", "cut", func(*writer) {})
}

// with is a code with other lengths for some symbols, told in pairs.
func with(base []uint8, changes ...int) []uint8 {
	out := slices.Clone(base)
	for i := 0; i < len(changes); i += 2 {
		out[changes[i]] = uint8(changes[i+1])
	}
	return out
}

func TestStreams(t *testing.T) {
	names, whys := map[string]bool{}, map[string]bool{}
	for _, s := range streams() {
		if names[s.name] {
			t.Errorf("two streams are named %s", s.name)
		}
		names[s.name], whys[s.why] = true, true
		wantErr := io.EOF
		switch s.why {
		case "":
		case "cut":
			wantErr = io.ErrUnexpectedEOF
		default:
			wantErr = fmt.Errorf("%w: %s", ErrCorrupt, s.why)
		}
		limit := len(s.data) + 1000
		// That it is the stream that its name says.
		got, err := naive(s.bytes, limit)
		if wants(t, s.name+", naive", got, err, s.data, wantErr); err.Error() != wantErr.Error() {
			t.Errorf("%s, naive: %v, not %v", s.name, err, wantErr)
		}
		for _, buf := range []int{1, 3, 17, 258, fastOut - 1, fastOut, fastOut + 1, 4096, windowBytes - 1, windowBytes, windowBytes + 1, 300 << 10} {
			if buf < 100 && len(s.data) > 4000 {
				continue // each Read moves the window
			}
			got, err := drain(t, NewReader(bytes.NewReader(s.bytes)), limit, always(buf))
			wants(t, fmt.Sprintf("%s, by %d", s.name, buf), got, err, s.data, wantErr)
		}
		for _, source := range sources[1:] {
			if len(s.bytes) > 5000 {
				continue // slow
			}
			got, err := drain(t, NewReader(source.of(bytes.NewReader(s.bytes))), limit, always(300<<10))
			wants(t, fmt.Sprintf("%s, %s", s.name, source.name), got, err, s.data, wantErr)
		}
		for n := 1; n < len(s.data); n += 1 + len(s.data)/20 {
			got, err := drain(t, NewReader(bytes.NewReader(s.bytes)), limit, first(n, 300<<10))
			wants(t, fmt.Sprintf("%s, split after %d", s.name, n), got, err, s.data, wantErr)
		}
		std, err := library(s.bytes, limit)
		accepts := s.why == ""
		if s.std != "" {
			if accepts = s.std == "accepts"; accepts == (s.why == "") {
				t.Errorf("%s: compress/gzip does the same", s.name)
			}
		}
		if (err == io.EOF) != accepts {
			t.Errorf("%s: compress/gzip says %v", s.name, err)
		}
		if s.why == "" && accepts && !bytes.Equal(std, s.data) {
			t.Errorf("%s: compress/gzip gives something else", s.name)
		}
		if t.Failed() {
			t.Fatalf("%s: %x", s.name, s.bytes[:min(len(s.bytes), 200)])
		}
	}
	source, err := os.ReadFile("naive_test.go")
	if err != nil {
		t.Fatal(err)
	}
	reasons := regexp.MustCompile(`\.corrupt\("(.*?)"\)`).FindAllSubmatch(source, -1)
	if len(reasons) < 10 {
		t.Errorf("%d reasons found", len(reasons))
	}
	for _, reason := range reasons {
		if !whys[string(reason[1])] {
			t.Errorf("no stream is refused for %q", reason[1])
		}
	}
}

// TestWriter holds the tables of the writer against RFC 1951 section 3.2.5.
func TestWriter(t *testing.T) {
	for _, c := range []struct {
		symbol, base int
		extra        uint
		of           func(int) (int, int, uint)
	}{
		{257, 3, 0, lengthSymbol}, {264, 10, 0, lengthSymbol}, {265, 11, 1, lengthSymbol}, {284, 227, 5, lengthSymbol}, {285, 258, 0, lengthSymbol},
		{0, 1, 0, distSymbol}, {3, 4, 0, distSymbol}, {4, 5, 1, distSymbol}, {29, 24577, 13, distSymbol},
	} {
		if symbol, base, extra := c.of(c.base); symbol != c.symbol || base != c.base || extra != c.extra {
			t.Errorf("%d: symbol %d, base %d, %d extra bits", c.base, symbol, base, extra)
		}
	}
	w := &writer{}
	w.bits(5, 3)
	w.bits(0x1ff, 9)
	w.code(0b0110000, 7)
	if got := binary.LittleEndian.Uint16(w.out); got != 5|0x1ff<<3|0b110<<12 {
		t.Errorf("%b", w.out)
	}
}
