package tableflip

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/tableflip/internal/process"
	"example.com/tableflip/internal/step"
)

// This file owns the description of a new process, and the file that names the one
// in charge. How a process is started and killed is internal/process.

// initialDir is where relative paths were meant, whatever os.Chdir did since.
var initialDir, initialDirErr = os.Getwd()

// fromInitialDir makes a path that was given at the start of the process absolute.
func fromInitialDir(path string) (string, error) {
	if strings.HasPrefix(path, "/") || path == "" {
		return path, nil
	}
	if initialDirErr != nil {
		return "", fmt.Errorf("tableflip: %q is relative, and the working directory was not known at the start: %w", path, initialDirErr)
	}
	// Not filepath.Join: it would resolve ".." without following links.
	return initialDir + "/" + path, nil
}

// newCommand describes a process like this one. customize, which may be nil, can
// change all of it but its extra files.
func newCommand(customize func(*exec.Cmd)) (*exec.Cmd, error) {
	path, pathErr := findSelf()
	cmd := &exec.Cmd{
		Path:   path,
		Args:   slices.Clone(os.Args),
		Env:    os.Environ(),
		Stdin:  os.Stdin,
		Stdout: os.Stdout,
		Stderr: os.Stderr,
		// If customize chose an output that is not a file, a descendant that
		// holds it open must not keep a dead process from being reaped.
		WaitDelay: time.Second,
	}
	if initialDirErr == nil {
		cmd.Dir = initialDir
	}
	if customize != nil {
		customize(cmd)
	}
	if cmd.Path == "" && pathErr != nil {
		return nil, pathErr
	}
	if cmd.Path == "" {
		return nil, errors.New("tableflip: Options.Command has cleared the path of the new binary")
	}
	if len(cmd.ExtraFiles) > 0 {
		return nil, errors.New("tableflip: Options.Command set ExtraFiles: pass files on by AddFile instead")
	}
	return cmd, nil
}

// findSelf returns the path of what argv[0] names now, which after a deployment
// is the new binary.
func findSelf() (string, error) {
	if len(os.Args) == 0 || os.Args[0] == "" {
		return "", errors.New("tableflip: os.Args[0] is empty: name the new binary by Options.Command")
	}
	if strings.Contains(os.Args[0], "/") {
		return fromInitialDir(os.Args[0])
	}
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		return "", fmt.Errorf("tableflip: find the new binary: %w; start the service by its path, or name the new binary by Options.Command", err)
	}
	return path, nil
}

// A pidFile is the path of the file that names the process in charge. The empty
// one does nothing.
type pidFile string

// prepare writes what commit renames into place, so that no reader sees it half
// written. The name of the temporary file is fixed, so that a process that is killed
// leaves at most one.
func (path pidFile) prepare(content []byte) error {
	if path == "" {
		return nil
	}
	temporary := path.temporary()
	_ = os.Remove(temporary)
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err == nil {
		_, err = file.Write(content)
		if err = errors.Join(err, file.Close()); err != nil {
			_ = os.Remove(temporary)
		}
	}
	step.Reached(step.PIDFilePrepared)
	if err != nil {
		return fmt.Errorf("tableflip: can't write the PID file: %w", err)
	}
	return nil
}

func (path pidFile) commit() error {
	if path == "" {
		return nil
	}
	if err := os.Rename(path.temporary(), string(path)); err != nil {
		_ = os.Remove(path.temporary())
		return fmt.Errorf("tableflip: can't write the PID file: %w", err)
	}
	step.Reached(step.PIDFileWritten)
	return nil
}

func (path pidFile) write(content []byte) error {
	if err := path.prepare(content); err != nil {
		return err
	}
	return path.commit()
}

func (path pidFile) temporary() string { return string(path) + ".tmp" }

// read returns nil if there is no file.
func (path pidFile) read() ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	content, err := os.ReadFile(string(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't read the PID file: %w%s", err, process.LimitHint(err))
	}
	return content, nil
}

// restore puts the file back to what read returned, if it has changed since.
func (path pidFile) restore(before []byte) error {
	if path == "" {
		return nil
	}
	_ = os.Remove(path.temporary())
	now, err := path.read()
	switch {
	case err == nil && string(now) == string(before):
		return nil
	case before == nil:
		return os.Remove(string(path))
	default:
		return path.write(before)
	}
}

// remove removes the file, unless it names another process.
func (path pidFile) remove() error {
	if now, err := path.read(); err != nil || string(now) != string(ownPID()) {
		return err
	}
	if err := os.Remove(string(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("tableflip: can't remove the PID file: %w", err)
	}
	return nil
}

func ownPID() []byte {
	return strconv.AppendInt(nil, int64(os.Getpid()), 10)
}
