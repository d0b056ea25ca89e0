package descriptor

import (
	"slices"

	"golang.org/x/sys/unix"
)

// setCloseOnExecAtOnce sets close-on-exec on n descriptors from first on, by two system
// calls instead of n. It reports whether it could, and all of them are open: Linux has
// close_range(2) from 5.11 on.
func setCloseOnExecAtOnce(first uintptr, n int) bool {
	if n == 0 || unix.CloseRange(uint(first), uint(first)+uint(n)-1, unix.CLOSE_RANGE_CLOEXEC) != nil {
		return false
	}
	polled := make([]unix.PollFd, n)
	for i := range polled {
		polled[i].Fd = int32(first) + int32(i)
	}
	_, err := unix.Poll(polled, 0)
	return err == nil && !slices.ContainsFunc(polled, func(p unix.PollFd) bool { return p.Revents&unix.POLLNVAL != 0 })
}

// closeAtOnce closes n descriptors from first on, by one system call, and reports whether
// it could. It does not tell whether they were open.
func closeAtOnce(first uintptr, n int) bool {
	return unix.CloseRange(uint(first), uint(first)+uint(n)-1, 0) == nil
}
