package qemu

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest"
)

// The guest of these tests needs a kernel with its modules, e.g. Debian's
// linux-image-cloud-amd64, unpacked anywhere.
const (
	vmlinuzVar = "BANGER_TEST_VMLINUZ"     // a vmlinux or bzImage
	modulesVar = "BANGER_TEST_MODULES_DIR" // its lib/modules/VERSION folder
)

// guestModules is what the kernel may have as modules; the guest finds the
// order.
var guestModules = []string{"virtio", "virtio_ring", "virtio_mmio", "virtio_blk", "virtio_console", "rng-core", "virtio-rng", "failover", "net_failover", "virtio_net"}

// need skips the test when something of the machine is missing, but not where
// tests must be complete.
func need(tb testing.TB, ok bool, what string) {
	tb.Helper()
	if ok {
		return
	}
	if os.Getenv("CI") == "true" {
		tb.Fatalf("needed for this test: %s", what)
	}
	tb.Skipf("SKIPPED, since this is missing: %s", what)
}

var testInitrd = sync.OnceValues(buildInitrd)

// buildInitrd makes the initramfs: the test guest, and modules if there are.
// The caller's process ends with it in the temporary folder of the tests.
func buildInitrd() ([]byte, error) {
	folder, err := os.MkdirTemp("", "banger-testguest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(folder)
	program := filepath.Join(folder, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "banger/internal/vmm/vmmtest/testguest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("test guest: %w: %s", err, out)
	}
	var archive cpio
	for _, dir := range []string{"dev", "modules", "proc", "sys"} {
		archive.add(dir, unix.S_IFDIR|0o755, 0, nil)
	}
	archive.add("dev/console", unix.S_IFCHR|0o600, unix.Mkdev(5, 1), nil)
	init, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	archive.add("init", unix.S_IFREG|0o755, 0, init)
	paths := make(map[string]string)
	err = filepath.WalkDir(filepath.Join(os.Getenv(modulesVar), "kernel"), func(path string, e fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			paths[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for i, name := range guestModules {
		path, ok := paths[strings.ReplaceAll(name, "-", "_")]
		if !ok {
			continue // built in, or not needed: the boot will tell
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		archive.add(fmt.Sprintf("modules/%02d-%s.ko", i, name), unix.S_IFREG|0o644, 0, data)
	}
	return archive.end(), nil
}

// A cpio is an archive in the "newc" format (Linux,
// Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	bytes.Buffer
	inode uint32
}

func (c *cpio) add(name string, mode uint32, rdev uint64, data []byte) {
	c.inode++
	fmt.Fprintf(c, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", c.inode, mode, 0, 0, 1, 0, len(data),
		0, 0, unix.Major(rdev), unix.Minor(rdev), len(name)+1, 0)
	c.WriteString(name + "\x00")
	c.pad()
	c.Write(data)
	c.pad()
}

func (c *cpio) pad() { c.Write(make([]byte, -c.Len()&3)) }

func (c *cpio) end() []byte {
	c.add("TRAILER!!!", 0, 0, nil)
	return c.Bytes()
}

// testMachine describes a machine that boots the test guest.
func testMachine(tb testing.TB) vmm.Machine {
	tb.Helper()
	_, err := exec.LookPath(program)
	need(tb, err == nil, program)
	kernel := os.Getenv(vmlinuzVar)
	need(tb, kernel != "", "a kernel in "+vmlinuzVar)
	need(tb, os.Getenv(modulesVar) != "", "its modules in "+modulesVar)
	initrd, err := testInitrd()
	if err != nil {
		tb.Fatal(err)
	}
	// A name no option parser should see: it must not matter.
	folder := filepath.Join(tb.TempDir(), "a,b=c \"d'\n,,on")
	run := filepath.Join(folder, "run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		tb.Fatal(err)
	}
	path := filepath.Join(folder, "initrd,on")
	if err := os.WriteFile(path, initrd, 0o600); err != nil {
		tb.Fatal(err)
	}
	return vmm.Machine{
		ID: "0123456789ab", RunDir: run, CPUs: 1, MemoryBytes: 256 << 20, Accel: banger.AccelAuto,
		Boot: vmm.Boot{Kernel: kernel, Initrd: path, Args: []string{"cryptomgr.notests"}},
	}
}

func TestConformance(t *testing.T) {
	testMachine(t) // skip here, once, rather than in every part
	vmmtest.Run(t, vmmtest.Harness{
		New:         func(testing.TB) vmm.Driver { return confined() },
		Machine:     testMachine,
		BootTimeout: 2 * time.Minute,
		Processes:   true,
	})
}
