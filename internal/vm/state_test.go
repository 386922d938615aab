package vm

import (
	"math/rand/v2"
	"testing"
	"time"

	"banger"
)

var (
	states = []banger.State{
		banger.StateCreated, banger.StateStarting, banger.StateRunning, banger.StatePaused,
		banger.StateStopping, banger.StateStopped, banger.StateFailed, banger.StateDeleting,
	}
	events   = []event{evStart, evBooted, evPaused, evResumed, evStop, evExited, evFailed, evDelete, evReboot}
	requests = []Request{RequestStart, RequestStop, RequestKill, RequestPause, RequestResume, RequestExec, RequestDelete}
)

// The diagram again, as a table of every state and every event, written by
// hand: a change of the code must be made here too.
func TestNext(t *testing.T) {
	table := map[banger.State][9]banger.State{
		//                start,        booted,      paused,    resumed,     stop,         exited,      failed,    delete,     reboot
		"created":  {"starting", "", "", "", "", "", "", "deleting", ""},
		"starting": {"", "running", "", "", "stopping", "", "failed", "", ""},
		"running":  {"", "", "paused", "", "stopping", "stopped", "failed", "", "starting"},
		"paused":   {"", "", "", "running", "stopping", "", "failed", "", ""},
		"stopping": {"", "", "", "", "", "stopped", "failed", "", ""},
		"stopped":  {"starting", "", "", "", "", "", "", "deleting", ""},
		"failed":   {"starting", "", "", "", "", "", "", "deleting", ""},
		"deleting": {},
	}
	for _, s := range append(states, "", "no state") {
		for i, e := range events {
			want := table[s][i]
			got, err := next(s, e)
			if (err == nil) != (want != "") {
				t.Errorf("%s + %s: %v, want %q", s, e, err, want)
			} else if want == "" && got != s || want != "" && got != want {
				t.Errorf("%s + %s = %s, want %q", s, e, got, want)
			}
		}
		if got, err := next(s, "no event"); err == nil || got != s {
			t.Errorf("%s took an event that is none", s)
		}
	}
}

func TestAccept(t *testing.T) {
	accepted := map[Request][]banger.State{
		RequestStart:  {"created", "stopped", "failed"},
		RequestStop:   {"created", "starting", "running", "paused", "stopping", "stopped", "failed"},
		RequestKill:   {"created", "starting", "running", "paused", "stopping", "stopped", "failed"},
		RequestPause:  {"running"},
		RequestResume: {"paused"},
		RequestExec:   {"running"},
		RequestDelete: {"created", "stopped", "failed"},
	}
	for _, r := range requests {
		want := map[banger.State]bool{}
		for _, s := range accepted[r] {
			want[s] = true
		}
		for _, s := range states {
			if accept(s, r) != want[s] {
				t.Errorf("%s in %s: %v", r, s, !want[s])
			}
		}
	}
	for _, s := range states {
		if accept(s, "no request") {
			t.Errorf("%s accepts a request that is none", s)
		}
	}
}

// What is accepted can be done: the event of a request has an edge from every
// state that accepts it, but for a stop that has nothing to do.
func TestAcceptedCanBeDone(t *testing.T) {
	eventOf := map[Request]event{
		RequestStart: evStart, RequestStop: evStop, RequestPause: evPaused, RequestResume: evResumed, RequestDelete: evDelete,
	}
	idle := map[banger.State]bool{banger.StateCreated: true, banger.StateStopping: true, banger.StateStopped: true, banger.StateFailed: true}
	for _, s := range states {
		for r, e := range eventOf {
			_, err := next(s, e)
			switch {
			case r == RequestStop && idle[s]:
				if err == nil {
					t.Errorf("%s has a stop to do after all", s)
				}
			case accept(s, r) != (err == nil):
				t.Errorf("%s in %s: accepted %v, but %v", r, s, accept(s, r), err)
			}
		}
	}
}

// Random lives: whatever comes in whatever order, these hold.
func TestLives(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	hasProcess := map[banger.State]bool{
		banger.StateStarting: true, banger.StateRunning: true, banger.StatePaused: true, banger.StateStopping: true,
	}
	for range 5_000 {
		s := banger.StateCreated
		started := false // since it last had no process
		for range 30 {
			e := events[rng.IntN(len(events))]
			to, err := next(s, e)
			if err != nil {
				if to != s {
					t.Fatalf("%s refused %s and went to %s", s, e, to)
				}
				continue
			}
			switch {
			case s == banger.StateDeleting:
				t.Fatalf("%s led out of deleting", e)
			case to == banger.StateRunning && !started:
				t.Fatalf("%s + %s: running without a start", s, e)
			case hasProcess[to] && !hasProcess[s] && e != evStart:
				t.Fatalf("%s + %s: a process from nowhere", s, e)
			case to == banger.StateDeleting && hasProcess[s]:
				t.Fatalf("%s + %s: deleted under a process", s, e)
			case to == banger.StateCreated:
				t.Fatalf("%s + %s: created twice", s, e)
			}
			started = hasProcess[to]
			s = to
		}
	}
}

// An owner that dies leaves a VM at rest, whatever it was at; nothing that was
// at rest changes.
func TestSettle(t *testing.T) {
	for s, want := range map[banger.State]banger.State{
		"created": "created", "starting": "failed", "running": "failed", "paused": "failed",
		"stopping": "stopped", "stopped": "stopped", "failed": "failed", "deleting": "deleting",
	} {
		if got := settle(s); got != want {
			t.Errorf("%s settles as %s, want %s", s, got, want)
		}
		if s != banger.StateDeleting && !Rests(settle(s)) {
			t.Errorf("%s does not come to rest", s)
		}
		if Rests(s) != accept(s, RequestDelete) {
			t.Errorf("%s rests: %v, and may be deleted: %v", s, Rests(s), !Rests(s))
		}
	}
}
