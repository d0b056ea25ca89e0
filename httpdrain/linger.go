package httpdrain

import (
	"context"
	"net"
	"os"
	"time"
)

// This file owns what happens to a connection of HTTP/1 whose client has not closed
// it after the last response.
//
// A socket that is closed while its client sends is reset, and the reset overtakes
// the response: a client that pipelines over a slow link loses a response that has
// been sent. RFC 9112, section 9.6, has the server half-close and read on until the
// client closes. net/http half-closes, and closes half a second later. So a
// duplicate of the descriptor keeps the socket open beyond that.

const (
	// lingerAfter is when the duplicate is made, if the client has not closed: well
	// before net/http closes.
	lingerAfter = 250 * time.Millisecond

	// lingerSilence is for how long the client must be silent for the socket to be
	// closed: no reset follows then. lingerLimit is how long it may go on sending.
	lingerSilence = time.Second
	lingerLimit   = 30 * time.Second
)

// receivedTick is how accurate lastReceived is: Linux counts jiffies.
const receivedTick = 10 * time.Millisecond

// bare returns the connection that nc wraps.
func bare(nc net.Conn) net.Conn {
	for {
		inner, wrapped := nc.(interface{ NetConn() net.Conn })
		if !wrapped {
			return nc
		}
		nc = inner.NetConn()
	}
}

// duplicate returns another descriptor of the TCP connection, or nil if it needs
// none, or cannot have one.
func duplicate(nc net.Conn) *os.File {
	tcp, ok := bare(nc).(*net.TCPConn)
	if !ok || clientClosed(tcp) {
		return nil
	}
	file, err := tcp.File()
	if err != nil {
		return nil
	}
	return file
}

// discard reads what the client sends until it closes, is silent, or ctx ends. It
// closes file.
func discard(ctx context.Context, file *os.File) {
	defer file.Close()
	ctx, cancel := context.WithTimeout(ctx, lingerLimit)
	defer cancel()
	buf := make([]byte, 16<<10)
	for ctx.Err() == nil {
		if err := file.SetReadDeadline(time.Now().Add(lingerSilence)); err != nil {
			return
		}
		if _, err := file.Read(buf); err != nil {
			return
		}
	}
}
