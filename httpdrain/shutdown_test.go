package httpdrain_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

// While a request is served, Shutdown and Serve do not return, and nobody can
// connect.
func TestShutdownWaits(t *testing.T) {
	t.Parallel()
	gate := newGate()
	s := start(t, config{handler: gate})
	c := dial(t, s.addr)
	c.send(get("/"))
	wait(t, gate.entered, "the request")
	result := s.drain(t.Context())
	refused(t, s.addr)
	select {
	case err := <-result:
		t.Errorf("Shutdown has returned: %v", err)
	case err := <-s.served:
		t.Errorf("Serve has returned: %v", err)
	default:
	}
	gate.open()
	c.answer().more(t, "")
	c.Close()
	s.finished(result)
}

// refused returns when connections to addr are refused.
func refused(t *testing.T, addr string) {
	t.Helper()
	for {
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			return
		}
		nc.Close()
	}
}

// When its context ends, Shutdown closes the connections and counts them.
func TestContextEnds(t *testing.T) {
	t.Parallel()
	gate := newGate()
	defer gate.open()
	isIdle := make(chan struct{})
	s := start(t, config{
		handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/gate" {
				gate.ServeHTTP(w, r)
			}
		}),
		server: func(s *http.Server) {
			s.ConnState = func(_ net.Conn, state http.ConnState) {
				if state == http.StateIdle {
					close(isIdle)
				}
			}
		},
	})
	idle, active := dial(t, s.addr), []*client{dial(t, s.addr), dial(t, s.addr)}
	for _, c := range active {
		c.send(get("/gate"))
		wait(t, gate.entered, "the request")
	}
	idle.get("/").more(t, "")
	wait(t, isIdle, "StateIdle")
	reason := errors.New("the operator is impatient")
	ctx, cancel := context.WithCancelCause(t.Context())
	result := s.drain(ctx)
	cancel(reason)
	err := wait(t, result, "Shutdown")
	var cut *httpdrain.CutError
	if !errors.As(err, &cut) || cut.Connections != 3 || cut.Active != 2 {
		t.Errorf("got %#v; want 3 connections cut, 2 of them active", err)
	}
	if !errors.Is(err, reason) || !strings.HasSuffix(err.Error(), "3 connections cut, 2 of them with a request in progress: "+reason.Error()) {
		t.Errorf("the error is %q", err)
	}
	for _, c := range append(active, idle) {
		c.closed()
	}
	if err := wait(t, s.served, "Serve"); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// Streams of HTTP/2 are cut as well; their connection counts once.
func TestContextEndsOverHTTP2(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		gate := newGate()
		defer gate.open()
		c.handler = gate
		s := start(t, c)
		transport := newTransport()
		var streams sync.WaitGroup
		for range 3 {
			streams.Go(func() {
				if a, _, err := ask(t.Context(), transport, scheme+s.addr, ""); err == nil {
					t.Errorf("the stream has got an answer: %v", a)
				}
			})
			wait(t, gate.entered, "the request")
		}
		ctx, cancel := context.WithCancel(t.Context())
		result := s.drain(ctx)
		cancel()
		err := wait(t, result, "Shutdown")
		var cut *httpdrain.CutError
		if !errors.As(err, &cut) || cut.Connections != 1 || cut.Active != 1 || !errors.Is(err, context.Canceled) {
			t.Errorf("got %#v; want 1 connection cut", err)
		}
		if !strings.Contains(err.Error(), "1 connection cut") {
			t.Errorf("the error is %q", err)
		}
		streams.Wait()
	})
}

// A context that has ended is no error if there is nothing to cut.
func TestContextHasEnded(t *testing.T) {
	t.Parallel()
	closed := make(chan struct{})
	s := start(t, config{handler: http.HandlerFunc(hello), server: func(s *http.Server) {
		s.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				close(closed)
			}
		}
	}})
	c := dial(t, s.addr)
	c.send("GET / HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n")
	c.answer().last(t, "hello")
	wait(t, closed, "StateClosed")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.finished(s.drain(ctx))
}

// Calls of Shutdown join one drain. The context of each of them can cut it.
func TestShutdownTwice(t *testing.T) {
	t.Parallel()
	gate := newGate()
	defer gate.open()
	s := start(t, config{handler: gate})
	c := dial(t, s.addr)
	c.send(get("/"))
	wait(t, gate.entered, "the request")
	patient := s.drain(t.Context())
	ctx, cancel := context.WithCancel(t.Context())
	impatient := s.drain(ctx)
	cancel()
	first, second := wait(t, patient, "Shutdown"), wait(t, impatient, "the second Shutdown")
	var cut *httpdrain.CutError
	if !errors.As(first, &cut) || first != second {
		t.Errorf("got %v and %v; want one CutError", first, second)
	}
	if third := s.Shutdown(t.Context()); third != first {
		t.Errorf("afterwards: %v", third)
	}
}

func TestShutdownConcurrently(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hello), grace: -1})
	dial(t, s.addr).get("/").more(t, "hello")
	var results []<-chan error
	for range 10 {
		results = append(results, s.drain(t.Context()))
	}
	for _, result := range results[1:] {
		if err := wait(t, result, "Shutdown"); err != nil {
			t.Error(err)
		}
	}
	s.finished(results[0])
}

func TestShutdownBeforeServe(t *testing.T) {
	t.Parallel()
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	httpdrain.SetAcceptLimits(s.Drainer, time.Millisecond)
	early := s.Listener(listenTCP(t))
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.server.Serve(early); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve of a listener from before: %v", err)
	}
	late := listenTCP(t)
	if err := s.Serve(late); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve: %v", err)
	}
	for _, ln := range []net.Listener{early, late} {
		refused(t, ln.Addr().String())
	}
}

// Serve during the drain closes its listener, and returns with the others.
func TestServeDuringDrain(t *testing.T) {
	t.Parallel()
	gate := newGate()
	s := start(t, config{handler: gate})
	c := dial(t, s.addr)
	c.send(get("/"))
	wait(t, gate.entered, "the request")
	result := s.drain(t.Context())
	late := listenTCP(t)
	served := make(chan error, 1)
	ln := s.Listener(late)
	refused(t, late.Addr().String())
	go func() { served <- s.server.Serve(ln) }()
	gate.open()
	c.answer().is(t, "")
	c.Close()
	s.finished(result)
	if err := wait(t, served, "the late Serve"); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("the late Serve: %v", err)
	}
}

// A server that its owner closes in the middle of a drain is closed.
func TestServerCloseDuringDrain(t *testing.T) {
	t.Parallel()
	gate := newGate()
	defer gate.open()
	s := start(t, config{handler: gate})
	c := dial(t, s.addr)
	c.send(get("/"))
	wait(t, gate.entered, "the request")
	result := s.drain(t.Context())
	s.server.Close()
	c.closed()
	gate.opened <- struct{}{}
	s.finished(result)
}

// Server.Shutdown without a drain works as it does without a Drainer.
func TestServerShutdownAlone(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hello)})
	c := dial(t, s.addr)
	c.get("/").more(t, "hello")
	if err := s.server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	c.closed()
	s.finished(s.drain(t.Context()))
}

// Several listeners, and several servers, drain together.
func TestSeveral(t *testing.T) {
	t.Parallel()
	one := start(t, config{handler: name("one")})
	second := listenTCP(t)
	served := make(chan error, 1)
	go func() { served <- one.Serve(second) }()
	two := start(t, config{handler: name("two"), tls: true})
	clients := map[*client]string{
		dial(t, one.addr):               "one",
		dial(t, second.Addr().String()): "one",
		dialTLS(t, two.addr):            "two",
	}
	for c, name := range clients {
		c.get("/").more(t, name)
	}
	first, other := one.drain(t.Context()), two.drain(t.Context())
	for c, name := range clients {
		c.get("/").last(t, name)
		c.closed()
	}
	one.finished(first)
	two.finished(other)
	if err := wait(t, served, "the second Serve"); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("the second Serve: %v", err)
	}
}

// A Unix socket is like any other; closing its listener removes its file as ever.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "socket")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Skip("no Unix sockets on this system: ", err)
	}
	s := start(t, config{handler: http.HandlerFunc(hello), listen: func() net.Listener { return ln }})
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, nc)
	c.get("/").more(t, "hello")
	result := s.drain(t.Context())
	c.get("/").last(t, "hello")
	c.closed()
	s.finished(result)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket's file: %v", err)
	}
}

// closingListener holds the server up when that closes it.
type closingListener struct {
	net.Listener
	once            sync.Once
	closing, resume chan struct{}
}

func (l *closingListener) Close() error {
	l.once.Do(func() {
		close(l.closing)
		<-l.resume
	})
	return l.Listener.Close()
}

// What is cut is what is in use when the context ends, also if that is new since
// Server.Shutdown was called.
func TestContextEndsDuringServerShutdown(t *testing.T) {
	t.Parallel()
	gate := newGate()
	defer gate.open()
	s := newService(t, config{handler: gate, grace: -1})
	ln := &closingListener{Listener: hidingListener{s.Listener(listenTCP(t))}, closing: make(chan struct{}), resume: make(chan struct{})}
	go func() { s.served <- s.server.Serve(ln) }()
	client := dial(t, ln.Addr().String())
	client.startHTTP2()
	ctx, cancel := context.WithCancel(t.Context())
	result := s.drain(ctx)
	wait(t, ln.closing, "Server.Shutdown")
	client.request(1)
	wait(t, gate.entered, "the request")
	close(ln.resume)
	client.next(frameGoAway)
	cancel()
	var cut *httpdrain.CutError
	if err := wait(t, result, "Shutdown"); !errors.As(err, &cut) || cut.Connections != 1 || cut.Active != 1 {
		t.Errorf("got %v; want 1 connection cut", err)
	}
}

// A listener that the server was never given is closed with the others when the drain is
// cut.
func TestContextEndsBeforeServe(t *testing.T) {
	t.Parallel()
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	ln := s.Listener(listenTCP(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	refused(t, ln.Addr().String())
	if err := s.server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// unclosableListener says that it cannot be closed.
type unclosableListener struct{ *net.TCPListener }

func (l unclosableListener) Close() error {
	l.TCPListener.Close()
	return fs.ErrPermission
}

// A listener that cannot be closed is Shutdown's error.
func TestListenerCannotBeClosed(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hello), listen: func() net.Listener {
		return unclosableListener{listenTCP(t).(*net.TCPListener)}
	}})
	err := wait(t, s.drain(t.Context()), "Shutdown")
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "httpdrain: closing a listener") {
		t.Errorf("Shutdown: %v", err)
	}
}

// A listener that the program has closed itself is no error.
func TestListenerAlreadyClosed(t *testing.T) {
	t.Parallel()
	ln := listenTCP(t)
	s := start(t, config{handler: http.HandlerFunc(hello), listen: func() net.Listener { return ln }})
	c := dial(t, s.addr)
	c.get("/").more(t, "hello")
	result := s.drain(t.Context())
	ln.Close()
	c.get("/").last(t, "hello")
	s.finished(result)
}
