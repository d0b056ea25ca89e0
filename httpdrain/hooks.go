package httpdrain

import (
	"cmp"
	"context"
	"net"
	"net/http"
	"reflect"
)

// This file owns what the Drainer puts before the server's hooks, and what it learns
// from them: which listeners the server serves, which protocols, and the state of
// each connection.

// watch puts the drainer before the server's hooks.
func (d *Drainer) watch() {
	srv := d.srv
	base := srv.BaseContext
	srv.BaseContext = func(ln net.Listener) context.Context {
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
// where to notice that a listener does not come from Listener.
func (d *Drainer) serving(ln net.Listener) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l, ok := ln.(*listener); !ok {
		// It may contain one, as those of crypto/tls do.
		d.unserved--
	} else if !l.served {
		l.served = true
		d.unserved--
	}
	if d.unserved < 0 {
		panic("httpdrain: the server serves a listener that its Drainer cannot stop; use Drainer.Serve or Drainer.ServeTLS, or wrap the listener by Drainer.Listener")
	}
}

// serves is called before the server is given a connection. It has set up its
// protocols then, and serves looks at them, once.
func (d *Drainer) serves() {
	if d.learnt.Load() {
		return
	}
	d.setUp.Lock()
	defer d.setUp.Unlock()
	if d.learnt.Load() {
		return
	}
	d.plainHTTP2.Store(d.srv.Protocols != nil && d.srv.Protocols.UnencryptedHTTP2())
	for protocol := range d.srv.TLSNextProto {
		if protocol != "h2" && protocol != "unencrypted_http2" {
			d.otherProtocol.Store(true)
		}
	}
	d.frameNextProto()
	d.learnt.Store(true)
}

func (d *Drainer) add(nc net.Conn, framed *framedConn) *conn {
	c := &conn{drainer: d, Conn: nc}
	if framed != nil {
		c = framed.conn
	}
	if watchable(nc) {
		d.conns.Store(nc, c)
	}
	return c
}

// watchable reports whether nc can be the key of a map. Its type may be comparable
// although the value is not.
func watchable(nc net.Conn) bool {
	// A pointer is what nearly every connection is, and Value.Comparable allocates.
	return reflect.TypeOf(nc).Kind() == reflect.Pointer || reflect.ValueOf(nc).Comparable()
}

func (d *Drainer) update(nc net.Conn, state http.ConnState) {
	if !watchable(nc) {
		return
	}
	known := d.conns.Load
	if state == http.StateHijacked || state == http.StateClosed {
		known = d.conns.LoadAndDelete
	}
	value, ok := known(nc)
	if !ok {
		return
	}
	c := value.(*conn)
	c.state.Store(int32(state))
	if state == http.StateHijacked {
		d.hijacked.add(nc)
	}
	if d.draining.Load() {
		c.stir(state)
	}
}
