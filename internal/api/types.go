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
	MethodRun          = "run"
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
	File      int    `json:"file"`     // what an oci: or rootfs: reference names
	Packages  int    `json:"packages"` // the package list
	// PackagesName is how the user called the list, for errors.
	PackagesName string `json:"packages_name,omitempty"`
	Name         string `json:"name,omitempty"` // under which it is kept, if not its own
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

// RunParams asks for an ephemeral VM and one session in it. The frames of the
// session are wire's.
type RunParams struct {
	Spec    banger.Spec `json:"spec"`
	Source  Source      `json:"source"`
	Command []string    `json:"command,omitempty"` // takes the place of the image's Cmd
	Session wire.Exec   `json:"session"`           // Args is decided by the daemon
}

// RunResult is how a run ended.
type RunResult struct {
	Exit  wire.Exit `json:"exit"`
	Clean bool      `json:"clean"` // the guest powered off by itself
}
