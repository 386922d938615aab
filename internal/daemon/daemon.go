// Package daemon is where the rooms of banger are joined: it answers the API
// with images, kernels, drivers and VMs. Nothing else imports them all.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/api"
	"banger/internal/doctor"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/qemu"
)

// Version is set when a release is linked.
var Version = "dev"

// callFD is the descriptor of the connection that the client passes.
const callFD = 3

// Main is the program bangerd. It has four parts: the resident daemon, the
// daemon of one call, the supervisor of one VM, and the last step before a VMM.
func Main(args []string) int { return mainWith(args, qemuDriver) }

// qemuDriver is the driver of every VM.
func qemuDriver() (vmm.Driver, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return qemu.New(self, confineVerb), nil
}

// confineVerb makes this program the one that a VMM is started through.
const confineVerb = "confine"

func mainWith(args []string, newDriver func() (vmm.Driver, error)) int {
	verb := ""
	if len(args) > 1 {
		verb = args[1]
	}
	var err error
	switch {
	case len(args) == 2 && verb == "--version":
		fmt.Println("bangerd", Version)
		return 0
	case len(args) > 2 && verb == confineVerb:
		err = qemu.Confined(args[2:])
	case len(args) == 2 && verb == "call":
		err = oneCall(newDriver)
	case len(args) == 2 && verb == "serve":
		closeOnExec()
		if err = serve(newDriver, api.Ready); err != nil {
			api.Ready(err)
		}
	case len(args) == 3 && verb == "supervise":
		closeOnExec()
		err = supervise(args[2], newDriver)
	default:
		fmt.Fprintln(os.Stderr, "bangerd is started by banger; run `banger --help`")
		return 2
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bangerd: %v\n", err)
		return 2
	}
	return 0
}

// closeOnExec keeps whatever this process has inherited from what it starts.
func closeOnExec() {
	unix.CloseRange(callFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) // ENOSYS before Linux 5.11
	// A client that dies in the middle of a frame is found out by the write
	// that fails, not by a signal.
	signal.Ignore(syscall.SIGPIPE)
}

// oneCall is the daemon of one call, on an inherited connection.
func oneCall(newDriver func() (vmm.Driver, error)) error {
	conn, err := inheritedConn()
	if err != nil {
		return err
	}
	closeOnExec()
	image.LimitMemory()
	// Asked to end, it ends as when the client cancels: with everything
	// cleaned up.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	d := &daemon{newDriver: newDriver}
	api.Serve(ctx, conn, d.routes())
	return nil
}

type daemon struct {
	newDriver func() (vmm.Driver, error)
}

// routes is what a daemon of one call does: what reads images and kernels,
// which are not to be trusted, and nothing that touches a VM.
func (d *daemon) routes() map[string]api.Handler {
	return map[string]api.Handler{
		api.MethodVersion:      d.version,
		api.MethodImageList:    d.imageList,
		api.MethodImageInspect: d.imageInspect,
		api.MethodImageRemove:  d.imageRemove,
		api.MethodImagePull:    d.imagePull,
		api.MethodImageBuild:   d.imageBuild,

		api.MethodImageRegister: d.imageRegister,
		api.MethodImageSeed:     d.imageSeed,
		api.MethodImageTag:      d.imageTag,
		api.MethodImagePrune:    d.imagePrune,
		api.MethodImageVerify:   d.imageVerify,
		api.MethodImageHistory:  d.imageHistory,
		api.MethodImageExport:   d.imageExport,

		api.MethodKernelList:   d.kernelList,
		api.MethodKernelPull:   d.kernelPull,
		api.MethodKernelImport: d.kernelImport,
		api.MethodKernelRemove: d.kernelRemove,
		api.MethodPrepare:      d.prepare,
		api.MethodDoctor:       d.doctor,
		api.MethodProxy:        d.proxy,
	}
}

// rooms are the parts that work on one opened state folder.
type rooms struct {
	store   *store.Store
	images  *image.Images
	kernels *kernel.Kernels
}

// open opens the state folder.
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
	return openRooms(s), nil
}

// openRooms joins the rooms on a state folder: an image and a kernel stay as
// long as a VM needs them.
func openRooms(s *store.Store) *rooms {
	r := &rooms{store: s, images: image.Open(s), kernels: kernel.Open(s)}
	r.images.Users = func(id string) ([]string, error) {
		return r.users(func(rec vm.Record) bool { return rec.ImageID == id })
	}
	return r
}

// users names the VMs that need something. A record that cannot be read may
// need anything.
func (r *rooms) users(needs func(vm.Record) bool) (names []string, err error) {
	ids, err := r.store.VMIDs()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		rec, _, err := vm.Load(r.store, id)
		switch {
		case errors.Is(err, os.ErrNotExist): // removed meanwhile
		case err != nil:
			return nil, err
		case needs(rec):
			names = append(names, rec.Name)
		}
	}
	return names, nil
}

// agent opens the guest binary of this release.
func openAgent() (*os.File, error) {
	path, err := api.Companion(api.AgentProgram)
	if err != nil {
		return nil, err
	}
	return os.Open(path)
}

// doctor looks at the host and at the state folder, and changes nothing.
func (d *daemon) doctor(ctx context.Context, c *api.Call) (any, error) {
	root, err := store.DefaultRoot()
	if err != nil {
		return nil, err
	}
	driver, err := d.newDriver()
	if err != nil {
		return nil, err
	}
	s := store.View(root)
	h := doctor.Host{Store: s, Probe: driver.Probe, Kernel: func() (string, error) {
		k, err := kernel.Open(s).Get("")
		if err != nil {
			return "", err
		}
		return k.Version, nil
	}, Daemon: func() (string, error) {
		conn, err := api.Dial(store.Run(root), store.DaemonSocket)
		if err != nil {
			return "", err
		}
		ctx, cancel := context.WithTimeout(ctx, doctorLimit)
		defer cancel()
		conn.SetReadDeadline(time.Now().Add(doctorLimit))
		var hello api.Hello
		// Of its own release, whatever that is: to look is not to replace it.
		err = api.NewClient(conn).Call(ctx, api.MethodHello, api.Hello{}, nil, &hello, nil, nil)
		return hello.Version, err
	}, Programs: func() (map[string]string, error) {
		found := map[string]string{}
		for _, name := range []string{api.DaemonProgram, api.AgentProgram} {
			path, err := api.Companion(name)
			if err != nil {
				return nil, err
			}
			out, err := exec.CommandContext(ctx, path, "--version").Output()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			found[name] = strings.TrimSpace(strings.TrimPrefix(string(out), name))
		}
		return found, nil
	}}
	return api.Checks{Checks: h.Checks(ctx)}, nil
}

// doctorLimit bounds the answer of a daemon to the doctor.
const doctorLimit = 5 * time.Second

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
