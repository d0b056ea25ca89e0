package control

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"example.com/tableflip/internal/trial"
)

// logTo returns the Options of a Server that logs to a buffer.
func logTo(log *bytes.Buffer) Options {
	return Options{Logger: slog.New(slog.NewTextHandler(log, nil))}
}

// A process on trial leaves the socket to its parent, until it is in charge.
func TestServeOnTrial(t *testing.T) {
	t.Cleanup(func() { trial.Begin(nil)(false) }) // outside of the bubble
	for name, test := range map[string]struct {
		end    func(ctl *Server, end func(undone bool))
		serves bool
	}{
		"in charge": {func(_ *Server, end func(bool)) { end(false) }, true},
		"undone":    {func(_ *Server, end func(bool)) { end(true) }, false},
		"closed":    {func(ctl *Server, _ func(bool)) { ctl.Close() }, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				end := trial.Begin(nil)
				upg := newMemoryUpgrader()
				ctl, err := New(upg, "", Options{})
				if err != nil {
					t.Fatal(err)
				}
				defer ctl.Close()
				conn := upg.ln.dial()
				defer conn.Close()
				served := make(chan struct{})
				go func() {
					defer close(served)
					ctl.Serve()
				}()
				accepted := func() bool {
					synctest.Wait()
					return len(upg.ln.dialled) == 0
				}
				if accepted() {
					t.Error("a process on trial accepts")
				}
				test.end(ctl, end)
				if accepted() != test.serves {
					t.Errorf("it accepts: %v", !test.serves)
				}
				if !test.serves {
					<-served
				}
			})
		})
	}
}

func TestServeAfterClose(t *testing.T) {
	upg := newMemoryUpgrader()
	ctl, err := New(upg, "", Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctl.Close()
	ctl.Serve()
}

// A failingUpgrader has no socket.
type failingUpgrader struct {
	memoryUpgrader
	hasParent bool
}

func (u failingUpgrader) HasParent() bool { return u.hasParent }

func (failingUpgrader) ListenWithCallback(string, string, func(string, string) (net.Listener, error)) (net.Listener, error) {
	return nil, io.ErrClosedPipe
}

// A child does without a socket, and the first generation does not.
func TestNoSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		upg := failingUpgrader{memoryUpgrader: newMemoryUpgrader()}
		if _, err := New(upg, "", Options{}); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("got %v", err)
		}
		upg.hasParent = true
		var log bytes.Buffer
		ctl, err := New(upg, "", logTo(&log))
		if err != nil || !strings.Contains(log.String(), "control: no control socket") {
			t.Fatalf("got %v, and the log says %q", err, &log)
		}
		ctl.Serve()
		upg.Stop()
		synctest.Wait()
		ctl.Close()
	})
}

// A brokenListener can't accept.
type brokenListener struct{ memoryListener }

func (brokenListener) Accept() (net.Conn, error) { return nil, io.ErrClosedPipe }

type brokenUpgrader struct{ memoryUpgrader }

func (u brokenUpgrader) ListenWithCallback(string, string, func(string, string) (net.Listener, error)) (net.Listener, error) {
	return brokenListener{u.ln}, nil
}

// The log says when the socket is not served any more, unless that was wanted.
func TestServeLogs(t *testing.T) {
	const notServed = "not served any more"
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		ctl, err := New(brokenUpgrader{newMemoryUpgrader()}, "", logTo(&log))
		if err != nil {
			t.Fatal(err)
		}
		ctl.Serve()
		if !strings.Contains(log.String(), notServed) {
			t.Errorf("the log says %q", &log)
		}
		ctl.Close()
	})
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		ctl, err := New(newMemoryUpgrader(), "", logTo(&log))
		if err != nil {
			t.Fatal(err)
		}
		go ctl.Serve()
		synctest.Wait()
		ctl.Close()
		synctest.Wait()
		if strings.Contains(log.String(), notServed) {
			t.Errorf("the log says %q", &log)
		}
	})
}
