package guest

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"banger/internal/wire"
)

// A table as Linux 6.1 on x86-64 writes it, with lines that are none.
const tcpTable = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000000000000000 100 0 0 10 0
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 4712 1 0000000000000000 100 0 0 10 0
   2: 0200570A:0050 0100570A:C000 01 00000000:00000000 00:00000000 00000000     0        0 4713 1 0000000000000000 20 4 30 10 -1
   3: 00000000:0000 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4714
   4: 00000000:10000 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4715
   5: 000000:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4716
   6: 00000000:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 -1
   7: 00000000 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4717
   8: 00000000:0051 00000000:0000 0A
`

const tcp6Table = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 10 1 0000000000000000 100 0 0 10 0
   1: 6E6162FD01006567000000000200000000:0017 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1
   2: 6E6162FD000065670000000002000000:0018 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1
   3: 0000000000000000FFFF00000100007F:0019 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1
   4: 00000000000000000000000001000000:FFFF 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18446744073709551615 1
`

func text(list []waiting) (out []string) {
	for _, w := range list {
		out = append(out, fmt.Sprintf("%s %v %d", w.Proto, w.Local, w.inode))
	}
	return out
}

func TestReadSockets(t *testing.T) {
	for _, c := range []struct {
		name, table, proto string
		want               []string
		whole              bool
	}{
		{"tcp", tcpTable, "tcp", []string{"tcp 127.0.0.1:8080 4711", "tcp 0.0.0.0:80 4712"}, true},
		{"tcp6", tcp6Table, "tcp", []string{"tcp [::]:22 10", "tcp [fd62:616e:6765::2]:24 12", "tcp 127.0.0.1:25 13", "tcp [::1]:65535 18446744073709551615"}, true},
		{"tcp read as udp", tcpTable, "udp", nil, true},
		{"udp", strings.ReplaceAll(tcpTable, " 0A ", " 07 "), "udp", []string{"udp 127.0.0.1:8080 4711", "udp 0.0.0.0:80 4712"}, true},
		{"empty", "", "tcp", nil, true},
		{"cut off", tcpTable[:len(tcpTable)-1], "tcp", []string{"tcp 127.0.0.1:8080 4711", "tcp 0.0.0.0:80 4712"}, false},
		{"no table", strings.Repeat("x", 100_000) + "\n" + tcpTable, "tcp", []string{"tcp 127.0.0.1:8080 4711", "tcp 0.0.0.0:80 4712"}, true},
	} {
		list, whole := readSockets(strings.NewReader(c.table), c.proto)
		if got := text(list); !slices.Equal(got, c.want) || whole != c.whole {
			t.Errorf("%s: %q, whole: %v", c.name, got, whole)
		}
	}
	line := strings.SplitAfter(tcpTable, "\n")[1]
	for n, whole := range map[int]bool{wire.MaxSockets: true, wire.MaxSockets + 1: false, 100 * wire.MaxSockets: false} {
		if list, got := readSockets(strings.NewReader(strings.Repeat(line, n)), "tcp"); got != whole || len(list) != min(n, wire.MaxSockets+1) {
			t.Errorf("%d sockets: %d, whole: %v", n, len(list), got)
		}
	}
}

// Against this kernel and this process.
func TestWaitingSockets(t *testing.T) {
	has := func(proto, addr string, port int) bool {
		t.Helper()
		self, _ := os.ReadFile("/proc/self/comm")
		list := waitingSockets()
		for _, s := range list.List {
			if s.Proto == proto && s.Local == netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(port)) {
				if s.PID != os.Getpid() || s.Process != strings.TrimSpace(string(self)) {
					t.Errorf("%s %v is held by %d %q", proto, s.Local, s.PID, s.Process)
				}
				return true
			}
		}
		return false
	}
	for _, addr := range []string{"127.0.0.1", "0.0.0.0", "::1", "::"} {
		network := "4"
		if strings.Contains(addr, ":") {
			network = "6"
		}
		l, err := net.Listen("tcp"+network, net.JoinHostPort(addr, "0"))
		if err != nil {
			if network == "6" && os.Getenv("CI") == "" {
				t.Logf("MISSING: %s: %v", addr, err)
				continue
			}
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		if !has("tcp", addr, port) {
			t.Errorf("tcp %s:%d is not seen", addr, port)
		}
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		local := c.LocalAddr().(*net.TCPAddr)
		if has("tcp", local.IP.String(), local.Port) {
			t.Errorf("a connection at %v is taken for a listener", local)
		}
		c.Close()
		l.Close()
		if has("tcp", addr, port) {
			t.Errorf("tcp %s:%d is seen after its end", addr, port)
		}
		u, err := net.ListenPacket("udp"+network, net.JoinHostPort(addr, "0"))
		if err != nil {
			t.Fatal(err)
		}
		port = u.LocalAddr().(*net.UDPAddr).Port
		if !has("udp", addr, port) {
			t.Errorf("udp %s:%d is not seen", addr, port)
		}
		u.Close()
	}
}

func TestFindHolders(t *testing.T) {
	proc := tree(t, map[string]string{
		"7/fd/0": "->/dev/null", "7/fd/1": "->socket:[4711]", "7/comm": "seven\n",
		"30/fd/9": "->socket:[4711]", "30/fd/10": "->socket:[4712]", "30/comm": "\x1b[2J\xff evil\n",
		"31/fd/1": "->socket:[4713]x", "31/fd/2": "->" + strings.Repeat("x", 200), "32/": "", "self/fd/1": "->socket:[4713]",
	})
	all := []waiting{{inode: 4711}, {inode: 4712}, {inode: 4711}, {inode: 4713}}
	findHolders(proc, all, maxDescriptors)
	for i, want := range []wire.Socket{{PID: 7, Process: "seven"}, {PID: 30, Process: "\x1b[2J? evil"}, {PID: 7, Process: "seven"}, {}} {
		if all[i].Socket != want {
			t.Errorf("%d: %+v", i, all[i])
		}
	}
	// Process 7 has two descriptors, process 30 two more.
	for limit, want := range map[int]int{0: 0, 2: 0, 4: 1} {
		few := []waiting{{inode: 4712}, {inode: 4713}}
		findHolders(proc, few, limit)
		if found := few[0].PID / 30; found != want {
			t.Errorf("of %d descriptors: %+v", limit, few)
		}
	}
}

func FuzzSocketTable(f *testing.F) {
	f.Add([]byte(tcpTable), true)
	f.Add([]byte(tcp6Table), true)
	f.Add([]byte(strings.ReplaceAll(tcp6Table, " 0A ", " 07 ")), false)
	f.Fuzz(func(t *testing.T, table []byte, tcp bool) {
		proto := map[bool]string{true: "tcp", false: "udp"}[tcp]
		list, whole := readSockets(bytes.NewReader(table), proto)
		if len(list) > wire.MaxSockets+1 || len(list) > bytes.Count(table, []byte("\n")) {
			t.Fatalf("%d sockets", len(list))
		}
		for _, w := range list {
			if w.Proto != proto || w.Local.Port() == 0 || !w.Local.IsValid() || w.Local.Addr().Is4In6() || w.Local.Addr().Zone() != "" {
				t.Fatalf("%+v", w)
			}
		}
		if n := len(table); whole && n > 0 && n < 4096 && table[n-1] != '\n' {
			t.Fatal("a table without its end is whole")
		}
	})
}
