package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
)

const (
	maxModinfoBytes   = 1 << 20
	maxModuleSections = 65_535
	maxIndexBytes     = 16 << 20 // modules.order, modules.builtin, modules.builtin.modinfo
	maxPathBytes      = 512
)

// A moduleTree is a module folder (/lib/modules/RELEASE): the module files,
// and the lists that the kernel's own build made. Where the bytes are is
// known to read alone.
type moduleTree struct {
	files []treeFile // sorted by path
	read  func(treeFile) ([]byte, error)
}

// A treeFile is one regular file, as it is stored.
type treeFile struct {
	path      string // below the module folder, checked
	sizeBytes int64
	offset    int64 // in the spool, for a tree that has one
}

// Lists made by the kernel's build. Everything else named modules.* is made
// anew, to agree with the files that are there.
var shippedLists = []string{"modules.order", "modules.builtin", "modules.builtin.modinfo"}

var modulePath = regexp.MustCompile(`^[A-Za-z0-9._+,@=/-]+$`)

// moduleExt splits the file name extension of a module into "x.ko" and the
// compression's extension; ok is false for any other file.
func moduleExt(name string) (plain, ext string, ok bool) {
	for _, ext := range []string{"", ".xz", ".zst", ".gz"} {
		if plain, ok := strings.CutSuffix(name, ext); ok && strings.HasSuffix(plain, ".ko") {
			return plain, ext, true
		}
	}
	return "", "", false
}

// wantFile says whether a file of a module folder belongs on the drive, and
// refuses names that cannot stand in modules.dep, where blanks separate.
func wantFile(name string, size int64) (bool, error) {
	_, _, isModule := moduleExt(name)
	if !isModule && !slices.Contains(shippedLists, name) {
		return false, nil
	}
	if len(name) > maxPathBytes || !modulePath.MatchString(name) || path.Clean(name) != name || !fs.ValidPath(name) {
		return false, fmt.Errorf("module path %q: not a plain path of at most %d characters", name[:min(len(name), maxPathBytes)], maxPathBytes)
	}
	limit := int64(maxModuleBytes)
	if !isModule {
		limit = maxIndexBytes
	}
	if size < 0 || size > limit {
		return false, fmt.Errorf("%q: %d bytes, the limit is %d", name, size, limit)
	}
	return true, nil
}

// finish sorts the files and refuses two of one name.
func (t *moduleTree) finish() error {
	slices.SortFunc(t.files, func(a, b treeFile) int { return strings.Compare(a.path, b.path) })
	for i := 1; i < len(t.files); i++ {
		if t.files[i].path == t.files[i-1].path {
			return fmt.Errorf("module folder: %q twice", t.files[i].path)
		}
	}
	return nil
}

// add appends a file and keeps the sum of all in bounds.
func (t *moduleTree) add(f treeFile, total *int64) error {
	if len(t.files) == maxModules {
		return fmt.Errorf("module folder: more than %d files", maxModules)
	}
	if *total += f.sizeBytes; *total > maxAllModulesBytes {
		return fmt.Errorf("module folder: more than %d bytes", int64(maxAllModulesBytes))
	}
	t.files = append(t.files, f)
	return nil
}

// A moduleSpool collects the files of a package into one scratch file, under
// no name of the package's choosing.
type moduleSpool struct {
	f     *os.File
	tree  moduleTree
	total int64
}

func newModuleSpool(f *os.File) *moduleSpool {
	s := &moduleSpool{f: f}
	s.tree.read = func(tf treeFile) ([]byte, error) {
		b := make([]byte, tf.sizeBytes)
		_, err := f.ReadAt(b, tf.offset)
		return b, err
	}
	return s
}

// add is the callback of readKernelDeb.
func (s *moduleSpool) add(name string, size int64, r io.Reader) error {
	if want, err := wantFile(name, size); err != nil || !want {
		return err
	}
	if err := s.tree.add(treeFile{path: name, sizeBytes: size, offset: s.total}, &s.total); err != nil {
		return err
	}
	n, err := io.Copy(s.f, r)
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	return noEOF(err)
}

// openModuleDir makes a tree of a module folder on the host. dir is that
// folder, or one that holds it under the kernel's release, or one whose only
// folder it is. Symlinks are not followed. The root must stay open while the
// tree is used.
func openModuleDir(dir *os.Root, release string) (*moduleTree, *os.Root, error) {
	root, err := findModuleDir(dir, release)
	if err != nil {
		return nil, nil, err
	}
	t := &moduleTree{read: func(tf treeFile) ([]byte, error) {
		f, err := root.Open(tf.path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, tf.sizeBytes+1))
		if err == nil && int64(len(b)) != tf.sizeBytes {
			err = fmt.Errorf("%q: changed while it was read", tf.path)
		}
		return b, err
	}}
	var total int64
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if want, err := wantFile(name, info.Size()); err != nil || !want {
			return err
		}
		return t.add(treeFile{path: name, sizeBytes: info.Size()}, &total)
	})
	if err == nil {
		err = t.finish()
	}
	if err == nil && len(t.files) == 0 {
		err = errors.New("module folder: no modules in it")
	}
	if err != nil {
		root.Close()
		return nil, nil, err
	}
	return t, root, nil
}

func findModuleDir(dir *os.Root, release string) (*os.Root, error) {
	if st, err := dir.Lstat(release); err == nil && st.IsDir() {
		return dir.OpenRoot(release)
	}
	entries, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return nil, fmt.Errorf("module folder: %w", err)
	}
	var folders []string
	for _, e := range entries {
		if e.Name() == "kernel" && e.IsDir() || slices.Contains(shippedLists, e.Name()) {
			return dir.OpenRoot(".")
		}
		if e.IsDir() {
			folders = append(folders, e.Name())
		}
	}
	if len(folders) != 1 {
		return nil, fmt.Errorf("module folder: neither a folder of modules nor one that holds %s", release)
	}
	return dir.OpenRoot(folders[0])
}

// A module is one loadable module and what it says about itself.
type module struct {
	name     string // with "_" for "-", as the kernel calls it
	path     string
	order    int // position in modules.order
	aliases  []string
	softdeps []string
	weakdeps []string
	symbols  []string // exported
	depends  []string // direct, as names

	load []*module // all it needs, each after its own needs; set by resolve
}

// moduleName is the kernel's name for the module in that file.
func moduleName(file string) string {
	plain, _, ok := moduleExt(path.Base(file))
	if !ok {
		plain = path.Base(file)
	}
	return underscores(strings.TrimSuffix(plain, ".ko"))
}

func underscores(name string) string { return strings.ReplaceAll(name, "-", "_") }

// plainModule decompresses a module file by its name.
func plainModule(name string, raw []byte) ([]byte, error) {
	_, ext, _ := moduleExt(name)
	if ext == "" {
		return raw, nil
	}
	r, err := decompressor(bytes.NewReader(raw), ext)
	if err != nil {
		return nil, fmt.Errorf("module %q: %w", name, noEOF(err))
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxModuleBytes+1))
	if err != nil {
		return nil, fmt.Errorf("module %q: %w", name, noEOF(err))
	}
	if len(b) > maxModuleBytes {
		return nil, fmt.Errorf("module %q: unpacks to more than %d bytes", name, maxModuleBytes)
	}
	return b, nil
}

// parseModule reads what a module's ELF file says about it. A vermagic of
// another release than the kernel's is refused: it would not load.
func parseModule(file string, elf []byte, release string) (*module, error) {
	m := &module{name: moduleName(file), path: file}
	info, symbols, err := readModuleELF(elf)
	if err != nil {
		return nil, fmt.Errorf("module %q: %w", file, err)
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, ok := strings.Cut(string(entry), "=")
		if !ok || !printable(value) {
			continue
		}
		switch key {
		case "alias":
			m.aliases = append(m.aliases, value)
		case "softdep":
			m.softdeps = append(m.softdeps, value)
		case "weakdep":
			m.weakdeps = append(m.weakdeps, value)
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					m.depends = append(m.depends, underscores(d))
				}
			}
		case "vermagic":
			if got := firstWord([]byte(value)); got != release {
				return nil, fmt.Errorf("module %q: is for kernel %q, not for %s", file, got, release)
			}
		}
	}
	m.symbols = symbols
	return m, nil
}

// printable says whether a text may stand on a line of the module lists.
func printable(s string) bool {
	if len(s) > 4096 {
		return false
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

const (
	elfSectionBytes = 64
	elfSymbolBytes  = 24
	elfTypeRel      = 1
)

// readModuleELF returns the .modinfo section of a module and the names of the
// symbols it exports. Like checkPVH it reads the ELF file itself.
func readModuleELF(b []byte) (modinfo []byte, exported []string, err error) {
	le := binary.LittleEndian
	if len(b) < elfHeaderBytes || string(b[:4]) != "\x7fELF" || b[4] != 2 || b[5] != 1 || le.Uint16(b[16:]) != elfTypeRel {
		return nil, nil, errors.New("not a 64-bit little-endian ELF object")
	}
	at, size, count, names := le.Uint64(b[40:]), le.Uint16(b[58:]), uint64(le.Uint16(b[60:])), uint64(le.Uint16(b[62:]))
	table, ok := slice(b, at, count*elfSectionBytes)
	if size != elfSectionBytes || !ok || names >= count || count > maxModuleSections {
		return nil, nil, errors.New("section table outside the file")
	}
	section := func(i uint64) []byte {
		h := table[i*elfSectionBytes:]
		if le.Uint32(h[4:]) == 8 { // SHT_NOBITS: no bytes in the file
			return nil
		}
		data, _ := slice(b, le.Uint64(h[24:]), le.Uint64(h[32:]))
		return data
	}
	strtab := section(names)
	var symtab, symnames []byte
	for i := range count {
		h := table[i*elfSectionBytes:]
		switch stringAt(strtab, le.Uint32(h)) {
		case ".modinfo":
			modinfo = section(i)
		case ".symtab":
			symtab = section(i)
			if link := uint64(le.Uint32(h[40:])); link < count {
				symnames = section(link)
			}
		}
	}
	if modinfo == nil {
		return nil, nil, errors.New("no .modinfo section")
	}
	if len(modinfo) > maxModinfoBytes {
		return nil, nil, fmt.Errorf(".modinfo of %d bytes, the limit is %d", len(modinfo), maxModinfoBytes)
	}
	const mark = "__ksymtab_" // EXPORT_SYMBOL (include/linux/export.h)
	for ; len(symtab) >= elfSymbolBytes; symtab = symtab[elfSymbolBytes:] {
		at := le.Uint32(symtab)
		if head, ok := slice(symnames, uint64(at), uint64(len(mark))); !ok || string(head) != mark {
			continue
		}
		if name := stringAt(symnames, at+uint32(len(mark))); name != "" && printable(name) && len(name) <= 512 {
			exported = append(exported, name)
		}
	}
	slices.Sort(exported)
	return modinfo, slices.Compact(exported), nil
}

// stringAt returns the NUL-terminated string at an offset of a string table,
// "" if there is none.
func stringAt(table []byte, at uint32) string {
	if uint64(at) >= uint64(len(table)) {
		return ""
	}
	s, _, ok := bytes.Cut(table[at:], []byte{0})
	if !ok {
		return ""
	}
	return string(s)
}

// A moduleIndex is what modprobe must know of a module folder.
type moduleIndex struct {
	modules []*module // in the order of modules.order, then by path
	byName  map[string]*module

	builtin        []string // names of what is part of the kernel image
	builtinAliases []builtinAlias
}

// A builtinAlias is another name of something in the kernel image.
type builtinAlias struct{ alias, name string }

// newModuleIndex orders the modules and works out what each must have loaded
// before it. lists holds the shipped lists that the tree has.
func newModuleIndex(modules []*module, lists map[string][]byte) (*moduleIndex, error) {
	place := make(map[string]int)
	for line := range strings.Lines(string(lists["modules.order"])) {
		if line = strings.TrimSpace(line); line != "" {
			plain, _, ok := moduleExt(line)
			if _, dup := place[plain]; ok && !dup {
				place[plain] = len(place)
			}
		}
	}
	for _, m := range modules {
		plain, _, _ := moduleExt(m.path)
		var listed bool
		if m.order, listed = place[plain]; !listed {
			m.order = len(place)
		}
	}
	ix := &moduleIndex{byName: make(map[string]*module)}
	ix.builtin, ix.builtinAliases = readBuiltin(lists)
	sorted := slices.Clone(modules)
	slices.SortFunc(sorted, func(a, b *module) int {
		if a.order != b.order {
			return a.order - b.order
		}
		return strings.Compare(a.path, b.path)
	})
	// Of two files of one module, that below updates/ counts (depmod.d(5)).
	for _, m := range sorted {
		old := ix.byName[m.name]
		if old == nil || (strings.HasPrefix(m.path, "updates/") && !strings.HasPrefix(old.path, "updates/")) {
			ix.byName[m.name] = m
		}
	}
	for _, m := range sorted {
		if ix.byName[m.name] == m {
			m.order = len(ix.modules)
			ix.modules = append(ix.modules, m)
		}
	}
	return ix, ix.resolve()
}

// resolve sets the load order of each module, and refuses circles.
func (ix *moduleIndex) resolve() error {
	const (
		unseen = iota
		open
		done
	)
	state := make(map[*module]int, len(ix.modules))
	var visit func(m *module) error
	visit = func(m *module) error {
		switch state[m] {
		case open:
			return fmt.Errorf("module %q: depends on itself", m.path)
		case done:
			return nil
		}
		state[m] = open
		seen := make(map[*module]bool)
		for _, name := range m.depends {
			d := ix.byName[name]
			if d == nil {
				continue // built in, or not there: the kernel will say so
			}
			if err := visit(d); err != nil {
				return err
			}
			for _, need := range append(slices.Clone(d.load), d) {
				if !seen[need] {
					seen[need] = true
					m.load = append(m.load, need)
				}
			}
		}
		state[m] = done
		return nil
	}
	for _, m := range ix.modules {
		if err := visit(m); err != nil {
			return err
		}
	}
	return nil
}

// readBuiltin reads modules.builtin, the paths of what is built in, and the
// aliases in modules.builtin.modinfo ("name.key=value", NUL-terminated). The
// latter also speaks of code that could not be a module, such as debugfs.
func readBuiltin(lists map[string][]byte) (names []string, aliases []builtinAlias) {
	seen := make(map[string]bool)
	for line := range strings.Lines(string(lists["modules.builtin"])) {
		line = strings.TrimSpace(line)
		if name := moduleName(line); line != "" && printable(line) && !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	for entry := range bytes.SplitSeq(lists["modules.builtin.modinfo"], []byte{0}) {
		key, value, ok := strings.Cut(string(entry), "=")
		name, key, ok2 := strings.Cut(key, ".")
		if ok && ok2 && key == "alias" && name != "" && printable(name) && printable(value) {
			aliases = append(aliases, builtinAlias{value, underscores(name)})
		}
	}
	return names, aliases
}

// bootModules are what a guest needs to reach its root, its channel and its
// network before its init starts, in the order of loading; the rest it finds on the modules drive. Debian's cloud
// kernel has ext4 built in; other kernels do not.
var bootModules = []string{"virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "ext4", "overlay"}

// bootOrder returns the modules to load in the initramfs, each after what it
// needs. What is built in or missing is left out.
func (ix *moduleIndex) bootOrder() []*module {
	var order []*module
	taken := make(map[*module]bool)
	var load func(name string)
	load = func(name string) {
		m := ix.find(name)
		if m == nil || taken[m] {
			return
		}
		taken[m] = true
		for _, need := range m.load {
			load(need.name)
		}
		pre, post := splitSoftdeps(m.softdeps)
		for _, p := range pre {
			load(p)
		}
		order = append(order, m)
		for _, p := range post {
			load(p)
		}
	}
	for _, name := range bootModules {
		load(name)
	}
	return order
}

// find looks a module up by its name, else by an alias without wildcards.
func (ix *moduleIndex) find(name string) *module {
	if m := ix.byName[underscores(name)]; m != nil {
		return m
	}
	for _, m := range ix.modules {
		if slices.Contains(m.aliases, name) {
			return m
		}
	}
	return nil
}

// splitSoftdeps reads "pre: a b post: c" (modprobe.d(5)).
func splitSoftdeps(lines []string) (pre, post []string) {
	for _, line := range lines {
		var list *[]string
		for _, word := range strings.Fields(line) {
			switch {
			case word == "pre:":
				list = &pre
			case word == "post:":
				list = &post
			case list != nil:
				*list = append(*list, word)
			}
		}
	}
	return pre, post
}
