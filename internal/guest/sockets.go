package guest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// maxTableBytes is how much is read of one table of sockets; a line is some
	// 150 bytes. Those that listen stand first in the TCP tables.
	maxTableBytes = 8 << 20
	// maxDescriptors is how many descriptors of processes are looked at to find
	// who has a socket.
	maxDescriptors = 50_000
	maxCommBytes   = 64
)

// A waiting is a socket that waits for peers, and its inode.
type waiting struct {
	wire.Socket
	inode uint64
}

// waitingSockets looks at what waits for peers in the network namespace of the
// agent, which is that of the guest's init. What cannot be read is left out.
func waitingSockets() wire.Sockets {
	var all []waiting
	var out wire.Sockets
	for _, proto := range []string{"tcp", "udp"} {
		for _, table := range []string{proto, proto + "6"} {
			f, err := os.Open("/proc/self/net/" + table) // none of version 6 where the kernel is without it
			if err != nil {
				continue
			}
			list, whole := readSockets(io.LimitReader(f, maxTableBytes), proto)
			f.Close()
			all = append(all, list...)
			out.More = out.More || !whole
		}
	}
	if len(all) > wire.MaxSockets {
		all, out.More = all[:wire.MaxSockets], true
	}
	findHolders("/proc", all, maxDescriptors)
	out.List = make([]wire.Socket, 0, len(all))
	for _, w := range all {
		out.List = append(out.List, w.Socket)
	}
	return out
}

// readSockets reads a table of /proc/net (proc_pid_net(5), Linux's
// net/ipv4/tcp_ipv4.c:get_tcp4_sock and its like) up to MaxSockets and one.
// Lines that are none are passed over; whole is false if the end is missing.
func readSockets(table io.Reader, proto string) (list []waiting, whole bool) {
	in := bufio.NewReader(table)
	for len(list) <= wire.MaxSockets {
		line, err := in.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue // no line of a table's
		case err != nil:
			return list, errors.Is(err, io.EOF) && len(line) == 0
		}
		if w, ok := parseSocket(line, proto); ok {
			list = append(list, w)
		}
	}
	return list, false
}

// States of sockets in the tables (Linux's include/net/tcp_states.h). UDP has
// that of a closed TCP socket where it has no peer.
const (
	stateListen = "0A"
	stateClose  = "07"
)

// parseSocket reads a line of a table. It is false for the head, for a socket
// that does not wait, and for what is no such line.
func parseSocket(line []byte, proto string) (w waiting, ok bool) {
	const local, state, inode = 1, 3, 9
	f := bytes.Fields(line)
	if len(f) <= inode || string(f[state]) != map[string]string{"tcp": stateListen, "udp": stateClose}[proto] {
		return w, false
	}
	address, port, found := bytes.Cut(f[local], []byte(":"))
	n, err := strconv.ParseUint(string(port), 16, 16)
	if !found || err != nil || n == 0 {
		return w, false
	}
	// An address is words of 32 bits, each written as the number that it is to
	// this CPU.
	b, err := hex.DecodeString(string(address))
	if err != nil || len(b) != 4 && len(b) != 16 {
		return w, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, _ := netip.AddrFromSlice(b)
	if w.inode, err = strconv.ParseUint(string(f[inode]), 10, 64); err != nil {
		return w, false
	}
	w.Proto, w.Local = proto, netip.AddrPortFrom(a.Unmap(), uint16(n))
	return w, true
}

// findHolders fills in for each socket the first process that has it, by the
// links in /proc/PID/fd (proc_pid_fd(5)), of which it looks at so many.
func findHolders(proc string, all []waiting, limit int) {
	missing := map[string][]int{} // link -> where in all
	for i, w := range all {
		link := fmt.Sprintf("socket:[%d]", w.inode)
		missing[link] = append(missing[link], i)
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	for _, pid := range pids {
		if len(missing) == 0 || limit <= 0 {
			return
		}
		dir, err := os.Open(filepath.Join(proc, strconv.Itoa(pid), "fd"))
		if err != nil {
			continue // it has ended
		}
		names, _ := dir.Readdirnames(limit)
		limit -= len(names)
		for _, name := range names {
			link := make([]byte, 64)
			n, err := unix.Readlinkat(int(dir.Fd()), name, link)
			if err != nil || n == len(link) {
				continue
			}
			for _, i := range missing[string(link[:n])] {
				all[i].PID, all[i].Process = pid, comm(proc, pid)
			}
			delete(missing, string(link[:n]))
		}
		dir.Close()
	}
}

// comm is the name of a process, which itself chose it; "" if it has ended.
func comm(proc string, pid int) string {
	text, err := readBounded(filepath.Join(proc, strconv.Itoa(pid), "comm"), maxCommBytes)
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(strings.TrimSuffix(string(text), "\n"), "?")
}
