//go:build unix

package process_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/proctest"
)

// program writes something that can be started, and returns its path.
func program(t *testing.T, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	proctest.OK(t, os.WriteFile(path, []byte(content), mode))
	return path
}

// busy returns the path of a program that is open for writing until the file is closed.
func busy(t *testing.T) (path string, writer *os.File) {
	t.Helper()
	path = program(t, "#!/bin/sh\nexit 7\n", 0o700)
	writer, err := os.OpenFile(path, os.O_WRONLY, 0)
	proctest.OK(t, err)
	t.Cleanup(func() { writer.Close() })
	if err := exec.Command(path).Run(); !errors.Is(err, syscall.ETXTBSY) {
		t.Skipf("this kernel executes files that are being written, as Linux 6.11 and 6.12 do: %v", err)
	}
	return path, writer
}

// A waitingContext calls onWait when somebody begins to wait for its end.
type waitingContext struct {
	context.Context
	onWait func()
}

func (ctx *waitingContext) Done() <-chan struct{} {
	ctx.onWait()
	return ctx.Context.Done()
}

// While a process that this one starts has not executed its program yet, it has what
// this one is writing open.
func TestStartBusy(t *testing.T) {
	path, writer := busy(t)
	waited := 0
	ctx := &waitingContext{t.Context(), func() {
		if waited++; waited == 3 {
			writer.Close()
		}
	}}
	p, err := process.Start(ctx, &exec.Cmd{Path: path, Args: []string{path}}, nil, false)
	proctest.OK(t, err)
	proctest.Within(t, "the process to exit", p.Exited())
	if p.Err() == nil || p.Err().Error() != "exit status 7" {
		t.Errorf("it ended with %v", p.Err())
	}
}

func TestStartBusyCancelled(t *testing.T) {
	path, _ := busy(t)
	cause := errors.New("as told")
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := process.Start(&waitingContext{ctx, func() { cancel(cause) }}, &exec.Cmd{Path: path, Args: []string{path}}, nil, false)
	proctest.WantError(t, "Start", err, cause)
	proctest.WantError(t, "Start", err, syscall.ETXTBSY)
}

func TestStartBusyForever(t *testing.T) {
	path, _ := busy(t)
	_, err := process.Start(t.Context(), &exec.Cmd{Path: path, Args: []string{path}}, nil, false)
	proctest.WantError(t, "Start", err, syscall.ETXTBSY)
	if !strings.Contains(err.Error(), "rename it into place") {
		t.Errorf("got %v, without advice", err)
	}
}

// A command can be looked at by whoever has made it.
func TestStartKeepsCmd(t *testing.T) {
	cmd := &exec.Cmd{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 0"}}
	p, err := process.Start(t.Context(), cmd, nil, false)
	proctest.OK(t, err)
	if cmd.Process == nil || cmd.Process.Pid != p.PID() {
		t.Errorf("the command has the process %v, want %d", cmd.Process, p.PID())
	}
	proctest.Within(t, "the process to exit", p.Exited())
}

func TestStartWithContextOfCommand(t *testing.T) {
	_, err := process.Start(t.Context(), exec.CommandContext(t.Context(), "/bin/true"), nil, false)
	if err == nil || !strings.Contains(err.Error(), "exec.CommandContext") {
		t.Errorf("got %v, want an error that names exec.CommandContext", err)
	}
}

// What exec.Command could not find is not looked for in the working directory.
func TestStartNotFound(t *testing.T) {
	path := program(t, "#!/bin/sh\nexit 7\n", 0o700)
	t.Chdir(filepath.Dir(path))
	for _, test := range []struct {
		path string
		want error
	}{{"/", exec.ErrNotFound}, {".", exec.ErrDot}} {
		t.Setenv("PATH", test.path)
		_, err := process.Start(t.Context(), exec.Command(filepath.Base(path)), nil, false)
		proctest.WantError(t, "Start with PATH="+test.path, err, test.want)
	}
}

// A program may have its children reaped without its knowing.
func TestStartReapedByOthers(t *testing.T) {
	p, err := process.Start(t.Context(), &exec.Cmd{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 0"}}, nil, false)
	proctest.OK(t, err)
	if pid, err := syscall.Wait4(p.PID(), nil, 0, nil); pid != p.PID() {
		t.Fatalf("waiting for %d: %v", p.PID(), err)
	}
	proctest.Within(t, "the process to exit", p.Exited())
	proctest.WantError(t, "its status", p.Err(), process.ErrStatusUnknown)
	proctest.OK(t, p.Kill(0))
}
