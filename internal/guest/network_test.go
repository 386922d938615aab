package guest

import (
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

// testNetwork is what a host gives its guests.
func testNetwork() *wire.Network {
	return &wire.Network{
		MAC: "02:62:61:00:00:07", MTU: 65520,
		Addresses: []string{"10.87.0.30/30", "fd62:616e:6765:7::2/64"},
		Gateways:  []string{"10.87.0.29", "fd62:616e:6765:7::1"},
		DNS:       []string{"10.87.0.29", "fd62:616e:6765:7::1"},
		Search:    []string{"banger", "corp.example"},
	}
}

func TestWithOwnName(t *testing.T) {
	const standard = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	const line = "10.87.0.2\tweb.banger web # banger\n"
	for hosts, want := range map[string]string{
		"":                                    standard + line,
		" \n":                                 standard + line,
		"127.0.0.1 localhost\n":               "127.0.0.1 localhost\n" + line,
		"127.0.0.1 localhost":                 "127.0.0.1 localhost\n" + line,
		"127.0.0.1 localhost WEB\n":           "127.0.0.1 localhost WEB\n",
		"127.0.0.1 localhost # web\n":         "127.0.0.1 localhost # web\n" + line,
		"web\n":                               "web\n" + line,
		"10.87.0.9 web # banger\n1.1.1.1 x\n": "1.1.1.1 x\n" + line,
		line:                                  standard[:0] + line,
	} {
		got := withOwnName(hosts, "web", "10.87.0.2", "web.banger web")
		if got != want {
			t.Errorf("%q became\n%q, want\n%q", hosts, got, want)
		}
		if again := withOwnName(got, "web", "10.87.0.2", "web.banger web"); again != got {
			t.Errorf("%q, done again, became %q", got, again)
		}
	}
	if got := withOwnName("1.1.1.1 x\n", "localhost", "127.0.1.1", "localhost"); got != "1.1.1.1 x\n" {
		t.Errorf("a guest without a name: %q", got)
	}
}

func TestHostsAddress(t *testing.T) {
	for _, row := range []struct {
		name           string
		network        *wire.Network
		address, names string
	}{
		{"web", nil, "127.0.1.1", "web"},
		{"web", testNetwork(), "10.87.0.30", "web.banger web"},
		{"web.example.com", testNetwork(), "10.87.0.30", "web.example.com"},
		{"web", &wire.Network{Addresses: []string{"10.0.0.2/8"}}, "10.0.0.2", "web"},
	} {
		if address, names := hostsAddress(row.name, row.network); address != row.address || names != row.names {
			t.Errorf("%s: %q %q", row.name, address, names)
		}
	}
}

// A card is found by its MAC and is then what ip(8) shows.
func TestConfigureCard(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, "a network namespace needs root")
	}
	onThread(func() {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		ip := func(line string) string {
			out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput()
			if err != nil {
				t.Errorf("ip %s: %v %s", line, err, out)
			}
			return string(out)
		}
		n := testNetwork()
		ip("link add other type veth peer name card")
		ip("link set card address " + n.MAC)
		ip("link set other up")
		for range 2 { // a second time changes nothing
			link, err := findCard(n.MAC, time.Second)
			if err != nil || link.Name != "card" {
				t.Errorf("found %q, %v", link.Name, err)
				return
			}
			if err := configureCard(link, n); err != nil {
				t.Error(err)
				return
			}
		}
		for line, wants := range map[string][]string{
			"link show card": {"mtu 65520", "UP"},
			"addr show card": {"inet 10.87.0.30/30", "inet6 fd62:616e:6765:7::2/64 scope global nodad"},
			"route":          {"default via 10.87.0.29 dev card", "10.87.0.28/30 dev card"},
			"-6 route":       {"default via fd62:616e:6765:7::1 dev card"},
		} {
			got := ip(line)
			for _, want := range wants {
				if !strings.Contains(got, want) {
					t.Errorf("ip %s has no %q:\n%s", line, want, got)
				}
			}
		}
		if _, err := findCard("02:62:61:00:00:08", 20*time.Millisecond); err == nil || !strings.Contains(err.Error(), "virtio_net") {
			t.Errorf("a card that is not there: %v", err)
		}
		for what, change := range map[string]func(*wire.Network){
			"no address":             func(n *wire.Network) { n.Addresses = []string{"10.87.0.30"} },
			"no gateway":             func(n *wire.Network) { n.Gateways = []string{"x"} },
			"a gateway out of reach": func(n *wire.Network) { n.Gateways = []string{"192.0.2.1"} },
			"an MTU too large":       func(n *wire.Network) { n.MTU = 1 << 20 },
		} {
			bad := testNetwork()
			change(bad)
			link, err := net.InterfaceByName("card")
			if err != nil {
				t.Error(err)
				return
			}
			if err := configureCard(*link, bad); err == nil {
				t.Errorf("%s: no error", what)
			}
		}
	})
}

// onThread runs f in a thread of its own, which ends with it. It is not the
// process's first one: that cannot end, and its namespaces are what everybody
// finds at /proc/self.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked but where another has to do it
		if unix.Gettid() == os.Getpid() {
			onThread(f)
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-done
}
