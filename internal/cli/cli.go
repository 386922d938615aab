// Package cli is the command line: one file per verb. It parses, opens the
// paths that the user named, talks to the daemon, and shows what comes back.
// It knows no room but the API.
package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"banger"
	"banger/internal/api"
)

// Version is set when a release is linked.
var Version = "dev"

// Main runs the command line and returns its exit code.
func Main(args []string) int {
	root := newRoot()
	root.SetArgs(args[1:])
	err := root.Execute()
	var exit exitStatus
	if errors.As(err, &exit) {
		return int(exit)
	}
	if err != nil {
		printError(os.Stderr, err)
	}
	return exitCode(err)
}

// exitStatus is the exit code of a guest's command, on its way out.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// exitCode is the one place that decides exit codes.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	switch banger.CodeOf(err) {
	case banger.CodeUsage:
		return 2
	case banger.CodeCommandNotExecutable:
		return 126
	case banger.CodeCommandNotFound:
		return 127
	case banger.CodeCanceled:
		return 130
	}
	return 125
}

// exitHelp is the end of every help page.
const exitHelp = `EXIT STATUS
  0      it worked
  2      the arguments do not parse
  125    any other error of banger's own
  130    ended by Ctrl-C`

// runExitHelp is that of commands that run something in a guest.
const runExitHelp = `EXIT STATUS
  the command's own; 128+N when signal N ended it
  2      the arguments do not parse
  125    any other error of banger's own
  126    the command is there and cannot be run
  127    the command is not there
  130    ended by Ctrl-C before the command started`

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "banger",
		Short: "A real Linux machine of your own, from any OCI image",
		Long: `banger makes a bootable machine of any OCI image and runs it as a VM with a
kernel of its own, without root.

EXAMPLE
  banger run debian
  banger run apt:bookworm -- uname -a`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("%q: no such command", args[0]).WithHint("`banger --help` lists the commands")
			}
			return cmd.Help()
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w", err).WithHint("`%s --help` shows the flags", cmd.CommandPath())
	})
	root.SetHelpTemplate(helpTemplate)
	root.SetHelpCommand(&cobra.Command{
		Use:   "help [COMMAND...]",
		Short: "Show the help of a command",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return usagef("%q: no such command", strings.Join(args, " ")).WithHint("`banger --help` lists the commands")
			}
			return cmd.Help()
		},
	})
	root.AddCommand(vmCommands()...)
	root.AddCommand(group("vm", "The same commands, for those who like to say what they act on", vmCommands()...),
		imageCommand(), kernelCommand(), netCommand(), proxyCommand(), doctorCommand(), autostartCommand(), versionCommand())
	flagsOnce(root)
	return root
}

const helpTemplate = `{{with or .Long .Short}}{{. | trimTrailingWhitespaces}}

{{end}}USAGE
  {{if .HasAvailableSubCommands}}{{.CommandPath}} COMMAND{{else}}{{.UseLine}}{{end}}
{{if .HasAvailableSubCommands}}
COMMANDS
{{range .Commands}}{{if .IsAvailableCommand}}  {{rpad .Name .NamePadding}} {{.Short}}
{{end}}{{end}}{{end}}{{if .HasAvailableLocalFlags}}
FLAGS
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}
{{end}}
{{if index .Annotations "exit"}}{{index .Annotations "exit"}}{{else}}` + exitHelp + `{{end}}
`

// flagsOnce keeps cobra from writing "[flags]" at the end of every usage line:
// where flags go is part of the line itself.
func flagsOnce(c *cobra.Command) {
	c.DisableFlagsInUseLine = true
	for _, sub := range c.Commands() {
		flagsOnce(sub)
	}
}

// group makes a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("%q: no such command of %q", args[0], cmd.CommandPath()).
					WithHint("`%s --help` lists them", cmd.CommandPath())
			}
			return cmd.Help()
		},
	}
	c.AddCommand(commands...)
	return c
}

func usagef(format string, args ...any) *banger.Error {
	return banger.Errorf(banger.CodeUsage, format, args...)
}

// exactly refuses another number of arguments, naming those it wants.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		want := "no arguments"
		if len(names) > 0 {
			want = strings.Join(names, " ")
		}
		return usagef("%s: it takes %s, and got %d arguments", cmd.CommandPath(), want, len(args)).
			WithHint("`%s --help` has an example", cmd.CommandPath())
	}
}

// connect makes a client of the resident daemon for one call.
func connect() (*api.Client, error) { return api.Connect(Version) }

// ask makes one call to the resident daemon, with progress on stderr. result
// may be nil.
func ask(method string, params any, result any) error {
	if result == nil {
		result = new(any)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	client, err := connect()
	if err != nil {
		return err
	}
	p := newProgress(os.Stderr)
	defer p.end()
	return client.Call(ctx, method, params, nil, result, p.event, nil)
}

// call makes one call to a daemon of its own, with progress on stderr. Ctrl-C cancels it; the daemon
// then cleans up and the call ends.
func call(method string, params any, files []*os.File, result any) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	client, err := api.Start()
	if err != nil {
		return err
	}
	p := newProgress(os.Stderr)
	defer p.end()
	return client.Call(ctx, method, params, files, result, p.event, nil)
}
