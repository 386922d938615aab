package vm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"banger"
	"banger/internal/store"
)

// Schemas of the two records of a VM.
const (
	recordSchema = 1
	lifeSchema   = 1
)

// A Record is what a VM is: vms/<id>/vm.json. It is written with the disks,
// before the VM can be seen; nothing of it changes but Spec.Ports. Paths are not
// in it, so that the state folder can be moved.
type Record struct {
	ID        string             `json:"id"`
	Name      string             `json:"name"`
	Ephemeral bool               `json:"ephemeral"` // it goes when it stops
	OfRun     bool               `json:"of_run"`    // it was made for one session
	Spec      banger.Spec        `json:"spec"`      // complete
	ImageID   string             `json:"image_id"`  // the one base its overlay disk fits
	RootUUID  string             `json:"root_uuid"` // of the base's file system
	Kernel    string             `json:"kernel"`
	Config    banger.ImageConfig `json:"config"`
	Main      []string           `json:"main,omitempty"` // the command whose end stops the VM
	Disks     Disks              `json:"disks"`
	// Net numbers the VM's addresses among all; 0 for a VM of before there was
	// a network, which has none.
	Net     int       `json:"net,omitempty"`
	Created time.Time `json:"created"`
}

// A Life is what became of a VM: vms/<id>/life.json. Who holds the VM writes
// it, and before an act, not after.
type Life struct {
	State  banger.State `json:"state"`
	Stage  banger.Stage `json:"stage,omitempty"`  // the last one reached
	Reason string       `json:"reason,omitempty"` // untrusted text
	Detail string       `json:"detail,omitempty"` // the console's end; untrusted text

	Supervisor *Process `json:"supervisor,omitempty"`
	VMM        *Process `json:"vmm,omitempty"`

	Driver      string              `json:"driver,omitempty"`
	Accel       banger.Accel        `json:"accel,omitempty"`
	Confinement *banger.Confinement `json:"confinement,omitempty"`
	Ports       []banger.Port       `json:"ports,omitempty"` // that are open now

	Started  *time.Time `json:"started,omitempty"`
	Ended    *time.Time `json:"ended,omitempty"`
	Exit     *int       `json:"exit,omitempty"` // of the main command
	Restarts int        `json:"restarts,omitempty"`
}

// namePattern is the form of a VM's name.
var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// CheckName refuses what cannot be a VM's name. What reads as an id cannot: a
// name must never mean another VM.
func CheckName(name string) error {
	if !namePattern.MatchString(name) {
		return banger.Errorf(banger.CodeUsage, "name %q: not 1 to 63 of a-z, 0-9 and -, beginning with a letter or digit", name)
	}
	if store.IsID(name) {
		return banger.Errorf(banger.CodeUsage, "name %q: it reads as an id", name)
	}
	return nil
}

// Create makes a VM: its disks and its records, in a folder of its own that
// appears under the VM's id as a whole or not at all. The work disk is filled
// from workSeed. It fills in the disks and the time of r. After an error there
// is no VM, unless that cannot be undone, which the error says then.
func Create(s *store.Store, r *Record, workSeed string) error {
	if !store.IsID(r.ID) {
		return banger.Errorf(banger.CodeInternal, "VM: %q is no id", r.ID)
	}
	if err := CheckName(r.Name); err != nil {
		return err
	}
	tmp, err := s.TempDir("vm-" + r.ID)
	if err != nil {
		return err
	}
	defer tmp.Remove()
	if r.Disks, err = MakeDisks(tmp.Path, workSeed); err != nil {
		return err
	}
	r.Created = time.Now().UTC().Truncate(time.Millisecond)
	if err := store.WriteJSON(filepath.Join(tmp.Path, store.VMLife), lifeSchema, Life{State: banger.StateCreated, Stage: banger.StageDisks}); err != nil {
		return err
	}
	if err := store.WriteJSON(filepath.Join(tmp.Path, store.VMRecord), recordSchema, r); err != nil {
		return err
	}
	err = tmp.Commit(s.VM(r.ID))
	if errors.Is(err, store.ErrNotDurable) {
		// Its owner is told that it was not made, and may make another one of
		// that name.
		if undo := s.Remove(s.VM(r.ID)); undo != nil {
			err = fmt.Errorf("%w; and it is not undone: %w", err, undo)
		}
	}
	return err
}

// Load reads the records of a VM. Ones that cannot be read, or are of another
// VM, are an error that says what was found.
func Load(s *store.Store, id string) (r Record, l Life, err error) {
	dir := s.VM(id)
	if err := store.ReadJSON(filepath.Join(dir, store.VMRecord), recordSchema, &r); err != nil {
		return r, l, lost(dir, store.VMRecord, err)
	}
	if r.ID != id {
		return r, l, fmt.Errorf("record %s: it is of the VM %q", filepath.Join(dir, store.VMRecord), r.ID)
	}
	if err := CheckName(r.Name); err != nil {
		return r, l, fmt.Errorf("record %s: %w", filepath.Join(dir, store.VMRecord), err)
	}
	l, err = LoadLife(s, id)
	return r, l, err
}

// LoadLife reads what became of a VM.
func LoadLife(s *store.Store, id string) (l Life, err error) {
	dir := s.VM(id)
	if err := store.ReadJSON(filepath.Join(dir, store.VMLife), lifeSchema, &l); err != nil {
		return l, lost(dir, store.VMLife, err)
	}
	if _, known := transitions[l.State]; !known {
		return l, fmt.Errorf("record %s: no such state: %q", filepath.Join(dir, store.VMLife), l.State)
	}
	return l, nil
}

// lost tells a record that is missing from a VM that is.
func lost(dir, name string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, statErr := os.Lstat(dir); statErr == nil {
		return fmt.Errorf("VM %s: its folder %s has no %s", filepath.Base(dir), dir, name)
	}
	return err
}

// SaveLife writes what became of a VM. The caller holds the VM.
func SaveLife(s *store.Store, id string, l Life) error {
	const maxText = 16 << 10 // of a reason or a console
	l.Reason, l.Detail = l.Reason[:min(len(l.Reason), maxText)], l.Detail[:min(len(l.Detail), maxText)]
	return store.WriteJSON(filepath.Join(s.VM(id), store.VMLife), lifeSchema, l)
}

// SavePorts replaces the ports in the record of a VM. The caller holds the VM.
func SavePorts(s *store.Store, id string, ports []string) error {
	r, _, err := Load(s, id)
	if err != nil {
		return err
	}
	r.Spec.Ports = ports
	return store.WriteJSON(filepath.Join(s.VM(id), store.VMRecord), recordSchema, r)
}

// Settle brings the record of a VM to rest whose owner is gone, ends what is
// left of its VMM, and says in words what it found; "" where all was in order.
// The caller holds the VM.
func Settle(s *store.Store, id string, l *Life) (found string, err error) {
	was := l.State
	if l.VMM != nil {
		if err := l.VMM.Kill(); err != nil {
			return "", fmt.Errorf("VM %s: its VMM, process %d, outlived its supervisor: %w", id, l.VMM.PID, err)
		}
	}
	os.Remove(filepath.Join(s.VM(id), store.SupervisorSocket))
	os.RemoveAll(s.VMRun(id))
	s.SweepVM(id) // what stays is in nobody's way
	if settle(was) == was {
		return "", nil
	}
	now := time.Now().UTC().Truncate(time.Millisecond)
	l.State, l.Ended = settle(was), &now
	l.Reason = fmt.Sprintf("its supervisor died while the VM was %s", was)
	l.Supervisor, l.VMM, l.Confinement, l.Ports = nil, nil, nil, nil
	return l.Reason, SaveLife(s, id, *l)
}

// MarkRemoving records that a VM is to go, before it is stopped for that: the
// next start of the daemon finishes it. On a disk without room for the mark it
// does nothing; the removal itself is one rename.
func MarkRemoving(s *store.Store, id string) error {
	err := store.WriteFile(filepath.Join(s.VM(id), store.VMRemoving), nil, 0o600)
	if errors.Is(err, noSpace) {
		return nil
	}
	return err
}

// UnmarkRemoving takes the mark back.
func UnmarkRemoving(s *store.Store, id string) error {
	err := os.Remove(filepath.Join(s.VM(id), store.VMRemoving))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// IsRemoving says whether the removal of a VM was decided.
func IsRemoving(s *store.Store, id string) bool {
	_, err := os.Lstat(filepath.Join(s.VM(id), store.VMRemoving))
	return err == nil
}
