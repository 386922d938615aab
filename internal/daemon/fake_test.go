package daemon

import (
	"bytes"
	"context"

	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest"
	"banger/internal/wire"
)

// fakeEnv makes a bangerd of the tests one whose VMs have no VMM: a guest in
// the supervisor's memory, and a process that stands for the VMM. Its value is
// the number of the driver's call that fails, 0 for none.
const fakeEnv = "BANGER_TEST_FAKE"

func fakeDriver() (vmm.Driver, error) {
	failAt, err := strconv.Atoi(os.Getenv(fakeEnv))
	if err != nil {
		return nil, err
	}
	return childDriver{vmmtest.NewFake(vmmtest.Options{Serve: fakeGuest, FailAt: failAt})}, nil
}

// A childDriver gives every machine of the fake a process that dies with the
// supervisor, as a VMM does.
type childDriver struct{ *vmmtest.Fake }

type childProcess struct {
	*vmmtest.FakeGuest
	cmd  *exec.Cmd
	done chan struct{}
}

func (p childProcess) PID() int              { return p.cmd.Process.Pid }
func (p childProcess) Done() <-chan struct{} { return p.done }

func (d childDriver) Start(ctx context.Context, m vmm.Machine) (vmm.Process, error) {
	p, err := d.Fake.Start(ctx, m)
	if err != nil {
		return nil, err
	}
	c := childProcess{p.(*vmmtest.FakeGuest), exec.Command("sleep", "1000000"), make(chan struct{})}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // its end would be the parent's
		defer runtime.UnlockOSThread()
		err := c.cmd.Start()
		started <- err
		if err == nil {
			c.cmd.Wait()
			c.Crash("the process was killed")
		}
	}()
	if err := <-started; err != nil {
		c.Crash(err.Error())
		return nil, err
	}
	go func() {
		<-p.Done()
		c.cmd.Process.Kill()
		for vmIsThere(c.cmd.Process.Pid) {
			time.Sleep(time.Millisecond)
		}
		close(c.done)
	}()
	return c, nil
}

func vmIsThere(pid int) bool {
	_, err := vm.ProcessOf(pid)
	return err == nil
}

// fakeSockets are what listens in every fake guest.
var fakeSockets = []wire.Socket{
	{Proto: "tcp", Local: netip.MustParseAddrPort("0.0.0.0:80"), PID: 7, Process: "\x1b[2Jweb"},
	{Proto: "tcp", Local: netip.MustParseAddrPort("127.0.0.1:81"), PID: 8, Process: "db"},
	{Proto: "udp", Local: netip.MustParseAddrPort("[::]:53")},
}

// fakeGuest boots, and runs commands that are a word or two.
func fakeGuest(g *vmmtest.FakeGuest, _ uint32, conn net.Conn) {
	defer conn.Close()
	var req wire.Request
	if wire.ReadMessage(conn, &req) != nil {
		return
	}
	reply := wire.Reply{Version: wire.Version}
	if req.Op == wire.OpSockets {
		reply.Sockets = &wire.Sockets{List: fakeSockets}
	}
	if req.Op == wire.OpExec && len(req.Exec.Args) == 2 && req.Exec.Args[0] == "refuse" {
		reply.Error = &wire.Error{Code: wire.ErrorCode(req.Exec.Args[1]), Message: "the agent refuses"}
	}
	if wire.WriteMessage(conn, reply) != nil || reply.Error != nil {
		return
	}
	exit := func(code int) { wire.WriteFrame(conn, wire.FrameExit, fmt.Appendf(nil, `{"code":%d}`, code)) }
	switch req.Op {
	case wire.OpBoot:
		for _, stage := range []string{"kernel", "modules", "disks", "root", "agent", "network", "init"} {
			wire.WriteFrame(conn, wire.FrameEvent, fmt.Appendf(nil, `{"stage":%q}`, stage))
		}
	case wire.OpShutdown:
		g.PowerOff()
	case wire.OpExec:
		words := append(req.Exec.Args, "", "")
		switch words[0] {
		case "exit":
			code, _ := strconv.Atoi(words[1])
			exit(code)
		case "echo":
			wire.WriteFrame(conn, wire.FrameStdout, []byte(words[1]+"\n"))
			exit(0)
		case "sleep": // until it is cut off
			wire.WriteFrame(conn, wire.FrameStdout, []byte("asleep\n"))
			for {
				f, err := wire.ReadFrame(conn, nil)
				if err != nil {
					return
				}
				if f.Type == wire.FrameSignal && string(f.Payload) == "TERM" {
					exit(143)
					return
				}
			}
		case "spoof": // a packet from 2001:db8::N
			n, _ := strconv.Atoi(words[1])
			packet := make([]byte, 48)
			packet[0], packet[5], packet[6], packet[7] = 0x60, 8, 17, 64
			packet[8], packet[9], packet[10], packet[11], packet[23] = 0x20, 0x01, 0x0d, 0xb8, byte(n)
			packet[24], packet[39] = 0x20, 1
			g.SendFrame([6]byte{0x02, 0x62, 0x61, 0x6e, 0x67, 0x65}, 0x86dd, packet)
			exit(0)
		case "poweroff":
			g.PowerOff()
		case "reboot":
			g.Reboot()
		case "panic":
			g.Panic()
		case "":
			exit(0)
		default:
			exit(127)
		}
	}
}

// A world is a state folder with one image and one kernel, and the daemon and
// supervisors that work on it.
type world struct {
	t    testing.TB
	home string
	s    *store.Store
	prep api.Prepared
}

const worldImage = "aabb00000001"

// newWorld makes a state folder. Whatever runs for it at the end is ended, by
// the number of the process.
func newWorld(t testing.TB, failAt int) *world {
	t.Helper()
	return newWorldIn(t, filepath.Join(t.TempDir(), "state"), failAt)
}

func newWorldIn(t testing.TB, home string, failAt int) *world {
	t.Helper()
	t.Setenv("BANGER_HOME", home)
	t.Setenv(fakeEnv, strconv.Itoa(failAt))
	t.Setenv(idleEnv, "1m")
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector would wait a second at every end
	s, err := store.Open(home)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, home: home, s: s}
	w.plant(s)
	t.Cleanup(w.end)
	return w
}

// end ends whatever runs for this state folder.
func (w *world) end() {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all := w.processes("")
		if len(all) == 0 {
			return
		}
		if time.Now().After(end) {
			w.t.Errorf("processes that do not end: %v", all)
			return
		}
		for _, pid := range all {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// plant puts what VMs are made of into the store, as if it had been pulled.
func (w *world) plant(s *store.Store) {
	w.t.Helper()
	check := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	image := s.Image(worldImage)
	check(os.Mkdir(image, 0o700))
	check(os.WriteFile(filepath.Join(image, store.ImageRootfs), []byte("base"), 0o400))
	check(store.WriteJSON(filepath.Join(image, store.ImageRecord), 1, map[string]any{
		"id": worldImage, "uuid": strings.Repeat("ab", 16), "config": banger.ImageConfig{Cmd: []string{"/bin/sh"}}}))
	check(store.WriteJSON(s.ImageNames(), 1, map[string]any{"names": map[string]string{"base": worldImage}}))
	kernel := s.Kernel("1.2.3")
	check(os.Mkdir(kernel, 0o700))
	check(os.WriteFile(filepath.Join(kernel, "vmlinux"), []byte("kernel"), 0o600))
	check(store.WriteJSON(filepath.Join(kernel, "kernel.json"), 1, map[string]any{"version": "1.2.3"}))
	w.prep = api.Prepared{Image: "base", ImageID: worldImage, Kernel: "1.2.3"}
}

// processes are those that were started with this state folder, by what they
// are: "serve", "supervise ID", "sleep" for a VMM, or "" for all of them.
func (w *world) processes(what string) (pids []int) {
	mark := []byte("\x00BANGER_HOME=" + w.home + "\x00")
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		env, err := os.ReadFile(dir + "/environ")
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() || !bytes.Contains(append([]byte{0}, env...), mark) {
			continue
		}
		line, err := os.ReadFile(dir + "/cmdline")
		words := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
		if err != nil || len(line) == 0 {
			continue
		}
		words[0] = filepath.Base(words[0])
		text := strings.TrimPrefix(strings.Join(words, " "), api.DaemonProgram+" ")
		if what == "" || text == what || strings.HasPrefix(text, what+" ") {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// call makes a call to the resident daemon, which is started if it does not
// run.
func (w *world) call(method string, params, result any) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := w.callWith(ctx, method, params, nil, result)
	return err
}

func (w *world) callWith(ctx context.Context, method string, params any, files []*os.File, result any) (events []api.Event, err error) {
	if result == nil {
		result = new(any)
	}
	c, err := api.Connect(Version)
	if err != nil {
		return nil, err
	}
	err = c.Call(ctx, method, params, files, result, func(e api.Event) { events = append(events, e) }, nil)
	return events, err
}

// must is call for what has to work.
func (w *world) must(method string, params, result any) {
	w.t.Helper()
	if err := w.call(method, params, result); err != nil {
		w.t.Fatalf("%s %+v: %v\n%s", method, params, err, w.log())
	}
}

func (w *world) log() string {
	text, _ := os.ReadFile(filepath.Join(store.Run(w.home), store.DaemonLog))
	return "the daemon's log:\n" + string(text)
}

func (w *world) create(name string, spec banger.Spec) banger.VM {
	w.t.Helper()
	var v banger.VM
	w.must(api.MethodCreate, api.CreateParams{Name: name, Spec: spec, Prepared: w.prep}, &v)
	return v
}

func (w *world) do(method, name string) banger.VM {
	w.t.Helper()
	var v banger.VM
	w.must(method, api.VMParams{Name: name, TimeoutMs: -1}, &v)
	return v
}

// list is what the daemon says there is.
func (w *world) list() map[string]banger.VM {
	w.t.Helper()
	var out api.VMs
	w.must(api.MethodList, api.None{}, &out)
	all := map[string]banger.VM{}
	for _, v := range out.VMs {
		all[v.Name] = v
	}
	return all
}

// exec runs a command in a VM and returns what it printed and its exit code.
func (w *world) exec(name string, start bool, args ...string) (out string, code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ours, theirs, err := api.Pair()
	if err != nil {
		return "", 0, err
	}
	_, err = w.callWith(ctx, api.MethodAttach, api.VMParams{Name: name, Start: start}, []*os.File{theirs}, nil)
	theirs.Close()
	if err != nil {
		ours.Close()
		return "", 0, err
	}
	var result api.ExecResult
	err = api.NewClient(ours).Call(ctx, api.MethodExec, api.ExecParams{Session: wire.Exec{Args: args}}, nil, &result, nil, func(f wire.Frame) error {
		out += string(f.Payload[:len(f.Payload)*btoi(f.Type == wire.FrameStdout)])
		return nil
	})
	return out, result.Exit.Code, err
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// patience is for what takes milliseconds on a machine that has time.
const patience = time.Minute

// until waits for something to become true.
func (w *world) until(what string, f func() bool) {
	w.t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("not within %v: %s\n%s", patience, what, w.log())
		}
	}
}

// killDaemon ends the resident daemon as a crash does.
func (w *world) killDaemon() {
	w.t.Helper()
	for _, pid := range w.processes("serve") {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	w.until("the daemon is gone", func() bool { return len(w.processes("serve")) == 0 })
}

// atRest checks that nothing but the daemon runs, and that the state folder
// holds these VMs, each whole, and nothing half made.
func (w *world) atRest(names ...string) {
	w.t.Helper()
	w.until("no supervisor, no VMM, nothing half deleted", func() bool {
		left, err := w.s.Leftovers()
		return len(w.processes("supervise")) == 0 && len(w.processes("sleep")) == 0 && err == nil && len(left) == 0
	})
	all := w.list()
	var got []string
	for name := range all {
		got = append(got, name)
	}
	slices.Sort(got)
	slices.Sort(names)
	if !slices.Equal(got, names) {
		w.t.Errorf("there are %q, want %q\n%s", got, names, w.log())
	}
	ids, err := w.s.VMIDs()
	if err != nil || len(ids) != len(names) {
		w.t.Errorf("folders %q, %v; want %d", ids, err, len(names))
	}
	for _, id := range ids {
		entries, err := os.ReadDir(w.s.VM(id))
		if err != nil {
			w.t.Error(err)
		}
		for _, e := range entries {
			if !slices.Contains([]string{store.VMRecord, store.VMLife, store.VMOverlay, store.VMWork, store.VMOutput, store.VMConsole, store.VMNetLog, store.VMSupervisor}, e.Name()) {
				w.t.Errorf("VM %s has a file %s", id, e.Name())
			}
		}
		rec, life, err := vm.Load(w.s, id)
		if err != nil {
			w.t.Error(err)
		} else if shown := all[rec.Name]; shown.State != life.State || !vm.Rests(life.State) || life.Supervisor != nil || life.VMM != nil {
			w.t.Errorf("VM %s is shown as %s, its record says %+v", rec.Name, shown.State, life)
		}
		// A supervisor that was killed has its files for a moment longer.
		w.until("VM "+id+" is held by nobody", func() bool {
			hold, err := w.s.HoldVM(id)
			if err == nil {
				hold.Close()
			}
			return err == nil
		})
	}
	if left, err := w.s.Leftovers(); err != nil || len(left) > 0 {
		w.t.Errorf("left behind: %q, %v", left, err)
	}
}
