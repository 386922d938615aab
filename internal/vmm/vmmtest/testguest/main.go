// Testguest is the first process of the guest that driver tests boot. It loads
// the modules in /modules in the order of their names, speaks the agent's side
// of the channel, and does what package guestops asks.
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"banger/internal/vmm/vmmtest/guestops"
	"banger/internal/wire"
)

func main() {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		_ = os.MkdirAll(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			fatal("mount", err)
		}
	}
	console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err != nil {
		fatal("console", err)
	}
	g := &guest{console: console}
	g.Print(wire.ReadyLine + "\n")
	if err := loadModules("/modules"); err != nil {
		g.Print(err.Error() + "\n")
		fatal("modules", err)
	}
	for {
		if err := g.serve(); err != nil {
			g.Print(err.Error() + "\n")
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func fatal(what string, err error) {
	fmt.Fprintf(os.Stderr, "testguest: %s: %v\n", what, err)
	powerCommand(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// loadModules loads all modules of a folder. Which needs which differs between
// kernels, so those that lack another (ENOENT) are tried again after it.
func loadModules(folder string) error {
	names, err := filepath.Glob(folder + "/*.ko")
	if err != nil {
		return err
	}
	for len(names) > 0 {
		var again []string
		for _, name := range names {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
			switch {
			case err == nil, errors.Is(err, unix.EEXIST):
			case errors.Is(err, unix.ENOENT):
				again = append(again, name)
			default:
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if len(again) == len(names) {
			return fmt.Errorf("%s: %w", again[0], unix.ENOENT)
		}
		names = again
	}
	return nil
}

type guest struct {
	mu      sync.Mutex // of console
	console *os.File

	hung    atomic.Bool
	session *yamux.Session
}

// serve opens the port, serves one session and closes the port.
func (g *guest) serve() error {
	port, err := openPort()
	if err != nil {
		return err
	}
	defer port.Close()
	if g.hung.Load() {
		for {
			time.Sleep(time.Hour)
		}
	}
	if err := wire.HandshakeGuest(port); err != nil {
		return err
	}
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive = false
	cfg.ConnectionWriteTimeout = time.Hour
	cfg.MaxStreamWindowSize = 1 << 20
	cfg.LogOutput = io.Discard
	session, err := yamux.Server(port, cfg)
	if err != nil {
		return err
	}
	defer session.Close()
	g.session = session
	for {
		conn, err := session.Accept()
		if err != nil {
			return nil
		}
		go g.stream(conn)
	}
}

func (g *guest) stream(conn net.Conn) {
	var service [4]byte
	if _, err := io.ReadFull(conn, service[:]); err != nil {
		conn.Close()
		return
	}
	guestops.Serve(conn, binary.BigEndian.Uint32(service[:]), g)
}

// openPort waits for the virtio-serial port.
func openPort() (*os.File, error) {
	for range 1000 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err == nil && strings.TrimSpace(string(text)) == wire.PortName {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(name)), os.O_RDWR|unix.O_NONBLOCK, 0)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, errors.New("testguest: no virtio-serial port " + wire.PortName)
}

func (g *guest) Print(text string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, _ = io.WriteString(g.console, text)
}

func powerCommand(command int) {
	unix.Sync()
	_ = unix.Reboot(command)
}

func (g *guest) Off()    { powerCommand(unix.LINUX_REBOOT_CMD_POWER_OFF) }
func (g *guest) Reboot() { powerCommand(unix.LINUX_REBOOT_CMD_RESTART) }
func (g *guest) Panic()  { _ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0) }

// Hang makes serve open the port once more and then say nothing.
func (g *guest) Hang() {
	g.hung.Store(true)
	g.session.Close()
}

func (g *guest) Restart() { g.session.Close() }

// OpenStream counts a stream that is neither served nor refused as taken.
func (g *guest) OpenStream() error {
	conn, err := g.session.Open()
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, yamux.ErrTimeout) {
		return err
	}
	return nil
}

// drive finds the block device that begins with marker.
func drive(marker string, flags int) (*os.File, error) {
	names, _ := filepath.Glob("/sys/block/vd*")
	for _, name := range names {
		path := "/dev/" + filepath.Base(name)
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		var head [guestops.MarkerBytes]byte
		_, err = io.ReadFull(f, head[:])
		f.Close()
		if err == nil && string(bytes.TrimRight(head[:], "\x00")) == marker {
			return os.OpenFile(path, flags, 0)
		}
	}
	return nil, fmt.Errorf("no drive begins with %q", marker)
}

func (g *guest) Write(marker, text string) error {
	f, err := drive(marker, os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	sector := make([]byte, guestops.SectorBytes)
	copy(sector, text)
	if _, err := f.WriteAt(sector, guestops.WriteOffset); err != nil {
		return err
	}
	return f.Sync()
}

func (g *guest) Read(marker string) (string, error) {
	f, err := drive(marker, os.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sector := make([]byte, guestops.SectorBytes)
	if _, err := f.ReadAt(sector, guestops.WriteOffset); err != nil {
		return "", err
	}
	return string(bytes.TrimRight(sector, "\x00")), nil
}

func (g *guest) Trim(marker string) error {
	f, err := drive(marker, os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	span := [2]uint64{guestops.TrimOffset, guestops.TrimBytes}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return fmt.Errorf("discard: %w", errno)
	}
	return nil
}

// card opens the first network card that is none of the kernel's own.
func card() (link net.Interface, fd int, err error) {
	links, err := net.Interfaces()
	if err != nil {
		return link, 0, err
	}
	for _, l := range links {
		if l.Flags&net.FlagLoopback == 0 && len(l.HardwareAddr) == 6 {
			link = l
		}
	}
	if link.Name == "" {
		return link, 0, errors.New("no network card")
	}
	control, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return link, 0, err
	}
	defer unix.Close(control)
	ifr, err := unix.NewIfreq(link.Name)
	if err != nil {
		return link, 0, err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(control, unix.SIOCSIFFLAGS, ifr); err != nil {
		return link, 0, err
	}
	protocol := uint16(guestops.EtherType&0xff<<8 | guestops.EtherType>>8) // htons
	if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(protocol)); err != nil {
		return link, 0, err
	}
	return link, fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: link.Index})
}

func (g *guest) Card() (string, error) {
	link, fd, err := card()
	if err != nil {
		return "", err
	}
	go func() {
		buf := make([]byte, 128<<10)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if answer := guestops.EchoFrame([6]byte(link.HardwareAddr), buf[:n]); answer != nil {
				_, _ = unix.Write(fd, answer)
			}
		}
	}()
	return fmt.Sprint(link.HardwareAddr, " ", link.MTU), nil
}

func (g *guest) Flood(frames int) error {
	link, fd, err := card()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// A card whose queue is full takes no more: that is not waited for.
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	mac := [6]byte(link.HardwareAddr)
	frame := guestops.Frame([6]byte{2, 0, 0, 0, 0, 1}, mac, make([]byte, link.MTU))
	for range frames {
		_, _ = unix.Write(fd, frame)
	}
	return nil
}
