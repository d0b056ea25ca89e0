package httpdrain_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"reflect"
	"strings"
	"sync"
	"testing"
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
		conn = info.Conn.LocalAddr().String()
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

// Streams in flight end as they would, a stream opened during the drain is
// served, and its response makes the client leave the connection.
func TestStreams(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		gate := newGate()
		mux := http.NewServeMux()
		mux.Handle("/gate", gate)
		mux.HandleFunc("/", echo)
		c.handler = mux
		s := start(t, c)
		transport := newTransport()
		defer transport.CloseIdleConnections()
		url := scheme + s.addr
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
		wait(t, gate.entered, "the stream in flight")
		result := s.drain(t.Context())
		during, conn, err := ask(t.Context(), transport, url, "during")
		if err != nil {
			t.Fatal(err)
		}
		during.is(t, "during")
		if len(during.Header["Connection"]) > 0 {
			t.Errorf("Connection: %q over HTTP/2", during.Header["Connection"])
		}
		if _, _, err := ask(t.Context(), transport, url, "after"); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("a request after the GOAWAY: %v; want a refused new connection", err)
		}
		gate.open()
		o := wait(t, inFlight, "the stream in flight")
		if o.err != nil {
			t.Fatal(o.err)
		}
		o.is(t, "in flight")
		if o.conn != conn {
			t.Errorf("the streams were on the connections %s and %s", o.conn, conn)
		}
		s.finished(result)
	})
}

// A client with many requests at a time, none of which it can repeat, loses none
// by the GOAWAY.
func TestManyStreams(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		c.handler = http.HandlerFunc(echo)
		s := start(t, c)
		transport := newTransport()
		defer transport.CloseIdleConnections()
		var clients sync.WaitGroup
		warm := make(chan struct{}, 1000)
		for range 16 {
			clients.Go(func() {
				for {
					a, _, err := ask(t.Context(), transport, scheme+s.addr, "body")
					if err != nil {
						if !strings.Contains(err.Error(), "refused") {
							t.Error(err)
						}
						return
					}
					a.is(t, "body")
					select {
					case warm <- struct{}{}:
					default:
					}
				}
			})
		}
		for range 100 {
			wait(t, warm, "the clients' requests")
		}
		result := s.drain(t.Context())
		clients.Wait()
		s.finished(result)
	})
}

// A 1xx response over HTTP/2 must not have a field Connection, and a handler
// that clears its header after it (as httputil.ReverseProxy does) does not keep
// the client on the connection.
func TestInformationalResponseOverHTTP2(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>")
			w.WriteHeader(http.StatusEarlyHints)
			clear(w.Header())
			w.WriteHeader(http.StatusOK)
			io.WriteString(w, "hello")
		})
		s := start(t, c)
		transport := newTransport()
		defer transport.CloseIdleConnections()
		connect(t, transport, scheme+s.addr)
		result := s.drain(t.Context())
		var hints http.Header
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
			hints = http.Header(h)
			return nil
		}})
		a, _, err := ask(ctx, transport, scheme+s.addr, "")
		if err != nil {
			t.Fatal(err)
		}
		a.is(t, "hello")
		if hints.Get("Link") == "" || len(hints["Connection"]) > 0 {
			t.Errorf("the 1xx response has %v", hints)
		}
		if _, _, err := ask(t.Context(), transport, scheme+s.addr, ""); err == nil {
			t.Error("the client did not leave")
		}
		s.finished(result)
	})
}

// connect makes transport open its connection.
func connect(t *testing.T, transport *http.Transport, url string) {
	t.Helper()
	if _, _, err := ask(t.Context(), transport, url, ""); err != nil {
		t.Fatal(err)
	}
}

// The ResponseWriter has the methods that it has without a drain.
func TestResponseWriterOverHTTP2(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		types := make(chan reflect.Type, 2)
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { types <- reflect.TypeOf(w) })
		s := start(t, c)
		transport := newTransport()
		defer transport.CloseIdleConnections()
		connect(t, transport, scheme+s.addr)
		result := s.drain(t.Context())
		connect(t, transport, scheme+s.addr)
		before, during := <-types, <-types
		for i := range before.NumMethod() {
			method := before.Method(i)
			if got, ok := during.MethodByName(method.Name); !ok {
				t.Errorf("no method %s during the drain", method.Name)
			} else if got.Type.NumIn() != method.Type.NumIn() || got.Type.NumOut() != method.Type.NumOut() {
				t.Errorf("method %s is %v, and %v during the drain", method.Name, method.Type, got.Type)
			}
		}
		s.finished(result)
	})
}

// The first response does not end before the GOAWAY, however busy the server is
// with the connection: the client could send another request in between.
func TestGoAwayComesFirst(t *testing.T) {
	t.Parallel()
	for range 20 {
		s := start(t, config{handler: http.HandlerFunc(hello)})
		c := dial(t, s.addr)
		c.startHTTP2()
		result := s.drain(t.Context())
		const endStream, endHeaders = 1, 4
		c.sendFrame(frameHeaders, endStream|endHeaders, 1, 0x82, 0x86, 0x84) // GET http /
		// The server answers each of these, and would hang up if they were many more.
		acks := make(chan struct{}, 1000)
		for range cap(acks) {
			acks <- struct{}{}
		}
		answered, flooded := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(flooded)
			var pings bytes.Buffer
			for {
				select {
				case <-acks:
					pings.WriteString(frame(framePing, 0, 0, make([]byte, 8)...))
				default:
					pings.WriteTo(c)
				}
				select {
				default:
				case <-answered:
					return
				}
			}
		}()
		for gone := false; ; {
			kind, flags, payload := c.frame()
			switch kind {
			case framePing:
				acks <- struct{}{}
			case frameGoAway:
				gone = true
				if want := []byte{0, 0, 0, 1, 0, 0, 0, 0}; !bytes.Equal(payload, want) {
					t.Errorf("GOAWAY with % x, want stream 1 and no error", payload)
				}
			}
			if kind <= frameHeaders && flags&endStream != 0 {
				if !gone {
					t.Error("the response has ended before the GOAWAY")
				}
				break
			}
		}
		close(answered)
		wait(t, flooded, "the flood")
		c.Close()
		s.finished(result)
	}
}

// A connection that stays silent is told to go before it is closed, and does not
// count as cut.
func TestSilentHTTP2Connection(t *testing.T) {
	t.Parallel()
	test := func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler, c.grace = http.HandlerFunc(echo), -1
		s := start(t, c)
		client := dial(t, s.addr)
		client.startHTTP2()
		result := s.drain(t.Context())
		payload := client.next(frameGoAway)
		if want := make([]byte, 8); !bytes.Equal(payload, want) {
			t.Errorf("GOAWAY with % x, want no stream and no error", payload)
		}
		client.closed()
		s.finished(result)
	}
	t.Run("TLS", func(t *testing.T) {
		test(t, config{tls: true}, func(t testing.TB, addr string) *client { return dialTLS(t, addr, "h2") })
	})
	t.Run("h2c", func(t *testing.T) { test(t, config{}, dial) })
}

const (
	frameHeaders  = 1 // and DATA is 0
	frameSettings = 4
	framePing     = 6
	frameGoAway   = 7
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
