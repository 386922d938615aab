// Package store is the state folder: where every file of banger stands, how a
// record is written so that a crash leaves the old or the new one, and who may
// touch what at a time. It knows names and durability, not what is in the
// files. docs/state.md shows a sample.
package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names of everything in the state folder. No other file of the project joins
// state paths.
const (
	blobsDir   = "blobs"   // blobs/sha256/<64 hex digits>
	partialDir = "partial" // blobs/partial/<64 hex digits>: what has come of one; flocked while it comes
	imagesDir  = "images"  // images/<id>/: one base image each
	kernelsDir = "kernels" // kernels/<release>/: one kernel each
	vmsDir     = "vms"     // vms/<id>/: one VM each
	tmpDir     = "tmp"     // what is being made; swept when its maker is gone
	trashDir   = "trash"   // what is being deleted; swept always
	locksDir   = "locks"   // flock files; they stay

	runDir = "run" // the daemon's socket and log; nothing in it outlives its use

	ImageRecord  = "image.json"  // in images/<id>/
	ImageRootfs  = "rootfs.ext4" // in images/<id>/
	imageNames   = "names.json"  // in images/
	defaultsFile = "default"     // in kernels/

	// In vms/<id>/:
	VMRecord     = "vm.json"        // what the VM is; rewritten when its ports change
	VMLife       = "life.json"      // what became of it; rewritten at every change
	VMOverlay    = "overlay.ext4"   // overlay disk
	VMWork       = "work.ext4"      // work disk
	VMOutput     = "output.log"     // of its main command
	VMConsole    = "console.log"    // of its guest
	VMNetLog     = "netlog.json"    // what its guest was denied
	VMRemoving   = "removing"       // its removal was decided
	vmRun        = "run"            // gone when the VM does not run
	VMInitramfs  = "initramfs.img"  // in run/
	VMSupervisor = "supervisor.log" // what its supervisor itself printed at its last start

	// In run/:
	DaemonLog    = "bangerd.log"
	DaemonSocket = "bangerd.sock"
	// SupervisorSocket is in vms/<id>/, not in the VM's run/, which comes and
	// goes while its supervisor stays.
	SupervisorSocket = "supervisor.sock"
)

// ErrNotDurable is wrapped by the error of a Commit or Replace that happened
// and could not be made to outlast a power cut.
var ErrNotDurable = errors.New("it is there, and may not outlast a power cut")

// ErrHeld is returned by HoldVM for a VM that somebody else holds.
var ErrHeld = errors.New("it is held by another process")

// ImageWorkSeed, in images/<id>/, is the file system that a new VM's work disk
// is filled from.
const ImageWorkSeed = "rootfs.work-seed.ext4"

// DefaultRoot is the state folder of this user: BANGER_HOME, else
// $XDG_DATA_HOME/banger, else ~/.local/share/banger.
func DefaultRoot() (string, error) {
	if dir := os.Getenv("BANGER_HOME"); dir != "" {
		return filepath.Abs(dir)
	}
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "banger"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", errors.New("state folder: neither BANGER_HOME, XDG_DATA_HOME nor HOME is set")
	}
	return filepath.Join(home, ".local", "share", "banger"), nil
}

// A Store is one opened state folder. Its methods may be called from any
// goroutine and any number of processes at once.
type Store struct {
	root  string
	swept []string
}

// Open opens the state folder, making it and its rooms if they are missing,
// and removes what dead processes left half made. It refuses a folder that
// another user owns or may write.
func Open(root string) (*Store, error) {
	// The paths that are handed out hold whatever the working folder becomes.
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(root, &st); err != nil {
		return nil, fmt.Errorf("state folder %s: %w", root, err)
	}
	if int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("state folder %s: owned by uid %d, not by you (uid %d)", root, st.Uid, os.Geteuid())
	}
	if st.Mode&0o022 != 0 {
		return nil, fmt.Errorf("state folder %s: others may write to it (mode %04o); chmod it to 0700", root, st.Mode&0o7777)
	}
	s := &Store{root: root}
	for _, dir := range []string{blobsDir + "/sha256", blobsDir + "/" + partialDir, imagesDir, kernelsDir, vmsDir, tmpDir, trashDir, locksDir, runDir} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			return nil, fmt.Errorf("state folder: %w", err)
		}
	}
	if err := s.sweep(); err != nil {
		return nil, err
	}
	return s, nil
}

// View is the state folder as it is: nothing in it is made, removed or judged.
// It is for looking only.
func View(root string) *Store { return &Store{root: root} }

// Leftovers names what dead processes left half made or half deleted, which
// the next Open removes.
func (s *Store) Leftovers() (names []string, err error) {
	for _, room := range []string{tmpDir, trashDir} {
		entries, err := os.ReadDir(filepath.Join(s.root, room))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			f := holdIfFree(filepath.Join(s.root, room, e.Name()))
			if f != nil || room == trashDir {
				names = append(names, filepath.Join(room, e.Name()))
			}
			if f != nil {
				f.Close()
			}
		}
	}
	return names, nil
}

// Root is the folder's path.
func (s *Store) Root() string { return s.root }

// Swept names what Open found half made or half deleted, and removed.
func (s *Store) Swept() []string { return s.swept }

// Run is the folder of the daemon's socket and log in the state folder at
// root.
func Run(root string) string { return filepath.Join(root, runDir) }

// Images, Kernels and VMs are folders of folders; Image, Kernel and VM are
// the folder of one. The caller has validated ids and releases.
func (s *Store) Images() string               { return filepath.Join(s.root, imagesDir) }
func (s *Store) Image(id string) string       { return filepath.Join(s.root, imagesDir, id) }
func (s *Store) ImageNames() string           { return filepath.Join(s.root, imagesDir, imageNames) }
func (s *Store) Kernels() string              { return filepath.Join(s.root, kernelsDir) }
func (s *Store) Kernel(release string) string { return filepath.Join(s.root, kernelsDir, release) }
func (s *Store) DefaultKernel() string        { return filepath.Join(s.root, kernelsDir, defaultsFile) }
func (s *Store) VMs() string                  { return filepath.Join(s.root, vmsDir) }
func (s *Store) VM(id string) string          { return filepath.Join(s.root, vmsDir, id) }
func (s *Store) VMRun(id string) string       { return filepath.Join(s.root, vmsDir, id, vmRun) }

// NewID returns a random id of 12 hex digits.
func NewID() string {
	var b [6]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// IsID says whether text is an id as NewID makes them.
func IsID(text string) bool {
	return len(text) == 12 && strings.Trim(text, "0123456789abcdef") == ""
}

// Lock waits for the exclusive lock of that name, until ctx ends. Locks are
// flock: they go with the process, however it ends.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	path := filepath.Join(s.root, locksDir, name+".lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	// flock cannot be interrupted from Go, so ask again at a growing pace.
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return sync.OnceFunc(func() { f.Close() }), nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// A Temp is a folder in which something is being made. It belongs to this
// process; when the process dies the next Open removes it.
type Temp struct {
	Path string

	s    *Store
	held *os.File // the folder, flocked while the Temp lives
	done sync.Once
}

// TempDir makes a new empty folder, mode 0700.
func (s *Store) TempDir(prefix string) (*Temp, error) {
	held, path, err := s.makeHeld(filepath.Join(s.root, tmpDir, prefix+"-"+NewID()))
	if err != nil {
		return nil, err
	}
	return &Temp{Path: path, s: s, held: held}, nil
}

// makeHeld makes a folder and flocks it, out of the sight of sweep.
func (s *Store) makeHeld(path string) (*os.File, string, error) {
	unlock, err := s.Lock(context.Background(), "sweep")
	if err != nil {
		return nil, "", err
	}
	defer unlock()
	if err := os.Mkdir(path, 0o700); err != nil {
		return nil, "", err
	}
	held, err := os.Open(path)
	if err != nil {
		os.Remove(path)
		return nil, "", err
	}
	if err := syscall.Flock(int(held.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		held.Close()
		os.Remove(path)
		return nil, "", fmt.Errorf("lock %s: %w", path, err)
	}
	return held, path, nil
}

// Commit makes the folder durable and gives it its final name, which must not
// exist. It either happens whole or not at all; after an error the Temp is
// still there to be removed, unless the error is ErrNotDurable.
func (t *Temp) Commit(final string) error {
	if err := syncTree(t.Path); err != nil {
		return err
	}
	if _, err := os.Lstat(final); err == nil {
		return fmt.Errorf("%s: %w", final, fs.ErrExist)
	}
	// Renaming a folder over another fails unless that is empty, so a loser of
	// a race gets an error here too.
	if err := os.Rename(t.Path, final); err != nil {
		return err
	}
	t.done.Do(func() { t.held.Close() })
	if err := errors.Join(syncDir(filepath.Dir(final)), syncDir(filepath.Dir(t.Path))); err != nil {
		return fmt.Errorf("%s: %w: %w", final, ErrNotDurable, err)
	}
	return nil
}

// Replace is Commit for a final name that exists: the folder takes its place in
// one step, and what was there is deleted. A file system that has no such step
// is an error that wraps errors.ErrUnsupported, and nothing happens.
func (t *Temp) Replace(final string) error {
	if err := syncTree(t.Path); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, t.Path, unix.AT_FDCWD, final, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		err = errors.ErrUnsupported
	}
	if err != nil {
		return fmt.Errorf("%s: exchange for a new folder: %w", final, err)
	}
	// The old one has the Temp's name, and is the next Open's if this fails.
	t.done.Do(func() { t.held.Close() })
	if err := syncDir(filepath.Dir(final)); err != nil {
		return fmt.Errorf("%s: %w: %w", final, ErrNotDurable, err)
	}
	return os.RemoveAll(t.Path)
}

// Remove deletes the folder; after Commit, or again, it does nothing.
func (t *Temp) Remove() error {
	var err error
	t.done.Do(func() {
		err = os.RemoveAll(t.Path)
		t.held.Close()
	})
	return err
}

// Remove deletes a folder of one image, kernel or VM: it is out of sight at
// once and as a whole, and its space is given back after that.
func (s *Store) Remove(dir string) error {
	parent := filepath.Dir(dir)
	if dir != filepath.Clean(dir) || parent != s.Images() && parent != s.Kernels() && parent != s.VMs() {
		return fmt.Errorf("%q: not the folder of an image, a kernel or a VM in %s", dir, s.root)
	}
	trash := filepath.Join(s.root, trashDir, filepath.Base(dir)+"-"+NewID())
	if err := os.Rename(dir, trash); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	return os.RemoveAll(trash)
}

// HoldVM takes the hold on a VM, which is the right to write its records and
// to run it: a flock on its folder, that goes with the process. The hold ends
// when it is closed. A VM that is held is ErrHeld, one that is gone
// fs.ErrNotExist.
func (s *Store) HoldVM(id string) (hold *os.File, err error) {
	dir := s.VM(id)
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	switch {
	case errors.Is(err, syscall.EWOULDBLOCK):
		err = fmt.Errorf("VM %s: %w", id, ErrHeld)
	case err == nil:
		// Between the opening and the lock it may have gone to the trash.
		var opened, now os.FileInfo
		if opened, err = f.Stat(); err == nil {
			if now, err = os.Lstat(dir); err == nil && !os.SameFile(opened, now) {
				err = fmt.Errorf("%s: %w", dir, fs.ErrNotExist)
			}
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// SweepVM removes what was half written into a VM's folder by a process that
// died. The caller holds the VM.
func (s *Store) SweepVM(id string) error { return sweepHalfWritten(s.VM(id)) }

// SweepKernels is SweepVM for the folder of the kernels. The caller has the
// lock of whoever writes there.
func (s *Store) SweepKernels() error { return sweepHalfWritten(s.Kernels()) }

func sweepHalfWritten(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if isHalfWritten(e.Name()) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// VMIDs lists the ids of all VMs. What is no folder with the name of an id is
// not of banger.
func (s *Store) VMIDs() ([]string, error) {
	entries, err := os.ReadDir(s.VMs())
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && IsID(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// sweep removes what a dead process was making, and all trash.
func (s *Store) sweep() error {
	unlock, err := s.Lock(context.Background(), "sweep")
	if err != nil {
		return err
	}
	defer unlock()
	tmp := filepath.Join(s.root, tmpDir)
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(tmp, e.Name())
		if f := holdIfFree(path); f != nil {
			s.swept = append(s.swept, filepath.Join(tmpDir, e.Name()))
			err = errors.Join(err, os.RemoveAll(path))
			f.Close()
		}
	}
	trash := filepath.Join(s.root, trashDir)
	entries, readErr := os.ReadDir(trash)
	err = errors.Join(err, readErr)
	for _, e := range entries {
		s.swept = append(s.swept, filepath.Join(trashDir, e.Name()))
		err = errors.Join(err, os.RemoveAll(filepath.Join(trash, e.Name())))
	}
	return errors.Join(err, s.Blobs().sweepPartials(time.Now()))
}

// holdIfFree flocks a file or folder if nobody else does, else returns nil.
func holdIfFree(path string) *os.File {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil
	}
	return f
}
