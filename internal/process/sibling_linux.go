package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

// statusGrace is how long the parent of a sibling gets to reap it. Its status is
// not known before.
const statusGrace = time.Second

// makeSibling has cmd start a child of this process's parent, and returns what is to
// be called in place of cmd.Wait, which is for parents.
func makeSibling(cmd *exec.Cmd) (wait func() error) {
	var attr syscall.SysProcAttr
	if cmd.SysProcAttr != nil {
		attr = *cmd.SysProcAttr
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil || attr.PidFD != nil {
		return cmd.Wait // it could not be waited for
	}
	unix.Close(self)

	pidfd := -1
	attr.Cloneflags |= unix.CLONE_PARENT // clone(2)
	attr.PidFD = &pidfd
	cmd.SysProcAttr = &attr
	return func() error {
		err := waitSibling(pidfd)
		_ = cmd.Wait() // fails, but releases what cmd holds
		return err
	}
}

// waitSibling returns when the process of pidfd, which it closes, has ended, and its
// status as an error.
func waitSibling(pidfd int) error {
	if err := descriptor.SetNonblock(uintptr(pidfd), true); err != nil {
		return err
	}
	file := os.NewFile(uintptr(pidfd), "pidfd")
	defer file.Close()
	if err := awaitPoll(file, unix.POLLIN); err != nil {
		return err
	}

	// Since Linux 6.15 others than the parent learn the status, once the parent has.
	file.SetReadDeadline(time.Now().Add(statusGrace))
	if err := awaitPoll(file, unix.POLLHUP); err != nil {
		return ErrStatusUnknown
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err := descriptor.Control(file, func(fd uintptr) error { return unix.IoctlPidfdInfo(int(fd), &info) })
	status := syscall.WaitStatus(info.Exit_code)
	switch {
	case err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0:
		return ErrStatusUnknown
	case status.Signaled():
		return fmt.Errorf("signal: %v", status.Signal())
	case status.ExitStatus() != 0:
		return fmt.Errorf("exit status %d", status.ExitStatus())
	}
	return nil
}

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
