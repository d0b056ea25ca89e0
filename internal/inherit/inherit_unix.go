//go:build unix

package inherit

import "syscall"

// isPipe reports whether fd is the pipe that the header identifies as id. If id has only
// zeros, any pipe is.
func isPipe(fd int, id string) bool {
	var stat syscall.Stat_t
	if syscall.Fstat(fd, &stat) != nil || uint32(stat.Mode)&syscall.S_IFMT != syscall.S_IFIFO {
		return false
	}
	return id == "0:0" || id == utoa(uint64(stat.Dev))+":"+utoa(uint64(stat.Ino))
}

func setCloseOnExec(fd int) { syscall.CloseOnExec(fd) }
