package cli

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"banger"
	"banger/internal/api"
	"banger/internal/wire"
)

// secondInterrupt is how soon after one Ctrl-C another stops the VM instead
// of reaching the command.
const secondInterrupt = 2 * time.Second

func runCommand() *cobra.Command {
	var (
		source      sourceFlags
		spec        banger.Spec
		memory      string
		accel       string
		env         []string
		user, dir   string
		interactive bool
		tty         bool
		rm          bool
		trace       bool
		asJSON      bool
	)
	cmd := &cobra.Command{
		Use:   "run [FLAGS] IMAGE [-- COMMAND [ARG...]]",
		Short: "Boot a VM from an image, run one command in it, and remove it",
		Long: `Boot a VM from an image, run one command in it, and leave nothing behind.
Without a command the image's own is run, or a shell where that is what the
image starts. An image that is not in the store is pulled first.

EXAMPLE
  banger run debian
  banger run apt:bookworm -- uname -a
  echo hello | banger run -m 512M alpine -- tr a-z A-Z

IMAGE is the name or id of an image in the store, or a reference:
` + strings.TrimPrefix(referenceHelp, "REFERENCE is one of\n"),
		Annotations: map[string]string{"exit": runExitHelp},
		Args: func(cmd *cobra.Command, args []string) error {
			n := cmd.ArgsLenAtDash()
			switch {
			case len(args) == 0 || n == 0:
				return usagef("run: no image").WithHint("`banger run debian`, for one")
			case n == -1 && len(args) > 1, n > 1:
				return usagef("run: %q: one image, then -- and the command", args[1]).
					WithHint("`banger run %s -- %s`", args[0], strings.Join(args[1:], " "))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if memory != "" {
				n, err := parseSize(memory)
				if err != nil || n < 64<<20 {
					if err == nil {
						err = errors.New("a VM needs at least 64 MiB")
					}
					return usagef("--memory %q: %w", memory, err).WithHint("write it like 512M or 2G")
				}
				spec.MemoryBytes = n &^ (1<<20 - 1)
			}
			if cmd.Flags().Changed("cpus") && spec.CPUs < 1 {
				return usagef("--cpus %d: a VM needs at least one", spec.CPUs)
			}
			spec.Accel = banger.Accel(accel)
			spec.Image = args[0]
			src, files, err := source.open(args[0])
			if err != nil {
				return err
			}
			if !rm {
				return usagef("run: --rm=false: a VM without a name is always removed")
			}
			resolved, err := environment(env)
			if err != nil {
				return err
			}
			s := &session{
				trace: trace, asJSON: asJSON,
				params: api.RunParams{
					Spec: spec, Source: src, Command: args[1:],
					Session: wire.Exec{Env: resolved, User: user, Dir: dir, Stdin: interactive},
				},
			}
			if !cmd.Flags().Changed("tty") {
				tty = term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
			}
			return s.run(files, tty)
		},
	}
	f := cmd.Flags()
	source.add(cmd)
	f.IntVar(&spec.CPUs, "cpus", 0, fmt.Sprintf("give it `N` virtual CPUs (default %d, at most the host's)", banger.DefaultCPUs))
	f.StringVarP(&memory, "memory", "m", "", "give it `SIZE` of memory, like 512M or 2G (default 1G)")
	f.StringVar(&accel, "accel", "auto", "run guest code by `HOW`: auto, kvm or tcg")
	f.StringVar(&spec.Kernel, "kernel", "", "boot the kernel `VERSION` (default: the default of `banger kernel ls`)")
	f.StringVar(&spec.Init, "init", "auto", "let `WHO` be the guest's init: auto, image or agent")
	f.StringVar(&spec.Hostname, "hostname", "", "call the guest `NAME`")
	f.StringArrayVarP(&env, "env", "e", nil, "add `KEY=VALUE` to the command's environment; KEY alone takes it from here")
	f.StringVarP(&user, "user", "u", "", "run the command as `USER[:GROUP]`, as the guest knows it")
	f.StringVarP(&dir, "workdir", "w", "", "start the command in `DIR`")
	f.BoolVarP(&interactive, "interactive", "i", true, "pass standard input on")
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal (default: when there is one here)")
	f.BoolVar(&rm, "rm", true, "remove the VM afterwards; without a name it always is")
	f.BoolVar(&trace, "trace", false, "print where the time went")
	f.BoolVar(&asJSON, "json", false, "with --trace, print JSON lines")
	return cmd
}

// environment completes KEY entries from the environment here; one that is
// not set is left out, as in Docker.
func environment(entries []string) ([]string, error) {
	var out []string
	for _, e := range entries {
		key, _, full := strings.Cut(e, "=")
		if key == "" {
			return nil, usagef("--env %q: it has no key", e).WithHint("write it as KEY=VALUE")
		}
		if !full {
			value, ok := os.LookupEnv(key)
			if !ok {
				continue
			}
			e += "=" + value
		}
		out = append(out, e)
	}
	return out, nil
}

// parseSize reads a number of bytes with an optional unit of powers of 1024.
func parseSize(s string) (int64, error) {
	s = strings.ToUpper(s)
	digits := strings.TrimRight(s, "IBKMGT")
	unit := s[len(digits):]
	var shift int
	switch unit {
	case "", "B":
	case "K", "KB", "KIB":
		shift = 10
	case "M", "MB", "MIB":
		shift = 20
	case "G", "GB", "GIB":
		shift = 30
	case "T", "TB", "TIB":
		shift = 40
	default:
		return 0, fmt.Errorf("no unit %q", unit)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return 0, errors.New("not a whole number with a unit")
	}
	if n <= 0 || n > (1<<62)>>shift {
		return 0, errors.New("out of range")
	}
	return n << shift, nil
}

// session is the terminal's side of a command in a guest.
type session struct {
	params api.RunParams
	trace  bool
	asJSON bool

	client  *api.Client
	p       *progress
	started chan struct{}
	credit  credit
}

func (s *session) run(files []*os.File, tty bool) error {
	s.p = newProgress(os.Stderr)
	s.started = make(chan struct{})
	s.credit.init(wire.StdinWindowBytes)
	stdin := int(os.Stdin.Fd())
	if tty {
		w := windowOf(int(os.Stdout.Fd()))
		s.params.Session.TTY = &w
		if name := os.Getenv("TERM"); name != "" {
			s.params.Session.Env = append(s.params.Session.Env, "TERM="+name)
		}
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
	defer signal.Stop(signals)
	client, err := api.Start()
	if err != nil {
		return err
	}
	s.client = client
	over := make(chan struct{})
	defer close(over)
	go s.passSignals(signals, over, tty)

	restore := func() {}
	var rawOnce sync.Once
	onEvent := func(e api.Event) {
		s.p.event(e)
		if !e.Started {
			return
		}
		s.p.end()
		if tty && term.IsTerminal(stdin) {
			rawOnce.Do(func() {
				if old, err := term.MakeRaw(stdin); err == nil {
					restore = sync.OnceFunc(func() { term.Restore(stdin, old) })
				}
			})
		}
		close(s.started)
		if s.params.Session.Stdin {
			go s.passStdin()
		}
	}
	defer func() { restore() }()
	var result api.RunResult
	err = client.Call(context.Background(), api.MethodRun, s.params, files, &result, onEvent, func(f wire.Frame) error {
		err := s.frame(f)
		if f.Type == wire.FrameExit {
			restore() // what is typed from here on is for the user's own shell
		}
		return err
	})
	restore()
	s.p.end()
	if s.trace {
		s.p.waterfall(s.asJSON)
	}
	if err != nil {
		return err
	}
	if result.Exit.Code != 0 {
		return exitStatus(result.Exit.Code)
	}
	return nil
}

// frame takes one frame of the session.
func (s *session) frame(f wire.Frame) error {
	var err error
	switch f.Type {
	case wire.FrameStdout:
		_, err = os.Stdout.Write(f.Payload)
	case wire.FrameStderr:
		_, err = os.Stderr.Write(f.Payload)
	case wire.FrameCredit:
		if len(f.Payload) == 4 {
			s.credit.add(int(binary.BigEndian.Uint32(f.Payload)))
		}
	}
	return err
}

// passStdin sends standard input as far as the guest has room for it, then
// its end.
func (s *session) passStdin() {
	buf := make([]byte, 32<<10)
	for {
		n, err := os.Stdin.Read(buf)
		for rest := buf[:n]; len(rest) > 0; {
			k := s.credit.take(len(rest))
			if s.client.Send(wire.FrameStdin, rest[:k]) != nil {
				return
			}
			rest = rest[k:]
		}
		if err != nil {
			if errors.Is(err, io.EOF) || n == 0 {
				s.client.Send(wire.FrameStdinEOF, nil)
			}
			return
		}
	}
}

// passSignals sends signals to the command once it runs. Before that, and at
// the second INT within a short time, they end the run.
func (s *session) passSignals(signals <-chan os.Signal, over <-chan struct{}, tty bool) {
	names := map[os.Signal]string{
		syscall.SIGINT: "INT", syscall.SIGTERM: "TERM", syscall.SIGHUP: "HUP",
		syscall.SIGQUIT: "QUIT", syscall.SIGUSR1: "USR1", syscall.SIGUSR2: "USR2",
	}
	var lastInterrupt time.Time
	for {
		var sig os.Signal
		select {
		case sig = <-signals:
		case <-over:
			return
		}
		running := false
		select {
		case <-s.started:
			running = true
		default:
		}
		if sig == syscall.SIGWINCH {
			if tty && running {
				if data, err := json.Marshal(windowOf(int(os.Stdout.Fd()))); err == nil {
					s.client.Send(wire.FrameResize, data)
				}
			}
			continue
		}
		if !running {
			if sig != syscall.SIGUSR1 && sig != syscall.SIGUSR2 {
				s.client.Cancel()
			}
			continue
		}
		if sig == syscall.SIGINT {
			now := time.Now()
			if now.Sub(lastInterrupt) < secondInterrupt {
				s.client.Cancel()
				continue
			}
			lastInterrupt = now
		}
		s.client.Send(wire.FrameSignal, []byte(names[sig]))
	}
}

func windowOf(fd int) wire.Window {
	cols, rows, err := term.GetSize(fd)
	if err != nil || cols == 0 || rows == 0 { // a terminal may not know
		return wire.Window{Rows: 24, Cols: 80}
	}
	return wire.Window{Rows: uint16(rows), Cols: uint16(cols)}
}

// credit counts the bytes that may still be sent.
type credit struct {
	mu   sync.Mutex
	some *sync.Cond
	n    int
}

func (c *credit) init(n int) {
	c.n = n
	c.some = sync.NewCond(&c.mu)
}

func (c *credit) add(n int) {
	c.mu.Lock()
	c.n += n
	c.mu.Unlock()
	c.some.Broadcast()
}

// take waits for credit and takes at most n of it.
func (c *credit) take(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.n <= 0 {
		c.some.Wait()
	}
	n = min(n, c.n)
	c.n -= n
	return n
}
