package tableflip

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"example.com/tableflip/internal/process"
)

// This file owns the description of a new process. How a process is started and killed,
// and what this one was started with, is internal/process.

// newCommand describes a process like this one was when it started. customize, which
// may be nil, can change all of it but its extra files.
func newCommand(customize func(*exec.Cmd)) (*exec.Cmd, error) {
	path, pathErr := process.Path()
	stdin, stdout, stderr := process.Streams()
	cmd := &exec.Cmd{
		Path:   path,
		Args:   process.Args(),
		Env:    os.Environ(),
		Dir:    process.Dir(),
		Stdin:  stdin,
		Stdout: stdout,
		Stderr: stderr,
		// If customize chose an output that is not a file, a descendant that
		// holds it open must not keep a dead process from being reaped.
		WaitDelay: 500 * time.Millisecond,
	}
	if customize != nil {
		customize(cmd)
	}
	switch {
	case cmd.Path == "" && pathErr != nil:
		return nil, pathErr
	case cmd.Path == "":
		return nil, errors.New("tableflip: Options.Command has cleared the path of the new binary")
	case len(cmd.ExtraFiles) > 0:
		return nil, errors.New("tableflip: Options.Command set ExtraFiles: pass files on by AddFile instead")
	}
	if cmd.Env != nil && strings.HasPrefix(cmd.Dir, "/") {
		// So that the new process knows the directory by this name, too. Os/exec
		// does that if Env is nil.
		cmd.Env = append(cmd.Env, "PWD="+cmd.Dir)
	}
	return cmd, nil
}

func ownPID() string { return strconv.Itoa(os.Getpid()) }
