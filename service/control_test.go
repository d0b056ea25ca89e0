//go:build unix

package service_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/queue"
	"example.com/tableflip/service"
)

// startControlled runs a process with a control socket beside its predecessor.
func startControlled(t *testing.T, opts service.Options, servers ...service.Server) (r *run, socket string) {
	t.Helper()
	opts.Control = filepath.Join(proctest.SocketDir(t), "ctl")
	return startBesideParent(t, opts, servers...), opts.Control
}

// An answer is what the control socket has said.
type answer struct {
	code int
	text string
}

// ask asks in the background.
func ask(ctx context.Context, socket, question string) <-chan answer {
	return proctest.InBackground(func() answer {
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://control/"+question, nil)
		if err != nil {
			return answer{0, err.Error()}
		}
		response, err := client.Do(request)
		if err != nil {
			return answer{0, err.Error()}
		}
		defer response.Body.Close()
		content, err := io.ReadAll(response.Body)
		return answer{response.StatusCode, string(content) + proctest.CauseOf(err)}
	})
}

func wantAnswer(t *testing.T, asked <-chan answer, code int, text string) {
	t.Helper()
	if a := proctest.Within(t, "an answer", asked); a.code != code || !strings.Contains(a.text, text) {
		t.Errorf("answered %d %q, want %d %q", a.code, a.text, code, text)
	}
}

func TestControlUpgrade(t *testing.T) {
	opts, log := logged()
	r, socket := startControlled(t, opts)
	wantAnswer(t, ask(t.Context(), socket, "upgrade"), http.StatusConflict, "the process before this one drains")
	log.Await(t, "upgrade failed")
	waits := ask(t.Context(), socket, "upgrade?wait")
	log.Await(t, "upgrade failed")
	r.noUpgrade()
	for range 2 {
		if queue.IsKept(<-r.upg.early) {
			t.Error("the Upgrader does not know that somebody waits for the result")
		}
	}
	close(r.upg.parent)
	<-r.upg.upgrades
	wantAnswer(t, ask(t.Context(), socket, "upgrade"), http.StatusConflict, "another upgrade is under way")
	r.signal(syscall.SIGHUP)
	log.Await(t, "upgrade queued")
	r.upg.outcomes <- errRefused
	wantAnswer(t, waits, http.StatusInternalServerError, "refused")

	<-r.upg.upgrades // by the signal
	wantAnswer(t, ask(t.Context(), socket, "upgrade"), http.StatusConflict, "another upgrade is under way")
	r.upg.outcomes <- errRefused
	log.Await(t, "upgrade failed")
	log.Await(t, "upgrade failed")

	// Who goes away aborts it.
	ctx, leave := context.WithCancel(t.Context())
	asked := ask(ctx, socket, "upgrade?wait")
	upgrade := <-r.upg.upgrades
	leave()
	proctest.Within(t, "the end of the upgrade", upgrade.Done())
	<-asked
	log.Await(t, "upgrade failed")

	last := ask(t.Context(), socket, "upgrade?wait")
	<-r.upg.upgrades
	r.upg.outcomes <- nil
	r.end()
	wantAnswer(t, last, http.StatusOK, "has taken over")
	r.noUpgrade()
}

// The status tells how many connections the servers have that know it.
func TestControlConnections(t *testing.T) {
	server := conversations()
	server.Addr = filepath.Join(proctest.SocketDir(t), "socket")
	r, control := startControlled(t, quiet(), service.HTTP(server), service.Stream("tcp", "localhost:0", serveLines, nil))
	r.socket = server.Addr
	request := r.begin()
	conn := proctest.Opened[net.Conn](t)(net.Dial("unix", control))
	io.WriteString(conn, "GET /status HTTP/1.0\r\n\r\n")
	if got := proctest.Answers(t, []net.Conn{conn})[0]; !strings.Contains(got, "has 1 connections") {
		t.Errorf("the status is %q", got)
	}
	request.end()
	close(r.upg.parent)
	r.end()
}

// An Upgrader that cannot be controlled is an error.
func TestControlNeedsUpgrader(t *testing.T) {
	opts := quiet()
	opts.Control = filepath.Join(t.TempDir(), "ctl")
	upg := newStub(t)
	err := service.Run(struct{ service.Upgrader }{upg}, opts)
	if err == nil || !strings.Contains(err.Error(), "needs a control.Upgrader") {
		t.Errorf("got %v", err)
	}
	proctest.Within(t, "the end of the Upgrader", upg.Exit())
}

// A signal that comes during a rehearsal is queued, too.
func TestControlRehearse(t *testing.T) {
	opts, log := logged()
	r, socket := startControlled(t, opts)
	close(r.upg.parent)
	rehearsal := ask(t.Context(), socket, "rehearse?wait")
	<-r.upg.upgrades
	r.signal(syscall.SIGHUP)
	log.Await(t, "upgrade queued")
	r.upg.outcomes <- nil
	wantAnswer(t, rehearsal, http.StatusOK, "an upgrade would succeed")
	<-r.upg.upgrades
	r.upg.outcomes <- errRefused
	log.Await(t, "upgrade failed")
	r.end()
}

func TestControlBeforeUpgrade(t *testing.T) {
	opts := quiet()
	opts.BeforeUpgrade = func(context.Context) error { return errors.New("bad configuration") }
	r, socket := startControlled(t, opts)
	close(r.upg.parent)
	wantAnswer(t, ask(t.Context(), socket, "upgrade?wait"), http.StatusInternalServerError, "bad configuration")
	wantAnswer(t, ask(t.Context(), socket, "rehearse?wait"), http.StatusInternalServerError, "bad configuration")
	r.noUpgrade()
	r.end()
}

// Who has connected before the process was replaced is answered while it drains, and the
// events end with it.
func TestControlDuringDrain(t *testing.T) {
	drained, socket := make(chan struct{}), filepath.Join(proctest.SocketDir(t), "socket")
	r, control := startControlled(t, quiet(), service.Stream("unix", socket,
		func(net.Listener) error { <-drained; return nil },
		func(context.Context) error { <-drained; return nil }))
	close(r.upg.parent)
	late := proctest.Opened[net.Conn](t)(net.Dial("unix", control))
	events := proctest.Opened[net.Conn](t)(net.Dial("unix", control))
	io.WriteString(events, "GET /events HTTP/1.0\r\n\r\n")
	upgrade := ask(t.Context(), control, "upgrade?wait") // those are accepted first
	<-r.upg.upgrades
	r.upg.outcomes <- nil
	r.upg.end()
	wantAnswer(t, upgrade, http.StatusOK, "has taken over")

	io.WriteString(late, "POST /upgrade HTTP/1.0\r\n\r\n")
	<-r.upg.upgrades // which says why not
	r.upg.outcomes <- tableflip.ErrUpgraded
	if got := proctest.Answers(t, []net.Conn{late})[0]; !strings.Contains(got, "409 Conflict") {
		t.Errorf("answered %q, want 409", got)
	}
	close(drained)
	proctest.OK(t, r.returns())
	if got := proctest.Answers(t, []net.Conn{events})[0]; !strings.Contains(got, "watching") {
		t.Errorf("the events are %q", got)
	}
}

// Without an Upgrader the socket is there, and says that there are no upgrades.
func TestControlWithoutUpgrader(t *testing.T) {
	opts, log := logged()
	opts.Control = filepath.Join(proctest.SocketDir(t), "ctl")
	r := &run{t: t, ran: make(chan error, 1)}
	go func() { r.ran <- service.Run(nil, opts) }()
	log.Await(t, "can't be upgraded")
	log.Await(t, "ready")
	for _, question := range []string{"upgrade", "upgrade?wait", "rehearse"} {
		wantAnswer(t, ask(t.Context(), opts.Control, question), http.StatusNotImplemented, "not support")
	}
	wantAnswer(t, ask(t.Context(), opts.Control, "stop"), http.StatusOK, "stops")
	proctest.OK(t, r.returns())
}

// To stop by the control socket is to stop by a signal.
func TestControlStop(t *testing.T) {
	opts, log := logged()
	opts.DrainDelay = time.Hour
	r, socket := startControlled(t, opts)
	close(r.upg.parent)
	upgrade := ask(t.Context(), socket, "upgrade?wait")
	<-r.upg.upgrades
	wantAnswer(t, ask(t.Context(), socket, "stop"), http.StatusOK, "stops")
	log.Await(t, "stopped by the control socket")
	wantAnswer(t, upgrade, http.StatusServiceUnavailable, "terminating")
	wantAnswer(t, ask(t.Context(), socket, "upgrade?wait"), http.StatusServiceUnavailable, "the service stops")
	r.upg.Stop()
	proctest.OK(t, r.returns())
}

// The new version cannot serve, and whoever has asked is told why.
func TestControlFlawedVersion(t *testing.T) {
	directory := proctest.SocketDir(t)
	s, first := startService(t, directory, nil)
	socket := filepath.Join(directory, "ctl")
	proctest.OK(t, os.WriteFile(filepath.Join(directory, "flaw"), []byte("empty certificate"), 0o600))
	wantAnswer(t, ask(t.Context(), socket, "upgrade"), http.StatusInternalServerError, flaws["empty certificate"].says)
	s.Next().AwaitEnd()
	proctest.OK(t, os.Remove(filepath.Join(directory, "flaw")))
	wantAnswer(t, ask(t.Context(), socket, "upgrade"), http.StatusOK, "has taken over from ")
	second := s.Next()
	first.AwaitEnd()
	wantAnswer(t, ask(t.Context(), socket, "stop"), http.StatusOK, "stops")
	second.AwaitEnd()
	if proctest.Exists(socket) {
		t.Error("the socket is left")
	}
}
