package usernet

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// bootstrap is what brings a card up in a guest that banger has not booted.
const bootstrap = "../image/guestfiles/banger-network-bootstrap"

// In a mount name space of its own the script sees a kernel command line and a
// resolv.conf of ours.
func TestBootstrap(t *testing.T) {
	w := newWorld(t)
	if os.Getuid() != 0 {
		missing(t, "mounting needs root")
	}
	for _, tool := range []string{"busybox", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing(t, tool+" is not installed")
		}
	}
	w.wan.serveEcho(t, "0.0.0.0:80")
	script, err := filepath.Abs(bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, cmdline, args, fails string
		mtu                        string
		before                     string // what somebody else has done
	}{
		{name: "DHCP", cmdline: "quiet root=/dev/vda", mtu: "1400"},
		{name: "DHCP by name", cmdline: "ip=dhcp", mtu: "1400"},
		{name: "kernel parameter", cmdline: "quiet ip=10.87.0.30::10.87.0.29:255.255.255.252:name:eth0:off:10.87.0.29", mtu: "1500"},
		{name: "kernel parameter, no device", cmdline: "ip=10.87.0.30::10.87.0.29:255.255.255.252::::10.87.0.29 quiet", mtu: "1500"},
		{name: "arguments", args: "10.87.0.30/30 10.87.0.29 10.87.0.29", mtu: "1500"},
		{name: "somebody was here", before: "addr add 10.87.0.30/30 dev eth0", cmdline: "ip=10.0.0.1::10.0.0.2:255.0.0.0", mtu: "1500"},
		{name: "a broken netmask", cmdline: "ip=10.87.0.30::10.87.0.29:255.255.7.0", fails: "netmask"},
		{name: "an address that is none", args: "10.87.0.300/30 10.87.0.29", fails: "does not take the address"},
		{name: "a gateway out of reach", args: "10.87.0.30/30 192.0.2.1", fails: "no route"},
	} {
		t.Run(row.name, func(t *testing.T) {
			n := newNetwork(t, "one", 7, "", func(c *Config) { c.MTU = 1400 })
			g := newKernelGuest(t, n)
			g.ip(t, "link set eth0 down")
			g.ip(t, "link set eth0 mtu 1500")
			if row.before != "" {
				g.ip(t, "link set eth0 up")
				g.ip(t, "%s", row.before)
				g.ip(t, "route add default via 10.87.0.29")
			}
			dir := t.TempDir()
			cmdline, resolv := filepath.Join(dir, "cmdline"), filepath.Join(dir, "resolv.conf")
			for path, text := range map[string]string{cmdline: row.cmdline + "\n", resolv: "# as the image has it\n"} {
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			// sysfs shows the network of whoever mounts it.
			out, err := g.run("unshare", "-m", "sh", "-c",
				"mount -t sysfs sysfs /sys && mount --bind "+cmdline+" /proc/cmdline && mount --bind "+resolv+" /etc/resolv.conf && exec sh "+script+" "+row.args)
			if row.fails != "" {
				if err == nil || !strings.Contains(out, row.fails) {
					t.Fatalf("%v\n%s", err, out)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if got := g.must("ip addr show eth0"); !strings.Contains(got, "10.87.0.30/30") || !strings.Contains(got, "mtu "+row.mtu) {
				t.Errorf("the card:\n%s", got)
			}
			want := "nameserver 10.87.0.29\n"
			if row.before != "" {
				want = "# as the image has it\n"
			}
			if got, err := os.ReadFile(resolv); err != nil || string(got) != want {
				t.Errorf("resolv.conf: %q, %v", got, err)
			}
			c, err := g.dial("tcp", inet4+":80")
			if err != nil {
				t.Fatal(err)
			}
			exchangeBytes(t, c, 64<<10)
		})
	}
}
