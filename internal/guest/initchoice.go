package guest

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"banger/internal/wire"
)

// An initKind says how PID 1 is asked to shut down.
type initKind string

const (
	kindSystemd initKind = "systemd"
	kindOpenRC  initKind = "openrc-init"
	kindBusybox initKind = "busybox"
	kindOther   initKind = "other"  // an init that we do not know how to ask
	kindReaper  initKind = "reaper" // our own
)

// An initChoice is what PID 1 becomes.
type initChoice struct {
	Kind initKind `json:"kind"`
	Path string   `json:"path,omitempty"` // to execute, as the image names it
	Args []string `json:"args"`
}

func (c initChoice) String() string {
	if c.Kind == kindReaper {
		return string(c.Kind)
	}
	return fmt.Sprintf("%s (%s)", c.Path, c.Kind)
}

// defaultInit is where an image's init is looked for, as the kernel would.
const defaultInit = "/sbin/init"

// chooseInit decides what PID 1 of the image at root becomes: with "auto" the
// image's command if that is an init; else, unless the image has a program of
// its own to run, a systemd or openrc-init that is installed as /sbin/init;
// else our own reaper.
func chooseInit(root string, c *wire.BootConfig) (initChoice, error) {
	reaper := initChoice{Kind: kindReaper, Args: []string{reaperName}}
	switch c.Init {
	case "agent":
		return reaper, nil
	case "auto", "", "image":
	default:
		return reaper, fmt.Errorf("init %q: not one of auto, image, agent", c.Init)
	}
	if command := slices.Concat(c.Entrypoint, c.Cmd); len(command) > 0 {
		if kind, ok := initAt(root, command[0]); ok {
			return initChoice{kind, command[0], command}, nil
		}
	}
	kind, ok := initAt(root, defaultInit)
	installed := initChoice{kind, defaultInit, []string{defaultInit}}
	if c.Init == "image" {
		if !ok {
			return reaper, fmt.Errorf("init: the image has no %s, and its command is not an init", defaultInit)
		}
		return installed, nil
	}
	plain := len(c.Entrypoint) == 0 && (len(c.Cmd) == 0 || wire.IsShell(c.Cmd))
	if ok && plain && (kind == kindSystemd || kind == kindOpenRC) {
		return installed, nil
	}
	return reaper, nil
}

// initAt says whether program, as an image names it, is an init, and which.
// What it is called decides, and what the name leads to: busybox and sysvinit
// act as init under that name only, systemd under any.
func initAt(root, program string) (initKind, bool) {
	if !path.IsAbs(program) {
		return "", false
	}
	target, fi, err := resolveIn(root, program)
	if err != nil || !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 {
		return "", false
	}
	switch base := path.Base(target); {
	case base == "systemd":
		return kindSystemd, true
	case base == "openrc-init":
		return kindOpenRC, true
	case path.Base(program) != "init":
		return "", false
	case strings.HasPrefix(base, "busybox"):
		return kindBusybox, true
	}
	return kindOther, true
}
