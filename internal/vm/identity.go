package vm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const noSpace = unix.ENOSPC

// A Process is a process of this host that cannot be mistaken for a later one
// with the same number: the time it started, in the kernel's ticks since the
// boot whose random id is Boot (proc_pid_stat(5), field 22).
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
	Boot  string `json:"boot"`
}

const (
	maxStatBytes = 4 << 10
	// killLimit is how long a process that was sent SIGKILL may take to end:
	// the kernel frees its memory first.
	killLimit = 10 * time.Second
)

// errGone says that a process is not there, or is another one.
var errGone = errors.New("no such process")

// ProcessOf identifies a process that is there now.
func ProcessOf(pid int) (*Process, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	start, zombie, err := startOf(pid)
	if err != nil {
		return nil, err
	}
	if zombie {
		return nil, errGone
	}
	return &Process{PID: pid, Start: start, Boot: boot}, nil
}

func bootID() (string, error) {
	f, err := os.Open("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStatBytes))
	return string(bytes.TrimSpace(data)), err
}

// startOf reads when a process started. The second field, its name, may hold
// anything but ends at the last parenthesis.
func startOf(pid int) (start uint64, zombie bool, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false, errGone
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStatBytes))
	if err != nil {
		return 0, false, errGone // it ended while it was read
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	const state, starttime = 0, 19 // fields 3 and 22 of the whole
	if len(fields) <= starttime {
		return 0, false, fmt.Errorf("process %d: its stat has %d fields", pid, len(fields))
	}
	start, err = strconv.ParseUint(fields[starttime], 10, 64)
	return start, fields[state] == "Z" || fields[state] == "X", err
}

// Alive says whether this very process still runs.
func (p *Process) Alive() bool {
	now, err := ProcessOf(p.PID)
	return err == nil && *now == *p
}

// Kill ends this very process, and no other that has its number now, and waits
// for its end. One that is gone is no error.
func (p *Process) Kill() error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	// The descriptor stands for one process, so what is true of the number
	// now is true of the descriptor, or both are gone.
	if !p.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process %d: %w", p.PID, err)
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for end := time.Now().Add(killLimit); ; {
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("process %d: it does not end", p.PID)
		}
		n, err := unix.Poll(poll, int(left.Milliseconds())+1)
		if err == nil && n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("process %d: %w", p.PID, err)
		}
	}
}
