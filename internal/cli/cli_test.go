package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"banger"
)

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("plain"), 125},
		{banger.Errorf(banger.CodeUsage, "x"), 2},
		{fmt.Errorf("wrapped: %w", banger.Errorf(banger.CodeUsage, "x")), 2},
		{banger.Errorf(banger.CodeNotFound, "x"), 125},
		{banger.Errorf(banger.CodeConflict, "x"), 125},
		{banger.Errorf(banger.CodeInvalid, "x"), 125},
		{banger.Errorf(banger.CodeUnavailable, "x"), 125},
		{banger.Errorf(banger.CodeNoSpace, "x"), 125},
		{banger.Errorf(banger.CodeTimeout, "x"), 125},
		{banger.Errorf(banger.CodeCanceled, "x"), 130},
		{banger.Errorf(banger.CodeGuest, "x"), 125},
		{banger.Errorf(banger.CodeInternal, "x"), 125},
		{banger.Errorf(banger.CodeCommandNotFound, "x"), 127},
		{banger.Errorf(banger.CodeCommandNotExecutable, "x"), 126},
		{banger.Errorf("a code of a newer daemon", "x"), 125},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v (%s): exit code %d, want %d", c.err, banger.CodeOf(c.err), got, c.want)
		}
	}
}

func TestPrintError(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want string
	}{
		{"plain", errors.New("x: y"), "banger: x: y\n"},
		{"two lines in one", errors.New("x\ny\x1b[31m"), "banger: x\\ny\\x1b[31m\n"},
		{"with a hint", banger.Errorf(banger.CodeUsage, "x: y").WithHint("do %q", "z"), "banger: x: y\nhint: do \"z\"\n"},
		{"all of it", fmt.Errorf("outer: %w", &banger.Error{Message: "boot: x", Detail: "the console ends:\n\x1b]0;t\x07\na\r", Hint: "a\nb"}),
			"banger: outer: boot: x\n  | the console ends:\n  | \\x1b]0;t\\a\n  | a\\r\nhint: a\\nb\n"},
	} {
		var b bytes.Buffer
		printError(&b, c.err)
		if b.String() != c.want {
			t.Errorf("%s:\n%q\nwant\n%q", c.name, b.String(), c.want)
		}
	}
}

// execute runs the command line as Main does, without a process of its own.
func execute(args ...string) (out string, err error) {
	var b bytes.Buffer
	root := newRoot()
	root.SetOut(&b)
	root.SetErr(&b)
	root.SetArgs(args)
	err = root.Execute()
	return b.String(), err
}

func commands(t *testing.T) (all []*cobra.Command) {
	t.Helper()
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		all = append(all, c)
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot())
	return all
}

func TestHelp(t *testing.T) {
	withExample := []string{
		"banger", "banger run", "banger create", "banger exec", "banger shell", "banger logs", "banger autostart",
		"banger image pull", "banger image build", "banger kernel pull", "banger kernel import",
		"banger image register", "banger image seed", "banger image tag", "banger image prune", "banger image verify",
		"banger image export", "banger image import", "banger ports", "banger ports ls", "banger ports add", "banger ports rm", "banger net log", "banger proxy",
	}
	runs := []string{"banger run", "banger exec", "banger shell"}
	for _, c := range commands(t) {
		path := c.CommandPath()
		plain := strings.Replace(path, "banger vm ", "banger ", 1) // the same command once more
		t.Run(path, func(t *testing.T) {
			help, err := execute(append(strings.Fields(path)[1:], "--help")...)
			if err != nil {
				t.Fatal(err)
			}
			end := exitHelp
			if slices.Contains(runs, plain) {
				end = runExitHelp
			}
			if !strings.HasSuffix(help, "\n\n"+end+"\n") {
				t.Errorf("the page does not end with its exit status:\n%s", help)
			}
			if has := strings.Contains(help, "\nEXAMPLE\n  "); has != slices.Contains(withExample, plain) {
				t.Errorf("an example: %v\n%s", has, help)
			}
			if !strings.Contains(help, "\nUSAGE\n  "+path) {
				t.Errorf("no usage:\n%s", help)
			}
			for line := range strings.Lines(help) {
				if line != "\n" && strings.TrimRight(line, " \t\n") != strings.TrimSuffix(line, "\n") {
					t.Errorf("white space at the end of %q", line)
				}
			}
			if c.Short == "" || strings.HasSuffix(c.Short, ".") {
				t.Errorf("short help %q", c.Short)
			}
			c.Flags().VisitAll(func(f *pflag.Flag) {
				if f.Usage == "" {
					t.Errorf("--%s says nothing", f.Name)
				}
			})
		})
	}
}

func TestArguments(t *testing.T) {
	t.Setenv("BANGER_HOME", t.TempDir())
	for _, c := range []struct {
		name string
		args []string
		code banger.Code // CodeUnavailable: they parse, and there is no daemon beside a test
	}{
		{"no such command", []string{"rum"}, banger.CodeUsage},
		{"no such command, hostile", []string{"\x1b[0m"}, banger.CodeUsage},
		{"no such subcommand", []string{"image", "rum"}, banger.CodeUsage},
		{"no such flag", []string{"version", "--wat"}, banger.CodeUsage},
		{"no such short flag", []string{"run", "-Z", "debian"}, banger.CodeUsage},
		{"a flag without its value", []string{"run", "debian", "-m"}, banger.CodeUsage},
		{"a number that is none", []string{"run", "--cpus", "two", "debian"}, banger.CodeUsage},
		{"help", []string{"help"}, ""},
		{"help of a command", []string{"help", "image", "pull"}, ""},
		{"help of none", []string{"help", "rum"}, banger.CodeUsage},
		{"help of no subcommand", []string{"help", "image", "rum"}, banger.CodeUsage},
		{"version", []string{"version"}, banger.CodeUnavailable},
		{"version with an argument", []string{"version", "x"}, banger.CodeUsage},
		{"pull of nothing", []string{"image", "pull"}, banger.CodeUsage},
		{"pull of two", []string{"image", "pull", "a", "b"}, banger.CodeUsage},
		{"pull of a folder that is not there", []string{"image", "pull", "oci:/nonexistent/x"}, banger.CodeNotFound},
		{"pull with a list that is not there", []string{"image", "pull", "a", "--packages", "/nonexistent/x"}, banger.CodeNotFound},
		{"build to nowhere", []string{"image", "build", "a"}, banger.CodeUsage},
		{"build of a bad size", []string{"image", "build", "a", "-o", "/nonexistent/x", "--size", "1.5G"}, banger.CodeUsage},
		{"build into a folder that is not there", []string{"image", "build", "a", "-o", "/nonexistent/x"}, banger.CodeUnavailable},
		{"build over a folder", []string{"image", "build", "a", "-o", "/"}, banger.CodeConflict},
		{"rm of nothing", []string{"image", "rm"}, banger.CodeUsage},
		{"inspect of two", []string{"image", "inspect", "a", "b"}, banger.CodeUsage},
		{"ls of one", []string{"image", "ls", "a"}, banger.CodeUsage},
		{"kernel pull", []string{"kernel", "pull"}, banger.CodeUnavailable},
		{"kernel pull of one", []string{"kernel", "pull", "trixie"}, banger.CodeUnavailable},
		{"kernel pull of two", []string{"kernel", "pull", "a", "b"}, banger.CodeUsage},
		{"kernel import of nothing", []string{"kernel", "import"}, banger.CodeUsage},
		{"kernel import of a file that is not there", []string{"kernel", "import", "/nonexistent/x"}, banger.CodeNotFound},
		{"kernel rm of nothing", []string{"kernel", "rm"}, banger.CodeUsage},

		{"run", []string{"run", "debian"}, banger.CodeUnavailable},
		{"run without an image", []string{"run"}, banger.CodeUsage},
		{"run with -- first", []string{"run", "--", "debian"}, banger.CodeUsage},
		{"run with an empty --", []string{"run", "debian", "--"}, banger.CodeUnavailable},
		{"run with two words and no --", []string{"run", "debian", "true"}, banger.CodeUsage},
		{"run with two words before --", []string{"run", "debian", "x", "--", "true"}, banger.CodeUsage},
		{"run with a command", []string{"run", "debian", "--", "true"}, banger.CodeUnavailable},
		{"run --rm=false", []string{"run", "--rm=false", "debian"}, banger.CodeUsage},
		{"run with no CPU", []string{"run", "--cpus", "0", "debian"}, banger.CodeUsage},
		{"run with less than no CPU", []string{"run", "--cpus=-1", "debian"}, banger.CodeUsage},
		{"run with 64 MiB", []string{"run", "-m", "64M", "debian"}, banger.CodeUnavailable},
		{"run with a byte less", []string{"run", "-m", "67108863", "debian"}, banger.CodeUsage},
		{"run with memory that grows in upper case", []string{"run", "-m", "\u0250", "debian"}, banger.CodeUsage},
		{"run with a key that is empty", []string{"run", "-e", "=x", "debian"}, banger.CodeUsage},
		{"run --rm=false, detached", []string{"run", "--rm=false", "-d", "debian"}, banger.CodeUnavailable},
		{"run --rm=false, named", []string{"run", "--rm=false", "--name", "a", "debian"}, banger.CodeUnavailable},
		{"run -d with an environment", []string{"run", "-d", "-e", "A=1", "debian"}, banger.CodeUsage},
		{"run that waits for nobody", []string{"run", "--wait", "me", "debian"}, banger.CodeUsage},
		{"run that waits for init", []string{"run", "--wait", "init", "debian"}, banger.CodeUnavailable},

		{"create", []string{"create", "debian"}, banger.CodeUnavailable},
		{"create of nothing", []string{"create"}, banger.CodeUsage},
		{"create with a command", []string{"create", "debian", "--", "true"}, banger.CodeUnavailable},
		{"create with two words and no --", []string{"create", "debian", "true"}, banger.CodeUsage},
		{"start of nothing", []string{"start"}, banger.CodeUsage},
		{"start of two", []string{"start", "a", "b"}, banger.CodeUnavailable},
		{"the same below vm", []string{"vm", "start", "a", "b"}, banger.CodeUnavailable},
		{"start that waits for nobody", []string{"start", "--wait", "", "a"}, banger.CodeUsage},
		{"stop at once", []string{"stop", "-t", "0", "a"}, banger.CodeUnavailable},
		{"stop in 10 s", []string{"stop", "-t", "10", "a"}, banger.CodeUnavailable},
		{"stop in 11 s", []string{"stop", "-t", "11", "a"}, banger.CodeUsage},
		{"stop before it began", []string{"stop", "-t=-1", "a"}, banger.CodeUsage},
		{"restart", []string{"restart", "a"}, banger.CodeUnavailable},
		{"restart in 11 s", []string{"restart", "-t", "11", "a"}, banger.CodeUsage},
		{"kill with a signal, which is not built", []string{"kill", "-s", "HUP", "a"}, banger.CodeUsage},
		{"rm of nothing", []string{"rm", "-f"}, banger.CodeUsage},
		{"ls of one", []string{"ls", "a"}, banger.CodeUsage},
		{"exec of nothing", []string{"exec", "a"}, banger.CodeUsage},
		{"exec of nothing, said so", []string{"exec", "a", "--"}, banger.CodeUsage},
		{"exec", []string{"exec", "a", "ls", "-l", "--wat"}, banger.CodeUnavailable},
		{"exec with --", []string{"exec", "a", "--", "ls", "-l"}, banger.CodeUnavailable},
		{"shell of nothing", []string{"shell"}, banger.CodeUsage},
		{"shell", []string{"vm", "shell", "a"}, banger.CodeUnavailable},
		{"logs with half a line", []string{"logs", "-n", "0.5", "a"}, banger.CodeUsage},
		{"logs of no line", []string{"logs", "-n", "0", "a"}, banger.CodeUnavailable},
		{"inspect of two", []string{"inspect", "a", "b"}, banger.CodeUsage},
		{"stats", []string{"stats", "--no-stream"}, banger.CodeUnavailable},
		{"proxy", []string{"proxy"}, banger.CodeUnavailable},
		{"proxy to somewhere", []string{"proxy", "web"}, banger.CodeUsage},
		{"proxy on a free port", []string{"proxy", "--listen", "0"}, banger.CodeUnavailable},
		{"proxy on the last port", []string{"proxy", "--listen", "[::1]:65535"}, banger.CodeUnavailable},
		{"proxy one port further", []string{"proxy", "--listen", "127.0.0.1:65536"}, banger.CodeUsage},
		{"proxy on all addresses, said so", []string{"proxy", "--listen", "0.0.0.0:1080"}, banger.CodeUnavailable},
		{"proxy on all addresses by omission", []string{"proxy", "--listen", ":1080"}, banger.CodeUsage},
		{"proxy on all addresses by a star", []string{"proxy", "--listen", "*:1080"}, banger.CodeUsage},
		{"proxy on a name", []string{"proxy", "--listen", "example.com:1080"}, banger.CodeUsage},
		{"proxy on localhost", []string{"proxy", "--listen", "localhost:1080"}, banger.CodeUnavailable},
		{"proxy on nothing", []string{"proxy", "--listen", ""}, banger.CodeUsage},
		{"doctor", []string{"doctor"}, banger.CodeUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := execute(c.args...)
			if got := banger.CodeOf(err); got != c.code {
				t.Errorf("%q: %s (%v), want %s", c.args, got, err, c.code)
			}
		})
	}
}

// What stands behind -- is the command's, flags and all.
func TestRunArguments(t *testing.T) {
	for _, c := range []struct {
		args  string
		image string
		rest  []string
		cpus  string
		env   string
	}{
		{"debian", "debian", nil, "0", "[]"},
		{"--cpus 3 debian", "debian", nil, "3", "[]"},
		{"debian --cpus 3", "debian", nil, "3", "[]"},
		{"debian --cpus=3 -- ls", "debian", []string{"ls"}, "3", "[]"},
		{"debian -- ls --cpus 3 -e A=1", "debian", []string{"ls", "--cpus", "3", "-e", "A=1"}, "0", "[]"},
		{"-e A=1,2 -e B debian -- sh -c x -- --", "debian", []string{"sh", "-c", "x", "--", "--"}, "0", `["A=1,2",B]`},
		{"debian -- --help", "debian", []string{"--help"}, "0", "[]"},
	} {
		root := newRoot()
		run, _, err := root.Find([]string{"run"})
		if err != nil {
			t.Fatal(err)
		}
		called := false
		run.RunE = func(cmd *cobra.Command, args []string) error {
			called = true
			if args[0] != c.image || !slices.Equal(args[1:], c.rest) {
				t.Errorf("%q: image %q, command %q", c.args, args[0], args[1:])
			}
			if got := cmd.Flag("cpus").Value.String(); got != c.cpus {
				t.Errorf("%q: %s CPUs", c.args, got)
			}
			if got := cmd.Flag("env").Value.String(); got != c.env {
				t.Errorf("%q: environment %s", c.args, got)
			}
			return nil
		}
		root.SetArgs(append([]string{"run"}, strings.Fields(c.args)...))
		if err := root.Execute(); err != nil || !called {
			t.Errorf("%q: called %v, %v", c.args, called, err)
		}
	}
}

func TestLocalPath(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, dir := range []string{"plain", "with:colon"} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		reference, path string
		ok              bool
	}{
		{"debian", "", false},
		{"apt:bookworm", "", false},
		{"localhost:5000/oci:x", "", false},
		{"oci", "", false},
		{"oci:", "", true},
		{"oci:plain", "plain", true},
		{"oci:plain:tag", "plain", true},
		{"oci:none", "none", true},
		{"oci:none:tag", "none", true},
		{"oci:with:colon", "with:colon", true},
		{"oci:with:colon:tag", "with:colon", true},
		{"oci:./plain", "./plain", true},
		{"oci:a:b/c", "a:b/c", true},
		{"oci:/x:1/none:tag", "/x:1/none", true},
		{"oci::tag", ":tag", true},
		{"rootfs:plain", "plain", true},
		{"rootfs:x:y.tar", "x:y.tar", true},
		{"rootfs:-x", "-x", true},
		{"rootfs:", "", true},
	} {
		path, ok := localPath(c.reference)
		if path != c.path || ok != c.ok {
			t.Errorf("%q: %q, %v; want %q, %v", c.reference, path, ok, c.path, c.ok)
		}
	}
}

func TestOpenSource(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("dir", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("list", []byte("vim\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		reference, packages string
		file, list          int
	}{
		{"debian", "", -1, -1}, {"oci:dir", "", 0, -1}, {"apt:bookworm", "list", -1, 0}, {"rootfs:dir", "list", 0, 1},
	} {
		flags := sourceFlags{packages: c.packages}
		src, files, err := flags.open(c.reference)
		if err != nil || src.Reference != c.reference || src.File != c.file || src.Packages != c.list || src.PackagesName != c.packages {
			t.Errorf("%q: %+v, %v", c.reference, src, err)
		}
		if c.file >= 0 && files[c.file].Name() != "dir" || c.list >= 0 && files[c.list].Name() != "list" {
			t.Errorf("%q: the files are not where it says", c.reference)
		}
		for _, f := range files {
			f.Close()
		}
	}
	for _, path := range []string{"", "none", "list/x", "nul\x00"} {
		_, err := openNamed(path)
		var e *banger.Error
		if !errors.As(err, &e) || e.Code != banger.CodeNotFound || e.Hint == "" {
			t.Errorf("%q: %v", path, err)
		}
	}
}

func TestOutput(t *testing.T) {
	for name, newOutput := range map[string]func(string) (*output, error){
		"without a name": newOutput, "with a temporary name": newNamedOutput,
	} {
		ls := func(t *testing.T, want ...string) {
			t.Helper()
			entries, err := os.ReadDir(".")
			if err != nil {
				t.Fatal(err)
			}
			got := []string{}
			for _, e := range entries {
				got = append(got, e.Name())
			}
			if !slices.Equal(got, append([]string{}, want...)) {
				t.Errorf("the folder holds %q, want %q", got, want)
			}
		}
		begin := func(t *testing.T) *output {
			t.Helper()
			t.Chdir(t.TempDir())
			o, err := newOutput("x.ext4")
			if err != nil {
				t.Fatal(err)
			}
			if name == "without a name" && o.named != "" {
				t.Skipf("NOT TESTED: the file system of %s has no files without a name", os.TempDir())
			}
			if _, err := os.Lstat("x.ext4"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it has its name too early: %v", err)
			}
			if _, err := o.f.WriteString("content"); err != nil {
				t.Fatal(err)
			}
			return o
		}
		t.Run(name, func(t *testing.T) {
			t.Run("commit", func(t *testing.T) {
				o := begin(t)
				if err := o.commit(); err != nil {
					t.Fatal(err)
				}
				o.discard()
				ls(t, "x.ext4")
				if data, err := os.ReadFile("x.ext4"); err != nil || string(data) != "content" {
					t.Errorf("%q, %v", data, err)
				}
				if st, err := os.Stat("x.ext4"); err != nil || st.Mode() != 0o644&^umask(t) {
					t.Errorf("mode %v, %v", st.Mode(), err)
				}
			})
			t.Run("discard", func(t *testing.T) {
				begin(t).discard()
				ls(t)
			})
			t.Run("taken meanwhile", func(t *testing.T) {
				o := begin(t)
				if err := os.WriteFile("x.ext4", []byte("another's"), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := o.commit(); !errors.Is(err, fs.ErrExist) {
					t.Errorf("got %v", err)
				}
				o.discard()
				ls(t, "x.ext4")
				if data, _ := os.ReadFile("x.ext4"); string(data) != "another's" {
					t.Errorf("it was overwritten: %q", data)
				}
			})
		})
	}
}

func umask(t *testing.T) fs.FileMode {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, nil, 0o777); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return 0o777 &^ st.Mode()
}

func TestOutputThatExists(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, make := range map[string]func(string) error{
		"file":    func(p string) error { return os.WriteFile(p, []byte("mine"), 0o600) },
		"folder":  func(p string) error { return os.Mkdir(p, 0o700) },
		"symlink": func(p string) error { return os.Symlink("nowhere", p) },
	} {
		if err := make(name); err != nil {
			t.Fatal(err)
		}
		_, err := newOutput(name)
		var e *banger.Error
		if !errors.As(err, &e) || e.Code != banger.CodeConflict || e.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
