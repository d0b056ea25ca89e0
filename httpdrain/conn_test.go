package httpdrain

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
)

// A connection that has ended by the time it would join the drain is not waited for.
func TestJoinTooLate(t *testing.T) {
	for _, state := range []http.ConnState{http.StateHijacked, http.StateClosed} {
		d := New(new(http.Server))
		c := &conn{drainer: d}
		c.state.Store(int32(state))
		c.join()
		if n := d.waits.Load(); n != 0 {
			t.Errorf("%v: the drain waits for %d", state, n)
		}
	}
}

// A program's own HTTP/2 may tell the state of a connection that has ended.
func TestStateAfterEnd(t *testing.T) {
	d := New(new(http.Server))
	d.update(new(hijackedConn), http.StateIdle)
	if n := d.Progress().Connections; n != 0 {
		t.Errorf("%d connections", n)
	}
}

// A listener that is closed is forgotten.
func TestListenerIsForgotten(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := New(new(http.Server))
	d.Listener(ln).Close()
	if n := len(d.listeners); n != 0 {
		t.Errorf("%d listeners are known", n)
	}
}

// An error that does not say that it may go away ends the acceptance.
func TestErrorOfAccept(t *testing.T) {
	if New(new(http.Server)).listener(nil).mayRetry(io.EOF) {
		t.Error("it is tried again")
	}
}

// What the program has set of the protocols is known from before the server adds to it.
func TestProtocolsAreLearntOnce(t *testing.T) {
	srv := &http.Server{Protocols: new(http.Protocols)}
	d := New(srv)
	d.Listener(nil)
	srv.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){"h2": nil}
	d.Listener(nil)
	if d.ownProtocols {
		t.Error("what the server has added is taken for the program's own")
	}
	own := New(&http.Server{TLSNextProto: srv.TLSNextProto})
	own.Listener(nil)
	if !own.ownProtocols {
		t.Error("the program's own are not seen")
	}
	d.serves()
	srv.Protocols.SetUnencryptedHTTP2(true)
	d.serves()
	if d.plainHTTP2.Load() {
		t.Error("the protocols are looked at while the server uses them")
	}
}

// The handler that the program sets before the server is given a listener is wrapped, once.
func TestHandlerIsWrappedOnce(t *testing.T) {
	srv := new(http.Server)
	d := New(srv)
	d.Listener(nil)
	h, ok := srv.Handler.(*handler)
	if !ok {
		t.Fatalf("the handler is a %T", srv.Handler)
	}
	if _, again := h.next.(*handler); again {
		t.Error("it is wrapped twice")
	}
}

// hijackedConn is one that has been closed.
type hijackedConn struct{ net.Conn }

func (c *hijackedConn) SyscallConn() (syscall.RawConn, error) { return nil, net.ErrClosed }

// Hijacked connections that are closed are forgotten, although nobody counts them.
func TestHijackedAreForgotten(t *testing.T) {
	var h hijackedConns
	for range 1000 {
		h.add(new(hijackedConn))
	}
	if n := len(h.conns); n > 200 {
		t.Errorf("%d of 1000 that are closed are kept", n)
	}
	h.add(new(sink)) // of which it cannot be seen
	h.count()
}
