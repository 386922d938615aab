package daemon

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"

	"banger"
	"banger/internal/api"
	"banger/internal/image"
	"banger/internal/oci"
	"banger/internal/store"
)

// blobs gives oci the blob store as the interface it knows.
type blobs struct{ *store.Blobs }

func (b blobs) Create(digest string) (oci.BlobWriter, error) { return b.Blobs.Create(digest) }
func (b blobs) Resume(digest string, sizeBytes int64) (oci.BlobWriter, error) {
	return b.Blobs.Resume(digest, sizeBytes)
}

// source makes what oci needs to get an image: the parsed reference, the
// files that the client opened, and where progress goes. The package list is
// read to its end: call it once.
func (d *daemon) source(c *api.Call, p api.Source) (*oci.Source, oci.Reference, error) {
	ref, err := oci.ParseReference(p.Reference)
	if err != nil {
		return nil, ref, err
	}
	src := &oci.Source{
		UserAgent: "banger/" + Version,
		Platform:  p.Platform,
		Progress:  progressOf(c),
	}
	if src.Input, err = c.File(p.File); err != nil {
		return nil, ref, err
	}
	list, err := c.File(p.Packages)
	if err != nil {
		return nil, ref, err
	}
	if list != nil {
		if src.Packages, err = oci.ParsePackages(p.PackagesName, list); err != nil {
			return nil, ref, err
		}
	}
	return src, ref, nil
}

// trimOf says whether the base of a reference is to be trimmed.
func trimOf(p api.Source, ref oci.Reference) bool {
	if p.Trim != nil {
		return *p.Trim
	}
	return image.TrimmedByDefault(ref)
}

// progressOf passes progress on to the client.
func progressOf(c *api.Call) func(oci.Progress) {
	return func(g oci.Progress) {
		c.Emit(api.Event{Progress: &api.Progress{Step: g.Stage, Subject: g.Subject, DoneBytes: g.DoneBytes, TotalBytes: g.TotalBytes}})
	}
}

func (d *daemon) imageList(ctx context.Context, c *api.Call) (any, error) {
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	list, err := r.images.List()
	if err != nil {
		return nil, err
	}
	out := api.Images{Images: []banger.Image{}}
	for _, im := range list {
		out.Images = append(out.Images, im.Image)
	}
	return out, nil
}

// find looks an image up by what the user wrote: a reference, whose full name
// is taken, or a name or id as it is.
func (r *rooms) find(text string) (*image.Image, error) {
	full := ""
	if ref, err := oci.ParseReference(text); err == nil {
		full = new(oci.Source).Name(ref)
	}
	return r.lookUp(full, text)
}

// lookUp finds an image by its full name, if it has one, else by a text as it
// is.
func (r *rooms) lookUp(full, text string) (*image.Image, error) {
	if full != "" {
		im, err := r.images.Find(full)
		if banger.CodeOf(err) != banger.CodeNotFound {
			return im, err
		}
	}
	return r.images.Find(text)
}

// named opens the state folder and finds the image that a call names.
func (d *daemon) named(c *api.Call) (r *rooms, im *image.Image, text string, err error) {
	var p api.Named
	if err := c.Params(&p); err != nil {
		return nil, nil, "", err
	}
	if r, err = d.open(); err != nil {
		return nil, nil, "", err
	}
	im, err = r.find(p.Name)
	return r, im, p.Name, err
}

func (d *daemon) imageInspect(ctx context.Context, c *api.Call) (any, error) {
	_, im, _, err := d.named(c)
	if err != nil {
		return nil, err
	}
	return im.Image, nil
}

func (d *daemon) imageRemove(ctx context.Context, c *api.Call) (any, error) {
	r, im, text, err := d.named(c)
	if err != nil {
		return nil, err
	}
	name := im.Name
	if strings.HasPrefix(im.ID, text) {
		name = text // an id: Remove knows what that may mean
	}
	return im.Image, r.images.Remove(ctx, name)
}

func (d *daemon) imagePull(ctx context.Context, c *api.Call) (any, error) {
	var p api.Source
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	r, err := d.open()
	if err != nil {
		return nil, err
	}
	src, ref, err := d.source(c, p)
	if err != nil {
		return nil, err
	}
	im, err := d.pull(ctx, c, r, src, ref, image.PullOptions{Name: p.Name, Trim: trimOf(p, ref)})
	if err != nil {
		return nil, err
	}
	return im.Image, nil
}

// pull gets an image into the store, with this release's agent.
func (d *daemon) pull(ctx context.Context, c *api.Call, r *rooms, src *oci.Source, ref oci.Reference, opts image.PullOptions) (*image.Image, error) {
	src.Blobs, src.Scratch = blobs{r.store.Blobs()}, r.store.Scratch
	agent, err := openAgent()
	if err != nil {
		return nil, err
	}
	defer agent.Close()
	opts.Agent = agent
	im, err := r.images.Pull(ctx, src, ref, opts)
	if err != nil {
		return nil, err
	}
	for _, note := range im.Notes {
		c.Emit(api.Event{Notice: fmt.Sprintf("%s: %s", im.Name, note)})
	}
	return im, nil
}

// imageBuild writes a base into the client's file, without the store.
func (d *daemon) imageBuild(ctx context.Context, c *api.Call) (any, error) {
	var p api.BuildParams
	if err := c.Params(&p); err != nil {
		return nil, err
	}
	out, err := c.File(p.Output)
	if err != nil {
		return nil, err
	}
	if out == nil {
		return nil, banger.Errorf(banger.CodeUsage, "image build: no file to write")
	}
	src, ref, err := d.source(c, p.Source)
	if err != nil {
		return nil, err
	}
	var agent *os.File
	trim := trimOf(p.Source, ref)
	if p.NoGuest {
		if p.Source.Trim != nil && trim {
			return nil, banger.Errorf(banger.CodeUsage, "image build: --trim masks units by guest files, and --no-guest leaves those out")
		}
		trim = false
	} else {
		if agent, err = openAgent(); err != nil {
			return nil, err
		}
		defer agent.Close()
	}
	// Nothing goes into the state folder; a stream needs a place all the same.
	src.Scratch = func() (*os.File, error) {
		f, err := os.CreateTemp("", "banger-")
		if err == nil {
			err = os.Remove(f.Name())
		}
		return f, err
	}
	img, err := src.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	built, err := image.Build(ctx, img, out, image.BuildOptions{SizeBytes: p.SizeBytes, Agent: agent, Trim: trim})
	if err != nil {
		return nil, err
	}
	if err := out.Sync(); err != nil {
		return nil, err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(out.Fd()), &st); err != nil {
		return nil, err
	}
	result := api.Built{
		Reference: ref.String(), SizeBytes: built.SizeBytes,
		AllocatedBytes: st.Blocks * 512, Entries: built.Entries, Notes: built.Notes,
	}
	if img.Digest != "" {
		result.Digest = &img.Digest
	}
	return result, nil
}
