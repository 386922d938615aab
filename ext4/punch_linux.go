package ext4

import "syscall"

// punch makes a hole in f and tells whether it did.
func punch(f File, offset, lengthBytes int64) bool {
	const keepSize, punchHole = 0x1, 0x2
	conn, ok := f.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	if ctlErr := raw.Control(func(fd uintptr) {
		for {
			err = syscall.Fallocate(int(fd), keepSize|punchHole, offset, lengthBytes)
			if err != syscall.EINTR {
				return
			}
		}
	}); ctlErr != nil {
		return false
	}
	return err == nil
}
