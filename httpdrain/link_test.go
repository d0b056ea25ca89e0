package httpdrain_test

import (
	"net"
	"sync"
	"testing"
	"time"
)

// slowLink returns the address of a link to addr on which everything takes half of
// rtt each way, in the order in which it was sent.
func slowLink(t testing.TB, addr string, rtt time.Duration) string {
	t.Helper()
	ln := listenTCP(t)
	var links sync.WaitGroup
	t.Cleanup(links.Wait)
	t.Cleanup(func() { ln.Close() })
	links.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", addr)
			if err != nil {
				near.Close()
				continue
			}
			done := make(chan struct{}, 2)
			for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
				links.Go(func() {
					carry(way[0], way[1], rtt/2)
					done <- struct{}{}
				})
			}
			links.Go(func() {
				<-done
				<-done
				near.Close()
				far.Close()
			})
			t.Cleanup(func() { near.Close(); far.Close() })
		}
	})
	return ln.Addr().String()
}

// carry copies from one end to the other, and closes that for writing.
func carry(from, to net.Conn, delay time.Duration) {
	type piece struct {
		due  time.Time
		data []byte
	}
	pieces := make(chan piece, 10000)
	go func() {
		defer close(pieces)
		for {
			buf := make([]byte, 16<<10)
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
		if _, err := to.Write(p.data); err != nil {
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

// overLink returns nc at the other end of such a link.
func overLink(nc net.Conn, rtt time.Duration) net.Conn {
	if nc == nil {
		return nil
	}
	near, far := net.Pipe()
	for _, way := range [][2]net.Conn{{far, nc}, {nc, far}} {
		go func() {
			carry(way[0], way[1], rtt/2)
			way[0].Close()
		}()
	}
	return near
}
