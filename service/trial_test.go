//go:build unix

package service_test

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/load"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/trial"
	"example.com/tableflip/service"
)

// A process on trial serves, and its parent is in charge.

// A trialRun is a run of a process on trial.
type trialRun struct {
	*run
	undone chan error    // receives why the process undoes its trial, which waits for that
	late   chan error    // receives why it would have, after the end
	denied chan struct{} // closed when it may learn that it is too late
	end    func(undone bool)
}

// startOnTrial runs servers on trial.
func startOnTrial(t *testing.T, opts service.Options, servers ...service.Server) trialRun {
	t.Helper()
	r := trialRun{run: newRun(t), undone: make(chan error), late: make(chan error, 1), denied: make(chan struct{})}
	r.end = trial.Begin(func(why error) bool {
		if !trial.IsOn() {
			r.late <- why
			<-r.denied
			return false
		}
		r.undone <- why
		r.undo()
		return true
	})
	t.Cleanup(func() { trial.Begin(func(error) bool { return false })(false) })
	r.run.run(r.upg, opts, servers...)
	return r
}

// undo does what the Upgrader does when the trial is undone.
func (r trialRun) undo() {
	r.upg.Stop()
	r.end(true)
}

// A question is asked by Options.Healthy.
type question struct {
	ctx context.Context
	err chan<- error
}

// healthy returns options with which the test answers.
func healthy() (opts service.Options, asked chan question) {
	opts, asked = quiet(), make(chan question)
	opts.Healthy = func(ctx context.Context) error {
		err := make(chan error)
		asked <- question{ctx, err}
		return <-err
	}
	return opts, asked
}

func TestHealthy(t *testing.T) {
	opts, asked := healthy()
	r := startOnTrial(t, opts)
	for range 2 {
		proctest.Within(t, "the question", asked).err <- nil
	}
	proctest.Within(t, "the question", asked).err <- errRefused
	proctest.WantError(t, "why the trial was undone", proctest.Within(t, "the end of the trial", r.undone), errRefused)
	proctest.WantError(t, "Run", r.returns(), errRefused)
}

// An answer that comes after the trial does not count.
func TestHealthyLate(t *testing.T) {
	opts, asked := healthy()
	r := startOnTrial(t, opts)
	q := proctest.Within(t, "the question", asked)
	r.end(false)
	proctest.Within(t, "the end of its context", q.ctx.Done())
	q.err <- errRefused
	proctest.WantError(t, "what is too late", proctest.Within(t, "the end of the trial", r.late), errRefused)
	r.upg.end()
	r.waits() // to learn that it is
	close(r.denied)
	proctest.OK(t, r.returns())
}

// It is not asked any more once the process is in charge, nor without a trial.
func TestHealthyInCharge(t *testing.T) {
	opts, asked := healthy()
	tried := startOnTrial(t, opts)
	q := proctest.Within(t, "the question", asked)
	tried.end(false)
	q.err <- nil
	r := startServers(t, opts)
	for _, r := range []*run{tried.run, r} {
		r.upg.end()
		proctest.OK(t, r.returns())
	}
	select {
	case <-asked:
		t.Error("a process in charge was asked")
	case <-time.After(50 * time.Millisecond): // Nothing shows that it is not.
	}
}

// Told to stop, a process on trial undoes that, and nobody else learns of it.
func TestStopOnTrial(t *testing.T) {
	opts, asked := healthy()
	opts.DrainDelay = time.Hour
	opts.Health = new(service.Health)
	opts.Stopping = func() { t.Error("the service stops") }
	r := startOnTrial(t, opts)
	proctest.Within(t, "the question, when Ready has returned", asked).err <- nil
	r.signal(syscall.SIGTERM)
	r.waits()
	wantHealth(t, opts.Health, http.StatusOK)
	if err := proctest.Within(t, "the end of the trial", r.undone); err != nil {
		t.Errorf("the trial was undone because of %v", err)
	}
	proctest.OK(t, r.returns())
	time.Sleep(50 * time.Millisecond) // Nothing shows that it stays healthy.
	wantHealth(t, opts.Health, http.StatusOK)
}

// A process on trial whose parent has died is stopped as one in charge.
func TestStopOrphanOnTrial(t *testing.T) {
	end := trial.Begin(func(error) bool { return false })
	t.Cleanup(func() { trial.Begin(func(error) bool { return false })(false) })
	opts, stops := quiet(), make(chan struct{})
	opts.Health = new(service.Health)
	opts.Stopping = func() { close(stops) }
	r := newRun(t)
	r.run(r.upg, opts)
	r.signal(syscall.SIGTERM)
	proctest.Within(t, "the call of Stopping", stops)
	wantHealth(t, opts.Health, http.StatusServiceUnavailable)
	end(false)
	proctest.OK(t, r.returns())
}

func wantHealth(t *testing.T, h *service.Health, want int) {
	t.Helper()
	recorder := httptest.NewRecorder()
	h.ServeHTTP(recorder, nil)
	if recorder.Code != want {
		t.Errorf("the health check is answered by %d, want %d", recorder.Code, want)
	}
	if got := recorder.Body.String(); (got == "ok\n") != (want == http.StatusOK) {
		t.Errorf("the health check is answered by %q", got)
	}
	if got := recorder.Header().Get("Cache-Control"); got != "no-store" {
		t.Errorf("the answer to a health check may be kept: %q", got)
	}
}

// The parent learns why a server has failed.
func TestServerFailsOnTrial(t *testing.T) {
	serve := func(net.Listener) error { return errBroken }
	r := startOnTrial(t, quiet(), service.Stream("tcp", "localhost:0", serve, nil))
	proctest.WantError(t, "why the trial was undone", proctest.Within(t, "the end of the trial", r.undone), errBroken)
	proctest.WantError(t, "Run", r.returns(), errBroken)
}

// A process on trial is upgraded once it is in charge.
func TestUpgradeOnTrial(t *testing.T) {
	r := startOnTrial(t, quiet())
	close(r.upg.parent)
	r.signal(syscall.SIGHUP)
	select {
	case <-r.upg.upgrades:
		t.Fatal("an upgrade has begun")
	case <-time.After(50 * time.Millisecond): // Nothing shows that it waits.
	}
	r.end(false)
	proctest.Within(t, "the upgrade", r.upg.upgrades)
	r.upg.outcomes <- errRefused
	r.run.end()
}

// What only one process may do is never done in one whose trial was undone.
func TestBackgroundOnTrial(t *testing.T) {
	for range 10 { // It may see the end of Run first.
		r := startOnTrial(t, quiet(), service.Background(func(context.Context) error {
			t.Error("it runs beside the parent")
			return nil
		}))
		close(r.upg.parent) // which has died
		r.waits()
		r.undo()
		proctest.OK(t, r.returns())
	}
}

// It drains as one that was replaced, because the service has not stopped.
func TestUndoneDrains(t *testing.T) {
	opts := quiet()
	opts.DrainTimeout = 10 * time.Millisecond
	opts.StopTimeout = time.Hour
	socket := filepath.Join(t.TempDir(), "socket")
	r := startOnTrial(t, opts, service.Stream("unix", socket, serveLines, nil))
	dialLines(t, "unix", socket)
	r.upg.Stop()
	r.waits() // until it is known how the trial has ended
	r.end(true)
	if err := r.returns(); err == nil || !strings.Contains(err.Error(), "10ms after its trial was undone") {
		t.Errorf("got %v, want the timeout", err)
	}
}

// What waits in the queue is the parent's, because this version may be unhealthy, or the
// successor's.
func TestTheQueueIsLeft(t *testing.T) {
	t.Run("undone", func(t *testing.T) {
		testTheQueueIsLeft(t, func(opts service.Options, server service.Server) (*run, func()) {
			r := startOnTrial(t, opts, server)
			return r.run, r.undo
		})
	})
	t.Run("replaced", func(t *testing.T) {
		testTheQueueIsLeft(t, func(opts service.Options, server service.Server) (*run, func()) {
			r := startServers(t, opts, server)
			return r, r.upg.end
		})
	})
}

func testTheQueueIsLeft(t *testing.T, start func(service.Options, service.Server) (r *run, leave func())) {
	opts, socket := quiet(), filepath.Join(t.TempDir(), "socket")
	opts.IdleGrace = proctest.Patience
	accepted, stuck, unstuck := 0, make(chan struct{}), make(chan struct{})
	r, leave := start(opts, service.HTTP(&http.Server{
		Addr: socket,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context { // no other is accepted meanwhile
			if accepted++; accepted == 2 {
				close(stuck)
				<-unstuck
			}
			return ctx
		},
	}))
	dial := func() net.Conn {
		conn := proctest.Opened[net.Conn](t)(net.Dial("unix", socket))
		conn.SetDeadline(time.Now().Add(proctest.Patience))
		return conn
	}
	ask := func(conn net.Conn) (*http.Response, error) {
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")
		return http.ReadResponse(bufio.NewReader(conn), nil)
	}
	first, second := dial(), dial()
	proctest.Within(t, "the second connection", stuck)
	waiting := dial()
	leave()
	proctest.AwaitThat(t, "the drain has begun", func() bool {
		response, err := ask(first)
		proctest.OK(t, err)
		io.Copy(io.Discard, response.Body)
		return response.Close
	})
	close(unstuck)
	if response, err := ask(waiting); err == nil {
		t.Errorf("answered with %s", response.Status)
	}
	second.Close()
	proctest.OK(t, r.returns())
}

// The control socket is the parent's.
func TestControlOnTrial(t *testing.T) {
	opts := quiet()
	opts.Control = filepath.Join(proctest.SocketDir(t), "ctl")
	r := startOnTrial(t, opts)
	asked := ask(t.Context(), opts.Control, "upgrade")
	select {
	case a := <-asked:
		t.Fatalf("on trial it answers %q", a.text)
	case <-time.After(50 * time.Millisecond): // Nothing shows that it waits.
	}
	r.end(false)
	wantAnswer(t, asked, http.StatusConflict, "the process before this one drains")
	r.run.end()
}

// Nothing is lost over trials that end in either way, and the old version serves on.
func TestTrialsUnderLoad(t *testing.T) {
	t.Parallel()
	directory := proctest.SocketDir(t)
	read, write, err := os.Pipe()
	proctest.OK(t, err)
	log := proctest.NewOutput(t)
	go log.Read(read)
	s, current := startService(t, directory, write, trialVariable+"=1h")
	write.Close()
	answered, end := startClients(t, directory)
	socket := filepath.Join(directory, "socket")
	some := func() {
		before := answered.Load()
		proctest.AwaitThat(t, "requests are answered", func() bool { return answered.Load() > before+20 })
	}

	// Unhealthy at first, and later.
	for _, late := range []bool{false, true} {
		var held []*load.Held
		unhealthy := filepath.Join(directory, "unhealthy")
		if !late {
			proctest.OK(t, os.WriteFile(unhealthy, nil, 0o600))
		}
		proctest.Kill(t, current.PID, syscall.SIGHUP)
		child := s.Next()
		if late {
			s.Await("healthy")
			held, err = load.Hold(socket, 4)
			proctest.OK(t, err)
			proctest.OK(t, os.WriteFile(unhealthy, nil, 0o600))
		}
		log.Await("upgrade failed", "not healthy: out of order")
		some()
		for _, h := range held {
			proctest.OK(t, h.Finish())
		}
		child.AwaitEnd()
		if pid := pidIn(directory); pid != current.PID {
			t.Errorf("process %d is in charge, want %d", pid, current.PID)
		}
		proctest.OK(t, os.Remove(unhealthy))
	}

	// Told to leave.
	proctest.Kill(t, current.PID, syscall.SIGHUP)
	child := s.Next()
	s.Await("healthy")
	some()
	proctest.Terminate(t, child.PID)
	log.Await("upgrade failed", "stopped during its trial")
	child.AwaitEnd()

	short := filepath.Join(directory, "short")
	proctest.OK(t, os.WriteFile(short, nil, 0o600))
	proctest.Kill(t, current.PID, syscall.SIGHUP)
	next := s.Next()
	awaitCharge(t, directory, next)
	current.AwaitEnd()
	some()
	end()
	proctest.Terminate(t, next.PID)
	next.AwaitEnd()
	proctest.OK(t, os.Remove(short))
}

// A stop ends both.
func TestStopDuringTrial(t *testing.T) {
	t.Parallel()
	directory := proctest.SocketDir(t)
	s, parent := startService(t, directory, nil, trialVariable+"=1h")
	proctest.Kill(t, parent.PID, syscall.SIGHUP)
	child := s.Next()
	s.Await("healthy")
	held, err := load.Hold(filepath.Join(directory, "socket"), 10)
	proctest.OK(t, err)
	proctest.Terminate(t, parent.PID)
	for _, h := range held {
		proctest.OK(t, h.Finish())
	}
	for _, p := range []*proctest.Process{parent, child} {
		p.AwaitEnd()
	}
	if left, err := os.ReadDir(directory); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
