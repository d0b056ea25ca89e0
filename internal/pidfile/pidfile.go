// Package pidfile owns the file that names the process in charge.
package pidfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/step"
)

// A File names the process in charge. Without a path it does nothing.
//
// It is replaced in two steps, so that the second, which others see, is short and can be
// undone. Prepare writes a temporary file beside it, and Commit renames the temporary
// file. Abandon undoes the first step. Restore, in the process that was in charge before,
// undoes the second.
type File struct {
	path   string
	target string // path without links, valid from Prepare on
}

// Content is what a PID file held. It is nil if there was no file.
type Content struct {
	pid  []byte
	mode fs.FileMode
}

// Write puts this process's PID into the file.
func (f *File) Write() error {
	if err := f.Prepare(); err != nil {
		return err
	}
	return f.Commit()
}

// Prepare writes the temporary file that is to replace the PID file.
func (f *File) Prepare() (err error) {
	if f.path == "" {
		return nil
	}
	if f.target, err = resolve(f.path); err == nil {
		err = f.writeTemporary(ownPID(), 0)
	}
	step.Reached(step.PIDFilePrepared)
	if err != nil {
		return fmt.Errorf("tableflip: can't write the PID file: %w%s", err, hint(err))
	}
	return nil
}

// Commit replaces the PID file by the one that Prepare wrote, atomically, so that no
// reader sees half of it. After an error the PID file is as it was.
func (f *File) Commit() error {
	if f.path == "" {
		return nil
	}
	if err := os.Rename(f.temporary(), f.target); err != nil {
		f.Abandon()
		return fmt.Errorf("tableflip: can't replace the PID file: %w%s", err, hint(err))
	}
	step.Reached(step.PIDFileWritten)
	return nil
}

// Abandon removes the file that Prepare wrote in this process or, once a process that was
// to take over has ended, in that process.
func (f *File) Abandon() {
	if f.target != "" {
		_ = os.Remove(f.temporary())
	}
}

// Read returns the content and the mode, for Restore.
func (f *File) Read() (*Content, error) {
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
	return &Content{pid, info.Mode().Perm()}, nil
}

// Restore restores the file to what Read returned, if it has changed since, and removes
// what a process that failed has prepared.
func (f *File) Restore(before *Content) error {
	f.Abandon()
	now, err := f.Read()
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
	return f.Commit()
}

// Remove removes the file unless it names another process. After an upgrade to a version
// with another PID file, it still names this process.
func (f *File) Remove() error {
	now, err := f.Read()
	if now == nil || string(now.pid) != string(ownPID()) {
		return err
	}
	if err := os.Remove(f.target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("tableflip: can't remove the PID file: %w%s", err, hint(err))
	}
	return nil
}

// temporary returns a fixed name, so that a process that is killed leaves at most one file.
func (f *File) temporary() string { return f.target + ".tmp" }

// writeTemporary gives the file the mode, or 0644 less the umask if that is zero.
func (f *File) writeTemporary(pid []byte, mode fs.FileMode) error {
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
		f.Abandon()
	}
	return err
}

// resolve follows the links in path, so that a link is kept, and the file is found again
// when a directory's link leads elsewhere. The file need not exist.
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

// hint returns advice for the reader of an error, or an empty string.
func hint(err error) string {
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

// New returns the File of an absolute path, or one that does nothing if path is empty.
func New(path string) File { return File{path: path} }

// IsNone reports whether f does nothing.
func (f *File) IsNone() bool { return f.path == "" }

func ownPID() []byte {
	return strconv.AppendInt(nil, int64(os.Getpid()), 10)
}
