package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/api"
)

func imageCommand() *cobra.Command {
	return group("image", "Get, build, list and remove images",
		imagePullCommand(), imageBuildCommand(), imageRegisterCommand(), imageSeedCommand(),
		imageListCommand(), imageInspectCommand(), imageHistoryCommand(), imageVerifyCommand(),
		imageTagCommand(), imageRemoveCommand(), imagePruneCommand(), imageExportCommand(), imageImportCommand())
}

const referenceHelp = `REFERENCE is one of
  debian, ghcr.io/owner/name:tag, host/name@sha256:...   from a registry, as in Docker
  oci:DIR[:TAG]                                          an OCI image layout
  docker-archive:FILE[:NAME:TAG], ./FILE.tar, -          what "docker save" or "banger image export" wrote
  rootfs:DIR, rootfs:FILE.tar                            a root file system
  apt:SUITE                                              built from Debian's packages`

func imagePullCommand() *cobra.Command {
	var source sourceFlags
	var name string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "pull [FLAGS] REFERENCE",
		Short: "Get an image and make its base image",
		Long: `Get an image, check it, and make the base image that VMs start from.

EXAMPLE
  banger image pull debian:bookworm
  banger image pull apt:bookworm --packages packages.txt

` + referenceHelp,
		Args: exactly("REFERENCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, files, err := source.open(args[0])
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
	source.add(cmd)
	cmd.Flags().StringVar(&name, "name", "", "keep it under this `NAME`")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the image as JSON")
	return cmd
}

func imageBuildCommand() *cobra.Command {
	var source sourceFlags
	var output, sizeText string
	var noGuest, asJSON bool
	cmd := &cobra.Command{
		Use:   "build [FLAGS] REFERENCE -o FILE",
		Short: "Write an image as an ext4 file, without the store",
		Long: `Write an image as one ext4 file system to a new file. Nothing goes into the
store.

EXAMPLE
  banger image build debian:bookworm -o debian.ext4 --size 8G

` + referenceHelp,
		Args: exactly("REFERENCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return usagef("image build: no file to write").WithHint("name one with -o FILE")
			}
			var sizeBytes int64
			if sizeText != "" {
				var err error
				if sizeBytes, err = parseSize(sizeText); err != nil {
					return usagef("--size %q: %w", sizeText, err).WithHint("write it like 8G or 512M")
				}
			}
			src, files, err := source.open(args[0])
			if err != nil {
				return err
			}
			out, err := newOutput(output)
			if err != nil {
				return err
			}
			defer out.discard()
			params := api.BuildParams{Source: src, Output: len(files), SizeBytes: sizeBytes, NoGuest: noGuest}
			var built api.Built
			if err := call(api.MethodImageBuild, params, append(files, out.f), &built); err != nil {
				return err
			}
			if err := out.commit(); err != nil {
				return err
			}
			for _, note := range built.Notes {
				fmt.Fprintf(os.Stderr, "banger: %s\n", escape(note))
			}
			if asJSON {
				return printJSON(built)
			}
			fmt.Printf("%s: %d entries, %s (%s on disk)\n", output, built.Entries, size(built.SizeBytes), size(built.AllocatedBytes))
			return nil
		},
	}
	source.add(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "", "write `FILE`, which must not exist")
	cmd.Flags().StringVar(&sizeText, "size", "", "make the file system `SIZE` large, like 8G (default: by content)")
	cmd.Flags().BoolVar(&noGuest, "no-guest", false, "leave banger's guest files out")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print what was built as JSON")
	return cmd
}

// output is a file that gets its name only when it is whole. Until then it
// has none where the file system allows that, so nothing can be left behind.
type output struct {
	f     *os.File
	path  string
	named string // the temporary name, where one was needed
}

func newOutput(path string) (*output, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, banger.Errorf(banger.CodeConflict, "%s: it exists already", path).
			WithHint("remove it first, or name another file")
	}
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err == nil {
		return &output{f: os.NewFile(uintptr(fd), path), path: path}, nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, banger.Errorf(banger.CodeUnavailable, "%s: %w", dir, err).WithHint("check the folder of -o")
	}
	return newNamedOutput(path)
}

// newNamedOutput is for file systems that have no files without a name.
func newNamedOutput(path string) (*output, error) {
	named := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d", filepath.Base(path), os.Getpid()))
	f, err := os.OpenFile(named, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644) // as without a name, so that the umask counts
	if err != nil {
		return nil, err
	}
	return &output{f: f, path: path, named: named}, nil
}

// commit gives the file its name, unless something took that meanwhile.
func (o *output) commit() error {
	if o.named != "" {
		if err := os.Link(o.named, o.path); err != nil {
			return err
		}
		os.Remove(o.named)
		o.named = ""
	} else {
		proc := fmt.Sprintf("/proc/self/fd/%d", o.f.Fd())
		if err := unix.Linkat(unix.AT_FDCWD, proc, unix.AT_FDCWD, o.path, unix.AT_SYMLINK_FOLLOW); err != nil {
			return fmt.Errorf("%s: %w", o.path, err)
		}
	}
	dir, err := os.Open(filepath.Dir(o.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// discard lets go of the file; without a commit before, nothing of it stays.
func (o *output) discard() {
	o.f.Close()
	if o.named != "" {
		os.Remove(o.named)
	}
}

func imageListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the images in the store",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list api.Images
			if err := call(api.MethodImageList, api.None{}, nil, &list); err != nil {
				return err
			}
			if asJSON {
				return printJSON(list.Images)
			}
			rows := [][]string{{"NAME", "ID", "SIZE", "ON DISK", "CREATED"}}
			for _, im := range list.Images {
				rows = append(rows, []string{im.Name, im.ID, size(im.SizeBytes), size(im.AllocatedBytes), im.Created.Local().Format("2006-01-02 15:04")})
			}
			return table(rows)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON list")
	return cmd
}

func imageInspectCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect NAME",
		Short: "Show an image of the store",
		Args:  exactly("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var im banger.Image
			if err := call(api.MethodImageInspect, api.Named{Name: args[0]}, nil, &im); err != nil {
				return err
			}
			if asJSON {
				return printJSON(im)
			}
			digest := "none"
			if im.Digest != nil {
				digest = *im.Digest
			}
			return table([][]string{
				{"name", im.Name}, {"id", im.ID}, {"reference", im.Reference}, {"digest", digest},
				{"base digest", im.BaseDigest}, {"rootfs", im.Rootfs}, {"work seed", im.WorkSeed}, {"size", size(im.SizeBytes)},
				{"on disk", size(im.AllocatedBytes)}, {"platform", im.Platform}, {"created", im.Created.String()},
				{"entrypoint", strings.Join(im.Config.Entrypoint, " ")}, {"cmd", strings.Join(im.Config.Cmd, " ")},
				{"user", im.Config.User}, {"working dir", im.Config.WorkingDir}, {"trimmed", strconv.FormatBool(im.Trimmed)},
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON document")
	return cmd
}

func imageRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove images from the store",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return eachOf(cmd, args, "NAME", func(name string) error {
				var im banger.Image
				return call(api.MethodImageRemove, api.Named{Name: name}, nil, &im)
			})
		},
	}
}

// eachOf does something for every argument, printing each that worked, and
// returns the first error after it tried them all.
func eachOf(cmd *cobra.Command, args []string, what string, do func(string) error) error {
	if len(args) == 0 {
		return usagef("%s: it takes at least one %s", cmd.CommandPath(), what)
	}
	var first error
	for _, arg := range args {
		err := do(arg)
		if err == nil {
			fmt.Println(escape(arg))
			continue
		}
		if first == nil {
			first = err
		} else {
			printError(os.Stderr, err)
		}
	}
	return first
}
