package oci

import (
	"bufio"
	"context"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"banger"
	"banger/internal/apt"
)

// aptBase is what an apt image has beside the essential packages.
var aptBase = []string{"systemd-sysv", "dbus", "udev", "kmod", "iproute2", "iputils-ping", "ca-certificates"}

const (
	aptPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// aptEpoch is SOURCE_DATE_EPOCH for the build: no file of the image is
	// younger, so that the same packages give the same bytes whenever they are
	// unpacked. 2024-01-01T00:00:00Z.
	aptEpoch = 1704067200

	aptGrace     = 5 * time.Second // to clean up after a cancel, before a kill
	aptTailBytes = 4 << 10         // of what it says, for the error

	maxPackageListBytes = 1 << 20
	maxPackages         = 4096
)

// An archive is a distribution whose suites are known here.
type archive struct {
	name     string
	keyrings []string // file names in keyringDir, the first there is counts
	mirror   string
	security string // "" none
	suites   []string
	pockets  []string // "-updates", "-security"
	hint     string
}

const keyringDir = "/usr/share/keyrings"

var archives = []archive{
	{
		name: "debian", keyrings: []string{"debian-archive-keyring.gpg", "debian-archive-keyring.pgp"},
		mirror: "http://deb.debian.org/debian", security: "http://deb.debian.org/debian-security",
		suites:  []string{"bullseye", "bookworm", "trixie", "forky", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable"},
		pockets: []string{"-updates", "-security"}, hint: "sudo apt install debian-archive-keyring",
	},
	{
		name: "ubuntu", keyrings: []string{"ubuntu-archive-keyring.gpg"},
		mirror: "http://archive.ubuntu.com/ubuntu", security: "http://security.ubuntu.com/ubuntu",
		suites:  []string{"focal", "jammy", "noble", "plucky", "questing"},
		pockets: []string{"-updates", "-security"}, hint: "sudo apt install ubuntu-keyring",
	},
}

var packagePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+(:[a-z][a-z0-9-]*)?$`)

// ParsePackages reads a package list: one name a line, optionally with
// ":architecture", # starts a comment. name is what the list is called in
// errors. Duplicates go; a list without a package is an error.
func ParsePackages(name string, r io.Reader) ([]string, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxPackageListBytes+1))
	if err != nil {
		return nil, banger.Errorf(banger.CodeInvalid, "package list %q: %w", name, pathReason(err))
	}
	if len(raw) > maxPackageListBytes {
		return nil, banger.Errorf(banger.CodeInvalid, "package list %q: more than %d bytes", name, maxPackageListBytes)
	}
	var list []string
	seen := make(map[string]bool)
	for i, line := range strings.Split(string(raw), "\n") {
		line, _, _ = strings.Cut(line, "#")
		line = strings.Trim(line, " \t\r")
		if line == "" || seen[line] {
			continue
		}
		if !packagePattern.MatchString(line) || strings.HasSuffix(line, "-") || strings.HasSuffix(line, "+") && !strings.HasSuffix(line, "++") {
			e := banger.Errorf(banger.CodeInvalid, "package list %q: line %d: %q is not a package name", name, i+1, clip(line))
			if strings.Contains(line, "=") {
				e = e.WithHint("versions cannot be chosen; the suite's is taken")
			}
			return nil, e
		}
		seen[line] = true
		list = append(list, line)
		if len(list) > maxPackages {
			return nil, banger.Errorf(banger.CodeInvalid, "package list %q: more than %d packages", name, maxPackages)
		}
	}
	if len(list) == 0 {
		return nil, banger.Errorf(banger.CodeInvalid, "package list %q: no package in it", name)
	}
	return list, nil
}

// aptBuild is one run of mmdebstrap.
type aptBuild struct {
	image    string
	suite    string
	arch     string
	packages []string // beyond aptBase
	lines    []string // of sources
}

func (s *Source) resolveApt(img *Image) error {
	suite := img.Reference.Suite
	p, err := parsePlatform(s.platform())
	if err != nil {
		return err
	}
	if p.OS != "linux" || p.Architecture != "amd64" && p.Architecture != "arm64" {
		return banger.Errorf(banger.CodeUsage, "image %q: cannot be built for %s", img.Name, p)
	}
	b := &aptBuild{suite: suite, arch: p.Architecture}
	for _, name := range s.Packages {
		if !packagePattern.MatchString(name) {
			return banger.Errorf(banger.CodeUsage, "image %q: %q is not a package name", img.Name, clip(name))
		}
	}
	b.packages = extraPackages(s.Packages)
	img.Name = s.Name(img.Reference)
	b.image = img.Name
	if err := b.checkTools(); err != nil {
		return err
	}
	if b.lines, err = aptLines(img.Name, suite, apt.Sources("/etc/apt"), keyringExists); err != nil {
		return err
	}
	img.Config = banger.ImageConfig{Cmd: []string{"/bin/bash"}, Env: []string{aptPath}}
	img.Platform = p.String()
	img.filter = aptFilter
	img.tar = &blob{label: "tar", sizeBytes: -1, open: b.start}
	return nil
}

func (b *aptBuild) checkTools() error {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return banger.Errorf(banger.CodeUnavailable, "image %q: mmdebstrap is not installed", b.image).WithHint("sudo apt install mmdebstrap uidmap")
	}
	if os.Geteuid() == 0 {
		return nil
	}
	who := strconv.Itoa(os.Geteuid())
	if u, err := user.LookupId(who); err == nil {
		who = u.Username
	}
	_, errTool := exec.LookPath("newuidmap")
	sub := hasSubIDs("/etc/subuid", who) && hasSubIDs("/etc/subgid", who)
	const add = "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "
	switch {
	case errTool != nil && !sub:
		return banger.Errorf(banger.CodeUnavailable, "image %q: newuidmap is not installed and %s has no subordinate ids", b.image, who).
			WithHint("sudo apt install uidmap && %s%s", add, who)
	case errTool != nil:
		return banger.Errorf(banger.CodeUnavailable, "image %q: newuidmap is not installed", b.image).WithHint("sudo apt install uidmap")
	case !sub:
		return banger.Errorf(banger.CodeUnavailable, "image %q: %s has no subordinate ids in /etc/subuid and /etc/subgid", b.image, who).WithHint("%s%s", add, who)
	}
	return nil
}

func hasSubIDs(file, who string) bool {
	raw, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	uid := strconv.Itoa(os.Geteuid())
	for line := range strings.Lines(string(raw)) {
		if name, _, ok := strings.Cut(line, ":"); ok && (name == who || name == uid) {
			return true
		}
	}
	return false
}

func keyringExists(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

var wordPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9./_-]*$`)

// ofArchive tells whether a host's source is a mirror of the distribution and
// not somebody's repository for the same suite. Whatever it is, only packages
// signed with the distribution's key are taken from it.
func ofArchive(e *apt.Source, a *archive, keyring string) bool {
	u, err := url.Parse(e.URI)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || strings.ContainsAny(e.URI, "[] \t") {
		return false
	}
	if !slices.Contains(e.Components, "main") {
		return false
	}
	if e.SignedBy != "" {
		return e.SignedBy == keyring || strings.HasPrefix(filepath.Base(e.SignedBy), a.name+"-archive-")
	}
	last := path.Base(strings.TrimRight(u.Path, "/"))
	return last == a.name || last == a.name+"-security"
}

// aptLines returns the sources of a suite and its pockets: the host's own
// mirrors where it has some for the suite, else the public ones.
func aptLines(image, suite string, host []apt.Source, exists func(string) bool) ([]string, error) {
	var a *archive
	for i := range archives {
		if slices.Contains(archives[i].suites, suite) {
			a = &archives[i]
		}
	}
	if a == nil {
		var known []string
		for _, a := range archives {
			known = append(known, a.suites...)
		}
		return nil, banger.Errorf(banger.CodeNotFound, "image %q: %q is no suite that is known here", image, suite).
			WithHint("known are %s", strings.Join(known, ", "))
	}
	keyring := ""
	for _, k := range a.keyrings {
		if p := keyringDir + "/" + k; exists(p) {
			keyring = p
			break
		}
	}
	if keyring == "" {
		return nil, banger.Errorf(banger.CodeUnavailable, "image %q: the archive key of %s is not on this host", image, a.name).WithHint("%s", a.hint)
	}
	find := func(suite string) *apt.Source {
		for i := range host {
			if host[i].Suite == suite && ofArchive(&host[i], a, keyring) {
				return &host[i]
			}
		}
		return nil
	}
	line := func(uri, suite string, components []string) string {
		return "deb [signed-by=" + keyring + "] " + uri + " " + suite + " " + strings.Join(components, " ")
	}
	main := []string{"main"}
	if a.name == "ubuntu" {
		main = []string{"main", "universe"}
	}
	own := find(suite)
	rolling := suite == "sid" || suite == "unstable"
	var lines []string
	add := func(suite, fallback string) {
		if e := find(suite); e != nil {
			components := slices.DeleteFunc(slices.Clone(e.Components), func(c string) bool { return !wordPattern.MatchString(c) })
			lines = append(lines, line(e.URI, suite, components))
		} else if own == nil && fallback != "" {
			lines = append(lines, line(fallback, suite, main))
		}
	}
	add(suite, a.mirror)
	if !rolling {
		for _, p := range a.pockets {
			fallback := a.mirror
			if p == "-security" {
				fallback = a.security
			}
			add(suite+p, fallback)
		}
	}
	return lines, nil
}

// aptHostKeys is run by mmdebstrap in a shell, with the root's path as $1. An
// image with an SSH server has no host keys, which would be those of every VM of
// it: aptFilter takes them out, and its unit makes what is missing at a start.
const aptHostKeys = `set -eu
test -x "$1/usr/sbin/sshd" || exit 0
umask 022
mkdir -p "$1/etc/systemd/system/ssh.service.d"
cat >"$1/etc/systemd/system/ssh.service.d/host-keys.conf" <<'END'
[Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
END
`

// args are mmdebstrap's: nothing in them can be taken for another option, and
// nothing that a user chose goes through a shell.
func (b *aptBuild) args() []string {
	args := []string{
		"--mode=unshare", "--variant=minbase", "--format=tar", "--architectures=" + b.arch,
		"--include=" + strings.Join(slices.Concat(aptBase, b.packages), ","),
		`--aptopt=Acquire::Retries "3"`,
		"--customize-hook=" + aptHostKeys,
		"--", b.suite, "-",
	}
	return append(args, b.lines...)
}

// start runs mmdebstrap and returns its standard output, a tar. Closing it ends
// the whole process group.
func (b *aptBuild) start(ctx context.Context, p *progress) (io.ReadCloser, error) {
	cmd := exec.Command("mmdebstrap", b.args()...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "SOURCE_DATE_EPOCH=" + strconv.Itoa(aptEpoch)}
	for _, k := range []string{"HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy"} {
		if v, ok := os.LookupEnv(k); ok {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	// A pipe of our own: Wait would close cmd's before all of it is read.
	out, stdout, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	said, stderr, err := os.Pipe()
	if err != nil {
		out.Close()
		stdout.Close()
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	r := &aptRun{build: b, cmd: cmd, out: out, tail: &tailBuffer{most: aptTailBytes}, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig belongs to the thread that forks: it must live as long as the
		// child does.
		runtime.LockOSThread()
		err := cmd.Start()
		stdout.Close()
		stderr.Close()
		if started <- err; err != nil {
			return
		}
		r.listen(p, said)
		said.Close()
		r.err = cmd.Wait()
		close(r.exited)
	}()
	if err := <-started; err != nil {
		out.Close()
		said.Close()
		return nil, banger.Errorf(banger.CodeUnavailable, "image %q: mmdebstrap: %w", b.image, err)
	}
	r.stop = context.AfterFunc(ctx, r.end)
	return r, nil
}

// aptRun is a running mmdebstrap.
type aptRun struct {
	build  *aptBuild
	cmd    *exec.Cmd
	out    io.ReadCloser
	tail   *tailBuffer
	exited chan struct{}
	err    error // after exited
	stop   func() bool
	once   sync.Once
}

// aptSteps are the first words of what mmdebstrap says of its steps; the rest
// of what it says are remarks.
var aptSteps = []string{"running", "downloading", "extracting", "installing", "cleaning", "creating"}

func (r *aptRun) listen(p *progress, said io.Reader) {
	lines := bufio.NewScanner(io.TeeReader(said, r.tail))
	lines.Buffer(make([]byte, 4096), 64<<10)
	for lines.Scan() {
		text, ok := strings.CutPrefix(lines.Text(), "I: ")
		step := strings.TrimSuffix(text, "...")
		if verb, of, _ := strings.Cut(step, " "); ok && slices.Contains(aptSteps, verb) && !strings.HasPrefix(of, "--") {
			p.report("build", clip(step), 0, 0)
		}
	}
	_, _ = io.Copy(r.tail, said) // past a line without end
}

func (r *aptRun) Read(p []byte) (int, error) {
	n, err := r.out.Read(p)
	if err == nil || n > 0 {
		return n, nil
	}
	<-r.exited
	if r.err != nil {
		return 0, r.failure()
	}
	return 0, io.EOF
}

// failure makes one error of what mmdebstrap said last.
func (r *aptRun) failure() error {
	text := strings.ToValidUTF8(string(r.tail.buf), "?")
	b := r.build
	var e *banger.Error
	switch {
	case strings.Contains(text, "NO_PUBKEY"):
		e = banger.Errorf(banger.CodeUnavailable, "image %q: the archive key of %s is not on this host", b.image, b.suite).
			WithHint("update the distribution's archive keyring")
	case strings.Contains(text, "Unable to locate package"):
		_, name, _ := strings.Cut(text, "Unable to locate package ")
		name, _, _ = strings.Cut(name, "\n")
		e = banger.Errorf(banger.CodeNotFound, "image %q: no package %q in %s", b.image, clip(name), b.suite)
	case strings.Contains(text, "No space left on device"):
		e = banger.Errorf(banger.CodeNoSpace, "image %q: mmdebstrap: no space left", b.image).WithHint("it unpacks in TMPDIR, %s", os.TempDir())
	default:
		e = banger.Errorf(banger.CodeUnavailable, "image %q: mmdebstrap: %w", b.image, r.err).
			WithHint("its last words are in the details; is the mirror reachable?")
	}
	e.Detail = text
	return e
}

// end stops the process group, softly first, so that mmdebstrap removes its
// folder.
func (r *aptRun) end() {
	r.once.Do(func() {
		select {
		case <-r.exited:
			return
		default:
		}
		_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGTERM)
		select {
		case <-r.exited:
		case <-time.After(aptGrace):
			_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
			<-r.exited
		}
	})
}

func (r *aptRun) Close() error {
	r.stop()
	r.out.Close()
	r.end()
	<-r.exited
	return nil
}

// aptFilter leaves out what would make two builds differ or two machines one:
// identities, caches, logs, and what mmdebstrap copied from this host.
func aptFilter(e *entry) (keep bool) {
	name := strings.TrimPrefix(strings.TrimPrefix(e.name, "."), "/")
	dir, base := path.Split(name)
	switch {
	case name == "etc/machine-id":
		e.size = 0 // systemd makes one at boot where the file is empty
		return true
	case name == "etc/hostname", name == "etc/resolv.conf", name == "var/lib/dbus/machine-id" && e.typ == modeRegular,
		name == "var/lib/systemd/random-seed", name == "var/cache/ldconfig/aux-cache":
		return false
	case dir == "etc/ssh/" && strings.HasPrefix(base, "ssh_host_"):
		return false
	case e.typ == modeRegular && (strings.HasPrefix(name, "var/cache/apt/") || strings.HasPrefix(name, "var/lib/apt/lists/")):
		return false
	case e.typ == modeRegular && strings.HasPrefix(name, "var/log/") && (strings.HasSuffix(base, ".log") || strings.HasPrefix(name, "var/log/apt/")):
		return false
	}
	return true
}

// tailBuffer keeps the last bytes written to it.
type tailBuffer struct {
	buf  []byte
	most int
}

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.most; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}
