package handovertest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
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
			t.Run(wrapper.name+", "+at.String(), func(t *testing.T) {
				// At the first step the time is over, so that the parent has not heard
				// that the service is here.
				role, timeout := "hang", time.Nanosecond
				if at == step.ReadyReceived {
					role, timeout = "ready-or-leave", proctest.Patience
				}
				upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(wrapper.script), UpgradeTimeout: timeout}, role)
				proctest.OK(t, upg.Ready())
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var service int
				restore := proctest.During(t, at, func() {
					service = pidfd(t, s.Await("hanging").PID)
					cancel()
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
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0" & exec sleep 1000`)}, "die-held")
	proctest.OK(t, upg.Ready())
	err := upg.Upgrade()
	child := s.Await("dying")
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%d, exited", child.PID)) {
		t.Errorf("Upgrade: %v", err)
	}
}

// A process that exits has closed its descriptors for a moment before it has ended.
func TestWrapperServiceIsDying(t *testing.T) {
	upg, _ := NewParent(t, tableflip.Options{
		Command: proctest.Shell(`
			sleep 0.3 0<&- >&- 2>&- 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- &
			until [ -z "$(ls /proc/$!/fd)" ]; do :; done
			echo here $! >&3
			exec sleep 1000`),
	}, "fail")
	proctest.OK(t, upg.Ready())
	if err := upg.Upgrade(); err == nil || !strings.Contains(err.Error(), "exited before it was in charge") {
		t.Errorf("Upgrade: %v", err)
	}
}

func init() {
	proctest.Role("die-held", func() {
		proctest.Must(tableflip.New(tableflip.Options{}))
		holder := hold(3, 4)
		proctest.Report("dying", holder)
		os.Exit(5)
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
			upg, _ := NewParent(t, tableflip.Options{
				Command: proctest.Shell(fmt.Sprintf("echo here %d >&3; %s", innocent.Process.Pid, test.then)),
			}, "fail")
			proctest.OK(t, upg.Ready())
			if err := upg.Upgrade(); err == nil {
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
	upg, s := NewParent(t, tableflip.Options{Command: proctest.Shell(`"$0" & exit 3`), Trial: time.Hour}, "drain-until-told")
	proctest.OK(t, upg.Ready())
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
		<-upg.Exit()
		proctest.Report("draining")
		<-terminated
	})
}
