package control

import (
	"net"
	"os"
	"sync"
	"syscall"
)

// This file owns who may connect, and how many at once.

// maxConns is how many connections are served at once. Others wait in the socket's
// queue. What stuck clients take must not lack the service: each is a descriptor.
const maxConns = 64

// A listener accepts the connections of the socket.
type listener struct {
	net.Listener
	places chan struct{} // has a value for each connection
	closed chan struct{}
	close  func() error
}

func newListener(ln net.Listener) *listener {
	l := &listener{Listener: ln, places: make(chan struct{}, maxConns), closed: make(chan struct{})}
	l.close = sync.OnceValue(func() error {
		close(l.closed)
		return ln.Close()
	})
	return l
}

// Close returns when no connection is accepted any more: what connects later is the
// successor's.
func (l *listener) Close() error { return l.close() }

func (l *listener) Accept() (net.Conn, error) {
	select {
	case l.places <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.places
		return nil, err
	}
	return &conn{Conn: c, stranger: isStranger(c), release: sync.OnceFunc(func() { <-l.places })}, nil
}

// A conn is one of a listener's connections.
type conn struct {
	net.Conn
	stranger bool
	release  func()
}

func (c *conn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// isStranger reports whether a connection is neither of this process's user nor of root.
// The mode of the socket's file already keeps strangers out, unless somebody changes it.
// Where the system can't be asked, the mode must do.
func isStranger(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false // a stub's, in memory
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	stranger := true
	err = raw.Control(func(fd uintptr) {
		uid, known, err := peerOf(int(fd))
		stranger = err != nil || known && uid != 0 && uid != os.Geteuid()
	})
	return stranger || err != nil
}
