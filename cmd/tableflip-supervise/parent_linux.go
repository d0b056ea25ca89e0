package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// setParentDeath has the kernel send this process a signal when its parent ends, see
// PR_SET_PDEATHSIG(2const).
func setParentDeath(name string) error {
	number, err := strconv.Atoi(name)
	sig := unix.Signal(number)
	if err != nil {
		sig = unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG"))
	}
	if unix.SignalName(sig) == "" {
		return fmt.Errorf("no signal %q", name)
	}
	parent := os.Getppid()
	// The setting is the thread's, and ends with it.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(sig), 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_PDEATHSIG", err)
	}
	if os.Getppid() != parent { // it ended in between
		return unix.Kill(os.Getpid(), sig)
	}
	return nil
}
