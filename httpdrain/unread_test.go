package httpdrain_test

import (
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip/httpdrain"
)

// A sleepyConn is a server's connection whose process stands still for a while. What comes
// meanwhile is lost if the server's reads fail before they have it.
type sleepyConn struct {
	net.Conn
	asleep  atomic.Bool
	awake   chan struct{}
	expired atomic.Bool // the deadline of reads is over
}

func newSleepyConn(nc net.Conn) *sleepyConn {
	return &sleepyConn{Conn: nc, awake: make(chan struct{})}
}

func (c *sleepyConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && c.asleep.Load() {
		<-c.awake
		if c.expired.Load() {
			return 0, os.ErrDeadlineExceeded
		}
	}
	return n, err
}

func (c *sleepyConn) SetReadDeadline(at time.Time) error {
	c.expired.Store(!at.IsZero() && !time.Now().Before(at))
	return c.Conn.SetReadDeadline(at)
}

// A process that stood still when the grace was over has not read a request that had come.
// A connection of which nobody can tell is looked at twice.
func TestUnreadOfOpaque(t *testing.T) {
	const grace = httpdrain.DefaultIdleGrace
	inBubble(t, config{handler: http.HandlerFunc(hello)}, func(t *testing.T, s *service, m *memory) {
		var server *sleepyConn
		nc, err := m.dialBy(func(nc net.Conn) net.Conn { server = newSleepyConn(nc); return server })
		if err != nil {
			t.Fatal(err)
		}
		c := newClient(t, nc)
		c.SetDeadline(time.Time{})
		c.get("/").more(t, "hello")
		result := s.drain(t.Context())
		pass(grace / 2)
		server.asleep.Store(true)
		c.send(get("/"))
		pass(grace/2 + time.Millisecond)
		close(server.awake)
		c.answer().last(t, "hello")
		c.Close()
		s.finishedInBubble(result)
	})
}
