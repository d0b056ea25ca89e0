package httpdrain

import (
	"io"
	"net/http"
	"runtime"
	"strings"
	"time"
)

// This file owns how a response tells its client to leave.

const (
	// settleTicks is for how many ticks in a row a client must not have opened an
	// HTTP/2 stream for the drain to believe that none is on its way. Ticks are
	// counted rather than time measured, because a process that has not been
	// running for a while has not read the streams that were opened.
	settleTicks = 5
	settleTick  = 10 * time.Millisecond

	// settleLimit is after how many ticks it no longer waits for that.
	settleLimit = 25
)

type handler struct {
	drainer *Drainer
	next    http.Handler
}

// wrapHandler puts the drainer before the server's handler, unless it is there.
func (d *Drainer) wrapHandler() {
	if _, ok := d.srv.Handler.(*handler); !ok {
		d.srv.Handler = &handler{d, d.srv.Handler}
	}
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	next := h.next
	if next == nil {
		next = http.DefaultServeMux
	}
	if !h.drainer.draining.Load() {
		next.ServeHTTP(w, r)
		return
	}
	c := connOf(r)
	if r.ProtoMajor == 1 {
		answerAndClose(w, r)
	} else {
		w = answerAndGoAway(w)
		if c != nil {
			c.settle()
		}
	}
	next.ServeHTTP(w, r)
	if c != nil {
		if r.ProtoMajor != 1 {
			c.goAway(w)
		}
		c.mu.Lock()
		c.told = time.Now()
		c.mu.Unlock()
	}
}

// answerAndClose makes the server close the connection after the response, and
// say so in it.
//
// The plain way is the header field. But that would also be sent in 1xx responses, after
// which a client may close (RFC 9112, section 9.6); it would be joined with the
// field of a 101 response that a reverse proxy passes on; and the handler may
// overwrite it. What http.MaxBytesReader does when a body is too large, "it tells
// the ResponseWriter to close the connection", has none of these flaws, once the
// field that it sets is removed. It also makes the server close in the stages
// that RFC 9112 asks for: it half-closes, and closes after half a second, so that
// pipelined requests which remain unread do not reset the connection under the
// response.
func answerAndClose(w http.ResponseWriter, r *http.Request) {
	tooLarge := http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0)
	tooLarge.Read(make([]byte, 1))
	h := w.Header()
	if _, ok := h["Connection"]; ok && r.ProtoAtLeast(1, 1) {
		delete(h, "Connection")
	} else {
		// HTTP/1.0 has no 1xx responses, and would get "keep-alive". Or
		// the ResponseWriter is not that of net/http.
		h.Set("Connection", "close")
	}
}

// http2Writer is what the HTTP/2 ResponseWriter of net/http implements.
type http2Writer interface {
	http.ResponseWriter
	http.Flusher
	http.Pusher
	io.StringWriter
	CloseNotify() <-chan bool
	FlushError() error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	EnableFullDuplex() error
}

// answerAndGoAway makes the server send GOAWAY with the response: that is what
// net/http makes of the field, which HTTP/2 does not have.
func answerAndGoAway(w http.ResponseWriter) http.ResponseWriter {
	w.Header().Set("Connection", "close")
	if w, ok := w.(http2Writer); ok {
		return goAwayWriter{w}
	}
	return w
}

// goAwayWriter keeps the field from 1xx responses. There net/http sends it as it
// is, which makes them malformed (RFC 9113, section 8.2.2).
type goAwayWriter struct{ http2Writer }

func (w goAwayWriter) Unwrap() http.ResponseWriter { return w.http2Writer }

func (w goAwayWriter) WriteHeader(code int) {
	h := w.Header()
	if code < 200 {
		delete(h, "Connection")
		defer h.Set("Connection", "close")
	} else {
		h.Set("Connection", "close")
	}
	w.http2Writer.WriteHeader(code)
}

// settle delays a stream until no other has been opened on its connection for a
// while.
//
// The GOAWAY that net/http sends with the first response says that it will
// process the streams which it has seen, and no others. A client may repeat a
// request that it sent on another one in the meantime, if it can: net/http's
// cannot repeat a body that it reads from a pipe or a file. RFC 9113, section
// 6.8, has servers announce the GOAWAY by one that excludes no stream yet, which
// net/http does not. But clients whose requests wait for responses stop sending
// if they get none.
func (c *conn) settle() {
	c.mu.Lock()
	c.http2 = true
	c.streams++
	if settled := c.settled; settled != nil {
		c.mu.Unlock()
		<-settled
		return
	}
	c.settled = make(chan struct{})
	streams := c.streams
	c.mu.Unlock()
	defer close(c.settled)

	ticker := time.NewTicker(settleTick)
	defer ticker.Stop()
	for ticks, quiet := 0, 0; ticks < settleLimit && quiet < settleTicks; ticks++ {
		select {
		case <-ticker.C:
		case <-c.drainer.cutting.Done():
			return
		}
		runtime.Gosched() // likewise, if others wait for a processor
		quiet++
		c.mu.Lock()
		if c.streams != streams {
			streams, quiet = c.streams, 0
		}
		c.mu.Unlock()
	}
}

// goAway is called when a handler has returned, and returns when the client has
// probably been sent the GOAWAY. net/http may send that after the response that
// caused it, and the client another request in between. So the first response is
// sent without its end, and all the others are sent a moment later.
func (c *conn) goAway(w http.ResponseWriter) {
	c.mu.Lock()
	gone := c.gone
	if gone == nil {
		c.gone = make(chan struct{})
	}
	c.mu.Unlock()
	timer := time.NewTimer(settleTick)
	defer timer.Stop()
	if gone != nil {
		select {
		case <-gone:
		case <-timer.C:
		}
		return
	}
	http.NewResponseController(w).Flush()
	timer.Reset(settleTick / 2)
	<-timer.C
	close(c.gone)
}
