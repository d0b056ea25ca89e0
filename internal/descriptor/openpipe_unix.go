//go:build unix && !linux

package descriptor

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// openPipe is for all systems. Not all of them have pipe2.
func openPipe() (r, w uintptr, err error) {
	var ends [2]int
	// The lock keeps a fork out of the moment before close-on-exec is set.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := unix.Pipe(ends[:]); err != nil {
		return 0, 0, err
	}
	unix.CloseOnExec(ends[0])
	unix.CloseOnExec(ends[1])
	return uintptr(ends[0]), uintptr(ends[1]), nil
}
