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
	PID, Parent int
	State       string
	Started     string // tells it from an unrelated one that is given its PID later
	Name        string
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
	parent, _ := strconv.Atoi(fields[1])
	return Process{pid, parent, fields[0], fields[19], string(stat[open+1 : end])}, true
}

// Lives reports whether p is there, and no zombie.
func (p Process) Lives() bool {
	now, ok := Find(p.PID)
	return ok && now.Started == p.Started && now.State != Zombie
}

// Children returns the PIDs of a process's children, zombies included.
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

// Descendants returns the processes that come from this one, zombies included.
func Descendants() (all []Process) {
	queue := []int{os.Getpid()}
	for len(queue) > 0 {
		for _, pid := range Children(queue[0]) {
			if p, ok := Find(pid); ok {
				all = append(all, p)
				queue = append(queue, pid)
			}
		}
		queue = queue[1:]
	}
	return all
}

// Files returns how many descriptors of each kind a process has open. Sockets count if
// they listen, or are of UDP: others are connections, which come and go.
func Files(pid int) (map[string]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	listening := listeningSockets()
	kinds := make(map[string]int)
	for _, entry := range entries {
		target, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue
		}
		kind, id, isNumbered := strings.Cut(target, ":[")
		if isNumbered && kind == "socket" {
			if kind = listening[strings.TrimSuffix(id, "]")]; kind == "" {
				continue
			}
		}
		kinds[kind]++
	}
	return kinds, nil
}

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
