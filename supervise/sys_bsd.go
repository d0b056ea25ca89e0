//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package supervise

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// tellsSender: the kernel does not tell who has sent a message.
const tellsSender = false

// bindNotifySocket binds to a file in a directory that only this user can enter.
func bindNotifySocket(fd int) (address string, remove func(), err error) {
	directory, err := os.MkdirTemp("", "tableflip-supervise")
	if err != nil {
		return "", nil, err
	}
	remove = func() { os.RemoveAll(directory) }
	address = filepath.Join(directory, "notify")
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: address}); err != nil {
		remove()
		return "", nil, os.NewSyscallError("bind "+address, err)
	}
	return address, remove, nil
}

// credentials: the directory has checked them.
func credentials(*unix.SocketControlMessage) (pid int) { return 0 }

// These systems have no /proc: every living process may be the service's.

func isDescendant(pid int) bool             { return unix.Kill(pid, 0) == nil }
func isAncestor(pid int) bool               { return unix.Kill(pid, 0) == nil }
func descendants() (pids []int, known bool) { return nil, false }

func findServer([]int) (server int)                   { return 0 }
func signalDescendant(pid int, sig unix.Signal) error { return unix.Kill(pid, sig) }
func ownProgram() (string, error)                     { return os.Executable() }

// A watch would tell of the end of a process that is no child of this one.
type watch struct{}

func watchProcess(int) (*watch, error) { return nil, errors.ErrUnsupported }

func (*watch) signal(unix.Signal) error { return errors.ErrUnsupported }
func (*watch) ended() <-chan struct{}   { return nil }
func (*watch) status() *unix.WaitStatus { return nil }
func (*watch) close()                   {}
