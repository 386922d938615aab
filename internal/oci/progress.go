package oci

import (
	"sync"
	"time"
)

// Progress is one report of work under way.
type Progress struct {
	Stage      string // "resolve", "fetch" or "build"
	Subject    string // what is worked on; may hold untrusted text
	DoneBytes  int64
	TotalBytes int64 // 0 if it is not known
}

// reportInterval keeps reports to ten a second.
const reportInterval = 100 * time.Millisecond

// progress limits the rate of reports. A new stage is always reported.
type progress struct {
	mu    sync.Mutex
	to    func(Progress)
	stage string
	next  time.Time
}

func newProgress(to func(Progress)) *progress { return &progress{to: to} }

func (p *progress) report(stage, subject string, done, total int64) {
	if p == nil || p.to == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if stage == p.stage && now.Before(p.next) && (total == 0 || done < total) {
		return
	}
	p.stage, p.next = stage, now.Add(reportInterval)
	p.to(Progress{Stage: stage, Subject: subject, DoneBytes: done, TotalBytes: total})
}
