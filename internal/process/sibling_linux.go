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
	return startWithHandle(cmd, fds, func(h *Handle) error {
		err := waitSibling(h)
		forget(cmd)
		return err
	})
}

// startChild starts a child of this process.
func startChild(cmd *exec.Cmd, fds []uintptr) (control, error) {
	if !hasPidfds() {
		return startByID(cmd, fds)
	}
	return startWithHandle(cmd, fds, func(h *Handle) error {
		if err := h.Wait(); err != nil {
			return err
		}
		if h.isReaped() { // cmd has only the ID, which may be another process's by now
			return ErrStatusUnknown
		}
		return waitChild(cmd)
	})
}

// startWithHandle starts a process of which wait waits for the end.
func startWithHandle(cmd *exec.Cmd, fds []uintptr, wait func(*Handle) error) (control, error) {
	h, err := spawnWithHandle(cmd, fds)
	if err != nil {
		return control{}, err
	}
	return control{
		wait: func() error {
			defer h.Close()
			return wait(h)
		},
		kill: h.kill,
	}, nil
}

// spawnWithHandle does what spawn does, and returns a Handle of the new process.
func spawnWithHandle(cmd *exec.Cmd, fds []uintptr) (*Handle, error) {
	given := cmd.SysProcAttr
	defer func() { cmd.SysProcAttr = given }()
	var attr syscall.SysProcAttr
	if given != nil {
		attr = *given
	}
	passed, pidfd := attr.PidFD, -1
	attr.PidFD = &pidfd
	cmd.SysProcAttr = &attr
	if err := spawn(cmd, fds); err != nil {
		return nil, err
	}
	if passed != nil { // where Options.Command wants the pidfd
		*passed = -1
		if dup, err := descriptor.Duplicate(uintptr(pidfd)); err == nil {
			*passed = int(dup)
		}
	}
	file, err := descriptor.PolledFile(uintptr(pidfd), "pidfd")
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	return &Handle{file, cmd.Process.Pid}, nil
}

// forget closes what os/exec holds of a sibling, which it can't wait for, if it has started
// that to copy a stream. Otherwise cmd knows only the ID, which may be a child's by now.
func forget(cmd *exec.Cmd) {
	if _, ok := fileStreams(cmd); ok {
		return
	}
	_ = cmd.Wait() // the goroutines that copy
	_ = cmd.Process.Release()
}

// hasPidfds reports whether processes can be waited for by pidfds: pidfd_open(2) is the
// newest system call that this needs. A seccomp filter may forbid it.
var hasPidfds = sync.OnceValue(func() bool {
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return false
	}
	_ = descriptor.Close(uintptr(self))
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

// waitSibling returns when a sibling has ended, and its status as an error.
func waitSibling(h *Handle) error {
	if err := h.Wait(); err != nil {
		return err
	}

	// Since Linux 6.15, processes other than the parent can learn the status, once the
	// parent has. Before Linux 6.9 they may not even learn when the parent has.
	info, err := exitInfo(h.file)
	if err == nil && !hasExitStatus(info) {
		h.file.SetReadDeadline(time.Now().Add(statusGrace))
		if err := awaitPoll(h.file, unix.POLLHUP); err != nil {
			return ErrStatusUnknown
		}
		info, err = exitInfo(h.file)
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
