package proctest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// AwaitDeath waits until a process can be waited for. After the end of its wire, its other
// descriptors may still be open: a dying process closes them in no reliable order
// (task_work_add in the kernel's source).
func AwaitDeath(t *testing.T, pid int) {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return // it has been waited for
	}
	OK(t, err)
	defer unix.Close(pidfd)
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(Patience.Milliseconds()))
		if n == 1 {
			return
		}
		if !errors.Is(err, unix.EINTR) {
			t.Fatalf("%d is still dying: %v", pid, err)
		}
	}
}

// AwaitStop waits until all threads of a process have stopped.
func AwaitStop(t *testing.T, pid int) {
	t.Helper()
	for late := time.Now().Add(Patience); !hasStopped(t, pid); time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("%d has not stopped", pid)
		}
	}
}

func hasStopped(t *testing.T, pid int) bool {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	OK(t, err)
	return len(stats) > 0 && !slices.ContainsFunc(stats, func(path string) bool {
		fields := procStat(path)
		return len(fields) > 0 && fields[0] != "T"
	})
}

// AdoptOrphans makes this process the parent of its descendants whose own parent has
// ended, such as all generations of a service except the first. Otherwise their parent
// would be the init process, which in containers often does not reap, so that they would
// not seem to end. See prctl(2).
func AdoptOrphans() error {
	return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
}
