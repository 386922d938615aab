// Package guest is everything that banger runs inside a VM. One static binary
// takes five parts, told apart in Main:
//
//   - the first process, PID 1 of the initramfs: it joins the disks into the
//     image's root, starts the agent, and hands PID 1 over (boot.go);
//   - the agent, beside the image's init: it serves the host (channel.go,
//     serve.go, exec.go, session.go);
//   - the reaper, PID 1 of an image without an init (reaper.go);
//   - shutdown, PID 1 at the very end, which gives the disks back clean
//     (shutdown.go);
//   - the service in a guest that something else booted, which answers hello
//     and nothing else (agent.go).
//
// Everything outside is hostile: the image's files, and the guest's own users.
// The host is trusted, since it owns the guest.
package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

// Version is the agent's, set by the linker.
var Version = "dev"

const (
	program = "banger-vsock-agent"
	// agentName is the agent's argv[0]. systemd spares processes whose name
	// begins with "@" when it kills what is left at shutdown
	// (systemd.io/ROOT_STORAGE_DAEMONS).
	agentName    = "@" + program
	reaperName   = "banger-reaper"
	shutdownName = "shutdown"

	// runDir is root's alone: it holds the lock that says that an agent lives.
	runDir = "/run/banger"
)

// The stages of a boot as the guest sees them.
const (
	stageKernel  = "kernel"
	stageModules = "modules"
	stageDisks   = "disks"
	stageRoot    = "root"
	stageAgent   = "agent"
	stageNetwork = "network"
	stageInit    = "init"
)

// Main runs the part that belongs to this process and returns its exit code.
func Main(args []string) int {
	name := ""
	if len(args) > 0 {
		name = filepath.Base(args[0])
	}
	if os.Getpid() != 1 {
		if len(args) == 2 && args[1] == "--version" {
			fmt.Println(program, Version)
			return 0
		}
		if strings.HasPrefix(name, "@") {
			return agentMain()
		}
		return serviceMain()
	}
	switch name {
	case shutdownName:
		verb := "poweroff"
		if len(args) > 1 {
			verb = args[1]
		}
		lastProcess(verb)
	case reaperName:
		reap()
	default:
		firstProcess()
	}
	return 1 // not reached: PID 1 never returns
}

var consoleLock sync.Mutex

// console writes one line to the guest's console.
func console(line string) {
	consoleLock.Lock()
	defer consoleLock.Unlock()
	fd, err := unix.Open("/dev/console", unix.O_WRONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		fd = 2
	} else {
		defer unix.Close(fd)
	}
	unix.Write(fd, []byte(line+"\r\n"))
}

// complain reports an error of ours on the console, on one line whatever bytes
// it holds.
func complain(err error) {
	line := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, err.Error())
	console(program + ": " + line)
}

// announce tells the host that a first process runs.
func announce() { console(wire.ReadyLine) }

// oomProtected keeps a process from the kernel's memory killer, see
// proc_pid_oom_score_adj(5).
const oomProtected = -1000

func setOOMScore(score int) error {
	return os.WriteFile("/proc/self/oom_score_adj", fmt.Append(nil, score), 0)
}
