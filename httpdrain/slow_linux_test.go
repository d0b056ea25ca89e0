package httpdrain_test

import (
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"
)

// A header that takes longer than the grace is served if its pieces do not: on
// Linux the Drainer sees them arrive.
func TestDrippingHeader(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	t.Parallel()
	const grace = 2 * time.Second
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler, c.grace = http.HandlerFunc(hello), grace
		s := start(t, c)
		fresh, used := dial(t, s.addr), dial(t, s.addr)
		used.get("/").more(t, "hello")
		begin := time.Now()
		result := s.drain(t.Context())
		request := get("/")
		for drip := time.Tick(grace / 4); time.Since(begin) < 2*grace; <-drip {
			fresh.send(request[:1])
			used.send(request[:1])
			request = request[1:]
		}
		for _, c := range []*client{fresh, used} {
			c.send(request)
			c.answer().last(t, "hello")
		}
		s.finished(result)
	})
}

// A response that the kernel is still sending keeps its connection: the grace begins when
// the client can have it all.
func TestDrippingResponse(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	t.Parallel()
	const grace, size = 2 * time.Second, 256 << 10
	idle := make(chan struct{}, 1)
	s := start(t, config{grace: grace, handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, size))
	}), server: func(s *http.Server) {
		s.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateIdle {
				idle <- struct{}{}
			}
		}
	}})
	c := dial(t, s.addr)
	if err := c.Conn.(*net.TCPConn).SetReadBuffer(16 << 10); err != nil {
		t.Fatal(err)
	}
	c.send(get("/"))
	wait(t, idle, "StateIdle")
	result := s.drain(t.Context())
	response, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	drip := time.Tick(grace / 100)
	var silence time.Duration
	last := time.Now()
	for begin := last; time.Since(begin) < grace*3/2; <-drip {
		io.CopyN(io.Discard, response.Body, 1<<10)
		silence = max(silence, time.Since(last))
		last = time.Now()
	}
	if silence > grace/4 {
		t.Skipf("the machine is too busy: the client was silent for %v", silence)
	}
	if rest, err := io.Copy(io.Discard, response.Body); rest < size/4 || err != nil {
		t.Fatalf("the rest of the response is %d bytes, %v", rest, err)
	}
	if a := c.get("/"); !a.Close || len(a.body) != size {
		t.Errorf("%d bytes, close %t", len(a.body), a.Close)
	}
	s.finished(result)
}

// A request that begins after its connection was taken for silent, on a server that
// is slow to notice, is served: on Linux the Drainer sees it arrive.
func TestRequestAfterGrace(t *testing.T) {
	t.Parallel()
	idle := make(chan struct{}, 1)
	s := newService(t, config{handler: http.HandlerFunc(hello), grace: 300 * time.Millisecond, server: func(s *http.Server) {
		s.Protocols.SetUnencryptedHTTP2(false)
		s.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateIdle {
				idle <- struct{}{}
			}
		}
	}})
	late := &lateConn{expired: make(chan struct{})}
	ln := wrappingListener{s.Listener(listenTCP(t)), func(nc net.Conn) net.Conn {
		if nc == nil {
			return nil
		}
		late.Conn = nc
		return late
	}}
	go func() { s.served <- s.server.Serve(ln) }()
	c := dial(t, ln.Addr().String())
	c.get("/").more(t, "hello")
	wait(t, idle, "StateIdle")
	late.armed.Store(true)
	result := s.drain(t.Context())
	wait(t, late.expired, "the read deadline")
	// Until the drain looks again, a second later.
	request := get("/")
	for drip := time.Tick(100 * time.Millisecond); len(request) > 20; <-drip {
		c.send(request[:1])
		request = request[1:]
	}
	c.send(request)
	c.answer().last(t, "hello")
	s.finished(result)
}

// lateConn does not heed the first read deadline that expires it once it is armed.
type lateConn struct {
	net.Conn
	armed   atomic.Bool
	expired chan struct{}
}

func (c *lateConn) NetConn() net.Conn { return c.Conn }

func (c *lateConn) SetReadDeadline(at time.Time) error {
	if !at.IsZero() && time.Since(at) > time.Hour && c.armed.CompareAndSwap(true, false) {
		close(c.expired)
		return nil
	}
	return c.Conn.SetReadDeadline(at)
}
