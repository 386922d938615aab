package daemon

import (
	"context"
	"fmt"

	"banger"
	"banger/internal/api"
	"banger/internal/image"
)

// imageRegister makes a base image of a file system of the client's.
func (d *daemon) imageRegister(ctx context.Context, c *api.Call) (any, error) {
	var p api.RegisterParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	file, err := c.File(p.File)
	if err != nil {
		return nil, err
	}
	if file == nil {
		return nil, banger.Errorf(banger.CodeUsage, "image register: no file")
	}
	seed, err := c.File(p.Seed)
	if err != nil {
		return nil, err
	}
	agent, err := openAgent()
	if err != nil {
		return nil, err
	}
	defer agent.Close()
	im, err := r.images.Register(ctx, file, image.RegisterOptions{Name: p.Name, Label: p.Label, Agent: agent, Seed: seed})
	if err != nil {
		return nil, err
	}
	for _, note := range im.Notes {
		c.Emit(api.Event{Notice: fmt.Sprintf("%s: %s", im.Name, note)})
	}
	return im.Image, nil
}

// imageSeed replaces the work seed of an image.
func (d *daemon) imageSeed(ctx context.Context, c *api.Call) (any, error) {
	var p api.SeedParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	im, err := r.find(p.Image)
	if err != nil {
		return nil, err
	}
	src, ref, err := d.source(c, p.Source)
	if err != nil {
		return nil, err
	}
	if im, err = r.images.ReplaceSeed(ctx, im.Name, src, ref); err != nil {
		return nil, err
	}
	return im.Image, nil
}
