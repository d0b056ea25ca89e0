// Package service runs the servers of a process that is upgraded and stopped by signals
// without losing a request. It puts the parts together that most services need: package
// tableflip for the upgrade, package httpdrain for the end of HTTP in the old process,
// the signals, the deadlines, and what only one process may do at a time.
package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/control"
	"example.com/tableflip/httpdrain"
	"example.com/tableflip/internal/queue"
	"example.com/tableflip/internal/trial"
	stub "example.com/tableflip/testing"
)

// This file owns the life of the process: set-up, Ready, service, delay, drain. What a
// server is to it is server.go's, what signals say orders.go's.

// DefaultDrainTimeout is used if Options.DrainTimeout is zero or negative.
const DefaultDrainTimeout = 30 * time.Second

// hurryTimeout takes the place of DrainTimeout once this process should hurry: because
// its place is needed, or because the process that has replaced it has died, and nobody
// serves until a supervisor, which waits for this process, too, starts another.
const hurryTimeout = time.Second

// Options are the options of Run. The zero value is usable.
type Options struct {
	// UpgradeSignals are the signals that upgrade the process. If there are none, it is
	// SIGHUP.
	UpgradeSignals []os.Signal

	// BeforeUpgrade, if not nil, is called before each upgrade and each rehearsal, for
	// example to check the new configuration or the new binary. If it returns an error,
	// no new process is started. Its context ends when the process is told to stop. An
	// upgrade that is refused because earlier processes drain is tried again later, and
	// BeforeUpgrade is called again.
	BeforeUpgrade func(context.Context) error

	// UpgradeFailed, if not nil, is called with the error of an upgrade that failed, or
	// that BeforeUpgrade has refused. The process goes on. It is not called for an
	// upgrade that is tried again later, nor for a rehearsal.
	UpgradeFailed func(error)

	// Healthy, if not nil, is asked in a new process while that is on trial, as the Trial of
	// [tableflip.Options] has it: once it serves, and again a second after each answer. If it
	// returns an error, the trial is undone. The parent's UpgradeContext then returns the
	// reason, with which its UpgradeFailed is called, and this process drains, and Run returns
	// the error. The context ends when the trial does, which waits for no answer, and after
	// that an answer does not count. So Trial must be longer than Healthy takes to find out.
	// Healthy may also watch until then, and return nil. It is called neither in a process in
	// charge nor without a trial.
	Healthy func(context.Context) error

	// DrainTimeout limits how long the process may take to finish its requests
	// once it has been replaced or stopped, or its trial was undone. What is left then is
	// cut. If zero or negative, DefaultDrainTimeout is used. A process whose successor
	// crashes while it drains has one more second, because a supervisor waits for its end
	// before it starts the service again. So has one whose place is needed by an upgrade,
	// because more processes drain than the MaxDraining of [tableflip.Options] allows.
	DrainTimeout time.Duration

	// StopTimeout, if positive, takes the place of DrainTimeout once the process was told
	// to stop, also if it has been replaced before and drains. So a process that was
	// replaced may have hours, and a stop need not take longer than a supervisor waits.
	StopTimeout time.Duration

	// DrainDelay is how long the process still accepts connections and serves after it
	// was told to stop, so that load balancers have the time to notice that Health
	// fails. The timeouts begin after it. A process that was replaced, or whose trial was
	// undone, drains at once, because another accepts on the same sockets. If zero or
	// negative, the drain begins at once. That suits services whose clients connect
	// directly.
	DrainDelay time.Duration

	// Health, if not nil, fails as soon as the process is told to stop.
	Health *Health

	// Stopping, if not nil, is called when the process in charge is told to stop.
	// DrainDelay begins when it returns, which should be soon. It is for health checks
	// that are not HTTP's, such as gRPC's, and for registries of services. It is not
	// called in a process that was replaced, or is on trial, because the service goes on.
	Stopping func()

	// IdleGrace is how long a connection of an HTTP server must have been silent before
	// the drain closes it: see [httpdrain.Drainer]. If zero,
	// [httpdrain.DefaultIdleGrace] is used.
	IdleGrace time.Duration

	// WaitHijacked has the drain of HTTP servers wait for hijacked connections
	// (WebSocket): see [httpdrain.Drainer].
	WaitHijacked bool

	// Control, if not empty, is the path of a Unix socket at which the process can be
	// asked for an upgrade, its status and more: see package control. The Upgrader must
	// implement [control.Upgrader], as that of package tableflip does. Without an
	// Upgrader the socket is there, too, and answers that upgrades are not supported.
	Control string

	// Logger receives records of upgrades and of the drain. If nil, slog.Default() is
	// used.
	Logger *slog.Logger
}

// Upgrader is the part of [tableflip.Upgrader] that Run uses. The stub in package
// tableflip/testing implements it, too.
type Upgrader interface {
	Listen(network, addr string) (net.Listener, error)
	ListenPacket(network, addr string) (net.PacketConn, error)
	Ready() error
	WaitForParent(context.Context) error
	UpgradeContext(context.Context) error
	Exit() <-chan struct{}
	Replaced() bool
	Hurry() <-chan struct{}
	Stop()
}

var _ Upgrader = (*tableflip.Upgrader)(nil)

// Run listens on every server's address, reports that the process is ready, and serves.
// SIGHUP upgrades the process; SIGTERM and SIGINT (Ctrl-C) stop it. Once the process
// has been replaced or stopped, Run drains the servers side by side, and returns when
// that is done. [HTTP], [Stream], [Packet] and [Background] make servers.
//
// Further SIGTERMs change nothing, because supervisors send more than one in everyday
// use, also to processes that have been replaced. The timeouts limit the drain. The
// second SIGINT ends Run at once, and cuts what is in progress. Sending SIGINT to the
// process and its group, as timeout -s INT does, sends two.
//
// A signal to upgrade that comes while an upgrade is under way, or while earlier processes
// still drain, is remembered, at most once, and obeyed when that has ended, by the new
// process if the upgrade has succeeded. If the MaxDraining of [tableflip.Options] is
// positive, earlier processes may drain, and the upgrade itself waits if there are too
// many. A signal to stop cancels an upgrade. A failed upgrade is logged, and Run goes on.
//
// If upg is nil, as it is where tableflip.New returns [tableflip.ErrNotSupported], Run
// serves without upgrades, and logs that.
//
// The error is nil if nothing went wrong and nothing was cut, also if a signal stopped
// the process before it was ready. Otherwise it says why the service could not start or
// go on, or what the drain has cut: an [*httpdrain.CutError] of an HTTP server, or what a
// server's own shutdown has returned. The program must then exit, because what was cut
// may still be running.
//
// Run stops upg. A program that calls upg.Stop itself has no DrainDelay. If the service
// cannot start, or a server fails on trial, the parent's Upgrade returns the reason. The
// servers cannot be used again.
func Run(upg Upgrader, opts Options, servers ...Server) error {
	opts.Logger = cmp.Or(opts.Logger, slog.Default())
	if u, ok := upg.(*tableflip.Upgrader); upg == nil || ok && u == nil {
		opts.Logger.Warn("there is no Upgrader: this process can't be upgraded")
		upg = cannotUpgrade()
	}
	p := &process{
		upg:    upg,
		opts:   opts,
		told:   hear(opts.UpgradeSignals, opts.Logger),
		asked:  queue.Asked(),
		failed: make(chan error, len(servers)),
		asks:   make(chan ask),
	}
	defer p.upg.Stop()
	defer p.told.forget()
	defer p.closeControl() // last, because whoever has asked for an upgrade waits for the answer
	context.AfterFunc(p.told.stop, func() {
		<-trial.Ended()
		if !trial.WasUndone() { // or the parent serves
			opts.Health.fail()
		}
	})

	if err := p.start(servers); err != nil {
		if p.told.stop.Err() != nil && errors.Is(err, tableflip.ErrStopped) {
			opts.Logger.Info("stopped before it was ready", "cause", context.Cause(p.told.stop))
			return nil
		}
		p.fail(err)
		return err
	}
	opts.Logger.Info("ready", "pid", os.Getpid())
	opts.Health.succeed()

	p.serve()
	go p.checkHealth()
	if p.untilExit() && p.upg.Replaced() {
		// The signal that came during the upgrade may be about a binary that is newer
		// than the one that was started.
		queue.Keep()
		opts.Logger.Info("upgrade passed on")
	}

	<-trial.Ended() // now that Exit is closed

	opts.Logger.Info("draining")
	begin := time.Now()
	err := errors.Join(p.whyUndone(), p.drain())
	opts.Logger.Info("drained", "took", time.Since(begin), "error", err)
	return err
}

// A process is this one, from Run's begin to its end.
type process struct {
	upg    Upgrader
	opts   Options // Logger is not nil
	told   *orders
	asked  <-chan struct{} // an upgrade of the predecessor, which it has passed on
	fronts []*front
	failed chan error // of each server that has failed
	asks   chan ask

	undoing   sync.Mutex // held while the trial of this process is undone for want of health
	unhealthy error      // why it was

	control  *control.Server // nil if there is none
	cut      atomic.Int64    // connections, by the drain
	upgrades sync.WaitGroup
}

// cannotUpgrade is for platforms without upgrades.
func cannotUpgrade() Upgrader {
	upg, _ := stub.New() // Its error is always nil.
	return upg
}

// start does all that can fail, and then calls Ready. If it fails, it closes what it has
// opened.
func (p *process) start(servers []Server) (err error) {
	// Ready can take as long as the parent hesitates.
	release := context.AfterFunc(p.told.stop, p.upg.Stop)
	defer release()
	defer func() {
		if err != nil {
			for _, f := range p.fronts {
				if f.close != nil {
					f.close()
				}
			}
		}
	}()

	for _, server := range servers {
		f, err := server.open(p)
		if err != nil {
			return err
		}
		f.ended = make(chan struct{})
		p.fronts = append(p.fronts, f)
	}
	if err := p.openControl(); err != nil {
		return err
	}
	return p.upg.Ready()
}

// fail tells the parent, if there is one, why this process cannot take over.
func (p *process) fail(err error) {
	if upg, ok := p.upg.(interface{ Fail(error) }); ok {
		upg.Fail(err)
	}
}

// healthInterval is the time between an answer of Options.Healthy and the next question.
const healthInterval = time.Second

// checkHealth undoes the trial that this process is on, if it is, when it is not healthy.
func (p *process) checkHealth() {
	if p.opts.Healthy == nil || !trial.IsOn() {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-trial.Ended()
		cancel()
	}()
	for ctx.Err() == nil {
		if err := p.opts.Healthy(ctx); err != nil {
			p.undo(fmt.Errorf("service: not healthy: %w", err))
			return
		}
		select {
		case <-time.After(healthInterval):
		case <-ctx.Done():
		}
	}
}

// undo undoes the trial of this process, unless that has ended.
func (p *process) undo(unhealthy error) {
	p.undoing.Lock()
	defer p.undoing.Unlock()
	if trial.Undo(unhealthy) {
		p.unhealthy = unhealthy
	}
}

// whyUndone returns the error of Options.Healthy for which the trial of this process was
// undone, or nil. Call it once Exit is closed: undo, which may have done that, is waited for.
func (p *process) whyUndone() error {
	p.undoing.Lock()
	defer p.undoing.Unlock()
	return p.unhealthy
}

func (p *process) serve() {
	if p.control != nil {
		go p.control.Serve()
	}
	for _, f := range p.fronts {
		go func() {
			f.run(p.upg.Exit())
			if f.err != nil {
				p.failed <- f.err
			}
		}()
	}
}

// untilExit upgrades the process until it is to exit, and stops it when it is told
// to, or when a server has failed. It reports whether another upgrade is wanted.
func (p *process) untilExit() (wanted bool) {
	// What takes its time is done outside of this goroutine, so that the process can be
	// stopped.
	alone, delayed := make(chan struct{}), make(chan struct{})
	go func() {
		if p.upg.WaitForParent(p.told.stop) == nil {
			close(alone)
		}
	}()
	trying, tried := false, make(chan bool, 1)
	begin := func(try func() (tooEarly bool)) {
		trying = true
		p.upgrades.Go(func() { tried <- try() })
	}
	want := func() {
		wanted = true
		if trying {
			p.opts.Logger.Info("upgrade queued")
			go queue.Keep() // which a service manager can hold up
		}
	}
	var retry <-chan struct{} // alone if an upgrade is remembered that was too early
	stop, untried := p.told.stop.Done(), trial.Ended()
	for {
		// After the end it is for the new process.
		if wanted && untried == nil && !trying && !hasEnded(p.upg) {
			wanted, retry = false, nil
			begin(func() bool { return isTooEarly(p.upgrade(queue.Keeping(p.told.stop))) })
		}
		select {
		case <-untried:
			untried = nil
		case <-p.upg.Exit():
			return wanted || len(p.told.upgrade) > 0 || len(p.asked) > 0
		case err := <-p.failed:
			if !trial.Undo(err) {
				p.upg.Stop()
			}
		case <-p.told.upgrade:
			want()
		case <-p.asked:
			want()
		case <-retry:
			wanted, retry = true, nil
		case a := <-p.asks:
			if trying {
				a.result <- tableflip.ErrUpgradeInProgress
			} else {
				begin(func() bool { a.result <- a.try(a.ctx); return false })
			}
		case tooEarly := <-tried:
			trying = false
			if tooEarly {
				retry = alone
			}
		case <-stop:
			p.opts.Logger.Info("stopping", "cause", context.Cause(p.told.stop), "delay", p.opts.DrainDelay)
			stop = nil
			if !trial.Undo(nil) {
				p.opts.Health.fail() // of an orphan that is about to take charge
				go p.delay(delayed)
			}
		case <-delayed:
			p.upg.Stop()
		case <-p.told.now.Done():
			p.upg.Stop()
		}
	}
}

func hasEnded(upg Upgrader) bool {
	select {
	case <-upg.Exit():
		return true
	default:
		return false
	}
}

// delay has those who send clients here look away, and closes delayed when they have had
// the time.
func (p *process) delay(delayed chan<- struct{}) {
	if p.opts.Stopping != nil && !p.upg.Replaced() {
		p.opts.Stopping()
	}
	time.AfterFunc(p.opts.DrainDelay, func() { close(delayed) })
}

// isTooEarly reports whether an upgrade was refused because earlier processes drain, and
// did not itself wait for them.
func isTooEarly(err error) bool {
	return errors.Is(err, tableflip.ErrParentRunning) && !errors.Is(err, os.ErrDeadlineExceeded)
}

// upgrade returns when the process has been replaced, or has not and logged why.
func (p *process) upgrade(ctx context.Context) error {
	begin := time.Now()
	err := p.afterCheck(ctx, p.upg.UpgradeContext)
	switch {
	case err == nil:
		p.opts.Logger.Info("upgrade succeeded", "took", time.Since(begin))
	case queue.IsKept(ctx) && isTooEarly(err):
		p.opts.Logger.Info("upgrade queued")
	default:
		p.opts.Logger.Error("upgrade failed", "error", err)
		if p.opts.UpgradeFailed != nil {
			p.opts.UpgradeFailed(err)
		}
	}
	return err
}

// afterCheck tries what BeforeUpgrade does not refuse.
func (p *process) afterCheck(ctx context.Context, try func(context.Context) error) error {
	if p.opts.BeforeUpgrade != nil {
		if err := p.opts.BeforeUpgrade(ctx); err != nil {
			return err
		}
	}
	return try(ctx)
}

// drain drains the servers side by side, until they are, the time is over, or the
// process is told to end now.
func (p *process) drain() error {
	var passing sync.WaitGroup
	defer passing.Wait() // nothing is passed on when Run has returned
	ctx, cut := context.WithCancelCause(p.told.now)
	defer cut(nil)
	go p.limitDrain(ctx, cut)
	if p.upg.Replaced() {
		passing.Go(func() { p.passOn(ctx) })
	}

	errs := make([]error, len(p.fronts))
	var wait sync.WaitGroup
	for i, f := range p.fronts {
		wait.Go(func() {
			errs[i] = f.drain(ctx)
			if cut, ok := errors.AsType[*httpdrain.CutError](errs[i]); ok {
				p.cut.Add(int64(cut.Connections))
			}
		})
	}
	wait.Wait()

	// An upgrade is over, but what is done after it may not be.
	reported := make(chan struct{})
	go func() {
		p.upgrades.Wait()
		close(reported)
	}()
	select {
	case <-reported:
	case <-ctx.Done():
	}
	return errors.Join(errs...)
}

// passOn has the process in charge heed the signals to upgrade that come while this one,
// which was replaced, drains: systemd sends them here if it learns the main process from a
// PID file, which it may not read before this process ends.
func (p *process) passOn(ctx context.Context) {
	for {
		select {
		case <-p.told.upgrade:
			queue.Keep()
			p.opts.Logger.Info("upgrade passed on")
		case <-ctx.Done():
			return
		}
	}
}

// limitDrain cuts a drain when the first of the timeouts that have begun is over.
func (p *process) limitDrain(ctx context.Context, cut context.CancelCauseFunc) {
	cutAfter := func(timeout time.Duration, since string) {
		time.AfterFunc(timeout, func() { cut(fmt.Errorf("service: not drained %v after %s", timeout, since)) })
	}
	timeout := p.opts.DrainTimeout
	if timeout <= 0 {
		timeout = DefaultDrainTimeout
	}
	stopTimeout := p.opts.StopTimeout
	if stopTimeout <= 0 {
		stopTimeout = timeout
	}

	stop, hurry := p.told.stop.Done(), p.upg.Hurry()
	switch {
	case p.upg.Replaced():
		cutAfter(timeout, "it was replaced")
	case trial.WasUndone():
		cutAfter(timeout, "its trial was undone")
	default:
		stop = nil
		cutAfter(stopTimeout, "it was stopped")
	}
	for {
		select {
		case <-stop:
			stop = nil
			cutAfter(stopTimeout, "it was told to stop")
		case <-hurry:
			hurry = nil
			cutAfter(hurryTimeout, "it was told to hurry")
		case <-ctx.Done():
			return
		}
	}
}
