//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package descriptor

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockPatience bounds the wait for a lock that a suspended process, or a process of
// another program, holds.
const lockPatience = time.Second

// LockDir makes other callers of LockDir, in all processes, wait until unlock is called.
// The lock is advisory: if LockDir can't get it, it returns without.
func LockDir(path string) (unlock func()) {
	dir, err := os.Open(path)
	if err != nil {
		return func() {}
	}
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		err := Control(dir, func(fd uintptr) error { return unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) })
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Since(begin) > lockPatience {
			return func() { dir.Close() }
		}
	}
}
