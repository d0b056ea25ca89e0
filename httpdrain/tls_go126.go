//go:build !go1.27

package httpdrain

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"time"
)

// Until Go 1.26, the server serves TLS only on a *tls.Conn, but it calls functions
// of Server.TLSNextProto to serve HTTP/2. One of them is for connections without
// TLS, and takes any with a method ConnectionState for one with TLS.

func (d *Drainer) framedTLS(nc net.Conn) net.Conn { return nc }

// frameNextProto must be called after the server has set up its protocols, before it
// accepts.
func (d *Drainer) frameNextProto() {
	protocols := d.srv.TLSNextProto
	serve := protocols["unencrypted_http2"]
	if serve == nil || protocols["h2"] == nil || d.ownHTTP2 {
		return
	}
	protocols["h2"] = func(srv *http.Server, nc *tls.Conn, h http.Handler) {
		c := d.framed(nc)
		if known, ok := d.conns.Load(nc); ok {
			known.(*conn).attach(c)
		}
		// serve expects that the preface has been read.
		const timeout = 10 * time.Second // that of net/http
		c.SetReadDeadline(time.Now().Add(timeout))
		if _, err := io.ReadFull(c, make([]byte, len(preface))); err != nil || !c.http2.Load() {
			return
		}
		c.SetReadDeadline(time.Time{})
		serve(srv, tls.Client(carrier{tlsConn{c, nc}}, nil), h)
	}
}

// carrier brings a connection in a *tls.Conn to the server.
type carrier struct{ net.Conn }

func (c carrier) UnencryptedNetConn() net.Conn { return c.Conn }
