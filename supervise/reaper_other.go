//go:build darwin || dragonfly || netbsd || openbsd

package supervise

import "errors"

func becomeReaper() error { return errors.ErrUnsupported }
