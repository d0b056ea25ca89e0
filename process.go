package tableflip

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/step"
)

// This file owns the description of a new process, and the file that names the one
// in charge. How a process is started and killed, and what this one was started
// with, is internal/process.

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

// A pidFile names the process in charge. Without a path it does nothing.
//
// It is replaced in two steps, so that the second, which others see, is short and can
// be undone: prepare writes a temporary file beside it, and commit renames that.
// abandon undoes the first step, and restore, in the process that was in charge
// before, the second.
type pidFile struct {
	path   string
	target string // path without links, valid from prepare on
}

// pidFileContent is what a PID file held. It is nil if there was no file.
type pidFileContent struct {
	pid  []byte
	mode fs.FileMode
}

// write puts this process's PID into the file.
func (f *pidFile) write() error {
	if err := f.prepare(); err != nil {
		return err
	}
	return f.commit()
}

// prepare makes the file that is to replace the PID file.
func (f *pidFile) prepare() (err error) {
	if f.path == "" {
		return nil
	}
	if f.target, err = resolve(f.path); err == nil {
		err = f.writeTemporary(ownPID(), 0)
	}
	step.Reached(step.PIDFilePrepared)
	if err != nil {
		return fmt.Errorf("tableflip: can't write the PID file: %w%s", err, pidFileHint(err))
	}
	return nil
}

// commit replaces the PID file by what prepare wrote, at once, so that no reader sees
// it half written. After an error it is as it was.
func (f *pidFile) commit() error {
	if f.path == "" {
		return nil
	}
	if err := os.Rename(f.temporary(), f.target); err != nil {
		f.abandon()
		return fmt.Errorf("tableflip: can't replace the PID file: %w%s", err, pidFileHint(err))
	}
	step.Reached(step.PIDFileWritten)
	return nil
}

// abandon removes what prepare wrote: in this process or, once that has ended, in one
// that was to take over.
func (f *pidFile) abandon() {
	if f.target != "" {
		_ = os.Remove(f.temporary())
	}
}

// read returns what restore needs.
func (f *pidFile) read() (*pidFileContent, error) {
	if f.target == "" {
		return nil, nil
	}
	info, err := os.Stat(f.target)
	var pid []byte
	if err == nil {
		pid, err = os.ReadFile(f.target)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't read the PID file: %w%s", err, process.LimitHint(err))
	}
	return &pidFileContent{pid, info.Mode().Perm()}, nil
}

// restore puts the file back to what read returned, if it has changed since, and
// abandons what a process that failed has prepared.
func (f *pidFile) restore(before *pidFileContent) error {
	if f.target == "" {
		return nil
	}
	f.abandon()
	now, err := f.read()
	switch {
	case err == nil && now == nil && before == nil:
		return nil
	case err == nil && now != nil && before != nil && string(now.pid) == string(before.pid):
		return nil
	case before == nil:
		return os.Remove(f.target)
	}
	if err = f.writeTemporary(before.pid, before.mode); err != nil {
		return err
	}
	return f.commit()
}

// remove removes the file, unless it names another process: that of a new version
// that has another PID file, too, leaves this one behind.
func (f *pidFile) remove() error {
	now, err := f.read()
	if err != nil || now == nil || string(now.pid) != string(ownPID()) {
		return err
	}
	if err := os.Remove(f.target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("tableflip: can't remove the PID file: %w%s", err, pidFileHint(err))
	}
	return nil
}

// temporary is a fixed name, so that a process that is killed leaves at most one.
func (f *pidFile) temporary() string { return f.target + ".tmp" }

// writeTemporary gives the file the mode, or 0644 less the umask if that is zero.
func (f *pidFile) writeTemporary(pid []byte, mode fs.FileMode) error {
	_ = os.Remove(f.temporary())
	file, err := os.OpenFile(f.temporary(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = file.Write(pid)
	if mode != 0 {
		err = errors.Join(err, file.Chmod(mode))
	}
	if err = errors.Join(err, file.Close()); err != nil {
		f.abandon()
	}
	return err
}

// resolve follows the links that path leads through, so that a link is kept, and the
// file is found again when a directory's link leads elsewhere. The file need not exist.
func resolve(path string) (string, error) {
	// The kernel may refuse to follow a link that another user has made in /tmp
	// (proc_sys_fs(5), protected_symlinks), which Readlink would not notice.
	if _, err := os.Stat(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for range 255 { // more links than any kernel follows
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return "", err
		}
		path = filepath.Join(dir, filepath.Base(path))
		link, err := os.Readlink(path)
		if err != nil {
			return path, nil // not a link
		}
		if filepath.IsAbs(link) {
			path = link
		} else {
			path = dir + "/" + link
		}
	}
	return "", fmt.Errorf("%s leads through too many links", path)
}

// pidFileHint returns what the reader of an error can do about it.
func pidFileHint(err error) string {
	switch {
	case process.IsMounted(err):
		return "; a file that is a mount cannot be replaced: mount its directory instead"
	case errors.Is(err, fs.ErrPermission):
		return "; its directory must be writable, and not of another user if it is sticky, as /tmp is"
	case errors.Is(err, fs.ErrNotExist):
		return "; create its directory (RuntimeDirectory= in a systemd unit)"
	}
	return process.LimitHint(err)
}

func ownPID() []byte {
	return strconv.AppendInt(nil, int64(os.Getpid()), 10)
}
