package load

import (
	"context"
	"net"
	"sync"
	"time"
)

// A Link is a slow way to a server. It delivers everything, in the order in which it was
// sent.
type Link struct {
	RoundTrip time.Duration // what is sent takes half of it
	Rate      int           // bytes per second each way; 0 is without a limit
}

// Listen opens the link to the TCP address of a server until ctx is done, which also cuts
// its connections. It returns the address of the near end.
func (l Link) Listen(ctx context.Context, addr string) (near string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	context.AfterFunc(ctx, func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go l.connect(ctx, nc.(*net.TCPConn), addr)
		}
	}()
	return ln.Addr().String(), nil
}

// connect carries what comes on a connection to the server, and its answers back.
func (l Link) connect(ctx context.Context, near *net.TCPConn, addr string) {
	defer near.Close()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	far := nc.(*net.TCPConn)
	defer far.Close()
	defer context.AfterFunc(ctx, func() { near.Close(); far.Close() })()
	if l.Rate > 0 {
		near.SetReadBuffer(4 * maxPiece)
		far.SetReadBuffer(4 * maxPiece)
	}
	var ways sync.WaitGroup
	ways.Go(func() { l.carry(near, far) })
	ways.Go(func() { l.carry(far, near) })
	ways.Wait()
}

// Over returns nc at the other end of such a link, in memory.
func (l Link) Over(nc net.Conn) net.Conn {
	near, far := net.Pipe()
	for _, way := range [][2]net.Conn{{far, nc}, {nc, far}} {
		go func() {
			l.carry(way[0], way[1])
			way[0].Close()
		}()
	}
	return near
}

const maxPiece = 16 << 10

// carry copies from one end to the other, and closes that for writing.
func (l Link) carry(from, to net.Conn) {
	type piece struct {
		due  time.Time
		data []byte
	}
	underWay := 10000
	if l.Rate > 0 {
		underWay = 4 // so that a sender that is too fast has to wait
	}
	pieces := make(chan piece, underWay)
	delay := l.RoundTrip / 2
	go func() {
		defer close(pieces)
		for {
			buf := make([]byte, maxPiece)
			n, err := from.Read(buf)
			if n > 0 {
				pieces <- piece{time.Now().Add(delay), buf[:n]}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if l.Rate > 0 {
			time.Sleep(time.Duration(len(p.data)) * time.Second / time.Duration(l.Rate))
		}
		if _, err := to.Write(p.data); err != nil {
			from.Close()
			break
		}
	}
	time.Sleep(delay)
	if tcp, ok := to.(*net.TCPConn); ok {
		tcp.CloseWrite()
	} else {
		to.Close()
	}
	for range pieces {
	}
}
