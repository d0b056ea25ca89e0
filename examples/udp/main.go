// Command udp answers datagrams, and is upgraded without losing one.
//
// It sends each datagram back after "version=VERSION pid=PID ". Flags and signals are
// those of the http example.
//
// What is promised: an upgrade loses no datagram that has reached the socket. The socket
// and its queue are the same for all generations. What a process takes from the queue, it
// answers before it exits, and what it leaves, its successor takes.
//
// What is not: the answers' order, because during a handover two processes answer; and
// what UDP does not promise either, which is that datagrams arrive, or that the queue has
// room for them. From the moment that the old process stops reading to the moment that
// the new one starts it grows: at a high rate, enlarge it (net.UDPConn.SetReadBuffer).
// What is in the queue when the service is stopped for good is lost. An answer that would
// be larger than a datagram can be is not sent.
package main

import (
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
	listen := flag.String("listen", "localhost:8080", "UDP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long answers may take before the process exits")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		err = service.Run(upg, service.Options{DrainTimeout: *drain}, service.Packet("udp", *listen, serve, nil))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// workers is how many datagrams are worked on at once.
const workers = 4

// serve returns when no worker can read any more, because the process is to end or
// because reading fails. All that was taken from the queue has been answered then.
func serve(conn net.PacketConn) error {
	errs := make([]error, workers)
	var wait sync.WaitGroup
	for i := range workers {
		wait.Go(func() {
			errs[i] = answer(conn)
			conn.SetReadDeadline(time.Unix(1, 0)) // the others end, too
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// answer returns when a read fails, and why.
func answer(conn net.PacketConn) error {
	datagram := make([]byte, 64<<10)
	for {
		n, client, err := conn.ReadFrom(datagram)
		if err != nil {
			return err
		}
		reply := fmt.Appendf(nil, "version=%s pid=%d %s", version, os.Getpid(), datagram[:n])
		if _, err = conn.WriteTo(reply, client); err != nil {
			// The client's affair, or the network's: serve the others.
			slog.Warn("can't answer", "client", client.String(), "error", err)
		}
	}
}
