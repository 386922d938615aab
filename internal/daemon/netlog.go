package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/store"
)

const (
	netLogSchema = 1
	// netLogPause is how often at most a supervisor writes the log to its file.
	netLogPause = 10 * time.Second
)

// loadNetLog reads what the guest of a VM was denied, up to what its supervisor
// wrote last. It is empty where nothing was.
func loadNetLog(s *store.Store, id string) ([]banger.Denial, error) {
	out := api.NetLog{Denials: []banger.Denial{}}
	err := store.ReadJSON(filepath.Join(s.VM(id), store.VMNetLog), netLogSchema, &out)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return out.Denials, err
}

// keepNetLog writes the log to its file as it grows, until end is called, which
// writes the rest. That of a VM that goes when it stops is not kept.
func (sup *supervisor) keepNetLog() (end func()) {
	if sup.net == nil || sup.rec.Ephemeral {
		return func() {}
	}
	save := func() {
		err := store.WriteJSON(filepath.Join(sup.store.VM(sup.rec.ID), store.VMNetLog), netLogSchema, api.NetLog{Denials: sup.net.Log()})
		if err != nil {
			fmt.Fprintln(os.Stderr, "supervisor: the log of the network:", err)
		}
	}
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-sup.net.Denied():
				save()
			case <-over:
			}
			select {
			case <-time.After(netLogPause):
				continue
			case <-over:
			}
			select {
			case <-sup.net.Denied():
				save()
			default:
			}
			return
		}
	}()
	return func() { close(over); <-done }
}

// netLog is the call for what the guest of a VM was denied, running or not.
func (m *manager) netLog(ctx context.Context, c *api.Call) (any, error) {
	var p api.Named
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	e, err := m.sound(p.Name)
	if err != nil {
		return nil, err
	}
	if e.rec.Net == 0 {
		return nil, noNetwork(e.rec.Name)
	}
	var out api.NetLog
	if life, rested := m.look(e); rested != nil && life.VMM != nil {
		err := m.askNetwork(ctx, e, supervisorNetLog, api.None{}, nil, &out)
		if _, rested := m.look(e); err == nil || rested != nil {
			return &out, err
		}
		// It has ended meanwhile.
	}
	out.Denials, err = loadNetLog(m.store, e.id)
	return &out, err
}
