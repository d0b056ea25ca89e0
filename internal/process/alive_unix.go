//go:build unix

package process

import (
	"errors"

	"golang.org/x/sys/unix"
)

// IsAlive reports whether there is a process of this ID.
func IsAlive(pid int) bool {
	err := unix.Kill(pid, 0)
	return err == nil || errors.Is(err, unix.EPERM)
}
