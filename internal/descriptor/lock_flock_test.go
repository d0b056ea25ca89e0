//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package descriptor_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

func TestLockDir(t *testing.T) {
	dir := t.TempDir()
	file, err := os.Open(dir)
	ok(t, err)
	defer file.Close()
	tryLock := func() error {
		return descriptor.Control(file, func(fd uintptr) error { return unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) })
	}
	unlock := descriptor.LockDir(dir)
	if err := tryLock(); err != unix.EWOULDBLOCK {
		t.Errorf("while it is locked: %v", err)
	}
	unlock()
	ok(t, tryLock())

	// Who keeps the lock holds nobody up for ever.
	descriptor.LockDir(dir)()
	descriptor.LockDir(filepath.Join(dir, "none"))()
}
