//go:build unix

package link

import (
	"cmp"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"example.com/tableflip/internal/descriptor"
)

// pair returns two sockets that are connected to each other, in non-blocking mode.
func pair() (a, b *os.File, err error) {
	syscall.ForkLock.RLock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}

	errA, errB := unix.SetNonblock(fds[0], true), unix.SetNonblock(fds[1], true)
	files, err := adopt(fds[:])
	if err = cmp.Or(errA, errB, err); err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return files[0], files[1], nil
}

// adopt takes fds over. No file has the number of a standard stream: a program that has
// closed one must not write to another process when it panics.
func adopt(fds []int) (files []*os.File, err error) {
	for _, fd := range fds {
		if fd <= 2 {
			dup, dupErr := descriptor.Duplicate(uintptr(fd))
			unix.Close(fd)
			if dupErr != nil {
				err = dupErr
				continue
			}
			fd = int(dup)
		}
		files = append(files, os.NewFile(uintptr(fd), "link"))
	}
	return files, err
}

// send sends the beginning of p, with fds, and returns its length. If it may wait, it
// does so until there is room. If the other end is closed, the error is io.EOF.
func send(to *os.File, p []byte, fds []int, wait bool) (n int, err error) {
	raw, err := to.SyscallConn()
	if err != nil {
		return 0, err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	waitErr := raw.Write(func(fd uintptr) bool {
		err = unix.EINTR
		for err == unix.EINTR {
			n, err = unix.SendmsgN(int(fd), p, rights, nil, 0)
		}
		return !wait || !descriptor.IsBlocked(err)
	})
	switch {
	case waitErr != nil:
		return 0, waitErr
	case err == unix.EPIPE || err == unix.ECONNRESET:
		return 0, io.EOF
	}
	return n, os.NewSyscallError("sendmsg", err)
}

// receive fills the beginning of p, and returns its length, and the files that came
// along. It waits until there is something. If the other end is closed, the error is
// io.EOF.
func receive(from *os.File, p []byte) (n int, files []*os.File, err error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return 0, nil, err
	}
	waitErr := raw.Read(func(fd uintptr) bool {
		n, files, err = recvmsg(int(fd), p)
		return !descriptor.IsBlocked(err)
	})
	switch {
	case waitErr != nil:
		return 0, nil, waitErr
	case err == unix.ECONNRESET, err == nil && n == 0: // the former if it has left something unread
		return 0, files, io.EOF
	}
	return n, files, err
}

// recvmsg does not wait.
func recvmsg(fd int, p []byte) (n int, files []*os.File, err error) {
	control := make([]byte, unix.CmsgSpace(4*MaxDescriptors))
	var controlLen, flags int
	var fds []int

	syscall.ForkLock.RLock()
	err = unix.EINTR
	for err == unix.EINTR {
		n, controlLen, flags, _, err = unix.Recvmsg(fd, p, control, 0)
	}
	if err == nil && controlLen > 0 {
		messages, _ := unix.ParseSocketControlMessage(control[:controlLen])
		for _, message := range messages {
			rights, _ := unix.ParseUnixRights(&message)
			for _, fd := range rights {
				unix.CloseOnExec(fd)
			}
			fds = append(fds, rights...)
		}
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return 0, nil, err
	}

	files, err = adopt(fds)
	if err != nil || flags&unix.MSG_CTRUNC != 0 {
		return n, files, errLost
	}
	return n, files, nil
}
