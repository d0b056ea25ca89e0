//go:build unix

package handovertest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// These tests are about what counts against the time of an upgrade, and when it is too
// late to start a process.

// countStarts counts the processes that are started until the end of the test.
func countStarts(t *testing.T) *atomic.Int32 {
	var started atomic.Int32
	t.Cleanup(proctest.When(step.ChildStarted, func() { started.Add(1) }))
	return &started
}

func TestCancelledInCommand(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	because := errors.New("because")
	started := countStarts(t)
	upg, _ := NewParent(t, tableflip.Options{Command: func(*exec.Cmd) { cancel(because) }}, "succeed")
	proctest.OK(t, upg.Ready())
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), because)
	if n := started.Load(); n != 0 {
		t.Errorf("%d processes were started", n)
	}
	proctest.OK(t, upg.Upgrade())
}

// The time that Options.Command takes is not the new process's.
func TestTimeoutAndCommand(t *testing.T) {
	started := countStarts(t)
	upg, _ := NewParent(t, tableflip.Options{
		UpgradeTimeout: 100 * time.Millisecond,
		Command:        func(*exec.Cmd) { <-time.After(200 * time.Millisecond) },
	}, "hang")
	proctest.OK(t, upg.Ready())
	began := time.Now()
	err := upg.Upgrade()
	proctest.WantError(t, "Upgrade", err, os.ErrDeadlineExceeded)
	if n := started.Load(); n != 1 {
		t.Errorf("%d processes were started", n)
	}
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("the new process had only %v less 200ms", took)
	}
}

// The end of a context that has a deadline ends an upgrade, and no clock of this package.
func TestDeadlineOfContext(t *testing.T) {
	upg, _ := NewParent(t, tableflip.Options{}, "succeed")
	proctest.OK(t, upg.Ready())
	proctest.OK(t, upg.UpgradeContext(slowClock{t.Context()}))
}

// A slowClock is a context that has not ended at its deadline.
type slowClock struct{ context.Context }

func (slowClock) Deadline() (time.Time, bool) { return time.Now(), true }

// A caller's deadline also counts while Options.Command runs.
func TestDeadlineAndCommand(t *testing.T) {
	started := countStarts(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	upg, _ := NewParent(t, tableflip.Options{Command: func(*exec.Cmd) { <-ctx.Done() }}, "succeed")
	proctest.OK(t, upg.Ready())
	proctest.WantError(t, "Upgrade", upg.UpgradeContext(ctx), context.DeadlineExceeded)
	if n := started.Load(); n != 0 {
		t.Errorf("%d processes were started", n)
	}
}

// An error of a child that is late, or was cancelled, says which process that was.
func TestErrorNamesChild(t *testing.T) {
	for _, test := range []struct {
		name    string
		at      step.Step // at which the upgrade is cancelled
		timeout time.Duration
	}{
		{name: "late", timeout: time.Millisecond},
		{name: "cancelled early", at: step.ChildStarted},
		{name: "cancelled late", at: step.ReadyReceived},
	} {
		t.Run(test.name, func(t *testing.T) {
			var child *exec.Cmd
			role := "hang"
			if test.at == step.ReadyReceived {
				role = "succeed"
			}
			upg, _ := NewParent(t, tableflip.Options{
				UpgradeTimeout: test.timeout,
				Command:        func(cmd *exec.Cmd) { child = cmd },
			}, role)
			proctest.OK(t, upg.Ready())
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if test.at != (step.Step{}) {
				proctest.During(t, test.at, cancel)
			}
			err := upg.UpgradeContext(ctx)
			if err == nil || !strings.Contains(err.Error(), strconv.Itoa(child.Process.Pid)) {
				t.Errorf("%v does not name %d", err, child.Process.Pid)
			}
		})
	}
}

// Programs compare the texts.
func TestErrorTexts(t *testing.T) {
	for _, test := range []struct {
		err  error
		text string
	}{
		{tableflip.ErrNotReady, "process is not ready yet"},
		{tableflip.ErrUpgradeInProgress, "upgrade in progress"},
		{tableflip.ErrParentRunning, "parent hasn't exited"},
		{tableflip.ErrUpgraded, "already upgraded"},
		{tableflip.ErrStopped, "terminating"},
	} {
		if test.err.Error() != test.text {
			t.Errorf("%q, want %q", test.err, test.text)
		}
	}
}

// After Stop, the error of Upgrade is ErrStopped alone, whatever the child was doing.
func TestErrorTextStopped(t *testing.T) {
	for _, at := range []step.Step{step.ChildStarted, step.ReadyReceived, step.AfterCommit} {
		t.Run(at.String(), func(t *testing.T) {
			upg, s := NewParent(t, tableflip.Options{}, "hang-in-ready")
			proctest.OK(t, upg.Ready())
			stopping := make(chan bool, 1)
			proctest.During(t, at, func() {
				go func() { upg.Stop(); stopping <- true }()
				if at != step.ChildStarted {
					s.Await("hanging")
				}
			})
			if err := upg.Upgrade(); err == nil || err.Error() != "terminating" {
				t.Errorf("Upgrade: %v", err)
			}
			proctest.Within(t, "Stop", stopping)
		})
	}
}

func init() {
	// hang-in-ready hangs when it has said that it is ready.
	proctest.Role("hang-in-ready", func() {
		proctest.When(step.ReadySaid, func() {
			proctest.Report("hanging")
			proctest.UntilKilled()
		})
		proctest.Must(tableflip.New(tableflip.Options{})).Ready()
	})
}
