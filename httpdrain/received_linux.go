package httpdrain

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// received returns how many bytes the kernel has received on a TCP connection,
// whether or not the server has read them, and whether it can tell.
func received(nc net.Conn) (n uint64, ok bool) {
	for {
		inner, wrapped := nc.(interface{ NetConn() net.Conn })
		if !wrapped {
			break
		}
		nc = inner.NetConn()
	}
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return 0, false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, false
	}
	controlErr := raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Bytes_received
		}
	})
	return n, err == nil && controlErr == nil
}
