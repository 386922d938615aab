package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"banger"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "--version" { // what a check of name spaces starts
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// healthy is a host on which all is well.
func healthy(t *testing.T) (Host, *store.Store) {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	h := Host{
		Root: root, Store: store.View(s.Root()),
		Probe: func(_ context.Context, a banger.Accel) (vmm.Info, error) {
			return vmm.Info{Program: "/usr/bin/qemu", Version: "9.9", Accel: a, Reason: "it ran", Sandbox: true}, nil
		},
		Kernel:   func() (string, error) { return "6.1", nil },
		Daemon:   func() (string, error) { return "1.0", nil },
		Programs: func() (map[string]string, error) { return map[string]string{"a": "1.0", "b": "1.0"}, nil },
	}
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/1")
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		"/dev/net/tun": "", "/run/user/1/systemd/private": "", "/var/lib/systemd/linger/" + u.Username: "",
		"/proc/self/cgroup": "0::/user.slice/x.scope\n", "/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
	} {
		write(t, root+path, text)
	}
	return h, s
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// snapshot is everything below a folder, so that a check that changes
// something is seen.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		all[path] = fmt.Sprint(info.Mode(), info.Size(), info.ModTime())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// Every check is made to find each thing that it can, and nothing is changed.
func TestChecks(t *testing.T) {
	notFound := banger.Errorf(banger.CodeNotFound, "none")
	hinted := banger.Errorf(banger.CodeUnavailable, "it is not there").WithHint("apt install it")
	create := func(t *testing.T, s *store.Store) string {
		t.Helper()
		r := vm.Record{ID: store.NewID(), Name: "dev"}
		if err := vm.Create(s, &r, ""); err != nil {
			t.Fatal(err)
		}
		return r.ID
	}
	for _, c := range []struct {
		what   string
		change func(t *testing.T, h *Host, s *store.Store)
		name   string
		state  banger.CheckState
		found  string
		fix    string
	}{
		{"nothing", func(*testing.T, *Host, *store.Store) {}, "", "", "", ""},
		{"a program of another release", func(_ *testing.T, h *Host, _ *store.Store) {
			h.Programs = func() (map[string]string, error) { return map[string]string{"a": "1.0", "b": "1.1"}, nil }
		}, "programs", banger.CheckFail, "a 1.0, b 1.1", "install"},
		{"a program that is missing", func(_ *testing.T, h *Host, _ *store.Store) {
			h.Programs = func() (map[string]string, error) { return nil, hinted }
		}, "programs", banger.CheckFail, "it is not there", "apt install it"},
		{"no QEMU", func(_ *testing.T, h *Host, _ *store.Store) {
			probe := h.Probe
			h.Probe = func(ctx context.Context, a banger.Accel) (vmm.Info, error) {
				if a == banger.AccelTCG {
					return vmm.Info{}, hinted
				}
				return probe(ctx, a)
			}
		}, "qemu", banger.CheckFail, "it is not there", "apt install it"},
		{"a QEMU without a filter", func(_ *testing.T, h *Host, _ *store.Store) {
			h.Probe = func(context.Context, banger.Accel) (vmm.Info, error) { return vmm.Info{Program: "/q"}, nil }
		}, "qemu", banger.CheckWarn, "cannot filter", "seccomp"},
		{"a KVM that does not work", func(_ *testing.T, h *Host, _ *store.Store) {
			probe := h.Probe
			h.Probe = func(ctx context.Context, a banger.Accel) (vmm.Info, error) {
				if a == banger.AccelKVM {
					return vmm.Info{}, hinted
				}
				return probe(ctx, a)
			}
		}, "kvm", banger.CheckWarn, "emulated", "apt install it"},
		{"no kernel", func(_ *testing.T, h *Host, _ *store.Store) { h.Kernel = func() (string, error) { return "", notFound } },
			"kernel", banger.CheckWarn, "none is in the store", "banger kernel pull"},
		{"a kernel that cannot be read", func(_ *testing.T, h *Host, _ *store.Store) {
			h.Kernel = func() (string, error) { return "", errors.New("record: bad") }
		}, "kernel", banger.CheckFail, "record: bad", ""},
		{"no tun", func(t *testing.T, h *Host, _ *store.Store) { os.Remove(h.Root + "/dev/net/tun") },
			"tun", banger.CheckWarn, "no such file", "modprobe tun"},
		{"no cgroups of version 2", func(t *testing.T, h *Host, _ *store.Store) { os.Remove(h.Root + "/sys/fs/cgroup/cgroup.controllers") },
			"cgroups", banger.CheckWarn, "rlimits", "systemd"},
		{"no user manager", func(t *testing.T, h *Host, _ *store.Store) { os.Remove(h.Root + "/run/user/1/systemd/private") },
			"cgroups", banger.CheckWarn, "no user manager", "systemd"},
		{"no lingering", func(t *testing.T, h *Host, _ *store.Store) { os.RemoveAll(h.Root + "/var/lib/systemd/linger") },
			"linger", banger.CheckWarn, "VMs end when you log out", "loginctl enable-linger"},
		{"a daemon that is deaf", func(_ *testing.T, h *Host, _ *store.Store) {
			h.Daemon = func() (string, error) { return "", os.ErrDeadlineExceeded }
		}, "sockets", banger.CheckFail, "timeout", "kill $(pgrep"},
		{"a state folder for all", func(t *testing.T, _ *Host, s *store.Store) {
			if err := os.Chmod(s.Root(), 0o777); err != nil {
				t.Fatal(err)
			}
		}, "sockets", banger.CheckFail, "others may write", "chmod 0700"},
		{"a record that is cut", func(t *testing.T, _ *Host, s *store.Store) {
			write(t, filepath.Join(s.VM(create(t, s)), store.VMRecord), `{"schema":1`)
		}, "state", banger.CheckFail, "unexpected end", "rm -f ID"},
		{"a VM without its supervisor", func(t *testing.T, _ *Host, s *store.Store) {
			if err := vm.SaveLife(s, create(t, s), vm.Life{State: banger.StateRunning}); err != nil {
				t.Fatal(err)
			}
		}, "state", banger.CheckWarn, "dev (running)", "banger ls"},
		{"half a VM", func(t *testing.T, _ *Host, s *store.Store) {
			write(t, filepath.Join(s.Root(), "tmp", "vm-1", "x"), "")
		}, "state", banger.CheckWarn, "tmp/vm-1", "banger ls"},
	} {
		t.Run(c.what, func(t *testing.T) {
			h, s := healthy(t)
			c.change(t, &h, s)
			before := snapshot(t, s.Root())
			checks := h.Checks(t.Context())
			if after := snapshot(t, s.Root()); !maps.Equal(before, after) {
				t.Errorf("the state folder was %v, is %v", before, after)
			}
			seen := false
			for _, got := range checks {
				if got.Name == "" || got.Found == "" || got.State == banger.CheckOK && got.Fix != "" {
					t.Errorf("a check that says nothing, or too much: %+v", got)
				}
				if got.Name != c.name {
					// What depends on the real host may be anything.
					if got.State != banger.CheckOK && !slices.Contains([]string{"user-namespaces", "landlock", "space"}, got.Name) &&
						c.what != "no user manager" && c.what != "a QEMU without a filter" {
						t.Errorf("not asked for: %+v", got)
					}
					continue
				}
				seen = true
				if got.State != c.state || !strings.Contains(got.Found, c.found) || !strings.Contains(got.Fix, c.fix) {
					t.Errorf("got %+v", got)
				}
			}
			if !seen && c.name != "" {
				t.Error("nobody looked")
			}
		})
	}
}

// Without a daemon, and before there is anything, all is well too.
func TestNothingYet(t *testing.T) {
	h, _ := healthy(t)
	h.Store = store.View(filepath.Join(t.TempDir(), "not", "there"))
	for _, err := range []error{fs.ErrNotExist, syscall.ECONNREFUSED} {
		h.Daemon = func() (string, error) { return "", err }
		for _, c := range h.Checks(t.Context()) {
			if c.State == banger.CheckFail && c.Name != "space" {
				t.Errorf("%+v", c)
			}
		}
	}
	if _, err := os.Stat(h.Store.Root()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state folder: %v", err)
	}
}

// The doctor lets go of what it looked at, and takes one that is held for one
// that runs.
func TestLetsGo(t *testing.T) {
	h, s := healthy(t)
	r := vm.Record{ID: store.NewID(), Name: "dev"}
	if err := vm.Create(s, &r, ""); err != nil {
		t.Fatal(err)
	}
	if err := vm.SaveLife(s, r.ID, vm.Life{State: banger.StateStarting}); err != nil {
		t.Fatal(err)
	}
	h.state(t.Context())
	hold, err := s.HoldVM(r.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	if c := h.state(t.Context()); c.State != banger.CheckOK {
		t.Errorf("one that is held runs: %+v", c)
	}
}
