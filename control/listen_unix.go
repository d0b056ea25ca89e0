//go:build unix

package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
)

// backlog is more than systems allow, which they reduce it to: see listen(2).
const backlog = 4096

// listen creates a socket whose file only its owner can use. Package net would bind and
// listen in one go, with the mode that the umask leaves, and the umask belongs to the
// whole process. Nobody can connect before listen(2).
func listen(_, path string) (net.Listener, error) {
	if path == "" || path[0] == '@' {
		return nil, fmt.Errorf("%q is not the path of a file, whose mode keeps others out", path)
	}
	fd, err := newSocket()
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close() // net.FileListener duplicates it

	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("bind %s: %w", path, err)
	}
	ln, err := open(file, path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return ln, nil
}

// newSocket returns a socket with close-on-exec set.
func newSocket() (fd int, err error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fd, err = syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	return fd, err
}

// open has a bound socket listen.
func open(file *os.File, path string) (net.Listener, error) {
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	if err := syscall.Listen(int(file.Fd()), backlog); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	ln, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	// As net.Listen has it. The registry of an Upgrader takes this duty over.
	ln.(*net.UnixListener).SetUnlinkOnClose(true)
	return ln, nil
}

// isNobody reports whether err says that no process listens.
func isNobody(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}
