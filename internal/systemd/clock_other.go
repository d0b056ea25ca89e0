//go:build !linux

package systemd

import (
	"errors"
	"time"
)

func monotonicClock() (time.Duration, error) { return 0, errors.ErrUnsupported }
