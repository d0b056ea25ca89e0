//go:build go1.27

package httpdrain

import (
	"crypto/tls"
	"net"
)

// Since Go 1.27, the server takes any connection for one with TLS that has the
// methods which it needs; but those of Server.TLSNextProto are called only for a
// *tls.Conn.

func (d *Drainer) framedTLS(nc net.Conn) net.Conn {
	if encrypted, ok := nc.(*tls.Conn); ok && !d.ownProtocols {
		return tlsConn{d.framed(nc), encrypted}
	}
	return nc
}

func (d *Drainer) frameNextProto() {}
