package vm

import (
	"fmt"

	"banger"
)

// An event is something that happened to a VM, or that its owner decided.
type event string

const (
	evStart   event = "start"   // disks are there, the VMM is about to be spawned
	evBooted  event = "booted"  // the network stage was reached
	evPaused  event = "paused"  // the VMM holds the guest
	evResumed event = "resumed" // the VMM runs it again
	evStop    event = "stop"    // the guest is being asked to power off
	evExited  event = "exited"  // the VMM is gone, as was asked or as the guest asked
	evFailed  event = "failed"  // boot ended early, or the VMM or the supervisor went away unasked
	evReboot  event = "reboot"  // the guest asked for a reset: the VMM ended and is spawned again
	evDelete  event = "delete"  // its files are being removed
)

// The life of a VM:
//
//	          start              booted             pause
//	created ────────▶ starting ──────────▶ running ◀──────▶ paused
//	   │               │  │ ▲               │ │ │  resume    │ │
//	   │          stop │  │ │ start    stop │ │ │ exited     │ │
//	   │               ▼  │ │               │ │ │            │ │
//	   │         stopping◀┼─┼───────────────┘ │ │            │ │
//	   │          │     ▲ │ │                 │ │    stop    │ │
//	   │   exited │     └─┼─┼─────────────────┼─┼────────────┘ │
//	   │          ▼       │ │                 │ │              │
//	   │        stopped ──┼─┘◀────────────────┼─┘              │
//	   │          │       │                   │                │
//	   │          │       └─────▶ failed ◀────┴────────────────┘
//	   │ delete   │ delete          │ delete; start tries again
//	   └──────────┴─────▶ deleting ◀┘
//
// reboot leads from running back to starting; it is left out of the picture.
//
// created and stopped hold disks and nothing else. starting, running, paused
// and stopping hold a VMM process too. failed holds disks and a reason; the
// VMM is gone. stopping that fails is failed as well. deleting is last: after
// it the VM does not exist.
var transitions = map[banger.State]map[event]banger.State{
	banger.StateCreated: {
		evStart:  banger.StateStarting,
		evDelete: banger.StateDeleting,
	},
	banger.StateStarting: {
		evBooted: banger.StateRunning,
		evStop:   banger.StateStopping,
		evFailed: banger.StateFailed,
	},
	banger.StateRunning: {
		evPaused: banger.StatePaused,
		evStop:   banger.StateStopping,
		evExited: banger.StateStopped,
		evFailed: banger.StateFailed,
		evReboot: banger.StateStarting,
	},
	banger.StatePaused: {
		evResumed: banger.StateRunning,
		evStop:    banger.StateStopping,
		evFailed:  banger.StateFailed,
	},
	banger.StateStopping: {
		evExited: banger.StateStopped,
		evFailed: banger.StateFailed,
	},
	banger.StateStopped: {
		evStart:  banger.StateStarting,
		evDelete: banger.StateDeleting,
	},
	banger.StateFailed: {
		evStart:  banger.StateStarting,
		evDelete: banger.StateDeleting,
	},
	banger.StateDeleting: {},
}

// next is the whole policy: the state that event leads to, or a refusal. It
// has no lock, no clock and does no I/O.
func next(s banger.State, e event) (banger.State, error) {
	if to, ok := transitions[s][e]; ok {
		return to, nil
	}
	return s, fmt.Errorf("a VM that is %s takes no %s", s, e)
}

// A Request is what an owner of a VM may ask for.
type Request string

const (
	RequestStart  Request = "start"
	RequestStop   Request = "stop"
	RequestKill   Request = "kill"
	RequestPause  Request = "pause"
	RequestResume Request = "resume"
	RequestExec   Request = "exec"
	RequestDelete Request = "delete"
)

// accept decides whether a request is taken up in a state. Stop beats start:
// a VM that is starting takes a stop and no second start. A stop of what is
// stopped already is accepted and does nothing, so that stopping twice is no
// error.
func accept(s banger.State, r Request) bool {
	switch r {
	case RequestStart:
		return s == banger.StateCreated || s == banger.StateStopped || s == banger.StateFailed
	case RequestStop, RequestKill:
		return s != banger.StateDeleting
	case RequestPause, RequestExec:
		return s == banger.StateRunning
	case RequestResume:
		return s == banger.StatePaused
	case RequestDelete:
		return s == banger.StateCreated || s == banger.StateStopped || s == banger.StateFailed
	}
	return false
}

// Accept is the policy for requests, for who owns the records.
func Accept(s banger.State, r Request) bool { return accept(s, r) }

// Rests says whether a VM in that state holds disks and no process.
func Rests(s banger.State) bool {
	return s == banger.StateCreated || s == banger.StateStopped || s == banger.StateFailed
}

// settle is the state of a VM whose owner is gone, and with it the VMM: what
// it was at is finished where the end was what was wanted, and has failed
// where not.
func settle(s banger.State) banger.State {
	e := evFailed
	if s == banger.StateStopping {
		e = evExited
	}
	if to, err := next(s, e); err == nil {
		return to
	}
	return s
}
