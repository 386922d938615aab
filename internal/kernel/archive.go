package kernel

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"banger"

	"github.com/ProtonMail/go-crypto/openpgp"
)

// Suites are the Debian releases whose kernels can be pulled.
var Suites = []string{"bookworm", "trixie"}

// DefaultSuite is the one that `banger kernel pull` takes by itself.
const DefaultSuite = "bookworm"

// metaPackage depends on the newest cloud kernel of its suite.
const metaPackage = "linux-image-cloud-amd64"

const (
	maxInReleaseBytes     = 4 << 20
	maxPackagesBytes      = 64 << 20  // compressed
	maxPackagesPlainBytes = 512 << 20 // uncompressed
	maxPackagesLineBytes  = 1 << 20
	maxPackageStanzas     = 4096 // kernel packages in one index
	maxDebBytes           = 1 << 30
	maxRedirects          = 5

	// A release dated in the future means that one of two clocks is wrong.
	maxClockSkew = 24 * time.Hour

	dialTimeout  = 15 * time.Second
	stallTimeout = 60 * time.Second // without one byte
	fileTimeout  = 30 * time.Minute // for one file
)

// An archive is Debian's, seen through mirrors.
type archive struct {
	mirrors mirrors
	keys    openpgp.KeyRing
	client  *http.Client
	now     func() time.Time
	stall   time.Duration
}

func newArchive(m mirrors) (*archive, error) {
	keys, err := loadArchiveKeys()
	if err != nil {
		return nil, err
	}
	return &archive{mirrors: m, keys: keys, client: newClient(), now: time.Now, stall: stallTimeout}, nil
}

func newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSHandshakeTimeout:    dialTimeout,
			ResponseHeaderTimeout:  stallTimeout,
			MaxResponseHeaderBytes: 64 << 10,
			DisableCompression:     true, // sizes and hashes are of the bytes as stored
			ForceAttemptHTTP2:      true,
			IdleConnTimeout:        stallTimeout,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return fmt.Errorf("more than %d redirects", maxRedirects)
			}
			if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
				return errors.New("redirect from https to " + strconv.Quote(req.URL.Scheme))
			}
			return nil
		},
	}
}

// errMissing is wrapped when a mirror answers but has no such file.
var errMissing = errors.New("no such file on the mirror")

// errUnreachable is wrapped when a mirror does not answer, or not to the end.
var errUnreachable = errors.New("does not answer")

// fetch copies the body at address to w: at most limit bytes, and exactly size
// if size is not negative. Errors name the address.
func (a *archive) fetch(ctx context.Context, w io.Writer, address string, size, limit int64, progress func(done int64)) error {
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, fileTimeout)
	defer cancel()
	// Reading blocks; a timer that each read puts off ends a stalled one.
	stalled := time.AfterFunc(a.stall, cancel)
	defer stalled.Stop()

	// away tells a mirror that went away from a caller who did not want to wait.
	away := func(err error) error {
		switch {
		case asked.Err() != nil:
			err = context.Cause(asked)
		case ctx.Err() != nil:
			err = errUnreachable // its own cancellation says nothing to the user
		default:
			err = fmt.Errorf("%w: %w", errUnreachable, err)
		}
		return fmt.Errorf("mirror %s: %w", shown(address), err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return fmt.Errorf("mirror %s: %w", shown(address), err)
	}
	req.Header.Set("User-Agent", "banger")
	resp, err := a.client.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // the address is named by away
		}
		return away(err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return fmt.Errorf("mirror %s: %w", shown(address), errMissing)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("mirror %s: %w: status %d", shown(address), errUnreachable, resp.StatusCode)
	case size >= 0 && size > limit:
		return fmt.Errorf("mirror %s: %d bytes announced, the limit is %d", shown(address), size, limit)
	case size >= 0 && resp.ContentLength >= 0 && resp.ContentLength != size:
		return fmt.Errorf("mirror %s: %d bytes, the signed index says %d", shown(address), resp.ContentLength, size)
	}
	if size >= 0 {
		limit = size
	}
	var done int64
	buf := make([]byte, 64<<10)
	for {
		n, err := resp.Body.Read(buf)
		stalled.Reset(a.stall)
		if done += int64(n); done > limit {
			return fmt.Errorf("mirror %s: more than %d bytes", shown(address), limit)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		if progress != nil && n > 0 {
			progress(done)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return away(err)
		}
	}
	if size >= 0 && done != size {
		return fmt.Errorf("mirror %s: ends after %d bytes, the signed index says %d", shown(address), done, size)
	}
	return nil
}

// fetchHashed is fetch for a file whose size and SHA-256 are known. Nothing
// that it wrote may be believed before it returns nil.
func (a *archive) fetchHashed(ctx context.Context, w io.Writer, address string, want indexEntry, limit int64, progress func(done int64)) error {
	h := sha256.New()
	if err := a.fetch(ctx, io.MultiWriter(w, h), address, want.sizeBytes, limit, progress); err != nil {
		return err
	}
	if [sha256.Size]byte(h.Sum(nil)) != want.sha256 {
		return fmt.Errorf("mirror %s: SHA-256 differs from the signed index", shown(address))
	}
	return nil
}

// shown is an address as a message may show it: quoted, without a password.
func shown(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return strconv.Quote("an address that does not parse")
	}
	return strconv.Quote(u.Redacted())
}

// An indexEntry is the size and hash of one file, as a signed index has it.
type indexEntry struct {
	sizeBytes int64
	sha256    [sha256.Size]byte
}

// A release is the verified content of one InRelease file.
type release struct {
	base   string // address of the archive it came from
	suite  string
	byHash bool
	files  map[string]indexEntry
}

// openRelease finds the first mirror that serves the suite. A mirror that is
// away, or is signed by somebody other than Debian (a third party's archive
// among the host's sources), is passed over; one that serves Debian's signed
// text wrongly or too late is an error, since it may be an attack.
func (a *archive) openRelease(ctx context.Context, bases []string, suite string) (*release, error) {
	var first error
	for _, base := range bases {
		r, err := a.readRelease(ctx, base, suite)
		if err == nil {
			return r, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !errors.Is(err, errUnreachable) && !errors.Is(err, errMissing) && !errors.Is(err, errUnknownSigner) {
			return nil, err
		}
	}
	return nil, first
}

func (a *archive) readRelease(ctx context.Context, base, suite string) (*release, error) {
	address := base + "/dists/" + suite + "/InRelease"
	var buf strings.Builder
	if err := a.fetch(ctx, &buf, address, -1, maxInReleaseBytes, nil); err != nil {
		return nil, err
	}
	now := a.now()
	text, err := verifyClearSigned([]byte(buf.String()), a.keys, now)
	if err != nil {
		return nil, fmt.Errorf("mirror %s: %w", shown(address), err)
	}
	r, err := parseRelease(text, suite, now)
	if err != nil {
		return nil, fmt.Errorf("mirror %s: %w", shown(address), err)
	}
	r.base = base
	return r, nil
}

// What a well-signed release can be refused for.
var (
	errWrongSuite = errors.New("wrong suite")
	errStale      = errors.New("no longer valid")
	errFuture     = errors.New("dated in the future")
)

// parseRelease reads the text of a Release file (Debian repository format).
// It must be of the suite asked for, and valid now.
func parseRelease(text []byte, suite string, now time.Time) (*release, error) {
	r := &release{suite: suite, files: make(map[string]indexEntry)}
	fields := make(map[string]string)
	section := ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\r\n")
		if rest, ok := strings.CutPrefix(line, " "); ok {
			if section != "sha256" {
				continue
			}
			f := strings.Fields(rest)
			if len(f) != 3 {
				return nil, fmt.Errorf("release: malformed SHA256 line %q", line)
			}
			e, err := parseIndexEntry(f[1], f[0])
			if err != nil {
				return nil, fmt.Errorf("release: %q: %w", f[2], err)
			}
			if _, dup := r.files[f[2]]; dup {
				return nil, fmt.Errorf("release: %q: listed twice", f[2])
			}
			r.files[f[2]] = e
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("release: malformed line %q", line)
		}
		section = strings.ToLower(name)
		if _, dup := fields[section]; dup {
			return nil, fmt.Errorf("release: field %q twice", name)
		}
		fields[section] = strings.TrimSpace(value)
	}
	if got := fields["codename"]; got != suite {
		return nil, fmt.Errorf("%w: this is %q, asked for was %q", errWrongSuite, got, suite)
	}
	date, err := parseReleaseDate(fields["date"])
	if err != nil {
		return nil, fmt.Errorf("release: date: %w", err)
	}
	if date.After(now.Add(maxClockSkew)) {
		return nil, fmt.Errorf("%w: made %s, the clock here says %s", errFuture, date.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if s, ok := fields["valid-until"]; ok {
		until, err := parseReleaseDate(s)
		if err != nil {
			return nil, fmt.Errorf("release: valid-until: %w", err)
		}
		if now.After(until) {
			return nil, fmt.Errorf("%w: was valid until %s, the clock here says %s", errStale, until.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		}
	}
	r.byHash = fields["acquire-by-hash"] == "yes"
	return r, nil
}

// parseReleaseDate reads the RFC 2822 subset that Release files use.
func parseReleaseDate(s string) (time.Time, error) {
	for _, layout := range []string{"Mon, _2 Jan 2006 15:04:05 MST", "Mon, _2 Jan 2006 15:04:05 -0700"} {
		if t, err := time.Parse(layout, s); err == nil {
			// Only UTC is used; Go gives an unknown zone name offset 0.
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is no date", s)
}

func parseIndexEntry(size, sum string) (indexEntry, error) {
	var e indexEntry
	n, err := strconv.ParseUint(size, 10, 62)
	if err != nil {
		return e, fmt.Errorf("size %q is no number", size)
	}
	e.sizeBytes = int64(n)
	b, err := hex.DecodeString(sum)
	if err != nil || len(b) != sha256.Size {
		return e, fmt.Errorf("%q is no SHA-256", sum)
	}
	copy(e.sha256[:], b)
	return e, nil
}

// A debPackage is one stanza of a Packages index.
type debPackage struct {
	name, version string
	depends       string
	filename      string // path below the archive, validated
	indexEntry
	base string // address of the archive that has it
}

// readPackages fetches the suite's package index and returns the stanzas of
// kernel images. scratch holds the compressed index for the time of the call.
func (a *archive) readPackages(ctx context.Context, r *release, scratch *os.File) ([]debPackage, error) {
	const name = "main/binary-amd64/Packages.xz"
	e, ok := r.files[name]
	if !ok {
		return nil, fmt.Errorf("release of %q: lists no %s", r.suite, name)
	}
	dir := r.base + "/dists/" + r.suite + "/"
	var addresses []string
	if r.byHash {
		addresses = append(addresses, dir+"main/binary-amd64/by-hash/SHA256/"+hex.EncodeToString(e.sha256[:]))
	}
	addresses = append(addresses, dir+name)
	var err error
	for _, address := range addresses {
		if err := truncateFile(scratch); err != nil {
			return nil, err
		}
		if err = a.fetchHashed(ctx, scratch, address, e, maxPackagesBytes, nil); !errors.Is(err, errMissing) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	if _, err := scratch.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	xr, err := decompressor(scratch, ".xz")
	if err != nil {
		return nil, fmt.Errorf("%s of %q: %w", name, r.suite, err)
	}
	defer xr.Close()
	pkgs, err := parsePackages(xr, "linux-image-")
	if err != nil {
		return nil, fmt.Errorf("%s of %q: %w", name, r.suite, err)
	}
	for i := range pkgs {
		pkgs[i].base = r.base
	}
	return pkgs, nil
}

func truncateFile(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// parsePackages reads a Packages index, keeping only amd64 stanzas whose name
// has the prefix.
func parsePackages(r io.Reader, prefix string) ([]debPackage, error) {
	limited := &io.LimitedReader{R: r, N: maxPackagesPlainBytes + 1}
	br := bufio.NewReaderSize(limited, maxPackagesLineBytes)
	var pkgs []debPackage
	fields := make(map[string]string)
	flush := func() error {
		defer clear(fields)
		if !strings.HasPrefix(fields["package"], prefix) || fields["architecture"] != "amd64" {
			return nil
		}
		p, err := newDebPackage(fields)
		if err != nil {
			return err
		}
		if len(pkgs) == maxPackageStanzas {
			return fmt.Errorf("more than %d packages named %s*", maxPackageStanzas, prefix)
		}
		pkgs = append(pkgs, p)
		return nil
	}
	for {
		line, err := br.ReadSlice('\n')
		if limited.N == 0 {
			return nil, fmt.Errorf("larger than %d bytes", maxPackagesPlainBytes)
		}
		if err == bufio.ErrBufferFull {
			return nil, fmt.Errorf("a line longer than %d bytes", maxPackagesLineBytes)
		}
		if err != nil && err != io.EOF {
			return nil, err
		}
		text := line
		for len(text) > 0 && (text[len(text)-1] == '\n' || text[len(text)-1] == '\r') {
			text = text[:len(text)-1]
		}
		switch {
		case len(text) == 0:
			if len(fields) > 0 {
				if err := flush(); err != nil {
					return nil, err
				}
			}
		case text[0] == ' ' || text[0] == '\t': // nothing wanted is folded
		default:
			if i := slices.Index(text, ':'); i > 0 && i < 16 {
				switch key := strings.ToLower(string(text[:i])); key {
				case "package", "version", "architecture", "depends", "filename", "size", "sha256":
					if _, dup := fields[key]; dup {
						return nil, fmt.Errorf("package %q: field %q twice", fields["package"], key)
					}
					fields[key] = strings.TrimSpace(string(text[i+1:]))
				}
			}
		}
		if err == io.EOF {
			return pkgs, flush()
		}
	}
}

var poolPath = regexp.MustCompile(`^pool/[A-Za-z0-9._+~/-]{1,512}$`)

func newDebPackage(f map[string]string) (debPackage, error) {
	p := debPackage{name: f["package"], version: f["version"], depends: f["depends"], filename: f["filename"]}
	if _, err := parseDebVersion(p.version); err != nil {
		return p, fmt.Errorf("package %q: %w", p.name, err)
	}
	if !poolPath.MatchString(p.filename) || strings.Contains(p.filename, "..") || strings.Contains(p.filename, "//") {
		return p, fmt.Errorf("package %q: file name %q is none of a pool", p.name, p.filename)
	}
	var err error
	if p.indexEntry, err = parseIndexEntry(f["size"], f["sha256"]); err != nil {
		return p, fmt.Errorf("package %q: %w", p.name, err)
	}
	return p, nil
}

// findKernel asks the suite, its updates and its security archive, and
// returns the kernel package that the newest meta package stands for, and the
// kernel's release.
func (a *archive) findKernel(ctx context.Context, suite string, scratch *os.File) (debPackage, string, error) {
	var all []debPackage
	for _, s := range []struct {
		suite string
		bases []string
	}{
		{suite, a.mirrors.main},
		{suite + "-updates", a.mirrors.main},
		{suite + "-security", a.mirrors.security},
	} {
		r, err := a.openRelease(ctx, s.bases, s.suite)
		if err != nil {
			return debPackage{}, "", err
		}
		pkgs, err := a.readPackages(ctx, r, scratch)
		if err != nil {
			return debPackage{}, "", err
		}
		all = append(all, pkgs...)
	}
	return chooseKernel(all)
}

const unsignedSuffix = "-unsigned"

var dependsOnImage = regexp.MustCompile(`^(linux-image-([0-9][A-Za-z0-9.+~-]*-cloud-amd64))(?: \(= ([^()\s]+)\))?$`)

// chooseKernel follows the newest meta package to the image it depends on.
func chooseKernel(pkgs []debPackage) (debPackage, string, error) {
	meta := newestPackage(pkgs, metaPackage, "")
	if meta == nil {
		return debPackage{}, "", fmt.Errorf("package %s: not in the archive", metaPackage)
	}
	for _, dep := range strings.FieldsFunc(meta.depends, func(r rune) bool { return r == ',' || r == '|' }) {
		m := dependsOnImage.FindStringSubmatch(strings.TrimSpace(dep))
		if m == nil {
			continue
		}
		if err := checkRelease(m[2]); err != nil {
			return debPackage{}, "", err
		}
		for _, name := range []string{m[1], m[1] + unsignedSuffix} {
			if p := newestPackage(pkgs, name, m[3]); p != nil {
				return *p, m[2], nil
			}
		}
		return debPackage{}, "", fmt.Errorf("package %s: needed by %s %s, not in the archive", m[1], metaPackage, meta.version)
	}
	return debPackage{}, "", fmt.Errorf("package %s %s: depends on no kernel image: %q", metaPackage, meta.version, meta.depends)
}

// newestPackage returns the package of that name with the highest version, or
// nil. A version that is not "" must match.
func newestPackage(pkgs []debPackage, name, version string) *debPackage {
	var best *debPackage
	for i := range pkgs {
		p := &pkgs[i]
		if p.name != name || (version != "" && p.version != version) {
			continue
		}
		if best == nil || compareDebVersions(p.version, best.version) > 0 {
			best = p
		}
	}
	return best
}

// userError gives an error of pull or import its code and, where there is one,
// the next step. What the mirror or the user's files did wrong is invalid;
// errors of this computer stay as they are.
func userError(verb string, err error) error {
	var be *banger.Error
	var pe *fs.PathError
	switch {
	case err == nil, errors.As(err, &be):
		return err
	// First: a network time-out also says that it is a deadline.
	case errors.Is(err, errUnreachable), errors.Is(err, errMissing):
		return banger.Errorf(banger.CodeUnavailable, "kernel %s: %w", verb, err).
			WithHint("without a Debian mirror, bring a kernel: banger kernel import VMLINUZ --modules DIR")
	case errors.Is(err, context.Canceled):
		return banger.Errorf(banger.CodeCanceled, "kernel %s: %w", verb, err)
	case errors.Is(err, context.DeadlineExceeded):
		return banger.Errorf(banger.CodeTimeout, "kernel %s: %w", verb, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return banger.Errorf(banger.CodeNoSpace, "kernel %s: %w", verb, err).
			WithHint("a kernel needs up to 300 MB in the state folder while it is unpacked, and 160 MB after")
	case errors.Is(err, errStale), errors.Is(err, errFuture):
		return banger.Errorf(banger.CodeInvalid, "kernel %s: %w", verb, err).
			WithHint("check this computer's clock; if it is right, the mirror is out of date")
	case errors.As(err, &pe):
		return fmt.Errorf("kernel %s: %w", verb, err)
	}
	return banger.Errorf(banger.CodeInvalid, "kernel %s: %w", verb, err)
}
