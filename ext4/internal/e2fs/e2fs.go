// Package e2fs is what the tests of ext4 hold images against: e2fsprogs and
// the kernel. Nothing here passes because a tool is missing: the test is
// skipped with a message, and fails where the environment says CI=true.
package e2fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Tool gives the path of a program, also where only root has it in PATH.
func Tool(t testing.TB, name string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path := filepath.Join(dir, name); isFile(path) {
			return path
		}
	}
	Missing(t, name+" is not installed")
	return ""
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// Missing skips the test for want of something, loudly, or fails it in CI.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("cannot test: %s", what)
	}
	t.Skipf("NOT TESTED: %s", what)
}

// Run gives the output of a program, both streams, and its exit code.
func Run(t testing.TB, name string, args ...string) (output string, exit int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, Tool(t, name), args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC", "DEBUGFS_PAGER=cat", "PAGER=cat")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var status *exec.ExitError
	switch {
	case err == nil:
		return out.String(), 0
	case errors.As(err, &status) && status.Exited():
		return out.String(), status.ExitCode()
	}
	t.Fatalf("%s %q: %v\n%s", name, args, err, out.String())
	return "", 0
}

// Fsck gives all that e2fsck -fn has to say against an image, "" if it is
// clean. The exit code alone would not do: it is 0 for a wrong checksum of a
// group descriptor.
func Fsck(t testing.TB, image string) (complaints string) {
	t.Helper()
	out, exit := Run(t, "e2fsck", "-fn", image)
	summary := regexp.MustCompile(`^.*: \d+/\d+ files \([0-9.]+% non-contiguous\), \d+/\d+ blocks$`)
	passes := 0
	for line := range strings.Lines(out) {
		switch line = strings.TrimSpace(line); {
		case strings.HasPrefix(line, "Pass "):
			passes++
		case line == "" || strings.HasPrefix(line, "e2fsck ") || summary.MatchString(line):
		default:
			complaints += line + "\n"
		}
	}
	if exit != 0 || passes != 5 {
		complaints += fmt.Sprintf("e2fsck: exit %d after %d passes\n", exit, passes)
	}
	return complaints
}

// Clean requires an image that e2fsck has nothing to say about.
func Clean(t testing.TB, image string) {
	t.Helper()
	if out := Fsck(t, image); out != "" {
		t.Fatalf("e2fsck -fn:\n%s", clip(out))
	}
}

func clip(s string) string {
	const most = 4000
	if len(s) > most {
		return s[:most] + "\n..."
	}
	return s
}

// Mount mounts an image through a loop device and gives the folder. It is
// unmounted when the test ends, or by the function returned.
func Mount(t testing.TB, image string, options string) (dir string, unmount func()) {
	t.Helper()
	return MountType(t, "ext4", image, "loop,"+options)
}

// MountType is Mount for any file system and device, loop or not.
func MountType(t testing.TB, fstype, device, options string) (dir string, unmount func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "mounting needs root")
	}
	dir = t.TempDir()
	out, exit := Run(t, "mount", "-t", fstype, "-o", options, device, dir)
	if exit != 0 {
		if strings.Contains(out, "loop device") || strings.Contains(out, "unknown filesystem type") {
			Missing(t, strings.TrimSpace(out))
		}
		kernel, _ := Run(t, "dmesg")
		t.Fatalf("mount: exit %d: %s\n%s", exit, out, kernel[max(0, len(kernel)-1000):])
	}
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		if out, exit := Run(t, "umount", dir); exit != 0 {
			t.Errorf("umount: exit %d: %s", exit, out)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}
