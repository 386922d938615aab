package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// Three lives of a real VM leave the daemon and the state folder as they were,
// and no process.
func TestLives(t *testing.T) {
	home := t.TempDir()
	if err := os.Symlink(world.kernels, filepath.Join(home, "kernels")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(home, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, p := range processesOf(home) {
			syscall.Kill(p.pid, syscall.SIGKILL)
		}
	})
	banger := func(args ...string) {
		t.Helper()
		cmd := exec.Command(filepath.Join(world.bin, "banger"), args...)
		cmd.Env = append(os.Environ(), "BANGER_HOME="+home)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("banger %q: %v\n%s", args, err, out)
		}
	}
	type residue struct{ files, descriptors, processes int }
	look := func() (r residue) {
		filepath.WalkDir(home, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() != "kernels" {
				r.files++
			}
			return nil
		})
		for _, p := range processesOf(home) {
			r.processes++
			if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid)); err == nil && p.is("bangerd serve") {
				r.descriptors = len(fds)
			}
		}
		return r
	}
	image := world.registry.addr + "/busybox:gzip"
	life := func() {
		banger("create", "--name", "dev", "-m", "256M", image)
		banger("start", "dev")
		banger("exec", "dev", "sh", "-c", "echo x > /root/x; sync")
		banger("stop", "dev")
		banger("rm", "dev")
	}
	life() // the image and the daemon come and stay
	before := look()
	for range 3 {
		life()
	}
	var after residue
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if after = look(); after == before {
			return
		}
	}
	t.Errorf("before %+v, after three lives %+v: %+v", before, after, processesOf(home))
}
