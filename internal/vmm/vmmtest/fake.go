// Package vmmtest holds a driver without a VMM, for tests of what uses
// drivers, and the conformance suite that every driver passes, the fake
// included.
package vmmtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger"
	"banger/internal/vmm"
	"banger/internal/vmm/vmmtest/guestops"
	"banger/internal/wire"
)

// Options say how a Fake behaves. The zero value is a driver whose guests boot
// at once and do what package guestops asks.
type Options struct {
	// Serve is the guest's side of a stream; it owns conn. Its connection
	// stands still while the machine is paused, and breaks when it ends.
	Serve func(g *FakeGuest, port uint32, conn net.Conn)
	// Console is printed when a machine starts, before the agent is there.
	// "" stands for wire.ReadyLine.
	Console string
	// AgentDelay is how long after the start the agent answers; negative: it
	// never does.
	AgentDelay time.Duration
	// OnStart, if set, is told of every machine that started, before Start
	// returns.
	OnStart func(g *FakeGuest)
	// FailAt makes the call of that number fail, counted from 1 over all calls
	// of Probe, Start, DialGuest, Pause, Resume, Quit and Kill; 0 for none. A
	// Kill that fails kills nothing.
	FailAt int
	// FailErr is the error then; nil for a *banger.Error with CodeInternal.
	FailErr error
	// Deaf makes Quit be accepted and do nothing, as a VMM that is stuck.
	Deaf bool
}

// A Fake is a driver whose machines live in memory. It opens and locks drives
// as a real one does, and may be used from any goroutine.
type Fake struct {
	opt Options

	mu     sync.Mutex
	calls  []string
	guests []*FakeGuest
	locks  map[fileID]int // -1: a writer; n: readers
}

type fileID struct{ dev, ino uint64 }

// NewFake makes a driver.
func NewFake(opt Options) *Fake {
	if opt.Console == "" {
		opt.Console = wire.ReadyLine + "\n"
	}
	if opt.Serve == nil {
		opt.Serve = func(g *FakeGuest, port uint32, conn net.Conn) { guestops.Serve(conn, port, fakeOps{g}) }
	}
	if opt.FailErr == nil {
		opt.FailErr = banger.Errorf(banger.CodeInternal, "fake: told to fail")
	}
	return &Fake{opt: opt, locks: make(map[fileID]int)}
}

var (
	_ vmm.Driver  = (*Fake)(nil)
	_ vmm.Process = (*FakeGuest)(nil)
)

// Calls are the names of the calls so far, in order: the numbers for FailAt.
func (f *Fake) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// Guests are the machines that were started, in order.
func (f *Fake) Guests() []*FakeGuest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.guests)
}

func (f *Fake) call(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, name)
	if len(f.calls) == f.opt.FailAt {
		return f.opt.FailErr
	}
	return nil
}

// Probe implements vmm.Driver.
func (f *Fake) Probe(ctx context.Context, accel banger.Accel) (vmm.Info, error) {
	if err := f.call("Probe"); err != nil {
		return vmm.Info{}, err
	}
	return fakeInfo(accel)
}

func fakeInfo(accel banger.Accel) (vmm.Info, error) {
	switch accel {
	case banger.AccelAuto, "", banger.AccelTCG:
		return vmm.Info{Driver: "fake", Program: "/nonexistent/fake", Version: "1.0.0", Accel: banger.AccelTCG, Reason: "there is no VMM"}, nil
	case banger.AccelKVM:
		return vmm.Info{}, banger.Errorf(banger.CodeUnavailable, "kvm: there is no VMM").WithHint("--accel tcg")
	}
	return vmm.Info{}, banger.Errorf(banger.CodeUsage, "accel: %q is none of auto, kvm, tcg", accel)
}

// The fake's limits; any driver has some.
const (
	fakeMaxCPUs        = 64
	fakeMaxMemoryBytes = 1 << 46
	// fakeFirstPID is past the greatest process id Linux gives
	// (PID_MAX_LIMIT), so that signalling it hits nobody.
	fakeFirstPID = 1 << 22
)

// Start implements vmm.Driver. The process is a *FakeGuest.
func (f *Fake) Start(ctx context.Context, m vmm.Machine) (vmm.Process, error) {
	if err := f.call("Start"); err != nil {
		return nil, err
	}
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("fake: %w", err)
	}
	info, err := fakeInfo(m.Accel)
	if err != nil {
		return nil, err
	}
	switch {
	case m.CPUs < 1 || m.CPUs > fakeMaxCPUs:
		return nil, banger.Errorf(banger.CodeUsage, "cpus: %d asked, the fake takes 1 to %d", m.CPUs, fakeMaxCPUs)
	case m.MemoryBytes < 1 || m.MemoryBytes%(1<<20) != 0:
		return nil, banger.Errorf(banger.CodeUsage, "memory: %d bytes asked, which is not a multiple of 1 MiB", m.MemoryBytes)
	case m.MemoryBytes > fakeMaxMemoryBytes:
		return nil, banger.Errorf(banger.CodeUnavailable, "memory: %d bytes asked, the fake has %d", m.MemoryBytes, int64(fakeMaxMemoryBytes))
	}
	g := &FakeGuest{
		fake: f, m: m, info: info,
		ended: make(chan struct{}), done: make(chan struct{}), changed: make(chan struct{}),
	}
	for _, path := range []string{m.Boot.Kernel, m.Boot.Initrd} {
		if path == "" && path == m.Boot.Initrd {
			continue
		}
		file, err := openRegular(path, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		file.Close()
	}
	for _, d := range m.Drives {
		if err := g.attach(d); err != nil {
			g.detach()
			return nil, err
		}
	}
	if m.NIC != nil {
		if err := g.plugIn(*m.NIC); err != nil {
			g.detach()
			return nil, err
		}
	}
	f.mu.Lock()
	g.pid = fakeFirstPID + len(f.guests)
	f.guests = append(f.guests, g)
	f.mu.Unlock()
	g.Print(f.opt.Console)
	g.setAgent(f.opt.AgentDelay == 0)
	if d := f.opt.AgentDelay; d > 0 {
		g.work.Go(func() {
			select {
			case <-time.After(d):
				g.setAgent(true)
			case <-g.ended:
			}
		})
	}
	if f.opt.OnStart != nil {
		f.opt.OnStart(g)
	}
	return g, nil
}

func openRegular(path string, flags int) (*os.File, error) {
	file, err := os.OpenFile(path, flags|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, banger.Errorf(banger.CodeNotFound, "fake: %w", err)
	}
	if errors.Is(err, syscall.EISDIR) {
		return nil, banger.Errorf(banger.CodeInvalid, "fake: %w", err)
	}
	if err != nil {
		return nil, banger.Errorf(banger.CodeUnavailable, "fake: %w", err)
	}
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		file.Close()
		return nil, banger.Errorf(banger.CodeInvalid, "fake: %q is not a regular file", path)
	}
	return file, nil
}

// A FakeGuest is a started machine: the process as its user sees it, and the
// guest as the test moves it.
type FakeGuest struct {
	fake *Fake
	m    vmm.Machine
	info vmm.Info
	pid  int

	drives []fakeDrive
	card   *fakeCard // nil for none
	work   sync.WaitGroup

	printing sync.Mutex // one Write to the console at a time

	mu      sync.Mutex
	paused  bool
	agent   bool          // it answers
	changed chan struct{} // closed and replaced when paused or agent changes
	conns   map[*fakeConn]bool
	over    bool
	exit    vmm.Exit
	ended   chan struct{} // closed with over
	done    chan struct{}
}

type fakeDrive struct {
	id       fileID
	file     *os.File
	readOnly bool
}

// attach opens and locks a drive.
func (g *FakeGuest) attach(d vmm.Drive) error {
	flags := os.O_RDWR
	if d.ReadOnly {
		flags = os.O_RDONLY
	}
	file, err := openRegular(d.Path, flags)
	if err != nil {
		return err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(file.Fd()), &st); err != nil {
		file.Close()
		return fmt.Errorf("fake: %w", err)
	}
	id := fileID{st.Dev, st.Ino}
	g.fake.mu.Lock()
	defer g.fake.mu.Unlock()
	users := g.fake.locks[id]
	if users < 0 || users > 0 && !d.ReadOnly {
		file.Close()
		return banger.Errorf(banger.CodeConflict, "fake: drive %q is in use", d.Path)
	}
	if d.ReadOnly {
		g.fake.locks[id]++
	} else {
		g.fake.locks[id] = -1
	}
	g.drives = append(g.drives, fakeDrive{id, file, d.ReadOnly})
	return nil
}

// detach closes and unlocks all drives.
func (g *FakeGuest) detach() {
	g.fake.mu.Lock()
	defer g.fake.mu.Unlock()
	for _, d := range g.drives {
		d.file.Close()
		if d.readOnly && g.fake.locks[d.id] > 1 {
			g.fake.locks[d.id]--
		} else {
			delete(g.fake.locks, d.id)
		}
	}
	g.drives = nil
}

// A fakeCard is the guest's network card.
type fakeCard struct {
	vmm.NIC
	conn net.Conn
	up   atomic.Bool
	out  chan []byte
}

// cardQueue is how many frames wait for a host that reads none; then the card
// drops, as real ones do.
const cardQueue = 256

// plugIn makes the card and gives its stream to whoever wants it.
func (g *FakeGuest) plugIn(nic vmm.NIC) error {
	host, guest, err := newStream()
	if err != nil {
		return err
	}
	if err := nic.Attach(host); err != nil {
		guest.Close()
		return err
	}
	c := &fakeCard{NIC: nic, conn: guest, out: make(chan []byte, cardQueue)}
	g.card = c
	g.work.Go(func() {
		for {
			select {
			case f := <-c.out:
				if _, err := c.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(f))), f...)); err != nil {
					return
				}
			case <-g.ended:
				return
			}
		}
	})
	g.work.Go(func() {
		var head [4]byte
		frame := make([]byte, fakeMaxFrameBytes)
		for {
			if _, err := io.ReadFull(c.conn, head[:]); err != nil {
				return
			}
			size := binary.BigEndian.Uint32(head[:])
			if size > fakeMaxFrameBytes {
				return
			}
			if _, err := io.ReadFull(c.conn, frame[:size]); err != nil {
				return
			}
			if answer := guestops.EchoFrame(c.MAC, frame[:size]); answer != nil && c.up.Load() {
				c.send(answer)
			}
		}
	})
	return nil
}

const fakeMaxFrameBytes = 128 << 10

func (c *fakeCard) send(frame []byte) {
	select {
	case c.out <- frame:
	default:
	}
}

// Machine is what the driver was given.
func (g *FakeGuest) Machine() vmm.Machine { return g.m }

// SendFrame has the guest's card send a frame to a MAC; a guest without one
// sends nothing.
func (g *FakeGuest) SendFrame(to [6]byte, etherType uint16, payload []byte) {
	if g.card != nil {
		frame := append(append([]byte(nil), to[:]...), g.card.MAC[:]...)
		g.card.send(append(binary.BigEndian.AppendUint16(frame, etherType), payload...))
	}
}

// Print writes to the console, unless the machine has ended.
func (g *FakeGuest) Print(text string) {
	g.printing.Lock()
	defer g.printing.Unlock()
	g.mu.Lock()
	over := g.over
	g.mu.Unlock()
	if g.m.Console != nil && !over {
		_, _ = io.WriteString(g.m.Console, text)
	}
}

// PowerOff, Reboot and Panic are what a guest does by itself.
func (g *FakeGuest) PowerOff() { g.end(vmm.CauseGuestOff, 0, "") }
func (g *FakeGuest) Reboot()   { g.end(vmm.CauseGuestReboot, 0, "") }
func (g *FakeGuest) Panic()    { g.end(vmm.CauseGuestPanic, 0, "") }

// Crash ends the VMM with code 1 and what it printed last.
func (g *FakeGuest) Crash(output string) {
	g.end(vmm.CauseCrashed, 1, output[max(0, len(output)-vmm.MaxOutputBytes):])
}

// StopAgent breaks all streams and answers no more; StartAgent begins again.
func (g *FakeGuest) StopAgent() {
	g.setAgent(false)
	g.breakConns()
}

// StartAgent makes the agent answer, as if it had just come up.
func (g *FakeGuest) StartAgent() { g.setAgent(true) }

func (g *FakeGuest) setAgent(on bool) { g.set(func() { g.agent = on }) }

// set changes the state and wakes who waits for it.
func (g *FakeGuest) set(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *FakeGuest) breakConns() {
	g.mu.Lock()
	conns := g.conns
	g.conns = nil
	g.mu.Unlock()
	for c := range conns {
		c.snap()
	}
}

// end is the end of the machine; the first one counts.
func (g *FakeGuest) end(cause vmm.Cause, code int, output string) {
	g.mu.Lock()
	if g.over {
		g.mu.Unlock()
		return
	}
	g.over = true
	g.exit = vmm.Exit{Cause: cause, Code: code, Output: output}
	close(g.ended)
	g.mu.Unlock()
	go func() {
		g.breakConns()
		if g.card != nil {
			g.card.conn.Close()
		}
		g.work.Wait()
		g.printing.Lock() // the last Print is through
		g.printing.Unlock()
		g.detach()
		g.mu.Lock()
		g.exit.Time = time.Now()
		g.mu.Unlock()
		close(g.done)
	}()
}

// Info implements vmm.Process.
func (g *FakeGuest) Info() vmm.Info { return g.info }

// PID implements vmm.Process: a number no process has.
func (g *FakeGuest) PID() int { return g.pid }

// DialGuest implements vmm.Process.
func (g *FakeGuest) DialGuest(ctx context.Context, port uint32) (net.Conn, error) {
	if err := g.fake.call("DialGuest"); err != nil {
		return nil, err
	}
	for {
		g.mu.Lock()
		changed := g.changed
		switch {
		case g.over:
			g.mu.Unlock()
			return nil, vmm.ErrEnded
		case ctx.Err() != nil:
			g.mu.Unlock()
			return nil, fmt.Errorf("agent: does not answer: %w", context.Cause(ctx))
		case g.agent && !g.paused:
			host, guest, err := newStream()
			if err != nil {
				g.mu.Unlock()
				return nil, err
			}
			c := &fakeConn{Conn: host, guest: guest, broken: make(chan struct{})}
			if g.conns == nil {
				g.conns = make(map[*fakeConn]bool)
			}
			g.conns[c] = true
			// Not waited for: Serve belongs to the test, and its stream breaks
			// with the end.
			go g.fake.opt.Serve(g, port, &pausableConn{guest, g, c})
			g.mu.Unlock()
			return c, nil
		}
		g.mu.Unlock()
		select {
		case <-changed:
		case <-g.ended:
		case <-ctx.Done():
		}
	}
}

// Pause implements vmm.Process.
func (g *FakeGuest) Pause(ctx context.Context) error { return g.setPaused(ctx, "Pause", true) }

// Resume implements vmm.Process.
func (g *FakeGuest) Resume(ctx context.Context) error { return g.setPaused(ctx, "Resume", false) }

func (g *FakeGuest) setPaused(ctx context.Context, name string, paused bool) error {
	if err := g.fake.call(name); err != nil {
		return err
	}
	select {
	case <-g.ended:
		return vmm.ErrEnded
	default:
	}
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("fake: %w", err)
	}
	g.set(func() { g.paused = paused })
	return nil
}

// Quit implements vmm.Process.
func (g *FakeGuest) Quit(ctx context.Context) error {
	if err := g.fake.call("Quit"); err != nil {
		return err
	}
	if !g.fake.opt.Deaf {
		g.end(vmm.CauseQuit, 0, "")
	}
	return nil
}

// Kill implements vmm.Process.
func (g *FakeGuest) Kill() error {
	if err := g.fake.call("Kill"); err != nil {
		return err
	}
	g.end(vmm.CauseKilled, -1, "")
	return nil
}

// Done implements vmm.Process.
func (g *FakeGuest) Done() <-chan struct{} { return g.done }

// Exit implements vmm.Process. State is nil.
func (g *FakeGuest) Exit() vmm.Exit {
	select {
	case <-g.done:
		return g.exit
	default:
		return vmm.Exit{}
	}
}

// A fakeConn is the host's end of a stream.
type fakeConn struct {
	net.Conn
	guest  net.Conn
	once   sync.Once
	broken chan struct{}
}

// snap ends the stream as a broken session does.
func (c *fakeConn) snap() {
	c.once.Do(func() {
		close(c.broken)
		c.guest.Close()
	})
}

func (c *fakeConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return n, c.plain(err)
}

func (c *fakeConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	return n, c.plain(err)
}

// plain makes the end of a stream what the contract promises. A socket that
// is closed before all was read resets its peer; streams end orderly then.
func (c *fakeConn) plain(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		return err
	}
	select {
	case <-c.broken:
		return io.ErrUnexpectedEOF
	default:
		return io.EOF
	}
}

// newStream makes a socket pair: it buffers, as real streams do.
func newStream() (host, guest net.Conn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("fake: socket pair: %w", err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "fake")
		c, cerr := net.FileConn(f)
		f.Close()
		ends[i], err = c, errors.Join(err, cerr)
	}
	if err != nil {
		for _, c := range ends {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, fmt.Errorf("fake: socket pair: %w", err)
	}
	return ends[0], ends[1], nil
}

// A pausableConn is the guest's end, which stands still in a pause.
type pausableConn struct {
	net.Conn
	g    *FakeGuest
	host *fakeConn
}

// run waits until the guest runs or the stream breaks.
func (c *pausableConn) run() {
	for {
		c.g.mu.Lock()
		paused, changed := c.g.paused, c.g.changed
		c.g.mu.Unlock()
		if !paused {
			return
		}
		select {
		case <-changed:
		case <-c.host.broken:
			return
		}
	}
}

func (c *pausableConn) Read(p []byte) (int, error) {
	c.run()
	n, err := c.Conn.Read(p)
	c.run() // a pause while it waited
	return n, err
}

func (c *pausableConn) Write(p []byte) (int, error) {
	c.run()
	return c.Conn.Write(p)
}

func (c *pausableConn) Close() error {
	c.g.mu.Lock()
	delete(c.g.conns, c.host)
	c.g.mu.Unlock()
	return c.Conn.Close()
}

// fakeOps does in memory what package guestops asks of a guest.
type fakeOps struct{ g *FakeGuest }

func (o fakeOps) Print(text string) { o.g.Print(text) }
func (o fakeOps) Off()              { o.g.PowerOff() }
func (o fakeOps) Reboot()           { o.g.Reboot() }
func (o fakeOps) Panic()            { o.g.Panic() }
func (o fakeOps) Hang()             { o.g.StopAgent() }
func (o fakeOps) Restart()          { o.g.StopAgent(); o.g.StartAgent() }
func (o fakeOps) OpenStream() error { return errors.New("the host takes no streams") }

// drive finds the drive that begins with marker.
func (o fakeOps) drive(marker string) (*os.File, error) {
	o.g.fake.mu.Lock()
	defer o.g.fake.mu.Unlock()
	for _, d := range o.g.drives {
		head := make([]byte, guestops.MarkerBytes)
		if _, err := d.file.ReadAt(head, 0); err == nil && trimZeros(head) == marker {
			return d.file, nil
		}
	}
	return nil, fmt.Errorf("no drive begins with %q", marker)
}

func (o fakeOps) Write(marker, text string) error {
	f, err := o.drive(marker)
	if err != nil {
		return err
	}
	sector := make([]byte, guestops.SectorBytes)
	copy(sector, text)
	_, err = f.WriteAt(sector, guestops.WriteOffset)
	return err
}

func (o fakeOps) Read(marker string) (string, error) {
	f, err := o.drive(marker)
	if err != nil {
		return "", err
	}
	sector := make([]byte, guestops.SectorBytes)
	if _, err := f.ReadAt(sector, guestops.WriteOffset); err != nil {
		return "", err
	}
	return trimZeros(sector), nil
}

func (o fakeOps) Trim(marker string) error {
	_, err := o.drive(marker)
	return err
}

func (o fakeOps) Card() (string, error) {
	c := o.g.card
	if c == nil {
		return "", errors.New("no network card")
	}
	c.up.Store(true)
	return fmt.Sprint(net.HardwareAddr(c.MAC[:]), " ", c.MTU), nil
}

func (o fakeOps) Flood(frames int) error {
	c := o.g.card
	if c == nil {
		return errors.New("no network card")
	}
	frame := guestops.Frame([6]byte{2, 0, 0, 0, 0, 1}, c.MAC, make([]byte, c.MTU))
	for range frames {
		c.send(frame)
	}
	return nil
}

func trimZeros(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
