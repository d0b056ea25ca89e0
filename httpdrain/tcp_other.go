//go:build !linux

package httpdrain

import (
	"net"
	"time"
)

// lastReceived cannot tell on this platform.
func lastReceived(net.Conn, time.Time) (at time.Time, ok bool) { return time.Time{}, false }

// clientClosed cannot tell on this platform.
func clientClosed(net.Conn) bool { return false }

// lastTransfer cannot tell on this platform.
func lastTransfer(net.Conn, time.Time) (at time.Time, ok bool) { return time.Time{}, false }
