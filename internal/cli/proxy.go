package cli

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"banger/internal/api"
)

// defaultProxyPort is the one registered for SOCKS.
const defaultProxyPort = "1080"

func proxyCommand() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "proxy [--listen ADDRESS]",
		Short: "Let programs of the host reach VMs by name, over SOCKS 5 and HTTP",
		Long: `Let programs of the host reach VMs as NAME.banger, at any port and without -p:
a proxy that speaks SOCKS 5 (let it resolve the names: socks5h) and HTTP, both on
one port. It prints its address and runs until it is interrupted.

It leads to VMs and nowhere else. Whoever reaches its address reaches the VMs
through it: it is of this host alone unless you name another address.

EXAMPLE
  banger proxy &
  curl -x socks5h://127.0.0.1:1080 http://web.banger:8000/
  curl -x http://127.0.0.1:1080 http://web.banger:8000/`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := listenAddress(listen)
			if err != nil {
				return err
			}
			if !at.Addr().IsLoopback() {
				fmt.Fprintf(os.Stderr, "banger: %v is not of this host alone: whoever reaches it reaches your VMs\n", at)
			}
			return runProxy(at)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:"+defaultProxyPort, "take connections at this `ADDRESS`: [IP:]PORT, on 127.0.0.1 if no IP is given; port 0 is a free one")
	return cmd
}

// listenAddress reads what --listen takes. That an address is not the host's
// own must be seen in it: an empty one is not taken for all.
func listenAddress(text string) (netip.AddrPort, error) {
	bad := func(reason string) (netip.AddrPort, error) {
		return netip.AddrPort{}, usagef("--listen %q: %s", text, reason).WithHint("it takes [IP:]PORT, for example 1080, 127.0.0.1:0 or [::1]:1080")
	}
	host, port := "127.0.0.1", text
	if strings.Contains(text, ":") {
		var err error
		if host, port, err = net.SplitHostPort(text); err != nil {
			return bad("it is no address with a port")
		}
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return bad(fmt.Sprintf("%q is no IP address", host))
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return bad(fmt.Sprintf("%q is no port", port))
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// runProxy shows what a proxy says until the user ends it.
func runProxy(at netip.AddrPort) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	client, err := api.Start()
	if err != nil {
		return err
	}
	p := newProgress(os.Stderr)
	defer p.end()
	return interrupted(ctx, client.Call(ctx, api.MethodProxy, api.ProxyParams{Listen: at.String()}, nil, &api.None{}, func(e api.Event) {
		if e.Listen != "" {
			fmt.Println(escape(e.Listen))
			return
		}
		p.event(e)
	}, nil))
}
