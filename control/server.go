package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/trial"
)

// This file owns the life of the socket: claimed or created before Ready, served while
// this process is in charge, and kept after that until its answers have been delivered.

const (
	// headerTimeout is for clients that connect and ask nothing, or half of it.
	headerTimeout = 5 * time.Second

	// writeTimeout is for clients that do not read.
	writeTimeout = 5 * time.Second

	// drainInterval is how often a draining process tells how many connections it has.
	drainInterval = time.Second
)

// closeTimeout is how long Close waits for clients that ask nothing, or do not read. It
// is a variable for tests.
var closeTimeout = time.Second

// Options are the options of New. The zero value is usable.
type Options struct {
	// Logger, if not nil, receives warnings: a socket that could not be had, errors of
	// clients.
	Logger *slog.Logger

	// Connections, if not nil, returns how many connections this process has. The status
	// says so, and the events of a drain.
	Connections func() int

	// Cut, if not nil, is called by Close, and returns how many connections the drain has
	// cut, for the counters.
	Cut func() int
}

// Upgrader is the part of [tableflip.Upgrader] that a Server uses. The stub in package
// tableflip/testing implements it, too. A program that has more to do for an upgrade, or
// to stop, gives New an Upgrader with methods of its own.
type Upgrader interface {
	ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error)
	File(name string) (*os.File, error)
	AddFile(name string, file *os.File) error
	RemoveFile(name string) error
	HasParent() bool
	WaitForParent(context.Context) error
	UpgradeContext(context.Context) error
	Rehearse(context.Context) error
	Generations() []tableflip.Generation
	Exit() <-chan struct{}
	Replaced() bool
	Stop()
}

var _ Upgrader = (*tableflip.Upgrader)(nil)

// A Server answers at the control socket of this process. Its methods are safe for
// concurrent use.
type Server struct {
	upg     Upgrader
	opts    Options
	ln      *listener // nil if the socket could not be had
	http    *http.Server
	history *history
	relay   relay
	close   func()

	mu      sync.Mutex
	serving sync.WaitGroup // Add is called under mu
	closing chan struct{}  // closed under mu
}

// New claims the socket at path from the parent process, or creates it, with mode 0600.
// Call it before Ready, and Serve after it. The process should call Close before it
// ends. Generations also find each other by a file in the registry,
// "tableflip/control", so a program that calls Files must call New first.
//
// In a process that was started by an upgrade, New only logs that it could not have the
// socket, and returns a Server that serves nobody: an upgrade does not fail because of
// its control socket.
func New(upg Upgrader, path string, opts Options) (*Server, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{upg: upg, opts: opts, closing: make(chan struct{})}
	s.relay = relay{connections: make(map[int]int), came: make(chan struct{}), left: make(chan struct{})}
	s.close = sync.OnceFunc(s.shutDown)
	s.http = &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		ErrorLog:          slog.NewLogLogger(opts.Logger.Handler(), slog.LevelWarn),
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	// A kept connection would stay with this process after an upgrade.
	s.http.SetKeepAlivesEnabled(false)

	ln, err := upg.ListenWithCallback("unix", path, listen)
	switch {
	case err == nil:
		s.ln = newListener(ln)
	case upg.HasParent():
		opts.Logger.Error("control: no control socket: the service goes on without one", "path", path, "error", err)
	default:
		return nil, fmt.Errorf("control: %w", err)
	}
	s.join()
	self, _ := s.generations()
	s.history = remember(self.Number)
	return s, nil
}

// Serve serves until the Exit of the Upgrader is closed, or Close is called. Call it
// once, after Ready has returned nil: what a child accepts before is lost if its parent
// refuses it. In a process on trial (Options.Trial of package tableflip), Serve begins when
// that is in charge, because only the process in charge answers.
func (s *Server) Serve() {
	if !s.awaitCharge() {
		return
	}
	if !s.beginServing() {
		return
	}
	defer s.serving.Done()
	s.hear()
	s.serving.Go(s.leave)
	if s.ln == nil {
		return
	}
	if err := s.http.Serve(s.ln); !errors.Is(err, net.ErrClosed) {
		s.opts.Logger.Error("control: the control socket is not served any more", "error", err)
	}
}

// awaitCharge reports whether this process is in charge, or has been, or may be until
// Close was called.
func (s *Server) awaitCharge() bool {
	select {
	case <-trial.Ended():
	case <-s.closing:
	}
	return !trial.WasUndone()
}

// beginServing reports whether Close was not called before.
func (s *Server) beginServing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.closing:
		return false
	default:
		s.serving.Add(1)
		return true
	}
}

// leave has the successor alone accept, once there is one, and then tells how the drain
// goes on.
func (s *Server) leave() {
	select {
	case <-s.upg.Exit():
		s.stopAccepting()
		s.tellDrain()
	case <-s.closing:
	}
}

func (s *Server) stopAccepting() {
	if s.ln != nil {
		s.ln.Close()
	}
}

// Close ends the streams of events, and waits until those who have asked have their
// answers: the answer to who asked for an upgrade comes from the process that was
// replaced. It takes two seconds at most, after which it cuts them. Call it when the drain
// has ended. Further calls wait for the first.
func (s *Server) Close() { s.close() }

func (s *Server) shutDown() {
	s.mu.Lock()
	close(s.closing)
	s.mu.Unlock()
	s.stopAccepting()
	s.serving.Wait() // until the successor was told how the drain has ended
	s.history.close()
	if s.relay.meeting != nil {
		_ = s.relay.meeting.Close()
		s.relay.dropAll()
	}
	if s.ln == nil {
		return
	}
	// Not by Server.Shutdown, which drops what has been asked and not been read yet.
	deadline := time.After(closeTimeout)
	for range maxConns {
		select {
		case s.ln.places <- struct{}{}:
		case <-deadline:
			s.opts.Logger.Warn("control: clients are cut that have asked nothing, or not read their answers", "waited", closeTimeout)
			_ = s.http.Close()
			return
		}
	}
}
