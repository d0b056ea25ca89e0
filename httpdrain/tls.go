package httpdrain

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"slices"
)

// This file owns how TLS is served: as Server.ServeTLS does it, but with a listener
// whose connections can be wrapped after crypto/tls has made them.

// noFile is the name of a file that cannot exist.
const noFile = "\x00"

// serveTLS returns what Server.ServeTLS does.
func (l *listener) serveTLS(certFile, keyFile string) error {
	config, err := l.drainer.setUpTLS(certFile, keyFile)
	if err != nil {
		l.Close()
		return err
	}
	l.encrypted = tls.NewListener(acceptListener{l}, config)
	return l.drainer.srv.Serve(l)
}

// acceptListener is what crypto/tls wraps.
type acceptListener struct{ *listener }

func (l acceptListener) Accept() (net.Conn, error) { return l.accept() }

// setUpTLS has the server set up HTTP/2, and returns the configuration that
// Server.ServeTLS would have used.
func (d *Drainer) setUpTLS(certFile, keyFile string) (*tls.Config, error) {
	d.setUp.Lock()
	defer d.setUp.Unlock()

	// ServeTLS alone sets up HTTP/2 whatever TLSConfig says. After that it loads
	// the certificate, and goes no further.
	err := d.srv.ServeTLS(nil, noFile, noFile)
	if pathErr := (*fs.PathError)(nil); !errors.As(err, &pathErr) || pathErr.Path != noFile {
		return nil, err
	}

	config := new(tls.Config)
	if d.srv.TLSConfig != nil {
		config = d.srv.TLSConfig.Clone()
	}
	config.NextProtos = d.nextProtos(config.NextProtos)
	hasCertificate := len(config.Certificates) > 0 || config.GetCertificate != nil || config.GetConfigForClient != nil
	if !hasCertificate || certFile != "" || keyFile != "" {
		certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{certificate}
	}
	return config, nil
}

// nextProtos returns the names of the protocols for TLS to offer: those that the
// program has set, with HTTP/1 and HTTP/2 as the server has them.
func (d *Drainer) nextProtos(names []string) []string {
	http1, http2 := true, d.srv.TLSNextProto["h2"] != nil
	if p := d.srv.Protocols; p != nil && (p.HTTP1() || p.HTTP2() || p.UnencryptedHTTP2()) {
		http1, http2 = p.HTTP1(), p.HTTP2()
	}
	names = slices.Clone(names)
	for _, protocol := range []struct {
		name   string
		served bool
	}{{"h2", http2}, {"http/1.1", http1}} {
		switch {
		case protocol.served && !slices.Contains(names, protocol.name):
			names = append(names, protocol.name)
		case !protocol.served:
			names = slices.DeleteFunc(names, func(name string) bool { return name == protocol.name })
		}
	}
	return names
}
