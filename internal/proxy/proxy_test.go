package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger"
)

// promptly is for what takes milliseconds on a machine that has time.
const promptly = 10 * time.Second

// A world is a proxy and the VM web.banger: port 80 is its web server, port 7
// echoes until the end and then says "end", port 9 resets.
type world struct {
	t     testing.TB
	addr  string
	stop  func() // returns when nothing of the proxy runs
	seen  chan *http.Request
	body  []byte // of /large
	mu    sync.Mutex
	notes []string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, seen: make(chan *http.Request, 100), body: make([]byte, 4<<20)}
	rand.NewChaCha8([32]byte{}).Read(w.body)
	web := httptest.NewServer(http.HandlerFunc(w.serve))
	t.Cleanup(web.Close)
	ports := map[uint16]string{80: web.Listener.Addr().String(), 7: w.listen(echo), 9: w.listen(reset)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error)
	go func() {
		over <- Serve(ctx, l.(*net.TCPListener), Config{
			Dial: func(ctx context.Context, host string, port uint16) (*net.TCPConn, error) {
				switch host {
				case "web.banger", "10.87.0.6", "fd62:616e:6765:1::2":
				case "stopped.banger":
					return nil, banger.Errorf(banger.CodeConflict, "VM stopped: it is stopped").WithHint("`banger start stopped`")
				case "stuck.banger":
					<-ctx.Done()
					return nil, ctx.Err()
				default:
					return nil, banger.Errorf(banger.CodeUsage, "%q: it is no VM", host)
				}
				to, ok := ports[port]
				if !ok {
					return nil, banger.Errorf(banger.CodeUnavailable, "%s:%d: nothing listens there", host, port)
				}
				c, err := new(net.Dialer).DialContext(ctx, "tcp", to)
				if err != nil {
					return nil, err
				}
				return c.(*net.TCPConn), nil
			},
			Note: func(line string) { w.mu.Lock(); defer w.mu.Unlock(); w.notes = append(w.notes, line) },
		})
	}()
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-over:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(promptly):
			t.Error("Serve does not end")
		}
	})
	t.Cleanup(w.stop)
	return w
}

func (w *world) listen(f func(*net.TCPConn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f(c.(*net.TCPConn))
		}
	}()
	return l.Addr().String()
}

func echo(c *net.TCPConn) {
	defer c.Close()
	io.Copy(c, c)
	io.WriteString(c, "end")
}

func reset(c *net.TCPConn) {
	c.Read(make([]byte, 1))
	abort(c)
}

// serve is the web server of the VM.
func (w *world) serve(out http.ResponseWriter, r *http.Request) {
	w.seen <- r
	switch r.URL.Path {
	case "/large":
		out.Write(w.body)
	case "/sum":
		sum := sha256.New()
		n, err := io.Copy(sum, r.Body)
		fmt.Fprintf(out, "%d %x %v", n, sum.Sum(nil), err)
	case "/up":
		conn, buffered, err := http.NewResponseController(out).Hijack()
		if err != nil {
			w.t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
		io.Copy(conn, buffered)
	case "/half": // promises more than it gives
		out.Header().Set("Content-Length", "100")
		io.WriteString(out, "half")
		http.NewResponseController(out).Flush()
		panic(http.ErrAbortHandler)
	default:
		out.Header().Set("X-Hop", "1")
		out.Header().Set("Connection", "X-Hop")
		out.Header().Set("X-End", "1")
		fmt.Fprintf(out, "%s %s %s", r.Method, r.Host, r.RequestURI)
	}
}

// noted says whether a client was told on about something.
func (w *world) noted(text string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.notes, func(line string) bool { return strings.Contains(line, text) })
}

func (w *world) dial() *net.TCPConn {
	w.t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(promptly))
	return c.(*net.TCPConn)
}

// connect opens a connection to a port of web.banger, by either protocol.
func (w *world) connect(how string, port byte) *net.TCPConn {
	w.t.Helper()
	c := w.dial()
	request, answer := "\x05\x01\x00\x05\x01\x00\x03\x0aweb.banger\x00"+string(rune(port)), 2+10
	if how == "HTTP" {
		request = fmt.Sprintf("CONNECT web.banger:%d HTTP/1.1\r\nHost: web.banger\r\n\r\n", port)
		answer = len("HTTP/1.1 200 Connection established\r\n\r\n")
	}
	io.WriteString(c, request)
	b := make([]byte, answer)
	if _, err := io.ReadFull(c, b); err != nil {
		w.t.Fatalf("%s: %q, %v", how, b, err)
	}
	return c
}

func curl(t *testing.T, args ...string) (out string, code int) {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("MISSING: curl")
		}
		t.Skip("MISSING: curl (`make test` installs it as root)")
	}
	cmd := exec.Command("curl", append([]string{"-q", "-sS", "--max-time", "30", "--noproxy", ""}, args...)...)
	text, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(text), cmd.ProcessState.ExitCode()
}

// What everybody has on the host, by all three ways.
func TestCurl(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "upload")
	if err := os.WriteFile(file, w.body, 0o600); err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%d %x <nil>", len(w.body), sha256.Sum256(w.body))
	for how, args := range map[string][]string{
		"SOCKS":   {"--socks5-hostname", w.addr},
		"HTTP":    {"-x", "http://" + w.addr},
		"CONNECT": {"-p", "-x", "http://" + w.addr},
	} {
		get := func(more ...string) (string, int) { return curl(t, slices.Concat(args, more)...) }
		for _, c := range []struct{ url, want string }{
			{"http://web.banger/a%2fb?x=1;y=2&z", "GET web.banger /a%2fb?x=1;y=2&z"},
			{"http://10.87.0.6/", "GET 10.87.0.6 /"},
			{"http://[fd62:616e:6765:1::2]/", "GET [fd62:616e:6765:1::2] /"},
		} {
			if out, code := get("-g", c.url); out != c.want || code != 0 {
				t.Errorf("%s: %s: %q, exit code %d", how, c.url, out, code)
			}
		}
		if out, code := get("http://web.banger/large"); out != string(w.body) || code != 0 {
			t.Errorf("%s: %d bytes, exit code %d", how, len(out), code)
		}
		for _, header := range []string{"Content-Type: x/y", "Transfer-Encoding: chunked", "Expect: 100-continue"} {
			if out, code := get("-T", file, "-H", header, "http://web.banger/sum"); out != sum || code != 0 {
				t.Errorf("%s: upload with %s: %q, exit code %d", how, header, out, code)
			}
		}
		// Two requests on one connection.
		if out, code := get("http://web.banger/1", "http://web.banger/2"); out != "GET web.banger /1GET web.banger /2" || code != 0 {
			t.Errorf("%s: two at once: %q, exit code %d", how, out, code)
		}
		// An answer that breaks off does so at the client's, too.
		if _, code := get("http://web.banger/half"); code != 18 {
			t.Errorf("%s: half an answer: exit code %d", how, code)
		}
		for _, c := range []struct {
			url, socks, http string
		}{
			{"http://example.com/", "(2)", "403"},
			{"http://127.0.0.1:22/", "(2)", "403"},
			{"http://stopped.banger/", "(4)", "503"},
			{"http://web.banger:81/", "(5)", "502"},
		} {
			out, code := get("-g", "-w", "status=%{http_code}%{http_connect}", c.url)
			switch how {
			case "SOCKS":
				if code != 97 || !strings.Contains(out, c.socks) {
					t.Errorf("%s: %s: %q, exit code %d", how, c.url, out, code)
				}
			case "HTTP":
				if code != 0 || !strings.Contains(out, "status="+c.http) || !strings.Contains(out, "banger: ") {
					t.Errorf("%s: %s: %q, exit code %d", how, c.url, out, code)
				}
			case "CONNECT":
				if code != 56 || !strings.Contains(out, c.http) {
					t.Errorf("%s: %s: %q, exit code %d", how, c.url, out, code)
				}
			}
		}
	}
	if !w.noted(`"example.com": it is no VM`) || !w.noted("it is stopped") {
		t.Errorf("noted: %q", w.notes)
	}
	if n := strings.Count(strings.Join(w.notes, "\n"), "example.com"); n != 1 {
		t.Errorf("the same was noted %d times", n)
	}
}

func TestHalfClose(t *testing.T) {
	w := newWorld(t)
	for _, how := range []string{"SOCKS", "HTTP"} {
		c := w.connect(how, 7)
		sent := make(chan error)
		go func() {
			_, err := c.Write(w.body)
			c.CloseWrite()
			sent <- err
		}()
		got, err := io.ReadAll(c)
		if werr := <-sent; werr != nil || err != nil || string(got) != string(w.body)+"end" {
			t.Errorf("%s: %d bytes came back, %v, %v", how, len(got), err, werr)
		}
	}
}

// What comes right behind the request is the VM's.
func TestEarly(t *testing.T) {
	w := newWorld(t)
	for how, request := range map[string]string{
		"SOCKS": "\x05\x01\x00\x05\x01\x00\x03\x0aweb.banger\x00\x07",
		"HTTP":  "CONNECT web.banger:7 HTTP/1.1\r\nHost: web.banger\r\n\r\n",
	} {
		c := w.dial()
		io.WriteString(c, request+"early ")
		c.CloseWrite()
		if got, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(got), "early end") {
			t.Errorf("%s: %q, %v", how, got, err)
		}
	}
}

func TestReset(t *testing.T) {
	w := newWorld(t)
	for _, how := range []string{"SOCKS", "HTTP"} {
		c := w.connect(how, 9)
		c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v", how, err)
		}
	}
}

// Its end is the end of what is open.
func TestEnd(t *testing.T) {
	w := newWorld(t)
	socks, connect, idle := w.connect("SOCKS", 7), w.connect("HTTP", 7), w.dial()
	w.stop()
	for what, c := range map[string]net.Conn{"SOCKS": socks, "CONNECT": connect, "idle": idle} {
		if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s lives on: %d, %v", what, n, err)
		}
	}
	if c, err := net.Dial("tcp", w.addr); err == nil {
		c.Close()
		t.Error("it still listens")
	}
}

// What concerns one hop goes no further; what does not, does.
func TestHopByHop(t *testing.T) {
	w := newWorld(t)
	c := w.dial()
	io.WriteString(c, "GET http://user:secret@web.banger/x HTTP/1.1\r\nHost: other.example\r\n"+
		"Connection: keep-alive, X-Hop, close\r\nX-Hop: 1\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\n"+
		"Keep-Alive: 1\r\nTE: gzip\r\nUpgrade: h2c\r\nX-Forwarded-For: 192.0.2.1\r\nForwarded: for=192.0.2.1\r\nVia: 1.0 other\r\nX-End: 1\r\n\r\n")
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(r.Body)
	if string(body) != "GET web.banger /x" {
		t.Errorf("the VM was asked for %q", body)
	}
	if r.Header.Get("X-End") != "1" || r.Header.Get("X-Hop") != "" || r.Header.Get("Via") != via {
		t.Errorf("answered with %v", r.Header)
	}
	h := (<-w.seen).Header
	for _, name := range []string{"X-Hop", "Proxy-Connection", "Proxy-Authorization", "Keep-Alive", "Te", "Upgrade", "Connection", "Authorization", "User-Agent", "Accept-Encoding"} {
		if h.Get(name) != "" {
			t.Errorf("%s came through: %q", name, h.Get(name))
		}
	}
	for name, want := range map[string]string{"X-Forwarded-For": "192.0.2.1", "Forwarded": "for=192.0.2.1", "X-End": "1"} {
		if h.Get(name) != want {
			t.Errorf("%s: %q", name, h.Get(name))
		}
	}
	if got := h.Values("Via"); !slices.Equal(got, []string{"1.0 other", via}) {
		t.Errorf("Via: %q", got)
	}
}

func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	c := w.dial()
	io.WriteString(c, "GET http://web.banger/up HTTP/1.1\r\nHost: web.banger\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	in := bufio.NewReader(c)
	r, err := http.ReadResponse(in, nil)
	if err != nil || r.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v, %v", r, err)
	}
	io.WriteString(c, "hello")
	b := make([]byte, 5)
	if _, err := io.ReadFull(in, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
}

// What a page of the web can have a browser send here does nothing.
func TestNoServer(t *testing.T) {
	w := newWorld(t)
	for request, status := range map[string]int{
		"GET / HTTP/1.1\r\nHost: 127.0.0.1:1080\r\n\r\n":                            400,
		"GET / HTTP/1.1\r\nHost: web.banger\r\n\r\n":                                400,
		"POST //web.banger/ HTTP/1.1\r\nHost: web.banger\r\n\r\n":                   400,
		"OPTIONS * HTTP/1.1\r\nHost: web.banger\r\n\r\n":                            400,
		"CONNECT / HTTP/1.1\r\nHost: web.banger\r\n\r\n":                            400,
		"CONNECT web.banger HTTP/1.1\r\nHost: web.banger\r\n\r\n":                   400,
		"CONNECT web.banger:x HTTP/1.1\r\nHost: web.banger\r\n\r\n":                 400,
		"GET https://web.banger/ HTTP/1.1\r\nHost: web.banger\r\n\r\n":              400,
		"GET http:///etc/passwd HTTP/1.1\r\nHost: web.banger\r\n\r\n":               400,
		"GET file:///etc/passwd HTTP/1.1\r\nHost: web.banger\r\n\r\n":               400,
		"TRACE http://web.banger/ HTTP/1.1\r\nHost: web.banger\r\n\r\n":             405,
		"GET http://evil.example/ HTTP/1.1\r\nHost: web.banger\r\n\r\n":             403,
		"GET http://localhost:22/ HTTP/1.1\r\nHost: web.banger\r\n\r\n":             403,
		"GET http://web.banger.evil.example/ HTTP/1.1\r\nHost: x\r\n\r\n":           403,
		"OPTIONS http://web.banger/ HTTP/1.1\r\nMax-Forwards: 0\r\nHost: x\r\n\r\n": 204,
		"nonsense\r\n\r\n": 400,
		"GET http://web.banger/ HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", maxHeaderBytes+8<<10) + "\r\n\r\n": 431,
	} {
		c := w.dial()
		io.WriteString(c, request)
		r, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || r.StatusCode != status {
			t.Errorf("%.60q: %+v, %v; want %d", request, r, err, status)
		}
		c.Close()
	}
	select {
	case r := <-w.seen:
		t.Errorf("the VM was asked for %v", r.URL)
	default:
	}
}

// A client that does not finish its request is not waited for.
func TestSlowRequest(t *testing.T) {
	defer func(d time.Duration) { requestTimeout = d }(requestTimeout)
	requestTimeout = 50 * time.Millisecond
	w := newWorld(t)
	for _, begun := range []string{"", "\x05", "\x05\x01\x00", "\x05\x01\x00\x05\x01\x00\x03\x0aweb", "G", "GET http://web.banger/ HTTP/1.1\r\nHost:"} {
		c := w.dial()
		io.WriteString(c, begun)
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: it waits", begun)
		}
	}
	// Established, it may take its time.
	c := w.connect("SOCKS", 7)
	time.Sleep(4 * requestTimeout)
	io.WriteString(c, "x")
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

func TestSlowVM(t *testing.T) {
	defer func(d time.Duration) { dialTimeout = d }(dialTimeout)
	dialTimeout = 50 * time.Millisecond
	w := newWorld(t)
	c := w.dial()
	io.WriteString(c, "GET http://stuck.banger/ HTTP/1.1\r\nHost: x\r\n\r\n")
	if r, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || r.StatusCode != http.StatusGatewayTimeout {
		t.Errorf("%+v, %v", r, err)
	}
	c = w.dial()
	io.WriteString(c, "\x05\x01\x00\x05\x01\x00\x03\x0cstuck.banger\x00P")
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, []byte{5, 0, 5, replyTTLExpired, 0, 1, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("%v, %v", got, err)
	}
}

// One connection more than there may be waits for another's end.
func TestManyConnections(t *testing.T) {
	defer func(n int) { maxConns = n }(maxConns)
	maxConns = 3
	w := newWorld(t)
	open := []*net.TCPConn{w.connect("SOCKS", 7), w.connect("HTTP", 7), w.connect("SOCKS", 7)}
	c := w.dial()
	io.WriteString(c, "\x05\x01\x00")
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := c.Read(make([]byte, 2)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a fourth connection: %d, %v", n, err)
	}
	open[1].Close()
	c.SetReadDeadline(time.Now().Add(promptly))
	if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
		t.Errorf("after the end of another: %v", err)
	}
}
