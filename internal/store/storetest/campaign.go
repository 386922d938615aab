// Package storetest makes a change of a state folder with a fault at each of
// its operations on files: the process killed there, the operation failing once
// or the disk for good, and a power cut that leaves what was fsynced and, of all
// else, this or that. It is for tests alone.
package storetest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Campaign is one change of a state folder, made with every fault.
type Campaign struct {
	Change string   // its name, as Child is told
	Row    int      // its number among the changes of a test, so that these do not all leave out the same faults
	From   string   // the state folder that it begins with, no file of which it may write to
	Work   string   // a folder for the state folders that are made
	Env    []string // of the process that makes the change, beside the test's own
	// Again has one more fault: an operation fails once, and then the process
	// makes the change again.
	Again bool
	// Check says what is wrong with a state folder that was cut off from the
	// change, or in which the change failed; "" for nothing. done: the change
	// was reported as made. Where a power cut left the same in two ways it is
	// called once.
	Check func(t *testing.T, root string, done bool) (problem string)
}

// again is the fault after which the process that met it makes the change once
// more.
const again = "EIO, and again"

const (
	changeVar = "BANGER_TEST_CHANGE"
	rootVar   = "BANGER_TEST_CHANGE_ROOT"
	againVar  = "BANGER_TEST_CHANGE_AGAIN"
)

// Child is what a test that has campaigns does first: in the process that a
// campaign starts, open opens the state folder root, and what it returns makes
// the change of that name, both watched, and Child is true. The test is over
// then.
func Child(t *testing.T, open func(change, root string) (do func() error, err error)) bool {
	t.Helper()
	change := os.Getenv(changeVar)
	if change == "" {
		return false
	}
	if err := watched(3); err != nil {
		t.Fatal(err)
	}
	do, err := open(change, os.Getenv(rootVar))
	if err == nil {
		if err = do(); err != nil && os.Getenv(againVar) != "" {
			err = do()
		}
	}
	fmt.Fprint(os.NewFile(3, "reply"), "ended: ", err)
	return true
}

// Rand is the one source of what is random in a test's campaigns. Its seed is
// printed, and is FAULTS_SEED where that is set.
func Rand(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("FAULTS_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("FAULTS_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// Dir makes a folder, in memory where that is possible: thousands of state
// folders are made in it.
func Dir(t *testing.T) string {
	work, err := os.MkdirTemp("/dev/shm", "banger-faults-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(work) })
	return work
}

// Run makes the change with one fault of four at each operation, and with all
// where FAULTS_SOAK is set, and cuts the power at each. It stops at the first
// problem, and gives in words how much was tried.
func (c *Campaign) Run(t *testing.T, r *rand.Rand) (tried string) {
	t.Helper()
	soak := os.Getenv("FAULTS_SOAK") != ""
	prints := NewPrints(nil)
	start := prints.Of(t, c.From)
	n := 0
	fresh := func() string {
		n++
		return filepath.Join(c.Work, fmt.Sprintf("%d-%d", c.Row, n))
	}
	name, _, _ := strings.Cut(t.Name(), "/")
	run := func(root, kind string, judge func(operation) verdict) string {
		cmd := exec.Command(os.Args[0], "-test.run=^"+name+"$")
		cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir(), changeVar+"="+c.Change, rootVar+"="+root)
		cmd.Env = append(cmd.Env, c.Env...)
		if kind == again {
			cmd.Env = append(cmd.Env, againVar+"=1")
		}
		return watch(t, cmd, root, judge)
	}

	// Once, stopped before each operation: what a kill or a power cut
	// leaves there.
	root := fresh()
	LinkTree(t, c.From, root)
	keep := fresh()
	if err := os.Mkdir(keep, 0o700); err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, root, keep)
	var ops []operation
	states := map[string]bool{}
	cutAll := func(done bool) {
		d.look()
		all := cuts(r)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			for range map[bool]int{true: 10, false: 1}[soak && name == "random"] {
				to := fresh()
				id := fmt.Sprint(done, d.after(all[name], to))
				if !states[id] {
					states[id] = true
					if problem := c.Check(t, to, done); problem != "" {
						t.Errorf("power cut after %d operations (%s): %s\nthe last ones: %v", len(ops), name, problem, ops[max(0, len(ops)-12):])
					}
				}
				if err := os.RemoveAll(to); err != nil {
					t.Fatal(err)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
		}
	}
	got := run(root, "", func(op operation) verdict {
		cutAll(false)
		d.change(op)
		ops = append(ops, op)
		return let
	})
	if got != "ended: <nil>" {
		t.Fatalf("without a fault: %q", got)
	}
	cutAll(true)

	// And with each operation failing, or the last.
	kinds := []string{"EIO", "ENOSPC", "disk gone", "killed"}
	if c.Again {
		kinds = append(kinds, again)
	}
	faults := 0
	for k := 1; k <= len(ops); k++ {
		for way, kind := range kinds {
			if !soak && (k+way+c.Row)%4 != 0 {
				continue
			}
			faults++
			root := fresh()
			LinkTree(t, c.From, root)
			i := 0
			var failed operation
			got := run(root, kind, func(op operation) verdict {
				i++
				if i == k || i > k && kind == "disk gone" {
					failed = op
					return map[string]verdict{"EIO": verdict(unix.EIO), "ENOSPC": verdict(unix.ENOSPC), "disk gone": verdict(unix.EIO), "killed": kill, again: verdict(unix.EIO)}[kind]
				}
				return let
			})
			if i >= k && kind != "killed" && !strings.HasPrefix(got, "ended: ") {
				t.Fatalf("operation %d (%s): it ended with %q", k, kind, got)
			}
			if problem := c.Check(t, root, got == "ended: <nil>"); problem != "" {
				t.Errorf("operation %d (%s, %s): %s\nit said %q", k, kind, failed, problem, got)
			}
			if err := os.RemoveAll(root); err != nil {
				t.Fatal(err)
			}
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	if now := NewPrints(nil).Of(t, c.From); fmt.Sprint(now) != fmt.Sprint(start) {
		t.Error("a file of the store was changed in its place")
	}
	if err := os.RemoveAll(keep); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d operations: %d states after a kill or a power cut, %d faults", len(ops), len(states), faults)
}
