// Package banger holds the nouns of banger: what the daemon's API, the
// command line and the rooms below them speak of. It does no I/O and imports
// only the standard library. It is not yet a stable API; package ext4 is.
package banger

import (
	"net/netip"
	"time"
)

// An Image is a base image in the store, as `banger image inspect` shows it.
type Image struct {
	ID             string      `json:"id"`              // 12 hex digits
	Name           string      `json:"name"`            // its full reference
	Reference      string      `json:"reference"`       // what was asked for
	Digest         *string     `json:"digest"`          // of the manifest; nil where there is none
	BaseDigest     string      `json:"base_digest"`     // of the base image's bytes: "fsverity-sha256:" and what `fsverity digest` prints, or "sha256:" in old records
	Rootfs         string      `json:"rootfs"`          // path of the ext4 file
	WorkSeed       string      `json:"work_seed"`       // path of the work seed; "" for an old image, which has none
	SizeBytes      int64       `json:"size_bytes"`      // of the file system
	AllocatedBytes int64       `json:"allocated_bytes"` // what it occupies on the host
	Platform       string      `json:"platform"`
	Created        time.Time   `json:"created"` // when the base was built here
	Config         ImageConfig `json:"config"`
	Trimmed        bool        `json:"trimmed"` // units of systemd that a microVM does not need are masked in it
}

// ImageConfig is the part of an OCI image configuration that banger acts on.
type ImageConfig struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkingDir string   `json:"working_dir,omitempty"`
	StopSignal string   `json:"stop_signal,omitempty"`
}

// A Kernel is a guest kernel in the store.
type Kernel struct {
	Version   string    `json:"version"` // the kernel's own release, as uname -r
	Source    string    `json:"source"`  // "debian:bookworm", or "import"
	Package   string    `json:"package,omitempty"`
	Vmlinux   string    `json:"vmlinux"`           // path of the uncompressed ELF image
	Modules   string    `json:"modules,omitempty"` // path of the modules drive; "" if it has none
	Default   bool      `json:"default"`
	SizeBytes int64     `json:"size_bytes"` // of all its files
	Created   time.Time `json:"created"`
}

// A State is where a VM is in its life; the diagram is in internal/vm.
type State string

const (
	StateCreated  State = "created"
	StateStarting State = "starting"
	StateRunning  State = "running"
	StatePaused   State = "paused"
	StateStopping State = "stopping"
	StateStopped  State = "stopped"
	StateFailed   State = "failed"
	StateDeleting State = "deleting"
)

// A VM is one virtual machine, as `banger inspect` shows it. What a guest or an
// image brought about (Reason, Image) is untrusted text.
type VM struct {
	Name        string   `json:"name"`
	ID          string   `json:"id"` // 12 hex digits
	State       State    `json:"state"`
	Reason      string   `json:"reason,omitempty"` // of the state, where there is more to say
	Image       string   `json:"image"`            // full name of the image when the VM was made
	ImageID     string   `json:"image_id"`         // of the base image it is bound to
	Kernel      string   `json:"kernel"`
	Driver      string   `json:"driver"` // of the last start; "" before the first
	Accel       Accel    `json:"accel"`  // of the last start; what was asked for before it
	CPUs        int      `json:"cpus"`
	MemoryBytes int64    `json:"memory_bytes"`
	Command     []string `json:"command,omitempty"` // its main command: the VM stops when that ends
	ExitCode    *int     `json:"exit_code"`         // of the main command's last run; null where there is none
	Ephemeral   bool     `json:"ephemeral"`         // removed when it stops
	Disks       []Disk   `json:"disks"`
	Ports       []Port   `json:"ports"`
	Net         string   `json:"net"`       // what its guest may reach, as --net takes it
	Addresses   []string `json:"addresses"` // of its guest

	PID     int        `json:"pid"`     // of the VMM; 0 where none runs
	Created time.Time  `json:"created"` // when its disks were made
	Started *time.Time `json:"started"` // its last start; null before the first

	Confinement *Confinement `json:"confinement,omitempty"` // of the VMM that runs
}

// A Disk is a file that a VM has as a drive.
type Disk struct {
	Path           string `json:"path"`
	Role           string `json:"role"` // base, overlay, work, modules
	SizeBytes      int64  `json:"size_bytes"`
	AllocatedBytes int64  `json:"allocated_bytes"` // what it occupies on the host
}

// A Port is a port of the host that leads to one of a VM.
type Port struct {
	Protocol  string `json:"protocol"` // tcp or udp
	HostAddr  string `json:"host_addr"`
	HostPort  uint16 `json:"host_port"`
	GuestPort uint16 `json:"guest_port"`
}

// A Listener is a socket in a guest that waits for peers, as the guest has it:
// Process, which is the name that a process there gave itself, is untrusted
// text.
type Listener struct {
	Protocol string     `json:"protocol"` // tcp or udp
	Addr     netip.Addr `json:"addr"`     // 0.0.0.0 and :: are every address of the guest's
	Port     uint16     `json:"port"`
	Process  string     `json:"process,omitempty"`
	PID      int        `json:"pid,omitempty"` // in the guest; 0 where it was not found out
}

// A Denial is something the guest wanted and did not get. Equal ones are one,
// counted. Names were answered by our DNS; they hold printable ASCII alone.
type Denial struct {
	First  time.Time      `json:"first"`
	Last   time.Time      `json:"last"`
	Count  int            `json:"count"`
	Proto  string         `json:"proto"`           // tcp, udp, icmp, dns, or spoof for a packet under a false source
	To     netip.AddrPort `json:"to,omitzero"`     // port 0 where there is none
	From   netip.Addr     `json:"from,omitzero"`   // of a spoof
	Names  []string       `json:"names,omitempty"` // for which the address was answered, or the one asked for
	Reason string         `json:"reason"`
	Flag   string         `json:"flag,omitempty"` // what would allow it; empty if nothing does
}

// Confinement is what keeps a VMM from the rest of the host: what was really
// applied, not what was asked for.
type Confinement struct {
	Seccomp     bool     `json:"seccomp"`      // the VMM filters its own system calls
	NoNewPrivs  bool     `json:"no_new_privs"` // prctl(2) PR_SET_NO_NEW_PRIVS
	LandlockABI int      `json:"landlock_abi"` // landlock(7); 0: the kernel has none
	Namespaces  []string `json:"namespaces"`   // user, net, pid, ipc, uts
	Limits      []string `json:"limits"`       // "nofile 1024", "memory.max 1342177280", ...
	Missing     []string `json:"missing"`      // what this host does not allow, and why
	// Proof is one thing that was tried after all that, and had to fail.
	Proof string `json:"proof"`
}

// A Check is one thing that `banger doctor` looked at.
type Check struct {
	Name  string     `json:"name"`
	State CheckState `json:"state"`
	Found string     `json:"found"`
	Fix   string     `json:"fix,omitempty"` // what to do, where it is not ok
}

// A CheckState says whether something is as it should be.
type CheckState string

const (
	CheckOK   CheckState = "ok"
	CheckWarn CheckState = "warn" // banger works, and could do better
	CheckFail CheckState = "fail" // banger does not work
)

// A Stage is a milestone of a boot. Stages are reached in the order declared.
type Stage string

const (
	StagePulled  Stage = "pulled"  // the image's blobs are here
	StageBuilt   Stage = "built"   // the base image is here
	StageDisks   Stage = "disks"   // overlay disk and work disk are made
	StageSpawned Stage = "spawned" // the VMM process runs
	StageKernel  Stage = "kernel"  // the guest kernel started its first process
	StageAgent   Stage = "agent"   // the agent answers
	StageNetwork Stage = "network" // the guest's interfaces are up
	StageInit    Stage = "init"    // the image's init says that the system is up
)

// Accel names how guest code is run.
type Accel string

const (
	AccelAuto Accel = "auto" // KVM where a probe shows that it works, else TCG
	AccelKVM  Accel = "kvm"
	AccelTCG  Accel = "tcg" // software emulation: no isolation is promised
)

// Defaults for what a spec leaves out.
const (
	DefaultCPUs                   = 2 // at most the host's
	DefaultMemoryBytes      int64 = 1 << 30
	DefaultOverlayDiskBytes int64 = 16 << 30
	DefaultWorkDiskBytes    int64 = 16 << 30
)

// A Spec is what the user asks of a VM. Zero fields take the defaults.
type Spec struct {
	Image       string `json:"image"`
	Hostname    string `json:"hostname,omitempty"`
	CPUs        int    `json:"cpus,omitempty"`
	MemoryBytes int64  `json:"memory_bytes,omitempty"`
	Accel       Accel  `json:"accel,omitempty"`
	Init        string `json:"init,omitempty"` // auto, image, agent
	Kernel      string `json:"kernel,omitempty"`
	// Net is the policy of the guest's network as --net takes it; "" is public.
	Net string `json:"net,omitempty"`
	// AllowHost are ports of the host's loopback that the guest reaches at
	// host.banger, and Ports are ports of the host that lead to the guest, as
	// -p takes them.
	AllowHost []uint16 `json:"allow_host,omitempty"`
	Ports     []string `json:"ports,omitempty"`
	// Command takes the place of the image's Cmd in the VM's main command.
	Command []string `json:"command,omitempty"`
}
