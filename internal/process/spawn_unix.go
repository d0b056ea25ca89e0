//go:build unix

package process

import (
	"errors"
	"os"
	"os/exec"
	"syscall"

	"example.com/tableflip/internal/descriptor"
)

// spawn does what cmd.Start does, with fds as the descriptors of the new process from 3
// on. os/exec needs a file for each descriptor, and creating and closing a file costs two
// registrations with the network poller and a finalizer.
func spawn(cmd *exec.Cmd, fds []uintptr) error {
	streams, ok := fileStreams(cmd)
	if !ok {
		return spawnCopying(cmd, fds)
	}
	attr := &syscall.ProcAttr{Dir: cmd.Dir, Env: cmd.Environ(), Sys: cmd.SysProcAttr}
	for _, stream := range streams {
		if stream == nil {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer null.Close()
			stream = null
		}
		attr.Files = append(attr.Files, stream.Fd())
	}
	attr.Files = append(attr.Files, fds...)

	argv := cmd.Args
	if len(argv) == 0 {
		argv = []string{cmd.Path}
	}
	pid, err := syscall.ForkExec(cmd.Path, argv, attr)
	if err != nil {
		// As in package os: execve(2) and chdir(2) have one error for both.
		var missing *os.PathError
		if cmd.Dir != "" && rootDir(cmd) == "" {
			if _, err := os.Stat(cmd.Dir); errors.As(err, &missing) {
				missing.Op = "chdir"
				return missing
			}
		}
		return &os.PathError{Op: "fork/exec", Path: cmd.Path, Err: err}
	}
	// Not os.FindProcess: it would start another process, to find out whether the kernel
	// has pidfds.
	cmd.Process = &os.Process{Pid: pid}
	return nil
}

// fileStreams returns the files of the standard streams, nil for the null device. It
// returns false if one is not a file.
func fileStreams(cmd *exec.Cmd) (streams [3]*os.File, ok bool) {
	for i, stream := range []any{cmd.Stdin, cmd.Stdout, cmd.Stderr} {
		if stream == nil {
			continue
		}
		if streams[i], ok = stream.(*os.File); !ok {
			return streams, false
		}
	}
	return streams, true
}

// spawnCopying has os/exec copy a standard stream.
func spawnCopying(cmd *exec.Cmd, fds []uintptr) error {
	var files []*os.File
	defer func() {
		for _, file := range files {
			file.Close()
		}
	}()
	for _, fd := range fds {
		dup, err := descriptor.Duplicate(fd)
		if err != nil {
			return err
		}
		files = append(files, os.NewFile(dup, ""))
	}
	cmd.ExtraFiles = files
	return cmd.Start()
}
