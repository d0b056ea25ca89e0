//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package descriptor

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockPatience bounds the wait for a lock that a suspended process, or a stranger, has.
const lockPatience = time.Second

// LockDir keeps other callers of LockDir, in all processes, waiting until unlock is
// called. It is advisory: where it can't have the lock it does without.
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
