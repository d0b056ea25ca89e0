package tableflip_test

import (
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
)

// Here the test is systemd, to which a main process must be a child.

func init() {
	roles["sibling"] = func() {
		terminate := terminated()
		upg := must(tableflip.New(tableflip.Options{UpgradeTimeout: 2 * time.Second}))
		if upg.HasParent() {
			report("started", os.Getppid())
			switch arg() {
			case "exits":
				os.Exit(3)
			case "dies":
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
			case "hangs":
				<-terminate
			}
			mustBeReady(upg)
			report("ready")
			<-terminate
			return
		}
		mustBeReady(upg)
		err := upg.Upgrade()
		report("upgraded", errors.Is(err, os.ErrDeadlineExceeded), err)
		<-terminate
	}
}

// startUnderSystemd also takes what the test has not waited for at its end.
func startUnderSystemd(t *testing.T, arg string) *service {
	t.Helper()
	s, first := startService(t, "sibling", withArg(arg), "INVOCATION_ID=1", fmt.Sprint("MANAGERPID=", os.Getpid()))
	t.Cleanup(func() {
		terminate(t, first.Process.Pid) // so that what it has executed is counted
		s.awaitEnd()
	})
	return s
}

func (s *service) reap(pid int) (status syscall.WaitStatus) {
	s.t.Helper()
	if reaped, err := syscall.Wait4(pid, &status, 0, nil); reaped != pid {
		s.t.Fatalf("waiting for %d, which should be a child of this process: %v", pid, err)
	}
	return status
}

func TestNewProcessIsAChildOfSystemd(t *testing.T) {
	s := startUnderSystemd(t, "")
	child := s.await("started")
	if want := strconv.Itoa(os.Getpid()); child.text != want {
		t.Errorf("its parent is %s, want %s", child.text, want)
	}
	s.await("ready")
	terminate(t, child.pid)
	s.reap(child.pid)
}

func TestFailedChildOfSystemdTellsItsStatus(t *testing.T) {
	for way, status := range map[string]string{"exits": "exit status 3", "dies": "signal: killed"} {
		t.Run(way, func(t *testing.T) {
			s := startUnderSystemd(t, way)
			s.reap(s.await("started").pid)
			if got := s.await("upgraded").text; !strings.Contains(got, "exited before it was ready") || !strings.HasSuffix(got, wantStatus(t, status)) {
				t.Errorf("Upgrade returned %q, want %q", got, status)
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

func TestHangingChildOfSystemdIsKilledInTime(t *testing.T) {
	s := startUnderSystemd(t, "hangs")
	child := s.await("started")
	if status := s.reap(child.pid); status.Signal() != syscall.SIGKILL {
		t.Errorf("wait status %#x, want SIGKILL", status)
	}
	if got := s.await("upgraded").text; !strings.HasPrefix(got, "true") {
		t.Errorf("Upgrade returned %q, want os.ErrDeadlineExceeded", got)
	}
}
