package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// The files of a foreign boot: what another tool puts around a root file
// system. The initramfs loads modules and switches root, and knows nothing of
// banger; the report is a service of the image's own.
const (
	foreignInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in /modules/*.ko; do /bin/busybox insmod $m; done
while [ ! -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /root
for d in proc sys dev; do /bin/busybox mount --move /$d /root/$d; done
exec /bin/busybox switch_root /root /sbin/init
`
	reportUnit = `[Unit]
Description=report of a foreign boot
After=banger-network.service banger-vsock-agent.service

[Service]
Type=oneshot
ExecStart=/bin/bash /usr/local/bin/report

[Install]
WantedBy=multi-user.target
`
	// report says what it finds on the console, and then over the network, once
	// that has a route.
	report = `exec 2>&1
report() {
	for u in banger-network banger-vsock-agent; do
		echo "$u: $(for p in ActiveState SubState Result; do systemctl show -P $p $u.service; done | tr '\n' ' ')"
	done
	echo "agent: $(readlink /proc/$(systemctl show -P MainPID banger-vsock-agent.service)/exe)"
	for p in /proc/[0-9]*; do
		case $(tr '\0' ' ' <$p/cmdline) in *banger*) echo "process: $(tr '\0' ' ' <$p/cmdline)" ;; esac
	done
	echo "routes: $(awk '$2 == "00000000" { print $3 }' /proc/net/route)"
	echo "init: $(tr '\0' ' ' </proc/1/cmdline)"
	echo "root: $(awk '$2 == "/" { print $1, $3 }' /proc/mounts)"
	echo "trigger: $(systemctl show -P UnitFileState systemd-udev-trigger.service)"
	echo end
}
for i in $(seq 600); do
	awk '$2 == "00000000" { found = 1 } END { exit !found }' /proc/net/route && break
	sleep 0.2
done
report >/dev/ttyS0
for word in $(cat /proc/cmdline); do case $word in report=*) report >/dev/tcp/10.0.2.2/${word#report=} ;; esac; done
`
)

// TestForeignBoot registers a root file system of another tool's making and
// boots a copy of its base by plain QEMU, with a kernel, an initramfs and an
// init that are not banger's: the agent answers, and says no more than it may,
// and the network comes up.
func TestForeignBoot(t *testing.T) {
	tarball, vmlinuz, modules := os.Getenv("BANGER_TEST_DEBIAN_TAR"), os.Getenv("BANGER_TEST_VMLINUZ"), os.Getenv("BANGER_TEST_MODULES_DIR")
	if tarball == "" || vmlinuz == "" || modules == "" {
		missing(t, "no root or no kernel (make test has both)")
	}
	for _, p := range []string{"mke2fs", "depmod", "cpio", "busybox"} {
		needProgram(t, p)
	}
	if os.Geteuid() != 0 {
		missing(t, "unpacking a root with its owners needs root")
	}
	root := filepath.Join(t.TempDir(), "root")
	must(t, os.Mkdir(root, 0o755))
	run(t, "tar", "-xpf", tarball, "-C", root, "--numeric-owner", "--exclude=./dev/*")
	put := func(dir, name, text string, mode os.FileMode) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), mode))
	}
	put(root, "etc/systemd/system/report.service", reportUnit, 0o644)
	put(root, "usr/local/bin/report", report, 0o755)
	put(root, "etc/hostname", "foreign\n", 0o644)
	must(t, os.MkdirAll(filepath.Join(root, "etc/systemd/system/multi-user.target.wants"), 0o755))
	must(t, os.Symlink("../report.service", filepath.Join(root, "etc/systemd/system/multi-user.target.wants/report.service")))
	// Its own modules, as an image with a kernel has them.
	version := filepath.Base(modules)
	kernel := filepath.Join(root, "usr/lib/modules", version, "kernel")
	must(t, os.MkdirAll(kernel, 0o755))
	run(t, "sh", "-c", `cd "$1/kernel" && cp -a --parents drivers/virtio drivers/char drivers/net/virtio_net.ko drivers/net/net_failover.ko net/core net/vmw_vsock "$2"`, "sh", modules, kernel)
	run(t, "depmod", "-b", root, version)
	made := filepath.Join(t.TempDir(), "made.ext4")
	run(t, "mke2fs", "-q", "-t", "ext4", "-d", root, made, "1G")

	initramfs := t.TempDir()
	put(initramfs, "init", foreignInit, 0o755)
	run(t, "cp", "--parents", "/bin/busybox", initramfs)
	must(t, os.Mkdir(filepath.Join(initramfs, "modules"), 0o755))
	for i, m := range []string{"virtio/virtio_ring", "virtio/virtio", "virtio/virtio_pci_legacy_dev", "virtio/virtio_pci_modern_dev", "virtio/virtio_pci", "block/virtio_blk"} {
		data, err := os.ReadFile(filepath.Join(modules, "kernel/drivers", m+".ko"))
		must(t, err)
		put(initramfs, fmt.Sprintf("modules/%d-%s.ko", i, filepath.Base(m)), string(data), 0o644)
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	run(t, "sh", "-c", `cd "$1" && find . | cpio --quiet -o -H newc >"$2"`, "sh", initramfs, initrd)

	for _, row := range []struct {
		name    string
		flags   []string
		trigger string // the state of a unit that trimming masks
	}{
		{"as it is", nil, "static"},
		{"trimmed", []string{"--trim"}, "masked"},
	} {
		t.Run(row.name, func(t *testing.T) {
			home := newStore(t)
			banger(t, home, append(append([]string{"image", "register", "--name", "made"}, row.flags...), made)...)
			disk := filepath.Join(t.TempDir(), "disk")
			run(t, "cp", "--sparse=always", baseOf(t, home, "made"), disk)

			listener, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			defer listener.Close()
			vm := bootForeign(t, vmlinuz, initrd, disk, listener.Addr().(*net.TCPAddr).Port)
			host := vm.connect()
			// Health for everybody, and nothing else without a token, of which
			// there is none.
			hello := vm.ask(host, `{"version":1,"op":"hello"}`)
			var answer struct {
				Version int `json:"version"`
				Hello   *struct {
					KernelRelease string `json:"kernel_release"`
					UptimeMs      int64  `json:"uptime_ms"`
					Booted        bool   `json:"booted"`
				} `json:"hello"`
			}
			must(t, json.Unmarshal(hello, &answer))
			if h := answer.Hello; h == nil || answer.Version != 1 || h.KernelRelease != version || h.UptimeMs <= 0 || h.Booted {
				t.Errorf("hello: %s", hello)
			}
			for _, request := range []string{
				`{"version":1,"op":"exec","exec":{"args":["id"]}}`, `{"version":1,"op":"boot"}`, `{"version":1,"op":"shutdown"}`,
				`{"version":1,"op":"exec","token":"","exec":{"args":["id"]}}`, `{"version":1,"op":"exec","token":"guess","exec":{"args":["id"]}}`,
			} {
				if reply := vm.ask(host, request); !strings.Contains(string(reply), `"code":"denied"`) {
					t.Errorf("%s: %s", request, reply)
				}
			}

			// What the guest says of itself, over its own network.
			must(t, listener.(*net.TCPListener).SetDeadline(time.Now().Add(foreignTimeout)))
			conn, err := listener.Accept()
			if err != nil {
				t.Fatalf("no report: %v\n%s", err, vm.console())
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(30 * time.Second))
			said, err := io.ReadAll(conn)
			must(t, err)
			want := regexp.MustCompile(`^banger-network: active exited success 
banger-vsock-agent: active running success 
agent: /usr/local/bin/banger-vsock-agent
process: /usr/local/bin/banger-vsock-agent 
routes: 0202000A
init: /sbin/init 
root: /dev/vda ext4
trigger: ` + row.trigger + `
end
$`)
			if !want.Match(said) {
				t.Errorf("the report:\n%s\nwant\n%s\nconsole:\n%s", said, want, vm.console())
			}
			// Still there, for another host on the same port.
			host.Close()
			if reply := vm.ask(vm.connect(), `{"version":1,"op":"hello"}`); !strings.Contains(string(reply), `"hello"`) {
				t.Errorf("a second host: %s", reply)
			}
			for _, p := range processesOf(home) {
				if p.is("bangerd supervise") {
					t.Errorf("a supervisor has a part in it: %s", p.line)
				}
			}
		})
	}
}

// foreignTimeout bounds an emulated boot on a busy machine.
const foreignTimeout = 3 * time.Minute

// foreignVM is a QEMU that banger knows nothing of.
type foreignVM struct {
	t   *testing.T
	dir string
}

// bootForeign starts an ordinary PC with a disk, a card on QEMU's own user
// network, and a virtio-serial port as docs/wire.md names it.
func bootForeign(t *testing.T, kernel, initrd, disk string, port int) *foreignVM {
	t.Helper()
	vm := &foreignVM{t, t.TempDir()}
	cmd := exec.Command("qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "512", "-nodefaults", "-no-reboot", "-display", "none",
		"-kernel", kernel, "-initrd", initrd, "-append", fmt.Sprintf("console=ttyS0 quiet panic=-1 net.ifnames=0 report=%d", port),
		"-serial", "file:"+filepath.Join(vm.dir, "console"),
		"-drive", "if=none,id=disk,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=disk",
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-chardev", "socket,id=agent,server=on,wait=off,path="+filepath.Join(vm.dir, "agent.sock"),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=banger.agent")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("QEMU: %s", said.Bytes())
		}
	})
	return vm
}

func (vm *foreignVM) console() string {
	data, _ := os.ReadFile(filepath.Join(vm.dir, "console"))
	return string(data)
}

// connect is a host on the port, by the bytes of docs/wire.md.
func (vm *foreignVM) connect() *yamux.Session {
	vm.t.Helper()
	var conn net.Conn
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if conn, err = net.Dial("unix", filepath.Join(vm.dir, "agent.sock")); err == nil {
			break
		}
	}
	must(vm.t, err)
	nonce := make([]byte, 16)
	rand.Read(nonce)
	conn.SetDeadline(time.Now().Add(foreignTimeout))
	_, err = conn.Write(append([]byte("banger-host/1\n"), nonce...))
	must(vm.t, err)
	want := append([]byte("banger-guest/1\n"), nonce...)
	var read []byte
	for one := make([]byte, 1); !bytes.HasSuffix(read, want); read = append(read, one[0]) {
		if _, err := io.ReadFull(conn, one); err != nil {
			vm.t.Fatalf("no agent: %v\n%s", err, vm.console())
		}
	}
	conn.SetDeadline(time.Time{})
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.StreamOpenTimeout = 0
	config.LogOutput = io.Discard
	mux, err := yamux.Client(conn, config)
	must(vm.t, err)
	vm.t.Cleanup(func() { mux.Close() })
	return mux
}

// ask opens a stream to the agent and gives the JSON of its reply.
func (vm *foreignVM) ask(host *yamux.Session, request string) []byte {
	vm.t.Helper()
	s, err := host.Open()
	must(vm.t, err)
	defer s.Close()
	s.SetDeadline(time.Now().Add(30 * time.Second))
	message := binary.BigEndian.AppendUint32(nil, 1024)
	message = binary.BigEndian.AppendUint32(message, uint32(len(request)))
	_, err = s.Write(append(message, request...))
	must(vm.t, err)
	var length uint32
	must(vm.t, binary.Read(s, binary.BigEndian, &length))
	if length > 1<<20 {
		vm.t.Fatalf("a reply of %d bytes", length)
	}
	reply := make([]byte, length)
	_, err = io.ReadFull(s, reply)
	must(vm.t, err)
	return reply
}
