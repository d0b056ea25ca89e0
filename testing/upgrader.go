// Package testing has a stub of tableflip's Upgrader that never upgrades.
//
// It is for the tests of applications, which may need several of them in one process,
// and for platforms without upgrades: it works wherever Go does. A program runs with
// either Upgrader if it takes an interface of the methods that it uses, as in the
// example, or if it chooses between the packages by build constraints.
//
// It does not show whether a service survives upgrades, because it makes none. For a
// test that upgrades the service itself under load, copy
// examples/deploy/web/upgrade_test.go in this module's repository.
package testing

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"example.com/tableflip"
)

// An Upgrader is a first generation that never has a successor. It has the methods of
// [tableflip.Upgrader]. All are safe for concurrent use.
type Upgrader struct {
	*Fds

	created time.Time
	stop    sync.Once
	stopped time.Time     // valid once exit is closed
	exit    chan struct{} // closed by Stop, shared with Fds
}

// New returns a new Upgrader. Unlike [tableflip.New], it may be called any number of
// times, and each Upgrader is independent of the others. It does not block. It does not
// read the environment, so that it also works in a process that was started by an
// upgrade. Its error is always nil.
func New() (*Upgrader, error) {
	exit := make(chan struct{})
	return &Upgrader{Fds: &Fds{stopped: exit}, created: time.Now(), exit: exit}, nil
}

// Ready returns nil at once, or [tableflip.ErrStopped] after Stop. It writes no PID
// file. It can be called again.
func (u *Upgrader) Ready() error {
	if u.isStopped() {
		return tableflip.ErrStopped
	}
	return nil
}

// Exit returns a channel that is closed by Stop, and by nothing else.
func (u *Upgrader) Exit() <-chan struct{} {
	return u.exit
}

// Replaced returns false: a stub can only be stopped.
func (u *Upgrader) Replaced() bool {
	return false
}

// Generations returns this process alone, which is in charge from New to Stop, whether
// Ready was called or not.
func (u *Upgrader) Generations() []tableflip.Generation {
	self := tableflip.Generation{PID: os.Getpid(), Number: 1, Since: u.created, State: "in charge"}
	if u.isStopped() {
		self.Since, self.State = u.stopped, "draining"
	}
	return []tableflip.Generation{self}
}

// Hurry returns nil, a channel that is never closed.
func (u *Upgrader) Hurry() <-chan struct{} {
	return nil
}

// Stop closes the channel that Exit returns. When it has returned, Ready and the Listen
// methods fail. It closes no listener and no packet conn, and unlinks no file, because
// what the Listen methods returned is the caller's. Further calls do nothing.
func (u *Upgrader) Stop() {
	u.stop.Do(func() {
		u.stopped = time.Now()
		close(u.exit)
	})
}

// Fail does what Stop does.
func (u *Upgrader) Fail(err error) { u.Stop() }

// WaitForParent returns nil at once, even if ctx is done, because there is no parent.
func (u *Upgrader) WaitForParent(ctx context.Context) error {
	return nil
}

// HasParent returns false.
func (u *Upgrader) HasParent() bool {
	return false
}

// Upgrade returns [tableflip.ErrNotSupported] at once, also before Ready and after Stop.
// It starts no process.
func (u *Upgrader) Upgrade() error {
	return tableflip.ErrNotSupported
}

// UpgradeContext does what Upgrade does, whether ctx is done or not.
func (u *Upgrader) UpgradeContext(ctx context.Context) error {
	return tableflip.ErrNotSupported
}

// Rehearse does what Upgrade does.
func (u *Upgrader) Rehearse(ctx context.Context) error {
	return tableflip.ErrNotSupported
}

// Fds is a registry that has inherited nothing and passes nothing on: it holds no
// descriptor. It has the methods of [tableflip.Fds]. All are safe for concurrent use.
// The zero value is usable, and is never stopped.
type Fds struct {
	stopped <-chan struct{}
}

func (f *Fds) isStopped() bool {
	select {
	case <-f.stopped:
		return true
	default:
		return false
	}
}

// Listen creates a listener with [net.Listen], which may block to resolve a name. The
// caller owns the listener. Closing a Unix listener unlinks its file, because Stop does
// not. After Stop the error wraps [tableflip.ErrStopped].
func (f *Fds) Listen(network, addr string) (net.Listener, error) {
	return f.ListenWithCallback(network, addr, net.Listen)
}

// ListenWithCallback calls callback and returns the listener that it returned. The
// caller owns the listener. Unlike with tableflip, it may be of any kind, for example
// one in memory. An error from callback is wrapped. After Stop callback is not called,
// and the error wraps [tableflip.ErrStopped].
func (f *Fds) ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	return listen(f, network, addr, callback)
}

// Listener returns nil, nil: there is no inherited listener.
func (f *Fds) Listener(network, addr string) (net.Listener, error) {
	return nil, nil
}

// AddListener does nothing. The caller keeps ln.
func (f *Fds) AddListener(network, addr string, ln tableflip.Listener) error {
	return nil
}

// RemoveListener does nothing, whether a listener of this name was added or not.
func (f *Fds) RemoveListener(network, addr string) error {
	return nil
}

// ListenPacket creates a packet conn with [net.ListenPacket], which may block to resolve
// a name. The caller owns the packet conn. After Stop the error wraps
// [tableflip.ErrStopped].
func (f *Fds) ListenPacket(network, addr string) (net.PacketConn, error) {
	return f.ListenPacketWithCallback(network, addr, net.ListenPacket)
}

// ListenPacketWithCallback calls callback and returns the packet conn that it
// returned, as ListenWithCallback does for listeners.
func (f *Fds) ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	return listen(f, network, addr, callback)
}

// PacketConn returns nil, nil: there is no inherited packet conn.
func (f *Fds) PacketConn(network, addr string) (net.PacketConn, error) {
	return nil, nil
}

// AddPacketConn does nothing. The caller keeps conn.
func (f *Fds) AddPacketConn(network, addr string, conn tableflip.PacketConn) error {
	return nil
}

// RemovePacketConn does nothing, whether a packet conn of this name was added or
// not.
func (f *Fds) RemovePacketConn(network, addr string) error {
	return nil
}

// Conn returns nil, nil: there is no inherited connection.
func (f *Fds) Conn(network, addr string) (net.Conn, error) {
	return nil, nil
}

// AddConn does nothing. The caller keeps conn.
func (f *Fds) AddConn(network, addr string, conn tableflip.Conn) error {
	return nil
}

// RemoveConn does nothing, whether a connection of this name was added or not.
func (f *Fds) RemoveConn(network, addr string) error {
	return nil
}

// File returns nil, nil: there is no inherited file.
func (f *Fds) File(fileName string) (*os.File, error) {
	return nil, nil
}

// Files returns nil, nil: there are no inherited files.
func (f *Fds) Files() ([]*os.File, error) {
	return nil, nil
}

// AddFile does nothing. The caller keeps file.
func (f *Fds) AddFile(fileName string, file *os.File) error {
	return nil
}

// RemoveFile does nothing, whether a file of this name was added or not.
func (f *Fds) RemoveFile(fileName string) error {
	return nil
}

// listen is what all Listen methods do, for either kind of socket.
func listen[T any](f *Fds, network, addr string, create func(network, addr string) (T, error)) (T, error) {
	var none T
	if f.isStopped() {
		return none, fmt.Errorf("tableflip: listen on %s %s: %w", network, addr, tableflip.ErrStopped)
	}
	socket, err := create(network, addr)
	if err != nil {
		return none, fmt.Errorf("tableflip: can't create new socket for %s %s: %w", network, addr, err)
	}
	return socket, nil
}
