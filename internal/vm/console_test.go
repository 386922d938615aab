package vm

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/internal/wire"
)

// text is n bytes, no two neighbourhoods alike.
func text(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%d,", i)
	}
	return b.Bytes()[:n]
}

func TestConsoleKeepsTheEnd(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, limit := range []int{1, 2, 7, 64, 1000} {
		for _, n := range []int{0, 1, limit - 1, limit, limit + 1, 2*limit - 1, 2 * limit, 3 * limit, 3*limit + 1} {
			whole := text(n)
			for round := range 20 {
				c := NewConsole(limit)
				for rest := whole; len(rest) > 0; {
					k := 1 + rng.IntN(min(len(rest), 1+rng.IntN(2*limit)))
					if round == 0 {
						k = len(rest) // in one piece
					}
					piece := bytes.Clone(rest[:k])
					if got, err := c.Write(piece); got != k || err != nil {
						t.Fatalf("wrote %d of %d, %v", got, k, err)
					}
					clear(piece) // it was the caller's
					rest = rest[k:]
				}
				if got, want := c.Bytes(), whole[max(0, n-limit):]; !bytes.Equal(got, want) {
					t.Fatalf("limit %d, %d bytes: kept %q, want %q", limit, n, got, want)
				}
			}
		}
	}
}

func TestConsoleBytesAreACopy(t *testing.T) {
	for _, n := range []int{3, 4, 5} {
		c := NewConsole(4)
		c.Write(text(n))
		want := c.Bytes()
		clear(c.Bytes())
		if got := c.Bytes(); !bytes.Equal(got, want) {
			t.Errorf("%d bytes: changed from outside: %q", n, got)
		}
	}
}

func up(c *Console) bool {
	select {
	case <-c.KernelUp():
		return true
	default:
		return false
	}
}

// The line is found wherever the pieces are cut, at most twice, and in a
// console that keeps less than the line.
func TestReadyLineInPieces(t *testing.T) {
	for _, limit := range []int{1, consoleTailBytes} {
		for i := range len(wire.ReadyLine) + 1 {
			for j := i; j <= len(wire.ReadyLine); j++ {
				c := NewConsole(limit)
				c.Write([]byte("banger-vsock-agent: first process" + strings.Repeat("x", j)))
				for _, piece := range []string{wire.ReadyLine[:i], wire.ReadyLine[i:j], wire.ReadyLine[j:]} {
					if up(c) {
						t.Fatalf("cut at %d and %d: seen too early", i, j)
					}
					c.Write([]byte(piece))
					if piece != "" && strings.HasSuffix(wire.ReadyLine, piece) && up(c) {
						break
					}
				}
				if !up(c) {
					t.Fatalf("cut at %d and %d: not seen", i, j)
				}
				c.Write([]byte(wire.ReadyLine)) // again: no panic
			}
		}
	}
	c := NewConsole(100)
	for _, b := range []byte(strings.Repeat(wire.ReadyLine[:len(wire.ReadyLine)-1]+"!", 50)) {
		c.Write([]byte{b})
	}
	if up(c) {
		t.Error("seen though it never was there whole")
	}
	if n := len(c.tail); n > len(wire.ReadyLine) {
		t.Errorf("%d bytes are kept to find a line of %d", n, len(wire.ReadyLine))
	}
	c.Write([]byte(wire.ReadyLine))
	c.expectKernel()
	if up(c) {
		t.Error("a new start is up before it began")
	}
	c.Write([]byte(wire.ReadyLine))
	if !up(c) {
		t.Error("the second start was not seen")
	}
}

func TestLastLines(t *testing.T) {
	for _, c := range []struct {
		name, text string
		n          int
		want       []string
	}{
		{"nothing", "", 5, nil},
		{"no line end", "abc", 5, []string{"abc"}},
		{"empty lines", "\n\r\n \t\na\n\n", 5, []string{"a"}},
		{"just as many", "a\nb\n", 2, []string{"a", "b"}},
		{"one too many", "a\nb\nc", 2, []string{"b", "c"}},
		{"none asked", "a\nb", 0, nil},
		{"carriage returns", "a\r\nb  \r\n", 5, []string{"a", "b"}},
		{"a line of 500", strings.Repeat("x", 500), 1, []string{strings.Repeat("x", 500)}},
		{"a line of 501", strings.Repeat("x", 501), 1, []string{strings.Repeat("x", 500)}},
		{"a line of 1 MiB", "first\n" + strings.Repeat("x", 1<<20), 5, []string{strings.Repeat("x", 500)}},
		{"a line of 1 MiB, then another", strings.Repeat("x", 1<<20) + "\nlast\n", 5, []string{strings.Repeat("x", 500), "last"}},
		{"a million line ends", strings.Repeat("\n", 1<<20) + "last", 5, []string{"last"}},
		{"control characters are kept", "\x1b[2J\x00\xff", 1, []string{"\x1b[2J\x00\xff"}},
	} {
		con := NewConsole(4 << 20)
		con.Write([]byte(c.text))
		if got := con.LastLines(c.n); !slices.Equal(got, c.want) {
			t.Errorf("%s: %.80q", c.name, got)
		}
	}
}

func TestConsoleMemory(t *testing.T) {
	c := NewConsole(1 << 20)
	if cap(c.buf) != 0 {
		t.Errorf("%d bytes before anything was written", cap(c.buf))
	}
	for range 100 {
		c.Write(make([]byte, 64<<10))
	}
	if len(c.buf) != 1<<20 || cap(c.buf) > 2<<20 {
		t.Errorf("%d bytes in use, %d held", len(c.buf), cap(c.buf))
	}
}

func TestConsoleConcurrent(t *testing.T) {
	c := NewConsole(100)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				c.Write([]byte(wire.ReadyLine + "\n"))
				c.Bytes()
				c.LastLines(3)
				<-c.KernelUp()
			}
		})
	}
	wg.Wait()
}
