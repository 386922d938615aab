package oci

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"banger"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

const (
	maxHandshakeBytes = 128 << 10 // one body of the login
	maxErrorBytes     = 4 << 10   // the body of an answer other than 200
	maxRedirects      = 5
	requestTries      = 3
	firstRetryDelay   = 200 * time.Millisecond
	dialTimeout       = 10 * time.Second
	answerTimeout     = 30 * time.Second
	helperTimeout     = 30 * time.Second // for the user's login, which a helper may hold
	handshakeTimeout  = 60 * time.Second // for the first question and the token
	stallTimeout      = 60 * time.Second // without a byte of a body
	slowWindow        = 60 * time.Second // of waiting for a body, in which there must come
	slowBytes         = 64 << 10         // so much: a line of 10 kbit/s brings more
	resumeTries       = 5                // of a blob that breaks off, without
	resumeBytes       = 1 << 20          // so much between one break and the next
)

// repository is the way into one repository of a registry, shared by every
// image that a Source resolves there. The login is made once, when first needed.
//
// go-containerregistry speaks the login: it finds the user's credentials where
// docker login and podman login leave them, answers the registry's challenge
// and renews the token. It guarantees that credentials go to the registry asked
// and to the token server that it names (never an address literal of a private
// network), tokens to the registry, and headers with either to no other host or
// port that a redirect leads to. The guard below it holds the rest: schemes,
// redirects, limits.
type repository struct {
	name     name.Repository
	base     string // scheme://host
	keychain authn.Keychain
	guard    *guard

	turn   chan struct{} // held by the one who logs in
	login  authn.Authenticator
	client *http.Client // nil before the login
}

// repository returns the way into a reference's repository, the same one each
// time, so that a login serves all requests of a Source.
func (s *Source) repository(ref Reference) (*repository, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := ref.Host + "/" + ref.Repository
	if r := s.repositories[key]; r != nil {
		return r, nil
	}
	scheme, opts := "https", []name.Option(nil)
	if isLoopback(ref.Host) {
		scheme, opts = "http", append(opts, name.Insecure)
	}
	// docker.io becomes the host that serves Docker Hub.
	reg, err := name.NewRegistry(ref.Host, opts...)
	if err != nil {
		return nil, banger.Errorf(banger.CodeUsage, "image %q: registry %q: not a host to ask", ref.Name(), clip(ref.Host))
	}
	host := reg.RegistryStr()
	r := &repository{
		name: reg.Repo(ref.Repository), base: scheme + "://" + host, keychain: s.keychain,
		guard: &guard{inner: s.transport, scheme: scheme, registry: host, userAgent: s.UserAgent},
		turn:  make(chan struct{}, 1),
	}
	if r.keychain == nil {
		r.keychain = authn.DefaultKeychain
	}
	if r.guard.inner == nil {
		r.guard.inner = newTransport()
	}
	if r.guard.userAgent == "" {
		r.guard.userAgent = "banger"
	}
	if s.repositories == nil {
		s.repositories = make(map[string]*repository)
	}
	s.repositories[key] = r
	return r, nil
}

func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout:    dialTimeout,
		ResponseHeaderTimeout:  answerTimeout,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // digests are of the bytes as stored
		ForceAttemptHTTP2:      true,
	}
}

// isLoopback tells whether host[:port] is this machine by its spelling alone:
// localhost, 127.0.0.0/8 or ::1.
func isLoopback(host string) bool {
	h := host
	if name, _, err := net.SplitHostPort(host); err == nil {
		h = name
	}
	h = strings.TrimSuffix(strings.TrimPrefix(h, "["), "]")
	if strings.EqualFold(h, "localhost") {
		return true
	}
	a, err := netip.ParseAddr(h)
	return err == nil && a.Unmap().IsLoopback()
}

// connect returns a client that is logged in as far as the registry wants.
// What failed is tried again by the next caller.
func (r *repository) connect(ctx context.Context) (*http.Client, error) {
	select {
	case r.turn <- struct{}{}:
		defer func() { <-r.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if r.client != nil {
		return r.client, nil
	}
	if r.login == nil {
		login, err := r.findLogin(ctx)
		if err != nil {
			return nil, err
		}
		r.login = login
	}
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, handshakeKey{}, r.login != authn.Anonymous), handshakeTimeout)
	defer cancel()
	t, err := transport.NewWithContext(ctx, r.name.Registry, r.login, r.guard, []string{r.name.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	r.client = &http.Client{Transport: t}
	return r.client, nil
}

// loginError says that the user's own credentials cannot be read.
type loginError struct{ err error }

func (e *loginError) Error() string { return e.err.Error() }
func (e *loginError) Unwrap() error { return e.err }

// findLogin asks the keychain, which may run a program of the user's that
// never ends and that nothing stops; here it is only waited for so long.
func (r *repository) findLogin(ctx context.Context) (authn.Authenticator, error) {
	type answer struct {
		login authn.Authenticator
		err   error
	}
	answers := make(chan answer, 1)
	go func() {
		login, err := authn.Resolve(ctx, r.keychain, r.name)
		answers <- answer{login, err}
	}()
	timer := time.NewTimer(helperTimeout)
	defer timer.Stop()
	select {
	case a := <-answers:
		if a.err != nil {
			return nil, &loginError{a.err}
		}
		return a.login, nil
	case <-timer.C:
		return nil, &loginError{fmt.Errorf("no answer from the credential helper for %s", helperTimeout)}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// handshakeKey marks the context of a login, whose bodies are small; its value
// tells whether the user has credentials there.
type handshakeKey struct{}

// guard is what every request goes through last, those of the login and every
// hop of a redirect too:
//   - plain http goes to loopback only, and never follows https;
//   - this machine is asked only on behalf of a registry that runs on it;
//   - a login with credentials, or a body, which would hold a refresh token,
//     is not led to another host;
//   - bodies that are not an image's have a limit.
type guard struct {
	inner     http.RoundTripper
	scheme    string // the one to ask the registry with
	registry  string // host[:port]
	userAgent string
}

// hopError is why a request was not sent or not answered. The library asks
// some registries by https and by http at once: of its two errors this is the
// one that counts, since errOtherScheme is none.
type hopError struct{ err error }

func (e *hopError) Error() string { return e.err.Error() }
func (e *hopError) Unwrap() error { return e.err }

var errOtherScheme = errors.New("asked by another scheme than its own")

// RoundTrip implements http.RoundTripper.
func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := g.check(req); err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	req = req.Clone(req.Context())
	req.Header.Set("User-Agent", g.userAgent)
	resp, err := g.inner.RoundTrip(req)
	if err != nil {
		return nil, &hopError{err}
	}
	most := int64(0)
	if _, ok := req.Context().Value(handshakeKey{}).(bool); ok {
		most = maxHandshakeBytes
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusPartialContent {
		most = maxErrorBytes
	}
	if most > 0 {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, most), resp.Body}
	}
	return resp, nil
}

func (g *guard) check(req *http.Request) error {
	to := clip(req.URL.Scheme + "://" + req.URL.Host)
	local := isLoopback(req.URL.Host)
	redirect := ""
	if via := previous(req); via != nil {
		redirect = "redirect to "
		withCredentials, _ := req.Context().Value(handshakeKey{}).(bool)
		hops := 0
		for r := req; r != nil; r = previous(r) {
			hops++
		}
		switch {
		case hops > maxRedirects+1:
			return &hopError{errors.New("too many redirects")}
		case via.URL.Scheme != req.URL.Scheme && req.URL.Scheme != "https":
			return &hopError{fmt.Errorf("redirect to %q, which is not https", to)}
		case via.URL.Host != req.URL.Host && (withCredentials || req.Body != nil && req.Body != http.NoBody):
			return &hopError{fmt.Errorf("redirect of a login to %q, another host", to)}
		}
	}
	switch {
	case req.URL.Host == g.registry && req.URL.Scheme != g.scheme:
		return errOtherScheme
	case req.URL.Scheme != "https" && (req.URL.Scheme != "http" || !local):
		return &hopError{fmt.Errorf("%s%q, which is not https", redirect, to)}
	case local && !isLoopback(g.registry):
		return &hopError{fmt.Errorf("%s%q, which is this machine", redirect, to)}
	}
	return nil
}

// previous returns the request whose answer led to req, nil at the first.
func previous(req *http.Request) *http.Request {
	if req.Response == nil {
		return nil
	}
	return req.Response.Request
}

// remote is one image in a repository.
type remote struct {
	*repository
	ref Reference
}

func (s *Source) remote(ref Reference) (*remote, error) {
	r, err := s.repository(ref)
	if err != nil {
		return nil, err
	}
	return &remote{repository: r, ref: ref}, nil
}

func (s *Source) resolveRegistry(ctx context.Context, img *Image) error {
	r, err := s.remote(img.Reference)
	if err != nil {
		return err
	}
	ask := img.Reference.Tag
	var raw []byte
	mediaType := ""
	if d := img.Reference.Digest; d != "" {
		ask = d
		raw = s.cachedDocument(d)
	}
	if raw == nil {
		if raw, mediaType, err = r.manifest(ctx, ask); err != nil {
			return sourceError(ctx, img.Name, err)
		}
		if d := img.Reference.Digest; d != "" && sum(raw) != d {
			return sourceError(ctx, img.Name, &mismatchError{what: "manifest: digest", got: sum(raw), want: d})
		}
	}
	if err := s.pin(ctx, img, r, raw, mediaType); err != nil {
		if e, ok := errors.AsType[*banger.Error](err); ok && !strings.HasPrefix(e.Message, "image ") && ctx.Err() == nil {
			return withImage(img.Name, e)
		}
		return sourceError(ctx, img.Name, err)
	}
	return s.keepDocument(sum(raw), raw)
}

// withImage puts the image's name before the message of e.
func withImage(name string, e *banger.Error) error {
	c := *e
	c.Message = fmt.Sprintf("image %q: %s", name, e.Message)
	return &c
}

const acceptManifests = mediaOCIIndex + ", " + mediaDockerList + ", " + mediaOCIManifest + ", " + mediaDockerManifest

func (r *remote) manifest(ctx context.Context, tagOrDigest string) ([]byte, string, error) {
	resp, err := r.get(ctx, "/v2/"+r.ref.Repository+"/manifests/"+tagOrDigest, acceptManifests, 0)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifestBytes+1))
	if err != nil {
		return nil, "", r.unavailable(err)
	}
	if len(raw) > MaxManifestBytes {
		return nil, "", fmt.Errorf("manifest of more than %d bytes", MaxManifestBytes)
	}
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	mediaType = strings.TrimSpace(mediaType)
	if mediaType == "application/json" || mediaType == "application/octet-stream" || strings.HasPrefix(mediaType, "text/") {
		mediaType = "" // says nothing
	}
	return raw, mediaType, nil
}

func (r *remote) openBlob(ctx context.Context, digest string, sizeBytes int64) (io.ReadCloser, error) {
	return r.openRest(ctx, digest, sizeBytes, 0)
}

func (r *remote) openRest(ctx context.Context, digest string, sizeBytes, from int64) (io.ReadCloser, error) {
	b := &remoteBody{r: r, ctx: ctx, digest: digest, size: sizeBytes, done: from, broken: from}
	return b, b.open()
}

// remoteBody is a blob as it comes over the network. Where the connection
// breaks it asks for the rest (RFC 9110 section 14) and goes on. That the parts
// fit is for the digest to say, which whoever reads it computes over the whole.
type remoteBody struct {
	r      *remote
	ctx    context.Context
	digest string
	size   int64

	body   io.ReadCloser
	done   int64 // bytes handed out, or there before
	tries  int   // breaks since the last resumeBytes
	broken int64 // where the last one was
}

// open asks for what is left.
func (b *remoteBody) open() error {
	path := "/v2/" + b.r.ref.Repository + "/blobs/" + b.digest
	resp, err := b.r.get(b.ctx, path, "", b.done)
	if err == nil && resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		resp.Body.Close()
		resp, err = b.r.get(b.ctx, path, "", 0)
	}
	if err != nil {
		return err
	}
	fail := func(err error) error {
		resp.Body.Close()
		return err
	}
	left := b.size
	if resp.StatusCode == http.StatusPartialContent {
		if got, want := resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", b.done, b.size-1, b.size); got != want {
			return fail(fmt.Errorf("blob %s: the rest of it is %q, asked for was %q", b.digest, clip(got), want))
		}
		left -= b.done
	}
	if resp.ContentLength >= 0 && resp.ContentLength != left {
		return fail(&mismatchError{what: "blob " + b.digest + ": size", got: fmt.Sprintf("%d bytes", resp.ContentLength), want: fmt.Sprintf("%d bytes", left)})
	}
	if resp.StatusCode == http.StatusOK && b.done > 0 {
		// A server that knows no ranges begins again.
		if _, err := io.CopyN(io.Discard, resp.Body, b.done); err != nil {
			return fail(b.r.unavailable(err))
		}
	}
	b.body = resp.Body
	return nil
}

func (b *remoteBody) Read(p []byte) (int, error) {
	if b.body == nil {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.body.Read(p)
	b.done += int64(n)
	if err == nil || err == io.EOF {
		return n, err
	}
	if b.ctx.Err() != nil || b.done >= b.size || !isTemporary(err) {
		return n, b.r.unavailable(err)
	}
	if b.done-b.broken >= resumeBytes {
		b.tries = 0
	}
	b.broken = b.done
	if b.tries++; b.tries > resumeTries {
		return n, b.r.unavailable(err)
	}
	b.body.Close()
	b.body = nil
	select {
	case <-time.After(firstRetryDelay):
	case <-b.ctx.Done():
		return n, context.Cause(b.ctx)
	}
	return n, b.open()
}

func (b *remoteBody) Close() error {
	if b.body == nil {
		return nil
	}
	return b.body.Close()
}

// get asks for a path, after the login if there was none yet, and tries again
// where the network or the server failed for the moment. from > 0 asks for what
// is from that byte on. Anything but 200, or 206 and 416 then, is an error for
// the user.
func (r *remote) get(ctx context.Context, path, accept string, from int64) (*http.Response, error) {
	delay := firstRetryDelay
	for try := 1; ; try++ {
		resp, err := r.send(ctx, path, accept, from)
		if err == nil {
			return resp, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		err, temporary := r.explain(err)
		if !temporary || try == requestTries {
			return nil, err
		}
		select {
		case <-time.After(delay):
			delay *= 3
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// explain makes one line for the user of what went wrong, and tells whether it
// may go well the next time.
func (r *remote) explain(err error) (explained error, temporary bool) {
	if e, ok := errors.AsType[*loginError](err); ok {
		b := banger.Errorf(banger.CodeUnavailable, "image %q: login for %s: %s", r.ref.Name(), r.ref.Host, oneLine(e.err))
		b.Err = err
		return b.WithHint("check Docker's config.json (or Podman's auth.json) and the credential helpers it names"), false
	}
	if e, ok := errors.AsType[*transport.Error](err); ok {
		return r.statusError(e), e.StatusCode >= 500 || e.StatusCode == http.StatusTooManyRequests
	}
	if e, ok := errors.AsType[*hopError](err); ok {
		err = e.err
	}
	return r.unavailable(err), isTemporary(err)
}

func isTemporary(err error) bool {
	if errors.Is(err, context.Canceled) || errors.Is(err, syscall.ECONNREFUSED) {
		return false
	}
	if e, ok := errors.AsType[*net.DNSError](err); ok {
		return e.IsTemporary || e.IsTimeout
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return true
	}
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
}

func (r *remote) send(ctx context.Context, path, accept string, from int64) (*http.Response, error) {
	client, err := r.connect(ctx)
	if err != nil {
		return nil, err
	}
	ctx, stall := newStall(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+path, nil)
	if err != nil {
		stall.stop()
		return nil, err
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	good := []int{http.StatusOK}
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
		good = append(good, http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable)
	}
	resp, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		stall.stop()
		return nil, err
	}
	stall.timer.Stop()
	stall.body = resp.Body
	resp.Body = stall
	if err := transport.CheckError(resp, good...); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

var (
	errStalled = fmt.Errorf("no byte for %s", stallTimeout)
	errSlow    = fmt.Errorf("less than %d bytes in %s", slowBytes, slowWindow)
)

// stallGuard is a body that is given up when no byte comes for stallTimeout,
// or fewer than slowBytes for slowWindow.
type stallGuard struct {
	body   io.ReadCloser
	timer  *time.Timer
	cancel context.CancelCauseFunc
	ctx    context.Context

	waited time.Duration // in this window
	came   int           // bytes
}

func newStall(ctx context.Context) (context.Context, *stallGuard) {
	ctx, cancel := context.WithCancelCause(ctx)
	return ctx, &stallGuard{ctx: ctx, cancel: cancel, timer: time.AfterFunc(stallTimeout, func() { cancel(errStalled) })}
}

func (g *stallGuard) Read(p []byte) (int, error) {
	// The clock runs only while we wait: who places the bytes may be slow.
	g.timer.Reset(stallTimeout)
	start := time.Now()
	n, err := g.body.Read(p)
	g.timer.Stop()
	g.waited += time.Since(start)
	if g.came += n; g.waited >= slowWindow {
		if g.came < slowBytes && err == nil {
			g.cancel(errSlow)
			return n, errSlow
		}
		g.waited, g.came = 0, 0
	}
	if err != nil && err != io.EOF && g.ctx.Err() != nil {
		err = context.Cause(g.ctx)
	}
	return n, err
}

func (g *stallGuard) Close() error {
	g.stop()
	return g.body.Close()
}

func (g *stallGuard) stop() {
	g.timer.Stop()
	g.cancel(context.Canceled)
}

// unavailable makes one line of an error of the network.
func (r *remote) unavailable(err error) error {
	reason := oneLine(err)
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, syscall.ECONNREFUSED):
		reason = "connection refused"
	case errors.Is(err, syscall.ECONNRESET):
		reason = "connection reset"
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		reason = "connection closed in the middle of an answer"
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		reason = "not reachable"
	default:
		if d, ok := errors.AsType[*net.DNSError](err); ok {
			reason = "name not resolved"
			if d.IsTimeout {
				reason = "no answer from the name server"
			}
			break
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			reason = "its certificate is not trusted"
		} else if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
			reason = "its certificate is not trusted"
		} else if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
			reason = "it does not speak TLS, and plain http is for loopback only"
		} else if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
			reason = "no answer in time"
		} else if isBadJSON(err) {
			reason = "token server: answer not understood"
		} else if u, ok := errors.AsType[*url.Error](err); ok {
			reason = oneLine(u.Err)
		}
	}
	e := banger.Errorf(banger.CodeUnavailable, "image %q: registry %s: %s", r.ref.Name(), r.ref.Host, reason)
	e.Err = err
	return e.WithHint("check the network, or build without a registry: apt:bookworm, oci:DIR, rootfs:DIR")
}

// isBadJSON tells an answer of a token server that was no such thing.
func isBadJSON(err error) bool {
	_, syntax := errors.AsType[*json.SyntaxError](err)
	_, kind := errors.AsType[*json.UnmarshalTypeError](err)
	return syntax || kind
}

// oneLine is the first line of an error that may repeat what a server or a
// program wrote; more than that line may hold a secret.
func oneLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	line = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, line)
	return clip(strings.TrimRight(line, ": "))
}

// statusError makes one line of an answer other than 200. What the server
// wrote goes into Detail, since it is anyone's text.
func (r *remote) statusError(answer *transport.Error) error {
	name, host := r.ref.Name(), r.ref.Host
	code := answer.StatusCode
	if code == http.StatusBadRequest && answer.Request != nil && !strings.HasPrefix(answer.Request.URL.Path, "/v2/") {
		code = http.StatusUnauthorized // how some token servers say that the login is wrong
	}
	var e *banger.Error
	switch {
	case code == http.StatusNotFound:
		e = banger.Errorf(banger.CodeNotFound, "image %q: not found at %s", name, host).WithHint("check the spelling of name and tag")
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		e = banger.Errorf(banger.CodeNotFound, "image %q: %s does not give access, or there is no such image", name, host).
			WithHint("check the spelling; for a private image log in first: docker login %s", host)
	case code == http.StatusTooManyRequests:
		e = banger.Errorf(banger.CodeUnavailable, "image %q: %s answers that there were too many requests", name, host).
			WithHint("wait, or log in for a higher limit: docker login %s", host)
	default:
		e = banger.Errorf(banger.CodeUnavailable, "image %q: %s answers with status %d", name, host, code).WithHint("try again later")
	}
	e.Detail = clip(strings.ToValidUTF8(answer.Error(), "?"))
	return e
}
