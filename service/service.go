// Package service runs net/http servers that are upgraded and stopped by signals
// without losing a request. It puts the parts together that most services need:
// package tableflip for the upgrade, package httpdrain for the end of the old
// process, and the signals.
package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/httpdrain"
)

// DefaultDrainTimeout is used if Options.DrainTimeout is zero.
const DefaultDrainTimeout = 30 * time.Second

// Options are the options of Run. The zero value is usable.
type Options struct {
	// DrainTimeout is how long the process may take to finish its requests once
	// it has been replaced or stopped. What is left then is cut. Zero, and less,
	// means DefaultDrainTimeout.
	DrainTimeout time.Duration

	// IdleGrace is how long a connection must have been silent until the drain
	// closes it: see httpdrain.Drainer. Zero means httpdrain.DefaultIdleGrace.
	IdleGrace time.Duration

	// Logger is told of upgrades, and of the drain. Nil means slog.Default().
	Logger *slog.Logger
}

// Upgrader is what Run needs of a *tableflip.Upgrader. The stub in package
// tableflip/testing has it too.
type Upgrader interface {
	Listen(network, addr string) (net.Listener, error)
	Ready() error
	Upgrade() error
	Exit() <-chan struct{}
	Stop()
}

var _ Upgrader = (*tableflip.Upgrader)(nil)

// Run listens on every server's Addr, says that the process is ready, and serves.
// From then on, SIGHUP upgrades the process, and SIGTERM and SIGINT (Ctrl-C) stop
// it. Once it has been replaced or stopped, Run drains the servers, and returns
// when that is done; a second SIGTERM or SIGINT ends it at once.
//
// An Addr is HOST:PORT, as for net/http (":http" if it is empty, ":https" with TLS),
// or the path of a Unix socket, which begins with a slash. A server whose TLSConfig
// is not nil serves TLS, with the certificates that are in it.
//
// An upgrade while the previous process still drains is refused
// (tableflip.ErrParentRunning), and only logged: send SIGHUP again once it has ended.
//
// Handlers of long-lived responses (streams, server-sent events) end when upg.Exit is
// closed; the functions of Server.RegisterOnShutdown are called too late for that.
// Hijacked connections are not waited for. A sender that signals the process and its
// group, as timeout(1) does, has sent two signals.
//
// The error is nil if nothing went wrong and nothing was cut. Otherwise it says
// why the service could not start or go on, or wraps the *httpdrain.CutError of a
// drain that took too long. A failed upgrade is logged, and is no reason to return.
//
// Run stops upg. The servers cannot be used again.
func Run(upg Upgrader, opts Options, servers ...*http.Server) error {
	defer upg.Stop()
	logger := cmp.Or(opts.Logger, slog.Default())

	// Before Ready, so that no signal ends the process in between.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, hangup, syscall.SIGTERM, os.Interrupt)
	defer signal.Stop(signals)

	listeners, err := listen(upg, servers)
	if err != nil {
		return err
	}
	failed := make(chan error, len(servers))
	exit := make(chan error, 1)
	var stopped bool // by a signal
	go func() {
		var err error
		stopped, err = untilExit(upg, logger, signals, failed)
		exit <- err
	}()

	if err := upg.Ready(); err != nil {
		upg.Stop()
		<-exit
		closeAll(listeners)
		return err
	}
	logger.Info("ready", "pid", os.Getpid())
	drains := make([]*httpdrain.Drainer, len(servers))
	for i, server := range servers {
		drains[i] = httpdrain.New(server)
		drains[i].IdleGrace = opts.IdleGrace
		go func() {
			if err := serve(drains[i], server, listeners[i]); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("service: serve on %s: %w", listeners[i].Addr(), err)
			}
		}()
	}
	serveErr := <-exit

	logger.Info("draining")
	begin := time.Now()
	drainErr := drain(drains, opts.DrainTimeout, signals, stopped)
	logger.Info("drained", "took", time.Since(begin), "error", drainErr)
	return errors.Join(serveErr, drainErr)
}

// listen returns a listener for each server, or none.
func listen(upg Upgrader, servers []*http.Server) ([]net.Listener, error) {
	var listeners []net.Listener
	for _, server := range servers {
		network, addr := "tcp", server.Addr
		switch {
		case strings.HasPrefix(addr, "/"):
			network = "unix"
		case addr == "" && server.TLSConfig != nil:
			addr = ":https"
		case addr == "":
			addr = ":http"
		}
		ln, err := upg.Listen(network, addr)
		if err != nil {
			closeAll(listeners)
			return nil, err
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

func closeAll(listeners []net.Listener) {
	for _, ln := range listeners {
		ln.Close()
	}
}

func serve(drainer *httpdrain.Drainer, server *http.Server, ln net.Listener) error {
	if server.TLSConfig != nil {
		return drainer.ServeTLS(ln, "", "")
	}
	return drainer.Serve(ln)
}

// untilExit obeys signals until the process is to exit, and reports whether one of
// them said so. If a server failed, it stops the process and returns why.
func untilExit(upg Upgrader, logger *slog.Logger, signals <-chan os.Signal, failed <-chan error) (stopped bool, err error) {
	for {
		select {
		case <-upg.Exit():
			return false, nil
		case err := <-failed:
			upg.Stop()
			return false, err
		case sig := <-signals:
			if sig != hangup {
				logger.Info("stopping", "signal", sig.String())
				upg.Stop()
				return true, nil
			}
			// Not here, so that a signal to stop is heard meanwhile.
			go upgrade(upg, logger)
		}
	}
}

func upgrade(upg Upgrader, logger *slog.Logger) {
	begin := time.Now()
	if err := upg.Upgrade(); err != nil {
		logger.Error("upgrade failed", "error", err)
		return
	}
	logger.Info("upgrade succeeded", "took", time.Since(begin))
}

// drain drains the servers side by side, until they are, the timeout has passed, or
// a signal to stop arrives that is not the first: a supervisor that stops the
// service also tells the process that was just replaced.
func drain(drains []*httpdrain.Drainer, timeout time.Duration, signals <-chan os.Signal, stopped bool) error {
	if timeout <= 0 {
		timeout = DefaultDrainTimeout
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), timeout,
		fmt.Errorf("service: not drained after %v", timeout))
	defer cancel()
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	go func() {
		for {
			select {
			case sig := <-signals:
				if sig == hangup {
					continue
				}
				if stopped {
					cut(fmt.Errorf("service: %v during the drain", sig))
					return
				}
				stopped = true
			case <-ctx.Done():
				return
			}
		}
	}()

	errs := make([]error, len(drains))
	var wait sync.WaitGroup
	for i, drainer := range drains {
		wait.Go(func() { errs[i] = drainer.Shutdown(ctx) })
	}
	wait.Wait()
	return errors.Join(errs...)
}
