// Command bangerd is the daemon of banger. The command line starts it.
package main

import (
	"os"

	"banger/internal/daemon"
)

func main() { os.Exit(daemon.Main(os.Args)) }
