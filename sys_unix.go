//go:build unix

package tableflip

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

const supported = true

// duplicate returns a close-on-exec duplicate of fd. The duplicate shares the
// open file, and so its blocking mode, with fd.
func duplicate(fd uintptr) (int, error) {
	dup, err := unix.FcntlInt(fd, syscall.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	return dup, nil
}

// replace makes the close-on-exec descriptor target, which must be open, refer
// to the open file of fd instead.
func replace(target, fd uintptr) error {
	if dup3 != nil {
		return dup3(target, fd)
	}
	// The lock keeps a fork out of the moment before close-on-exec is set.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	err := unix.Dup2(int(fd), int(target))
	for err == unix.EINTR || err == unix.EBUSY { // by a race with open, see dup(2)
		err = unix.Dup2(int(fd), int(target))
	}
	if err != nil {
		return os.NewSyscallError("dup2", err)
	}
	unix.CloseOnExec(int(target))
	return nil
}

// dup3 does what replace does in one call. It is nil where that is missing.
var dup3 func(target, fd uintptr) error

// setCloseOnExec fails if fd is not open.
func setCloseOnExec(fd uintptr) error {
	_, err := unix.FcntlInt(fd, unix.F_SETFD, unix.FD_CLOEXEC)
	return os.NewSyscallError("fcntl F_SETFD", err)
}

func setNonblock(fd uintptr, nonblocking bool) error {
	return os.NewSyscallError("fcntl O_NONBLOCK", unix.SetNonblock(int(fd), nonblocking))
}

func closeDescriptor(fd uintptr) error {
	return os.NewSyscallError("close", unix.Close(int(fd)))
}

// atEnd reports whether a read from fd, which does not block, finds the end of
// the file.
func atEnd(fd uintptr) bool {
	n, err := unix.Read(int(fd), make([]byte, 1))
	return n == 0 && err == nil
}

// identifyPipe tells which pipe fd is an end of. It fails if fd is not one.
func identifyPipe(fd uintptr) (identity, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(fd), &stat); err != nil {
		return identity{}, os.NewSyscallError("fstat", err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFIFO {
		return identity{}, fmt.Errorf("descriptor %d is not a pipe", fd)
	}
	return identity{device: uint64(stat.Dev), inode: uint64(stat.Ino)}, nil
}

// identifySocket tells what fd is.
func identifySocket(fd uintptr) (socket, error) {
	kind, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
	if err == unix.ENOTSOCK {
		return socket{kind: kindFile}, nil
	}
	if err != nil {
		return socket{}, os.NewSyscallError("getsockopt SO_TYPE", err)
	}
	bound, err := unix.Getsockname(int(fd))
	if err == unix.EAFNOSUPPORT {
		return socket{kind: kindFile}, nil
	}
	if err != nil {
		return socket{}, os.NewSyscallError("getsockname", err)
	}
	s := socket{kind: kindConn}
	if accepting, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); accepting != 0 {
		s.kind = kindListener
	} else if kind == unix.SOCK_DGRAM {
		s.kind = kindPacketConn
	}
	switch bound := bound.(type) {
	case *unix.SockaddrUnix:
		s.network = map[int]string{unix.SOCK_STREAM: "unix", unix.SOCK_DGRAM: "unixgram", unix.SOCK_SEQPACKET: "unixpacket"}[kind]
		s.path = bound.Name
		return s, nil
	case *unix.SockaddrInet4:
		s.bound = netip.AddrPortFrom(netip.AddrFrom4(bound.Addr), uint16(bound.Port))
	case *unix.SockaddrInet6:
		ip := netip.AddrFrom16(bound.Addr)
		if bound.ZoneId != 0 {
			zone := strconv.Itoa(int(bound.ZoneId))
			if link, err := net.InterfaceByIndex(int(bound.ZoneId)); err == nil {
				zone = link.Name
			}
			ip = ip.WithZone(zone)
		}
		s.bound = netip.AddrPortFrom(ip, uint16(bound.Port))
		only, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		s.dual = ip.IsUnspecified() && only == 0
	default:
		return socket{kind: kindFile}, nil
	}
	s.network = map[int]string{unix.SOCK_STREAM: "tcp", unix.SOCK_DGRAM: "udp"}[kind]
	if s.network == "" {
		return socket{kind: kindFile}, nil // raw: package net makes none of it
	}
	return s, nil
}

// socketRights makes fd part of a message to a Unix socket (unix(7), SCM_RIGHTS).
func socketRights(fd uintptr) []byte { return unix.UnixRights(int(fd)) }

// sendMessage sends a datagram from a connected socket, or fails if isBlocked.
func sendMessage(fd uintptr, message, rights []byte) error {
	err := unix.Sendmsg(int(fd), message, rights, nil, 0)
	for err == unix.EINTR {
		err = unix.Sendmsg(int(fd), message, rights, nil, 0)
	}
	return os.NewSyscallError("sendmsg", err)
}

func isBlocked(err error) bool { return errors.Is(err, unix.EAGAIN) }

// isNotOpen reports whether err says that a descriptor was not open.
func isNotOpen(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EBADF)
}

func isAddressInUse(err error) bool { return errors.Is(err, unix.EADDRINUSE) }

func isRefused(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }

// adviseStart says what the reader of err, which came from starting a process,
// can do about it. It is empty where the error says it all.
func adviseStart(err error) string {
	var pathError *os.PathError
	switch {
	case errors.As(err, &pathError) && pathError.Op == "chdir":
		return "; create the working directory again, or choose another by Options.Command"
	case errors.Is(err, unix.ENOENT):
		return "; put the new binary, built by go build and not started by go run, where the old one was, or name it by Options.Command"
	case errors.Is(err, unix.EACCES):
		return "; make the new binary executable for this user"
	case errors.Is(err, unix.ETXTBSY):
		return "; write the new binary beside the old one and rename it into place"
	case errors.Is(err, unix.ENOEXEC):
		return "; build the new binary for " + runtime.GOOS + "/" + runtime.GOARCH
	case errors.Is(err, unix.E2BIG):
		return "; the environment, with the names of the descriptors in it, is larger than this system passes on: pass on fewer descriptors, use shorter names, or raise the stack limit (ulimit -s), which on Linux bounds it"
	}
	return adviseLimit(err)
}

func adviseLimit(err error) string {
	if errors.Is(err, unix.EMFILE) {
		return "; raise the limit of open files (ulimit -n, LimitNOFILE=)"
	}
	return ""
}
