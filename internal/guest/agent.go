package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// The descriptors that the first process gives the agent.
	orderFD = 3 // the order, as JSON
	toldFD  = 4 // ends when PID 1 has become init; text on it says why not

	maxOrderBytes = 2 << 20
	maxToldBytes  = 4 << 10

	// upPause is between two looks whether systemd takes questions yet, and
	// upTimeout bounds the wait for its answer: a unit that hangs delays it.
	upPause   = 250 * time.Millisecond
	upTimeout = 15 * time.Minute
)

// An agentOrder is what the first process tells the agent. It travels on a
// pipe: a command line or an environment would show the token to every user
// of the guest.
type agentOrder struct {
	Token  string           `json:"token"`
	Init   initChoice       `json:"init"`
	Events []wire.BootEvent `json:"events"`
}

// startAgent starts the agent beside PID 1 and returns the pipe on which it
// waits for PID 1 to become init.
func startAgent(order agentOrder) (told *os.File, err error) {
	data, err := json.Marshal(order)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	orderR, orderW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	defer orderR.Close()
	defer orderW.Close()
	toldR, toldW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	defer toldR.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", bare(os.DevNull, err))
	}
	defer null.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{agentName}, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=" + defaultPath},
		Files: []*os.File{null, null, null, orderR, toldR},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		toldW.Close()
		return nil, fmt.Errorf("agent: %w", err)
	}
	if _, err = orderW.Write(data); err != nil {
		toldW.Close()
		return nil, fmt.Errorf("agent: %w", err)
	}
	p.Release() // whoever becomes PID 1 reaps it
	return toldW, nil
}

// agentMain is the agent of banger's own boot. A process that calls itself so
// without an order has nothing to do.
func agentMain() int {
	order, told, err := takeOrder()
	if err != nil {
		return 0
	}
	lock, err := lockRun()
	if err != nil {
		complain(err)
	}
	if lock != nil {
		defer lock.Close()
	}
	unix.Umask(0o022)
	catchSignals()
	j := newJournal(order.Events)
	s := newServer(order.Token, j)
	if sysrq, err = openSysrq(); err != nil {
		complain(err)
	}
	s.protected = setOOMScore(oomProtected) == nil
	down := &shutdowner{kind: order.Init.Kind}
	s.shutdown = down.start

	go func() {
		reachable := make(chan struct{})
		go s.serveChannel(func() {
			select {
			case <-reachable:
			default:
				close(reachable)
			}
		})
		<-reachable
		j.add(stageAgent, "init: "+order.Init.String())
		reason, _ := io.ReadAll(io.LimitReader(told, maxToldBytes))
		told.Close()
		if len(reason) > 0 {
			j.add(wire.StageFailed, strings.ToValidUTF8(string(reason), "?"))
			return
		}
		j.add(stageNetwork, "loopback")
		detail := string(order.Init.Kind)
		if order.Init.Kind == kindSystemd {
			detail += ": " + waitSystemd()
		}
		j.add(stageInit, detail)
	}()
	select {} // the agent lives as long as the guest
}

// takeOrder reads what the first process left on the inherited descriptors.
func takeOrder() (agentOrder, *os.File, error) {
	var order agentOrder
	for _, fd := range []int{orderFD, toldFD} {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
			return order, nil, errors.New("agent: started without an order")
		}
		unix.CloseOnExec(fd)
		unix.SetNonblock(fd, true)
	}
	in, told := os.NewFile(orderFD, "order"), os.NewFile(toldFD, "told")
	defer in.Close()
	data, err := io.ReadAll(io.LimitReader(in, maxOrderBytes))
	if err == nil {
		err = json.Unmarshal(data, &order)
	}
	return order, told, err
}

// catchSignals keeps what is meant for everybody ("kill -1", a shutdown of the
// image's init) from ending the agent. Caught, not ignored: an ignored signal
// would stay ignored in every session.
func catchSignals() {
	c := make(chan os.Signal, 16)
	signal.Notify(c, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPIPE)
	go func() {
		for sig := range c {
			if sig == unix.SIGTERM {
				onTerminate()
			}
		}
	}()
}

// waitSystemd waits until systemd has brought the guest up and returns the
// state that it says it is in.
func waitSystemd() string {
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	for ctx.Err() == nil {
		if _, err := os.Stat("/run/systemd/private"); err == nil {
			out, err := exec.CommandContext(ctx, "systemctl", "is-system-running", "--wait").Output()
			state := strings.TrimSpace(string(out))
			switch {
			case state == "running", state == "degraded", state == "maintenance", state == "stopping":
				return state
			case errors.Is(err, exec.ErrNotFound):
				return "unknown, the image has no systemctl"
			}
		}
		time.Sleep(upPause)
	}
	return "unknown, it does not answer"
}

// lockRun takes the lock that says that an agent lives in this guest. It goes
// with the process. Its folder is root's alone, so that nobody else in the
// guest can pretend.
func lockRun() (*os.File, error) {
	if err := os.Mkdir(runDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, bare(runDir, err)
	}
	path := filepath.Join(runDir, "agent.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, bare(path, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, bare(path, err)
	}
	return f, nil
}

// serviceMain is the unit of a banger image: in a guest that something else
// booted it answers hello; in banger's own boot it stands down.
func serviceMain() int {
	lock, err := lockRun()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", program, err)
		return 1
	}
	defer lock.Close()
	j := newJournal(nil)
	newServer("", j).serveChannel(func() {})
	return 0
}
