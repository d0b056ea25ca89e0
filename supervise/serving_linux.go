package supervise

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// This file finds the process that serves, for a service whose main process has ended
// without naming its successor.

// findServer returns the process that clients can reach by a socket of its own. If there
// are several, it ignores those that another of them has started, and returns the one that
// was started last. If there is none, it returns 0.
func findServer(pids []int) (server int) {
	serving := slices.DeleteFunc(slices.Clone(pids), func(pid int) bool { return !serves(pid) })
	var newest uint64
	for _, pid := range serving {
		s := statOf(pid)
		if !slices.Contains(serving, s.parent) && s.started >= newest {
			server, newest = pid, s.started
		}
	}
	return server
}

// serves reports whether the process has a socket that listens, or a UDP socket
// that anyone can send to.
func serves(pid int) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	descriptors, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return false
	}
	inodes := map[string]bool{}
	for _, d := range descriptors {
		target, _ := os.Readlink(filepath.Join(dir, "fd", d.Name()))
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	// See proc_pid_net(5). The network namespace is that of the process.
	for _, table := range []struct {
		name         string
		state, inode int // columns
		open         string
	}{
		{"tcp", 3, 9, "0A"}, // TCP_LISTEN
		{"tcp6", 3, 9, "0A"},
		{"udp", 3, 9, "07"}, // not connected
		{"udp6", 3, 9, "07"},
		{"unix", 3, 6, "00010000"}, // __SO_ACCEPTCON
	} {
		content, _ := os.ReadFile(filepath.Join(dir, "net", table.name))
		for line := range strings.Lines(string(content)) {
			columns := strings.Fields(line)
			if len(columns) > table.inode && columns[table.state] == table.open && inodes[columns[table.inode]] {
				return true
			}
		}
	}
	return false
}
