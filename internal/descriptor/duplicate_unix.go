//go:build unix && !aix

package descriptor

import (
	"os"

	"golang.org/x/sys/unix"
)

// duplicateFrom returns a close-on-exec duplicate of fd that is not less than first.
func duplicateFrom(fd uintptr, first int) (int, error) {
	dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, first)
	return dup, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
}
