package service

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"strings"

	"example.com/tableflip/httpdrain"
)

// This file owns one server: what can fail of it before the process is ready, and
// how it serves after that.

// A front is a server with its listener.
type front struct {
	server  *http.Server
	ln      net.Listener
	drainer *httpdrain.Drainer
}

func newFront(upg Upgrader, server *http.Server) (*front, error) {
	network, addr := "tcp", server.Addr
	switch {
	case strings.HasPrefix(addr, "/"):
		network = "unix"
	case addr == "" && server.TLSConfig != nil:
		addr = ":https"
	case addr == "":
		addr = ":http"
	}
	if err := rehearse(server); err != nil {
		return nil, fmt.Errorf("service: the server on %s can't serve: %w", addr, err)
	}
	ln, err := upg.Listen(network, addr)
	if err != nil {
		return nil, err
	}
	return &front{server, ln, httpdrain.New(server)}, nil
}

func (f *front) serve() error {
	if f.server.TLSConfig != nil {
		return f.drainer.ServeTLS(f.ln, "", "")
	}
	return f.drainer.Serve(f.ln)
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
