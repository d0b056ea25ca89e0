// Package systemd owns the conversation with the service manager: the messages to it
// (sd_notify(3)), the sockets that it passed to the first generation (sd_listen_fds(3)),
// and the copies that it stores of a registry's sockets (the descriptor store of
// systemd.service(5)). The absence of a manager is no special case: a nil *Notifier does
// nothing.
package systemd

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"
	"unicode"

	"example.com/tableflip/internal/descriptor"
)

// Tests make these shorter.
var (
	// NotifyTimeout bounds a message to a manager whose queue is full.
	NotifyTimeout = time.Second

	// BarrierTimeout limits how long the manager may take to read of a handover.
	BarrierTimeout = 5 * time.Second

	// ExtendInterval is how often the manager is told that a trial goes on.
	ExtendInterval = time.Second

	send = descriptor.Send
)

// fullPause is the time between two attempts to send to a full queue that the network
// poller does not watch.
const fullPause = 5 * time.Millisecond

// maxStatus keeps a message below the 4,096 bytes that systemd reads of one.
const maxStatus = 1000

// A Notifier tells the service manager which process is the main process, and in which
// state the service is.
type Notifier struct {
	addr   *net.UnixAddr
	logger *slog.Logger // nil for none
}

// Ready tells the manager that the service is up.
func (n *Notifier) Ready() { n.notify("READY=1") }

// Stopping tells the manager that the service stops.
func (n *Notifier) Stopping() { n.notify("STOPPING=1") }

// MainPID tells the manager that pid is the main process, and whether it is ready. The status
// was that of the process before it, which may have had a trial under way.
func (n *Notifier) MainPID(pid int, ready bool) {
	fields := []string{mainPID(pid)}
	if ready {
		fields = append(fields, "READY=1", "STATUS=")
	}
	n.notify(fields...)
}

func mainPID(pid int) string { return fmt.Sprintf("MAINPID=%d", pid) }

// Reloading tells the manager that an upgrade begins.
func (n *Notifier) Reloading() {
	fields := []string{"RELOADING=1"}
	// By this time, Type=notify-reload knows which SIGHUP is answered.
	if now, err := monotonicClock(); err == nil {
		fields = append(fields, fmt.Sprintf("MONOTONIC_USEC=%d", now.Microseconds()))
	}
	n.notify(fields...)
}

// OnTrial tells the manager, until ctx is done, that a new process is on trial, after which
// the answer to the reload takes no longer than patience.
func (n *Notifier) OnTrial(ctx context.Context, pid int, trial, patience time.Duration) {
	if n == nil {
		return
	}
	began := time.Now()
	extend := func(left time.Duration) string {
		// The sum of the two may be no Duration.
		return fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", left.Microseconds()+patience.Microseconds())
	}
	n.notify(extend(trial), fmt.Sprintf("STATUS=upgrade: process %d is on trial for %v", pid, trial))
	// systemd sets the timeout anew when it learns that the process of ExecReload= has ended.
	again := time.NewTicker(ExtendInterval)
	defer again.Stop()
	for {
		select {
		case <-again.C:
			_ = n.send(nil, extend(max(trial-time.Since(began), 0))) // an error is logged once
		case <-ctx.Done():
			return
		}
	}
}

// ReloadFailed tells the manager that an upgrade has left this process in charge.
func (n *Notifier) ReloadFailed(err error) {
	n.notify("READY=1", "STATUS="+status(err))
}

// ReloadQueued answers a reload whose upgrade has to wait.
func (n *Notifier) ReloadQueued() {
	n.Reloading()
	n.notify("READY=1", "STATUS=upgrade queued")
}

// status makes err fit into a field. For systemd, a carriage return also ends a field. It
// ignores a message with a NUL in it, and a status that is not UTF-8.
func status(err error) string {
	text := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, fmt.Sprintf("upgrade failed: %v", err))
	if len(text) > maxStatus {
		text = strings.ToValidUTF8(text[:maxStatus], "")
	}
	return text
}

// notify sends a message. Errors are only logged, because no upgrade fails for them.
func (n *Notifier) notify(fields ...string) {
	if n != nil {
		n.log(n.send(nil, fields...))
	}
}

func (n *Notifier) send(rights []byte, fields ...string) error {
	conn, err := n.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return sendFields(conn, rights, fields...)
}

func (n *Notifier) dial() (*net.UnixConn, error) {
	return net.DialUnix("unixgram", nil, n.addr)
}

func sendFields(conn *net.UnixConn, rights []byte, fields ...string) error {
	deadline := time.Now().Add(NotifyTimeout)
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	for {
		// Not WriteMsgUnix, which refuses connected sockets: only these can wait for
		// room in the manager's queue.
		writeErr := raw.Write(func(fd uintptr) bool {
			err = send(fd, []byte(strings.Join(fields, "\n")), rights)
			return !descriptor.IsBlocked(err)
		})
		switch {
		case !descriptor.IsFull(err):
			return cmp.Or(writeErr, err)
		case time.Now().After(deadline):
			return err
		}
		time.Sleep(fullPause)
	}
}

func (n *Notifier) log(err error) {
	if err != nil && n.logger != nil {
		n.logger.Warn("tableflip: can't talk to the service manager", "error", err)
	}
}
