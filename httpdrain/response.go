package httpdrain

import (
	"io"
	"net/http"
	"strings"
	"time"
)

// This file owns how a response tells its client to leave.

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
	if h.drainer.draining.Load() {
		serveDraining(next, w, r)
		return
	}
	next.ServeHTTP(w, r)
}

func serveDraining(next http.Handler, w http.ResponseWriter, r *http.Request) {
	received, last := time.Now(), mayLeave(r)
	if last {
		w = sayGoodbye(w, r)
	}
	next.ServeHTTP(w, r)
	if c := connOf(r); c != nil {
		c.answer(r, received, last)
	}
}

// mayLeave reports whether the time has come to tell the client to leave.
func mayLeave(r *http.Request) bool {
	c := connOf(r)
	return c == nil || c.mayLeave()
}

// sayGoodbye makes the response tell the client to leave, if it does not know.
func sayGoodbye(w http.ResponseWriter, r *http.Request) http.ResponseWriter {
	if r.ProtoMajor == 1 {
		answerAndClose(w, r)
	} else if c := connOf(r); c == nil || c.stays() {
		w = answerAndGoAway(w)
	}
	return w
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

// answerAndGoAway makes the server send its own GOAWAY with the response: that is
// what net/http makes of the field, which HTTP/2 does not have. It refuses the
// streams that the server has not read by then.
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
