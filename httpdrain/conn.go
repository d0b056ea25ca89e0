package httpdrain

import (
	"crypto/tls"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// This file owns what is known of each connection, which the server tells by its
// hooks, and decides when one is silent. It never closes one itself: it lets the
// server's next read fail, so that a request which the server has got is served.
//
// During a drain each connection that stirs has a timer of its own, and one sweep looks
// at those that do not. The Drainer counts those that it waits for. So a drain costs the
// same for each connection however many there are.

const (
	// expiredWait is how long net/http may take to close a connection that has
	// been expired. One that is open still is left to Server.Shutdown.
	expiredWait = time.Second

	// hookTime is how long after its hooks the server may set a read deadline, which
	// would undo ours.
	hookTime = 10 * time.Millisecond

	// closeWait is the time in which net/http closes an HTTP/1 connection after
	// its last response: half a second (see answerAndClose), and some.
	closeWait = time.Second

	// holdAge is the age of a request from which on its response is not held: the
	// hold must not be what makes it miss its client's deadline.
	holdAge = 40 * time.Millisecond

	// holdSlack is for how long a response waits for the GOAWAY after holdTime, if
	// the server is writing.
	holdSlack = 5 * time.Millisecond
)

type conn struct {
	drainer *Drainer
	net.Conn

	// state is an http.ConnState. It is written before, and read after,
	// Drainer.draining; before the drain nothing else is kept up to date.
	state atomic.Int32

	mu      sync.Mutex
	joined  bool         // it is part of the drain
	begins  time.Time    // when the drain begins for it: see Drainer.Spread
	timer   *time.Timer  // looks again, once it was set
	waiting bool         // the drain waits for it
	ended   bool         // it is not the server's any more
	since   time.Time    // since when it has been silent
	doubted bool         // it was looked at twice, because nobody can tell whether something waits to be read
	expired time.Time    // when the server's reads were made to fail
	told    time.Time    // when the client was told to leave: the handler of its last response has returned, or the GOAWAY was sent
	knows   bool         // it has been told, and has nothing left to send that would be served
	framed  *framedConn  // how the server sees it; nil if as everybody does
	held    time.Time    // until when responses are held
	linger  *net.TCPConn // keeps the socket open when the server closes it; or nil
}

type connKey struct{}

// connOf returns the connection on which a request came, or nil.
func connOf(r *http.Request) *conn {
	c, _ := r.Context().Value(connKey{}).(*conn)
	return c
}

// stir notes a change of state during the drain.
func (c *conn) stir(state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateHijacked, http.StateClosed:
		c.end()
		return
	case http.StateActive:
		if !c.expired.IsZero() {
			c.revive()
		}
	}
	c.since = time.Now()
	c.prepare()
	c.look()
}

// join is called when the drain begins.
func (c *conn) join() {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch http.ConnState(c.state.Load()) {
	case http.StateHijacked, http.StateClosed:
	default:
		c.prepare()
		c.look()
	}
}

// prepare makes the connection part of the drain. c.mu is held.
func (c *conn) prepare() {
	if c.joined {
		return
	}
	c.joined = true
	if c.framed != nil {
		c.scheduleFarewell()
	}
}

// beginning returns when the drain begins for this connection. c.mu is held.
func (c *conn) beginning() time.Time {
	if c.begins.IsZero() {
		c.begins = c.drainer.began
		if spread := c.drainer.Spread; spread > 0 {
			c.begins = c.begins.Add(rand.N(spread))
		}
	}
	return c.begins
}

// end notes that the server is done with the connection. c.mu is held.
func (c *conn) end() {
	c.ended = true
	if c.timer != nil {
		c.timer.Stop()
	}
	if tcp := c.linger; tcp != nil {
		go func() {
			defer c.drainer.wait(-1)
			discard(c.drainer.cutting, tcp, c.drainer.limits.lingerSilence)
		}()
	}
	c.await(false)
}

// await notes whether the drain waits for the connection. c.mu is held.
func (c *conn) await(waiting bool) {
	if c.waiting == waiting {
		return
	}
	c.waiting = waiting
	if waiting {
		c.drainer.wait(1)
	} else {
		c.drainer.wait(-1)
	}
}

// attach notes how the server sees the connection, if that is known late.
func (c *conn) attach(framed *framedConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.framed = framed
	framed.conn = c
	if c.joined {
		c.scheduleFarewell()
	}
}

// scheduleFarewell has a client of HTTP/2 told to leave. c.mu is held.
func (c *conn) scheduleFarewell() {
	time.AfterFunc(time.Until(c.beginning()), c.framed.leave)
}

// noteFarewell notes that the client of HTTP/2 is told to leave, and then that it
// knows.
func (c *conn) noteFarewell(knows bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.knows || c.told.IsZero() == knows {
		return
	}
	c.told, c.since, c.knows = time.Now(), time.Now(), knows
	c.look()
}

// hold holds the responses that end from now on for d.
func (c *conn) hold(d time.Duration) {
	c.mu.Lock()
	c.held = time.Now().Add(d + holdSlack)
	c.mu.Unlock()
}

// mayLeave reports whether the time has come to tell the client to leave.
func (c *conn) mayLeave() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !time.Now().Before(c.beginning())
}

// answer is called when a handler that was called during the drain has returned, and
// returns when the response may end. Over HTTP/1, last tells whether it told the client to leave.
func (c *conn) answer(r *http.Request, received time.Time, last bool) {
	if r.ProtoMajor == 1 {
		if last {
			c.noteLast()
		}
		return
	}
	until, framed := c.heldUntil(received)
	wait := time.Until(until)
	if framed == nil || wait <= 0 {
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-framed.left:
	case <-timer.C:
	case <-r.Context().Done():
	}
}

// heldUntil returns until when the response to a request that was received at a
// time is held at most, if it is until the GOAWAY is sent to framed.
func (c *conn) heldUntil(received time.Time) (until time.Time, framed *framedConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if until = c.held; until.IsZero() {
		if time.Now().Before(c.beginning()) {
			return time.Time{}, nil
		}
		until = c.beginning().Add(holdTime + holdSlack)
	}
	limit := holdAge
	if timeout := c.drainer.srv.WriteTimeout; timeout > 0 {
		limit = min(limit, timeout/2)
	}
	if oldest := received.Add(limit); oldest.Before(until) {
		until = oldest
	}
	return until, c.framed
}

// noteLast notes that the client of HTTP/1 has been told to leave.
func (c *conn) noteLast() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told, c.knows = time.Now(), true
	c.look()
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

// look decides whether the drain waits for the connection, and when to look again
// if it does not stir. c.mu is held.
func (c *conn) look() {
	if next := c.consider(); !next.Equal(c.drainer.sweepAt) {
		c.lookAt(next)
	}
}

// sweep is look for a connection to which the sweep will come back.
func (c *conn) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if next := c.consider(); c.expired.IsZero() {
		c.lookAt(next)
	}
}

func (c *conn) lookAgain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
}

// lookAt sets the timer, unless next is zero.
func (c *conn) lookAt(next time.Time) {
	switch {
	case next.IsZero():
	case c.timer == nil:
		c.timer = time.AfterFunc(time.Until(next), c.lookAgain)
	default:
		c.timer.Reset(time.Until(next))
	}
}

func (c *conn) consider() (next time.Time) {
	if c.ended || !c.joined {
		return time.Time{}
	}
	next, waiting := c.decide(time.Now())
	c.await(waiting)
	return next
}

// decide expires the connection if it is time for that. The next look is at next,
// unless that is zero.
func (c *conn) decide(now time.Time) (next time.Time, waiting bool) {
	state := http.ConnState(c.state.Load())
	if state == http.StateActive {
		return c.decideLinger(now), true
	}
	if !c.expired.IsZero() {
		if next = c.expired.Add(expiredWait); now.Before(next) {
			return next, true
		}
		if heard, _, _ := c.drainer.lastTransfer(c.Conn, now); !heard.After(c.expired.Add(transferTick)) {
			return time.Time{}, false
		}
		c.expired = time.Time{} // it was too late: a request had begun
	}
	if next = c.silentAt(now); now.Before(next) {
		return next, true
	}
	if next = c.unreadUntil(now); now.Before(next) {
		return next, true
	}
	if !c.mayExpire(state) {
		return now.Add(max(c.drainer.grace(), lateWait)), false
	}
	c.expired = now
	c.SetReadDeadline(time.Unix(1, 0))
	return now.Add(expiredWait), true
}

// silentAt returns when the grace will be over, if nothing is received.
func (c *conn) silentAt(now time.Time) time.Time {
	grace := c.drainer.leastGrace()
	if c.knows && c.isHTTP2() {
		grace = min(grace, lateWait)
	}
	since := c.beginning()
	if c.since.After(since) {
		since = c.since
	}
	if until := since.Add(grace); now.Before(until) {
		return until
	}
	if received, sent, ok := c.drainer.lastTransfer(c.Conn, now); ok {
		last := received
		if sent.After(last) {
			last = sent // a response may take long to be sent to a client on a slow link
		}
		if last.After(since.Add(transferTick)) {
			c.since, since = last, last
		}
	}
	return since.Add(grace)
}

// unreadUntil returns when the server will have read what has come, or now if nothing has.
// A process that stood still finds that the grace is over and a request is there, and would
// close the connection first.
func (c *conn) unreadUntil(now time.Time) time.Time {
	readable, known := c.drainer.isReadable(bare(c.Conn))
	switch {
	case readable:
		return now.Add(c.drainer.leastGrace())
	case !known && !c.doubted:
		c.doubted = true
		return now.Add(hookTime)
	}
	return now
}

// decideLinger keeps the connection open beyond the server's close, if it is time
// for that, and returns when it will be, if ever.
func (c *conn) decideLinger(now time.Time) time.Time {
	if !c.knows || c.isHTTP2() || c.linger != nil {
		return time.Time{}
	}
	if at := c.told.Add(c.drainer.limits.lingerAfter); now.Before(at) {
		return at
	}
	c.keepOpen()
	return time.Time{}
}

// noteGoAway notes that the server has sent its own GOAWAY: it will close the connection
// a second after the last stream. One that a listener has wrapped once more is never part
// of the drain, because the hooks do not know it.
func (c *conn) noteGoAway() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.joined && !c.ended {
		c.keepOpen()
	}
}

// keepOpen keeps the socket open beyond the server's close. The drain waits for what is
// kept. c.mu is held.
func (c *conn) keepOpen() {
	if c.linger = duplicate(c.Conn); c.linger != nil {
		c.drainer.wait(1)
	}
}

// mayExpire reports whether a read that fails makes the server close the
// connection, without a loss if nothing was received.
func (c *conn) mayExpire(state http.ConnState) bool {
	d := c.drainer
	encrypted, ok := c.Conn.(interface{ ConnectionState() tls.ConnectionState })
	switch {
	case state == http.StateNew:
		// ConnectionState would wait for the end of the handshake. The
		// server never tells the state of connections with other protocols.
		return !ok || !d.otherProtocol.Load()
	case ok:
		return encrypted.ConnectionState().NegotiatedProtocol != "h2"
	case c.framed != nil:
		return !c.isHTTP2()
	default:
		return !d.plainHTTP2.Load()
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
		now := time.Now()
		early = !c.knows && c.expired.IsZero() && now.Before(c.silentAt(now))
	}
	return early, false
}
