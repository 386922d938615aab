package image

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/internal/oci"
	"banger/internal/store"
)

// newSmallImages is a store whose bases are quick to read.
func newSmallImages(t testing.TB) (*Images, *store.Store) {
	t.Helper()
	im, s := newImages(t)
	im.baseBytes = smallBytes
	return im, s
}

// pullWithGuest pulls an image of two layers that have one of everything.
func pullWithGuest(t testing.TB, im *Images, l *layout, tag string) *Image {
	t.Helper()
	when := time.Date(2019, 8, 7, 6, 5, 4, 321, time.UTC)
	l.add(tag, tarOf(t,
		dir("./", 0o755).at(when),
		file("gone", 0o644, "gone"),
		file("etc/passwd", 0o644, "root:x:0:0").at(when),
		file("bin/su", 0o4755, strings.Repeat("su", 9000)).with("security.capability", "\x01\x00\x00\x02"+strings.Repeat("\x00", 16)),
		hardlink("bin/sudo", "bin/su"),
		entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Devmajor: 1, Devminor: 3, Mode: 0o666}},
		symlink("lib", "usr/lib"),
		file("usr/lib/x", 0o600, "x").owned(3, 4),
		symlink("usr/local", "/opt"),
		file("\xff\x01\n", 0o644, "odd"),
	), tarOf(t,
		file(".wh.gone", 0o644, ""),
		file("lib/y", 0o644, "y"),
	))
	src, ref := l.reference(tag)
	src.Blobs = &blobs{Blobs: im.s.Blobs()}
	image, err := im.Pull(t.Context(), src, ref, PullOptions{Name: tag, Agent: agentFile(t)})
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func verify(t testing.TB, im *Images, name string, agent *os.File) *Verified {
	t.Helper()
	v, err := im.Verify(t.Context(), name, &oci.Source{Blobs: &blobs{Blobs: im.s.Blobs()}}, agent)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// An image as it was pulled is sound; whatever is changed in it is named.
func TestVerify(t *testing.T) {
	im, s := newSmallImages(t)
	l := newLayout(t)
	image := pullWithGuest(t, im, l, "a")
	if v := verify(t, im, "a", agentFile(t)); v.Differences != nil || v.Notes != nil || v.Entries < 20 {
		t.Fatalf("as it was pulled: %+v", v)
	}
	if left := inside(t, s, "tmp"); left != nil {
		t.Errorf("tmp/ has %q", left)
	}
	// The agent of another release is no difference.
	other := agentFile(t)
	if err := os.WriteFile(other.Name(), []byte("another release"), 0o600); err != nil {
		t.Fatal(err)
	}
	if v := verify(t, im, "a", other); v.Differences != nil || len(v.Notes) != 1 || !strings.Contains(v.Notes[0], "another release") && !strings.Contains(v.Notes[0], "of another release") {
		t.Errorf("of another release: %+v", v)
	}

	good, err := os.ReadFile(image.Rootfs)
	if err != nil {
		t.Fatal(err)
	}
	evil := filepath.Join(t.TempDir(), "evil")
	if err := os.WriteFile(evil, []byte("evil"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct{ name, command, words string }{
		{"mode", "set_inode_field bin/su mode 0104777", `"bin/su": mode`},
		{"owner", "set_inode_field etc/passwd uid 9", `"etc/passwd": owner`},
		{"time", "set_inode_field etc/passwd mtime 20200101", `"etc/passwd": mtime`},
		{"birth", "set_inode_field etc/passwd crtime 20200101", `"etc/passwd": crtime`},
		{"xattr", "ea_rm bin/su security.capability", `"bin/su": xattrs`},
		{"a name more", "write " + evil + " etc/evil", `"etc/evil": name`},
		{"a name less", "rm etc/passwd", `"etc/passwd": name`},
		{"device", "set_inode_field dev/null block[0] 0x0105", `"dev/null": device`},
		{"size", "set_inode_field etc/passwd size 4", `"etc/passwd": content: 4 bytes`},
		{"links", "set_inode_field bin/su links_count 3", `"bin/su": links`},
	} {
		t.Run(row.name, func(t *testing.T) {
			if err := os.WriteFile(image.Rootfs, good, 0o400); err != nil {
				t.Fatal(err)
			}
			if out, exit := tool(t, "debugfs", "-w", "-R", row.command, image.Rootfs); exit != 0 {
				t.Fatal(out)
			}
			v := verify(t, im, "a", agentFile(t))
			for _, want := range []string{"base image: digest ", row.words} {
				if !slices.ContainsFunc(v.Differences, func(d string) bool { return strings.Contains(d, want) }) {
					t.Errorf("%q: does not say %q", v.Differences, want)
				}
			}
		})
	}
	t.Run("bytes", func(t *testing.T) {
		bad := slices.Clone(good)
		at := strings.Index(string(bad), "root:x:0:0")
		bad[at] = 'R'
		if err := os.WriteFile(image.Rootfs, bad, 0o400); err != nil {
			t.Fatal(err)
		}
		if v := verify(t, im, "a", agentFile(t)); len(v.Differences) != 2 || v.Differences[1] != `"etc/passwd": content: other bytes` {
			t.Errorf("%q", v.Differences)
		}
	})
	t.Run("the target of a symlink", func(t *testing.T) {
		bad := []byte(strings.Replace(string(good), "usr/lib\x00", "etc/lib\x00", 1))
		if err := os.WriteFile(image.Rootfs, bad, 0o400); err != nil {
			t.Fatal(err)
		}
		// Its inode's checksum tells as well.
		if v := verify(t, im, "a", agentFile(t)); len(v.Differences) < 2 || !strings.Contains(strings.Join(v.Differences, "\n"), "lib") {
			t.Errorf("%q", v.Differences)
		}
	})
	t.Run("records of other versions", func(t *testing.T) {
		if err := os.WriteFile(image.Rootfs, good, 0o400); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(s.Image(image.ID), store.ImageRecord)
		var r record
		if err := store.ReadJSON(path, imageSchema, &r); err != nil {
			t.Fatal(err)
		}
		made := r.BaseDigest
		for _, row := range []struct{ digest, difference string }{
			{shaOf(t, image.Rootfs), ""},
			{"sha256:" + strings.Repeat("0", 64), "not the sha256:0000"},
			{"fsverity-sha256:" + strings.Repeat("0", 64), "not the fsverity-sha256:0000"},
			{"fsverity-sha512:\x1b[2J", `"fsverity-sha512:\x1b[2J", which is of no kind that this version of banger knows`},
			{"", `"", which is of no kind`},
			{made, ""},
		} {
			r.BaseDigest = row.digest
			if err := store.WriteJSON(path, imageSchema, r); err != nil {
				t.Fatal(err)
			}
			v := verify(t, im, "a", agentFile(t))
			if row.difference == "" && v.Differences != nil || row.difference != "" && (len(v.Differences) != 1 || !strings.Contains(v.Differences[0], row.difference)) {
				t.Errorf("%q: %q, want %q", row.digest, v.Differences, row.difference)
			}
		}
	})
	t.Run("no file system", func(t *testing.T) {
		if err := os.WriteFile(image.Rootfs, make([]byte, smallBytes), 0o400); err != nil {
			t.Fatal(err)
		}
		if v := verify(t, im, "a", agentFile(t)); len(v.Differences) != 2 {
			t.Errorf("%q", v.Differences)
		}
	})
	if err := os.WriteFile(image.Rootfs, good, 0o400); err != nil {
		t.Fatal(err)
	}
	t.Run("a damaged seed", func(t *testing.T) {
		seed, err := os.ReadFile(image.WorkSeed)
		if err != nil {
			t.Fatal(err)
		}
		seed[1024+0x28] ^= 1
		if err := os.WriteFile(image.WorkSeed, seed, 0o400); err != nil {
			t.Fatal(err)
		}
		if v := verify(t, im, "a", agentFile(t)); len(v.Differences) != 1 || !strings.HasPrefix(v.Differences[0], "work seed: ") {
			t.Errorf("%q", v.Differences)
		}
		if err := os.Remove(image.WorkSeed); err != nil {
			t.Fatal(err)
		}
		if v := verify(t, im, "a", agentFile(t)); v.Differences != nil || len(v.Notes) != 1 {
			t.Errorf("without a seed: %+v", v)
		}
	})
	// Each blob is needed.
	for _, d := range digests(t, s) {
		path := filepath.Join(s.Root(), "blobs/sha256", strings.TrimPrefix(d, "sha256:"))
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for what, damaged := range map[string][]byte{"gone": nil, "cut": data[:len(data)-1], "changed": append(slices.Clone(data[:len(data)-1]), data[len(data)-1]^1)} {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if damaged != nil {
				if err := os.WriteFile(path, damaged, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			v := verify(t, im, "a", agentFile(t))
			if len(v.Differences) != 1 || !strings.HasPrefix(v.Differences[0], "layers: ") {
				t.Errorf("blob %s %s: %q", d, what, v.Differences)
			}
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if v := verify(t, im, "a", agentFile(t)); v.Differences != nil {
		t.Errorf("mended: %q", v.Differences)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := im.Verify(ctx, "a", &oci.Source{Blobs: &blobs{Blobs: s.Blobs()}}, agentFile(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	_, err = im.Verify(t.Context(), "none", &oci.Source{}, agentFile(t))
	wantCode(t, err, banger.CodeNotFound)
}

// What was not made of layers is checked as far as that goes, and it says so.
func TestVerifyRegistered(t *testing.T) {
	im, _ := newImages(t)
	image, err := register(t, im, foreign(t, someTree(t), "16M", "-t", "ext4"), "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if v := verify(t, im, "x", agentFile(t)); v.Differences != nil || len(v.Notes) != 1 || !strings.Contains(v.Notes[0], "layers") {
		t.Errorf("%+v", v)
	}
	if out, exit := tool(t, "debugfs", "-w", "-R", "rm "+guestAgentPath, image.Rootfs); exit != 0 {
		t.Fatal(out)
	}
	if v := verify(t, im, "x", agentFile(t)); len(v.Differences) != 1 || len(v.Notes) != 2 {
		t.Errorf("without its agent: %+v", v)
	}
}

func TestTag(t *testing.T) {
	im, s := newImages(t)
	plant(t, s, "aabb00000001", "one")
	plant(t, s, "aabb00000002", "two")
	for _, name := range []string{"one", "aabb00000001", "aabb00000001"[:11] + "1"} {
		image, err := im.Tag(t.Context(), name, "new")
		if err != nil || image.ID != "aabb00000001" || image.Name != "new" {
			t.Errorf("%q: %+v, %v", name, image, err)
		}
	}
	if image, err := im.Tag(t.Context(), "two", "new"); err != nil || image.ID != "aabb00000002" {
		t.Errorf("moved: %+v, %v", image, err)
	}
	_, err := im.Tag(t.Context(), "none", "x")
	wantCode(t, err, banger.CodeNotFound)
	_, err = im.Tag(t.Context(), "one", "a\nb")
	wantCode(t, err, banger.CodeUsage)
	n, err := im.readNames()
	if err != nil || len(n.Names) != 3 || n.Names["new"] != "aabb00000002" {
		t.Errorf("%+v, %v", n, err)
	}
}

func TestPrune(t *testing.T) {
	im, s := newSmallImages(t)
	l := newLayout(t)
	shared := tarOf(t, file("bin/sh", 0o755, "shell"))
	l.add("a", shared, tarOf(t, file("a", 0o644, "a")))
	l.add("b", shared, tarOf(t, file("b", 0o644, "b")))
	a, _ := pull(t, im, l, "a", "x")
	b, _ := pull(t, im, l, "b", "x") // a has no name any more
	before := digests(t, s)
	prune := func() Pruned {
		t.Helper()
		p, err := im.Prune(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	// What a VM has open, or needs by its record, stays.
	release, err := im.Hold(a)
	if err != nil {
		t.Fatal(err)
	}
	if p := prune(); len(p.Images) != 0 || p.Blobs != 0 || p.FreedBytes != 0 {
		t.Errorf("while it is held: %+v", p)
	}
	release()
	im.Users = func(id string) ([]string, error) {
		if id == a.ID {
			return []string{"myvm"}, nil
		}
		return nil, nil
	}
	if p := prune(); len(p.Images) != 0 || p.Blobs != 0 {
		t.Errorf("while a VM is made of it: %+v", p)
	}
	im.Users = func(string) ([]string, error) { return nil, errors.New("unreadable record") }
	if _, err := im.Prune(t.Context()); err == nil {
		t.Error("who needs what is not known, and it prunes")
	}
	if now := digests(t, s); !slices.Equal(now, before) {
		t.Errorf("blobs %q became %q", before, now)
	}
	im.Users = nil
	held, err := allocatedIn(s.Image(a.ID))
	if err != nil {
		t.Fatal(err)
	}
	p := prune()
	if !slices.Equal(p.Images, []string{a.ID}) || p.Blobs != 3 || p.FreedBytes <= held {
		t.Errorf("%+v, its folder had %d bytes", p, held)
	}
	if left := inside(t, s, "trash"); left != nil {
		t.Errorf("trash/ has %q", left)
	}
	if v := verify(t, im, "x", agentFile(t)); v.Image.ID != b.ID || slices.ContainsFunc(v.Differences, func(d string) bool { return strings.HasPrefix(d, "layers") }) {
		t.Errorf("what is left of the other: %+v", v)
	}
	if p := prune(); len(p.Images) != 0 || p.Blobs != 0 || p.FreedBytes != 0 {
		t.Errorf("again: %+v", p)
	}
}
