package proxy

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReadSOCKS(t *testing.T) {
	const greeting = "\x01\x00"
	long := strings.Repeat("x", 255)
	for _, c := range []struct {
		name, in string
		host     string
		port     uint16
		reply    int // of a *socksError; -1 for errNoMethod, -2 for a stream that breaks off
	}{
		{"a name", greeting + "\x05\x01\x00\x03\x0aweb.banger\x1f\x90", "web.banger", 8080, 0},
		{"the longest name", greeting + "\x05\x01\x00\x03\xff" + long + "\x00\x00", long, 0, 0},
		{"the shortest name", greeting + "\x05\x01\x00\x03\x00\xff\xff", "", 65535, 0},
		{"a hostile name", greeting + "\x05\x01\x00\x03\x03\x1b\x00\n\x00\x01", "\x1b\x00\n", 1, 0},
		{"IPv4", greeting + "\x05\x01\x00\x01\x0a\x57\x00\x06\x00\x50", "10.87.0.6", 80, 0},
		{"IPv6", greeting + "\x05\x01\x00\x04\xfd\x62\x61\x6e\x67\x65\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x50", "fd62:616e:6765:1::2", 80, 0},
		{"many methods", "\xff" + strings.Repeat("\x02", 254) + "\x00" + "\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", "127.0.0.1", 80, 0},
		{"no methods", "\x00" + "\x05\x01\x00\x01", "", 0, -1},
		{"passwords only", "\x01\x02" + "\x05\x01\x00\x01", "", 0, -1},
		{"BIND", greeting + "\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50", "", 0, replyCommandUnsupported},
		{"UDP ASSOCIATE", greeting + "\x05\x03\x00\x01\x7f\x00\x00\x01\x00\x50", "", 0, replyCommandUnsupported},
		{"address type 2", greeting + "\x05\x01\x00\x02\x00", "", 0, replyAddressUnsupported},
		{"version 4", greeting + "\x04\x01\x00\x01\x7f\x00\x00\x01\x00\x50", "", 0, replyFailure},
		{"reserved", greeting + "\x05\x01\x01\x01\x7f\x00\x00\x01\x00\x50", "", 0, replyFailure},
		{"half a greeting", "\x02\x00", "", 0, -2},
		{"half a name", greeting + "\x05\x01\x00\x03\x0aweb", "", 0, -2},
		{"half a port", greeting + "\x05\x01\x00\x01\x7f\x00\x00\x01\x00", "", 0, -2},
	} {
		const next = "SSH-2.0"
		r := strings.NewReader(c.in + next)
		if c.reply == -2 {
			r = strings.NewReader(c.in)
		}
		host, port, err := readSOCKS(iotest.OneByteReader(r), io.Discard)
		var e *socksError
		switch {
		case c.reply == -1 && errors.Is(err, errNoMethod):
		case c.reply == -2 && (err == io.EOF || err == io.ErrUnexpectedEOF):
		case c.reply > 0 && errors.As(err, &e) && int(e.reply) == c.reply:
		case c.reply == 0 && err == nil && host == c.host && port == c.port:
			if rest, _ := io.ReadAll(r); string(rest) != next {
				t.Errorf("%s: it left %q to be read", c.name, rest)
			}
		default:
			t.Errorf("%s: %q, %d, %v", c.name, host, port, err)
		}
	}
}

// Whatever comes, little of it is read and what is accepted is what was asked.
func FuzzSOCKS(f *testing.F) {
	for _, s := range []string{
		"\x01\x00\x05\x01\x00\x03\x0aweb.banger\x1f\x90", "\x01\x00\x05\x01\x00\x01\x0a\x57\x00\x06\x00\x50rest",
		"\x01\x00\x05\x01\x00\x04\xfd\x62\x61\x6e\x67\x65\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x50", "\x00", "\x01\x02\x05", "\xff",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		var out bytes.Buffer
		host, port, err := readSOCKS(r, &out)
		read := in[:len(in)-r.Len()]
		if len(read) > 1+255+4+1+255+2 || out.Len() > 2 {
			t.Fatalf("%d bytes read, %d written", len(read), out.Len())
		}
		if err != nil {
			return
		}
		want := append([]byte{}, read[:1+int(read[0])]...)
		want = append(want, 5, 1, 0)
		switch read[len(want)] {
		case addressDomain:
			want = append(append(want, addressDomain, byte(len(host))), host...)
		case addressIPv4:
			want = append(append(want, addressIPv4), netip.MustParseAddr(host).AsSlice()...)
		case addressIPv6:
			want = append(append(want, addressIPv6), netip.MustParseAddr(host).AsSlice()...)
		}
		want = append(want, byte(port>>8), byte(port))
		if !bytes.Equal(read, want) {
			t.Fatalf("%q port %d was read from %x", host, port, read)
		}
	})
}
