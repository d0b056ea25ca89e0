package tableflip

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/tableflip/internal/descriptor"
	"example.com/tableflip/internal/nametable"
	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/step"
	"example.com/tableflip/internal/systemd"
)

// This file is the parent's side of the conversation with its child: it owns
// the read end of the ready pipe and the write end of the verdict pipe.

// The verdicts, one byte each, so that they are written whole or not at all.
const (
	verdictCommit = 'c'
	verdictAbort  = 'a'

	// managerNotified follows a commit.
	managerNotified = 't'
)

// exitGrace is how long a child that has given up gets to exit by itself, so
// that its exit status can be told, and how long one that has exited gets to be
// noticed by its pipe.
const exitGrace = time.Second

// handedOver keeps the write ends of verdict pipes open until the kernel closes
// them when this process ends, which is how the child learns of it.
var handedOver []*os.File

// A child is a new process that has not been put in charge yet.
type child struct {
	process *process.Process
	pid     int // of the one that said it is ready, which a wrapper may have started
	ready   *os.File
	verdict *os.File
}

// startChild starts cmd, as a child or a sibling of this process, with files as its
// descriptors from 5 on. The caller keeps files.
func startChild(ctx context.Context, cmd *exec.Cmd, sibling bool, entries []*nametable.Entry, files []*os.File) (*child, error) {
	readyRead, readyWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't start a new process: %w%s", err, process.LimitHint(err))
	}
	defer readyWrite.Close()
	verdictRead, verdictWrite, err := os.Pipe()
	if err != nil {
		readyRead.Close()
		return nil, fmt.Errorf("tableflip: can't start a new process: %w%s", err, process.LimitHint(err))
	}
	defer verdictRead.Close()
	c := &child{ready: readyRead, verdict: verdictWrite}

	table := nametable.Table{Entries: entries}
	table.Ready, err = identify(readyWrite)
	if err == nil {
		table.Verdict, err = identify(verdictRead)
	}
	if err == nil {
		// Options.Command may have brought back what New has removed.
		cmd.Env = slices.DeleteFunc(cmd.Environ(), func(variable string) bool {
			name, _, _ := strings.Cut(variable, "=")
			return nametable.IsVariable(name)
		})
		cmd.Env = append(systemd.WithoutWatchdogPID(cmd.Env), table.Encode()...)
		cmd.ExtraFiles = append([]*os.File{readyWrite, verdictRead}, files...)
		c.process, err = process.Start(ctx, cmd, sibling)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	step.Reached(step.ChildStarted)
	return c, nil
}

func identify(pipe *os.File) (id nametable.PipeID, err error) {
	err = descriptor.Control(pipe, func(fd uintptr) error {
		id, err = identifyPipe(fd)
		return err
	})
	return id, err
}

func (c *child) close() {
	c.ready.Close()
	c.verdict.Close()
}

// awaitReady returns once the child serves. An error is final: the child has
// died, given up, or is late.
func (c *child) awaitReady(ctx context.Context) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	// The end of the pipe tells of most deaths. Not of one whose descendants have
	// the pipe open: but for that, no thread needs to wait while the child starts.
	watch := time.AfterFunc(exitGrace, func() {
		select {
		case <-c.process.Exited():
			// One that succeeds may be a wrapper that has started the
			// service in the background.
			if err := c.process.Err(); err != nil && err != process.ErrStatusUnknown {
				fail(c.exitError())
			}
		case <-ctx.Done():
		}
	})
	defer watch.Stop()
	stop := context.AfterFunc(ctx, func() { c.ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	var err error
	c.pid, err = readPID(c.ready)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.EOF):
		return c.waitExit(ctx)
	case err != nil:
		return fmt.Errorf("tableflip: the new process did not say that it is ready: %w", err)
	}
	step.Reached(step.ReadyReceived)
	return nil
}

// readPID reads the child's word that it is ready.
func readPID(ready io.Reader) (int, error) {
	// Longer than any PID, so that garbage is not taken in without end.
	line, err := bufio.NewReader(io.LimitReader(ready, 32)).ReadString('\n')
	if err != nil && (line == "" || !errors.Is(err, io.EOF)) {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSuffix(line, "\n"))
	if err != nil || pid <= 0 {
		return 0, fmt.Errorf("it said %q instead of its process ID", line)
	}
	return pid, nil
}

// waitExit waits for a child that has closed its ready pipe to exit.
func (c *child) waitExit(ctx context.Context) error {
	grace := time.NewTimer(exitGrace)
	defer grace.Stop()
	select {
	case <-c.process.Exited():
		return c.exitError()
	case <-grace.C:
		return errors.New("tableflip: the new process gave up, and was killed as it did not exit")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *child) exitError() error {
	if c.process.Err() == nil {
		return errors.New("tableflip: the new process exited before it was ready: exit status 0")
	}
	return fmt.Errorf("tableflip: the new process exited before it was ready: %w%s", c.process.Err(), c.process.Hint())
}

// commit puts the child in charge. After an error it is not.
func (c *child) commit(logger *slog.Logger) error {
	step.Reached(step.BeforeCommit)
	if c.hasClosedReady() {
		return errors.New("tableflip: the new process was ready, and has died or was stopped")
	}
	if _, err := c.verdict.Write([]byte{verdictCommit}); err != nil {
		return fmt.Errorf("tableflip: the new process was ready, and died: %w", err)
	}
	step.Reached(step.AfterCommit)
	handedOver = append(handedOver, c.verdict)
	c.ready.Close()
	exited := c.process.Exited() // so that it is no zombie until this process ends
	if logger != nil {
		go func() {
			<-exited
			if c.process.Err() == nil && c.pid != c.process.PID() {
				return // a wrapper that has started the service in the background
			}
			logger.Warn("tableflip: the process that was started by the upgrade ended before the old one did",
				"started", c.process.PID(), "ready", c.pid, "error", c.process.Err())
		}()
	}
	return nil
}

// managerNotified tells the child that the service manager knows it.
func (c *child) managerNotified() {
	_, _ = c.verdict.Write([]byte{managerNotified})
}

// hasClosedReady reports whether the child has closed its end of the ready pipe, as its
// death does.
func (c *child) hasClosedReady() bool {
	raw, err := c.ready.SyscallConn()
	if err != nil {
		return true
	}
	ended := false
	err = raw.Read(func(fd uintptr) bool {
		ended = descriptor.AtEOF(fd)
		return true
	})
	return ended || err != nil
}

// abort tells the child, should it still listen, to touch nothing that is shared,
// and returns once it has been killed and reaped.
func (c *child) abort() {
	_, _ = c.verdict.Write([]byte{verdictAbort})
	_ = c.process.Kill(time.Minute)
	c.close()
}
