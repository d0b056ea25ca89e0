//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package supervise

import (
	"errors"
	"fmt"
	"runtime"
)

func (s Supervisor) run(string, bool) (int, error) {
	return 0, fmt.Errorf("no supervisor on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}

func isSupervised() bool { return false }
func adopt() error       { return nil }
