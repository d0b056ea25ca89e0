//go:build !unix

package control

import (
	"errors"
	"io/fs"
	"net"
)

// listen is for stubs of an Upgrader: there are no upgrades here.
func listen(network, path string) (net.Listener, error) { return net.Listen(network, path) }

// isNobody reports whether err says that no process listens.
func isNobody(err error) bool { return errors.Is(err, fs.ErrNotExist) }
