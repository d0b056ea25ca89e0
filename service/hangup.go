//go:build !js

package service

import (
	"os"
	"syscall"
)

var hangup os.Signal = syscall.SIGHUP
