//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package supervise

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// This file owns the sockets of sd_notify(3): the one that the service writes to, and the
// one of the supervisor that this process has itself.

// A notifySocket is the socket that NOTIFY_SOCKET names in the service's environment.
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
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0
	})
}

// A message is one datagram of the service.
type message struct {
	lines       []string
	truncated   bool
	pid         int // of the sender; 0 if the kernel does not tell
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
	var size, controlSize, flags int
	_ = raw.Control(func(fd uintptr) {
		size, controlSize, flags, _, err = unix.Recvmsg(int(fd), text, control, 0)
	})
	if err != nil {
		return m, false
	}
	m.lines, m.truncated = strings.Split(string(text[:size]), "\n"), flags&unix.MSG_TRUNC != 0
	parts, _ := unix.ParseSocketControlMessage(control[:controlSize])
	for _, part := range parts {
		if descriptors, err := unix.ParseUnixRights(&part); err == nil {
			m.descriptors = append(m.descriptors, descriptors...)
		} else {
			m.pid = credentials(&part)
		}
	}
	return m, true
}

// close closes the message's descriptors. For BARRIER=1, that tells the sender that all its
// messages before were obeyed.
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

// An outer is this process's own NOTIFY_SOCKET. A nil outer sends nothing. A goroutine of
// its own sends the messages, so that a reader that hangs does not block the supervisor.
type outer struct {
	address string
	texts   chan string
	closed  chan struct{}
	log     *journal
}

func openOuter(log *journal) *outer {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return nil
	}
	o := &outer{address, make(chan string, 16), make(chan struct{}), log}
	go func() {
		defer close(o.closed)
		for text := range o.texts {
			if err := o.send(text); err != nil {
				log.warn("can't pass a message on to NOTIFY_SOCKET", "error", err)
			}
		}
	}()
	return o
}

// close waits until all messages are sent, for flushTimeout at most.
func (o *outer) close() {
	if o == nil {
		return
	}
	close(o.texts)
	select {
	case <-o.closed:
	case <-time.After(flushTimeout):
	}
}

// passOn sends the fields of a message that concern the outer supervisor. If it does not
// read, only the last messages are kept, because they say what the state is.
func (o *outer) passOn(m message) {
	if o == nil {
		return
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
		return
	}
	text := strings.Join(append(lines, fmt.Sprint("MAINPID=", os.Getpid())), "\n")
	for {
		select {
		case o.texts <- text:
			return
		default:
		}
		select {
		case <-o.texts:
			o.log.warn("NOTIFY_SOCKET is not read: a message is lost")
		default:
		}
	}
}

func (o *outer) send(text string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	unix.CloseOnExec(fd)
	err = unix.Sendto(fd, []byte(text), 0, &unix.SockaddrUnix{Name: o.address})
	return os.NewSyscallError("sendto", err)
}
