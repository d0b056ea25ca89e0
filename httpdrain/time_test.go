package httpdrain_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/httpdrain"
)

// These tests run on a fake clock, over connections in memory. Such a test also
// fails if a goroutine is left behind.

// certificateTime is a time at which the test's certificate is valid. The clock of a bubble
// begins in 2000.
var certificateTime = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// memory is a listener for connections within the process.
type memory struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newMemory() *memory { return &memory{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (m *memory) Accept() (net.Conn, error) {
	select {
	case nc := <-m.conns:
		return nc, nil
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

func (m *memory) Close() error {
	m.once.Do(func() { close(m.closed) })
	return nil
}

func (m *memory) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "unix"} }

func (m *memory) dial() (net.Conn, error) {
	return m.dialBy(func(nc net.Conn) net.Conn { return nc })
}

// dialBy connects to what wrap makes of the server's end.
func (m *memory) dialBy(wrap func(net.Conn) net.Conn) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case m.conns <- wrap(server):
		return client, nil
	case <-m.closed:
		return nil, errors.New("connection refused")
	}
}

func (m *memory) client(t *testing.T) *client {
	t.Helper()
	nc, err := m.dial()
	if err != nil {
		t.Fatal(err)
	}
	return newClient(t, nc)
}

// pass lets time pass in a bubble.
func pass(d time.Duration) { <-time.After(d) }

// inBubble runs test with a service in memory.
func inBubble(t *testing.T, c config, test func(t *testing.T, s *service, m *memory)) {
	inBubbleOn(t, c, func() net.Listener { return newMemory() }, func(t *testing.T, s *service, ln net.Listener) {
		synctest.Wait()
		test(t, s, ln.(*memory))
	})
}

// inBubbleOn runs test with a service on the listener that listen returns.
func inBubbleOn(t *testing.T, c config, listen func() net.Listener, test func(t *testing.T, s *service, ln net.Listener)) {
	testCertificate()
	synctest.Test(t, func(t *testing.T) {
		ln := listen()
		if c.server == nil {
			c.server = func(s *http.Server) { s.Protocols.SetUnencryptedHTTP2(false) }
		}
		c.listen = func() net.Listener { return ln }
		c.bubble = true
		test(t, start(t, c), ln)
	})
}

// after fails the test unless want has passed since begin, exactly but for what
// the drain needs to notice.
func after(t *testing.T, begin time.Time, what string, want time.Duration) {
	t.Helper()
	if got := time.Since(begin); got < want || got > want+50*time.Millisecond {
		t.Errorf("%s after %v, want %v", what, got, want)
	}
}

// A connection is closed when it has been silent for the grace, whether or not
// it has had a request; and then the drain is over.
func TestIdleGrace(t *testing.T) {
	for _, test := range []struct{ grace, want time.Duration }{
		{0, httpdrain.DefaultIdleGrace},
		{time.Minute, time.Minute},
		{-1, 0},
	} {
		inBubble(t, config{handler: http.HandlerFunc(hello), grace: test.grace}, func(t *testing.T, s *service, m *memory) {
			fresh, used := m.client(t), m.client(t)
			fresh.SetDeadline(time.Time{})
			used.SetDeadline(time.Time{})
			used.get("/").more(t, "hello")
			begin := time.Now()
			result := s.drain(t.Context())
			used.closed()
			after(t, begin, "the idle connection was closed", test.want)
			fresh.closed()
			after(t, begin, "the new connection was closed", test.want)
			s.finishedInBubble(result)
			after(t, begin, "the drain was over", test.want)
		})
	}
}

// So is one on which nothing of a TLS handshake has come, and one without TLS on a server
// that has protocols of the program's own with TLS.
func TestSilentNewConnection(t *testing.T) {
	for _, encrypted := range []bool{true, false} {
		c := config{handler: http.HandlerFunc(hello), grace: time.Second, tls: encrypted}
		c.server = func(s *http.Server) {
			s.Protocols.SetUnencryptedHTTP2(false)
			if !encrypted {
				s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){"shout": nil}
			}
		}
		inBubble(t, c, func(t *testing.T, s *service, m *memory) {
			c := m.client(t)
			c.SetDeadline(time.Time{})
			begin := time.Now()
			result := s.drain(t.Context())
			c.closed()
			after(t, begin, "the connection was closed", time.Second)
			s.finishedInBubble(result)
		})
	}
}

// One that is to be HTTP/2 has as long as net/http gives it.
func TestSilentInsteadOfPreface(t *testing.T) {
	inBubble(t, config{handler: http.HandlerFunc(hello), tls: true}, func(t *testing.T, s *service, m *memory) {
		nc, err := m.dial()
		if err != nil {
			t.Fatal(err)
		}
		config := clientTLS("h2")
		config.Time = func() time.Time { return certificateTime }
		encrypted := tls.Client(nc, config)
		if err := encrypted.Handshake(); err != nil {
			t.Fatal(err)
		}
		c := newClient(t, encrypted)
		c.SetDeadline(time.Time{})
		begin := time.Now()
		io.Copy(io.Discard, c.r)
		after(t, begin, "the connection was closed", 10*time.Second)
		c.Close()
		s.finishedInBubble(s.drain(t.Context()))
	})
}

// finishedInBubble is finished without patience, which would make time pass.
func (s *service) finishedInBubble(result <-chan error) {
	s.t.Helper()
	if err := <-result; err != nil {
		s.t.Errorf("Shutdown: %v", err)
	}
	if err := <-s.served; !errors.Is(err, http.ErrServerClosed) {
		s.t.Errorf("Serve: %v", err)
	}
}

// deafConn does not heed deadlines of reads once it is deaf.
type deafConn struct {
	net.Conn
	deaf atomic.Bool
}

func (c *deafConn) NetConn() net.Conn { return c.Conn }

func (c *deafConn) SetReadDeadline(at time.Time) error {
	if c.deaf.Load() {
		return nil
	}
	return c.Conn.SetReadDeadline(at)
}

// A silent connection whose reads cannot be made to fail does not hold up the drain: a
// second later Server.Shutdown closes it. So it is if the kernel tells that it is silent.
func TestDeafConnection(t *testing.T) {
	for _, wrap := range []func(net.Conn) net.Conn{
		func(nc net.Conn) net.Conn { return nc },
		func(nc net.Conn) net.Conn { return newKernelConn(nc) },
	} {
		inBubble(t, config{handler: http.HandlerFunc(hello), grace: time.Minute}, func(t *testing.T, s *service, m *memory) {
			httpdrain.SetLastTransfer(s.Drainer)
			deaf := new(deafConn)
			nc, err := m.dialBy(func(nc net.Conn) net.Conn { deaf.Conn = wrap(nc); return deaf })
			if err != nil {
				t.Fatal(err)
			}
			c := newClient(t, nc)
			c.SetDeadline(time.Time{})
			c.get("/").more(t, "hello")
			synctest.Wait()
			deaf.deaf.Store(true)
			begin := time.Now()
			result := s.drain(t.Context())
			c.closed()
			after(t, begin, "the connection was closed", time.Minute+time.Second)
			s.finishedInBubble(result)
		})
	}
}

// A request in the last moment of the grace is served.
func TestRequestDuringGrace(t *testing.T) {
	inBubble(t, config{handler: http.HandlerFunc(hello)}, func(t *testing.T, s *service, m *memory) {
		fresh, used := m.client(t), m.client(t)
		used.get("/").more(t, "hello")
		result := s.drain(t.Context())
		pass(httpdrain.DefaultIdleGrace - time.Millisecond)
		fresh.get("/").last(t, "hello")
		used.get("/").last(t, "hello")
		fresh.closed()
		used.closed()
		s.finishedInBubble(result)
	})
}

// A connection whose request outlasts the grace has a grace of its own when that
// ends, as its response did not tell the client to leave. Those that were silent
// are closed in the meantime.
func TestGraceAfterLongRequest(t *testing.T) {
	gate := make(chan struct{})
	inBubble(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/long" {
			<-gate
		}
		io.WriteString(w, "hello")
	})}, func(t *testing.T, s *service, m *memory) {
		gate = make(chan struct{})
		begin := time.Now()
		long, again, idle := m.client(t), m.client(t), m.client(t)
		for _, c := range []*client{long, again, idle} {
			c.SetDeadline(time.Time{})
		}
		long.send(get("/long"))
		again.send(get("/long"))
		synctest.Wait()
		result := s.drain(t.Context())
		idle.closed()
		after(t, begin, "the idle connection was closed", httpdrain.DefaultIdleGrace)
		pass(time.Minute)
		close(gate)
		ended := time.Now()
		long.answer().more(t, "hello")
		again.answer().more(t, "hello")
		pass(httpdrain.DefaultIdleGrace - time.Second)
		again.get("/").last(t, "hello")
		again.closed()
		long.closed()
		after(t, ended, "the connection of the long request was closed", httpdrain.DefaultIdleGrace)
		s.finishedInBubble(result)
	})
}

// pausingConn makes the server pause when it has read a header, in the moment
// before it says so.
type pausingConn struct {
	net.Conn
	header atomic.Bool // was what was read last
	pause  time.Duration
}

func (c *pausingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.header.Store(strings.HasSuffix(string(p[:n]), "\r\n\r\n"))
	return n, err
}

func (c *pausingConn) SetReadDeadline(deadline time.Time) error {
	err := c.Conn.SetReadDeadline(deadline)
	if deadline.IsZero() && c.header.Swap(false) {
		pass(c.pause)
	}
	return err
}

// A request that the server has read when its connection is taken for silent is
// served, however slow its body is.
func TestRequestAtEndOfGrace(t *testing.T) {
	for _, again := range []bool{false, true} {
		inBubble(t, config{handler: http.HandlerFunc(echo), server: func(s *http.Server) {
			s.Protocols.SetUnencryptedHTTP2(again)
		}}, func(t *testing.T, s *service, m *memory) {
			used, err := m.dialBy(func(nc net.Conn) net.Conn { return &pausingConn{Conn: nc, pause: 1500 * time.Millisecond} })
			if err != nil {
				t.Fatal(err)
			}
			c := newClient(t, used)
			if again {
				c.get("/").more(t, "")
			}
			result := s.drain(t.Context())
			pass(httpdrain.DefaultIdleGrace - time.Second)
			c.send("POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 4\r\n\r\n")
			pass(2 * time.Second)
			c.send("body")
			c.answer().last(t, "body")
			s.finishedInBubble(result)
		})
	}
}

// readPausingConn makes the server pause before it is given a header's end.
type readPausingConn struct {
	net.Conn
	pause time.Duration
}

func (c *readPausingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if strings.HasSuffix(string(p[:n]), "\r\n\r\n") {
		pass(c.pause)
	}
	return n, err
}

// Such a request has the server's ReadTimeout for its body.
func TestReadTimeoutAtEndOfGrace(t *testing.T) {
	inBubble(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begin := time.Now()
		_, err := io.ReadAll(r.Body)
		fmt.Fprint(w, time.Since(begin).Round(time.Second), errors.Is(err, os.ErrDeadlineExceeded))
	}), server: func(s *http.Server) { s.ReadTimeout = 8 * time.Second }}, func(t *testing.T, s *service, m *memory) {
		nc, err := m.dialBy(func(nc net.Conn) net.Conn { return &readPausingConn{nc, 1500 * time.Millisecond} })
		if err != nil {
			t.Fatal(err)
		}
		c := newClient(t, nc)
		c.SetDeadline(time.Time{})
		result := s.drain(t.Context())
		pass(httpdrain.DefaultIdleGrace - time.Second)
		c.send("POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 4\r\n\r\n")
		c.answer().is(t, "8s true")
		s.finishedInBubble(result)
	})
}

// Others have what is left of it.
func TestReadTimeoutDuringGrace(t *testing.T) {
	inBubble(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begin := time.Now()
		_, err := io.ReadAll(r.Body)
		fmt.Fprint(w, time.Since(begin).Round(time.Second), errors.Is(err, os.ErrDeadlineExceeded))
	}), server: func(s *http.Server) {
		s.Protocols.SetUnencryptedHTTP2(false)
		s.ReadTimeout = 8 * time.Second
	}}, func(t *testing.T, s *service, m *memory) {
		c := m.client(t)
		c.SetDeadline(time.Time{})
		result := s.drain(t.Context())
		pass(3 * time.Second)
		c.send("POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 4\r\n\r\n")
		c.answer().is(t, "5s true")
		s.finishedInBubble(result)
	})
}

// Without a grace, a connection whose response did not tell its client to leave is
// closed at once: the server does not undo that when it becomes idle.
func TestNoGraceAfterRequest(t *testing.T) {
	var gate chan struct{}
	inBubble(t, config{grace: -1, handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-gate })},
		func(t *testing.T, s *service, m *memory) {
			gate = make(chan struct{})
			c := m.client(t)
			c.send(get("/"))
			synctest.Wait()
			result := s.drain(t.Context())
			close(gate)
			c.answer().more(t, "")
			begin := time.Now()
			c.closed()
			after(t, begin, "the connection was closed", 0)
			s.finishedInBubble(result)
		})
}

// What the server's timeouts end is not waited for.
func TestServerTimeoutDuringGrace(t *testing.T) {
	inBubble(t, config{handler: http.HandlerFunc(hello), grace: time.Hour, server: func(s *http.Server) {
		s.Protocols.SetUnencryptedHTTP2(false)
		s.ReadHeaderTimeout, s.IdleTimeout = 2*time.Second, 3*time.Second
	}}, func(t *testing.T, s *service, m *memory) {
		fresh, used := m.client(t), m.client(t)
		used.get("/").more(t, "hello")
		begin := time.Now()
		result := s.drain(t.Context())
		fresh.closed()
		used.closed()
		s.finishedInBubble(result)
		after(t, begin, "the drain was over", 3*time.Second)
	})
}

// A context that ends during the grace cuts what is silent, and says so, also if a
// response has come that let the client stay; the connection of the last response, which
// net/http closes half a second later, does not count.
func TestContextEndsDuringGrace(t *testing.T) {
	var gate chan struct{}
	inBubble(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/long" {
			<-gate
		}
		io.WriteString(w, "hello")
	})}, func(t *testing.T, s *service, m *memory) {
		gate = make(chan struct{})
		m.client(t)
		used, long, last := m.client(t), m.client(t), m.client(t)
		used.get("/").more(t, "hello")
		long.send(get("/long"))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), httpdrain.DefaultIdleGrace/2)
		defer cancel()
		begin := time.Now()
		result := s.drain(ctx)
		pass(httpdrain.DefaultIdleGrace/2 - 100*time.Millisecond)
		close(gate)
		long.answer().more(t, "hello")
		last.get("/").last(t, "hello")
		err := <-result
		after(t, begin, "the drain was over", httpdrain.DefaultIdleGrace/2)
		var cut *httpdrain.CutError
		if !errors.As(err, &cut) || cut.Connections != 3 || cut.Active != 0 || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %#v; want 3 idle connections cut", err)
		}
		pass(time.Second) // for net/http's goroutine, which waits to close
		if err := <-s.served; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
}

// Over HTTP/2, a stream counts as cut until it has ended, and a client that knows that it
// is to leave, or has been silent for the grace, does not.
func TestContextEndsAfterFarewell(t *testing.T) {
	for _, test := range []struct {
		name                  string
		acknowledges, streams bool
		after                 time.Duration
		cut                   int
	}{
		{"the client knows", true, false, 500 * time.Millisecond, 0},
		{"the client knows, and a stream is open", true, true, 500 * time.Millisecond, 1},
		{"the client does not know", false, false, 500 * time.Millisecond, 1},
		{"the client is silent", false, false, httpdrain.DefaultIdleGrace + 500*time.Millisecond, 0},
	} {
		gate := newGate()
		c := rawHTTP2
		c.handler = gate
		inBubble(t, c, func(t *testing.T, s *service, m *memory) {
			gate.entered, gate.opened = make(chan struct{}, 1), make(chan struct{})
			c := m.client(t)
			c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
			frames := c.inBackground()
			c.sendFrame(frameSettings, 0, 0)
			if test.streams {
				c.request(1)
				<-gate.entered
			}
			ctx, cancel := context.WithTimeout(t.Context(), test.after)
			defer cancel()
			result := s.drain(ctx)
			pass(50 * time.Millisecond)
			if got := goAways(frames); !slices.Equal(got, []uint32{1<<31 - 1}) {
				t.Fatalf("GOAWAY with %d, want all streams", got)
			}
			if test.acknowledges {
				c.acknowledge("draining")
			}
			err := <-result
			var cut *httpdrain.CutError
			switch {
			case test.cut == 0 && err != nil:
				t.Errorf("%s: %v", test.name, err)
			case test.cut > 0 && (!errors.As(err, &cut) || cut.Connections != test.cut):
				t.Errorf("%s: got %v; want %d connection cut", test.name, err, test.cut)
			}
			gate.open()
			pass(time.Second) // for net/http's goroutines
		})
	}
}

// A connection on which the drain has not begun counts as cut, also if it has been used
// since it began elsewhere.
func TestContextEndsBeforeItsTime(t *testing.T) {
	inBubble(t, config{handler: http.HandlerFunc(hello)}, func(t *testing.T, s *service, m *memory) {
		s.Spread = 100 * 365 * 24 * time.Hour
		c := m.client(t)
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		result := s.drain(ctx)
		c.get("/").more(t, "hello")
		synctest.Wait()
		cancel()
		var cut *httpdrain.CutError
		if err := <-result; !errors.As(err, &cut) || cut.Connections != 1 || cut.Active != 0 {
			t.Errorf("got %v; want 1 idle connection cut", err)
		}
	})
}

// A stuck client counts as cut although its handler has returned.
func TestContextEndsDuringLastWrite(t *testing.T) {
	inBubble(t, config{handler: http.HandlerFunc(hello)}, func(t *testing.T, s *service, m *memory) {
		c := m.client(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		result := s.drain(ctx)
		c.send(get("/")) // and does not read the response
		err := <-result
		var cut *httpdrain.CutError
		if !errors.As(err, &cut) || cut.Connections != 1 || cut.Active != 1 {
			t.Errorf("got %#v; want 1 connection cut", err)
		}
		pass(time.Second) // for net/http's goroutine, which waits to close
	})
}

// Over HTTP/2, many clients on one connection lose no request that they cannot
// repeat. The clock of this test goes on only when all of them wait.
func TestStreamsSettle(t *testing.T) {
	for range 20 {
		inBubble(t, config{
			handler: http.HandlerFunc(echo),
			server:  func(s *http.Server) { s.Protocols.SetUnencryptedHTTP2(true) },
		}, func(t *testing.T, s *service, m *memory) {
			transport := plainHTTP2Transport()
			transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return m.dial() }
			var clients sync.WaitGroup
			var served atomic.Int32
			enough := make(chan struct{})
			for range 16 {
				clients.Go(func() {
					for {
						_, _, err := ask(t.Context(), transport, "http://example.com", "body")
						if err != nil {
							if !strings.Contains(err.Error(), "refused") {
								t.Error(err)
							}
							return
						}
						if served.Add(1) == 100 {
							close(enough)
						}
					}
				})
			}
			<-enough
			result := s.drain(t.Context())
			clients.Wait()
			transport.CloseIdleConnections()
			s.finishedInBubble(result)
		})
	}
}

// An HTTP/2 connection whose client knows that it is to leave is closed soon.
func TestSilentHTTP2InBubble(t *testing.T) {
	inBubble(t, rawHTTP2, func(t *testing.T, s *service, m *memory) {
		transport := plainHTTP2Transport()
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return m.dial() }
		if _, _, err := ask(t.Context(), transport, "http://example.com", "body"); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		s.finishedInBubble(s.drain(t.Context()))
		// net/http waits for a second, too.
		if got := time.Since(begin); got > 2500*time.Millisecond {
			t.Errorf("the drain was over after %v", got)
		}
		transport.CloseIdleConnections()
	})
}

var rawHTTP2 = config{
	handler: http.HandlerFunc(echo),
	server:  func(s *http.Server) { s.Protocols.SetUnencryptedHTTP2(true) },
}

// inBackground answers nothing, but reads what the server sends, as it would
// block else. It returns the kinds of frames and their payloads.
func (c *client) inBackground() <-chan []byte {
	frames := make(chan []byte, 1000)
	c.SetDeadline(time.Time{})
	go func() {
		defer close(frames)
		for {
			var header [9]byte
			if _, err := io.ReadFull(c.r, header[:]); err != nil {
				return
			}
			payload := make([]byte, int(header[0])<<16|int(header[1])<<8|int(header[2]))
			if _, err := io.ReadFull(c.r, payload); err != nil {
				return
			}
			frames <- append([]byte{header[3]}, payload...)
		}
	}()
	return frames
}

// goAways returns the streams that the GOAWAYs have named until now.
func goAways(frames <-chan []byte) (streams []uint32) {
	synctest.Wait()
	for len(frames) > 0 {
		if f := <-frames; len(f) > 0 && f[0] == frameGoAway {
			streams = append(streams, binary.BigEndian.Uint32(f[1:]))
		}
	}
	return streams
}

// A client that goes on opening streams although it should not is refused in the
// end: late if it has not acknowledged anything, as it may not have read it.
func TestClientStays(t *testing.T) {
	for _, acknowledges := range []bool{true, false} {
		inBubble(t, rawHTTP2, func(t *testing.T, s *service, m *memory) {
			c := m.client(t)
			c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
			frames := c.inBackground()
			c.sendFrame(frameSettings, 0, 0)
			result := s.drain(t.Context())
			pass(50 * time.Millisecond)
			if got := goAways(frames); !slices.Equal(got, []uint32{1<<31 - 1}) {
				t.Fatalf("GOAWAY with %d, want all streams", got)
			}
			patience := httpdrain.DefaultIdleGrace
			if acknowledges {
				c.acknowledge("draining")
				patience = time.Second
			}
			pass(patience - 500*time.Millisecond)
			c.request(1)
			if got := goAways(frames); got != nil {
				t.Errorf("GOAWAY with %d before %v", got, patience)
			}
			pass(600 * time.Millisecond)
			c.request(3)
			if got := goAways(frames); !slices.Equal(got, []uint32{3}) {
				t.Errorf("GOAWAY with %d after %v, want stream 3", got, patience)
			}
			c.Close()
			s.finishedInBubble(result)
		})
	}
}

// A connection that becomes HTTP/2 during the drain is told as well, and not
// before the server has sent its settings. Its responses are held until then.
func TestPrefaceDuringDrain(t *testing.T) {
	inBubble(t, rawHTTP2, func(t *testing.T, s *service, m *memory) {
		c := m.client(t)
		c.send("PRI * HTTP/2.0\r\n")
		result := s.drain(t.Context())
		pass(time.Second)
		c.send("\r\nSM\r\n\r\n")
		if first, _, _ := c.frame(); first != frameSettings {
			t.Errorf("the first frame is %d", first)
		}
		begin := time.Now()
		c.sendFrame(frameSettings, 0, 0)
		c.request(1)
		c.farewell() // for which the response waits, and not for longer
		for kind, flags := byte(frameSettings), byte(0); kind > frameHeaders || flags&endStream == 0; {
			kind, flags, _ = c.frame()
		}
		if got, want := time.Since(begin), 15*time.Millisecond; got != want {
			t.Errorf("the response ends after %v, want %v", got, want)
		}
		c.Close()
		s.finishedInBubble(result)
	})
}

// The GOAWAY does not come in the middle of a header block that takes several
// frames, although the client is slow to read it.
func TestHeaderBlockStaysWhole(t *testing.T) {
	const endHeaders = 4
	c := rawHTTP2
	c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Large", strings.Repeat("large", 1<<20))
		w.(http.Flusher).Flush()
	})
	inBubble(t, c, func(t *testing.T, s *service, m *memory) {
		c := m.client(t)
		c.SetDeadline(time.Time{})
		c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
		for c.sendFrame(frameSettings, 0, 0); ; {
			if kind, flags, _ := c.frame(); kind == frameSettings && flags == 1 {
				break // it acknowledges
			}
		}
		result := s.drain(t.Context())
		synctest.Wait()
		c.request(1)
		// The server writes the header block when the time for the GOAWAY comes.
		pass(15 * time.Millisecond)
		inBlock := false
		for told := false; !told; {
			kind, flags, _ := c.frame()
			if (kind == frameContinuation) != inBlock {
				t.Fatalf("frame %d, in a header block: %t", kind, inBlock)
			}
			if kind == frameHeaders || kind == frameContinuation {
				inBlock = flags&endHeaders == 0
			}
			told = kind == frameGoAway
		}
		c.Close()
		s.finishedInBubble(result)
	})
}

// net/http's own GOAWAY is not followed by one that names a higher stream.
func TestDrainAfterGoAway(t *testing.T) {
	c := rawHTTP2
	c.server = func(s *http.Server) {
		s.Protocols.SetUnencryptedHTTP2(true)
		s.IdleTimeout = time.Minute
	}
	inBubble(t, c, func(t *testing.T, s *service, m *memory) {
		c := m.client(t)
		c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
		frames := c.inBackground()
		c.sendFrame(frameSettings, 0, 0)
		pass(time.Minute + time.Millisecond)
		result := s.drain(t.Context())
		s.finishedInBubble(result)
		if got := goAways(frames); !slices.Equal(got, []uint32{0}) {
			t.Errorf("GOAWAY with %d, want that of net/http alone", got)
		}
	})
}

// With Spread, the clients are told to leave, and those that are silent closed, at
// different times. Until it is its time, a connection is as if there were no drain.
func TestSpread(t *testing.T) {
	const grace, spread, n = 2 * time.Second, time.Minute, 100
	for _, protocol := range []string{"silent", "busy", "HTTP/2"} {
		c := config{handler: http.HandlerFunc(hello), grace: grace}
		if protocol == "HTTP/2" {
			c.server = rawHTTP2.server
		}
		inBubble(t, c, func(t *testing.T, s *service, m *memory) {
			s.Spread = spread
			begin := time.Now()
			times := make(chan time.Duration, n)
			var clients sync.WaitGroup
			for range n {
				c := m.client(t)
				c.SetDeadline(time.Time{})
				clients.Go(func() {
					told := false
					switch protocol {
					case "silent":
						c.closed()
					case "busy":
						for ; !told; pass(time.Second) {
							told = c.get("/").Close
						}
					case "HTTP/2":
						c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(frameSettings, 0, 0))
						c.request(1) // which is served before
						c.next(frameGoAway)
					}
					times <- time.Since(begin)
					c.Close()
				})
			}
			synctest.Wait()
			result := s.drain(t.Context())
			clients.Wait()
			s.finishedInBubble(result)
			close(times)
			thirds := make([]int, 3)
			for at := range times {
				if protocol == "silent" {
					at -= grace
				}
				thirds[min(max(int(3*at/spread), 0), 2)]++
			}
			// Each has 33, and a deviation of less than 5.
			if slices.Min(thirds) < 8 {
				t.Errorf("%s: %v left in each third of the time", protocol, thirds)
			}
			if took := time.Since(begin); took > spread+grace+5*time.Second {
				t.Errorf("%s: the drain took %v", protocol, took)
			}
		})
	}
}

// A HTTP/2 connection over TLS stays open for as long as the server lets it.
func TestIdleHTTP2OverTLS(t *testing.T) {
	testCertificate()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		s := start(t, config{handler: http.HandlerFunc(echo), tls: true, bubble: true, listen: func() net.Listener { return m }})
		transport := http2Transport()
		transport.TLSClientConfig.Time = func() time.Time { return certificateTime }
		dials := 0
		transport.DialContext = func(context.Context, string, string) (net.Conn, error) { dials++; return m.dial() }
		for range 3 {
			if _, _, err := ask(t.Context(), transport, "https://example.com", "body"); err != nil {
				t.Fatal(err)
			}
			pass(20 * time.Second)
		}
		if dials != 1 {
			t.Errorf("%d connections", dials)
		}
		transport.CloseIdleConnections()
		s.finishedInBubble(s.drain(t.Context()))
	})
}
