//go:build linux

// Package launch starts the services that are measured.
package launch

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// Start starts cmd in a process group of its own, and adds what it writes to the file log in
// dir. The channel is closed once the process has been reaped.
func Start(cmd *exec.Cmd, dir string) (ended <-chan struct{}, err error) {
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		cmd.Wait()
	}()
	return reaped, nil
}
