package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
	"banger/internal/usernet"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/wire"
)

// Methods of a supervisor about its VM's network.
const (
	supervisorPorts   = "supervisor.ports"
	supervisorPortAdd = "supervisor.port.add"
	supervisorPortRm  = "supervisor.port.remove"
	supervisorNetLog  = "supervisor.net.log"
	supervisorDial    = "supervisor.dial"
	// supervisorPeer hands over one end of a stream whose other end another
	// VM's supervisor has.
	supervisorPeer = "supervisor.peer"
)

// policyOf is what a spec allows the guest.
func policyOf(spec banger.Spec) (usernet.Policy, error) {
	p, err := usernet.ParsePolicy(spec.Net)
	p.HostPorts = slices.Clone(spec.AllowHost)
	return p, err
}

// checkNetwork refuses a network that could not be made.
func checkNetwork(spec banger.Spec) error {
	if _, err := policyOf(spec); err != nil {
		return err
	}
	ports, err := parsePorts(spec.Ports)
	if err != nil {
		return err
	}
	_, err = addPorts(nil, ports)
	return err
}

// A vmNetwork is the network of a supervisor's VM.
type vmNetwork struct {
	*usernet.Network
	store *store.Store
	id    string // of the VM
	card  vmm.NIC
	guest wire.Network

	mu        sync.Mutex // over a change of the ports
	published []published
}

// openNetwork makes the network of a VM, with its ports, before the VM is
// there: nothing of a guest is ever without its policy.
func openNetwork(s *store.Store, rec vm.Record, earlier []banger.Denial) (*vmNetwork, error) {
	policy, err := policyOf(rec.Spec)
	if err != nil {
		return nil, err
	}
	a, err := usernet.AddressesOf(rec.Net)
	if err != nil {
		return nil, err
	}
	n := &vmNetwork{
		store: s, id: rec.ID,
		card: vmm.NIC{MAC: a.MAC, MTU: usernet.DefaultMTU},
		guest: wire.Network{
			MAC: a.MAC.String(), MTU: usernet.DefaultMTU,
			Addresses: []string{a.IPv4.String(), a.IPv6.String()},
			Gateways:  []string{a.Gateway4.String(), a.Gateway6.String()},
			DNS:       []string{a.Gateway4.String(), a.Gateway6.String()},
			Search:    append([]string{usernet.Domain}, usernet.HostSearch()...),
		},
	}
	if n.Network, err = usernet.New(usernet.Config{Name: rec.Name, Addresses: a, Policy: policy, Log: earlier}); err != nil {
		return nil, err
	}
	n.card.Attach = n.Attach
	ports, err := parsePorts(rec.Spec.Ports)
	if err == nil {
		err = n.publish(ports)
	}
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// networkRoutes are the calls about the network.
func (sup *supervisor) networkRoutes() map[string]api.Handler {
	return map[string]api.Handler{
		supervisorPorts:   sup.portList,
		supervisorPortAdd: sup.changePorts(sup.addPorts),
		supervisorPortRm:  sup.changePorts(sup.removePorts),
		supervisorNetLog: func(context.Context, *api.Call) (any, error) {
			if sup.net == nil {
				return nil, noNetwork(sup.rec.Name)
			}
			return api.NetLog{Denials: sup.net.Log()}, nil
		},
		supervisorDial: sup.dial,
		supervisorPeer: func(_ context.Context, c *api.Call) (any, error) {
			f, err := c.File(0)
			if err != nil {
				return nil, err
			}
			conn, err := net.FileConn(f)
			if err != nil {
				return nil, banger.Errorf(banger.CodeUsage, "%w", err)
			}
			if sup.net == nil {
				conn.Close()
				return nil, noNetwork(sup.rec.Name)
			}
			// The two agree beside this call, whose end the other one awaits.
			sup.work.Go(func() { sup.peer(conn) })
			return api.None{}, nil
		},
	}
}

func noNetwork(name string) error {
	return banger.Errorf(banger.CodeConflict, "VM %s: it was made before VMs had a network", name).WithHint("make it anew to give it one")
}

// peer joins this VM's network to another one's; that the two do not want each
// other is no news to anybody.
func (sup *supervisor) peer(conn net.Conn) {
	if err := sup.net.Peer(conn); err != nil && banger.CodeOf(err) != banger.CodeConflict {
		fmt.Fprintln(os.Stderr, "supervisor:", err)
	}
}

// findPeers joins this VM to every other one of its groups that runs. Each VM
// does so when it listens already, so that of two that start at once at least
// one finds the other.
func (sup *supervisor) findPeers(ctx context.Context, s *store.Store) {
	mine, err := policyOf(sup.rec.Spec)
	if sup.net == nil || err != nil || len(mine.Groups) == 0 {
		return
	}
	ids, err := s.VMIDs()
	if err != nil {
		fmt.Fprintln(os.Stderr, "supervisor:", err)
		return
	}
	for _, id := range ids {
		rec, life, err := vm.Load(s, id)
		if err != nil || id == sup.rec.ID || life.Supervisor == nil {
			continue
		}
		if theirs, err := policyOf(rec.Spec); err != nil || !mine.SharesGroup(theirs.Groups) {
			continue
		}
		if err := sup.callPeer(ctx, s, id, life); err != nil {
			fmt.Fprintf(os.Stderr, "supervisor: VM %s: %v\n", rec.Name, err)
		}
	}
}

func (sup *supervisor) callPeer(ctx context.Context, s *store.Store, id string, life vm.Life) error {
	c, err := dialSupervisor(s, id, life)
	if err != nil {
		return err
	}
	ours, theirs, err := api.Pair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	if err := c.Call(ctx, supervisorPeer, api.None{}, []*os.File{theirs}, &api.None{}, nil, nil); err != nil {
		ours.Close()
		return err
	}
	sup.peer(ours)
	return nil
}

// askNetwork asks the supervisor of a VM that runs.
func (m *manager) askNetwork(ctx context.Context, e *entry, method string, params any, files []*os.File, result any) error {
	if err := e.check(); err != nil {
		return err
	}
	life, rested := m.look(e)
	if rested == nil || life.VMM == nil {
		return banger.Errorf(banger.CodeConflict, "VM %s: it is %s, so it has no network now", e.name(), life.State).
			WithHint("`banger start %s`", e.name())
	}
	c, err := m.supervisorOf(e)
	if err != nil {
		return err
	}
	return c.Call(ctx, method, params, files, result, nil, nil)
}
