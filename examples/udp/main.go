// JavaScript and WASI have no SIGHUP.

//go:build !js && !wasip1

// Command udp answers datagrams, and is upgraded without losing one.
//
// It sends each datagram back after "version=VERSION pid=PID ". Flags and signals
// are those of the http example.
//
// What is promised: an upgrade loses no datagram that has reached the socket. The
// socket and its queue are the same for all generations. What a process takes
// from the queue, it answers before it exits, and what it leaves, its successor
// takes.
//
// What is not: the order of the answers, because two processes answer during a
// handover; and what UDP does not promise either, that datagrams arrive and that the
// queue has room for them. From the moment that the old process stops reading to
// the moment that the new one starts it grows: at a high rate, enlarge it
// (net.UDPConn.SetReadBuffer). What is in the queue when the service is stopped
// for good is lost. An answer that would be larger than a datagram can be is not
// sent.
package main

import (
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
	deadline := flag.Duration("drain", 30*time.Second, "how long answers may take before the process exits")
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

	conn, err := upg.ListenPacket("udp", listen)
	if err != nil {
		return err
	}
	defer conn.Close()
	slog.Info("listening", "addr", conn.LocalAddr().String(), "upgraded", upg.HasParent())

	// Reading comes after Ready: what a process takes from the queue is lost if
	// its parent refuses it.
	if err := upg.Ready(); err != nil {
		return err
	}
	slog.Info("ready")

	served := make(chan error, 1)
	go func() { served <- serve(conn) }()
	select {
	case err := <-served:
		return err
	case <-upg.Exit():
	}
	return drain(conn, served, deadline)
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

// workers is how many datagrams are worked on at once.
const workers = 4

// serve answers datagrams until the read deadline has passed, or reading fails.
// When it returns, all that was taken from the queue has been answered.
func serve(conn net.PacketConn) error {
	results := make(chan error)
	for range workers {
		go func() { results <- answer(conn) }()
	}
	var err error
	for range workers {
		if failure := <-results; failure != nil {
			err = failure
			conn.SetReadDeadline(time.Unix(1, 0)) // the other workers end too
		}
	}
	return err
}

func answer(conn net.PacketConn) error {
	datagram := make([]byte, 64<<10)
	for {
		n, client, err := conn.ReadFrom(datagram)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		reply := fmt.Appendf(nil, "version=%s pid=%d %s", version, os.Getpid(), datagram[:n])
		_, err = conn.WriteTo(reply, client)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err != nil {
			// The client's affair, or the network's: serve the others.
			slog.Warn("can't answer", "client", client.String(), "error", err)
		}
	}
}

// drain answers what has been taken from the queue and takes no more. It returns
// when that is done. A datagram that is not answered by the deadline is an error.
//
// It does not close the packet conn to stop the readers, because a worker that has a
// datagram by then could not answer it. A deadline is this process's own: it does
// not stop the successor, with which the socket is shared, and a read that has
// taken a datagram returns it, however late.
func drain(conn net.PacketConn, served <-chan error, deadline time.Duration) error {
	slog.Info("draining", "deadline", deadline)
	began := time.Now()
	if err := conn.SetWriteDeadline(began.Add(deadline)); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	if err := <-served; err != nil {
		return err
	}
	slog.Info("drained", "took", time.Since(began))
	return nil
}
