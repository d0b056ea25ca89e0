package service

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"

	"example.com/tableflip/httpdrain"
)

// This file owns what is HTTP's: what can fail of a server before the process is ready,
// and how it drains.

// HTTP returns a Server that runs server, which must not be serving yet, and drains it
// as package httpdrain does.
//
// Its Addr is HOST:PORT, as for net/http (":http" if it is empty, ":https" with TLS), or
// names a Unix socket, by a path that begins with a slash or by an abstract name that
// begins with @. If its TLSConfig is not nil, it serves TLS with the certificates that
// are in it. Run tries its set-up, down to a TLS handshake in memory, before it reports
// that the process is ready: a new version that could not serve fails, and the old one
// goes on.
//
// Handlers of long-lived responses (streams, server-sent events) and users of hijacked
// connections (WebSocket) end when the Upgrader's Exit is closed; the functions of
// Server.RegisterOnShutdown are called too late for that. Options.WaitHijacked has the
// drain wait for hijacked connections, too.
func HTTP(server *http.Server) Server {
	return Server{func(p *process) (*front, error) {
		addr := server.Addr
		switch {
		case addr == "" && server.TLSConfig != nil:
			addr = ":https"
		case addr == "":
			addr = ":http"
		}
		if err := rehearse(server); err != nil {
			return nil, fmt.Errorf("service: the server on %s can't serve: %w", addr, err)
		}
		ln, err := p.listen("tcp", addr)
		if err != nil {
			return nil, err
		}
		drainer := httpdrain.New(server)
		drainer.IdleGrace = p.opts.IdleGrace
		drainer.WaitHijacked = p.opts.WaitHijacked
		return &front{
			name: "the server on " + ln.Addr().String(),
			serve: func() error {
				serve := drainer.Serve
				if server.TLSConfig != nil {
					serve = func(ln net.Listener) error { return drainer.ServeTLS(ln, "", "") }
				}
				if err := serve(ln); !errors.Is(err, http.ErrServerClosed) {
					return err
				}
				return nil
			},
			shutdown: func(ctx context.Context) error {
				// The queue of the listener is the successor's.
				drainer.Replaced = p.upg.Replaced()
				return drainer.Shutdown(ctx)
			},
			close: ln.Close,
			connections: func() int {
				progress := drainer.Progress()
				return progress.Connections + progress.Hijacked
			},
		}, nil
	}}
}

// rehearse has net/http set up a copy of the server, which fails where the server
// would: net/http does so only when it begins to serve, and then this process is in
// charge.
func rehearse(server *http.Server) error {
	rehearsal := &http.Server{
		TLSConfig:    server.TLSConfig.Clone(),
		TLSNextProto: maps.Clone(server.TLSNextProto),
		Protocols:    server.Protocols,
		HTTP2:        server.HTTP2,
		ErrorLog:     log.New(io.Discard, "", 0),
	}
	serve := rehearsal.Serve
	if config := server.TLSConfig; config != nil {
		if len(config.Certificates) == 0 && config.GetCertificate == nil && config.GetConfigForClient == nil {
			return errNoCertificate
		}
		serve = func(ln net.Listener) error { return rehearsal.ServeTLS(ln, "", "") }
	}
	if err := serve(noListener{}); !errors.Is(err, errRehearsed) {
		return err
	}
	return handshake(server.TLSConfig)
}

var errNoCertificate = errors.New("its TLSConfig has no certificate: set Certificates (tls.LoadX509KeyPair reads the files that ListenAndServeTLS took), GetCertificate or GetConfigForClient; to serve without TLS, leave TLSConfig nil (http2.ConfigureServer of golang.org/x/net sets it: Server.Protocols has HTTP/2 without TLS)")

// A noListener has net/http stop when it would begin to accept.
type noListener struct{}

var errRehearsed = errors.New("service: rehearsed")

func (noListener) Accept() (net.Conn, error) { return nil, errRehearsed }
func (noListener) Close() error              { return nil }
func (noListener) Addr() net.Addr            { return &net.TCPAddr{} }

// handshake tries a configuration on a client that understands everything. Where it
// is the client that decides which certificate it gets, there is nothing to try.
func handshake(config *tls.Config) error {
	if config == nil || config.GetCertificate != nil || config.GetConfigForClient != nil {
		return nil
	}
	config = config.Clone()
	config.KeyLogWriter = nil
	// The client has nothing to show.
	config.ClientAuth, config.VerifyPeerCertificate, config.VerifyConnection = tls.NoClientCert, nil, nil

	clientConfig := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10}
	for _, suite := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		clientConfig.CipherSuites = append(clientConfig.CipherSuites, suite.ID)
	}
	near, far := net.Pipe()
	defer near.Close()
	client := make(chan error, 1)
	go func() {
		defer far.Close()
		conn := tls.Client(far, clientConfig)
		client <- conn.Handshake()
		io.Copy(io.Discard, conn) // session tickets
	}()
	if err := tls.Server(near, config).Handshake(); err != nil {
		near.Close()
		return fmt.Errorf("a TLS handshake: %w", errors.Join(err, <-client))
	}
	return nil
}
