package cli

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"banger"
	"banger/internal/api"
)

func kernelCommand() *cobra.Command {
	return group("kernel", "Get, import, list and remove guest kernels",
		kernelPullCommand(), kernelImportCommand(), kernelListCommand(), kernelRemoveCommand())
}

func printKernel(k banger.Kernel, asJSON bool) error {
	if asJSON {
		return printJSON(k)
	}
	fmt.Println(escape(k.Version))
	return nil
}

func kernelPullCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "pull [SUITE]",
		Short: "Get Debian's cloud kernel, verified from the archive's key down",
		Long: `Get Debian's cloud kernel of a suite (bookworm unless another is named). The
archive's signature, the package lists and the package are all verified.

EXAMPLE
  banger kernel pull
  banger kernel pull trixie`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return exactly("[SUITE]")(cmd, args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var p api.PullKernel
			if len(args) == 1 {
				p.Suite = args[0]
			}
			var k banger.Kernel
			if err := call(api.MethodKernelPull, p, nil, &k); err != nil {
				return err
			}
			return printKernel(k, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the kernel as JSON")
	return cmd
}

func kernelImportCommand() *cobra.Command {
	var modules string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "import [FLAGS] VMLINUZ|VMLINUX",
		Short: "Bring a kernel of your own",
		Long: `Bring a kernel of your own: a bzImage or an uncompressed vmlinux for x86-64 that
boots by PVH, with the folder of its modules.

EXAMPLE
  banger kernel import /boot/vmlinuz-6.1.0-49-amd64 --modules /lib/modules/6.1.0-49-amd64`,
		Args: exactly("VMLINUZ"),
		RunE: func(cmd *cobra.Command, args []string) error {
			image, err := openNamed(args[0])
			if err != nil {
				return err
			}
			p := api.ImportKernel{Image: 0, Modules: -1}
			files := []*os.File{image}
			if modules != "" {
				dir, err := openNamed(modules)
				if err != nil {
					return err
				}
				p.Modules = 1
				files = append(files, dir)
			}
			var k banger.Kernel
			if err := call(api.MethodKernelImport, p, files, &k); err != nil {
				return err
			}
			return printKernel(k, asJSON)
		},
	}
	cmd.Flags().StringVar(&modules, "modules", "", "take its modules from `DIR`, like /lib/modules/VERSION")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the kernel as JSON")
	return cmd
}

func kernelListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the kernels in the store",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list api.Kernels
			if err := call(api.MethodKernelList, api.None{}, nil, &list); err != nil {
				return err
			}
			if asJSON {
				return printJSON(list.Kernels)
			}
			rows := [][]string{{"VERSION", "SOURCE", "SIZE", "DEFAULT"}}
			for _, k := range list.Kernels {
				mark := ""
				if k.Default {
					mark = "yes"
				}
				rows = append(rows, []string{k.Version, k.Source, size(k.SizeBytes), mark})
			}
			return table(rows)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON list")
	return cmd
}

func kernelRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm VERSION...",
		Short: "Remove kernels from the store",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return eachOf(cmd, args, "VERSION", func(version string) error {
				return call(api.MethodKernelRemove, api.Named{Name: version}, nil, &api.None{})
			})
		},
	}
}
