//go:build unix

package proctest

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// SocketDir is a directory whose path is short enough for Unix sockets in it, unlike
// that of t.TempDir.
func SocketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "flip")
	OK(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Exists reports whether there is a file, or a socket, of this name.
func Exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Opened returns a function that returns its argument, and closes it at the end of the
// test. It ends the test if there was an error.
func Opened[T io.Closer](t testing.TB) func(T, error) T {
	t.Helper()
	return func(socket T, err error) T {
		t.Helper()
		OK(t, err)
		t.Cleanup(func() { socket.Close() })
		return socket
	}
}

// ErrorOf drops a socket, which stays open until the garbage collector finds it.
func ErrorOf[T any](_ T, err error) error { return err }

// Connect returns both ends of a TCP connection.
func Connect(t testing.TB) (server, client *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "localhost:0")
	OK(t, err)
	defer ln.Close()
	dialed := Opened[net.Conn](t)(net.Dial("tcp", ln.Addr().String()))
	accepted := Opened[net.Conn](t)(ln.Accept())
	return accepted.(*net.TCPConn), dialed.(*net.TCPConn)
}

// Dial makes connections that wait to be accepted.
func Dial(t testing.TB, count int, addr net.Addr) []net.Conn {
	t.Helper()
	var conns []net.Conn
	for range count {
		conns = append(conns, Opened[net.Conn](t)(net.Dial(addr.Network(), addr.String())))
	}
	return conns
}

// Answers returns what each of conns receives until it is closed.
func Answers(t testing.TB, conns []net.Conn) []string {
	t.Helper()
	var all []string
	for _, conn := range conns {
		conn.SetDeadline(time.Now().Add(Patience))
		answer, err := io.ReadAll(conn)
		if err != nil {
			t.Errorf("%v: %v", conn.RemoteAddr(), err)
		}
		all = append(all, string(answer))
	}
	return all
}

// Answer returns what a server sends on a new connection until it closes that.
func Answer(t testing.TB, network, addr string) string {
	t.Helper()
	conn, err := net.Dial(network, addr)
	OK(t, err)
	defer conn.Close()
	return Answers(t, []net.Conn{conn})[0]
}

// WantEOF waits until the other side has closed conn, or is gone.
func WantEOF(t testing.TB, what string, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(Patience))
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("%s: read %d bytes, %v, want the end of the connection", what, n, err)
	}
}

// WantOpen checks that conn still reaches a socket at the other end.
func WantOpen(t testing.TB, what string, conn, other net.Conn) {
	t.Helper()
	if _, err := io.WriteString(other, "x"); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	conn.SetReadDeadline(time.Now().Add(Patience))
	if n, err := conn.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("%s: read %d bytes, %v", what, n, err)
	}
}

// WantRefused checks that nobody listens.
func WantRefused(t testing.TB, what, network, addr string) {
	t.Helper()
	conn, err := net.Dial(network, addr)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: dial %s %s: %v, want it refused", what, network, addr, err)
	}
}
