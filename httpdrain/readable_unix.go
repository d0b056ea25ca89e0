//go:build unix

package httpdrain

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// isReadable reports whether something waits to be read from a connection, or a connection
// in the queue of a listener, and whether that is known.
func isReadable(of any) (readable, known bool) {
	sc, ok := of.(syscall.Conn)
	if !ok {
		return false, false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false, false
	}
	n := -1
	raw.Control(func(fd uintptr) {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	return n > 0, n >= 0 && err == nil
}
