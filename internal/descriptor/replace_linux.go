package descriptor

import (
	"os"

	"golang.org/x/sys/unix"
)

// Replace makes the close-on-exec descriptor target, which must be open, refer to
// the open file of fd instead.
func Replace(target, fd uintptr) error {
	err := unix.Dup3(int(fd), int(target), unix.O_CLOEXEC)
	for err == unix.EINTR || err == unix.EBUSY { // by a race with open, see dup(2)
		err = unix.Dup3(int(fd), int(target), unix.O_CLOEXEC)
	}
	return os.NewSyscallError("dup3", err)
}
