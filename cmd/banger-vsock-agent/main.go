// Command banger-vsock-agent is banger's guest binary: the first process of a
// guest, the agent beside its init, and the last process at power-off. Package
// guest says which it is when.
package main

import (
	"os"

	"banger/internal/guest"
)

func main() { os.Exit(guest.Main(os.Args)) }
