package tableflip

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file owns what not every system of sys_unix.go has: what systemd needs, and
// what is quicker. It fills in variables that are nil elsewhere.

func init() {
	monotonicClock = func() (time.Duration, error) {
		var now unix.Timespec
		err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
		return time.Duration(now.Nano()), os.NewSyscallError("clock_gettime", err)
	}
	dup3 = func(target, fd uintptr) error {
		err := unix.Dup3(int(fd), int(target), unix.O_CLOEXEC)
		for err == unix.EINTR || err == unix.EBUSY { // by a race with open, see dup(2)
			err = unix.Dup3(int(fd), int(target), unix.O_CLOEXEC)
		}
		return os.NewSyscallError("dup3", err)
	}
	asSibling = func(cmd *exec.Cmd) (wait func() error) {
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
}

// waitSibling returns when the process of pidfd, which it closes, has ended, and its
// status as an error.
func waitSibling(pidfd int) error {
	if err := setNonblock(uintptr(pidfd), true); err != nil {
		return err
	}
	file := os.NewFile(uintptr(pidfd), "pidfd")
	defer file.Close()
	if err := awaitPoll(file, unix.POLLIN); err != nil {
		return err
	}
	// Since Linux 6.15 others than the parent learn the status, once the parent has.
	file.SetReadDeadline(time.Now().Add(exitGrace))
	if err := awaitPoll(file, unix.POLLHUP); err != nil {
		return errStatusUnknown
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err := control(file, func(fd uintptr) error { return unix.IoctlPidfdInfo(int(fd), &info) })
	status := syscall.WaitStatus(info.Exit_code)
	switch {
	case err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0:
		return errStatusUnknown
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
