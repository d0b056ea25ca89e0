// Command tcp is a line server that is upgraded while its clients stay connected.
//
// Each line that it gets it sends back after "version=VERSION pid=PID ". When the
// process is to end, after SIGHUP has started its successor or by SIGTERM or SIGINT,
// every client is sent the line "closing", once, between two answers. Flags and signals
// are those of the http example.
//
// What is promised: no connection is refused or reset because of an upgrade. A connection
// stays with the process that accepted it, and has all its lines answered, until the
// client closes it or half of it. A client that does so on "closing", and connects again
// for what it has not sent yet, loses nothing and waits for nothing.
//
// What is not: a client that is still there when -drain has passed is cut off. Its last
// line may then have no answer, and it cannot know whether that line was seen. So is one
// that sends nothing, or takes no answers, for five minutes. When the service is stopped,
// connections that wait in the listener's queue are reset.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "TCP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long clients may stay before the process exits")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		serve := func(ln net.Listener) error { return serve(ln, upg.Exit()) }
		err = service.Run(upg, service.Options{DrainTimeout: *drain}, service.Stream("tcp", *listen, serve, nil))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// serve returns when ln has been closed, and then all connections.
func serve(ln net.Listener, exit <-chan struct{}) error {
	var connections sync.WaitGroup
	defer connections.Wait()
	for {
		conn, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return err
		} else if err != nil {
			// Too many open files, most likely: a reason to wait, not to go.
			slog.Warn("can't accept", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		done := make(chan struct{})
		connections.Go(func() {
			defer close(done)
			answer(conn)
		})
		go func() {
			select {
			case <-exit:
				// net.Conn keeps it apart from an answer that is written meanwhile.
				fmt.Fprint(conn, "closing\n")
			case <-done:
			}
		}()
	}
}

// answer returns when the client is done, or silent for too long.
func answer(conn net.Conn) {
	defer conn.Close()
	for lines := bufio.NewReaderSize(conn, 64<<10); ; {
		conn.SetDeadline(time.Now().Add(5 * time.Minute))
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
