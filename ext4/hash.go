package ext4

import "math/bits"

// A nameHash orders the entries of an indexed directory: half of MD4 over
// the name (fs/ext4/hash.c), bytes taken as signed, as the superblock says.
type nameHash struct{ major, minor uint32 }

// hashSeed is the state that hashing starts from. An unset seed means MD4's own.
func hashSeed(seed [16]byte) [4]uint32 {
	if seed == [16]byte{} {
		return [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}
	}
	var s [4]uint32
	for i := range s {
		s[i] = le.Uint32(seed[4*i:])
	}
	return s
}

func hashName(name string, state [4]uint32) nameHash {
	const (
		chunk     = 32
		endOfTree = 0x7fffffff << 1 // means "no more" in a directory position
	)
	for p := name; ; p = p[chunk:] {
		in := hashWords(p)
		halfMD4(&state, &in)
		if len(p) <= chunk {
			break
		}
	}
	h := nameHash{state[1] &^ 1, state[2]}
	if h.major == endOfTree {
		h.major = (0x7fffffff - 1) << 1
	}
	return h
}

// hashWords is str2hashbuf_signed for one chunk: eight words, padded with the
// length of what is left.
func hashWords(p string) (w [8]uint32) {
	pad := uint32(len(p)) | uint32(len(p))<<8
	pad |= pad << 16
	for i := range w {
		w[i] = pad
		for j := 4 * i; j < 4*i+4 && j < len(p); j++ {
			w[i] = w[i]<<8 + uint32(int32(int8(p[j])))
		}
	}
	return w
}

// halfMD4 is half_md4_transform of fs/ext4/hash.c: MD4 with half of its steps.
func halfMD4(state *[4]uint32, in *[8]uint32) {
	const k2, k3 = 0x5A827999, 0x6ED9EBA1
	a, b, c, d := state[0], state[1], state[2], state[3]
	round := func(f func(x, y, z uint32) uint32, k uint32, order [8]uint8, s [4]int) {
		for i := 0; i < 8; i += 4 {
			a = bits.RotateLeft32(a+f(b, c, d)+in[order[i]]+k, s[0])
			d = bits.RotateLeft32(d+f(a, b, c)+in[order[i+1]]+k, s[1])
			c = bits.RotateLeft32(c+f(d, a, b)+in[order[i+2]]+k, s[2])
			b = bits.RotateLeft32(b+f(c, d, a)+in[order[i+3]]+k, s[3])
		}
	}
	choose := func(x, y, z uint32) uint32 { return z ^ (x & (y ^ z)) }
	majority := func(x, y, z uint32) uint32 { return x&y + (x^y)&z }
	parity := func(x, y, z uint32) uint32 { return x ^ y ^ z }
	round(choose, 0, [8]uint8{0, 1, 2, 3, 4, 5, 6, 7}, [4]int{3, 7, 11, 19})
	round(majority, k2, [8]uint8{1, 3, 5, 7, 0, 2, 4, 6}, [4]int{3, 5, 9, 13})
	round(parity, k3, [8]uint8{3, 7, 2, 6, 1, 5, 0, 4}, [4]int{3, 9, 11, 15})
	state[0] += a
	state[1] += b
	state[2] += c
	state[3] += d
}
