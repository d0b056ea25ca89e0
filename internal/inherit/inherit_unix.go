//go:build unix

package inherit

import "syscall"

// isPipe reports whether fd is the pipe that the header identifies as id. If id is
// anyPipe, any pipe is.
func isPipe(fd int, id string) bool {
	var stat syscall.Stat_t
	if syscall.Fstat(fd, &stat) != nil || uint32(stat.Mode)&syscall.S_IFMT != syscall.S_IFIFO {
		return false
	}
	return id == anyPipe || id == utoa(uint64(stat.Dev))+":"+utoa(uint64(stat.Ino))
}

func isOpen(fd int) bool {
	var stat syscall.Stat_t
	return syscall.Fstat(fd, &stat) == nil
}

// setCloseOnExec sets it on all descriptors from first to last.
func setCloseOnExec(first, last int) {
	if !setCloseOnExecAtOnce(first, last) {
		setCloseOnExecEach(first, last)
	}
}

func setCloseOnExecEach(first, last int) {
	for fd := first; fd <= last; fd++ {
		syscall.CloseOnExec(fd)
	}
}
