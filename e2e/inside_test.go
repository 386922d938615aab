package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// Tests of the network run in a copy of the test program that has a network
// namespace of its own for the host, and beside it one for the Internet. There
// is no way out of the two: nothing that is sent there reaches a real network.
//
//	namespace of the test = the host           namespace far
//	203.0.113.2, 2001:db8:113::2 ------------- 203.0.113.1, 2001:db8:113::1
//	      default routes                       198.51.100.7, 2001:db8:100::7 (far.test)

const (
	insideEnv = "BANGER_E2E_INSIDE" // what the copy has to know, as JSON
	farAddr   = "198.51.100.7"
	farAddr6  = "2001:db8:100::7"
	farName   = "far.test"
	farNet    = farAddr + ":7000" // where `prog net serve` is
	farNet6   = "[" + farAddr6 + "]:7000"
)

// inside is what the copy gets from the test that starts it.
type inside struct {
	Bin, Prog, Home string
	Guests          map[string]bare `json:",omitempty"` // for benchmarks
}

// runInside runs one test of this program in there.
func runInside(t *testing.T, test string, in inside) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "namespaces need root")
	}
	in.Bin, in.Prog = world.bin, world.prog
	data, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^"+test+"$", "-test.v", "-test.timeout", "10m")
	cmd.Env = append(os.Environ(), insideEnv+"="+string(data), "BANGER_HOME="+in.Home)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if os.Getenv("BANGER_BENCH") != "" {
		cmd.Stdout = os.Stdout
	}
	err = cmd.Run()
	t.Logf("%s", out.Bytes())
	if err != nil {
		t.Fatalf("inside: %v", err)
	}
	if cmd.Stdout == &out && !strings.Contains(out.String(), "--- PASS: "+test) {
		t.Fatalf("inside: %s did not run", test)
	}
}

// far is the Internet as seen from inside.
type far struct {
	t   testing.TB
	pid int // of a process that holds the namespace
}

// setUpInside makes the host's network and the far side of it.
func setUpInside(t testing.TB) (inside, *far) {
	t.Helper()
	text := os.Getenv(insideEnv)
	if text == "" {
		t.Skip("another test runs this one, inside namespaces")
	}
	var in inside
	if err := json.Unmarshal([]byte(text), &in); err != nil {
		t.Fatal(err)
	}
	// The host's resolver is ours. The mount is seen in this namespace only.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	real, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(conf, real, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	holder := exec.Command(in.Prog, "sleep")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { holder.Process.Kill(); holder.Wait() })
	f := &far{t, holder.Process.Pid}
	for _, line := range []string{
		"ip link set lo up",
		fmt.Sprintf("ip link add wan type veth peer name far netns %d", f.pid),
		"ip link set wan up",
		"ip addr add 203.0.113.2/24 dev wan",
		"ip addr add 2001:db8:113::2/64 dev wan nodad",
	} {
		run(t, strings.Fields(line)...)
	}
	for _, line := range []string{
		"ip link set lo up", "ip link set far up",
		"ip addr add 203.0.113.1/24 dev far",
		"ip addr add " + farAddr + "/32 dev lo",
		"ip addr add 2001:db8:113::1/64 dev far nodad",
		"ip addr add " + farAddr6 + "/128 dev lo nodad",
	} {
		run(t, f.args(strings.Fields(line)...)...)
	}
	run(t, "ip", "route", "add", "default", "via", "203.0.113.1")
	run(t, "ip", "-6", "route", "add", "default", "via", "2001:db8:113::1")
	// As distributions have it: everybody may ping.
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0); err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{farNet, farNet6} {
		f.start("serving", in.Prog, "net", "serve", addr)
	}
	serveNames(t)
	return in, f
}

// args is a command line in the far namespace.
func (f *far) args(args ...string) []string {
	return append([]string{"nsenter", "-n", "-t", fmt.Sprint(f.pid)}, args...)
}

// start runs a program in the far namespace for as long as the test lasts, and
// waits until it has said the word.
func (f *far) start(word string, args ...string) { background(f.t, word, f.args(args...)...) }

// background runs a program for as long as the test lasts; with a word, it
// returns when the program has said it.
func background(t testing.TB, word string, args ...string) *output {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out := &output{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	for end := time.Now().Add(30 * time.Second); word != "" && !strings.Contains(out.String(), word); time.Sleep(10 * time.Millisecond) {
		select {
		case err := <-ended:
			t.Fatalf("%q: %v\n%s", args, err, out.String())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("%q does not say %q\n%s", args, word, out.String())
		}
	}
	return out
}

// run runs a program and returns what it printed.
func run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := try(t, args...)
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return out
}

func try(t testing.TB, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.WaitDelay = time.Second
	out := &output{}
	cmd.Stdout, cmd.Stderr = out, out
	err := cmd.Run()
	return out.String(), err
}

// serveNames is the host's resolver: it knows one name.
func serveNames(t testing.TB) {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m.Header = dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true, RecursionDesired: m.RecursionDesired}
			m.Additionals = nil
			switch {
			case strings.TrimSuffix(q.Name.String(), ".") != farName:
				m.RCode = dnsmessage.RCodeNameError
			case q.Type == dnsmessage.TypeA:
				m.Answers = answer(q, &dnsmessage.AResource{A: [4]byte(net.ParseIP(farAddr).To4())})
			case q.Type == dnsmessage.TypeAAAA:
				m.Answers = answer(q, &dnsmessage.AAAAResource{AAAA: [16]byte(net.ParseIP(farAddr6))})
			}
			if answer, err := m.Pack(); err == nil {
				c.WriteTo(answer, from)
			}
		}
	}()
}

func answer(q dnsmessage.Question, body dnsmessage.ResourceBody) []dnsmessage.Resource {
	return []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60}, Body: body}}
}

// output is what a program prints, readable while it runs.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const maxOutputBytes = 1 << 20

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if room := maxOutputBytes - o.buf.Len(); room > 0 {
		o.buf.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
