package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/oci"
	"banger/internal/store"
)

// crashVar, set to a state folder, makes TestStoreKilled the process that is
// killed; crashLayout is the images it pulls.
const (
	crashVar    = "BANGER_TEST_CRASH"
	crashLayout = "BANGER_TEST_CRASH_LAYOUT"
)

// churn does all that changes a store, over and over.
func churn(root, layoutDir string) error {
	s, err := store.Open(root)
	if err != nil {
		return err
	}
	im := Open(s)
	im.baseBytes = smallBytes
	ctx := context.Background()
	seed := filepath.Join(layoutDir, "index.json")
	agent, err := os.Open(filepath.Join(layoutDir, "agent"))
	if err != nil {
		return err
	}
	defer agent.Close()
	for i := 0; ; i++ {
		for _, tag := range []string{"a", "b"} {
			dir, err := os.Open(layoutDir)
			if err != nil {
				return err
			}
			ref, err := oci.ParseReference("oci:" + layoutDir + ":" + tag)
			if err != nil {
				return err
			}
			src := &oci.Source{Input: dir, Blobs: &blobs{Blobs: s.Blobs()}}
			if _, err := im.Pull(ctx, src, ref, PullOptions{Name: []string{"x", tag}[i%2], Agent: agent}); err != nil {
				return err
			}
			dir.Close()
			if _, err := im.Tag(ctx, []string{"x", tag}[i%2], "tagged"); err != nil {
				return err
			}
		}
		// A seed of one file, which is quick.
		one := filepath.Join(filepath.Dir(root), "one")
		if err := os.MkdirAll(one, 0o755); err != nil {
			return err
		}
		data, err := os.ReadFile(seed)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(one, "f"), data, 0o644); err != nil {
			return err
		}
		dir, err := os.Open(one)
		if err != nil {
			return err
		}
		ref, err := oci.ParseReference("rootfs:" + one)
		if err != nil {
			return err
		}
		if _, err := im.ReplaceSeed(ctx, "tagged", &oci.Source{Input: dir}, ref); err != nil {
			return err
		}
		dir.Close()
		if _, err := im.Prune(ctx); err != nil {
			return err
		}
		list, err := im.List()
		if err != nil {
			return err
		}
		for _, image := range list {
			if i%3 == 0 || image.Name != "tagged" {
				if err := im.Remove(ctx, image.Name); err != nil {
					return err
				}
			}
		}
	}
}

// sound requires of a store that whatever is in it is whole: bases that read as
// their layers say, blobs that are what they are called, and nothing else.
func sound(t *testing.T, root string) (images int) {
	t.Helper()
	im, s := openStore(t, root) // removes what was half made
	for _, dir := range []string{"tmp", "trash"} {
		if left := inside(t, s, dir); left != nil {
			t.Errorf("%s/ has %q", dir, left)
		}
	}
	list, err := im.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range list {
		v, err := im.Verify(t.Context(), image.Name, &oci.Source{Blobs: &blobs{Blobs: s.Blobs()}}, agentFile(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range v.Differences {
			t.Errorf("image %s: %s", image.Name, d)
		}
		if image.WorkSeed == "" {
			t.Errorf("image %s has no seed", image.Name)
		}
	}
	for _, d := range digests(t, s) {
		if got := shaOf(t, filepath.Join(s.Root(), "blobs/sha256", strings.TrimPrefix(d, "sha256:"))); got != d {
			t.Errorf("blob %s has the digest %s", d, got)
		}
	}
	for _, name := range inside(t, s, "images") {
		if strings.HasPrefix(name, ".") {
			continue // a names file that was being written, which prune removes
		}
		if name == "names.json" {
			continue
		}
		if _, err := im.load(name, name); err != nil {
			t.Errorf("half an image: %v", err)
		}
	}
	return len(list)
}

// TestStoreKilled kills a process that pulls, tags, seeds, prunes and removes,
// at any moment: what is there afterwards is whole, and work goes on.
func TestStoreKilled(t *testing.T) {
	if root := os.Getenv(crashVar); root != "" {
		t.Fatal(churn(root, os.Getenv(crashLayout)))
	}
	rounds := 25
	if s := os.Getenv("IMAGE_KILLS"); s != "" {
		rounds, _ = strconv.Atoi(s)
	}
	if testing.Short() {
		rounds = 5
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("IMAGE_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("IMAGE_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	l := newLayout(t)
	shared := tarOf(t, file("bin/sh", 0o755, strings.Repeat("shell", 50_000)))
	l.add("a", shared, tarOf(t, file("a", 0o644, strings.Repeat("a", 100_000))))
	l.add("b", shared, tarOf(t, file("b", 0o644, strings.Repeat("b", 100_000))))
	l.write("agent", []byte(agentText))
	root := filepath.Join(t.TempDir(), "state")
	states := map[int]bool{}
	for i := range rounds {
		cmd := exec.Command(os.Args[0], "-test.run=^TestStoreKilled$")
		cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir(), crashVar+"="+root, crashLayout+"="+l.dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case err := <-ended:
			t.Fatalf("round %d: it ended by itself: %v\n%s", i, err, out.String())
		case <-time.After(time.Duration(20+r.IntN(600)) * time.Millisecond):
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-ended
		states[sound(t, root)] = true
		if t.Failed() {
			t.Fatalf("round %d", i)
		}
	}
	if len(states) < 2 {
		t.Errorf("every kill found the same number of images: %v", states)
	}
	// And what nothing reaches goes.
	im, s := openStore(t, root)
	if list, err := im.List(); err != nil {
		t.Fatal(err)
	} else {
		for _, image := range list {
			if err := im.Remove(t.Context(), image.Name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	if _, err := im.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := digests(t, s); d != nil {
		t.Errorf("blobs %q stay", d)
	}
	if left := slices.DeleteFunc(inside(t, s, "images"), func(n string) bool { return n == "names.json" }); len(left) > 0 {
		t.Errorf("images/ has %s", fmt.Sprint(left))
	}
}
