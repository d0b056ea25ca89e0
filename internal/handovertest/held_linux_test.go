package handovertest

import (
	"strconv"
	"syscall"
	"testing"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// A process that the parent has forked has the parent's ends of the pipes open, so that
// they do not tell of its death.

func TestParentKilledPipeHeld(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		die   step.Step // of the parent
		pause step.Step // of the child, where it is when the parent dies
	}{
		{name: "before the child is ready", pause: newReturned},
		{name: "before the commit", die: step.BeforeCommit, pause: step.ReadySaid},
		{name: "before the commit, which the child awaits", die: step.BeforeCommit},
		{name: "after the commit", die: step.AfterCommit, pause: step.VerdictReceived},
		{name: "after the acknowledgement", die: step.AcknowledgementReceived},
		{name: "at its end", die: step.ManagerNotified},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newChain(t)
			parent, reaped := c.start(forkVariable+"="+step.ChildStarted.String(), c.PauseAt(test.die))
			parent.AwaitStep(alone)
			parent.Order("upgrade", c.PauseAt(test.pause))
			holder, err := strconv.Atoi(parent.Await("forked").Text)
			proctest.OK(t, err)
			c.Watch(holder)
			if test.die != (step.Step{}) {
				parent.AwaitStep(test.die)
			}
			child := c.Next()
			if test.pause != (step.Step{}) {
				child.AwaitStep(test.pause)
			}
			proctest.Kill(t, parent.PID, syscall.SIGKILL)
			<-reaped
			if test.pause != (step.Step{}) {
				child.Resume()
			}

			child.AwaitStep(alone)
			if err := syscall.Kill(holder, 0); err != nil {
				t.Errorf("the process that has the pipes open: %v", err)
			}
			c.wantCharge(child.PID)
			next := c.upgrade(child)
			c.wantCharge(next.PID)
			c.wantStop(next)
		})
	}
}

// A parent that says something and dies is heard to the end.
func TestParentKilledPipeHeldCommitted(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	parent, reaped := c.start(forkVariable+"="+step.ChildStarted.String(), c.PauseAt(step.AfterCommit))
	parent.AwaitStep(alone)
	parent.Order("upgrade", c.PauseAt(step.ReadySaid))
	holder, err := strconv.Atoi(parent.Await("forked").Text)
	proctest.OK(t, err)
	c.Watch(holder)
	child := c.Next()
	child.AwaitStep(step.ReadySaid)
	proctest.Suspend(t, child.PID)
	parent.AwaitStep(step.AfterCommit)
	proctest.Kill(t, parent.PID, syscall.SIGKILL)
	<-reaped
	proctest.Continue(t, child.PID)
	child.Resume()
	child.AwaitStep(step.Acknowledged) // which an orphan does not come to
	child.AwaitStep(alone)
	c.wantCharge(child.PID)
	c.wantStop(child)
}
