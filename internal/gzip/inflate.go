package gzip

// In the fast loop of inflate one turn reads at most fastIn bytes of input and
// writes at most fastOut bytes, those that a copy by words writes too many
// among them.
const (
	fastIn  = 16
	fastOut = 3 + maxMatch + 16
)

// inflate goes on with a block of coded data into p[n:] and returns where it
// ends: when p is full, at the end of the block, or at z.err.
func (z *Reader) inflate(p []byte, n int) int {
	for z.state == inCoded && z.err == nil && n < len(p) {
		if z.length > 0 {
			n = z.match(p, n)
			continue
		}
		if z.w-z.r < 2*fastIn {
			z.fill()
		}
		if len(p)-n >= fastOut && z.w-z.r >= fastIn {
			n = z.fast(p, n)
			if z.err != nil || z.state != inCoded || z.length > 0 {
				continue
			}
		}
		n = z.slow(p, n)
	}
	return n
}

// slow inflates one symbol. It needs no room but for one byte.
func (z *Reader) slow(p []byte, n int) int {
	z.refill()
	bits, nbits := z.bits, z.nbits
	next := func(table []entry, tableBits uint) (value int, e entry) {
		e = table[bits&(1<<tableBits-1)]
		if e&kindLink != 0 {
			sub := bits >> tableBits & (1<<e.codeBits() - 1)
			if nbits < tableBits {
				return 0, kindBad | 64
			}
			bits >>= tableBits
			nbits -= tableBits
			e = table[e.value()+int(sub)]
		}
		if nbits < e.consume() {
			return 0, kindBad | 64
		}
		value = e.value()
		if e&(kindLiteral|kindSpecial) == 0 {
			value += int(bits & (1<<e.consume() - 1) >> e.codeBits())
		}
		bits >>= e.consume()
		nbits -= e.consume()
		return value, e
	}
	bad := func(e entry) int {
		if z.err = ErrCorrupt; e.consume() == 64 {
			z.err = z.ended()
		}
		return n
	}
	length, e := next(z.litlen[:], litlenBits)
	switch {
	case e&kindBad != 0:
		return bad(e)
	case e&kindEnd != 0:
		z.bits, z.nbits = bits, nbits
		z.state = atBlock
		return n
	case e&kindLiteral != 0:
		z.bits, z.nbits = bits, nbits
		p[n] = uint8(length)
		return n + 1
	}
	distance, e := next(z.dist[:], distBits)
	if e&kindBad != 0 {
		return bad(e)
	}
	z.bits, z.nbits = bits, nbits
	z.length, z.distance = length, distance
	return n
}

// match copies what is left of a match, as much as there is room for.
func (z *Reader) match(p []byte, n int) int {
	if z.distance > n-z.base+z.windowN {
		z.err = ErrCorrupt
		return n
	}
	for z.length > 0 && n < len(p) {
		if back := z.distance - (n - z.base); back > 0 {
			m := copy(p[n:], z.window[z.windowN-back:z.windowN-back+min(z.length, back)])
			n += m
			z.length -= m
			continue
		}
		p[n] = p[n-z.distance]
		n++
		z.length--
	}
	return n
}

// fast inflates while there is input and room for a whole turn. It stops
// before a match that reaches into the window, with z.length set.
func (z *Reader) fast(p []byte, n int) int {
	in, at := z.in[:z.w], z.r
	inEnd, outEnd := z.w-fastIn, len(p)-fastOut
	base := z.base
	litlen, dist := &z.litlen, &z.dist
	// Above nbits bits may have what comes next, as at has it.
	bits, nbits := z.bits, z.nbits
	for at <= inEnd && n <= outEnd {
		bits |= load64(in, at) << (nbits & 63)
		at += int((63 - nbits) >> 3)
		nbits |= 56
		// At least 56 bits: three codes of a table, or two and the refill. Literals
		// come in rows, so the two after the first are written out.
		e := litlen[bits&(1<<litlenBits-1)]
		if e&kindLiteral != 0 {
			bits >>= e.consume() & 63
			nbits -= e.consume()
			p[n] = uint8(e >> 16)
			n++
			e = litlen[bits&(1<<litlenBits-1)]
			if e&kindLiteral != 0 {
				bits >>= e.consume() & 63
				nbits -= e.consume()
				p[n] = uint8(e >> 16)
				n++
				e = litlen[bits&(1<<litlenBits-1)]
				if e&kindLiteral != 0 {
					bits >>= e.consume() & 63
					nbits -= e.consume()
					p[n] = uint8(e >> 16)
					n++
					continue
				}
			}
			bits |= load64(in, at) << (nbits & 63)
			at += int((63 - nbits) >> 3)
			nbits |= 56
		}
		if e&kindSpecial != 0 {
			if e&kindLink != 0 {
				bits >>= litlenBits
				nbits -= litlenBits
				e = litlen[(uint(e>>16)+uint(bits)&(1<<e.codeBits()-1))&(litlenRoom-1)]
				if e&kindLiteral != 0 {
					bits >>= e.consume() & 63
					nbits -= e.consume()
					p[n] = uint8(e >> 16)
					n++
					continue
				}
			}
			if e&kindEnd != 0 {
				bits >>= e.consume() & 63
				nbits -= e.consume()
				z.state = atBlock
				break
			}
			if e&kindBad != 0 {
				z.err = ErrCorrupt
				break
			}
		}
		length := int(e>>16) + int(bits&(1<<(e.consume()&63)-1)>>e.codeBits())
		bits >>= e.consume() & 63
		nbits -= e.consume()
		// At least 36 bits are left: 28 are the most of a distance.
		e = dist[bits&(1<<distBits-1)]
		if e&kindSpecial != 0 {
			if e&kindLink != 0 {
				bits >>= distBits
				nbits -= distBits
				e = dist[(uint(e>>16)+uint(bits)&(1<<e.codeBits()-1))&(distRoom-1)]
			}
			if e&kindBad != 0 {
				z.err = ErrCorrupt
				break
			}
		}
		distance := int(e>>16) + int(bits&(1<<(e.consume()&63)-1)>>e.codeBits())
		bits >>= e.consume() & 63
		nbits -= e.consume()
		if distance > n-base {
			z.length, z.distance = length, distance
			break
		}
		from, end := n-distance, n+length
		switch {
		case distance >= 8:
			store64(p, n, load64(p, from))
			store64(p, n+8, load64(p, from+8))
			for n += 16; n < end; n += 8 {
				from += 8
				store64(p, n, load64(p, from+8))
			}
		case distance == 1:
			v := uint64(p[from]) * 0x0101010101010101
			for ; n < end; n += 8 {
				store64(p, n, v)
			}
		default:
			for ; n < end; n++ {
				p[n] = p[from]
				from++
			}
		}
		n = end
	}
	z.r = at
	z.bits, z.nbits = bits&(1<<nbits-1), nbits
	return n
}
