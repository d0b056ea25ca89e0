package httpdrain_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/httpdrain"
)

// A kernelConn is a server's connection in memory that takes what is written at once,
// sends it as fast as the client reads, and knows when something was received and sent
// last: as the kernel's TCP on Linux.
type kernelConn struct {
	net.Conn
	received, sent atomic.Pointer[time.Time]
	queue          chan []byte
	closed         chan struct{}
	once           sync.Once
}

func newKernelConn(nc net.Conn) *kernelConn {
	c := &kernelConn{Conn: nc, queue: make(chan []byte, 1000), closed: make(chan struct{})}
	c.received.Store(new(time.Now()))
	c.sent.Store(new(time.Now()))
	go c.send()
	return c
}

func (c *kernelConn) send() {
	defer c.Conn.Close()
	for {
		select {
		case p := <-c.queue:
			for piece := range slices.Chunk(p, 1<<10) {
				if _, err := c.Conn.Write(piece); err != nil {
					return
				}
				c.sent.Store(new(time.Now()))
			}
		case <-c.closed:
			if len(c.queue) == 0 {
				return
			}
		}
	}
}

func (c *kernelConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.received.Store(new(time.Now()))
	}
	return n, err
}

func (c *kernelConn) Write(p []byte) (int, error) {
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	case c.queue <- slices.Clone(p):
		return len(p), nil
	}
}

// SetWriteDeadline does not concern what has been taken.
func (c *kernelConn) SetWriteDeadline(time.Time) error { return nil }

func (c *kernelConn) SetDeadline(at time.Time) error { return c.SetReadDeadline(at) }

func (c *kernelConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.SetReadDeadline(time.Unix(1, 0))
}

func (c *kernelConn) LastTransfer() (received, sent time.Time) {
	return *c.received.Load(), *c.sent.Load()
}

// inBubbleWithKernel runs test with a service whose connections are in a kernel's hands.
func inBubbleWithKernel(t *testing.T, c config, test func(t *testing.T, s *service, dial func() *client)) {
	inBubble(t, c, func(t *testing.T, s *service, m *memory) {
		httpdrain.SetLastTransfer(s.Drainer)
		test(t, s, func() *client {
			nc, err := m.dialBy(func(nc net.Conn) net.Conn { return newKernelConn(nc) })
			if err != nil {
				t.Fatal(err)
			}
			if c.tls {
				config := clientTLS("http/1.1")
				config.Time = func() time.Time { return certificateTime }
				nc = tls.Client(nc, config)
			}
			client := newClient(t, nc)
			client.SetDeadline(time.Time{})
			return client
		})
	})
}

// A header that takes longer than the grace is served if its pieces do not: the Drainer
// sees them arrive.
func TestDrippingHeader(t *testing.T) {
	const grace = httpdrain.DefaultIdleGrace
	for _, c := range []config{{}, {tls: true}, rawHTTP2} {
		c.handler = http.HandlerFunc(hello)
		inBubbleWithKernel(t, c, func(t *testing.T, s *service, dial func() *client) {
			fresh, used := dial(), dial()
			if c.tls {
				fresh.Conn.(*tls.Conn).Handshake()
			}
			used.get("/").more(t, "hello")
			result := s.drain(t.Context())
			request := get("/")
			for begin := time.Now(); time.Since(begin) < 2*grace; pass(grace / 4) {
				fresh.send(request[:1])
				used.send(request[:1])
				request = request[1:]
			}
			for _, c := range []*client{fresh, used} {
				c.send(request)
				c.answer().last(t, "hello")
			}
			fresh.Close() // which may take seconds over TLS
			used.Close()
			s.finishedInBubble(result)
		})
	}
}

// A response that the kernel is still sending keeps its connection: the grace begins when
// the client has it all.
func TestDrippingResponse(t *testing.T) {
	const grace, size = httpdrain.DefaultIdleGrace, 256 << 10
	inBubbleWithKernel(t, config{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, size))
	})}, func(t *testing.T, s *service, dial func() *client) {
		c := dial()
		c.send(get("/"))
		synctest.Wait() // the handler has returned
		result := s.drain(t.Context())
		response, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		for begin := time.Now(); time.Since(begin) < grace*3/2; pass(grace / 100) {
			io.CopyN(io.Discard, response.Body, 1<<10)
		}
		if rest, err := io.Copy(io.Discard, response.Body); rest < size/4 || err != nil {
			t.Fatalf("the rest of the response is %d bytes, %v", rest, err)
		}
		pass(grace - time.Second)
		if a := c.get("/"); !a.Close || len(a.body) != size {
			t.Errorf("%d bytes, close %t", len(a.body), a.Close)
		}
		s.finishedInBubble(result)
	})
}

// A request that begins after its connection was taken for silent, on a server that is
// slow to notice, is served: the Drainer sees it arrive.
// If the context ends before it has all come, it counts as cut.
func TestRequestAfterGrace(t *testing.T) {
	const grace = httpdrain.DefaultIdleGrace
	for _, isCut := range []bool{false, true} {
		inBubble(t, config{handler: http.HandlerFunc(hello)}, func(t *testing.T, s *service, m *memory) {
			httpdrain.SetLastTransfer(s.Drainer)
			late := new(lateConn)
			nc, err := m.dialBy(func(nc net.Conn) net.Conn {
				late.kernelConn = newKernelConn(nc)
				return late
			})
			if err != nil {
				t.Fatal(err)
			}
			c := newClient(t, nc)
			c.SetDeadline(time.Time{})
			c.get("/").more(t, "hello")
			synctest.Wait()
			late.armed.Store(true)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := s.drain(ctx)
			pass(grace + time.Millisecond)
			if late.armed.Load() {
				t.Fatal("the connection is not taken for silent")
			}
			// Until the drain looks again, a second later.
			request := get("/")
			for ; len(request) > 20; pass(100 * time.Millisecond) {
				c.send(request[:1])
				request = request[1:]
			}
			if isCut {
				cancel()
				var cut *httpdrain.CutError
				if err := <-result; !errors.As(err, &cut) || cut.Connections != 1 {
					t.Errorf("got %v; want 1 connection cut", err)
				}
				return
			}
			c.send(request)
			c.answer().last(t, "hello")
			c.Close()
			s.finishedInBubble(result)
		})
	}
}

// A connection on which something has come during the grace is closed a grace later, and
// left to Server.Shutdown, if its reads cannot be made to fail, another second later.
func TestSilentAfterByte(t *testing.T) {
	const grace, early = time.Minute, 500 * time.Millisecond
	for _, isDeaf := range []bool{false, true} {
		inBubble(t, config{handler: http.HandlerFunc(hello), grace: grace}, func(t *testing.T, s *service, m *memory) {
			httpdrain.SetLastTransfer(s.Drainer)
			deaf := new(deafConn)
			nc, err := m.dialBy(func(nc net.Conn) net.Conn { deaf.Conn = newKernelConn(nc); return deaf })
			if err != nil {
				t.Fatal(err)
			}
			c := newClient(t, nc)
			c.SetDeadline(time.Time{})
			c.get("/").more(t, "hello")
			synctest.Wait()
			deaf.deaf.Store(isDeaf)
			begin := time.Now()
			result := s.drain(t.Context())
			pass(early)
			c.send("G")
			want := grace + early
			if isDeaf {
				want += time.Second
			}
			c.closed()
			after(t, begin, "the connection was closed", want)
			s.finishedInBubble(result)
		})
	}
}

// lateConn does not heed the first read deadline that expires it once it is armed.
type lateConn struct {
	*kernelConn
	armed atomic.Bool
}

func (c *lateConn) SetReadDeadline(at time.Time) error {
	if !at.IsZero() && time.Since(at) > time.Hour && c.armed.CompareAndSwap(true, false) {
		return nil
	}
	return c.kernelConn.SetReadDeadline(at)
}
