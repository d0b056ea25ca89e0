//go:build unix

package handovertest

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// One of the two processes is suspended, or hangs, at each step of the handover. In
// death_test.go it dies there.

var (
	childSteps = []step.Step{
		step.HereSaid, step.PIDFilePrepared, step.ReadySaid, step.VerdictReceived, step.PIDFileWritten, step.Acknowledged,
	}
	parentSteps = []step.Step{
		step.ChildStarted, step.ReadyReceived, step.BeforeCommit, step.AfterCommit, step.AcknowledgementReceived, step.ManagerNotified,
	}
)

func TestStepsAll(t *testing.T) {
	tested := slices.Concat(parentSteps, childSteps)
	if !slices.Equal(tested, step.All) {
		t.Errorf("the steps are %v, and those of the tests are %v", step.All, tested)
	}
}

// isBefore reports whether s comes before other in one process.
func isBefore(s, other step.Step) bool {
	return slices.Index(step.All, s) < slices.Index(step.All, other)
}

// eachStep runs a test for processes that hang, and for those that are suspended.
func eachStep(t *testing.T, steps []step.Step, run func(t *testing.T, at step.Step, suspended bool)) {
	for _, at := range steps {
		for _, suspended := range []bool{false, true} {
			how := "hangs"
			if suspended {
				how = "is suspended"
			}
			t.Run(how+" at "+at.String(), func(t *testing.T) {
				t.Parallel()
				run(t, at, suspended)
			})
		}
	}
}

// TestChildStuck checks that a stuck child is killed if it has not acknowledged the
// commit, and is in charge if it has.
func TestChildStuck(t *testing.T) {
	t.Parallel()
	eachStep(t, childSteps, func(t *testing.T, at step.Step, suspended bool) {
		c := newChain(t)
		pause := step.AfterCommit // where the parent waits until the child is stuck
		if isBefore(at, step.ReadySaid) {
			pause = step.Step{}
		}
		parent, _ := c.start(acknowledgeVariable+"=100ms", c.PauseAt(pause))
		parent.AwaitStep(alone)
		before := proctest.OpenFiles(t, parent.PID)
		parent.Order("upgrade", c.PauseAt(at))
		child := c.Next()
		child.AwaitStep(at)
		if suspended {
			proctest.Suspend(t, child.PID)
		}
		if pause == (step.Step{}) {
			parent.Order("cancel")
		} else {
			parent.AwaitStep(pause)
			parent.Resume()
		}
		m := parent.Await("upgraded")

		if at == step.Acknowledged {
			if m.Text != "" {
				t.Errorf("Upgrade returned %q", m.Text)
			}
			parent.AwaitEnd()
			if suspended {
				proctest.Continue(t, child.PID)
			}
			child.Resume()
			child.AwaitStep(alone)
			c.wantCharge(child.PID)
			c.wantStop(child)
			return
		}
		if !strings.Contains(m.Text, strconv.Itoa(child.PID)) {
			t.Errorf("Upgrade returned %q, which does not name the child, %d", m.Text, child.PID)
		}
		if pause != (step.Step{}) && (m.Cause != "deadline" || !strings.Contains(m.Text, "did not take charge")) {
			t.Errorf("Upgrade returned %q, caused by %q", m.Text, m.Cause)
		}
		if err := syscall.Kill(child.PID, 0); err != syscall.ESRCH {
			t.Errorf("the child has not been reaped: %v", err)
		}
		c.wantCharge(parent.PID)
		if after := proctest.OpenFiles(t, parent.PID); !maps.Equal(after, before) {
			t.Errorf("the descriptors were %v, and are %v", before, after)
		}
		c.wantGoesOn(parent)
	})
}

// TestParentStuck checks that a child whose parent is stuck waits until it is in
// charge, and then does not.
func TestParentStuck(t *testing.T) {
	t.Parallel()
	eachStep(t, parentSteps, func(t *testing.T, at step.Step, suspended bool) {
		c := newChain(t)
		parent, reaped := c.start(c.PauseAt(at))
		parent.AwaitStep(alone)
		parent.Order("upgrade")
		child := c.Next()
		parent.AwaitStep(at)
		child.AwaitStep(step.ReadySaid)
		if suspended {
			proctest.Suspend(t, parent.PID)
		}
		requests := c.send()
		switch {
		case isBefore(at, step.AfterCommit):
			c.wantPIDFile(parent.PID)
			if !suspended {
				c.wantAnswers(requests, parent.PID)
			}
		default:
			child.AwaitStep(readyReturns)
			c.wantPIDFile(child.PID)
			if suspended {
				c.wantAnswers(requests, child.PID)
			} // else both serve
		}

		// It goes on, or will not.
		if suspended {
			proctest.Continue(t, parent.PID)
			parent.Resume()
			if m := parent.Await("upgraded"); m.Text != "" {
				t.Errorf("Upgrade returned %q", m.Text)
			}
		} else {
			proctest.Kill(t, parent.PID, syscall.SIGKILL)
			<-reaped
		}
		child.AwaitStep(alone)
		c.wantCharge(child.PID)
		c.wantGoesOn(child)
	})
}
