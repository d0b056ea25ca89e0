package httpdrain

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// This file owns the drain: its steps, their order, and what ends it.

// DefaultIdleGrace is how long a connection must have been silent before a drain
// closes it, if Drainer.IdleGrace is zero: longer than a client in the middle of
// its work thinks between two requests, as long as net/http waits for the first
// request of a new connection, and a sixth of the 30 seconds that Kubernetes
// gives a pod to terminate.
const DefaultIdleGrace = 5 * time.Second

// sweepInterval is the least time between two looks at the connections.
const sweepInterval = 10 * time.Millisecond

// Drainer watches the connections of one http.Server, so that Shutdown can end
// them without losing a request. New makes one; the zero value is not usable.
//
// All methods are safe for concurrent use.
type Drainer struct {
	// IdleGrace is how long a connection must have been silent before Shutdown closes
	// it: no request being answered, and nothing received. If zero, [DefaultIdleGrace]
	// is used. If negative, Shutdown does not wait. It must not be changed after the
	// call of Shutdown.
	//
	// A client that is just sending a request on a connection that the server
	// closes cannot know whether the request was processed, and must not repeat
	// a POST (RFC 9110, section 9.2.2, RFC 9112, section 9.3.1). A grace that is
	// longer than the clients' pauses leaves them no such connection, because
	// the response to any request during the grace tells them to leave.
	IdleGrace time.Duration

	srv *http.Server

	ctx   context.Context // ends when the drain begins
	begin context.CancelFunc

	draining atomic.Bool
	began    time.Time     // set before draining
	changed  chan struct{} // holds a value if connections changed since the last sweep
	conns    sync.Map      // net.Conn, as the server's hooks see it, to *conn

	cutting context.Context // ends, with the cause, when a caller's context did
	cut     context.CancelCauseFunc
	done    chan struct{} // closed when the drain is over, after err was set
	err     error

	setUp     sync.Mutex // held while the server sets up its protocols
	frameOnce sync.Once  // for frameNextProto

	mu            sync.Mutex
	listeners     map[*listener]struct{}
	unserved      int  // listeners that Listener returned, less calls of Server.Serve for them
	plainHTTP2    bool // connections without TLS may be HTTP/2
	otherProtocol bool // connections with TLS may be neither HTTP/1 nor HTTP/2
	prepared      bool // Listener has been called
	ownProtocols  bool // the program has its own Server.TLSNextProto
}

// New returns a Drainer for srv, which must not be serving yet. It puts itself
// before srv's Handler (http.DefaultServeMux if that is nil), BaseContext,
// ConnContext and ConnState, and calls them as the server would. They must not
// be set again, except for Handler, which may be set until the first call of
// Listener, Serve or ServeTLS.
func New(srv *http.Server) *Drainer {
	d := &Drainer{
		srv:       srv,
		changed:   make(chan struct{}, 1),
		done:      make(chan struct{}),
		listeners: make(map[*listener]struct{}),
	}
	d.ctx, d.begin = context.WithCancel(context.Background())
	d.cutting, d.cut = context.WithCancelCause(context.Background())
	d.watch()
	d.wrapHandler()
	return d
}

// Serve serves connections of ln, which it closes, like Server.Serve.
//
// It returns http.ErrServerClosed when Shutdown has come to its last step, or
// the server was closed otherwise; the program must then wait for Shutdown to
// return. Other errors are those of Server.Serve.
func (d *Drainer) Serve(ln net.Listener) error {
	return d.srv.Serve(d.Listener(ln))
}

// ServeTLS serves connections of ln with TLS, like Server.ServeTLS. It returns
// when and what Serve returns. HTTP/2 over TLS is drained without loss only if it
// is served by this method: see the package's documentation.
func (d *Drainer) ServeTLS(ln net.Listener, certFile, keyFile string) error {
	return d.listener(ln).serveTLS(certFile, keyFile)
}

// Context returns a context that is cancelled when the first call of Shutdown begins.
// Handlers of long-lived responses and users of hijacked connections watch it to say
// goodbye: Shutdown waits for the former, and knows nothing of the latter. Functions of
// Server.RegisterOnShutdown are called too late for that. This calls f in time:
//
//	context.AfterFunc(d.Context(), f)
func (d *Drainer) Context() context.Context { return d.ctx }

// Shutdown drains the server in place of Server.Shutdown, and returns when its
// connections are closed. In this order, it
//
//   - cancels Context;
//   - accepts the connections that wait in the listeners' queues, and closes the
//     listeners;
//   - lets every request be served, and tells the clients to leave: by
//     "Connection: close" in each response of HTTP/1, by a GOAWAY frame that
//     refuses nothing in HTTP/2;
//   - closes the connections that have been silent for IdleGrace;
//   - when no others are left, calls Server.Shutdown, which calls the functions
//     that Server.RegisterOnShutdown got, sends the silent HTTP/2 connections
//     their GOAWAY and closes them after another second.
//
// When ctx ends first, it calls Server.Close, and returns a *CutError if that
// closed a connection before its time. Otherwise it returns nil, or what closing
// the listeners returned. Handlers that were cut may be running still.
//
// Further calls, concurrent ones too, join the drain and return its result. It
// is cut when the context of any of them ends, so that a second signal can make
// an end of it. Hijacked connections are neither waited for nor closed.
func (d *Drainer) Shutdown(ctx context.Context) error {
	d.mu.Lock()
	first := !d.draining.Load()
	if first {
		d.began = time.Now()
		d.draining.Store(true)
	}
	d.mu.Unlock()
	if first {
		d.begin()
		go d.drain()
	}
	select {
	case <-d.done:
	case <-ctx.Done():
		d.cut(context.Cause(ctx))
		<-d.done
	}
	return d.err
}

func (d *Drainer) drain() {
	defer close(d.done)
	d.sayFarewell()
	d.stopAccepting()
	d.awaitSilence()
	d.err = d.closeServer()
}

// sayFarewell tells the clients of HTTP/2 to leave. It does not wait for those
// that do not read.
func (d *Drainer) sayFarewell() {
	d.conns.Range(func(_, value any) bool {
		c := value.(*conn)
		c.mu.Lock()
		framed := c.framed
		c.mu.Unlock()
		if framed != nil {
			go framed.drain()
		}
		return true
	})
}

// stopAccepting returns when no listener will give the server another
// connection, and all that they gave are known. It does not wait for long for a
// server that does not ask for another one.
func (d *Drainer) stopAccepting() {
	d.mu.Lock()
	listeners := slices.Collect(maps.Keys(d.listeners))
	d.mu.Unlock()
	for _, ln := range listeners {
		ln.interrupt()
	}
	limit, cancel := context.WithTimeout(d.cutting, 2*acceptLimit)
	defer cancel()
	for _, ln := range listeners {
		select {
		case <-ln.stopped:
		case <-limit.Done():
			ln.release()
		}
	}
}

// awaitSilence returns when the connections that are left have been silent for
// the grace, or when the drain is cut.
func (d *Drainer) awaitSilence() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		next, silent := d.sweep()
		if silent {
			return
		}
		var due <-chan time.Time
		if !next.IsZero() {
			timer.Reset(time.Until(next))
			due = timer.C
		}
		select {
		case <-due:
		case <-d.changed:
			timer.Reset(sweepInterval)
			select {
			case <-timer.C:
			case <-d.cutting.Done():
				return
			}
		case <-d.cutting.Done():
			return
		}
	}
}

// sweep expires the connections whose time has come. It reports whether those
// that are left may be closed, and if not, when to look again at the latest:
// zero if that is when connections have changed.
func (d *Drainer) sweep() (next time.Time, silent bool) {
	silent = true
	d.conns.Range(func(_, value any) bool {
		at, waiting := value.(*conn).sweep()
		if waiting {
			silent = false
		}
		if !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
		return true
	})
	return next, silent
}

// closeServer leaves to the server what the drain has left.
func (d *Drainer) closeServer() error {
	cut := d.cutting.Err() != nil
	connections, active := d.count()
	err := d.srv.Shutdown(d.cutting)
	if d.cutting.Err() != nil {
		if !cut {
			connections, active = d.count()
		}
		err = d.srv.Close()
		if connections > 0 {
			return &CutError{connections, active, context.Cause(d.cutting)}
		}
	}
	if err != nil {
		return fmt.Errorf("httpdrain: closing a listener: %w", err)
	}
	return nil
}

// count returns how many connections, and how many of them in the middle of a
// request, would be closed before their time if they were closed now.
func (d *Drainer) count() (connections, active int) {
	d.conns.Range(func(_, value any) bool {
		early, inRequest := value.(*conn).inUse()
		if early {
			connections++
		}
		if inRequest {
			active++
		}
		return true
	})
	return connections, active
}

// lookAgain makes awaitSilence look at the connections again.
func (d *Drainer) lookAgain() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

func (d *Drainer) grace() time.Duration {
	if d.IdleGrace == 0 {
		return DefaultIdleGrace
	}
	return max(d.IdleGrace, 0)
}

// CutError is returned by Shutdown if its context ended before all connections
// had come to their end.
type CutError struct {
	// Connections is the number of connections that were closed although a
	// request was being answered, or IdleGrace was not over.
	Connections int

	// Active is how many of them had a request that was being answered.
	Active int

	// Cause is context.Cause of the context that ended.
	Cause error
}

func (e *CutError) Error() string {
	noun := "connections"
	if e.Connections == 1 {
		noun = "connection"
	}
	return fmt.Sprintf("httpdrain: %d %s cut, %d of them with a request in progress: %v", e.Connections, noun, e.Active, e.Cause)
}

// Unwrap returns Cause.
func (e *CutError) Unwrap() error { return e.Cause }
