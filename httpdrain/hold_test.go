package httpdrain

import (
	"context"
	"errors"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// A response waits for the GOAWAY if that is soon, and never for long: the server
// may be stuck in writing to the client.
func TestHold(t *testing.T) {
	const second = time.Second
	if most := holdTime + holdSlack; most > 50*time.Millisecond {
		t.Errorf("responses are held for %v", most)
	}
	for _, test := range []struct {
		name                 string
		age, timeout, told   time.Duration // of the request; WriteTimeout; until the GOAWAY is sent
		cancelled, notFramed bool
		want                 time.Duration
	}{
		{name: "GOAWAY in time", told: holdTime, want: holdTime},
		{name: "GOAWAY late", told: second, want: holdTime + holdSlack},
		{name: "old request", age: 39 * time.Millisecond, told: second, want: time.Millisecond},
		{name: "older request", age: 41 * time.Millisecond, told: second, want: 0},
		{name: "WriteTimeout", timeout: 10 * time.Millisecond, told: second, want: 5 * time.Millisecond},
		{name: "client gone", cancelled: true, told: second, want: 0},
		{name: "no frames", notFramed: true, told: second, want: 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := New(&http.Server{WriteTimeout: test.timeout})
				d.began = time.Now()
				c := d.framed(nil)
				c.hold(holdTime)
				if test.notFramed {
					c.conn.framed = nil
				}
				left := time.AfterFunc(test.told, func() { close(c.left) })
				defer left.Stop()
				ctx, cancel := context.WithCancel(t.Context())
				if test.cancelled {
					cancel()
				}
				defer cancel()
				r := (&http.Request{ProtoMajor: 2}).WithContext(ctx)
				begin := time.Now()
				c.answer(r, begin.Add(-test.age), true)
				if got := time.Since(begin); got != test.want {
					t.Errorf("held for %v, want %v", got, test.want)
				}
			})
		})
	}
}

// Responses that end before the farewell has begun are held as well, and are not
// before it is the connection's time.
func TestHoldBeforeFarewell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(new(http.Server))
		d.began = time.Now()
		for _, begins := range []time.Duration{0, time.Second} {
			c := d.framed(nil)
			c.begins = d.began.Add(begins)
			begin := time.Now()
			c.answer(&http.Request{ProtoMajor: 2}, begin, true)
			want := holdTime + holdSlack
			if begins > 0 {
				want = 0
			}
			if got := time.Since(begin); got != want {
				t.Errorf("held for %v, want %v", got, want)
			}
		}
	})
}

// failingConn fails to write.
type failingConn struct {
	net.Conn
	closed bool
}

func (c *failingConn) Write([]byte) (int, error) { return 3, errors.New("broken") }
func (c *failingConn) Close() error              { c.closed = true; return nil }

// A connection on which a GOAWAY has been written in part is closed.
func TestInsertFails(t *testing.T) {
	nc := new(failingConn)
	New(new(http.Server)).framed(nc).insert(goAway)
	if !nc.closed {
		t.Error("the connection is open, in the middle of a frame")
	}
}
