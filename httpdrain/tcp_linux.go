package httpdrain

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lastTransfer returns when the kernel received something on a TCP connection last, whether
// or not the server has read it, when it sent something last, and whether it can tell. Both
// are accurate to transferTick.
func lastTransfer(nc net.Conn, now time.Time) (received, sent time.Time, ok bool) {
	info, ok := tcpInfo(nc)
	if !ok {
		return time.Time{}, time.Time{}, false
	}
	before := func(milliseconds uint32) time.Time { return now.Add(-time.Duration(milliseconds) * time.Millisecond) }
	return before(info.Last_data_recv), before(info.Last_data_sent), true
}

// States of TCP in which the other end has closed: include/net/tcp_states.h of Linux.
const (
	tcpTimeWait  = 6
	tcpClose     = 7
	tcpCloseWait = 8
	tcpLastAck   = 9
	tcpClosing   = 11
)

// clientClosed reports whether the kernel knows that the client has closed.
func clientClosed(nc net.Conn) bool {
	info, ok := tcpInfo(nc)
	if !ok {
		return false
	}
	switch info.State {
	case tcpTimeWait, tcpClose, tcpCloseWait, tcpLastAck, tcpClosing:
		return true
	}
	return false
}

func tcpInfo(nc net.Conn) (info *unix.TCPInfo, ok bool) {
	sc, ok := bare(nc).(syscall.Conn)
	if !ok {
		return nil, false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, false
	}
	controlErr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	return info, err == nil && controlErr == nil
}
