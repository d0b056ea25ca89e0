package handovertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip"
	"example.com/tableflip/internal/proctest"
)

// Here the test is systemd, to which a main process must be a child.

func init() {
	proctest.Role("sibling", func() {
		terminate := proctest.Terminated()
		var opts tableflip.Options
		if proctest.Arg() == "hangs" {
			opts.UpgradeTimeout = 6 * time.Second // in which the child has to have started
		}
		upg := proctest.Must(tableflip.New(opts))
		if upg.HasParent() {
			proctest.Report("started", os.Getppid())
			switch proctest.Arg() {
			case "exits":
				os.Exit(3)
			case "dies":
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
			case "hangs":
				<-terminate
			case "rehearses":
				proctest.Report("refused", upg.Ready())
				return
			}
			MustBeReady(upg)
			proctest.Report("ready")
			<-terminate
			return
		}
		MustBeReady(upg)
		if proctest.Arg() == "rehearses" {
			proctest.Report("rehearsed", upg.Rehearse(context.Background()))
			<-terminate
			return
		}
		err := upg.Upgrade()
		proctest.Report("upgraded", errors.Is(err, os.ErrDeadlineExceeded), err)
		<-terminate
	})
}

// startUnderSystemd also takes what the test has not waited for at its end.
func startUnderSystemd(t *testing.T, arg string) *proctest.Service {
	t.Helper()
	s, first := proctest.Start(t, "sibling", proctest.WithArg(arg), "INVOCATION_ID=1", fmt.Sprint("MANAGERPID=", os.Getpid()))
	t.Cleanup(func() {
		proctest.Terminate(t, first.Process.Pid) // so that what it has executed is counted
		s.AwaitEnd()
	})
	return s
}

func reap(t *testing.T, pid int) (status syscall.WaitStatus) {
	t.Helper()
	if reaped, err := syscall.Wait4(pid, &status, 0, nil); reaped != pid {
		t.Fatalf("waiting for %d, which should be a child of this process: %v", pid, err)
	}
	return status
}

func TestSiblingParent(t *testing.T) {
	s := startUnderSystemd(t, "")
	child := s.Await("started")
	if want := strconv.Itoa(os.Getpid()); child.Text != want {
		t.Errorf("its parent is %s, want %s", child.Text, want)
	}
	s.Await("ready")
	proctest.Terminate(t, child.PID)
	reap(t, child.PID)
}

func TestSiblingStatus(t *testing.T) {
	for _, test := range []struct{ way, status string }{
		{"exits", "exit status 3"},
		{"dies", "signal: killed"},
	} {
		t.Run(test.way, func(t *testing.T) {
			s := startUnderSystemd(t, test.way)
			reap(t, s.Await("started").PID)
			if got := s.Await("upgraded").Text; !strings.Contains(got, "exited before it was ready") || !strings.HasSuffix(got, wantStatus(t, test.status)) {
				t.Errorf("Upgrade returned %q, want %q", got, test.status)
			}
		})
	}
}

// wantStatus returns nothing for kernels that may tell nobody but the parent.
func wantStatus(t *testing.T, status string) string {
	t.Helper()
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Skip("pidfd_open is missing, without which there are no siblings:", err)
	}
	defer unix.Close(self)
	// A living process has no status: what counts is whether the flag is known.
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT | unix.PIDFD_INFO_COREDUMP}
	if err := unix.IoctlPidfdInfo(self, &info); err != nil || info.Mask&unix.PIDFD_INFO_COREDUMP == 0 {
		return ""
	}
	return status
}

func TestSiblingRehearses(t *testing.T) {
	s := startUnderSystemd(t, "rehearses")
	child := s.Await("started")
	if m := s.Await("refused"); !strings.Contains(m.Text, "rehearsed") {
		t.Errorf("Ready: %s", m.Text)
	}
	if status := reap(t, child.PID); status.ExitStatus() != 0 {
		t.Errorf("wait status %#x: it was not given the time to exit", status)
	}
	if m := s.Await("rehearsed"); m.Text != "<nil>" {
		t.Errorf("Rehearse: %s", m.Text)
	}
}

func TestSiblingHangs(t *testing.T) {
	s := startUnderSystemd(t, "hangs")
	child := s.Await("started")
	if status := reap(t, child.PID); status.Signal() != syscall.SIGKILL {
		t.Errorf("wait status %#x, want SIGKILL", status)
	}
	if got := s.Await("upgraded").Text; !strings.HasPrefix(got, "true") {
		t.Errorf("Upgrade returned %q, want os.ErrDeadlineExceeded", got)
	}
}

// systemd may be busy, and reap late. Kernels before Linux 6.9 tell nobody but the parent
// when it does.
func TestSiblingReapedLate(t *testing.T) {
	for _, test := range []struct{ way, want string }{
		{"exits", "exited before it was ready"},
		{"hangs", "was not ready after 6s"},
	} {
		t.Run(test.way, func(t *testing.T) {
			s := startUnderSystemd(t, test.way)
			child := s.Await("started")
			got := s.Await("upgraded").Text
			reap(t, child.PID)
			if !strings.Contains(got, test.want) || strings.Contains(got, "has not ended") || strings.Contains(got, "gave up") {
				t.Errorf("Upgrade returned %q, want one that just says %q", got, test.want)
			}
		})
	}
}
