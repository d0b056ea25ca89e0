// JavaScript and WASI have no SIGHUP.

//go:build !js && !wasip1

// Command tcp is a line server that is upgraded while its clients stay connected.
//
// Each line that it gets it sends back after "version=VERSION pid=PID ". When the
// process is to end, after SIGHUP has started its successor or by SIGTERM or
// SIGINT, every client is sent the line "closing", once, between two answers.
// Flags and signals are those of the http example.
//
// What is promised: no connection is refused or reset because of an upgrade. A
// connection stays with the process that accepted it, and has all its lines
// answered, until the client closes it or half of it. A client that does so on
// "closing", and connects again for what it has not sent yet, loses nothing and
// waits for nothing.
//
// What is not: a client that is still there when -drain has passed is cut off.
// Its last line may then have no answer, and it cannot know whether that line was
// seen. So is one that sends nothing, or takes no answers, for five minutes.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"example.com/tableflip"
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
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer upg.Stop()
	handlers.Go(func() { handleSignals(upg, hangup, terminate) })

	ln, err := upg.Listen("tcp", listen)
	if err != nil {
		return err
	}
	slog.Info("listening", "addr", ln.Addr().String(), "upgraded", upg.HasParent())

	// Accepting comes after Ready: what a process accepts is lost if its parent
	// refuses it. Until then connections wait in the listener's queue, or are
	// served by the parent.
	if err := upg.Ready(); err != nil {
		return err
	}
	slog.Info("ready")

	srv := newServer()
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		srv.accept(ln)
	}()
	<-upg.Exit()
	// The successor accepts from the same queue, so that whoever is not accepted
	// here is accepted there.
	ln.Close()
	<-accepting
	return srv.drain(deadline)
}

// handleSignals returns once the process is to drain and no upgrade is under way.
func handleSignals(upg *tableflip.Upgrader, hangup, terminate <-chan os.Signal) {
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

// A server answers lines on the connections that it accepts.
type server struct {
	connections sync.WaitGroup

	leaving context.Context // done once clients are to leave
	askAll  context.CancelFunc
	over    context.Context // done once those who have not are cut off
	cutOff  context.CancelFunc
}

func newServer() *server {
	s := &server{}
	s.leaving, s.askAll = context.WithCancel(context.Background())
	s.over, s.cutOff = context.WithCancel(context.Background())
	return s
}

// accept returns when ln has been closed. No connection comes after it.
func (s *server) accept(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Too many open files, most likely: a reason to wait, not to go.
			slog.Warn("can't accept", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		s.connections.Go(func() { s.answer(conn) })
	}
}

const (
	maxLine  = 64 << 10
	patience = 5 * time.Minute
)

// answer returns when the client is done, silent for too long, or cut off.
func (s *server) answer(conn net.Conn) {
	defer conn.Close()
	forget := context.AfterFunc(s.leaving, func() {
		// net.Conn keeps it apart from an answer that is written meanwhile.
		fmt.Fprint(conn, "closing\n")
	})
	defer forget()
	spare := context.AfterFunc(s.over, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer spare()

	lines := bufio.NewReaderSize(conn, maxLine)
	for {
		conn.SetDeadline(time.Now().Add(patience))
		if s.over.Err() != nil {
			return // The line above may have undone the cut.
		}
		// What ends without a newline is not a line, and gets no answer.
		line, err := lines.ReadSlice('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(conn, "version=%s pid=%d %s", version, os.Getpid(), line); err != nil {
			return
		}
	}
}

// drain asks the clients to leave, and returns when they have, or when it has
// cut off those who have not before the deadline, which is an error.
func (s *server) drain(deadline time.Duration) error {
	slog.Info("draining", "deadline", deadline)
	began := time.Now()
	late := time.AfterFunc(deadline, s.cutOff)
	defer late.Stop()
	s.askAll()
	s.connections.Wait()
	if s.over.Err() != nil {
		return fmt.Errorf("clients did not leave in %v and were cut off", deadline)
	}
	slog.Info("drained", "took", time.Since(began))
	return nil
}
