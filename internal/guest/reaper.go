package guest

import (
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// graceFile tells the reaper how long the processes may take to end, in
	// milliseconds; a signal cannot carry it.
	graceFile    = "grace-ms"
	maxGraceText = 32
	defaultGrace = 10 * time.Second
)

// The signals that ask the reaper to end the guest: systemd's (systemd(1)) and
// those of the poweroff, reboot and halt of busybox and sysvinit.
const (
	sigPowerOff = syscall.Signal(34 + 4) // SIGRTMIN+4; the C library's SIGRTMIN is 34
	sigHalt     = syscall.Signal(34 + 3)
	sigReboot   = syscall.Signal(34 + 5)
)

var endings = map[os.Signal]string{
	sigPowerOff: "poweroff", sigHalt: "poweroff", unix.SIGUSR1: "poweroff", unix.SIGUSR2: "poweroff", unix.SIGPWR: "poweroff",
	sigReboot: "reboot", unix.SIGTERM: "reboot", unix.SIGINT: "reboot",
}

// reap is PID 1 of a guest without an init: it waits for every orphan, and
// ends the guest when it is told to. It starts nothing itself, so no one else
// in this process waits for a child.
func reap() {
	c := make(chan os.Signal, 64)
	signal.Notify(c) // all of them: PID 1 must die of none
	reapAll()
	for sig := range c {
		reapAll() // whatever came: a full channel may have dropped a SIGCHLD
		if verb, ok := endings[sig]; ok {
			endGuest(verb)
		}
	}
}

// reapAll waits for the children that have ended and says whether any is left.
func reapAll() (left bool) {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return false // ECHILD
		case pid == 0:
			return true
		}
	}
}

// endGuest ends every process and becomes the last one. It does not return.
func endGuest(verb string) {
	grace := defaultGrace
	if data, err := readBounded(filepath.Join(runDir, graceFile), maxGraceText); err == nil {
		if ms, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err == nil && ms >= 0 {
			grace = min(time.Duration(ms)*time.Millisecond, maxGrace)
		}
	}
	// The agent stays, to tell the host and to fall back on: it ignores this.
	unix.Kill(-1, unix.SIGTERM)
	unix.Kill(-1, unix.SIGCONT)
	for end := time.Now().Add(grace / 2); time.Now().Before(end) && othersLeft(); {
		reapAll()
		time.Sleep(10 * time.Millisecond)
	}
	unix.Kill(-1, unix.SIGKILL)
	if err := pivotToShutdown(); err != nil {
		complain(err)
	} else {
		complain(bare("/"+shutdownName, syscall.Exec("/"+shutdownName, []string{"/" + shutdownName, verb}, initEnv)))
	}
	finish(verb)
}

// othersLeft says whether there is a process besides PID 1 and the agent.
func othersLeft() bool {
	agent := 0
	for _, p := range processes() {
		if p == 1 {
			continue
		}
		if agent == 0 && strings.HasPrefix(commandLine(p), agentName) {
			agent = p
			continue
		}
		return true
	}
	return false
}
