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
// With -control server.ctl it can be asked for an upgrade, whose outcome it then tells:
//
//	./server -control server.ctl -ctl upgrade # or rehearse, status, stop, events
//
// What is promised: no request is lost because of an upgrade. A connection stays with the
// process that accepted it, which answers what comes on it, and tells its client to
// connect anew. When the service is stopped, it answers what it has accepted.
//
// What is not: requests that take longer than -drain are cut, and the exit status is 1. A
// client that is silent for five seconds and then sends a request in the very moment in
// which the connection is closed loses it: see package httpdrain.
//
// SIGHUP starts the binary that is at its path now, in this process's place. SIGTERM and
// SIGINT stop the service. A second SIGINT ends a process at once, also one that was
// replaced; a second SIGTERM changes nothing. Where there are no upgrades, as on Windows,
// it serves without.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/control"
	"example.com/tableflip/service"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "`address` to serve on, or the path of a Unix socket")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long requests may take to end before the process exits")
	socket := flag.String("control", "", "`path` of the control socket, if there is to be one")
	ask := flag.String("ctl", "", "`question` for the server at that control socket: upgrade, rehearse, status, stop or events")
	flag.Parse()
	if *ask != "" {
		os.Exit(control.Main("-s", *socket, *ask))
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil || errors.Is(err, tableflip.ErrNotSupported) {
		err = service.Run(upg, service.Options{DrainTimeout: *drain, Control: *socket}, service.HTTP(&http.Server{
			Addr:              *listen,
			Handler:           http.HandlerFunc(answer),
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       30 * time.Second,
			WriteTimeout:      30 * time.Second,
			IdleTimeout:       2 * time.Minute,
			ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
		}))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

func answer(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintf(w, "version=%s pid=%d\n", version, os.Getpid())
}
