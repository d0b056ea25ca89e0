//go:build unix

package httpdrain_test

import (
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"
)

// stallingListener is one on a machine that stands still when Accept with a deadline is
// called, until that is over.
type stallingListener struct {
	*net.TCPListener
	deadline atomic.Pointer[time.Time]
	stalls   atomic.Int32 // how often that happens
}

func (l *stallingListener) SetDeadline(at time.Time) error {
	l.deadline.Store(&at)
	return l.TCPListener.SetDeadline(at)
}

func (l *stallingListener) Accept() (net.Conn, error) {
	if at := l.deadline.Load(); at != nil && time.Until(*at) > 0 && l.stalls.Add(-1) >= 0 {
		<-time.After(time.Until(*at) + time.Millisecond)
	}
	return l.TCPListener.Accept()
}

// A queue is not taken for empty because the time in which to look was over before Accept
// had begun.
func TestQueueOnStallingMachine(t *testing.T) {
	t.Parallel()
	busy, resume := make(chan struct{}, 100), make(chan struct{})
	ln := &stallingListener{TCPListener: listenTCP(t).(*net.TCPListener)}
	ln.stalls.Store(3)
	s := start(t, config{
		handler: http.HandlerFunc(hello),
		listen:  func() net.Listener { return ln },
		server:  holdNew(busy, resume),
	})
	clients := []*client{dial(t, s.addr)}
	wait(t, busy, "the first connection")
	for range 3 {
		clients = append(clients, dial(t, s.addr))
	}
	result := s.drain(t.Context())
	close(resume)
	for _, c := range clients {
		c.get("/").last(t, "hello")
		c.Close()
	}
	s.finished(result)
}
