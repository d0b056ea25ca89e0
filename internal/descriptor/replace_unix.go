//go:build unix && !linux

package descriptor

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Replace makes the close-on-exec descriptor target, which must be open, refer to
// the open file of fd instead. Not all of these systems have dup3.
func Replace(target, fd uintptr) error {
	// The lock keeps a fork out of the moment before close-on-exec is set.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	err := unix.Dup2(int(fd), int(target))
	for err == unix.EINTR || err == unix.EBUSY {
		err = unix.Dup2(int(fd), int(target))
	}
	if err != nil {
		return os.NewSyscallError("dup2", err)
	}
	unix.CloseOnExec(int(target))
	return nil
}
