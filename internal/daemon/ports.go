package daemon

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

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
			return n.ownedByVM(f, err)
		}
		done = append(done, published{f, open})
	}
	n.published = append(n.published, done...)
	return nil
}

// ownedByVM is an error about a port that is taken, with the name of the VM that
// has it where it is one: its process alone would say little.
func (n *vmNetwork) ownedByVM(f usernet.Forward, taken error) error {
	if banger.CodeOf(taken) != banger.CodeConflict {
		return taken
	}
	ids, _ := n.store.VMIDs()
	for _, id := range ids {
		rec, life, err := vm.Load(n.store, id)
		if err != nil || id == n.id || life.Supervisor == nil || !life.Supervisor.Alive() {
			continue
		}
		for _, p := range life.Ports {
			a, err := netip.ParseAddr(p.HostAddr)
			if err != nil || p.Protocol != f.Proto || p.HostPort != f.Host.Port() || a != f.Host.Addr() && !a.IsUnspecified() && !f.Host.Addr().IsUnspecified() {
				continue
			}
			theirs := usernet.Forward{Proto: p.Protocol, Host: netip.AddrPortFrom(a, p.HostPort), Guest: p.GuestPort}
			return banger.Errorf(banger.CodeConflict, "port %v: VM %s has it, for its port %d", f.Host, rec.Name, p.GuestPort).
				WithHint("choose another port of the host, or `banger ports rm %s %v`", rec.Name, theirs)
		}
	}
	return taken
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

// apiPorts is a list of ports of which no more is known.
func apiPorts(list []usernet.Forward) api.Ports {
	out := api.Ports{Ports: []api.Port{}}
	for _, f := range list {
		out.Ports = append(out.Ports, api.Port{Port: portOf(f)})
	}
	return out
}

// joinListeners puts a guest's listeners beside the ports that lead to it.
func joinListeners(list []usernet.Forward, a usernet.Addresses, listeners []banger.Listener) api.Ports {
	out := apiPorts(list)
	out.Listeners = []api.Listener{}
	for i := range list {
		out.Ports[i].Listening = new(bool)
	}
	for _, l := range listeners {
		found := api.Listener{Listener: l, Reach: api.ReachPort}
		switch {
		case l.Addr.IsLoopback():
			found.Reach = api.ReachLoopback
		case !l.Addr.IsUnspecified() && l.Addr != a.IPv4.Addr() && l.Addr != a.IPv6.Addr():
			found.Reach = api.ReachOther
		}
		for i, f := range list {
			if found.Reach == api.ReachPort && leadsTo(f, l) {
				found.Forwarded, *out.Ports[i].Listening = true, true
			}
		}
		out.Listeners = append(out.Listeners, found)
	}
	return out
}

// leadsTo says whether what comes to a port of the host comes to a listener at
// one of the guest's own addresses: TCP tries both of them, UDP has the version
// of IP that the port has. A socket at :: is taken to serve IPv4 too, as is the
// rule: its table does not show the exception.
func leadsTo(f usernet.Forward, l banger.Listener) bool {
	if f.Proto != l.Protocol || f.Guest != l.Port {
		return false
	}
	return f.Proto == "tcp" || f.Host.Addr().Is4() == l.Addr.Is4() || f.Host.Addr().Is4() && l.Addr == netip.IPv6Unspecified()
}

// listenersLimit bounds the guest's answer, so that one that does not answer
// does not keep its ports from being listed.
const listenersLimit = 10 * time.Second

// portList lists the ports of the VM, and what waits for peers in its guest.
func (sup *supervisor) portList(ctx context.Context, _ *api.Call) (any, error) {
	if sup.net == nil {
		return nil, noNetwork(sup.rec.Name)
	}
	a, err := usernet.AddressesOf(sup.rec.Net)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, listenersLimit)
	defer cancel()
	listeners, more, err := sup.v.Listeners(ctx)
	if err != nil {
		out := apiPorts(sup.net.Forwards())
		out.Unknown = err.Error()
		return out, nil
	}
	out := joinListeners(sup.net.Forwards(), a, listeners)
	out.More = more
	return out, nil
}

// changePorts makes the handler of a call that changes the ports.
func (sup *supervisor) changePorts(change func([]usernet.Forward) error) api.Handler {
	return func(_ context.Context, c *api.Call) (any, error) {
		var p api.PortParams
		if err := c.Params(&p); err != nil {
			return nil, err
		}
		if sup.net == nil {
			return nil, noNetwork(sup.rec.Name)
		}
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
		return apiPorts(sup.net.Forwards()), nil
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
	e, err := m.sound(p.Name)
	if err != nil {
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
	return apiPorts(list), nil
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
	return apiPorts(list), nil
}
