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
	"sync"
	"time"

	"example.com/tableflip"
)

// This file owns the life of the process: set-up, Ready, service, delay, drain.

// DefaultDrainTimeout is used if Options.DrainTimeout is zero or negative.
const DefaultDrainTimeout = 30 * time.Second

// hurryTimeout takes the place of DrainTimeout once the process that has replaced this
// one has died: nobody serves until a supervisor, which waits for this process, too,
// starts another.
const hurryTimeout = time.Second

// Options are the options of Run. The zero value is usable.
type Options struct {
	// DrainTimeout limits how long the process may take to finish its requests
	// once it has been replaced or stopped. What is left then is cut. If zero or
	// negative, DefaultDrainTimeout is used. A process whose successor crashes while it
	// drains has one more second, because a supervisor waits for its end before it
	// starts the service again.
	DrainTimeout time.Duration

	// DrainDelay is how long the process still accepts connections and serves after it
	// was told to stop, so that load balancers have the time to notice that Health
	// fails. DrainTimeout begins after it. A process that was replaced drains at once,
	// because its successor accepts on the same sockets. The zero value is right if
	// clients connect directly.
	DrainDelay time.Duration

	// Health, if not nil, fails as soon as the process is told to stop.
	Health *Health

	// IdleGrace is how long a connection must have been silent before the drain closes
	// it: see [httpdrain.Drainer]. If zero, [httpdrain.DefaultIdleGrace] is used.
	IdleGrace time.Duration

	// Logger receives records of upgrades and of the drain. If nil, slog.Default() is
	// used.
	Logger *slog.Logger
}

// Upgrader is the part of [tableflip.Upgrader] that Run uses. The stub in package
// tableflip/testing implements it, too.
type Upgrader interface {
	Listen(network, addr string) (net.Listener, error)
	Ready() error
	UpgradeContext(context.Context) error
	Exit() <-chan struct{}
	Replaced() bool
	Hurry() <-chan struct{}
	Stop()
}

var _ Upgrader = (*tableflip.Upgrader)(nil)

// Run listens on every server's Addr, reports that the process is ready, and serves.
// SIGHUP upgrades the process; SIGTERM and SIGINT (Ctrl-C) stop it. Once the process
// has been replaced or stopped, Run drains the servers, and returns when that is done.
//
// Further SIGTERMs change nothing, because supervisors send more than one in everyday
// use, also to processes that have been replaced. DrainTimeout limits the drain. The
// second SIGINT ends Run at once, and cuts what is in progress. Sending SIGINT to the
// process and its group, as timeout -s INT does, sends two.
//
// An Addr is HOST:PORT, as for net/http (":http" if it is empty, ":https" with TLS),
// or the path of a Unix socket, which begins with a slash. A server whose TLSConfig
// is not nil serves TLS, with the certificates that are in it. Run tries the set-up of
// each server, down to a TLS handshake in memory, before it reports that the process
// is ready: a new version that could not serve fails, and the old one goes on.
//
// An upgrade while the previous process still drains is refused
// (tableflip.ErrParentRunning), and only logged: send SIGHUP again once it has ended.
// A signal to stop cancels an upgrade.
//
// Handlers of long-lived responses (streams, server-sent events) end when upg.Exit is
// closed; the functions of Server.RegisterOnShutdown are called too late for that.
// Hijacked connections are not waited for.
//
// The error is nil if nothing went wrong and nothing was cut, also if a signal stopped
// the process before it was ready. Otherwise it says why the service could not start or
// go on, or wraps the [*httpdrain.CutError] of a drain that took too long. A failed
// upgrade is only logged, and Run goes on.
//
// Run stops upg. A program that calls upg.Stop itself has no DrainDelay. The servers
// cannot be used again.
func Run(upg Upgrader, opts Options, servers ...*http.Server) error {
	defer upg.Stop()
	logger := cmp.Or(opts.Logger, slog.Default())
	told := hear()
	defer told.forget()
	context.AfterFunc(told.stop, opts.Health.fail)

	fronts, err := start(upg, told, servers)
	if err != nil {
		for _, f := range fronts {
			f.ln.Close()
		}
		if told.stop.Err() != nil && errors.Is(err, tableflip.ErrStopped) {
			logger.Info("stopped before it was ready", "cause", context.Cause(told.stop))
			return nil
		}
		return err
	}
	logger.Info("ready", "pid", os.Getpid())
	opts.Health.succeed()

	failed := make(chan error, len(fronts))
	for _, f := range fronts {
		f.drainer.IdleGrace = opts.IdleGrace
		go func() {
			if err := f.serve(); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("service: serve on %s: %w", f.ln.Addr(), err)
			}
		}()
	}
	serveErr := untilExit(upg, told, logger, opts.DrainDelay, failed)

	logger.Info("draining")
	begin := time.Now()
	drainErr := drain(upg, told, opts.DrainTimeout, fronts)
	logger.Info("drained", "took", time.Since(begin), "error", drainErr)
	return errors.Join(serveErr, drainErr)
}

// start does all that can fail, and then calls Ready. The caller closes the listeners
// of what it returns with an error.
func start(upg Upgrader, told *orders, servers []*http.Server) ([]*front, error) {
	// Ready can take as long as the parent hesitates.
	release := context.AfterFunc(told.stop, upg.Stop)
	defer release()

	var fronts []*front
	for _, server := range servers {
		f, err := newFront(upg, server)
		if err != nil {
			return fronts, err
		}
		fronts = append(fronts, f)
	}
	return fronts, upg.Ready()
}

// untilExit upgrades the process until it is to exit, and stops it when it is told
// to, or when a server has failed, which is the error.
func untilExit(upg Upgrader, told *orders, logger *slog.Logger, delay time.Duration, failed <-chan error) error {
	stop := told.stop.Done()
	var delayed <-chan time.Time
	for {
		select {
		case <-upg.Exit():
			return nil
		case err := <-failed:
			upg.Stop()
			return err
		case <-told.upgrade:
			// Not here, so that the process can be stopped meanwhile.
			go upgrade(told.stop, upg, logger)
		case <-stop:
			logger.Info("stopping", "cause", context.Cause(told.stop), "delay", delay)
			stop, delayed = nil, time.After(delay)
		case <-delayed:
			upg.Stop()
			return nil
		case <-told.now.Done():
			upg.Stop()
			return nil
		}
	}
}

func upgrade(ctx context.Context, upg Upgrader, logger *slog.Logger) {
	begin := time.Now()
	if err := upg.UpgradeContext(ctx); err != nil {
		logger.Error("upgrade failed", "error", err)
		return
	}
	logger.Info("upgrade succeeded", "took", time.Since(begin))
}

// drain drains the servers side by side, until they are, the timeout has passed, or
// the process is told to end now.
func drain(upg Upgrader, told *orders, timeout time.Duration, fronts []*front) error {
	if timeout <= 0 {
		timeout = DefaultDrainTimeout
	}
	ctx, cancel := context.WithTimeoutCause(told.now, timeout,
		fmt.Errorf("service: not drained after %v", timeout))
	defer cancel()
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	go func() {
		select {
		case <-upg.Hurry():
			time.AfterFunc(hurryTimeout, func() {
				cut(fmt.Errorf("service: not drained %v after the new process has died", hurryTimeout))
			})
		case <-ctx.Done():
		}
	}()

	errs := make([]error, len(fronts))
	var wait sync.WaitGroup
	for i, f := range fronts {
		// The queue of the listener is the successor's.
		f.drainer.Replaced = upg.Replaced()
		wait.Go(func() { errs[i] = f.drainer.Shutdown(ctx) })
	}
	wait.Wait()
	return errors.Join(errs...)
}
