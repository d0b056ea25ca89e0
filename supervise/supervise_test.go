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
			b.next().tell(test.command, test.argument)
			b.ends(test.status)
		})
	}
}

func TestNotStarted(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/nowhere/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
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
		second.gets(name)
	}
	first.getsNoMore()
	first.tell("exit", "0")
	first.ends()
	third := second.upgrade(b)
	b.signal(syscall.SIGTERM)
	third.gets("SIGTERM")
	second.getsNoMore()
	second.tell("exit", "0")
	second.ends()
	third.do("notify", "STOPPING=1")
	third.tell("exit", "0")
	b.ends(0)
}

func TestFailedUpgradeChangesNothing(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	child := main.spawn(b)
	b.signal(syscall.SIGTERM)
	main.gets("SIGTERM")
	child.tell("exit", "1")
	child.ends()
	main.do("notify", "READY=1\nSTATUS=upgrade failed: exit status 1")
	main.barrier()
	// What it was told then is its own business, also if a later upgrade works.
	second := main.upgrade(b)
	second.getsNoMore()
	b.signal(syscall.SIGUSR1)
	second.gets("SIGUSR1")
}

// The old process has committed, and no longer stops the service by a signal.
func TestSignalsToStopDuringTheHandOver(t *testing.T) {
	b := startBed(t, nil, "puppet")
	first := b.next()
	b.signal(syscall.SIGTERM)
	first.gets("SIGTERM") // before the upgrade: its own
	first.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	second := first.spawn(b)
	b.signal(syscall.SIGTERM)
	first.gets("SIGTERM")
	b.signal(syscall.SIGHUP)
	first.gets("SIGHUP")
	first.do("notify", fmt.Sprintf("READY=1\nMAINPID=%d", second.pid))
	second.gets("SIGTERM")
	second.getsNoMore()
	// It does not say when an upgrade begins.
	third := second.spawn(b)
	second.do("notify", fmt.Sprintf("MAINPID=%d", third.pid))
	second.barrier()
	third.getsNoMore()
}

func TestTakeover(t *testing.T) {
	b := startBed(t, nil, "puppet")
	first := b.next()
	first.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	second := first.spawn(b)
	first.tell("die", "")
	b.log.await("waiting for a new main process")
	b.signal(syscall.SIGHUP)
	b.log.await("holding", "SIGHUP")
	b.signal(syscall.SIGTERM)
	b.log.await("holding", "SIGTERM")
	second.getsNoMore()
	second.do("notify", fmt.Sprintf("MAINPID=%d\nREADY=1", second.pid))
	second.getsBoth("SIGHUP", "SIGTERM")
	second.do("notify", "STOPPING=1")
	second.tell("exit", "0")
	b.ends(0)
}

func TestTakeoverThatDoesNotHappen(t *testing.T) {
	b := startBed(t, []string{"-takeover", "10ms"}, "puppet")
	first := b.next()
	first.do("notify", "RELOADING=1\nMONOTONIC_USEC=1")
	second := first.spawn(b)
	first.tell("exit", "5")
	second.gets("SIGTERM")
	second.tell("exit", "0")
	b.ends(5)
}

func TestPIDFile(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	b := startBed(t, []string{"-pid-file", pidFile}, "puppet")
	first := b.next()
	second := first.spawn(b)
	if err := os.WriteFile(pidFile, fmt.Appendln(nil, second.pid), 0o644); err != nil {
		t.Fatal(err)
	}
	b.signal(syscall.SIGTERM)
	first.gets("SIGTERM")
	first.tell("exit", "0")
	second.gets("SIGTERM") // which the first got after it was replaced
	b.signal(syscall.SIGUSR1)
	second.gets("SIGUSR1")
	second.tell("exit", "0")
	second.ends()
	b.log.await("msg=ended")
}

func TestDescriptorsOfMessagesAreClosed(t *testing.T) {
	b := startBed(t, nil, "puppet")
	main := b.next()
	main.do("attach", "FDSTORE=1\nFDNAME=listener")
	main.do("attach", "")
	main.do("attach", "BARRIER=1")
}
