package httpdrain

import (
	"context"
	"fmt"
	"log/slog"
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
// closes it, if Drainer.IdleGrace is zero. A client in the middle of its work pauses
// for less between two requests. Server.Shutdown waits as long for the first request of
// a new connection. Kubernetes gives a pod six times as long to terminate.
const DefaultIdleGrace = 5 * time.Second

// Drainer watches the connections of one http.Server, so that Shutdown can end
// them without losing a request. New makes one; the zero value is not usable.
//
// All methods are safe for concurrent use.
type Drainer struct {
	// IdleGrace is how long a connection must have been silent before Shutdown closes
	// it: no request being answered, and nothing received or sent. If zero,
	// [DefaultIdleGrace] is used. If negative, Shutdown does not wait. It must not be
	// changed after the call of Shutdown.
	//
	// A client that is just sending a request on a connection that the server
	// closes cannot know whether the request was processed, and must not repeat
	// a POST (RFC 9110, section 9.2.2, RFC 9112, section 9.3.1). A grace that is
	// longer than the clients' pauses leaves them no such connection, because
	// the response to any request during the grace tells them to leave.
	IdleGrace time.Duration

	// Spread, if positive, is the time over which Shutdown spreads its goodbyes: for
	// each connection the drain begins at a random moment of it. Until then nothing
	// tells the client to leave, and IdleGrace begins only then. So the clients do
	// not all reconnect to the successor in the same moment. A drain takes longer by
	// Spread. It must not be changed after the call of Shutdown.
	Spread time.Duration

	// Replaced tells Shutdown that another process accepts from the same sockets, as
	// after an upgrade. Then it leaves the connections that wait in their queues to
	// that process, and accepts no more. Otherwise it accepts and serves them. It
	// must not be changed after the call of Shutdown. If the trial of this process was
	// undone (Options.Trial of package tableflip), Shutdown knows without it.
	Replaced bool

	// WaitHijacked has Shutdown wait until the hijacked connections are closed, as
	// far as it can see them: see Progress.Hijacked. It must not be changed after
	// the call of Shutdown.
	WaitHijacked bool

	// Logger, if not nil, receives the progress of a drain: when it begins, every
	// five seconds, and when it ends. It must not be changed after the call of
	// Shutdown.
	Logger *slog.Logger

	srv *http.Server

	ctx   context.Context // ends when the drain begins
	begin context.CancelFunc

	draining atomic.Bool
	began    time.Time     // set before draining
	sweepAt  time.Time     // when sweep looks first; set before draining
	conns    sync.Map      // net.Conn, as the server's hooks see it, to *conn
	hijacked hijackedConns // what the server has given away
	waits    atomic.Int64  // what the drain waits for
	nothing  chan struct{} // holds a value if waits has been zero

	cutting context.Context // ends, with the cause, when a caller's context did
	cut     context.CancelCauseFunc
	done    chan struct{} // closed when the drain is over, after err was set
	err     error

	setUp         sync.Mutex  // held while the server sets up TLS, or its protocols are looked at
	learnt        atomic.Bool // what follows is known
	plainHTTP2    atomic.Bool // connections without TLS may be HTTP/2
	otherProtocol atomic.Bool // connections with TLS may be neither HTTP/1 nor HTTP/2

	limits       limits
	lastTransfer func(nc net.Conn, now time.Time) (received, sent time.Time, ok bool) // asks the kernel
	isReadable   func(nc any) (readable, known bool)                                  // so does this

	mu           sync.Mutex
	listeners    map[*listener]struct{}
	unserved     int  // listeners that Listener returned, less calls of Server.Serve for them
	prepared     bool // Listener has been called
	ownProtocols bool // the program has its own Server.TLSNextProto
	ownHTTP2     bool // and HTTP/2 is in it
}

// limits are those times that tests change, so that no stall of the machine fails them.
type limits struct{ accept, server, lingerAfter, lingerSilence time.Duration }

// New returns a Drainer for srv, which must not be serving yet. It puts itself
// before srv's Handler (http.DefaultServeMux if that is nil), BaseContext,
// ConnContext and ConnState, and calls them as the server would. They must not
// be set again, except for Handler, which may be set until the first call of
// Listener, Serve or ServeTLS.
func New(srv *http.Server) *Drainer {
	d := &Drainer{
		srv:       srv,
		nothing:   make(chan struct{}, 1),
		done:      make(chan struct{}),
		listeners: make(map[*listener]struct{}),

		limits:       limits{acceptLimit, serverLimit, lingerAfter, lingerSilence},
		lastTransfer: lastTransfer,
		isReadable:   isReadable,
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
// goodbye: Shutdown waits for the former, and with WaitHijacked for the latter.
// Functions of Server.RegisterOnShutdown are called too late for that. This calls f in
// time:
//
//	context.AfterFunc(d.Context(), f)
func (d *Drainer) Context() context.Context { return d.ctx }

// Shutdown drains the server in place of Server.Shutdown, and returns when its
// connections are closed. In this order, it
//
//   - cancels Context;
//   - accepts the connections that wait in the listeners' queues, unless Replaced is
//     set, and closes the listeners;
//   - lets every request be served, and tells the clients to leave: by
//     "Connection: close" in each response of HTTP/1, by a GOAWAY frame that
//     refuses nothing in HTTP/2;
//   - closes the connections that have been silent for IdleGrace;
//   - when no others are left, calls Server.Shutdown, which calls the functions
//     that Server.RegisterOnShutdown got, sends the silent HTTP/2 connections
//     their GOAWAY and closes them after another second;
//   - waits for the hijacked connections, if WaitHijacked is set.
//
// When ctx ends first, it calls Server.Close, and returns a *CutError if that
// closed a connection before its time, or hijacked ones are left that it was to wait
// for. Otherwise it returns nil, or what closing
// the listeners returned. Handlers that were cut may be running still.
//
// Further calls, concurrent ones too, join the drain and return its result. It
// is cut when the context of any of them ends, so that a second signal can make
// an end of it. Hijacked connections are never closed: Progress counts them.
func (d *Drainer) Shutdown(ctx context.Context) error {
	d.mu.Lock()
	first := !d.draining.Load()
	if first {
		d.began = time.Now()
		d.sweepAt = d.began.Add(d.leastGrace())
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
	stopLogging := d.logProgress()
	listeners := d.interruptListeners()
	d.joinConnections()
	go d.sweep()
	d.stopAccepting(listeners)
	d.awaitNothing()
	d.err = d.closeServer()
	stopLogging()
}

// joinConnections makes the connections part of the drain. Those that come later
// join when the server tells their state.
func (d *Drainer) joinConnections() {
	d.conns.Range(func(_, value any) bool {
		value.(*conn).join()
		return true
	})
}

// sweep looks at the connections when those are to be closed that have been silent since
// the drain began, and once more when they should be.
func (d *Drainer) sweep() {
	wait := time.Until(d.sweepAt)
	for _, look := range []func(*conn){(*conn).sweep, (*conn).lookAgain} {
		select {
		case <-time.After(wait):
		case <-d.done:
			return
		}
		d.conns.Range(func(_, value any) bool {
			look(value.(*conn))
			return true
		})
		wait = expiredWait
	}
}

func (d *Drainer) interruptListeners() []*listener {
	d.mu.Lock()
	listeners := slices.Collect(maps.Keys(d.listeners))
	d.mu.Unlock()
	for _, ln := range listeners {
		ln.interrupt()
	}
	return listeners
}

// stopAccepting returns when no listener will give the server another
// connection, and all that they gave are known, or when the drain is cut.
func (d *Drainer) stopAccepting(listeners []*listener) {
	for _, ln := range listeners {
		select {
		case <-ln.stopped:
		case <-d.cutting.Done():
			ln.release()
		}
	}
}

// wait changes how much the drain waits for.
func (d *Drainer) wait(delta int64) {
	if d.waits.Add(delta) == 0 {
		select {
		case d.nothing <- struct{}{}:
		default:
		}
	}
}

// awaitNothing returns when the drain waits for nothing, or is cut.
func (d *Drainer) awaitNothing() {
	for d.waits.Load() > 0 {
		select {
		case <-d.nothing:
		case <-d.cutting.Done():
			return
		}
	}
}

// closeServer leaves to the server what the drain has left.
func (d *Drainer) closeServer() error {
	cut := d.cutting.Err() != nil
	connections, active := d.countInUse()
	err := d.srv.Shutdown(d.cutting)
	d.awaitNothing() // the sockets that are kept open
	if d.WaitHijacked {
		d.hijacked.await(d.cutting)
	}
	if d.cutting.Err() != nil {
		if !cut {
			connections, active = d.countInUse()
		}
		err = d.srv.Close()
		hijacked := 0
		if d.WaitHijacked {
			hijacked = d.hijacked.count()
		}
		if connections > 0 || hijacked > 0 {
			return &CutError{connections, active, hijacked, context.Cause(d.cutting)}
		}
	}
	if err != nil {
		return fmt.Errorf("httpdrain: closing a listener: %w", err)
	}
	return nil
}

// leastGrace is for how long a connection is silent at least before it is closed.
func (d *Drainer) leastGrace() time.Duration { return max(d.grace(), hookTime) }

func (d *Drainer) grace() time.Duration {
	if d.IdleGrace == 0 {
		return DefaultIdleGrace
	}
	return max(d.IdleGrace, 0)
}
