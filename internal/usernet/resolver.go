package usernet

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	resolvConf         = "/etc/resolv.conf"
	maxResolvConfBytes = 64 << 10
	maxNameServers     = 3 // resolv.conf(5)
	maxSearchDomains   = 6
	resolverTryTimeout = 3 * time.Second
	resolverTries      = 2
)

func randomID() uint16 {
	var b [2]byte
	rand.Read(b[:]) // never fails
	return binary.BigEndian.Uint16(b[:])
}

// A hostResolver asks the servers of the host's resolv.conf(5), in turn.
type hostResolver struct {
	path string

	mu      sync.Mutex
	read    time.Time // modification time of what was read
	servers []string
}

// HostResolver is the Resolver that asks whom the host's programs ask. It
// notices when the host moves to another network.
func HostResolver() Resolver { return &hostResolver{path: resolvConf} }

// HostSearch are the host's own search domains.
func HostSearch() []string {
	conf, err := readResolvConf(resolvConf)
	if err != nil {
		return nil
	}
	return conf.search
}

type resolvConfig struct {
	servers []string // host:port
	search  []string
}

func readResolvConf(path string) (resolvConfig, error) {
	f, err := os.Open(path)
	if err != nil {
		return resolvConfig{}, err
	}
	defer f.Close()
	return parseResolvConf(io.LimitReader(f, maxResolvConfBytes)), nil
}

// parseResolvConf takes what it understands, as resolvers do. Without a server
// it is the one on the host itself.
func parseResolvConf(r io.Reader) (c resolvConfig) {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if addr, err := netip.ParseAddr(f[1]); err == nil && len(c.servers) < maxNameServers {
				c.servers = append(c.servers, netip.AddrPortFrom(addr, dnsPort).String())
			}
		case "search", "domain":
			c.search = nil
			for _, name := range f[1:] {
				name = strings.ToLower(strings.TrimSuffix(name, "."))
				if validName(name) && len(c.search) < maxSearchDomains {
					c.search = append(c.search, name)
				}
			}
		}
	}
	if len(c.servers) == 0 {
		c.servers = []string{net.JoinHostPort("127.0.0.1", fmt.Sprint(dnsPort))}
	}
	return c
}

func (h *hostResolver) list() ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	st, err := os.Stat(h.path)
	if err != nil {
		return nil, fmt.Errorf("resolver: %w", err)
	}
	if h.servers == nil || !st.ModTime().Equal(h.read) {
		conf, err := readResolvConf(h.path)
		if err != nil {
			return nil, fmt.Errorf("resolver: %w", err)
		}
		h.servers, h.read = conf.servers, st.ModTime()
	}
	return h.servers, nil
}

// Exchange implements Resolver: UDP first, TCP for what does not fit.
func (h *hostResolver) Exchange(ctx context.Context, query []byte) ([]byte, error) {
	servers, err := h.list()
	if err != nil {
		return nil, err
	}
	var last error
	for range resolverTries {
		for _, server := range servers {
			out, err := exchange(ctx, "udp", server, query)
			if err == nil && out[2]&2 != 0 { // truncated
				out, err = exchange(ctx, "tcp", server, query)
			}
			if err == nil {
				return out, nil
			}
			last = err
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
		}
	}
	return nil, fmt.Errorf("resolver: %w", last)
}

// exchange asks one server once.
func exchange(ctx context.Context, network, server string, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, resolverTryTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "tcp" {
		if _, err := c.Write(binary.BigEndian.AppendUint16(nil, uint16(len(query)))); err != nil {
			return nil, err
		}
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	if network == "tcp" {
		var head [2]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return nil, err
		}
		out := make([]byte, binary.BigEndian.Uint16(head[:]))
		if len(out) < 12 {
			return nil, errors.New("a short answer")
		}
		_, err := io.ReadFull(c, out)
		return out, err
	}
	// The socket is connected, so only the server's datagrams come; one that
	// answers another question is left, and not taken for the end.
	b := make([]byte, maxDNSBytes)
	for {
		n, err := c.Read(b)
		if err != nil {
			return nil, err
		}
		if n >= 12 && b[0] == query[0] && b[1] == query[1] && b[2]&0x80 != 0 {
			return b[:n], nil
		}
	}
}
