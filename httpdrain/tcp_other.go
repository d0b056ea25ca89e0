//go:build !linux

package httpdrain

import (
	"net"
	"time"
)

// clientClosed cannot tell on this platform.
func clientClosed(net.Conn) bool { return false }

// lastTransfer cannot tell on this platform.
func lastTransfer(net.Conn, time.Time) (received, sent time.Time, ok bool) {
	return time.Time{}, time.Time{}, false
}
