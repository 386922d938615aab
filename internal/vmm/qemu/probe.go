package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Whether KVM works is found by running guest code. A /dev/kvm that opens
// proves nothing: on a host that is itself a guest, KVM may emulate every
// instruction, a thousand times slower than TCG, and stop at the first one it
// does not know.
//
// The code runs on a thread of this process, not in a child: a library cannot
// know what its executable does with an argument, and a child stuck in KVM_RUN
// ends no sooner than a thread does, since both leave it only where KVM looks
// for pending signals. The thread is kicked with SIGURG, which the Go runtime
// handles in every process and ignores when it did not send it.

const (
	// probeLimit bounds the whole answer, whatever the kernel does.
	probeLimit = 900 * time.Millisecond
	// probeRunLimit bounds the guest code by the clock, and probeCPULimit by
	// the CPU time it got: a busy host is waited for, a slow one is not. At
	// minKVMRate the loop takes half of probeCPULimit.
	probeRunLimit = 250 * time.Millisecond
	probeCPULimit = 100 * time.Millisecond
	// probeKick is how often the vCPU thread is looked at, and interrupted
	// after a limit.
	probeKick = 5 * time.Millisecond
	// probeLoops is how often the guest's loop of two instructions goes round:
	// a millisecond on hardware.
	probeLoops = 500_000
	// minKVMRate is the least number of instructions per second of CPU time
	// that counts as hardware. Processors do 1e9 and more, also for KVM nested
	// in a virtual machine; a kernel that emulates does some 1e6. The limit
	// lies between, nearer to the second: a host that is a busy guest itself
	// may lose nine tenths of its time without seeing it.
	minKVMRate = 20_000_000
)

// A kvmResult is the answer of the probe.
type kvmResult struct {
	works  bool
	unsure bool   // the kernel did not come back in time
	reason string // one clause
	hint   string // next step for who asked for KVM by name, or ""
}

var knownKVM struct {
	sync.Mutex
	found  bool
	result kvmResult
}

// probeKVM gives the answer, found once per process. That the kernel did not
// come back is no answer to keep.
func probeKVM() kvmResult {
	knownKVM.Lock()
	defer knownKVM.Unlock()
	if !knownKVM.found {
		knownKVM.result = runKVMProbe("/dev/kvm", probeLoops)
		knownKVM.found = !knownKVM.result.unsure
	}
	return knownKVM.result
}

// runKVMProbe answers within probeLimit. Should the kernel never come back
// from an ioctl, that one thread stays behind with the descriptors it holds;
// nothing in user space could end it.
func runKVMProbe(device string, loops uint32) kvmResult {
	p := &kvmProbe{device: device, loops: loops}
	answer := make(chan kvmResult, 1)
	go func() { answer <- p.run() }()

	end := time.NewTimer(probeLimit)
	defer end.Stop()
	kick := time.NewTicker(probeKick)
	defer kick.Stop()
	for {
		select {
		case r := <-answer:
			return r
		case <-end.C:
			return kvmResult{unsure: true, reason: fmt.Sprintf("%s does not come back within %v", device, probeLimit)}
		case now := <-kick.C:
			p.kickAfter(now)
		}
	}
}

type kvmProbe struct {
	device string
	loops  uint32

	mu      sync.Mutex
	tid     int       // of the thread in KVM_RUN, 0 when there is none
	started time.Time // when it began to run
	// usedBefore is the CPU time that the thread had used by then.
	usedBefore time.Duration
	state      []byte // struct kvm_run, shared with the kernel
	late       atomic.Bool
}

// kickAfter interrupts guest code that has used up its time.
func (p *kvmProbe) kickAfter(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tid == 0 || now.Sub(p.started) < probeRunLimit && cpuTimeOf(p.tid)-p.usedBefore < probeCPULimit {
		return
	}
	p.late.Store(true)
	p.state[kvmRunImmediateExit] = 1 // a signal before KVM_RUN is entered would be lost otherwise
	_ = unix.Tgkill(os.Getpid(), p.tid, unix.SIGURG)
}

// Numbers and layouts from include/uapi/linux/kvm.h and
// arch/x86/include/uapi/asm/kvm.h.
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetTSSAddr          = 0xae47
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmAPIVersion = 12

	kvmExitIO            = 2
	kvmExitHLT           = 5
	kvmExitShutdown      = 8
	kvmExitFailEntry     = 9
	kvmExitIntr          = 10
	kvmExitInternalError = 17

	// Offsets in struct kvm_run.
	kvmRunImmediateExit = 1
	kvmRunExitReason    = 8
	kvmRunIOPort        = 32 + 2

	maxVCPUMmapBytes = 1 << 20
)

type kvmMemoryRegion struct {
	slot, flags         uint32
	guestAddr, sizeByte uint64
	userAddr            uint64
}

type kvmRegs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r8, r9, r10, r11, r12, r13, r14, r15   uint64
	rip, rflags                            uint64
}

type kvmSegment struct {
	base                           uint64
	limit                          uint32
	selector                       uint16
	typ, present, dpl, db, s, l, g uint8
	avl, unusable, padding         uint8
}

type kvmDTable struct {
	base    uint64
	limit   uint16
	padding [3]uint16
}

type kvmSregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt kvmSegment
	gdt, idt                        kvmDTable
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

// The guest: 64-bit code with paging, as a kernel would run. Memory is one
// slot at 0 holding three levels of page tables and one page of code.
const (
	guestPML4     = 0x1000
	guestPDPT     = 0x2000
	guestPD       = 0x3000
	guestCode     = 0x4000
	guestMemBytes = 0x8000
	guestPort     = 0x10
)

// run asks the kernel step by step.
func (p *kvmProbe) run() kvmResult {
	kvm, err := unix.Open(p.device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return kvmResult{reason: p.device + " does not exist", hint: "turn on virtualization in the firmware and load the kvm_intel or kvm_amd module"}
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return kvmResult{reason: p.device + " may not be opened by this user", hint: "add the user to the kvm group: sudo usermod -aG kvm $USER, then log in again"}
	case err != nil:
		return kvmResult{reason: fmt.Sprintf("%s does not open: %v", p.device, err)}
	}
	defer unix.Close(kvm)
	fail := func(what string, err error) kvmResult {
		return kvmResult{reason: fmt.Sprintf("%s: %s: %v", p.device, what, err)}
	}

	version, err := ioctl(kvm, kvmGetAPIVersion, 0)
	if err != nil {
		return fail("not a KVM device", err)
	}
	if version != kvmAPIVersion {
		return fail("API version", fmt.Errorf("%d, not %d", version, kvmAPIVersion))
	}
	vm, err := ioctl(kvm, kvmCreateVM, 0)
	if err != nil {
		return fail("cannot create a virtual machine", err)
	}
	defer unix.Close(vm)
	// Intel's real-mode support wants three pages of guest addresses that are
	// not memory; AMD ignores it.
	if _, err := ioctl(vm, kvmSetTSSAddr, 0xfffbd000); err != nil {
		return fail("cannot set the TSS address", err)
	}

	mem, err := unix.Mmap(-1, 0, guestMemBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fail("cannot map guest memory", err)
	}
	defer unix.Munmap(mem)
	p.writeGuest(mem)
	region := kvmMemoryRegion{sizeByte: guestMemBytes, userAddr: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return fail("cannot give memory to the guest", err)
	}

	vcpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return fail("cannot create a vCPU", err)
	}
	defer unix.Close(vcpu)
	size, err := ioctl(kvm, kvmGetVCPUMmapSize, 0)
	if err != nil || size < os.Getpagesize() || size > maxVCPUMmapBytes {
		return fail("vCPU state", fmt.Errorf("size %d: %w", size, err))
	}
	state, err := unix.Mmap(vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fail("cannot map the vCPU state", err)
	}
	defer unix.Munmap(state)
	if err := setLongMode(vcpu); err != nil {
		return fail("cannot set registers", err)
	}
	return p.execute(vcpu, state)
}

// writeGuest puts page tables and code into guest memory.
func (p *kvmProbe) writeGuest(mem []byte) {
	const present, writable, large = 1, 2, 0x80
	binary.LittleEndian.PutUint64(mem[guestPML4:], guestPDPT|present|writable)
	binary.LittleEndian.PutUint64(mem[guestPDPT:], guestPD|present|writable)
	binary.LittleEndian.PutUint64(mem[guestPD:], 0|present|writable|large)
	code := []byte{0xb9, 0, 0, 0, 0, // mov ecx, loops
		0xff, 0xc9, // dec ecx
		0x75, 0xfc, // jnz back
		0xe6, guestPort, // out port, al
		0xf4} // hlt
	binary.LittleEndian.PutUint32(code[1:], p.loops)
	copy(mem[guestCode:], code)
}

// setLongMode starts the vCPU in flat 64-bit mode.
func setLongMode(vcpu int) error {
	var s kvmSregs
	if _, err := ioctl(vcpu, kvmGetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return err
	}
	const pe, mp, et, ne, wp, am, pg = 1, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 18, 1 << 31
	const pae, lme, lma = 1 << 5, 1 << 8, 1 << 10
	s.cr0, s.cr3, s.cr4, s.efer = pe|mp|et|ne|wp|am|pg, guestPML4, pae, lme|lma
	s.cs = kvmSegment{limit: 0xffffffff, selector: 0x08, typ: 11, present: 1, s: 1, l: 1, g: 1}
	data := kvmSegment{limit: 0xffffffff, selector: 0x10, typ: 3, present: 1, s: 1, db: 1, g: 1}
	s.ds, s.es, s.fs, s.gs, s.ss = data, data, data, data, data
	if _, err := ioctl(vcpu, kvmSetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return err
	}
	const reserved = 2 // a bit of RFLAGS that is always set
	regs := kvmRegs{rip: guestCode, rsp: guestMemBytes, rflags: reserved}
	_, err := ioctl(vcpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs)))
	return err
}

// execute runs the guest to its first exit and judges the pace.
func (p *kvmProbe) execute(vcpu int, state []byte) kvmResult {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := threadTime()
	if err != nil {
		return kvmResult{reason: err.Error()}
	}
	p.mu.Lock()
	p.tid, p.started, p.usedBefore, p.state = unix.Gettid(), time.Now(), before, state
	p.mu.Unlock()
	// Taken back before state is unmapped and the thread serves others.
	defer func() {
		p.mu.Lock()
		p.tid, p.state = 0, nil
		p.mu.Unlock()
	}()

	for {
		_, err := ioctlOnce(vcpu, kvmRun, 0)
		interrupted := errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN)
		if interrupted && !p.late.Load() {
			continue // a signal of the runtime's own
		}
		after, terr := threadTime()
		if terr != nil {
			return kvmResult{reason: terr.Error()}
		}
		if interrupted {
			return kvmResult{reason: fmt.Sprintf("KVM is there but too slow: %d instructions took longer than %v", 2*p.loops, (after - before).Round(time.Millisecond))}
		}
		if err != nil {
			return kvmResult{reason: fmt.Sprintf("%s: guest code does not run: %v", p.device, err)}
		}
		return judge(state, p.loops, after-before)
	}
}

// judge turns the first exit, and the CPU time it took to come there, into
// the answer.
func judge(state []byte, loops uint32, took time.Duration) kvmResult {
	exit := binary.LittleEndian.Uint32(state[kvmRunExitReason:])
	port := binary.LittleEndian.Uint16(state[kvmRunIOPort:])
	if exit != kvmExitIO || port != guestPort {
		names := map[uint32]string{kvmExitHLT: "halt", kvmExitShutdown: "triple fault", kvmExitFailEntry: "entry refused",
			kvmExitIntr: "signal", kvmExitInternalError: "internal error"}
		name, ok := names[exit]
		if !ok {
			name = "unexpected"
		}
		return kvmResult{reason: fmt.Sprintf("KVM is there but cannot run guest code: exit %d (%s)", exit, name)}
	}
	rate := float64(2*uint64(loops)) / max(took, time.Microsecond).Seconds()
	if rate < minKVMRate {
		return kvmResult{reason: fmt.Sprintf("KVM is there but too slow: %.1f million instructions a second", rate/1e6)}
	}
	return kvmResult{works: true, reason: fmt.Sprintf("KVM runs guest code at %.0f million instructions a second", rate/1e6)}
}

// threadTime is the CPU time of the calling thread: what else runs on the
// host does not count.
func threadTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, fmt.Errorf("clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// cpuTimeOf is the CPU time of another thread of this process, by the clock
// that the kernel has for each (include/linux/posix-timers_types.h: the
// inverted number, shifted by 3, with CPUCLOCK_PERTHREAD and CPUCLOCK_SCHED).
// 0 where it cannot be read: then the clock on the wall decides alone.
func cpuTimeOf(tid int) time.Duration {
	const perThread, sched = 4, 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^tid<<3|perThread|sched), &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// ioctl repeats what a signal interrupted.
func ioctl(fd int, request, arg uintptr) (int, error) {
	for {
		r, err := ioctlOnce(fd, request, arg)
		if !errors.Is(err, unix.EINTR) {
			return r, err
		}
	}
}

func ioctlOnce(fd int, request, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if errno != 0 {
		return int(r), errno
	}
	return int(r), nil
}
