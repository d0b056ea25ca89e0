// Command dns is a DNS server over UDP and TCP that is upgraded while it answers.
//
// It answers every TXT query with "version=VERSION pid=PID NAME". Flags and signals are
// those of the http example; -listen is the address for both.
//
// What is promised: an upgrade loses no query. Over UDP the queue is shared, and what a
// process has read it answers before it exits. Over TCP a connection stays with the process
// that accepted it until it has been silent for two seconds, however young it is. A client
// that sends the option edns-tcp-keepalive (RFC 7828) is told to leave by the next answer.
//
// What is not: a client without that option that never pauses keeps its connection until
// -drain has passed, and is cut then. A query that is sent in the very moment in which a
// silent connection is closed is lost, and repeated by its client (RFC 7766, section 6.2.4).
// When the service is stopped, what waits in the queues is lost.
//
// The Shutdown of a dns.Server is right for UDP. Over TCP it ends every read at once, so that
// it loses what connections are about to send, new ones too. Here the listener is closed,
// after which ActivateAndServe returns when the last connection has ended.
package main

import (
	"context"
	"flag"
	"log/slog"
	"net"
	"os"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/service"
	"github.com/miekg/dns"
)

// version is set by go build -ldflags '-X main.version=v2'.
var version = "dev"

func main() {
	listen := flag.String("listen", "localhost:8053", "`address` to serve on, UDP and TCP")
	pidFile := flag.String("pid-file", "", "`file` that holds the PID of the process in charge")
	drain := flag.Duration("drain", 30*time.Second, "how long TCP clients may stay before the process exits")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)).With("version", version, "pid", os.Getpid()))

	upg, err := tableflip.New(tableflip.Options{PIDFile: *pidFile, Logger: slog.Default()})
	if err == nil {
		udp, tcp := server(upg), server(upg)
		started := make(chan struct{})
		udp.NotifyStartedFunc = func() { close(started) }
		err = service.Run(upg, service.Options{DrainTimeout: *drain},
			service.Packet("udp", *listen, func(conn net.PacketConn) error {
				udp.PacketConn = conn
				return udp.ActivateAndServe()
			}, func(ctx context.Context) error {
				select {
				case <-started: // Before, Shutdown does nothing.
				case <-ctx.Done():
				}
				return udp.ShutdownContext(ctx)
			}),
			service.Stream("tcp", *listen, func(ln net.Listener) error {
				tcp.Listener = ln
				return tcp.ActivateAndServe()
			}, nil))
	}
	if err != nil {
		slog.Error("exiting", "error", err)
		os.Exit(1)
	}
}

const idle = 2 * time.Second

func server(upg service.Upgrader) *dns.Server {
	return &dns.Server{
		MaxTCPQueries: -1,
		ReadTimeout:   idle,
		IdleTimeout:   func() time.Duration { return idle },
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) {
			w.WriteMsg(answer(query, upg.Exit()))
		}),
	}
}
