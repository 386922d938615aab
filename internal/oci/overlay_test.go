package oci

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// overlayLayers makes layers as an engine with overlayfs would write them: each
// a tree of its own, parents before children, whiteouts beside entries and
// opaque markers in directories. Within a layer the order of siblings is left
// to chance.
func overlayLayers(r *rand.Rand) [][]te {
	names := []string{"a", "b", "c", "d"}
	var layers [][]te
	for range 1 + r.IntN(4) {
		var l []te
		var fill func(at string, depth int)
		fill = func(at string, depth int) {
			for _, i := range r.Perm(len(names)) {
				p := at + names[i]
				switch r.IntN(9) {
				case 0, 1:
					l = append(l, moded(f(p, strconv.Itoa(r.IntN(1000))), int64(r.IntN(0o10000))))
				case 2:
					l = append(l, sym(p, names[r.IntN(4)]))
				case 3, 4:
					l = append(l, moded(owned(dir(p), r.IntN(3)), int64(0o700|r.IntN(0o100))))
					opaqueFirst := r.IntN(6)
					if opaqueFirst == 0 {
						l = append(l, opaque(p))
					}
					if depth < 3 {
						fill(p+"/", depth+1)
					}
					if opaqueFirst == 1 {
						l = append(l, opaque(p))
					}
				case 5:
					l = append(l, wh(p))
				case 6:
					// A link to a file of the same layer, which came before.
					for _, e := range slices.Backward(l) {
						if e.typ == '0' && !strings.Contains(e.name, ".wh.") {
							l = append(l, hard(p, e.name))
							break
						}
					}
				}
			}
		}
		fill("", 0)
		layers = append(layers, l)
	}
	return layers
}

// unpackOverlay writes one layer as overlayfs keeps it: a whiteout is a device
// 0:0, an opaque directory has an xattr.
func unpackOverlay(to string, l []te) error {
	for _, e := range l {
		p := filepath.Join(to, e.name)
		d, b := filepath.Split(p)
		var err error
		switch {
		case b == opaqueName:
			err = unix.Lsetxattr(filepath.Clean(d), "trusted.overlay.opaque", []byte("y"), 0)
		case strings.HasPrefix(b, whiteoutPrefix):
			err = unix.Mknod(d+b[len(whiteoutPrefix):], unix.S_IFCHR, 0)
		case e.typ == '5':
			err = errors.Join(os.Mkdir(p, 0o700), os.Lchown(p, e.uid, e.uid), unix.Chmod(p, uint32(e.mode)))
		case e.typ == '2':
			err = os.Symlink(e.link, p)
		case e.typ == '1':
			err = os.Link(filepath.Join(to, e.link), p)
		default:
			err = errors.Join(os.WriteFile(p, []byte(e.body), 0o600), unix.Chmod(p, uint32(e.mode)))
		}
		if err != nil {
			return fmt.Errorf("%+v: %w", e, err)
		}
	}
	return nil
}

// dumpDir renders a directory as dump does a tree, the root left out.
func dumpDir(dir string) (out []string, err error) {
	groups := make(map[uint64]int)
	err = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err == unix.ENOENT {
			return nil // a whiteout in a directory of one layer is listed, and not there
		} else if err != nil {
			return err
		}
		s := fmt.Sprintf("%s %o %d", strings.TrimPrefix(p, dir), st.Mode, st.Uid)
		switch st.Mode & modeType {
		case modeRegular:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %q", data)
			if st.Nlink > 1 {
				if groups[st.Ino] == 0 {
					groups[st.Ino] = len(groups) + 1
				}
				s += fmt.Sprintf(" link %d", groups[st.Ino])
			}
		case modeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + target
		}
		out = append(out, s)
		return nil
	})
	return out, err
}

// dumpTree renders a tree as dumpDir does a directory. Names of one file that
// are in several layers' past are counted by those that are left.
func dumpTree(tree *Tree[int], sink *memSink) (out []string) {
	groups := make(map[*Node[int]]int)
	_ = tree.Walk(func(p string, n *Node[int]) error {
		if p == "/" {
			return nil
		}
		s := fmt.Sprintf("%s %o %d", p, n.Mode, n.UID)
		switch n.Type() {
		case modeRegular:
			s += fmt.Sprintf(" %q", sink.files[n.Content])
			if n.Nlink > 1 {
				if groups[n] == 0 {
					groups[n] = len(groups) + 1
				}
				s += fmt.Sprintf(" link %d", groups[n])
			}
		case modeSymlink:
			s += " -> " + n.Target
		}
		out = append(out, s)
		return nil
	})
	return out
}

// lonelyLinks drops the group of a file with one visible name: overlayfs counts
// the names in the layer, hidden ones too.
func lonelyLinks(lines []string) []string {
	count := make(map[string]int)
	group := func(s string) string {
		i := strings.LastIndex(s, " link ")
		if i < 0 {
			return ""
		}
		return s[i:]
	}
	for _, s := range lines {
		count[group(s)]++
	}
	renumbered := make(map[string]string)
	out := make([]string, 0, len(lines))
	for _, s := range lines {
		g := group(s)
		if g == "" {
			out = append(out, s)
			continue
		}
		s = strings.TrimSuffix(s, g)
		if count[g] > 1 {
			if renumbered[g] == "" {
				renumbered[g] = fmt.Sprintf(" link %d", len(renumbered)+1)
			}
			s += renumbered[g]
		}
		out = append(out, s)
	}
	return out
}

// TestOverlayfsRandom mounts random layers with the kernel's own overlayfs and
// compares what it shows with what the squash makes of the same layers.
func TestOverlayfsRandom(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, "overlayfs needs root")
	}
	count := 2000
	if s := os.Getenv("OCI_IMAGES"); s != "" {
		count, _ = strconv.Atoi(s)
	}
	if testing.Short() {
		count = 100
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("OCI_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("OCI_SEED=%d", seed)
	base := t.TempDir()
	done := make(chan error)
	go func() {
		// The thread has a mount namespace of its own, and ends with it.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			if err := unix.Mount("tmpfs", base, "tmpfs", 0, "mode=0755"); err != nil {
				return err
			}
			old := syscall.Umask(0)
			defer syscall.Umask(old)
			for i := range count {
				if err := overlayOnce(t, base, rand.New(rand.NewPCG(seed, uint64(i)))); err != nil {
					return fmt.Errorf("image %d: %w", i, err)
				}
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
			missing(t, "overlayfs: "+err.Error())
		}
		t.Fatal(err)
	}
}

func overlayOnce(t *testing.T, base string, r *rand.Rand) error {
	layers := overlayLayers(r)
	work := filepath.Join(base, "w")
	defer os.RemoveAll(work)
	merged, empty := filepath.Join(work, "m"), filepath.Join(work, "empty")
	for _, d := range []string{work, merged, empty} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	lowers := []string{}
	var tars [][]byte
	for i, l := range layers {
		d := filepath.Join(work, fmt.Sprintf("l%d", i))
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
		if err := unpackOverlay(d, l); err != nil {
			return err
		}
		lowers = append(lowers, d)
		tars = append(tars, tarOf(t, l))
	}
	slices.Reverse(lowers)
	options := "lowerdir=" + strings.Join(append(lowers, empty), ":")
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, options); err != nil {
		return fmt.Errorf("mount -o %s: %w", options, err)
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	kernel, err := dumpDir(merged)
	if err != nil {
		return err
	}
	tree, sink, err := squashMem(t, memImage(t, nil, tars...))
	if err != nil {
		return fmt.Errorf("%w\n%+v", err, layers)
	}
	if got, want := lonelyLinks(dumpTree(tree, sink)), lonelyLinks(kernel); !slices.Equal(got, want) {
		return fmt.Errorf("\nours   %q\nkernel %q\n%+v", got, want, layers)
	}
	return nil
}

// The comparison sees a difference: another seed gives another tree.
func TestOverlayfsRandomDiffers(t *testing.T) {
	seen := map[string]bool{}
	for i := range 50 {
		var tars [][]byte
		for _, l := range overlayLayers(rand.New(rand.NewPCG(1, uint64(i)))) {
			tars = append(tars, tarOf(t, l))
		}
		tree, sink, err := squashMem(t, memImage(t, nil, tars...))
		if err != nil {
			t.Fatal(err)
		}
		seen[strings.Join(lonelyLinks(dumpTree(tree, sink)), "\n")] = true
	}
	if len(seen) < 40 {
		t.Errorf("50 seeds give %d trees: %q", len(seen), slices.Sorted(maps.Keys(seen)))
	}
}
