package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"banger/ext4"
	"banger/internal/store"
)

// A digester is a new file whose digest is made while it is written, of bytes
// that are in the cache. It need not be written in order, only mostly so. Its
// blocks are in groups of 128, each below one hash of level 1 of the tree, and
// that hash is what stays of a group:
//
//	       write                another was written
//	zero ─────────▶ open ───────────────────────────▶ hashed
//	                 │                                   │
//	                 │ part of a block                   │ any part of it
//	                 └───────────────▶ lost ◀────────────┘
//
// A few groups are open: the hashes of their blocks are there. A lost one is
// read from the file in the end. What becomes zeros as a whole, by a hole or by
// the end of the file, is zero again whatever it was, and what is written as a
// whole is open. Of a write that failed nothing is known but where it was: its
// groups are lost.
//
// It is not safe for concurrent use, and all that changes the file must go
// through it.
type digester struct {
	f     *os.File
	early *store.Writeback
	end   int64 // nothing was ever written beyond it
	pages map[int64]*groupPage
	open  []openGroup
	turn  int64 // counts uses of open groups
}

const (
	groupBytes = verityFanout * verityBlockBytes // 512 KiB
	pageGroups = 2048                            // 1 GiB of the file, 66 KiB of memory
	openGroups = 16                              // 64 KiB of memory
)

type groupState uint8

const (
	groupZero groupState = iota
	groupOpen
	groupHashed
	groupLost
)

// groupPage is what is known of groups that follow each other. Where none was
// written there is no page.
type groupPage struct {
	states [pageGroups]groupState
	hashes [pageGroups][sha256.Size]byte
}

// openGroup has the hashes of a group's blocks, as the block of the tree that
// they are.
type openGroup struct {
	number int64
	used   int64 // the digester's turn; 0: there is no group here
	hashes [verityBlockBytes]byte
}

var (
	_ ext4.File        = (*digester)(nil)
	_ ext4.HolePuncher = (*digester)(nil)
)

// newDigester gives the digester of a file that has no byte yet, and stays the
// caller's.
func newDigester(f *os.File) *digester {
	return &digester{f: f, early: store.NewWriteback(f, false), pages: make(map[int64]*groupPage), open: make([]openGroup, openGroups)}
}

func (d *digester) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

func (d *digester) Stat() (fs.FileInfo, error) { return d.f.Stat() }

func (d *digester) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.f.WriteAt(p, off)
	d.early.Wrote(off, n) // the base will be fsynced
	end := off + int64(len(p))
	if off >= 0 && len(p) > 0 {
		d.end = max(d.end, end)
		if err != nil {
			d.lose(off, end)
		} else {
			d.change(off, end, p)
		}
	}
	return n, err
}

func (d *digester) Truncate(sizeBytes int64) error {
	if err := d.f.Truncate(sizeBytes); err != nil {
		for _, page := range d.pages { // what is zeros stays so
			for i := range page.states {
				if page.states[i] != groupZero {
					page.states[i] = groupLost
				}
			}
		}
		clear(d.open)
		return err
	}
	// What was written beyond is zeros, should the file grow again.
	d.change(sizeBytes, (d.end+groupBytes-1)/groupBytes*groupBytes, nil)
	return nil
}

// PunchHole makes a hole and leaves the size of the file.
func (d *digester) PunchHole(offset, lengthBytes int64) error {
	var err error = unix.EINTR
	for errors.Is(err, unix.EINTR) {
		err = unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, offset, lengthBytes)
	}
	if offset >= 0 && lengthBytes > 0 {
		if err != nil {
			d.lose(offset, offset+lengthBytes)
		} else {
			d.change(offset, offset+lengthBytes, nil)
		}
	}
	if err != nil {
		return &fs.PathError{Op: "punch hole", Path: d.f.Name(), Err: err}
	}
	return nil
}

// change notes that the bytes from one offset to another became p, or zeros if
// that is nil.
func (d *digester) change(from, to int64, p []byte) {
	for from < to {
		group := from / groupBytes
		page := d.pages[group/pageGroups]
		if page == nil && p == nil {
			from = (group/pageGroups + 1) * pageGroups * groupBytes
			continue
		}
		if page == nil {
			page = new(groupPage)
			d.pages[group/pageGroups] = page
		}
		state := &page.states[group%pageGroups]
		end := min(to, (group+1)*groupBytes)
		whole := end-from == groupBytes
		switch {
		case p == nil && (whole || *state == groupZero):
			d.set(state, group, groupZero)
		case from%verityBlockBytes != 0 || end%verityBlockBytes != 0:
			d.set(state, group, groupLost)
		case !whole && (*state == groupHashed || *state == groupLost):
			*state = groupLost
		default:
			o := d.opened(group)
			*state = groupOpen
			for at := from; at < end; at += verityBlockBytes {
				hash := &zeroHashes[0]
				if p != nil {
					sum := blockHash(p[at-from:][:verityBlockBytes])
					hash = &sum
				}
				copy(o.hashes[at%groupBytes/verityBlockBytes*sha256.Size:], hash[:])
			}
		}
		if p != nil {
			p = p[end-from:]
		}
		from = end
	}
}

// lose notes that nothing is known of the bytes from one offset to another.
func (d *digester) lose(from, to int64) {
	for group := from / groupBytes; group*groupBytes < to; group++ {
		page := d.pages[group/pageGroups]
		if page == nil {
			page = new(groupPage)
			d.pages[group/pageGroups] = page
		}
		d.set(&page.states[group%pageGroups], group, groupLost)
	}
}

// set gives a group a state in which it is not open.
func (d *digester) set(state *groupState, group int64, to groupState) {
	if *state == groupOpen {
		for i := range d.open {
			if o := &d.open[i]; o.number == group {
				o.used = 0
			}
		}
	}
	*state = to
}

// opened gives a group as an open one, with hashes of zeros if it was not open.
// The one that was used longest ago makes place for it.
func (d *digester) opened(group int64) *openGroup {
	d.turn++
	oldest := &d.open[0]
	for i := range d.open {
		o := &d.open[i]
		if o.used > 0 && o.number == group {
			o.used = d.turn
			return o
		}
		if o.used < oldest.used {
			oldest = o
		}
	}
	d.close(oldest)
	oldest.number, oldest.used = group, d.turn
	for at := 0; at < len(oldest.hashes); at += sha256.Size {
		copy(oldest.hashes[at:], zeroHashes[0][:])
	}
	return oldest
}

func (d *digester) close(o *openGroup) {
	if o.used == 0 {
		return
	}
	page, i := d.pages[o.number/pageGroups], o.number%pageGroups
	page.states[i], page.hashes[i] = groupHashed, sha256.Sum256(o.hashes[:])
	o.used = 0
}

// digest is that of the file as it is now, as digestOf has it.
func (d *digester) digest(ctx context.Context) (string, error) {
	st, err := d.f.Stat()
	if err != nil {
		return "", err
	}
	for i := range d.open {
		d.close(&d.open[i])
	}
	t := new(merkleTree)
	var buf []byte
	for _, number := range slices.Sorted(maps.Keys(d.pages)) {
		page := d.pages[number]
		for i, state := range page.states {
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			group := number*pageGroups + int64(i)
			begin := group * groupBytes
			n := min(groupBytes, st.Size()-begin)
			if state == groupZero || n <= 0 {
				continue
			}
			t.zerosTo(begin / verityBlockBytes)
			if state == groupHashed && n == groupBytes {
				t.add(1, page.hashes[i])
				continue
			}
			if buf == nil {
				buf = make([]byte, groupBytes)
			}
			if _, err := d.f.ReadAt(buf[:n], begin); err != nil {
				return "", fmt.Errorf("%s: at %d: %w", d.f.Name(), begin, err)
			}
			t.data(buf[:n])
		}
	}
	return t.digest(st.Size()), nil
}
