package usernet

import (
	"fmt"
	"io"
	"net"
	"testing"
)

// BenchmarkStream moves bytes between the guest and a server beyond the host's
// gateway, beside the same without a network of ours in between. The guest is
// a netstack in this process too, so that both share its time.
func BenchmarkStream(b *testing.B) {
	const size = 32 << 20
	w := newWorld(b)
	block := make([]byte, 64<<10)
	w.wan.serve(b, net.JoinHostPort(inet4, "80"), func(c *net.TCPConn) { // sends
		for sent := 0; sent < size; sent += len(block) {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	})
	w.wan.serve(b, net.JoinHostPort(inet4, "81"), func(c *net.TCPConn) { // receives, and says when it is done
		n, _ := io.Copy(io.Discard, c)
		fmt.Fprintf(c, "%d", n)
	})
	down := func(b *testing.B, c net.Conn) {
		if n, err := io.Copy(io.Discard, c); err != nil || n != size {
			b.Fatalf("%d bytes, %v", n, err)
		}
	}
	up := func(b *testing.B, c net.Conn) {
		for sent := 0; sent < size; sent += len(block) {
			if _, err := c.Write(block); err != nil {
				b.Fatal(err)
			}
		}
		if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			b.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != fmt.Sprint(size) {
			b.Fatalf("%q, %v", got, err)
		}
	}
	run := func(b *testing.B, dial func(string) net.Conn) {
		for _, way := range []struct {
			name, port string
			do         func(*testing.B, net.Conn)
		}{{"down", "80", down}, {"up", "81", up}} {
			b.Run(way.name, func(b *testing.B) {
				b.SetBytes(size)
				for b.Loop() {
					c := dial(net.JoinHostPort(inet4, way.port))
					way.do(b, c)
					c.Close()
				}
			})
		}
	}
	b.Run("direct", func(b *testing.B) {
		run(b, func(to string) net.Conn {
			c, err := net.Dial("tcp", to)
			if err != nil {
				b.Fatal(err)
			}
			return c
		})
	})
	for _, mtu := range []int{1500, DefaultMTU} {
		b.Run(fmt.Sprintf("usernet-%d", mtu), func(b *testing.B) {
			n := newNetwork(b, "one", 0, "", func(c *Config) { c.MTU = mtu })
			g := newGuest(b, n)
			run(b, g.mustDial)
		})
	}
	// Linux at the other end sends as it likes: here its TCP meets ours.
	for _, mtu := range []int{1500, DefaultMTU} {
		b.Run(fmt.Sprintf("linux-%d", mtu), func(b *testing.B) {
			g := newKernelGuest(b, newNetwork(b, "one", 0, "", func(c *Config) { c.MTU = mtu }))
			g.static()
			run(b, func(to string) net.Conn {
				c, err := g.dial("tcp", to)
				if err != nil {
					b.Fatal(err)
				}
				return c
			})
		})
	}
}

// BenchmarkRoundTrip sends a byte to a server beyond the gateway and back.
func BenchmarkRoundTrip(b *testing.B) {
	w := newWorld(b)
	w.wan.serveEcho(b, net.JoinHostPort(inet4, "80"))
	run := func(b *testing.B, c net.Conn, err error) {
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		buf := make([]byte, 1)
		for b.Loop() {
			if _, err := c.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	to := net.JoinHostPort(inet4, "80")
	b.Run("direct", func(b *testing.B) {
		c, err := net.Dial("tcp", to)
		run(b, c, err)
	})
	b.Run("linux", func(b *testing.B) {
		g := newKernelGuest(b, newNetwork(b, "one", 0, ""))
		g.static()
		c, err := g.dial("tcp", to)
		run(b, c, err)
	})
}
