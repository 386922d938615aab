package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// head is a length as it stands before a message, or behind a frame's type.
func head(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func TestMessageRoundTrip(t *testing.T) {
	for _, want := range []Request{
		{},
		{Version: Version, Token: "t", Op: OpExec, Exec: &Exec{
			Args: []string{"sh", "-c", "echo \"\x01\u2028\""}, Env: []string{"A=b=c"}, Dir: "/", User: "1:2",
			TTY: &Window{Rows: 1, Cols: 65535}, Stdin: true,
		}},
		{Version: Version, Op: OpShutdown, Shutdown: &Shutdown{GraceMs: 1 << 40}},
	} {
		var buf bytes.Buffer
		if err := WriteMessage(&buf, want); err != nil {
			t.Fatal(err)
		}
		var got Request
		// One byte at a time: a transport may split anywhere.
		if err := ReadMessage(iotest.OneByteReader(&buf), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
	}
}

func TestMessageLimits(t *testing.T) {
	quoted := func(n int) string { return strings.Repeat("a", n-2) } // and two quotes
	for _, c := range []struct {
		name string
		text string
		ok   bool
	}{
		{"largest", quoted(MaxMessageBytes), true},
		{"one more", quoted(MaxMessageBytes + 1), false},
	} {
		var buf bytes.Buffer
		err := WriteMessage(&buf, c.text)
		if (err == nil) != c.ok || !c.ok && buf.Len() > 0 {
			t.Errorf("write, %s: %v, %d bytes written", c.name, err, buf.Len())
		}
		data, _ := json.Marshal(c.text)
		var got string
		err = ReadMessage(io.MultiReader(bytes.NewReader(head(uint32(len(data)))), bytes.NewReader(data)), &got)
		if (err == nil) != c.ok || c.ok && got != c.text {
			t.Errorf("read, %s: %v", c.name, err)
		}
	}
	for _, c := range []struct {
		name string
		data []byte
		want error
	}{
		{"closed between messages", nil, io.EOF},
		{"closed in the length", head(2)[:3], io.ErrUnexpectedEOF},
		{"closed after the length", head(2), io.ErrUnexpectedEOF},
		{"closed in the text", append(head(2), '{'), io.ErrUnexpectedEOF},
	} {
		var v any
		if err := ReadMessage(bytes.NewReader(c.data), &v); err != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	var v Request
	for _, text := range []string{"", "{", "[]", `{"version":"1"}`, strings.Repeat("[", 100000)} {
		if ReadMessage(bytes.NewReader(append(head(uint32(len(text))), text...)), &v) == nil {
			t.Errorf("%.20q: no error", text)
		}
	}
}

func TestFrameLimits(t *testing.T) {
	for _, n := range []int{0, 1, MaxFrameBytes, MaxFrameBytes + 1} {
		var buf bytes.Buffer
		payload := bytes.Repeat([]byte{7}, n)
		err := WriteFrame(&buf, FrameStdout, payload)
		if n > MaxFrameBytes {
			if err == nil || buf.Len() > 0 {
				t.Errorf("a frame of %d bytes: %v, %d bytes written", n, err, buf.Len())
			}
			buf.Write(append(append([]byte{byte(FrameStdout)}, head(uint32(n))...), payload...))
		} else if err != nil {
			t.Error(err)
		}
		for _, space := range []int{0, MaxFrameBytes} {
			f, err := ReadFrame(bytes.NewReader(buf.Bytes()), make([]byte, space))
			if (err == nil) != (n <= MaxFrameBytes) || err == nil && (f.Type != FrameStdout || !bytes.Equal(f.Payload, payload)) {
				t.Errorf("%d bytes into a buffer of %d: %v", n, space, err)
			}
		}
	}
	whole := append([]byte{1}, append(head(2), 'a', 'b')...)
	for i := range whole {
		_, err := ReadFrame(bytes.NewReader(whole[:i]), nil)
		want := io.ErrUnexpectedEOF
		if i == 0 {
			want = io.EOF
		}
		if err != want {
			t.Errorf("cut at %d: %v, want %v", i, err, want)
		}
	}
}

// TestRefusedBeforeAllocation: a length that lies costs the reader nothing.
func TestRefusedBeforeAllocation(t *testing.T) {
	const rounds, most = 64, 1 << 10
	measure := func(read func(r io.Reader)) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range rounds {
			read(bytes.NewReader(append([]byte{1}, head(1<<32-1)...)))
		}
		runtime.ReadMemStats(&after)
		return (after.TotalAlloc - before.TotalAlloc) / rounds
	}
	if n := measure(func(r io.Reader) {
		if _, err := ReadFrame(r, nil); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error("frame:", err)
		}
	}); n > most {
		t.Errorf("frame: %d bytes allocated", n)
	}
	if n := measure(func(r io.Reader) {
		var v any
		r.Read(make([]byte, 1))
		if err := ReadMessage(r, &v); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error("message:", err)
		}
	}); n > most {
		t.Errorf("message: %d bytes allocated", n)
	}
	// The measure itself must see an allocation.
	if n := measure(func(io.Reader) { sink = make([]byte, MaxFrameBytes) }); n < MaxFrameBytes {
		t.Errorf("the measure sees %d bytes of %d", n, MaxFrameBytes)
	}
}

var sink []byte

func TestHandshake(t *testing.T) {
	for _, c := range []struct {
		name        string
		toHost, toG string // what an earlier peer left on the way
	}{
		{"clean", "", ""},
		{"junk", "old\x00frames", "GET / HTTP/1.1\r\n"},
		{"half a magic first", "banger-guest", "banger-hbanger-host"},
		{"an old answer", "banger-guest/1\n0123456789abcdef", ""},
	} {
		host, guest := net.Pipe()
		host.SetDeadline(time.Now().Add(5 * time.Second))
		guest.SetDeadline(time.Now().Add(5 * time.Second))
		done := make(chan error, 1)
		go func() {
			err := HandshakeGuest(struct {
				io.Reader
				io.Writer
			}{io.MultiReader(strings.NewReader(c.toG), guest), guest})
			if err == nil {
				_, err = guest.Write([]byte("next"))
			}
			done <- err
		}()
		r := struct {
			io.Reader
			io.Writer
		}{io.MultiReader(strings.NewReader(c.toHost), host), host}
		if err := HandshakeHost(r, [NonceBytes]byte{1, 2, 3}); err != nil {
			t.Errorf("%s: host: %v", c.name, err)
		}
		// Not a byte of what follows was taken.
		next := make([]byte, 4)
		if _, err := io.ReadFull(r, next); err != nil || string(next) != "next" {
			t.Errorf("%s: after it: %q %v", c.name, next, err)
		}
		if err := <-done; err != nil {
			t.Errorf("%s: guest: %v", c.name, err)
		}
		host.Close()
		guest.Close()
	}
}

// TestHandshakeNever: a peer that talks and never says the word is left.
func TestHandshakeNever(t *testing.T) {
	endless := &countingReader{}
	err := HandshakeGuest(struct {
		io.Reader
		io.Writer
	}{endless, io.Discard})
	if !errors.Is(err, errNoHandshake) || endless.n != maxHandshakeJunk {
		t.Errorf("%v after %d bytes, the limit is %d", err, endless.n, maxHandshakeJunk)
	}
	for _, short := range []string{"", "banger-host/1", "banger-host/1\n0123456789abcde"} {
		err := HandshakeGuest(struct {
			io.Reader
			io.Writer
		}{strings.NewReader(short), io.Discard})
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q: %v", short, err)
		}
	}
}

type countingReader struct{ n int }

func (c *countingReader) Read(p []byte) (int, error) {
	clear(p)
	c.n += len(p)
	return len(p), nil
}

func FuzzReadMessage(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(head(2), "{}"...))
	f.Add(append(head(1<<32-1), "{}"...))
	f.Add(append(head(MaxMessageBytes+1), "{}"...))
	var buf bytes.Buffer
	WriteMessage(&buf, Request{Version: Version, Op: OpExec, Exec: &Exec{Args: []string{"a"}, TTY: &Window{}}})
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		var req Request
		if err := ReadMessage(bytes.NewReader(data), &req); err != nil {
			return
		}
		var again bytes.Buffer
		if err := WriteMessage(&again, req); err != nil {
			return // escapes can make it longer than it was
		}
		var second Request
		if err := ReadMessage(&again, &second); err != nil || !reflect.DeepEqual(nilled(req), nilled(second)) {
			t.Errorf("%+v came back as %+v, %v", req, second, err)
		}
	})
}

// nilled makes an empty list and none the same, as omitempty does.
func nilled(r Request) Request {
	if r.Exec != nil {
		e := *r.Exec
		if len(e.Env) == 0 {
			e.Env = nil
		}
		r.Exec = &e
	}
	return r
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{1, 0, 0, 0, 1, 'x'})
	f.Add([]byte{4, 0, 0, 0, 0, 7, 0, 0, 0, 2, '{', '}'})
	f.Add(append([]byte{255}, head(MaxFrameBytes+1)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		buf := make([]byte, 16)
		var out bytes.Buffer
		for {
			frame, err := ReadFrame(r, buf)
			if err != nil {
				break
			}
			if err := WriteFrame(&out, frame.Type, frame.Payload); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(data, out.Bytes()) {
			t.Errorf("%x came back as %x", data, out.Bytes())
		}
	})
}

func FuzzHandshake(f *testing.F) {
	f.Add([]byte("banger-host/1\n0123456789abcdefrest"))
	f.Add([]byte("banger-guest/1\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		var answer bytes.Buffer
		err := HandshakeGuest(struct {
			io.Reader
			io.Writer
		}{r, &answer})
		at := bytes.Index(data, hostMagic)
		if whole := at >= 0 && len(data)-at >= len(hostMagic)+NonceBytes; whole != (err == nil) {
			t.Fatalf("%q: %v", data, err)
		} else if whole {
			end := at + len(hostMagic) + NonceBytes
			if want := append(bytes.Clone(guestMagic), data[end-NonceBytes:end]...); !bytes.Equal(answer.Bytes(), want) || r.Len() != len(data)-end {
				t.Errorf("%q: answer %q, %d bytes left", data, answer.Bytes(), r.Len())
			}
		}
	})
}
