package service

import (
	"os"
	"syscall"
)

// JavaScript has no SIGHUP, nor an upgrade that it could begin.
var hangup os.Signal = syscall.Signal(1)
