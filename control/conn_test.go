package control

import (
	"errors"
	"net"
	"testing"
	"testing/synctest"
)

// A memoryListener accepts any number of connections at once.
type memoryListener struct{ closed chan struct{} }

func (l memoryListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
		near, _ := net.Pipe()
		return near, nil
	}
}

func (l memoryListener) Close() error { close(l.closed); return nil }
func (memoryListener) Addr() net.Addr { return &net.UnixAddr{} }

func TestListenerLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newListener(memoryListener{make(chan struct{})})
		var accepted []net.Conn
		for range maxConns {
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			accepted = append(accepted, c)
		}
		result := make(chan error)
		accept := func() {
			_, err := l.Accept()
			result <- err
		}
		waits := func() {
			t.Helper()
			synctest.Wait()
			select {
			case err := <-result:
				t.Fatalf("one connection too many: %v", err)
			default:
			}
		}
		go accept()
		waits()
		accepted[0].Close()
		if err := <-result; err != nil {
			t.Errorf("there was room: %v", err)
		}
		accepted[0].Close() // makes no more room
		go accept()
		waits()
		l.Close()
		l.Close()
		if err := <-result; !errors.Is(err, net.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}
