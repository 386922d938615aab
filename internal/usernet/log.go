package usernet

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"banger"
)

// maxDenials bounds the log of one VM; the oldest gives way.
const maxDenials = 512

// A Denial is one entry of the log.
type Denial = banger.Denial

type denialKey struct {
	proto, reason, names string
	to                   netip.AddrPort
	from                 netip.Addr
}

// A denialLog is a bounded list of denials, oldest first by First.
type denialLog struct {
	mu   sync.Mutex
	list []*Denial
	at   map[denialKey]*Denial
}

func (l *denialLog) add(now time.Time, d Denial) {
	key := denialKey{d.Proto, d.Reason, strings.Join(d.Names, ","), d.To, d.From}
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.at[key]; old != nil {
		old.Last = now
		old.Count++
		return
	}
	if len(l.list) == maxDenials {
		first := l.list[0]
		delete(l.at, denialKey{first.Proto, first.Reason, strings.Join(first.Names, ","), first.To, first.From})
		l.list = slices.Delete(l.list, 0, 1)
	}
	d.First, d.Last, d.Count = now, now, 1
	if l.at == nil {
		l.at = make(map[denialKey]*Denial)
	}
	l.at[key] = &d
	l.list = append(l.list, &d)
}

func (l *denialLog) all() []Denial {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Denial, 0, len(l.list))
	for _, d := range l.list {
		out = append(out, *d)
	}
	return out
}
