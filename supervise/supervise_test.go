//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"example.com/tableflip/internal/proctest"
	"example.com/tableflip/supervise"
)

func TestExitStatus(t *testing.T) {
	for _, test := range []struct {
		command, argument string
		status            int
	}{
		{"exit", "0", 0},
		{"exit", "7", 7},
		{"die", "", 128 + 9},
	} {
		t.Run(test.command+test.argument, func(t *testing.T) {
			t.Parallel()
			b := startBed(t, nil, "puppet")
			b.next().Order(test.command, test.argument)
			b.wantStatus(test.status)
		})
	}
}

func TestNotStarted(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	proctest.OK(t, os.WriteFile(script, []byte("#!/nowhere/interpreter\n"), 0o755))
	plain := filepath.Join(t.TempDir(), "plain")
	proctest.OK(t, os.WriteFile(plain, nil, 0o644))
	for _, test := range []struct {
		command []string
		status  int
		is      error
	}{
		{nil, supervise.StatusFailed, nil},
		{[]string{"nowhere-to-be-found"}, supervise.StatusNotFound, exec.ErrNotFound},
		{[]string{"/nowhere/to/be/found"}, supervise.StatusNotFound, os.ErrNotExist},
		{[]string{script}, supervise.StatusNotFound, os.ErrNotExist},
		{[]string{plain}, supervise.StatusNotExecutable, os.ErrPermission},
		{[]string{t.TempDir()}, supervise.StatusNotExecutable, nil},
	} {
		status, err := supervise.Supervisor{Command: test.command}.Run()
		if status != test.status || err == nil || test.is != nil && !errors.Is(err, test.is) {
			t.Errorf("%q: status %d, error %v", test.command, status, err)
		}
	}
}

func TestSignalsGoToTheMainProcess(t *testing.T) {
	b := startBed(t, nil, "puppet")
	first := b.next()
	first.do("notify", "READY=1")
	second := first.upgrade(b)
	for sig, name := range map[syscall.Signal]string{
		syscall.SIGHUP: "SIGHUP", syscall.SIGTERM: "SIGTERM", syscall.SIGINT: "SIGINT",
		syscall.SIGQUIT: "SIGQUIT", syscall.SIGUSR1: "SIGUSR1", syscall.SIGUSR2: "SIGUSR2",
		syscall.SIGWINCH: "SIGWINCH", syscall.SIGCONT: "SIGCONT",
	} {
		b.signal(sig)
		second.wantSignals(name)
	}
	first.wantNoMoreSignals()
	first.Order("exit", "0")
	first.AwaitEnd()
	third := second.upgrade(b)
	b.signal(syscall.SIGTERM)
	third.wantSignals("SIGTERM")
	second.wantNoMoreSignals()
	second.Order("exit", "0")
	second.AwaitEnd()
	third.do("notify", "STOPPING=1")
	third.Order("exit", "0")
	b.wantStatus(0)
	if n := b.log.Count("NOTIFY_SOCKET"); n != 0 {
		t.Error("without a NOTIFY_SOCKET of its own, the supervisor has passed something on")
	}
	if n := b.log.Count("ignored messages"); n != 0 {
		t.Error("the supervisor has ignored something")
	}
}

func TestFailedUpgradeChangesNothing(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.beginUpgrade()
	child := main.spawn(b)
	b.signal(syscall.SIGTERM)
	main.wantSignals("SIGTERM")
	child.Order("exit", "1")
	child.AwaitEnd()
	main.do("notify", "READY=1\nSTATUS=upgrade failed: exit status 1")
	main.barrier()
	// Signals of the failed upgrade do not go to a process of a later one.
	second := main.upgrade(b)
	second.wantNoMoreSignals()
	b.signal(syscall.SIGUSR1)
	second.wantSignals("SIGUSR1")
}

// After a failed upgrade the main process ends as it would have before.
func TestFailedUpgradeIsOver(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.beginUpgrade()
	main.do("notify", "READY=1\nSTATUS=upgrade failed: exit status 1")
	main.Order("exit", "0")
	b.wantStatus(0)
}

// Who is told to stop in an upgrade, and stops, has done what it was to do.
func TestStopInAnUpgrade(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.beginUpgrade()
	b.signal(syscall.SIGTERM)
	main.wantSignals("SIGTERM")
	b.signal(syscall.SIGHUP) // which changes nothing
	main.wantSignals("SIGHUP")
	main.Order("exit", "0")
	b.wantStatus(0)
}

// Who has said that it stops may still fail.
func TestStopFails(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.do("notify", "STOPPING=1")
	main.Order("exit", "5")
	b.wantStatus(5)
}

// A main process that says that it is the main one has not handed over.
func TestMainPIDOfItself(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.beginUpgrade()
	main.do("notify", fmt.Sprintf("MAINPID=%d", main.PID))
	child := main.spawn(b)
	main.barrier()
	main.Order("die")
	b.log.Await("waiting for a new main process")
	child.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", child.PID))
	b.signal(syscall.SIGUSR1)
	child.wantSignals("SIGUSR1")
	child.do("notify", "STOPPING=1")
	child.Order("exit", "0")
	b.wantStatus(0)
}

// What is left of a service cannot become its main process.
func TestMainPIDTooLate(t *testing.T) {
	b := startBed(t, []string{"-stop", "1h"}, "puppet")
	main := b.next()
	helper := main.spawn(b)
	main.Order("exit", "3")
	helper.wantSignals("SIGTERM")
	helper.do("notify", fmt.Sprintf("MAINPID=%d", helper.PID))
	b.log.Await("ignored MAINPID", "too late")
	helper.Order("exit", "0")
	b.wantStatus(3)
}

// The old process has committed, and no longer stops the service by a signal.
func TestSignalsToStopDuringTheHandOver(t *testing.T) {
	b := startBed(t, nil, "puppet")
	first := b.next()
	b.signal(syscall.SIGTERM)
	first.wantSignals("SIGTERM") // before the upgrade: its own
	first.beginUpgrade()
	second := first.spawn(b)
	b.signal(syscall.SIGTERM)
	first.wantSignals("SIGTERM")
	b.signal(syscall.SIGHUP)
	first.wantSignals("SIGHUP")
	first.do("notify", fmt.Sprintf("READY=1\nMAINPID=%d", second.PID))
	second.wantSignals("SIGTERM")
	second.wantNoMoreSignals()
	// It does not say when an upgrade begins.
	third := second.spawn(b)
	second.do("notify", fmt.Sprintf("MAINPID=%d", third.PID))
	second.barrier()
	third.wantNoMoreSignals()
}

func TestTakeover(t *testing.T) {
	b := startBed(t, nil, "puppet")
	first := b.next()
	first.beginUpgrade()
	second := first.spawn(b)
	first.Order("die")
	b.log.Await("waiting for a new main process")
	for range 2 { // of which one arrives
		b.signal(syscall.SIGHUP)
		b.log.Await("holding", "SIGHUP")
	}
	b.signal(syscall.SIGTERM)
	b.log.Await("holding", "SIGTERM")
	second.wantNoMoreSignals()
	second.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", second.PID))
	second.wantBothSignals("SIGHUP", "SIGTERM")
	second.do("notify", "STOPPING=1")
	second.Order("exit", "0")
	b.wantStatus(0)
	if n := b.log.Count("msg=forwarded signal=SIGHUP"); n != 1 {
		t.Errorf("forwarded %d times", n)
	}
}

// The old process may not have obeyed the signals that it got during the upgrade.
func TestTakeoverOfSignals(t *testing.T) {
	b := startBed(t, nil, "puppet")
	first := b.next()
	first.beginUpgrade()
	second := first.spawn(b)
	b.signal(syscall.SIGHUP)
	first.wantSignals("SIGHUP")
	b.signal(syscall.SIGCONT)
	first.wantSignals("SIGCONT") // which is over
	first.Order("die")
	b.log.Await("waiting for a new main process")
	second.do("notify", fmt.Sprintf("MAINPID=%d", second.PID))
	second.barrier()
	second.wantSignals("SIGHUP")
	second.wantNoMoreSignals()
}

func TestTakeoverThatDoesNotHappen(t *testing.T) {
	b := startBed(t, []string{"-takeover", "10ms"}, "puppet")
	first := b.next()
	first.beginUpgrade()
	second := first.spawn(b)
	first.Order("exit", "5")
	second.wantSignals("SIGTERM")
	second.Order("exit", "0")
	b.wantStatus(5)
}

func TestPIDFile(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	b := startBed(t, []string{"-pid-file", pidFile}, "puppet")
	first := b.next()
	second := first.spawn(b)
	proctest.OK(t, os.WriteFile(pidFile, fmt.Appendln(nil, second.PID), 0o644))
	b.signal(syscall.SIGTERM)
	first.wantSignals("SIGTERM")
	first.Order("exit", "0")
	second.wantSignals("SIGTERM") // which the first got after it was replaced
	b.signal(syscall.SIGUSR1)
	second.wantSignals("SIGUSR1")
	second.Order("exit", "0")
	second.AwaitEnd()
	b.log.Await("msg=ended")
}

func TestDescriptorsOfMessagesAreClosed(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.do("attach", "FDSTORE=1\nFDNAME=listener")
	main.do("attach")
	main.do("attach", "BARRIER=1")
}
