package tableflip

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"example.com/tableflip/internal/step"
)

// This file owns what the operating system calls a process: how one is started,
// killed and reaped, and the file that names the one in charge. It knows nothing
// of the handover.

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

// A process is one that this process started.
type process struct {
	cmd     *exec.Cmd
	reap    func()        // begins to wait for the process to exit, once
	reaped  chan struct{} // closed when it has
	exitErr error         // nil for status 0, valid once reaped is closed
}

// errStatusUnknown is the exitErr of a sibling whose status the kernel tells only
// to its parent.
var errStatusUnknown = errors.New("with a status that only the service manager knows")

// asSibling has cmd start a child of this process's parent, if the system can do
// that, and returns what is to be called in place of cmd.Wait, which is for parents.
// It is nil except on Linux.
var asSibling func(cmd *exec.Cmd) (wait func() error)

// startProcess starts cmd, as a child of this process or of its parent. The caller
// keeps cmd.ExtraFiles.
func startProcess(cmd *exec.Cmd, sibling bool) (*process, error) {
	var duplicates []*os.File
	defer func() {
		for _, file := range duplicates {
			file.Close()
		}
	}()
	err := errors.Join(
		passStream(&cmd.Stdin, &duplicates),
		passStream(&cmd.Stdout, &duplicates),
		passStream(&cmd.Stderr, &duplicates),
	)
	wait := cmd.Wait
	if sibling && asSibling != nil {
		wait = asSibling(cmd)
	}
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("tableflip: can't start %s: %w%s", cmd.Path, err, cmp.Or(adviseMissing(cmd, err), adviseStart(err)))
	}
	p := &process{cmd: cmd, reaped: make(chan struct{})}
	p.reap = sync.OnceFunc(func() {
		go func() {
			p.exitErr = wait()
			close(p.reaped)
		}()
	})
	return p, nil
}

// exited returns a channel that is closed once the process has been reaped. From
// the first call on, a thread waits for that.
func (p *process) exited() <-chan struct{} {
	p.reap()
	return p.reaped
}

// prepareStart does what os/exec would do at the first start of a process: to try
// whether the kernel knows pidfds, which takes a process of its own.
func prepareStart() {
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Release()
	}
}

// adviseMissing says what was missing when cmd could not be started, unless it was
// the binary: execve(2) and chdir(2) have one error for all, and os/exec reports it
// with the binary's name.
func adviseMissing(cmd *exec.Cmd, err error) string {
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

// passStream replaces a standard stream that is a file by a duplicate, and one
// that was closed by nil, which is the null device. os/exec would refuse a closed
// file, and might change a file's blocking mode.
func passStream[T any](stream *T, duplicates *[]*os.File) error {
	file, ok := any(*stream).(*os.File)
	if !ok {
		return nil
	}
	var passed *os.File
	err := control(file, func(fd uintptr) error {
		dup, err := duplicate(fd)
		if err == nil {
			passed = os.NewFile(uintptr(dup), file.Name())
			*duplicates = append(*duplicates, passed)
		}
		return err
	})
	switch {
	case err == nil:
		*stream = any(passed).(T)
	case isNotOpen(err) || errors.Is(err, os.ErrInvalid):
		var none T
		*stream = none
	default:
		return err
	}
	return nil
}

// kill ends the process and returns once it has been reaped.
func (p *process) kill() {
	// It fails if the process has ended, which is what it is for.
	_ = p.cmd.Process.Kill()
	<-p.exited()
}

// A pidFile is the path of the file that names the process in charge. The empty
// one does nothing.
type pidFile string

// write replaces the file at once, so that no reader sees it half written.
func (path pidFile) write(content []byte) error {
	if path == "" {
		return nil
	}
	// The name is fixed, so that a process that is killed here leaves at most one.
	temporary := path.temporary()
	_ = os.Remove(temporary)
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err == nil {
		_, err = file.Write(content)
		err = errors.Join(err, file.Close())
		step.Reached(step.PIDFileWritten)
		if err == nil {
			err = os.Rename(temporary, string(path))
		}
		if err != nil {
			_ = os.Remove(temporary)
		}
	}
	if err != nil {
		return fmt.Errorf("tableflip: can't write the PID file: %w", err)
	}
	return nil
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
		return nil, fmt.Errorf("tableflip: can't read the PID file: %w%s", err, adviseLimit(err))
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
