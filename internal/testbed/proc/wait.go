//go:build linux

package proc

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Waits tells how long threads wait for a processor, by the kernel's own account ("Scheduler
// statistics", /proc/PID/schedstat). What sleeps, waits for a lock, or is stopped waits for none.
type Waits struct {
	seen map[int]map[string]time.Duration // by process and thread
}

func NewWaits() *Waits { return &Waits{make(map[int]map[string]time.Duration)} }

// Longest returns the longest time that a thread of these processes has waited since the last
// call for its process: 0 in the first, and for processes that are gone.
func (w *Waits) Longest(pids ...int) (longest time.Duration) {
	for _, pid := range pids {
		before, isKnown := w.seen[pid]
		now := waits(pid)
		w.seen[pid] = now
		for thread, total := range now {
			if isKnown {
				longest = max(longest, total-before[thread])
			}
		}
	}
	return longest
}

// waits returns how long each thread of a process has waited since its start.
func waits(pid int) map[string]time.Duration {
	all := make(map[string]time.Duration)
	dir := fmt.Sprintf("/proc/%d/task/", pid)
	threads, _ := os.ReadDir(dir)
	for _, thread := range threads {
		text, err := os.ReadFile(dir + thread.Name() + "/schedstat")
		if err != nil {
			continue // it has ended
		}
		if fields := strings.Fields(string(text)); len(fields) > 1 {
			waited, _ := strconv.ParseInt(fields[1], 10, 64) // in nanoseconds
			all[thread.Name()] = time.Duration(waited)
		}
	}
	return all
}
