package usernet

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Every test here runs in a network namespace that the test program made for
// itself, with no way out of it: nothing that is sent reaches a real network.
// insideEnv tells the copy of the program that runs in there.
const insideEnv = "USERNET_TEST_NAMESPACE"

func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) == "" {
		os.Exit(runInside())
	}
	if os.Getenv(insideEnv) == "yes" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			os.Setenv(insideEnv, fmt.Sprintf("ip: %v %s", err, out))
		}
		// As distributions have it: everybody may ping.
		if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(m.Run())
}

// runInside runs this program again in a namespace, or without one where that
// cannot be, and says why.
func runInside() int {
	run := func(attr *syscall.SysProcAttr, value string) (int, error) {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), insideEnv+"="+value)
		cmd.SysProcAttr = attr
		err := cmd.Run()
		var exit *exec.ExitError
		if err == nil || errors.As(err, &exit) {
			return cmd.ProcessState.ExitCode(), nil
		}
		return 1, err
	}
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	code, err := run(attr, "yes")
	if err != nil {
		code, _ = run(nil, "a network namespace: "+err.Error())
	}
	return code
}

// missing skips the test for want of something, loudly, or fails it in CI.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("MISSING: %s", what)
	}
	t.Skipf("MISSING: %s", what)
}

// needNamespace lets only tests through that are in a namespace of their own.
func needNamespace(t testing.TB) {
	t.Helper()
	if why := os.Getenv(insideEnv); why != "yes" {
		missing(t, why)
	}
}

func ip(t testing.TB, line string, args ...any) {
	t.Helper()
	line = fmt.Sprintf(line, args...)
	if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", line, err, out)
	}
}

// A place is a network namespace beside the test's own.
type place struct {
	path string
	do   chan func()
}

// newPlace makes one; it lasts as long as the test.
func newPlace(t testing.TB) *place {
	t.Helper()
	p := &place{do: make(chan func())}
	ready := make(chan error)
	var start func()
	start = func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == os.Getpid() {
			// What is read of /proc/self is the first thread's: it stays.
			go start()
			<-t.Context().Done()
			return
		}
		err := unix.Unshare(unix.CLONE_NEWNET)
		p.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- err
		for f := range p.do {
			f()
		}
	}
	go start()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(p.do) })
	return p
}

// in runs f in the namespace. Sockets made there stay there.
func (p *place) in(f func()) {
	done := make(chan struct{})
	p.do <- func() { defer close(done); f() }
	<-done
}

func (p *place) ip(t testing.TB, line string, args ...any) {
	t.Helper()
	p.in(func() {
		line = fmt.Sprintf(line, args...)
		cmd := exec.Command("ip", strings.Fields(line)...)
		// A child is made by this very thread, and so inside.
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("ip %s: %v: %s", line, err, out)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
}

// Addresses of the test's world.
const (
	lanHost4   = "192.168.77.1"
	lanHost6   = "fd77::1"
	lanPeer4   = "192.168.77.9"
	lanPeer6   = "fd77::9"
	onLink6    = "2001:db8:77::9" // a public address that is on the host's link
	wanHost4   = "203.0.113.2"
	wanHost6   = "2001:db8:113::2"
	inet4      = "198.51.100.7" // stands for the Internet
	inet6      = "2001:db8:100::7"
	otherInet4 = "198.51.100.8"
	farPrivate = "10.1.2.3" // beyond the gateway
)

// A world is the host's network as the tests make it:
//
//	        the test's own namespace = the host
//	   lan (192.168.77.1)         wan (203.0.113.2, default route)
//	        |                             |
//	lan place: 192.168.77.9         wan place: everything else
type world struct {
	lan, wan *place
	seen     *recorder // every IP packet on both wires, and on lo
}

func newWorld(t testing.TB) *world {
	t.Helper()
	needNamespace(t)
	w := &world{lan: newPlace(t), wan: newPlace(t)}
	for _, link := range []struct {
		name string
		to   *place
	}{{"lan", w.lan}, {"wan", w.wan}} {
		ip(t, "link add %s type veth peer name far netns %s", link.name, link.to.path)
		t.Cleanup(func() { exec.Command("ip", "link", "del", link.name).Run() })
		ip(t, "link set %s up", link.name)
		link.to.ip(t, "link set lo up")
		link.to.ip(t, "link set far up")
	}
	ip(t, "addr add %s/24 dev lan", lanHost4)
	ip(t, "addr add %s/64 dev lan nodad", lanHost6)
	ip(t, "addr add 2001:db8:77::1/64 dev lan nodad")
	ip(t, "addr add %s/24 dev wan", wanHost4)
	ip(t, "addr add %s/64 dev wan nodad", wanHost6)
	ip(t, "route add default via 203.0.113.1")
	ip(t, "-6 route add default via 2001:db8:113::1")
	w.lan.ip(t, "addr add %s/24 dev far", lanPeer4)
	w.lan.ip(t, "addr add %s/64 dev far nodad", lanPeer6)
	w.lan.ip(t, "addr add %s/64 dev far nodad", onLink6)
	w.wan.ip(t, "addr add 203.0.113.1/24 dev far")
	w.wan.ip(t, "addr add 2001:db8:113::1/64 dev far nodad")
	for _, a := range []string{inet4, otherInet4, farPrivate, "169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "172.16.5.5", "10.87.9.2"} {
		w.wan.ip(t, "addr add %s/32 dev lo", a)
	}
	for _, a := range []string{inet6, "fd00:ec2::254", "fc00::5", "64:ff9b::a9fe:a9fe", "64:ff9b::c0a8:4d09", "2002:c0a8:4d09::1", "64:ff9b:1::5"} {
		w.wan.ip(t, "addr add %s/128 dev lo nodad", a)
	}
	w.seen = newRecorder(t, "lan", "wan", "lo")
	return w
}

// A recorder has seen every IP packet that the host sent.
type recorder struct {
	mu   sync.Mutex
	dsts map[netip.Addr]int
}

func newRecorder(t testing.TB, links ...string) *recorder {
	r := &recorder{dsts: make(map[netip.Addr]int)}
	for _, name := range links {
		link, err := net.InterfaceByName(name)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Index}); err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "packets")
		raw, err := f.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		go func() {
			buf := make([]byte, 64<<10)
			for {
				var n int
				var from unix.Sockaddr
				var err error
				if raw.Read(func(fd uintptr) bool {
					n, from, err = unix.Recvfrom(int(fd), buf, 0)
					return err != unix.EAGAIN
				}) != nil || err != nil {
					return
				}
				if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
					r.packet(buf[:n])
				}
			}
		}()
	}
	return r
}

func htons(n uint16) uint16 { return n<<8 | n>>8 }

func (r *recorder) packet(b []byte) {
	var dst netip.Addr
	switch {
	case len(b) >= ipv4Bytes && b[0]>>4 == 4:
		dst = netip.AddrFrom4([4]byte(b[16:]))
	case len(b) >= ipv6Bytes && b[0]>>4 == 6:
		if b[6] == protoICMPv6 && len(b) > ipv6Bytes && b[ipv6Bytes] >= 133 && b[ipv6Bytes] <= 137 || b[6] == 0 {
			return // the host's own neighbour discovery
		}
		dst = netip.AddrFrom16([16]byte(b[24:]))
	default:
		return
	}
	r.mu.Lock()
	r.dsts[dst]++
	r.mu.Unlock()
}

// sent is how many packets went to an address.
func (r *recorder) sent(a netip.Addr) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dsts[a]
}

// strangers are the addresses that packets went to, but for the ones named.
func (r *recorder) strangers(but ...string) (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
next:
	for a, n := range r.dsts {
		for _, b := range but {
			if netip.MustParseAddr(b) == a {
				continue next
			}
		}
		out = append(out, fmt.Sprintf("%v (%d packets)", a, n))
	}
	return out
}

// serveEcho listens on TCP in a place and sends back what comes.
func (p *place) serveEcho(t testing.TB, address string) {
	t.Helper()
	p.serve(t, address, func(c *net.TCPConn) {
		buf := make([]byte, 64<<10)
		for {
			n, err := c.Read(buf)
			if n > 0 {
				if _, err := c.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				_ = c.CloseWrite()
				return
			}
		}
	})
}

// serve listens on TCP in a place, nil being the host.
func (p *place) serve(t testing.TB, address string, f func(*net.TCPConn)) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	listen := func() { l, err = net.Listen("tcp", address) }
	if p == nil {
		listen()
	} else {
		p.in(listen)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c.(*net.TCPConn))
			}()
		}
	}()
	return l
}

// serveUDP answers each datagram with "re: " and itself.
func (p *place) serveUDP(t testing.TB, address string) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	var err error
	listen := func() { c, err = net.ListenPacket("udp", address) }
	if p == nil {
		listen()
	} else {
		p.in(listen)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(bytes.Join([][]byte{[]byte("re: "), buf[:n]}, nil), from)
		}
	}()
	return c
}

// seeded is randomness that a failure can be replayed with.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func fill(b []byte, r *rand.Rand) {
	for i := range b {
		b[i] = byte(r.Uint32())
	}
}
