package registry

import (
	"net"
	"net/netip"
	"strconv"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
)

// ManagerNetwork is the network by which a socket that the service manager passed is
// claimed by the manager's name for it, as its address.
const ManagerNetwork = "systemd"

// A listenAddr is the parsed address that a caller asks for.
type listenAddr struct {
	addrKey
	family   string     // "6" of "tcp6"
	ip       netip.Addr // invalid for "", "*" and "localhost"
	wildcard bool       // all addresses
}

// An addrKey is equal for all addresses that may stand for one another.
type addrKey struct {
	network string // tcp, udp, unix, unixgram or unixpacket
	port    uint16
	host    netip.Addr // 0.0.0.0 for all addresses, 127.0.0.1 for those of "localhost"
	path    string     // canonical
}

var (
	anyHost   = netip.IPv4Unspecified()
	localhost = netip.AddrFrom4([4]byte{127, 0, 0, 1})
)

// parseListenAddr returns the address that a listener or packet conn of this name is to be
// bound to. It resolves no host name except "localhost". For any other, host is invalid. It
// returns false for a name that means no particular socket.
func parseListenAddr(n nametable.Name) (want listenAddr, ok bool) {
	if n.Kind != nametable.Listener && n.Kind != nametable.PacketConn {
		return listenAddr{}, false
	}
	switch n.Network {
	case "unix", "unixgram", "unixpacket":
		want.network, want.path = n.Network, unixKey(n.Addr)
		return want, n.Addr != ""
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
	default:
		return listenAddr{}, false
	}

	host, service, _ := net.SplitHostPort(n.Addr)
	port, _ := net.LookupPort(n.Network, service)
	if port == 0 { // or there was an error
		return listenAddr{}, false
	}
	want.network, want.family, want.port = n.Network[:3], n.Network[3:], uint16(port)
	switch host {
	case "", "*":
		want.wildcard, want.host = true, anyHost
	case "localhost":
		want.host = localhost
	default:
		ip, _ := netip.ParseAddr(host) // invalid for a name
		want.ip = withNamedZone(ip.Unmap())
		want.wildcard = want.ip.IsUnspecified()
		want.host = hostKey(want.ip)
	}
	return want, true
}

// unixKey returns the same spelling for all spellings of a Unix socket's address.
func unixKey(addr string) string {
	switch {
	case isPath(addr):
		return canonical(addr)
	case addr != "" && addr[0] == 0:
		return "@" + addr[1:]
	}
	return addr
}

// withNamedZone has ip's zone be the name of an interface, not its number.
func withNamedZone(ip netip.Addr) netip.Addr {
	index, _ := strconv.Atoi(ip.Zone()) // of no interface, if it is no number
	if link, err := net.InterfaceByIndex(index); err == nil {
		return ip.WithZone(link.Name)
	}
	return ip
}

func hostKey(ip netip.Addr) netip.Addr {
	switch ip {
	case netip.IPv6Unspecified():
		return anyHost
	case netip.IPv6Loopback():
		return localhost
	}
	return ip
}

// keyOf returns the key of e, which is bound to s.
func keyOf(e *entry, s descriptor.Socket) addrKey {
	switch {
	case e.file != nil: // s.Path may be relative, or a former name
		return addrKey{network: s.Network, path: canonical(e.file.path)}
	case isUnix(s.Network):
		return addrKey{network: s.Network, path: unixKey(s.Path)}
	}
	return addrKey{network: s.Network, port: s.Bound.Port(), host: hostKey(s.Bound.Addr().Unmap())}
}

// matches reports whether s, which has the same key, can be claimed as want. Unless
// exactly is set, all wildcard addresses are the same, because a socket bound to one of
// them is in the way of a new one bound to another.
func (want listenAddr) matches(s descriptor.Socket, exactly bool) bool {
	ip := s.Bound.Addr().Unmap()
	if want.family == "4" && ip.Is6() && !s.DualStack || want.family == "6" && ip.Is4() {
		return false
	}
	switch {
	case want.wildcard && exactly && want.ip.IsValid():
		return ip == want.ip
	case want.wildcard && exactly:
		return ip.Is4() || s.DualStack
	case want.wildcard, !want.ip.IsValid(): // also of a Unix socket
		return true
	default:
		return ip == want.ip
	}
}

// isInTheWay reports whether a socket of this key may keep a new one from being bound
// to want.
func (want listenAddr) isInTheWay(key addrKey) bool {
	if isUnix(want.network) {
		return isUnix(key.network) && want.path == key.path
	}
	return want.network == key.network && want.port == key.port
}
