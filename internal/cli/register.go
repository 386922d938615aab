package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"banger"
	"banger/internal/api"
)

// workSeedSuffix is what a work seed that lies beside FILE.ext4 is called.
const workSeedSuffix = ".work-seed.ext4"

func imageRegisterCommand() *cobra.Command {
	var name string
	var trim, asJSON bool
	cmd := &cobra.Command{
		Use:   "register [FLAGS] FILE.ext4",
		Short: "Make an image of a root file system that another tool made",
		Long: `Copy an ext4 file system (ext2 and ext3 will do) into the store and put
banger's guest files into the copy, so that VMs can be made of it. The file
itself is only read. Where FILE.work-seed.ext4 lies beside it, that is what
/root starts from; else it is the file system's own /root.

Registered again under the same name, it becomes another base image and the
name moves; VMs of the one before keep theirs.

EXAMPLE
  banger image register debian.ext4
  banger run debian`,
		Args: exactly("FILE.ext4"),
		RunE: func(cmd *cobra.Command, args []string) error {
			stem := strings.TrimSuffix(args[0], ".ext4")
			if !cmd.Flags().Changed("name") {
				name = filepath.Base(stem)
			}
			f, err := openNamed(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			files := []*os.File{f}
			params := api.RegisterParams{Name: name, Label: args[0], File: 0, Seed: -1, Trim: trim}
			seed, err := os.Open(stem + workSeedSuffix)
			switch {
			case err == nil:
				defer seed.Close()
				params.Seed = len(files)
				files = append(files, seed)
			case !errors.Is(err, fs.ErrNotExist):
				return banger.Errorf(banger.CodeUnavailable, "%w", err)
			}
			var im banger.Image
			if err := call(api.MethodImageRegister, params, files, &im); err != nil {
				return err
			}
			if asJSON {
				return printJSON(im)
			}
			fmt.Println(escape(im.Name))
			return nil
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "keep it under this `NAME` (default: the file's own)")
	cmd.Flags().BoolVar(&trim, "trim", false, "mask units of systemd that a microVM does not need")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the image as JSON")
	return cmd
}

func imageSeedCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "seed IMAGE DIR",
		Short: "Choose what /root holds in new VMs of an image",
		Long: `Replace the work seed of an image: what the work disk of a new VM, which the
guest has at /root, is filled with. It starts as the image's own /root. VMs that
exist keep what they have. Whoever owns DIR is root in the guest; other owners
stay as they are.

EXAMPLE
  banger image seed debian ~/dotfiles`,
		Args: exactly("IMAGE", "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := openNamed(args[1])
			if err != nil {
				return err
			}
			defer f.Close()
			params := api.SeedParams{Image: args[0], Source: api.Source{Reference: "rootfs:" + args[1], File: 0, Packages: -1}}
			var im banger.Image
			if err := call(api.MethodImageSeed, params, []*os.File{f}, &im); err != nil {
				return err
			}
			if asJSON {
				return printJSON(im)
			}
			fmt.Println(escape(im.Name))
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the image as JSON")
	return cmd
}
