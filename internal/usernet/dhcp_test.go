package usernet

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A real client gets all it needs.
func TestDHCPClient(t *testing.T) {
	w := newWorld(t)
	if _, err := exec.LookPath("busybox"); err != nil {
		missing(t, "busybox is not installed")
	}
	w.wan.serveEcho(t, "0.0.0.0:80")
	g := newKernelGuest(t, newNetwork(t, "one", 7, "", func(c *Config) { c.MTU = 1400 }))
	script := filepath.Join(t.TempDir(), "script")
	text := "#!/bin/sh\n[ $1 = bound ] || exit 0\nset -e\n" +
		"ip addr add $ip/$mask dev $interface\nip route add default via $router\nip link set $interface mtu $mtu\n" +
		"echo $ip $mask $router $dns $domain $hostname $mtu $lease >" + script + ".out\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := g.run("busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "5", "-T", "1", "-s", script, "-O", "mtu")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got, err := os.ReadFile(script + ".out")
	if want := "10.87.0.30 30 10.87.0.29 10.87.0.29 banger one 1400 86400"; err != nil || strings.TrimSpace(string(got)) != want {
		t.Errorf("the lease is %q, %v; want %q\n%s", got, err, want, out)
	}
	c, err := g.dial("tcp", inet4+":80")
	if err != nil {
		t.Fatal(err)
	}
	exchangeBytes(t, c, 1<<20)
}
