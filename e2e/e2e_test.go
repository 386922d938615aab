// Package e2e drives banger's real binaries by script, as a user would: the
// images come from a real registry on loopback, the guests are booted.
package e2e

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/rogpeppe/go-internal/testscript"
)

// world is what all scripts share.
var world struct {
	bin      string // folder of the three binaries
	kernels  string // a store's folder of kernels
	registry *registry
	layout   string // an OCI layout with the scratch image
	prog     string // the scratch image's one program
}

// needed are the programs without which nothing here can run.
var needed = []string{"qemu-system-x86_64", "mmdebstrap", "docker-registry", "busybox", "zstd", "e2fsck", "dumpe2fs", "script", "curl"}

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == usernetArg {
		fmt.Println("usernet:", runUsernet(os.Args[2]))
		os.Exit(1)
	}
	flag.Parse()
	os.Exit(func() int {
		if os.Getenv(insideEnv) != "" {
			return m.Run()
		}
		if testing.Short() {
			fmt.Println("e2e: SKIPPED: -short")
			return 0
		}
		var missing []string
		for _, p := range needed {
			if _, err := exec.LookPath(p); err != nil {
				missing = append(missing, p)
			}
		}
		if len(missing) > 0 {
			fmt.Printf("e2e: SKIPPED: not installed: %s (`make test` installs them as root)\n", strings.Join(missing, ", "))
			if os.Getenv("CI") != "" {
				return 1
			}
			return 0
		}
		dir, err := os.MkdirTemp("", "banger-e2e-")
		if err == nil {
			defer os.RemoveAll(dir)
			err = setUp(dir)
			if world.registry != nil {
				defer world.registry.stop()
			}
		}
		if err != nil {
			fmt.Println("e2e: set-up:", err)
			return 1
		}
		return m.Run()
	}())
}

func setUp(dir string) error {
	world.bin = filepath.Join(dir, "bin")
	for _, p := range []string{"banger", "bangerd", "banger-vsock-agent"} {
		if err := build(filepath.Join(world.bin, p), "banger/cmd/"+p); err != nil {
			return err
		}
	}
	world.prog = filepath.Join(dir, "prog")
	if err := build(world.prog, "./testdata/prog"); err != nil {
		return err
	}

	// The kernel is pulled once, into a store that outlives the tests so that
	// running them again is quick; the scripts' stores share it.
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	world.kernels = filepath.Join(cache, "kernels")
	cmd := exec.Command(filepath.Join(world.bin, "banger"), "kernel", "pull")
	cmd.Env = append(os.Environ(), "BANGER_HOME="+cache)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kernel pull: %w\n%s", err, out)
	}

	if world.registry, err = startRegistry(dir, false); err != nil {
		return err
	}
	below, above, err := busyboxLayers()
	if err != nil {
		return err
	}
	shell := v1.Config{Cmd: []string{"/bin/sh"}, Env: []string{"PATH=/bin:/usr/bin", "FROM=image"}}
	for tag, c := range map[string]compression{"busybox:gzip": gz, "busybox:zstd": zst, "busybox:plain": plain} {
		img, err := imageOf(c, shell, below, above)
		if err != nil {
			return err
		}
		if err := world.registry.push(tag, img); err != nil {
			return err
		}
	}
	binary, err := os.ReadFile(world.prog)
	if err != nil {
		return err
	}
	only, err := layerOf(file("prog", string(binary), 0o755))
	if err != nil {
		return err
	}
	scratch, err := imageOf(gz, v1.Config{Entrypoint: []string{"/prog"}, Cmd: []string{"hello"}}, only)
	if err != nil {
		return err
	}
	if err := world.registry.push("scratch:latest", scratch); err != nil {
		return err
	}
	for tag, layer := range map[string][]byte{
		"bad:truncated": below[:len(below)/2],
		"bad:garbage":   bytes.Repeat([]byte("no tar at all\n"), 1000),
	} {
		img, err := imageOf(gz, shell, layer)
		if err != nil {
			return err
		}
		if err := world.registry.push(tag, img); err != nil {
			return err
		}
	}
	world.layout = filepath.Join(dir, "layout")
	return writeLayout(world.layout, scratch)
}

func build(out, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, msg)
	}
	return nil
}

// cacheDir keeps what is slow to get between runs.
func cacheDir() (string, error) {
	if dir := os.Getenv("BANGER_TEST_CACHE"); dir != "" {
		return dir, os.MkdirAll(dir, 0o700)
	}
	base, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(base, "banger-test")
	return dir, os.MkdirAll(dir, 0o700)
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			home := filepath.Join(env.WorkDir, "home")
			if err := os.MkdirAll(home, 0o700); err != nil {
				return err
			}
			if err := os.Symlink(world.kernels, filepath.Join(home, "kernels")); err != nil {
				return err
			}
			env.Setenv("BANGER_HOME", home)
			// The daemons that the script started stay for a while: end them.
			env.Defer(func() {
				for _, p := range processesOf(env.WorkDir) {
					syscall.Kill(p.pid, syscall.SIGKILL)
				}
			})
			env.Setenv("REGISTRY", world.registry.addr)
			env.Setenv("LAYOUT", world.layout)
			env.Setenv("BIN", world.bin)
			for _, name := range []string{"BANGER_TEST_VMLINUZ", "BANGER_TEST_MODULES_DIR", "BANGER_TEST_DEBIAN_TAR"} {
				env.Setenv(name, os.Getenv(name))
			}
			env.Setenv("PATH", world.bin+string(os.PathListSeparator)+env.Getenv("PATH"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"nothing-left": nothingLeft,
			"kill-of":      killOf,
			"wait-for":     waitFor,
			"corrupt-blob": corruptBlob,
			"same-digest":  sameDigest,
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "debian":
				if os.Getenv("BANGER_TEST_DEBIAN_TAR") == "" && os.Getenv("CI") != "" {
					return false, errors.New("BANGER_TEST_DEBIAN_TAR names no root")
				}
				return os.Getenv("BANGER_TEST_DEBIAN_TAR") != "", nil
			case "kernel":
				return os.Getenv("BANGER_TEST_VMLINUZ") != "" && os.Getenv("BANGER_TEST_MODULES_DIR") != "", nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
	})
}

// nothingLeft fails if a script's store holds a VM or anything half made, or
// if a process of banger's still runs for it, but for the one daemon that
// waits for more to do.
func nothingLeft(ts *testscript.TestScript, neg bool, args []string) {
	home := ts.Getenv("BANGER_HOME")
	for _, room := range []string{"vms", "tmp", "trash"} {
		entries, err := os.ReadDir(filepath.Join(home, room))
		if err != nil && !os.IsNotExist(err) {
			ts.Fatalf("%v", err)
		}
		for _, e := range entries {
			ts.Fatalf("left behind: %s/%s", room, e.Name())
		}
	}
	daemons := 0
	for _, p := range processesOf(home) {
		if p.is("bangerd serve") {
			daemons++
			continue
		}
		ts.Fatalf("left behind: process %d %s", p.pid, p.line)
	}
	if daemons > 1 {
		ts.Fatalf("%d daemons", daemons)
	}
}

// killOf sends SIGKILL to what runs for the script's store: kill-of WHAT, where
// WHAT is daemon, supervisor or vmm.
func killOf(ts *testscript.TestScript, neg bool, args []string) {
	lines := map[string]string{"daemon": "bangerd serve", "supervisor": "bangerd supervise ", "vmm": "qemu-system-x86_64 "}
	if len(args) != 1 || lines[args[0]] == "" {
		ts.Fatalf("usage: kill-of daemon|supervisor|vmm")
	}
	var killed []int
	for _, p := range processesOf(ts.Getenv("BANGER_HOME")) {
		if p.is(lines[args[0]]) {
			ts.Check(syscall.Kill(p.pid, syscall.SIGKILL))
			killed = append(killed, p.pid)
		}
	}
	// A VMM has another environment: it is its supervisor's child.
	if args[0] == "vmm" {
		for _, p := range processesOf(ts.Getenv("BANGER_HOME")) {
			children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.pid, p.pid))
			tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.pid))
			for _, task := range tasks {
				more, _ := os.ReadFile(task)
				children = append(children, more...)
			}
			for _, word := range strings.Fields(string(children)) {
				if pid, err := strconv.Atoi(word); err == nil && p.is("bangerd supervise ") && syscall.Kill(pid, syscall.SIGKILL) == nil {
					killed = append(killed, pid)
				}
			}
		}
	}
	if len(killed) == 0 {
		ts.Fatalf("there is no %s", args[0])
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		there := 0
		for _, pid := range killed {
			if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(line) > 0 {
				there++
			}
		}
		if there == 0 {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%v do not end", killed)
		}
	}
}

// A process is one of banger's.
type process struct {
	pid  int
	line string // its arguments, the first without its folder
}

func (p process) is(line string) bool { return p.line == line || strings.HasPrefix(p.line, line) }

// processesOf lists the processes that were started with this BANGER_HOME, or
// one below it.
func processesOf(home string) (found []process) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		env, err := os.ReadFile(dir + "/environ")
		if err != nil {
			continue
		}
		ours := false
		for _, kv := range bytes.Split(env, []byte{0}) {
			if value, is := bytes.CutPrefix(kv, []byte("BANGER_HOME=")); is && (string(value) == home || strings.HasPrefix(string(value), home+"/")) {
				ours = true
			}
		}
		line, err := os.ReadFile(dir + "/cmdline")
		pid, pidErr := strconv.Atoi(filepath.Base(dir))
		if !ours || err != nil || pidErr != nil || len(line) == 0 {
			continue
		}
		words := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
		words[0] = filepath.Base(words[0])
		found = append(found, process{pid, strings.Join(words, " ")})
	}
	return found
}

// waitFor waits until a file holds a text: wait-for FILE TEXT.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: wait-for file text")
	}
	path := ts.MkAbs(args[0])
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		data, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(data), args[1]) {
			return
		}
	}
	data, _ := os.ReadFile(path)
	ts.Fatalf("%s does not hold %q after 60 s; it holds %q", args[0], args[1], data)
}

// corruptBlob flips a byte in the largest blob of the script's store.
func corruptBlob(ts *testscript.TestScript, neg bool, args []string) {
	blobs, err := filepath.Glob(filepath.Join(ts.Getenv("BANGER_HOME"), "blobs/sha256/*"))
	if err != nil || len(blobs) == 0 {
		ts.Fatalf("no blobs (%v)", err)
	}
	var largest string
	var most int64
	for _, b := range blobs {
		if st, err := os.Stat(b); err == nil && st.Size() > most {
			largest, most = b, st.Size()
		}
	}
	data, err := os.ReadFile(largest)
	ts.Check(err)
	data[len(data)/2] ^= 1
	ts.Check(os.WriteFile(largest, data, 0o600))
}

// sameDigest fails unless all files have the same bytes.
func sameDigest(ts *testscript.TestScript, neg bool, args []string) {
	var first string
	for i, a := range args {
		out, err := exec.Command("sha256sum", ts.MkAbs(a)).Output()
		ts.Check(err)
		sum := strings.Fields(string(out))[0]
		if i == 0 {
			first = sum
		} else if (sum == first) == neg {
			ts.Fatalf("%s and %s: digests %s and %s", args[0], a, first, sum)
		}
	}
}
