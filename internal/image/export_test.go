package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"banger"
	"banger/ext4"
)

// What was not made of layers is exported as one, and comes in again as the
// same file system to the last attribute.
func TestExportBase(t *testing.T) {
	im, s := newSmallImages(t)
	path := filepath.Join(t.TempDir(), "x.tar")
	when := time.Date(2019, 8, 7, 6, 5, 4, 321, time.UTC)
	if err := os.WriteFile(path, tarOf(t,
		dir("./", 0o750).at(when).owned(5, 6),
		file("etc/passwd", 0o644, "root:x:0:0").at(when),
		file("bin/su", 0o4755, strings.Repeat("su", 9000)).with("security.capability", "\x01\x00\x00\x02"+strings.Repeat("\x00", 16)),
		hardlink("bin/sudo", "bin/su"),
		entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Devmajor: 1, Devminor: 3, Mode: 0o666}},
		entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Devmajor: 8, Mode: 0o660}},
		entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "run/fifo", Mode: 0o600}},
		entry{tar.Header{Typeflag: tar.TypeReg, Name: "times", Mode: 0o644, ModTime: when, AccessTime: when.Add(time.Hour), ChangeTime: when.Add(2), Format: tar.FormatPAX}, "x"},
		symlink("lib", "usr/lib"),
		file("root/.profile", 0o600, "x").owned(1<<32-1, 4).at(time.Unix(-1, 5)),
		file("\xff\x01\n", 0o644, "odd"),
	), 0o600); err != nil {
		t.Fatal(err)
	}
	src, ref := reference(t, "rootfs:"+path, path)
	image, err := im.Pull(t.Context(), src, ref, PullOptions{Name: "x", Agent: agentFile(t)})
	if err != nil {
		t.Fatal(err)
	}
	export := func() []byte {
		var b bytes.Buffer
		if err := im.ExportBase(t.Context(), image, &b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	first := export()
	if !bytes.Equal(first, export()) {
		t.Error("exported twice it is not the same")
	}
	if bytes.Contains(first, []byte(agentText[:100])) {
		t.Error("the guest files are in it")
	}
	archive := filepath.Join(t.TempDir(), "export.tar")
	if err := os.WriteFile(archive, first, 0o600); err != nil {
		t.Fatal(err)
	}
	src, ref = reference(t, "docker-archive:"+archive, archive)
	src.Blobs = &blobs{Blobs: s.Blobs()}
	again, err := im.Pull(t.Context(), src, ref, PullOptions{Name: "y", Agent: agentFile(t)})
	if err != nil {
		t.Fatal(err)
	}
	var differ []string
	if err := ext4.Compare(openFS(t, image.Rootfs), openFS(t, again.Rootfs), ext4.DiffAll|ext4.DiffAtime|ext4.DiffCtime, func(d ext4.Difference) bool {
		differ = append(differ, d.Path+": "+d.Aspect.String())
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if differ != nil || again.Platform != image.Platform || !slices.Equal(again.Config.Cmd, image.Config.Cmd) {
		t.Errorf("differs: %q; %+v, was %+v", differ, again.Image, image.Image)
	}
	// What a layer cannot say is told.
	if err := os.WriteFile(path, tarOf(t, file("a/.wh.file", 0o644, "no whiteout in a tar")), 0o600); err != nil {
		t.Fatal(err)
	}
	src, ref = reference(t, "rootfs:"+path, path)
	odd, err := im.Pull(t.Context(), src, ref, PullOptions{Name: "odd", Agent: agentFile(t)})
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, im.ExportBase(t.Context(), odd, &bytes.Buffer{}), banger.CodeInvalid, `"a/.wh.file"`, "removed")
	// And a base that cannot be read.
	if err := os.Truncate(image.Rootfs, 4096); err != nil {
		t.Fatal(err)
	}
	wantCode(t, im.ExportBase(t.Context(), image, &bytes.Buffer{}), banger.CodeInvalid, `"x"`)
}
