//go:build unix

package handovertest

import (
	"fmt"
	"io"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

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
	tr.parent.AwaitStep(step.TrialBegun)
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

// wantUpgraded checks what Upgrade returns.
func (tr *trialRun) wantUpgraded(text, cause string) {
	tr.t.Helper()
	m := tr.parent.Await("upgraded")
	if !strings.Contains(m.Text, text) || (m.Text == "") != (text == "") || cause != "" && m.Cause != cause {
		tr.t.Errorf("Upgrade returned %q, caused by %q; want %q, %q", m.Text, m.Cause, text, cause)
	}
}

// wantUndone checks that the parent is as it was, and can be upgraded.
func (tr *trialRun) wantUndone() {
	tr.t.Helper()
	tr.child.AwaitEnd()
	proctest.AwaitThat(tr.t, "the parent knows of the end", func() bool {
		tr.parent.Order("look")
		return tr.parent.Await("look").Text == fmt.Sprintf("1 %d in charge", tr.parent.PID)
	})
	proctest.AwaitThat(tr.t, "it has closed what it had for the child", func() bool {
		return maps.Equal(proctest.OpenFiles(tr.t, tr.parent.PID), tr.before)
	})
	proctest.WantNoChildren(tr.t, tr.parent.PID)
	tr.wantCharge(tr.parent.PID)
	next := tr.upgrade(tr.parent)
	tr.wantCharge(next.PID)
	tr.wantStop(next)
}

func TestTrial(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	parent, _ := c.start(shortTrial, c.PauseAt(step.TrialBegun))
	tr := &trialRun{chain: c, parent: parent}
	parent.AwaitStep(alone)
	parent.Order("upgrade")
	tr.awaitTrial()

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
	c.wantCharge(tr.child.PID)
	for _, r := range tr.held {
		proctest.Must(io.WriteString(r.conn, "o\n"))
	}
	c.wantAnswers(tr.held, tr.child.PID)
	next := c.upgrade(tr.child)
	c.wantCharge(next.PID)
	c.wantStop(next)
}

// A trial is undone by its child, which drains.
func TestTrialChildLeaves(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ order, says string }{
		{"stop", "was stopped during its trial"},
		{"fail", "failed: no disk"},
	} {
		t.Run(test.order, func(t *testing.T) {
			t.Parallel()
			tr := startTrial(t)
			tr.hold()
			tr.child.Order(test.order)
			tr.wantUpgraded(test.says, "")
			tr.child.Await("never alone")
			tr.wantLook(tr.parent, "1 %d in charge, 2 %d draining", tr.parent.PID, tr.child.PID)
			tr.wantPIDFile(tr.parent.PID)
			tr.wantAnswers(tr.send(), tr.parent.PID)
			tr.wantDrained()
			tr.wantUndone()
		})
	}
}

// A trial is undone by the parent, and the child drains.
func TestTrialParentUndoes(t *testing.T) {
	t.Parallel()
	tr := startTrial(t)
	tr.hold()
	tr.parent.Order("cancel")
	tr.wantUpgraded("cancelled", "")
	if m := tr.child.Await("never alone"); !strings.Contains(m.Text, "undone") {
		t.Errorf("WaitForParent returned %q", m.Text)
	}
	tr.wantDrained()
	tr.wantUndone()
}

// A trial is undone by the end of its child.
func TestTrialChildEnds(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, says, cause string
		end               func(*trialRun)
	}{
		{"killed", "during its trial", "signal: killed", func(tr *trialRun) { proctest.Kill(tr.t, tr.child.PID, syscall.SIGKILL) }},
		{"exits", "during its trial", "exit status 7", func(tr *trialRun) { tr.child.Order("exit") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			tr := startTrial(t)
			test.end(tr)
			tr.wantUpgraded(test.says, test.cause)
			tr.wantUndone()
		})
	}
}
