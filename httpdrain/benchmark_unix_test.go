//go:build unix

package httpdrain_test

import (
	"syscall"
	"time"
)

func init() {
	cpuTime = func() time.Duration {
		var usage syscall.Rusage
		if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) != nil {
			return 0
		}
		return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	mostTCP = func() int {
		var limit syscall.Rlimit
		if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
			return 5000
		}
		// Each connection has two, and the test has some more.
		return (int(min(limit.Cur, 1<<30)) - 100) / 2
	}
}
