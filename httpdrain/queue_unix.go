//go:build unix

package httpdrain

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// isWaiting reports whether it is known that a connection waits in the queue of a
// listener.
func isWaiting(ln any) bool {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	raw.Control(func(fd uintptr) {
		n, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	return n > 0
}
