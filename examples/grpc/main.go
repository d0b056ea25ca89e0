// Command grpc is a gRPC server that is upgraded while calls are in progress.
//
// The service is grpc.testing.TestService, which comes with grpc-go: see calls.go, and put
// your own in its place. Flags and signals are those of the http example.
//
// What is promised, when an upgrade replaces the process:
//
//   - No connection is refused or reset. Its client is told to open no more calls on it
//     (GOAWAY), and is answered all that it has sent by then.
//   - Unary calls and uploads are served to their end. A stream that would go on for ever is
//     ended between two messages, with the status ABORTED. A message that has no answer by
//     then has not been processed, and can be sent again on a new stream.
//   - A health check (Watch) is ended with CANCELLED, and never hears NOT_SERVING: the
//     service does serve.
//
// SIGTERM and SIGINT do the same, except that health checks hear NOT_SERVING first, for the
// time of -delay, and that connections that wait in the listener's queue are reset.
//
// What is not: calls that are still in progress when -drain has passed are cut off. Their
// clients get UNAVAILABLE, and cannot know what was processed.
package main

import (
	"flag"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8080", "TCP `address` to serve on")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long calls may take to end before the process exits")
	delay := flag.Duration("delay", 0, "how long to serve on when told to stop, for load balancers that poll health checks")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		srv := newServer(&door{TransportCredentials: insecure.NewCredentials()})
		opts := service.Options{DrainTimeout: *drain, DrainDelay: *delay, Stopping: srv.checks.Shutdown}
		err = service.Run(upg, opts, service.Stream("tcp", *listen, srv.serve, nil))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

// headStart is for clients to get the GOAWAY before their streams end, because they would
// open the next ones on the old connection. They would lose nothing by it.
const headStart = 100 * time.Millisecond

// serve returns when ln has been closed, and then all connections have come to their end.
func (s *server) serve(ln net.Listener) error {
	s.door.Listener = ln
	err := s.grpc.Serve(s.door)
	s.door.entering.Wait()
	defer time.AfterFunc(headStart, s.endStreams).Stop()
	s.grpc.GracefulStop()
	return err
}

// A door is the listener and the security of a server. It counts the connections that have
// been accepted and that the server has not begun to serve: these it would close without a
// word once GracefulStop has been called.
type door struct {
	net.Listener
	credentials.TransportCredentials
	entering sync.WaitGroup
}

func (d *door) Accept() (net.Conn, error) {
	conn, err := d.Listener.Accept()
	if err == nil {
		d.entering.Add(1)
	}
	return conn, err
}

// ServerHandshake is the first that the server calls with a connection.
func (d *door) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	d.entering.Done()
	return d.TransportCredentials.ServerHandshake(conn)
}
