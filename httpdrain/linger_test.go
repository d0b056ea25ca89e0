package httpdrain_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

// The last response is not cut for a client that still sends when the server closes
// the connection: pipelined requests, which are not served.
func TestPipeliningOnSlowLink(t *testing.T) {
	t.Parallel()
	for _, encrypted := range []bool{false, true} {
		body := strings.Repeat("0123456789abcdef", 9<<10)
		closed := make(chan struct{}, 1)
		s := start(t, config{
			tls: encrypted,
			handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				io.WriteString(w, body)
			}),
			server: func(s *http.Server) {
				s.Protocols.SetUnencryptedHTTP2(false)
				s.ConnState = func(_ net.Conn, state http.ConnState) {
					if state == http.StateClosed {
						closed <- struct{}{}
					}
				}
			},
			listen: func() net.Listener { return largeBuffers{listenTCP(t)} },
		})
		nc, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		nc.(*net.TCPConn).SetReadBuffer(16 << 10) // the response does not fit
		if encrypted {
			nc = tls.Client(nc, clientTLS("http/1.1"))
		}
		c := newClient(t, nc)
		httpdrain.SetLinger(s.Drainer, patience)
		c.send("POST / HTT")
		result := s.drain(t.Context())
		c.send(strings.TrimPrefix(post("/", "1"), "POST / HTT") + post("/", "2") + post("/", "3"))
		wait(t, closed, "StateClosed") // by net/http, with requests unread
		c.send(post("/", strings.Repeat("4", 100)))
		c.answer().last(t, body)
		c.closed()
		c.Close()
		s.finished(result)
	}
}

// Responses of HTTP/2 that the kernel has not sent yet are not cut when the server has
// closed the connection and the client, which was silent, acknowledges what it reads.
func TestUnreadOverHTTP2(t *testing.T) {
	t.Parallel()
	eachRawHTTP2(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		const size = 512 << 10
		idle, closed := make(chan struct{}, 2), make(chan struct{}, 1)
		c.grace = -1
		c.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, size)) })
		c.listen = func() net.Listener { return largeBuffers{listenTCP(t)} }
		encrypted := c.tls
		c.server = func(s *http.Server) {
			s.Protocols.SetUnencryptedHTTP2(!encrypted)
			s.ConnState = func(_ net.Conn, state http.ConnState) {
				switch state {
				case http.StateIdle:
					idle <- struct{}{}
				case http.StateClosed:
					closed <- struct{}{}
				}
			}
		}
		s := start(t, c)
		httpdrain.SetLinger(s.Drainer, patience)
		client := dial(t, s.addr)
		var tcp *net.TCPConn
		switch nc := client.Conn.(type) {
		case *net.TCPConn:
			tcp = nc
		case *tls.Conn:
			tcp = nc.NetConn().(*net.TCPConn)
		}
		tcp.SetReadBuffer(16 << 10) // the response does not fit
		client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
		const windowSize, windowUpdate = 4, 8
		client.sendFrame(frameSettings, 0, 0, 0, windowSize, 0, 16, 0, 0) // 1 MiB
		client.sendFrame(windowUpdate, 0, 0, 0, 16, 0, 0)
		client.request(1)
		wait(t, idle, "StateIdle")
		wait(t, idle, "StateIdle again")
		result := s.drain(t.Context())
		wait(t, closed, "StateClosed") // by net/http, a second after its GOAWAY
		client.sendFrame(windowUpdate, 0, 0, 0, 0, 64, 0)
		got := 0
		for ended := false; !ended; {
			kind, flags, payload := client.frame()
			if kind == 0 {
				got += len(payload)
			}
			ended = kind <= frameHeaders && flags&endStream != 0
		}
		if got != size {
			t.Errorf("got %d bytes of %d", got, size)
		}
		client.next(frameGoAway)
		if _, err := io.Copy(io.Discard, client.r); err != nil {
			t.Error(err)
		}
		select {
		case err := <-result:
			t.Errorf("Shutdown has returned although the socket is open: %v", err)
		case <-time.After(time.Second): // net/http looks every half second
		}
		client.Close()
		s.finished(result)
	})
}

// largeBuffers has the kernel take a response whole, so that net/http goes on to close.
type largeBuffers struct{ net.Listener }

func (l largeBuffers) SetDeadline(at time.Time) error {
	return l.Listener.(*net.TCPListener).SetDeadline(at)
}

func (l largeBuffers) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err == nil {
		nc.(*net.TCPConn).SetWriteBuffer(1 << 20)
	}
	return nc, err
}
