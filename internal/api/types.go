package api

import (
	"banger"
	"banger/internal/wire"
)

// Methods of the API.
const (
	MethodVersion      = "version"
	MethodImageList    = "image.list"
	MethodImageInspect = "image.inspect"
	MethodImageRemove  = "image.remove"
	MethodImagePull    = "image.pull"
	MethodImageBuild   = "image.build"
	MethodKernelList   = "kernel.list"
	MethodKernelPull   = "kernel.pull"
	MethodKernelImport = "kernel.import"
	MethodKernelRemove = "kernel.remove"
	MethodPrepare      = "prepare"
	MethodDoctor       = "doctor"
	MethodProxy        = "proxy" // until the client cancels

	// Of the resident daemon.
	MethodHello   = "hello"
	MethodResolve = "resolve"
	MethodCreate  = "vm.create"
	MethodRun     = "vm.run"
	MethodStart   = "vm.start"
	MethodStop    = "vm.stop"
	MethodRestart = "vm.restart"
	MethodKill    = "vm.kill"
	MethodPause   = "vm.pause"
	MethodResume  = "vm.resume"
	MethodRemove  = "vm.remove"
	MethodList    = "vm.list"
	MethodInspect = "vm.inspect"
	MethodAttach  = "vm.attach"
	MethodLogs    = "vm.logs"
	MethodStats   = "vm.stats"

	MethodPorts   = "vm.ports"
	MethodPortAdd = "vm.port.add"
	MethodPortRm  = "vm.port.remove"
	MethodNetLog  = "vm.net.log"
	MethodDial    = "vm.dial"

	// Of a VM's supervisor.
	MethodExec = "exec"
)

// None is the type of parameters and results that say nothing.
type None struct{}

// Version is the result of MethodVersion.
type Version struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	Daemon  string `json:"daemon"` // path of the program
	Agent   string `json:"agent"`  // path of the guest binary
	State   string `json:"state"`  // path of the state folder
}

// A Source names an image to get and the files that the client opened for it,
// as indexes into the files of the call, -1 where there is none.
type Source struct {
	Reference string `json:"reference"`
	File      int    `json:"file"`     // what an oci:, docker-archive: or rootfs: reference names
	Packages  int    `json:"packages"` // the package list
	// PackagesName is how the user called the list, for errors.
	PackagesName string `json:"packages_name,omitempty"`
	Name         string `json:"name,omitempty"`     // under which it is kept, if not its own
	Platform     string `json:"platform,omitempty"` // os/architecture[/variant]; "" is linux/amd64
	// Trim masks units of systemd that a microVM does not need; nil leaves it to
	// the kind of image.
	Trim *bool `json:"trim,omitempty"`
}

// Named is the parameter of what acts on one thing by its name.
type Named struct {
	Name string `json:"name"`
}

// BuildParams asks for a base image in a file of the client's.
type BuildParams struct {
	Source    Source `json:"source"`
	Output    int    `json:"output"`     // index of the file to write: empty, open for reading and writing
	SizeBytes int64  `json:"size_bytes"` // 0: by content
	NoGuest   bool   `json:"no_guest"`
}

// Built is the result of MethodImageBuild.
type Built struct {
	Reference      string   `json:"reference"`
	Digest         *string  `json:"digest"`
	SizeBytes      int64    `json:"size_bytes"`
	AllocatedBytes int64    `json:"allocated_bytes"`
	Entries        int      `json:"entries"`
	Notes          []string `json:"notes,omitempty"`
}

// Images and Kernels are results of lists.
type Images struct {
	Images []banger.Image `json:"images"`
}

type Kernels struct {
	Kernels []banger.Kernel `json:"kernels"`
}

// PullKernel asks for a kernel of a Debian suite.
type PullKernel struct {
	Suite string `json:"suite"`
}

// ImportKernel brings a kernel of the user's own.
type ImportKernel struct {
	Image   int `json:"image"`
	Modules int `json:"modules"` // -1: none
}

// Hello says which release a side is of.
type Hello struct {
	Version string `json:"version"`
	// Program is the path of the daemon that the client would start; "" makes
	// no claim.
	Program string `json:"program,omitempty"`
	// Stale is the daemon's answer to a client of another release, or beside
	// which another daemon lies: it makes way.
	Stale bool `json:"stale,omitempty"`
}

// PrepareParams asks for an image and a kernel: MethodResolve for those that
// are in the store, MethodPrepare to get what is missing.
type PrepareParams struct {
	Source Source `json:"source"`
	Kernel string `json:"kernel,omitempty"` // "": the default one
}

// Prepared is what a VM can be made of.
type Prepared struct {
	Image   string `json:"image"` // full name
	ImageID string `json:"image_id"`
	Kernel  string `json:"kernel"`
}

// CreateParams asks for a VM.
type CreateParams struct {
	Name      string      `json:"name,omitempty"` // "": one is made up
	Ephemeral bool        `json:"ephemeral,omitempty"`
	Spec      banger.Spec `json:"spec"`
	Prepared  Prepared    `json:"prepared"`
}

// RunParams asks for a VM and for the connection in the one file of the call
// to be served by its supervisor. The VM stops, and goes if it is ephemeral,
// when the client says FrameStdinEOF or goes away.
type RunParams struct {
	Create CreateParams `json:"create"`
	Wait   banger.Stage `json:"wait,omitempty"`
}

// RunResult is how a VM ended.
type RunResult struct {
	Clean bool `json:"clean"` // the guest powered off by itself
}

// VMParams is the parameter of what acts on one VM, by its name, its id, or
// the beginning of its id.
type VMParams struct {
	Name string `json:"name"`
	// Wait is the stage that a start waits for; "" is the network stage.
	Wait banger.Stage `json:"wait,omitempty"`
	// TimeoutMs is what a stop gives the guest; -1 is the default.
	TimeoutMs int64 `json:"timeout_ms,omitempty"`
	// Force lets a remove stop the VM first.
	Force bool `json:"force,omitempty"`
	// Start lets an attach start the VM first. The connection to attach is
	// the one file of the call.
	Start bool `json:"start,omitempty"`
}

// VMs is a list.
type VMs struct {
	VMs []banger.VM `json:"vms"`
}

// PortParams names a VM and ports of it, as -p takes them.
type PortParams struct {
	Name  string   `json:"name"`
	Ports []string `json:"ports,omitempty"`
}

// Ports are those of the host that lead to a VM, the open ones or, of a VM at
// rest, those of its record; and what waits for peers in its guest.
type Ports struct {
	Ports []Port `json:"ports"`
	// Listeners is null where the guest was not asked, or did not answer.
	Listeners []Listener `json:"listeners"`
	More      bool       `json:"more,omitempty"`    // there are listeners beyond these
	Unknown   string     `json:"unknown,omitempty"` // why the guest did not answer; untrusted text
}

// A Port is a port of the host, and whether anything in the guest waits for what
// comes there: null where that is not known.
type Port struct {
	banger.Port
	Listening *bool `json:"listening"`
}

// A Listener is a socket of the guest's, and whether ports of the host can lead
// to it and do.
type Listener struct {
	banger.Listener
	Reach     Reach `json:"reach"`
	Forwarded bool  `json:"forwarded"`
}

// A Reach says who can come to a socket of a guest.
type Reach string

const (
	ReachPort     Reach = "port"     // ports of the host lead there
	ReachLoopback Reach = "loopback" // the guest itself alone
	ReachOther    Reach = "other"    // it is at an address of the guest's that ports do not lead to
)

// NetLog is what a VM's network has denied.
type NetLog struct {
	Denials []banger.Denial `json:"denials"`
}

// DialParams asks for the connection in the one file of the call, which is TCP,
// to be joined to a port of a VM. The call ends once the VM has accepted; the
// VM's supervisor keeps the connection.
type DialParams struct {
	// Host is NAME.banger or an address of the VM's. Anything else is an error
	// of CodeUsage, a VM that is not there of CodeNotFound, one that does not
	// run of CodeConflict; a port where nothing listens of CodeUnavailable, and
	// one that does not answer of CodeTimeout.
	Host string `json:"host"`
	Port uint16 `json:"port"`
}

// ProxyParams asks for a proxy to the VMs.
type ProxyParams struct {
	Listen string `json:"listen"` // address and port, which may be 0
}

// LogParams asks for a log, which comes as FrameStdout.
type LogParams struct {
	Name    string `json:"name"`
	Console bool   `json:"console,omitempty"`
	Follow  bool   `json:"follow,omitempty"` // until the VM is at rest
}

// ExecParams asks a supervisor for a session. Its frames are wire's.
type ExecParams struct {
	Session wire.Exec `json:"session"`
	// Main says that Session.Args take the place of the image's Cmd, as in
	// `docker run`; else they are the whole command.
	Main bool `json:"main,omitempty"`
}

// ExecResult is how a session ended.
type ExecResult struct {
	Exit wire.Exit `json:"exit"`
}

// Stats are the counters of a running VM, since its VMM started.
type Stats struct {
	Name           string `json:"name"`
	ID             string `json:"id"`
	CPUs           int    `json:"cpus"`
	CPUNs          int64  `json:"cpu_ns"`       // of all threads of the VMM
	MemoryBytes    int64  `json:"memory_bytes"` // resident
	LimitBytes     int64  `json:"limit_bytes"`  // memory of the guest
	ReadBytes      int64  `json:"read_bytes"`   // from block devices of the host
	WrittenBytes   int64  `json:"written_bytes"`
	AllocatedBytes int64  `json:"allocated_bytes"` // of its own disks
}

// StatsList is a list.
type StatsList struct {
	Stats []Stats `json:"stats"`
}

// Checks are what doctor found.
type Checks struct {
	Checks []banger.Check `json:"checks"`
}
