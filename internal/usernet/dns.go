package usernet

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	dnsPort = 53
	// hostName is the gateway's name, by which --allow-host ports are reached.
	hostName = "host"

	maxDNSBytes     = 65535
	plainDNSBytes   = 512  // the most over UDP without EDNS (RFC 1035 4.2.1)
	maxDNSUDPBytes  = 4096 // the most that is sent over UDP to whoever asks for more
	maxDNSQueries   = 128  // under way at once, for one VM
	maxDNSConns     = 16   // TCP connections of one VM to the server
	dnsIdle         = 10 * time.Second
	dnsTimeout      = 12 * time.Second
	maxAnswers      = 4096 // addresses remembered for one VM
	maxNamesOf      = 8    // names remembered for one address
	answerGrace     = 10 * time.Minute
	maxAnswerTTL    = 24 * time.Hour
	localAnswerTTLs = 5 // seconds: a VM comes and goes
)

// A Resolver answers DNS messages as the host would. The query is one that we
// built; the answer is a message of any size up to 64 KiB.
type Resolver interface {
	Exchange(ctx context.Context, query []byte) ([]byte, error)
}

// answers remembers which addresses were answered for which names, so that a
// rule for a name can be kept at the dial.
type answers struct {
	mu     sync.Mutex
	byAddr map[netip.Addr][]answer
}

type answer struct {
	name    string
	expires time.Time
}

// add remembers that name has addr. Programs hold on to an address for a while
// after its time is over, so it counts longer.
func (a *answers) add(now time.Time, name string, addr netip.Addr, ttl time.Duration) {
	expires := now.Add(min(max(ttl, 0), maxAnswerTTL) + answerGrace)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byAddr == nil {
		a.byAddr = make(map[netip.Addr][]answer)
	}
	list := slices.DeleteFunc(a.byAddr[addr], func(x answer) bool { return x.name == name || !x.expires.After(now) })
	if len(list) == maxNamesOf {
		list = slices.Delete(list, 0, 1)
	}
	if _, ok := a.byAddr[addr]; !ok && len(a.byAddr) >= maxAnswers {
		a.makeRoom(now)
	}
	a.byAddr[addr] = append(list, answer{name, expires})
}

// makeRoom forgets what is over, or else what is over first.
func (a *answers) makeRoom(now time.Time) {
	var oldest netip.Addr
	var when time.Time
	for addr, list := range a.byAddr {
		last := list[len(list)-1].expires
		if !last.After(now) {
			delete(a.byAddr, addr)
		} else if when.IsZero() || last.Before(when) {
			oldest, when = addr, last
		}
	}
	if len(a.byAddr) >= maxAnswers {
		delete(a.byAddr, oldest)
	}
}

// names are those that addr was answered for.
func (a *answers) names(now time.Time, addr netip.Addr) (out []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range a.byAddr[addr] {
		if x.expires.After(now) {
			out = append(out, x.name)
		}
	}
	return out
}

// A query is a question that a guest may ask, understood.
type query struct {
	id       uint16
	question dnsmessage.Question
	name     string // of the question, in lower case, without the dot at the end
	edns     bool
	dnssec   bool // the DO bit
	udpBytes int  // the longest answer over UDP
	recurse  bool
}

var (
	errNotQuery = errors.New("dns: no query")
	errRefused  = errors.New("dns: a query of another kind")
)

// parseQuery reads a message from a guest. errNotQuery means no answer at all;
// after errRefused q has what an answer needs.
func parseQuery(b []byte) (q query, err error) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || h.Response {
		return q, errNotQuery
	}
	q.id, q.recurse, q.udpBytes = h.ID, h.RecursionDesired, plainDNSBytes
	questions, err := p.AllQuestions()
	if err != nil {
		return q, errNotQuery
	}
	if h.OpCode != 0 || len(questions) != 1 || questions[0].Class != dnsmessage.ClassINET {
		return q, errRefused
	}
	q.question = questions[0]
	q.name = strings.ToLower(strings.TrimSuffix(q.question.Name.String(), "."))
	if p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return q, errNotQuery
	}
	for {
		r, err := p.AdditionalHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return q, nil
		}
		if err != nil || p.SkipAdditional() != nil {
			return q, errNotQuery
		}
		if r.Type == dnsmessage.TypeOPT && !q.edns {
			q.edns, q.dnssec = true, r.DNSSECAllowed()
			q.udpBytes = min(max(int(r.Class), plainDNSBytes), maxDNSUDPBytes)
		}
	}
}

// reply builds an answer of ours. rcode and resources are all that differs.
func (q query) reply(rcode dnsmessage.RCode, truncated bool, addrs []netip.Addr, ptr string) []byte {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: q.id, Response: true, RCode: rcode, Truncated: truncated,
		RecursionDesired: q.recurse, RecursionAvailable: true})
	b.EnableCompression()
	if q.question.Type != 0 {
		_ = b.StartQuestions()
		_ = b.Question(q.question)
	}
	_ = b.StartAnswers()
	h := dnsmessage.ResourceHeader{Name: q.question.Name, Class: dnsmessage.ClassINET, TTL: localAnswerTTLs}
	for _, a := range addrs {
		if a.Is4() && q.question.Type == dnsmessage.TypeA {
			_ = b.AResource(h, dnsmessage.AResource{A: a.As4()})
		} else if a.Is6() && q.question.Type == dnsmessage.TypeAAAA {
			_ = b.AAAAResource(h, dnsmessage.AAAAResource{AAAA: a.As16()})
		}
	}
	if name, err := dnsmessage.NewName(ptr); ptr != "" && err == nil && q.question.Type == dnsmessage.TypePTR {
		_ = b.PTRResource(h, dnsmessage.PTRResource{PTR: name})
	}
	if q.edns {
		_ = b.StartAdditionals()
		var opt dnsmessage.ResourceHeader
		if opt.SetEDNS0(maxDNSUDPBytes, dnsmessage.RCodeSuccess, q.dnssec) == nil {
			_ = b.OPTResource(opt, dnsmessage.OPTResource{})
		}
	}
	out, err := b.Finish()
	if err != nil {
		return nil
	}
	return out
}

// forward builds the query for the host's resolver: nothing of the guest's
// bytes but the question goes there.
func (q query) forward(id uint16) ([]byte, error) {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q.question); err != nil {
		return nil, err
	}
	if q.edns {
		if err := b.StartAdditionals(); err != nil {
			return nil, err
		}
		var opt dnsmessage.ResourceHeader
		if err := opt.SetEDNS0(maxDNSUDPBytes, dnsmessage.RCodeSuccess, q.dnssec); err != nil {
			return nil, err
		}
		if err := b.OPTResource(opt, dnsmessage.OPTResource{}); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

// A found is an address in an answer.
type found struct {
	addr netip.Addr
	ttl  time.Duration
}

// readAnswer checks that b answers the question and returns the addresses in it.
func (q query) readAnswer(b []byte, id uint16) ([]found, error) {
	var p dnsmessage.Parser
	h, err := p.Start(b)
	if err != nil || !h.Response || h.ID != id {
		return nil, errors.New("dns: the resolver's answer is none to the question")
	}
	questions, err := p.AllQuestions()
	if err != nil || len(questions) != 1 || questions[0].Type != q.question.Type || questions[0].Class != q.question.Class ||
		!strings.EqualFold(questions[0].Name.String(), q.question.Name.String()) {
		return nil, errors.New("dns: the resolver answers another question")
	}
	var out []found
	for {
		r, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		ttl := time.Duration(r.TTL) * time.Second
		switch r.Type {
		case dnsmessage.TypeA:
			a, err := p.AResource()
			if err != nil {
				return nil, err
			}
			out = append(out, found{netip.AddrFrom4(a.A), ttl})
		case dnsmessage.TypeAAAA:
			a, err := p.AAAAResource()
			if err != nil {
				return nil, err
			}
			out = append(out, found{netip.AddrFrom16(a.AAAA).Unmap(), ttl})
		default:
			if err := p.SkipAnswer(); err != nil {
				return nil, err
			}
		}
	}
}

// answerDNS answers one message from the guest; nil is no answer.
func (n *Network) answerDNS(ctx context.Context, message []byte, overUDP bool) []byte {
	q, err := parseQuery(message)
	switch {
	case errors.Is(err, errNotQuery):
		return nil
	case err != nil:
		return q.reply(dnsmessage.RCodeNotImplemented, false, nil, "")
	}
	if out := n.answerLocally(q); out != nil {
		return out
	}
	if !n.policy.allowsName(q.name) {
		names, flag := []string{"(a name that is no host name)"}, ""
		if validName(q.name) {
			names = []string{q.name}
			flag = "--net " + n.policy.with(netip.Addr{}, 0, names, kindPublic).String()
		}
		n.deny(Denial{Proto: "dns", Names: names, Reason: "a name that is not in the list of what is allowed", Flag: flag})
		return q.reply(dnsmessage.RCodeRefused, false, nil, "")
	}
	id := randomID()
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	forward, err := q.forward(id)
	if err != nil {
		return q.reply(dnsmessage.RCodeFormatError, false, nil, "")
	}
	out, err := n.resolver.Exchange(ctx, forward)
	if err != nil {
		return q.reply(dnsmessage.RCodeServerFailure, false, nil, "")
	}
	addrs, err := q.readAnswer(out, id)
	if err != nil {
		return q.reply(dnsmessage.RCodeServerFailure, false, nil, "")
	}
	if validName(q.name) {
		for _, a := range addrs {
			n.answers.add(n.now(), q.name, a.addr, a.ttl)
		}
	}
	if overUDP && len(out) > q.udpBytes {
		return q.reply(dnsmessage.RCodeSuccess, true, nil, "")
	}
	out = slices.Clone(out)
	out[0], out[1] = byte(q.id>>8), byte(q.id)
	return out
}

// answerLocally answers what is ours to know: names below banger, localhost
// (RFC 6761) and the way back from VMs' addresses. It returns nil for the rest.
func (n *Network) answerLocally(q query) []byte {
	if q.name == "localhost" || strings.HasSuffix(q.name, ".localhost") {
		return q.reply(dnsmessage.RCodeSuccess, false, []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, "")
	}
	if name, ok := strings.CutSuffix(q.name, "."+Domain); ok {
		if addrs := n.addressesOf(name); addrs != nil {
			return q.reply(dnsmessage.RCodeSuccess, false, addrs, "")
		}
		return q.reply(dnsmessage.RCodeNameError, false, nil, "")
	}
	if q.name == Domain {
		return q.reply(dnsmessage.RCodeSuccess, false, nil, "")
	}
	if addr, ok := reverseName(q.name); ok && (vmBlock4.Contains(addr) || vmBlock6.Contains(addr)) {
		if name := n.nameOf(addr); name != "" {
			return q.reply(dnsmessage.RCodeSuccess, false, nil, name+"."+Domain+".")
		}
		return q.reply(dnsmessage.RCodeNameError, false, nil, "")
	}
	return nil
}

// reverseName reads the address out of a name in in-addr.arpa or ip6.arpa
// (RFC 1035 3.5, RFC 3596 2.5).
func reverseName(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(rest, ".")
		slices.Reverse(parts)
		a, err := netip.ParseAddr(strings.Join(parts, "."))
		return a, err == nil && a.Is4()
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var text []byte
	for i := 62; i >= 0; i -= 2 {
		text = append(text, rest[i])
		if len(text)%5 == 4 && i > 0 {
			text = append(text, ':')
		}
	}
	a, err := netip.ParseAddr(string(text))
	return a, err == nil && strings.Count(rest, ".") == 31
}

// serveDNSConn answers the queries of one TCP connection, each after a length
// (RFC 1035 4.2.2), until it is idle.
func (n *Network) serveDNSConn(ctx context.Context, c net.Conn) {
	defer c.Close()
	var head [2]byte
	for {
		_ = c.SetDeadline(time.Now().Add(dnsIdle))
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		message := make([]byte, int(head[0])<<8|int(head[1]))
		if _, err := io.ReadFull(c, message); err != nil {
			return
		}
		out := n.answerDNS(ctx, message, false)
		if out == nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(dnsIdle))
		if _, err := c.Write(append([]byte{byte(len(out) >> 8), byte(len(out))}, out...)); err != nil {
			return
		}
	}
}
