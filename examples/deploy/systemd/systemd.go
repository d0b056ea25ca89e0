// Package systemd holds the units of this directory. The tests of
// internal/systemdtest, another module, run what is in it.
package systemd

import "embed"

// Units are the unit files.
//
//go:embed *.service *.socket
var Units embed.FS
