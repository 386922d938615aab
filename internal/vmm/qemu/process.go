package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/vmm"
)

const (
	// consoleTailBytes is how much of the console is kept to recognise a
	// panic: the message, the registers and call traces that follow it.
	consoleTailBytes = 32 << 10
	consoleReadBytes = 32 << 10
	// drainLimit bounds reading what is left in a pipe after the process has
	// ended; nobody else holds the other end.
	drainLimit = 10 * time.Second
	// exitLimit is how long a QEMU that has closed its monitor before its
	// guest began may take to exit.
	exitLimit = 10 * time.Second
	// spaceRetry is how long a VM whose drive found the host's disk full
	// stands still before it tries again.
	spaceRetry = time.Second
)

// A process is one running QEMU.
type process struct {
	info    vmm.Info
	cmd     *exec.Cmd
	pid     int
	console io.Writer // may be nil

	monitor *monitor
	channel *channel
	serial  net.Conn
	printed *os.File // read end of QEMU's stdout and stderr

	consoleTail, outputTail tail
	work                    sync.WaitGroup // everything that runs for this process
	reaped                  chan struct{}  // closed when the process was waited for
	done                    chan struct{}
	exit                    vmm.Exit // valid when done is closed

	ordered sync.Mutex // held over one Pause, Resume or retry

	mu      sync.Mutex
	state   *os.ProcessState
	reason  string // of QEMU's SHUTDOWN event, or ""
	killed  bool   // by Kill
	broken  string // why the driver itself ended QEMU, or ""
	stopped bool   // by Pause
	noSpace bool   // stopped by QEMU, since the host's disk is full
}

// spawn starts QEMU and waits for it in the background. The thread that forks
// must live as long as QEMU, whose parent-death signal is bound to it, so it
// is the one that waits.
func (p *process) spawn() error {
	started := make(chan error)
	p.work.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = p.cmd.Wait() // the state says more
		p.mu.Lock()
		p.state = p.cmd.ProcessState
		p.mu.Unlock()
		close(p.reaped)
	})
	if err := <-started; err != nil {
		p.work.Wait()
		return err
	}
	p.pid = p.cmd.Process.Pid
	// A core file would hold the guest's memory. The launcher sets this too.
	_ = unix.Prlimit(p.pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
	return nil
}

// watch starts all that serves a spawned process and ends with it.
func (p *process) watch() {
	var readers sync.WaitGroup
	read := func(f func()) {
		readers.Add(1)
		p.work.Go(func() { defer readers.Done(); f() })
	}
	read(p.readConsole)
	read(p.readPrinted)
	read(p.readMonitor)
	p.work.Go(p.channel.serve)
	go func() {
		<-p.reaped
		p.channel.end()
		limit := time.Now().Add(drainLimit)
		_ = p.serial.SetReadDeadline(limit)
		_ = p.printed.SetReadDeadline(limit)
		_ = p.monitor.conn.SetReadDeadline(limit)
		readers.Wait()
		p.work.Wait()
		p.serial.Close()
		p.printed.Close()
		p.finish()
		close(p.done)
	}()
}

func (p *process) readConsole() {
	buf := make([]byte, consoleReadBytes)
	for {
		n, err := p.serial.Read(buf)
		if n > 0 {
			p.consoleTail.Write(buf[:n])
			if p.console != nil {
				_, _ = p.console.Write(buf[:n])
			}
		}
		if err != nil {
			return
		}
	}
}

func (p *process) readPrinted() {
	_, _ = io.Copy(&p.outputTail, p.printed)
}

// readMonitor serves QMP. A monitor that talks nonsense means that nothing can
// be asked of this QEMU any more.
func (p *process) readMonitor() {
	p.monitor.read()
	if err := p.monitor.err; !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		p.abort(fmt.Sprintf("qmp: %v", err))
	}
}

// onEvent takes in an event; it is called by the monitor's reader.
func (p *process) onEvent(e qmpEvent) {
	switch e.Event {
	case "VSERPORT_CHANGE":
		var data struct {
			ID   string
			Open bool
		}
		if json.Unmarshal(e.Data, &data) == nil && data.ID == agentDevice {
			p.channel.portChanged(data.Open, e.at())
		}
	case "SHUTDOWN":
		var data struct{ Reason string }
		if json.Unmarshal(e.Data, &data) == nil {
			p.mu.Lock()
			p.reason = data.Reason
			p.mu.Unlock()
		}
	case "STOP":
		p.mu.Lock()
		asked := p.stopped
		p.mu.Unlock()
		if !asked {
			p.work.Go(p.stoppedByItself)
		}
	}
}

// stoppedByItself deals with a QEMU that has stopped the guest unasked: for a
// full disk, which may pass, or for a fault of KVM, which does not.
func (p *process) stoppedByItself() {
	ctx := context.Background()
	p.ordered.Lock()
	var status struct{ Status string }
	err := p.monitor.execute(ctx, "query-status", &status)
	if err == nil && status.Status == "io-error" {
		p.mu.Lock()
		p.noSpace = true
		p.mu.Unlock()
	}
	p.ordered.Unlock()
	switch {
	case err != nil:
		return // it is ending, or the monitor is broken
	case status.Status == "internal-error":
		p.abort("the accelerator reports an internal error")
		return
	case status.Status != "io-error":
		return // Pause was asked at the same time
	}

	select {
	case <-time.After(spaceRetry):
	case <-p.reaped:
		return
	}
	p.ordered.Lock()
	defer p.ordered.Unlock()
	p.mu.Lock()
	p.noSpace = false
	stopped := p.stopped
	p.mu.Unlock()
	if !stopped {
		_ = p.monitor.execute(ctx, "cont", nil) // it stops again while the disk is full
	}
}

// abort ends QEMU for a reason of the driver's own.
func (p *process) abort(reason string) {
	p.mu.Lock()
	if p.broken == "" && p.state == nil {
		p.broken = reason
	}
	p.mu.Unlock()
	_ = p.cmd.Process.Kill()
}

func (p *process) paused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stopped || p.noSpace
}

func (p *process) Info() vmm.Info { return p.info }
func (p *process) PID() int       { return p.pid }

func (p *process) DialGuest(ctx context.Context, port uint32) (net.Conn, error) {
	return p.channel.dial(ctx, port)
}

func (p *process) Pause(ctx context.Context) error {
	return p.setStopped(ctx, true, "stop")
}

func (p *process) Resume(ctx context.Context) error {
	return p.setStopped(ctx, false, "cont")
}

// setStopped tells the will before the deed, so that a STOP event of our own
// is known as such, and takes it back when the deed fails.
func (p *process) setStopped(ctx context.Context, stopped bool, command string) error {
	p.ordered.Lock()
	defer p.ordered.Unlock()
	p.mu.Lock()
	before := p.stopped
	p.stopped = before || stopped
	p.mu.Unlock()
	err := p.monitor.execute(ctx, command, nil)
	p.mu.Lock()
	if err == nil {
		p.stopped = stopped
	} else {
		p.stopped = before
	}
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	return nil
}

func (p *process) Quit(ctx context.Context) error {
	if err := p.monitor.execute(ctx, "quit", nil); err != nil && !errors.Is(err, vmm.ErrEnded) {
		return fmt.Errorf("qemu: %w", err)
	}
	return nil
}

func (p *process) Kill() error {
	p.mu.Lock()
	if p.state == nil {
		p.killed = true
	}
	p.mu.Unlock()
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("qemu: %w", err)
	}
	return nil
}

func (p *process) Done() <-chan struct{} { return p.done }

func (p *process) Exit() vmm.Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return vmm.Exit{}
	}
}

// finish decides how the process ended. It runs when nothing else does.
func (p *process) finish() {
	e := vmm.Exit{Code: p.state.ExitCode(), State: p.state, Time: time.Now(), Cause: vmm.CauseCrashed}
	status, _ := p.state.Sys().(syscall.WaitStatus)
	shot := status.Signaled() && status.Signal() == syscall.SIGKILL
	switch {
	case p.broken != "":
		fmt.Fprintf(&p.outputTail, "banger: ended the VMM: %s\n", p.broken)
	case p.killed && shot:
		e.Cause = vmm.CauseKilled
	case e.Code == 0:
		e.Cause = causeOf(p.reason, p.consoleTail.Bytes())
	}
	e.Output = string(p.outputTail.Bytes())
	p.exit = e
}

// causeOf reads QEMU's reason of a shutdown (ShutdownCause in its
// qapi/run-state.json). A panic of Linux ends in the same reset as a reboot,
// and microvm has no device to tell them apart, so the console decides: the
// kernel prints both its panic and an orderly restart at the level that no
// setting hides. A guest that lies about this deceives only about itself.
func causeOf(reason string, console []byte) vmm.Cause {
	switch reason {
	case "guest-shutdown":
		return vmm.CauseGuestOff
	case "guest-panic":
		return vmm.CauseGuestPanic
	case "guest-reset":
		if panicked(console) {
			return vmm.CauseGuestPanic
		}
		return vmm.CauseGuestReboot
	case "host-qmp-quit":
		return vmm.CauseQuit
	}
	return vmm.CauseCrashed
}

// panicked looks for a line of the kernel's own that announces a panic, not
// followed by one that announces a restart. Lines carry a time stamp or not.
func panicked(console []byte) bool {
	found := false
	for line := range bytes.Lines(console) {
		line = bytes.TrimLeft(line, "\r")
		if bytes.HasPrefix(line, []byte("[")) {
			if _, rest, ok := bytes.Cut(line, []byte("] ")); ok {
				line = rest
			}
		}
		switch {
		case bytes.HasPrefix(line, []byte("Kernel panic - not syncing")):
			found = true
		case bytes.HasPrefix(line, []byte("reboot: Restarting system")):
			found = false
		}
	}
	return found
}

// endedEarly describes an early end as an error: the last line QEMU printed is the
// reason.
func (p *process) endedEarly() error {
	e := p.Exit()
	how := fmt.Sprintf("exited with code %d", e.Code)
	if e.Code < 0 {
		how = "ended by " + e.State.String()
	}
	last := strings.TrimSpace(e.Output)
	if i := strings.LastIndexByte(last, '\n'); i >= 0 {
		last = last[i+1:]
	}
	// QEMU repeats the option it complains about, which is ours and long.
	if i := strings.LastIndex(last, "}: "); i >= 0 {
		last = last[i+len("}: "):]
	}
	if last == "" {
		return fmt.Errorf("qemu: %s and printed nothing", how)
	}
	return fmt.Errorf("qemu: %s: %q", how, last)
}

// A tail keeps the last bytes written to it. Written by one goroutine and read
// when that is over.
type tail struct {
	limit int
	buf   []byte
}

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	if n > t.limit {
		p = p[n-t.limit:]
	}
	// Room for twice the limit makes the shift rare.
	if t.buf == nil {
		t.buf = make([]byte, 0, 2*t.limit)
	}
	if len(t.buf)+len(p) > cap(t.buf) {
		keep := t.limit - len(p)
		t.buf = append(t.buf[:0], t.buf[max(0, len(t.buf)-keep):]...)
	}
	t.buf = append(t.buf, p...)
	return n, nil
}

// Bytes are the last ones, at most limit.
func (t *tail) Bytes() []byte {
	return t.buf[max(0, len(t.buf)-t.limit):]
}
