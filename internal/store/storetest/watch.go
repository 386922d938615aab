package storetest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A process whose changes to files are watched stops before each of them, and
// the one that watches says whether it happens: seccomp_unotify(2), on x86-64.
// So what is tested is the program as it is, with every file operation that it
// makes itself or has made for it, and no seam in it.

// An operation is one system call that changes a file system.
type operation struct {
	call string
	path string // what it changes
	to   string // of a rename or link
	fd   string // where what it changes is open, if it is; good until it happens
}

func (o operation) String() string {
	if o.to != "" {
		return o.call + " " + o.path + " " + o.to
	}
	return o.call + " " + o.path
}

// watchedCalls are all that Go or this project may use to change a file, with
// the arguments that name it. Of openat only what may create or truncate.
var watchedCalls = map[int]struct {
	name             string
	fd, dir, path    int // argument numbers; -1: none
	toDir, toPath    int
	createsByItsFlag bool
}{
	unix.SYS_OPENAT:          {name: "create", fd: -1, dir: 0, path: 1, toPath: -1, createsByItsFlag: true},
	unix.SYS_MKDIRAT:         {name: "mkdir", fd: -1, dir: 0, path: 1, toPath: -1},
	unix.SYS_UNLINKAT:        {name: "unlink", fd: -1, dir: 0, path: 1, toPath: -1},
	unix.SYS_RENAMEAT:        {name: "rename", fd: -1, dir: 0, path: 1, toDir: 2, toPath: 3},
	unix.SYS_RENAMEAT2:       {name: "rename", fd: -1, dir: 0, path: 1, toDir: 2, toPath: 3},
	unix.SYS_LINKAT:          {name: "link", fd: -1, dir: 0, path: 1, toDir: 2, toPath: 3},
	unix.SYS_SYMLINKAT:       {name: "symlink", fd: -1, dir: 1, path: 2, toPath: -1},
	unix.SYS_FCHMODAT:        {name: "chmod", fd: -1, dir: 0, path: 1, toPath: -1},
	unix.SYS_UTIMENSAT:       {name: "utimes", fd: -1, dir: 0, path: 1, toPath: -1},
	unix.SYS_FCHMOD:          {name: "chmod", fd: 0, path: -1, toPath: -1},
	unix.SYS_FCHOWN:          {name: "chown", fd: 0, path: -1, toPath: -1},
	unix.SYS_FTRUNCATE:       {name: "truncate", fd: 0, path: -1, toPath: -1},
	unix.SYS_FALLOCATE:       {name: "fallocate", fd: 0, path: -1, toPath: -1},
	unix.SYS_WRITE:           {name: "write", fd: 0, path: -1, toPath: -1},
	unix.SYS_PWRITE64:        {name: "write", fd: 0, path: -1, toPath: -1},
	unix.SYS_WRITEV:          {name: "write", fd: 0, path: -1, toPath: -1},
	unix.SYS_PWRITEV:         {name: "write", fd: 0, path: -1, toPath: -1},
	unix.SYS_SENDFILE:        {name: "write", fd: 0, path: -1, toPath: -1},
	unix.SYS_COPY_FILE_RANGE: {name: "write", fd: 2, path: -1, toPath: -1},
	unix.SYS_IOCTL:           {name: "ioctl", fd: 0, path: -1, toPath: -1},
	unix.SYS_FSYNC:           {name: "fsync", fd: 0, path: -1, toPath: -1},
	unix.SYS_FDATASYNC:       {name: "fsync", fd: 0, path: -1, toPath: -1},
}

const creating = unix.O_CREAT | unix.O_TRUNC | unix.O_TMPFILE&^unix.O_DIRECTORY

// watched is called by the process that is to be watched: from then on all its
// threads are. It hands the listener to whoever holds the other end of sock.
func watched(sock int) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	const number, argument2 = 0, 16 + 2*8 // offsets in struct seccomp_data
	filter := []unix.SockFilter{
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, number),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT, Jf: 4},
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, argument2),
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: creating, Jf: 1},
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_USER_NOTIF),
		stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW),
	}
	for nr, c := range watchedCalls {
		if !c.createsByItsFlag {
			filter = append(filter, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jf: 1},
				stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_USER_NOTIF))
		}
	}
	filter = append(filter, stmt(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW))
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC |
		unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	listener, _, errno := syscall.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	if err := unix.Sendmsg(sock, []byte("l"), unix.UnixRights(int(listener)), nil, 0); err != nil {
		return err
	}
	return unix.Close(int(listener))
}

type notification struct {
	id    uint64
	tid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type notificationAnswer struct {
	id    uint64
	value int64
	err   int32
	flags uint32
}

// A verdict says what becomes of an operation.
type verdict int

const (
	let  verdict = 0  // it happens
	kill verdict = -1 // it does not: the process is killed, as by SIGKILL
) // above 0: it fails with that errno

// watch runs cmd, which must call watched with descriptor 3, and asks judge
// before each change below root. It returns what the process wrote to
// descriptor 3 before it ended.
func watch(t *testing.T, cmd *exec.Cmd, root string, judge func(operation) verdict) string {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	cmd.ExtraFiles = []*os.File{theirs}
	// A signal between two goroutines would make a call twice.
	cmd.Env = append(cmd.Env, "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	runtime.LockOSThread() // the parent whose death is meant is the thread
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	killed := false
	defer func() {
		cmd.Process.Kill()
		if err := cmd.Wait(); err != nil && !killed && !t.Failed() {
			t.Fatalf("%v\n%s", err, out.String())
		}
	}()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		cmd.Wait()
		killed = true
		if os.Getenv("CI") == "true" {
			t.Fatalf("cannot test: system calls cannot be watched here: %s", out.String())
		}
		t.Skipf("NOT TESTED: system calls cannot be watched here: %s", out.String())
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	listener := os.NewFile(uintptr(fds[0]), "listener")
	defer listener.Close()
	var result string
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		data, _ := io.ReadAll(ours)
		result = string(data)
	}()
	for {
		// POLLHUP: no process is watched any more.
		polled := []unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}}
		if _, err := unix.Poll(polled, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		if polled[0].Revents&unix.POLLIN == 0 {
			<-ended
			return result
		}
		var note notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fds[0]), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&note))); errno == unix.ENOENT || errno == unix.EINTR {
			continue
		} else if errno != 0 {
			t.Fatal(errno)
		}
		answer := notificationAnswer{id: note.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		op, err := operationOf(&note)
		if err != nil {
			t.Fatalf("system call %d: %v", note.nr, err)
		}
		if within(op.path, root) || within(op.to, root) {
			switch v := judge(op); {
			case v == kill:
				killed = true
				cmd.Process.Kill()
				continue
			case v > 0:
				answer.flags, answer.err = 0, -int32(v)
			}
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fds[0]), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&answer))); errno != 0 && errno != unix.ENOENT {
			t.Fatal(errno)
		}
	}
}

func within(path, root string) bool {
	return path == root || strings.HasPrefix(path, root+"/")
}

// operationOf finds out what a stopped thread is about to do.
func operationOf(n *notification) (operation, error) {
	c := watchedCalls[int(n.nr)]
	op := operation{call: c.name}
	var err error
	if c.fd >= 0 {
		// What is no file has no path, and one without a name no longer has one.
		op.fd = fmt.Sprintf("/proc/%d/fd/%d", n.tid, int32(n.args[c.fd]))
		op.path, err = os.Readlink(op.fd)
		if errors.Is(err, os.ErrNotExist) {
			err = nil // the call itself will say so
		}
		return op, err
	}
	if op.path, err = pathOf(n, c.dir, c.path); err != nil {
		return op, err
	}
	if c.toPath >= 0 {
		op.to, err = pathOf(n, c.toDir, c.toPath)
	}
	return op, err
}

func pathOf(n *notification, dir, path int) (string, error) {
	buf := make([]byte, unix.PathMax)
	local := unix.Iovec{Base: &buf[0]}
	got := 0
	// In two parts, since what follows the text need not be there to be read.
	for got < len(buf) {
		at := uintptr(n.args[path]) + uintptr(got)
		part := min(len(buf)-got, 4096-int(at%4096))
		local.Base = &buf[got]
		local.SetLen(part)
		m, err := unix.ProcessVMReadv(int(n.tid), []unix.Iovec{local}, []unix.RemoteIovec{{Base: at, Len: part}}, 0)
		if err != nil {
			return "", err
		}
		if end := strings.IndexByte(string(buf[got:got+m]), 0); end >= 0 {
			text := string(buf[:got+end])
			if filepath.IsAbs(text) {
				return filepath.Clean(text), nil
			}
			at := fmt.Sprintf("/proc/%d/cwd", n.tid)
			if fd := int32(n.args[dir]); fd != unix.AT_FDCWD {
				at = fmt.Sprintf("/proc/%d/fd/%d", n.tid, fd)
			}
			base, err := os.Readlink(at)
			return filepath.Join(base, text), err
		}
		got += m
	}
	return "", unix.ENAMETOOLONG
}
