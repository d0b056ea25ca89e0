//go:build !linux

package httpdrain

import "net"

// received cannot tell on this platform.
func received(net.Conn) (n uint64, ok bool) { return 0, false }
