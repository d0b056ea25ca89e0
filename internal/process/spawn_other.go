//go:build !unix

package process

import (
	"errors"
	"os/exec"
)

func spawn(*exec.Cmd, []uintptr) error { return errors.ErrUnsupported }
