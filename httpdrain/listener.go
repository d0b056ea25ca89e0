package httpdrain

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// This file owns how a listener stops: before the server does, without losing
// the connections in its queue, and without an error that Server.Serve returns.

const (
	// acceptWait is how long a listener's queue must be empty. The wait is there
	// for Accept to have tried at all: with a deadline that is over it does not.
	acceptWait = 10 * time.Millisecond

	// acceptLimit ends the acceptance of connections that keep on coming. If
	// another process accepts from the same socket, nothing is lost by that.
	acceptLimit = 500 * time.Millisecond
)

// Listener returns a listener for Server.Serve and its kin, for programs that
// cannot use Serve or ServeTLS. It owns ln: Server.Serve closes both. HTTP/2 over
// TLS needs ServeTLS to be drained without loss.
//
// While a drain is going on, its Accept first returns the connections that wait
// in ln's queue, as their clients believe to be connected, and the kernel would
// reset them when the last descriptor of the socket is closed. Then it closes ln
// and blocks until the server is closed, so that Server.Serve returns
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

	limitOnce sync.Once
	limit     time.Time // when acceptLimit is over

	releaseOnce, stopOnce, closeOnce sync.Once
	err                              error // of closing ln
}

// Accept is called by Server.Serve, which has told its hooks of a connection
// before it asks for the next one.
func (l *listener) Accept() (net.Conn, error) {
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
	if !ok {
		return nil
	}
	l.limitOnce.Do(func() { l.limit = time.Now().Add(acceptLimit) })
	for {
		now := time.Now()
		if now.After(l.limit) || ln.SetDeadline(now.Add(acceptWait)) != nil {
			return nil
		}
		nc, err := l.Listener.Accept()
		if err == nil {
			return nc
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(now) >= acceptWait {
			return nil
		}
		// That was the deadline of interrupt.
	}
}

type deadliner interface {
	SetDeadline(time.Time) error
}

// interrupt makes Accept learn that the drain has begun.
func (l *listener) interrupt() {
	if ln, ok := l.Listener.(deadliner); !ok || ln.SetDeadline(time.Unix(1, 0)) != nil {
		l.release()
	}
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

// setUpTLS is the listener that Server.ServeTLS is given for it to set up HTTP/2,
// load the certificates, and wrap the listener by crypto/tls. When it goes on to
// serve, BaseContext learns the result, and the first Accept ends it. So what
// crypto/tls accepts can be wrapped in turn.
type setUpTLS struct {
	*listener
	done bool
}

var errSetUp = errors.New("httpdrain: the server is set up")

// serveTLS returns what Server.ServeTLS does.
func (l *listener) serveTLS(certFile, keyFile string) error {
	d := l.drainer
	d.setUp.Lock()
	err := d.srv.ServeTLS(&setUpTLS{listener: l}, certFile, keyFile)
	d.setUp.Unlock()
	if err != errSetUp {
		l.Close()
		return err
	}
	return d.srv.Serve(l)
}

// settingUp reports whether BaseContext is called for a setUpTLS.
func (d *Drainer) settingUp(ln net.Listener) bool {
	addr, ok := ln.Addr().(setUpAddr)
	if ok {
		addr.listener.encrypted = ln
		d.frameOnce.Do(d.frameNextProto)
	}
	return ok
}

func (s *setUpTLS) Accept() (net.Conn, error) {
	if !s.done {
		s.done = true
		return nil, errSetUp
	}
	return s.accept()
}

// Close is called when the server is set up.
func (s *setUpTLS) Close() error { return nil }

// setUpAddr is the address of a listener that crypto/tls has not yet wrapped.
type setUpAddr struct {
	net.Addr
	listener *listener
}

func (s *setUpTLS) Addr() net.Addr {
	if s.encrypted != nil {
		return s.listener.Addr()
	}
	return setUpAddr{s.listener.Addr(), s.listener}
}
