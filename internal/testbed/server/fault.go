//go:build linux

package main

import (
	"log/slog"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/testbed/proc"
	"example.com/tableflip/internal/testbed/wire"
)

// armed is the fault that is to happen once this process comes to its step.
var armed atomic.Pointer[wire.Fault]

// startedBy is the parent, which is another process once that has ended.
var startedBy = os.Getppid()

// arm reads which fault a child is to have, or its parent, of which isStep says at
// which steps it may happen.
func arm(path string, isStep func(step string) bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return
	}
	f, err := wire.ParseFault(string(text))
	if err != nil {
		panic(err)
	}
	if isStep(f.Step) {
		armed.Store(&f)
	}
}

// armParent is called before an upgrade, armChild when the process starts.
func armParent(path string) { arm(path, isParentStep) }
func armChild(path string)  { arm(path, func(step string) bool { return !isParentStep(step) }) }

// disarm is called when a child has become a parent.
func disarm() { armed.Store(nil) }

// reached lets the fault happen if that is its step.
func reached(step string) {
	f := armed.Load()
	if f == nil || f.Step != step || !armed.CompareAndSwap(f, nil) {
		return
	}
	victim := os.Getpid()
	if isSelf := isParentStep(step) == (f.Victim == wire.Parent); !isSelf {
		if victim = other(f.Victim); victim == 0 {
			return // it has ended
		}
	}
	slog.Warn("injected fault", "fault", f.String(), "victim", victim)
	reportEvent(wire.Event{Step: wire.Injecting, Victim: victim})
	if victim == os.Getpid() {
		suffer(f.Action)
	} else {
		inflict(f.Action, victim)
	}
}

// other returns the PID of the other process of an upgrade, or 0 if it has ended.
func other(victim string) int {
	if victim == wire.Parent {
		if os.Getppid() != startedBy {
			return 0
		}
		return startedBy
	}
	for _, child := range proc.Children(os.Getpid()) {
		return child
	}
	return 0
}

func suffer(action string) {
	switch action {
	case wire.Crash:
		panic("injected crash")
	case wire.ExitZero:
		os.Exit(0)
	case wire.Kill:
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case wire.Hang:
		select {}
	case wire.Suspend:
		// Sent to this thread, it comes before the next instruction.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		unix.Tgkill(os.Getpid(), unix.Gettid(), syscall.SIGSTOP)
	default:
		panic("unknown action " + action)
	}
}

// inflict returns once the victim has ended or stopped.
func inflict(action string, victim int) {
	signal := syscall.SIGSTOP
	if action == wire.Kill {
		signal = syscall.SIGKILL
	}
	syscall.Kill(victim, signal)
	for {
		switch p, _ := proc.Find(victim); p.State {
		case proc.None, proc.Zombie:
			return
		case proc.Stopped:
			if signal == syscall.SIGSTOP {
				return
			}
		}
		time.Sleep(50 * time.Microsecond)
	}
}
