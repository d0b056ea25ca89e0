package handovertest

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// In these tests the parent may not kill its child, because the child belongs to another
// user. Root needs CAP_KILL for that (capabilities(7)), which the parents do not have.

const nobody = "65534"

// startUnkillable starts a first generation whose children belong to nobody. It is
// impatient, and pauses at a step.
func startUnkillable(t *testing.T, pause step.Step, env ...string) (*chain, *proctest.Process) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	c := newChain(t)
	// Everybody may execute what is tested, and write the PID file.
	proctest.OK(t, os.Chmod(c.dir, 0o777))
	bin := proctest.SocketDir(t)
	proctest.OK(t, os.Chmod(bin, 0o755))
	copyBinary(t, filepath.Join(bin, "service"))
	c.program = filepath.Join(bin, "service")
	dropCapKill(t)
	env = append(env, acknowledgeVariable+"=100ms", childUserVariable+"="+nobody, c.PauseAt(pause))
	parent, _ := c.start(env...)
	parent.AwaitStep(alone)
	return c, parent
}

// copyBinary has another process write the copy: what this one has open for writing could
// be open in a process that another test starts, and then not be executed.
func copyBinary(t *testing.T, path string) {
	t.Helper()
	self, err := os.Executable()
	proctest.OK(t, err)
	proctest.OK(t, exec.Command("cp", self, path).Run())
	proctest.OK(t, os.Chmod(path, 0o755))
}

// dropCapKill takes the capability from what the goroutine of the test starts. Its
// thread ends with it.
func dropCapKill(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	proctest.OK(t, unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_KILL, 0, 0, 0))
}

// wantUnconfirmed checks the error of an upgrade to a child that may live on, beside
// which there is no other.
func wantUnconfirmed(t *testing.T, parent, child *proctest.Process, m proctest.Message) {
	t.Helper()
	for _, want := range []string{strconv.Itoa(child.PID), "not permitted"} {
		if !strings.Contains(m.Text, want) {
			t.Errorf("Upgrade returned %q, which does not say %q", m.Text, want)
		}
	}
	if err := syscall.Kill(child.PID, 0); err != nil {
		t.Fatalf("the child was killed: %v", err)
	}
	parent.Order("upgrade")
	if m := parent.Await("upgraded"); m.Text != "upgrade in progress" {
		t.Errorf("a second Upgrade returned %q", m.Text)
	}
}

// wantBounded checks how long a call took that must not wait for a child's end. The bound
// is two seconds. The rest is for busy machines.
func wantBounded(t *testing.T, call string, began time.Time) {
	t.Helper()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("%s took %v", call, took)
	}
}

// upgradeSettled is upgrade once the attempt before has been decided.
func (c *chain) upgradeSettled(g *proctest.Process) *proctest.Process {
	c.t.Helper()
	proctest.AwaitThat(c.t, "the attempt before is decided", func() bool {
		g.Order("upgrade patiently")
		m := g.Await("upgraded")
		if m.Text != "" && m.Text != "upgrade in progress" {
			c.t.Fatalf("upgrade: %s", m.Text)
		}
		return m.Text == ""
	})
	next := c.Next()
	next.AwaitStep(alone)
	g.AwaitEnd()
	return next
}

func TestUnkillableLeaves(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		at        step.Step
		suspended bool // it has not heard of its commit when it hears of the abort
	}{
		{step.HereSaid, false},
		{step.PIDFilePrepared, true},
		{step.ReadySaid, false},
		{step.ReadySaid, true},
		{step.VerdictReceived, false},
		{step.PIDFileWritten, false},
	} {
		name := test.at.String()
		if test.suspended {
			name += ", suspended"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pause := step.AfterCommit
			switch {
			case isBefore(test.at, step.ReadySaid):
				pause = step.Step{}
			case test.suspended:
				pause = step.BeforeCommit
			}
			c, parent := startUnkillable(t, pause)
			before := proctest.OpenFiles(t, parent.PID)
			parent.Order("upgrade", c.PauseAt(test.at))
			child := c.Next()
			child.AwaitStep(test.at)
			if test.suspended {
				proctest.Suspend(t, child.PID)
			}
			began := time.Now()
			if pause == (step.Step{}) {
				parent.Order("cancel")
			} else {
				parent.AwaitStep(pause)
				parent.Resume()
			}
			m := parent.Await("upgraded")
			wantBounded(t, "Upgrade", began)
			wantUnconfirmed(t, parent, child, m)
			c.wantAnswers(c.send(), parent.PID)

			if test.suspended {
				proctest.Continue(t, child.PID)
			}
			child.Resume()
			if m := child.Await("refused"); !strings.Contains(m.Text, "aborted") {
				t.Errorf("Ready returned %q", m.Text)
			}
			child.AwaitEnd()
			proctest.AwaitThat(t, "the parent has closed what it had for the child", func() bool {
				return maps.Equal(proctest.OpenFiles(t, parent.PID), before)
			})
			next := c.upgradeSettled(parent)
			c.wantCharge(next.PID)
			c.wantStop(next)
		})
	}
}

// A process that the child has forked has its pipe open, which therefore does not tell of its
// death.
func TestUnkillablePipeHeld(t *testing.T) {
	t.Parallel()
	c, parent := startUnkillable(t, step.Step{})
	parent.Order("upgrade", forkVariable+"="+step.HereSaid.String(), c.PauseAt(newReturned))
	child := c.Next()
	holder, err := strconv.Atoi(child.Await("forked").Text)
	proctest.OK(t, err)
	c.Watch(holder)
	child.AwaitStep(newReturned)
	parent.Order("cancel")
	wantUnconfirmed(t, parent, child, parent.Await("upgraded"))
	proctest.Kill(t, child.PID, syscall.SIGKILL)
	next := c.upgradeSettled(parent)
	c.wantCharge(next.PID)
	next.Order("stop")
	next.Await("stopped")
	c.wantFiles()
}

// Stop does not wait for a child that cannot be killed, which cannot take charge after it.
func TestUnkillableStop(t *testing.T) {
	t.Parallel()
	for _, at := range []step.Step{step.HereSaid, step.PIDFileWritten} {
		t.Run(at.String(), func(t *testing.T) {
			t.Parallel()
			pause := step.AfterCommit
			if at == step.HereSaid {
				pause = step.Step{}
			}
			c, parent := startUnkillable(t, pause)
			parent.Order("upgrade", c.PauseAt(at))
			child := c.Next()
			child.AwaitStep(at)
			// It cannot hear of the abort before Stop.
			proctest.Suspend(t, child.PID)
			if pause != (step.Step{}) {
				parent.AwaitStep(pause)
				parent.Resume()
			}
			began := time.Now()
			parent.Order("stop")
			parent.Take("stopped")
			wantBounded(t, "Stop", began)
			if m := parent.Take("upgraded"); !strings.Contains(m.Text, strconv.Itoa(child.PID)) {
				t.Errorf("Upgrade returned %q", m.Text)
			}
			parent.AwaitEnd()
			proctest.Continue(t, child.PID)
			child.Resume()
			if m := child.Await("refused"); !strings.Contains(m.Text, "aborted") {
				t.Errorf("Ready returned %q", m.Text)
			}
			child.AwaitEnd()
			c.AwaitEnd()
		})
	}
}

// The manager is told at once that its reload has failed, and so is one that asks again.
func TestUnkillableManager(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	c, parent := startUnkillable(t, step.Step{}, m.variable())
	m.want(parent.PID, "READY=1")
	parent.Order("upgrade", c.PauseAt(step.HereSaid))
	child := c.Next()
	child.AwaitStep(step.HereSaid)
	parent.Order("cancel")
	wantUnconfirmed(t, parent, child, parent.Await("upgraded"))
	m.want(parent.PID, reloading)
	if n := m.next(); n.PID != parent.PID || !strings.HasPrefix(n.Text, failed(errors.New(""))) {
		t.Errorf("%d told systemd %q, want that the upgrade has failed", n.PID, n.Text)
	}
	m.want(parent.PID, reloading, "READY=1")
	m.wantNoMore()

	child.Resume()
	child.Await("refused")
	child.AwaitEnd()
	proctest.AwaitThat(t, "the parent has learned of the end", func() bool { return !proctest.Exists(filepath.Join(c.dir, "pid.tmp")) })
	c.wantCharge(parent.PID)
	c.wantStop(parent)
}
