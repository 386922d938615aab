package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A listFile is one generated file of the module folder.
type listFile struct {
	name string
	data []byte
}

// lists makes what depmod(8) makes: the text files for people, and the .bin
// indexes, which are all that libkmod looks at. (It reads modules.softdep,
// modules.weakdep and modules.devname as text.)
func (ix *moduleIndex) lists() ([]listFile, error) {
	var dep, alias, softdep, weakdep, symbols, devname bytes.Buffer
	var depIndex, aliasIndex, symbolIndex, builtinIndex, builtinAliasIndex keyIndex
	alias.WriteString("# Aliases extracted from modules themselves.\n")
	softdep.WriteString("# Soft dependencies extracted from modules themselves.\n")
	weakdep.WriteString("# Weak dependencies extracted from modules themselves.\n")
	symbols.WriteString("# Aliases for symbols, used by symbol_request().\n")
	devname.WriteString("# Device nodes to trigger on-demand module loading.\n")
	for i, m := range ix.modules {
		prio := uint32(i)
		line := m.path + ":"
		for _, d := range slices.Backward(m.load) { // the last is loaded first
			line += " " + d.path
		}
		dep.WriteString(line + "\n")
		depIndex.add(m.name, line, prio)
		for _, a := range m.aliases {
			fmt.Fprintf(&alias, "alias %s %s\n", a, m.name)
			if key, ok := normalizeAlias(a); ok {
				aliasIndex.add(key, m.name, prio)
			}
		}
		for _, s := range m.softdeps {
			fmt.Fprintf(&softdep, "softdep %s %s\n", m.name, s)
		}
		for _, s := range m.weakdeps {
			fmt.Fprintf(&weakdep, "weakdep %s %s\n", m.name, s)
		}
		for _, s := range m.symbols {
			fmt.Fprintf(&symbols, "alias symbol:%s %s\n", s, m.name)
			symbolIndex.add("symbol:"+s, m.name, prio)
		}
		if node, ok := deviceNode(m.aliases); ok {
			fmt.Fprintf(&devname, "%s %s\n", m.name, node)
		}
	}
	for _, name := range ix.builtin {
		builtinIndex.add(name, "", 0)
	}
	for _, b := range ix.builtinAliases {
		if key, ok := normalizeAlias(b.alias); ok {
			builtinAliasIndex.add(key, b.name, 0)
		}
	}
	files := []listFile{
		{"modules.alias", alias.Bytes()},
		{"modules.dep", dep.Bytes()},
		{"modules.devname", devname.Bytes()},
		{"modules.softdep", softdep.Bytes()},
		{"modules.symbols", symbols.Bytes()},
		{"modules.weakdep", weakdep.Bytes()},
	}
	for _, x := range []struct {
		name string
		keys *keyIndex
	}{
		{"modules.alias.bin", &aliasIndex},
		{"modules.builtin.alias.bin", &builtinAliasIndex},
		{"modules.builtin.bin", &builtinIndex},
		{"modules.dep.bin", &depIndex},
		{"modules.symbols.bin", &symbolIndex},
	} {
		data, err := x.keys.encode()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", x.name, err)
		}
		files = append(files, listFile{x.name, data})
	}
	return files, nil
}

// normalizeAlias writes "_" for "-" outside of brackets, as libkmod does
// before it looks an alias up. An alias with unpaired brackets is not found.
func normalizeAlias(alias string) (string, bool) {
	b := []byte(alias)
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '-':
			b[i] = '_'
		case ']':
			return "", false
		case '[':
			end := bytes.IndexByte(b[i:], ']')
			if end < 0 {
				return "", false
			}
			i += end
		}
	}
	return string(b), true
}

// deviceNode finds the node that a module's aliases ask for, as
// "NAME cMAJOR:MINOR": what kmod static-nodes makes, such as net/tun.
func deviceNode(aliases []string) (string, bool) {
	var name, number string
	for _, a := range aliases {
		if n, ok := strings.CutPrefix(a, "devname:"); ok && n != "" && !strings.ContainsAny(n, " \t") {
			name = n
		}
		for _, kind := range []string{"char", "block"} {
			rest, ok := strings.CutPrefix(a, kind+"-major-")
			major, minor, ok2 := strings.Cut(rest, "-")
			if !ok || !ok2 {
				continue
			}
			x, err := strconv.ParseUint(major, 10, 12)
			y, err2 := strconv.ParseUint(minor, 10, 20)
			if err == nil && err2 == nil {
				number = fmt.Sprintf("%c%d:%d", kind[0], x, y)
			}
		}
	}
	return name + " " + number, name != "" && number != ""
}

// A keyIndex is libkmod's on-disk index (kmod, libkmod-index.h): a trie of
// keys with common prefixes joined, integers big-endian, children before
// their parent, and flags in the high bits of each node's offset.
type keyIndex struct{ entries []keyEntry }

type keyEntry struct {
	key, value string
	prio       uint32 // lower is looked at first
}

const (
	keyIndexMagic    = 0xb007f457
	keyIndexVersion  = 0x00020001
	keyNodePrefix    = 0x80000000
	keyNodeValues    = 0x40000000
	keyNodeChildren  = 0x20000000
	maxKeyIndexBytes = 0x0fffffff // what an offset can say
)

// add appends a value under a key. Both are printable ASCII: the format has
// room for 128 children only.
func (x *keyIndex) add(key, value string, prio uint32) {
	if key != "" {
		x.entries = append(x.entries, keyEntry{key, value, prio})
	}
}

func (x *keyIndex) encode() ([]byte, error) {
	slices.SortStableFunc(x.entries, func(a, b keyEntry) int { return strings.Compare(a.key, b.key) })
	out := make([]byte, 12)
	binary.BigEndian.PutUint32(out, keyIndexMagic)
	binary.BigEndian.PutUint32(out[4:], keyIndexVersion)
	out, root := appendKeyNode(out, x.entries, 0, 0)
	if len(out) > maxKeyIndexBytes {
		return nil, fmt.Errorf("index of %d bytes, the format's limit is %d", len(out), maxKeyIndexBytes)
	}
	binary.BigEndian.PutUint32(out[8:], root)
	return out, nil
}

// appendKeyNode writes the node of entries, which agree in key[:start], with
// all below it, and returns its offset and flags. Its prefix is key[start:end].
func appendKeyNode(out []byte, entries []keyEntry, start, end int) ([]byte, uint32) {
	be := binary.BigEndian
	n := 0 // entries whose key ends here
	for n < len(entries) && len(entries[n].key) == end {
		n++
	}
	own, below := entries[:n], entries[n:]
	var first, last byte
	var children []uint32
	if len(below) > 0 {
		first, last = below[0].key[end], below[len(below)-1].key[end]
		children = make([]uint32, int(last-first)+1)
	}
	for len(below) > 0 {
		c := below[0].key[end]
		m := 1
		for m < len(below) && below[m].key[end] == c {
			m++
		}
		// Keys are sorted: what the first and the last share, all share.
		a, b := below[0].key, below[m-1].key
		common := end + 1
		for common < len(a) && common < len(b) && a[common] == b[common] {
			common++
		}
		out, children[c-first] = appendKeyNode(out, below[:m], end+1, common)
		below = below[m:]
	}
	offset := uint32(len(out))
	if end > start {
		out = append(append(out, entries[0].key[start:end]...), 0)
		offset |= keyNodePrefix
	}
	if children != nil {
		out = append(out, first, last)
		for _, c := range children {
			out = be.AppendUint32(out, c)
		}
		offset |= keyNodeChildren
	}
	if len(own) > 0 {
		own = slices.Clone(own)
		slices.SortStableFunc(own, func(a, b keyEntry) int { return int(int64(a.prio) - int64(b.prio)) })
		out = be.AppendUint32(out, uint32(len(own)))
		for _, e := range own {
			out = be.AppendUint32(out, e.prio)
			out = append(append(out, e.value...), 0)
		}
		offset |= keyNodeValues
	}
	return out, offset
}
