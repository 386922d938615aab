package ext4

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// ErrCorrupt is wrapped by every error that says an image contradicts itself.
var ErrCorrupt = errors.New("the file system is damaged")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), ErrCorrupt)
}

// blockDevice reads the blocks of an image as they are once everything pending is
// applied: first what an editor has changed, then what the journal still has
// to say, then the image itself. It is safe for concurrent use as long as
// changed is not written to.
type blockDevice struct {
	r         io.ReaderAt
	blockSize int
	blocks    uint64
	changed   map[uint64][]byte
	journal   *recovery // nil if there is nothing to replay

	mu    sync.Mutex
	cache map[uint64][]byte
	order [cacheBlocks]uint64 // a ring of the blocks in cache
	next  int
}

// cacheBlocks bounds what a device remembers of metadata: 256 KiB at most.
const cacheBlocks = 64

// reset tells a device its geometry, which it does not know while the first
// superblock is read.
func (d *blockDevice) reset(blockSize int, blocks uint64) {
	d.blockSize, d.blocks = blockSize, blocks
	d.cache = make(map[uint64][]byte)
	d.next = 0
}

// block gives a block of metadata, which must not be written to.
func (d *blockDevice) block(n uint64) ([]byte, error) {
	if n >= d.blocks {
		return nil, corrupt("block %d: beyond the end of %d blocks", n, d.blocks)
	}
	if b := d.changed[n]; b != nil {
		return b, nil
	}
	d.mu.Lock()
	b := d.cache[n]
	d.mu.Unlock()
	if b != nil {
		return b, nil
	}
	b = make([]byte, d.blockSize)
	if err := d.readSaved(n, b); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cache[n] == nil {
		if len(d.cache) >= cacheBlocks {
			delete(d.cache, d.order[d.next])
		}
		d.cache[n] = b
		d.order[d.next] = n
		d.next = (d.next + 1) % cacheBlocks
	}
	return b, nil
}

// read fills p with whole blocks from n on, without remembering them.
func (d *blockDevice) read(n uint64, p []byte) error {
	count := uint64(len(p) / d.blockSize)
	if n >= d.blocks || count > d.blocks-n {
		return corrupt("blocks %d to %d: beyond the end of %d blocks", n, n+count, d.blocks)
	}
	if len(d.changed) == 0 && d.journal == nil {
		return d.readRaw(n, p)
	}
	for i := range count {
		b := p[int(i)*d.blockSize:][:d.blockSize]
		if c := d.changed[n+i]; c != nil {
			copy(b, c)
		} else if err := d.readSaved(n+i, b); err != nil {
			return err
		}
	}
	return nil
}

// readSaved reads one block as the journal leaves it.
func (d *blockDevice) readSaved(n uint64, p []byte) error {
	if d.journal != nil {
		if found, err := d.journal.read(n, p); found || err != nil {
			return err
		}
	}
	return d.readRaw(n, p)
}

func (d *blockDevice) readRaw(n uint64, p []byte) error {
	if read, err := d.r.ReadAt(p, int64(n)*int64(d.blockSize)); read < len(p) {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return corrupt("block %d: the image ends before it", n+uint64(read/d.blockSize))
		}
		return fmt.Errorf("image: reading block %d: %w", n, err)
	}
	return nil
}
