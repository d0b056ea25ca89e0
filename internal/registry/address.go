package registry

import (
	"net"
	"net/netip"
	"os"
	"strings"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// ManagerNetwork is the network by which a socket that the service manager passed is
// claimed by the manager's name for it, as its address.
const ManagerNetwork = "systemd"

// A listenAddr is what a caller asks for, understood.
type listenAddr struct {
	network, family    string // "tcp6" is "tcp" and "6"
	ip                 netip.Addr
	wildcard, loopback bool // all addresses, or any of this host's own
	port               uint16
	path               string
}

// parseListenAddr returns false for what names no particular socket. It resolves no
// host name but "localhost".
func parseListenAddr(n nametable.Name) (listenAddr, bool) {
	switch n.Network {
	case "unix", "unixgram", "unixpacket":
		path := n.Addr
		if !strings.HasPrefix(path, "@") && !strings.HasPrefix(path, "/") {
			if dir, err := os.Getwd(); err == nil {
				path = dir + "/" + path
			}
		}
		return listenAddr{network: n.Network, path: path}, n.Addr != ""
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
	default:
		return listenAddr{}, false
	}

	host, service, err := net.SplitHostPort(n.Addr)
	if err != nil {
		return listenAddr{}, false
	}
	port, err := net.LookupPort(n.Network, service)
	if err != nil {
		return listenAddr{}, false
	}

	want := listenAddr{network: n.Network[:3], family: n.Network[3:], port: uint16(port)}
	switch host {
	case "", "*":
		want.wildcard = true
	case "localhost":
		want.loopback = true
	default:
		if want.ip, err = netip.ParseAddr(host); err != nil {
			return listenAddr{}, false
		}
		want.ip = want.ip.Unmap()
		want.wildcard = want.ip.IsUnspecified()
	}
	return want, true
}

// matches reports whether s serves who asks for want. If not exactly, any address
// that stands for all is as good as another, because a socket bound to one is in the
// way of a new one bound to the other.
func (want listenAddr) matches(s descriptor.Socket, exactly bool) bool {
	if s.Network != want.network {
		return false
	}
	if s.Network != "tcp" && s.Network != "udp" {
		return s.Path == want.path
	}

	ip := s.Bound.Addr().Unmap()
	if s.Bound.Port() != want.port || want.family == "4" && ip.Is6() && !s.DualStack || want.family == "6" && ip.Is4() {
		return false
	}
	switch {
	case want.wildcard && exactly && want.ip.IsValid():
		return ip == want.ip
	case want.wildcard && exactly:
		return ip.IsUnspecified() && (ip.Is4() || s.DualStack)
	case want.wildcard:
		return ip.IsUnspecified()
	case want.loopback:
		return ip.IsLoopback()
	default:
		return ip == want.ip
	}
}

// addrOf returns what s is bound to.
func addrOf(s descriptor.Socket) net.Addr {
	switch s.Network {
	case "tcp":
		return net.TCPAddrFromAddrPort(s.Bound)
	case "udp":
		return net.UDPAddrFromAddrPort(s.Bound)
	default:
		return &net.UnixAddr{Net: s.Network, Name: s.Path}
	}
}
