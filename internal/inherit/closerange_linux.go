//go:build !mips && !mipsle && !mips64 && !mips64le

package inherit

import "syscall"

// setCloseOnExecAtOnce sets close-on-exec on all descriptors from first to last by
// one system call, close_range(2), and reports whether it could: Linux has that from 5.11
// on.
func setCloseOnExecAtOnce(first, last int) bool {
	// Package unix, which has these, is ready too late. MIPS has another number.
	const closeRange, cloexec = 436, 4
	_, _, errno := syscall.RawSyscall(closeRange, uintptr(first), uintptr(last), cloexec)
	return errno == 0
}
