package httpdrain

import (
	"context"
	"net"
	"time"
)

// This file owns what happens to a connection whose client has not closed it when the
// server does.

// A socket that is closed while its client sends is reset, and the reset overtakes the
// responses that the kernel has not sent yet: a client that pipelines over a slow link
// loses a response, and so does one of HTTP/2 that acknowledges what it reads. RFC 9112,
// section 9.6, has the server half-close and read on until the client closes. net/http
// half-closes HTTP/1, and closes half a second later, and HTTP/2 a second after its GOAWAY.
// So a duplicate of the descriptor keeps the socket open beyond that.

const (
	// lingerAfter is when the duplicate is made for HTTP/1, if the client has not
	// closed: well before net/http closes.
	lingerAfter = 250 * time.Millisecond

	// lingerSilence is for how long the client must be silent for the socket to be
	// closed: no reset follows then. lingerLimit is how long it may go on sending.
	lingerSilence = time.Second
	lingerLimit   = 30 * time.Second
)

// transferTick is how accurate lastTransfer is: Linux counts jiffies.
const transferTick = 10 * time.Millisecond

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
func duplicate(nc net.Conn) *net.TCPConn {
	tcp, ok := bare(nc).(*net.TCPConn)
	if !ok || clientClosed(tcp) {
		return nil
	}
	file, err := tcp.File()
	if err != nil {
		return nil
	}
	defer file.Close()
	dup, err := net.FileConn(file)
	if err != nil {
		return nil
	}
	return dup.(*net.TCPConn)
}

// discard half-closes tcp, reads what the client sends until it closes, is silent, or ctx
// ends, and closes it.
func discard(ctx context.Context, tcp *net.TCPConn, silence time.Duration) {
	defer tcp.Close()
	tcp.CloseWrite()
	ctx, cancel := context.WithTimeout(ctx, lingerLimit)
	defer cancel()
	buf := make([]byte, 16<<10)
	for ctx.Err() == nil {
		if err := tcp.SetReadDeadline(time.Now().Add(silence)); err != nil {
			return
		}
		if _, err := tcp.Read(buf); err != nil {
			return
		}
	}
}
