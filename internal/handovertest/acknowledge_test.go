//go:build unix

package handovertest

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// Between ready and the acknowledgement, the child dies, gives up, cannot take charge, or
// acknowledges at the last moment.

const waitRefused = "wait after Ready was refused"

func init() {
	mishaps[waitRefused] = func(w *proctest.Wire, upg *tableflip.Upgrader) {
		err := upg.Ready()
		if err == nil {
			step.Reached(readyReturns)
		}
		w.ReportError("refused", err)
		w.ReportError("waited", upg.WaitForParent(context.Background()))
		w.Hang()
	}
	mishaps["leave the pipes to a descendant"] = func(w *proctest.Wire, _ *tableflip.Upgrader) {
		w.Report("holder", hold(3, 4))
	}
	// The steps of Ready run in its goroutine, which Stop does not wait for before the
	// child takes charge.
	for _, at := range []step.Step{step.PIDFilePrepared, step.ReadySaid, step.VerdictReceived} {
		mishaps["Stop at "+at.String()] = func(w *proctest.Wire, upg *tableflip.Upgrader) {
			proctest.When(at, func() {
				upg.Stop()
				w.Report("stopped")
			})
			w.ReportError("refused", upg.Ready())
			w.ReportError("waited", upg.WaitForParent(context.Background()))
			w.Hang()
		}
	}
}

// A child that is dead hangs up, unless a descendant has its end of the pipe.
func TestChildKilledPipeHeld(t *testing.T) {
	t.Parallel()
	for _, at := range []step.Step{step.PIDFilePrepared, step.ReadySaid, step.VerdictReceived, step.PIDFileWritten} {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			c, parent, _ := startChain(t)
			parent.Order("upgrade", mishapVariable+"=leave the pipes to a descendant", c.DieAt(at))
			child := c.Next()
			holder, err := strconv.Atoi(child.Await("holder").Text)
			proctest.OK(t, err)
			c.Watch(holder)
			m := parent.Await("upgraded")
			if m.Cause != "signal: killed" || !strings.Contains(m.Text, strconv.Itoa(child.PID)) {
				t.Errorf("Upgrade returned %q, caused by %q", m.Text, m.Cause)
			}
			if err := syscall.Kill(holder, 0); err != nil {
				t.Errorf("the descendant: %v", err)
			}
			c.wantCharge(parent.PID)
			c.wantGoesOn(parent)
		})
	}
}

// A child that stops before it has acknowledged is not put in charge, however far the
// parent has come.
func TestChildStopsAtStep(t *testing.T) {
	t.Parallel()
	for _, at := range []step.Step{step.PIDFilePrepared, step.ReadySaid, step.VerdictReceived} {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			c := newChain(t)
			pause := step.BeforeCommit
			switch at {
			case step.VerdictReceived:
				pause = step.AfterCommit
			case step.PIDFilePrepared:
				pause = step.ChildStarted
			}
			parent, _ := c.start(lingers, c.PauseAt(pause))
			parent.AwaitStep(alone)
			parent.Order("upgrade", mishapVariable+"=Stop at "+at.String())
			parent.AwaitStep(pause)
			child := c.Next()
			child.Await("stopped")
			if m := child.Await("refused"); m.Text != tableflip.ErrStopped.Error() {
				t.Errorf("Ready returned %q", m.Text)
			}
			if m := child.Await("waited"); m.Text == "" {
				t.Error("WaitForParent returned nil in a child that has given up")
			}
			parent.Resume()
			if m := parent.Await("upgraded"); !strings.Contains(m.Text, strconv.Itoa(child.PID)) {
				t.Errorf("Upgrade returned %q", m.Text)
			}
			c.wantCharge(parent.PID)
			c.wantGoesOn(parent)
		})
	}
}

// What the child does after the commit can fail, and be undone.
func TestCommitFails(t *testing.T) {
	t.Parallel()
	c, parent, _ := startChain(t, lingers)
	parent.Order("upgrade", c.PauseAt(step.VerdictReceived), mishapVariable+"="+waitRefused)
	child := c.Next()
	child.AwaitStep(step.VerdictReceived)
	proctest.OK(t, os.Remove(filepath.Join(c.dir, "pid.tmp")))
	child.Resume()
	if m := child.Await("waited"); !strings.Contains(m.Text, "can't replace the PID file") {
		t.Errorf("WaitForParent returned %q", m.Text)
	}
	m := parent.Await("upgraded")
	for _, want := range []string{strconv.Itoa(child.PID), "can't replace the PID file", syscall.ENOENT.Error()} {
		if !strings.Contains(m.Text, want) {
			t.Errorf("Upgrade returned %q, which does not say %q", m.Text, want)
		}
	}
	c.wantCharge(parent.PID)
	c.wantGoesOn(parent)
}

// An acknowledgement that is there when the time is over counts.
func TestAcknowledgedLate(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	parent, _ := c.start(acknowledgeVariable+"=1ns", c.PauseAt(step.AfterCommit))
	parent.AwaitStep(alone)
	parent.Order("upgrade")
	child := c.Next()
	child.AwaitStep(step.Acknowledged)
	parent.AwaitStep(step.AfterCommit)
	parent.Resume()
	if m := parent.Await("upgraded"); m.Text != "" {
		t.Errorf("Upgrade returned %q", m.Text)
	}
	child.AwaitStep(alone)
	c.wantCharge(child.PID)
	c.wantStop(child)
}
