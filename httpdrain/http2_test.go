package httpdrain_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// eachHTTP2 runs test over TLS, and over TCP with prior knowledge.
func eachHTTP2(t *testing.T, test func(t *testing.T, c config, transport func() *http.Transport, scheme string)) {
	t.Run("TLS", func(t *testing.T) { test(t, config{tls: true}, http2Transport, "https://") })
	t.Run("h2c", func(t *testing.T) { test(t, config{}, plainHTTP2Transport, "http://") })
}

// ask posts a body that cannot be replayed, and reports the connection it used.
func ask(ctx context.Context, transport *http.Transport, url, body string) (answer, string, error) {
	var conn string
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		conn = fmt.Sprintf("%p", info.Conn)
	}})
	request, err := http.NewRequestWithContext(ctx, "POST", url, io.NopCloser(strings.NewReader(body)))
	if err != nil {
		return answer{}, "", err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return answer{}, conn, err
	}
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	return answer{response, string(got)}, conn, err
}

// eachHTTP2InBubble runs test with a service in memory, over TLS and without it.
func eachHTTP2InBubble(t *testing.T, handler func() http.Handler, test func(t *testing.T, s *service, dial func() (net.Conn, error))) {
	testCertificate()
	for _, encrypted := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			s := start(t, config{handler: handler(), tls: encrypted, bubble: true, listen: func() net.Listener { return m }})
			test(t, s, m.dial)
		})
	}
}

// Streams in flight end as they would, a stream opened during the drain is
// served, and its response makes the client leave the connection.
func TestStreams(t *testing.T) {
	var gate *gate
	eachHTTP2InBubble(t, func() http.Handler {
		gate = newGate()
		mux := http.NewServeMux()
		mux.Handle("/gate", gate)
		mux.HandleFunc("/", echo)
		return mux
	}, func(t *testing.T, s *service, dial func() (net.Conn, error)) {
		transport, url := s.transport(dial)
		type outcome struct {
			answer
			conn string
			err  error
		}
		inFlight := make(chan outcome, 1)
		go func() {
			a, conn, err := ask(t.Context(), transport, url+"/gate", "in flight")
			inFlight <- outcome{a, conn, err}
		}()
		<-gate.entered
		result := s.drain(t.Context())
		during, conn, err := ask(t.Context(), transport, url, "during")
		if err != nil {
			t.Fatal(err)
		}
		during.is(t, "during")
		if len(during.Header["Connection"]) > 0 {
			t.Errorf("Connection: %q over HTTP/2", during.Header["Connection"])
		}
		synctest.Wait()
		if _, after, err := ask(t.Context(), transport, url, "after"); err == nil || after == conn {
			t.Errorf("the client has not left: %v", err)
		}
		gate.open()
		o := <-inFlight
		if o.err != nil {
			t.Fatal(o.err)
		}
		o.is(t, "in flight")
		if o.conn != conn {
			t.Errorf("the streams were on the connections %s and %s", o.conn, conn)
		}
		s.finishedInBubble(result)
	})
}

// transport returns a client of a service in memory, and its URL.
func (s *service) transport(dial func() (net.Conn, error)) (transport *http.Transport, url string) {
	transport, url = plainHTTP2Transport(), "http://example.com"
	if !s.server.Protocols.UnencryptedHTTP2() {
		transport, url = http2Transport(), "https://example.com"
		transport.TLSClientConfig.Time = func() time.Time { return certificateTime }
	}
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return dial() }
	return transport, url
}

// connect makes transport open its connection.
func connect(t *testing.T, transport *http.Transport, url string) {
	t.Helper()
	if _, _, err := ask(t.Context(), transport, url, ""); err != nil {
		t.Fatal(err)
	}
}

// eachRawHTTP2 runs test with a client whose frames the test spells out.
func eachRawHTTP2(t *testing.T, test func(t *testing.T, c config, dial func(testing.TB, string) *client)) {
	t.Run("TLS", func(t *testing.T) {
		test(t, config{tls: true}, func(t testing.TB, addr string) *client { return dialTLS(t, addr, "h2") })
	})
	t.Run("h2c", func(t *testing.T) { test(t, config{}, dial) })
}

// The first GOAWAY excludes no stream, and the streams that the client opens
// before it acknowledges that are served, however many.
func TestFarewell(t *testing.T) {
	handler := func() http.Handler { return http.HandlerFunc(hello) }
	eachHTTP2InBubble(t, handler, func(t *testing.T, s *service, dial func() (net.Conn, error)) {
		nc, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		if !s.server.Protocols.UnencryptedHTTP2() {
			config := clientTLS("h2")
			config.Time = func() time.Time { return certificateTime }
			nc = tls.Client(nc, config)
		}
		client := newClient(t, nc)
		client.startHTTP2()
		result := s.drain(t.Context())
		client.request(1)
		client.farewell()
		const streams = 99 // the server's limit is 250 at a time
		for stream := byte(3); stream <= streams; stream += 2 {
			client.request(stream)
		}
		client.acknowledge("draining")
		for ended := 0; ended < (streams+1)/2; {
			kind, flags, payload := client.frame()
			if kind == frameGoAway || kind == frameReset {
				t.Fatalf("frame %d with % x while streams are open", kind, payload)
			}
			if kind <= frameHeaders && flags&endStream != 0 {
				ended++
			}
		}
		client.Close()
		s.finishedInBubble(result)
	})
}

// farewell reads until the GOAWAY has come. No response ends before that.
func (c *client) farewell() {
	c.t.Helper()
	for {
		kind, flags, payload := c.frame()
		switch {
		case kind == frameGoAway:
			if want := "\x7f\xff\xff\xff\x00\x00\x00\x00"; string(payload) != want {
				c.t.Errorf("GOAWAY with % x, want % x", payload, want)
			}
			if got := c.next(framePing); string(got) != "draining" {
				c.t.Errorf("PING with %q after GOAWAY", got)
			}
			return
		case kind <= frameHeaders && flags&endStream != 0:
			c.t.Error("a response has ended before the GOAWAY")
		}
	}
}

func (c *client) acknowledge(data string) {
	c.t.Helper()
	c.sendFrame(framePing, 1, 0, []byte(data)...)
}

// request opens a stream.
func (c *client) request(stream byte) {
	c.t.Helper()
	const endHeaders = 4
	c.sendFrame(frameHeaders, endStream|endHeaders, stream, 0x82, 0x86, 0x84) // GET http /
}

// A connection whose handshake comes during the drain is told to leave as well.
func TestHandshakeDuringDrain(t *testing.T) {
	t.Parallel()
	s := start(t, config{tls: true, handler: http.HandlerFunc(hello)})
	nc, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	result := s.drain(t.Context())
	client := newClient(t, tls.Client(nc, clientTLS("h2")))
	client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	client.sendFrame(frameSettings, 0, 0)
	client.farewell()
	client.Close()
	s.finished(result)
}

// A connection that stays silent is told to go before it is closed, and does not
// count as cut.
func TestSilentHTTP2Connection(t *testing.T) {
	t.Parallel()
	eachRawHTTP2(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler = http.HandlerFunc(echo)
		s := start(t, c)
		client := dial(t, s.addr)
		client.startHTTP2()
		result := s.drain(t.Context())
		client.farewell()
		client.acknowledge("draining")
		if payload := client.next(frameGoAway); !bytes.Equal(payload, make([]byte, 8)) {
			t.Errorf("GOAWAY with % x, want no stream and no error", payload)
		}
		client.closed()
		s.finished(result)
	})
}

// Nothing comes in the middle of a frame: responses of any size arrive as they
// were sent, in frames that are split between writes.
func TestFramesStayWhole(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		ln := listenTCP(t).(*net.TCPListener)
		defer ln.Close()
		content := make([]byte, 3<<20)
		rand.NewChaCha8([32]byte{}).Read(content)
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for rest := content; len(rest) > 0; {
				n := min(len(rest), 1+rand.IntN(40000))
				w.Write(rest[:n])
				rest = rest[n:]
			}
		})
		c.listen = func() net.Listener { return duplicate(t, ln) }
		s := start(t, c)
		url := scheme + s.addr
		transport := newTransport()
		defer transport.CloseIdleConnections()
		for range 5 {
			var streams sync.WaitGroup
			running := make(chan struct{}, 8)
			for range cap(running) {
				streams.Go(func() {
					response, err := (&http.Client{Transport: transport}).Get(url)
					running <- struct{}{}
					if err != nil {
						t.Error(err)
						return
					}
					defer response.Body.Close()
					if got, err := io.ReadAll(response.Body); err != nil || !bytes.Equal(got, content) {
						t.Errorf("got %d bytes of %d: %v", len(got), len(content), err)
					}
				})
			}
			for range cap(running) {
				wait(t, running, "a response")
			}
			next := start(t, c)
			result := s.drain(t.Context())
			streams.Wait()
			s.finished(result)
			s = next
		}
	})
}

// The hooks and the handler of an HTTP/2 connection see what they would see
// without a Drainer.
func TestHooksOverHTTP2(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		var accepted net.Conn
		states := make(chan http.ConnState, 100)
		base := make(chan net.Listener, 10)
		c.server = func(srv *http.Server) {
			srv.BaseContext = func(ln net.Listener) context.Context {
				base <- ln
				return context.Background()
			}
			srv.ConnContext = func(ctx context.Context, nc net.Conn) context.Context {
				accepted = nc
				return ctx
			}
			srv.ConnState = func(nc net.Conn, state http.ConnState) {
				if nc != accepted {
					t.Errorf("ConnState is called for %T, and ConnContext was for %T", nc, accepted)
				}
				states <- state
			}
		}
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if (r.TLS != nil) != c.tls || c.tls && r.TLS.NegotiatedProtocol != "h2" {
				t.Errorf("r.TLS is %v", r.TLS)
			}
		})
		s := start(t, c)
		transport := newTransport()
		defer transport.CloseIdleConnections()
		connect(t, transport, scheme+s.addr)
		want := "*net.TCPConn"
		if c.tls {
			want = "*tls.Conn"
		}
		if got := fmt.Sprintf("%T", accepted); got != want {
			t.Errorf("the hooks are given a %s, want %s", got, want)
		}
		if len(base) != 1 || (<-base).Addr().String() != s.addr {
			t.Error("BaseContext is not called once, with the listener")
		}
		result := s.drain(t.Context())
		for wait(t, states, "StateClosed") != http.StateClosed {
		}
		s.finished(result)
	})
}

// Listeners that hide the frames: those of crypto/tls under a Go that wants its
// connections as they are, and any other that wraps the connections.
func TestHiddenFrames(t *testing.T) {
	t.Parallel()
	for _, implicit := range []bool{false, true} {
		testHiddenFrames(t, implicit)
	}
}

// testHiddenFrames has the handler write the header by itself, or implicitly.
func testHiddenFrames(t *testing.T, implicit bool) {
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>")
			w.WriteHeader(http.StatusEarlyHints)
			if !implicit {
				clear(w.Header()) // as httputil.ReverseProxy does
				w.WriteHeader(http.StatusOK)
			}
			for i := range reflect.TypeOf(w).NumMethod() {
				fmt.Fprintln(w, reflect.TypeOf(w).Method(i).Name)
			}
		})
		s := newService(t, c)
		ln := s.Listener(listenTCP(t))
		s.addr = ln.Addr().String()
		if c.tls {
			config := clientTLS("h2")
			config.Certificates = []tls.Certificate{certificate()}
			ln = tls.NewListener(ln, config)
			s.server.TLSConfig = nil
		}
		go func() { s.served <- s.server.Serve(hidingListener{ln}) }()
		transport := newTransport()
		defer transport.CloseIdleConnections()
		before, conn, err := ask(t.Context(), transport, scheme+s.addr, "")
		if err != nil {
			t.Fatal(err)
		}
		result := s.drain(t.Context())
		var hints http.Header
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
			hints = http.Header(h)
			return nil
		}})
		during, _, err := ask(ctx, transport, scheme+s.addr, "")
		if err != nil {
			t.Fatal(err)
		}
		if hints.Get("Link") == "" || len(hints["Connection"]) > 0 {
			t.Errorf("the 1xx response has %v", hints)
		}
		for method := range strings.Lines(before.body) {
			if !strings.Contains("\n"+during.body, "\n"+method) {
				t.Errorf("no method %s during the drain", method)
			}
		}
		for after := conn; after == conn; { // until the client has the GOAWAY
			_, after, _ = ask(t.Context(), transport, scheme+s.addr, "")
		}
		transport.CloseIdleConnections() // it may have got into the listener's queue
		s.finished(result)
	})
}

// A connection whose frames are hidden gets net/http's GOAWAY before it is closed.
func TestSilentHiddenHTTP2(t *testing.T) {
	t.Parallel()
	eachRawHTTP2(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler, c.grace = http.HandlerFunc(hello), -1
		s := newService(t, c)
		ln := s.Listener(listenTCP(t))
		if c.tls {
			config := clientTLS("h2")
			config.Certificates = []tls.Certificate{certificate()}
			ln = tls.NewListener(ln, config)
			s.server.TLSConfig = nil
		}
		go func() { s.served <- s.server.Serve(hidingListener{ln}) }()
		client := dial(t, ln.Addr().String())
		client.startHTTP2()
		result := s.drain(t.Context())
		client.next(frameGoAway)
		if _, err := io.Copy(io.Discard, client.r); err != nil {
			t.Error(err)
		}
		s.finished(result)
	})
}

// hidingListener hides what plain connections are, but not that they have TLS.
type hidingListener struct{ net.Listener }

func (l hidingListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if _, encrypted := nc.(*tls.Conn); err != nil || encrypted {
		return nc, err
	}
	return &struct{ net.Conn }{nc}, nil
}

const (
	frameHeaders  = 1 // and DATA is 0
	frameReset    = 3
	frameSettings = 4
	framePing     = 6
	frameGoAway   = 7

	frameContinuation = 9

	endStream = 1
)

// startHTTP2 exchanges settings, and returns when the server has nothing to say.
func (c *client) startHTTP2() {
	c.t.Helper()
	c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	c.sendFrame(frameSettings, 0, 0)
	c.next(frameSettings)
	c.sendFrame(frameSettings, 1, 0)
	c.sendFrame(framePing, 0, 0, make([]byte, 8)...)
	c.next(framePing)
}

func (c *client) sendFrame(kind, flags, stream byte, payload ...byte) {
	c.t.Helper()
	c.send(frame(kind, flags, stream, payload...))
}

func frame(kind, flags, stream byte, payload ...byte) string {
	return string(append([]byte{0, 0, byte(len(payload)), kind, flags, 0, 0, 0, stream}, payload...))
}

// next reads frames until one of a kind, and returns its payload.
func (c *client) next(want byte) []byte {
	c.t.Helper()
	for {
		if kind, _, payload := c.frame(); kind == want {
			return payload
		}
	}
}

// frame reads the next frame.
func (c *client) frame() (kind, flags byte, payload []byte) {
	c.t.Helper()
	var header [9]byte
	if _, err := io.ReadFull(c.r, header[:]); err != nil {
		c.t.Fatalf("reading a frame: %v", err)
	}
	payload = make([]byte, int(header[0])<<16|int(header[1])<<8|int(header[2]))
	if _, err := io.ReadFull(c.r, payload); err != nil {
		c.t.Fatalf("reading a frame: %v", err)
	}
	return header[3], header[4], payload
}

// A body that arrives slowly is read to its end.
func TestSlowBodyOverHTTP2(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		entered := make(chan struct{}, 1)
		c.grace = -1
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			entered <- struct{}{}
			var body bytes.Buffer
			body.ReadFrom(r.Body)
			w.Write(body.Bytes())
		})
		s := start(t, c)
		transport := newTransport()
		defer transport.CloseIdleConnections()
		r, w := io.Pipe()
		request, err := http.NewRequestWithContext(t.Context(), "POST", scheme+s.addr, r)
		if err != nil {
			t.Fatal(err)
		}
		bodies := make(chan string, 1)
		go func() {
			defer close(bodies)
			response, err := transport.RoundTrip(request)
			if err != nil {
				t.Error(err)
				return
			}
			defer response.Body.Close()
			got, err := io.ReadAll(response.Body)
			if err != nil {
				t.Error(err)
			}
			bodies <- string(got)
		}()
		io.WriteString(w, "slow")
		wait(t, entered, "the handler")
		result := s.drain(t.Context())
		io.WriteString(w, "body")
		w.Close()
		if got := wait(t, bodies, "the response"); got != "slowbody" {
			t.Errorf("got %q", got)
		}
		s.finished(result)
	})
}
