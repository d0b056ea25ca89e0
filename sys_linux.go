package tableflip

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A file of its own, as golang.org/x/sys lacks the call, or the constant, on
// other platforms of sys_unix.go.

func init() {
	monotonicClock = func() (time.Duration, error) {
		var now unix.Timespec
		err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
		return time.Duration(now.Nano()), os.NewSyscallError("clock_gettime", err)
	}
}
