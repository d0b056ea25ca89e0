//go:build darwin || dragonfly || netbsd || openbsd

package supervise

import "errors"

func setReaper(bool) error { return errors.ErrUnsupported }
