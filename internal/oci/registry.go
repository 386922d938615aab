package oci

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"banger"
)

const (
	dockerHub       = "docker.io"
	dockerHubServer = "registry-1.docker.io"

	maxTokenBytes     = 256 << 10 // answer of a token server
	maxChallengeBytes = 8 << 10   // one WWW-Authenticate header
	maxRedirects      = 10
	requestTries      = 3
	firstRetryDelay   = 200 * time.Millisecond
	dialTimeout       = 10 * time.Second
	answerTimeout     = 30 * time.Second
	stallTimeout      = 60 * time.Second // without a byte of a body
)

// registryClient is an HTTP client that keeps to rules:
//   - plain http only to loopback addresses, at every hop of a redirect;
//   - credentials go to the registry that was asked, and to the token server it
//     names over https; neither they nor tokens follow a redirect to another
//     host or port.
type registryClient struct {
	http *http.Client
	auth func(ctx context.Context, host string) (credentials, error)
}

func newRegistryClient() *registryClient {
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout:    dialTimeout,
		ResponseHeaderTimeout:  answerTimeout,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // digests are of the bytes as stored
		ForceAttemptHTTP2:      true,
	}
	return &registryClient{http: &http.Client{Transport: t, CheckRedirect: checkRedirect}, auth: lookupCredentials}
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return errors.New("too many redirects")
	}
	if req.URL.Scheme != "https" && (req.URL.Scheme != "http" || !isLoopback(req.URL.Host) || via[0].URL.Scheme != "http") {
		return fmt.Errorf("redirect to %q, which is not https", clip(req.URL.Scheme+"://"+req.URL.Host))
	}
	if req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme {
		req.Header.Del("Authorization")
	}
	return nil
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

// remote is one repository of a registry.
type remote struct {
	client    *registryClient
	ref       Reference
	base      string // scheme://host
	host      string
	userAgent string

	mu     sync.Mutex
	header string // Authorization to send
}

func (s *Source) remote(ref Reference) *remote {
	c := s.client
	if c == nil {
		c = newRegistryClient()
	}
	r := &remote{client: c, ref: ref, host: ref.Host, userAgent: s.UserAgent}
	if r.host == dockerHub {
		r.host = dockerHubServer
	}
	if r.userAgent == "" {
		r.userAgent = "banger"
	}
	r.base = "https://" + r.host
	if isLoopback(r.host) {
		r.base = "http://" + r.host
	}
	return r
}

func (s *Source) resolveRegistry(ctx context.Context, img *Image) error {
	r := s.remote(img.Reference)
	ask := img.Reference.Tag
	var raw []byte
	mediaType := ""
	if d := img.Reference.Digest; d != "" {
		ask = d
		raw = s.cachedDocument(d)
	}
	if raw == nil {
		var err error
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
	resp, err := r.get(ctx, "/v2/"+r.ref.Repository+"/manifests/"+tagOrDigest, acceptManifests)
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
	resp, err := r.get(ctx, "/v2/"+r.ref.Repository+"/blobs/"+digest, "")
	if err != nil {
		return nil, err
	}
	if resp.ContentLength >= 0 && resp.ContentLength != sizeBytes {
		resp.Body.Close()
		return nil, &mismatchError{what: "blob " + digest + ": size", got: fmt.Sprintf("%d bytes", resp.ContentLength), want: fmt.Sprintf("%d bytes", sizeBytes)}
	}
	return &remoteBody{r: r, body: resp.Body}, nil
}

// remoteBody names the registry in errors of its body.
type remoteBody struct {
	r    *remote
	body io.ReadCloser
}

func (b *remoteBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	if err != nil && err != io.EOF {
		err = b.r.unavailable(err)
	}
	return n, err
}

func (b *remoteBody) Close() error { return b.body.Close() }

// get asks for a path, logs in if the registry wants that, and tries again
// where the network or the server failed for the moment. Anything but 200 is an
// error for the user.
func (r *remote) get(ctx context.Context, path, accept string) (*http.Response, error) {
	delay := firstRetryDelay
	for try := 1; ; try++ {
		resp, err := r.getOnce(ctx, path, accept)
		if err == nil && resp.StatusCode == http.StatusOK {
			return resp, nil
		}
		temporary := err != nil && isTemporary(err)
		if err == nil {
			temporary = resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests
			err = r.statusError(resp)
			resp.Body.Close()
		} else if _, ok := errors.AsType[*banger.Error](err); !ok {
			err = r.unavailable(err)
		}
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

func (r *remote) getOnce(ctx context.Context, path, accept string) (*http.Response, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	resp, err := r.send(ctx, path, accept)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	if resp.Request.URL.Host != r.host {
		return resp, nil // another host's challenge is not answered
	}
	header, err := r.login(ctx, resp.Header.Values("WWW-Authenticate"))
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	if header == "" || header == r.header {
		return resp, nil
	}
	resp.Body.Close()
	r.header = header
	return r.send(ctx, path, accept)
}

func (r *remote) send(ctx context.Context, path, accept string) (*http.Response, error) {
	ctx, stall := newStall(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+path, nil)
	if err != nil {
		stall.stop()
		return nil, err
	}
	req.Header.Set("User-Agent", r.userAgent)
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	if r.header != "" {
		req.Header.Set("Authorization", r.header)
	}
	resp, err := r.client.http.Do(req)
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
	return resp, nil
}

var errStalled = fmt.Errorf("no byte for %s", stallTimeout)

// stallGuard is a body that is given up when no byte comes for stallTimeout.
type stallGuard struct {
	body   io.ReadCloser
	timer  *time.Timer
	cancel context.CancelCauseFunc
	ctx    context.Context
}

func newStall(ctx context.Context) (context.Context, *stallGuard) {
	ctx, cancel := context.WithCancelCause(ctx)
	return ctx, &stallGuard{ctx: ctx, cancel: cancel, timer: time.AfterFunc(stallTimeout, func() { cancel(errStalled) })}
}

func (g *stallGuard) Read(p []byte) (int, error) {
	// The clock runs only while we wait: who places the bytes may be slow.
	g.timer.Reset(stallTimeout)
	n, err := g.body.Read(p)
	g.timer.Stop()
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
	reason := err.Error()
	var e *banger.Error
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
		} else if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
			reason = "no answer in time"
		} else if u, ok := errors.AsType[*url.Error](err); ok {
			reason = clip(strings.Join(strings.Fields(u.Err.Error()), " "))
		}
	}
	e = banger.Errorf(banger.CodeUnavailable, "image %q: registry %s: %s", r.ref.Name(), r.host, reason)
	e.Err = err
	return e.WithHint("check the network, or build without a registry: apt:bookworm, oci:DIR, rootfs:DIR")
}

// statusError makes one line of an answer other than 200. What the server
// wrote goes into Detail, since it is anyone's text.
func (r *remote) statusError(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
	name := r.ref.Name()
	var e *banger.Error
	switch code := resp.StatusCode; {
	case code == http.StatusNotFound:
		e = banger.Errorf(banger.CodeNotFound, "image %q: not found at %s", name, r.host).WithHint("check the spelling of name and tag")
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		e = banger.Errorf(banger.CodeNotFound, "image %q: %s does not give access, or there is no such image", name, r.host).
			WithHint("check the spelling; for a private image log in first: docker login %s", r.ref.Host)
	case code == http.StatusTooManyRequests:
		e = banger.Errorf(banger.CodeUnavailable, "image %q: %s answers that there were too many requests", name, r.host).
			WithHint("wait, or log in for a higher limit: docker login %s", r.ref.Host)
	default:
		e = banger.Errorf(banger.CodeUnavailable, "image %q: %s answers with status %d", name, r.host, code).WithHint("try again later")
	}
	e.Detail = clip(strings.ToValidUTF8(string(body), "?"))
	return e
}

// login answers the challenges of a registry and returns the Authorization
// header to use; "" if there is nothing to answer with.
func (r *remote) login(ctx context.Context, challenges []string) (string, error) {
	cred, err := r.client.auth(ctx, r.ref.Host)
	if err != nil {
		return "", banger.Errorf(banger.CodeUnavailable, "image %q: credentials for %s: %w", r.ref.Name(), r.ref.Host, err)
	}
	for _, c := range challenges {
		if len(c) > maxChallengeBytes {
			continue
		}
		scheme, params := parseChallenge(c)
		switch scheme {
		case "bearer":
			if cred.RegistryToken != "" {
				return "Bearer " + cred.RegistryToken, nil
			}
			token, err := r.token(ctx, params, cred)
			if err != nil {
				return "", err
			}
			return "Bearer " + token, nil
		case "basic":
			if cred.Username != "" {
				return basicHeader(cred), nil
			}
		}
	}
	return "", nil
}

func basicHeader(c credentials) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
}

// parseChallenge splits a WWW-Authenticate header with one challenge (RFC 9110,
// 11.6.1) into its scheme, in lower case, and its parameters.
func parseChallenge(s string) (scheme string, params map[string]string) {
	scheme, rest, _ := strings.Cut(strings.TrimSpace(s), " ")
	params = make(map[string]string)
	for rest = strings.TrimLeft(rest, " ,"); rest != ""; rest = strings.TrimLeft(rest, " ,") {
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			break
		}
		key = strings.ToLower(strings.TrimSpace(key))
		var val strings.Builder
		if strings.HasPrefix(after, `"`) {
			i := 1
			for i < len(after) && after[i] != '"' {
				if after[i] == '\\' && i+1 < len(after) {
					i++
				}
				val.WriteByte(after[i])
				i++
			}
			rest = after[min(i+1, len(after)):]
		} else {
			v, next, _ := strings.Cut(after, ",")
			val.WriteString(strings.TrimSpace(v))
			rest = next
		}
		if _, dup := params[key]; !dup {
			params[key] = val.String()
		}
	}
	return strings.ToLower(scheme), params
}

// checkRealm decides whether a registry may send us to a token server: https,
// or plain http where both are on loopback, and no address literal inside this
// network other than the registry's own.
func (r *remote) checkRealm(realm string) (*url.URL, error) {
	u, err := url.Parse(realm)
	if err != nil || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("token server %q is not a URL to use", clip(realm))
	}
	local := isLoopback(u.Host) && isLoopback(r.host)
	if u.Scheme != "https" && (u.Scheme != "http" || !local) {
		return nil, fmt.Errorf("token server %q is not https", clip(realm))
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil && u.Host != r.host && !local {
		if a = a.Unmap(); !a.IsGlobalUnicast() || a.IsPrivate() {
			return nil, fmt.Errorf("token server %q is an address of a private network", clip(realm))
		}
	} else if err != nil && isLoopback(u.Host) && !local {
		return nil, fmt.Errorf("token server %q is this machine", clip(realm))
	}
	return u, nil
}

// token fetches a bearer token for pulling from the repository; distribution's
// token authentication specification.
func (r *remote) token(ctx context.Context, params map[string]string, cred credentials) (string, error) {
	refused := func(reason any) (string, error) {
		return "", banger.Errorf(banger.CodeUnavailable, "image %q: registry %s: %v", r.ref.Name(), r.host, reason)
	}
	u, err := r.checkRealm(params["realm"])
	if err != nil {
		return refused(err)
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	scope := "repository:" + r.ref.Repository + ":pull"
	var req *http.Request
	if cred.IdentityToken != "" {
		form := url.Values{"grant_type": {"refresh_token"}, "service": {params["service"]}, "scope": {scope}, "client_id": {"banger"}, "refresh_token": {cred.IdentityToken}}
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
	} else {
		q := u.Query()
		q.Set("scope", scope)
		if params["service"] != "" {
			q.Set("service", params["service"])
		}
		u.RawQuery = q.Encode()
		req, err = http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err == nil && cred.Username != "" {
			req.SetBasicAuth(cred.Username, cred.Password)
		}
	}
	if err != nil {
		return refused("token server: not a URL to use")
	}
	req.Header.Set("User-Agent", r.userAgent)
	// A redirect could carry credentials or the form elsewhere.
	client := *r.client.http
	client.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		if req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme {
			return errors.New("token server redirects to another host")
		}
		return checkRedirect(req, via)
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", r.unavailable(fmt.Errorf("token server: %w", err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		if resp.StatusCode == http.StatusBadRequest {
			resp.StatusCode = http.StatusUnauthorized // how some say that the login is wrong
		}
		return "", r.statusError(resp)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBytes+1))
	if err != nil {
		return "", r.unavailable(err)
	}
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if len(raw) > maxTokenBytes || json.Unmarshal(raw, &answer) != nil {
		return refused("token server: answer not understood")
	}
	if answer.Token == "" {
		answer.Token = answer.AccessToken
	}
	if answer.Token == "" || strings.ContainsAny(answer.Token, "\r\n") {
		return refused("token server: no token in its answer")
	}
	return answer.Token, nil
}
