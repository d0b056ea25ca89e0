// Package descriptor owns what the operating system calls a descriptor: it
// duplicates, closes and identifies them. On systems where processes cannot pass
// sockets to each other, Supported is false, and every function fails with
// errors.ErrUnsupported.
package descriptor

import (
	"errors"
	"net/netip"
	"os"
	"syscall"
)

// Control calls use with c's descriptor, which stays open meanwhile. Unlike
// os.File.Fd, it leaves the blocking mode alone.
func Control(c syscall.Conn, use func(fd uintptr) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}

	var useErr error
	if err := raw.Control(func(fd uintptr) { useErr = use(fd) }); err != nil {
		// For a closed file, the error is one that package os does not export.
		if file, ok := c.(*os.File); ok {
			if _, statErr := file.Stat(); errors.Is(statErr, os.ErrClosed) {
				return os.ErrClosed
			}
		}
		return err
	}
	return useErr
}

// DuplicateOf returns a close-on-exec duplicate of c's descriptor.
func DuplicateOf(c syscall.Conn) (dup uintptr, err error) {
	err = Control(c, func(fd uintptr) error {
		dup, err = Duplicate(fd)
		return err
	})
	return dup, err
}

// PollOf does what Poll does, for c's descriptor. It returns an error if c was closed.
func PollOf(c syscall.Conn) (readable, hungUp bool, err error) {
	err = Control(c, func(fd uintptr) error {
		readable, hungUp = Poll(fd)
		return nil
	})
	return readable, hungUp, err
}

// AwaitHangUp returns nil once the other end of c's pipe was closed, and reads nothing
// from it. It returns an error when c's read deadline has passed, or c was closed. The pipe
// must be in non-blocking mode.
func AwaitHangUp(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		_, hungUp := Poll(fd)
		return hungUp
	})
}

// A Socket is what the kernel says about a descriptor.
type Socket struct {
	// Network is tcp, udp, ip, unix, unixgram or unixpacket, or empty if package
	// net knows no such socket.
	Network   string
	Listening bool
	Datagram  bool
	Bound     netip.AddrPort // of TCP, UDP and IP
	DualStack bool           // IPv6 on all addresses, and accepts IPv4, too
	Path      string         // of a Unix socket; an abstract one begins with @
}
