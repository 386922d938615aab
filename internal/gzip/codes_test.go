package gzip

import (
	"math/bits"
	"math/rand/v2"
	"testing"
)

// enough searches all whole codes of up to symbols symbols for the one whose
// table, looked up by root bits first, is the largest. It returns the number
// of its entries and the lengths of its codes. A code is known by how many
// symbols have each length: second tables are made in that order, and each is
// as small as what stands in it allows.
func enough(symbols, root int) (entries int, lengths []uint8) {
	// left codes of that length are not given yet, for symbols symbols; the
	// second table that was begun last has room for that many of them.
	type node struct{ symbols, left, length, room int }
	type choice struct{ entries, codes int } // from here on; of this length
	chosen := map[node]choice{}
	var choose func(n node) choice
	choose = func(n node) (best choice) {
		if c, ok := chosen[n]; ok {
			return c
		}
		begin := n
		size, begun := 1<<(n.length-root), 0
		use := func(codes int) {
			for n.room < codes {
				codes -= n.room
				n.room = size
				begun += size
			}
			n.room -= codes
		}
		if n.symbols == n.left {
			use(n.left)
			best = choice{begun, n.left}
		} else {
			least := max(0, 2*n.left-n.symbols)
			deeper := 1 << (maxCodeBits - n.length)
			most := (n.left*deeper - n.symbols) / (deeper - 1)
			use(least)
			for codes := least; codes <= most; codes++ {
				c := choose(node{n.symbols - codes, 2 * (n.left - codes), n.length + 1, 2 * n.room})
				c.entries += begun
				if n.room > 0 {
					c.entries += size // twice as large, for it is not full
				}
				if c.entries > best.entries {
					best = choice{c.entries, codes}
				}
				use(1)
			}
		}
		chosen[begin] = best
		return best
	}
	var first node
	short := 0
	for prefixes := 1; prefixes <= 1<<root; prefixes++ {
		// The fewest symbols fill the rest of the first table.
		rest := 1<<root - prefixes
		for n := 2 * prefixes; n <= min(symbols-bits.OnesCount(uint(rest)), prefixes<<(maxCodeBits-root)); n++ {
			start := node{n, 2 * prefixes, root + 1, 0}
			if c := choose(start); 1<<root+c.entries > entries {
				entries, first, short = 1<<root+c.entries, start, rest
			}
		}
	}
	for i := range root + 1 {
		if short>>i&1 != 0 {
			lengths = append(lengths, uint8(root-i))
		}
	}
	for n := first; ; {
		c := chosen[n]
		for range c.codes {
			lengths = append(lengths, uint8(n.length))
		}
		if n.symbols == n.left {
			return entries, lengths
		}
		size := 1 << (n.length - root)
		room := (n.room-c.codes)%size + size
		n = node{n.symbols - c.codes, 2 * (n.left - c.codes), n.length + 1, 2 * (room % size)}
	}
}

// TestEnough: no code needs more room than its table has. The one that needs
// most is built, so that the search and build agree on what it takes.
func TestEnough(t *testing.T) {
	for _, c := range []struct {
		symbols int
		root    uint
		entries int
		room    int
		of      []entry
	}{
		{288, litlenBits, 2342, litlenRoom, litlenSymbols[:]},
		{32, distBits, 402, distRoom, distSymbols[:]},
	} {
		entries, lengths := enough(c.symbols, int(c.root))
		if entries != c.entries || entries > c.room {
			t.Errorf("%d symbols by %d bits: %d entries, not %d", c.symbols, c.root, entries, c.entries)
		}
		if len(lengths) > c.symbols {
			t.Fatalf("%d symbols, not %d", len(lengths), c.symbols)
		}
		const untouched = ^entry(0)
		table := make([]entry, 2*c.room)
		for i := range table {
			table[i] = untouched
		}
		if !build(table, c.root, lengths, c.of) {
			t.Fatalf("%d symbols: refused: %v", c.symbols, lengths)
		}
		for i, e := range table {
			if (e == untouched) != (i >= entries) {
				t.Fatalf("%d symbols by %d bits: build touches entry %d of %d: %v", c.symbols, c.root, i, entries, e != untouched)
			}
		}
	}
}

// TestBuild looks every 15 bits up in tables of many codes, and compares with
// the naive code. The table was another code's before.
func TestBuild(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 0))
	table := make([]entry, litlenRoom)
	for i := range 60 {
		lengths := [][]uint8{wholeCode(r, 2+r.IntN(287), 15), wholeCode(r, 288, 9+uint8(i/10)), {1}, {0, 1}, {0, 0}}[max(0, i-55)]
		naive := newNaiveCode(lengths)
		for _, root := range []uint{litlenBits, distBits} {
			if !build(table, root, lengths, litlenSymbols[:]) || naive == nil {
				t.Fatalf("refused: %v", lengths)
			}
			for v := range uint(1 << maxCodeBits) {
				want, wantBits := kindBad|1, uint(0)
				code, n := 1, uint(0)
				for n < maxCodeBits && code < len(naive.symbols)/2 {
					code = code<<1 | int(v>>n&1)
					n++
					if s := naive.symbols[code]; s >= 0 {
						want, wantBits = litlenSymbols[s], n
						break
					}
				}
				e := table[v&(1<<root-1)]
				n = e.codeBits()
				if e&kindLink != 0 {
					e = table[uint(e.value())+v>>root&(1<<n-1)]
					n = root + e.codeBits()
				}
				got := e
				if e != kindBad|1 {
					got = e&^0xfff | entry(e.consume()-e.codeBits())
				}
				if got != want || n != wantBits {
					t.Fatalf("%d symbols by %d bits, %015b: %#x of %d bits, not %#x of %d", len(lengths), root, v, got, n, want, wantBits)
				}
			}
		}
	}
}
