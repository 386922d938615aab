// Command banger is the command line of banger.
package main

import (
	"os"

	"banger/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args)) }
