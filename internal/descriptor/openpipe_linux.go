package descriptor

import "golang.org/x/sys/unix"

func openPipe() (r, w uintptr, err error) {
	var ends [2]int
	err = unix.Pipe2(ends[:], unix.O_CLOEXEC)
	return uintptr(ends[0]), uintptr(ends[1]), err
}
