package cli

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
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

// machineFlags are those of every command that makes a VM.
type machineFlags struct {
	source sourceFlags
	spec   banger.Spec
	memory string
	accel  string
	name   string

	allowHost []string
}

func (m *machineFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	m.source.add(cmd)
	f.StringVar(&m.name, "name", "", "call the VM `NAME`: a-z, 0-9 and -")
	f.IntVar(&m.spec.CPUs, "cpus", 0, fmt.Sprintf("give it `N` virtual CPUs (default %d, at most the host's)", banger.DefaultCPUs))
	f.StringVarP(&m.memory, "memory", "m", "", "give it `SIZE` of memory, like 512M or 2G (default 1G)")
	f.StringVar(&m.accel, "accel", "auto", "run guest code by `HOW`: auto, kvm or tcg")
	f.StringVar(&m.spec.Kernel, "kernel", "", "boot the kernel `VERSION` (default: the default of `banger kernel ls`)")
	f.StringVar(&m.spec.Init, "init", "auto", "let `WHO` be the guest's init: auto, image or agent")
	f.StringVar(&m.spec.Hostname, "hostname", "", "call the guest `NAME`")
	m.networkFlags(cmd)
}

// complete makes the spec of what was parsed.
func (m *machineFlags) complete(cmd *cobra.Command, image string) error {
	if m.memory != "" {
		n, err := parseSize(m.memory)
		if err != nil || n < 64<<20 {
			if err == nil {
				err = errors.New("a VM needs at least 64 MiB")
			}
			return usagef("--memory %q: %w", m.memory, err).WithHint("write it like 512M or 2G")
		}
		m.spec.MemoryBytes = n &^ (1<<20 - 1)
	}
	if cmd.Flags().Changed("cpus") && m.spec.CPUs < 1 {
		return usagef("--cpus %d: a VM needs at least one", m.spec.CPUs)
	}
	m.spec.Accel = banger.Accel(m.accel)
	m.spec.Image = image
	return m.completeNetwork()
}

// prepare finds the image and the kernel, and gets what is missing with this
// process's own environment: its proxies, its logins, its programs.
func (m *machineFlags) prepare(ctx context.Context, p *progress) (out api.Prepared, err error) {
	params := api.PrepareParams{Kernel: m.spec.Kernel}
	ask := func(client func() (*api.Client, error), method string) error {
		var files []*os.File
		if params.Source, files, err = m.source.open(m.spec.Image); err != nil {
			return err
		}
		defer closeAll(files)
		c, err := client()
		if err != nil {
			return err
		}
		return c.Call(ctx, method, params, files, &out, p.events(time.Now()), nil)
	}
	err = ask(connect, api.MethodResolve)
	if banger.CodeOf(err) == banger.CodeNotFound && ctx.Err() == nil {
		err = ask(api.Start, api.MethodPrepare)
	}
	return out, err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// sessionFlags are those of every command that runs something in a guest.
type sessionFlags struct {
	env         []string
	user, dir   string
	interactive bool
	tty         bool
}

func (s *sessionFlags) add(cmd *cobra.Command, stdin bool) {
	f := cmd.Flags()
	f.StringArrayVarP(&s.env, "env", "e", nil, "add `KEY=VALUE` to the command's environment; KEY alone takes it from here")
	f.StringVarP(&s.user, "user", "u", "", "run the command as `USER[:GROUP]`, as the guest knows it")
	f.StringVarP(&s.dir, "workdir", "w", "", "start the command in `DIR`")
	f.BoolVarP(&s.interactive, "interactive", "i", stdin, "pass standard input on")
	f.BoolVarP(&s.tty, "tty", "t", false, "give the command a terminal (default: when there is one here)")
}

// session makes the session of what was parsed.
func (s *sessionFlags) session(cmd *cobra.Command) (*session, error) {
	env, err := environment(s.env)
	if err != nil {
		return nil, err
	}
	if !cmd.Flags().Changed("tty") {
		s.tty = term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))
		if s.tty && !cmd.Flags().Changed("interactive") {
			s.interactive = true // a terminal that cannot be typed at is of no use
		}
	}
	out := &session{
		exec: wire.Exec{Env: env, User: s.user, Dir: s.dir, Stdin: s.interactive},
		tty:  s.tty, p: newProgress(os.Stderr), started: make(chan struct{}),
	}
	out.credit.init(wire.StdinWindowBytes)
	if out.tty {
		w := windowOf(int(os.Stdout.Fd()))
		out.exec.TTY = &w
		if name := os.Getenv("TERM"); name != "" {
			out.exec.Env = append(out.exec.Env, "TERM="+name)
		}
	}
	return out, nil
}

// imageAndCommand checks arguments of the form IMAGE [-- COMMAND...].
func imageAndCommand(cmd *cobra.Command, args []string) error {
	n := cmd.ArgsLenAtDash()
	switch {
	case len(args) == 0 || n == 0:
		return usagef("%s: no image", cmd.Name()).WithHint("`%s debian`, for one", cmd.CommandPath())
	case n == -1 && len(args) > 1, n > 1:
		return usagef("%s: %q: one image, then -- and the command", cmd.Name(), args[1]).
			WithHint("`%s %s -- %s`", cmd.CommandPath(), args[0], strings.Join(args[1:], " "))
	}
	return nil
}

// waitStage reads the value of --wait.
func waitStage(text string) (banger.Stage, error) {
	switch text {
	case "agent":
		return banger.StageNetwork, nil
	case "init":
		return banger.StageInit, nil
	}
	return "", usagef("--wait %q: it is agent or init", text)
}

const waitHelp = "wait until `WHO` is up: agent, or the image's init too"

func runCommand() *cobra.Command {
	var (
		machine machineFlags
		flags   sessionFlags
		wait    string
		detach  bool
		rm      bool
		trace   bool
		asJSON  bool
	)
	cmd := &cobra.Command{
		Use:   "run [FLAGS] IMAGE [-- COMMAND [ARG...]]",
		Short: "Boot a VM from an image and run one command in it",
		Long: `Boot a VM from an image and run one command in it. A VM without a name goes when
the command ends; one with a name is stopped and stays. Without a command the
image's own is run, or a shell where that is what the image starts. An image
that is not in the store is pulled first.

EXAMPLE
  banger run debian
  banger run apt:bookworm -- uname -a
  echo hello | banger run -m 512M alpine -- tr a-z A-Z
  banger run --name web -d nginx

IMAGE is the name or id of an image in the store, or a reference:
` + strings.TrimPrefix(referenceHelp, "REFERENCE is one of\n"),
		Annotations: map[string]string{"exit": runExitHelp},
		Args:        imageAndCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := machine.complete(cmd, args[0]); err != nil {
				return err
			}
			until, err := waitStage(wait)
			if err != nil {
				return err
			}
			named := machine.name != ""
			if cmd.Flags().Changed("rm") && !rm && !named && !detach {
				return usagef("run: --rm=false: a VM without a name is always removed").WithHint("give it one with --name")
			}
			p := api.RunParams{Wait: until, Create: api.CreateParams{
				Name: machine.name, Spec: machine.spec, Ephemeral: rm || !named && !detach,
			}}
			s, err := flags.session(cmd)
			if err != nil {
				return err
			}
			s.trace, s.asJSON = trace, asJSON
			if detach {
				for _, name := range []string{"env", "user", "workdir", "interactive", "tty"} {
					if cmd.Flags().Changed(name) {
						return usagef("run: --%s says how a session is run, and -d has none", name).WithHint("`banger exec` has --%s", name)
					}
				}
				p.Create.Spec.Command = args[1:]
				return s.detached(&machine, p)
			}
			s.exec.Args, s.main = args[1:], true
			return s.run(&machine, p)
		},
	}
	f := cmd.Flags()
	machine.add(cmd)
	flags.add(cmd, true)
	f.BoolVarP(&detach, "detach", "d", false, "start the VM with the command and leave it; `banger logs` shows what it says")
	f.BoolVar(&rm, "rm", false, "remove the VM when it stops, also one with a name")
	f.StringVar(&wait, "wait", "agent", waitHelp)
	f.BoolVar(&trace, "trace", false, "print where the time went")
	f.BoolVar(&asJSON, "json", false, "with --trace, print JSON lines; with -d, print the VM as JSON")
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
	exec   wire.Exec
	main   bool // the command takes the place of the image's Cmd
	tty    bool
	trace  bool
	asJSON bool

	client  *api.Client // of the session itself
	p       *progress
	started chan struct{} // closed when the command runs
	credit  credit
}

// begin makes signals end what is under way, until the command runs and gets
// them itself. Call end when all is over.
func (s *session) begin() (ctx context.Context, end func()) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
	ctx, cancel := context.WithCancel(context.Background())
	go s.passSignals(ctx, cancel, signals)
	return ctx, func() {
		signal.Stop(signals)
		cancel()
		s.p.end()
		if s.trace {
			s.p.waterfall(s.asJSON)
		}
	}
}

// run makes the VM, runs the command in it, and ends the VM.
func (s *session) run(machine *machineFlags, p api.RunParams) (err error) {
	ctx, end := s.begin()
	defer end()
	if p.Create.Prepared, err = machine.prepare(ctx, s.p); err != nil {
		return err
	}
	ours, theirs, err := api.Pair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	daemon, err := connect()
	if err != nil {
		ours.Close()
		return err
	}
	up := make(chan banger.VM, 1)
	over := make(chan error, 1)
	onEvent := s.p.events(time.Now())
	go func() { // the daemon's part: it ends when the VM has
		over <- daemon.Call(ctx, api.MethodRun, p, []*os.File{theirs}, &api.None{}, func(e api.Event) {
			if e.VM != nil {
				up <- *e.VM
				return
			}
			onEvent(e)
		}, nil)
	}()
	var vm banger.VM
	select {
	case vm = <-up:
	case err := <-over:
		ours.Close()
		select {
		case vm = <-up: // it was up, and the daemon died
			return errors.Join(err, s.cleanUp(vm))
		default:
			return err
		}
	}
	theirs.Close()
	code, err := s.converse(ctx, ours)
	daemon.Send(wire.FrameStdinEOF, nil)
	if runErr := <-over; errors.Is(runErr, api.ErrGone) || banger.CodeOf(runErr) == banger.CodeUnavailable {
		// The daemon went away meanwhile: what it had still to do is left.
		if cleanErr := s.cleanUp(vm); err == nil {
			err = cleanErr
		}
	}
	if err == nil && code != 0 {
		return exitStatus(code)
	}
	return err
}

// cleanUp ends a VM whose daemon went away.
func (s *session) cleanUp(vm banger.VM) error {
	if vm.Ephemeral {
		err := ask(api.MethodRemove, api.VMParams{Name: vm.ID, Force: true}, nil)
		if banger.CodeOf(err) == banger.CodeNotFound {
			return nil // whoever came up in its place has removed it
		}
		return err
	}
	return ask(api.MethodStop, api.VMParams{Name: vm.ID, TimeoutMs: -1}, nil)
}

// detached makes the VM and starts it with its main command.
func (s *session) detached(machine *machineFlags, p api.RunParams) (err error) {
	ctx, end := s.begin()
	defer end()
	if p.Create.Prepared, err = machine.prepare(ctx, s.p); err != nil {
		return err
	}
	var vm banger.VM
	if err := s.call(ctx, api.MethodCreate, p.Create, nil, &vm); err != nil {
		return err
	}
	if err := s.call(ctx, api.MethodStart, api.VMParams{Name: vm.ID, Wait: p.Wait}, nil, &vm); err != nil {
		if p.Create.Ephemeral {
			ask(api.MethodRemove, api.VMParams{Name: vm.ID, Force: true}, nil) // the error of the start says more
		}
		return err
	}
	s.p.end()
	if s.asJSON && !s.trace {
		return printJSON(vm)
	}
	fmt.Println(escape(vm.Name))
	return nil
}

// attach runs the command in a VM that is there.
func (s *session) attach(p api.VMParams) error {
	ctx, end := s.begin()
	defer end()
	ours, theirs, err := api.Pair()
	if err != nil {
		return err
	}
	err = s.call(ctx, api.MethodAttach, p, []*os.File{theirs}, &banger.VM{})
	theirs.Close()
	if err != nil {
		ours.Close()
		return err
	}
	code, err := s.converse(ctx, ours)
	if err == nil && code != 0 {
		return exitStatus(code)
	}
	return err
}

// call makes a call to the resident daemon with progress.
func (s *session) call(ctx context.Context, method string, params any, files []*os.File, result any) error {
	c, err := connect()
	if err != nil {
		return err
	}
	return c.Call(ctx, method, params, files, result, s.p.events(time.Now()), nil)
}

// converse runs the command over a connection that its VM's supervisor serves,
// and returns its exit code.
func (s *session) converse(ctx context.Context, conn *net.UnixConn) (code int, err error) {
	s.client = api.NewClient(conn)
	stdin := int(os.Stdin.Fd())
	restore := func() {}
	defer func() { restore() }()
	onEvent := s.p.events(time.Now())
	var result api.ExecResult
	err = s.client.Call(ctx, api.MethodExec, api.ExecParams{Session: s.exec, Main: s.main}, nil, &result, func(e api.Event) {
		onEvent(e)
		if !e.Started {
			return
		}
		s.p.end()
		if s.tty && term.IsTerminal(stdin) {
			if old, err := term.MakeRaw(stdin); err == nil {
				restore = sync.OnceFunc(func() { term.Restore(stdin, old) })
			}
		}
		close(s.started)
		if s.exec.Stdin {
			go s.passStdin()
		}
	}, func(f wire.Frame) error {
		err := s.frame(f)
		if f.Type == wire.FrameExit {
			restore() // what is typed from here on is for the user's own shell
		}
		return err
	})
	if errors.Is(err, api.ErrGone) {
		err = banger.Errorf(banger.CodeGuest, "the VM ended before the command did: its supervisor is gone").
			WithHint("`banger ls` shows what became of it")
	}
	return result.Exit.Code, err
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
func (s *session) passSignals(ctx context.Context, cancel func(), signals <-chan os.Signal) {
	names := map[os.Signal]string{
		syscall.SIGINT: "INT", syscall.SIGTERM: "TERM", syscall.SIGHUP: "HUP",
		syscall.SIGQUIT: "QUIT", syscall.SIGUSR1: "USR1", syscall.SIGUSR2: "USR2",
	}
	var lastInterrupt time.Time
	for {
		var sig os.Signal
		select {
		case sig = <-signals:
		case <-ctx.Done():
			return
		}
		running := false
		select {
		case <-s.started:
			running = true
		default:
		}
		if sig == syscall.SIGWINCH {
			if s.tty && running {
				if data, err := json.Marshal(windowOf(int(os.Stdout.Fd()))); err == nil {
					s.client.Send(wire.FrameResize, data)
				}
			}
			continue
		}
		if !running {
			if sig != syscall.SIGUSR1 && sig != syscall.SIGUSR2 {
				cancel()
			}
			continue
		}
		if sig == syscall.SIGINT {
			now := time.Now()
			if now.Sub(lastInterrupt) < secondInterrupt {
				cancel()
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
