//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// This file owns the step between fork and exec that lets LISTEN_PID name the
// service (sd_listen_fds(3)): only the new process knows its PID before the service
// runs. It is this program, which executes the service before main.

// shimVariable holds the path of the service's program.
const shimVariable = "TABLEFLIP_SUPERVISOR_EXEC"

func init() {
	path, ok := os.LookupEnv(shimVariable)
	if !ok {
		return
	}
	err := os.Unsetenv(shimVariable)
	if err == nil {
		err = os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	if err == nil {
		err = syscall.Exec(path, os.Args, os.Environ())
	}
	err = fmt.Errorf("supervise: %w: %s: %w", errNotStarted, path, err)
	fmt.Fprintln(os.Stderr, err)
	os.Exit(startStatus(err))
}
