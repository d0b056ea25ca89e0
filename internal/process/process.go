// Package process owns what the operating system calls a process: how one is
// started, killed and reaped, and what an error of starting one means for the
// reader. It knows nothing of handovers.
package process

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"example.com/tableflip/internal/descriptor"
)

// ErrStatusUnknown is the error of a sibling whose exit status the kernel tells
// nobody but its parent.
var ErrStatusUnknown = errors.New("with a status that only the service manager knows")

// A Process is one that this process started.
type Process struct {
	cmd    *exec.Cmd
	reap   func()        // begins to wait for the process to exit, once
	reaped chan struct{} // closed when it has
	err    error         // nil for status 0, valid once reaped is closed
}

// Start starts cmd. The caller keeps cmd.ExtraFiles. A sibling is a child of this
// process's parent, where the system can do that, and a child of this process
// elsewhere.
func Start(cmd *exec.Cmd, sibling bool) (*Process, error) {
	streams, err := duplicateStreams(cmd)
	defer func() {
		for _, file := range streams {
			file.Close()
		}
	}()

	wait := cmd.Wait
	if sibling {
		wait = makeSibling(cmd)
	}
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't start %s: %w%s", cmd.Path, err, cmp.Or(hintMissing(cmd, err), StartHint(err)))
	}

	p := &Process{cmd: cmd, reaped: make(chan struct{})}
	p.reap = sync.OnceFunc(func() {
		go func() {
			p.err = wait()
			close(p.reaped)
		}()
	})
	return p, nil
}

// PID returns the process's ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited returns a channel that is closed once the process has been reaped. From
// the first call on, a thread waits for that.
func (p *Process) Exited() <-chan struct{} {
	p.reap()
	return p.reaped
}

// Err returns how the process exited: nil for status 0, else an *exec.ExitError
// or, of a sibling, words. It may be called once Exited is closed.
func (p *Process) Err() error { return p.err }

// Kill ends the process and returns nil once it has been reaped, or an error if that
// takes longer than timeout.
func (p *Process) Kill(timeout time.Duration) error {
	killErr := p.cmd.Process.Kill()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-p.Exited():
		return nil
	case <-timer.C:
		return fmt.Errorf("tableflip: process %d is still there %v after it was to be killed: %w", p.PID(), timeout, cmp.Or(killErr, os.ErrDeadlineExceeded))
	}
}

// Prepare does what os/exec would do at the first start of a process: it finds out
// whether the kernel knows pidfds, which takes a process of its own.
func Prepare() {
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Release()
	}
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
	dup, err := descriptor.DuplicateOf(file)
	switch {
	case err == nil:
		passed := os.NewFile(dup, file.Name())
		*duplicates = append(*duplicates, passed)
		*stream = any(passed).(T)
	case descriptor.IsClosed(err) || errors.Is(err, os.ErrInvalid):
		var none T
		*stream = none
	default:
		return err
	}
	return nil
}

// hintMissing says what was missing when cmd could not be started, unless it was
// the binary: execve(2) and chdir(2) have one error for all, and os/exec reports it
// with the binary's name.
func hintMissing(cmd *exec.Cmd, err error) string {
	if !errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	path := cmd.Path
	if cmd.Dir != "" {
		if _, err := os.Stat(cmd.Dir); err != nil {
			return "; create the working directory " + cmd.Dir + " again, or choose another by Options.Command"
		}
		if !strings.HasPrefix(path, "/") {
			path = cmd.Dir + "/" + path
		}
	}
	if _, err := os.Stat(path); err == nil {
		return "; the binary is there: install the interpreter or the loader that it names"
	}
	return ""
}
