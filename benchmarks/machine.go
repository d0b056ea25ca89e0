//go:build linux

package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// describeMachine notes where and when the figures were measured.
func (b *bench) describeMachine() {
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		release, _, _ := strings.Cut(unix.ByteSliceToString(name.Release[:]), "-")
		b.set("system", "Linux "+release+" "+runtime.GOARCH)
	}
	b.set("go", runtime.Version())
	b.set("processors", fmt.Sprintf("%d × %s", runtime.NumCPU(), field("/proc/cpuinfo", "model name")))
	b.set("memory", field("/proc/meminfo", "MemTotal"))
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		b.set("load average at the start", strings.Fields(string(load))[0])
	}
	b.set("date", time.Now().Format("2 January 2006"))
	b.set("rounds", fmt.Sprint(b.plan.rounds))
}

// watchForStalls returns a function that says for how long this process, or the
// machine, did not get to run: what the clients saw then is not the servers' doing.
func watchForStalls() func() time.Duration {
	const tick = 10 * time.Millisecond
	var longest atomic.Int64
	go func() {
		for last := time.Now(); ; last = time.Now() {
			time.Sleep(tick)
			longest.Store(max(longest.Load(), int64(time.Since(last)-tick)))
		}
	}()
	return func() time.Duration { return time.Duration(longest.Load()) }
}

// field returns the value of the first line that begins with the name.
func field(path, name string) string {
	file, err := os.Open(path)
	if err != nil {
		return "unknown"
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}
