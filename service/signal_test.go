//go:build unix

package service_test

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/service"
	stub "example.com/tableflip/testing"
)

func newStub(t *testing.T) *stub.Upgrader {
	t.Helper()
	upg, err := stub.New()
	proctest.OK(t, err)
	return upg
}

// replaceable can be replaced, which a stub cannot.
type replaceable struct {
	*stub.Upgrader
	exit     chan struct{}
	end      func() // closes exit
	hurry    chan struct{}
	parent   chan struct{}        // closed when the predecessor has ended
	early    chan context.Context // of upgrades that were refused because of it
	upgrades chan context.Context // of others
	outcomes chan error           // of upgrades
	started  func()               // called once Run has what it needs
	serving  chan struct{}        // closed by started
}

func (upg replaceable) Exit() <-chan struct{} { return upg.exit }

func (upg replaceable) Replaced() bool {
	return proctest.IsClosed(upg.exit) && !proctest.IsClosed(upg.Upgrader.Exit())
}

func (upg replaceable) Hurry() <-chan struct{} { return upg.hurry }

func (upg replaceable) Stop() {
	upg.Upgrader.Stop()
	upg.end()
}

func (upg replaceable) UpgradeContext(ctx context.Context) error {
	if !proctest.IsClosed(upg.parent) {
		upg.early <- ctx
		return tableflip.ErrParentRunning
	}
	upg.upgrades <- ctx
	select {
	case err := <-upg.outcomes:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Rehearse ends as an upgrade does.
func (upg replaceable) Rehearse(ctx context.Context) error { return upg.UpgradeContext(ctx) }

func (upg replaceable) WaitForParent(ctx context.Context) error {
	upg.started()
	select {
	case <-upg.parent:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A run is a call of service.Run in this process.
type run struct {
	t      *testing.T
	upg    replaceable
	socket string
	ran    chan error
	heard  chan os.Signal
}

// startRun runs a server, and returns when it is ready.
func startRun(t *testing.T, opts service.Options, server *http.Server) *run {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	server.Addr = cmp.Or(server.Addr, socket)
	r := startServers(t, opts, service.HTTP(server))
	r.socket = socket
	return r
}

// startServers runs servers in a process without a predecessor.
func startServers(t *testing.T, opts service.Options, servers ...service.Server) *run {
	t.Helper()
	r := startBesideParent(t, opts, servers...)
	close(r.upg.parent)
	return r
}

func startBesideParent(t *testing.T, opts service.Options, servers ...service.Server) *run {
	t.Helper()
	r := newRun(t)
	r.run(r.upg, opts, servers...)
	return r
}

func newRun(t *testing.T) *run {
	exit, serving := make(chan struct{}), make(chan struct{})
	return &run{
		t: t,
		upg: replaceable{
			Upgrader: newStub(t),
			exit:     exit,
			end:      sync.OnceFunc(func() { close(exit) }),
			hurry:    make(chan struct{}),
			parent:   make(chan struct{}),
			early:    make(chan context.Context, 10),
			upgrades: make(chan context.Context, 1),
			outcomes: make(chan error),
			started:  sync.OnceFunc(func() { close(serving) }),
			serving:  serving,
		},
		ran:   make(chan error, 1),
		heard: hearSignals(t),
	}
}

// hearSignals has the test hear all signals, too, so that none ends it.
func hearSignals(t *testing.T) chan os.Signal {
	heard := make(chan os.Signal, 10)
	signal.Notify(heard, syscall.SIGHUP, syscall.SIGUSR2, syscall.SIGTERM, os.Interrupt)
	t.Cleanup(func() { signal.Stop(heard) })
	return heard
}

// run returns when the servers are ready.
func (r *run) run(upg service.Upgrader, opts service.Options, servers ...service.Server) {
	r.t.Helper()
	go func() { r.ran <- service.Run(upg, opts, servers...) }()
	select {
	case <-r.upg.serving:
	case err := <-r.ran:
		r.t.Fatal(err)
	}
}

// signal returns when this process has got a signal, Run in particular.
func (r *run) signal(sig syscall.Signal) {
	r.t.Helper()
	proctest.OK(r.t, syscall.Kill(os.Getpid(), sig))
	if got := <-r.heard; got != sig {
		r.t.Fatalf("heard %v, sent %v", got, sig)
	}
	signal.Stop(nil) // returns when package signal has told all channels
}

func (r *run) accepts() bool {
	conn, err := net.Dial("unix", r.socket)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// A conversation is a request that goes on as long as the test says: the handler
// answers each line of its body.
type conversation struct {
	t     *testing.T
	conn  net.Conn
	lines *bufio.Reader
}

func converse(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	control.EnableFullDuplex()
	lines := bufio.NewScanner(r.Body)
	for lines.Scan() {
		w.Write([]byte(lines.Text() + "\n"))
		control.Flush()
	}
}

// begin returns when the handler has got the request.
func (r *run) begin() *conversation {
	r.t.Helper()
	conn, err := net.Dial("unix", r.socket)
	proctest.OK(r.t, err)
	r.t.Cleanup(func() { conn.Close() })
	// An HTTP/1.0 response ends with its connection, and has no chunks.
	head := "POST / HTTP/1.0\r\nHost: service\r\nContent-Length: 1000\r\n\r\n"
	c := &conversation{r.t, conn, bufio.NewReader(conn)}
	if _, err := conn.Write([]byte(head)); err != nil {
		r.t.Fatal(err)
	}
	conn.Write([]byte("hello\n"))
	response, err := http.ReadResponse(c.lines, httptest.NewRequest(http.MethodPost, "/", nil))
	proctest.OK(r.t, err)
	c.lines = bufio.NewReader(response.Body)
	if line, err := c.lines.ReadString('\n'); line != "hello\n" {
		r.t.Fatalf("got %q, %v", line, err)
	}
	return c
}

// goesOn checks that the request is being answered.
func (c *conversation) goesOn() {
	c.t.Helper()
	c.conn.SetDeadline(time.Now().Add(proctest.Patience))
	if _, err := c.conn.Write([]byte("still\n")); err != nil {
		c.t.Fatal(err)
	}
	if line, err := c.lines.ReadString('\n'); line != "still\n" {
		c.t.Fatalf("got %q, %v", line, err)
	}
}

// end ends the request.
func (c *conversation) end() { c.conn.(*net.UnixConn).CloseWrite() }

// returns waits for the end of Run.
func (r *run) returns() error {
	r.t.Helper()
	return proctest.Within(r.t, "the end of Run", r.ran)
}

// isCutBy waits until a drain has been cut, and checks why.
func (r *run) isCutBy(cause string) {
	r.t.Helper()
	var cut *httpdrain.CutError
	if err := r.returns(); !errors.As(err, &cut) || !strings.Contains(cut.Cause.Error(), cause) {
		r.t.Fatalf("got %v, want a cut because %q", err, cause)
	}
}

func conversations() *http.Server { return &http.Server{Handler: http.HandlerFunc(converse)} }

// systemd sends several in everyday units.
func TestTermsAreOne(t *testing.T) {
	for name, end := range map[string]func(*run){
		"replaced": func(r *run) { r.upg.end() },
		"stopped":  func(r *run) { r.signal(syscall.SIGTERM) },
	} {
		t.Run(name, func(t *testing.T) {
			r := startRun(t, quiet(), conversations())
			request := r.begin()
			end(r)
			proctest.AwaitThat(t, "it accepts no more", func() bool { return !r.accepts() })
			for range 20 {
				r.signal(syscall.SIGTERM)
				request.goesOn()
			}
			request.end()
			if err := r.returns(); err != nil {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestInterruptTwiceIsNow(t *testing.T) {
	for name, end := range map[string]func(*run){
		"replaced": func(r *run) {
			r.upg.end()
			proctest.AwaitThat(r.t, "it accepts no more", func() bool { return !r.accepts() })
			r.signal(syscall.SIGTERM)
			r.signal(syscall.SIGINT)
		},
		"stopped": func(r *run) {
			r.signal(syscall.SIGINT)
			proctest.AwaitThat(r.t, "it accepts no more", func() bool { return !r.accepts() })
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := startRun(t, quiet(), conversations())
			request := r.begin()
			end(r)
			for range 20 {
				request.goesOn()
			}
			r.signal(syscall.SIGINT)
			r.isCutBy("interrupted twice")
		})
	}
}

func TestDrainTimeoutCuts(t *testing.T) {
	opts := quiet()
	opts.DrainTimeout = time.Millisecond
	r := startRun(t, opts, conversations())
	r.begin()
	r.signal(syscall.SIGTERM)
	r.isCutBy("not drained 1ms after it was stopped")
}

// inMemory listens within the process.
type inMemory struct {
	replaceable
	conns  chan net.Conn
	closed chan struct{}
	once   func() // closes closed
}

func (upg inMemory) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "unix"} }

func (upg inMemory) Listen(string, string) (net.Listener, error) { return upg, nil }

func (upg inMemory) Accept() (net.Conn, error) {
	select {
	case conn := <-upg.conns:
		return conn, nil
	case <-upg.closed:
		return nil, net.ErrClosed
	}
}

func (upg inMemory) Close() error { upg.once(); return nil }

// The clock of this test stands still while anybody computes.
func TestIdleGrace(t *testing.T) {
	hearSignals(t) // or package signal would begin to in the bubble
	synctest.Test(t, func(t *testing.T) {
		r := newRun(t)
		closed := make(chan struct{})
		upg := inMemory{r.upg, make(chan net.Conn), closed, sync.OnceFunc(func() { close(closed) })}
		close(upg.parent)
		opts := quiet()
		opts.IdleGrace = time.Minute
		opts.DrainTimeout = time.Hour
		r.run(upg, opts, service.HTTP(conversations()))
		client, server := net.Pipe()
		upg.conns <- server
		io.WriteString(client, "GET / HTTP/1.1\r\nHost: service\r\n\r\n")
		response, err := http.ReadResponse(bufio.NewReader(client), nil)
		proctest.OK(t, err)
		response.Body.Close()
		began := time.Now()
		upg.end()
		if _, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read %v, want the connection's end", err)
		}
		// What is no socket can't be asked whether a request has come, and is given time.
		const more = 10 * time.Millisecond
		if took := time.Since(began); took < opts.IdleGrace || took > opts.IdleGrace+more {
			t.Errorf("an idle connection is closed after %v, want %v, or %v more", took, opts.IdleGrace, more)
		}
		proctest.OK(t, <-r.ran)
	})
}

// No supervisor starts the service again before the old process has ended.
func TestDrainHurries(t *testing.T) {
	r := startRun(t, quiet(), conversations())
	request := r.begin()
	r.upg.end()
	proctest.AwaitThat(t, "it accepts no more", func() bool { return !r.accepts() })
	request.goesOn()
	close(r.upg.hurry)
	r.isCutBy("told to hurry")
}

// pausedUpgrader is told to stop before it is ready.
type pausedUpgrader struct {
	*stub.Upgrader
	stop func()
}

func (upg pausedUpgrader) Ready() error {
	upg.stop()
	<-upg.Exit()
	return upg.Upgrader.Ready()
}

func TestTermBeforeReady(t *testing.T) {
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, syscall.SIGTERM)
	defer signal.Stop(heard)
	upg := pausedUpgrader{newStub(t), func() { syscall.Kill(os.Getpid(), syscall.SIGTERM) }}
	opts := quiet()
	opts.DrainDelay = time.Hour // it serves nobody who would have to look away
	r := &run{t: t, ran: make(chan error, 1)}
	go func() { r.ran <- service.Run(upg, opts, service.HTTP(&http.Server{Addr: "localhost:0"})) }()
	if err := r.returns(); err != nil {
		t.Errorf("got %v", err)
	}
}

// Another error than that of the stop is an error.
func TestTermAndErrorBeforeReady(t *testing.T) {
	hearSignals(t)
	upg := brokenByTerm{newStub(t)}
	r := &run{t: t, ran: make(chan error, 1)}
	go func() { r.ran <- service.Run(upg, quiet(), service.HTTP(&http.Server{Addr: "localhost:0"})) }()
	proctest.WantError(t, "Run", r.returns(), errBroken)
}

// brokenByTerm fails when it is told to stop before it is ready.
type brokenByTerm struct{ *stub.Upgrader }

func (upg brokenByTerm) Ready() error {
	syscall.Kill(os.Getpid(), syscall.SIGTERM)
	<-upg.Exit()
	return errBroken
}

func (r *run) get(path string) (status int) {
	r.t.Helper()
	client := unixClient(filepath.Dir(r.socket), false)
	response, err := client.Get("http://service" + path)
	proctest.OK(r.t, err)
	response.Body.Close()
	return response.StatusCode
}

// delayed is a server with a health check.
func delayed(t *testing.T, delay time.Duration) *run {
	opts := quiet()
	opts.DrainDelay, opts.Health, opts.IdleGrace = delay, new(service.Health), proctest.Patience
	mux := http.NewServeMux()
	mux.Handle("/health", opts.Health)
	mux.HandleFunc("/", converse)
	recorder := httptest.NewRecorder()
	opts.Health.ServeHTTP(recorder, nil)
	if recorder.Code != http.StatusServiceUnavailable {
		t.Errorf("status %d before it is ready", recorder.Code)
	}
	r := startRun(t, opts, &http.Server{Handler: mux})
	proctest.AwaitThat(t, "it is healthy", func() bool { return r.get("/health") == http.StatusOK })
	return r
}

func TestHealthFailsFirst(t *testing.T) {
	r := delayed(t, time.Hour)
	r.signal(syscall.SIGTERM)
	proctest.AwaitThat(t, "it is not healthy", func() bool { return r.get("/health") == http.StatusServiceUnavailable })
	// It serves on, whatever comes, until it is to end now.
	request := r.begin()
	for range 20 {
		r.signal(syscall.SIGTERM)
		if status := r.get("/"); status != http.StatusOK {
			t.Errorf("status %d", status)
		}
		select {
		case <-r.upg.exit:
			t.Fatal("it was stopped without a delay")
		default:
		}
	}
	r.signal(syscall.SIGINT)
	request.goesOn()
	r.signal(syscall.SIGINT)
	r.isCutBy("interrupted twice")
}

// The address is as healthy as before.
func TestHealthOfTheReplaced(t *testing.T) {
	r := delayed(t, time.Hour)
	kept, err := net.Dial("unix", r.socket)
	proctest.OK(t, err)
	defer kept.Close()
	request := r.begin()
	r.upg.end()
	proctest.AwaitThat(t, "it drains without a delay", func() bool { return !r.accepts() })
	proctest.OK(t, httptest.NewRequest(http.MethodGet, "/health", nil).Write(kept))
	response, err := http.ReadResponse(bufio.NewReader(kept), nil)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Errorf("got %v, %v", response, err)
	}
	request.end()
	if err := r.returns(); err != nil {
		t.Error(err)
	}
}

// Unless it is told to stop, too, as when the whole service is.
func TestHealthOfTheReplacedThatStops(t *testing.T) {
	opts := quiet()
	opts.Health = new(service.Health)
	r := startRun(t, opts, conversations())
	request := r.begin()
	r.upg.end()
	proctest.AwaitThat(t, "it accepts no more", func() bool { return !r.accepts() })
	wantHealth(t, opts.Health, http.StatusOK)
	r.signal(syscall.SIGTERM)
	proctest.AwaitThat(t, "it is not healthy", func() bool {
		recorder := httptest.NewRecorder()
		opts.Health.ServeHTTP(recorder, nil)
		return recorder.Code == http.StatusServiceUnavailable
	})
	request.end()
	proctest.OK(t, r.returns())
}

func TestDelayEnds(t *testing.T) {
	const delay = 10 * time.Millisecond
	r := delayed(t, delay)
	began := time.Now()
	r.signal(syscall.SIGTERM)
	<-r.upg.exit
	if took := time.Since(began); took < delay {
		t.Errorf("it was stopped after %v", took)
	}
	r.signal(syscall.SIGINT) // the clients of before are not all gone
	r.signal(syscall.SIGINT)
	<-r.ran
}

// The delay begins when the hook has returned.
func TestStopping(t *testing.T) {
	called, release := make(chan struct{}, 10), make(chan struct{})
	opts := quiet()
	opts.Stopping = func() { called <- struct{}{}; <-release }
	r := startRun(t, opts, conversations())
	for range 3 {
		r.signal(syscall.SIGTERM)
	}
	proctest.Within(t, "Stopping", called)
	for range 20 {
		r.begin().end()
		if proctest.IsClosed(r.upg.exit) {
			t.Fatal("it was stopped before Stopping had returned")
		}
	}
	close(release)
	proctest.OK(t, r.returns())
	if len(called) > 0 {
		t.Errorf("called %d more times", len(called))
	}
}

func TestStoppingThatHangs(t *testing.T) {
	called := make(chan struct{})
	opts := quiet()
	opts.Stopping = func() { close(called); select {} }
	r := startServers(t, opts)
	r.signal(syscall.SIGINT)
	proctest.Within(t, "Stopping", called)
	r.signal(syscall.SIGINT)
	proctest.OK(t, r.returns())
}

// It may have been replaced just before Run sees that it was told to stop.
func TestStoppingOfTheJustReplaced(t *testing.T) {
	opts := quiet()
	opts.Stopping = func() { t.Error("called") }
	r := newRun(t)
	close(r.upg.parent)
	r.run(justReplaced{r.upg}, opts)
	r.signal(syscall.SIGTERM)
	proctest.OK(t, r.returns())
}

type justReplaced struct{ replaceable }

func (justReplaced) Replaced() bool { return true }

// The service goes on.
func TestStoppingOfTheReplaced(t *testing.T) {
	opts := quiet()
	opts.Stopping = func() { t.Error("called") }
	r := startRun(t, opts, conversations())
	request := r.begin()
	r.upg.end()
	proctest.AwaitThat(t, "it accepts no more", func() bool { return !r.accepts() })
	for range 3 {
		r.signal(syscall.SIGTERM)
		request.goesOn()
	}
	request.end()
	proctest.OK(t, r.returns())
}

// A new process would not know that the service is to stop.
func TestTermCancelsUpgrade(t *testing.T) {
	r := delayed(t, time.Hour)
	r.signal(syscall.SIGHUP)
	upgrade := <-r.upg.upgrades
	r.signal(syscall.SIGTERM)
	proctest.Within(t, "the end of the upgrade", upgrade.Done())
	r.upg.end()
	if err := r.returns(); err != nil {
		t.Error(err)
	}
}
