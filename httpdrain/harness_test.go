package httpdrain_test

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

// patience bounds every wait for an event. No test passes because of it.
const patience = 2 * time.Minute

// A service is a server on a loopback listener, and its Drainer.
type service struct {
	t      testing.TB
	server *http.Server
	*httpdrain.Drainer
	addr    string
	serving chan struct{} // holds a value if Serve has begun
	served  chan error    // what Serve returned
}

// config is what differs between the services of the tests.
type config struct {
	handler http.Handler
	grace   time.Duration // if zero, longer than a test takes, or in a bubble the default
	server  func(*http.Server)
	listen  func() net.Listener
	tls     bool
	bubble  bool // time stands still while anybody computes
}

func start(t testing.TB, c config) *service {
	t.Helper()
	s := newService(t, c)
	listen := c.listen
	if listen == nil {
		listen = func() net.Listener { return listenTCP(t) }
	}
	s.serve(listen(), c.tls)
	return s
}

func newService(t testing.TB, c config) *service {
	s := &service{t: t, serving: make(chan struct{}, 1), served: make(chan error, 1)}
	s.server = &http.Server{
		Handler:   c.handler,
		ErrorLog:  log.New(io.Discard, "", 0),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}},
		Protocols: new(http.Protocols),
	}
	s.server.Protocols.SetHTTP1(true)
	s.server.Protocols.SetHTTP2(true)
	s.server.Protocols.SetUnencryptedHTTP2(!c.tls)
	if c.server != nil {
		c.server(s.server)
	}
	base := s.server.BaseContext
	s.server.BaseContext = func(ln net.Listener) context.Context {
		select {
		case s.serving <- struct{}{}:
		default:
		}
		if base != nil {
			return base(ln)
		}
		return context.Background()
	}
	s.Drainer = httpdrain.New(s.server)
	s.IdleGrace = c.grace
	if !c.bubble {
		s.IdleGrace = cmp.Or(c.grace, 10*patience)
		httpdrain.SetAcceptLimits(s.Drainer, patience)
	}
	return s
}

func (s *service) serve(ln net.Listener, encrypted bool) {
	s.addr = ln.Addr().String()
	go func() {
		if encrypted {
			s.served <- s.ServeTLS(ln, "", "")
		} else {
			s.served <- s.Serve(ln)
		}
	}()
	s.t.Cleanup(func() { s.server.Close() })
	<-s.serving
}

// drain starts Shutdown and returns when the drain has begun, with what will
// deliver its result.
func (s *service) drain(ctx context.Context) <-chan error {
	result := make(chan error, 1)
	go func() { result <- s.Shutdown(ctx) }()
	<-s.Context().Done()
	return result
}

func listenTCP(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// duplicate returns another listener on the same socket, as an upgrade would.
func duplicate(t testing.TB, ln *net.TCPListener) net.Listener {
	t.Helper()
	file, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dup, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	return dup
}

// testCertificate is the one that httptest has for 127.0.0.1 and example.com.
var testCertificate = sync.OnceValues(func() (tls.Certificate, *x509.CertPool) {
	s := httptest.NewUnstartedServer(nil)
	s.StartTLS()
	defer s.Close()
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	return s.TLS.Certificates[0], pool
})

func certificate() tls.Certificate {
	c, _ := testCertificate()
	return c
}

func clientTLS(protocols ...string) *tls.Config {
	_, pool := testCertificate()
	return &tls.Config{RootCAs: pool, ServerName: "example.com", NextProtos: protocols}
}

// wait returns what c delivers.
func wait[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: nothing after %v", what, patience)
		panic("unreachable")
	}
}

// finished waits for Shutdown and Serve to return without an error.
func (s *service) finished(result <-chan error) {
	s.t.Helper()
	if err := wait(s.t, result, "Shutdown"); err != nil {
		s.t.Errorf("Shutdown: %v", err)
	}
	if err := wait(s.t, s.served, "Serve"); !errors.Is(err, http.ErrServerClosed) {
		s.t.Errorf("Serve: %v", err)
	}
}

// A client is one connection, whose requests and responses the test spells out.
type client struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

// answer is a response with its body read.
type answer struct {
	*http.Response
	body string
}

func dial(t testing.TB, addr string) *client {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return newClient(t, nc)
}

func dialTLS(t testing.TB, addr string, protocols ...string) *client {
	t.Helper()
	nc, err := tls.Dial("tcp", addr, clientTLS(protocols...))
	if err != nil {
		t.Fatal(err)
	}
	return newClient(t, nc)
}

func newClient(t testing.TB, nc net.Conn) *client {
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	return &client{t, nc, bufio.NewReader(nc)}
}

func (c *client) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatalf("sending: %v", err)
	}
}

func (c *client) get(path string) answer {
	c.t.Helper()
	c.send(get(path))
	return c.answer()
}

func get(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: example.com\r\n\r\n" }

func post(path, body string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: example.com\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
}

// answer reads the next response.
func (c *client) answer() answer {
	c.t.Helper()
	response, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatalf("reading a response: %v", err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		c.t.Fatalf("reading a response's body: %v", err)
	}
	return answer{response, string(body)}
}

// closed fails the test unless the server ends the connection as it should, and
// without another response.
func (c *client) closed() {
	c.t.Helper()
	if b, err := c.r.ReadByte(); err != io.EOF {
		c.t.Errorf("read %q, %v; want the connection's end", b, err)
	}
}

// last fails the test unless a is a good response that tells the client to leave.
func (a answer) last(t testing.TB, body string) {
	t.Helper()
	a.is(t, body)
	if !a.Close {
		t.Errorf("the response does not say that the connection will be closed")
	}
}

// more fails the test unless a is a good response that lets the client stay.
func (a answer) more(t testing.TB, body string) {
	t.Helper()
	a.is(t, body)
	if a.Close {
		t.Errorf("the response says that the connection will be closed")
	}
}

func (a answer) is(t testing.TB, body string) {
	t.Helper()
	if a.StatusCode != http.StatusOK || a.body != body {
		t.Errorf("got status %d and %q, want 200 and %q", a.StatusCode, a.body, body)
	}
}

// A gate is a handler that waits for the test before it answers.
type gate struct {
	entered chan struct{}
	opened  chan struct{}
}

func newGate() *gate { return &gate{make(chan struct{}, 100), make(chan struct{})} }

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.entered <- struct{}{}
	<-g.opened
	io.Copy(w, r.Body)
}

func (g *gate) open() { close(g.opened) }

// hello answers every request.
func hello(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }

// holdNew has a server send to busy for each new connection, and then accept no other
// until resume is closed.
func holdNew(busy chan<- struct{}, resume <-chan struct{}) func(*http.Server) {
	return func(s *http.Server) {
		s.ConnState = func(_ net.Conn, state http.ConnState) {
			// The server calls this before it accepts another connection.
			if state == http.StateNew {
				busy <- struct{}{}
				<-resume
			}
		}
	}
}
