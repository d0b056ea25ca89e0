//go:build unix

package handovertest

import (
	"errors"
	"maps"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// One of the two processes of an upgrade dies, hangs or gives up, at any step of the
// handover.

var mishaps = map[string]mishap{
	"exit 0": func(*proctest.Wire, *tableflip.Upgrader) { os.Exit(0) },
	"exit 7": func(*proctest.Wire, *tableflip.Upgrader) { os.Exit(7) },
	"hang":   func(w *proctest.Wire, _ *tableflip.Upgrader) { w.Hang() },
	"SIGSTOP": func(w *proctest.Wire, _ *tableflip.Upgrader) {
		w.Report("hanging")
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		select {} // until it takes effect
	},
	"Stop and exit": func(_ *proctest.Wire, upg *tableflip.Upgrader) {
		upg.Stop()
		os.Exit(7)
	},
	"Stop and linger": func(w *proctest.Wire, upg *tableflip.Upgrader) {
		upg.Stop()
		w.Hang()
	},
	"Stop after saying ready": func(w *proctest.Wire, upg *tableflip.Upgrader) {
		said := make(chan struct{})
		proctest.When(step.ReadySaid, func() { close(said) })
		go func() {
			<-said
			upg.Stop()
		}()
		w.ReportError("refused", upg.Ready())
		w.Hang()
	},
	"hang up": func(w *proctest.Wire, _ *tableflip.Upgrader) {
		syscall.Close(3)
		w.Hang()
	},
	"say nonsense":        say("ready!\n"),
	"say an empty line":   say("\n"),
	"say here twice":      say("here 1\n"),
	"say no end of zeros": say(strings.Repeat("0", 5000)),
	"say half a word and hang up": func(w *proctest.Wire, _ *tableflip.Upgrader) {
		proctest.Must(syscall.Write(3, []byte("re")))
		syscall.Close(3)
		w.Hang()
	},
	"no space": func(*proctest.Wire, *tableflip.Upgrader) { fillDisk() },
	"no space at first": func(w *proctest.Wire, upg *tableflip.Upgrader) {
		fillDisk()
		w.ReportError("no space", upg.Ready())
		step.Reached(tryingAgain)
		proctest.Must(0, proctest.Limit(unix.RLIMIT_FSIZE, -1))
	},
}

// say sends something else than a child that is ready does.
func say(message string) mishap {
	return func(w *proctest.Wire, _ *tableflip.Upgrader) {
		proctest.Must(syscall.Write(3, []byte(message)))
		w.Hang()
	}
}

// fillDisk makes every write to a file fail, as on a full disk.
func fillDisk() {
	signal.Ignore(syscall.SIGXFSZ)
	proctest.Must(0, proctest.Limit(unix.RLIMIT_FSIZE, 0))
}

// TestChildFails checks that a child that does not get to the commit leaves its
// parent as it was.
func TestChildFails(t *testing.T) {
	t.Parallel()
	const killed, late = "signal: killed", "deadline"
	const toSuspend = 6 * time.Second // which the parent must be in before this passes
	tests := []struct {
		name    string
		fault   step.Step // the step at which the child is killed
		mishap  string    // or what else happens to it
		refusal error     // the cause of what its Ready returns, if it does
		lingers bool      // it does not end by itself
		timeout time.Duration
		cause   string // of what Upgrade returns
		text    string // in that error
	}{
		{name: "killed before New", fault: beforeNew, cause: killed},
		{name: "killed after New", fault: newReturned, cause: killed},
		{name: "killed after claiming", fault: claimed, cause: killed},
		{name: "killed after New said here", fault: step.HereSaid, cause: killed},
		{name: "killed after writing the PID file", fault: step.PIDFilePrepared, cause: killed},
		{name: "killed after it said ready", fault: step.ReadySaid, text: "the new process"},

		{name: "exits", mishap: "exit 0", text: "exit status 0"},
		{name: "fails", mishap: "exit 7", cause: "exit status 7"},
		{name: "stops and exits", mishap: "Stop and exit", cause: "exit status 7"},
		{name: "stops and lingers", mishap: "Stop and linger", lingers: true, text: "gave up"},
		{name: "stops after it said ready", mishap: "Stop after saying ready", lingers: true, text: "was stopped"},
		{name: "closes its ready pipe", mishap: "hang up", lingers: true, text: "gave up"},
		{name: "says nonsense", mishap: "say nonsense", lingers: true, timeout: toSuspend, cause: late},
		{name: "says an empty line", mishap: "say an empty line", lingers: true, timeout: toSuspend, cause: late},
		{name: "says twice that it is here", mishap: "say here twice", lingers: true, text: "twice"},
		{name: "says no end of zeros", mishap: "say no end of zeros", lingers: true, text: "no end"},
		{name: "says half a word", mishap: "say half a word and hang up", lingers: true, text: "gave up"},
		{name: "hangs", mishap: "hang", lingers: true, timeout: toSuspend, cause: late},
		{name: "is suspended", mishap: "SIGSTOP", lingers: true, timeout: toSuspend, cause: late},
		{name: "has no space for the PID file", mishap: "no space", refusal: syscall.EFBIG, cause: "exit status 2"},
		{name: "misses the PID file's directory", mishap: missingDirectory, refusal: syscall.ENOENT, cause: "exit status 2"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			env := []string{timeoutVariable + "=" + test.timeout.String()}
			if test.lingers {
				env = append(env, lingers)
			}
			c, parent, _ := startChain(t, env...)
			before := proctest.OpenFiles(t, parent.PID)

			parent.Order("upgrade", c.PauseAt(started), c.DieAt(test.fault), mishapVariable+"="+test.mishap)
			parent.AwaitStep(step.ChildStarted)
			proctest.Suspend(t, parent.PID)
			child := c.Next()
			child.AwaitStep(started)
			requests := c.send()
			child.Resume()
			if test.refusal != nil {
				if n := child.Await("refused"); n.Cause != test.refusal.Error() || !strings.Contains(n.Text, "PID file") {
					t.Errorf("Ready returned %q, caused by %q; want %q", n.Text, n.Cause, test.refusal)
				}
			}
			if test.lingers {
				child.Await("hanging")
			} else {
				child.AwaitEnd()
			}
			proctest.Continue(t, parent.PID)

			n := parent.Await("upgraded")
			if !strings.HasPrefix(n.Text, "tableflip: ") || !strings.Contains(n.Text, test.text) || test.cause != "" && n.Cause != test.cause {
				t.Errorf("Upgrade returned %q, caused by %q; want %q, caused by %q", n.Text, n.Cause, test.text, test.cause)
			}
			if err := syscall.Kill(child.PID, 0); err != syscall.ESRCH {
				t.Errorf("the child has not been reaped: %v", err)
			}
			proctest.WantNoChildren(t, parent.PID)
			c.wantAnswers(requests, parent.PID)
			c.wantCharge(parent.PID)
			if after := proctest.OpenFiles(t, parent.PID); !maps.Equal(after, before) {
				t.Errorf("the descriptors were %v, and are %v", before, after)
			}

			c.wantGoesOn(parent)
		})
	}
}

// TestParentKilled checks that the child carries the service on.
func TestParentKilled(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		step  step.Step // of the parent, at which it is killed; if none, the test kills it
		pause step.Step // where the child waits meanwhile
	}{
		{name: "child just started", step: step.ChildStarted, pause: started},
		{name: "child initialises", pause: newReturned},
		{name: "child has claimed", pause: claimed},
		{name: "ready received", step: step.ReadyReceived, pause: readyReturns},
		{name: "before commit", step: step.BeforeCommit, pause: readyReturns},
		{name: "after commit", step: step.AfterCommit, pause: readyReturns},
		{name: "acknowledged", step: step.AcknowledgementReceived, pause: readyReturns},
		{name: "manager notified", step: step.ManagerNotified, pause: readyReturns},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newChain(t)
			parent, reaped := c.start(c.DieAt(test.step))
			parent.AwaitStep(alone)
			before := proctest.OpenFiles(t, parent.PID)

			parent.Order("upgrade", c.PauseAt(test.pause))
			child := c.Next()
			child.AwaitStep(test.pause)
			if test.step == (step.Step{}) {
				syscall.Kill(parent.PID, syscall.SIGKILL)
			}
			<-reaped
			requests := c.send()
			child.Resume()

			child.AwaitStep(alone)
			c.wantAnswers(requests, child.PID)
			c.wantCharge(child.PID)
			proctest.WantNoChildren(t, child.PID)
			if before, after := proctest.KindsOf(before), proctest.KindsOf(proctest.OpenFiles(t, child.PID)); !maps.Equal(after, before) {
				t.Errorf("the parent had the descriptors %v, and the child has %v", before, after)
			}

			c.wantGoesOn(child)
		})
	}
}

// TestServiceGone checks what is left when the process in charge is killed and
// there is no other: what its death itself leaves, and no more. It is for a
// supervisor to start the service again.
func TestServiceGone(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name       string
		parentStep step.Step // at which the parent is killed
		childStep  step.Step // or the child
	}{
		{name: "parent killed before starting a child", parentStep: starting},
		// It has said that it is in charge, and cannot take that back: the parent exits.
		{name: "child killed when it is in charge", childStep: step.Acknowledged},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := newChain(t)
			parent, reaped := c.start(c.DieAt(test.parentStep))
			parent.AwaitStep(alone)
			parent.Order("upgrade", c.DieAt(test.childStep))
			last := parent
			if test.childStep != (step.Step{}) {
				last = c.Next()
				if n := parent.Await("upgraded"); n.Text != "" {
					t.Errorf("Upgrade returned %q", n.Text)
				}
				last.AwaitEnd()
			}
			<-reaped

			wantNobody(t, "tcp", c.tcp)
			wantNobody(t, "unix", filepath.Join(c.dir, "socket"))
			c.wantPIDFile(last.PID)
			c.wantFiles("pid", "socket")

			c.removeSocket()
			again, _ := c.start()
			again.AwaitStep(alone)
			c.wantCharge(again.PID)
			c.wantGoesOn(again)
		})
	}
}

// wantNobody checks that there is a socket, and that nobody listens on it.
func wantNobody(t *testing.T, network, addr string) {
	t.Helper()
	if conn, err := net.Dial(network, addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dialling %s: %v, %v; want it refused", network, conn, err)
	}
}

// TestFirstKilled checks that the temporary file, which a process
// that is killed while it writes the PID file leaves, goes at the next start.
func TestFirstKilled(t *testing.T) {
	t.Parallel()
	c := newChain(t)
	first, reaped := c.start(c.DieAt(step.PIDFilePrepared))
	first.AwaitEnd()
	<-reaped
	c.wantFiles("pid.tmp", "socket")
	c.removeSocket()
	again, _ := c.start()
	again.AwaitStep(alone)
	c.wantCharge(again.PID)
	c.wantStop(again)
}

// TestReadyFullDisk checks that a Ready that could not write the PID file
// leaves no other file, and can be tried again.
func TestReadyFullDisk(t *testing.T) {
	t.Parallel()
	wantTrouble := func(g *proctest.Process) {
		t.Helper()
		if n := g.Await("no space"); n.Cause != syscall.EFBIG.Error() || !strings.Contains(n.Text, "PID file") {
			t.Errorf("Ready returned %q, caused by %q; want %q", n.Text, n.Cause, syscall.EFBIG)
		}
		g.AwaitStep(tryingAgain)
	}
	const happens = mishapVariable + "=no space at first"
	c := newChain(t)
	parent, _ := c.start(happens, c.PauseAt(tryingAgain))
	wantTrouble(parent)
	c.wantFiles("socket")
	parent.Resume()
	parent.AwaitStep(alone)
	c.wantCharge(parent.PID)

	parent.Order("upgrade", happens, c.PauseAt(tryingAgain))
	child := c.Next()
	wantTrouble(child)
	c.wantCharge(parent.PID)
	child.Resume()
	child.AwaitStep(alone)
	parent.AwaitEnd()
	c.wantCharge(child.PID)
	c.wantStop(child)
}
