package daemon

import (
	"context"
	"strings"

	"banger"
	"banger/internal/api"
	"banger/internal/kernel"
	"banger/internal/vm"
)

func (d *daemon) kernelList(ctx context.Context, c *api.Call) (any, error) {
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	list, err := r.kernels.List()
	if err != nil {
		return nil, err
	}
	out := api.Kernels{Kernels: []banger.Kernel{}}
	for _, k := range list {
		out.Kernels = append(out.Kernels, k.Kernel)
	}
	return out, nil
}

func (d *daemon) kernelPull(ctx context.Context, c *api.Call) (any, error) {
	var p api.PullKernel
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	k, err := d.pullKernel(ctx, c, r, p.Suite)
	if err != nil {
		return nil, err
	}
	return k.Kernel, nil
}

func (d *daemon) pullKernel(ctx context.Context, c *api.Call, r *rooms, suite string) (*kernel.Kernel, error) {
	return r.kernels.Pull(ctx, suite, func(g kernel.Progress) {
		c.Emit(api.Event{Progress: &api.Progress{Step: g.Stage, Subject: "kernel " + g.Name, DoneBytes: g.DoneBytes, TotalBytes: g.TotalBytes}})
	})
}

func (d *daemon) kernelImport(ctx context.Context, c *api.Call) (any, error) {
	var p api.ImportKernel
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	file, err := c.File(p.Image)
	if err != nil {
		return nil, err
	}
	if file == nil {
		return nil, banger.Errorf(banger.CodeUsage, "kernel import: no kernel image")
	}
	modules, err := c.File(p.Modules)
	if err != nil {
		return nil, err
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	k, err := r.kernels.Import(ctx, file, modules)
	if err != nil {
		return nil, err
	}
	return k.Kernel, nil
}

func (d *daemon) kernelRemove(ctx context.Context, c *api.Call) (any, error) {
	var p api.Named
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	users, err := r.users(func(rec vm.Record) bool { return rec.Kernel == p.Name })
	if err != nil {
		return nil, err
	}
	if len(users) > 0 {
		return nil, banger.Errorf(banger.CodeConflict, "kernel %s: the VM %s boots it", p.Name, users[0]).
			WithHint("remove the VMs that do first: banger rm %s", strings.Join(users, " "))
	}
	return api.None{}, r.kernels.Remove(ctx, p.Name)
}
