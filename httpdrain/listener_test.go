package httpdrain_test

import (
	"context"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip/httpdrain"
	"example.com/tableflip/internal/trial"
)

// backlog is a listener in memory whose Accept has deadlines, and fails when it is told to.
type backlog struct {
	*memory
	err atomic.Pointer[syscall.Errno]

	mu       sync.Mutex
	deadline time.Time
	moved    chan struct{} // closed when the deadline moves
}

func newBacklog() *backlog { return &backlog{memory: newMemory(), moved: make(chan struct{})} }

func (l *backlog) SetDeadline(at time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deadline = at
	close(l.moved)
	l.moved = make(chan struct{})
	return nil
}

func (l *backlog) Accept() (net.Conn, error) {
	for {
		l.mu.Lock()
		moved, deadline := l.moved, l.deadline
		l.mu.Unlock()
		if l.isClosed() {
			return nil, net.ErrClosed
		}
		if err := l.err.Load(); err != nil {
			return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", *err)}
		}
		var expired <-chan time.Time
		if !deadline.IsZero() {
			expired = time.After(time.Until(deadline))
		}
		select {
		case nc := <-l.conns:
			return nc, nil
		case <-l.closed:
		case <-expired:
			return nil, os.ErrDeadlineExceeded
		case <-moved:
		}
	}
}

func (l *backlog) isClosed() bool {
	select {
	case <-l.closed:
		return true
	default:
		return false
	}
}

// An error that may go away does not lose the connections in the queue: those that
// the drain closes give their descriptors back, and that takes longer than connections
// are accepted from a queue.
func TestQueueDuringEMFILE(t *testing.T) {
	listen := func() net.Listener { return newBacklog() }
	inBubbleOn(t, config{handler: http.HandlerFunc(hello)}, listen, func(t *testing.T, s *service, ln net.Listener) {
		l := ln.(*backlog)
		used := l.client(t)
		used.SetDeadline(time.Time{})
		used.get("/").more(t, "hello")
		synctest.Wait()
		l.err.Store(new(syscall.EMFILE))
		result := s.drain(t.Context())
		var waiting sync.WaitGroup
		for range 3 {
			waiting.Go(func() {
				nc, err := l.dial()
				if err != nil {
					t.Error(err)
					return
				}
				c := newClient(t, nc)
				c.get("/").last(t, "hello")
				c.Close()
			})
		}
		used.get("/").last(t, "hello")
		used.Close()
		pass(10 * time.Second)
		l.err.Store(nil)
		waiting.Wait()
		s.finishedInBubble(result)
	})
}

// An error that stays ends the retries, and so does the end of the drain.
func TestQueueAcceptFails(t *testing.T) {
	for _, test := range []struct {
		err  syscall.Errno
		want time.Duration
	}{{syscall.EINVAL, 0}, {syscall.EMFILE, time.Minute}} {
		listen := func() net.Listener { return newBacklog() }
		inBubbleOn(t, config{handler: http.HandlerFunc(hello)}, listen, func(t *testing.T, s *service, ln net.Listener) {
			l := ln.(*backlog)
			synctest.Wait()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			l.err.Store(&test.err)
			begin := time.Now()
			s.finishedInBubble(s.drain(ctx))
			if took := time.Since(begin); took < test.want || took > test.want+time.Second {
				t.Errorf("the drain was over after %v, want %v", took, test.want)
			}
			if _, err := l.dial(); err == nil {
				t.Error("the listener is open")
			}
			pass(time.Minute) // for what waits to retry
		})
	}
}

// A process that was replaced leaves the queue to its successor. Until there is one
// that accepts, nobody does.
func TestReplaced(t *testing.T) {
	t.Parallel()
	ln := listenTCP(t).(*net.TCPListener)
	second := duplicate(t, ln)
	old := start(t, config{handler: name("old"), listen: func() net.Listener { return ln }})
	old.Replaced = true
	used := dial(t, old.addr)
	used.get("/").more(t, "old")
	result := old.drain(t.Context())
	used.get("/").last(t, "old")
	used.Close()
	old.finished(result)

	waiting := dial(t, old.addr)
	waiting.send(get("/"))
	successor := start(t, config{handler: name("new"), listen: func() net.Listener { return second }})
	waiting.answer().more(t, "new")
	waiting.Close()
	successor.finished(successor.drain(t.Context()))
}

// The process that was replaced accepts nothing from the moment when its drain has
// begun, although nobody else does yet.
func TestReplacedAcceptsNothing(t *testing.T) {
	t.Parallel()
	testAcceptsNothing(t, true)
}

// So does one whose trial is undone, because its parent serves.
func TestUndoneAcceptsNothing(t *testing.T) {
	begin := func() func(bool) { return trial.Begin(func(error) bool { return false }) }
	defer func() { begin()(false) }()
	end := begin()
	testAcceptsNothing(t, false)
	end(true)
	testAcceptsNothing(t, false)
}

func testAcceptsNothing(t *testing.T, replaced bool) {
	t.Helper()
	ln := listenTCP(t).(*net.TCPListener)
	second := duplicate(t, ln)
	busy, resume := make(chan struct{}, 100), make(chan struct{})
	old := start(t, config{
		handler: name("old"),
		listen:  func() net.Listener { return ln },
		server:  holdNew(busy, resume),
	})
	old.Replaced = replaced
	first := dial(t, old.addr)
	wait(t, busy, "the first connection")
	var waiting []*client
	for range 10 {
		waiting = append(waiting, dial(t, old.addr))
	}
	result := old.drain(t.Context())
	close(resume)
	first.get("/").last(t, "old")
	first.Close()
	old.finished(result)
	successor := start(t, config{handler: name("new"), listen: func() net.Listener { return second }})
	for _, c := range waiting {
		c.get("/").more(t, "new")
		c.Close()
	}
	successor.finished(successor.drain(t.Context()))
}

// endless is a listener in whose queue there always is another connection.
type endless struct {
	mu       sync.Mutex
	deadline time.Time
	early    bool // Accept fails once before its deadline
	closed   chan struct{}
	accepted atomic.Int64
}

func (l *endless) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	case <-time.After(time.Millisecond):
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.early && time.Until(l.deadline) > 0 && !l.deadline.IsZero() {
		l.early = false
		return nil, os.ErrDeadlineExceeded
	}
	l.accepted.Add(1)
	near, far := net.Pipe()
	far.Close()
	return near, nil
}

func (l *endless) SetDeadline(at time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deadline = at
	return nil
}

func (l *endless) Close() error   { close(l.closed); return nil }
func (l *endless) Addr() net.Addr { return new(net.TCPAddr) }

// Connections that keep on coming do not make the drain last for ever. A deadline
// of Accept that ends too early does not end the acceptance: it was the one from
// before.
func TestQueueWithoutEnd(t *testing.T) {
	inBubbleOn(t, config{handler: http.HandlerFunc(hello)}, func() net.Listener {
		return &endless{closed: make(chan struct{}), early: true}
	}, func(t *testing.T, s *service, ln net.Listener) {
		begin := time.Now()
		accepted := &ln.(*endless).accepted
		before := accepted.Load()
		s.finishedInBubble(s.drain(t.Context()))
		if got := time.Since(begin); got < 400*time.Millisecond || got > time.Second {
			t.Errorf("the drain was over after %v", got)
		}
		if n := accepted.Load() - before; n < 100 {
			t.Errorf("%d connections were accepted", n)
		}
	})
}

// A server that is slow to ask for another connection is given as much as any other then.
func TestQueueOfSlowServer(t *testing.T) {
	const slow = 1900 * time.Millisecond
	var once sync.Once
	var begun atomic.Bool
	inBubbleOn(t, config{handler: http.HandlerFunc(hello), server: func(s *http.Server) {
		s.Protocols.SetUnencryptedHTTP2(false)
		s.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
			if begun.Load() {
				once.Do(func() { pass(slow) })
			}
			return ctx
		}
	}}, func() net.Listener {
		return &endless{closed: make(chan struct{})}
	}, func(t *testing.T, s *service, ln net.Listener) {
		begun.Store(true)
		begin := time.Now()
		s.finishedInBubble(s.drain(t.Context()))
		if got := time.Since(begin); got < slow+400*time.Millisecond || got > slow+time.Second {
			t.Errorf("the drain was over after %v", got)
		}
	})
}

// A server that does not ask for another connection does not keep its listener open.
func TestQueueOfStuckServer(t *testing.T) {
	t.Parallel()
	stuck, resume := make(chan struct{}), make(chan struct{})
	s := start(t, config{handler: http.HandlerFunc(hello), server: func(s *http.Server) {
		s.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
			close(stuck)
			<-resume
			return ctx
		}
	}})
	httpdrain.SetAcceptLimits(s.Drainer, 100*time.Millisecond)
	c := dial(t, s.addr)
	wait(t, stuck, "ConnContext")
	result := s.drain(t.Context())
	refused(t, s.addr)
	close(resume)
	c.get("/").last(t, "hello")
	s.finished(result)
}
