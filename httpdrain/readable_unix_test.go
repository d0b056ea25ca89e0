//go:build unix

package httpdrain_test

import (
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
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

// A sleepySocket is a sleepyConn that leaves what comes in the kernel's hands.
type sleepySocket struct{ *sleepyConn }

func (c sleepySocket) NetConn() net.Conn { return c.Conn }

func (c sleepySocket) Read(p []byte) (int, error) {
	raw, err := c.Conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Read(func(fd uintptr) bool {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0
	})
	if err != nil {
		return 0, err
	}
	if c.asleep.Load() {
		<-c.awake
	}
	return c.Conn.Read(p)
}

// A connection on which something waits to be read is not closed, although the grace is over.
func TestUnreadIsNoSilence(t *testing.T) {
	t.Parallel()
	const grace = 10 * time.Millisecond
	accepted := make(chan sleepySocket, 1)
	ln := wrappingListener{
		proctest.Opened[net.Listener](t)(net.Listen("unix", filepath.Join(proctest.SocketDir(t), "socket"))),
		func(nc net.Conn) net.Conn {
			c := sleepySocket{newSleepyConn(nc)}
			accepted <- c
			return c
		},
	}
	s := start(t, config{
		handler: http.HandlerFunc(hello),
		grace:   grace,
		listen:  func() net.Listener { return ln },
	})
	c := newClient(t, proctest.Opened[net.Conn](t)(net.Dial("unix", s.addr)))
	server := <-accepted
	c.get("/").more(t, "hello")
	server.asleep.Store(true)
	c.send(get("/"))
	result := s.drain(t.Context())
	time.Sleep(20 * grace) // for the drain to look; otherwise nothing is shown
	close(server.awake)
	c.answer().last(t, "hello")
	c.Close()
	s.finished(result)
}
