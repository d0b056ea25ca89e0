//go:build dragonfly || freebsd

package supervise

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// setReaper makes this process, or not, the parent of its descendants' orphans, by
// procctl(2), of which golang.org/x/sys has the number only.
func setReaper(on bool) error {
	const pPID = 0 // sys/wait.h, sys/procctl.h
	command := uintptr(procReapRelease)
	if on {
		command = procReapAcquire
	}
	if strconv.IntSize < 64 {
		return errors.ErrUnsupported // FreeBSD's second argument has 64 bits
	}
	_, _, errno := unix.Syscall6(unix.SYS_PROCCTL, pPID, uintptr(os.Getpid()), command, 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("procctl", errno)
	}
	return nil
}
