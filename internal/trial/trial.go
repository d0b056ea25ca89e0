// Package trial is where the Upgrader of this process tells packages service, control and
// httpdrain that the process is on trial, in which its parent is still in charge. It is no
// part of the root's API, because a program that serves has nothing else to do on trial than
// later. A process has one Upgrader at a time, so the package keeps one trial.
package trial

import "sync"

var (
	mu     sync.Mutex
	ended  = closed()
	undo   = func(error) bool { return false }
	undone bool
)

func closed() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// Begin says that this process is on trial until end is called, which says whether the trial
// was undone. Undo calls f.
func Begin(f func(error) bool) (end func(undone bool)) {
	this := make(chan struct{})
	mu.Lock()
	defer mu.Unlock()
	ended, undo, undone = this, f, false
	return func(is bool) {
		mu.Lock()
		defer mu.Unlock()
		undone = is
		close(this)
	}
}

// Ended returns a channel that is closed unless this process is on trial. It is closed when
// the trial has ended, and if that was undone, when Exit of the Upgrader has been closed.
func Ended() <-chan struct{} {
	mu.Lock()
	defer mu.Unlock()
	return ended
}

// IsOn reports whether this process is on trial.
func IsOn() bool {
	select {
	case <-Ended():
		return false
	default:
		return true
	}
}

// WasUndone reports whether this process was on trial, and was not put in charge.
func WasUndone() bool {
	mu.Lock()
	defer mu.Unlock()
	return undone
}

// Undo stops the Upgrader of a process on trial, and tells the parent why, unless that is
// nil. Otherwise it does nothing. It reports which.
func Undo(why error) bool {
	mu.Lock()
	f := undo
	mu.Unlock()
	return f(why)
}
