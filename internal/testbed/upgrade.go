//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/testbed/wire"
)

// This file owns what the test-bed does to the server, and the promises that it
// checks after each upgrade.

// row is the result of a step.
type row struct {
	began   time.Time
	fault   fault
	result  string
	took    time.Duration // from the signal until somebody is in charge
	drained time.Duration // from then until the old process has exited
	broken  []string      // promises
}

func (r *row) breaks(format string, args ...any) {
	r.broken = append(r.broken, fmt.Sprintf(format, args...))
}

// perform does one step, and returns when the server is ready for the next one.
func (b *bed) perform(s step) *row {
	r := &row{began: time.Now(), fault: s.fault}
	parent, parentVersion := b.chain.current()
	if parent == 0 {
		r.breaks("no process was in charge")
		b.restart(r)
		return r
	}
	b.version++
	b.forget(parent)
	undo, err := b.prepare(s.fault, parent)
	if err != nil {
		r.breaks("test-bed: %v", err)
		return r
	}
	r.began = time.Now()
	syscall.Kill(parent, syscall.SIGHUP)
	result := b.awaitResult(parent, s.fault)
	r.took = time.Since(r.began)
	undo()

	switch {
	case s.fault.child.Action == wire.KillParent:
		r.result = "child took over"
		if result != tookOver {
			r.result = "outage"
			r.breaks("the child of a killed parent: %v", result)
			b.restart(r)
		}
		// What the parent had begun is lost by the crash.
		b.record.crashed(window{r.began, time.Now()})
	case s.fault.survivable():
		r.result = "upgraded"
		if result != succeeded {
			r.result = "FAILED"
			r.breaks("the upgrade: %v: %s", result, b.failure(parent))
			break
		}
		b.awaitExit(r, parent)
		if s.fault.environment == drainKilled {
			b.record.crashed(window{r.began, time.Now()})
		}
	default:
		r.result = "refused: " + brief(b.failure(parent))
		if result != failed {
			r.result = "ACCEPTED"
			r.breaks("the upgrade to a process with a fault: %v", result)
		}
	}
	b.verify(r, parentVersion)
	return r
}

// forget makes room for the next result of a process that was upgraded before.
func (b *bed) forget(pid int) {
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	delete(b.chain.process(pid).steps, wire.UpgradeFailed)
}

// prepare installs the next version and arranges the fault.
func (b *bed) prepare(f fault, parent int) (undo func(), err error) {
	if err := install(b.binary, b.path("server"), b.version); err != nil {
		return nil, err
	}
	away := func(name string) func() {
		os.Rename(b.path(name), b.path(name+".away"))
		return func() { os.Rename(b.path(name+".away"), b.path(name)) }
	}
	switch f.environment {
	case noBinary:
		return away("server"), nil
	case noPIDDirectory:
		return away("run"), nil
	case fileForDirectory:
		back := away("run")
		return func() { os.Remove(b.path("run")); back() }, os.WriteFile(b.path("run"), nil, 0o600)
	case diskFull:
		return b.fillDisk()
	case fewDescriptors:
		var before unix.Rlimit
		if err := unix.Prlimit(parent, unix.RLIMIT_NOFILE, nil, &before); err != nil {
			return nil, err
		}
		restore := func() { unix.Prlimit(parent, unix.RLIMIT_NOFILE, &before, nil) }
		return restore, unix.Prlimit(parent, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: before.Max}, nil)
	}
	if f.child.Action == "" {
		return func() {}, nil
	}
	return func() { os.Remove(b.path("fault")) }, os.WriteFile(b.path("fault"), []byte(f.child.String()), 0o600)
}

// fillDisk puts a file system that holds nothing but the PID file, and has no room
// for more, in the place of its directory.
func (b *bed) fillDisk() (undo func(), err error) {
	text, err := os.ReadFile(b.pidFile())
	if err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", b.path("run"), "tmpfs", 0, "size=64k"); err != nil {
		return nil, err
	}
	undo = func() { unix.Unmount(b.path("run"), unix.MNT_DETACH) }
	err = os.WriteFile(b.pidFile(), text, 0o644)
	if err == nil {
		if err = os.WriteFile(b.path("run/filler"), make([]byte, 128<<10), 0o600); errors.Is(err, unix.ENOSPC) {
			return undo, nil
		}
	}
	undo()
	return nil, fmt.Errorf("fill the file system of the PID file: %v", err)
}

type result string

const (
	succeeded result = "succeeded"
	failed    result = "failed"
	tookOver  result = "took over"
	died      result = "the process in charge died"
	endless   result = "did not end"
)

// awaitResult waits until the upgrade has ended one way or the other. It suspends
// the parent, and resumes whom the fault has suspended.
func (b *bed) awaitResult(parent int, f fault) result {
	limit := b.upgradeTimeout + startLimit
	if f.environment == parentSuspended {
		time.Sleep(f.delay)
		syscall.Kill(parent, syscall.SIGSTOP)
		time.Sleep(f.length)
		syscall.Kill(parent, syscall.SIGCONT)
	}
	if f.environment == impatience {
		for range 2 {
			time.Sleep(f.delay)
			syscall.Kill(parent, syscall.SIGHUP)
		}
	}
	if f.child.Action == wire.Suspend {
		var child int
		b.chain.await(limit, func() bool {
			child = b.child(wire.Stopping)
			return child != 0 || b.chain.processes[parent].reported(wire.UpgradeFailed)
		})
		if child != 0 {
			time.Sleep(f.length)
			syscall.Kill(child, syscall.SIGCONT)
		}
	}
	result := endless
	b.chain.await(limit, func() bool {
		p := b.chain.processes[parent]
		ready := b.child(wire.Ready) != 0
		switch {
		case ready && p.reported(wire.Upgraded):
			result = succeeded
		case ready && p.ended && f.child.Action == wire.KillParent:
			result = tookOver
		case p.reported(wire.UpgradeFailed) && f.environment != impatience:
			result = failed
		case p.ended && b.childEnded():
			result = died
		}
		return result != endless
	})
	return result
}

// child returns the PID of the new process, if it has reported the step. The
// chain is locked.
func (b *bed) child(step string) int {
	for pid, p := range b.chain.processes {
		if p.version == b.version && p.reported(step) {
			return pid
		}
	}
	return 0
}

// children returns how many processes of the new version there were.
func (b *bed) children() (n int) {
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	for _, p := range b.chain.processes {
		if p.version == b.version && p.reported(wire.AfterNew) {
			n++
		}
	}
	return n
}

// childEnded reports whether the new process has reported something, and ended.
func (b *bed) childEnded() bool {
	for _, p := range b.chain.processes {
		if p.version == b.version && p.ended {
			return true
		}
	}
	return false
}

// failure returns the error of the parent's Upgrade.
func (b *bed) failure(parent int) string {
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	return b.chain.processes[parent].steps[wire.UpgradeFailed]
}

// awaitExit waits until the old process is drained and gone, or sees to that.
func (b *bed) awaitExit(r *row, parent int) {
	began := time.Now()
	killed := r.fault.environment == drainKilled
	if killed {
		syscall.Kill(parent, syscall.SIGKILL)
	}
	if !b.chain.await(b.drain+10*time.Second, func() bool { return b.chain.processes[parent].ended }) {
		r.breaks("the old process, PID %d, does not exit", parent)
		syscall.Kill(parent, syscall.SIGKILL)
		return
	}
	r.drained = time.Since(began)
	if killed {
		return
	}
	// Its last report may be in the pipe still.
	reported := b.chain.await(2*time.Second, func() bool { return b.chain.processes[parent].reported(wire.Drained) })
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	if status := b.chain.processes[parent].status; !reported || status != 0 {
		r.breaks("the old process, PID %d, was not drained in %v: wait status %#x", parent, b.drain, int(status))
	}
}

// verify checks that the right process is in charge, and answers. If there is none
// it starts one.
func (b *bed) verify(r *row, parentVersion int) {
	want := b.version
	if !r.fault.survivable() && r.fault.child.Action != wire.KillParent {
		want = parentVersion
	}
	if n := b.children(); n > 1 {
		r.breaks("%d upgrades at a time", n)
	}
	pid, version := b.chain.current()
	if pid == 0 {
		r.breaks("no process is in charge")
		b.restart(r)
		return
	}
	if version != want {
		r.breaks("version %d is in charge, not %d", version, want)
	}
	text, err := os.ReadFile(b.pidFile())
	if named, _ := strconv.Atoi(strings.TrimSpace(string(text))); named != pid {
		r.breaks("the PID file says %q (%v), and %d is in charge", text, err, pid)
	}
	if _, err := os.Lstat(b.target.unix); err != nil {
		r.breaks("the Unix socket: %v", err)
	}
	if version, err = b.probe(); err != nil {
		r.breaks("the service does not answer: %v", err)
	} else if version != want {
		r.breaks("version %d answers, not %d", version, want)
	}
}

// probe asks the server once, on a new connection.
func (b *bed) probe() (version int, err error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + b.target.tcp + "/?id=7&n=100")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	return check(resp, got, wire.Content(7, 100))
}

// restart does what a service manager does when nobody is left. That includes
// clearing away the Unix socket, as the first generation will not.
func (b *bed) restart(r *row) {
	b.chain.killChildren()
	os.Remove(b.target.unix)
	b.version++
	err := install(b.binary, b.path("server"), b.version)
	if err == nil {
		err = b.chain.start()
	}
	if err != nil {
		r.breaks("restarting the service: %v", err)
	}
	b.record.crashed(window{r.began, time.Now()})
}

func (b *bed) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bed) pidFile() string { return filepath.Join(b.dir, "run", "server.pid") }

// brief shortens an error to its causes.
func brief(text string) string {
	text = strings.TrimPrefix(text, "tableflip: ")
	if len(text) > 60 {
		text = "…" + string(bytes.ToValidUTF8([]byte(text[len(text)-58:]), nil))
	}
	return text
}
