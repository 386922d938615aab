package image

import (
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/ext4"
)

// behind does to the file itself, unseen by its digester, one kind of
// operation; or that fails, and the file is changed nonetheless.
type behind struct {
	*digester
	skip  string
	fails bool
}

// passed is what does an operation: the digester or the file alone.
func (b *behind) passed(op string) ext4.HolePuncher {
	if op != b.skip {
		return b.digester
	}
	alone := newDigester(b.f)
	if b.fails {
		return failingOps{b.digester, alone}
	}
	return alone
}

func (b *behind) WriteAt(p []byte, off int64) (int, error) {
	return b.passed("write").WriteAt(p, off)
}

func (b *behind) Truncate(n int64) error {
	st, err := b.f.Stat()
	if err != nil {
		return err
	}
	op := "grow"
	if n < st.Size() {
		op = "cut"
	}
	return b.passed(op).Truncate(n)
}

func (b *behind) PunchHole(off, n int64) error { return b.passed("punch").PunchHole(off, n) }

// failingOps do half of an operation, or all of it, and say that it failed:
// the digester's file is one that refuses every change.
type failingOps struct{ d, alone *digester }

func (f failingOps) refused(do func() error) error {
	file := f.d.f
	readOnly, err := os.Open(file.Name())
	if err != nil {
		return err
	}
	defer readOnly.Close()
	f.d.f = readOnly
	err = do()
	f.d.f = file
	return err
}

func (f failingOps) WriteAt(p []byte, off int64) (n int, err error) {
	if n, err = f.alone.WriteAt(p[:len(p)/2], off); err != nil {
		return n, err
	}
	return n, f.refused(func() error { _, err := f.d.WriteAt(p, off); return err })
}

func (f failingOps) Truncate(n int64) error {
	if err := f.alone.Truncate(n); err != nil {
		return err
	}
	return f.refused(func() error { return f.d.Truncate(n) })
}

func (f failingOps) PunchHole(off, n int64) error {
	if err := f.alone.PunchHole(off, n); err != nil {
		return err
	}
	return f.refused(func() error { return f.d.PunchHole(off, n) })
}

// play does random operations on a file of up to 4 MiB, or around the end of a
// page, and says how many failed.
func play(r *rand.Rand, f ext4.HolePuncher) (failed int) {
	const most = 8*groupBytes + 3
	begin := []int64{0, 0, 0, pageGroups*groupBytes - 4*groupBytes}[r.IntN(4)]
	do := func(err error) {
		if err != nil {
			failed++
		}
	}
	unit := func() int64 {
		return []int64{1, verityBlockBytes, verityBlockBytes, verityBlockBytes, groupBytes}[r.IntN(5)]
	}
	somewhere := func() int64 { return begin + r.Int64N(most)/unit()*unit() }
	length := func() int64 { u := unit(); return (1 + r.Int64N(max(1, r.Int64N(3*groupBytes)))/u) * u }
	cursor := begin // as a writer has it, mostly ascending
	for range 1 + r.IntN(40) {
		switch r.IntN(10) {
		case 0:
			do(f.Truncate(somewhere()))
		case 1, 2:
			do(f.PunchHole(somewhere(), length()))
		case 3:
			do(second(f.WriteAt(nil, somewhere())))
		default:
			at := somewhere()
			if r.IntN(2) == 0 {
				at = cursor
			}
			p := noise[r.IntN(1000):][:min(length(), begin+most-min(at, begin+most))]
			if len(p) == 0 {
				cursor = begin
				continue
			}
			if r.IntN(5) == 0 {
				p = blank[:len(p)]
			}
			do(second(f.WriteAt(p, at)))
			cursor = at + int64(len(p))
		}
	}
	return failed
}

// noise and blank are what is written: random bytes, and zeros.
var noise, blank = func() (noise, blank []byte) {
	noise, blank = make([]byte, 4*groupBytes), make([]byte, 4*groupBytes)
	rand.NewChaCha8([32]byte{}).Read(noise)
	return noise, blank
}()

func second[T any](_ T, err error) error { return err }

func emptyFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// random is a source whose seed is printed, and taken from IMAGE_SEED.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("IMAGE_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("IMAGE_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// wrongs plays so many games and counts those after which the digester is wrong
// about the file.
func wrongs(t *testing.T, r *rand.Rand, games int, skip string, fails bool) (wrong, failed int) {
	t.Helper()
	f := emptyFile(t)
	for i := range games {
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		d := newDigester(f)
		d.open = d.open[:1+r.IntN(4)] // fewer than there are groups
		n := play(r, &behind{d, skip, fails})
		failed += n
		got, err := d.digest(t.Context())
		if err != nil {
			t.Fatalf("game %d: %v", i, err)
		}
		want, err := digestOf(t.Context(), f)
		if err != nil {
			t.Fatalf("game %d: %v", i, err)
		}
		if st, err := f.Stat(); err != nil {
			t.Fatal(err)
		} else if st.Size() <= 8*groupBytes+3 && i%25 == 0 {
			if naive := verityOf(t, f.Name()); naive != want {
				t.Fatalf("game %d: digestOf gives %s, the documentation %s", i, want, naive)
			}
		}
		if got != want {
			wrong++
		}
	}
	return wrong, failed
}

// Whatever is done to a file, in whatever order, its digester has its digest.
func TestDigester(t *testing.T) {
	games := 2000
	if testing.Short() {
		games = 200
	}
	if wrong, failed := wrongs(t, random(t), games, "", false); wrong > 0 || failed > 0 {
		t.Errorf("%d of %d games end with another digest than the file's; %d operations failed", wrong, games, failed)
	}
}

// And if operations of a kind fail, half done or done.
func TestDigesterFaults(t *testing.T) {
	r := random(t)
	for _, kind := range []string{"write", "punch", "cut", "grow"} {
		wrong, failed := wrongs(t, r, 200, kind, true)
		if wrong > 0 || failed < 50 {
			t.Errorf("%s: %d of 200 games end with another digest than the file's; %d operations failed", kind, wrong, failed)
		}
	}
}

// It must learn of each kind of operation; of growth there is nothing to learn.
func TestDigesterMustSee(t *testing.T) {
	r := random(t)
	for kind, most := range map[string]int{"write": 200, "punch": 200, "cut": 200, "grow": 0} {
		wrong, failed := wrongs(t, r, 200, kind, false)
		if failed > 0 || most == 0 && wrong > 0 || most > 0 && wrong < 10 {
			t.Errorf("%s, unseen: %d of 200 games end with another digest than the file's; %d operations failed", kind, wrong, failed)
		}
	}
}

// What there is to remember is bounded, and what is not remembered is read
// again: more groups than can be open are each written in two halves.
func TestDigesterGroups(t *testing.T) {
	f := emptyFile(t)
	d := newDigester(f)
	half := make([]byte, groupBytes/2)
	rand.NewChaCha8([32]byte{}).Read(half)
	states := func() (n [4]int) {
		for _, page := range d.pages {
			for _, state := range page.states {
				n[state]++
			}
		}
		return n
	}
	write := func(from, to, at int64) {
		t.Helper()
		for group := from; group < to; group++ {
			if _, err := d.WriteAt(half, group*groupBytes+at); err != nil {
				t.Fatal(err)
			}
		}
	}
	steps := []struct {
		name string
		do   func()
		want [4]int // zero, open, hashed, lost
	}{
		{"as many as may be open", func() { write(0, openGroups, 0) }, [4]int{pageGroups - openGroups, openGroups, 0, 0}},
		{"their other halves", func() { write(0, openGroups, groupBytes/2) }, [4]int{pageGroups - openGroups, openGroups, 0, 0}},
		{"and one more", func() { write(openGroups, openGroups+1, 0) }, [4]int{pageGroups - openGroups - 1, openGroups, 1, 0}},
		{"part of a closed one", func() { write(0, 1, 0) }, [4]int{pageGroups - openGroups - 1, openGroups, 0, 1}},
		{"all of it, in two", func() { write(0, 1, 0); write(0, 1, groupBytes/2) }, [4]int{pageGroups - openGroups - 1, openGroups, 0, 1}},
		{"all of it, in one", func() {
			if _, err := d.WriteAt(append(half, half...), 0); err != nil {
				t.Fatal(err)
			}
		}, [4]int{pageGroups - openGroups - 1, openGroups, 1, 0}},
		{"a hole in place of four", func() {
			if err := d.PunchHole(0, 4*groupBytes); err != nil {
				t.Fatal(err)
			}
		}, [4]int{pageGroups - openGroups + 3, openGroups - 3, 0, 0}},
		{"cut to one and a half", func() {
			if err := d.Truncate(5*groupBytes + groupBytes/2); err != nil {
				t.Fatal(err)
			}
		}, [4]int{pageGroups - 2, 2, 0, 0}},
		{"emptied", func() {
			if err := d.Truncate(0); err != nil {
				t.Fatal(err)
			}
		}, [4]int{pageGroups, 0, 0, 0}},
	}
	for _, step := range steps {
		step.do()
		if got := states(); got != step.want {
			t.Errorf("%s: %v groups are zero, open, hashed and lost, want %v", step.name, got, step.want)
		}
	}
	if got, err := d.digest(t.Context()); err != nil || got != verityOf(t, f.Name()) {
		t.Errorf("%s, %v", got, err)
	}
}

// What is known is not read again: open groups and closed ones are changed
// behind the digester, which does not see it.
func TestDigesterReadsNothing(t *testing.T) {
	f := emptyFile(t)
	d := newDigester(f)
	const groups = openGroups + 2
	for at := int64(0); at < groups*groupBytes; at += groupBytes {
		if _, err := d.WriteAt(noise[:groupBytes], at); err != nil {
			t.Fatal(err)
		}
	}
	want := verityOf(t, f.Name())
	for at := int64(0); at < groups*groupBytes; at += groupBytes {
		if _, err := f.WriteAt([]byte{^noise[0]}, at); err != nil {
			t.Fatal(err)
		}
	}
	if verityOf(t, f.Name()) == want {
		t.Fatal("the file is as it was")
	}
	if got, err := d.digest(t.Context()); err != nil || got != want {
		t.Errorf("%s, %v, what was written has %s", got, err, want)
	}
}

// A file whose content goes is as small as a bare file would be: the holes are
// made, not written.
func TestDigesterPunches(t *testing.T) {
	f := emptyFile(t)
	d := newDigester(f)
	w, err := ext4.NewWriter(d, ext4.Options{})
	if err != nil {
		t.Fatal(err)
	}
	place := func(n int64) *ext4.Content {
		c, err := w.Place(io.LimitReader(rand.NewChaCha8([32]byte{}), n), n)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	w.Discard(place(16 << 20))
	// What is behind it keeps the file from being cut there.
	if err := w.Add("kept", &ext4.Inode{Mode: modeRegular | 0o644, Content: place(10_000)}); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(ext4.Params{SizeBytes: 64 << 20, UUID: [16]byte{1}}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes are left of content that was discarded", st.Blocks*512)
	}
	if got, err := d.digest(t.Context()); err != nil || got != fsverityOf(t, f.Name()) {
		t.Errorf("%s, %v", got, err)
	}
	clean(t, f.Name())
}
