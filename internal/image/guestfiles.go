package image

import (
	"embed"
	"fmt"
	"io"
	"os"

	"banger/ext4"
	"banger/internal/oci"
)

// Guest files are what every base image holds so that it also comes up under
// another VMM, kernel and boot path. In banger's own boot the agent of the
// initramfs is already running, and this one ends when it finds it.
//
//go:embed guestfiles
var guestFiles embed.FS

const (
	guestAgentPath = "usr/local/bin/banger-vsock-agent"
	guestUnitPath  = "etc/systemd/system/banger-vsock-agent.service"
	guestWantsPath = "etc/systemd/system/multi-user.target.wants/banger-vsock-agent.service"
	guestLoadPath  = "etc/modules-load.d/banger-vsock.conf"
)

// maxAgentBytes bounds the agent's binary: ten times what it is.
const maxAgentBytes = 32 << 20

// putGuestFiles puts the guest files into the tree, as root:root and in place
// of whatever the image has there. Parents are resolved inside the image.
func putGuestFiles(t *oci.Tree[*ext4.Content], w *ext4.Writer, agent *os.File) error {
	st, err := agent.Stat()
	if err != nil {
		return err
	}
	if st.Size() == 0 || st.Size() > maxAgentBytes {
		return fmt.Errorf("guest agent %s: %d bytes is no agent", agent.Name(), st.Size())
	}
	put := func(path string, mode uint16, r io.Reader, sizeBytes int64) error {
		content, err := w.Place(r, sizeBytes)
		if err != nil {
			return fmt.Errorf("guest file %s: %w", path, err)
		}
		node := &oci.Node[*ext4.Content]{Mode: mode, Content: content, SizeBytes: sizeBytes}
		return t.Put(path, node)
	}
	if err := put(guestAgentPath, modeRegular|0o755, io.NewSectionReader(agent, 0, st.Size()), st.Size()); err != nil {
		return err
	}
	for _, f := range []struct{ path, name string }{
		{guestUnitPath, "guestfiles/banger-vsock-agent.service"},
		{guestLoadPath, "guestfiles/banger-vsock.conf"},
	} {
		src, err := guestFiles.Open(f.name)
		if err != nil {
			return err
		}
		st, err := src.Stat()
		if err != nil {
			return err
		}
		if err := put(f.path, modeRegular|0o644, src, st.Size()); err != nil {
			return err
		}
	}
	return t.Put(guestWantsPath, &oci.Node[*ext4.Content]{
		Mode: modeSymlink | 0o777, Target: "/" + guestUnitPath,
	})
}
