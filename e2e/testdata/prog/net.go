package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The network as programs use it, from either end: the tests run `serve` on
// one side and the others on the other side. Every server speaks the same
// language: a line that says what is wanted, then what that brings.
//
//	down BYTES SEED   sends that many bytes of a stream that the seed gives
//	up                takes bytes to their end, then answers COUNT SHA256
//	echo              sends back what comes; its end when that ends
//	half              sends "first" and its end, then takes bytes to their end,
//	                  which the next client that says `heard` is told

// netMain is prog net ...
func netMain(args []string) {
	var result any
	var err error
	switch {
	case len(args) == 2 && args[0] == "serve":
		err = netServe(args[1])
	case len(args) == 4 && args[0] == "down":
		result, err = netDown(args[1], number(args[2]), number(args[3]))
	case len(args) == 4 && args[0] == "up":
		result, err = netUp(args[1], number(args[2]), number(args[3]))
	case len(args) == 3 && args[0] == "rtt":
		result, err = netRTT(args[1], number(args[2]))
	case len(args) == 4 && args[0] == "connect":
		result, err = netConnect(args[1], number(args[2]), number(args[3]))
	case len(args) == 3 && args[0] == "hold":
		result, err = netHold(args[1], number(args[2]))
	case len(args) == 2 && args[0] == "half":
		result, err = netHalf(args[1])
	case len(args) == 3 && args[0] == "udp":
		result, err = netUDP(args[1], number(args[2]))
	case len(args) == 3 && args[0] == "talk":
		result, err = netTalk(args[1], number(args[2]))
	case len(args) == 2 && args[0] == "lookup":
		result, err = net.LookupHost(args[1])
	default:
		err = fmt.Errorf("net: what is %q", args)
	}
	check(err)
	if result != nil {
		check(json.NewEncoder(os.Stdout).Encode(result))
	}
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	check(err)
	return n
}

// netDeadline ends whatever hangs.
const netDeadline = 2 * time.Minute

// stream is an endless stream of bytes that the seed gives.
func stream(seed int) io.Reader {
	var s [32]byte
	binary.BigEndian.PutUint64(s[:], uint64(seed))
	return rand.NewChaCha8(s)
}

type ended interface{ CloseWrite() error }

// netServe serves TCP and UDP at an address until it is killed.
func netServe(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	// UDP has the same port, which is known now.
	u, err := net.ListenPacket("udp", l.Addr().String())
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := u.ReadFrom(buf)
			if err == nil {
				u.WriteTo(buf[:n], from)
			}
		}
	}()
	fmt.Println("serving", l.Addr())
	heard := make(chan string, 16)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(netDeadline))
			if err := netAnswer(c, heard); err != nil {
				fmt.Fprintln(os.Stderr, c.RemoteAddr(), err)
			}
		}()
	}
}

// readLine reads a short line and nothing that comes after it.
func readLine(r io.Reader) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for len(line) < 100 {
		if _, err := io.ReadFull(r, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return "", errors.New("a long line")
}

func netAnswer(c net.Conn, heard chan string) error {
	line, err := readLine(c)
	if err != nil {
		return err
	}
	words := strings.Fields(line)
	switch {
	case len(words) == 3 && words[0] == "down":
		size, err := strconv.Atoi(words[1])
		if err != nil {
			return err
		}
		seed, err := strconv.Atoi(words[2])
		if err != nil {
			return err
		}
		block := make([]byte, 256<<10)
		src := stream(seed)
		if seed == 0 { // for speed: the same block again and again
			io.ReadFull(src, block)
			src = repeat(block)
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{c}, io.LimitReader(src, int64(size)), block)
		return err
	case line == "up":
		h := sha256.New()
		n, err := io.Copy(h, c)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c, "%d %x\n", n, h.Sum(nil))
		return err
	case line == "sink":
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, make([]byte, 256<<10))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c, "%d %x\n", n, 0)
		return err
	case line == "echo":
		if _, err := io.Copy(c, c); err != nil {
			return err
		}
		return c.(ended).CloseWrite()
	case line == "half":
		if _, err := c.Write([]byte("first")); err != nil {
			return err
		}
		if err := c.(ended).CloseWrite(); err != nil {
			return err
		}
		all, err := io.ReadAll(io.LimitReader(c, 100))
		heard <- string(all)
		return err
	case line == "heard":
		_, err := fmt.Fprintln(c, <-heard)
		return err
	}
	return fmt.Errorf("asked for %q", line)
}

type repeat []byte

func (r repeat) Read(b []byte) (int, error) { return copy(b, r), nil }

func netAsk(addr, line string) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", addr, netDeadline)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(netDeadline))
	if _, err := fmt.Fprintln(c, line); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// A transfer is what netDown and netUp print.
type transfer struct {
	Bytes   int64   `json:"bytes"`
	Equal   bool    `json:"equal"` // the right bytes came
	Seconds float64 `json:"seconds"`
}

func netDown(addr string, size, seed int) (any, error) {
	c, err := netAsk(addr, fmt.Sprintf("down %d %d", size, seed))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	start := time.Now()
	if seed == 0 {
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
		return transfer{n, n == int64(size), time.Since(start).Seconds()}, err
	}
	got, want := sha256.New(), sha256.New()
	n, err := io.Copy(got, c)
	took := time.Since(start).Seconds()
	io.CopyN(want, stream(seed), int64(size))
	return transfer{n, string(got.Sum(nil)) == string(want.Sum(nil)), took}, err
}

func netUp(addr string, size, seed int) (any, error) {
	line := "up"
	if seed == 0 {
		line = "sink"
	}
	c, err := netAsk(addr, line)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	h := sha256.New()
	start := time.Now()
	src, dst := stream(seed), io.MultiWriter(c, h)
	block := make([]byte, 256<<10)
	if seed == 0 {
		io.ReadFull(src, block)
		src, dst = repeat(block), struct{ io.Writer }{c}
	}
	if _, err := io.CopyBuffer(dst, io.LimitReader(src, int64(size)), block); err != nil {
		return nil, err
	}
	if err := c.(ended).CloseWrite(); err != nil {
		return nil, err
	}
	answer, err := readLine(c)
	took := time.Since(start).Seconds()
	if err != nil {
		return nil, err
	}
	count, sum, _ := strings.Cut(answer, " ")
	n, err := strconv.ParseInt(count, 10, 64)
	return transfer{n, n == int64(size) && (seed == 0 || sum == fmt.Sprintf("%x", h.Sum(nil))), took}, err
}

// netRTT is the median of round trips of one byte, in microseconds.
func netRTT(addr string, count int) (any, error) {
	c, err := netAsk(addr, "echo")
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var all []time.Duration
	b := make([]byte, 1)
	for range count {
		start := time.Now()
		if _, err := c.Write(b); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return nil, err
		}
		all = append(all, time.Since(start))
	}
	slices.Sort(all)
	return map[string]float64{"micros": float64(all[len(all)/2].Nanoseconds()) / 1000}, nil
}

// netConnect makes connections that exchange a byte, several at a time, and
// says how many a second.
func netConnect(addr string, count, parallel int) (any, error) {
	var each sync.WaitGroup
	var mu sync.Mutex
	var first error
	left := make(chan struct{}, count)
	for range count {
		left <- struct{}{}
	}
	close(left)
	start := time.Now()
	for range parallel {
		each.Go(func() {
			for range left {
				if err := exchange(addr); err != nil {
					mu.Lock()
					first = err
					mu.Unlock()
					return
				}
			}
		})
	}
	each.Wait()
	return map[string]float64{"per_second": float64(count) / time.Since(start).Seconds()}, first
}

func exchange(addr string) error {
	c, err := netAsk(addr, "echo")
	if err != nil {
		return err
	}
	defer c.Close()
	b := []byte{42}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err = io.ReadFull(c, b)
	return err
}

// netHold opens many connections and then, with all of them open, exchanges a
// byte on each.
func netHold(addr string, count int) (any, error) {
	var all []net.Conn
	for range count {
		c, err := netAsk(addr, "echo")
		if err != nil {
			return nil, fmt.Errorf("after %d: %w", len(all), err)
		}
		all = append(all, c)
	}
	for i, c := range all {
		b := []byte{byte(i)}
		if _, err := c.Write(b); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, b); err != nil || b[0] != byte(i) {
			return nil, fmt.Errorf("connection %d: %v, %v", i, b, err)
		}
	}
	for _, c := range all {
		c.Close()
	}
	return map[string]int{"held": len(all)}, nil
}

// netHalf reads to the end of what the other side sends, and only then sends.
func netHalf(addr string) (any, error) {
	c, err := netAsk(addr, "half")
	if err != nil {
		return nil, err
	}
	all, err := io.ReadAll(c)
	if err != nil || string(all) != "first" {
		return nil, fmt.Errorf("%q, %v", all, err)
	}
	if _, err := c.Write([]byte("after the end")); err != nil {
		return nil, err
	}
	c.Close()
	if c, err = netAsk(addr, "heard"); err != nil {
		return nil, err
	}
	defer c.Close()
	line, err := readLine(c)
	return map[string]string{"heard": line}, err
}

// netUDP sends one datagram of that size until it comes back.
func netUDP(addr string, size int) (any, error) {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	sent, got := make([]byte, size), make([]byte, 64<<10)
	io.ReadFull(stream(size), sent)
	for try := range 5 {
		if _, err = c.Write(sent); err != nil {
			return nil, err
		}
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		var n int
		if n, err = c.Read(got); err == nil {
			return map[string]any{"bytes": n, "equal": string(got[:n]) == string(sent), "tries": try + 1}, nil
		}
	}
	return nil, err
}

// netTalk keeps exchanging for that many seconds, with new connections when
// one breaks, and says how often it had to, and the longest silence.
func netTalk(addr string, seconds int) (any, error) {
	end := time.Now().Add(time.Duration(seconds) * time.Second)
	last, longest := time.Now(), time.Duration(0)
	exchanged, broken, wrong := 0, 0, 0
	for time.Now().Before(end) {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			broken++
			time.Sleep(100 * time.Millisecond)
			continue
		}
		fmt.Fprintln(c, "echo")
		b := make([]byte, 4)
		for n := uint32(1); time.Now().Before(end); n++ {
			c.SetDeadline(time.Now().Add(2 * time.Second))
			binary.BigEndian.PutUint32(b, n)
			if _, err = c.Write(b); err != nil {
				break
			}
			if _, err = io.ReadFull(c, b); err != nil {
				break
			}
			if binary.BigEndian.Uint32(b) != n {
				wrong++
			}
			if exchanged++; exchanged == 1 {
				fmt.Fprintln(os.Stderr, "talking")
			}
			longest = max(longest, time.Since(last))
			last = time.Now()
			time.Sleep(20 * time.Millisecond)
		}
		if err != nil {
			broken++
		}
		c.Close()
	}
	return map[string]any{"exchanged": exchanged, "broken": broken, "wrong": wrong,
		"silent_seconds": longest.Seconds(), "last_seconds": time.Since(last).Seconds()}, nil
}
