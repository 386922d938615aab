package ext4

import (
	"encoding/binary"
	"math/bits"
)

// A nameHash orders the entries of an indexed directory.
type nameHash struct{ major, minor uint32 }

// Hash versions, as s_def_hash_version and the root of an htree have them.
// Whether bytes are signed says the superblock (s_flags).
const (
	hashLegacy  = 0
	hashHalfMD4 = 1
	hashTEA     = 2
)

// dirHash is how a file system hashes names (fs/ext4/hash.c).
type dirHash struct {
	version  byte
	unsigned bool      // bytes are 0 to 255, else -128 to 127
	state    [4]uint32 // from hashSeed
}

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

// sum is ext4fs_dirhash.
func (d *dirHash) sum(name string) (h nameHash) {
	const endOfTree = 0x7fffffff << 1 // means "no more" in a directory position
	state := d.state
	switch d.version {
	case hashLegacy:
		h.major = d.legacy(name)
	case hashTEA:
		var in [4]uint32
		for p := name; len(p) > 0; p = p[min(4*len(in), len(p)):] {
			d.words(p, in[:])
			tea(&state, &in)
		}
		h = nameHash{state[0], state[1]}
	default:
		var in [8]uint32
		for p := name; len(p) > 0; p = p[min(4*len(in), len(p)):] {
			d.words(p, in[:])
			halfMD4(&state, &in)
		}
		h = nameHash{state[1], state[2]}
	}
	if h.major &^= 1; h.major == endOfTree {
		h.major = (0x7fffffff - 1) << 1
	}
	return h
}

// words is str2hashbuf_signed or _unsigned for one chunk: the bytes big endian,
// padded with the length of what is left.
func (d *dirHash) words(p string, w []uint32) {
	pad := uint32(len(p)) | uint32(len(p))<<8
	pad |= pad << 16
	for i := range w {
		var part [4]byte
		n := 0
		if 4*i < len(p) {
			n = copy(part[:], p[4*i:])
		}
		switch word := binary.BigEndian.Uint32(part[:]); {
		case n == 4 && (d.unsigned || word&0x80808080 == 0):
			w[i] = word
		default:
			w[i] = pad
			for _, c := range part[:n] {
				w[i] = w[i]<<8 + d.value(c)
			}
		}
	}
}

// value is a byte as the hash takes it.
func (d *dirHash) value(c byte) uint32 {
	if d.unsigned {
		return uint32(c)
	}
	return uint32(int32(int8(c)))
}

// legacy is dx_hack_hash.
func (d *dirHash) legacy(name string) uint32 {
	h0, h1 := uint32(0x12a3fe2d), uint32(0x37abe8f9)
	for i := range len(name) {
		h := h1 + (h0 ^ d.value(name[i])*7152373)
		if h&0x80000000 != 0 {
			h -= 0x7fffffff
		}
		h0, h1 = h, h0
	}
	return h0 << 1
}

// tea is TEA_transform: sixteen rounds of the cipher of that name.
func tea(state *[4]uint32, key *[4]uint32) {
	const delta = 0x9E3779B9
	x, y, sum := state[0], state[1], uint32(0)
	for range 16 {
		sum += delta
		x += (y<<4 + key[0]) ^ (y + sum) ^ (y>>5 + key[1])
		y += (x<<4 + key[2]) ^ (x + sum) ^ (x>>5 + key[3])
	}
	state[0] += x
	state[1] += y
}

// halfMD4 is half_md4_transform: MD4 with half of its steps.
func halfMD4(state *[4]uint32, in *[8]uint32) {
	const k2, k3 = 0x5A827999, 0x6ED9EBA1
	a, b, c, d := state[0], state[1], state[2], state[3]
	for i := 0; i < 8; i += 4 {
		a = bits.RotateLeft32(a+(d^(b&(c^d)))+in[i], 3)
		d = bits.RotateLeft32(d+(c^(a&(b^c)))+in[i+1], 7)
		c = bits.RotateLeft32(c+(b^(d&(a^b)))+in[i+2], 11)
		b = bits.RotateLeft32(b+(a^(c&(d^a)))+in[i+3], 19)
	}
	for i := 1; i >= 0; i-- { // words 1 3 5 7, then 0 2 4 6
		a = bits.RotateLeft32(a+(b&c+(b^c)&d)+in[i]+k2, 3)
		d = bits.RotateLeft32(d+(a&b+(a^b)&c)+in[i+2]+k2, 5)
		c = bits.RotateLeft32(c+(d&a+(d^a)&b)+in[i+4]+k2, 9)
		b = bits.RotateLeft32(b+(c&d+(c^d)&a)+in[i+6]+k2, 13)
	}
	for i := 3; i >= 1; i -= 2 { // words 3 7 2 6, then 1 5 0 4
		a = bits.RotateLeft32(a+(b^c^d)+in[i]+k3, 3)
		d = bits.RotateLeft32(d+(a^b^c)+in[i+4]+k3, 9)
		c = bits.RotateLeft32(c+(d^a^b)+in[i-1]+k3, 11)
		b = bits.RotateLeft32(b+(c^d^a)+in[i+3]+k3, 15)
	}
	state[0] += a
	state[1] += b
	state[2] += c
	state[3] += d
}
