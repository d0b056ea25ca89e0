//go:build unix

package handovertest

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// A new process serves beside its parent before it is put in charge (Options.Trial).

const (
	longTrial  = trialVariable + "=1h" // which no test waits for
	shortTrial = trialVariable + "=1ms"
)

// A trialRun is a trial that a test ends.
type trialRun struct {
	*chain
	parent, child *proctest.Process
	before        map[string]string // what the parent had open
	held          []request         // what the child has accepted
}

// startTrial starts a chain whose first generation has a child on trial.
func startTrial(t *testing.T, env ...string) *trialRun {
	t.Helper()
	c, parent, _ := startChain(t, append([]string{longTrial}, env...)...)
	tr := &trialRun{chain: c, parent: parent, before: proctest.OpenFiles(t, parent.PID)}
	parent.Order("upgrade")
	tr.awaitTrial()
	return tr
}

// awaitTrial waits until both processes serve.
func (tr *trialRun) awaitTrial() {
	tr.t.Helper()
	tr.child = tr.Next()
	tr.child.AwaitStep(readyReturns)
}

// awaitUndone waits until the child accepts no more, and returns what WaitForParent has
// returned.
func (tr *trialRun) awaitUndone() proctest.Message {
	tr.t.Helper()
	tr.child.Take("closed")
	return tr.child.Take("never alone")
}

// hold has the child accept connections, whose requests are not complete.
func (tr *trialRun) hold() {
	tr.t.Helper()
	proctest.Suspend(tr.t, tr.parent.PID)
	defer proctest.Continue(tr.t, tr.parent.PID)
	for _, socket := range []struct{ network, addr string }{
		{"tcp", tr.tcp}, {"unix", filepath.Join(tr.dir, "socket")},
	} {
		conn := proctest.Opened[net.Conn](tr.t)(net.DialTimeout(socket.network, socket.addr, proctest.Patience))
		proctest.Must(io.WriteString(conn, "wh"))
		tr.held = append(tr.held, request{socket.network, conn})
	}
	// A queue is first in, first out.
	tr.wantAnswers(tr.send(), tr.child.PID)
}

// wantDrained checks that the child answers what it has accepted, and ends.
func (tr *trialRun) wantDrained() {
	tr.t.Helper()
	for _, r := range tr.held {
		proctest.Must(io.WriteString(r.conn, "o\n"))
	}
	tr.wantAnswers(tr.held, tr.child.PID)
	tr.child.AwaitEnd()
}

// wantLook checks what a process knows.
func (tr *trialRun) wantLook(p *proctest.Process, format string, args ...any) {
	tr.t.Helper()
	p.Order("look")
	if got, want := p.Await("look").Text, fmt.Sprintf(format, args...); got != want {
		tr.t.Errorf("%d knows %q, want %q", p.PID, got, want)
	}
}

// awaitLook waits until a process knows that.
func (tr *trialRun) awaitLook(p *proctest.Process, format string, args ...any) {
	tr.t.Helper()
	want := fmt.Sprintf(format, args...)
	proctest.AwaitThat(tr.t, fmt.Sprint(p.PID, " knows ", want), func() bool {
		p.Order("look")
		return p.Await("look").Text == want
	})
}

// wantUpgraded checks what Upgrade returns.
func (tr *trialRun) wantUpgraded(text, cause string) {
	tr.t.Helper()
	m := tr.parent.Take("upgraded")
	if !strings.Contains(m.Text, text) || (m.Text == "") != (text == "") || cause != "" && m.Cause != cause {
		tr.t.Errorf("Upgrade returned %q, caused by %q; want %q, %q", m.Text, m.Cause, text, cause)
	}
}

// wantUndone checks that the parent is as it was, and can be upgraded.
func (tr *trialRun) wantUndone() {
	tr.t.Helper()
	tr.child.AwaitEnd()
	tr.awaitLook(tr.parent, "1 %d in charge", tr.parent.PID)
	proctest.AwaitThat(tr.t, "it has closed what it had for the child", func() bool {
		return maps.Equal(proctest.OpenFiles(tr.t, tr.parent.PID), tr.before)
	})
	proctest.WantNoChildren(tr.t, tr.parent.PID)
	tr.wantCharge(tr.parent.PID)
	tr.wantGoesOn(tr.parent)
}

func TestTrial(t *testing.T) {
	t.Parallel()
	tr := pauseTrial(t, step.TrialBegun)
	c, parent := tr.chain, tr.parent

	// Both serve, and the parent is in charge.
	tr.hold()
	c.wantPIDFile(parent.PID)
	tr.wantLook(parent, "1 %d in charge, 2 %d on trial", parent.PID, tr.child.PID)
	tr.wantLook(tr.child, "1 %d in charge, 2 %d on trial", parent.PID, tr.child.PID)
	tr.child.Order("upgrade")
	if m := tr.child.Await("upgraded"); m.Text != "upgrade in progress" {
		t.Errorf("Upgrade of a process on trial returned %q", m.Text)
	}
	proctest.Suspend(t, tr.child.PID)
	c.wantAnswers(c.send(), parent.PID)
	proctest.Continue(t, tr.child.PID)

	parent.Resume()
	tr.wantUpgraded("", "")
	parent.AwaitEnd()
	tr.child.AwaitStep(alone)
	tr.wantLook(tr.child, "2 %d in charge", tr.child.PID)
	tr.child.Order("undo")
	if m := tr.child.Await("undone"); m.Text != "false" {
		t.Error("a process in charge has undone its trial")
	}
	c.wantCharge(tr.child.PID)
	for _, r := range tr.held {
		proctest.Must(io.WriteString(r.conn, "o\n"))
	}
	c.wantAnswers(tr.held, tr.child.PID)
	c.wantGoesOn(tr.child)
}

// A trial goes on until the child is in charge.
func TestTrialTakesCharge(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	parent, _ := c.start(shortTrial, c.PauseAt(step.BeforeCommit))
	tr := &trialRun{chain: c, parent: parent}
	parent.AwaitStep(alone)
	parent.Order("upgrade", c.PauseAt(step.PIDFileWritten))
	tr.awaitTrial()
	parent.AwaitStep(step.BeforeCommit)
	parent.Resume()
	tr.child.AwaitStep(step.PIDFileWritten)
	tr.wantLook(tr.child, "1 %d in charge, 2 %d on trial", parent.PID, tr.child.PID)
	tr.child.Order("upgrade")
	if m := tr.child.Await("upgraded"); m.Text != "upgrade in progress" {
		t.Errorf("Upgrade of a process on trial returned %q", m.Text)
	}
	tr.child.Resume()
	tr.wantUpgraded("", "")
	parent.AwaitEnd()
	tr.child.AwaitStep(alone)
	c.wantCharge(tr.child.PID)
	c.wantStop(tr.child)
}

// A trial is undone by its child, at any of its steps. One that lives drains.
func TestTrialChildUndoes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		order, says, cause string
		drains             bool
	}{
		{order: "stop", says: "was stopped during its trial", drains: true},
		{order: "fail", says: "failed: no disk", drains: true},
		{order: "undo", says: "failed: unhealthy", drains: true},
		{order: "exit"},
		{order: "kill"},
	} {
		for _, at := range []step.Step{step.TrialBegun, step.TrialOver, step.BeforeCommit, step.AfterCommit} {
			t.Run(test.order+" at "+at.String(), func(t *testing.T) {
				t.Parallel()
				tr := pauseTrial(t, at)
				tr.hold()
				if test.order == "kill" {
					proctest.Kill(t, tr.child.PID, syscall.SIGKILL)
				} else {
					tr.child.Order(test.order)
				}
				if test.drains {
					tr.awaitUndone()
				} else {
					tr.child.AwaitEnd()
				}
				tr.parent.Resume()
				tr.wantUpgraded(cmp.Or(test.says, strconv.Itoa(tr.child.PID)), test.cause)
				if test.drains {
					tr.wantLook(tr.parent, "1 %d in charge, 2 %d draining", tr.parent.PID, tr.child.PID)
					tr.wantLook(tr.child, "1 %d in charge, 2 %d draining, exit", tr.parent.PID, tr.child.PID)
					tr.wantCharge(tr.parent.PID)
					if at == step.AfterCommit {
						tr.child.Resume()
					}
					tr.wantDrained()
				}
				tr.wantUndone()
			})
		}
	}
}

// pauseTrial starts a trial whose parent pauses at a step. After the commit, so does the
// child, before it takes charge.
func pauseTrial(t *testing.T, at step.Step, env ...string) *trialRun {
	t.Helper()
	c := newChain(t)
	if at != step.TrialBegun {
		env = append(env, holdVariable+"=yes") // or the child may hear of the end, too, before Ready returns
	}
	parent, _ := c.start(append(env, shortTrial, c.PauseAt(at))...)
	tr := &trialRun{chain: c, parent: parent}
	parent.AwaitStep(alone)
	tr.before = proctest.OpenFiles(t, parent.PID)
	pause := step.Step{}
	if at == step.AfterCommit {
		pause = step.VerdictReceived
	}
	parent.Order("upgrade", c.PauseAt(pause))
	tr.awaitTrial()
	if at != step.TrialBegun {
		parent.Order("go on")
	}
	parent.AwaitStep(at)
	if pause != (step.Step{}) {
		tr.child.AwaitStep(pause)
	}
	return tr
}

// How a child has ended is known while the trial goes on.
func TestTrialChildEnds(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ order, cause string }{
		{"exit", "exit status 7"},
		{"kill", "signal: killed"},
	} {
		t.Run(test.order, func(t *testing.T) {
			t.Parallel()
			tr := startTrial(t, graceVariable+"="+proctest.Patience.String())
			if test.order == "kill" {
				proctest.Kill(t, tr.child.PID, syscall.SIGKILL)
			} else {
				tr.child.Order(test.order)
			}
			tr.wantUpgraded("during its trial", test.cause)
			tr.wantUndone()
		})
	}
}

// A descendant of the child holds its pipe, so that only the process tells its end.
func TestTrialChildEndsPipeHeld(t *testing.T) {
	t.Parallel()
	c, parent, _ := startChain(t, longTrial)
	tr := &trialRun{chain: c, parent: parent, before: proctest.OpenFiles(t, parent.PID)}
	parent.Order("upgrade", forkVariable+"="+step.OnTrial.String())
	tr.child = c.Next()
	holder, err := strconv.Atoi(tr.child.Await("forked").Text)
	proctest.OK(t, err)
	tr.child.AwaitStep(readyReturns)
	c.Watch(holder)
	proctest.Kill(t, tr.child.PID, syscall.SIGKILL)
	tr.wantUpgraded("during its trial", "signal: killed")
	proctest.Kill(t, holder, syscall.SIGKILL)
	tr.wantUndone()
}

// A trial is undone by the parent, and the child drains.
func TestTrialParentUndoes(t *testing.T) {
	t.Parallel()
	for _, at := range []step.Step{step.TrialBegun, step.TrialOver} {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			tr := pauseTrial(t, at)
			tr.hold()
			tr.parent.Order("cancel")
			tr.parent.Await("cancelled")
			tr.parent.Resume()
			tr.wantUpgraded("cancelled", "")
			if m := tr.awaitUndone(); !strings.Contains(m.Text, "undone") {
				t.Errorf("WaitForParent returned %q", m.Text)
			}
			tr.wantDrained()
			tr.wantUndone()
		})
	}
}

// The deadline of its caller ends a trial, and Options.UpgradeTimeout does not.
func TestTrialDeadline(t *testing.T) {
	t.Parallel()
	c, parent, _ := startChain(t, longTrial, timeoutVariable+"=1ns")
	tr := &trialRun{chain: c, parent: parent, before: proctest.OpenFiles(t, parent.PID)}
	parent.Order("upgrade until")
	tr.awaitTrial()
	parent.Order("expire")
	tr.wantUpgraded("deadline exceeded", "")
	tr.wantUndone()
}

func TestTrialUpgradeTimeout(t *testing.T) {
	t.Parallel()
	const timeout = 6 * time.Second // in which the trial has to have begun
	tr := startTrial(t, timeoutVariable+"="+timeout.String())
	time.Sleep(timeout + timeout/2) // in which a timeout that is at work still ends the trial
	tr.wantLook(tr.parent, "1 %d in charge, 2 %d on trial", tr.parent.PID, tr.child.PID)
	tr.parent.Order("cancel")
	tr.wantUpgraded("cancelled", "")
	tr.wantUndone()
}

// A stop ends both, and both drain.
func TestTrialStop(t *testing.T) {
	t.Parallel()
	tr := startTrial(t)
	tr.hold()
	tr.parent.Order("stop")
	tr.wantUpgraded("terminating", "")
	tr.parent.Await("stopped")
	tr.wantFiles()
	tr.parent.AwaitEnd()
	tr.awaitUndone()
	tr.awaitLook(tr.child, "2 %d draining, exit", tr.child.PID) // and need not hurry
	tr.wantDrained()
	tr.AwaitEnd()
}

// Stop of the parent leaves a child alone that takes charge in this moment.
func TestTrialStopAfterCommit(t *testing.T) {
	t.Parallel()
	tr := pauseTrial(t, step.AfterCommit)
	tr.parent.Order("stop")
	tr.parent.Await("stopping")
	tr.parent.Resume()
	time.Sleep(time.Second / 10) // in which Stop must not end the wait for the acknowledgement
	tr.child.Resume()
	tr.wantUpgraded("", "")
	tr.parent.AwaitEnd()
	tr.child.AwaitStep(alone)
	tr.wantCharge(tr.child.PID)
	tr.wantStop(tr.child)
}

// A child that does not react is killed.
func TestTrialChildStuck(t *testing.T) {
	t.Parallel()
	const soon = acknowledgeVariable + "=100ms"
	for _, at := range []step.Step{step.TrialBegun, step.TrialOver, step.BeforeCommit, step.AfterCommit} {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			tr := pauseTrial(t, at, soon)
			proctest.Suspend(t, tr.child.PID)
			tr.parent.Resume()
			tr.wantUpgraded("did not take charge", "deadline")
			tr.wantUndone()
		})
	}
	for _, order := range []string{"cancel", "stop"} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			tr := startTrial(t, soon)
			proctest.Suspend(t, tr.child.PID)
			tr.parent.Order(order)
			if order == "stop" {
				tr.parent.AwaitEnd()
				tr.child.AwaitEnd()
				tr.wantFiles()
				return
			}
			tr.wantUpgraded("cancelled", "")
			if err := syscall.Kill(tr.child.PID, 0); err != syscall.ESRCH {
				t.Errorf("the child has not been reaped: %v", err)
			}
			tr.wantUndone()
		})
	}
}

// A parent that was suspended has missed that its child drains, and reads it.
func TestTrialParentSuspended(t *testing.T) {
	t.Parallel()
	const soon = 3 * time.Second
	c, parent, _ := startChain(t, longTrial, acknowledgeVariable+"="+soon.String())
	tr := &trialRun{chain: c, parent: parent, before: proctest.OpenFiles(t, parent.PID)}
	parent.Order("upgrade", c.PauseAt(step.VerdictReceived))
	tr.awaitTrial()
	tr.hold()
	parent.Order("cancel")
	tr.child.AwaitStep(step.VerdictReceived)
	proctest.Suspend(t, parent.PID)
	tr.child.Resume()
	tr.child.Take("closed")
	time.Sleep(soon + soon/10) // Its patience with the child is over.
	proctest.Continue(t, parent.PID)
	tr.wantUpgraded("cancelled", "")
	tr.wantDrained()
	tr.wantUndone()
}

// The child of a dead parent is in charge.
func TestTrialOrphan(t *testing.T) {
	t.Parallel()
	for _, at := range []step.Step{step.TrialBegun, step.TrialOver, step.BeforeCommit, step.AfterCommit} {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			tr := pauseTrial(t, at)
			if at == step.AfterCommit {
				tr.child.Resume()
			}
			testTrialOrphan(tr)
		})
	}
	t.Run("during it", func(t *testing.T) {
		t.Parallel()
		testTrialOrphan(startTrial(t))
	})
	t.Run("suspended", func(t *testing.T) {
		t.Parallel()
		tr := startTrial(t)
		proctest.Suspend(t, tr.child.PID)
		proctest.Kill(t, tr.parent.PID, syscall.SIGKILL)
		tr.parent.AwaitEnd()
		proctest.Continue(t, tr.child.PID)
		testTrialOrphan(tr)
	})
}

func testTrialOrphan(tr *trialRun) {
	tr.t.Helper()
	syscall.Kill(tr.parent.PID, syscall.SIGKILL)
	tr.parent.AwaitEnd()
	tr.child.AwaitStep(alone)
	tr.wantLook(tr.child, "2 %d in charge", tr.child.PID)
	tr.wantCharge(tr.child.PID)
	tr.wantGoesOn(tr.child)
}

// Nobody else serves, so that it does without a PID file.
func TestTrialOrphanPIDFile(t *testing.T) {
	t.Parallel()
	tr := startTrial(t)
	proctest.OK(t, os.Remove(filepath.Join(tr.dir, "pid.tmp")))
	proctest.Kill(t, tr.parent.PID, syscall.SIGKILL)
	tr.child.AwaitStep(alone)
	tr.wantLook(tr.child, "2 %d in charge", tr.child.PID)
	tr.wantAnswers(tr.send(), tr.child.PID)
	tr.wantPIDFile(tr.parent.PID)
	tr.wantGoesOn(tr.child)
}

// An orphan that is stopped before it is in charge cleans up as one that is.
func TestTrialOrphanStop(t *testing.T) {
	t.Parallel()
	c, parent, _ := startChain(t, longTrial)
	tr := &trialRun{chain: c, parent: parent}
	parent.Order("upgrade", c.PauseAt(step.VerdictReceived))
	tr.awaitTrial()
	tr.hold()
	proctest.Kill(t, parent.PID, syscall.SIGKILL)
	tr.child.AwaitStep(step.VerdictReceived)
	tr.child.Order("stop")
	tr.child.Await("stopped")
	tr.wantFiles("pid") // of the parent, who was killed
	tr.child.Resume()
	tr.child.Order("await the end of the trial")
	if m := tr.child.Await("trial ended"); m.Text != "false" { // so that it may take its time
		t.Errorf("undone: %s", m.Text)
	}
	tr.awaitLook(tr.child, "2 %d draining, exit", tr.child.PID)
	tr.wantLook(tr.child, "2 %d draining, exit", tr.child.PID) // and does not hurry
	tr.wantDrained()
}

// A health check that fails when the parent has died leaves the only process that serves.
func TestTrialOrphanUndo(t *testing.T) {
	t.Parallel()
	c, parent, _ := startChain(t, longTrial)
	tr := &trialRun{chain: c, parent: parent}
	parent.Order("upgrade", c.PauseAt(step.VerdictReceived))
	tr.awaitTrial()
	proctest.Kill(t, parent.PID, syscall.SIGKILL)
	tr.child.AwaitStep(step.VerdictReceived)
	tr.child.Order("undo")
	if m := tr.child.Await("undone"); m.Text != "false" {
		t.Error("an orphan has undone its trial")
	}
	tr.child.Resume()
	tr.child.AwaitStep(alone)
	c.wantCharge(tr.child.PID)
	c.wantStop(tr.child)
}

// What fails when the child takes charge undoes the trial.
func TestTrialCommitFails(t *testing.T) {
	t.Parallel()
	tr := pauseTrial(t, step.BeforeCommit)
	tr.hold()
	proctest.OK(t, os.Remove(filepath.Join(tr.dir, "pid.tmp")))
	tr.parent.Resume()
	tr.wantUpgraded("can't replace the PID file", "")
	tr.awaitUndone()
	tr.wantDrained()
	tr.wantUndone()
}

// undoTrial starts a trial that is undone, and whose child drains.
func undoTrial(t *testing.T, env ...string) *trialRun {
	t.Helper()
	tr := startTrial(t, env...)
	tr.hold()
	tr.child.Order("stop")
	tr.wantUpgraded("was stopped", "")
	tr.awaitUndone()
	return tr
}

// The next upgrade waits for the end of the child, and does not have it hurry unless
// deploys come in quick succession.
func TestTrialUndoneNext(t *testing.T) {
	t.Parallel()
	for _, maxDraining := range []int{0, 1} {
		t.Run(strconv.Itoa(maxDraining), func(t *testing.T) {
			t.Parallel()
			tr := undoTrial(t, maxDrainingVariable+"="+strconv.Itoa(maxDraining))
			tr.parent.Order("upgrade until")
			tr.parent.AwaitStep(step.UndoneAwaited)
			time.Sleep(1500 * time.Millisecond) // longer than a child has that has failed before Ready
			tr.parent.Order("expire")
			tr.wantUpgraded("upgrade in progress: process "+strconv.Itoa(tr.child.PID), "deadline")
			hurries := ""
			if maxDraining > 0 {
				hurries = ", hurry"
			}
			proctest.AwaitThat(t, "it hurries if it should", func() bool {
				tr.child.Order("look")
				return strings.HasSuffix(tr.child.Await("look").Text, "exit"+hurries)
			})
			tr.parent.Order("rehearse")
			tr.parent.AwaitStep(step.UndoneAwaited)
			tr.parent.Order("cancel")
			if m := tr.parent.Await("rehearsed"); !strings.Contains(m.Text, "cancelled") {
				t.Errorf("Rehearse returned %q", m.Text)
			}

			tr.parent.Order("upgrade patiently")
			tr.parent.AwaitStep(step.UndoneAwaited)
			tr.wantCharge(tr.parent.PID)
			tr.wantDrained()
			next := tr.Next()
			tr.wantUpgraded("", "")
			tr.parent.AwaitEnd()
			next.AwaitStep(alone)
			tr.wantLook(next, "2 %d in charge", next.PID)
			tr.wantCharge(next.PID)
			tr.wantStop(next)
		})
	}
}

// A child that drains after its trial was undone ends soon if its parent dies, because a
// supervisor waits for it.
func TestTrialUndoneOrphan(t *testing.T) {
	t.Parallel()
	tr := undoTrial(t)
	proctest.Kill(t, tr.parent.PID, syscall.SIGKILL)
	tr.awaitLook(tr.child, "2 %d draining, exit, hurry", tr.child.PID)
	tr.wantDrained()
}

// If the parent is stopped, it has its time.
func TestTrialUndoneStop(t *testing.T) {
	t.Parallel()
	tr := undoTrial(t)
	tr.parent.Order("stop")
	tr.parent.AwaitEnd()
	tr.wantFiles()
	tr.awaitLook(tr.child, "2 %d draining, exit", tr.child.PID)
	tr.wantDrained()
	tr.AwaitEnd()
}

// Clients notice nothing of trials.
func TestTrialLoad(t *testing.T) {
	t.Parallel()
	c, parent, _ := startChain(t, longTrial)
	tr := &trialRun{chain: c, parent: parent, before: proctest.OpenFiles(t, parent.PID)}
	for _, undo := range []func(){
		func() { tr.child.Order("stop") },
		func() { tr.child.Order("fail") },
		func() { tr.parent.Order("cancel") },
	} {
		parent.Order("upgrade")
		var requests [][]request
		for range 20 {
			requests = append(requests, c.send())
		}
		tr.awaitTrial()
		for range 20 {
			requests = append(requests, c.send())
		}
		undo()
		for range 20 {
			requests = append(requests, c.send())
		}
		for _, r := range requests {
			tr.wantAnswered(r)
		}
		tr.parent.Await("upgraded")
		tr.child.AwaitEnd()
	}
	tr.wantUndone()
}

// wantAnswered checks that requests are answered, by either process.
func (tr *trialRun) wantAnswered(requests []request) {
	tr.t.Helper()
	for _, r := range requests {
		r.conn.SetReadDeadline(time.Now().Add(proctest.Patience))
		answer, err := bufio.NewReader(r.conn).ReadString('\n')
		if answer != fmt.Sprintln(tr.parent.PID) && answer != fmt.Sprintln(tr.child.PID) {
			tr.t.Errorf("%s request answered with %q, %v", r.network, answer, err)
		}
		r.conn.Close()
	}
}

// Each of the generations has a trial, or not, and MaxDraining, or not.
func TestTrialChain(t *testing.T) {
	t.Parallel()
	for i := range 16 {
		has := func(bit int) bool { return i&(1<<bit) != 0 }
		t.Run(fmt.Sprintf("%04b", i), func(t *testing.T) {
			t.Parallel()
			envOf := func(tried, draining bool) []string {
				env := []string{maxDrainingVariable + "=0"}
				if draining {
					env = []string{maxDrainingVariable + "=2"}
				}
				if tried {
					env = append(env, longTrial)
				}
				return env
			}
			c, g, _ := startChain(t, envOf(has(0), has(1))...)
			for _, env := range [][]string{envOf(has(2), has(3)), envOf(true, true)} {
				g.Order("upgrade patiently", env...)
				next := c.Next()
				if m := g.Await("upgraded"); m.Text != "" {
					t.Fatalf("Upgrade returned %q", m.Text)
				}
				g.AwaitEnd()
				next.AwaitStep(alone)
				c.wantCharge(next.PID)
				g = next
			}
			c.wantStop(g)
		})
	}
}

// startTrialBesideElder starts a trial while the first generation drains, until held is
// closed.
func startTrialBesideElder(t *testing.T) (tr *trialRun, first *proctest.Process, held net.Conn) {
	t.Helper()
	c, first, _ := startChain(t, maxDrainingVariable+"=1")
	held = proctest.Opened[net.Conn](t)(net.Dial("tcp", c.tcp))
	proctest.Must(io.WriteString(held, "wh"))
	c.wantAnswers(c.send(), first.PID)
	first.Order("upgrade", longTrial)
	tr = &trialRun{chain: c, parent: c.Next()}
	tr.parent.AwaitStep(readyReturns)
	first.Await("upgraded")
	tr.parent.Order("upgrade")
	tr.awaitTrial()
	return tr, first, held
}

// Earlier generations that drain take a process on trial for a successor only once it is in
// charge.
func TestTrialDraining(t *testing.T) {
	t.Parallel()
	tr, first, held := startTrialBesideElder(t)
	tr.wantLook(tr.child, "1 %d draining, 2 %d in charge, 3 %d on trial", first.PID, tr.parent.PID, tr.child.PID)
	tr.child.Order("stop")
	tr.wantUpgraded("was stopped", "")
	tr.child.AwaitEnd()
	tr.wantLook(first, "1 %d draining, 2 %d in charge, exit, replaced", first.PID, tr.parent.PID)

	tr.parent.Order("upgrade")
	tr.awaitTrial()
	proctest.Kill(t, tr.parent.PID, syscall.SIGKILL)
	tr.awaitLook(first, "1 %d draining, 3 %d in charge, exit, replaced", first.PID, tr.child.PID)
	tr.awaitLook(tr.child, "1 %d draining, 3 %d in charge", first.PID, tr.child.PID)
	proctest.Kill(t, tr.child.PID, syscall.SIGKILL)
	tr.awaitLook(first, "1 %d draining, exit, replaced, hurry", first.PID)
	held.Close()
}

// Nor do they take one for a successor that has given up, and drains.
func TestTrialDrainingStopped(t *testing.T) {
	t.Parallel()
	tr, first, held := startTrialBesideElder(t)
	tr.hold()
	proctest.Suspend(t, tr.parent.PID) // so that it does not undo the trial
	tr.child.Order("stop")
	tr.child.Take("closed")
	proctest.Kill(t, tr.parent.PID, syscall.SIGKILL)
	tr.awaitLook(first, "1 %d draining, exit, replaced, hurry", first.PID)
	tr.wantDrained()
	held.Close()
}
