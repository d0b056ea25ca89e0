package httpdrain_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
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
