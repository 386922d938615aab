package vm

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"banger"
	"banger/internal/wire"
)

// maxProcessName is how much of a process's name is kept; Linux has 15 bytes.
const maxProcessName = 64

// Listeners asks the guest what waits for peers there. Equal ones are one; more
// says that there are some beyond wire.MaxSockets. What the guest answers is
// checked for its form and believed no further.
func (v *VM) Listeners(ctx context.Context) (list []banger.Listener, more bool, err error) {
	if s := v.State(); !accept(s, RequestExec) {
		return nil, false, banger.Errorf(banger.CodeConflict, "VM %s: it is %s, so it cannot be asked", v.id, s)
	}
	conn, reply, err := v.ask(ctx, wire.Request{Op: wire.OpSockets})
	if err != nil {
		return nil, false, err
	}
	conn.Close()
	if reply.Sockets == nil {
		return nil, false, fmt.Errorf("agent: %s: it names none, and not that there are none", wire.OpSockets)
	}
	sockets, more := reply.Sockets.List, reply.Sockets.More
	if len(sockets) > wire.MaxSockets {
		sockets, more = sockets[:wire.MaxSockets], true
	}
	list = make([]banger.Listener, 0, len(sockets))
	for _, s := range sockets {
		if s.Proto != "tcp" && s.Proto != "udp" || !s.Local.IsValid() || s.Local.Addr().Zone() != "" || s.Local.Port() == 0 || s.PID < 0 {
			return nil, false, fmt.Errorf("agent: %s: %.20q at %.80q of process %d is none", wire.OpSockets, s.Proto, s.Local.String(), s.PID)
		}
		name := s.Process
		if len(name) > maxProcessName {
			name = strings.ToValidUTF8(name[:maxProcessName], "")
		}
		list = append(list, banger.Listener{Protocol: s.Proto, Addr: s.Local.Addr().Unmap(), Port: s.Local.Port(), Process: name, PID: s.PID})
	}
	slices.SortFunc(list, func(a, b banger.Listener) int {
		return cmp.Or(strings.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), a.Addr.Compare(b.Addr),
			strings.Compare(a.Process, b.Process), cmp.Compare(a.PID, b.PID))
	})
	// Workers of one program may have a socket each.
	list = slices.CompactFunc(list, func(a, b banger.Listener) bool { a.PID = b.PID; return a == b })
	return list, more, nil
}
