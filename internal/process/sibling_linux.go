package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

const (
	// statusGrace is how long the parent of a sibling gets to reap it. The sibling's status
	// is not known before. A sibling that has ended counts as ended only after that,
	// which is well within the time that a process gets to end.
	statusGrace = 500 * time.Millisecond

	// pollInterval is how often a sibling is checked on a kernel without pidfds.
	pollInterval = 50 * time.Millisecond
)

// asksForSibling reports whether Options.Command asks for a sibling. os/exec would report
// that a sibling has ended.
func asksForSibling(cmd *exec.Cmd) bool {
	return cmd.SysProcAttr != nil && cmd.SysProcAttr.Cloneflags&unix.CLONE_PARENT != 0
}

// startSibling starts a child of this process's parent.
func startSibling(cmd *exec.Cmd, fds []uintptr) (control, error) {
	var attr syscall.SysProcAttr
	if cmd.SysProcAttr != nil {
		attr = *cmd.SysProcAttr
	}
	attr.Cloneflags |= unix.CLONE_PARENT
	cmd.SysProcAttr = &attr
	if !hasPidfds() {
		return startPolled(cmd, fds)
	}

	passed := attr.PidFD // where Options.Command wants the pidfd
	pidfd := -1
	attr.PidFD = &pidfd
	if err := spawn(cmd, fds); err != nil {
		return control{}, err
	}
	if passed != nil {
		*passed = -1
		if dup, err := descriptor.Duplicate(uintptr(pidfd)); err == nil {
			*passed = int(dup)
		}
	}
	return control{
		wait: func() error {
			err := waitPidfd(pidfd)
			forget(cmd)
			return err
		},
		kill: cmd.Process.Kill,
	}, nil
}

// forget closes what cmd holds of a sibling, which it can't wait for.
func forget(cmd *exec.Cmd) {
	_ = cmd.Wait() // the goroutines that copy its output
	_ = cmd.Process.Release()
}

// hasPidfds reports whether processes can be waited for by pidfds: pidfd_open(2) is the
// newest system call that this needs. A seccomp filter may forbid it.
var hasPidfds = sync.OnceValue(func() bool {
	self, err := OpenSelf()
	if err != nil {
		return false
	}
	_ = descriptor.Close(self)
	return true
})

// startPolled starts a sibling of which only the ID is known.
func startPolled(cmd *exec.Cmd, fds []uintptr) (control, error) {
	if err := spawn(cmd, fds); err != nil {
		return control{}, err
	}
	pid := cmd.Process.Pid
	started := startTime(pid)
	return control{
		wait: func() error {
			for isAlive(pid, started) {
				time.Sleep(pollInterval)
			}
			forget(cmd)
			return ErrStatusUnknown
		},
		kill: func() error {
			// Its parent may have reaped it, and its ID may be another process's by now.
			if !isAlive(pid, started) {
				return os.ErrProcessDone
			}
			return unix.Kill(pid, unix.SIGKILL)
		},
	}, nil
}

// isAlive reports whether the process that began at this time still runs.
func isAlive(pid int, started string) bool {
	return unix.Kill(pid, 0) != unix.ESRCH && state(pid) != "Z" && startTime(pid) == started
}

// waitPidfd returns when the process of pidfd, which it closes, has ended, and its
// status as an error.
func waitPidfd(pidfd int) error {
	if err := descriptor.SetNonblock(uintptr(pidfd), true); err != nil {
		return err
	}
	file := os.NewFile(uintptr(pidfd), "pidfd")
	defer file.Close()
	if err := awaitPoll(file, unix.POLLIN); err != nil {
		return err
	}

	// Since Linux 6.15, processes other than the parent can learn the status, once the
	// parent has. Before Linux 6.9 they may not even learn when the parent has.
	info, err := exitInfo(file)
	if err == nil && !hasExitStatus(info) {
		file.SetReadDeadline(time.Now().Add(statusGrace))
		if err := awaitPoll(file, unix.POLLHUP); err != nil {
			return ErrStatusUnknown
		}
		info, err = exitInfo(file)
	}
	status := syscall.WaitStatus(info.Exit_code)
	switch {
	case err != nil || !hasExitStatus(info):
		return ErrStatusUnknown
	case status.Signaled():
		return fmt.Errorf("signal: %v", status.Signal())
	case status.ExitStatus() != 0:
		return fmt.Errorf("exit status %d", status.ExitStatus())
	}
	return nil
}

// exitInfo returns what the kernel says about the process of a pidfd, or an error if the
// kernel says nothing.
func exitInfo(file *os.File) (info unix.PidfdInfo, err error) {
	info.Mask = unix.PIDFD_INFO_EXIT
	err = descriptor.Control(file, func(fd uintptr) error { return unix.IoctlPidfdInfo(int(fd), &info) })
	return info, err
}

func hasExitStatus(info unix.PidfdInfo) bool { return info.Mask&unix.PIDFD_INFO_EXIT != 0 }

func awaitPoll(file *os.File, events int16) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var pollErr error
	err = raw.Read(func(fd uintptr) bool {
		polled := []unix.PollFd{{Fd: int32(fd), Events: events}}
		_, pollErr = unix.Poll(polled, 0)
		return pollErr != nil && pollErr != unix.EINTR || polled[0].Revents&events != 0
	})
	return errors.Join(err, pollErr)
}
