//go:build linux

// Package proc reads the process table, by which the test-bed sees its servers from
// outside. See proc_pid_stat(5).
package proc

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// States of a Process; others are of one that runs.
const (
	None    = ""
	Stopped = "T"
	Zombie  = "Z"
)

// A Process is an entry of the table.
type Process struct {
	PID     int
	Name    string
	State   string
	Group   int
	Started string // tells it from an unrelated one that is given its PID later
}

// Find returns the process that has this ID now, and whether there is one.
func Find(pid int) (Process, bool) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, false
	}
	// The second field is a name in parentheses that may contain anything.
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	if open < 0 || len(fields) < 20 {
		return Process{}, false
	}
	group, _ := strconv.Atoi(fields[2])
	return Process{pid, string(stat[open+1 : end]), fields[0], group, fields[19]}, true
}

// Lives reports whether p is there, and no zombie.
func (p Process) Lives() bool {
	now, ok := Find(p.PID)
	return ok && now.Started == p.Started && now.State != Zombie
}

// Children returns the PIDs of a process's children, zombies included. Some may be missing
// while others end (see proc_pid_task(5)).
func Children(pid int) (children []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for field := range strings.FieldsSeq(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				children = append(children, child)
			}
		}
	}
	return children
}

// InGroup returns the processes of a process group, zombies included.
func InGroup(group int) (all []Process) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if p, ok := Find(pid); ok && p.Group == group {
			all = append(all, p)
		}
	}
	return all
}

// Files returns how many descriptors of each kind a process has open. Connections, which
// come and go, do not count; of the sockets that listen, or are of UDP, the one that has
// the most descriptors does, for the kernel may leave out some, or all, where many change.
func Files(pid int) (map[string]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	listening := listeningSockets()
	kinds, sockets := make(map[string]int), make(map[string]int)
	for _, entry := range entries {
		target, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue
		}
		kind, inode, isNumbered := strings.Cut(target, ":[")
		switch inode = strings.TrimSuffix(inode, "]"); {
		case !isNumbered || kind != "socket":
			kinds[kind]++
		case listening[inode] != "":
			sockets[inode]++
			kind = socketKind + listening[inode]
			kinds[kind] = max(kinds[kind], sockets[inode])
		}
	}
	return kinds, nil
}

const socketKind = "the same socket, "

// IsSocket reports whether a kind is one of sockets, whose absence says nothing.
func IsSocket(kind string) bool { return strings.HasPrefix(kind, socketKind) }

// listeningSockets returns the kinds of sockets by inode. See proc_pid_net(5).
func listeningSockets() map[string]string {
	kinds := make(map[string]string)
	for _, table := range []struct {
		name         string
		state, inode int // columns
		listens      string
	}{
		{"tcp", 3, 9, "0A"}, {"tcp6", 3, 9, "0A"},
		{"udp", 3, 9, "07"}, {"udp6", 3, 9, "07"},
		{"unix", 3, 6, "00010000"},
	} {
		text, _ := os.ReadFile("/proc/self/net/" + table.name)
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) > table.inode && fields[table.state] == table.listens {
				kinds[fields[table.inode]] = table.name
			}
		}
	}
	return kinds
}

// Use is what a process holds.
type Use struct {
	Memory      int // KiB of its own, resident
	Descriptors int
	Threads     int
}

// Held returns what a process holds, and nothing if it is gone. See proc_pid_status(5).
func Held(pid int) (u Use) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return Use{}
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		switch name {
		case "RssAnon":
			fmt.Sscan(value, &u.Memory)
		case "Threads":
			fmt.Sscan(value, &u.Threads)
		}
	}
	descriptors, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	u.Descriptors = len(descriptors)
	return u
}
