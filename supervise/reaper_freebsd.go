package supervise

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// becomeReaper: procctl(2), of which golang.org/x/sys has the number only.
func becomeReaper() error {
	const pPID, procReapAcquire = 0, 2 // sys/wait.h, sys/procctl.h
	if strconv.IntSize < 64 {
		return errors.ErrUnsupported // its second argument has 64 bits
	}
	_, _, errno := unix.Syscall6(unix.SYS_PROCCTL, pPID, uintptr(os.Getpid()), procReapAcquire, 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("procctl PROC_REAP_ACQUIRE", errno)
	}
	return nil
}
