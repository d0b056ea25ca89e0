//go:build unix

package service_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/service"
	"golang.org/x/sys/unix"
)

func init() { proctest.Role("job", jobRole) }

// jobRole is a service that does one job, which two processes must not do at a time.
// Its Arg is a directory. When it is told to end, it does so at the order "end". The
// order "next" has the next process get a variable.
func jobRole() {
	wire := proctest.OpenWire()
	directory := proctest.Arg()
	var variable atomic.Value
	end := make(chan struct{}, 1)
	go func() {
		for order := range wire.Orders() {
			switch order.Do {
			case "end":
				end <- struct{}{}
			case "next":
				variable.Store(order.Arguments[0])
				wire.Report("next")
			}
		}
	}()
	upg := proctest.Must(tableflip.New(tableflip.Options{
		PIDFile: filepath.Join(directory, "pid"),
		Command: func(cmd *exec.Cmd) {
			if v, ok := variable.Swap("").(string); ok && v != "" {
				cmd.Env = append(cmd.Env, v)
			}
		},
	}))
	job := func(ctx context.Context) error {
		openSlowToClose()
		// Locks by flock end with the process, however that ends.
		lock := proctest.Must(os.OpenFile(filepath.Join(directory, "lock"), os.O_CREATE|os.O_RDWR, 0o600))
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			wire.ReportError("another process does the job", err)
			select {}
		}
		wire.Report("working")
		<-ctx.Done()
		wire.Report("told to end")
		<-end
		return ctx.Err()
	}
	opts := service.Options{DrainTimeout: proctest.Patience, Logger: slog.New(reporting{slog.DiscardHandler, wire})}
	if err := service.Run(upg, opts, service.Background(job)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// openSlowToClose opens what the kernel takes a moment to close when the process is killed:
// after the pipes of the handover, before what is opened next.
var openSlowToClose = func() {}

// reporting reports what is logged.
type reporting struct {
	slog.Handler
	wire *proctest.Wire
}

func (r reporting) Enabled(context.Context, slog.Level) bool { return true }

func (r reporting) Handle(_ context.Context, record slog.Record) error {
	r.wire.Report(record.Message)
	return nil
}

// A jobChain is a service whose job is being done.
type jobChain struct {
	t         *testing.T
	s         *proctest.Service
	directory string
	current   *proctest.Process
}

func newJobs(t *testing.T) *jobChain {
	return &jobChain{t: t, s: proctest.NewService(t), directory: proctest.SocketDir(t)}
}

func startJobs(t *testing.T) *jobChain {
	t.Helper()
	c := newJobs(t)
	c.start()
	return c
}

// start starts a first generation.
func (c *jobChain) start(env ...string) {
	c.t.Helper()
	cmd := c.s.Command("job", append(env, c.s.Wire(), proctest.WithArg(c.directory))...)
	cmd.Stderr = nil
	c.s.Start(cmd)
	c.current = c.s.Next()
	c.current.Await("working")
}

// begin begins an upgrade to a process that gets a variable.
func (c *jobChain) begin(variable string) (next *proctest.Process) {
	c.t.Helper()
	c.current.Order("next", variable)
	c.current.Await("next")
	proctest.Kill(c.t, c.current.PID, syscall.SIGHUP)
	return c.s.Next()
}

// upgrade upgrades. The new process must not have begun while the old one ends.
func (c *jobChain) upgrade() {
	c.t.Helper()
	next := c.begin("")
	awaitCharge(c.t, c.directory, next)
	c.current.Await("told to end")
	time.Sleep(time.Millisecond) // in which a process that does not wait shows itself: no correct one fails for it
	c.current.Order("end")
	c.current.AwaitEnd()
	next.Await("working")
	c.current = next
}

// stop checks that the job is being done by the current process alone, and has been
// since it began to.
func (c *jobChain) stop() {
	c.t.Helper()
	proctest.Terminate(c.t, c.current.PID)
	c.current.Take("told to end")
	c.current.Order("end")
	c.current.AwaitEnd()
}

func TestBackgroundUpgrades(t *testing.T) {
	c := startJobs(t)
	for range 20 {
		c.upgrade()
	}
	c.stop()
}

// skipUnlessEndIsKnown is for tests in which a process that does the job is killed.
func skipUnlessEndIsKnown(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the kernel closes a pipe, which says that a process has ended, before it releases a lock")
	}
}

// At each step of a handover, the old process dies, or the new one.
func TestBackgroundCrashes(t *testing.T) {
	for _, at := range []step.Step{
		step.ChildStarted, step.ReadyReceived, step.BeforeCommit, step.AfterCommit, step.AcknowledgementReceived,
	} {
		t.Run("parent at "+at.String(), func(t *testing.T) {
			skipUnlessEndIsKnown(t)
			c := newJobs(t)
			c.start(c.s.DieAt(at))
			old := c.current
			next := c.begin("")
			old.AwaitEnd()
			next.Await("working")
			c.current = next
			c.upgrade()
			c.stop()
		})
	}
	for _, at := range []step.Step{step.HereSaid, step.PIDFilePrepared, step.ReadySaid, step.VerdictReceived, step.PIDFileWritten} {
		t.Run("child at "+at.String(), func(t *testing.T) {
			c := startJobs(t)
			c.begin(c.s.DieAt(at)).AwaitEnd()
			c.current.Take("upgrade failed")
			c.upgrade() // It is told to end now, not before.
			c.stop()
		})
	}
	t.Run("child in charge", func(t *testing.T) {
		c := startJobs(t)
		next := c.begin("")
		awaitCharge(t, c.directory, next)
		c.current.Await("told to end")
		proctest.Kill(t, next.PID, syscall.SIGKILL)
		next.AwaitEnd()
		c.current.Order("end")
		c.current.AwaitEnd()
		c.start() // as a supervisor does
		c.upgrade()
		c.stop()
	})
	t.Run("parent while it ends", func(t *testing.T) {
		skipUnlessEndIsKnown(t)
		c := startJobs(t)
		next := c.begin("")
		awaitCharge(t, c.directory, next)
		c.current.Await("told to end")
		proctest.Kill(t, c.current.PID, syscall.SIGKILL)
		next.Await("working")
		c.current.AwaitEnd()
		c.current = next
		c.upgrade()
		c.stop()
	})
}

// The signal may be about a binary that is newer than the one that has been started.
func TestQueuedUpgradeIsPassedOn(t *testing.T) {
	c := startJobs(t)
	next := c.begin(c.s.PauseAt(step.ReadySaid))
	next.AwaitStep(step.ReadySaid)
	proctest.Kill(t, c.current.PID, syscall.SIGHUP)
	c.current.Await("upgrade queued")
	next.Resume()
	c.current.Await("told to end")
	next.Await("upgrade queued") // or it could be replaced before it begins the job
	c.current.Order("end")
	next.Await("working")
	third := c.s.Next()
	next.Await("told to end")
	next.Order("end")
	third.Await("working")
	c.current = third
	c.stop()
}
