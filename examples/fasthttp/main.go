// Command fasthttp is a web server with github.com/valyala/fasthttp that is upgraded while
// it serves. Flags and signals are those of the http example.
//
// What is promised: no request is lost because of an upgrade. A connection stays with the
// process that accepted it, which answers what comes on it, and tells its client to connect
// anew by "Connection: close".
//
// What is not: requests that take longer than -drain are cut. A client that has been silent
// for five seconds, and then sends a request in the very moment in which the connection is
// closed, loses it. When the service is stopped, connections that wait in the listener's
// queue are reset. Hijacked connections are not waited for.
//
// The Shutdown of a fasthttp.Server closes silent connections at once, and loses what is on
// its way to them. Here the listener is closed, and the connections are waited for: those
// that are silent end by IdleTimeout.
package main

import (
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	"github.com/valyala/fasthttp"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "TCP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long requests may take to end before the process exits")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		server := &fasthttp.Server{
			Handler:      leaving(upg.Exit(), answer),
			ReadTimeout:  idle,
			IdleTimeout:  idle,
			WriteTimeout: 30 * time.Second,
		}
		serve := func(ln net.Listener) error { return serve(server, ln) }
		err = service.Run(upg, service.Options{DrainTimeout: *drain}, service.Stream("tcp", *listen, serve, nil))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// idle is how long a connection may be silent, and so the least that a drain takes if one is.
const idle = 5 * time.Second

// serve returns when ln has been closed, and then all connections.
func serve(server *fasthttp.Server, ln net.Listener) error {
	err := server.Serve(ln)
	// While Serve runs, it counts as an open connection, for which this accounts.
	for server.GetOpenConnectionsCount() >= 0 {
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

// leaving has clients told to leave once the process is to exit.
func leaving(exit <-chan struct{}, handle fasthttp.RequestHandler) fasthttp.RequestHandler {
	return func(ctx *fasthttp.RequestCtx) {
		handle(ctx)
		select {
		case <-exit:
			ctx.SetConnectionClose()
		default:
		}
	}
}

func answer(ctx *fasthttp.RequestCtx) {
	fmt.Fprintf(ctx, "version=%s pid=%d\n", version, os.Getpid())
}
