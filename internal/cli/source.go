package cli

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"banger"
	"banger/internal/api"
)

// sourceFlags are the flags of every command that gets an image.
type sourceFlags struct {
	packages string
	platform string
	trim     optionalBool
}

func (s *sourceFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.packages, "packages", "", "for apt: images, a `FILE` of more packages, one name a line")
	cmd.Flags().StringVar(&s.platform, "platform", "", "of an image for several, the one for `OS/ARCH` (default linux/amd64)")
	f := cmd.Flags().VarPF(&s.trim, "trim", "", "mask units of systemd that a microVM does not need (default: of apt: images)")
	f.NoOptDefVal = "true"
}

// An optionalBool is a flag that knows whether it was given.
type optionalBool struct{ value *bool }

func (b *optionalBool) String() string {
	if b.value == nil {
		return ""
	}
	return strconv.FormatBool(*b.value)
}

func (b *optionalBool) Set(text string) error {
	v, err := strconv.ParseBool(text)
	if err != nil {
		return errors.New("it is true or false")
	}
	b.value = &v
	return nil
}

func (b *optionalBool) Type() string { return "bool" }

// open makes the Source of a reference and opens what it and the flags name.
func (s *sourceFlags) open(reference string) (src api.Source, files []*os.File, err error) {
	src = api.Source{Reference: reference, File: -1, Packages: -1, Platform: s.platform, Trim: s.trim.value}
	if reference == "-" {
		if term.IsTerminal(int(os.Stdin.Fd())) {
			return src, nil, usagef("-: standard input is a terminal").WithHint("docker save IMAGE | banger image pull --name NAME -")
		}
		src.File, files = 0, []*os.File{os.Stdin}
	} else if path, ok := localPath(reference); ok {
		f, err := openNamed(path)
		if err != nil {
			return src, nil, err
		}
		src.File = len(files)
		files = append(files, f)
	}
	if s.packages != "" {
		f, err := openNamed(s.packages)
		if err != nil {
			return src, nil, err
		}
		src.Packages = len(files)
		src.PackagesName = s.packages
		files = append(files, f)
	}
	return src, files, nil
}

// localPath is the path in a reference that names something of the user's:
// oci:DIR[:TAG], rootfs:PATH, docker-archive:FILE[:NAME:TAG] and ./FILE.tar.
func localPath(reference string) (string, bool) {
	if path, ok := strings.CutPrefix(reference, "rootfs:"); ok {
		return path, true
	}
	for _, scheme := range []string{"docker-archive:", "oci-archive:"} {
		if rest, ok := strings.CutPrefix(reference, scheme); ok {
			path, _, _ := strings.Cut(rest, ":")
			return path, true
		}
	}
	if strings.HasPrefix(reference, ".") || strings.HasPrefix(reference, "/") {
		return reference, true // an archive, or the daemon says what to call it
	}
	path, ok := strings.CutPrefix(reference, "oci:")
	if !ok {
		return "", false
	}
	// A tag has no slash, so what follows the last colon is one only if the
	// whole is not itself a folder.
	if i := strings.LastIndexByte(path, ':'); i > 0 && !strings.Contains(path[i:], "/") {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			path = path[:i]
		}
	}
	return path, true
}

// openNamed opens what the user named on the command line.
func openNamed(path string) (*os.File, error) {
	f, err := os.Open(path)
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return nil, banger.Errorf(banger.CodeNotFound, "%s: %w", path, pathErr.Err).WithHint("check the path")
	}
	return f, err
}
