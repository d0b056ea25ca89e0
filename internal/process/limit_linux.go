package process

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file owns how many files a new process may open.
//
// At the start of a program, package syscall raises the soft limit of open files to one
// below the hard limit. In every process that it starts, it restores the old limit right
// before execve, and it does not export the old limit (syscall/rlimit.go, exec_linux.go).
// A new process that inherits more descriptors than that cannot even load its libraries.
// So this package checks the limit of a process that was just started. If the limit is
// too low, the process is killed, and started again with this process's limit. The loader
// of the killed one may have had the time to complain on standard error.

// spareDescriptors is how many a program may need before its Go runtime, if it has
// one, raises the limit: for its loader and, if it is a script, for the shell, which
// keeps the script open as descriptor 10 or above.
const spareDescriptors = 16

// fits reports whether a process that was just started may open more files than the
// inherited ones.
func fits(pid, inherited int) bool {
	var limit unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit)
	return err != nil || limit.Cur >= uint64(inherited+spareDescriptors)
}

// passLimitOn gives this process's limit to the processes that it starts, until undo is
// called. syscall.Setrlimit would do so for good. Instead, this relies on package
// syscall's test for a limit that another process has changed: it restores the old limit
// only if the soft limit is one below the hard limit. Other processes that this one starts
// meanwhile get the higher limit, too, which harms only programs that use select(2).
func passLimitOn() (undo func()) {
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil || before.Cur != before.Max-1 {
		return func() {} // it is passed on anyway
	}
	setLimit(&unix.Rlimit{Cur: before.Max, Max: before.Max})
	return func() { setLimit(&before) }
}

// setLimit does what unix.Setrlimit does, without package syscall's knowledge.
func setLimit(limit *unix.Rlimit) {
	// It fails if the hard limit was lowered meanwhile. Then the soft limit stays below that.
	_, _, _ = unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(limit)), 0, 0, 0)
}
