package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"banger"
	"banger/internal/api"
)

// The units of systemd's user manager. KillMode=process leaves supervisors,
// and with them VMs, alone when the daemon is stopped or updated.
const (
	socketUnit = `[Unit]
Description=Socket of the daemon of banger

[Socket]
ListenStream=%s
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
`
	serviceUnit = `[Unit]
Description=Daemon of banger
Requires=bangerd.socket

[Service]
ExecStart=%s serve
Environment=%s
KillMode=process
`
)

func autostartCommand() *cobra.Command {
	var remove bool
	cmd := &cobra.Command{
		Use:   "autostart",
		Short: "Have systemd's user manager start the daemon when it is called",
		Long: `Write a socket and a service for systemd's user manager, and print what turns
them on. Without them the daemon is started by the first command that needs it;
that is all most users want.

EXAMPLE
  banger autostart`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			config := os.Getenv("XDG_CONFIG_HOME")
			if !filepath.IsAbs(config) {
				home, err := os.UserHomeDir()
				if err != nil {
					return err
				}
				config = filepath.Join(home, ".config")
			}
			dir := filepath.Join(config, "systemd", "user")
			socket, service := filepath.Join(dir, "bangerd.socket"), filepath.Join(dir, "bangerd.service")
			if remove {
				for _, path := range []string{socket, service} {
					if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
						return err
					}
				}
				fmt.Println("systemctl --user disable --now bangerd.socket; systemctl --user daemon-reload")
				return nil
			}
			program, err := api.Companion(api.DaemonProgram)
			if err != nil {
				return err
			}
			root, path, err := api.Address()
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			for _, unit := range []struct{ path, text string }{
				{socket, fmt.Sprintf(socketUnit, specifiers(path))},
				{service, fmt.Sprintf(serviceUnit, strings.ReplaceAll(quoted(program), "$", "$$"), quoted("BANGER_HOME="+root))},
			} {
				if err := replaceFile(unit.path, unit.text); err != nil {
					return banger.Errorf(banger.CodeUnavailable, "%s: %w", unit.path, err)
				}
				fmt.Fprintln(os.Stderr, unit.path)
			}
			fmt.Println("systemctl --user daemon-reload && systemctl --user enable --now bangerd.socket")
			return nil
		},
	}
	cmd.Flags().BoolVar(&remove, "remove", false, "remove the units again")
	return cmd
}

// specifiers writes text so that systemd reads no specifier in it
// (systemd.unit(5)).
func specifiers(text string) string { return strings.ReplaceAll(text, "%", "%%") }

// quoted writes text as one word of a systemd unit (systemd.syntax(7)).
func quoted(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%").Replace(text) + `"`
}

// replaceFile writes a file beside its place and renames it there.
func replaceFile(path, text string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".bangerd-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone after the rename
	if _, err := f.WriteString(text); err != nil {
		f.Close()
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
