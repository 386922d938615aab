package usernet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

func TestOwnNames(t *testing.T) {
	needNamespace(t)
	names := &zone{}
	g := newGuest(t, newNetwork(t, "one", 0, "none", func(c *Config) { c.Resolver = names }))
	for name, want := range map[string]string{
		"one.banger":   "10.87.0.2 fd62:616e:6765::2",
		"ONE.Banger":   "10.87.0.2 fd62:616e:6765::2",
		"host.banger":  "10.87.0.1 fd62:616e:6765::1",
		"two.banger":   "",
		"a.one.banger": "",
		"banger":       "",
		"localhost":    "127.0.0.1 ::1",
		"a.localhost":  "127.0.0.1 ::1",
	} {
		var got []string
		for _, a := range g.lookupAll(name) {
			got = append(got, a.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	for name, want := range map[string]string{
		"2.0.87.10.in-addr.arpa": "one.banger.",
		"1.0.87.10.in-addr.arpa": "host.banger.",
		"6.0.87.10.in-addr.arpa": "",
		"2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.5.6.7.6.e.6.1.6.2.6.d.f.ip6.arpa": "one.banger.",
	} {
		m, err := g.lookup(name, dnsmessage.TypePTR)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, r := range m.Answers {
			got += r.Body.(*dnsmessage.PTRResource).PTR.String()
		}
		if got != want || want == "" && m.RCode != dnsmessage.RCodeNameError {
			t.Errorf("%s: %q, %v; want %q", name, got, m.RCode, want)
		}
	}
	if asked := names.questions(); len(asked) > 0 {
		t.Errorf("the resolver was asked for %v", asked)
	}
}

// A resolver whose answers are too long for UDP, or wrong, or late.
type oddResolver struct {
	size  int // of a TXT record's text
	wrong func([]byte) []byte
}

func (o oddResolver) Exchange(ctx context.Context, query []byte) ([]byte, error) {
	var q dnsmessage.Message
	if err := q.Unpack(query); err != nil {
		return nil, err
	}
	q.Response, q.Additionals = true, nil
	body := &dnsmessage.TXTResource{}
	for left := o.size; left > 0; left -= 200 {
		body.TXT = append(body.TXT, strings.Repeat("x", min(left, 200)))
	}
	q.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Class: dnsmessage.ClassINET, Type: dnsmessage.TypeTXT}, Body: body}}
	out, err := q.Pack()
	if o.wrong != nil {
		out = o.wrong(out)
	}
	return out, err
}

func TestLongAnswers(t *testing.T) {
	needNamespace(t)
	g := newGuest(t, newNetwork(t, "one", 0, "", func(c *Config) { c.Resolver = oddResolver{size: 3000} }))
	m, err := g.lookup("long.example", dnsmessage.TypeTXT)
	if err != nil || !m.Truncated || len(m.Answers) > 0 {
		t.Fatalf("over UDP: %+v, %v", m.Header, err)
	}
	// Over TCP, twice on one connection.
	c := g.mustDial(netip.AddrPortFrom(g.addr.Gateway6, dnsPort).String())
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(promptly))
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 9}, Questions: []dnsmessage.Question{{
		Name: dnsmessage.MustNewName("long.example."), Type: dnsmessage.TypeTXT, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)); err != nil {
			t.Fatal(err)
		}
		var head [2]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			t.Fatal(err)
		}
		out := make([]byte, binary.BigEndian.Uint16(head[:]))
		if _, err := io.ReadFull(c, out); err != nil {
			t.Fatal(err)
		}
		if err := m.Unpack(out); err != nil || m.ID != 9 || len(m.Answers) != 1 || m.Truncated {
			t.Errorf("over TCP: %+v, %v", m.Header, err)
		}
	}
}

func TestWrongAnswers(t *testing.T) {
	n := newNetwork(t, "one", 0, "")
	for name, wrong := range map[string]func([]byte) []byte{
		"empty":            func(b []byte) []byte { return nil },
		"cut":              func(b []byte) []byte { return b[:len(b)-3] },
		"another id":       func(b []byte) []byte { b[0]++; return b },
		"a query":          func(b []byte) []byte { b[2] &^= 0x80; return b },
		"another question": func(b []byte) []byte { b[13]++; return b },
		"another type":     func(b []byte) []byte { b[12+14+1]++; return b },
	} {
		n.resolver = oddResolver{size: 10, wrong: wrong}
		q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("odd.example."), Type: dnsmessage.TypeTXT, Class: dnsmessage.ClassINET}}}
		b, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		var m dnsmessage.Message
		if err := m.Unpack(n.answerDNS(t.Context(), b, true)); err != nil || m.RCode != dnsmessage.RCodeServerFailure {
			t.Errorf("%s: %v, %v", name, m.RCode, err)
		}
	}
}

// The host's resolver: what does not fit comes over TCP, a dead server is
// passed over, and a new resolv.conf is noticed.
func TestHostResolver(t *testing.T) {
	needNamespace(t)
	answer := func(query []byte, truncated bool) []byte {
		var q dnsmessage.Message
		if err := q.Unpack(query); err != nil {
			return nil
		}
		q.Response, q.Truncated, q.Additionals = true, truncated, nil
		if !truncated {
			q.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Class: dnsmessage.ClassINET},
				Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 9}}}}
		}
		out, _ := q.Pack()
		return out
	}
	u, err := net.ListenPacket("udp", "127.0.0.3:53")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			stale := slices.Clone(answer(buf[:n], false))
			stale[0]++ // an answer to somebody else's question comes first
			_, _ = u.WriteTo(stale, from)
			_, _ = u.WriteTo(answer(buf[:n], strings.Contains(string(buf[:n]), "long")), from)
		}
	}()
	var host *place
	host.serve(t, "127.0.0.3:53", func(c *net.TCPConn) {
		var head [2]byte
		_, _ = io.ReadFull(c, head[:])
		b := make([]byte, binary.BigEndian.Uint16(head[:]))
		_, _ = io.ReadFull(c, b)
		out := answer(b, false)
		_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
	})
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(text string, at int64) {
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o644), os.Chtimes(path, time.Unix(at, 0), time.Unix(at, 0))); err != nil {
			t.Fatal(err)
		}
	}
	r := &hostResolver{path: path}
	ask := func(name string) error {
		q := query{question: dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}
		b, err := q.forward(77)
		if err != nil {
			return err
		}
		out, err := r.Exchange(t.Context(), b)
		if err != nil {
			return err
		}
		addrs, err := q.readAnswer(out, 77)
		if err == nil && (len(addrs) != 1 || addrs[0].addr.String() != "192.0.2.9") {
			err = fmt.Errorf("%v", addrs)
		}
		return err
	}
	if err := ask("a.example."); err == nil {
		t.Error("without a resolv.conf: an answer")
	}
	write("# nobody\nnameserver 127.0.0.4\nnameserver 127.0.0.3\nsearch corp.example\n", 1)
	for _, name := range []string{"a.example.", "long.example."} {
		if err := ask(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	write("nameserver 127.0.0.4\n", 2)
	if err := ask("a.example."); err == nil {
		t.Error("a new resolv.conf is not noticed")
	}
}

func TestParseResolvConf(t *testing.T) {
	for text, want := range map[string]string{
		"":                               "127.0.0.1:53 / ",
		"nameserver 192.0.2.1":           "192.0.2.1:53 / ",
		"nameserver ::1\nsearch a.b c.d": "[::1]:53 / a.b c.d",
		"nameserver fe80::1%eth0":        "[fe80::1%eth0]:53 / ",
		"nameserver x\nnameserver 1.1.1.1 # x\n; nameserver 9.9.9.9": "1.1.1.1:53 / ",
		"search a.b\ndomain C.d.\nsearch":                            "127.0.0.1:53 / c.d",
		"search -x ok ../etc":                                        "127.0.0.1:53 / ok",
		strings.Repeat("nameserver 192.0.2.1\n", 5):                  "192.0.2.1:53 192.0.2.1:53 192.0.2.1:53 / ",
	} {
		c := parseResolvConf(strings.NewReader(text))
		if got := strings.Join(c.servers, " ") + " / " + strings.Join(c.search, " "); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestAnswersAreBounded(t *testing.T) {
	var a answers
	now := time.Unix(1000, 0)
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, byte(i >> 16), byte(i >> 8), byte(i)}) }
	for i := range 2 * maxAnswers {
		a.add(now.Add(time.Duration(i)*time.Millisecond), "a.b", addr(i), time.Second)
	}
	if len(a.byAddr) != maxAnswers {
		t.Errorf("%d addresses", len(a.byAddr))
	}
	if got := a.names(now.Add(time.Minute), addr(2*maxAnswers-1)); !slices.Equal(got, []string{"a.b"}) {
		t.Errorf("the newest has the names %v", got)
	}
	if got := a.names(now, addr(0)); got != nil {
		t.Errorf("the oldest has the names %v", got)
	}
	for i := range 2 * maxNamesOf {
		a.add(now, fmt.Sprintf("n%d.b", i), addr(5), time.Hour)
	}
	if got := a.names(now, addr(5)); len(got) != maxNamesOf || got[maxNamesOf-1] != "n15.b" {
		t.Errorf("names %v", got)
	}
	if got := a.names(now.Add(time.Hour+answerGrace-1), addr(5)); len(got) != maxNamesOf {
		t.Errorf("before their time is over: %v", got)
	}
	if got := a.names(now.Add(time.Hour+answerGrace), addr(5)); got != nil {
		t.Errorf("after their time is over: %v", got)
	}
	a.add(now, "long.b", addr(6), 1<<62)
	if got := a.names(now.Add(maxAnswerTTL+answerGrace), addr(6)); got != nil {
		t.Errorf("for ever: %v", got)
	}
}

func FuzzDNS(f *testing.F) {
	q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("one.banger."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	b, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{})
	p, err := ParsePolicy("allow:*.example")
	if err != nil {
		f.Fatal(err)
	}
	a, _ := AddressesOf(0)
	n, err := New(Config{Name: "one", Addresses: a, Policy: p, Resolver: &zone{}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		out := n.answerDNS(t.Context(), b, true)
		if out == nil {
			return
		}
		var p dnsmessage.Parser
		h, err := p.Start(out)
		if err != nil || !h.Response || len(b) < 2 || h.ID != binary.BigEndian.Uint16(b) || len(out) > maxDNSUDPBytes {
			t.Fatalf("% x: % x", b, out)
		}
	})
}

// A resolver's bytes are read as carefully.
func FuzzReadAnswer(f *testing.F) {
	q := query{question: dnsmessage.Question{Name: dnsmessage.MustNewName("a.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}
	f.Add(q.reply(dnsmessage.RCodeSuccess, false, []netip.Addr{netip.MustParseAddr(inet4)}, ""))
	f.Fuzz(func(t *testing.T, b []byte) {
		addrs, err := q.readAnswer(b, 0)
		if err == nil && len(addrs) > len(b)/14 {
			t.Fatalf("%d addresses in %d bytes", len(addrs), len(b))
		}
	})
}
