package descriptor

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// duplicateFrom returns a close-on-exec duplicate of fd that is not less than first. AIX
// has no F_DUPFD_CLOEXEC: package syscall defines it as 0, which is F_DUPFD
// (syscall_aix.go), and internal/poll.DupCloseOnExec checks for that, too.
func duplicateFrom(fd uintptr, first int) (int, error) {
	// The lock keeps a fork out of the moment before close-on-exec is set.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	dup, err := unix.FcntlInt(fd, unix.F_DUPFD, first)
	if err != nil {
		return 0, os.NewSyscallError("fcntl F_DUPFD", err)
	}
	unix.CloseOnExec(dup)
	return dup, nil
}
