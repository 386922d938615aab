package cli

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"banger"
	"banger/internal/api"
)

// networkFlags are those of the network of a VM that is made.
func (m *machineFlags) networkFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVarP(&m.spec.Ports, "publish", "p", nil, "lead a port of the host to the guest: `[IP:]HOST:GUEST[/udp]`, on 127.0.0.1 if no IP is given")
	f.StringVar(&m.spec.Net, "net", "", "let the guest reach `WHAT`: full, public (default), none, allow:HOST[:PORT], allow:CIDR, group:NAME, with commas between")
	f.StringArrayVar(&m.allowHost, "allow-host", nil, "let the guest reach this `PORT` of the host's 127.0.0.1, at host.banger")
}

// completeNetwork checks what the daemon cannot say as well.
func (m *machineFlags) completeNetwork() error {
	for _, text := range m.allowHost {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return usagef("--allow-host %q: it is a port number", text)
		}
		m.spec.AllowHost = append(m.spec.AllowHost, uint16(n))
	}
	return nil
}

func portsCommand() *cobra.Command {
	var asJSON bool
	list := &cobra.Command{
		Use:   "ls VM",
		Short: "List the ports of the host that lead to a VM, and what listens in its guest",
		Long: `List the ports of the host that lead to a VM and, where it runs, what listens
in its guest: which of them lead to nobody, and to what there is none yet.

EXAMPLE
  banger ports ls web`,
		Args: exactly("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var out api.Ports
			if err := ask(api.MethodPorts, api.PortParams{Name: args[0]}, &out); err != nil {
				return err
			}
			if asJSON {
				return printJSON(out)
			}
			if err := table(portRows(args[0], out)); err != nil {
				return err
			}
			switch {
			case out.Unknown != "":
				fmt.Fprintf(os.Stderr, "banger: what listens in the guest is not known: %s\n", escape(out.Unknown))
			case out.More:
				fmt.Fprintf(os.Stderr, "banger: more listens in the guest than the first %d\n", len(out.Listeners))
			}
			return nil
		},
	}
	list.Flags().BoolVar(&asJSON, "json", false, "print it as JSON")
	change := func(use, short, long, method string) *cobra.Command {
		return &cobra.Command{
			Use:   use + " VM [IP:]HOST:GUEST[/udp]...",
			Short: short,
			Long:  long,
			Args: func(cmd *cobra.Command, args []string) error {
				if len(args) < 2 {
					return usagef("ports %s: it takes a VM and ports", use).WithHint("`banger ports %s web 8080:80`", use)
				}
				return nil
			},
			RunE: func(cmd *cobra.Command, args []string) error {
				return ask(method, api.PortParams{Name: args[0], Ports: args[1:]}, &api.Ports{})
			},
		}
	}
	cmd := group("ports", "Ports of the host that lead to a VM",
		list,
		change("add", "Lead ports of the host to a VM", `Lead ports of the host to a VM, all of them or none: at once where it runs, and
at every start. They are on 127.0.0.1 if no IP is given; HOST 0 is a free one.

EXAMPLE
  banger ports add web 8080:80 '[::1]:5353:53/udp'`, api.MethodPortAdd),
		change("rm", "Close ports again; connections live on", `Close ports of the host that lead to a VM, all of them or none, as `+"`banger ports ls`"+`
shows them: at once where it runs, and for every start. Connections live on.

EXAMPLE
  banger ports rm web 8080:80`, api.MethodPortRm))
	cmd.Long = `Ports of the host that lead to a VM. They are part of it, like those that
` + "`-p`" + ` gave it when it was made: added or closed at once where it runs, and the
same at every start.

EXAMPLE
  banger ports add web 8080:80
  banger ports ls web`
	return cmd
}

// portRows are the rows of a list of ports: those of the host first, then what
// listens in the guest with none.
func portRows(vm string, p api.Ports) [][]string {
	if p.Listeners == nil {
		rows := [][]string{{"HOST", "GUEST"}}
		for _, port := range p.Ports {
			rows = append(rows, []string{hostPort(port), guestPort(port.Protocol, port.GuestPort)})
		}
		return rows
	}
	rows := [][]string{{"HOST", "GUEST", "LISTENER", "NOTE"}}
	for _, port := range p.Ports {
		row := []string{hostPort(port), guestPort(port.Protocol, port.GuestPort)}
		if port.Listening == nil || !*port.Listening {
			row = append(row, "-", "nothing listens there")
		} else {
			row = append(row, listenersAt(p.Listeners, port))
		}
		rows = append(rows, row)
	}
	for _, l := range p.Listeners {
		if l.Forwarded {
			continue
		}
		row := []string{"-", guestPort(l.Protocol, l.Port), listener(l)}
		switch l.Reach {
		case api.ReachLoopback:
			row = append(row, "of the guest itself: no port of the host leads there")
		case api.ReachPort:
			row = append(row, fmt.Sprintf("banger ports add %s %s", vm, suggestedPort(l)))
		default:
			row = append(row, "at an address that no port of the host leads to")
		}
		rows = append(rows, row)
	}
	return rows
}

func hostPort(p api.Port) string {
	return net.JoinHostPort(p.HostAddr, strconv.Itoa(int(p.HostPort)))
}

func guestPort(proto string, port uint16) string { return fmt.Sprintf("%d/%s", port, proto) }

// listener is who listens, and where if not everywhere.
func listener(l api.Listener) string {
	name := l.Process
	if name == "" {
		name = "unknown"
	}
	if l.Addr.IsUnspecified() {
		return name
	}
	return name + " on " + l.Addr.String()
}

// maxListenersShown bounds the names beside one port: honest guests have one or
// two there.
const maxListenersShown = 4

// listenersAt are those whom a port leads to.
func listenersAt(all []api.Listener, p api.Port) string {
	var names []string
	for _, l := range all {
		if l.Forwarded && l.Protocol == p.Protocol && l.Port == p.GuestPort && !slices.Contains(names, listener(l)) {
			names = append(names, listener(l))
		}
	}
	if len(names) > maxListenersShown {
		names = append(names[:maxListenersShown], "...")
	}
	return strings.Join(names, ", ")
}

// suggestedPort is what would lead to a listener. Ports below 1024 are root's
// on the host.
func suggestedPort(l api.Listener) string {
	host := int(l.Port)
	if host < 1024 {
		host += 8000
	}
	text := fmt.Sprintf("%d:%d", host, l.Port)
	if l.Protocol == "udp" {
		text += "/udp"
	}
	return text
}

func netCommand() *cobra.Command {
	var asJSON bool
	log := &cobra.Command{
		Use:   "log VM",
		Short: "Show what a VM's guest was denied, and what would allow it",
		Long: `Show what the guest of a VM wanted to reach and was denied, each with the reason
and the flag that would allow it; also of one that is stopped, and from earlier
starts. Equal ones are one line; the last 512 are kept.

EXAMPLE
  banger net log web`,
		Args: exactly("VM"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var out api.NetLog
			if err := ask(api.MethodNetLog, api.Named{Name: args[0]}, &out); err != nil {
				return err
			}
			if asJSON {
				return printJSON(out.Denials)
			}
			rows := [][]string{{"LAST", "TIMES", "WHAT", "REASON", "ALLOWED BY"}}
			for _, d := range out.Denials {
				rows = append(rows, []string{d.Last.Local().Format("2006-01-02 15:04:05"), strconv.Itoa(d.Count), denied(d), d.Reason, d.Flag})
			}
			return table(rows)
		},
	}
	log.Flags().BoolVar(&asJSON, "json", false, "print a JSON list")
	return group("net", "Networks of VMs", log)
}

// denied says what a denial is about.
func denied(d banger.Denial) string {
	what := d.Proto
	switch {
	case d.From.IsValid():
		what += " from " + d.From.String()
	case d.To.IsValid() && d.To.Port() == 0:
		what += " " + d.To.Addr().String()
	case d.To.IsValid():
		what += " " + d.To.String()
	}
	if len(d.Names) > 0 {
		what += " " + strings.Join(d.Names, ", ")
	}
	return what
}
