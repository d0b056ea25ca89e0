//go:build unix

package descriptor

import (
	"net"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// IdentifySocket returns what kind of socket fd is. It is no error if fd is no socket.
func IdentifySocket(fd uintptr) (Socket, error) {
	socketType, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
	if err == unix.ENOTSOCK {
		return Socket{}, nil
	}
	if err != nil {
		return Socket{}, os.NewSyscallError("getsockopt SO_TYPE", err)
	}

	bound, err := unix.Getsockname(int(fd))
	if err == unix.EAFNOSUPPORT {
		return Socket{}, nil
	}
	if err != nil {
		return Socket{}, os.NewSyscallError("getsockname", err)
	}

	s := Socket{Datagram: socketType == unix.SOCK_DGRAM}
	if accepting, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); accepting != 0 {
		s.Listening = true
	}

	switch bound := bound.(type) {
	case *unix.SockaddrUnix:
		s.Network = unixNetworks[socketType]
		s.Path = bound.Name
		return s, nil
	case *unix.SockaddrInet4:
		s.Bound = netip.AddrPortFrom(netip.AddrFrom4(bound.Addr), uint16(bound.Port))
	case *unix.SockaddrInet6:
		ip := netip.AddrFrom16(bound.Addr).WithZone(zone(bound.ZoneId))
		s.Bound = netip.AddrPortFrom(ip, uint16(bound.Port))
		only, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		s.DualStack = ip.IsUnspecified() && only == 0
	default:
		return Socket{}, nil
	}
	s.Network = inetNetworks[socketType]
	return s, nil
}

var (
	unixNetworks = map[int]string{unix.SOCK_STREAM: "unix", unix.SOCK_DGRAM: "unixgram", unix.SOCK_SEQPACKET: "unixpacket"}
	inetNetworks = map[int]string{unix.SOCK_STREAM: "tcp", unix.SOCK_DGRAM: "udp", unix.SOCK_RAW: "ip"}
)

// zone returns the name of the interface that an address of IPv6 belongs to.
func zone(index uint32) string {
	if index == 0 {
		return ""
	}
	if link, err := net.InterfaceByIndex(int(index)); err == nil {
		return link.Name
	}
	return strconv.Itoa(int(index))
}
