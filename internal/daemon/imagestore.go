package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/image"
	"banger/internal/oci"
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
	im, err := r.images.Register(ctx, file, image.RegisterOptions{Name: p.Name, Label: p.Label, Agent: agent, Seed: seed, Trim: p.Trim})
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

func (d *daemon) imageTag(ctx context.Context, c *api.Call) (any, error) {
	var p api.TagParams
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
	if im, err = r.images.Tag(ctx, im.Name, p.Name); err != nil {
		return nil, err
	}
	return im.Image, nil
}

func (d *daemon) imagePrune(ctx context.Context, c *api.Call) (any, error) {
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	p, err := r.images.Prune(ctx)
	if err != nil {
		return nil, err
	}
	return api.Pruned{Images: append([]string{}, p.Images...), Blobs: p.Blobs, FreedBytes: p.FreedBytes}, nil
}

// stored is what reads an image's own blobs, and reports how far it is.
func (r *rooms) stored(c *api.Call) *oci.Source {
	return &oci.Source{Blobs: blobs{r.store.Blobs()}, Progress: progressOf(c)}
}

func (d *daemon) imageVerify(ctx context.Context, c *api.Call) (any, error) {
	r, im, _, err := d.named(c)
	if err != nil {
		return nil, err
	}
	agent, err := openAgent()
	if err != nil {
		return nil, err
	}
	defer agent.Close()
	v, err := r.images.Verify(ctx, im.Name, r.stored(c), agent)
	if err != nil {
		return nil, err
	}
	return api.Verified{
		Image: v.Image.Image, Sound: len(v.Differences) == 0, Entries: v.Entries,
		Differences: append([]string{}, v.Differences...), Notes: append([]string{}, v.Notes...),
	}, nil
}

func (d *daemon) imageHistory(ctx context.Context, c *api.Call) (any, error) {
	r, im, _, err := d.named(c)
	if err != nil {
		return nil, err
	}
	h := api.History{Steps: []api.HistoryStep{}}
	if im.Digest == nil {
		h.Steps = append(h.Steps, api.HistoryStep{Created: im.Created.Format(time.RFC3339), CreatedBy: im.Reference})
		return h, nil
	}
	src := r.stored(c)
	src.Platform = im.Platform
	steps, err := src.History(ctx, im.Name, *im.Digest)
	if err != nil {
		return nil, err
	}
	for _, s := range slices.Backward(steps) {
		step := api.HistoryStep{Created: s.Created, CreatedBy: s.CreatedBy, Comment: s.Comment}
		if s.Layer != nil {
			step.Digest, step.SizeBytes = s.Layer.Digest, s.Layer.SizeBytes
		}
		h.Steps = append(h.Steps, step)
	}
	return h, nil
}

// imageExport writes an image's layers into the client's file.
func (d *daemon) imageExport(ctx context.Context, c *api.Call) (any, error) {
	var p api.ExportParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	out, err := c.File(p.Output)
	if err != nil {
		return nil, err
	}
	if out == nil {
		return nil, banger.Errorf(banger.CodeUsage, "image export: no file to write")
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	im, err := r.find(p.Name)
	if err != nil {
		return nil, err
	}
	release, err := r.images.Hold(im)
	if err != nil {
		return nil, err
	}
	defer release()
	if im.Digest == nil {
		err = r.images.ExportBase(ctx, im, out)
	} else {
		src := r.stored(c)
		src.Platform = im.Platform
		var img *oci.Image
		if img, err = src.Stored(ctx, im.Name, *im.Digest); err == nil {
			err = src.Export(ctx, out, img, im.Name)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := out.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOTSUP) { // a pipe has none
		return nil, err
	}
	return im.Image, nil
}
