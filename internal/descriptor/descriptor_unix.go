//go:build unix

package descriptor

import (
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Supported reports whether this system can pass sockets to another process.
const Supported = true

// Duplicate returns a close-on-exec duplicate of fd. The duplicate shares the
// open file, and so its blocking mode, with fd.
func Duplicate(fd uintptr) (uintptr, error) {
	dup, err := duplicateFrom(fd, firstFree)
	if err != nil {
		return 0, err
	}
	return uintptr(dup), nil
}

// SetCloseOnExec sets close-on-exec on n descriptors from first on. With an error, it
// returns the first that is not open.
func SetCloseOnExec(first uintptr, n int) (closed uintptr, err error) {
	if setCloseOnExecAtOnce(first, n) {
		return 0, nil
	}
	for fd := first; fd < first+uintptr(n); fd++ {
		if _, err := unix.FcntlInt(fd, unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return fd, os.NewSyscallError("fcntl F_SETFD", err)
		}
	}
	return 0, nil
}

// IsCloseOnExec fails if fd is not open.
func IsCloseOnExec(fd uintptr) (bool, error) {
	flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0)
	return flags&unix.FD_CLOEXEC != 0, os.NewSyscallError("fcntl F_GETFD", err)
}

// AccessMode returns os.O_RDONLY, os.O_WRONLY or os.O_RDWR, and fails if fd is not open.
func AccessMode(fd uintptr) (int, error) {
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	return flags & unix.O_ACCMODE, os.NewSyscallError("fcntl F_GETFL", err)
}

// SetNonblock sets the blocking mode of fd, and of all its duplicates.
func SetNonblock(fd uintptr, nonblocking bool) error {
	return os.NewSyscallError("fcntl O_NONBLOCK", unix.SetNonblock(int(fd), nonblocking))
}

// Close closes fd.
func Close(fd uintptr) error {
	return os.NewSyscallError("close", unix.Close(int(fd)))
}

// CloseAll closes fds, which it sorts.
func CloseAll(fds []uintptr) error {
	slices.Sort(fds)
	var errs []error
	for len(fds) > 0 {
		n := 1
		for n < len(fds) && fds[n] == fds[n-1]+1 {
			n++
		}
		if n == 1 || !closeAtOnce(fds[0], n) {
			for _, fd := range fds[:n] {
				errs = append(errs, Close(fd))
			}
		}
		fds = fds[n:]
	}
	return errors.Join(errs...)
}

// Poll reports, without waiting, whether something can be read from fd, and whether
// the other end of its pipe was closed. It reads nothing from the pipe.
func Poll(fd uintptr) (readable, hungUp bool) {
	polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(polled, 0); err != unix.EINTR {
			break
		}
	}
	readable = polled[0].Revents&unix.POLLIN != 0
	return readable, polled[0].Revents&unix.POLLHUP != 0 || readable && isAtEnd(fd)
}

// AnonymousPipes makes pipes look as on OpenBSD, NetBSD and DragonFly, which report
// device 0 and inode 0 for all of them. It is for tests.
var AnonymousPipes bool

// IdentifyPipe returns the device and the inode that tell the pipe of fd from all other
// pipes that exist now, or zeros where the system has none. It fails if fd is no end of a
// pipe.
func IdentifyPipe(fd uintptr) (device, inode uint64, err error) {
	// Not unix.Stat_t, whose fields are not those that package inherit sees.
	var stat syscall.Stat_t
	if err := syscall.Fstat(int(fd), &stat); err != nil {
		return 0, 0, os.NewSyscallError("fstat", err)
	}
	if uint32(stat.Mode)&syscall.S_IFMT != syscall.S_IFIFO {
		return 0, 0, fmt.Errorf("descriptor %d is not a pipe", fd)
	}
	if AnonymousPipes {
		return 0, 0, nil
	}
	return uint64(stat.Dev), uint64(stat.Ino), nil
}

// IdentifyFile returns an ID that tells the inode of path from all others that exist. If
// follow is set, it is the inode that a symbolic link leads to.
func IdentifyFile(path string, follow bool) (id string, isSocket bool, err error) {
	stat := unix.Lstat
	if follow {
		stat = unix.Stat
	}
	var inode unix.Stat_t
	if err := stat(path, &inode); err != nil {
		return "", false, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return fmt.Sprintf("%d:%d", inode.Dev, inode.Ino), inode.Mode&unix.S_IFMT == unix.S_IFSOCK, nil
}

// ListenAgain gives a listening socket this process's credentials, which its clients see
// (SO_PEERCRED), and the longest queue that the system allows now. The kernel does both
// in listen(2), which keeps the connections that wait in the queue.
func ListenAgain(fd uintptr) error {
	return os.NewSyscallError("listen", unix.Listen(int(fd), math.MaxInt32)) // cut down to somaxconn
}

// Rights makes fd part of a message to a Unix socket (unix(7), SCM_RIGHTS).
func Rights(fd uintptr) []byte { return unix.UnixRights(int(fd)) }

// Send sends a datagram from a connected socket. It does not block: if the receiver's
// queue is full, its error satisfies IsBlocked or IsFull.
func Send(fd uintptr, message, rights []byte) error {
	err := unix.Sendmsg(int(fd), message, rights, nil, 0)
	for err == unix.EINTR {
		err = unix.Sendmsg(int(fd), message, rights, nil, 0)
	}
	return os.NewSyscallError("sendmsg", err)
}

// IsBlocked reports whether err says that a call would have had to wait.
func IsBlocked(err error) bool { return errors.Is(err, unix.EAGAIN) }

// IsFull reports whether err says that a receiver's queue is full, and that the poller
// will not tell when it is not. On the BSDs and macOS a Unix datagram socket is always
// writable (uipc_send in bsd/kern/uipc_usrreq.c of macOS).
func IsFull(err error) bool { return errors.Is(err, unix.ENOBUFS) }

// IsClosed reports whether err says that a descriptor was not open.
func IsClosed(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EBADF)
}

// IsAddrInUse reports whether err says that an address is in use.
func IsAddrInUse(err error) bool { return errors.Is(err, unix.EADDRINUSE) }

// IsDead reports whether no open socket belongs to a Unix socket's file, so that nobody
// can be reached by it any more. If that is not certain, it returns false.
//
// It asks by a datagram socket, so that it does not enter the queue of a listener: a
// socket of another type refuses a datagram socket because of its type (EPROTOTYPE),
// whether it listens or is only bound. The order of these checks is the same in
// unix_find_bsd of Linux, unp_connect of the BSDs and macOS, and so_ux_lookup of illumos,
// which returns EDESTADDRREQ where the others return ECONNREFUSED.
func IsDead(path string) bool {
	conn, err := net.Dial("unixgram", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EDESTADDRREQ)
}
