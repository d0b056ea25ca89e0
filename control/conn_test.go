package control

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/event"
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

// A replacedUpgrader is replaced from the beginning.
type replacedUpgrader struct{ memoryUpgrader }

func (replacedUpgrader) Replaced() bool { return true }

func (replacedUpgrader) Exit() <-chan struct{} {
	exit := make(chan struct{})
	close(exit)
	return exit
}

// Without a meeting, the status says less, and nothing else changes.
func TestNoMeeting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		upg := newMemoryUpgrader()
		ctl, err := New(replacedUpgrader{upg}, "", Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(log.String(), errors.ErrUnsupported.Error()) {
			t.Errorf("the log says %q", &log)
		}
		began := time.Now()
		go ctl.Serve()
		<-upg.ln.closed
		ctl.Close()
		if took := time.Since(began); took != 0 {
			t.Errorf("Close took %v", took)
		}
	})
}

// A drain tells how many connections are left when that has changed, and only then.
func TestDrainTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events, cancel := event.Subscribe()
		defer cancel()
		var left atomic.Int32
		left.Store(3)
		ctl, err := New(replacedUpgrader{newMemoryUpgrader()}, "", Options{Connections: func() int { return int(left.Load()) }})
		if err != nil {
			t.Fatal(err)
		}
		go ctl.Serve()
		var told []int64
		for _, n := range []int32{2, 1} {
			time.Sleep(3 * drainInterval)
			left.Store(n)
		}
		time.Sleep(3 * drainInterval)
		ctl.Close()
		for len(events) > 0 {
			for _, a := range (<-events).Attrs {
				if a.Key == "connections" {
					told = append(told, a.Value.Int64())
				}
			}
		}
		if !slices.Equal(told, []int64{3, 2, 1}) {
			t.Errorf("told %v", told)
		}
	})
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

// drainTime is how long the parent of a scriptedUpgrader drains.
const drainTime = time.Minute

func (scriptedUpgrader) WaitForParent(context.Context) error {
	time.Sleep(drainTime)
	return nil
}

func newScriptedUpgrader(errs ...error) scriptedUpgrader {
	upg := scriptedUpgrader{newMemoryUpgrader(), make(chan error, len(errs))}
	for _, err := range errs {
		upg.errs <- err
	}
	return upg
}

// Who waits is not refused for what ends, and hears of what does not.
func TestUpgradeWaits(t *testing.T) {
	inProgress, running := tableflip.ErrUpgradeInProgress, tableflip.ErrParentRunning
	for _, test := range []struct {
		question string
		errs     []error
		status   int
		waits    time.Duration
	}{
		{"/upgrade?wait", []error{inProgress, running, fmt.Errorf("%w: %w", running, os.ErrDeadlineExceeded), inProgress, nil}, http.StatusOK, 2*retryInterval + drainTime},
		{"/upgrade?wait", []error{running, tableflip.ErrUpgraded}, http.StatusConflict, drainTime},
		{"/upgrade?wait", []error{os.ErrDeadlineExceeded}, http.StatusInternalServerError, 0},
		{"/upgrade?wait=0", []error{running}, http.StatusConflict, 0},
		{"/upgrade?wait=false", []error{inProgress}, http.StatusConflict, 0},
		{"/upgrade", []error{running}, http.StatusConflict, 0},
		{"/upgrade", []error{tableflip.ErrNotReady}, http.StatusConflict, 0},
		{"/upgrade", []error{tableflip.ErrStopped}, http.StatusServiceUnavailable, 0},
		{"/upgrade", []error{tableflip.ErrNotSupported}, http.StatusNotImplemented, 0},
		{"/upgrade", []error{os.ErrDeadlineExceeded}, http.StatusInternalServerError, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			upg := newScriptedUpgrader(test.errs...)
			serve(t, upg)
			asked := time.Now()
			conn := upg.ln.ask(t, "POST "+test.question+" HTTP/1.0\r\n\r\n")
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || answer.StatusCode != test.status || len(upg.errs) > 0 || time.Since(asked) != test.waits {
				t.Errorf("%s, %v: got %v, %v after %v and all but %d", test.question, test.errs, answer, err, time.Since(asked), len(upg.errs))
			}
		})
	}
}

// An event says when somebody else's upgrade has ended.
func TestUpgradeWaitsForEvents(t *testing.T) {
	for _, name := range []string{event.Committed, event.Failed, event.Rehearsed} {
		synctest.Test(t, func(t *testing.T) {
			upg := newScriptedUpgrader(tableflip.ErrUpgradeInProgress, nil)
			serve(t, upg)
			conn := upg.ln.ask(t, "POST /upgrade?wait HTTP/1.0\r\n\r\n")
			synctest.Wait()
			event.Publish(nil, slog.LevelInfo, event.Ready) // goes on
			synctest.Wait()
			if len(upg.errs) != 1 {
				t.Error("it was tried again before the other upgrade has ended")
			}
			began := time.Now()
			event.Publish(nil, slog.LevelInfo, name)
			wantOK(t, conn)
			if waited := time.Since(began); waited != 0 {
				t.Errorf("%s: waited %v", name, waited)
			}
		})
	}
}

// Who goes away waits no longer.
func TestUpgradeWaitsForNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inProgress := tableflip.ErrUpgradeInProgress
		upg := newScriptedUpgrader(inProgress, inProgress, inProgress)
		serve(t, upg)
		conn := upg.ln.ask(t, "POST /upgrade?wait HTTP/1.0\r\n\r\n")
		synctest.Wait()
		conn.Close()
		synctest.Wait()
		if tried := 3 - len(upg.errs); tried > 2 {
			t.Fatalf("it was tried %d times", tried)
		}
	})
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
		if n := len(l.places); n != maxConns {
			t.Errorf("%d places are taken by %d connections", n, maxConns)
		}
	})
}

// A place whose connection could not be accepted is free again.
func TestListenerFails(t *testing.T) {
	dial := newMemoryListener()
	l := newListener(dial)
	dial.Close()
	for range 2 {
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
	if n := len(l.places); n > 0 {
		t.Errorf("%d places are taken", n)
	}
}
