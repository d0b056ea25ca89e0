// Command several is a service with all kinds of servers: HTTP with a health check, a line
// protocol over TCP, datagrams, and a job that only one process may do. They are ready,
// upgraded, drained and stopped together. Flags and signals are those of the http example.
//
// What is promised is what the examples http, tcp, udp and queue promise, of each. The drain
// takes as long as that of the slowest, and the next upgrade and the job of the new process
// wait for it. A server that fails ends the service, and the others drain.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "`address` of the HTTP server")
	lines := flag.String("lines", "localhost:0", "`address` of the line server")
	datagrams := flag.String("datagrams", "localhost:0", "`address` of the UDP server")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long all may take to end after an upgrade")
	delay := flag.Duration("delay", 0, "how long to serve on when told to stop, until load balancers have noticed")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		health := new(service.Health)
		mux := http.NewServeMux()
		mux.Handle("/health", health)
		mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, answer()) })
		opts := service.Options{DrainTimeout: *drain, StopTimeout: 5 * time.Second, DrainDelay: *delay, Health: health}
		err = service.Run(upg, opts,
			service.HTTP(&http.Server{Addr: *listen, Handler: mux}),
			service.Stream("tcp", *lines, serveLines, nil),
			service.Packet("udp", *datagrams, serveDatagrams, nil),
			service.Background(job))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

func answer() string { return fmt.Sprintf("version=%s pid=%d", version, os.Getpid()) }

// serveLines answers one line on each connection.
func serveLines(ln net.Listener) error {
	var connections sync.WaitGroup
	defer connections.Wait()
	for {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		connections.Go(func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
				fmt.Fprintln(conn, answer(), line)
			}
		})
	}
}

func serveDatagrams(conn net.PacketConn) error {
	for datagram := make([]byte, 64<<10); ; {
		n, client, err := conn.ReadFrom(datagram)
		if err != nil {
			return err
		}
		// An error is the client's affair, or the network's.
		conn.WriteTo(fmt.Appendln(nil, answer(), string(datagram[:n])), client)
	}
}

// job is what only one process may do, such as a timetable.
func job(ctx context.Context) error {
	slog.Info("job begins")
	<-ctx.Done()
	slog.Info("job ends")
	return nil
}
