//go:build darwin || netbsd || openbsd

package supervise

import "errors"

func setReaper(bool) error { return errors.ErrUnsupported }
