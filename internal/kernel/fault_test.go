package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"

	"banger"
	"banger/internal/store"
	"banger/internal/store/storetest"
)

// What changes the kernels, each done in a process that is stopped before every
// operation on a file. inputs is a folder that holds what it reads.
var changes = []struct {
	name  string
	empty bool // begins with an empty store
	do    func(ctx context.Context, ks *Kernels, inputs string) error
}{
	{"the first pull", true, pullFault("first")},
	{"pull of a newer release", false, pullFault("newer")},
	{"pull of a release built anew", false, pullFault("rebuilt")},
	{"the first import", true, importFault},
	{"import", false, importFault},
	{"rm of the default", false, func(ctx context.Context, ks *Kernels, _ string) error { return ks.Remove(ctx, testRelease) }},
	{"rm of another", false, func(ctx context.Context, ks *Kernels, _ string) error { return ks.Remove(ctx, "5.1") }},
	{"rm of one without a record", false, func(ctx context.Context, ks *Kernels, _ string) error { return ks.Remove(ctx, "4.9") }},
}

// pullFault pulls from the mirror of that name.
func pullFault(name string) func(context.Context, *Kernels, string) error {
	return func(ctx context.Context, ks *Kernels, inputs string) error {
		url, err := os.ReadFile(filepath.Join(inputs, name))
		if err != nil {
			return err
		}
		key, err := os.Open(filepath.Join(inputs, "key"))
		if err != nil {
			return err
		}
		defer key.Close()
		keys, err := openpgp.ReadKeyRing(key)
		if err != nil {
			return err
		}
		ks.archive = func() (*archive, error) {
			f := &fakeArchive{now: fakeNow, stall: time.Minute}
			return f.client(string(url), keys), nil
		}
		_, err = ks.Pull(ctx, "", nil)
		return err
	}
}

func importFault(ctx context.Context, ks *Kernels, inputs string) error {
	image, err := os.Open(filepath.Join(inputs, "vmlinuz"))
	if err != nil {
		return err
	}
	defer image.Close()
	modules, err := os.Open(filepath.Join(inputs, "modules"))
	if err != nil {
		return err
	}
	defer modules.Close()
	_, err = ks.Import(ctx, image, modules)
	return err
}

var createdLine = regexp.MustCompile(`"created": "[^"]*"`)

// A sweep is one change, done once without any fault, and what it made of what.
type sweep struct {
	do           func(context.Context, *Kernels, string) error
	inputs       string
	known        *storetest.Prints
	start, final map[string]string // final: when it was done
	finalDefault string
	tried        map[string]bool
}

// kernelsOf tells each kernel's folder as one text, and the default's file.
func (sw *sweep) kernelsOf(t *testing.T, root string) map[string]string {
	t.Helper()
	all := sw.known.Of(t, root)
	out := map[string]string{}
	for path, is := range all {
		if rest, ok := strings.CutPrefix(path, "kernels/"); ok && rest != "" && !strings.Contains(strings.TrimSuffix(rest, "/"), "/") {
			out[rest] = is
			if strings.HasSuffix(rest, "/") {
				inside := storetest.Contents{}
				for path, is := range all {
					if name, ok := strings.CutPrefix(path, "kernels/"+rest); ok {
						inside[name] = is
					}
				}
				out[rest] = fmt.Sprint(inside) // maps are printed in order
			}
		}
	}
	return out
}

// check requires of a store that was cut off from the change, or in which the
// change failed, that no kernel is lost or half, that the change can be made
// again, and that what is there in the end is what would be without the fault.
func (sw *sweep) check(t *testing.T, root string, done bool) (problem string) {
	t.Helper()
	s, err := store.Open(root)
	if err != nil {
		return fmt.Sprintf("open: %v", err)
	}
	if left, err := s.Leftovers(); err != nil || left != nil {
		return fmt.Sprintf("left over: %q, %v", left, err)
	}
	ks := Open(s)
	now := sw.kernelsOf(t, root)
	for _, name := range names(now, sw.start, sw.final) {
		is, before, after := now[name], sw.start[name], sw.final[name]
		if is != before && is != after && !strings.HasPrefix(name, ".") {
			return fmt.Sprintf("%s is %q, was %q and becomes %q", name, is, before, after)
		}
		if done && is != after && !strings.HasPrefix(name, ".") {
			return fmt.Sprintf("it was done, and %s is %q, not %q", name, is, after)
		}
	}
	if list, err := ks.List(); !sound(err) {
		return fmt.Sprintf("list: %v", err)
	} else if n := len(slices.DeleteFunc(list, func(k *Kernel) bool { return !k.Default })); len(list) > 0 && n != 1 {
		return fmt.Sprintf("%d kernels are the default", n)
	}
	id := fmt.Sprint(now)
	if sw.tried[id] {
		return ""
	}
	sw.tried[id] = true
	// What was removed cannot be removed again, nor imported what is there.
	err = sw.do(t.Context(), ks, sw.inputs)
	if code := banger.CodeOf(err); err != nil && code != banger.CodeNotFound && code != banger.CodeConflict {
		return fmt.Sprintf("again: %v", err)
	}
	now = sw.kernelsOf(t, root)
	for _, name := range names(now, sw.final) {
		if now[name] != sw.final[name] && name != "default" {
			return fmt.Sprintf("in the end %s is %q, want %q", name, now[name], sw.final[name])
		}
	}
	// No name of a default may stand for the one that has it, nor one that is gone.
	named, err := ks.readDefault()
	if now["default"] != sw.final["default"] && (named != "" || err != nil) {
		return fmt.Sprintf("in the end the default is %q, %v", named, err)
	}
	if version := defaultOf(ks); version != sw.finalDefault {
		return fmt.Sprintf("in the end the default is %q, want %q", version, sw.finalDefault)
	}
	return ""
}

// sound says whether a list is complete but for the kernel that has no record.
func sound(err error) bool {
	return err == nil || strings.Count(err.Error(), "\n") == 0 && strings.Contains(err.Error(), "4.9")
}

// defaultOf is the release of the default kernel; "" for none.
func defaultOf(ks *Kernels) string {
	list, _ := ks.List()
	for _, k := range list {
		if k.Default {
			return k.Version
		}
	}
	return ""
}

func names(all ...map[string]string) (out []string) {
	for _, m := range all {
		for name := range m {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// TestFaults makes each change of the kernels with a fault at each of its
// operations on files.
func TestFaults(t *testing.T) {
	const inputsVar = "BANGER_TEST_CHANGE_INPUTS"
	if storetest.Child(t, func(change, root string) (func() error, error) {
		s, err := store.Open(root)
		return func() error {
			for _, c := range changes {
				if c.name == change {
					return c.do(t.Context(), Open(s), os.Getenv(inputsVar))
				}
			}
			return fmt.Errorf("no such change: %s", change)
		}, err
	}) {
		return
	}
	r := storetest.Rand(t)
	work := storetest.Dir(t)

	// Three mirrors of one key, and a kernel of the user's own.
	first := newFakeArchive(t)
	newer, rebuilt := newFakeArchive(t), newFakeArchive(t)
	newer.key, rebuilt.key = first.key, first.key
	first.build()
	const newRelease = "6.1.0-200-cloud-amd64"
	for release, f := range map[string]*fakeArchive{newRelease: newer, testRelease: rebuilt} {
		f.build()
		f.deb = fakeKernelDeb(t, ".xz", "", release)
		name, path := "linux-image-"+release, "pool/updates/"+release+".deb"
		f.suite("bookworm-security", "security", stanza(metaPackage, "6.1.200-2", name+" (= 6.1.200-2)", "pool/updates/m.deb", nil)+
			stanza(name, "6.1.200-2", "kmod", path, f.deb))
		f.files["/security/"+path] = f.deb
	}
	inputs := t.TempDir()
	for name, f := range map[string]*fakeArchive{"first": first, "newer": newer, "rebuilt": rebuilt} {
		if err := os.WriteFile(filepath.Join(inputs, name), []byte(f.srv.URL), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	key, err := os.Create(filepath.Join(inputs, "key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(first.key.Serialize(key), key.Close(),
		os.WriteFile(filepath.Join(inputs, "vmlinuz"), fakeVmlinuz(t, "5.3"), 0o600)); err != nil {
		t.Fatal(err)
	}
	writeModules(t, filepath.Join(inputs, "modules"), "5.3", "")

	// The store that most begin with: a pulled kernel that is the default, one
	// of the user's own, one whose record is lost, and a default that was being
	// written.
	template, empty := filepath.Join(work, "template"), filepath.Join(work, "empty")
	s, err := store.Open(template)
	if err != nil {
		t.Fatal(err)
	}
	ks := Open(s)
	if err := pullFault("first")(t.Context(), ks, inputs); err != nil {
		t.Fatal(err)
	}
	for _, release := range []string{"5.1", "4.9"} {
		if _, err := ks.Import(t.Context(), openBytes(t, fakeVmlinuz(t, release)), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Remove(filepath.Join(s.Kernel("4.9"), recordFile)),
		os.WriteFile(filepath.Join(s.Kernels(), ".default.123"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(empty); err != nil {
		t.Fatal(err)
	}

	for row, c := range changes {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			from := template
			if c.empty {
				from = empty
			}
			sw := &sweep{do: c.do, inputs: inputs, tried: map[string]bool{},
				known: storetest.NewPrints(func(data []byte) []byte { return createdLine.ReplaceAll(data, nil) })}
			sw.start = sw.kernelsOf(t, from)
			whole := filepath.Join(work, fmt.Sprint(row))
			storetest.LinkTree(t, from, whole)
			s, err := store.Open(whole)
			if err != nil {
				t.Fatal(err)
			}
			ks := Open(s)
			if err := c.do(t.Context(), ks, inputs); err != nil {
				t.Fatal(err)
			}
			sw.final = sw.kernelsOf(t, whole)
			sw.finalDefault = defaultOf(ks)
			if fmt.Sprint(sw.start) == fmt.Sprint(sw.final) {
				t.Fatal("it changes nothing")
			}
			campaign := &storetest.Campaign{Change: c.name, Row: row, From: from, Work: work, Again: true,
				Env: []string{inputsVar + "=" + inputs}, Check: sw.check}
			tried := campaign.Run(t, r)
			t.Logf("%s, %d stores gone on with; %s", tried, len(sw.tried), time.Since(begin).Round(time.Millisecond))
		})
	}
}
