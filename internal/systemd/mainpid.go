package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"example.com/tableflip/internal/descriptor"
)

// A MainPIDUpdate holds the socket and the pipe that are needed to announce a new main
// process. They are opened before the commit: if that failed afterwards for lack of
// descriptors, systemd would still track the old process, and end the service with it.
type MainPIDUpdate struct {
	notifier    *Notifier
	conn        *net.UnixConn // nil if the manager can't be reached
	read, write *os.File      // the barrier's pipe
}

// PrepareMainPID returns an error only if this process is out of descriptors.
func (n *Notifier) PrepareMainPID() (*MainPIDUpdate, error) {
	if n == nil {
		return nil, nil
	}
	u := &MainPIDUpdate{notifier: n}
	var err error
	if u.conn, err = n.dial(); err != nil {
		n.log(err)
	}
	if u.read, u.write, err = os.Pipe(); err != nil {
		u.Close()
		return nil, err
	}
	return u, nil
}

// Close closes what u holds.
func (u *MainPIDUpdate) Close() {
	if u == nil {
		return
	}
	if u.conn != nil {
		u.conn.Close()
	}
	u.read.Close()
	u.write.Close()
}

// IsReachable reports whether u is connected to a manager.
func (u *MainPIDUpdate) IsReachable() bool { return u != nil && u.conn != nil }

// Notify tells the manager that pid is the main process from now on, and reports whether
// the message was sent. It returns when the manager has read the message, or after
// BarrierTimeout, because the manager listens to this process only while it exists.
func (u *MainPIDUpdate) Notify(pid int) bool {
	if !u.IsReachable() {
		return false
	}
	err := sendFields(u.conn, nil, mainPID(pid), "READY=1", "STATUS=")
	notified := err == nil
	if notified {
		err = u.barrier()
	}
	if err != nil {
		u.notifier.log(fmt.Errorf("tell it the new main process, %d: %w", pid, err))
	}
	return notified
}

// barrier returns once the manager has read all messages before this one: then it closes
// the descriptor that this message carries (sd_notify_barrier(3)).
func (u *MainPIDUpdate) barrier() error {
	err := descriptor.Control(u.write, func(fd uintptr) error {
		return sendFields(u.conn, descriptor.Rights(fd), "BARRIER=1")
	})
	u.write.Close()
	if err != nil {
		return err
	}

	if err := u.read.SetReadDeadline(time.Now().Add(BarrierTimeout)); err != nil {
		return err
	}
	if _, err = u.read.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}
