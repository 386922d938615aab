//go:build linux

package ext4

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/ext4/internal/disk"
	"banger/ext4/internal/e2fs"
)

// TestRivals prints what an image costs beside what it costs with tar2ext4 and
// mke2fs, each in a process of its own, in turn, in one run. `make bench` runs
// it; it has no opinion on the figures.
func TestRivals(t *testing.T) {
	if child := os.Getenv(rivalChild); child != "" {
		rivalsChild(t, child)
		return
	}
	if os.Getenv("BANGER_BENCH") == "" {
		t.Skip("make bench runs this")
	}
	b := rivals{t: t, dir: t.TempDir(), cache: os.Getenv("BANGER_TEST_CACHE")}
	if b.cache == "" {
		b.cache = t.TempDir()
	}
	b.tar2ext4 = b.build("github.com/Microsoft/hcsshim", "v0.15.0", "cmd/tar2ext4")
	small := "systemd-sysv,dbus,udev,perl,python3,git,man-db,curl,build-essential"
	b.tree("Debian, small", b.debian("bench-small.tar", small))
	b.tree("Debian, large", b.debian("bench-large.tar", small+",vim-runtime,golang-1.19-src,linux-headers-amd64,python3-sympy,node-typescript,libboost1.81-dev"))
	b.tree("70,000 files in one directory", b.crowd(70_000))
	b.workDisk()
	var self syscall.Rusage
	must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &self))
	fmt.Printf("\nA child's resident memory begins with this process's own, at most %.1f MiB.\n", float64(self.Maxrss)/(1<<10))
}

type rivals struct {
	t        *testing.T
	dir      string
	cache    string
	tar2ext4 string
}

const (
	rivalChild  = "EXT4_RIVAL_CHILD"
	rivalRounds = 7
	// What takes longer than this runs once, and is stopped at the limit.
	rivalPatience = 30 * time.Second
	rivalLimit    = 3 * time.Minute
)

type rival struct {
	name    string
	prepare func() // not measured
	command []string
	env     string
	runs    []rivalCost
	stopped bool
}

func (r *rival) slow() bool { return len(r.runs) > 0 && r.runs[0].wall > rivalPatience }

type rivalCost struct {
	wall, cpu     time.Duration
	residentBytes int64
}

// compare runs all in turn, the order turning as well, and prints medians.
func (b *rivals) compare(what string, list ...*rival) {
	t := b.t
	t.Helper()
	for round := range rivalRounds {
		for i := range list {
			if r := list[(round+i)%len(list)]; !r.stopped && !r.slow() {
				b.run(r)
			}
		}
	}
	fmt.Printf("\n%s (medians of %d)\n%-40s %9s %9s %9s %7s\n", what, rivalRounds, "", "CPU ms", "wall ms", "MiB", "CPU")
	var ours time.Duration
	for _, r := range list {
		if r.stopped {
			fmt.Printf("%-40s more than %v: stopped\n", r.name, rivalLimit)
			continue
		}
		name := r.name
		if r.slow() {
			name += " (once)"
		}
		cpu := median(r.runs, func(c rivalCost) time.Duration { return c.cpu })
		wall := median(r.runs, func(c rivalCost) time.Duration { return c.wall })
		resident := median(r.runs, func(c rivalCost) int64 { return c.residentBytes })
		if ours == 0 {
			ours = cpu
		}
		fmt.Printf("%-40s %9.1f %9.1f %9.1f %7.2f\n", name, ms(cpu), ms(wall), float64(resident)/(1<<20), float64(cpu)/float64(ours))
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median[T cmp.Ordered](runs []rivalCost, of func(rivalCost) T) T {
	list := make([]T, len(runs))
	for i, r := range runs {
		list[i] = of(r)
	}
	slices.Sort(list)
	return list[len(list)/2]
}

func (b *rivals) run(r *rival) {
	t := b.t
	t.Helper()
	if r.prepare != nil {
		r.prepare()
	}
	ctx, cancel := context.WithTimeout(t.Context(), rivalLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.command[0], r.command[1:]...)
	cmd.Env = os.Environ()
	if r.env != "" {
		cmd.Env = append(cmd.Env, r.env)
	}
	start := time.Now()
	out, err := cmd.CombinedOutput()
	c := rivalCost{wall: time.Since(start)}
	if ctx.Err() != nil {
		r.stopped = true
		return
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", r.name, err, out)
	}
	c.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	c.residentBytes = cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
	r.runs = append(r.runs, c)
}

// build makes a program of another module, outside this one.
func (b *rivals) build(module, version, command string) string {
	t := b.t
	t.Helper()
	program := filepath.Join(b.cache, path.Base(command)+"-"+version)
	if _, err := os.Stat(program); err == nil {
		return program
	}
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module bench\n\ngo 1.26\n"), 0o600))
	for _, args := range [][]string{{"get", module + "/" + command + "@" + version}, {"build", "-o", program, module + "/" + command}} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	return program
}

// debian is a root of these packages, as Debian's own tool makes it.
func (b *rivals) debian(name, packages string) string {
	t := b.t
	t.Helper()
	file := filepath.Join(b.cache, name)
	if _, err := os.Stat(file); err == nil {
		return file
	}
	mmdebstrap := e2fs.Tool(t, "mmdebstrap")
	partial := strings.TrimSuffix(file, ".tar") + ".partial.tar"
	cmd := exec.Command(mmdebstrap, "--quiet", "--mode=unshare", "--variant=minbase", "--include="+packages, "bookworm", partial)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mmdebstrap: %v\n%s", err, out)
	}
	must(t, os.Rename(partial, file))
	return file
}

// crowd is a tar of so many small files in one directory.
func (b *rivals) crowd(files int) string {
	t := b.t
	t.Helper()
	f, err := os.Create(filepath.Join(b.dir, "crowd.tar"))
	must(t, err)
	defer f.Close()
	buffered := bufio.NewWriter(f)
	w := tar.NewWriter(buffered)
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "crowd/", Mode: 0o755, ModTime: testTime.Truncate(time.Second)}))
	for i := range files {
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("crowd/message-%07d.eml", i), Mode: 0o644, Size: 8, ModTime: testTime.Truncate(time.Second)}))
		fmt.Fprintf(w, "%08d", i)
	}
	must(t, w.Close())
	must(t, buffered.Flush())
	return f.Name()
}

// tree makes an image of a tar. mke2fs of this age cannot read one: it gets the
// tree unpacked, which costs it nothing here.
func (b *rivals) tree(what, archive string) {
	t := b.t
	t.Helper()
	unpacked := filepath.Join(b.dir, "unpacked")
	must(t, os.Mkdir(unpacked, 0o755))
	defer os.RemoveAll(unpacked)
	if out, exit := e2fs.Run(t, "tar", "-C", unpacked, "-xf", archive); exit != 0 {
		t.Fatalf("tar: exit %d\n%s", exit, out)
	}
	image := filepath.Join(b.dir, "ours.img")
	other := filepath.Join(b.dir, "other.img")
	entries, contentBytes := measureTree(t, unpacked)
	ours := &rival{name: "ours", command: []string{os.Args[0], "-test.run=^TestRivals$"}, env: rivalChild + "=tar:" + archive + ":" + image}
	theirs := &rival{name: "tar2ext4", command: []string{b.tar2ext4, "-i", archive, "-o", other}, prepare: func() { os.Remove(other) }}
	sizeMiB := contentBytes*5/4>>20 + 64
	tree := &rival{
		name:    "mke2fs -d, from an unpacked tree",
		prepare: func() { os.Remove(other) },
		command: []string{e2fs.Tool(t, "mke2fs"), "-q", "-F", "-t", "ext4", "-N", fmt.Sprint(entries + 1000), "-d", unpacked, other, fmt.Sprintf("%dM", sizeMiB)},
	}
	ours.prepare = func() { os.Remove(image) }
	b.compare(fmt.Sprintf("%s: %d entries, %d MiB", what, entries, contentBytes>>20), ours, theirs, tree)
	e2fs.Clean(t, image)
	os.Remove(image)
	os.Remove(other)
}

// measureTree counts the entries of a tree and the bytes of its files, in blocks.
func measureTree(t *testing.T, root string) (entries int, contentBytes int64) {
	t.Helper()
	must(t, filepath.WalkDir(root, func(_ string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		entries++
		info, err := d.Info()
		if err == nil && info.Mode().IsRegular() {
			contentBytes += ceilDiv(info.Size(), disk.BlockSize) * disk.BlockSize
		}
		return err
	}))
	return entries, contentBytes
}

// workDisk is a large disk with a few small files.
func (b *rivals) workDisk() {
	t := b.t
	t.Helper()
	image, other := filepath.Join(b.dir, "ours.img"), filepath.Join(b.dir, "other.img")
	script := filepath.Join(b.dir, "script")
	var commands strings.Builder
	for _, name := range dotfiles() {
		fmt.Fprintf(&commands, "write %s %s\nsif %s mode 0100644\nsif %s uid 0\nsif %s gid 0\n", script, name, name, name, name)
	}
	must(t, os.WriteFile(script, []byte(commands.String()), 0o600))
	mkfs := e2fs.Tool(t, "mke2fs")
	debugfs := e2fs.Tool(t, "debugfs")
	b.compare("8 GiB work disk with 30 dotfiles",
		&rival{name: "ours", command: []string{os.Args[0], "-test.run=^TestRivals$"}, env: rivalChild + "=disk::" + image, prepare: func() { os.Remove(image) }},
		&rival{name: "our process, doing nothing", command: []string{os.Args[0], "-test.run=^TestRivals$"}, env: rivalChild + "=none::" + image, prepare: func() { os.Remove(image) }},
		&rival{name: "mke2fs and one debugfs script", command: []string{"sh", "-c", mkfs + ` -q -F -t ext4 "$1" 8G && ` + debugfs + ` -w -f "$2" "$1"`, "sh", other, script}, prepare: func() { os.Remove(other) }},
	)
	f := newImage(t)
	var runs []rivalCost
	for range 3 * rivalRounds {
		start := time.Now()
		must(t, writeWorkDisk(f))
		runs = append(runs, rivalCost{wall: time.Since(start)})
	}
	fmt.Printf("%-40s %9s %9.1f\n", "ours, the calls alone", "", ms(median(runs, func(c rivalCost) time.Duration { return c.wall })))
	e2fs.Clean(t, f.Name())
}

func dotfiles() (names []string) {
	for i := range 30 {
		names = append(names, fmt.Sprintf(".dotfile-%d", i))
	}
	return names
}

func writeWorkDisk(f *os.File) error {
	w, err := NewWriter(f, Options{MaxSizeBytes: 8 << 30})
	if err != nil {
		return err
	}
	body := bytes.Repeat([]byte("export EDITOR=vi\n"), 200)
	for _, name := range dotfiles() {
		c, err := w.Place(bytes.NewReader(body), int64(len(body)))
		if err != nil {
			return err
		}
		if err := w.Add(name, &Inode{Mode: 0o100644, Content: c}); err != nil {
			return err
		}
	}
	return w.Finish(params(8 << 30))
}

// rivalsChild is our contender: task, tar and image, separated by colons.
func rivalsChild(t *testing.T, arg string) {
	parts := strings.SplitN(arg, ":", 3)
	f, err := os.Create(parts[2])
	must(t, err)
	defer f.Close()
	switch parts[0] {
	case "tar":
		must(t, fromTar(f, parts[1]))
	case "disk":
		must(t, writeWorkDisk(f))
	case "none":
	}
}

// fromTar makes an image of a tar whose directories come first.
func fromTar(f *os.File, archive string) error {
	in, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer in.Close()
	w, err := NewWriter(f, Options{})
	if err != nil {
		return err
	}
	const xattrPrefix = "SCHILY.xattr."
	files := make(map[string]*Inode) // that may get a second name
	r := tar.NewReader(bufio.NewReaderSize(in, 1<<20))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name := path.Clean(h.Name)
		n := &Inode{Mode: uint16(h.Mode & 0o7777), UID: uint32(h.Uid), GID: uint32(h.Gid), Mtime: h.ModTime}
		switch h.Typeflag {
		case tar.TypeReg:
			n.Mode |= disk.TypeRegular
			if n.Content, err = w.Place(r, h.Size); err != nil {
				return err
			}
			files[name] = n
		case tar.TypeDir:
			n.Mode |= disk.TypeDir
		case tar.TypeSymlink:
			n.Mode |= disk.TypeSymlink
			n.Target = h.Linkname
		case tar.TypeChar:
			n.Mode |= disk.TypeChar
			n.Major, n.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		case tar.TypeBlock:
			n.Mode |= disk.TypeBlock
			n.Major, n.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		case tar.TypeFifo:
			n.Mode |= disk.TypeFIFO
		case tar.TypeLink:
			if n = files[path.Clean(h.Linkname)]; n == nil {
				return fmt.Errorf("%q: a link to %q, which was not there before", name, h.Linkname)
			}
		default:
			return errors.New("tar: entry of unknown type " + string(rune(h.Typeflag)))
		}
		for key, value := range h.PAXRecords {
			if x, ok := strings.CutPrefix(key, xattrPrefix); ok {
				if n.Xattrs == nil {
					n.Xattrs = make(map[string][]byte)
				}
				n.Xattrs[x] = []byte(value)
			}
		}
		if err := w.Add(name, n); err != nil {
			return err
		}
	}
	p := params(0)
	if p.SizeBytes, err = w.MinSizeBytes(p); err != nil {
		return err
	}
	p.SizeBytes += p.SizeBytes / 4
	return w.Finish(p)
}
