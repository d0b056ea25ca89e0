//go:build unix

package service_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/queue"
	"example.com/tableflip/service"
	stub "example.com/tableflip/testing"
)

var errRefused = errors.New("refused")

// logged returns options with a logger whose lines the test reads.
func logged() (service.Options, proctest.Logbook) {
	opts := quiet()
	var log proctest.Logbook
	opts.Logger, log = proctest.NewLogger()
	return opts, log
}

// noUpgrade checks that none has begun by the time that Run has returned.
func (r *run) noUpgrade() {
	r.t.Helper()
	select {
	case <-r.upg.upgrades:
		r.t.Error("an upgrade has begun")
	default:
	}
}

func (r *run) end() {
	r.t.Helper()
	r.upg.end()
	proctest.OK(r.t, r.returns())
}

func TestUpgradeSignals(t *testing.T) {
	opts, log := logged()
	opts.UpgradeSignals = []os.Signal{syscall.SIGUSR2}
	r := startServers(t, opts)
	r.signal(syscall.SIGUSR2)
	proctest.Within(t, "an upgrade", r.upg.upgrades)
	r.upg.outcomes <- errRefused
	if line := log.Await(t, "upgrade "); !strings.Contains(line, "failed") { // and not queued, because it did not wait
		t.Errorf("the log says %s", line)
	}
	r.signal(syscall.SIGHUP) // It is the program's own.
	r.end()
	r.noUpgrade()
}

func TestUpgradeWaitsForParent(t *testing.T) {
	opts, log := logged()
	opts.UpgradeFailed = func(err error) {
		if !errors.Is(err, errRefused) {
			t.Errorf("failed: %v", err)
		}
	}
	r := startBesideParent(t, opts)
	for _, order := range []func(){
		func() { r.signal(syscall.SIGHUP) },
		func() { r.signal(syscall.SIGHUP) },
		func() { queue.Ask() }, // as the parent that was asked for one more does
	} {
		order()
		// A service manager that waits for the answer to a reload gets it at once.
		if !queue.IsKept(proctest.Within(t, "an attempt", r.upg.early)) {
			t.Error("the Upgrader does not know that it will be asked again")
		}
		log.Await(t, "upgrade queued")
	}
	close(r.upg.parent)
	proctest.Within(t, "the upgrade", r.upg.upgrades)
	r.upg.outcomes <- errRefused
	log.Await(t, "upgrade failed")
	r.end()
	r.noUpgrade() // Three were one.
}

// A service manager may know only the process that drains.
func TestUpgradeWhileDraining(t *testing.T) {
	kept := make(chan struct{}, 1)
	queue.OnKeep(func() { kept <- struct{}{} })
	t.Cleanup(func() { queue.OnKeep(nil) })
	r := startRun(t, quiet(), conversations())
	request := r.begin()
	r.upg.end()
	proctest.AwaitThat(t, "it accepts no more", func() bool { return !r.accepts() })
	for range 2 {
		r.signal(syscall.SIGHUP)
		proctest.Within(t, "the upgrade", kept)
	}
	request.end()
	proctest.OK(t, r.returns())
}

// An upgrade that has begun is the one that was too early before.
func TestUpgradeIsNotTriedTwice(t *testing.T) {
	opts, log := logged()
	r := newRun(t)
	upg := unaware{r.upg, make(chan struct{})}
	r.run(upg, opts)
	r.signal(syscall.SIGHUP)
	log.Await(t, "upgrade queued")
	close(r.upg.parent)
	r.signal(syscall.SIGHUP)
	<-r.upg.upgrades
	close(upg.hears)
	r.upg.outcomes <- errRefused
	log.Await(t, "upgrade failed")
	r.end()
	r.noUpgrade()
}

// An unaware Upgrader hears late that its parent has ended.
type unaware struct {
	replaceable
	hears chan struct{}
}

func (upg unaware) WaitForParent(ctx context.Context) error {
	upg.started()
	<-upg.hears
	return upg.replaceable.WaitForParent(ctx)
}

// What comes while Run does something else, before it sees that it was replaced, is the
// new process's.
func TestLateUpgradeIsPassedOn(t *testing.T) {
	for name, order := range map[string]func(*run){
		"of a signal":        func(r *run) { r.signal(syscall.SIGHUP) },
		"of the predecessor": func(*run) { queue.Ask() },
	} {
		t.Run(name, func(t *testing.T) {
			for range 10 { // Run may see what has come, or the end, first.
				passedOn := make(chan struct{}, 10)
				queue.OnKeep(func() { passedOn <- struct{}{} })
				t.Cleanup(func() { queue.OnKeep(nil) })
				opts := quiet()
				opts.DrainDelay = time.Hour
				holds, release := make(chan struct{}), make(chan struct{})
				opts.Logger = slog.New(slog.NewTextHandler(holding{"stopping", holds, release}, nil))
				r := startServers(t, opts)
				r.signal(syscall.SIGTERM)
				<-holds
				order(r)
				r.upg.end()
				close(release)
				proctest.OK(t, r.returns())
				proctest.Within(t, "the upgrade", passedOn)
				select {
				case <-queue.Asked(): // which outlives a call of Run
				default:
				}
			}
		})
	}
}

// What is not wanted is not passed on, and a process that was stopped has nobody to pass
// it on to.
func TestNoUpgradeIsPassedOn(t *testing.T) {
	passedOn := make(chan struct{}, 10)
	queue.OnKeep(func() { passedOn <- struct{}{} })
	t.Cleanup(func() { queue.OnKeep(nil) })
	startServers(t, quiet()).end()

	opts := quiet()
	holds, release := make(chan struct{}), make(chan struct{})
	opts.Logger = slog.New(slog.NewTextHandler(holding{"stopping", holds, release}, nil))
	r := startRun(t, opts, conversations())
	request := r.begin()
	r.signal(syscall.SIGTERM)
	<-holds
	r.signal(syscall.SIGHUP)
	r.upg.Stop()
	close(release)
	proctest.AwaitThat(t, "it accepts no more", func() bool { return !r.accepts() })
	r.signal(syscall.SIGHUP) // while it drains
	request.goesOn()
	request.end()
	proctest.OK(t, r.returns())
	if len(passedOn) > 0 {
		t.Error("an upgrade was passed on")
	}
}

// A holding log holds up who writes a text.
type holding struct {
	text           string
	holds, release chan struct{}
}

func (h holding) Write(line []byte) (int, error) {
	if bytes.Contains(line, []byte("msg="+h.text)) {
		close(h.holds)
		<-h.release
	}
	return len(line), nil
}

// The Upgrader has waited for earlier processes as long as it may.
func TestUpgradeWaitsNoLonger(t *testing.T) {
	opts, log := logged()
	r := startServers(t, opts)
	r.signal(syscall.SIGHUP)
	<-r.upg.upgrades
	r.upg.outcomes <- errors.Join(tableflip.ErrParentRunning, os.ErrDeadlineExceeded)
	log.Await(t, "upgrade failed")
	r.end()
	r.noUpgrade()
}

func TestUpgradeWaitsForUpgrade(t *testing.T) {
	opts, log := logged()
	r := startServers(t, opts)
	r.signal(syscall.SIGHUP)
	<-r.upg.upgrades
	// A service manager that waits for the answer to a reload gets it at once.
	answered := make(chan struct{}, 10)
	queue.OnKeep(func() { answered <- struct{}{} })
	t.Cleanup(func() { queue.OnKeep(nil) })
	for range 3 {
		r.signal(syscall.SIGHUP)
		log.Await(t, "upgrade queued")
		proctest.Within(t, "the answer", answered)
	}
	r.noUpgrade()
	r.upg.outcomes <- errRefused
	<-r.upg.upgrades
	r.upg.outcomes <- errRefused
	log.Await(t, "upgrade failed")
	log.Await(t, "upgrade failed")
	r.end()
	r.noUpgrade()
}

func TestStopForgetsQueuedUpgrade(t *testing.T) {
	opts, log := logged()
	opts.DrainDelay = 50 * time.Millisecond // in which one that is not forgotten is tried
	r := startBesideParent(t, opts)
	r.signal(syscall.SIGHUP)
	log.Await(t, "upgrade queued")
	r.signal(syscall.SIGTERM)
	proctest.OK(t, r.returns())
	if n := len(r.upg.early); n != 1 {
		t.Errorf("tried %d times", n)
	}
	r.noUpgrade()
}

func TestBeforeUpgradeRefuses(t *testing.T) {
	failed := make(chan error)
	opts := quiet()
	opts.BeforeUpgrade = func(context.Context) error { return errRefused }
	opts.UpgradeFailed = func(err error) { failed <- err }
	r := startServers(t, opts)
	r.signal(syscall.SIGHUP)
	proctest.WantError(t, "UpgradeFailed", proctest.Within(t, "UpgradeFailed", failed), errRefused)
	r.end()
	r.noUpgrade()
}

func TestHooksOfUpgrade(t *testing.T) {
	calls := make(chan string, 10)
	opts := quiet()
	opts.BeforeUpgrade = func(context.Context) error { calls <- "before"; return nil }
	opts.UpgradeFailed = func(err error) { calls <- err.Error() }
	r := startServers(t, opts)
	r.signal(syscall.SIGHUP)
	<-r.upg.upgrades
	if got := <-calls; got != "before" {
		t.Errorf("got %q before the upgrade", got)
	}
	r.upg.outcomes <- errRefused
	if got := proctest.Within(t, "UpgradeFailed", calls); got != errRefused.Error() {
		t.Errorf("got %q after it", got)
	}

	r.signal(syscall.SIGHUP)
	<-r.upg.upgrades
	r.upg.outcomes <- nil
	r.end()
	if got := <-calls; got != "before" || len(calls) > 0 {
		t.Errorf("got %q and %d more calls for an upgrade that succeeded", got, len(calls))
	}
}

// The program exits when Run returns, and the hook may have something to undo.
func TestRunWaitsForUpgradeFailed(t *testing.T) {
	called, release := make(chan struct{}), make(chan struct{})
	opts := quiet()
	opts.UpgradeFailed = func(error) { close(called); <-release }
	r := startServers(t, opts)
	r.signal(syscall.SIGHUP)
	<-r.upg.upgrades
	r.signal(syscall.SIGTERM) // cancels it
	proctest.Within(t, "UpgradeFailed", called)
	proctest.Within(t, "Exit", r.upg.exit)
	select {
	case err := <-r.ran:
		t.Errorf("Run has returned %v", err)
	default:
	}
	close(release)
	proctest.OK(t, r.returns())
}

func TestWithoutUpgrader(t *testing.T) {
	for name, upg := range map[string]service.Upgrader{
		"nil":                     nil,
		"nil *tableflip.Upgrader": (*tableflip.Upgrader)(nil),
	} {
		t.Run(name, func(t *testing.T) {
			addrs := make(chan net.Addr, 1)
			serve := func(ln net.Listener) error {
				addrs <- ln.Addr()
				return http.Serve(ln, nil)
			}
			r := &run{t: t, ran: make(chan error, 1), heard: hearSignals(t)}
			var log bytes.Buffer
			opts := quiet()
			opts.Logger = slog.New(slog.NewTextHandler(&log, nil))
			go func() {
				defer func() {
					if cause := recover(); cause != nil {
						r.ran <- fmt.Errorf("Run has panicked: %v", cause)
					}
				}()
				r.ran <- service.Run(upg, opts, service.Stream("tcp", "localhost:0", serve, nil))
			}()
			var addr net.Addr
			select {
			case addr = <-addrs:
			case err := <-r.ran:
				t.Fatal(err)
			}
			response, err := http.Get("http://" + addr.String())
			proctest.OK(t, err)
			response.Body.Close()
			r.signal(syscall.SIGTERM)
			proctest.OK(t, r.returns())
			if n := strings.Count(log.String(), "can't be upgraded"); n != 1 {
				t.Errorf("the log says %d times that it can't be upgraded:\n%s", n, &log)
			}
		})
	}
}

// A failing Upgrader tells the parent.
type failing struct {
	*stub.Upgrader
	told chan error
}

func (upg failing) Fail(err error) { upg.told <- err }

func TestParentIsToldWhy(t *testing.T) {
	upg := failing{newStub(t), make(chan error, 1)}
	err := service.Run(upg, quiet(), service.Stream("tcp", "no address", nil, nil))
	if err == nil {
		t.Fatal("it has started")
	}
	if got := proctest.Within(t, "what the parent is told", upg.told); got != err {
		t.Errorf("the parent was told %v, want %v", got, err)
	}
}
