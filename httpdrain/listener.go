package httpdrain

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"example.com/tableflip/internal/trial"
)

// This file owns how a listener stops: before the server does, without losing
// the connections in its queue, and without an error that Server.Serve returns.

const (
	// acceptWait is how long a listener's queue must be empty. The wait is there
	// for Accept to have tried at all: with a deadline that is over it does not. On a
	// busy machine it may be over before Accept has begun: see isReadable.
	acceptWait = 10 * time.Millisecond

	// acceptLimit ends the acceptance of connections that keep on coming. If
	// another process accepts from the same socket, nothing is lost by that.
	acceptLimit = 500 * time.Millisecond

	// serverLimit is how long the server may take to ask for another connection:
	// longer than the second for which net/http waits after an error.
	serverLimit = 2 * time.Second

	// retryFirst and retryMost are how long to wait after an error such as EMFILE,
	// as net/http does: the connections that are drained will give descriptors back.
	retryFirst = 5 * time.Millisecond
	retryMost  = time.Second
)

// Listener returns a listener for Server.Serve and its kin, for programs that
// cannot use Serve or ServeTLS. It owns ln: Server.Serve closes both. HTTP/2 over
// TLS needs ServeTLS to be drained without loss.
//
// While a drain is going on, its Accept first returns the connections that wait
// in ln's queue, unless Drainer.Replaced is set: their clients believe to be
// connected, and the kernel would reset them when the last descriptor of the socket
// is closed. Then it closes ln and blocks until the server is closed, so that Server.Serve returns
// http.ErrServerClosed, and not before. A ln without a method SetDeadline, as
// those of crypto/tls, is closed without regard to its queue: wrap the listener
// that Listener returns rather than pass it a wrapped one.
func (d *Drainer) Listener(ln net.Listener) net.Listener { return d.listener(ln) }

func (d *Drainer) listener(ln net.Listener) *listener {
	l := &listener{
		Listener: ln,
		drainer:  d,
		stopped:  make(chan struct{}),
		closed:   make(chan struct{}),
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.prepared {
		d.prepared = true
		d.ownProtocols = len(d.srv.TLSNextProto) > 0 // net/http will add its own
		d.ownHTTP2 = d.srv.TLSNextProto["h2"] != nil
		d.wrapHandler()
	}
	d.unserved++
	if d.draining.Load() {
		l.release()
		l.stop()
	} else {
		d.listeners[l] = struct{}{}
	}
	return l
}

type listener struct {
	net.Listener
	drainer *Drainer
	served  bool // Server.Serve was called; guarded by Drainer.mu

	encrypted net.Listener // what crypto/tls makes of it, for ServeTLS; or nil

	stopped chan struct{} // closed when the server knows all connections
	closed  chan struct{} // closed by Close

	// What acceptQueued keeps, which the server calls in one goroutine.
	limit time.Time     // when acceptLimit is over
	retry time.Duration // how long to wait after the next error

	watchMu  sync.Mutex
	watchdog *time.Timer // fires when serverLimit is over

	releaseOnce, stopOnce, closeOnce sync.Once
	err                              error // of closing ln
}

// Accept is called by Server.Serve, which has told its hooks of a connection
// before it asks for the next one.
func (l *listener) Accept() (net.Conn, error) {
	l.drainer.serves()
	if l.encrypted != nil {
		nc, err := l.encrypted.Accept() // which calls accept
		if err != nil {
			return nil, err
		}
		return l.drainer.framedTLS(nc), nil
	}
	nc, err := l.accept()
	if protocols := l.drainer.srv.Protocols; err != nil || protocols == nil || !protocols.UnencryptedHTTP2() {
		return nc, err
	}
	return plainConn{l.drainer.framed(nc)}, nil
}

func (l *listener) accept() (net.Conn, error) {
	if !l.drainer.draining.Load() {
		nc, err := l.Listener.Accept()
		if err == nil || !l.drainer.draining.Load() {
			return nc, err
		}
	}
	l.watch()
	if nc := l.acceptQueued(); nc != nil {
		return nc, nil
	}
	l.release()
	l.stop()
	<-l.closed
	return nil, &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: net.ErrClosed}
}

// acceptQueued returns the next connection that waits in the queue, or nil.
func (l *listener) acceptQueued() net.Conn {
	ln, ok := l.Listener.(deadliner)
	if !ok || l.drainer.Replaced || isParents() {
		return nil
	}
	if l.limit.IsZero() {
		l.limit = time.Now().Add(l.drainer.limits.accept)
	}
	for {
		now := time.Now()
		if now.After(l.limit) || ln.SetDeadline(now.Add(acceptWait)) != nil {
			return nil
		}
		nc, err := l.Listener.Accept()
		switch {
		case err == nil:
			l.retry = 0
			return nc
		case errors.Is(err, os.ErrDeadlineExceeded):
			// Otherwise that was the deadline of interrupt.
			if time.Since(now) >= acceptWait {
				if waits, _ := isReadable(ln); !waits {
					return nil
				}
			}
		case !l.mayRetry(err):
			return nil
		}
	}
}

// isParents reports whether the queues are those of a parent that is in charge, because the
// trial of this process was undone, or is being undone.
func isParents() bool { return trial.IsOn() || trial.WasUndone() }

// mayRetry waits after an error of Accept, and reports whether it may go away.
func (l *listener) mayRetry(err error) bool {
	var temporary interface{ Temporary() bool }
	if !errors.As(err, &temporary) || !temporary.Temporary() {
		return false
	}
	l.retry = min(max(2*l.retry, retryFirst), retryMost)
	time.Sleep(l.retry)
	l.limit = time.Now().Add(l.drainer.limits.accept)
	l.watch()
	return true
}

type deadliner interface {
	SetDeadline(time.Time) error
}

// interrupt makes Accept learn that the drain has begun.
func (l *listener) interrupt() {
	l.watch()
	if ln, ok := l.Listener.(deadliner); !ok || ln.SetDeadline(time.Unix(1, 0)) != nil {
		l.release()
	}
}

// watch gives the server serverLimit to ask for another connection, from now on.
func (l *listener) watch() {
	l.watchMu.Lock()
	defer l.watchMu.Unlock()
	if l.watchdog != nil {
		l.watchdog.Reset(l.drainer.limits.server)
		return
	}
	l.watchdog = time.AfterFunc(l.drainer.limits.server, func() {
		l.release()
		l.stop()
	})
}

// release closes ln. Server.Serve does not learn of it.
func (l *listener) release() {
	l.releaseOnce.Do(func() {
		if err := l.Listener.Close(); !errors.Is(err, net.ErrClosed) {
			l.err = err
		}
	})
}

func (l *listener) stop() { l.stopOnce.Do(func() { close(l.stopped) }) }

// Close is what the server calls.
func (l *listener) Close() error {
	l.closeOnce.Do(func() {
		close(l.closed)
		l.drainer.mu.Lock()
		delete(l.drainer.listeners, l)
		l.drainer.mu.Unlock()
	})
	l.release()
	l.stop()
	return l.err
}
