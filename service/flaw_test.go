//go:build unix

package service_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/service"
	stub "example.com/tableflip/testing"
)

// A flaw of a server shows only when net/http sets it up, or at the first handshake.
type flaw struct {
	put  func(*http.Server)
	says string // part of the error
}

var flaws = map[string]flaw{
	"no certificate": {func(s *http.Server) { s.TLSConfig = &tls.Config{} }, "Certificates"},
	"http2.ConfigureServer without TLS": {func(s *http.Server) {
		// What golang.org/x/net/http2 does.
		s.TLSConfig = &tls.Config{NextProtos: []string{"h2"}}
		s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){"h2": func(*http.Server, *tls.Conn, http.Handler) {}}
	}, "http2.ConfigureServer"},
	"cipher list that HTTP/2 refuses": {func(s *http.Server) {
		s.TLSConfig = tlsConfig()
		s.TLSConfig.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA}
	}, "cipher"},
	"unknown cipher list": {func(s *http.Server) {
		s.TLSConfig = tlsConfig()
		s.TLSConfig.MaxVersion = tls.VersionTLS12
		s.TLSConfig.CipherSuites = []uint16{0x1234}
		s.Protocols = new(http.Protocols)
		s.Protocols.SetHTTP1(true)
	}, "cipher suite"},
	"empty certificate": {func(s *http.Server) {
		s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{{}}}
	}, "certificate"},
	"key of another certificate": {func(s *http.Server) {
		s.TLSConfig = tlsConfig()
		s.TLSConfig.Certificates[0].PrivateKey = newKey()
	}, "signature"},
	"versions that do not meet": {func(s *http.Server) {
		s.TLSConfig = tlsConfig()
		s.TLSConfig.MinVersion, s.TLSConfig.MaxVersion = tls.VersionTLS13, tls.VersionTLS12
	}, "version"},
}

func newKey() *ecdsa.PrivateKey {
	return proctest.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
}

func tlsConfig() *tls.Config {
	key := newKey()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"service"}}
	certificate := proctest.Must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}}}
}

// unaskedUpgrader fails the test if the process says that it is ready.
type unaskedUpgrader struct {
	*stub.Upgrader
	t *testing.T
}

func (upg unaskedUpgrader) Ready() error {
	upg.t.Error("ready")
	upg.Stop()
	return upg.Upgrader.Ready()
}

func TestFlawIsFoundBeforeReady(t *testing.T) {
	for name, flaw := range flaws {
		t.Run(name, func(t *testing.T) {
			server := &http.Server{Addr: "localhost:0"}
			flaw.put(server)
			r := &run{t: t, ran: make(chan error, 1)}
			go func() { r.ran <- service.Run(unaskedUpgrader{newStub(t), t}, quiet(), service.HTTP(server)) }()
			err := r.returns()
			if err == nil || !strings.Contains(err.Error(), flaw.says) || !strings.Contains(err.Error(), "localhost:0") {
				t.Errorf("got %v, want the address and %q", err, flaw.says)
			}
		})
	}
}

// What depends on the client is not tried without one.
func TestGoodTLSIsAccepted(t *testing.T) {
	for name, change := range map[string]func(*tls.Config){
		"as it is": func(*tls.Config) {},
		"client certificates": func(c *tls.Config) {
			c.ClientAuth = tls.RequireAndVerifyClientCert
			c.VerifyConnection = func(tls.ConnectionState) error { return os.ErrPermission }
		},
		"keys that are logged": func(c *tls.Config) { c.KeyLogWriter = unwritable{t} },
		"certificates by name": func(c *tls.Config) {
			c.Certificates = nil
			c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, os.ErrNotExist }
		},
		"configurations by name": func(c *tls.Config) {
			c.Certificates = nil
			c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, os.ErrNotExist }
		},
		"TLS 1.2": func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"TLS 1.3": func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 },
	} {
		t.Run(name, func(t *testing.T) {
			config := tlsConfig()
			change(config)
			auth, verify := config.ClientAuth, config.VerifyConnection != nil
			p := startRun(t, quiet(), &http.Server{TLSConfig: config})
			p.upg.Stop()
			if err := p.returns(); err != nil {
				t.Error(err)
			}
			if config.ClientAuth != auth || (config.VerifyConnection != nil) != verify {
				t.Error("clients are not asked for certificates any more")
			}
		})
	}
}

// A server with a TLSConfig serves TLS, also to clients that understand what is old alone.
func TestTLSIsServed(t *testing.T) {
	server := conversations()
	server.TLSConfig = tlsConfig()
	server.TLSConfig.MaxVersion = tls.VersionTLS12
	server.TLSConfig.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256}
	server.Protocols = new(http.Protocols)
	server.Protocols.SetHTTP1(true)
	r := startRun(t, quiet(), server)
	conn, err := net.Dial("unix", r.socket)
	proctest.OK(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(proctest.Patience))
	encrypted := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, CipherSuites: server.TLSConfig.CipherSuites})
	proctest.OK(t, httptest.NewRequest(http.MethodGet, "/", nil).Write(encrypted))
	if response, err := http.ReadResponse(bufio.NewReader(encrypted), nil); err != nil || response.StatusCode != http.StatusOK {
		t.Errorf("got %v, %v", response, err)
	}
	conn.Close()
	r.end()
}

// unwritable fails the test if anything is written.
type unwritable struct{ t *testing.T }

func (w unwritable) Write(p []byte) (int, error) {
	w.t.Errorf("written: %q", p)
	return len(p), nil
}

func TestFlawedVersionIsRefused(t *testing.T) {
	directory := proctest.SocketDir(t)
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	log := proctest.NewOutput(t)
	go log.Read(read)
	s, first := startService(t, directory, write)
	write.Close()
	client := unixClient(directory, false)
	for _, name := range []string{"no certificate", "cipher list that HTTP/2 refuses", "http2.ConfigureServer without TLS"} {
		proctest.OK(t, os.WriteFile(filepath.Join(directory, "flaw"), []byte(name), 0o600))
		proctest.Kill(t, first.PID, syscall.SIGHUP)
		s.Next().AwaitEnd()
		log.Await(flaws[name].says) // the new process is the first to say so
		log.Await("upgrade failed")
		answer, err := post(t.Context(), client, "hello")
		if err != nil || answer != strconv.Itoa(first.PID)+" hello" {
			t.Errorf("%s: answer %q, error %v", name, answer, err)
		}
	}
	proctest.OK(t, os.Remove(filepath.Join(directory, "flaw")))
	proctest.Kill(t, first.PID, syscall.SIGHUP)
	last := s.Next() // a version without a flaw
	awaitCharge(t, directory, last)
	proctest.Terminate(t, last.PID)
	last.AwaitEnd()
}

func quiet() service.Options {
	return service.Options{Logger: slog.New(slog.DiscardHandler), IdleGrace: time.Millisecond}
}
