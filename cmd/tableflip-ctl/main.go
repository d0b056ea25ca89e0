// Command tableflip-ctl asks a service for an upgrade, a rehearsal, its status, its end,
// or the steps of its upgrades, and says by its exit status how that went. Package
// control, whose socket it uses, says more.
package main

import (
	"os"

	"example.com/tableflip/control"
)

func main() { os.Exit(control.Main(os.Args[1:]...)) }
