package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/api"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm/vmmtest"
	"banger/internal/wire"
)

// The tests run as a copy of themselves that has its companions beside it:
// bangerd is this program again, the agent a file of text.
const (
	companionsEnv = "BANGER_TEST_COMPANIONS"
	sessionEnv    = "BANGER_TEST_SESSION"
)

var agentText = strings.Repeat("the guest binary\n", 1000)

func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == api.DaemonProgram && os.Getenv(sessionEnv) != "":
		os.Exit(serveSession())
	case filepath.Base(os.Args[0]) == api.DaemonProgram && os.Getenv(fakeEnv) != "":
		os.Exit(mainWith(os.Args, fakeDriver))
	case filepath.Base(os.Args[0]) == api.DaemonProgram:
		os.Exit(Main(os.Args))
	case len(os.Args) == 3 && os.Args[1] == "supervise": // a daemon inside a test starts this program
		os.Exit(mainWith(os.Args, fakeDriver))
	case os.Getenv(companionsEnv) != "":
		os.Exit(m.Run())
	}
	code, err := withCompanions()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func withCompanions() (code int, err error) {
	dir, err := os.MkdirTemp("", "banger-daemon-test-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return 0, err
	}
	for name, data := range map[string][]byte{"daemon.test": self, api.AgentProgram: []byte(agentText)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o700); err != nil {
			return 0, err
		}
	}
	// One file, so that a daemon inside a test is the one its clients expect.
	if err := os.Link(filepath.Join(dir, "daemon.test"), filepath.Join(dir, api.DaemonProgram)); err != nil {
		return 0, err
	}
	cmd := exec.Command(filepath.Join(dir, "daemon.test"), os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), companionsEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			return 0, err
		}
	}
	return max(cmd.ProcessState.ExitCode(), 0), nil
}

// call makes one call to a daemon of its own.
func call(t *testing.T, method string, params any, files []*os.File, result any) (events []api.Event, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := api.Start()
	if err != nil {
		t.Fatal(err)
	}
	err = c.Call(ctx, method, params, files, result, func(e api.Event) { events = append(events, e) }, nil)
	return events, err
}

func newState(t *testing.T) (*rooms, *store.Store) {
	t.Helper()
	root := filepath.Join(t.TempDir(), "state")
	t.Setenv("BANGER_HOME", root)
	r, err := new(daemon).open()
	if err != nil {
		t.Fatal(err)
	}
	if r.store.Root() != root {
		t.Fatalf("the state folder is %s, want %s", r.store.Root(), root)
	}
	return r, r.store
}

func wantCode(t *testing.T, err error, code banger.Code, words ...string) {
	t.Helper()
	if banger.CodeOf(err) != code {
		t.Fatalf("got %q: %v, want %q", banger.CodeOf(err), err, code)
	}
	e, _ := errors.AsType[*banger.Error](err)
	for _, w := range words {
		if !strings.Contains(e.Message+" "+e.Hint, w) {
			t.Errorf("%s (hint %q): does not say %q", e.Message, e.Hint, w)
		}
	}
}

func digestOf(data []byte) string {
	h := sha256.Sum256(data)
	return hex.EncodeToString(h[:])
}

// layout writes an OCI image layout with one image of one file of that
// content, which is not to be compressed.
func layout(t *testing.T, content []byte) *os.File {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, data []byte) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(mediaType string, data []byte) string {
		write("blobs/sha256/"+digestOf(data), data)
		return fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:%s","size":%d}`, mediaType, digestOf(data), len(data))
	}
	layer := tarOf(t, content)
	config := blob("application/vnd.oci.image.config.v1+json", fmt.Appendf(nil,
		`{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/true"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, digestOf(layer)))
	manifest := blob("application/vnd.oci.image.manifest.v1+json", fmt.Appendf(nil,
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}`,
		config, blob("application/vnd.oci.image.layer.v1.tar", layer)))
	write("index.json", fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[%s]}`, manifest))
	write("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func tarOf(t *testing.T, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "file", Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	w.Write(content)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func temp(t *testing.T, content string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(content); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	return f
}

// The rules are those of docker run without --entrypoint, with the images'
// inits taken out: they run already.
func TestCommand(t *testing.T) {
	type l = []string
	for _, r := range []struct {
		entrypoint, cmd, given, want []string
	}{
		{nil, nil, nil, nil},
		{nil, nil, l{"ls", "-l"}, l{"ls", "-l"}},
		{nil, l{"bash"}, nil, l{"bash"}},
		{nil, l{"bash"}, l{"ls"}, l{"ls"}},
		{l{"nginx"}, nil, nil, l{"nginx"}},
		{l{"nginx"}, nil, l{"-t"}, l{"nginx", "-t"}},
		{l{"/entry", "-x"}, l{"serve", "80"}, nil, l{"/entry", "-x", "serve", "80"}},
		{l{"/entry", "-x"}, l{"serve", "80"}, l{"sh"}, l{"/entry", "-x", "sh"}},
		{l{"/bin/sh", "-c"}, l{"echo hi"}, nil, l{"/bin/sh", "-c", "echo hi"}},
		{l{"tini", "--"}, l{"init"}, l{"ls"}, l{"tini", "--", "ls"}},
		{l{""}, nil, nil, l{""}},
		// An init is PID 1 or nothing.
		{nil, l{"/sbin/init"}, nil, nil},
		{nil, l{"/sbin/init"}, l{"ls"}, l{"ls"}},
		{l{"/lib/systemd/systemd"}, l{"--log-level=debug"}, nil, nil},
		{l{"/lib/systemd/systemd"}, l{"--log-level=debug"}, l{"ls"}, l{"ls"}},
		{l{"init"}, nil, l{"ls"}, l{"ls"}},
		{l{"/sbin/openrc-init"}, nil, nil, nil},
		// One past it.
		{nil, l{"/sbin/initial"}, nil, l{"/sbin/initial"}},
		{nil, l{"sh", "/sbin/init"}, nil, l{"sh", "/sbin/init"}},
		{l{"/sbin/init.sh"}, nil, l{"ls"}, l{"/sbin/init.sh", "ls"}},
	} {
		config := banger.ImageConfig{Entrypoint: slices.Clip(r.entrypoint), Cmd: slices.Clip(r.cmd)}
		got := command(config, r.given)
		if !slices.Equal(got, r.want) || (got == nil) != (r.want == nil) {
			t.Errorf("entrypoint %q, cmd %q, given %q: %q, want %q", r.entrypoint, r.cmd, r.given, got, r.want)
		}
	}
}

func TestCheckSpec(t *testing.T) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		t.Fatal(err)
	}
	most := int64(si.Totalram)*int64(si.Unit) - hostReserveBytes
	for _, r := range []struct {
		spec banger.Spec
		code banger.Code
		word string
	}{
		{banger.Spec{}, "", ""},
		{banger.Spec{MemoryBytes: most}, "", ""},
		{banger.Spec{MemoryBytes: most + 1}, banger.CodeUnavailable, fmt.Sprintf("at most %d MiB", most>>20)},
		{banger.Spec{MemoryBytes: 1<<63 - 1}, banger.CodeUnavailable, "memory"},
		{banger.Spec{MemoryBytes: -1}, banger.CodeUsage, "memory"},
		{banger.Spec{CPUs: -1}, banger.CodeUsage, "cpus"},
		{banger.Spec{Init: "auto"}, "", ""},
		{banger.Spec{Init: "image"}, "", ""},
		{banger.Spec{Init: "agent"}, "", ""},
		{banger.Spec{Init: "Agent"}, banger.CodeUsage, `"Agent"`},
		{banger.Spec{Init: "agent\n\x1b"}, banger.CodeUsage, `"agent\n\x1b"`},
		{banger.Spec{Accel: banger.AccelAuto}, "", ""},
		{banger.Spec{Accel: banger.AccelKVM}, "", ""},
		{banger.Spec{Accel: banger.AccelTCG}, "", ""},
		{banger.Spec{Accel: "hvf"}, banger.CodeUsage, `"hvf"`},
	} {
		err := checkSpec(r.spec)
		if banger.CodeOf(err) != r.code || err != nil && !strings.Contains(err.Error()+err.(*banger.Error).Hint, r.word) {
			t.Errorf("%+v: %q %v, want %q with %q", r.spec, banger.CodeOf(err), err, r.code, r.word)
		}
	}
}

func TestSource(t *testing.T) {
	d := new(daemon)
	input, list := temp(t, "input"), temp(t, "curl\n# no\nvim curl\n")
	c := &api.Call{Files: []*os.File{input, list}}
	src, ref, err := d.source(c, api.Source{Reference: "apt:bookworm", File: -1, Packages: 1})
	if err == nil || !strings.Contains(err.Error(), "vim curl") {
		t.Errorf("two names on a line: %v", err)
	}
	list = temp(t, "curl # why\n\nvim\ncurl\n")
	c.Files[1] = list
	src, ref, err = d.source(c, api.Source{Reference: "apt:bookworm", File: -1, Packages: 1})
	if err != nil || src.Input != nil || !slices.Equal(src.Packages, []string{"curl", "vim"}) || ref.String() != "apt:bookworm" {
		t.Errorf("%+v, %v, %v", src, ref, err)
	}
	// The list is at its end: it was read, and once is all it can be.
	if at, err := list.Seek(0, io.SeekCurrent); err != nil || at == 0 {
		t.Errorf("the list stands at %d, %v", at, err)
	}
	if rest, err := io.ReadAll(list); err != nil || len(rest) != 0 {
		t.Errorf("%q of the list is left, %v", rest, err)
	}
	src, _, err = d.source(c, api.Source{Reference: "rootfs:-", File: 0, Packages: -1})
	if err != nil || src.Input != input || src.Packages != nil {
		t.Errorf("%+v, %v", src, err)
	}
	for _, p := range []api.Source{
		{Reference: "rootfs:-", File: 2, Packages: -1},
		{Reference: "rootfs:-", File: -2, Packages: -1},
		{Reference: "apt:bookworm", File: -1, Packages: 2},
		{Reference: "apt:bookworm", File: -1, Packages: -2},
	} {
		_, _, err := d.source(c, p)
		wantCode(t, err, banger.CodeUsage, "no file number")
	}
	_, _, err = d.source(c, api.Source{Reference: "UPPER case", File: -1, Packages: -1})
	wantCode(t, err, banger.CodeUsage)
	_, _, err = d.source(&api.Call{}, api.Source{Reference: "rootfs:-", File: 0, Packages: -1})
	wantCode(t, err, banger.CodeUsage, "no file number 0")
}

// plant puts an image into the store that has the records of one.
func plant(t *testing.T, s *store.Store, id string, names ...string) {
	t.Helper()
	if err := os.Mkdir(s.Image(id), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Image(id), store.ImageRootfs), nil, 0o400); err != nil {
		t.Fatal(err)
	}
	if err := store.WriteJSON(filepath.Join(s.Image(id), store.ImageRecord), 1, map[string]string{"id": id, "uuid": strings.Repeat("ab", 16)}); err != nil {
		t.Fatal(err)
	}
	var n struct {
		Names map[string]string `json:"names"`
	}
	if err := store.ReadJSON(s.ImageNames(), 1, &n); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if n.Names == nil {
		n.Names = map[string]string{}
	}
	for _, name := range names {
		n.Names[name] = id
	}
	if err := store.WriteJSON(s.ImageNames(), 1, n); err != nil {
		t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	r, s := newState(t)
	plant(t, s, "aabb00000001", "docker.io/library/debian:latest", "apt:bookworm", "mine")
	plant(t, s, "aabb00000002", "debian", "ccdd")
	plant(t, s, "ccdd00000003", "My Image")
	for text, id := range map[string]string{
		"debian": "aabb00000001", "docker.io/debian": "aabb00000001", "library/debian:latest": "aabb00000001",
		"apt:bookworm": "aabb00000001", "mine": "aabb00000001", "aabb00000002": "aabb00000002",
		"ccdd":     "aabb00000002", // a name comes before an id
		"ccdd0":    "ccdd00000003",
		"My Image": "ccdd00000003", // no reference at all
	} {
		if im, err := r.find(text); err != nil || im.ID != id {
			t.Errorf("%q: %+v, %v; want %s", text, im, err, id)
		}
	}
	for text, code := range map[string]banger.Code{
		"": banger.CodeNotFound, "debian:12": banger.CodeNotFound, "aab": banger.CodeNotFound,
		"rootfs:mine": banger.CodeNotFound, "aabb": banger.CodeUsage, "../x": banger.CodeNotFound,
	} {
		if im, err := r.find(text); banger.CodeOf(err) != code {
			t.Errorf("%q: %+v, %v; want %q", text, im, err, code)
		}
	}
	// A damaged record is told, not passed over for another of that name.
	if err := os.WriteFile(filepath.Join(s.Image("aabb00000001"), store.ImageRecord), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if im, err := r.find("debian"); err == nil {
		t.Errorf("found %+v", im)
	}
}

// The images of the API, from end to end: bangerd is a process of its own.
func TestImageCalls(t *testing.T) {
	_, s := newState(t)
	dir := layout(t, []byte("content"))
	var list api.Images
	if _, err := call(t, api.MethodImageList, api.None{}, nil, &list); err != nil || list.Images == nil || len(list.Images) != 0 {
		t.Fatalf("%+v, %v: want an empty list, not null", list, err)
	}
	var pulled, found banger.Image
	source := api.Source{Reference: "oci:x", File: 0, Packages: -1, Name: "mine"}
	if _, err := call(t, api.MethodImagePull, source, []*os.File{dir}, &pulled); err != nil {
		t.Fatal(err)
	}
	if _, err := call(t, api.MethodImageInspect, api.Named{Name: pulled.ID[:5]}, nil, &found); err != nil || found.BaseDigest != pulled.BaseDigest || found.Name != "mine" {
		t.Errorf("%+v, %v", found, err)
	}
	if _, err := call(t, api.MethodImageList, api.None{}, nil, &list); err != nil || len(list.Images) != 1 || list.Images[0].ID != pulled.ID {
		t.Errorf("%+v, %v", list, err)
	}
	// A VM of another process holds it.
	im := image.Open(s)
	img, err := im.Find("mine")
	if err != nil {
		t.Fatal(err)
	}
	release, err := im.Hold(img)
	if err != nil {
		t.Fatal(err)
	}
	_, err = call(t, api.MethodImageRemove, api.Named{Name: "mine"}, nil, &found)
	wantCode(t, err, banger.CodeConflict, "VM")
	release()
	if _, err := call(t, api.MethodImageRemove, api.Named{Name: "mine"}, nil, &found); err != nil || found.ID != pulled.ID {
		t.Errorf("%+v, %v", found, err)
	}
	_, err = call(t, api.MethodImageInspect, api.Named{Name: "mine"}, nil, &found)
	wantCode(t, err, banger.CodeNotFound)

	// What is wrong with the parameters is the caller's.
	for method, params := range map[string]any{
		api.MethodImagePull:    api.Source{Reference: "oci:x", File: 1, Packages: -1},
		api.MethodImageBuild:   api.BuildParams{Source: source, Output: -1},
		api.MethodKernelImport: api.ImportKernel{Image: -1, Modules: -1},
		api.MethodImageInspect: "not an object",
		api.MethodPrepare:      api.PrepareParams{Source: api.Source{Reference: "UPPER case", File: -1, Packages: -1}},
		"image.eat":            api.None{},
	} {
		_, err := call(t, method, params, []*os.File{dir}, &found)
		wantCode(t, err, banger.CodeUsage)
	}

	// Build writes the client's file, with the guest files or without.
	var sums []string
	for _, noGuest := range []bool{false, true} {
		out := temp(t, "")
		var built api.Built
		params := api.BuildParams{Source: source, Output: 1, SizeBytes: 16 << 20, NoGuest: noGuest}
		if _, err := call(t, api.MethodImageBuild, params, []*os.File{dir, out}, &built); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(out.Name())
		if err != nil || built.SizeBytes != 16<<20 || int64(len(data)) != built.SizeBytes || built.Digest == nil {
			t.Errorf("%+v, %d bytes, %v", built, len(data), err)
		}
		if has := bytes.Contains(data, []byte(agentText)); has == noGuest {
			t.Errorf("no guest files asked for: %v, the agent is in it: %v", noGuest, has)
		}
		sums = append(sums, digestOf(data))
	}
	if sums[0] == sums[1] {
		t.Error("guest files make no difference")
	}
}

// A full disk is known as one by the client.
func TestPullDiskFull(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=2m,mode=0700"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("cannot test: a small tmpfs: %v", err)
		}
		t.Skipf("NOT TESTED: a small tmpfs: %v", err)
	}
	defer unix.Unmount(root, unix.MNT_DETACH)
	t.Setenv("BANGER_HOME", root)
	for _, contentBytes := range []int{3 << 20, 1200 << 10} { // the blob does not fit; the base does not
		dir := layout(t, bytes.Repeat([]byte("no zero "), contentBytes/8))
		var pulled banger.Image
		_, err := call(t, api.MethodImagePull, api.Source{Reference: "oci:x", File: 0, Packages: -1, Name: "a"}, []*os.File{dir}, &pulled)
		wantCode(t, err, banger.CodeNoSpace)
		for _, room := range []string{"tmp", "images", "trash"} {
			entries, err := os.ReadDir(filepath.Join(root, room))
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if e.Name() != "names.json" {
					t.Errorf("%s/%s is left", room, e.Name())
				}
			}
		}
	}
}

// sessionParams are what the test's own method takes.
type sessionParams struct {
	Guest  string             `json:"guest"` // what the guest does
	Config banger.ImageConfig `json:"config"`
	Run    api.ExecParams     `json:"run"`
}

type sessionResult struct {
	Exit  wire.Exit `json:"exit"`
	Clean bool      `json:"clean"`
}

// serveSession is bangerd with one more method: a session in a VM without VMM.
func serveSession() int {
	conn, err := net.FileConn(os.NewFile(callFD, "client"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	api.Serve(context.Background(), conn.(*net.UnixConn), map[string]api.Handler{"test.session": fakeSession})
	return 0
}

func fakeSession(ctx context.Context, c *api.Call) (any, error) {
	var p sessionParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "banger-session-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"rootfs", "vmlinux", "agent", "modules"} {
		if err := os.WriteFile(path(name), []byte(name), 0o600); err != nil {
			return nil, err
		}
	}
	s, err := store.Open(path("state"))
	if err != nil {
		return nil, err
	}
	id := store.NewID()
	if err := os.Mkdir(s.VM(id), 0o700); err != nil {
		return nil, err
	}
	disks, err := vm.MakeDisks(s.VM(id), "")
	if err != nil {
		return nil, err
	}
	v := vm.New(vm.Config{
		ID: id, Store: s, Disks: disks, Config: p.Config, Rootfs: path("rootfs"), Agent: path("agent"),
		Kernel: &kernel.Kernel{Kernel: banger.Kernel{Vmlinux: path("vmlinux"), Modules: path("modules")}},
		Driver: vmmtest.NewFake(vmmtest.Options{Serve: guest(p.Guest)}),
	})
	if err := v.Start(ctx, banger.StageNetwork); err != nil {
		return nil, err
	}
	p.Run.Session.Args = command(p.Config, p.Run.Session.Args)
	exit, err := session(ctx, c, v, p.Config, p.Run.Session)
	clean, stopErr := v.Stop(context.WithoutCancel(ctx))
	if err != nil {
		return nil, err
	}
	return sessionResult{Exit: exit, Clean: clean}, stopErr
}

// guest serves the agent's protocol. Its sessions say what they were asked to
// run, then do what is wanted.
func guest(does string) func(g *vmmtest.FakeGuest, port uint32, conn net.Conn) {
	return func(g *vmmtest.FakeGuest, port uint32, conn net.Conn) {
		defer conn.Close()
		var req wire.Request
		if wire.ReadMessage(conn, &req) != nil {
			return
		}
		reply := wire.Reply{Version: wire.Version}
		if req.Op == wire.OpExec && does == "refuse" {
			reply.Error = &wire.Error{Code: wire.ErrNotFound, Message: "exec: no such program"}
		}
		if wire.WriteMessage(conn, reply) != nil || reply.Error != nil {
			return
		}
		switch req.Op {
		case wire.OpBoot:
			for _, stage := range []string{"kernel", "modules", "disks", "root", "agent", "network"} {
				data, _ := json.Marshal(wire.BootEvent{Stage: stage})
				wire.WriteFrame(conn, wire.FrameEvent, data)
			}
		case wire.OpShutdown:
			g.PowerOff()
		case wire.OpExec:
			data, _ := json.Marshal(req.Exec)
			wire.WriteFrame(conn, wire.FrameStdout, data)
			switch does {
			case "panic":
				g.Print("Kernel panic - not syncing\n")
				g.Panic()
			case "vanish":
				return
			case "exit 256":
				wire.WriteFrame(conn, wire.FrameExit, []byte(`{"code":256}`))
			case "event":
				wire.WriteFrame(conn, wire.FrameEvent, []byte(`{}`))
			case "hang":
				io.Copy(io.Discard, conn)
			default:
				echo(conn)
			}
		}
	}
}

// echo says what it is sent until there is no more.
func echo(conn net.Conn) {
	for {
		f, err := wire.ReadFrame(conn, nil)
		if err != nil {
			return
		}
		switch f.Type {
		case wire.FrameStdin:
			wire.WriteFrame(conn, wire.FrameStdout, f.Payload)
		case wire.FrameStdinEOF:
			wire.WriteFrame(conn, wire.FrameStderr, []byte("bye"))
			wire.WriteFrame(conn, wire.FrameExit, []byte(`{"code":7,"signal":"TERM"}`))
			return
		default:
			wire.WriteFrame(conn, wire.FrameStdout, fmt.Appendf(nil, "<%d %s>", f.Type, f.Payload))
		}
	}
}

// runSession makes a call of test.session. Once the session runs, during is
// called beside it.
func runSession(t *testing.T, p sessionParams, during func(c *api.Client)) (stdout, stderr string, events []api.Event, result sessionResult, err error) {
	t.Helper()
	t.Setenv(sessionEnv, "1")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := api.Start()
	if err != nil {
		t.Fatal(err)
	}
	var beside sync.WaitGroup
	defer beside.Wait()
	err = c.Call(ctx, "test.session", p, nil, &result, func(e api.Event) {
		events = append(events, e)
		if e.Started && during != nil {
			beside.Go(func() { during(c) })
		}
	}, func(f wire.Frame) error {
		switch f.Type {
		case wire.FrameStdout:
			stdout += string(f.Payload)
		case wire.FrameStderr:
			stderr += string(f.Payload)
		default:
			t.Errorf("frame type %d reached the client", f.Type)
		}
		return nil
	})
	return stdout, stderr, events, result, err
}

func TestSession(t *testing.T) {
	p := sessionParams{
		Config: banger.ImageConfig{Entrypoint: []string{"entry"}, Cmd: []string{"cmd"}, Env: []string{"A=image", "B=image"}, User: "web", WorkingDir: "/srv"},
		Run:    api.ExecParams{Session: wire.Exec{Args: []string{"given"}, Env: []string{"A=user"}, Stdin: true}},
	}
	big := bytes.Repeat([]byte("0123456789"), wire.MaxFrameBytes/10)
	stdout, stderr, events, result, err := runSession(t, p, func(c *api.Client) {
		c.Send(wire.FrameSignal, []byte("USR1"))
		c.Send(wire.FrameResize, []byte(`{"rows":1}`))
		c.Send(wire.FrameStdin, big)
		c.Send(wire.FrameStdinEOF, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	asked, rest, _ := strings.Cut(stdout, "}")
	var exec wire.Exec
	if err := json.Unmarshal([]byte(asked+"}"), &exec); err != nil {
		t.Fatalf("%q: %v", asked, err)
	}
	if !slices.Equal(exec.Args, []string{"entry", "given"}) || !slices.Equal(exec.Env, []string{"A=image", "B=image", "A=user"}) ||
		exec.User != "web" || exec.Dir != "/srv" || !exec.Stdin {
		t.Errorf("the guest was asked for %+v", exec)
	}
	if want := `<6 USR1><5 {"rows":1}>` + string(big); rest != want {
		t.Errorf("stdout has %d bytes, want %d: %.60q", len(rest), len(want), rest)
	}
	if stderr != "bye" || result.Exit != (wire.Exit{Code: 7, Signal: "TERM"}) || !result.Clean {
		t.Errorf("stderr %q, result %+v", stderr, result)
	}
	var steps []string
	started := 0
	for _, e := range events {
		if e.Stage != nil {
			steps = append(steps, e.Stage.Name)
			if e.Stage.StartUs < 0 || e.Stage.EndUs < e.Stage.StartUs {
				t.Errorf("step %+v", e.Stage)
			}
		}
		if e.Started {
			started++
		}
	}
	if !slices.Equal(steps, []string{"exec", "first byte"}) || started != 1 {
		t.Errorf("steps %q, started %d times", steps, started)
	}

	// What the user says comes before what the image says.
	p.Run.Session.User, p.Run.Session.Dir = "0:0", "/"
	stdout, _, _, _, err = runSession(t, p, func(c *api.Client) { c.Send(wire.FrameStdinEOF, nil) })
	if err != nil || !strings.Contains(stdout, `"user":"0:0"`) || !strings.Contains(stdout, `"dir":"/"`) {
		t.Errorf("%s, %v", stdout, err)
	}
}

func TestSessionBreaks(t *testing.T) {
	for _, r := range []struct {
		guest string
		code  banger.Code
		words []string
	}{
		{"refuse", banger.CodeCommandNotFound, []string{"no such program"}},
		{"panic", banger.CodeGuest, []string{"ended before the command"}},
		{"vanish", banger.CodeGuest, []string{"went away"}},
		{"exit 256", banger.CodeGuest, []string{"256"}},
		{"event", banger.CodeGuest, []string{"unexpected frame"}},
	} {
		t.Run(r.guest, func(t *testing.T) {
			_, _, _, _, err := runSession(t, sessionParams{Guest: r.guest}, nil)
			wantCode(t, err, r.code, r.words...)
		})
	}
	t.Run("canceled", func(t *testing.T) {
		start := time.Now()
		_, _, _, _, err := runSession(t, sessionParams{Guest: "hang"}, func(c *api.Client) {
			// A frame that goes to no guest ends the input, not the client's say.
			c.Send(wire.FrameExit, nil)
			c.Send(wire.FrameStdin, []byte("lost"))
			c.Cancel()
		})
		wantCode(t, err, banger.CodeCanceled)
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// Whoever ended the call is the reason, not what broke because of it; and what
// has a code keeps it without waiting for the VM.
func TestSessionError(t *testing.T) {
	cause := errors.New("the user")
	ctx, cancel := context.WithCancelCause(t.Context())
	known := banger.Errorf(banger.CodeGuest, "known")
	if err := sessionError(ctx, nil, fmt.Errorf("session: %w", known)); !errors.Is(err, known) {
		t.Errorf("got %v, want %v", err, known)
	}
	cancel(cause)
	for _, err := range []error{known, io.ErrUnexpectedEOF} {
		if got := sessionError(ctx, nil, err); got != cause {
			t.Errorf("got %v, want %v", got, cause)
		}
	}
}
