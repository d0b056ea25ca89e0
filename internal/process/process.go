// Package process owns what the operating system calls a process: what this process was
// started with, how another is started, killed and reaped, and what the error of a failed
// start means for the reader. It knows nothing of handovers.
package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"example.com/tableflip/internal/descriptor"
)

// ErrStatusUnknown is the error of a process whose exit status the kernel did not report to
// this package. For a sibling, only its parent learns the status. A program that waits for
// all its children itself (wait4 of -1) takes the status away, and one that ignores SIGCHLD
// discards it.
var ErrStatusUnknown = errors.New("exit status unknown, because the process was reaped elsewhere")

// busyPatience bounds how long Start tries to execute a file that is open for
// writing, and restartPatience how long a process may take to end that is started
// again.
const (
	busyPatience    = 2 * time.Second
	restartPatience = time.Second
)

// A PipeEnd is one of the constants below.
type PipeEnd os.FileMode

const (
	ReadEnd  PipeEnd = 0o400
	WriteEnd PipeEnd = 0o200
)

// A Process is a process that this one started.
type Process struct {
	pid  int
	path string // of its binary, as this process sees it
	control
	reap   func()        // begins to wait for the process to exit, once
	reaped chan struct{} // closed when it has
	err    error         // nil for status 0, valid once reaped is closed
}

// A control waits for a process that has been started, and kills it.
type control struct {
	wait func() error // returns how it ended
	kill func() error // returns os.ErrProcessDone if it has ended
}

// childControl is for systems without pidfds.
func childControl(cmd *exec.Cmd) control {
	return control{func() error { return waitChild(cmd) }, cmd.Process.Kill}
}

func waitChild(cmd *exec.Cmd) error {
	err := cmd.Wait()
	if isNoChild(err) {
		return ErrStatusUnknown
	}
	return err
}

// Start starts cmd, which must not have been started, with fds as its descriptors from
// 3 on. The caller keeps those. A sibling is a child of this process's parent, where the
// system can do that, and a child of this process elsewhere.
//
// Start returns once the new process executes cmd.Path. If that file is open for writing,
// Start retries for a while, until ctx is done at the latest. The error then also wraps the
// cause of ctx's end.
func Start(ctx context.Context, cmd *exec.Cmd, fds []uintptr, sibling bool) (*Process, error) {
	if cmd.Cancel != nil {
		return nil, errors.New("tableflip: Options.Command set Cancel, as exec.CommandContext does, which would kill the new process when that context ends: use exec.Command")
	}
	if err := refuse(cmd); err != nil {
		return nil, err
	}
	if cmd.Err != nil { // from exec.Command, which then leaves a name in Path
		return nil, fmt.Errorf("tableflip: can't start %s, which Options.Command chose: %w", cmd.Path, cmd.Err)
	}
	streams, err := duplicateStreams(cmd)
	defer func() {
		for _, file := range streams {
			file.Close()
		}
	}()
	if err == nil {
		var p *Process
		if p, err = startWithRoom(ctx, &template{*cmd, cmd, fds}, sibling); err == nil {
			return p, nil
		}
	}
	return nil, fmt.Errorf("tableflip: can't start %s: %w%s", cmd.Path, err, startHint(cmd, err))
}

// A template can start a command more than once.
type template struct {
	unstarted exec.Cmd
	cmd       *exec.Cmd // what Options.Command may have kept
	fds       []uintptr
}

func (t *template) fresh() *exec.Cmd {
	*t.cmd = t.unstarted
	return t.cmd
}

// startWithRoom starts a command with the limit of open files that package os would give
// it or, if its files do not fit under that, with the limit of this process.
func startWithRoom(ctx context.Context, t *template, sibling bool) (*Process, error) {
	p, err := startWhenWritten(ctx, t, sibling)
	if err != nil || fits(p.PID(), 3+len(t.fds)) {
		return p, err
	}
	if p.Kill(restartPatience) != nil {
		return p, nil // its limit may suffice, and no second process may run beside it
	}
	undo := passLimitOn()
	defer undo()
	return startWhenWritten(ctx, t, sibling)
}

// startWhenWritten starts a command, and retries while its file is open for writing. A file
// that this process has written and closed can still be open in a process that it started
// meanwhile, until that process executes its program (https://go.dev/issue/22315).
func startWhenWritten(ctx context.Context, t *template, sibling bool) (*Process, error) {
	for began, pause := time.Now(), time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		p, err := start(t.fresh(), t.fds, sibling)
		if !isBusy(err) || time.Since(began) > busyPatience {
			return p, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w, when the upgrade ended: %w", err, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

func start(cmd *exec.Cmd, fds []uintptr, sibling bool) (*Process, error) {
	startCmd := startChild
	if sibling || asksForSibling(cmd) {
		startCmd = startSibling
	}
	control, err := startCmd(cmd, fds)
	if err != nil {
		return nil, err
	}

	p := &Process{pid: cmd.Process.Pid, path: binaryPath(cmd), control: control, reaped: make(chan struct{})}
	p.reap = sync.OnceFunc(func() {
		go func() {
			p.err = p.control.wait()
			close(p.reaped)
		}()
	})
	return p, nil
}

// startByID starts a child of which only the ID is known.
func startByID(cmd *exec.Cmd, fds []uintptr) (control, error) {
	if err := spawn(cmd, fds); err != nil {
		return control{}, err
	}
	return childControl(cmd), nil
}

// PID returns the process's ID.
func (p *Process) PID() int { return p.pid }

// Exited returns a channel that is closed once the process has been reaped. From
// the first call on, a goroutine or, without pidfds, a thread waits for that.
func (p *Process) Exited() <-chan struct{} {
	p.reap()
	return p.reaped
}

// Err returns how the process exited: nil for status 0, else an *exec.ExitError or, for a
// sibling, an error that says it in words. It may be called once Exited is closed.
func (p *Process) Err() error { return p.err }

// Hint returns what is wrong with the binary of a process that ended too early. It is empty
// if nothing is known to be wrong.
func (p *Process) Hint() string { return exitHint(p.path) }

// Kill ends the process and returns once it has been reaped, or after patience. After an
// error the process may still run, and is still waited for: Exited is closed when it ends.
// The error wraps os.ErrPermission if this process may not kill it, and
// os.ErrDeadlineExceeded if it has not ended in time. If cmd's output is copied, patience
// must also allow for its WaitDelay.
func (p *Process) Kill(patience time.Duration) error {
	killErr := p.control.kill()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-p.Exited():
		return nil
	case <-timer.C:
	}
	select {
	case <-p.Exited(): // at the same time
		return nil
	default:
	}
	return killError(p.PID(), patience, killErr)
}

// killError returns the error of a process that has not ended. It was waited for even if
// it could not be killed, because it may have left by itself.
func killError(pid int, patience time.Duration, killErr error) error {
	if killErr != nil && !errors.Is(killErr, os.ErrProcessDone) {
		return fmt.Errorf("tableflip: can't kill process %d%s: %w: end it by hand", pid, owner(pid), killErr)
	}
	return fmt.Errorf("tableflip: process %d%s was killed, and has not ended after %v: %w", pid, condition(pid), patience, os.ErrDeadlineExceeded)
}

// duplicateStreams replaces each standard stream that is a file by a duplicate, and
// one that was closed by nil, which is the null device. os/exec would refuse a
// closed file, and might change a file's blocking mode.
func duplicateStreams(cmd *exec.Cmd) (duplicates []*os.File, err error) {
	err = errors.Join(
		duplicateStream(&cmd.Stdin, &duplicates),
		duplicateStream(&cmd.Stdout, &duplicates),
		duplicateStream(&cmd.Stderr, &duplicates),
	)
	return duplicates, err
}

func duplicateStream[T any](stream *T, duplicates *[]*os.File) error {
	file, ok := any(*stream).(*os.File)
	if !ok {
		return nil
	}
	var none T
	if !isStream(file) {
		*stream = none
		return nil
	}
	dup, err := descriptor.DuplicateOf(file)
	switch {
	case err == nil:
		passed := os.NewFile(dup, file.Name())
		*duplicates = append(*duplicates, passed)
		*stream = any(passed).(T)
	case descriptor.IsClosed(err) || errors.Is(err, os.ErrInvalid):
		*stream = none
	default:
		return err
	}
	return nil
}
