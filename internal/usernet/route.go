package usernet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Route is how the host's kernel would send to an address.
type Route int

const (
	RouteNone      Route = iota // it would not: no route, or one that refuses
	RouteLocal                  // to itself
	RouteOnLink                 // to a network it is on
	RouteGateway                // through a gateway, or the other end of a tunnel
	RouteBroadcast              // to many
)

const (
	routeTimeout    = 2 * time.Second
	maxNetlinkBytes = 16 << 10
	// leadsOutBits: a route without a gateway over a link without neighbours
	// is the way out, not a network, when its prefix is that short: tunnels
	// take all addresses as one /0 or as two /1.
	leadsOutBits = 1
	rtaNextHopID = 30 // RTA_NH_ID of linux/rtnetlink.h
)

// routeOf asks the kernel, as rtnetlink(7) says. What cannot be learned is
// RouteNone with an error.
func routeOf(addr netip.Addr) (Route, error) {
	r, err := askRoute(addr, unix.RTM_F_FIB_MATCH)
	if errors.Is(err, errElsewhere) {
		r, err = askRoute(addr, 0)
	}
	if err != nil && !refuses(err) {
		return RouteNone, fmt.Errorf("route to %v: %w", addr, err)
	}
	return r, nil
}

// errElsewhere: the route points to a next hop object and does not show it.
var errElsewhere = errors.New("netlink: a next hop object")

func askRoute(addr netip.Addr, flags uint32) (Route, error) {
	reply, err := netlink(routeRequest(addr, flags))
	if err != nil {
		return RouteNone, err
	}
	return judgeRoute(reply, flags&unix.RTM_F_FIB_MATCH != 0, pointToPoint)
}

// refuses are the answers of a kernel that would not send there.
func refuses(err error) bool {
	for _, e := range []error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EAFNOSUPPORT, unix.EADDRNOTAVAIL} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// routeRequest is RTM_GETROUTE for one address. With RTM_F_FIB_MATCH the answer
// is the route that matched, with all its hops, and else what follows from it.
func routeRequest(addr netip.Addr, flags uint32) []byte {
	family, raw := byte(unix.AF_INET6), addr.AsSlice()
	if addr.Is4() {
		family = unix.AF_INET
	}
	b := make([]byte, unix.SizeofNlMsghdr+unix.SizeofRtMsg, 64)
	binary.NativeEndian.PutUint16(b[4:], unix.RTM_GETROUTE)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(b[8:], 1)
	b[16], b[17] = family, byte(len(raw)*8)
	binary.NativeEndian.PutUint32(b[24:], unix.RTM_F_LOOKUP_TABLE|flags)
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(raw)))
	b = binary.NativeEndian.AppendUint16(b, unix.RTA_DST)
	b = append(b, raw...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// netlink asks once and returns the body of the answer, after its header.
func netlink(request []byte) ([]byte, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	limit := unix.NsecToTimeval(routeTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return nil, err
	}
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	b := make([]byte, maxNetlinkBytes)
	var n int
	for {
		n, _, err = unix.Recvfrom(fd, b, 0)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	return netlinkBody(b[:n])
}

func netlinkBody(b []byte) ([]byte, error) {
	if len(b) < unix.SizeofNlMsghdr+4 {
		return nil, errors.New("netlink: a short answer")
	}
	size := binary.NativeEndian.Uint32(b)
	if uint64(size) > uint64(len(b)) || size < unix.SizeofNlMsghdr+4 {
		return nil, errors.New("netlink: a wrong length")
	}
	body := b[unix.SizeofNlMsghdr:size]
	switch binary.NativeEndian.Uint16(b[4:]) {
	case unix.NLMSG_ERROR:
		if code := int32(binary.NativeEndian.Uint32(body)); code < 0 {
			return nil, unix.Errno(-code)
		}
		return nil, errors.New("netlink: an empty answer")
	case unix.RTM_NEWROUTE:
		return body, nil
	}
	return nil, fmt.Errorf("netlink: message type %d", binary.NativeEndian.Uint16(b[4:]))
}

// judgeRoute reads an rtmsg and its attributes; matched as askRoute asked.
func judgeRoute(b []byte, matched bool, pointToPoint func(link int) bool) (Route, error) {
	if len(b) < unix.SizeofRtMsg {
		return RouteNone, errors.New("netlink: a short route")
	}
	bits, kind := b[1], b[7]
	link, gateway, elsewhere := 0, false, false
	for attrs := b[unix.SizeofRtMsg:]; len(attrs) >= unix.SizeofRtAttr; {
		size := int(binary.NativeEndian.Uint16(attrs))
		if size < unix.SizeofRtAttr || size > len(attrs) {
			return RouteNone, errors.New("netlink: a wrong attribute")
		}
		body := attrs[unix.SizeofRtAttr:size]
		switch binary.NativeEndian.Uint16(attrs[2:]) {
		case unix.RTA_GATEWAY, unix.RTA_VIA:
			gateway = true
		case unix.RTA_MULTIPATH:
			gateway = multipathGateways(body)
		case rtaNextHopID:
			elsewhere = true
		case unix.RTA_OIF:
			if len(body) == 4 {
				link = int(binary.NativeEndian.Uint32(body))
			}
		}
		attrs = attrs[min(len(attrs), (size+3)&^3):]
	}
	switch kind {
	case unix.RTN_LOCAL, unix.RTN_ANYCAST:
		return RouteLocal, nil
	case unix.RTN_BROADCAST, unix.RTN_MULTICAST:
		return RouteBroadcast, nil
	case unix.RTN_UNICAST:
		if elsewhere && !gateway && matched {
			return RouteNone, errElsewhere
		}
		if gateway || bits <= leadsOutBits && link != 0 && pointToPoint(link) {
			return RouteGateway, nil
		}
		return RouteOnLink, nil
	}
	return RouteNone, nil
}

// multipathGateways says whether every next hop of a list of struct rtnexthop
// has a gateway: the kernel may take any of them.
func multipathGateways(b []byte) bool {
	hops := 0
	for len(b) >= unix.SizeofRtNexthop {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtNexthop || size > len(b) {
			return false
		}
		found := false
		for attrs := b[unix.SizeofRtNexthop:size]; len(attrs) >= unix.SizeofRtAttr; {
			n := int(binary.NativeEndian.Uint16(attrs))
			if n < unix.SizeofRtAttr || n > len(attrs) {
				return false
			}
			kind := binary.NativeEndian.Uint16(attrs[2:])
			found = found || kind == unix.RTA_GATEWAY || kind == unix.RTA_VIA
			attrs = attrs[min(len(attrs), (n+3)&^3):]
		}
		if !found {
			return false
		}
		hops++
		b = b[min(len(b), (size+3)&^3):]
	}
	return hops > 0
}

// pointToPoint says whether a link has one other end and no neighbours to ask
// for: a tunnel or a dialled line.
func pointToPoint(link int) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	// SIOCGIFNAME takes the index where SIOCGIFFLAGS gives the flags.
	var ifr struct {
		name  [unix.IFNAMSIZ]byte
		value uint32
		_     [20]byte
	}
	ifr.value = uint32(link)
	for _, request := range []uintptr{unix.SIOCGIFNAME, unix.SIOCGIFFLAGS} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&ifr))); errno != 0 {
			return false
		}
	}
	return uint16(ifr.value)&unix.IFF_POINTOPOINT != 0
}
