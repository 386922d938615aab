// Package vmm is the contract between banger and a VMM: a Machine goes in, a
// Process comes out. It is an interface, a fake (vmmtest.Fake) and a mandatory
// conformance suite (vmmtest.Run); each driver is a package below it.
package vmm

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"banger"
)

// ErrEnded is what every call that needs a living VMM returns, wrapped or not,
// once the process has ended.
var ErrEnded = errors.New("vmm: the process has ended")

// MaxOutputBytes bounds Exit.Output.
const MaxOutputBytes = 4 << 10

// A Machine is the full description given to a driver. Every path is absolute
// and the driver opens it; the caller owns the files and removes them.
type Machine struct {
	ID          string // of the VM: 12 hex digits; names the process, nothing else
	RunDir      string // folder of this VM alone, mode 0700, for whatever the driver must put in a file
	CPUs        int
	MemoryBytes int64 // a multiple of 1 MiB
	Accel       banger.Accel
	Boot        Boot
	Drives      []Drive
	NIC         *NIC // nil for none
	// Console receives what the guest writes to its console; nil throws it
	// away. The driver calls Write from one goroutine, keeps no reference to
	// the bytes and ignores what Write returns. A Console must not block: as
	// long as it does the guest's serial line stands still. Untrusted bytes.
	Console io.Writer
}

// Boot is what the machine starts.
type Boot struct {
	Kernel string // an uncompressed ELF vmlinux
	Initrd string // a cpio archive; "" for none
	// Args are the kernel command line's words that hold for every driver;
	// the driver adds those of its platform (console, clock, reboot).
	Args []string
}

// A Drive is a block device given to the VMM: a raw file. Guests find drives
// by what is on them, so there is no order and no serial in the contract.
// A file is in use by one machine that writes or by any number that only read;
// Start fails otherwise. A flush by the guest is a flush of the file.
type Drive struct {
	Path     string
	ReadOnly bool // the driver must open it so that the VMM cannot write
}

// A NIC is the machine's network card. What the guest sends comes out of a
// stream that the driver makes, and what is written to it goes to the guest:
// Ethernet frames, each after its length in 32 bits, big-endian.
type NIC struct {
	MAC [6]byte
	MTU int // the guest is told; frames are at most 14 bytes longer
	// Attach is called once by Start, before the guest's first instruction,
	// and owns the stream from then on; an error of it fails Start. The stream
	// breaks when the process ends. A stream that nobody reads stands still,
	// and the guest's card with it, but nothing else.
	Attach func(net.Conn) error
}

// Info is what a driver found on this host.
type Info struct {
	Driver  string       `json:"driver"` // "qemu"
	Program string       `json:"program"`
	Version string       `json:"version"`
	Accel   banger.Accel `json:"accel"`  // what it would use for the asked accel: kvm or tcg
	Reason  string       `json:"reason"` // why auto chose that, one clause
	// Sandbox says whether the VMM filters its own system calls.
	Sandbox bool `json:"sandbox"`
	// Confinement is what was applied to a process; nil for a probe.
	Confinement *banger.Confinement `json:"confinement,omitempty"`
}

// A Driver starts machines on one kind of VMM.
type Driver interface {
	// Probe finds the program and decides the accelerator, within a few
	// seconds at most, without leaving anything behind. A missing program, or
	// an accel that was asked for by name and does not work, is a
	// *banger.Error with CodeUnavailable and a hint.
	Probe(ctx context.Context, accel banger.Accel) (Info, error)

	// Start spawns the VMM and returns once the guest's first instruction may
	// run. The process dies with the calling process, however that ends, and
	// holds no file descriptor but those of its machine. When Start fails
	// nothing is left: no process, no file in RunDir, and Console is not
	// written to again. A machine that no VMM here could run (no CPU, more
	// memory than the host has, a file that is missing) is refused before
	// anything is spawned. ctx bounds Start only.
	Start(ctx context.Context, m Machine) (Process, error)
}

// A Process is one running VMM. All methods may be called from any goroutine,
// and after the end.
type Process interface {
	Info() Info
	PID() int

	// DialGuest opens a stream to a service number of the agent, waiting for
	// the agent as long as ctx allows. The agent need not have answered on the
	// stream when it returns. When ctx ends first the error wraps its cause.
	// After the end of the process it returns ErrEnded at once, and open
	// streams break. Streams survive a pause. Close of a stream never waits
	// for the guest.
	DialGuest(ctx context.Context, port uint32) (net.Conn, error)

	// Pause stops the guest's CPUs, Resume lets them go on; either may be
	// called again with no effect.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error

	// Quit asks the VMM itself to end (the guest is not asked, and may be
	// paused), writing back what it holds of the drives, and returns when it
	// has accepted; Done tells when it is over. Kill ends it at once. Both may
	// be called again and return nil when the process has ended.
	Quit(ctx context.Context) error
	Kill() error

	// Done is closed once the process has been waited for, all its output was
	// passed to Console, nothing of the driver runs for it any more, and no
	// file of the driver is left in RunDir. Exit is valid from then on and
	// zero before.
	Done() <-chan struct{}
	Exit() Exit
}

// A Cause says why a VMM ended.
type Cause string

const (
	CauseGuestOff    Cause = "guest-off"    // the guest powered off
	CauseGuestReboot Cause = "guest-reboot" // the guest asked for a reset
	CauseGuestPanic  Cause = "guest-panic"  // the guest's kernel gave up
	CauseQuit        Cause = "quit"         // Quit was called
	CauseKilled      Cause = "killed"       // Kill was called
	CauseCrashed     Cause = "crashed"      // anything else
)

// Exit is how a VMM ended.
type Exit struct {
	Cause Cause
	Code  int // exit code of the process, -1 if a signal ended it
	State *os.ProcessState
	// Output is the end of what the VMM itself printed, at most
	// MaxOutputBytes: the reason of a crash. Untrusted bytes.
	Output string
	Time   time.Time
}
