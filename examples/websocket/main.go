// JavaScript and WASI have no SIGHUP.

//go:build !js && !wasip1

// Command websocket is an echo server that is upgraded while its clients stay
// connected.
//
// Each text message that it gets it sends back after "version=VERSION pid=PID ".
// Flags and signals are those of the http example.
//
// What is promised: no connection is refused or reset because of an upgrade. When
// the process is to end, it answers the message that it is handling on a connection,
// if there is one, and then sends a close frame: 1012 (service restart) after an
// upgrade, upon which the client can connect again at once; 1001 (going away) after
// SIGTERM or SIGINT, when it may find nobody there. A message that has no answer
// before that close frame has not been handled, and can be sent again.
//
// What is not: a client that does not answer the close frame in five seconds is cut
// off, and so are all whose messages are still being handled when -drain has
// passed. The latter get no close frame, and cannot know whether the message was
// handled.
//
// Package service runs an http.Server in one call, but WebSocket connections are
// hijacked, and a drain does not see hijacked connections. So this example drains them
// itself, with httpdrain.Drainer.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
	"github.com/coder/websocket"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "TCP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	deadline := flag.Duration("drain", 30*time.Second, "how long clients may stay before the process exits")
	flag.Parse()

	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))
	err := run(*listen, *pidFile, *deadline)
	if err != nil && !errors.Is(err, tableflip.ErrStopped) {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// run returns when the service has been drained. An ErrStopped means that it was
// stopped before it served.
func run(listen, pidFile string, deadline time.Duration) error {
	// Before all else: until then these signals end the process. There are two
	// channels so that no number of the one keeps out the other.
	hangup, terminate := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	signal.Notify(terminate, syscall.SIGTERM, os.Interrupt)

	upg, err := tableflip.New(tableflip.Options{PIDFile: pidFile, Logger: slog.Default()})
	if err != nil {
		return err
	}
	srv := newServer(echo)
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer upg.Stop()
	handlers.Go(func() { srv.handleSignals(upg, hangup, terminate) })

	ln, err := upg.Listen("tcp", listen)
	if err != nil {
		return err
	}
	slog.Info("listening", "addr", ln.Addr().String(), "upgraded", upg.HasParent())

	// Serve comes after Ready: what a process accepts is lost if its parent
	// refuses it. Until then connections wait in the listener's queue, or
	// are served by the parent.
	if err := upg.Ready(); err != nil {
		return err
	}
	slog.Info("ready")

	served := make(chan error, 1)
	go func() { served <- srv.drainer.Serve(ln) }()
	select {
	case err := <-served:
		return err
	case <-upg.Exit():
	}
	return srv.drain(deadline)
}

// A handler does all that a message causes, before it returns. An error closes the
// connection.
type handler func(ctx context.Context, conn *websocket.Conn, kind websocket.MessageType, message []byte) error

// echo answers messages: put your own in its place.
func echo(ctx context.Context, conn *websocket.Conn, kind websocket.MessageType, message []byte) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return conn.Write(ctx, kind, fmt.Appendf(nil, "version=%s pid=%d %s", version, os.Getpid(), message))
}

// patience is for a client to take an answer.
const patience = 10 * time.Second

// A server has messages handled, one at a time on each connection.
type server struct {
	handle  handler
	drainer *httpdrain.Drainer
	stopped atomic.Bool // rather than upgraded

	connections sync.WaitGroup  // the drainer does not know these
	over        context.Context // done once those that have not left are cut off
	cutOff      context.CancelFunc
}

func newServer(handle handler) *server {
	s := &server{handle: handle}
	s.over, s.cutOff = context.WithCancel(context.Background())
	s.drainer = httpdrain.New(&http.Server{
		Handler:           s,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	})
	return s
}

// handleSignals returns once the process is to drain and no upgrade is under way.
func (s *server) handleSignals(upg *tableflip.Upgrader, hangup, terminate <-chan os.Signal) {
	var upgrades sync.WaitGroup
	defer upgrades.Wait()
	for {
		select {
		case <-hangup:
			// Not here, so that the service can be stopped meanwhile.
			upgrades.Go(func() { upgrade(upg) })
		case sig := <-terminate:
			slog.Info("stopping", "signal", sig.String())
			if sig == os.Interrupt {
				signal.Reset(os.Interrupt)
			}
			s.stopped.Store(true)
			upg.Stop()
		case <-upg.Exit():
			go heedInterrupts(terminate)
			return
		}
	}
}

// heedInterrupts has the second SIGINT end a process that drains, whether it was
// stopped or replaced. Any number of SIGTERMs is one: supervisors send several.
func heedInterrupts(terminate <-chan os.Signal) {
	for sig := range terminate {
		if sig == os.Interrupt {
			signal.Reset(os.Interrupt)
		}
	}
}

func upgrade(upg *tableflip.Upgrader) {
	began := time.Now()
	if err := upg.Upgrade(); err != nil {
		slog.Error("upgrade failed", "error", err)
		return
	}
	slog.Info("upgrade succeeded", "took", time.Since(began))
}

// ServeHTTP makes a WebSocket of the connection, and returns when it is closed.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// Before Accept hijacks the connection, so that drain waits for it in one way
	// or the other.
	s.connections.Add(1)
	defer s.connections.Done()
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // Accept has told the client.
	}
	s.answer(conn)
}

// answer returns when conn is closed, by whomever.
func (s *server) answer(conn *websocket.Conn) {
	defer conn.CloseNow()
	var handling sync.Mutex // held while a message is
	leaving := false
	sayGoodbye := func() {
		handling.Lock()
		leaving = true
		handling.Unlock()
		conn.Close(s.goodbye()) // It waits for the client's answer.
	}
	defer context.AfterFunc(s.drainer.Context(), sayGoodbye)()
	for {
		kind, message, err := conn.Read(s.over)
		if err != nil {
			return
		}
		handling.Lock()
		if leaving {
			// It has crossed the close frame.
			handling.Unlock()
			continue
		}
		err = s.handle(s.over, conn, kind, message)
		handling.Unlock()
		if err != nil {
			return
		}
	}
}

func (s *server) goodbye() (code websocket.StatusCode, reason string) {
	if s.stopped.Load() {
		return websocket.StatusGoingAway, "the service stops"
	}
	return websocket.StatusServiceRestart, "connect again"
}

// drain has the clients leave, and returns when they have, or when it has cut off
// those who have not before the deadline, which is an error.
func (s *server) drain(deadline time.Duration) error {
	slog.Info("draining", "deadline", deadline)
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	defer context.AfterFunc(ctx, s.cutOff)()
	// It cancels Drainer.Context. After it, nobody comes any more.
	err := s.drainer.Shutdown(ctx)
	s.connections.Wait()
	if err != nil || s.over.Err() != nil {
		return fmt.Errorf("clients did not leave in %v and were cut off", deadline)
	}
	slog.Info("drained", "took", time.Since(began))
	return nil
}
