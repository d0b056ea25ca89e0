package httpdrain_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"example.com/tableflip/httpdrain"
)

// eachTransport runs test over TCP, over TLS, and over TCP on a server that
// expects HTTP/2 there too.
func eachTransport(t *testing.T, test func(t *testing.T, c config, dial func(testing.TB, string) *client)) {
	t.Run("TCP", func(t *testing.T) {
		test(t, config{server: func(s *http.Server) { s.Protocols.SetUnencryptedHTTP2(false) }}, dial)
	})
	t.Run("TLS", func(t *testing.T) {
		test(t, config{tls: true}, func(t testing.TB, addr string) *client { return dialTLS(t, addr, "http/1.1") })
	})
	t.Run("beside h2c", func(t *testing.T) {
		test(t, config{}, dial)
	})
}

// A connection that has sent nothing when the drain begins, and one that has
// been used before, are served once more.
func TestConnectionsThatAreOpen(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler = http.HandlerFunc(echo)
		s := start(t, c)
		fresh, used := dial(t, s.addr), dial(t, s.addr)
		used.get("/").more(t, "")
		result := s.drain(t.Context())
		for _, c := range []*client{fresh, used} {
			c.send(post("/", "body"))
			c.answer().last(t, "body")
			c.closed()
		}
		s.finished(result)
	})
}

// A TLS handshake that has not begun, and one that is half done, are completed.
func TestHandshake(t *testing.T) {
	t.Parallel()
	s := start(t, config{tls: true, handler: http.HandlerFunc(hello)})
	not, half := dial(t, s.addr), dial(t, s.addr)
	halved := &halvedConn{Conn: half.Conn, wrote: make(chan struct{}), resume: make(chan struct{})}
	encrypted := []*tls.Conn{tls.Client(halved, clientTLS()), tls.Client(not.Conn, clientTLS())}
	shaken := make(chan error, 1)
	go func() { shaken <- encrypted[0].Handshake() }()
	wait(t, halved.wrote, "half a ClientHello")
	result := s.drain(t.Context())
	close(halved.resume)
	if err := wait(t, shaken, "the handshake"); err != nil {
		t.Fatal(err)
	}
	for _, nc := range encrypted {
		c := newClient(t, nc)
		c.get("/").last(t, "hello")
		c.closed()
	}
	s.finished(result)
}

// A halvedConn sends the first half of what is written first, and waits.
type halvedConn struct {
	net.Conn
	begun         bool
	wrote, resume chan struct{}
}

func (c *halvedConn) Write(p []byte) (int, error) {
	if c.begun {
		return c.Conn.Write(p)
	}
	c.begun = true
	n, err := c.Conn.Write(p[:len(p)/2])
	if err != nil {
		return n, err
	}
	close(c.wrote)
	<-c.resume
	m, err := c.Conn.Write(p[n:])
	return n + m, err
}

// Connections that the kernel has accepted and the server has not are served.
func TestQueueOfListener(t *testing.T) {
	t.Parallel()
	busy, resume := make(chan struct{}), make(chan struct{})
	accepted := 0
	s := start(t, config{handler: http.HandlerFunc(hello), server: func(s *http.Server) {
		s.ConnState = func(_ net.Conn, state http.ConnState) {
			// The server calls this before it accepts another connection.
			if state == http.StateNew {
				if accepted++; accepted == 1 {
					close(busy)
					<-resume
				}
			}
		}
	}})
	clients := []*client{dial(t, s.addr)}
	wait(t, busy, "the first connection")
	for range 10 {
		clients = append(clients, dial(t, s.addr))
	}
	result := s.drain(t.Context())
	close(resume)
	for _, c := range clients {
		c.get("/").last(t, "hello")
	}
	s.finished(result)
	if nc, err := net.Dial("tcp", s.addr); err == nil {
		nc.Close()
		t.Errorf("the listener is open after the drain")
	}
}

// A request whose header arrives in pieces is served, on a new connection as on
// a used one.
func TestSlowHeader(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler = http.HandlerFunc(hello)
		s := start(t, c)
		fresh, used := dial(t, s.addr), dial(t, s.addr)
		used.get("/").more(t, "hello")
		for _, c := range []*client{fresh, used} {
			c.send("GET / HT")
		}
		result := s.drain(t.Context())
		for _, c := range []*client{fresh, used} {
			c.send("TP/1.1\r\nHost: exam")
			c.send("ple.com\r\n\r\n")
			c.answer().last(t, "hello")
			c.closed()
		}
		s.finished(result)
	})
}

// A request whose body arrives in pieces is served. If its handler ran when the
// drain began, only the next response tells the client to leave.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		entered := make(chan struct{}, 2)
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			entered <- struct{}{}
			echo(w, r)
		})
		s := start(t, c)
		before, during := dial(t, s.addr), dial(t, s.addr)
		before.send("POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 8\r\n\r\n")
		wait(t, entered, "the handler")
		during.send("POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 8\r\n")
		result := s.drain(t.Context())
		during.send("\r\n")
		wait(t, entered, "the handler")
		for _, c := range []*client{before, during} {
			c.send("slow")
			c.send("body")
		}
		during.answer().last(t, "slowbody")
		before.answer().more(t, "slowbody")
		before.send(post("/", "once more"))
		before.answer().last(t, "once more")
		s.finished(result)
	})
}

func TestExpectContinue(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(echo)})
	before, during := dial(t, s.addr), dial(t, s.addr)
	const header = "POST / HTTP/1.1\r\nHost: example.com\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
	goesOn := func(c *client) {
		t.Helper()
		const want = "HTTP/1.1 100 Continue\r\n\r\n"
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c.r, got); err != nil || string(got) != want {
			t.Fatalf("got %q, %v; want %q", got, err, want)
		}
	}
	before.send(header)
	goesOn(before)
	result := s.drain(t.Context())
	during.send(header)
	goesOn(during)
	during.send("body")
	during.answer().last(t, "body")
	before.send("body")
	before.answer().is(t, "body")
	before.Close()
	s.finished(result)
}

// Of pipelined requests the server answers those that it has begun to read when
// the drain begins, and the next, which says that it is the last. The others
// must not take its response along, however large they are.
func TestPipelining(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		gate := newGate()
		c.handler = gate
		s := start(t, c)
		httpdrain.SetLinger(s.Drainer, patience)
		client := dial(t, s.addr)
		client.send(post("/", "1") + post("/", "2") + post("/", "3"))
		wait(t, gate.entered, "the first request")
		result := s.drain(t.Context())
		gate.open()
		client.answer().more(t, "1")
		sent := make(chan struct{})
		go func() {
			// This may fail when the server has closed.
			io.WriteString(client, post("/", strings.Repeat("4", 1<<20)))
			close(sent)
		}()
		client.answer().last(t, "2")
		client.closed()
		wait(t, sent, "writing")
		client.Close()
		s.finished(result)
	})
}

// halfConn notes that its sending half was closed.
type halfConn struct {
	net.Conn
	closed chan struct{}
}

func (c *halfConn) CloseWrite() error { close(c.closed); return nil }

// net/http half-closes a connection after its last response, also beside h2c.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	closed := make(chan struct{})
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	ln := wrappingListener{listenTCP(t), func(nc net.Conn) net.Conn { return &halfConn{nc, closed} }}
	s.serve(ln, false)
	c := dial(t, s.addr)
	c.get("/").more(t, "hello")
	result := s.drain(t.Context())
	c.get("/").last(t, "hello")
	wait(t, closed, "CloseWrite")
	s.finished(result)
}

// A client of HTTP/1.0 that would keep the connection is told that it cannot.
func TestHTTP10(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hello)})
	c := dial(t, s.addr)
	const request = "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
	c.send(request)
	if a := c.answer(); a.Header.Get("Connection") != "keep-alive" {
		t.Errorf("before the drain: Connection: %q", a.Header.Get("Connection"))
	}
	result := s.drain(t.Context())
	c.send(request)
	if a := c.answer(); a.Header.Get("Connection") != "close" {
		t.Errorf("Connection: %q", a.Header.Get("Connection"))
	}
	c.closed()
	s.finished(result)
}

// What a handler does with the field Connection neither keeps the connection
// open nor stops it from switching protocols.
func TestHandlersOwnConnectionField(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if v, ok := w.Header()["Connection"]; ok {
			t.Errorf("the handler finds Connection: %q", v)
		}
		w.Header().Set("Connection", "keep-alive")
		io.WriteString(w, "hello")
	})})
	c := dial(t, s.addr)
	result := s.drain(t.Context())
	a := c.get("/")
	a.last(t, "hello")
	if got := fmt.Sprint(a.Header["Connection"]); got != "[close]" && got != "[]" {
		t.Errorf("Connection: %v", got)
	}
	c.closed()
	s.finished(result)
}

// A 1xx response does not say that the connection will be closed: a client could
// take that for the end.
func TestInformationalResponse(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
		io.WriteString(w, "hello")
	})})
	c := dial(t, s.addr)
	result := s.drain(t.Context())
	hints := c.get("/")
	if hints.StatusCode != http.StatusEarlyHints || hints.Header.Get("Link") == "" || hints.Close {
		t.Errorf("status %d, %v", hints.StatusCode, hints.Header)
	}
	c.answer().last(t, "hello")
	c.closed()
	s.finished(result)
}

// A file is sent by the ReadFrom of net/http, and so by sendfile where there is
// one: the handler gets the server's own ResponseWriter.
func TestResponseWriterIsTheServers(t *testing.T) {
	t.Parallel()
	content := strings.Repeat("content", 1<<16)
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	types := make(chan string, 2)
	s := start(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		types <- fmt.Sprintf("%T", w)
		http.ServeFile(w, r, name)
	})})
	c := dial(t, s.addr)
	c.get("/").more(t, content)
	result := s.drain(t.Context())
	c.get("/").last(t, content)
	if before, during := <-types, <-types; before != during {
		t.Errorf("the ResponseWriter was a %s and is a %s", before, during)
	}
	s.finished(result)
}

// A handler that panics ends its connection, and the drain does not wait for it.
func TestPanic(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		panic(http.ErrAbortHandler)
	})})
	c := dial(t, s.addr)
	result := s.drain(t.Context())
	c.send(get("/"))
	c.closed()
	s.finished(result)
}

// A request that is no request is refused as ever.
func TestMalformedRequest(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(hello)})
	c := dial(t, s.addr)
	result := s.drain(t.Context())
	c.send("this is not a request\r\n\r\n")
	if a := c.answer(); a.StatusCode != http.StatusBadRequest {
		t.Errorf("status %d", a.StatusCode)
	}
	c.closed()
	s.finished(result)
}

// A client that leaves while its request is served is not waited for.
func TestClientLeaves(t *testing.T) {
	t.Parallel()
	gate := newGate()
	s := start(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		gate.entered <- struct{}{}
		<-r.Context().Done()
	})})
	c := dial(t, s.addr)
	c.send(get("/"))
	wait(t, gate.entered, "the handler")
	result := s.drain(t.Context())
	c.Close()
	s.finished(result)
}

// net/http's client never sees the drain: its requests that cannot be repeated
// go through on the old connection, and then on a new one to the successor.
func TestTransportMovesToSuccessor(t *testing.T) {
	t.Parallel()
	ln := listenTCP(t).(*net.TCPListener)
	second := duplicate(t, ln)
	old := start(t, config{handler: name("old"), listen: func() net.Listener { return ln }})
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	url := "http://" + old.addr
	ask := func() string {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), "POST", url, io.NopCloser(strings.NewReader("body")))
		if err != nil {
			t.Fatal(err)
		}
		response, err := transport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		return string(body)
	}
	if got := ask(); got != "old" {
		t.Errorf("before: %s", got)
	}
	successor := start(t, config{handler: name("new"), listen: func() net.Listener { return second }})
	result := old.drain(t.Context())
	if got := ask(); got != "old" {
		t.Errorf("on the connection: %s", got)
	}
	old.finished(result)
	if got := ask(); got != "new" {
		t.Errorf("after: %s", got)
	}
	transport.CloseIdleConnections()
	successor.finished(successor.drain(t.Context()))
}

// name answers every request with its name.
type name string

func (n name) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	io.WriteString(w, string(n))
}
