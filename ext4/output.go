package ext4

import (
	"fmt"

	"banger/ext4/internal/disk"
)

// output gathers writes to neighbouring blocks into large ones. Blocks may be
// written in any order; ascending is cheap.
type output struct {
	f       File
	buf     []byte
	start   uint64 // block where buf begins
	used    int    // bytes of buf in use, whole blocks
	written uint64 // blocks handed to f
	err     error  // the first failed write; nothing is written after it
}

const outputBytes = 1 << 20

func newOutput(f File) *output { return &output{f: f, buf: make([]byte, outputBytes)} }

// room gives at least want bytes of buffer (at most outputBytes) for what
// begins at block. The bytes are not cleared. commit keeps them.
func (o *output) room(block uint64, want int) ([]byte, error) {
	if o.start+uint64(o.used/disk.BlockSize) != block || len(o.buf)-o.used < want {
		if err := o.flush(); err != nil {
			return nil, err
		}
		o.start = block
	}
	return o.buf[o.used:], o.err
}

// commit keeps the first n bytes, whole blocks, of what room gave.
func (o *output) commit(n int) { o.used += n }

// block gives one zeroed block that will be written, to be filled before the
// next call of any method.
func (o *output) block(block uint64) ([]byte, error) {
	b, err := o.room(block, disk.BlockSize)
	if err != nil {
		return nil, err
	}
	b = b[:disk.BlockSize]
	clear(b)
	o.commit(disk.BlockSize)
	return b, nil
}

func (o *output) flush() error {
	if o.err != nil || o.used == 0 {
		return o.err
	}
	if _, err := o.f.WriteAt(o.buf[:o.used], int64(o.start)*disk.BlockSize); err != nil {
		o.err = fmt.Errorf("image: writing at block %d: %w", o.start, err)
		return o.err
	}
	o.written += uint64(o.used / disk.BlockSize)
	o.start += uint64(o.used / disk.BlockSize)
	o.used = 0
	return nil
}

// erase makes length blocks at start read as zeros, as holes where it can.
// Nothing may be buffered.
func (o *output) erase(start, length uint64) error {
	if o.err != nil {
		return o.err
	}
	if o.punch(int64(start)*disk.BlockSize, int64(length)*disk.BlockSize) {
		return nil
	}
	clear(o.buf)
	for length > 0 {
		n := min(length, uint64(len(o.buf)/disk.BlockSize))
		if _, err := o.f.WriteAt(o.buf[:n*disk.BlockSize], int64(start)*disk.BlockSize); err != nil {
			o.err = fmt.Errorf("image: erasing at block %d: %w", start, err)
			return o.err
		}
		start, length = start+n, length-n
	}
	return nil
}

// punch makes a hole and tells whether it did.
func (o *output) punch(offset, lengthBytes int64) bool {
	if f, ok := o.f.(HolePuncher); ok {
		return f.PunchHole(offset, lengthBytes) == nil
	}
	return punch(o.f, offset, lengthBytes)
}
