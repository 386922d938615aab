package image

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"banger"
	"banger/internal/oci"
)

// systemdEntries are what a distribution's systemd has of the needless units,
// on a merged /usr, and one that its author has changed.
func systemdEntries() []entry {
	return []entry{
		symlink("lib", "usr/lib"),
		file("usr/lib/systemd/system/systemd-udev-trigger.service", 0o644, "[Unit]\n"),
		file("usr/lib/systemd/system/getty@.service", 0o644, "[Unit]\n"),
		file("usr/lib/systemd/system/ssh.service", 0o644, "[Unit]\n"),
		file("usr/lib/systemd/system/systemd-random-seed.service", 0o644, "[Unit]\n"),
		file("etc/systemd/system/systemd-random-seed.service", 0o644, "[Unit]\nDescription=mine\n"),
	}
}

var trimmedUnits = []string{"systemd-udev-trigger.service", "getty@tty1.service"}

func TestTrimmable(t *testing.T) {
	for name, row := range map[string]struct {
		has  []string
		want []string
	}{
		"nothing":                    {},
		"a unit":                     {[]string{"usr/lib/systemd/system/systemd-random-seed.service"}, []string{"systemd-random-seed.service"}},
		"a unit, /usr not merged":    {[]string{"lib/systemd/system/systemd-random-seed.service"}, []string{"systemd-random-seed.service"}},
		"a template":                 {[]string{"lib/systemd/system/modprobe@.service"}, []string{"modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@loop.service", "modprobe@fuse.service"}},
		"an instance of its own":     {[]string{"lib/systemd/system/modprobe@loop.service"}, []string{"modprobe@loop.service"}},
		"one that is needed":         {[]string{"lib/systemd/system/ssh.service"}, nil},
		"one of the author's":        {[]string{"lib/systemd/system/getty@.service", "etc/systemd/system/getty@tty1.service"}, nil},
		"a unit that is only in etc": {[]string{"etc/systemd/system/systemd-random-seed.service"}, nil},
	} {
		if got := trimmable(func(p string) bool { return slices.Contains(row.has, p) }); !slices.Equal(got, row.want) {
			t.Errorf("%s: %q, want %q", name, got, row.want)
		}
	}
}

func TestNameOf(t *testing.T) {
	for _, row := range []struct {
		text      string
		packages  []string
		yes, no   string
		byDefault bool
	}{
		{"apt:bookworm", nil, "apt:bookworm", "apt:bookworm+untrimmed", true},
		{"apt:bookworm", []string{"tree"}, "apt:bookworm+36e8c616", "apt:bookworm+36e8c616+untrimmed", true},
		{"debian", nil, "docker.io/library/debian:latest+trimmed", "docker.io/library/debian:latest", false},
		{"rootfs:x", nil, "", "", false},
	} {
		ref, err := oci.ParseReference(row.text)
		if err != nil {
			t.Fatal(err)
		}
		src := &oci.Source{Packages: row.packages}
		if yes, no := NameOf(src, ref, true), NameOf(src, ref, false); yes != row.yes || no != row.no || TrimmedByDefault(ref) != row.byDefault {
			t.Errorf("%s %q: %q and %q, by default %v", row.text, row.packages, yes, no, TrimmedByDefault(ref))
		}
	}
}

// A trimmed base is another base than the image's own, has its masks, and is
// sound; what its author has decided stays.
func TestTrim(t *testing.T) {
	im, s := newSmallImages(t)
	l := newLayout(t)
	l.add("sys", tarOf(t, systemdEntries()...))
	l.add("none", tarOf(t, file("bin/sh", 0o755, "sh")))
	get := func(tag, name string, trim bool) *Image {
		t.Helper()
		src, ref := l.reference(tag)
		src.Blobs = &blobs{Blobs: s.Blobs()}
		image, err := im.Pull(t.Context(), src, ref, PullOptions{Name: name, Agent: agentFile(t), Trim: trim})
		if err != nil {
			t.Fatal(err)
		}
		clean(t, image.Rootfs)
		return image
	}
	whole, trimmed := get("sys", "whole", false), get("sys", "trimmed", true)
	if whole.ID == trimmed.ID || whole.BaseDigest == trimmed.BaseDigest || whole.Trimmed || !trimmed.Trimmed {
		t.Fatalf("one base for both: %+v, %+v", whole, trimmed)
	}
	if whole.Masked != nil || !slices.Equal(trimmed.Masked, trimmedUnits) || trimmed.Notes != nil {
		t.Errorf("masked: %q and %q, notes %q", whole.Masked, trimmed.Masked, trimmed.Notes)
	}
	var paths []string
	for _, d := range differences(t, openFS(t, whole.Rootfs), openFS(t, trimmed.Rootfs)) {
		if !strings.HasPrefix(d, "etc/systemd/system: ") { // the directory, which is as large as before or not
			paths = append(paths, d)
		}
	}
	want := []string{}
	for _, u := range trimmedUnits {
		want = append(want, unitFolder+"/"+u+": name")
		if target, err := openFS(t, trimmed.Rootfs).ReadLink(unitFolder + "/" + u); err != nil || target != "/dev/null" {
			t.Errorf("%s: %q, %v", u, target, err)
		}
	}
	slices.Sort(want)
	if slices.Sort(paths); !slices.Equal(paths, want) {
		t.Errorf("they differ in %q, want %q", paths, want)
	}
	// Both again: nothing is made, each is itself.
	if again := get("sys", "again", true); again.ID != trimmed.ID || !again.Trimmed {
		t.Errorf("again: %+v", again)
	}
	for _, name := range []string{"whole", "trimmed"} {
		if v := verify(t, im, name, agentFile(t)); v.Differences != nil || v.Notes != nil {
			t.Errorf("%s: %+v", name, v)
		}
	}
	// A mask that is gone is a difference, whatever release looks.
	if err := os.Chmod(trimmed.Rootfs, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, exit := tool(t, "debugfs", "-w", "-R", "rm "+unitFolder+"/getty@tty1.service", trimmed.Rootfs); exit != 0 {
		t.Fatal(out)
	}
	if v := verify(t, im, "trimmed", agentFile(t)); !slices.ContainsFunc(v.Differences, func(d string) bool { return strings.Contains(d, `getty@tty1.service": name`) }) {
		t.Errorf("without a mask: %q", v.Differences)
	}

	// An image without systemd has nothing to mask, and it is said.
	none := get("none", "none", true)
	if !none.Trimmed || none.Masked != nil || len(none.Notes) != 1 || !strings.Contains(none.Notes[0], "nothing to trim") {
		t.Errorf("without systemd: %+v", none)
	}
}

// A file system of another tool is trimmed as it is registered.
func TestTrimRegistered(t *testing.T) {
	im, _ := newImages(t)
	dir := someTree(t)
	for _, path := range []string{"usr/lib/systemd/system/systemd-udev-trigger.service", "usr/lib/systemd/system/getty@.service"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte("[Unit]\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	path := foreign(t, dir, "16M", "-t", "ext4")
	untouched(t, path)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ids := map[bool]string{}
	for _, trim := range []bool{false, true} {
		image, err := im.Register(t.Context(), f, RegisterOptions{Name: map[bool]string{false: "whole", true: "trimmed"}[trim], Label: "x", Agent: agentFile(t), Trim: trim})
		if err != nil {
			t.Fatal(err)
		}
		clean(t, image.Rootfs)
		ids[trim] = image.ID
		want := trimmedUnits
		if !trim {
			want = nil
		}
		if image.Trimmed != trim || !slices.Equal(image.Masked, want) {
			t.Errorf("trim %v: %+v", trim, image)
		}
		for _, u := range trimmedUnits {
			if target, err := openFS(t, image.Rootfs).ReadLink(unitFolder + "/" + u); (err == nil && target == "/dev/null") != trim {
				t.Errorf("trim %v: %s: %q, %v", trim, u, target, err)
			}
		}
		if v := verify(t, im, image.Name, agentFile(t)); v.Differences != nil {
			t.Errorf("trim %v: %q", trim, v.Differences)
		}
	}
	if ids[false] == ids[true] {
		t.Error("one base for both")
	}
	image, err := im.Find("trimmed")
	if err != nil {
		t.Fatal(err)
	}
	if out, exit := tool(t, "debugfs", "-w", "-R", "rm "+unitFolder+"/getty@tty1.service", image.Rootfs); exit != 0 {
		t.Fatal(out)
	}
	if v := verify(t, im, "trimmed", agentFile(t)); !slices.ContainsFunc(v.Differences, func(d string) bool { return strings.Contains(d, "getty@tty1.service") }) {
		t.Errorf("without a mask: %q", v.Differences)
	}
}

// Where a mask would stand is no place for one: the image is refused by name.
func TestTrimRefused(t *testing.T) {
	_, _, err := buildRootfs(t, BuildOptions{Agent: agentFile(t), Trim: true}, tarOf(t,
		file("usr/lib/systemd/system/getty@.service", 0o644, ""), file("etc/systemd/system", 0o644, "")))
	wantCode(t, err, banger.CodeInvalid, "etc/systemd/system", "not a directory")
}
