// Package kernel keeps the guest kernels: it pulls them from Debian, verified
// from the archive's signing keys down to the package's hash, or imports the
// user's own; it unpacks the boot image to the ELF file that a VMM starts, puts all
// modules on a read-only drive for the guest, and writes each VM's initramfs.
//
// On disk a kernel is one folder named by its release, made whole or not at all:
//
//	kernels/6.1.0-56-cloud-amd64/
//	  kernel.json       the record
//	  vmlinux           the uncompressed ELF image
//	  modules.ext4      the modules drive, mounted at /lib/modules/RELEASE
//	  boot/NN-NAME.ko   the modules of the initramfs, in the order of loading
package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"banger"
	"banger/internal/store"
)

// Names inside a kernel's folder.
const (
	recordFile  = "kernel.json"
	vmlinuxFile = "vmlinux"
	driveFile   = "modules.ext4"
	bootDir     = "boot"
)

const (
	recordSchema   = 1
	maxBootModules = 100

	// lockName serializes whatever changes the kernels.
	lockName = "kernels"

	sourceImport = "import"
	sourceDebian = "debian:" // and the suite
)

// A Kernel is one kernel of the store. Its files do not change; they go away
// when it is removed.
type Kernel struct {
	banger.Kernel
	// ModulesUUID is the UUID of the modules drive's file system, "" if the
	// kernel has no modules drive.
	ModulesUUID string `json:"modules_uuid,omitempty"`

	dir  string
	boot []string // names below boot/, in load order
	// wanted is what bootModules was when it was unpacked.
	wanted []string
}

// record is the content of kernel.json.
type record struct {
	Version string `json:"version"`
	Source  string `json:"source"`
	Package string `json:"package,omitempty"` // NAME VERSION
	// Wanted are the modules that were looked for, by name: a later release may
	// need more.
	Wanted      []string  `json:"wanted_modules,omitempty"`
	ModulesUUID string    `json:"modules_uuid,omitempty"`
	BootModules []string  `json:"boot_modules,omitempty"`
	SizeBytes   int64     `json:"size_bytes"`
	Created     time.Time `json:"created"`
}

// defaultRecord is the content of the file that names the default kernel.
type defaultRecord struct {
	Version string `json:"version"`
}

// Kernels are the kernels of one store. Its methods may be called from any
// goroutine and any number of processes at once.
type Kernels struct {
	s       *store.Store
	archive func() (*archive, error)
}

// Open returns the kernels of s. It reads nothing yet.
func Open(s *store.Store) *Kernels {
	return &Kernels{s: s, archive: func() (*archive, error) {
		return newArchive(hostMirrors("/etc/apt"))
	}}
}

// Progress says how far a long call has come.
type Progress struct {
	Stage      string // "index", "download", "unpack"
	Name       string // what is being fetched or unpacked
	DoneBytes  int64
	TotalBytes int64 // 0 where it is not known
}

// Pull fetches the newest cloud kernel of a Debian suite ("" is DefaultSuite)
// and returns it; one that is already there is not fetched again. Two pulls at
// once do the work once. progress may be nil; it is called from the same
// goroutine, often.
//
// The first kernel becomes the default one; after that, a pull from the suite
// that the default kernel came from moves the default.
func (ks *Kernels) Pull(ctx context.Context, suite string, progress func(Progress)) (*Kernel, error) {
	if suite == "" {
		suite = DefaultSuite
	}
	if !slices.Contains(Suites, suite) {
		return nil, banger.Errorf(banger.CodeUsage, "suite %q: not one of %s", suite, strings.Join(Suites, ", "))
	}
	if progress == nil {
		progress = func(Progress) {}
	}
	k, err := ks.pull(ctx, suite, progress)
	return k, userError("pull", err)
}

func (ks *Kernels) pull(ctx context.Context, suite string, progress func(Progress)) (*Kernel, error) {
	a, err := ks.archive()
	if err != nil {
		return nil, err
	}
	unlock, err := ks.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()

	scratch, err := ks.s.TempDir("kernel-pull")
	if err != nil {
		return nil, err
	}
	defer scratch.Remove()
	file, err := os.Create(filepath.Join(scratch.Path, "download"))
	if err != nil {
		return nil, err
	}
	defer file.Close()

	progress(Progress{Stage: "index", Name: suite})
	pkg, release, err := a.findKernel(ctx, suite, file)
	if err != nil {
		return nil, err
	}
	source, label := sourceDebian+suite, pkg.name+" "+pkg.version
	replaces := false
	switch old, err := ks.load(release); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case old.Source == sourceImport:
		return nil, banger.Errorf(banger.CodeConflict, "kernel %s: an imported kernel has that release", release).
			WithHint("banger kernel rm %s", release)
	case old.Package == label && slices.Equal(old.wanted, bootModules):
		return old, ks.moveDefault(old)
	default: // the same release built anew, or unpacked for guests that needed less
		replaces = true
	}

	if err := truncateFile(file); err != nil {
		return nil, err
	}
	err = a.fetchHashed(ctx, file, pkg.base+"/"+pkg.filename, pkg.indexEntry, maxDebBytes, func(done int64) {
		progress(Progress{Stage: "download", Name: label, DoneBytes: done, TotalBytes: pkg.sizeBytes})
	})
	if err != nil {
		return nil, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	progress(Progress{Stage: "unpack", Name: label})
	spoolFile, err := os.Create(filepath.Join(scratch.Path, "modules"))
	if err != nil {
		return nil, err
	}
	defer spoolFile.Close()
	spool := newModuleSpool(spoolFile)
	deb, err := readKernelDeb(file, release, func(name string, size int64, r io.Reader) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return spool.add(name, size, r)
	})
	if err != nil {
		return nil, fmt.Errorf("package %s: %w", label, err)
	}
	if err := spool.tree.finish(); err != nil {
		return nil, fmt.Errorf("package %s: %w", label, err)
	}
	vmlinux, got, err := unpackKernel(deb.vmlinuz)
	if err != nil {
		return nil, fmt.Errorf("package %s: %w", label, err)
	}
	if got != release {
		return nil, fmt.Errorf("package %s: its kernel says it is %q", label, got)
	}
	return ks.install(ctx, vmlinux, &spool.tree, record{Version: release, Source: source, Package: label}, replaces)
}

// Import adds the user's own kernel: vmlinuz is a bzImage or an ELF image,
// modules an opened folder (/lib/modules/RELEASE, or one that holds it) or nil.
// The caller keeps both files and closes them. A release that is there already
// is a conflict. Without modules the kernel must have built in what a guest
// needs to boot: virtio on MMIO, block, console and overlayfs.
func (ks *Kernels) Import(ctx context.Context, vmlinuz, modules *os.File) (*Kernel, error) {
	k, err := ks.importKernel(ctx, vmlinuz, modules)
	return k, userError("import", err)
}

func (ks *Kernels) importKernel(ctx context.Context, vmlinuz, modules *os.File) (*Kernel, error) {
	image, err := readImage(vmlinuz)
	if err != nil {
		return nil, err
	}
	vmlinux, release, err := unpackKernel(image)
	if err != nil {
		return nil, err
	}
	var tree *moduleTree
	if modules != nil {
		// The descriptor is what the user opened; its path may mean something
		// else to this process.
		dir, err := os.OpenRoot("/proc/self/fd/" + strconv.Itoa(int(modules.Fd())))
		if err != nil {
			return nil, fmt.Errorf("module folder %q: %w", modules.Name(), errors.Unwrap(err))
		}
		defer dir.Close()
		var root *os.Root
		if tree, root, err = openModuleDir(dir, release); err != nil {
			return nil, err
		}
		defer root.Close()
	}
	unlock, err := ks.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := ks.load(release); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil, banger.Errorf(banger.CodeConflict, "kernel %s: is there already", release).
			WithHint("banger kernel rm %s", release)
	}
	return ks.install(ctx, vmlinux, tree, record{Version: release, Source: sourceImport}, false)
}

// lock takes the lock of the kernels. Whoever had it and died may have left a
// default that was half written, or one that names the kernel it removed: what
// can be done of that is finished, and the rest is in nobody's way.
func (ks *Kernels) lock(ctx context.Context) (unlock func(), err error) {
	unlock, err = ks.s.Lock(ctx, lockName)
	if err != nil {
		return nil, err
	}
	_ = ks.s.SweepKernels()
	if version, err := ks.readDefault(); err == nil && version != "" {
		if _, err := os.Lstat(ks.s.Kernel(version)); errors.Is(err, fs.ErrNotExist) {
			_ = ks.writeDefault("")
		}
	}
	return unlock, nil
}

// readImage reads a kernel image: a regular file, which an ELF image makes
// larger than a bzImage.
func readImage(f *os.File) ([]byte, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("kernel image: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("kernel image %q: not a regular file", f.Name())
	}
	if st.Size() > maxVmlinuxBytes {
		return nil, fmt.Errorf("kernel image %q: %d bytes, the limit is %d", f.Name(), st.Size(), maxVmlinuxBytes)
	}
	image, err := io.ReadAll(io.NewSectionReader(f, 0, st.Size()))
	if err != nil {
		return nil, fmt.Errorf("kernel image: %w", err)
	}
	return image, nil
}

// install makes a kernel's folder and gives it its name; replaces says that it
// takes the place of the kernel of that release, which VMs may need. The caller
// holds the lock.
func (ks *Kernels) install(ctx context.Context, vmlinux []byte, tree *moduleTree, r record, replaces bool) (*Kernel, error) {
	tmp, err := ks.s.TempDir("kernel")
	if err != nil {
		return nil, err
	}
	defer tmp.Remove()
	if err := os.WriteFile(filepath.Join(tmp.Path, vmlinuxFile), vmlinux, 0o600); err != nil {
		return nil, err
	}
	r.SizeBytes = int64(len(vmlinux))
	if tree != nil && len(tree.files) > 0 {
		if err := installModules(ctx, tmp.Path, tree, &r); err != nil {
			return nil, err
		}
	}
	r.Created = time.Now().UTC().Truncate(time.Second)
	if err := store.WriteJSON(filepath.Join(tmp.Path, recordFile), recordSchema, r); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	commit := tmp.Commit
	if replaces {
		commit = tmp.Replace
	}
	if err := commit(ks.s.Kernel(r.Version)); errors.Is(err, errors.ErrUnsupported) {
		return nil, banger.Errorf(banger.CodeUnavailable, "kernel %s: it was built anew, and cannot take the place of the one that is there: %w", r.Version, err).
			WithHint("banger kernel rm %s, then pull it once more", r.Version)
	} else if err != nil {
		return nil, err
	}
	k, err := ks.load(r.Version)
	if err != nil {
		return nil, err
	}
	return k, ks.moveDefault(k)
}

// installModules writes the modules drive and the boot modules below dir.
func installModules(ctx context.Context, dir string, tree *moduleTree, r *record) error {
	f, err := os.OpenFile(filepath.Join(dir, driveFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	uuid, boot, err := writeDrive(ctx, f, tree, r.Version)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if len(boot) > maxBootModules {
		return fmt.Errorf("kernel %s: %d modules needed to boot, the limit is %d", r.Version, len(boot), maxBootModules)
	}
	r.ModulesUUID, r.Wanted = uuid, bootModules
	r.SizeBytes += st.Size()
	if err := os.Mkdir(filepath.Join(dir, bootDir), 0o700); err != nil {
		return err
	}
	for _, m := range boot {
		if err := os.WriteFile(filepath.Join(dir, bootDir, m.name), m.data, 0o600); err != nil {
			return err
		}
		r.BootModules = append(r.BootModules, m.name)
		r.SizeBytes += int64(len(m.data))
	}
	return f.Close()
}

var bootModuleName = regexp.MustCompile(`^[0-9]{2}-[A-Za-z0-9_.+]+\.ko$`)

// load reads one kernel; a missing one gives fs.ErrNotExist.
func (ks *Kernels) load(version string) (*Kernel, error) {
	if err := checkRelease(version); err != nil {
		return nil, err
	}
	dir := ks.s.Kernel(version)
	var r record
	if err := store.ReadJSON(filepath.Join(dir, recordFile), recordSchema, &r); err != nil {
		if _, statErr := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) && statErr == nil {
			return nil, fmt.Errorf("kernel %s: its folder has no %s", version, recordFile)
		}
		return nil, err
	}
	if r.Version != version {
		return nil, fmt.Errorf("kernel %s: its record is of %q", version, r.Version)
	}
	for _, name := range r.BootModules {
		if !bootModuleName.MatchString(name) {
			return nil, fmt.Errorf("kernel %s: boot module %q in its record", version, name)
		}
	}
	k := &Kernel{
		Kernel: banger.Kernel{
			Version:   r.Version,
			Source:    r.Source,
			Package:   r.Package,
			Vmlinux:   filepath.Join(dir, vmlinuxFile),
			SizeBytes: r.SizeBytes,
			Created:   r.Created,
		},
		ModulesUUID: r.ModulesUUID,
		dir:         dir,
		boot:        r.BootModules,
		wanted:      r.Wanted,
	}
	if r.ModulesUUID != "" {
		k.Modules = filepath.Join(dir, driveFile)
	}
	return k, nil
}

// List returns all kernels, the newest first. Where one cannot be read, it
// returns the others and an error that names it; if that is the default one, no
// other takes its place.
func (ks *Kernels) List() ([]*Kernel, error) {
	entries, err := os.ReadDir(ks.s.Kernels())
	if err != nil {
		return nil, fmt.Errorf("kernels: %w", err)
	}
	var list []*Kernel
	var errs []error
	broken := make(map[string]bool)
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		k, err := ks.load(e.Name())
		switch {
		case err == nil:
			list = append(list, k)
		case !errors.Is(err, fs.ErrNotExist): // removed meanwhile
			errs = append(errs, err)
			broken[e.Name()] = true
		}
	}
	slices.SortFunc(list, func(a, b *Kernel) int {
		if c := b.Created.Compare(a.Created); c != 0 {
			return c
		}
		return strings.Compare(a.Version, b.Version)
	})
	version, err := ks.readDefault()
	if err != nil {
		return list, errors.Join(append(errs, err)...)
	}
	i := slices.IndexFunc(list, func(k *Kernel) bool { return k.Version == version })
	switch {
	case i >= 0:
		list[i].Default = true
	case len(list) > 0 && !broken[version]:
		list[0].Default = true // none is named, or it is gone
	}
	return list, errors.Join(errs...)
}

// Get returns the kernel of that release, or the default one for "".
func (ks *Kernels) Get(version string) (*Kernel, error) {
	list, err := ks.List()
	for _, k := range list {
		if k.Version == version || (version == "" && k.Default) {
			return k, nil
		}
	}
	switch {
	case err != nil:
		return nil, err
	case version == "":
		return nil, banger.Errorf(banger.CodeNotFound, "kernel: there is none yet").WithHint("banger kernel pull")
	}
	return nil, banger.Errorf(banger.CodeNotFound, "kernel %q: not found", version).WithHint("banger kernel ls")
}

// Remove deletes a kernel, readable or not. If it was the default one, the
// newest that is left takes its place. Whether a VM needs it is the caller's
// to know.
func (ks *Kernels) Remove(ctx context.Context, version string) error {
	if err := checkRelease(version); err != nil {
		return banger.Errorf(banger.CodeUsage, "%w", err)
	}
	unlock, err := ks.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	err = ks.s.Remove(ks.s.Kernel(version))
	if errors.Is(err, fs.ErrNotExist) {
		return banger.Errorf(banger.CodeNotFound, "kernel %q: not found", version).WithHint("banger kernel ls")
	}
	if err != nil {
		return fmt.Errorf("kernel %s: %w", version, err)
	}
	// A default that names no kernel means the newest; say so on disk too, or
	// importing the same release again would bring the old choice back.
	if current, err := ks.readDefault(); err != nil || current != version {
		return err
	}
	return ks.writeDefault("")
}

// readDefault returns the release of the default kernel, "" if none was named.
func (ks *Kernels) readDefault() (string, error) {
	var d defaultRecord
	err := store.ReadJSON(ks.s.DefaultKernel(), recordSchema, &d)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return d.Version, err
}

func (ks *Kernels) writeDefault(version string) error {
	return store.WriteJSON(ks.s.DefaultKernel(), recordSchema, defaultRecord{version})
}

// moveDefault makes k the default one if there is no other, or if the default
// came from the same suite. The caller holds the lock.
func (ks *Kernels) moveDefault(k *Kernel) error {
	version, err := ks.readDefault()
	if err != nil {
		return err
	}
	old, err := ks.load(version)
	switch {
	case err != nil && version != "":
		// The kernel it names is gone or broken: any other is better.
	case err != nil, k.Source != sourceImport && old.Source == k.Source:
	default:
		k.Default = version == k.Version
		return nil
	}
	k.Default = true
	if version == k.Version {
		return nil
	}
	return ks.writeDefault(k.Version)
}
