package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/kernel"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/wire"
)

// Methods of a supervisor that only the daemon uses.
const (
	supervisorStart  = "supervisor.start" // on the connection it was started with, once
	supervisorServe  = "supervisor.serve" // serve the connection in the file of the call
	supervisorWait   = "supervisor.wait"  // returns when the VM is at rest
	supervisorState  = "supervisor.state" // returns the state, which may be ahead of the record
	supervisorStop   = "supervisor.stop"
	supervisorKill   = "supervisor.kill"
	supervisorPause  = "supervisor.pause"
	supervisorResume = "supervisor.resume"
)

// leaseLimit is how long a VM whose life hangs on a session waits for it.
const leaseLimit = 30 * time.Second

// startParams asks a supervisor to boot its VM.
type startParams struct {
	Wait banger.Stage `json:"wait,omitempty"`
	// Bare says that the main command is not started this time, and that the
	// VM stops when the connection of a later supervisorServe ends.
	Bare bool `json:"bare,omitempty"`
}

// serveParams describe a connection that is handed over.
type serveParams struct {
	Lease bool `json:"lease,omitempty"` // the VM stops when it ends
}

// stopParams says what a stop gives the guest; -1 is the default.
type stopParams struct {
	TimeoutMs int64 `json:"timeout_ms"`
}

// A supervisor is the process that owns one running VM: its VMM, its main
// command, its logs and its socket. It starts with the VM and ends with it,
// and needs no daemon for either.
type supervisor struct {
	store *store.Store
	rec   vm.Record
	v     *vm.VM
	out   *vm.Log
	info  vmm.Info   // of the driver
	net   *vmNetwork // nil for a VM that has none

	bare   bool // of this start
	leased chan struct{}
	lease  sync.Once
	over   chan struct{} // closed when the VM is at rest

	mu   sync.Mutex
	main *vm.Session // of the main command, while it runs

	work sync.WaitGroup // sessions and calls
}

// supervise is the program `bangerd supervise ID`, started by the daemon with
// a connection as descriptor 3.
func supervise(id string, newDriver func() (vmm.Driver, error)) error {
	conn, err := inheritedConn()
	if err != nil {
		return err
	}
	defer conn.Close()
	root, err := store.DefaultRoot()
	if err != nil {
		return err
	}
	if !store.IsID(id) {
		return fmt.Errorf("supervise: %q is no id", id)
	}
	s, err := store.Open(root)
	if err != nil {
		return err
	}
	// The daemon looks into records too, for moments.
	var hold *os.File
	for range 100 {
		if hold, err = s.HoldVM(id); !errors.Is(err, store.ErrHeld) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	defer hold.Close()
	// A daemon that died before this point has a successor, which found the VM
	// at rest: it is not for us to start it.
	if api.Gone(conn) {
		return errors.New("the daemon went away before the VM was held")
	}
	sup := &supervisor{store: s, leased: make(chan struct{}), over: make(chan struct{})}
	release, err := sup.open(s, id, newDriver)
	if err != nil {
		// The daemon hears of it as the answer to its start.
		api.Serve(context.Background(), conn, map[string]api.Handler{
			supervisorStart: func(context.Context, *api.Call) (any, error) { return nil, err },
		})
		return err
	}
	defer release()
	l, err := api.Listen(s.VM(id), store.SupervisorSocket)
	if err != nil {
		return err
	}
	defer os.Remove(filepath.Join(s.VM(id), store.SupervisorSocket))
	defer l.Close()

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// The start is served on the connection of the daemon; what comes to the
	// socket meanwhile is served beside it.
	started := make(chan error, 1)
	sup.work.Go(func() {
		api.Serve(ctx, conn, map[string]api.Handler{supervisorStart: func(ctx context.Context, c *api.Call) (any, error) {
			err := sup.start(ctx, c)
			started <- err
			return api.None{}, err
		}})
		select {
		case started <- errors.New("the daemon went away before it asked for the start"):
		default:
		}
	})
	go sup.accept(ctx, l)
	sup.work.Go(func() { sup.findPeers(ctx, s) })
	// Whoever ends this process in an orderly way ends the VM so.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		for range signals {
			sup.stop(ctx)
		}
	}()
	endLog := sup.keepNetLog()
	if err := <-started; err == nil {
		sup.live(ctx)
	}
	endLog()
	l.Close()
	close(sup.over)
	// Whoever hears of the end is told before this process is gone.
	done := make(chan struct{})
	go func() { sup.work.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(time.Second):
		cancel()
	}
	return nil
}

// inheritedConn is the connection that a process was started with.
func inheritedConn() (*net.UnixConn, error) {
	f := os.NewFile(callFD, "descriptor "+strconv.Itoa(callFD))
	if f == nil {
		return nil, fmt.Errorf("descriptor %d: not open", callFD)
	}
	defer f.Close()
	return api.ConnOf(f)
}

// open reads what the VM is and holds what it needs until release is called.
func (sup *supervisor) open(s *store.Store, id string, newDriver func() (vmm.Driver, error)) (release func(), err error) {
	var undo []func()
	release = func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	r := openRooms(s)
	var life vm.Life
	if sup.rec, life, err = vm.Load(s, id); err != nil {
		return release, err
	}
	im, err := r.images.ByID(sup.rec.ImageID)
	if err != nil {
		return release, fmt.Errorf("VM %s: %w", sup.rec.Name, err)
	}
	uuid := fmt.Sprintf("%x", im.UUID)
	if uuid != sup.rec.RootUUID {
		return release, banger.Errorf(banger.CodeInvalid, "VM %s: its base image %s has the UUID %s, its overlay disk was made over %s",
			sup.rec.Name, im.ID, uuid, sup.rec.RootUUID)
	}
	let, err := r.images.Hold(im)
	if err != nil {
		return release, err
	}
	undo = append(undo, let)
	var k *kernel.Kernel
	if k, err = r.kernels.Get(sup.rec.Kernel); err != nil {
		return release, err
	}
	agent, err := api.Companion(api.AgentProgram)
	if err != nil {
		return release, err
	}
	driver, err := newDriver()
	if err != nil {
		return release, err
	}
	if sup.info, err = driver.Probe(context.Background(), sup.rec.Spec.Accel); err != nil {
		return release, err
	}
	spec := sup.rec.Spec
	spec.Accel = sup.info.Accel // found out once
	if sup.out, err = vm.OpenLog(filepath.Join(s.VM(id), store.VMOutput)); err != nil {
		return release, err
	}
	undo = append(undo, func() { sup.out.Close() })
	console, err := vm.OpenLog(filepath.Join(s.VM(id), store.VMConsole))
	if err != nil {
		return release, err
	}
	undo = append(undo, func() { console.Close() })
	me, err := vm.ProcessOf(os.Getpid())
	if err != nil {
		return release, err
	}
	var card *vmm.NIC
	var guest *wire.Network
	if sup.rec.Net > 0 {
		earlier, err := loadNetLog(s, id)
		if err != nil { // it begins anew
			fmt.Fprintln(os.Stderr, "supervisor:", err)
		}
		if sup.net, err = openNetwork(s, sup.rec, earlier); err != nil {
			return release, err
		}
		undo = append(undo, func() { sup.net.Close() })
		card, guest = &sup.net.card, &sup.net.guest
	}
	var grace time.Duration
	if sup.rec.Ephemeral {
		grace = ephemeralGrace
	}
	sup.v = vm.New(vm.Config{
		ID: id, Store: s, Spec: spec, Config: sup.rec.Config, Disks: sup.rec.Disks,
		Rootfs: im.Rootfs, RootUUID: im.UUID, Kernel: k, Agent: agent, Driver: driver, Grace: grace,
		Life: life, ConsoleLog: console,
		NIC: card, Network: guest,
		Save: func(l vm.Life) error {
			if !vm.Rests(l.State) {
				l.Supervisor = me
				if sup.net != nil {
					l.Ports = sup.net.ports()
				}
			}
			return vm.SaveLife(s, id, l)
		},
		OnStage: sup.onStage,
	})
	return release, nil
}

// stages is where the steps of a boot are told, while somebody listens.
var stages struct {
	mu sync.Mutex
	t  *trace
}

func (sup *supervisor) onStage(s banger.Stage) {
	stages.mu.Lock()
	defer stages.mu.Unlock()
	if stages.t != nil {
		stages.t.next(stepOf[s])
	}
}

// start boots the VM. A client that cancels or goes away ends the boot.
func (sup *supervisor) start(ctx context.Context, c *api.Call) error {
	var p startParams
	if err := c.Params(&p); err != nil {
		return err
	}
	sup.bare = p.Bare
	c.Emit(api.Event{}) // this process is up: what fails from here on is not its start
	if sup.info.Accel == banger.AccelTCG {
		c.Emit(api.Event{Notice: fmt.Sprintf("no KVM (%s): the VM is emulated, slowly, and is no boundary against what runs in it", sup.info.Reason)})
	}
	stages.mu.Lock()
	stages.t = newTrace(c)
	stages.mu.Unlock()
	defer func() {
		stages.mu.Lock()
		stages.t = nil
		stages.mu.Unlock()
	}()
	if p.Wait == "" {
		p.Wait = banger.StageNetwork
	}
	return sup.v.Start(ctx, p.Wait)
}

// live is the VM's life from its first boot to its rest.
func (sup *supervisor) live(ctx context.Context) {
	if len(sup.rec.Main) > 0 && !sup.bare {
		sup.work.Go(func() { sup.runMain(ctx) })
	}
	if sup.bare {
		go func() {
			select {
			case <-sup.leased:
			case <-time.After(leaseLimit):
				sup.v.Stop(context.Background())
			}
		}()
	}
	sup.v.Follow(ctx)
}

// accept serves the socket: the daemon's calls.
func (sup *supervisor) accept(ctx context.Context, l *net.UnixListener) {
	routes := sup.routes()
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond) // out of descriptors or memory: others may give some back
			continue
		}
		if _, err := api.Peer(conn); err != nil {
			fmt.Fprintln(os.Stderr, "supervisor:", err)
			conn.Close()
			continue
		}
		sup.work.Go(func() { api.Serve(ctx, conn, routes) })
	}
}

func (sup *supervisor) routes() map[string]api.Handler {
	plain := func(f func(ctx context.Context, c *api.Call) error) api.Handler {
		return func(ctx context.Context, c *api.Call) (any, error) { return api.None{}, f(ctx, c) }
	}
	out := map[string]api.Handler{
		supervisorWait: plain(func(ctx context.Context, c *api.Call) error {
			select {
			case <-sup.over:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}),
		supervisorStop: plain(func(ctx context.Context, c *api.Call) error {
			p := stopParams{TimeoutMs: -1}
			if err := c.Params(&p); err != nil {
				return err
			}
			// The client's end does not end a stop; its time limit does.
			stopCtx := context.WithoutCancel(ctx)
			if p.TimeoutMs >= 0 {
				var cancel func()
				stopCtx, cancel = context.WithTimeout(stopCtx, time.Duration(p.TimeoutMs)*time.Millisecond)
				defer cancel()
			}
			return sup.stop(stopCtx)
		}),
		supervisorState:  func(context.Context, *api.Call) (any, error) { return sup.v.State(), nil },
		supervisorKill:   plain(func(context.Context, *api.Call) error { return sup.v.Kill() }),
		supervisorPause:  plain(func(ctx context.Context, _ *api.Call) error { return sup.v.Pause(ctx) }),
		supervisorResume: plain(func(ctx context.Context, _ *api.Call) error { return sup.v.Resume(ctx) }),
		supervisorServe:  plain(sup.serve),
	}
	maps.Copy(out, sup.networkRoutes())
	return out
}

// serve takes over a connection of the user's, and answers one call on it.
func (sup *supervisor) serve(_ context.Context, c *api.Call) error {
	var p serveParams
	if err := c.Params(&p); err != nil {
		return err
	}
	f, err := c.File(0)
	if err != nil {
		return err
	}
	conn, err := api.ConnOf(f)
	if err != nil {
		return banger.Errorf(banger.CodeUsage, "%w", err)
	}
	if p.Lease {
		sup.lease.Do(func() { close(sup.leased) })
	}
	sup.work.Go(func() {
		api.Serve(context.Background(), conn, map[string]api.Handler{api.MethodExec: sup.exec})
		if p.Lease {
			sup.v.Stop(context.Background())
		}
	})
	return nil
}

// exec runs a session for the user.
func (sup *supervisor) exec(ctx context.Context, c *api.Call) (any, error) {
	var p api.ExecParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	if p.Main {
		p.Session.Args = command(sup.rec.Config, p.Session.Args)
	}
	exit, err := session(ctx, c, sup.v, sup.rec.Config, p.Session)
	return api.ExecResult{Exit: exit}, err
}

// mainStopLimit is what the main command gets to end by its own signal, of the
// time that a stop has.
const mainStopLimit = 5 * time.Second

// stop gives the main command its stop signal, as its image says it wants to
// be ended, and then ends the VM.
func (sup *supervisor) stop(ctx context.Context) error {
	sup.mu.Lock()
	main := sup.main
	sup.mu.Unlock()
	if main != nil && sup.v.State() == banger.StateRunning {
		name := strings.TrimPrefix(strings.ToUpper(sup.rec.Config.StopSignal), "SIG")
		if !slices.Contains(wire.Signals, name) {
			name = "TERM"
		}
		limit, cancel := context.WithTimeout(ctx, mainStopLimit)
		defer cancel()
		if main.Send(wire.Frame{Type: wire.FrameSignal, Payload: []byte(name)}) == nil {
			for sup.running(main) && limit.Err() == nil {
				select {
				case <-time.After(10 * time.Millisecond):
				case <-limit.Done():
				}
			}
		}
	}
	_, err := sup.v.Stop(ctx)
	return err
}

func (sup *supervisor) running(s *vm.Session) bool {
	sup.mu.Lock()
	defer sup.mu.Unlock()
	return sup.main == s
}

// runMain runs the main command again for every boot, keeps what it says and how
// it ended, and stops the VM when it has ended by itself.
func (sup *supervisor) runMain(ctx context.Context) {
	for ctx.Err() == nil {
		err := sup.mainOnce(ctx)
		if err == nil {
			sup.v.Stop(context.Background())
			return
		}
		var refusal *wire.Error
		if errors.As(err, &refusal) {
			fmt.Fprintf(sup.out, "banger: %s\n", err)
			sup.v.SetExit(exitOf(refusal.Code))
			sup.v.Stop(context.Background())
			return
		}
		// The VM went away under it: its next boot, if there is one, starts
		// the command anew.
		if !sup.v.WaitRunning(ctx) {
			return
		}
	}
}

// exitOf is the exit code of a command that the agent refused to start, as
// banger itself and Docker have them.
func exitOf(code wire.ErrorCode) int {
	switch code {
	case wire.ErrNotExecutable:
		return 126
	case wire.ErrNotFound:
		return 127
	}
	return 125
}

func (sup *supervisor) mainOnce(ctx context.Context) error {
	s, err := sup.v.Exec(ctx, fill(wire.Exec{Args: sup.rec.Main}, sup.rec.Config))
	if err != nil {
		return err
	}
	defer s.Close()
	sup.mu.Lock()
	sup.main = s
	sup.mu.Unlock()
	defer func() {
		sup.mu.Lock()
		sup.main = nil
		sup.mu.Unlock()
	}()
	for {
		f, err := s.Recv()
		if err != nil {
			return err
		}
		switch f.Type {
		case wire.FrameStdout, wire.FrameStderr:
			sup.out.Write(f.Payload)
		case wire.FrameExit:
			var exit wire.Exit
			err := json.Unmarshal(f.Payload, &exit)
			if err == nil {
				sup.v.SetExit(exit.Code) // before anybody is told that it has ended
			}
			return err
		}
	}
}
