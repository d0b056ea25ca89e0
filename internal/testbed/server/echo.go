//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// echo serves connections that last. Each stays with the process that accepted
// it, until the client ends it or the drain its patience. It begins with a line
// that names the version.
type echo struct {
	ln net.Listener

	mu       sync.Mutex
	stopped  bool
	conns    map[net.Conn]struct{}
	wait     sync.WaitGroup // one per connection
	finished chan struct{}
}

func (e *echo) serve() error {
	e.mu.Lock()
	e.finished = make(chan struct{})
	e.conns = make(map[net.Conn]struct{})
	e.mu.Unlock()
	defer close(e.finished)
	for {
		conn, err := e.ln.Accept()
		if errors.Is(err, syscall.EMFILE) {
			time.Sleep(10 * time.Millisecond) // as net/http does; the queue waits
			continue
		}
		if err != nil {
			e.mu.Lock()
			defer e.mu.Unlock()
			if e.stopped && errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		e.mu.Lock()
		e.conns[conn] = struct{}{}
		e.mu.Unlock()
		e.wait.Go(func() {
			fmt.Fprintln(conn, version)
			// Not by splice, whose pipes look like descriptors that are lost.
			io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
			e.mu.Lock()
			delete(e.conns, conn)
			e.mu.Unlock()
			conn.Close()
		})
	}
}

func (e *echo) drain(ctx context.Context) error {
	e.mu.Lock()
	e.stopped = true
	finished := e.finished
	e.mu.Unlock()
	e.ln.Close()
	if finished != nil {
		<-finished // the last Accept may have returned a connection
	}
	// A channel of its own, so that a connection's end and the deadline can race.
	gone := make(chan struct{})
	go func() { e.wait.Wait(); close(gone) }()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
	}
	e.mu.Lock()
	n := len(e.conns)
	for conn := range e.conns {
		conn.Close()
	}
	e.mu.Unlock()
	<-gone
	return fmt.Errorf("echo: %d connections cut", n)
}
