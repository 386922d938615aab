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
	changed chan struct{} // holds one token once something was added

	mu   sync.Mutex
	list []*Denial
	at   map[denialKey]*Denial
}

// newDenialLog makes a log that goes on from an earlier one.
func newDenialLog(earlier []Denial) *denialLog {
	l := &denialLog{changed: make(chan struct{}, 1), at: make(map[denialKey]*Denial)}
	for _, d := range earlier {
		l.put(d)
	}
	return l
}

func keyOf(d Denial) denialKey {
	return denialKey{d.Proto, d.Reason, strings.Join(d.Names, ","), d.To, d.From}
}

func (l *denialLog) add(now time.Time, d Denial) {
	d.First, d.Last, d.Count = now, now, 1
	l.put(d)
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// put adds a denial, or counts it with an equal one.
func (l *denialLog) put(d Denial) {
	key := keyOf(d)
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.at[key]; old != nil {
		old.Last = d.Last
		old.Count += d.Count
		return
	}
	if len(l.list) == maxDenials {
		delete(l.at, keyOf(*l.list[0]))
		l.list = slices.Delete(l.list, 0, 1)
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
