package handovertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/event"
	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/internal/step"
)

// Who dies with a failed upgrade when a wrapper has started the service: the service's
// process, and nobody who only bears its number.

// pidfd refers to a process until the end of the test.
func pidfd(t *testing.T, pid int) int {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	proctest.OK(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func hasEnded(fd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n == 1 && err == nil
}

func TestWrapperFails(t *testing.T) {
	for _, wrapper := range []struct{ name, script string }{
		{"exits", `"$0" &`},
		{"waits", `"$0" & wait`},
		{"stays", `"$0" & exec sleep 1000`},
		{"exits with a status", `"$0" & exit 3`},
	} {
		for _, at := range []step.Step{step.ChildStarted, step.ReadyReceived} {
			if at == step.ReadyReceived && wrapper.name == "exits with a status" {
				continue // The service has only a second to come to that.
			}
			t.Run(wrapper.name+", "+at.String(), func(t *testing.T) {
				// At the first step the upgrade is over, so that the parent has not heard
				// that the service is here.
				role := "hang"
				if at == step.ReadyReceived {
					role = "ready-or-leave"
				}
				script := "{ echo; echo hello; } >&3; " + wrapper.script
				upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(script)}, role)
				proctest.OK(t, upg.Ready())
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var service int
				restore := proctest.During(t, at, func() {
					service = pidfd(t, s.Await("hanging").PID)
					cancel()
					time.Sleep(time.Second / 20) // The upgrade learns of it from a goroutine.
				})
				err := upg.UpgradeContext(ctx)
				restore()
				if err == nil {
					t.Fatal("the upgrade succeeded")
				}
				if !hasEnded(service) {
					t.Error("the service's process lives")
				}
			})
		}
	}
}

func init() {
	// ready-or-leave hangs when it has been refused.
	proctest.Role("ready-or-leave", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("hanging")
		upg.Ready()
		proctest.UntilKilled()
	})
}

// The service that a wrapper has started dies before it is ready. Neither the wrapper
// nor the pipe tells.
func TestWrapperServiceDies(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0" & exec sleep 1000`)}, "die-held", proctest.WithArg("5"))
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	child := s.Await("dying")
	s.Watch(proctest.Must(strconv.Atoi(child.Text)))
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%d, exited", child.PID)) {
		t.Errorf("Upgrade: %v", err)
	}
}

// Nor does the pipe tell of one without a wrapper, for which no status is a success.
func TestServiceExitsPipeHeld(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{}, "die-held", proctest.WithArg("0"))
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	child := s.Await("dying")
	s.Watch(proctest.Must(strconv.Atoi(child.Text)))
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%d, exited before it was ready: exit status 0", child.PID)) {
		t.Errorf("Upgrade: %v", err)
	}
}

// A wrapper may have succeeded long before its service is ready.
func TestWrapperSucceeds(t *testing.T) {
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`PROCTEST_ARG=$$ "$0" &`)}, "outlive-wrapper")
	Upgrade(t, upg)
	s.Await("ready")
}

func init() {
	proctest.Role("outlive-wrapper", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		wrapper := proctest.Must(strconv.Atoi(proctest.Arg()))
		for syscall.Kill(wrapper, 0) != syscall.ESRCH { // until it was reaped
			time.Sleep(time.Millisecond) // a poll
		}
		MustBeReady(upg)
		proctest.Report("ready")
	})
}

// The service gets the time to end that its wrapper has not used. A busy machine may need
// some attempts.
func TestWrapperServiceFails(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "marker")
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0" &`)}, "fail-slowly", proctest.WithArg(marker))
	proctest.OK(t, upg.Ready())
	events, cancel := event.Subscribe()
	defer cancel()
	proctest.AwaitThat(t, "the service ends by itself", func() bool {
		result := proctest.InBackground(upg.Upgrade)
		service := s.Await("failing").PID
		proctest.AwaitThat(t, "it has proven to be the service", func() bool {
			return strings.Contains(strings.Join(shown(events), ", "), "here pid")
		})
		proctest.Terminate(t, service)
		if err := proctest.Within(t, "Upgrade", result); err == nil || !strings.Contains(err.Error(), "failed: no disk") {
			t.Fatalf("Upgrade: %v", err)
		}
		return proctest.Exists(marker)
	})
}

func init() {
	proctest.Role("fail-slowly", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("failing")
		<-terminated
		upg.Fail(errors.New("no disk"))
		time.Sleep(time.Second / 5) // in which a parent that does not wait kills this process: a correct one waits for a minute
		proctest.Must(0, os.WriteFile(proctest.Arg(), nil, 0o600))
	})
}

// The service has ended when the parent looks who has said that it is here.
func TestWrapperServiceEnds(t *testing.T) {
	for _, test := range []struct{ name, script string }{
		// It has closed its descriptors for a moment before it has ended.
		{"now", `sleep 0.3 0<&- >&- 2>&- 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- &
			until [ -z "$(ls /proc/$!/fd)" ]; do :; done`},
		{"and was reaped", "true & wait $!"},
	} {
		t.Run(test.name, func(t *testing.T) {
			upg, _ := NewParent(t, tableflip.Options{
				Command: proctest.Shell(test.script + "\necho here $! >&3; exec sleep 1000"),
			}, "fail")
			proctest.OK(t, upg.Ready())
			if err := twice(t, upg.Upgrade); err == nil || !strings.Contains(err.Error(), "exited before it was in charge") {
				t.Errorf("Upgrade: %v", err)
			}
		})
	}
}

// twice returns the result of the second of two upgrades, which must leave nothing open.
func twice(t *testing.T, upgrade func() error) error {
	t.Helper()
	proctest.WithoutGC(t)
	_ = upgrade()
	before := proctest.OpenDescriptors()
	err := upgrade()
	proctest.AwaitThat(t, fmt.Sprintf("no more than %d descriptors are open", before), func() bool {
		return proctest.OpenDescriptors() <= before
	})
	return err
}

// The parent has a handle of a service that a wrapper has started.
func TestWrapperLeaks(t *testing.T) {
	shorten(t, &step.ExitGrace)
	upg, _ := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0" & wait`)}, "ready-or-leave")
	proctest.OK(t, upg.Ready())
	proctest.OK(t, twice(t, func() error { return upg.Rehearse(t.Context()) }))
}

func init() {
	proctest.Role("die-held", func() {
		proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("dying", hold(3, 4))
		os.Exit(proctest.Must(strconv.Atoi(proctest.Arg())))
	})
}

// The death of a service that a wrapper has started is confirmed by its handle, whoever has
// its pipe.
func TestWrapperStuckPipeHeld(t *testing.T) {
	shorten(t, &step.AcknowledgeTimeout)
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0" & wait`)}, "hang-committed")
	proctest.OK(t, upg.Ready())
	for range 2 {
		err := upg.Upgrade()
		proctest.WantError(t, "Upgrade", err, os.ErrDeadlineExceeded)
		if strings.Contains(fmt.Sprint(err), "still there") {
			t.Errorf("Upgrade: %v", err)
		}
		m := s.Await("held")
		s.Watch(proctest.Must(strconv.Atoi(m.Text)))
		if syscall.Kill(m.PID, 0) == nil && !hasEnded(pidfd(t, m.PID)) {
			t.Errorf("the service, %d, lives", m.PID)
		}
	}
}

func init() {
	proctest.Role("hang-committed", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		proctest.Report("held", hold(3, 4))
		proctest.When(step.VerdictReceived, proctest.UntilKilled)
		upg.Ready()
	})
}

// A process that does not have the pipe open has not been started for the upgrade.
func TestWrapperInnocent(t *testing.T) {
	innocent := exec.Command("sleep", "1000")
	proctest.OK(t, innocent.Start())
	defer func() {
		innocent.Process.Kill()
		innocent.Wait()
	}()
	for _, test := range []struct{ name, then string }{
		{"fails", "exit 5"},
		{"fails after the commit", "echo ready >&3; read verdict <&4; exit 5"},
		{"is not heard of", "exec 3>&- 4>&-; exec sleep 1000"},
	} {
		t.Run(test.name, func(t *testing.T) {
			shorten(t, &step.ExitGrace)
			upg, _ := NewParent(t, tableflip.Options{
				Command: proctest.Shell(fmt.Sprintf("echo here %d >&3; %s", innocent.Process.Pid, test.then)),
			}, "fail")
			proctest.OK(t, upg.Ready())
			if err := twice(t, upg.Upgrade); err == nil {
				t.Error("the upgrade succeeded")
			}
			if proctest.IsReaped(innocent.Process.Pid) || hasEnded(pidfd(t, innocent.Process.Pid)) {
				t.Fatal("an innocent process was killed")
			}
		})
	}
}

// The parent has the pipe open as well.
func TestWrapperNamesParent(t *testing.T) {
	s, first := proctest.Start(t, "named-by-child")
	if m := s.Await("upgraded"); !strings.Contains(m.Text, fmt.Sprintf("%q", fmt.Sprint(first.Process.Pid))) {
		t.Errorf("Upgrade: %s", m.Text)
	}
}

func init() {
	proctest.Role("named-by-child", func() {
		upg := proctest.Must(tableflip.New(tableflip.Options{Command: proctest.Shell("echo here $PPID >&3; exec sleep 1000")}))
		MustBeReady(upg)
		proctest.Report("upgraded", upg.Upgrade())
	})
}

// A service that drains, because its trial was undone, outlives its wrapper, which a Ctrl-C
// or a stop of the unit ends first.
func TestWrapperUndone(t *testing.T) {
	var wrapper *exec.Cmd
	upg, s := NewParent(t, tableflip.Options{Trial: time.Hour, Command: func(cmd *exec.Cmd) {
		proctest.Shell(`trap "exit 3" TERM; "$0" & wait`)(cmd)
		wrapper = cmd
	}}, "drain-until-told")
	proctest.OK(t, upg.Ready())
	proctest.During(t, step.TrialBegun, func() { proctest.Terminate(t, wrapper.Process.Pid) })
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Fatalf("Upgrade returned %v", err)
	}
	pid := s.Await("draining").PID
	service := pidfd(t, pid)
	time.Sleep(3 * time.Second) // longer than a process has that is to be killed
	if hasEnded(service) {
		t.Fatal("it was killed")
	}
	proctest.Terminate(t, pid)
	proctest.AwaitThat(t, "its end is known", func() bool { return len(upg.Generations()) == 1 })
}

func init() {
	proctest.Role("drain-until-told", func() {
		terminated := proctest.Terminated()
		upg := proctest.Must(tableflip.New(tableflip.Options{}))
		MustBeReady(upg)
		proctest.When(step.VerdictReceived, func() { time.Sleep(2 * time.Second) }) // longer than the end of a process goes unnoticed
		<-upg.Exit()
		proctest.Report("draining")
		<-terminated
	})
}
