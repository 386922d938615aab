// Command bootinit is the first process of the guest in TestPullDebian: it
// loads the boot modules, mounts the modules drive and loads one module from
// there, and says on the console how far it came.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	err := run()
	if err != nil {
		fmt.Println("bootinit: failed:", err)
	} else {
		fmt.Println("bootinit: all is well")
	}
	time.Sleep(100 * time.Millisecond) // for the console
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	select {}
}

func run() error {
	for _, m := range []string{"proc", "sysfs", "devtmpfs"} {
		target := map[string]string{"proc": "/proc", "sysfs": "/sys", "devtmpfs": "/dev"}[m]
		if err := syscall.Mount(m, target, m, 0, ""); err != nil && err != syscall.EBUSY {
			return fmt.Errorf("mount %s: %w", m, err)
		}
	}
	data, err := os.ReadFile("/banger/boot.json")
	if err != nil {
		return err
	}
	var boot struct {
		Release, Want string
		Modules       []string
	}
	if err := json.Unmarshal(data, &boot); err != nil {
		return err
	}
	for _, m := range boot.Modules {
		if err := load(m); err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	dir := "/lib/modules/" + boot.Release
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for range 50 { // until the disk is found
		if err = syscall.Mount("/dev/vda", dir, "ext4", syscall.MS_RDONLY, ""); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("mount the modules drive: %w", err)
	}
	dep, err := os.ReadFile(dir + "/modules.dep")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(dep)) {
		file, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
		if !strings.HasSuffix(strings.TrimSuffix(file, ".xz"), "/"+boot.Want+".ko") {
			continue
		}
		paths := append([]string{file}, strings.Fields(needs)...)
		for i := len(paths) - 1; i >= 0; i-- {
			if err := load(dir + "/" + paths[i]); err != nil && err != syscall.EEXIST {
				return fmt.Errorf("load %s: %w", paths[i], err)
			}
		}
	}
	loaded, err := os.ReadFile("/proc/modules")
	if err != nil {
		return err
	}
	for _, want := range []string{"overlay", boot.Want} {
		if !strings.Contains("\n"+string(loaded), "\n"+want+" ") {
			return fmt.Errorf("%s is not loaded:\n%s", want, loaded)
		}
	}
	return nil
}

// load is finit_module(2); the kernel itself unpacks .xz files.
func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	const finitModule, compressed = 313, 4
	flags := uintptr(0)
	if strings.HasSuffix(path, ".xz") {
		flags = compressed
	}
	empty := []byte{0}
	if _, _, errno := syscall.Syscall(finitModule, f.Fd(), uintptr(unsafe.Pointer(&empty[0])), flags); errno != 0 {
		return errno
	}
	return nil
}
