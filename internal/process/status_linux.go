package process

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// This file owns what /proc says about a process. Where it is not mounted, all of it
// is empty.

// startTime tells a process from an unrelated one that gets the same ID later.
func startTime(pid int) string { return statField(pid, 22) }

// state is a letter: D, R, S, T, Z or another.
func state(pid int) string { return statField(pid, 3) }

// statField returns the field of this number, from 3 on, of proc_pid_stat(5).
func statField(pid, number int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// The second field is a name in parentheses, which may contain anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < number-2 {
		return ""
	}
	return fields[number-3]
}

// owner returns words to follow a process's ID, if it is another user's.
func owner(pid int) string {
	info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		return ""
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && int(stat.Uid) != os.Geteuid() {
		return fmt.Sprintf(" of user %d", stat.Uid)
	}
	return ""
}

// condition returns words to follow the ID of a process that does not end.
func condition(pid int) string {
	switch letter := state(pid); letter {
	case "":
		return ""
	case "D":
		return " (in state D: it waits for a device or a file server, and ends when that answers)"
	default:
		return " (in state " + letter + ")"
	}
}
