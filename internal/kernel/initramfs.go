package kernel

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

const (
	maxAgentBytes      = 256 << 20
	maxBootConfigBytes = 1 << 20

	initramfsModules = "modules"          // the folder of modules in the initramfs
	bootConfigPath   = "banger/boot.json" // wire.BootConfigPath without its slash
)

// WriteInitramfs writes the initramfs of one VM to w, uncompressed: an archive
// with the agent as /init (read from agent, exactly agentSizeBytes) and the
// boot modules, and a second one with the VM's boot config (boot, at most
// 1 MiB) as /banger/boot.json, mode 0600. The bytes are a function of the
// arguments and the kernel alone.
//
// The kernel takes archives one after the other, each from a 4-byte boundary
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func (k *Kernel) WriteInitramfs(w io.Writer, agent io.Reader, agentSizeBytes int64, boot []byte) error {
	if agentSizeBytes <= 0 || agentSizeBytes > maxAgentBytes {
		return fmt.Errorf("initramfs: agent of %d bytes, 1 to %d can be", agentSizeBytes, maxAgentBytes)
	}
	if len(boot) > maxBootConfigBytes {
		return fmt.Errorf("initramfs: boot config of %d bytes, the limit is %d", len(boot), maxBootConfigBytes)
	}
	c := &cpioWriter{w: w}
	for _, dir := range []string{"banger", "dev", initramfsModules, "proc", "sys"} {
		c.entry(dir, cpioDir|0o755, 0, nil)
	}
	c.entry("init", cpioFile|0o755, agentSizeBytes, agent)
	for _, name := range k.boot {
		if err := c.file(initramfsModules+"/"+name, filepath.Join(k.dir, bootDir, name)); err != nil {
			return err
		}
	}
	c.trailer()
	c.entry(bootConfigPath, cpioFile|0o600, int64(len(boot)), bytes.NewReader(boot))
	c.trailer()
	if c.err != nil {
		return fmt.Errorf("initramfs: %w", c.err)
	}
	return nil
}

// LoadModules are the paths of the boot modules inside the initramfs, in the
// order in which the agent must load them.
func (k *Kernel) LoadModules() []string {
	paths := make([]string, len(k.boot))
	for i, name := range k.boot {
		paths[i] = "/" + initramfsModules + "/" + name
	}
	return paths
}

const (
	cpioFile        = 0o100000
	cpioDir         = 0o040000
	cpioHeaderBytes = 110
	cpioTrailer     = "TRAILER!!!"
)

// A cpioWriter writes the "newc" format (cpio(5)). Everything is of root's,
// of 1970, and numbered in order. The first error stays.
type cpioWriter struct {
	w     io.Writer
	inode uint32
	err   error
}

// entry writes one file of exactly size bytes, or a folder. size is below
// 4 GiB.
func (c *cpioWriter) entry(name string, mode uint32, size int64, r io.Reader) {
	c.inode++
	links := 1
	if mode&cpioDir != 0 {
		links = 2
	}
	c.header(c.inode, mode, links, size, name)
	if c.err != nil || size == 0 {
		return
	}
	n, err := io.Copy(c.w, io.LimitReader(r, size))
	if err == nil && n != size {
		err = fmt.Errorf("%q ends after %d of %d bytes", name, n, size)
	}
	if err == nil {
		// One byte more would be a file that is not what was measured.
		if extra, _ := io.ReadFull(r, make([]byte, 1)); extra != 0 {
			err = fmt.Errorf("%q is longer than %d bytes", name, size)
		}
	}
	if c.err = err; err == nil {
		c.pad(size)
	}
}

// file writes the file at path.
func (c *cpioWriter) file(name, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	if st.Size() > maxModuleBytes {
		return fmt.Errorf("initramfs: %q: %d bytes, the limit is %d", name, st.Size(), maxModuleBytes)
	}
	c.entry(name, cpioFile|0o644, st.Size(), f)
	return nil
}

// trailer ends an archive. Inode numbers start again after it.
func (c *cpioWriter) trailer() {
	c.header(0, 0, 1, 0, cpioTrailer)
	c.inode = 0
}

func (c *cpioWriter) header(inode, mode uint32, links int, size int64, name string) {
	if c.err != nil {
		return
	}
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor,
	// rdevmajor, rdevminor, namesize with its NUL, check
	_, c.err = fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	c.pad(cpioHeaderBytes + int64(len(name)) + 1)
}

// pad fills up to a multiple of four bytes.
func (c *cpioWriter) pad(size int64) {
	if n := -size & 3; n != 0 && c.err == nil {
		_, c.err = c.w.Write(make([]byte, n))
	}
}
