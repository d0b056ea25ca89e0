package httpdrain

import (
	"cmp"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// This file owns what is known of each connection, which the server tells by its
// hooks, and decides when one is silent. It never closes one itself: it lets the
// server's next read fail, so that a request which the server has got is served.

const (
	// expiredWait is how long net/http may take to close a connection that has
	// been expired. One that is open still is left to Server.Shutdown.
	expiredWait = time.Second

	// closeWait is the time in which net/http closes an HTTP/1 connection after
	// its last response: half a second (see answerAndClose), and some.
	closeWait = time.Second
)

type conn struct {
	drainer *Drainer
	net.Conn

	// state is an http.ConnState. It is written before, and read after,
	// Drainer.draining; before the drain nothing else is kept up to date.
	state atomic.Int32

	mu       sync.Mutex
	since    time.Time   // since when it has been silent
	seen     bool        // received was read once since then
	received uint64      // what the kernel has received at that time, if it can tell
	expired  time.Time   // when the server's reads were made to fail
	told     time.Time   // when the client was told to leave: the handler of its last response has returned, or see noteFarewell
	knows    bool        // it has been told, and has nothing left to send that would be served
	framed   *framedConn // how the server sees it; nil if as everybody does
}

type connKey struct{}

// connOf returns the connection on which a request came, or nil.
func connOf(r *http.Request) *conn {
	c, _ := r.Context().Value(connKey{}).(*conn)
	return c
}

// watch puts the drainer before the server's hooks.
func (d *Drainer) watch() {
	srv := d.srv
	base := srv.BaseContext
	srv.BaseContext = func(ln net.Listener) context.Context {
		if d.settingUp(ln) {
			return context.Background()
		}
		d.serving(ln)
		if base == nil {
			return context.Background()
		}
		if l, ok := ln.(*listener); ok {
			ln = cmp.Or(l.encrypted, l.Listener)
		}
		return base(ln)
	}
	next := srv.ConnContext
	srv.ConnContext = func(ctx context.Context, nc net.Conn) context.Context {
		nc, framed := unframed(nc)
		ctx = context.WithValue(ctx, connKey{}, d.add(nc, framed))
		if next != nil {
			ctx = next(ctx, nc)
		}
		return ctx
	}
	hook := srv.ConnState
	srv.ConnState = func(nc net.Conn, state http.ConnState) {
		nc, _ = unframed(nc)
		d.update(nc, state)
		if hook != nil {
			hook(nc, state)
		}
	}
}

// serving is called by Server.Serve, after that has set up the protocols. It is
// the first chance to notice that a listener does not come from Listener, and the
// last one at which everybody will notice it.
func (d *Drainer) serving(ln net.Listener) {
	d.setUp.Lock()
	defer d.setUp.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if l, ok := ln.(*listener); !ok {
		// It may contain one, as those of crypto/tls do.
		d.unserved--
	} else if !l.served {
		l.served = true
		d.unserved--
		d.frameOnce.Do(d.frameNextProto)
	}
	if d.unserved < 0 {
		panic("httpdrain: the server serves a listener that its Drainer cannot stop; use Drainer.Serve or Drainer.ServeTLS, or wrap the listener by Drainer.Listener")
	}
	d.plainHTTP2 = d.srv.Protocols != nil && d.srv.Protocols.UnencryptedHTTP2()
	for protocol := range d.srv.TLSNextProto {
		if protocol != "h2" && protocol != "unencrypted_http2" {
			d.otherProtocol = true
		}
	}
}

func (d *Drainer) add(nc net.Conn, framed *framedConn) *conn {
	c := &conn{drainer: d, Conn: nc}
	if framed != nil {
		c = framed.conn
	}
	if reflect.TypeOf(nc).Comparable() {
		d.conns.Store(nc, c)
	}
	return c
}

func (d *Drainer) update(nc net.Conn, state http.ConnState) {
	if !reflect.TypeOf(nc).Comparable() {
		return
	}
	value, ok := d.conns.Load(nc)
	if !ok {
		return
	}
	c := value.(*conn)
	c.state.Store(int32(state))
	if state == http.StateHijacked || state == http.StateClosed {
		d.conns.Delete(nc)
	}
	if d.draining.Load() {
		c.stir(state)
	}
}

// stir notes a change of state during the drain.
func (c *conn) stir(state http.ConnState) {
	c.mu.Lock()
	c.since, c.seen = time.Now(), false
	if state == http.StateActive && !c.expired.IsZero() {
		c.revive()
	}
	c.mu.Unlock()
	if state != http.StateActive {
		c.drainer.lookAgain()
	}
}

// noteFarewell notes that the client of HTTP/2 is told to leave, and then that it
// knows.
func (c *conn) noteFarewell(knows bool) {
	c.mu.Lock()
	if !c.knows && c.told.IsZero() != knows {
		c.told, c.since, c.seen, c.knows = time.Now(), time.Now(), false, knows
	}
	c.mu.Unlock()
	c.drainer.lookAgain()
}

// answer is called when a handler has returned, and returns when the response may
// end. Over HTTP/1, last tells whether it told the client to leave.
func (c *conn) answer(r *http.Request, last bool) {
	c.mu.Lock()
	framed := c.framed
	if last && r.ProtoMajor == 1 {
		c.told, c.knows = time.Now(), true
	}
	c.mu.Unlock()
	if framed != nil && r.ProtoMajor != 1 {
		select {
		case <-framed.left:
		case <-r.Context().Done():
		}
	}
}

// stays reports whether the client of HTTP/2 opens streams although it has been
// told to leave, or cannot be told but by net/http.
func (c *conn) stays() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.framed == nil:
		return true
	case c.told.IsZero():
		return false
	case c.knows:
		return time.Since(c.told) > lateWait
	default:
		return time.Since(c.told) > max(lateWait, c.drainer.grace())
	}
}

// revive undoes expire: the server had read a request by then.
func (c *conn) revive() {
	c.expired = time.Time{}
	var deadline time.Time
	if timeout := c.drainer.srv.ReadTimeout; timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	c.SetReadDeadline(deadline)
}

// sweep expires the connection if it is time for that. It reports whether the
// drain has to wait for it, and until when at most, unless until it stirs.
func (c *conn) sweep() (until time.Time, waiting bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	state := http.ConnState(c.state.Load())
	if state == http.StateActive {
		return time.Time{}, true
	}
	if !c.expired.IsZero() {
		if until = c.expired.Add(expiredWait); time.Now().Before(until) {
			return until, true
		}
		if !c.heard() {
			return time.Time{}, false
		}
		c.expired = time.Time{} // it was too late: a request had begun
	}
	if until = c.silentAt(); time.Now().Before(until) {
		return until, true
	}
	if !c.mayExpire(state) {
		return time.Time{}, false
	}
	c.expired = time.Now()
	c.SetReadDeadline(time.Unix(1, 0))
	return c.expired.Add(expiredWait), true
}

// silentAt returns when the grace will be over, if nothing is received.
func (c *conn) silentAt() time.Time {
	if c.since.IsZero() {
		c.since = c.drainer.began
	}
	grace := c.drainer.grace()
	if c.knows && c.isHTTP2() {
		grace = min(grace, lateWait)
	}
	if until := c.since.Add(grace); c.seen && time.Now().Before(until) {
		return until
	}
	if c.heard() {
		c.since = time.Now()
	}
	return c.since.Add(grace)
}

// heard reports whether something was received since it was called last, or
// since the connection stirred.
func (c *conn) heard() bool {
	n, ok := received(c.Conn)
	changed := ok && c.seen && n != c.received
	c.received, c.seen = n, true
	return changed
}

// mayExpire reports whether a read that fails makes the server close the
// connection, without a loss if nothing was received.
func (c *conn) mayExpire(state http.ConnState) bool {
	d := c.drainer
	d.mu.Lock()
	plainHTTP2, otherProtocol := d.plainHTTP2, d.otherProtocol
	d.mu.Unlock()
	encrypted, ok := c.Conn.(interface{ ConnectionState() tls.ConnectionState })
	switch {
	case state == http.StateNew:
		// ConnectionState would wait for the end of the handshake. The
		// server never tells the state of connections with other protocols.
		return !ok || !otherProtocol
	case ok:
		return encrypted.ConnectionState().NegotiatedProtocol != "h2"
	case c.framed != nil:
		return !c.isHTTP2()
	default:
		return !plainHTTP2
	}
}

// isHTTP2 reports whether it is known to be HTTP/2.
func (c *conn) isHTTP2() bool { return c.framed != nil && c.framed.http2.Load() }

// inUse reports whether the connection would be closed before its time if it
// were closed now, and whether that would cut a request short.
func (c *conn) inUse() (early, active bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch http.ConnState(c.state.Load()) {
	case http.StateActive:
		closing := c.knows && !c.isHTTP2() && time.Since(c.told) < closeWait
		return !closing, !closing
	case http.StateNew, http.StateIdle:
		early = !c.knows && c.expired.IsZero() && time.Now().Before(c.silentAt())
	}
	return early, false
}
