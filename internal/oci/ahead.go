package oci

import "io"

// ahead reads in a goroutine of its own, so that a blob is fetched and hashed
// while what came before is inflated.
type ahead struct {
	free chan []byte
	full chan chunk
	step func(n int) // told of what is consumed

	cur chunk
	at  int
	n   int64 // consumed
}

// newAhead starts to read r, which nobody else may touch until stop returned.
func newAhead(r io.Reader, step func(n int)) *ahead {
	a := &ahead{free: make(chan []byte, aheadCount), full: make(chan chunk, aheadCount), step: step}
	for range aheadCount {
		a.free <- make([]byte, aheadBytes)
	}
	go a.run(r)
	return a
}

func (a *ahead) run(r io.Reader) {
	defer close(a.full)
	for buf := range a.free {
		n, err := r.Read(buf)
		a.full <- chunk{buf: buf, n: n, last: err != nil, err: err}
		if err != nil {
			return
		}
	}
}

func (a *ahead) Read(p []byte) (int, error) {
	for a.at == a.cur.n {
		if a.cur.last {
			return 0, a.cur.err
		}
		a.next()
	}
	n := copy(p, a.cur.buf[a.at:a.cur.n])
	a.consume(n)
	return n, nil
}

func (a *ahead) consume(n int) {
	a.at += n
	a.n += int64(n)
	a.step(n)
}

// next gives the buffer back and takes the one that follows.
func (a *ahead) next() {
	if a.cur.buf != nil {
		a.free <- a.cur.buf
	}
	a.cur, a.at = <-a.full, 0
}

// stop consumes the rest, up to the end of what is read or its error.
func (a *ahead) stop() {
	for a.consume(a.cur.n - a.at); !a.cur.last; a.consume(a.cur.n) {
		a.next()
	}
}
