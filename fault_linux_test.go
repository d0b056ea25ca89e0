package tableflip_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// A dying process closes its descriptors in no order that one could rely on
// (task_work_add in the kernel's source), so that the end of its wire does not mean
// that its other descriptors are closed. That it can be waited for means it.
func init() {
	awaitDeath = func(t *testing.T, pid int) {
		t.Helper()
		pidfd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			return // it has been waited for
		}
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pidfd)
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(fds, int(patience.Milliseconds()))
			if n == 1 {
				return
			}
			if !errors.Is(err, unix.EINTR) {
				t.Fatalf("%d is still dying: %v", pid, err)
			}
		}
	}
	awaitStop = func(t *testing.T, pid int) {
		t.Helper()
		stopped := make(chan error, 1)
		go func() {
			for {
				err := unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil)
				if !errors.Is(err, unix.EINTR) {
					stopped <- err
					return
				}
			}
		}()
		expectSoon(t, "SIGSTOP", stopped, nil)
	}
}
