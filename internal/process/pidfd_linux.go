package process

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

// A Handle is a pidfd (pidfd_open(2)). It refers to one process for ever, unlike a process
// ID, which another process may get once that process has ended.
type Handle struct {
	file *os.File
	pid  int // when it was opened, or 0
}

// Open returns a Handle of the process that has this ID now, or os.ErrProcessDone if
// there is none.
func Open(pid int) (*Handle, error) {
	fd, err := openPidfd(pid)
	if err != nil {
		return nil, err
	}
	return &Handle{os.NewFile(fd, "pidfd"), pid}, nil
}

// OpenSelf returns a descriptor of which Inherited makes a Handle of this process in
// another.
func OpenSelf() (uintptr, error) { return openPidfd(os.Getpid()) }

func openPidfd(pid int) (uintptr, error) {
	pidfd, err := unix.PidfdOpen(pid, 0) // PIDFD_NONBLOCK is younger (Linux 5.10)
	if errors.Is(err, unix.ESRCH) {
		return 0, os.ErrProcessDone
	}
	if err != nil {
		return 0, os.NewSyscallError("pidfd_open", err)
	}
	fd := uintptr(pidfd)
	if err := descriptor.SetNonblock(fd, true); err != nil {
		_ = descriptor.Close(fd)
		return 0, os.NewSyscallError("fcntl", err)
	}
	return fd, nil
}

// Inherited returns the Handle that a parent passed as fd, or an error if it is none.
func Inherited(fd uintptr) (*Handle, error) {
	// Signal 0 only checks the descriptor.
	if err := unix.PidfdSendSignal(int(fd), 0, nil, 0); errors.Is(err, unix.EBADF) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("descriptor %d is not a pidfd: %w", fd, err)
	}
	return &Handle{file: os.NewFile(fd, "pidfd")}, nil
}

// Duplicate returns a descriptor of which Inherited makes a Handle of the same process in
// another.
func (h *Handle) Duplicate() (uintptr, error) { return descriptor.DuplicateOf(h.file) }

// Ended reports whether the process has ended.
func (h *Handle) Ended() bool {
	ended, _, err := descriptor.PollOf(h.file)
	return ended && err == nil
}

// Wait returns nil when the process has ended, or an error when h was closed.
func (h *Handle) Wait() error { return awaitPoll(h.file, unix.POLLIN) }

// Kill ends the process, and returns an error as Process.Kill does.
func (h *Handle) Kill(patience time.Duration) error {
	killErr := h.kill()
	if h.WaitFor(patience) == nil {
		return nil
	}
	return killError(h.pid, patience, killErr)
}

// WaitFor is Wait, and returns os.ErrDeadlineExceeded after patience, as does any other Wait
// that runs then.
func (h *Handle) WaitFor(patience time.Duration) error {
	h.file.SetReadDeadline(time.Now().Add(patience))
	defer h.file.SetReadDeadline(time.Time{})
	return h.Wait()
}

// kill returns os.ErrProcessDone if the process has been reaped.
func (h *Handle) kill() error {
	err := descriptor.Control(h.file, func(fd uintptr) error {
		return os.NewSyscallError("pidfd_send_signal", unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0))
	})
	if errors.Is(err, unix.ESRCH) || descriptor.IsClosed(err) {
		return os.ErrProcessDone
	}
	return err
}

// isReaped reports whether it is certain that a child that has ended was reaped.
func (h *Handle) isReaped() bool {
	err := descriptor.Control(h.file, func(fd uintptr) error {
		return unix.Waitid(unix.P_PIDFD, int(fd), nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil) // Linux 5.4
	})
	return errors.Is(err, unix.ECHILD)
}

// Close closes h.
func (h *Handle) Close() error { return h.file.Close() }

// HoldsPipe reports whether a process has an end of a pipe open. It returns an error if
// this process may not know, which includes that the other's binary has capabilities, and
// os.ErrProcessDone if the other has no descriptors at all: one that exits has closed them
// for a moment before it has ended.
func HoldsPipe(pid int, inode uint64, end PipeEnd) (bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err == nil && len(fds) == 0 {
		err = os.ErrProcessDone
	}
	if err != nil {
		return false, err
	}
	pipe := fmt.Sprintf("pipe:[%d]", inode)
	for _, fd := range fds {
		name := dir + "/" + fd.Name()
		target, err := os.Readlink(name)
		if err != nil || target != pipe {
			continue
		}
		// The link's mode says for what the descriptor is open (proc_pid_fd(5)).
		if info, err := os.Lstat(name); err == nil && info.Mode()&os.FileMode(end) != 0 {
			return true, nil
		}
	}
	return false, nil
}

// PIDNamespace returns an ID of this process's PID namespace (pid_namespaces(7)), or an
// empty string if that is unknown.
var PIDNamespace = sync.OnceValue(func() string {
	link, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	return strings.Trim(strings.TrimPrefix(link, "pid:"), "[]")
})

// UnknownAncestors makes Parent know no more than it does on other systems. It is for tests.
var UnknownAncestors bool

// Parent returns the parent of a process, or 0 if that is unknown.
func Parent(pid int) int {
	if pid == os.Getpid() {
		return os.Getppid()
	}
	if UnknownAncestors {
		return 0
	}
	parent, _ := strconv.Atoi(statField(pid, 4))
	return parent
}
