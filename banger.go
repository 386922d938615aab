// Package banger holds the nouns of banger: what the daemon's API, the
// command line and the rooms below them speak of. It does no I/O and imports
// only the standard library. It is not yet a stable API; package ext4 is.
package banger

import "time"

// An Image is a base image in the store, as `banger image inspect` shows it.
type Image struct {
	ID             string      `json:"id"`              // 12 hex digits
	Name           string      `json:"name"`            // its full reference
	Reference      string      `json:"reference"`       // what was asked for
	Digest         *string     `json:"digest"`          // of the manifest; nil where there is none
	BaseDigest     string      `json:"base_digest"`     // sha256 of the base image's bytes
	Rootfs         string      `json:"rootfs"`          // path of the ext4 file
	SizeBytes      int64       `json:"size_bytes"`      // of the file system
	AllocatedBytes int64       `json:"allocated_bytes"` // what it occupies on the host
	Platform       string      `json:"platform"`
	Created        time.Time   `json:"created"` // when the base was built here
	Config         ImageConfig `json:"config"`
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
}
