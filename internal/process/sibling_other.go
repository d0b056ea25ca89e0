//go:build !linux

package process

import "os/exec"

func asksForSibling(*exec.Cmd) bool { return false }

func startChild(cmd *exec.Cmd, fds []uintptr) (control, error) { return startByID(cmd, fds) }

// startSibling starts a child of this process.
func startSibling(cmd *exec.Cmd, fds []uintptr) (control, error) { return startChild(cmd, fds) }

// These systems have no common place from which the owner and the state of a process
// could be read.

func owner(pid int) string { return "" }

func condition(pid int) string { return "" }
