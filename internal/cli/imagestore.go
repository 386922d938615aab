package cli

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"banger"
	"banger/internal/api"
)

func imageTagCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "tag IMAGE NAME",
		Short: "Give an image one more name",
		Long: `Give an image one more name. A name that another image had moves.

EXAMPLE
  banger image tag debian golden`,
		Args: exactly("IMAGE", "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var im banger.Image
			return call(api.MethodImageTag, api.TagParams{Image: args[0], Name: args[1]}, nil, &im)
		},
	}
}

func imagePruneCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove what no name leads to and no VM needs",
		Long: `Remove base images that have no name any more and that no VM was made of, and
layers that no image was made from.

EXAMPLE
  banger image prune`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			var p api.Pruned
			if err := call(api.MethodImagePrune, api.None{}, nil, &p); err != nil {
				return err
			}
			if asJSON {
				return printJSON(p)
			}
			fmt.Printf("%d images, %d blobs, %s freed\n", len(p.Images), p.Blobs, size(p.FreedBytes))
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print what was removed as JSON")
	return cmd
}

func imageVerifyCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify NAME...",
		Short: "Compare base images with what they were made from",
		Long: `Read a base image and its layers again and say what differs: every byte of the
layers against their digests, every entry of the merged layers against the file
system. Guest files of another release of banger are no difference.

EXAMPLE
  banger image verify debian`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return eachOf(cmd, args, "NAME", func(name string) error {
				var v api.Verified
				if err := call(api.MethodImageVerify, api.Named{Name: name}, nil, &v); err != nil {
					return err
				}
				if asJSON {
					if err := printJSON(v); err != nil {
						return err
					}
				} else {
					for _, d := range v.Differences {
						fmt.Println(escape(d))
					}
				}
				for _, note := range v.Notes {
					fmt.Fprintf(os.Stderr, "banger: %s: %s\n", escape(name), escape(note))
				}
				if !v.Sound {
					return banger.Errorf(banger.CodeInvalid, "image %q: it is not what it was made from", name).
						WithHint("remove it and pull it again")
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON document for each")
	return cmd
}

func imageHistoryCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "history NAME",
		Short: "Show how an image's layers came about, as it says itself",
		Args:  exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var h api.History
			if err := call(api.MethodImageHistory, api.Named{Name: args[0]}, nil, &h); err != nil {
				return err
			}
			if asJSON {
				return printJSON(h.Steps)
			}
			rows := [][]string{{"CREATED", "LAYER", "SIZE", "CREATED BY"}}
			for _, s := range h.Steps {
				layer, bytes := "-", "-"
				if s.Digest != "" {
					layer, bytes = strings.TrimPrefix(s.Digest, "sha256:")[:12], size(s.SizeBytes)
				}
				rows = append(rows, []string{s.Created, layer, bytes, s.CreatedBy})
			}
			return table(rows)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON list")
	return cmd
}

func imageExportCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "export IMAGE -o FILE",
		Short: "Write an image's layers to a tar",
		Long: `Write an image as it was pulled, layers and all, to one tar: an OCI image
layout that "docker load" takes too. One that was not made of layers is written
as one layer. Guest files are not in it. -o - is standard output.

EXAMPLE
  banger image export debian -o debian.tar
  banger image export debian -o - | ssh host banger image import -`,
		Args: exactly("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return usagef("image export: no file to write").WithHint("name one with -o FILE")
			}
			var im banger.Image
			params := api.ExportParams{Name: args[0], Output: 0}
			if output == "-" {
				if term.IsTerminal(int(os.Stdout.Fd())) {
					return usagef("image export: standard output is a terminal").WithHint("name a file with -o FILE")
				}
				return call(api.MethodImageExport, params, []*os.File{os.Stdout}, &im)
			}
			out, err := newOutput(output)
			if err != nil {
				return err
			}
			defer out.discard()
			if err := call(api.MethodImageExport, params, []*os.File{out.f}, &im); err != nil {
				return err
			}
			return out.commit()
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "write `FILE`, which must not exist")
	return cmd
}

func imageImportCommand() *cobra.Command {
	var source sourceFlags
	var name string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "import [FLAGS] FILE|-",
		Short: `Take in an image that "image export" or "docker save" wrote`,
		Long: `Make a base image of an image in a tar, compressed or not. It keeps the name
that it brings along, unless another is given.

EXAMPLE
  banger image import debian.tar
  docker save debian | banger image import --name mine -`,
		Args: exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			reference := args[0]
			if reference != "-" {
				if strings.Contains(reference, ":") {
					return usagef("image import: %q: a colon in a file's name", reference).WithHint("cat FILE | banger image import -")
				}
				reference = "docker-archive:" + reference
			}
			src, files, err := source.open(reference)
			if err != nil {
				return err
			}
			src.Name = name
			var im banger.Image
			if err := call(api.MethodImagePull, src, files, &im); err != nil {
				return err
			}
			if asJSON {
				return printJSON(im)
			}
			fmt.Println(escape(im.Name))
			return nil
		},
	}
	cmd.Flags().StringVar(&source.platform, "platform", "", "of an image for several, the one for `OS/ARCH` (default linux/amd64)")
	cmd.Flags().StringVar(&name, "name", "", "keep it under this `NAME`")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the image as JSON")
	return cmd
}
