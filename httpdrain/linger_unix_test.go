//go:build unix

package httpdrain

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// tcpPair returns both ends of a connection.
func tcpPair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return client, server
}

// What was kept open is closed, and not left to the garbage collector.
func TestKeptOpenIsClosed(t *testing.T) {
	_, server := tcpPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	discard(ctx, server.(*net.TCPConn), time.Minute)
	if err := server.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("afterwards, it can be used: %v", err)
	}
}

// A socket is kept open once, however many GOAWAYs the server sends, and over HTTP/2 only
// once it has sent one.
func TestKeptOpenOnce(t *testing.T) {
	_, server := tcpPair(t)
	d := New(new(http.Server))
	c := d.framed(server)
	c.http2.Store(true)
	c.state.Store(int32(http.StateActive))
	c.joined, c.knows = true, true
	want := func(n int64, when string) {
		t.Helper()
		if got := d.waits.Load(); got != n {
			t.Errorf("%s, the drain waits for %d, want %d", when, got, n)
		}
	}
	c.lookAgain()
	want(1, "while a stream is open")
	for _, when := range []string{"after a GOAWAY", "after another"} {
		if _, err := c.Write([]byte(goAway)); err != nil {
			t.Fatal(err)
		}
		want(2, when)
	}
	c.linger.Close()
}

// So is one of HTTP/1, however often the drain looks at it.
func TestKeptOpenOnceOverHTTP1(t *testing.T) {
	_, server := tcpPair(t)
	d := New(new(http.Server))
	c := &conn{drainer: d, Conn: server, joined: true, knows: true}
	c.state.Store(int32(http.StateActive))
	for range 2 {
		c.lookAgain()
		if n := d.waits.Load(); n != 2 { // the connection, and its socket
			t.Errorf("the drain waits for %d", n)
		}
	}
	c.linger.Close()
}

// A duplicate is the only descriptor that is left of a connection once that is closed.
func TestDuplicateIsOne(t *testing.T) {
	client, server := tcpPair(t)
	dup := duplicate(server)
	server.Close()
	dup.Close()
	client.SetDeadline(time.Now().Add(2 * time.Minute))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read %v, want the connection's end", err)
	}
}
