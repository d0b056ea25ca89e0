package systemd

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// monotonicClock returns what CLOCK_MONOTONIC shows.
func monotonicClock() (time.Duration, error) {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return time.Duration(now.Nano()), os.NewSyscallError("clock_gettime", err)
}
