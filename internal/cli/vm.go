package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"banger"
	"banger/internal/api"
	"banger/internal/wire"
)

// vmCommands are the commands that make and act on VMs. They stand at the top
// and once more below `banger vm`.
func vmCommands() []*cobra.Command {
	return []*cobra.Command{
		runCommand(), createCommand(), startCommand(), stopCommand(), restartCommand(), killCommand(),
		pauseCommand(), resumeCommand(), removeCommand(), listCommand(), execCommand(), shellCommand(),
		logsCommand(), inspectCommand(), statsCommand(), portsCommand(),
	}
}

func createCommand() *cobra.Command {
	var machine machineFlags
	var rm, asJSON bool
	cmd := &cobra.Command{
		Use:   "create [FLAGS] IMAGE [-- COMMAND [ARG...]]",
		Short: "Make a VM from an image without starting it",
		Long: `Make a VM from an image without starting it, and print its name. When it is
started it runs COMMAND, or what the image starts, and stops when that ends;
where that is a shell or an init, it runs until it is stopped.

EXAMPLE
  banger create --name dev debian
  banger shell dev`,
		Args: imageAndCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := machine.complete(cmd, args[0]); err != nil {
				return err
			}
			machine.spec.Command = args[1:]
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			p := newProgress(os.Stderr)
			defer p.end()
			prepared, err := machine.prepare(ctx, p)
			if err != nil {
				return err
			}
			c, err := connect()
			if err != nil {
				return err
			}
			var vm banger.VM
			params := api.CreateParams{Name: machine.name, Ephemeral: rm, Spec: machine.spec, Prepared: prepared}
			if err := c.Call(ctx, api.MethodCreate, params, nil, &vm, p.events(time.Now()), nil); err != nil {
				return err
			}
			p.end()
			if asJSON {
				return printJSON(vm)
			}
			fmt.Println(escape(vm.Name))
			return nil
		},
	}
	machine.add(cmd)
	cmd.Flags().BoolVar(&rm, "rm", false, "remove the VM when it stops")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the VM as JSON")
	return cmd
}

// eachVM makes a command that does one thing to every VM that is named.
func eachVM(use, short, method string, flags func(*cobra.Command, *api.VMParams) func() error) *cobra.Command {
	p := api.VMParams{TimeoutMs: -1}
	var check func() error
	cmd := &cobra.Command{
		Use:   use + " VM...",
		Short: short,
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if check != nil {
				if err := check(); err != nil {
					return err
				}
			}
			return eachOf(cmd, args, "VM", func(name string) error {
				params := p
				params.Name = name
				return ask(method, params, nil)
			})
		},
	}
	if flags != nil {
		check = flags(cmd, &p)
	}
	return cmd
}

func waitFlag(cmd *cobra.Command, p *api.VMParams) func() error {
	var wait string
	cmd.Flags().StringVar(&wait, "wait", "agent", waitHelp)
	return func() (err error) {
		p.Wait, err = waitStage(wait)
		return err
	}
}

func timeFlag(cmd *cobra.Command, p *api.VMParams) func() error {
	var seconds int
	cmd.Flags().IntVarP(&seconds, "time", "t", 10, "give the guest `SECONDS` to power off, at most 10; then the VM is ended")
	return func() error {
		if seconds < 0 || seconds > 10 {
			return usagef("--time %d: it is 0 to 10 seconds", seconds)
		}
		p.TimeoutMs = int64(seconds) * 1000
		return nil
	}
}

func startCommand() *cobra.Command {
	return eachVM("start", "Start VMs", api.MethodStart, waitFlag)
}

func stopCommand() *cobra.Command {
	return eachVM("stop", "Stop VMs: their guests power off", api.MethodStop, timeFlag)
}

func restartCommand() *cobra.Command {
	return eachVM("restart", "Stop VMs and start them again", api.MethodRestart, func(cmd *cobra.Command, p *api.VMParams) func() error {
		wait, limit := waitFlag(cmd, p), timeFlag(cmd, p)
		return func() error { return errors.Join(wait(), limit()) }
	})
}

func killCommand() *cobra.Command {
	return eachVM("kill", "End VMs at once, as if the power was cut", api.MethodKill, nil)
}

func pauseCommand() *cobra.Command {
	return eachVM("pause", "Stop the CPUs of VMs", api.MethodPause, nil)
}

func resumeCommand() *cobra.Command {
	cmd := eachVM("resume", "Let the CPUs of paused VMs go on", api.MethodResume, nil)
	cmd.Aliases = []string{"unpause"}
	return cmd
}

func removeCommand() *cobra.Command {
	return eachVM("rm", "Remove VMs and their disks", api.MethodRemove, func(cmd *cobra.Command, p *api.VMParams) func() error {
		cmd.Flags().BoolVarP(&p.Force, "force", "f", false, "end a VM that runs first")
		return nil
	})
}

func listCommand() *cobra.Command {
	var asJSON, quiet bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list", "ps"},
		Short:   "List all VMs, running or not",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list api.VMs
			if err := ask(api.MethodList, api.None{}, &list); err != nil {
				return err
			}
			if asJSON {
				return printJSON(list.VMs)
			}
			rows := [][]string{{"NAME", "ID", "IMAGE", "STATE", "CPUS", "MEMORY", "ON DISK", "CREATED"}}
			for _, v := range list.VMs {
				if quiet {
					fmt.Println(escape(v.Name))
					continue
				}
				var own int64
				for _, d := range v.Disks {
					if d.Role == "overlay" || d.Role == "work" {
						own += d.AllocatedBytes
					}
				}
				rows = append(rows, []string{v.Name, v.ID, v.Image, stateOf(v), strconv.Itoa(v.CPUs), size(v.MemoryBytes),
					size(own), v.Created.Local().Format("2006-01-02 15:04")})
			}
			if quiet {
				return nil
			}
			return table(rows)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON list")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print names only")
	return cmd
}

// stateOf is a state in a word or two.
func stateOf(v banger.VM) string {
	if v.State == banger.StateStopped && v.ExitCode != nil {
		return fmt.Sprintf("%s (%d)", v.State, *v.ExitCode)
	}
	return string(v.State)
}

func execCommand() *cobra.Command {
	var flags sessionFlags
	var start bool
	cmd := &cobra.Command{
		Use:   "exec [FLAGS] VM [--] COMMAND [ARG...]",
		Short: "Run a command in a VM, which is started if it does not run",
		Long: `Run a command in a VM, which is started if it does not run, and goes on running
afterwards.

EXAMPLE
  banger exec web ps aux
  tar c . | banger exec -i -w /srv web -- tar x`,
		Annotations: map[string]string{"exit": runExitHelp},
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 || len(args) == 2 && args[1] == "--" {
				return usagef("exec: it takes a VM and a command").WithHint("`banger exec VM ls`; `banger shell VM` for a shell")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := flags.session(cmd)
			if err != nil {
				return err
			}
			s.exec.Args = args[1:]
			if args[1] == "--" {
				s.exec.Args = args[2:]
			}
			return s.attach(api.VMParams{Name: args[0], Start: start})
		},
	}
	flags.add(cmd, false)
	cmd.Flags().BoolVar(&start, "start", true, "start the VM if it does not run")
	cmd.Flags().SetInterspersed(false) // what follows the VM is the command's
	return cmd
}

func shellCommand() *cobra.Command {
	var flags sessionFlags
	var start bool
	cmd := &cobra.Command{
		Use:   "shell [FLAGS] VM",
		Short: "Open a login shell in a VM, which is started if it does not run",
		Long: `Open a login shell in a VM, which is started if it does not run, and goes on
running afterwards.

EXAMPLE
  banger shell dev
  banger shell -u postgres dev`,
		Annotations: map[string]string{"exit": runExitHelp},
		Args:        exactly("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := flags.session(cmd)
			if err != nil {
				return err
			}
			return s.attach(api.VMParams{Name: args[0], Start: start})
		},
	}
	flags.add(cmd, true)
	cmd.Flags().BoolVar(&start, "start", true, "start the VM if it does not run")
	return cmd
}

func logsCommand() *cobra.Command {
	var p api.LogParams
	var tail string
	cmd := &cobra.Command{
		Use:   "logs [FLAGS] VM",
		Short: "Show what a VM's main command, or its console, has said",
		Long: `Show what the main command of a VM has said, or with --console what its guest
wrote to its console; also of one that is stopped. The newest 4 to 8 MiB are
kept. On a terminal control characters are shown and not obeyed.

EXAMPLE
  banger logs -f web
  banger logs --console web > console.txt`,
		Args: exactly("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p.Name = args[0]
			lines := -1
			if tail != "all" {
				n, err := strconv.Atoi(tail)
				if err != nil || n < 0 {
					return usagef("--tail %q: it is a number of lines, or all", tail)
				}
				lines = n
			}
			return showLog(p, lines)
		},
	}
	cmd.Flags().BoolVarP(&p.Follow, "follow", "f", false, "go on with what comes, until the VM stops")
	cmd.Flags().BoolVar(&p.Console, "console", false, "show the console")
	cmd.Flags().StringVarP(&tail, "tail", "n", "all", "begin `LINES` before the end")
	return cmd
}

// showLog prints a log. With a number of lines it holds what comes first back
// until there is a pause, and prints the end of it.
func showLog(p api.LogParams, lines int) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	out := &logWriter{escape: term.IsTerminal(int(os.Stdout.Fd()))}
	if lines >= 0 {
		// The whole is at most 8 MiB: look at it, and follow from there.
		first := p
		first.Follow = false
		var whole bytes.Buffer
		if err := readLog(ctx, first, func(b []byte) error { whole.Write(b); return nil }); err != nil {
			return err
		}
		if err := out.write(lastLines(whole.Bytes(), lines)); err != nil || !p.Follow {
			return err
		}
		skip := whole.Len()
		err := readLog(ctx, p, func(b []byte) error {
			n := min(skip, len(b))
			skip -= n
			return out.write(b[n:])
		})
		return interrupted(ctx, err)
	}
	return interrupted(ctx, readLog(ctx, p, out.write))
}

// interrupted makes the end of a log that the user ended no error.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil && banger.CodeOf(err) == banger.CodeCanceled {
		return nil
	}
	return err
}

func readLog(ctx context.Context, p api.LogParams, emit func([]byte) error) error {
	c, err := connect()
	if err != nil {
		return err
	}
	progress := newProgress(os.Stderr)
	return c.Call(ctx, api.MethodLogs, p, nil, &api.None{}, progress.event, func(f wire.Frame) error {
		if f.Type != wire.FrameStdout {
			return nil
		}
		return emit(f.Payload)
	})
}

// lastLines is the end of text from n lines before it.
func lastLines(text []byte, n int) []byte {
	at := len(text)
	if n > 0 && at > 0 && text[at-1] == '\n' {
		at--
	}
	for ; n > 0; n-- {
		at = bytes.LastIndexByte(text[:at], '\n')
		if at < 0 {
			return text
		}
	}
	if at == len(text) {
		return nil
	}
	return text[at+1:]
}

// A logWriter prints a guest's text. For a terminal it is escaped line by
// line, and a line that does not end is shown in pieces.
type logWriter struct {
	escape bool
	rest   []byte
}

func (w *logWriter) write(b []byte) error {
	if !w.escape {
		_, err := os.Stdout.Write(b)
		return err
	}
	const maxPiece = 4096
	w.rest = append(w.rest, b...)
	var out strings.Builder
	for {
		i := bytes.IndexByte(w.rest, '\n')
		if i < 0 && len(w.rest) < maxPiece {
			break
		}
		end := i
		if i < 0 {
			end, i = maxPiece, maxPiece-1
		}
		line := strings.TrimSuffix(string(w.rest[:end]), "\r")
		for j, cell := range strings.Split(line, "\t") {
			if j > 0 {
				out.WriteByte('\t')
			}
			out.WriteString(escape(cell))
		}
		out.WriteByte('\n')
		w.rest = w.rest[i+1:]
	}
	_, err := os.Stdout.WriteString(out.String())
	return err
}

func inspectCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect VM",
		Short: "Show all there is to know of a VM",
		Args:  exactly("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var v banger.VM
			if err := ask(api.MethodInspect, api.VMParams{Name: args[0]}, &v); err != nil {
				return err
			}
			if asJSON {
				return printJSON(v)
			}
			rows := [][]string{{"name", v.Name}, {"id", v.ID}, {"state", stateOf(v)}}
			add := func(key, value string) {
				if value != "" {
					rows = append(rows, []string{key, value})
				}
			}
			add("reason", v.Reason)
			add("image", v.Image+" ("+v.ImageID+")")
			add("kernel", v.Kernel)
			add("command", strings.Join(v.Command, " "))
			add("driver", v.Driver)
			add("accel", string(v.Accel))
			add("cpus", strconv.Itoa(v.CPUs))
			add("memory", size(v.MemoryBytes))
			for _, d := range v.Disks {
				add(d.Role+" disk", fmt.Sprintf("%s, %s on disk, %s", size(d.SizeBytes), size(d.AllocatedBytes), d.Path))
			}
			if v.PID != 0 {
				add("pid", strconv.Itoa(v.PID))
			}
			add("created", v.Created.Local().String())
			if v.Started != nil {
				add("started", v.Started.Local().String())
			}
			if c := v.Confinement; c != nil {
				add("namespaces", strings.Join(c.Namespaces, " "))
				add("seccomp", yes(c.Seccomp))
				add("no new privs", yes(c.NoNewPrivs))
				add("landlock", strconv.Itoa(c.LandlockABI))
				add("limits", strings.Join(c.Limits, ", "))
				add("not confined", strings.Join(c.Missing, "; "))
				add("proof", c.Proof)
			}
			return table(rows)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON document")
	return cmd
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func statsCommand() *cobra.Command {
	var asJSON, once bool
	cmd := &cobra.Command{
		Use:   "stats [FLAGS] [VM...]",
		Short: "Show what running VMs use",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			return showStats(ctx, append([]string{}, args...), asJSON, once || !term.IsTerminal(int(os.Stdout.Fd())))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the counters as a JSON list, once")
	cmd.Flags().BoolVar(&once, "no-stream", false, "print one sample and end")
	return cmd
}

// statsPause is between two samples, of which the difference is shown.
const statsPause = time.Second

func showStats(ctx context.Context, names []string, asJSON, once bool) error {
	before := map[string]api.Stats{}
	last := time.Now()
	for n := 0; ; n++ {
		var list api.StatsList
		if err := ask(api.MethodStats, names, &list); err != nil {
			return err
		}
		if asJSON {
			return printJSON(list.Stats)
		}
		now := time.Now()
		if n > 0 {
			rows := [][]string{{"NAME", "CPU", "MEMORY", "OF", "ON DISK", "READ", "WRITTEN"}}
			for _, s := range list.Stats {
				cpu := "-"
				if b, ok := before[s.ID]; ok && s.CPUNs >= b.CPUNs {
					cpu = fmt.Sprintf("%.0f%%", 100*float64(s.CPUNs-b.CPUNs)/float64(now.Sub(last)))
				}
				rows = append(rows, []string{s.Name, cpu, size(s.MemoryBytes), size(s.LimitBytes),
					size(s.AllocatedBytes), size(s.ReadBytes), size(s.WrittenBytes)})
			}
			if !once {
				fmt.Print("\x1b[H\x1b[2J")
			}
			if err := table(rows); err != nil || once {
				return err
			}
		}
		clear(before)
		for _, s := range list.Stats {
			before[s.ID] = s
		}
		last = now
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(statsPause):
		}
	}
}
