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
		s.Network = networkOf(socketType, "unix", "unixgram", "unixpacket", "")
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
	s.Network = networkOf(socketType, "tcp", "udp", "", "ip")
	return s, nil
}

// networkOf returns the name that a family gives to its sockets of this type.
func networkOf(socketType int, stream, datagram, packet, raw string) string {
	switch socketType {
	case unix.SOCK_STREAM:
		return stream
	case unix.SOCK_DGRAM:
		return datagram
	case unix.SOCK_SEQPACKET:
		return packet
	case unix.SOCK_RAW:
		return raw
	}
	return ""
}

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
