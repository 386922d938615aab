package usernet

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A kernelGuest is Linux itself at the other end of the port: a TAP device in
// a namespace of its own takes the place of the virtual network card.
type kernelGuest struct {
	*place
	t testing.TB
	n *Network
}

const maxTestOutput = 64 << 10

func newKernelGuest(t testing.TB, n *Network) *kernelGuest {
	t.Helper()
	needNamespace(t)
	g := &kernelGuest{newPlace(t), t, n}
	var tap *os.File
	var err error
	g.in(func() { tap, err = openTAP("eth0") })
	if err != nil {
		missing(t, "a TAP device: "+err.Error())
	}
	t.Cleanup(func() { tap.Close() })
	a := n.link.addr
	g.ip(t, "link set lo up")
	g.ip(t, "link set eth0 address %v", a.MAC)
	g.ip(t, "link set eth0 mtu %d", n.link.mtu)
	g.ip(t, "link set eth0 up")
	ours, theirs := socketPair(t)
	t.Cleanup(func() { theirs.Close() })
	if err := n.Attach(ours); err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 4+maxClaimBytes)
		for {
			size, err := tap.Read(buf[4:])
			if err != nil {
				return
			}
			binary.BigEndian.PutUint32(buf, uint32(size))
			if _, err := theirs.Write(buf[:4+size]); err != nil {
				return
			}
		}
	}()
	go func() {
		var head [4]byte
		buf := make([]byte, maxClaimBytes)
		for {
			if _, err := io.ReadFull(theirs, head[:]); err != nil {
				return
			}
			frame := buf[:binary.BigEndian.Uint32(head[:])]
			if _, err := io.ReadFull(theirs, frame); err != nil {
				return
			}
			_, _ = tap.Write(frame)
		}
	}()
	return g
}

func openTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var ifr struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(ifr.name[:], name)
	ifr.flags = unix.IFF_TAP | unix.IFF_NO_PI
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&ifr))); errno != 0 {
		unix.Close(fd)
		return nil, errno
	}
	return os.NewFile(uintptr(fd), "tap"), nil
}

// static gives the guest its addresses as the agent does.
func (g *kernelGuest) static() {
	g.t.Helper()
	a := g.n.link.addr
	g.ip(g.t, "addr add %v dev eth0", a.IPv4)
	g.ip(g.t, "addr add %v dev eth0 nodad", a.IPv6)
	g.ip(g.t, "route add default via %v", a.Gateway4)
	g.ip(g.t, "-6 route add default via %v", a.Gateway6)
}

// run runs a program in the guest's namespace.
func (g *kernelGuest) run(args ...string) (string, error) {
	var out []byte
	var err error
	g.in(func() {
		ctx, cancel := context.WithTimeout(g.t.Context(), 2*promptly)
		defer cancel()
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.WaitDelay = time.Second // a child of its may hold the pipe
		out, err = cmd.CombinedOutput()
	})
	return string(out[:min(len(out), maxTestOutput)]), err
}

func (g *kernelGuest) must(line string, args ...any) string {
	g.t.Helper()
	line = fmt.Sprintf(line, args...)
	out, err := g.run(strings.Fields(line)...)
	if err != nil {
		g.t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

// dial connects from the guest's namespace.
func (g *kernelGuest) dial(network, to string) (c net.Conn, err error) {
	g.in(func() {
		d := net.Dialer{Timeout: promptly}
		c, err = d.DialContext(g.t.Context(), network, to)
	})
	return c, err
}

// Linux asks with ARP and NDP, gets its answers, and reaches the outside.
func TestKernelGuest(t *testing.T) {
	for _, mtu := range []int{minMTU, 1500, maxMTU} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			w := newWorld(t)
			w.wan.serveEcho(t, net.JoinHostPort(inet4, "80"))
			w.wan.serveEcho(t, net.JoinHostPort(inet6, "80"))
			g := newKernelGuest(t, newNetwork(t, "one", 5, "", func(c *Config) { c.MTU = mtu }))
			g.static()
			for _, a := range []string{inet4, inet6, g.n.link.addr.Gateway4.String(), g.n.link.addr.Gateway6.String()} {
				g.must("ping -c 1 -W 5 %s", a)
			}
			for _, a := range []string{inet4, inet6} {
				c, err := g.dial("tcp", net.JoinHostPort(a, "80"))
				if err != nil {
					t.Fatalf("%s: %v", a, err)
				}
				exchangeBytes(t, c, 4<<20)
			}
			// What is not allowed fails at once, and says so.
			if out, err := g.run("ping", "-c", "1", "-W", "5", lanPeer4); err == nil || !strings.Contains(out, "iltered") {
				t.Errorf("ping of the LAN: %v\n%s", err, out)
			}
			if out, err := g.run("ping", "-c", "1", "-W", "5", lanPeer6); err == nil || !strings.Contains(out, "prohibited") {
				t.Errorf("ping of the LAN: %v\n%s", err, out)
			}
			if len(g.n.Log()) == 0 {
				t.Error("nothing in the log")
			}
			if d := g.n.Stats().Dropped; d["malformed"] > 0 || d["source-mac"] > 0 || d["arp"] > 0 {
				t.Errorf("dropped of an honest guest: %v", d)
			}
		})
	}
}
