//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/testbed/proc"
	"example.com/tableflip/internal/testbed/wire"
)

// This file owns what the test-bed does to the server.

// row is the result of an attempt.
type row struct {
	began    time.Time
	fault    fault
	outcome  outcome
	err      string        // of the old process's Upgrade
	took     time.Duration // from the signal until somebody is in charge
	drained  time.Duration // from then until the old process has exited
	broken   []string      // promises
	from, to string        // the libraries of the old and the new process
	held     proc.Use      // by the old process, before

	concluded time.Time // when only one process was left
	killed    time.Time // when the fault killed, or began to
}

func (r *row) breaks(format string, args ...any) {
	r.broken = append(r.broken, fmt.Sprintf(format, args...))
}

// perform makes one attempt, and returns when the server is ready for the next one.
func (b *bed) perform(a attempt) *row {
	r := &row{began: time.Now(), fault: a.fault}
	parent, parentVersion := b.chain.current()
	if parent == 0 {
		r.breaks("no process was in charge")
		b.restart(r)
		return r
	}
	r.from, r.held = b.libraries[parentVersion], proc.Held(parent)
	b.chain.forget(parent)
	undo, err := b.prepare(a.fault, parent)
	r.to = b.libraries[b.version]
	if err != nil {
		r.breaks("test-bed: %v", err)
		return r
	}
	r.began = time.Now()
	syscall.Kill(parent, syscall.SIGHUP)
	b.disturb(r, parent, parentVersion)
	r.outcome = b.awaitOutcome(parent, r)
	if r.outcome != refused {
		b.turn++
	}
	r.took = time.Since(r.began)
	undo()

	r.err = b.failure(parent)
	if want := b.outcomes(r); !slices.Contains(want, r.outcome) {
		r.breaks("the outcome is %q, want %q: %s", r.outcome, want, r.err)
	}
	// When a process is dead, its last reports may still be in the pipe.
	isInjected := func() bool { return b.chain.injected.Victim != 0 }
	if a.fault.injected.Action != "" && !b.chain.await(settleLimit, isInjected) {
		r.breaks("no process came to the step")
	}
	b.conclude(r, parent)
	r.concluded = time.Now()
	b.verify(r, parentVersion)
	return r
}

// conclude waits for the end of the process that is not in charge after the upgrade. If
// no process is left, it does what a service manager would do.
func (b *bed) conclude(r *row, parent int) {
	killed := cmp.Or(r.killed, b.injected().At, r.began)
	switch r.outcome {
	case refused:
		b.concludeTrial(r, killed)
	case succeeded:
		b.awaitExit(r, parent)
		if r.fault.environment == drainKilled {
			b.record.crashed(window{r.killed, time.Now(), b.endOf(parent)})
		}
	case tookOver:
		b.record.crashed(window{killed, time.Now(), b.endOf(parent)})
	case crashed:
		b.awaitExit(r, parent)
		b.restart(r)
		b.record.crashed(window{from: killed, to: time.Now()})
	case outage, endless:
		b.restart(r)
		b.record.crashed(window{from: killed, to: time.Now()})
	}
}

// concludeTrial waits for the end of a new process whose trial was undone.
func (b *bed) concludeTrial(r *row, killed time.Time) {
	b.chain.mu.Lock()
	child := b.child()
	b.chain.mu.Unlock()
	switch {
	case !r.fault.hasTrial || child == nil:
	case r.fault.leavesDraining():
		// The old process waits for it, so that its status is not known.
		if !b.chain.await(b.drain+10*time.Second, func() bool { return !child.lives() }) {
			r.breaks("the new process, PID %d, does not exit", child.entry.PID)
		} else if !b.chain.await(2*time.Second, func() bool { return child.reported(wire.Drained) }) {
			r.breaks("the new process, PID %d, was not drained", child.entry.PID)
		}
	case b.chain.await(settleLimit, func() bool { return !child.lives() }):
		now := time.Now()
		b.record.crashed(window{killed, now, now})
	}
}

// prepare installs the next version and arranges the fault.
func (b *bed) prepare(f fault, parent int) (undo func(), err error) {
	if err := b.install(); err != nil {
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
	if f.injected.Action == "" {
		return func() {}, nil
	}
	return func() { os.Remove(b.path("fault")) }, os.WriteFile(b.path("fault"), []byte(f.injected.String()), 0o600)
}

// fillDisk mounts a full file system, with nothing but the PID file on it, over the
// directory of the PID file.
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

// disturb does the test-bed's part of a fault.
func (b *bed) disturb(r *row, parent, parentVersion int) {
	f := r.fault
	if f.cancels() || slices.Contains(trialEnvironments, f.environment) {
		child := b.awaitOnTrial(r, parent)
		if child == 0 {
			return
		}
		time.Sleep(f.delay)
		switch {
		case f.cancels():
			syscall.Kill(parent, syscall.SIGUSR1)
		case f.environment == childStopsOnTrial:
			syscall.Kill(child, syscall.SIGTERM)
		case f.environment == childFailsOnTrial:
			syscall.Kill(child, syscall.SIGUSR2)
		case f.environment == childKilledOnTrial:
			b.kill(r, child)
		case f.environment == parentKilledOnTrial:
			b.kill(r, parent)
		}
	}
	switch f.environment {
	case parentSuspended:
		time.Sleep(f.delay)
		syscall.Kill(parent, syscall.SIGSTOP)
		b.resume(f, parent)
	case impatience:
		for range 2 {
			time.Sleep(f.delay)
			syscall.Kill(parent, syscall.SIGHUP)
		}
	case parentKilled:
		time.Sleep(f.delay)
		b.kill(r, parent)
	case childKilled:
		if child := b.awaitChild(parent); child != 0 {
			time.Sleep(f.delay)
			b.kill(r, child)
		}
	}
	switch f.injected.Action {
	case wire.Suspend:
		if victim := b.awaitInjected(f, parent); victim != 0 {
			b.resume(f, victim)
		}
	case wire.Hang:
		victim := b.awaitInjected(f, parent)
		if f.injected.Victim == wire.Child && !b.awaitUpgraded(parent) || victim == 0 {
			return // the old process must lose its patience
		}
		b.checkHung(r, parentVersion)
		time.Sleep(f.length)
		b.kill(r, victim)
		if injected := b.injected(); injected.PID != victim && f.stopsService() {
			b.record.stopped(injected.At, r.killed)
		}
	}
}

// limit bounds an upgrade.
func (b *bed) limit() time.Duration {
	return b.upgradeTimeout + b.trial + b.acknowledgeTimeout + startLimit
}

// resume has a process that is told to stop go on, some time after it has stopped.
func (b *bed) resume(f fault, pid int) {
	told := time.Now()
	b.chain.await(b.limit(), func() bool {
		p, ok := proc.Find(pid)
		return !ok || p.State == proc.Stopped || p.State == proc.Zombie
	})
	time.Sleep(f.length)
	syscall.Kill(pid, syscall.SIGCONT)
	if f.stopsService() {
		b.record.stopped(told, time.Now())
	}
}

// kill kills a process, and waits for its death.
func (b *bed) kill(r *row, pid int) {
	p, ok := proc.Find(pid)
	if !ok {
		return
	}
	r.killed = time.Now()
	syscall.Kill(pid, syscall.SIGKILL)
	if !b.chain.await(startLimit, func() bool { return !p.Lives() }) {
		r.breaks("PID %d survives SIGKILL", pid)
	}
}

// awaitChild returns the process that parent starts, or 0 if it starts none.
func (b *bed) awaitChild(parent int) (child int) {
	b.chain.await(b.limit(), func() bool {
		for _, child = range proc.Children(parent) {
			return true
		}
		p := b.chain.processes[parent]
		return p.reported(wire.UpgradeFailed) || !p.lives()
	})
	return child
}

// awaitOnTrial returns the process that is on trial, or 0 if none comes to be.
func (b *bed) awaitOnTrial(r *row, parent int) (child int) {
	b.chain.await(b.limit(), func() bool {
		if c := b.child(); c != nil && c.reported(wire.OnTrial) {
			child = c.entry.PID
		}
		p := b.chain.processes[parent]
		return child != 0 || p.reported(wire.UpgradeFailed) || p.reported(wire.Upgraded) || !p.lives()
	})
	if child == 0 {
		r.breaks("no process is on trial")
		return 0
	}
	if text, err := os.ReadFile(b.pidFile()); strings.TrimSpace(string(text)) != strconv.Itoa(parent) {
		r.breaks("in a trial, the PID file says %q (%v), not %d", text, err, parent)
	}
	return child
}

// awaitInjected returns the process that the fault has happened to, or 0 if none has come
// to its step. The old process may report before that the upgrade has succeeded, and that it
// has failed before the new one comes to the end of its trial.
func (b *bed) awaitInjected(f fault, parent int) (victim int) {
	b.chain.await(b.limit(), func() bool {
		victim = b.chain.injected.Victim
		p := b.chain.processes[parent]
		return victim != 0 || p.reported(wire.UpgradeFailed) && !f.cancels() || !p.lives()
	})
	return victim
}

func (b *bed) injected() wire.Event {
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	return b.chain.injected
}

// awaitUpgraded reports whether the old process has been told that it was upgraded.
func (b *bed) awaitUpgraded(parent int) (upgraded bool) {
	b.chain.await(b.limit(), func() bool {
		p := b.chain.processes[parent]
		upgraded = p.reported(wire.Upgraded)
		return upgraded || p.reported(wire.UpgradeFailed) || !p.lives()
	})
	return upgraded
}

// outcomes returns those that the upgrade may have.
func (b *bed) outcomes(r *row) []outcome {
	f, all := r.fault, r.fault.outcomes(r.from, r.to)
	isLate := f.isLong && f.injected.Victim == wire.Child && f.moment() == uncommitted && !f.cancels()
	if isLate && b.record.stalledSince(r.began) > (f.length-b.acknowledgeTimeout)/2 {
		// When the old process loses its patience, it looks for an acknowledgement once more. If it
		// gets no time for that until the new process goes on, that may have acknowledged.
		all = append(all, succeeded)
	}
	return all
}

// awaitOutcome waits until the upgrade has ended one way or the other.
func (b *bed) awaitOutcome(parent int, r *row) outcome {
	f, result := r.fault, endless
	b.chain.await(b.limit(), func() bool {
		p, child := b.chain.processes[parent], b.child()
		childLives := child != nil && child.lives()
		serves := childLives && child.reported(wire.Ready)
		switch {
		case !p.lives() && serves && f.endsParent():
			result = tookOver
		case !p.ended.IsZero() && p.status != 0 && !childLives && len(b.strays(parent)) == 0:
			result = outage
		case f.endsParent():
		// A new process that is to be killed may not have ended yet.
		case serves && p.reported(wire.Upgraded) && slices.Contains(b.outcomes(r), succeeded):
			result = succeeded
		case p.reported(wire.Upgraded) && child != nil && !childLives:
			result = crashed
		case p.reported(wire.UpgradeFailed) && f.environment != impatience:
			result = refused
		}
		return result != endless
	})
	return result
}

// child returns the new process, if it has reported something. The chain is locked.
func (b *bed) child() *process {
	for _, p := range b.chain.processes {
		if p.version == b.version {
			return p
		}
	}
	return nil
}

// failure returns the error of a process's Upgrade.
func (b *bed) failure(pid int) string {
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	return b.chain.processes[pid].steps[wire.UpgradeFailed]
}

// endOf waits until a process that was killed can have begun nothing any more.
func (b *bed) endOf(pid int) (ended time.Time) {
	b.chain.await(startLimit, func() bool {
		ended = b.chain.processes[pid].ended
		return !ended.IsZero()
	})
	return ended
}

// awaitExit waits until the old process has drained and exited. If it does not exit, it
// is killed.
func (b *bed) awaitExit(r *row, parent int) {
	began := time.Now()
	killed := r.fault.environment == drainKilled
	if killed {
		b.kill(r, parent)
	}
	if !b.chain.await(b.drain+10*time.Second, func() bool { return !b.chain.processes[parent].ended.IsZero() }) {
		r.breaks("the old process, PID %d, does not exit", parent)
		b.kill(r, parent)
		return
	}
	r.drained = time.Since(began)
	if killed {
		return
	}
	// Its last report may still be in the pipe.
	reported := b.chain.await(2*time.Second, func() bool { return b.chain.processes[parent].reported(wire.Drained) })
	b.chain.mu.Lock()
	defer b.chain.mu.Unlock()
	if status := b.chain.processes[parent].status; !reported || status != 0 {
		r.breaks("the old process, PID %d, was not drained in %v: wait status %#x", parent, b.drain, int(status))
	}
}

// restart does what a service manager does when no process is left. It also removes the
// Unix socket's file, because not every library replaces it.
func (b *bed) restart(r *row) {
	b.chain.kill()
	if !b.chain.await(startLimit, func() bool { return len(b.strays(0)) == 0 }) {
		r.breaks("some processes survive SIGKILL: %v", b.strays(0))
	}
	os.Remove(b.target.unix)
	err := b.install()
	if err == nil {
		err = b.chain.start()
	}
	if err != nil {
		r.breaks("restarting the service: %v", err)
	}
	b.turn++
}

func (b *bed) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bed) pidFile() string { return filepath.Join(b.dir, "run", "server.pid") }

// brief shortens an error to its causes.
func brief(text string) string {
	text = strings.TrimPrefix(text, "tableflip: ")
	if len(text) > 60 {
		text = "…" + strings.ToValidUTF8(text[len(text)-58:], "")
	}
	return text
}
