package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// defaultPath is PATH where the image and the user say nothing; Docker's.
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// defaultTerm is TERM with a pty where the host says nothing.
	defaultTerm = "xterm"

	// maxExecWords bounds the number of arguments and variables of a
	// request; their bytes are bounded by the message.
	maxExecWords = 64 << 10
)

// refuse makes the error that goes into a Reply.
func refuse(code wire.ErrorCode, format string, args ...any) error {
	return &wire.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// A command is what a wire.Exec comes to in this guest.
type command struct {
	path string // of the program, absolute
	args []string
	env  []string
	dir  string
	who  account
}

// prepare turns a request into a command, with the guest's own account files
// and programs. Errors are *wire.Error.
func prepare(e *wire.Exec) (*command, error) {
	if len(e.Args)+len(e.Env) > maxExecWords {
		return nil, refuse(wire.ErrInvalid, "exec: more than %d arguments and variables", maxExecWords)
	}
	for _, s := range slices.Concat(e.Args, e.Env, []string{e.Dir, e.User}) {
		if strings.IndexByte(s, 0) >= 0 {
			return nil, refuse(wire.ErrInvalid, "exec: %q holds a zero byte", s)
		}
	}
	who, err := lookupAccount("/", e.User)
	if err != nil {
		return nil, err
	}
	c := &command{args: e.Args, who: who, dir: e.Dir}
	if c.env, err = environment(e.Env, who, e.TTY != nil); err != nil {
		return nil, err
	}
	if c.dir == "" {
		c.dir = who.Home
		if fi, err := os.Stat(c.dir); err != nil || !fi.IsDir() {
			c.dir = "/"
		}
	} else {
		if !strings.HasPrefix(c.dir, "/") {
			return nil, refuse(wire.ErrInvalid, "folder %q: not an absolute path", c.dir)
		}
		if err := os.MkdirAll(c.dir, 0o755); err != nil {
			return nil, refuse(wire.ErrInvalid, "folder %v", bare(c.dir, err))
		}
	}
	name := ""
	if len(c.args) > 0 {
		name = c.args[0]
	}
	asUser(who, func() {
		if err = enterable(c.dir); err != nil {
			return
		}
		if len(c.args) == 0 {
			name, err = loginShell(who)
			c.args = []string{"-" + filepath.Base(name)}
		}
		if err == nil {
			c.path, err = lookProgram(name, getenv(c.env, "PATH"), c.dir)
		}
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// environment joins what the host asked for and what every session has; later
// values win.
func environment(asked []string, who account, tty bool) ([]string, error) {
	var env []string
	index := map[string]int{}
	set := func(key, value string) {
		if i, ok := index[key]; ok {
			env[i] = key + "=" + value
			return
		}
		index[key] = len(env)
		env = append(env, key+"="+value)
	}
	set("PATH", defaultPath)
	set("HOME", who.Home)
	if who.Name != "" {
		set("USER", who.Name)
	}
	if tty {
		set("TERM", defaultTerm)
	}
	for _, kv := range asked {
		key, value, ok := strings.Cut(kv, "=")
		if !ok || key == "" {
			return nil, refuse(wire.ErrInvalid, "environment: %q is not KEY=VALUE", kv)
		}
		set(key, value)
	}
	return env, nil
}

func getenv(env []string, key string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, key+"="); ok {
			return v
		}
	}
	return ""
}

// loginShell is the shell of passwd(5), or the first usual one that is there.
func loginShell(who account) (string, error) {
	for _, sh := range []string{who.Shell, "/bin/sh", "/bin/bash"} {
		if sh == "" {
			continue
		}
		if _, err := lookProgram(sh, "", "/"); err == nil {
			return sh, nil
		}
	}
	return "", refuse(wire.ErrNotFound, "shell: the image has none (no /bin/sh, no /bin/bash): name a program to run")
}

// enterable says why dir cannot be the working directory of the calling
// thread's user.
func enterable(dir string) error {
	if fi, err := os.Stat(dir); err != nil {
		return refuse(wire.ErrInvalid, "folder %v", bare(dir, err))
	} else if !fi.IsDir() {
		return refuse(wire.ErrInvalid, "folder %q: not a directory", dir)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.X_OK, unix.AT_EACCESS); err != nil {
		return refuse(wire.ErrInvalid, "folder %v", bare(dir, err))
	}
	return nil
}

// lookProgram finds name as execvp would for the calling thread's user in the
// working directory dir.
func lookProgram(name, path, dir string) (string, error) {
	if name == "" {
		return "", refuse(wire.ErrNotFound, "exec: the program's name is empty")
	}
	candidates := []string{name}
	if !strings.Contains(name, "/") {
		candidates = candidates[:0]
		for d := range strings.SplitSeq(path, ":") {
			candidates = append(candidates, filepath.Join(cmpOr(d, "."), name))
		}
	}
	var denied error
	for _, p := range candidates {
		if !filepath.IsAbs(p) {
			p = dir + "/" + p // not Join: a/../b must mean what the kernel makes of it
		}
		fi, err := os.Stat(p)
		if err == nil && fi.IsDir() {
			err = unix.EISDIR
		} else if err == nil && !fi.Mode().IsRegular() {
			err = unix.EACCES
		}
		if err == nil {
			err = unix.Faccessat(unix.AT_FDCWD, p, unix.X_OK, unix.AT_EACCESS)
		}
		switch {
		case err == nil:
			return p, nil
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		case denied == nil:
			denied = refuse(wire.ErrNotExecutable, "exec %v", bare(p, err))
		}
	}
	if denied != nil {
		return "", denied
	}
	if len(candidates) == 1 && candidates[0] == name {
		return "", refuse(wire.ErrNotFound, "exec %q: no such file", name)
	}
	return "", refuse(wire.ErrNotFound, "exec %q: not found in PATH %q", name, path)
}

func cmpOr(s, or string) string {
	if s == "" {
		return or
	}
	return s
}

// asUser runs f with the account's rights on files, and nothing else of it:
// only the file system ids of one thread change (setfsuid(2)), so the account
// gains no right to signal or trace the agent meanwhile.
func asUser(who account, f func()) {
	if who.UID == 0 || os.Geteuid() != 0 {
		f()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		groups := append([]uint32{}, who.Groups...)
		groups = append(groups, who.GID)
		// Raw: the wrappers of the standard library change every thread.
		unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&groups[0])), 0)
		unix.SetfsgidRetGid(int(who.GID))
		unix.SetfsuidRetUid(int(who.UID))
		f()
	}()
	<-done
}
