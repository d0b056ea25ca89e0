package httpdrain

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// This file owns how a client of HTTP/2 is told to leave: by a GOAWAY that
// excludes no stream, in between the frames of the server.
//
// RFC 9113, section 6.8, has a server send that first. The client opens no more
// streams, those that are on their way are served, and when all are done most
// clients close the connection. net/http only has the GOAWAY that refuses the
// streams which it has not read.

const (
	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

	// Frames have a header, whose first 3 bytes are the payload's length.
	headerLen   = 9
	headerType  = 3 // the index of the type
	typeHeaders = 1
	typeGoAway  = 7

	ping    = "\x00\x00\x08\x06\x00\x00\x00\x00\x00"
	pingAck = "\x00\x00\x08\x06\x01\x00\x00\x00\x00"
	goAway  = "\x00\x00\x08\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff\x00\x00\x00\x00" // all streams, no error

	// What the PINGs ask, in 8 bytes.
	areYouQuiet   = "settling"
	areYouLeaving = "draining"

	// quietWait is for how long the client must not have opened a stream to be taken
	// for quiet, or quietTrips round trips of a PING, if they are slow: a client that
	// is short of processors has requests that it is yet to send. quietLimit and
	// limitTrips are when that is not waited for any longer.
	quietTick  = 5 * time.Millisecond
	quietWait  = 3 * quietTick
	quietTrips = 2
	quietLimit = 250 * time.Millisecond
	limitTrips = 20

	// lateWait is for how long a client that has acknowledged the GOAWAY may still
	// open streams. net/http's may acknowledge a PING in between giving a stream
	// its number and sending it.
	lateWait = time.Second
)

// frames follows a flow of frames (RFC 9113, section 4.1). The zero value is at
// the beginning of one.
type frames struct {
	head [len(pingAck) + len(areYouQuiet)]byte // how the last frame begins
	seen int                                   // bytes of it that have passed
	size int                                   // of it, or of its header until that has passed
}

// pass lets p pass until the end of a frame, and returns how much that was.
func (f *frames) pass(p []byte) (n int) {
	if f.ended() {
		f.seen, f.size = 0, headerLen
	}
	if f.seen < headerLen {
		n = copy(f.head[f.seen:headerLen], p)
		if f.seen += n; f.seen < headerLen {
			return n
		}
		f.size += int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2])
	}
	payload := p[n:min(len(p), n+f.size-f.seen)]
	if f.seen < len(f.head) {
		copy(f.head[f.seen:], payload)
	}
	f.seen += len(payload)
	return n + len(payload)
}

// ended reports whether no frame has begun to pass that has not ended.
func (f *frames) ended() bool { return f.seen == f.size }

// A framedConn is a connection that may be HTTP/2, as the server sees it.
type framedConn struct {
	*conn
	http2 atomic.Bool // it is

	// What the server reads, by one goroutine at a time.
	preface int  // bytes of the preface that have been read
	other   bool // it is not HTTP/2
	in      frames

	newest  atomic.Uint32 // the stream that was opened last
	answers chan struct{} // holds a value if areYouQuiet was acknowledged
	left    chan struct{} // closed when responses may end

	writing sync.Mutex // guards what follows, and is held while the server writes
	out     frames
	greeted bool   // the server has sent its first frame, SETTINGS
	gone    bool   // it has sent its GOAWAY
	begun   bool   // leave was called
	pending string // frames to insert
}

// framed returns nc as the server is to see it.
func (d *Drainer) framed(nc net.Conn) *framedConn {
	c := &framedConn{
		conn:    &conn{drainer: d, Conn: nc},
		answers: make(chan struct{}, 1),
		left:    make(chan struct{}),
	}
	c.framed = c
	return c
}

// unframed returns nc as everybody else is to see it, and how the server does if
// that is different.
func unframed(nc net.Conn) (net.Conn, *framedConn) {
	if f, ok := nc.(interface{ self() *framedConn }); ok {
		return f.self().Conn, f.self()
	}
	return nc, nil
}

func (c *framedConn) self() *framedConn { return c }

// NetConn returns the connection itself.
func (c *framedConn) NetConn() net.Conn { return c.Conn }

// CloseWrite is called by net/http if there is one.
func (c *framedConn) CloseWrite() error {
	if nc, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return nc.CloseWrite()
	}
	return nil
}

func (c *framedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if !c.other {
		c.follow(p[:n])
	}
	return n, err
}

// follow notes what the client has sent.
func (c *framedConn) follow(p []byte) {
	if rest := preface[c.preface:]; rest != "" {
		n := min(len(p), len(rest))
		if string(p[:n]) != rest[:n] {
			c.other = true
			return
		}
		c.preface += n
		if n < len(rest) {
			return
		}
		c.http2.Store(true)
		p = p[n:]
	}
	for len(p) > 0 {
		p = p[c.in.pass(p):]
		if !c.in.ended() {
			return
		}
		head := &c.in.head
		switch {
		case head[headerType] == typeHeaders:
			if id := binary.BigEndian.Uint32(head[5:]); id > c.newest.Load() {
				c.newest.Store(id)
			}
		case string(head[:]) == pingAck+areYouQuiet:
			select {
			case c.answers <- struct{}{}:
			default:
			}
		case string(head[:]) == pingAck+areYouLeaving:
			c.noteFarewell(true)
		}
	}
}

// Write inserts what is pending at the first end of a frame.
func (c *framedConn) Write(p []byte) (n int, err error) {
	if !c.http2.Load() {
		return c.Conn.Write(p)
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	for n < len(p) && err == nil {
		part := p[n:]
		if c.pending != "" {
			ahead := c.out
			part = part[:ahead.pass(part)]
		}
		var m int
		m, err = c.Conn.Write(part)
		c.sent(part[:m])
		n += m
		c.flush()
	}
	c.begin()
	return n, err
}

// sent notes what the server has sent.
func (c *framedConn) sent(p []byte) {
	for len(p) > 0 {
		p = p[c.out.pass(p):]
		if c.out.ended() {
			c.greeted = true
			c.gone = c.gone || c.out.head[headerType] == typeGoAway
		}
	}
}

// drain is called when the drain begins.
func (c *framedConn) drain() {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.begin()
}

func (c *framedConn) begin() {
	if c.greeted && !c.begun && c.drainer.draining.Load() {
		c.begun = true
		go c.leave()
	}
}

// leave tells the client to leave when it is quiet, as clients are while all their
// requests wait for a response. net/http's fails a request which has waited for
// its turn on the connection when the GOAWAY came, if it cannot rewind the body,
// although it has sent nothing of it.
func (c *framedConn) leave() {
	defer close(c.left)
	c.awaitQuiet()
	c.noteFarewell(false)
	c.insert(goAway + ping + areYouLeaving)
}

func (c *framedConn) awaitQuiet() {
	newest := c.newest.Load()
	var trip time.Duration // the longest
	begin := time.Now()
	for since := begin; time.Since(since) < max(quietWait, quietTrips*trip); {
		if time.Since(begin) > max(quietLimit, limitTrips*trip) {
			return
		}
		sent := time.Now()
		c.insert(ping + areYouQuiet)
		select {
		case <-c.answers:
			trip = max(trip, time.Since(sent))
		case <-time.After(quietLimit):
			return
		}
		<-time.After(quietTick)
		if n := c.newest.Load(); n != newest {
			newest, since = n, time.Now()
		}
	}
}

// insert sends frames now, or when the frame that the server is sending ends.
func (c *framedConn) insert(frames string) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.pending = frames
	c.flush()
}

func (c *framedConn) flush() {
	if c.pending == "" || !c.out.ended() {
		return
	}
	if c.gone {
		// A further one must not name a higher stream.
		c.pending = strings.TrimPrefix(c.pending, goAway)
	}
	if _, err := io.WriteString(c.Conn, c.pending); err != nil {
		c.Conn.Close() // rather than go on in the middle of a frame
	}
	c.pending = ""
}

// plainConn is one without TLS. For HTTP/1, it has what net/http looks for on a
// TCP connection.
type plainConn struct{ *framedConn }

func (c plainConn) ReadFrom(r io.Reader) (int64, error) {
	if c.http2.Load() {
		return io.Copy(struct{ io.Writer }{c}, r)
	}
	return io.Copy(c.Conn, r)
}

// tlsConn is one with TLS.
type tlsConn struct {
	*framedConn
	tls *tls.Conn
}

func (c tlsConn) ConnectionState() tls.ConnectionState { return c.tls.ConnectionState() }

func (c tlsConn) HandshakeContext(ctx context.Context) error {
	err := c.tls.HandshakeContext(ctx)
	// The server will write before it reads the preface.
	c.http2.Store(c.ConnectionState().NegotiatedProtocol == "h2")
	c.other = !c.http2.Load()
	return err
}
