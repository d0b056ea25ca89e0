package handovertest

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
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
			c.wantGoesOn(child)
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

// startSleeper starts a process that a child takes for its parent, and returns a handle
// of it. The test, which has the pipes, outlives it.
func startSleeper(t *testing.T) (*exec.Cmd, *os.File) {
	t.Helper()
	sleeper := exec.Command("sleep", "1000")
	proctest.OK(t, sleeper.Start())
	t.Cleanup(func() {
		sleeper.Process.Kill()
		sleeper.Wait()
	})
	handle, err := unix.PidfdOpen(sleeper.Process.Pid, unix.PIDFD_NONBLOCK)
	proctest.OK(t, err)
	file := os.NewFile(uintptr(handle), "handle")
	t.Cleanup(func() { file.Close() })
	return sleeper, file
}

// What was said is heard even if the death of who said it is noticed first.
func TestParentDeadPipeHeld(t *testing.T) {
	s := proctest.NewService(t)
	sleeper, handle := startSleeper(t)
	sleeper.Process.Kill()
	sleeper.Wait()
	// With one thread, the goroutine that New has started last, which watches the
	// process, is the first to run.
	cmd := s.Command("tell-commit", "GOMAXPROCS=1")
	beginNew, err := cmd.StdinPipe()
	proctest.OK(t, err)
	child := speakToChild(t, cmd, "", "process,parent", handle)
	child.sayAll(t, "commit")
	beginNew.Close()
	if m := s.Await("acknowledged"); m.Text != "true" {
		t.Error("the child took itself for an orphan")
	}
}

func init() {
	proctest.Role("tell-commit", func() {
		acknowledged := false
		proctest.When(step.Acknowledged, func() { acknowledged = true })
		proctest.Must(io.Copy(io.Discard, os.Stdin))
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		runtime.Gosched()
		MustBeReady(upg)
		proctest.Report("acknowledged", acknowledged)
	})
}

// Upgrade is accepted from the moment when the parent's process has ended, or has closed its
// pipe, whether or not this process has noticed it.
func TestParentDeadUpgrade(t *testing.T) {
	for _, tells := range []string{"process", "pipe"} {
		t.Run(tells, func(t *testing.T) {
			s := proctest.NewService(t)
			sleeper, handle := startSleeper(t)
			entries, files := "process,parent", []*os.File{handle}
			if tells == "pipe" {
				entries, files = "fd,a", []*os.File{os.Stderr}
			}
			arg := proctest.WithArg(tells + " " + strconv.Itoa(sleeper.Process.Pid))
			child := speakToChild(t, s.Command("upgrade-at-once", arg), "", entries, files...)
			child.sayAll(t, "commit")
			if m := s.Await("early"); m.Text != tableflip.ErrParentRunning.Error() {
				t.Errorf("Upgrade beside the parent: %s", m.Text)
			}
			if tells == "process" {
				sleeper.Process.Kill()
			} else {
				child.saying.Close()
			}
			if m := s.Await("upgraded"); !strings.HasPrefix(m.Text, "true ") {
				t.Errorf("Upgrade was not accepted: %s", m.Text)
			}
		})
	}
}

// The process of a parent may hold a lock for a moment after it has closed its pipe.
func TestParentProcessAwaited(t *testing.T) {
	s := proctest.NewService(t)
	sleeper, handle := startSleeper(t)
	arg := proctest.WithArg(strconv.Itoa(sleeper.Process.Pid))
	child := speakToChild(t, s.Command("await-process", arg), "", "process,parent", handle)
	child.sayAll(t, "commit")
	s.Await("waiting")
	child.saying.Close()
	time.Sleep(time.Second / 10) // in which it must not return, and need not have begun to wait
	sleeper.Process.Kill()
	if m := s.Await("waited"); m.Text != "true" {
		t.Error("WaitForParent has returned while the parent's process lived")
	}
}

func init() {
	proctest.Role("await-process", func() {
		const limit = 5 * time.Second // after which nobody waits for the process
		parent := proctest.Must(unix.PidfdOpen(proctest.Must(strconv.Atoi(proctest.Arg())), 0))
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		began := time.Now()
		proctest.Report("waiting")
		proctest.Must(0, upg.WaitForParent(context.Background()))
		proctest.Report("waited", time.Since(began) >= limit || hasEnded(parent))
	})
}

func init() {
	proctest.Role("upgrade-at-once", func() {
		runtime.GOMAXPROCS(1)
		upg := proctest.Must(tableflip.New(tableflip.Options{Command: proctest.Unstartable}))
		MustBeReady(upg)
		tells, pid, _ := strings.Cut(proctest.Arg(), " ")
		parent := proctest.Must(unix.Dup(4)) // the pipe, which this process may close
		if tells == "process" {
			parent = proctest.Must(unix.PidfdOpen(proctest.Must(strconv.Atoi(pid)), 0))
		}
		proctest.Report("early", upg.Upgrade())
		// While it waits like this, no other goroutine runs.
		polled := unix.PollFd{Fd: int32(parent), Events: unix.POLLIN}
		for polled.Revents == 0 {
			runtime.Gosched()
			timeout := unix.NsecToTimespec(1e6)
			unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&polled)), 1, uintptr(unsafe.Pointer(&timeout)), 0, 0, 0)
		}
		err := upg.Upgrade()
		proctest.Report("upgraded", errors.Is(err, os.ErrNotExist), err)
	})
}
