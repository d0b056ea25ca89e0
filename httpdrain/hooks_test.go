package httpdrain_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

type contextKey string

// The server's own hooks are called as they would be without a Drainer, with the
// same listener and connections.
func TestHooks(t *testing.T) {
	t.Parallel()
	ln := listenTCP(t)
	var mu sync.Mutex
	var calls []string
	closed := make(chan struct{})
	note := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		calls = append(calls, fmt.Sprintf(format, args...))
	}
	shutdown := make(chan struct{})
	s := start(t, config{
		handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			note("handler %v %v", r.Context().Value(contextKey("base")), r.Context().Value(contextKey("conn")))
		}),
		listen: func() net.Listener { return ln },
		server: func(srv *http.Server) {
			srv.BaseContext = func(got net.Listener) context.Context {
				note("BaseContext %t", got == ln)
				return context.WithValue(context.Background(), contextKey("base"), 1)
			}
			srv.ConnContext = func(ctx context.Context, nc net.Conn) context.Context {
				note("ConnContext %T", nc)
				return context.WithValue(ctx, contextKey("conn"), 2)
			}
			srv.ConnState = func(nc net.Conn, state http.ConnState) {
				note("ConnState %T %v", nc, state)
				if state == http.StateClosed {
					close(closed)
				}
			}
			srv.RegisterOnShutdown(func() { close(shutdown) })
		},
	})
	c := dial(t, s.addr)
	c.get("/").more(t, "")
	result := s.drain(t.Context())
	c.get("/").last(t, "")
	s.finished(result)
	wait(t, shutdown, "the function for Shutdown")
	wait(t, closed, "StateClosed")
	want := []string{
		"BaseContext true", "ConnContext *net.TCPConn", "ConnState *net.TCPConn new",
		"ConnState *net.TCPConn active", "handler 1 2", "ConnState *net.TCPConn idle",
		"ConnState *net.TCPConn active", "handler 1 2", "ConnState *net.TCPConn closed",
	}
	if !slices.Equal(calls, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(calls, "\n"), strings.Join(want, "\n"))
	}
}

var registerLate = sync.OnceFunc(func() { http.HandleFunc("/registered-late", hello) })

// A server without a handler has that of package http, whenever that is set up.
func TestDefaultServeMux(t *testing.T) {
	t.Parallel()
	s := start(t, config{})
	registerLate()
	c := dial(t, s.addr)
	c.get("/registered-late").more(t, "hello")
	result := s.drain(t.Context())
	c.get("/registered-late").last(t, "hello")
	s.finished(result)
}

// The handler may be set after New: handlers need the Drainer.
func TestHandlerAfterNew(t *testing.T) {
	t.Parallel()
	s := newService(t, config{})
	s.server.Handler = http.HandlerFunc(hello)
	s.serve(listenTCP(t), false)
	c := dial(t, s.addr)
	c.get("/").more(t, "hello")
	result := s.drain(t.Context())
	c.get("/").last(t, "hello")
	s.finished(result)
}

// What would make the drain lossy is noticed at the start.
func TestListenerOfSomebodyElse(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hello)})
	dial(t, s.addr).get("/").more(t, "hello")
	ln := listenTCP(t)
	defer ln.Close()
	for name, serve := range map[string]func() error{
		"Serve":             func() error { return s.server.Serve(ln) },
		"ServeTLS":          func() error { return s.server.ServeTLS(ln, "", "") },
		"ListenAndServe":    func() error { s.server.Addr = "127.0.0.1:0"; return s.server.ListenAndServe() },
		"wrapped listeners": func() error { return s.server.Serve(tls.NewListener(ln, s.server.TLSConfig)) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if text := fmt.Sprint(recover()); !strings.Contains(text, "Drainer.Serve") {
					t.Errorf("panic: %v", text)
				}
			}()
			t.Errorf("returned %v", serve())
		})
	}
}

// Programs that need their own Serve wrap the listener, and may wrap the result.
func TestListener(t *testing.T) {
	t.Parallel()
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	ln := tls.NewListener(s.Listener(listenTCP(t)), &tls.Config{
		Certificates: []tls.Certificate{certificate()},
		NextProtos:   []string{"http/1.1"},
	})
	go func() { s.served <- s.server.Serve(ln) }()
	c := dialTLS(t, ln.Addr().String())
	c.get("/").more(t, "hello")
	result := s.drain(t.Context())
	c.get("/").last(t, "hello")
	s.finished(result)
}

// A listener that cannot be interrupted is closed.
func TestListenerWithoutDeadline(t *testing.T) {
	t.Parallel()
	for _, wrap := range []func(net.Listener) net.Listener{
		func(ln net.Listener) net.Listener { return struct{ net.Listener }{ln} },
		func(ln net.Listener) net.Listener { return noDeadlines{ln} },
	} {
		s := start(t, config{handler: http.HandlerFunc(hello), listen: func() net.Listener { return wrap(listenTCP(t)) }})
		c := dial(t, s.addr)
		c.get("/").more(t, "hello")
		result := s.drain(t.Context())
		refused(t, s.addr)
		c.get("/").last(t, "hello")
		s.finished(result)
	}
}

// noDeadlines is a listener whose method fails.
type noDeadlines struct{ net.Listener }

func (noDeadlines) SetDeadline(time.Time) error { return os.ErrNoDeadline }

// An error of the listener is that of Serve, as ever.
func TestListenerFails(t *testing.T) {
	t.Parallel()
	ln := listenTCP(t)
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	ln.Close()
	wrapped := s.Listener(ln)
	for range 2 { // as a program may try again
		if err := s.server.Serve(wrapped); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

// A connection with a protocol of the program's own is the program's to end: it
// is silent for the Drainer even if it is not.
func TestTLSNextProto(t *testing.T) {
	t.Parallel()
	s := start(t, config{
		tls:   true,
		grace: -1,
		server: func(s *http.Server) {
			s.Protocols.SetHTTP2(false)
			s.TLSConfig.NextProtos = []string{"shout"}
			s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){
				"shout": func(_ *http.Server, nc *tls.Conn, _ http.Handler) {
					for r := bufio.NewReader(nc); ; {
						line, err := r.ReadString('\n')
						if err != nil {
							return
						}
						io.WriteString(nc, strings.ToUpper(line))
					}
				},
			}
		},
	})
	c := dialTLS(t, s.addr, "shout")
	c.send("before\n")
	c.line("BEFORE\n")
	result := s.drain(t.Context())
	refused(t, s.addr)
	for range 10 {
		c.send("during\n")
		c.line("DURING\n")
	}
	c.Close()
	s.finished(result)
}

// unhashable is a connection that cannot be the key of a map, because of its type.
type unhashable struct {
	net.Conn
	_ func()
}

// unhashableValue is one because of its value.
type unhashableValue struct {
	net.Conn
	extra any
}

type wrappingListener struct {
	net.Listener
	wrap func(net.Conn) net.Conn
}

func (l wrappingListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.wrap(nc), nil
}

// A connection that the Drainer cannot watch is served.
func TestUnwatchableConnection(t *testing.T) {
	t.Parallel()
	for _, wrap := range []func(net.Conn) net.Conn{
		func(nc net.Conn) net.Conn { return unhashable{Conn: nc} },
		func(nc net.Conn) net.Conn { return unhashableValue{nc, func() {}} },
	} {
		s := newService(t, config{handler: http.HandlerFunc(hello)})
		ln := wrappingListener{s.Listener(listenTCP(t)), wrap}
		go func() { s.served <- s.server.Serve(ln) }()
		c := dial(t, ln.Addr().String())
		c.get("/").more(t, "hello")
		s.finished(s.drain(t.Context()))
	}
}

// One that is no pointer is watched if it can be.
func TestConnectionThatIsNoPointer(t *testing.T) {
	t.Parallel()
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	ln := wrappingListener{s.Listener(listenTCP(t)), func(nc net.Conn) net.Conn { return struct{ net.Conn }{nc} }}
	go func() { s.served <- s.server.Serve(ln) }()
	c := dial(t, ln.Addr().String())
	c.get("/").more(t, "hello")
	if n := s.Progress().Connections; n != 1 {
		t.Errorf("%d connections are known", n)
	}
	result := s.drain(t.Context())
	c.get("/").last(t, "hello")
	c.closed()
	s.finished(result)
}

// BaseContext that is set after New takes nothing from the drain; with TLS, all is
// encrypted.
func TestBaseContextAfterNew(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, r.Context().Value(contextKey("base")))
		})
		s := newService(t, c)
		s.server.BaseContext = func(net.Listener) context.Context {
			s.serving <- struct{}{}
			return context.WithValue(context.Background(), contextKey("base"), "late")
		}
		s.serve(listenTCP(t), c.tls)
		client := dial(t, s.addr)
		client.get("/").more(t, "late")
		result := s.drain(t.Context())
		client.get("/").last(t, "late")
		s.finished(result)
	})
}

// A program's own HTTP/2 is called, and told to leave by its own means.
func TestOwnHTTP2(t *testing.T) {
	t.Parallel()
	for _, others := range []bool{false, true} {
		called := make(chan string, 1)
		s := start(t, config{
			tls:   true,
			grace: -1,
			server: func(s *http.Server) {
				own := func(_ *http.Server, nc *tls.Conn, _ http.Handler) {
					called <- nc.ConnectionState().NegotiatedProtocol
					nc.Close()
				}
				s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){"h2": own}
				if others { // as golang.org/x/net/http2 does
					s.TLSNextProto["unencrypted_http2"] = own
				}
			},
		})
		c := dialTLS(t, s.addr, "h2")
		if got := wait(t, called, "the program's own HTTP/2"); got != "h2" {
			t.Errorf("it is given a connection with %q", got)
		}
		c.Close()
		s.finished(s.drain(t.Context()))
	}
}

// It ends its connections itself, also if they are silent.
func TestOwnHTTP2IsNotInterrupted(t *testing.T) {
	t.Parallel()
	idle, ended, shutdown := make(chan struct{}), make(chan error, 1), make(chan struct{})
	s := start(t, config{
		tls:   true,
		grace: -1,
		server: func(s *http.Server) {
			s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){
				"h2": func(srv *http.Server, nc *tls.Conn, _ http.Handler) {
					srv.ConnState(nc, http.StateIdle) // as golang.org/x/net/http2 does
					close(idle)
					_, err := nc.Read(make([]byte, 1))
					ended <- err
				},
			}
			s.RegisterOnShutdown(func() { close(shutdown) })
		},
	})
	c := dialTLS(t, s.addr, "h2")
	wait(t, idle, "StateIdle")
	result := s.drain(t.Context())
	wait(t, shutdown, "Server.Shutdown")
	c.Close()
	if err := wait(t, ended, "the end of the connection"); !errors.Is(err, io.EOF) {
		t.Errorf("reading: %v", err)
	}
	s.finished(result)
}

// ServeTLS offers the protocols that Server.ServeTLS would.
func TestProtocols(t *testing.T) {
	t.Parallel()
	only := func(set func(*http.Protocols)) *http.Protocols {
		p := new(http.Protocols)
		set(p)
		return p
	}
	for _, test := range []struct {
		name  string
		setUp func(*http.Server)
	}{
		{"default", func(s *http.Server) {}},
		{"HTTP/1", func(s *http.Server) { s.Protocols = only(func(p *http.Protocols) { p.SetHTTP1(true) }) }},
		{"HTTP/2 without TLS", func(s *http.Server) {
			s.Protocols = only(func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) })
		}},
		{"HTTP/2", func(s *http.Server) { s.Protocols = only(func(p *http.Protocols) { p.SetHTTP2(true) }) }},
		{"empty TLSNextProto", func(s *http.Server) {
			s.TLSNextProto = make(map[string]func(*http.Server, *tls.Conn, http.Handler))
		}},
		{"own names", func(s *http.Server) { s.TLSConfig.NextProtos = []string{"shout", "http/1.1"} }},
		{"GetCertificate", func(s *http.Server) {
			c := s.TLSConfig.Certificates[0]
			s.TLSConfig = &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &c, nil }}
		}},
		{"GetConfigForClient", func(s *http.Server) {
			config := s.TLSConfig
			s.TLSConfig = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return config, nil }}
		}},
	} {
		negotiate := func(serve func(*http.Server, net.Listener)) (got []string) {
			srv := &http.Server{
				Handler:   http.HandlerFunc(hello),
				ErrorLog:  log.New(io.Discard, "", 0),
				TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate()}},
			}
			test.setUp(srv)
			ln := listenTCP(t)
			go serve(srv, ln)
			defer srv.Close()
			for _, offer := range [][]string{{"h2", "http/1.1"}, {"http/1.1", "h2"}, {"http/1.1"}, {"h2"}, {"shout"}, nil} {
				nc, err := tls.Dial("tcp", ln.Addr().String(), clientTLS(offer...))
				if err != nil {
					got = append(got, "refused")
					continue
				}
				got = append(got, nc.ConnectionState().NegotiatedProtocol)
				nc.Close()
			}
			return got
		}
		want := negotiate(func(srv *http.Server, ln net.Listener) { srv.ServeTLS(ln, "", "") })
		got := negotiate(func(srv *http.Server, ln net.Listener) { httpdrain.New(srv).ServeTLS(ln, "", "") })
		if !slices.Equal(got, want) {
			t.Errorf("%s: negotiates %q, want %q", test.name, got, want)
		}
	}
}

// An empty set of protocols is HTTP/1, as Go 1.27 has it.
func TestNoProtocols(t *testing.T) {
	t.Parallel()
	s := start(t, config{tls: true, handler: http.HandlerFunc(hello), server: func(s *http.Server) { s.Protocols = new(http.Protocols) }})
	c := dialTLS(t, s.addr, "h2", "http/1.1")
	if got := c.Conn.(*tls.Conn).ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("negotiates %q", got)
	}
	c.Close()
	s.finished(s.drain(t.Context()))
}

// Listeners of one server may be served at the same time, with the protocols that
// it has by default.
func TestServeConcurrently(t *testing.T) {
	t.Parallel()
	for range 10 {
		s := newService(t, config{handler: http.HandlerFunc(hello)})
		s.server.Protocols = nil
		s.server.TLSConfig.NextProtos = []string{"h2"} // else Serve, if it comes first, does not set up HTTP/2
		served := make(chan error, 9)
		var clients sync.WaitGroup
		begin := make(chan struct{})
		for i := range cap(served) {
			ln := listenTCP(t)
			plain := i%3 == 0
			go func() {
				<-begin
				if plain {
					served <- s.Serve(ln)
				} else {
					served <- s.ServeTLS(ln, "", "")
				}
			}()
			clients.Go(func() {
				transport, scheme := http2Transport(), "https://"
				if plain {
					transport, scheme = new(http.Transport), "http://"
				}
				defer transport.CloseIdleConnections()
				if a, _, err := ask(t.Context(), transport, scheme+ln.Addr().String(), ""); err != nil || a.body != "hello" {
					t.Errorf("%s: %q, %v", scheme, a.body, err)
				}
			})
		}
		close(begin)
		clients.Wait()
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		for range cap(served) {
			if err := wait(t, served, "Serve"); !errors.Is(err, http.ErrServerClosed) {
				t.Errorf("Serve: %v", err)
			}
		}
	}
}

// A certificate that cannot be read is ServeTLS's error, and closes the listener.
func TestServeTLSFails(t *testing.T) {
	t.Parallel()
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	for _, test := range []struct {
		certificates      []tls.Certificate
		certFile, keyFile string
	}{
		{nil, "", ""},
		{nil, "no-such-file", ""},
		{s.server.TLSConfig.Certificates, "", "no-such-file"},
		{s.server.TLSConfig.Certificates, "no-such-file", ""},
	} {
		s.server.TLSConfig.Certificates = test.certificates
		ln := listenTCP(t)
		if err := s.ServeTLS(ln, test.certFile, test.keyFile); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("ServeTLS: %v", err)
		}
		refused(t, ln.Addr().String())
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

// A certificate in files is used rather than one in the configuration, if there is any.
func TestServeTLSWithFiles(t *testing.T) {
	t.Parallel()
	certFile, keyFile := filepath.Join(t.TempDir(), "cert"), filepath.Join(t.TempDir(), "key")
	key, err := x509.MarshalPKCS8PrivateKey(certificate().PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: certificate().Certificate[0]},
		keyFile:  {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []*tls.Config{nil, {Certificates: []tls.Certificate{{}}}} {
		s := newService(t, config{tls: true, handler: http.HandlerFunc(hello), server: func(s *http.Server) {
			s.Protocols.SetHTTP2(false)
			s.TLSConfig = c
		}})
		ln := listenTCP(t)
		go func() { s.served <- s.ServeTLS(ln, certFile, keyFile) }()
		c := dialTLS(t, ln.Addr().String(), "http/1.1")
		c.get("/").more(t, "hello")
		c.Close()
		s.finished(s.drain(t.Context()))
	}
}

// The program's own names of protocols stay as they are.
func TestNamesStay(t *testing.T) {
	t.Parallel()
	names := []string{"h2", "shout", "http/1.1"}
	s := start(t, config{tls: true, handler: http.HandlerFunc(hello), server: func(s *http.Server) {
		s.Protocols.SetHTTP2(false)
		s.TLSConfig.NextProtos = names
	}})
	c := dialTLS(t, s.addr, "http/1.1")
	c.get("/").more(t, "hello")
	c.Close()
	s.finished(s.drain(t.Context()))
	if want := []string{"h2", "shout", "http/1.1"}; !slices.Equal(names, want) {
		t.Errorf("they are %q, want %q", names, want)
	}
}

// So is a configuration that net/http refuses to set HTTP/2 up with.
func TestServeTLSCannotSetUp(t *testing.T) {
	t.Parallel()
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	s.server.TLSConfig.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA}
	ln := listenTCP(t)
	if err := s.ServeTLS(ln, "", ""); err == nil || !strings.Contains(err.Error(), "CipherSuites") {
		t.Errorf("ServeTLS: %v", err)
	}
	refused(t, ln.Addr().String())
}
