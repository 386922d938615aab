package proxy

import (
	"bufio"
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"sync"
	"time"

	"banger"
)

const (
	// maxHeaderBytes bounds a request's head, maxAnswerBytes that of what a VM
	// answers.
	maxHeaderBytes = 64 << 10
	maxAnswerBytes = 256 << 10
	// idleTimeout is how long a client's connection waits for its next
	// request, vmIdleTimeout how long one to a VM is kept for it.
	idleTimeout   = time.Minute
	vmIdleTimeout = 15 * time.Second
	maxIdle       = 64

	via = "1.1 banger" // RFC 9110 7.6.3
)

// An httpSide is the server of those connections that speak HTTP. It is the
// net.Listener of net/http's server, too: a connection comes from take.
type httpSide struct {
	ctx    context.Context // ends with the proxy
	p      *proxy
	addr   net.Addr
	server *http.Server
	to     *http.Transport
	pass   *httputil.ReverseProxy
	conns  chan *httpConn
	done   chan struct{} // closed with the server
	once   sync.Once
}

func newHTTPSide(ctx context.Context, p *proxy, addr net.Addr) *httpSide {
	h := &httpSide{ctx: ctx, p: p, addr: addr, conns: make(chan *httpConn), done: make(chan struct{})}
	quiet := log.New(io.Discard, "", 0)
	h.to = &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			host, port, err := split(address)
			if err != nil {
				return nil, err
			}
			return p.dial(ctx, host, port)
		},
		DisableCompression:     true, // what a VM sends is passed on as it is
		MaxIdleConns:           maxIdle,
		IdleConnTimeout:        vmIdleTimeout,
		MaxResponseHeaderBytes: maxAnswerBytes,
	}
	h.pass = &httputil.ReverseProxy{
		Transport:     h.to,
		FlushInterval: -1,
		ErrorLog:      quiet,
		Rewrite:       rewrite,
		ModifyResponse: func(r *http.Response) error {
			r.Header.Add("Via", via)
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { fail(w, err) },
	}
	h.server = &http.Server{
		Handler:                      h,
		ReadHeaderTimeout:            requestTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     quiet,
	}
	return h
}

func (h *httpSide) serve() { _ = h.server.Serve(h) }

func (h *httpSide) close() {
	h.server.Close()
	h.to.CloseIdleConnections()
}

// Accept, Close and Addr are net.Listener's.
func (h *httpSide) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *httpSide) Close() error   { h.once.Do(func() { close(h.done) }); return nil }
func (h *httpSide) Addr() net.Addr { return h.addr }

// take gives a connection to the server and returns when it is over.
func (h *httpSide) take(conn *net.TCPConn, first byte) {
	c := &httpConn{TCPConn: conn, first: []byte{first}, over: make(chan struct{})}
	select {
	case h.conns <- c:
		<-c.over
	case <-h.done:
	}
}

// An httpConn is a connection whose first byte has been looked at.
type httpConn struct {
	*net.TCPConn
	first []byte
	once  sync.Once
	over  chan struct{} // closed with it
}

func (c *httpConn) Read(b []byte) (int, error) {
	if len(c.first) > 0 && len(b) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.TCPConn.Read(b)
}

func (c *httpConn) Close() error {
	defer c.once.Do(func() { close(c.over) })
	return c.TCPConn.Close()
}

// ServeHTTP answers one request. A page of the web can have a browser send
// requests to this port, under whatever name leads here; but not ones that
// name the server they are for, which only clients of a proxy send.
func (h *httpSide) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodConnect && r.URL.Host != "":
		h.connect(w, r)
	case r.Method == http.MethodConnect, r.URL.Host == "":
		refuse(w, http.StatusBadRequest, "this is a proxy to VMs and no server: tell your client so, as `curl -x http://%s http://NAME.banger/` does", h.addr)
	case r.URL.Scheme != "http":
		refuse(w, http.StatusBadRequest, "a proxy takes %q by CONNECT alone", r.URL.Scheme)
	case r.Method == http.MethodTrace:
		refuse(w, http.StatusMethodNotAllowed, "TRACE is not passed on")
	case r.Method == http.MethodOptions && r.Header.Get("Max-Forwards") == "0": // RFC 9110 7.6.2
		w.WriteHeader(http.StatusNoContent)
	default:
		h.pass.ServeHTTP(w, r)
	}
}

// rewrite makes the request for the VM: the client's, less what concerns this
// hop alone, which ReverseProxy has removed (RFC 9110 7.6.1).
func rewrite(r *httputil.ProxyRequest) {
	out, in := r.Out, r.In
	out.Host = in.URL.Host // whatever Host says (RFC 9112 3.2.2)
	out.URL.User = nil
	out.URL.RawQuery = in.URL.RawQuery
	// To a client these are as good as any others; ReverseProxy takes them for
	// its own.
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if values := in.Header.Values(name); len(values) > 0 {
			out.Header[name] = values
		}
	}
	out.Header.Add("Via", via)
	if n, err := strconv.Atoi(out.Header.Get("Max-Forwards")); err == nil && n > 0 && in.Method == http.MethodOptions {
		out.Header.Set("Max-Forwards", strconv.Itoa(n-1))
	}
}

// connect is CONNECT: RFC 9110 9.3.6.
func (h *httpSide) connect(w http.ResponseWriter, r *http.Request) {
	host, port, err := split(r.URL.Host)
	if err != nil {
		refuse(w, http.StatusBadRequest, "%v", err)
		return
	}
	// The request's own context ends when the client closes its direction.
	vm, err := h.p.dial(h.ctx, host, port)
	if err != nil {
		fail(w, err)
		return
	}
	defer vm.Close()
	hijacked, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		abort(vm)
		return
	}
	conn := hijacked.(*httpConn)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(requestTimeout))
	_, err = io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
	if err == nil {
		err = passOn(vm, buffered.Reader)
	}
	if err != nil {
		abort(vm)
		return
	}
	conn.SetDeadline(time.Time{})
	join(conn.TCPConn, vm)
}

// passOn writes what a client has sent after its request already.
func passOn(to io.Writer, from *bufio.Reader) error {
	early, err := from.Peek(from.Buffered())
	if err == nil {
		_, err = to.Write(early)
	}
	return err
}

// split takes a destination apart.
func split(address string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, banger.Errorf(banger.CodeUsage, "%w", err)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, banger.Errorf(banger.CodeUsage, "%q: it has no port number", address)
	}
	return host, uint16(n), nil
}

// statusOf is what a client is told of an error of Dial.
func statusOf(err error) int {
	switch banger.CodeOf(err) {
	case banger.CodeUsage:
		return http.StatusForbidden
	case banger.CodeConflict:
		return http.StatusServiceUnavailable
	case banger.CodeTimeout:
		return http.StatusGatewayTimeout
	}
	return http.StatusBadGateway
}

func fail(w http.ResponseWriter, err error) { answer(w, statusOf(err), explain(err)) }

func refuse(w http.ResponseWriter, status int, format string, args ...any) {
	answer(w, status, explain(banger.Errorf(banger.CodeUsage, format, args...)))
}

// answer is an answer of the proxy's own.
func answer(w http.ResponseWriter, status int, text string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Connection", "close")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text)
}
