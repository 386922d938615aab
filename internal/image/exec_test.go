package image

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var execLine = regexp.MustCompile(`execve(?:at)?\((?:AT_FDCWD, )?"([^"]*)"`)

// TestMetanamesCLI does with the real programs what TestMetanames does inside,
// and has strace tell what programs were started: banger's own, and none with a
// word of the image's.
func TestMetanamesCLI(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		missing(t, "strace is not installed")
	}
	bin := t.TempDir()
	for _, p := range []string{"banger", "bangerd", "banger-vsock-agent"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(bin, p), "banger/cmd/"+p)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", p, err, out)
		}
	}
	const mark = "qzwordqz" // is in every name, and nowhere else
	l := newLayout(t)
	var entries []entry
	for _, name := range metanames("victim") {
		entries = append(entries, file(mark+name, 0o755, mark), symlink(mark+"s"+name, name+mark))
	}
	l.add("a", tarOf(t, entries...))
	home := t.TempDir()
	log := filepath.Join(t.TempDir(), "log")
	run := func(program string, args ...string) string {
		t.Helper()
		args = append([]string{"-f", "--seccomp-bpf", "-qq", "-e", "trace=execve,execveat", "-s", "100000", "-v", "-o", log, "-A", "--", program}, args...)
		cmd := exec.Command(strace, args...)
		cmd.Env = append(os.Environ(), "BANGER_HOME="+filepath.Join(home, "state"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	banger := filepath.Join(bin, "banger")
	export := filepath.Join(home, "export.tar")
	for _, args := range [][]string{
		{"pull", "oci:" + l.dir + ":a", "--name", "x"}, {"ls"}, {"inspect", "x"}, {"tag", "x", "y"}, {"verify", "x"}, {"history", "x"},
		{"export", "x", "-o", export}, {"rm", "x"}, {"rm", "y"}, {"import", export, "--name", "z"}, {"verify", "z"}, {"rm", "z"}, {"prune"},
	} {
		out := run(banger, append([]string{"image"}, args...)...)
		if i := strings.IndexFunc(out, func(c rune) bool {
			return c < ' ' && c != '\n' && c != '\t' || c == 0x7f || c == '\ufffd' || c == '\u202e'
		}); i >= 0 {
			t.Errorf("image %q: shows %q", args, out[max(0, i-40):i+1])
		}
	}
	audit := func() (programs int, foreign []string) {
		data, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(data) {
			m := execLine.FindSubmatch(line)
			if m == nil {
				continue
			}
			programs++
			if filepath.Dir(string(m[1])) != bin && string(m[1]) != "/proc/self/exe" || bytes.Contains(line, []byte(mark)) {
				foreign = append(foreign, string(line))
			}
		}
		return programs, foreign
	}
	programs, foreign := audit()
	if programs < 20 { // each command is banger, and a bangerd that it calls
		t.Errorf("only %d programs were started", programs)
	}
	for _, line := range foreign {
		t.Errorf("started: %s", line)
	}
	t.Logf("%d programs started, %d of them with a word from the image or not banger's own", programs, len(foreign))
	// The audit is one.
	run("/bin/sh", "-c", ": "+mark)
	if _, after := audit(); len(after) != len(foreign)+1 {
		t.Errorf("a shell that is started: %q", after)
	}
}
