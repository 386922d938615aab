package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"banger"
	"banger/internal/api"
	"banger/internal/usernet"
	"banger/internal/vm"
)

// parsePorts reads ports as -p takes them.
func parsePorts(texts []string) (list []usernet.Forward, err error) {
	for _, text := range texts {
		f, err := usernet.ParseForward(text)
		if err != nil {
			return nil, err
		}
		list = append(list, f)
	}
	return list, nil
}

// addPorts is a list of ports with more, which it refuses where one of them
// is taken in the list.
func addPorts(list, more []usernet.Forward) ([]usernet.Forward, error) {
	out := slices.Clone(list)
	for _, f := range more {
		if i := slices.IndexFunc(out, func(g usernet.Forward) bool { return f.Proto == g.Proto && f.Host == g.Host }); i >= 0 && f.Host.Port() != 0 {
			return nil, banger.Errorf(banger.CodeConflict, "port %v: this VM has it already, for its port %d", f.Host, out[i].Guest)
		}
		if len(out) >= usernet.MaxForwards {
			return nil, banger.Errorf(banger.CodeUsage, "port %v: the VM has %d ports already", f, usernet.MaxForwards)
		}
		out = append(out, f)
	}
	return out, nil
}

// removePorts is a list of ports without some, each of which has to be there.
func removePorts(list, gone []usernet.Forward) ([]usernet.Forward, error) {
	out := slices.Clone(list)
	for _, f := range gone {
		i := slices.Index(out, f)
		if i < 0 {
			return nil, notPublished(f)
		}
		out = slices.Delete(out, i, i+1)
	}
	return out, nil
}

func notPublished(f usernet.Forward) error {
	return banger.Errorf(banger.CodeNotFound, "port %v: this VM does not have it", f).WithHint("`banger ports ls VM` shows those it has")
}

// portTexts is what stands in the record.
func portTexts(list []usernet.Forward) []string {
	out := []string{}
	for _, f := range list {
		out = append(out, f.String())
	}
	return out
}

func portOf(f usernet.Forward) banger.Port {
	return banger.Port{Protocol: f.Proto, HostAddr: f.Host.Addr().String(), HostPort: f.Host.Port(), GuestPort: f.Guest}
}

// A published port is one of the record's, and what was opened for it: the two
// differ where the record leaves the port of the host open.
type published struct{ asked, open usernet.Forward }

// publish opens ports, all of them or none.
func (n *vmNetwork) publish(list []usernet.Forward) error {
	var done []published
	for _, f := range list {
		open, err := n.Forward(f)
		if err != nil {
			for _, p := range done {
				n.Unforward(p.open)
			}
			return err
		}
		done = append(done, published{f, open})
	}
	n.published = append(n.published, done...)
	return nil
}

// asked are the ports as they stand in the record.
func (n *vmNetwork) asked() (list []usernet.Forward) {
	for _, p := range n.published {
		list = append(list, p.asked)
	}
	return list
}

// ports are the open ones.
func (n *vmNetwork) ports() []banger.Port {
	out := []banger.Port{}
	for _, f := range n.Forwards() {
		out = append(out, portOf(f))
	}
	return out
}

// ports makes the handler of a call about the ports of a VM that runs.
func (sup *supervisor) ports(change func([]usernet.Forward) error) api.Handler {
	return func(_ context.Context, c *api.Call) (any, error) {
		var p api.PortParams
		if err := c.Params(&p); err != nil {
			return nil, err
		}
		if sup.net == nil {
			return nil, noNetwork(sup.rec.Name)
		}
		if change != nil {
			list, err := parsePorts(p.Ports)
			if err != nil {
				return nil, err
			}
			sup.net.mu.Lock()
			err = change(list)
			sup.net.mu.Unlock()
			if err != nil {
				return nil, err
			}
			sup.v.Note()
		}
		return api.Ports{Ports: sup.net.ports()}, nil
	}
}

// addPorts opens ports and records them; one that cannot be recorded does not
// stay open. The caller holds net.mu.
func (sup *supervisor) addPorts(list []usernet.Forward) error {
	n := sup.net
	was := len(n.published)
	if err := n.publish(list); err != nil {
		return err
	}
	err := vm.SavePorts(sup.store, sup.rec.ID, portTexts(n.asked()))
	if err != nil {
		for _, p := range n.published[was:] {
			n.Unforward(p.open)
		}
		n.published = n.published[:was]
		return fmt.Errorf("VM %s: its ports are as before: %w", sup.rec.Name, err)
	}
	return nil
}

// removePorts closes ports and records that; where it cannot be recorded they
// are opened again. The caller holds net.mu.
func (sup *supervisor) removePorts(list []usernet.Forward) error {
	n := sup.net
	left := slices.Clone(n.published)
	var gone []published
	for _, f := range list {
		i := slices.IndexFunc(left, func(p published) bool { return p.open == f })
		if i < 0 {
			return notPublished(f)
		}
		gone = append(gone, left[i])
		left = slices.Delete(left, i, i+1)
	}
	was := n.published
	for _, p := range gone {
		n.Unforward(p.open)
	}
	n.published = left
	err := vm.SavePorts(sup.store, sup.rec.ID, portTexts(n.asked()))
	if err == nil {
		return nil
	}
	var lost []string
	for _, p := range gone {
		if _, again := n.Forward(p.open); again != nil { // somebody was quick
			lost = append(lost, again.Error())
			was = slices.DeleteFunc(slices.Clone(was), func(q published) bool { return q.open == p.open })
		}
	}
	n.published = was
	if len(lost) > 0 {
		return fmt.Errorf("VM %s: its record still has the ports: %w; until its next start it lacks some: %s", sup.rec.Name, err, strings.Join(lost, "; "))
	}
	return fmt.Errorf("VM %s: its ports are as before: %w", sup.rec.Name, err)
}

// portList is the call that lists the ports of a VM, running or not.
func (m *manager) portList(ctx context.Context, c *api.Call) (any, error) {
	var p api.PortParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	e, err := m.find(p.Name)
	if err != nil {
		return nil, err
	}
	if err := e.check(); err != nil {
		return nil, err
	}
	if life, rested := m.look(e); rested != nil && life.VMM != nil {
		var out api.Ports
		return &out, m.askNetwork(ctx, e, supervisorPorts, p, nil, &out)
	}
	list, err := m.recordedPorts(e)
	if err != nil {
		return nil, err
	}
	out := api.Ports{Ports: []banger.Port{}}
	for _, f := range list {
		out.Ports = append(out.Ports, portOf(f))
	}
	return &out, nil
}

// recordedPorts are those of the VM's record, which its supervisor may have
// changed.
func (m *manager) recordedPorts(e *entry) ([]usernet.Forward, error) {
	rec, _, err := vm.Load(m.store, e.id)
	if err != nil {
		return nil, err
	}
	if rec.Net == 0 {
		return nil, noNetwork(rec.Name)
	}
	return parsePorts(rec.Spec.Ports)
}

// changePorts makes the handler of a call that changes the ports of a VM. Of
// one that runs they are its supervisor's, record and all; of one at rest this
// changes the record, by change.
func (m *manager) changePorts(method string, change func(list, by []usernet.Forward) ([]usernet.Forward, error)) api.Handler {
	return func(ctx context.Context, c *api.Call) (any, error) {
		var p api.PortParams
		if err := c.Params(&p); err != nil {
			return nil, err
		}
		by, err := parsePorts(p.Ports)
		if err != nil {
			return nil, err
		}
		e, err := m.find(p.Name)
		if err != nil {
			return nil, err
		}
		// Neither started nor removed meanwhile; a start that is under way is
		// waited for.
		if err := e.lock(ctx); err != nil {
			return nil, err
		}
		defer e.unlock()
		for {
			if err := e.check(); err != nil {
				return nil, err
			}
			life, rested := m.look(e)
			switch {
			case rested == nil:
				return m.changeRecordedPorts(ctx, e, by, change)
			case !vm.Rests(life.State):
				var out api.Ports
				return &out, m.askNetwork(ctx, e, method, p, nil, &out)
			}
			// Its supervisor has said its last word and is on its way out.
			select {
			case <-rested:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}
}

// changeRecordedPorts changes the record of a VM at rest.
func (m *manager) changeRecordedPorts(ctx context.Context, e *entry, by []usernet.Forward, change func(list, by []usernet.Forward) ([]usernet.Forward, error)) (any, error) {
	hold, err := m.holdResting(ctx, e)
	if err != nil {
		return nil, err
	}
	defer hold.Close()
	list, err := m.recordedPorts(e)
	if err == nil {
		list, err = change(list, by)
	}
	if err == nil {
		err = vm.SavePorts(m.store, e.id, portTexts(list))
	}
	if err != nil {
		return nil, err
	}
	out := api.Ports{Ports: []banger.Port{}}
	for _, f := range list {
		out.Ports = append(out.Ports, portOf(f))
	}
	return &out, nil
}
