package daemon

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/vmm"
)

// idleLimit is how long the resident daemon stays with nothing to do. VMs need
// no daemon.
var idleLimit = 5 * time.Minute

const (
	// lockLimit is how long it waits for the one before it to end.
	lockLimit = 20 * time.Second
	// retireLimit is what calls get to end when the daemon is to go. A session
	// is not a call of the daemon's: it goes on.
	retireLimit = 5 * time.Second
	// tick is how often the daemon looks whether its socket is still there and
	// whether it is idle.
	tick = time.Second

	// idleEnv is the idle limit of a daemon as a Go duration.
	idleEnv = "BANGER_IDLE"
	// daemonLock is the lock of the one daemon of a state folder.
	daemonLock = "daemon"
	// maxDaemonLogBytes is when the daemon begins its log anew.
	maxDaemonLogBytes = 1 << 20
)

// A resident is the daemon that stays: the one writer of what VMs there are.
type resident struct {
	daemon
	m     *manager
	given bool // the socket is systemd's

	ctx    context.Context
	end    context.CancelFunc // of calls that outstay their time
	retire context.CancelFunc // asks the daemon to go

	calls  sync.WaitGroup
	active atomic.Int64
	last   atomic.Int64 // when the last call ended, in Unix nanoseconds
}

// serve is the program `bangerd serve`. It returns when it is idle, asked to
// go, or another daemon is there already. ready is told once it takes calls.
func serve(newDriver func() (vmm.Driver, error), ready func(error)) error {
	if text := os.Getenv(idleEnv); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d <= 0 {
			return banger.Errorf(banger.CodeUsage, "%s=%q: not a duration like 5m", idleEnv, text)
		}
		idleLimit = d
	}
	l, err := systemdListener()
	if err != nil {
		return err
	}
	r := &resident{daemon: daemon{newDriver: newDriver}, given: l != nil}
	rooms, err := r.open()
	if err != nil {
		return err
	}
	dir := store.Run(rooms.store.Root())
	shorten(filepath.Join(dir, store.DaemonLog))
	unlock, err := r.lock(rooms.store, dir)
	if unlock == nil {
		return err
	}
	defer unlock()

	stopCtx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	stopCtx, r.retire = context.WithCancel(stopCtx)
	defer r.retire()
	r.ctx, r.end = context.WithCancel(context.Background())
	defer r.end()
	if r.m, err = newManager(r.ctx, stopCtx, rooms); err != nil {
		return err
	}
	if !r.given {
		if l, err = api.Listen(dir, store.DaemonSocket); err != nil {
			return err
		}
	}
	socket := filepath.Join(dir, store.DaemonSocket)
	mine, err := os.Lstat(socket)
	if err != nil {
		return err
	}
	ready(nil)
	log.Printf("bangerd %s: %d VMs", Version, r.m.count())
	r.last.Store(time.Now().UnixNano())
	routes := r.routes()
	for stopCtx.Err() == nil {
		l.SetDeadline(time.Now().Add(tick))
		stopWake := context.AfterFunc(stopCtx, func() { l.SetDeadline(time.Unix(1, 0)) })
		conn, err := l.AcceptUnix()
		stopWake()
		switch {
		case err == nil:
			r.take(conn, routes)
			continue
		case !errors.Is(err, os.ErrDeadlineExceeded):
			log.Printf("accept: %v", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		shorten(filepath.Join(dir, store.DaemonLog))
		now, err := os.Lstat(socket)
		switch {
		case err == nil && !os.SameFile(mine, now):
			log.Printf("%s is another's now", socket)
			r.retire()
		case err != nil && !r.given:
			// It was removed from under us: make it anew.
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			fresh, err := api.Listen(dir, store.DaemonSocket)
			if err != nil {
				return err
			}
			l.Close()
			l = fresh
			if mine, err = os.Lstat(socket); err != nil {
				return err
			}
		case r.active.Load() == 0 && time.Since(time.Unix(0, r.last.Load())) > idleLimit:
			r.retire()
		}
	}
	// Nobody new can come; whoever came before this is served.
	if now, err := os.Lstat(socket); err == nil && !r.given && os.SameFile(mine, now) {
		os.Remove(socket)
	}
	for !r.given {
		l.SetDeadline(time.Now().Add(time.Millisecond))
		conn, err := l.AcceptUnix()
		if err != nil {
			break
		}
		r.take(conn, routes)
	}
	l.Close()
	done := make(chan struct{})
	go func() { r.calls.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(retireLimit):
		r.end()
		<-done
	}
	return nil
}

// shorten begins the daemon's log anew when it has become long. It is written
// at its end, wherever that is.
func shorten(path string) {
	if st, err := os.Stat(path); err == nil && st.Size() > maxDaemonLogBytes {
		os.Truncate(path, 0)
	}
}

// lock takes the lock of the one daemon. A nil unlock without an error means
// that another daemon takes calls, so that this one has nothing to do.
func (r *resident) lock(s *store.Store, dir string) (unlock func(), err error) {
	for end := time.Now().Add(lockLimit); ; {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		unlock, err := s.Lock(ctx, daemonLock)
		cancel()
		if err == nil {
			return unlock, nil
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			return nil, err
		}
		if !r.given {
			if conn, err := api.Dial(dir, store.DaemonSocket); err == nil {
				conn.Close()
				return nil, nil
			}
		}
		if time.Now().After(end) {
			return nil, banger.Errorf(banger.CodeUnavailable, "daemon: another one holds %s and takes no calls", s.Root()).
				WithHint("end it with `kill $(pgrep -u %d -x bangerd)`; running VMs go on and are found again", os.Geteuid())
		}
	}
}

// systemdListener is the socket of a systemd unit that started this process
// (sd_listen_fds(3)), or nil.
func systemdListener() (*net.UnixListener, error) {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || os.Getenv("LISTEN_FDS") != "1" {
		return nil, nil
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name) // not for what we start
	}
	f := os.NewFile(callFD, "socket of systemd")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("socket of systemd: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, errors.New("socket of systemd: it is no unix socket")
	}
	u.SetUnlinkOnClose(false)
	return u, nil
}

// take serves one connection beside the others.
func (r *resident) take(conn *net.UnixConn, routes map[string]api.Handler) {
	if _, err := api.Peer(conn); err != nil {
		log.Printf("refused: %v", err)
		conn.Close()
		return
	}
	r.active.Add(1)
	r.calls.Go(func() {
		api.Serve(r.ctx, conn, routes)
		r.last.Store(time.Now().UnixNano())
		r.active.Add(-1)
	})
}

// hello tells a client of what release this daemon is. A client of another
// gets a daemon of its own: this one goes.
func (r *resident) hello(ctx context.Context, c *api.Call) (any, error) {
	var p api.Hello
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	stale := p.Version != "" && p.Version != Version || p.Program != "" && !isMe(p.Program)
	if stale {
		log.Printf("a client is of release %q with %q: making way", p.Version, p.Program)
		if !r.given { // else systemd starts the next one by it
			os.Remove(filepath.Join(store.Run(r.m.store.Root()), store.DaemonSocket))
		}
		r.retire()
	}
	return api.Hello{Version: Version, Stale: stale}, nil
}

// isMe says whether a path leads to the program that this process runs. After
// an update, or a build, it leads to another.
func isMe(path string) bool {
	mine, err := os.Stat("/proc/self/exe")
	if err != nil {
		return true // it cannot be told
	}
	theirs, err := os.Stat(path)
	return err == nil && os.SameFile(mine, theirs)
}

// routes is the API of the resident daemon.
func (r *resident) routes() map[string]api.Handler {
	m := r.m
	return map[string]api.Handler{
		api.MethodHello:   r.hello,
		api.MethodResolve: func(ctx context.Context, c *api.Call) (any, error) { return r.prepared(ctx, c, m.rooms, false) },
		api.MethodCreate:  m.told(m.create),
		api.MethodRun:     m.told(m.run),
		api.MethodStart:   m.told(m.one(m.startCall)),
		api.MethodStop:    m.told(m.one(m.stopCall)),
		api.MethodRestart: m.told(m.one(m.restartCall)),
		api.MethodKill:    m.told(m.one(m.killCall)),
		api.MethodPause:   m.told(m.one(m.pauseCall)),
		api.MethodResume:  m.told(m.one(m.resumeCall)),
		api.MethodRemove:  m.told(m.one(m.removeCall)),
		api.MethodAttach:  m.told(m.one(m.attachCall)),
		api.MethodInspect: m.told(m.one(m.inspectCall)),
		api.MethodList:    m.told(m.list),
		api.MethodPorts:   m.portList,
		api.MethodPortAdd: m.changePorts(supervisorPortAdd, addPorts),
		api.MethodPortRm:  m.changePorts(supervisorPortRm, removePorts),
		api.MethodNetLog:  m.netLog,
		api.MethodDial:    m.dial,
		api.MethodLogs:    m.logs,
		api.MethodStats:   m.stats,
	}
}
