//go:build unix

package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
)

const supported = true

// endSignals are those that end the demo early.
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}

// surviveBrokenPipe makes writing to a pipe that nobody reads an error, instead
// of the end of the process, which has to clean up first.
func surviveBrokenPipe() {
	// Not signal.Ignore, which would hold for the processes that are started too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
}

// inOwnGroup has cmd start as the leader of a process group, whose number is its
// PID, out of reach of what is typed on the terminal.
func inOwnGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
}

// A signal to a group reaches every process in it at once: none that is being
// forked escapes.
func terminateGroup(group int) error { return syscall.Kill(-group, syscall.SIGTERM) }
func killGroup(group int) error      { return syscall.Kill(-group, syscall.SIGKILL) }

// running reports whether a process has not exited, which need not be a child of
// this one. Signal 0 reaches zombies as well, and those of a container without an
// init process stay.
func running(pid int) bool {
	if err := syscall.Kill(pid, 0); err != nil {
		return false
	}
	// See proc_pid_stat(5). Fields are counted from the state, the third, which
	// follows the name in parentheses. Systems without this file are taken to
	// have an init process.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 18 || fields[0] != "Z" {
		return true
	}
	// This is the state of the first thread only. As long as others have not
	// ended, the process's descriptors are open.
	threads := fields[17]
	return threads != "1" && threads != "0"
}
