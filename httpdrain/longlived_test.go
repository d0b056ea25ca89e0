package httpdrain_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
)

// A streaming response goes on to its end. Its header was sent before the drain,
// so that the client may use the connection again, and is told then.
func TestStreamingResponse(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		parts := make(chan string)
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/stream" {
				echo(w, r)
				return
			}
			for part := range parts {
				io.WriteString(w, part)
				w.(http.Flusher).Flush()
			}
		})
		s := start(t, c)
		client := dial(t, s.addr)
		client.send(get("/stream"))
		parts <- "one "
		response, err := http.ReadResponse(client.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		read := func(want string) {
			t.Helper()
			got := make([]byte, len(want))
			if _, err := io.ReadFull(response.Body, got); err != nil || string(got) != want {
				t.Fatalf("got %q, %v; want %q", got, err, want)
			}
		}
		read("one ")
		result := s.drain(t.Context())
		parts <- "two "
		read("two ")
		close(parts)
		if rest, err := io.ReadAll(response.Body); err != nil || len(rest) > 0 {
			t.Fatalf("got %q, %v", rest, err)
		}
		client.send(post("/", "again"))
		client.answer().last(t, "again")
		client.closed()
		s.finished(result)
	})
}

// Server-sent events end when their handler learns of the drain, over HTTP/1 and
// HTTP/2.
func TestServerSentEvents(t *testing.T) {
	t.Parallel()
	events := func(s **service, sent chan<- struct{}) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, "data: hello\n\n")
			http.NewResponseController(w).Flush()
			sent <- struct{}{}
			select {
			case <-(*s).Context().Done():
				io.WriteString(w, "data: goodbye\n\n")
			case <-r.Context().Done():
			}
		}
	}
	listen := func(t *testing.T, c config, transport *http.Transport, scheme string) {
		var s *service
		sent := make(chan struct{}, 1)
		c.handler, c.grace = events(&s, sent), -1
		s = start(t, c)
		defer transport.CloseIdleConnections()
		response, err := (&http.Client{Transport: transport}).Get(scheme + s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		wait(t, sent, "an event")
		result := s.drain(t.Context())
		got, err := io.ReadAll(response.Body)
		if want := "data: hello\n\ndata: goodbye\n\n"; err != nil || string(got) != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
		s.finished(result)
	}
	t.Run("HTTP/1", func(t *testing.T) { listen(t, config{}, new(http.Transport), "http://") })
	eachHTTP2(t, func(t *testing.T, c config, newTransport func() *http.Transport, scheme string) {
		t.Parallel()
		listen(t, c, newTransport(), scheme)
	})
}

// shout answers with a 101 response, and then shouts back every line. When the
// drain begins it says so.
func shout(s **service) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		nc, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		io.WriteString(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n")
		go func() {
			defer nc.Close()
			lines := make(chan string)
			go func() {
				defer close(lines)
				for {
					line, err := buffered.ReadString('\n')
					if err != nil {
						return
					}
					lines <- line
				}
			}()
			draining := (*s).Context().Done()
			for {
				select {
				case line, ok := <-lines:
					if !ok {
						return
					}
					io.WriteString(nc, strings.ToUpper(line))
				case <-draining:
					io.WriteString(nc, "the service is draining\n")
					draining = nil
				}
			}
		}()
	}
}

const upgrade = "GET / HTTP/1.1\r\nHost: example.com\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n"

func (c *client) switches() {
	c.t.Helper()
	response, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	if got := fmt.Sprint(response.Header["Connection"]); response.StatusCode != http.StatusSwitchingProtocols || got != "[Upgrade]" {
		c.t.Errorf("status %d, Connection: %s", response.StatusCode, got)
	}
}

func (c *client) line(want string) {
	c.t.Helper()
	if got, err := c.r.ReadString('\n'); err != nil || got != want {
		c.t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

// Hijacked connections outlive the drain, and learn that it has begun. One that
// is asked for during the drain is given.
func TestHijackedConnection(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		var s *service
		c.handler = shout(&s)
		s = start(t, c)
		before, during := dial(t, s.addr), dial(t, s.addr)
		before.send(upgrade)
		before.switches()
		result := s.drain(t.Context())
		during.send(upgrade)
		during.switches()
		s.finished(result)
		for _, c := range []*client{before, during} {
			c.line("the service is draining\n")
			c.send("hello\n")
			c.line("HELLO\n")
		}
	})
}

// Where the server sees a connection by another than everybody else, a hijacker
// gets that, and can ask for the connection itself.
func TestHijackedNetConn(t *testing.T) {
	t.Parallel()
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		var accepted net.Conn
		base := c.server
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			nc, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer nc.Close()
			if base != nil && nc != accepted {
				t.Errorf("hijacked %T although the server has no HTTP/2 without TLS", nc)
			}
			if under, ok := nc.(interface{ NetConn() net.Conn }); ok && nc != accepted {
				nc = under.NetConn()
			}
			if nc != accepted {
				t.Errorf("hijacked %T, want %T", nc, accepted)
			}
		})
		c.server = func(s *http.Server) {
			if base != nil {
				base(s)
			}
			s.ConnContext = func(ctx context.Context, nc net.Conn) context.Context {
				accepted = nc
				return ctx
			}
		}
		s := start(t, c)
		client := dial(t, s.addr)
		client.send(get("/"))
		client.closed()
		s.finished(s.drain(t.Context()))
	})
}

// A reverse proxy switches protocols too: its 101 response is that of the
// backend, with nothing added.
func TestReverseProxy(t *testing.T) {
	t.Parallel()
	var backendService *service
	backend := start(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/":
			shout(&backendService)(w, r)
		default:
			w.WriteHeader(http.StatusEarlyHints)
			echo(w, r)
		}
	})})
	backendService = backend
	target := &url.URL{Scheme: "http", Host: backend.addr}
	s := start(t, config{handler: &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}})
	upgraded, plain := dial(t, s.addr), dial(t, s.addr)
	result := s.drain(t.Context())
	upgraded.send(upgrade)
	upgraded.switches()
	upgraded.send("hello\n")
	upgraded.line("HELLO\n")
	plain.send(post("/echo", "body"))
	if a := plain.answer(); a.StatusCode != http.StatusEarlyHints || a.Close {
		t.Errorf("status %d, %v", a.StatusCode, a.Header)
	}
	plain.answer().last(t, "body")
	plain.closed()
	s.finished(result)
}

// A WebSocket client that net/http refuses to upgrade is answered like any other.
func TestUpgradeRefused(t *testing.T) {
	t.Parallel()
	s := start(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no", http.StatusUpgradeRequired)
	})})
	c := dial(t, s.addr)
	result := s.drain(t.Context())
	c.send(upgrade)
	if a := c.answer(); a.StatusCode != http.StatusUpgradeRequired || !a.Close {
		t.Errorf("status %d, close %t", a.StatusCode, a.Close)
	}
	c.closed()
	s.finished(result)
}

// The wrapped handler can be called without a server.
func TestHandlerWithoutServer(t *testing.T) {
	t.Parallel()
	s := newService(t, config{handler: http.HandlerFunc(hello)})
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Proto = version
		r.ProtoMajor, r.ProtoMinor, _ = http.ParseHTTPVersion(version)
		w := httptest.NewRecorder()
		s.server.Handler.ServeHTTP(w, r)
		if got := w.Body.String(); got != "hello" || w.Header().Get("Connection") != "close" {
			t.Errorf("%s: %q, %v", version, got, w.Header())
		}
	}
}
