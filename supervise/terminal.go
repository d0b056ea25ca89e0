//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// This file owns the controlling terminal: which process group is in its foreground, and
// what happens when that group is stopped.

// A terminal is this process's controlling terminal, if that is its standard input.
// Nil does nothing.
type terminal struct {
	own       int  // this process's group, a job of the shell's
	group     int  // the main process's
	suspended bool // the job was stopped with the service, and has not been continued
}

// openTerminal returns nil if there is none.
func openTerminal() *terminal {
	t := &terminal{own: unix.Getpgrp()}
	if t.foreground() < 0 {
		return nil
	}
	return t
}

// foreground returns the group in the foreground.
func (t *terminal) foreground() int {
	group, err := unix.IoctlGetInt(0, unix.TIOCGPGRP)
	if err != nil {
		return -1
	}
	return group
}

// attributes are those of the service's first process.
func (t *terminal) attributes() *unix.SysProcAttr {
	return &unix.SysProcAttr{
		Setpgid: true,
		// Before the service runs, so that it cannot read too early.
		Foreground: t != nil && t.foreground() == t.own,
		Ctty:       0,
	}
}

// follow gives the foreground, if it is this process's to give, to the group of the
// main process.
func (t *terminal) follow(group int) {
	if t == nil {
		return
	}
	// What the supervisor logs from the background must not stop it, see tostop in
	// stty(1). It starts no process from here on, which would inherit that.
	signal.Ignore(unix.SIGTTOU)
	before := t.group
	t.group = group
	if now := t.foreground(); now != group && (now == before || now == t.own) {
		t.give(group)
	}
}

// leave takes the foreground back, for a shell without job control, or a script,
// that goes on in this process's group.
func (t *terminal) leave() {
	if t == nil {
		return
	}
	// A group without members is that of a service that was not started.
	if now := t.foreground(); now == t.group || unix.Kill(-now, 0) == unix.ESRCH {
		t.give(t.own)
	}
	signal.Reset(unix.SIGTTOU)
}

func (t *terminal) give(group int) {
	// A process in the background is stopped for it otherwise, see tcsetpgrp(3).
	signal.Ignore(unix.SIGTTOU)
	_ = unix.IoctlSetPointerInt(0, unix.TIOCSPGRP, group)
}

// stopped is called when sig has stopped a child, pid. If the child belongs to the service,
// the supervisor's job stops, too, so that the shell gets the terminal.
func (t *terminal) stopped(pid int, sig unix.Signal) {
	if t == nil || t.suspended {
		return
	}
	if group, err := unix.Getpgid(pid); err != nil || group != t.group {
		return
	}
	switch {
	case (sig == unix.SIGTTIN || sig == unix.SIGTTOU) && t.foreground() == t.own:
		// The shell's fg of a job that ran in the background tells nobody.
		t.give(t.group)
		_ = unix.Kill(-t.group, unix.SIGCONT)
	case t.underShell():
		t.suspended = true
		t.leave()
		_ = unix.Kill(-t.own, unix.SIGSTOP) // as the terminal does to a whole job
	case sig == unix.SIGTSTP:
		// Nobody could ever continue it. The kernel does not stop such orphaned groups
		// (setpgid(2)), but it cannot know that this is one.
		_ = unix.Kill(-t.group, unix.SIGCONT)
	}
}

// underShell reports whether something that knows job control may be watching this
// process's group.
func (t *terminal) underShell() bool {
	parent := os.Getppid()
	session, err := unix.Getsid(0)
	if err != nil || parent == 0 { // in another PID namespace
		return false
	}
	parentSession, err := unix.Getsid(parent)
	if err != nil || parentSession != session {
		return false
	}
	group, err := unix.Getpgid(parent)
	return err == nil && (group != t.own || parent != session)
}

// resumed is called when this process was continued. It reports whether it has
// continued the service.
func (t *terminal) resumed() bool {
	if t == nil {
		return false
	}
	t.suspended = false
	if t.foreground() == t.own {
		t.give(t.group)
	}
	return unix.Kill(-t.group, unix.SIGCONT) == nil
}
