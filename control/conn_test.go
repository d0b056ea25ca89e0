package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip"
	stub "example.com/tableflip/testing"
)

// A memoryListener accepts what is dialled.
type memoryListener struct {
	dialled chan net.Conn
	closed  chan struct{}
}

func newMemoryListener() memoryListener {
	return memoryListener{make(chan net.Conn, 2*maxConns), make(chan struct{})}
}

func (l memoryListener) dial() net.Conn {
	near, far := net.Pipe()
	l.dialled <- far
	return near
}

func (l memoryListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	case c := <-l.dialled:
		return c, nil
	}
}

func (l memoryListener) Close() error { close(l.closed); return nil }
func (memoryListener) Addr() net.Addr { return &net.UnixAddr{} }

// A memoryUpgrader needs nothing of the system.
type memoryUpgrader struct {
	*stub.Upgrader
	ln memoryListener
}

func (u memoryUpgrader) ListenWithCallback(string, string, func(string, string) (net.Listener, error)) (net.Listener, error) {
	return u.ln, nil
}

func (memoryUpgrader) File(string) (*os.File, error) { return nil, errors.ErrUnsupported }

// ask returns a connection on which something was asked.
func (l memoryListener) ask(t *testing.T, question string) net.Conn {
	t.Helper()
	conn := l.dial()
	t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, question); err != nil {
		t.Fatal(err)
	}
	return conn
}

// wantOK reads an answer.
func wantOK(t *testing.T, conn net.Conn) {
	t.Helper()
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Errorf("the answer is %v, %v", answer, err)
	}
}

func serveInMemory(t *testing.T) memoryListener {
	t.Helper()
	upg := newMemoryUpgrader()
	serve(t, upg)
	return upg.ln
}

func newMemoryUpgrader() memoryUpgrader {
	upg, _ := stub.New()
	return memoryUpgrader{upg, newMemoryListener()}
}

func serve(t *testing.T, upg Upgrader) {
	t.Helper()
	ctl, err := New(upg, "", Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ctl.Close)
	go ctl.Serve()
}

// Clients that ask nothing, or half of it, or do not read their answers, leave room for
// others in the end.
func TestStuckClients(t *testing.T) {
	for name, question := range map[string]string{
		"nothing": "",
		"half":    "POST /stop HTTP/1.1\r\nHost: control\r\nContent-Length: 5\r\n\r\nhalf",
		"status":  "GET /status HTTP/1.0\r\n\r\n",
		"events":  "GET /events HTTP/1.0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := serveInMemory(t)
				for range maxConns {
					ln.ask(t, question)
				}
				synctest.Wait()
				wantOK(t, ln.ask(t, "GET /status HTTP/1.0\r\n\r\n"))
			})
		})
	}
}

// Readers of events leave room for other readers, too.
func TestStuckReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := serveInMemory(t)
		for range maxWatchers {
			ln.ask(t, "GET /events HTTP/1.0\r\n\r\n")
		}
		time.Sleep(2 * writeTimeout) // in the bubble's time
		wantOK(t, ln.ask(t, "GET /events HTTP/1.0\r\n\r\n"))
	})
}

func (memoryUpgrader) UpgradeContext(ctx context.Context) error {
	select {
	case <-time.After(time.Hour):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func TestUpgradeLong(t *testing.T) {
	for name, question := range map[string]string{
		"body":    "POST /upgrade HTTP/1.1\r\nHost: control\r\nContent-Length: 4\r\n\r\nbody",
		"no body": "POST /upgrade HTTP/1.0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := serveInMemory(t)
				wantOK(t, ln.ask(t, question))
				select {
				case <-ln.closed:
				default:
					t.Error("who asks again meets the process that was replaced")
				}
			})
		})
	}
}

// A scriptedUpgrader has an error for each upgrade.
type scriptedUpgrader struct {
	memoryUpgrader
	errs chan error
}

func (u scriptedUpgrader) UpgradeContext(context.Context) error { return <-u.errs }

// Who waits is not refused for what ends, and hears of what does not.
func TestUpgradeWaits(t *testing.T) {
	running := tableflip.ErrParentRunning
	for _, test := range []struct {
		question string
		errs     []error
		status   int
	}{
		{"/upgrade?wait", []error{tableflip.ErrUpgradeInProgress, running, fmt.Errorf("%w: %w", running, os.ErrDeadlineExceeded), tableflip.ErrUpgradeInProgress, nil}, http.StatusOK},
		{"/upgrade?wait", []error{running, tableflip.ErrUpgraded}, http.StatusConflict},
		{"/upgrade?wait=0", []error{running}, http.StatusConflict},
		{"/upgrade?wait=false", []error{tableflip.ErrUpgradeInProgress}, http.StatusConflict},
		{"/upgrade", []error{running}, http.StatusConflict},
		{"/upgrade", []error{tableflip.ErrNotReady}, http.StatusConflict},
		{"/upgrade", []error{tableflip.ErrStopped}, http.StatusServiceUnavailable},
		{"/upgrade", []error{tableflip.ErrNotSupported}, http.StatusNotImplemented},
		{"/upgrade", []error{os.ErrDeadlineExceeded}, http.StatusInternalServerError},
	} {
		synctest.Test(t, func(t *testing.T) {
			upg := scriptedUpgrader{newMemoryUpgrader(), make(chan error, len(test.errs))}
			for _, err := range test.errs {
				upg.errs <- err
			}
			serve(t, upg)
			conn := upg.ln.ask(t, "POST "+test.question+" HTTP/1.0\r\n\r\n")
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || answer.StatusCode != test.status || len(upg.errs) > 0 {
				t.Errorf("%s, %v: got %v, %v after all but %d", test.question, test.errs, answer, err, len(upg.errs))
			}
		})
	}
}

func TestListenerLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dial := newMemoryListener()
		for range maxConns + 2 {
			dial.dial()
		}
		l := newListener(dial)
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
