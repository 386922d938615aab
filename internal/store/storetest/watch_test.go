package storetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestWatch holds the watcher to what the watch is for: each kind of change is
// seen, can be made to fail and can be the last.
func TestWatch(t *testing.T) {
	const dirVar = "BANGER_TEST_WATCHED"
	if dir := os.Getenv(dirVar); dir != "" {
		if err := watched(3); err != nil {
			t.Fatal(err)
		}
		reply := os.NewFile(3, "reply")
		f, err := os.Create(filepath.Join(dir, "f"))
		fmt.Fprintln(reply, err)
		if err != nil {
			return
		}
		_, err = f.WriteAt([]byte("text"), 4)
		fmt.Fprintln(reply, errors.Join(err, f.Sync(), f.Truncate(1), f.Close(), os.Mkdir(filepath.Join(dir, "d"), 0o700),
			os.Rename(filepath.Join(dir, "f"), filepath.Join(dir, "d/g")), os.Link(filepath.Join(dir, "d/g"), filepath.Join(dir, "h")),
			os.Chmod(filepath.Join(dir, "h"), 0o600), os.Remove(filepath.Join(dir, "h"))))
		return
	}
	var seen []string
	run := func(judge func(operation) verdict) string {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0], "-test.run=^TestWatch$")
		cmd.Env = append(os.Environ(), dirVar+"="+dir)
		seen = nil
		return watch(t, cmd, dir, func(op operation) verdict {
			seen = append(seen, strings.ReplaceAll(op.String(), dir, ""))
			return judge(op)
		})
	}
	got := run(func(operation) verdict { return let })
	want := []string{"create /f", "write /f", "fsync /f", "truncate /f", "mkdir /d", "rename /f /d/g", "link /d/g /h", "chmod /h", "unlink /h"}
	if strings.Join(seen, "\n") != strings.Join(want, "\n") || got != "<nil>\n<nil>\n" {
		t.Errorf("seen %q, want %q; reply %q", seen, want, got)
	}
	for i := range want {
		var n atomic.Int32
		got := run(func(operation) verdict {
			if int(n.Add(1)) == i+1 {
				return verdict(unix.ENOSPC)
			}
			return let
		})
		if !strings.Contains(got, "no space left") {
			t.Errorf("%s fails: %q", want[i], got)
		}
		n.Store(0)
		run(func(operation) verdict {
			if int(n.Add(1)) == i+1 {
				return kill
			}
			return let
		})
		if len(seen) != i+1 {
			t.Errorf("killed before %s: seen %q", want[i], seen)
		}
	}
}
