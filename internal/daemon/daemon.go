// Package daemon is where the rooms of banger are joined: it answers the API
// with images, kernels, drivers and VMs. Nothing else imports them all.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"banger"
	"banger/internal/api"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/store"
)

// Version is set when a release is linked.
var Version = "dev"

// callFD is the descriptor of the connection that the client passes.
const callFD = 3

// Main is the program bangerd.
func Main(args []string) int {
	if len(args) == 2 && args[1] == "--version" {
		fmt.Println("bangerd", Version)
		return 0
	}
	if len(args) != 2 || args[1] != "call" {
		fmt.Fprintln(os.Stderr, "bangerd is started by banger; run `banger --help`")
		return 2
	}
	f := os.NewFile(callFD, "client")
	c, err := net.FileConn(f)
	if err != nil {
		fmt.Fprintf(os.Stderr, "bangerd: descriptor %d: %v\n", callFD, err)
		return 2
	}
	f.Close()
	conn, ok := c.(*net.UnixConn)
	if !ok {
		fmt.Fprintf(os.Stderr, "bangerd: descriptor %d is no unix socket\n", callFD)
		return 2
	}
	debug.SetMemoryLimit(image.MemoryTargetBytes)
	// A client that dies in the middle of a frame is found out by the write
	// that fails, not by a signal.
	signal.Ignore(syscall.SIGPIPE)
	// Asked to end, it ends as when the client cancels: with everything
	// cleaned up.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	api.Serve(ctx, conn, new(daemon).routes())
	return 0
}

type daemon struct{}

// routes is the whole API.
func (d *daemon) routes() map[string]api.Handler {
	return map[string]api.Handler{
		api.MethodVersion:      d.version,
		api.MethodImageList:    d.imageList,
		api.MethodImageInspect: d.imageInspect,
		api.MethodImageRemove:  d.imageRemove,
		api.MethodImagePull:    d.imagePull,
		api.MethodImageBuild:   d.imageBuild,
		api.MethodKernelList:   d.kernelList,
		api.MethodKernelPull:   d.kernelPull,
		api.MethodKernelImport: d.kernelImport,
		api.MethodKernelRemove: d.kernelRemove,
		api.MethodRun:          d.run,
	}
}

// rooms are the parts that work on one opened state folder.
type rooms struct {
	store   *store.Store
	images  *image.Images
	kernels *kernel.Kernels
}

// open opens the state folder and ends what a daemon that died left behind.
func (d *daemon) open() (*rooms, error) {
	root, err := store.DefaultRoot()
	if err != nil {
		return nil, err
	}
	s, err := store.Open(root)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return nil, banger.Errorf(banger.CodeUnavailable, "%w", err).WithHint("BANGER_HOME names another state folder")
		}
		return nil, err
	}
	if err := reconcile(s); err != nil {
		return nil, err
	}
	return &rooms{store: s, images: image.Open(s), kernels: kernel.Open(s)}, nil
}

// reconcile removes ephemeral VMs whose owner is gone. Their VMM went with
// the owner.
func reconcile(s *store.Store) error {
	ids, release, err := s.AbandonedVMs()
	if err != nil {
		return err
	}
	defer release()
	for _, id := range ids {
		if err := s.Remove(s.VM(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// agent opens the guest binary of this release.
func openAgent() (*os.File, error) {
	path, err := api.Companion(api.AgentProgram)
	if err != nil {
		return nil, err
	}
	return os.Open(path)
}

func (d *daemon) version(ctx context.Context, c *api.Call) (any, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	agent, err := api.Companion(api.AgentProgram)
	if err != nil {
		return nil, err
	}
	root, err := store.DefaultRoot()
	if err != nil {
		return nil, err
	}
	return api.Version{Version: Version, Go: runtime.Version(), Daemon: self, Agent: agent, State: root}, nil
}
