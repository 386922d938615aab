package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"banger"
)

// What the record says was applied is what the kernel shows of the process.
func TestConfinementIsTrue(t *testing.T) {
	m := tcgMachine(t)
	p := startProcess(t, confined(), m)
	c := p.Info().Confinement
	if c == nil {
		t.Fatal("nothing is recorded")
	}
	t.Logf("%+v", *c)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	has := func(line string) bool { return strings.Contains(string(status), "\n"+line+"\n") }
	if !c.NoNewPrivs || !has("NoNewPrivs:\t1") {
		t.Errorf("no new privileges: recorded %v; status:\n%s", c.NoNewPrivs, status)
	}
	if c.Seccomp != has("Seccomp:\t2") {
		t.Errorf("seccomp: recorded %v; status:\n%s", c.Seccomp, status)
	}
	for _, ns := range nameSpaces {
		ours, err := os.Readlink("/proc/self/ns/" + ns.name)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p.PID(), ns.name))
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(c.Namespaces, ns.name) != (ours != theirs) {
			t.Errorf("name space %s: recorded in %q; ours %s, QEMU's %s", ns.name, c.Namespaces, ours, theirs)
		}
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Max core file size 0 0", "Max open files 1024 1024", "Max file size 0 0"} {
		if !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), want) {
			t.Errorf("limits have no %q:\n%s", want, limits)
		}
	}
	if !slices.Contains(c.Limits, "core 0") || !slices.Contains(c.Limits, "nofile 1024") {
		t.Errorf("limits recorded: %q", c.Limits)
	}
	if c.LandlockABI > 0 && !strings.Contains(c.Proof, "permission denied") {
		t.Errorf("landlock %d, and the proof is %q", c.LandlockABI, c.Proof)
	}
	if c.LandlockABI == 0 && len(c.Missing) == 0 {
		t.Error("no landlock, and nobody is told")
	}
}

// A program in the place of QEMU tries what a QEMU that was taken over would.
func TestConfinedProgram(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	given, err := os.Open(secret)
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close()
	// run runs a script through the launcher and says what became of it.
	run := func(l launch, script string) (string, error) {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer w.Close()
		l.ReportFD = 3
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self, confineArg, string(text), "/bin/sh", "-c", script)
		cmd.ExtraFiles = []*os.File{w, given}
		cmd.Env = environment()
		cmd.SysProcAttr = &syscall.SysProcAttr{}
		isolate(cmd.SysProcAttr)
		out, err := cmd.CombinedOutput()
		if err != nil && strings.Contains(err.Error(), "operation not permitted") {
			t.Skipf("NOT TESTED: this host allows no name spaces: %v", err)
		}
		return string(out), err
	}
	if out, err := run(launch{}, "echo fine; test -e /proc/self/fd/3 || echo closed"); err != nil || out != "fine\nclosed\n" {
		t.Fatalf("%q, %v", out, err)
	}
	for name, c := range map[string]struct {
		l      launch
		script string
		want   string // "": it must fail
	}{
		"a file of the user's":      {launch{}, "cat " + secret, ""},
		"the same, given to it":     {launch{Files: []int{4}}, "cat /proc/self/fd/4", "secret"},
		"the same, not given":       {launch{}, "cat /proc/self/fd/4", ""},
		"writing to what was given": {launch{Files: []int{4}}, "echo x > /proc/self/fd/4", ""},
		"a new file":                {launch{}, "echo x > " + filepath.Dir(secret) + "/new", ""},
		"the environment of others": {launch{}, "cat /proc/1/environ > /dev/null", ""},
		"the network":               {launch{}, "grep -v -e lo: -e Inter -e face /proc/self/net/dev; ls /sys/class/net", ""},
		"more files than allowed":   {launch{}, "ulimit -n 4096", ""},
		"its libraries":             {launch{}, "ls /usr/bin/env", "/usr/bin/env\n"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(c.l, c.script)
			if (err == nil) != (c.want != "") || err == nil && out != c.want {
				t.Errorf("%q, %v; want %q", out, err, c.want)
			}
		})
	}
	if data, err := os.ReadFile(secret); err != nil || string(data) != "secret" {
		t.Errorf("the secret is %q now, %v", data, err)
	}
}

// A launcher that fails is an error with its words, and nothing is left.
func TestLauncherFails(t *testing.T) {
	for name, args := range map[string][]string{
		"nothing":                {},
		"no program":             {"{}"},
		"no launch":              {"[", "/bin/true"},
		"a program that is none": {`{"report_fd":2}`, "/nonexistent/program"},
	} {
		self, _ := os.Executable()
		out, err := exec.Command(self, append([]string{confineArg}, args...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "confine: ") {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
	d := New("/bin/false")
	d.program = "/bin/true"
	if _, err := d.Start(t.Context(), tcgMachine(t)); err == nil || !strings.Contains(err.Error(), "told nothing") && banger.CodeOf(err) != banger.CodeUnavailable {
		t.Errorf("got %v", err)
	}
}

func TestCgroupLimits(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a/b.scope/memory.max", "1342177280\n")
	write("a/b.scope/pids.max", "max\n")
	write("a/b.scope/cpu.max", "max 100000\n")
	write("self", "9:memory:/x\n0::/a/b.scope\n")
	write("up", "0::/../a/b.scope\n")
	write("v1", "9:memory:/a/b.scope\n")
	for self, want := range map[string][]string{"self": {"memory.max 1342177280"}, "up": nil, "v1": nil, "none": nil} {
		if got := cgroupLimits(filepath.Join(root, self), root); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", self, got, want)
		}
	}
}
