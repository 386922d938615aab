package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"banger/internal/usernet"
	"banger/internal/wire"
)

// usernetArg makes the test program the network of one VM and nothing else, so
// that it is measured as a process like the others.
const usernetArg = "bench-usernet"

// A user network is one of the contenders: what its guest is told, and how
// QEMU gets it. Each leads the host's port 7100 to the guest's 7000.
type userNetwork struct {
	name  string
	guest wire.Network
	// start begins what runs beside QEMU and returns QEMU's -netdev.
	start func(t *testing.T, dir string) string
}

var hostPort, guestPort uint16 = 7100, 7000

func userNetworks(t *testing.T) []userNetwork {
	t.Helper()
	ours, err := usernet.AddressesOf(1)
	if err != nil {
		t.Fatal(err)
	}
	stream := func(path string) string {
		return "stream,id=net,server=off,addr.type=unix,addr.path=" + path
	}
	socket := func(dir string) string { return filepath.Join(dir, "net.sock") }
	all := []userNetwork{
		{"banger usernet", wire.Network{MAC: ours.MAC.String(), MTU: usernet.DefaultMTU,
			Addresses: []string{ours.IPv4.String()}, Gateways: []string{ours.Gateway4.String()}},
			func(t *testing.T, dir string) string {
				background(t, "ready", "/proc/self/exe", usernetArg, socket(dir))
				return stream(socket(dir))
			}},
		{"QEMU -netdev user", wire.Network{MAC: ours.MAC.String(), MTU: 1500,
			Addresses: []string{"10.0.2.15/24"}, Gateways: []string{"10.0.2.2"}},
			func(t *testing.T, dir string) string {
				return fmt.Sprintf("user,id=net,hostfwd=tcp:127.0.0.1:%d-:%d", hostPort, guestPort)
			}},
		// passt gives its guest the host's own address.
		{"passt", wire.Network{MAC: ours.MAC.String(), MTU: usernet.DefaultMTU,
			Addresses: []string{"203.0.113.2/24"}, Gateways: []string{"203.0.113.1"}},
			func(t *testing.T, dir string) string {
				path := socket(dir)
				background(t, "", "passt", "--foreground", "--runas", "0", "--stderr", "--quiet", "--ipv4-only", "--one-off",
					"--no-dhcp-dns", "--no-dhcp-search", "--socket", path, "--tcp-ports", fmt.Sprintf("127.0.0.1/%d:%d", hostPort, guestPort))
				await(t, "passt listens", func() bool { _, err := os.Stat(path); return err == nil })
				return stream(path)
			}},
	}
	if _, err := exec.LookPath("passt"); err != nil {
		fmt.Println("MISSING: passt (Debian's package of that name)")
		all = all[:2]
	}
	return all
}

// runUsernet is the program that usernetArg stands for.
func runUsernet(path string) error {
	a, err := usernet.AddressesOf(1)
	if err != nil {
		return err
	}
	policy, err := usernet.ParsePolicy("public")
	if err != nil {
		return err
	}
	n, err := usernet.New(usernet.Config{Name: "bench", Addresses: a, Policy: policy})
	if err != nil {
		return err
	}
	if _, err := n.Forward(usernet.Forward{Proto: "tcp", Host: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), hostPort), Guest: guestPort}); err != nil {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if err := n.Attach(c); err != nil {
			return err
		}
	}
}

// compareNetwork moves bytes and makes connections between one guest and a
// host, through our network and those of others.
func compareNetwork(t *testing.T) {
	prog, err := os.ReadFile(world.prog)
	if err != nil {
		t.Fatal(err)
	}
	only, err := layerOf(file("prog", string(prog), 0o755))
	if err != nil {
		t.Fatal(err)
	}
	img, err := imageOf(gz, v1.Config{Entrypoint: []string{"/prog"}}, only)
	if err != nil {
		t.Fatal(err)
	}
	if err := world.registry.push("bench-network:latest", img); err != nil {
		t.Fatal(err)
	}
	ref := world.registry.addr + "/bench-network:latest"
	measure(t, filepath.Join(world.bin, "banger"), "image", "pull", ref)
	guests := map[string]bare{}
	for _, c := range userNetworks(t) {
		guests[c.name] = newBare(t, ref, &c.guest)
	}
	runInside(t, "TestCompareNetworkInside", inside{Home: t.TempDir(), Guests: guests})
}

// TestCompareNetworkInside is the part of TestCompare that needs namespaces.
func TestCompareNetworkInside(t *testing.T) {
	in, _ := setUpInside(t)
	all := userNetworks(t)
	const rounds = 3
	type row struct {
		name   string
		server string // "" is far, else the guest is asked from the host
		args   []string
		unit   string
		value  func(text string) float64
	}
	rate := func(text string) float64 {
		var tr transferred
		decode(t, text, &tr)
		if !tr.Equal {
			t.Fatalf("not all came: %s", text)
		}
		return float64(tr.Bytes) / tr.Seconds / 1e6
	}
	field := func(name string) func(string) float64 {
		return func(text string) float64 {
			var m map[string]float64
			decode(t, text, &m)
			return m[name]
		}
	}
	const size = "134217728"
	host := fmt.Sprintf("127.0.0.1:%d", hostPort)
	rows := []row{
		{"TCP from the outside to the guest", "", []string{"down", farNet, size, "0"}, "MB/s", rate},
		{"TCP from the guest to the outside", "", []string{"up", farNet, size, "0"}, "MB/s", rate},
		{"round trip, a byte", "", []string{"rtt", farNet, "2000"}, "µs", field("micros")},
		{"new connections from the guest, one after another", "", []string{"connect", farNet, "1000", "1"}, "a second", field("per_second")},
		{"the same, eight at a time", "", []string{"connect", farNet, "2000", "8"}, "a second", field("per_second")},
		{"through a port of the host: from the guest", host, []string{"down", host, size, "0"}, "MB/s", rate},
		{"through a port of the host: to the guest", host, []string{"up", host, size, "0"}, "MB/s", rate},
		{"through a port of the host: new connections", host, []string{"connect", host, "1000", "8"}, "a second", field("per_second")},
	}
	figures := make([]map[string][]float64, len(rows))
	for i := range figures {
		figures[i] = map[string][]float64{}
	}
	for round := range rounds {
		for i := range all {
			c := all[(i+round)%len(all)] // nobody is always first
			t.Run(c.name, func(t *testing.T) {
				netdev := c.start(t, t.TempDir())
				g, stop := in.Guests[c.name].start(t, "-netdev", netdev,
					"-device", fmt.Sprintf("virtio-net-device,netdev=net,mac=%s,host_mtu=%d", c.guest.MAC, c.guest.MTU))
				defer stop()
				server := g.exec("/prog", "net", "serve", fmt.Sprintf(":%d", guestPort))
				defer server.Close()
				if f, err := wire.ReadFrame(server, nil); err != nil || !strings.Contains(string(f.Payload), "serving") {
					t.Fatalf("the guest's server: %q, %v", f.Payload, err)
				}
				for i, r := range rows {
					var text string
					if r.server == "" {
						text = g.output(append([]string{"/prog", "net"}, r.args...)...)
					} else {
						var err error
						if text, err = try(t, append([]string{in.Prog, "net"}, r.args...)...); err != nil {
							if c.name == all[0].name {
								t.Fatalf("%s: %v\n%s", r.name, err, text)
							}
							t.Logf("%s: %v: %s", r.name, err, text) // QEMU's resets some of many at once
							continue
						}
					}
					figures[i][c.name] = append(figures[i][c.name], r.value(text))
				}
			})
		}
	}
	fmt.Printf("\nnetwork, one guest, medians of %d in turn\n%-52s", rounds, "")
	for _, c := range all {
		fmt.Printf(" %18s", c.name)
	}
	fmt.Println()
	for i, r := range rows {
		fmt.Printf("%-41s %10s", r.name, r.unit)
		for _, c := range all {
			v := figures[i][c.name]
			if len(v) == 0 {
				fmt.Printf(" %18s", "failed")
				continue
			}
			slices.Sort(v)
			fmt.Printf(" %18.1f", v[len(v)/2])
		}
		fmt.Println()
	}
}

// output runs a command to its end and returns what it printed.
func (g *bareGuest) output(args ...string) string {
	g.t.Helper()
	s := g.exec(args...)
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(3 * time.Minute))
	var stdout, stderr []byte
	for {
		f, err := wire.ReadFrame(s, nil)
		if err != nil {
			g.t.Fatalf("%q: %v\n%s", args, err, stderr)
		}
		switch f.Type {
		case wire.FrameStdout:
			stdout = append(stdout, f.Payload...)
		case wire.FrameStderr:
			stderr = append(stderr, f.Payload...)
		case wire.FrameExit:
			var exit wire.Exit
			if err := json.Unmarshal(f.Payload, &exit); err != nil || exit.Code != 0 {
				g.t.Fatalf("%q: %+v\n%s", args, exit, stderr)
			}
			return string(stdout)
		}
	}
}
