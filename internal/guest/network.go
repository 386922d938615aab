package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

const (
	// cardTimeout is how long the kernel may take to find the card.
	cardTimeout = 10 * time.Second
	// maxNetlinkBytes holds the kernel's answer to one request.
	maxNetlinkBytes = 16 << 10
	netlinkTimeout  = 5 * time.Second

	// hostsMark ends the line that is ours in /etc/hosts.
	hostsMark = "# banger"
)

// configureNetwork sets the card up as the host says: everything that is in
// the guest finds its network there.
func (b *boot) configureNetwork() error {
	n := b.config.Network
	if n == nil {
		return nil
	}
	link, err := findCard(n.MAC, cardTimeout)
	if err != nil {
		return fmt.Errorf("network card: %w", err)
	}
	if err := configureCard(link, n); err != nil {
		return fmt.Errorf("network card %s: %w", link.Name, err)
	}
	return nil
}

// findCard waits for the network card with that MAC.
func findCard(mac string, limit time.Duration) (net.Interface, error) {
	want, err := net.ParseMAC(mac)
	if err != nil {
		return net.Interface{}, err
	}
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		links, err := net.Interfaces()
		if err != nil {
			return net.Interface{}, err
		}
		for _, l := range links {
			if bytes.Equal(l.HardwareAddr, want) {
				return l, nil
			}
		}
		if time.Now().After(end) {
			return net.Interface{}, fmt.Errorf("none with the address %s (is the kernel without virtio_net? `banger kernel pull` brings one that has it)", mac)
		}
	}
}

// configureCard gives a card its MTU, addresses and routes (rtnetlink(7)).
func configureCard(link net.Interface, n *wire.Network) error {
	nl, err := openNetlink()
	if err != nil {
		return err
	}
	defer unix.Close(nl.fd)
	if err := nl.setUp(link.Index, n.MTU); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	for _, text := range n.Addresses {
		p, err := netip.ParsePrefix(text)
		if err == nil {
			err = nl.addAddress(link.Index, p)
		}
		if err != nil {
			return fmt.Errorf("address %q: %w", text, err)
		}
	}
	for _, text := range n.Gateways {
		a, err := netip.ParseAddr(text)
		if err == nil {
			err = nl.addDefaultRoute(link.Index, a)
		}
		if err != nil {
			return fmt.Errorf("gateway %q: %w", text, err)
		}
	}
	return nil
}

// A netlinkSocket asks the kernel one thing after the other.
type netlinkSocket struct {
	fd       int
	sequence uint32
}

func openNetlink() (*netlinkSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	limit := unix.NsecToTimeval(netlinkTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("netlink: %w", err)
	}
	return &netlinkSocket{fd: fd}, nil
}

// ask sends a request and waits for its acknowledgement.
func (n *netlinkSocket) ask(kind, flags uint16, body []byte) error {
	n.sequence++
	b := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body))
	binary.NativeEndian.PutUint32(b, uint32(unix.SizeofNlMsghdr+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	binary.NativeEndian.PutUint32(b[8:], n.sequence)
	if err := unix.Sendto(n.fd, append(b, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, maxNetlinkBytes)
	for {
		size, _, err := unix.Recvfrom(n.fd, answer, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if size < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint32(answer[8:]) != n.sequence {
			continue
		}
		if binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
			return errors.New("netlink: no acknowledgement")
		}
		if code := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); code != 0 {
			return unix.Errno(-code)
		}
		return nil
	}
}

// attribute appends a struct rtattr with its padding.
func attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (n *netlinkSocket) setUp(link, mtu int) error {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(link))
	binary.NativeEndian.PutUint32(b[8:], unix.IFF_UP)
	binary.NativeEndian.PutUint32(b[12:], unix.IFF_UP)
	if mtu > 0 {
		b = attribute(b, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(mtu)))
	}
	return n.ask(unix.RTM_NEWLINK, 0, b)
}

func (n *netlinkSocket) addAddress(link int, p netip.Prefix) error {
	b := make([]byte, unix.SizeofIfAddrmsg)
	b[0], b[1] = family(p.Addr()), byte(p.Bits())
	binary.NativeEndian.PutUint32(b[4:], uint32(link))
	if p.Addr().Is4() {
		b = attribute(b, unix.IFA_LOCAL, p.Addr().AsSlice())
	} else {
		// Nobody else is on the link: there is nothing to wait for.
		b[2] = unix.IFA_F_NODAD
	}
	b = attribute(b, unix.IFA_ADDRESS, p.Addr().AsSlice())
	return n.ask(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b)
}

func (n *netlinkSocket) addDefaultRoute(link int, gateway netip.Addr) error {
	b := make([]byte, unix.SizeofRtMsg)
	b[0], b[4], b[5], b[6], b[7] = family(gateway), unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	b = attribute(b, unix.RTA_GATEWAY, gateway.AsSlice())
	b = attribute(b, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(link)))
	return n.ask(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b)
}

// nameNetwork writes resolv.conf(5). A link of systemd-resolved's is replaced
// by a file: resolved then reads it for whom to ask, and so do all others.
func (b *boot) nameNetwork() error {
	if b.config.Network == nil {
		return nil
	}
	return keepFile("/etc/resolv.conf", resolvConf(b.config.Network))
}

func resolvConf(n *wire.Network) string {
	var text strings.Builder
	if len(n.Search) > 0 {
		fmt.Fprintf(&text, "search %s\n", strings.Join(n.Search, " "))
	}
	for _, a := range n.DNS {
		fmt.Fprintf(&text, "nameserver %s\n", a)
	}
	return text.String()
}

// hostsAddress is what the guest's own name stands for in /etc/hosts, and its
// full name where it has a domain.
func hostsAddress(name string, n *wire.Network) (address, names string) {
	if n == nil || len(n.Addresses) == 0 {
		return "127.0.1.1", name
	}
	address, _, _ = strings.Cut(n.Addresses[0], "/")
	if len(n.Search) > 0 && !strings.Contains(name, ".") {
		return address, name + "." + n.Search[0] + " " + name
	}
	return address, name
}

// nameSelf sees to it that the guest's own name has an address in /etc/hosts,
// whatever else the image says there.
func (b *boot) nameSelf(name string) error {
	const path = "/etc/hosts"
	data, err := readBounded(path, maxEtcFileBytes)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		complain(err) // the image's own affair, as before
		return nil
	}
	address, names := hostsAddress(name, b.config.Network)
	text := withOwnName(string(data), name, address, names)
	if text == string(data) {
		return nil
	}
	return replaceFile(path, []byte(text), 0o644)
}

// withOwnName returns hosts(5) with the line that is ours, in place of an
// earlier one. Where the image gives the name an address itself, that stays.
func withOwnName(hosts, name, address, names string) string {
	if strings.TrimSpace(hosts) == "" {
		hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	}
	var out strings.Builder
	known := name == "localhost"
	for line := range strings.Lines(hosts) {
		if strings.HasSuffix(strings.TrimSpace(line), hostsMark) {
			continue
		}
		out.WriteString(line)
		entry, _, _ := strings.Cut(line, "#")
		for i, field := range strings.Fields(entry) {
			known = known || i > 0 && strings.EqualFold(field, name)
		}
	}
	if known {
		return out.String()
	}
	if text := out.String(); text != "" && !strings.HasSuffix(text, "\n") {
		out.WriteString("\n")
	}
	fmt.Fprintf(&out, "%s\t%s %s\n", address, names, hostsMark)
	return out.String()
}
