// JavaScript and WASI have no SIGHUP.

//go:build !js && !wasip1

// Command http is a web server that is upgraded while it serves.
//
//	go build -ldflags '-X main.version=v1' -o server ./examples/http
//	./server -listen localhost:8080 -pid-file server.pid
//
// and, in another terminal,
//
//	go build -ldflags '-X main.version=v2' -o server.new ./examples/http
//	mv server.new server
//	kill -HUP "$(cat server.pid)"
//
// SIGHUP starts the binary that is at its path now, in this process's place.
// SIGTERM and SIGINT stop the service: it answers all that arrives on connections
// that it has accepted, for as long as -drain says, and exits with status 0 if
// that was everything. A second SIGINT ends the process at once, also one that was
// replaced; a second SIGTERM changes nothing.
//
// It shows the parts by hand. Package service does the same in one call.
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
	"syscall"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "TCP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	deadline := flag.Duration("drain", 30*time.Second, "how long requests may take to end before the process exits")
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

	srv := &http.Server{
		Handler:           http.HandlerFunc(answer),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	drainer := httpdrain.New(srv)

	// Serve comes after Ready: what a process accepts is lost if its parent
	// refuses it. Until then connections wait in the listener's queue, or
	// are served by the parent.
	if err := upg.Ready(); err != nil {
		return err
	}
	slog.Info("ready")

	served := make(chan error, 1)
	go func() { served <- drainer.Serve(ln) }()
	select {
	case err := <-served:
		return err
	case <-upg.Exit():
	}
	return drain(drainer, deadline)
}

func answer(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintf(w, "version=%s pid=%d\n", version, os.Getpid())
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

// drain answers what has been accepted, and returns when that is done, or the
// deadline has passed, which is an error. New connections are not affected: after
// an upgrade they wait in the queue that this process shares with the new one.
func drain(drainer *httpdrain.Drainer, deadline time.Duration) error {
	slog.Info("draining", "deadline", deadline)
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := drainer.Shutdown(ctx); err != nil {
		return fmt.Errorf("requests did not end in %v: %w", deadline, err)
	}
	slog.Info("drained", "took", time.Since(began))
	return nil
}
