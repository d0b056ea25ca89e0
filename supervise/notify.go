//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// This file owns the sockets of sd_notify(3): the one that the service writes to,
// and the one that this process was given itself.

// A notifySocket is what NOTIFY_SOCKET names for the service.
type notifySocket struct {
	file    *os.File
	address string        // as in NOTIFY_SOCKET
	arrived chan struct{} // receives if there may be something to receive
	closed  chan struct{}
	remove  func()
}

func openNotifySocket() (*notifySocket, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	unix.CloseOnExec(fd)
	address, remove, err := bindNotifySocket(fd)
	if err == nil {
		err = os.NewSyscallError("fcntl", unix.SetNonblock(fd, true))
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("can't offer NOTIFY_SOCKET: %w", err)
	}
	n := &notifySocket{
		file:    os.NewFile(uintptr(fd), "NOTIFY_SOCKET"),
		address: address,
		arrived: make(chan struct{}),
		closed:  make(chan struct{}),
		remove:  remove,
	}
	go func() {
		for awaitReadable(n.file) == nil {
			select {
			case n.arrived <- struct{}{}:
			case <-n.closed:
			}
		}
	}()
	return n, nil
}

func (n *notifySocket) close() {
	close(n.closed)
	n.file.Close()
	n.remove()
}

// awaitReadable blocks until file, a non-blocking one, can be read from.
func awaitReadable(file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 && err == nil
	})
}

// A message is one datagram of the service.
type message struct {
	lines       []string
	pid, uid    int // of the sender; pid is 0 where the kernel does not tell
	descriptors []int
}

// receive returns the next message, if there is one. The caller closes it.
func (n *notifySocket) receive() (m message, ok bool) {
	text := make([]byte, 4096) // as systemd does
	// Up to SCM_MAX_FD descriptors, see unix(7).
	control := make([]byte, unix.CmsgSpace(4*253)+unix.CmsgSpace(64))
	raw, err := n.file.SyscallConn()
	if err != nil {
		return m, false
	}
	var size, controlSize int
	_ = raw.Control(func(fd uintptr) {
		for {
			size, controlSize, _, _, err = unix.Recvmsg(int(fd), text, control, 0)
			if err != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return m, false
	}
	m.lines = strings.Split(string(text[:size]), "\n")
	parts, _ := unix.ParseSocketControlMessage(control[:controlSize])
	for _, part := range parts {
		if descriptors, err := unix.ParseUnixRights(&part); err == nil {
			m.descriptors = append(m.descriptors, descriptors...)
		} else {
			m.pid, m.uid = credentials(&part)
		}
	}
	return m, true
}

// close closes the message's descriptors, which for BARRIER=1 tells the sender that
// all it said before has been heeded.
func (m message) close() {
	for _, fd := range m.descriptors {
		unix.Close(fd)
	}
}

func (m message) field(name string) string {
	for _, line := range m.lines {
		if value, ok := strings.CutPrefix(line, name+"="); ok {
			return value
		}
	}
	return ""
}

// passedOn are the fields that concern this process's own supervisor, too.
var passedOn = []string{"READY", "RELOADING", "MONOTONIC_USEC", "STOPPING", "STATUS", "ERRNO", "WATCHDOG", "WATCHDOG_USEC", "EXTEND_TIMEOUT_USEC"}

// passOn tells this process's own NOTIFY_SOCKET, if it has one.
func passOn(m message) error {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil
	}
	var lines []string
	for _, name := range passedOn {
		for _, line := range m.lines {
			if strings.HasPrefix(line, name+"=") {
				lines = append(lines, line)
			}
		}
	}
	if len(lines) == 0 {
		return nil
	}
	lines = append(lines, fmt.Sprint("MAINPID=", os.Getpid()))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	// A receiver that hangs must not hang the service with it.
	timeout := unix.NsecToTimeval(int64(5 * time.Second))
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout)
	err = unix.Sendto(fd, []byte(strings.Join(lines, "\n")), 0, &unix.SockaddrUnix{Name: address})
	return os.NewSyscallError("sendto", err)
}
