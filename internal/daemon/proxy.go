package daemon

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/api"
	"banger/internal/proxy"
	"banger/internal/usernet"
)

// proxy is a call that lasts until the client ends it. It runs in a daemon of
// its own, and reaches VMs as any client does, through the resident one.
func (d *daemon) proxy(ctx context.Context, c *api.Call) (any, error) {
	var p api.ProxyParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", p.Listen)
	if err != nil {
		return nil, banger.Errorf(banger.CodeUnavailable, "proxy: %w", err).
			WithHint("`--listen` takes another address; with the port 0 one that is free")
	}
	c.Emit(api.Event{Listen: l.Addr().String()})
	err = proxy.Serve(ctx, l.(*net.TCPListener), proxy.Config{
		Dial: func(ctx context.Context, host string, port uint16) (*net.TCPConn, error) {
			return api.DialVM(ctx, api.DialParams{Host: host, Port: port})
		},
		Note: func(line string) { c.Emit(api.Event{Notice: line}) },
	})
	return api.None{}, err
}

// reach finds the VM that a host name or an address means to programs of the
// host's: NAME.banger, or one of the VM's own addresses. Whoever asks may be a
// web page: nothing else is looked up, and no id will do.
func (m *manager) reach(host string) (*entry, error) {
	refused := func() (*entry, error) {
		return nil, banger.Errorf(banger.CodeUsage, "%.100q: it is no VM, and nothing else is reached this way", host).WithHint("it leads to NAME.%s and to addresses of VMs", usernet.Domain)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		a = a.Unmap()
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, e := range m.byID {
			if of, err := usernet.AddressesOf(e.net); err == nil && e.net > 0 && (a == of.IPv4.Addr() || a == of.IPv6.Addr()) {
				return e, nil
			}
		}
		return refused()
	}
	name, ok := strings.CutSuffix(strings.TrimSuffix(strings.ToLower(host), "."), "."+usernet.Domain)
	if !ok {
		return refused()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.byName[name]; e != nil && m.byID[e.id] == e {
		return e, nil
	}
	return nil, banger.Errorf(banger.CodeNotFound, "VM %.100q: there is none of that name", name).WithHint("`banger ls` shows them")
}

// dial has the connection in the call's file joined to a port of a VM.
func (m *manager) dial(ctx context.Context, c *api.Call) (any, error) {
	var p api.DialParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	f, err := c.File(0)
	if err != nil {
		return nil, err
	}
	e, err := m.reach(p.Host)
	if err != nil {
		return nil, err
	}
	if life, rested := m.look(e); rested != nil && life.State == banger.StatePaused {
		return nil, banger.Errorf(banger.CodeConflict, "VM %s: it is paused", e.name()).WithHint("`banger resume %s`", e.name())
	}
	err = m.askNetwork(ctx, e, supervisorDial, p, []*os.File{f}, &api.None{})
	if banger.CodeOf(err) == banger.CodeUsage { // which is for what is no VM
		err = banger.Errorf(banger.CodeUnavailable, "VM %s: %w", e.name(), err).WithHint("`banger restart %s`", e.name())
	}
	return api.None{}, err
}

// dial joins the connection in the call's file to a port of the guest.
func (sup *supervisor) dial(ctx context.Context, c *api.Call) (any, error) {
	var p api.DialParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	f, err := c.File(0)
	if err != nil {
		return nil, err
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, banger.Errorf(banger.CodeUsage, "%w", err)
	}
	host, ok := conn.(*net.TCPConn)
	if !ok || sup.net == nil {
		conn.Close()
		if ok {
			return nil, noNetwork(sup.rec.Name)
		}
		return nil, banger.Errorf(banger.CodeUsage, "the connection to join is no TCP")
	}
	err = sup.net.Join(ctx, host, p.Port)
	where := net.JoinHostPort(sup.rec.Name+"."+usernet.Domain, strconv.Itoa(int(p.Port)))
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		err = banger.Errorf(banger.CodeUnavailable, "%s: nothing listens there", where).WithHint("`banger ports ls %s` shows what does", sup.rec.Name)
	case errors.Is(err, context.DeadlineExceeded):
		err = banger.Errorf(banger.CodeTimeout, "%s: the guest does not answer", where)
	case err != nil && banger.CodeOf(err) == banger.CodeInternal:
		err = banger.Errorf(banger.CodeUnavailable, "%s: %w", where, err)
	}
	return api.None{}, err
}
