package wire

import (
	"net/netip"
	"path"
)

// An Op is what a Request asks for.
type Op string

const (
	OpHello    Op = "hello"    // Reply.Hello; then the agent closes. Needs no token.
	OpBoot     Op = "boot"     // frames: FrameEvent for every stage reached so far and from now on
	OpExec     Op = "exec"     // frames: a session
	OpSockets  Op = "sockets"  // Reply.Sockets; then the agent closes
	OpShutdown Op = "shutdown" // Reply when accepted; the guest then powers off
)

// A Request opens a stream. Token is the VM's secret: without it an agent
// answers OpHello only.
type Request struct {
	Version  int       `json:"version"`
	Token    string    `json:"token,omitempty"`
	Op       Op        `json:"op"`
	Exec     *Exec     `json:"exec,omitempty"`
	Shutdown *Shutdown `json:"shutdown,omitempty"`
}

// A Reply answers a Request. Error is nil when it was accepted.
type Reply struct {
	Version int      `json:"version"`
	Error   *Error   `json:"error,omitempty"`
	Hello   *Hello   `json:"hello,omitempty"`
	Sockets *Sockets `json:"sockets,omitempty"`
}

// An ErrorCode is the kind of a refusal.
type ErrorCode string

const (
	ErrVersion       ErrorCode = "version"        // another protocol version
	ErrDenied        ErrorCode = "denied"         // no or a wrong token
	ErrInvalid       ErrorCode = "invalid"        // a request that makes no sense
	ErrNoUser        ErrorCode = "no-user"        // the user or group is not in the guest's files
	ErrNotFound      ErrorCode = "not-found"      // exec: no such program (exit code 127)
	ErrNotExecutable ErrorCode = "not-executable" // exec: it is there but cannot run (exit code 126)
	ErrInternal      ErrorCode = "internal"
)

// An Error is a refusal by the agent. Its text comes from a guest: escape it
// before a terminal sees it.
type Error struct {
	Code    ErrorCode `json:"code"`
	Message string    `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Hello says who answers.
type Hello struct {
	AgentVersion  string `json:"agent_version"`
	KernelRelease string `json:"kernel_release"`
	UptimeMs      int64  `json:"uptime_ms"` // of the guest
	Booted        bool   `json:"booted"`    // the last boot stage this agent brings about was reached
}

// MaxSockets bounds Sockets.List.
const MaxSockets = 1024

// Sockets are what in the guest waits for peers: TCP sockets that listen, and
// UDP sockets that have a port and no peer.
type Sockets struct {
	List []Socket `json:"list"`
	More bool     `json:"more,omitempty"` // not all were looked at, or fitted
}

// A Socket is where one of them waits, and who has it. Sockets of several
// processes, or of none that was found, are one process's or nobody's here.
type Socket struct {
	Proto   string         `json:"proto"` // tcp or udp
	Local   netip.AddrPort `json:"local"` // 0.0.0.0 and :: are every address of the guest's
	PID     int            `json:"pid,omitempty"`
	Process string         `json:"process,omitempty"` // its name, as proc_pid_comm(5) has it
}

// A BootEvent is one milestone of the boot as the guest saw it.
type BootEvent struct {
	Stage    string `json:"stage"` // kernel, modules, disks, root, agent, network, init; or failed
	UptimeMs int64  `json:"uptime_ms"`
	Detail   string `json:"detail,omitempty"` // the init chosen; with "failed", the reason
}

// StageFailed is the Stage of the event that ends a boot that cannot go on.
const StageFailed = "failed"

// Exec asks for a session: one command in the guest.
type Exec struct {
	// Args is the argument list, Args[0] looked up in PATH of the session's
	// environment. Empty asks for the user's login shell.
	Args []string `json:"args"`
	// Env is the environment as KEY=VALUE, later wins. The agent adds HOME,
	// USER and PATH where they are missing, and TERM with a pty.
	Env []string `json:"env,omitempty"`
	// Dir is the working directory, made if it is missing; empty is the
	// user's home, or / where there is none.
	Dir string `json:"dir,omitempty"`
	// User is NAME, UID, NAME:GROUP or UID:GID, looked up in the guest's own
	// /etc/passwd and /etc/group; empty is root.
	User string `json:"user,omitempty"`
	// TTY asks for a pty of that size. Output then comes as FrameStdout only.
	TTY *Window `json:"tty,omitempty"`
	// Stdin says that FrameStdin will come; else the command reads /dev/null.
	Stdin bool `json:"stdin,omitempty"`
}

// A Window is the size of a terminal.
type Window struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Exit is how a session ended: a code, or the name of the signal that killed
// the command (without "SIG") and 128 plus its number as the code.
type Exit struct {
	Code   int    `json:"code"`
	Signal string `json:"signal,omitempty"`
}

// Signals are the names that FrameSignal accepts.
var Signals = []string{"INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "KILL"}

// Shutdown asks the guest to power off cleanly.
type Shutdown struct {
	// GraceMs is the time the image's init gets. After it the agent kills
	// what is left, writes the disks back read-only, and powers off.
	GraceMs int64 `json:"grace_ms"`
}

// BootConfig is what the host tells the first process of a guest. It travels
// in a cpio appended to the initramfs, as BootConfigPath, mode 0600.
type BootConfig struct {
	Version  int    `json:"version"`
	Token    string `json:"token"`
	Hostname string `json:"hostname"`

	// Disks are found by the UUID in their ext4 superblock, as text in the
	// usual form. Modules may be empty.
	Base    string `json:"base"`
	Overlay string `json:"overlay"`
	Work    string `json:"work"`
	Modules string `json:"modules,omitempty"`

	// Network is the guest's network card; nil if it has none.
	Network *Network `json:"network,omitempty"`

	// LoadModules are paths in the initramfs, in the order to load them.
	// A module that is already there is no error.
	LoadModules []string `json:"load_modules"`

	// Init is auto, image or agent. Entrypoint and Cmd are the image's own
	// and decide in auto.
	Init       string   `json:"init"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
}

// IsShell says whether a command, which has at least one word, is nothing but
// an interactive shell: an image whose command is one starts nothing else.
func IsShell(command []string) bool {
	switch path.Base(command[0]) {
	case "sh", "bash", "ash", "dash", "zsh", "ksh", "fish":
	default:
		return false
	}
	for _, arg := range command[1:] {
		switch arg {
		case "-i", "-l", "-il", "-li", "--login":
		default:
			return false
		}
	}
	return true
}

// Network is how the guest's one network card is set before its init starts.
type Network struct {
	MAC       string   `json:"mac"`       // by which the card is found
	MTU       int      `json:"mtu"`       // 0 leaves it
	Addresses []string `json:"addresses"` // with their prefix length, IPv4 and IPv6
	Gateways  []string `json:"gateways"`  // default routes, at most one for each version of IP
	DNS       []string `json:"dns"`
	Search    []string `json:"search,omitempty"` // the first is the domain of the guest's own name
}
