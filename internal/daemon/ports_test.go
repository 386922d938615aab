package daemon

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/usernet"
	"banger/internal/vm"
)

// freePort is a port of the host that nobody has.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func isOpen(port int) bool {
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err == nil {
		c.Close()
	}
	return err == nil
}

// ports are what the daemon says a VM has, as -p takes them.
func (w *world) ports(name string) (list []string) {
	w.t.Helper()
	var out api.Ports
	w.must(api.MethodPorts, api.PortParams{Name: name}, &out)
	for _, p := range out.Ports {
		text := fmt.Sprintf("%s:%d", net.JoinHostPort(p.HostAddr, fmt.Sprint(p.HostPort)), p.GuestPort)
		if p.Protocol == "udp" {
			text += "/udp"
		}
		list = append(list, strings.TrimPrefix(text, "127.0.0.1:"))
	}
	return list
}

func (w *world) wantPorts(when, name string, want ...string) {
	w.t.Helper()
	if got := w.ports(name); !slices.Equal(got, want) {
		w.t.Errorf("%s: the ports are %q, want %q", when, got, want)
	}
}

// Ports are part of the VM: what changes while it runs is there at its next
// start, and what changes at rest, too.
func TestPortsStay(t *testing.T) {
	w := newWorld(t, 0)
	a, b, c := freePort(t), freePort(t), freePort(t)
	first, second, third := fmt.Sprintf("%d:80", a), fmt.Sprintf("%d:81", b), fmt.Sprintf("%d:5353/udp", c)
	change := func(method, name string, ports ...string) error {
		return w.call(method, api.PortParams{Name: name, Ports: ports}, nil)
	}
	w.create("web", banger.Spec{Ports: []string{first, "0:22"}})
	w.wantPorts("made", "web", first, "0:22")
	w.do(api.MethodStart, "web")
	running := w.ports("web")
	if len(running) != 2 || running[0] != first || running[1] == "0:22" {
		t.Errorf("started: %q", running)
	}
	if err := change(api.MethodPortAdd, "web", second, third); err != nil {
		t.Fatal(err)
	}
	w.wantPorts("added", "web", append(running, second, third)...)
	if !isOpen(a) || !isOpen(b) {
		t.Error("they are not open")
	}
	// All or none.
	wantCode(t, change(api.MethodPortAdd, "web", "0:1", second), banger.CodeConflict, "this VM has it already")
	wantCode(t, change(api.MethodPortRm, "web", second, "1:1"), banger.CodeNotFound)
	wantCode(t, change(api.MethodPortAdd, "web", "0:1", "1"), banger.CodeUsage)
	w.wantPorts("refused", "web", append(running, second, third)...)
	if err := change(api.MethodPortRm, "web", first, running[1]); err != nil {
		t.Fatal(err)
	}
	w.wantPorts("removed", "web", second, third)
	if isOpen(a) {
		t.Error("it is still open")
	}
	w.do(api.MethodStop, "web")
	if isOpen(b) {
		t.Error("it is open with the VM at rest")
	}
	w.wantPorts("stopped", "web", second, third)
	w.killDaemon()
	w.wantPorts("with the next daemon", "web", second, third)

	wantCode(t, change(api.MethodPortAdd, "web", "0:1", second), banger.CodeConflict, "this VM has it already")
	wantCode(t, change(api.MethodPortRm, "web", third, third), banger.CodeNotFound)
	wantCode(t, change(api.MethodPortAdd, "none", first), banger.CodeNotFound)
	if err := change(api.MethodPortRm, "web", third); err != nil {
		t.Fatal(err)
	}
	if err := change(api.MethodPortAdd, "web", first, "0:23"); err != nil {
		t.Fatal(err)
	}
	w.wantPorts("changed at rest", "web", second, first, "0:23")
	w.atRest("web")

	// One that is taken is an error with the name of who has it, not before
	// the start.
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", a))
	if err != nil {
		t.Fatal(err)
	}
	err = w.call(api.MethodStart, api.VMParams{Name: "web"}, nil)
	wantCode(t, err, banger.CodeConflict, fmt.Sprintf("port 127.0.0.1:%d: ", a), fmt.Sprintf("(process %d) has it", os.Getpid()))
	l.Close()
	w.do(api.MethodStart, "web")
	if !isOpen(a) || !isOpen(b) {
		t.Error("they are not open at the next start")
	}
	// One that another VM has, by its name; also behind every address.
	w.create("other", banger.Spec{Ports: []string{first}})
	wantCode(t, w.call(api.MethodStart, api.VMParams{Name: "other"}, nil), banger.CodeConflict, fmt.Sprintf("port 127.0.0.1:%d: VM web has it, for its port 80", a))
	w.do(api.MethodRemove, "other")
	w.create("other", banger.Spec{})
	w.do(api.MethodStart, "other")
	err = change(api.MethodPortAdd, "other", "0:1", "0.0.0.0:"+second)
	wantCode(t, err, banger.CodeConflict, fmt.Sprintf("port 0.0.0.0:%d: VM web has it, for its port 81", b))
	if hint := err.(*banger.Error).Hint; !strings.Contains(hint, fmt.Sprintf("`banger ports rm web 127.0.0.1:%d:81`", b)) {
		t.Errorf("the hint is %q", hint)
	}
	w.wantPorts("refused", "other")
	w.must(api.MethodRemove, api.VMParams{Name: "other", Force: true}, nil)
	// What the record leaves open is recorded as such, whatever it was once.
	w.do(api.MethodKill, "web")
	w.wantPorts("killed", "web", second, first, "0:23")
	if v := w.do(api.MethodInspect, "web"); len(v.Ports) != 0 {
		t.Errorf("at rest, open are %v", v.Ports)
	}

	many := []string{}
	for i := range usernet.MaxForwards - 3 {
		many = append(many, fmt.Sprintf("0:%d", i+1))
	}
	if err := change(api.MethodPortAdd, "web", many...); err != nil {
		t.Error(err)
	}
	wantCode(t, change(api.MethodPortAdd, "web", "0:1"), banger.CodeUsage, "256 ports already")
	w.do(api.MethodStart, "web")
	wantCode(t, change(api.MethodPortAdd, "web", "0:1"), banger.CodeUsage, "256 ports already")
	w.must(api.MethodRemove, api.VMParams{Name: "web", Force: true}, nil)
	w.atRest()
	if err := w.call(api.MethodCreate, api.CreateParams{Name: "two", Spec: banger.Spec{Ports: []string{first, first}}, Prepared: w.prep}, nil); banger.CodeOf(err) != banger.CodeConflict {
		t.Errorf("one port twice: %v", err)
	}
}

func TestJoinListeners(t *testing.T) {
	a, err := usernet.AddressesOf(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		port, local string // one port of the host's, one listener: "tcp ADDR:PORT"
		reach       api.Reach
		listening   bool
	}{
		{"1:80", "tcp 0.0.0.0:80", api.ReachPort, true},
		{"1:80", "tcp [::]:80", api.ReachPort, true},
		{"[::1]:1:80", "tcp 0.0.0.0:80", api.ReachPort, true},
		{"1:80", fmt.Sprintf("tcp %s:80", a.IPv4.Addr()), api.ReachPort, true},
		{"1:80", fmt.Sprintf("tcp [%s]:80", a.IPv6.Addr()), api.ReachPort, true},
		{"1:80", "tcp 0.0.0.0:81", api.ReachPort, false},
		{"1:80", "udp 0.0.0.0:80", api.ReachPort, false},
		{"1:80", "tcp 127.0.0.1:80", api.ReachLoopback, false},
		{"1:80", "tcp 127.0.0.53:80", api.ReachLoopback, false},
		{"1:80", "tcp [::1]:80", api.ReachLoopback, false},
		{"1:80", "tcp 172.17.0.1:80", api.ReachOther, false},
		{"1:80", fmt.Sprintf("tcp %s:80", a.Gateway4), api.ReachOther, false},
		{"1:53/udp", "udp 0.0.0.0:53", api.ReachPort, true},
		{"1:53/udp", "udp [::]:53", api.ReachPort, true},
		{"1:53/udp", fmt.Sprintf("udp [%s]:53", a.IPv6.Addr()), api.ReachPort, false},
		{"[::1]:1:53/udp", "udp 0.0.0.0:53", api.ReachPort, false},
		{"[::1]:1:53/udp", "udp [::]:53", api.ReachPort, true},
		{"[::1]:1:53/udp", fmt.Sprintf("udp [%s]:53", a.IPv6.Addr()), api.ReachPort, true},
	} {
		list, err := parsePorts([]string{c.port})
		if err != nil {
			t.Fatal(err)
		}
		proto, local, _ := strings.Cut(c.local, " ")
		at := netip.MustParseAddrPort(local)
		out := joinListeners(list, a, []banger.Listener{{Protocol: proto, Addr: at.Addr(), Port: at.Port()}})
		if l := out.Listeners[0]; l.Reach != c.reach || l.Forwarded != c.listening || *out.Ports[0].Listening != c.listening {
			t.Errorf("%s and %s: %+v, listening %v", c.port, c.local, l, *out.Ports[0].Listening)
		}
	}
}

// What the guest says stands beside what leads to it.
func TestPortsListed(t *testing.T) {
	w := newWorld(t, 0)
	w.create("web", banger.Spec{Ports: []string{"0:80", "0:81"}})
	list := func() (out api.Ports) {
		t.Helper()
		w.must(api.MethodPorts, api.PortParams{Name: "web"}, &out)
		return out
	}
	if out := list(); out.Listeners != nil || out.Ports[0].Listening != nil {
		t.Errorf("at rest: %+v", out)
	}
	w.do(api.MethodStart, "web")
	out := list()
	if len(out.Listeners) != len(fakeSockets) || out.More || out.Unknown != "" || !*out.Ports[0].Listening || *out.Ports[1].Listening {
		t.Fatalf("%+v", out)
	}
	if l := out.Listeners[0]; l.Process != "\x1b[2Jweb" || l.PID != 7 || !l.Forwarded {
		t.Errorf("%+v", l)
	}
	w.do(api.MethodPause, "web")
	if out := list(); out.Listeners != nil || len(out.Ports) != 2 || out.Ports[0].Listening != nil || !strings.Contains(out.Unknown, "paused") {
		t.Errorf("paused: %+v", out)
	}
	w.must(api.MethodRemove, api.VMParams{Name: "web", Force: true}, nil)
	w.atRest()
}

// Whatever is killed in the middle of a change, the record has the ports of
// before or of after it, and those are what is open.
func TestPortsKilled(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	w := newWorld(t, 0)
	v := w.create("web", banger.Spec{})
	recorded := func() string {
		rec, _, err := vm.Load(w.s, v.ID)
		if err != nil {
			t.Fatal(err)
		}
		list, err := parsePorts(rec.Spec.Ports)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(portTexts(list), " ")
	}
	port := fmt.Sprintf("127.0.0.1:%d:80", freePort(t))
	rounds, outcomes := 60, map[string]int{}
	if testing.Short() {
		rounds = 6
	}
	for round := range rounds {
		runs, victim := rng.IntN(3) > 0, "serve"
		if runs {
			w.do(api.MethodStart, "web")
			victim = []string{"serve", "supervise"}[rng.IntN(2)]
		} else {
			w.do(api.MethodStop, "web")
		}
		before := recorded()
		method, after := api.MethodPortAdd, port
		if before == port {
			method, after = api.MethodPortRm, ""
		}
		ctx, cancel := context.WithCancel(t.Context())
		over := make(chan error)
		go func() {
			_, err := w.callWith(ctx, method, api.PortParams{Name: "web", Ports: []string{port}}, nil, nil)
			over <- err
		}()
		time.Sleep(time.Duration(rng.IntN(4000)) * time.Microsecond)
		for _, pid := range w.processes(victim) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		err := <-over
		cancel()
		if runs && victim == "supervise" {
			w.until("the end of the VM is seen", func() bool { return vm.Rests(w.do(api.MethodInspect, "web").State) })
		}
		// A supervisor that was asked goes on without the daemon.
		var now string
		w.until("record and ports are one", func() bool {
			now = recorded()
			return strings.Join(w.ports("web"), " ") == strings.TrimPrefix(now, "127.0.0.1:") && recorded() == now
		})
		if now != before && now != after || err == nil && now != after {
			t.Fatalf("round %d, %s killed: %s ended with %v, the ports are %q, before %q", round, victim, method, err, now, before)
		}
		outcomes[fmt.Sprintf("%s, runs %v: done %v, told %v", victim, runs, now == after, err == nil)]++
	}
	t.Logf("%v", outcomes)
	w.do(api.MethodStop, "web")
	w.killDaemon()
	w.atRest("web")
	// The check on leftovers sees one, and the next start of the daemon
	// removes it.
	w.killDaemon()
	half := filepath.Join(w.s.VM(v.ID), "."+store.VMRecord+".1")
	if err := os.WriteFile(half, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w.atRest("web")
}
