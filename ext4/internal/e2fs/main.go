package e2fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
)

// Main runs the tests of a package in a mount namespace of their own, when
// root. Else a program that starts meanwhile in a namespace of its own takes
// copies of our mounts along, and an image that a test has unmounted stays
// mounted there.
func Main(m *testing.M) int {
	const inside = "E2FS_NAMESPACE"
	if os.Geteuid() != 0 || os.Getenv(inside) != "" {
		return m.Run()
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the signal comes when the thread ends
	err = cmd.Run()
	var status *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return status.ExitCode()
	case errors.Is(err, syscall.EPERM): // root of a container
		return m.Run()
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}
