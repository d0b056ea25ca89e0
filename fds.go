package tableflip

import (
	"net"
	"os"
	"syscall"

	"example.com/tableflip/internal/registry"
)

// This file is the public face of the registry (internal/registry).

// A Listener can be passed to another process.
type Listener interface {
	net.Listener
	syscall.Conn
}

// A PacketConn can be passed to another process.
type PacketConn interface {
	net.PacketConn
	syscall.Conn
}

// A Conn can be passed to another process.
type Conn interface {
	net.Conn
	syscall.Conn
}

// Fds is the registry of the descriptors that this process inherited from its parent,
// and of those that it will pass on to its child. An [Upgrader] has one. The zero value
// is not usable.
//
// # Names
//
// A network and an address name a listener, packet conn or connection. A string names a
// file. Both may be any bytes. An address that left the port open (":0") also names the
// socket by the address that the kernel chose ("127.0.0.1:38249"), and so does an empty
// Unix address. Several descriptors of one name are claimed in the order in which they
// were added.
//
// If nothing inherited has the requested name, a listener or packet conn is found by the
// address that it is bound to. The new version may spell the address otherwise: ":80",
// "*:80", "0.0.0.0:80", "[::]:80" and ":http" all find a socket that is bound to port
// 80 of all addresses, "localhost:80" finds one on a loopback address, and any path to
// its file finds a Unix socket. No host name is resolved. A socket that conflicts with an
// unclaimed one, such as "127.0.0.1:80" with ":80", can't be bound while that is open. The
// error then names what was inherited and not claimed.
//
// The network "systemd" finds the sockets that systemd passed to the first generation
// by their FileDescriptorName, which is the name of their socket unit by default:
// Listener("systemd", "web.socket"). They differ from other sockets only in that this
// package does not unlink their files.
//
// # Claims
//
// An inherited descriptor is claimed, once, by Listen, Listener, File and the methods
// like them. From then on it is passed on to the next child. What nobody has claimed
// when [Upgrader.Ready] is called is closed, and logged, once this process is in
// charge. A claim that comes later fails until the parent has exited, because the
// parent may still serve that socket. Call Listen before Ready, also if another
// goroutine serves.
//
// The registry passes on duplicates of its own, so that closing a listener, packet conn
// or file does not keep it from the next child. The Remove methods do. The exception is
// a connection that Conn returned, which is passed on while it is open. Duplicates
// share their blocking mode, which the registry never changes.
//
// Options of a socket are set when it is created, and belong to it from then on, in
// every process that has it. Options.ListenConfig and its Control function are not
// applied to an inherited socket, because that would change the parent's too. To change
// an option such as Multipath TCP, restart the service, or close the socket and create
// it anew.
//
// # Unix sockets
//
// While a listener or packet conn is in the registry, the process in charge unlinks its
// file: [Upgrader.Stop] does that. What is not in the registry is its creator's. A listener
// that was added must have the method SetUnlinkOnClose of [net.UnixListener], because
// its Close would otherwise unlink the file that the new process serves.
//
// If the file of an inherited socket is gone, or has been replaced by another socket's,
// no client can reach the inherited socket any more. It is then not claimed, a warning is
// logged, and Listen binds the path anew, which fails if another process has it.
//
// Once a child is in charge, clients of a Unix listener see its credentials
// (SO_PEERCRED), and the queue is as long as the system allows at that time.
//
// # Limits
//
// Sockets that share an address (SO_REUSEPORT) each have a queue. If a new version
// creates more of them than it inherits, the kernel gives them their part before the
// new process is in charge. If the upgrade then fails, the connections in these queues
// are lost. The registry logs a warning. Create them after Ready to avoid that.
//
// What package net can't open, such as a vsock listener, is refused, because no child
// could open it. Pass its descriptor on as a file.
//
// # Concurrency
//
// All methods are safe for concurrent use. During an upgrade, methods that add or
// remove descriptors block until it ends, because the set passed to the new process is
// fixed. With Options.DescriptorStore, methods that add or remove a listener or packet
// conn block until systemd has been told, for five seconds at most. If systemd does not
// read for a second, it is told nothing any more. After a successful upgrade all methods
// fail with [ErrUpgraded], and after Stop with [ErrStopped].
type Fds struct {
	registry *registry.Registry
}

// Listen returns a listener inherited from the parent process or from systemd, or
// creates a new one with Options.ListenConfig. It does not wait for the parent to
// stop listening: both processes accept from the same queue until one of them closes
// its listener.
//
// The caller owns the listener. A Unix listener's Close does not unlink the
// socket file; Stop does. If a process that was killed has left the file, and nobody
// has the socket open, it is replaced.
//
// In every generation the listener is the net package's own type, unless
// Options.ListenConfig sets keep-alive parameters: then a TCP listener is one that
// embeds the [net.TCPListener] and applies them.
func (f *Fds) Listen(network, addr string) (net.Listener, error) {
	return f.registry.Listen(network, addr)
}

// ListenWithCallback returns a listener inherited from the parent process, or
// calls callback to create a new one, which must implement Listener. It is for
// listeners that Options.ListenConfig cannot create.
//
// Only the socket is inherited. If callback returns another type than
// [net.TCPListener] or [net.UnixListener], the next generation does not get that type,
// and the Logger warns: wrap what ListenWithCallback returns instead. Keep-alive
// parameters that callback sets hold in its own generation at best; set them by
// Options.ListenConfig.
//
// An error from callback is wrapped. If it says that the file of a Unix socket is in
// use, and nobody has the socket open, the file is removed and callback called again.
// The registry is not locked during the call, so that callback may use it. As for
// Listen, the caller owns the listener.
func (f *Fds) ListenWithCallback(network, addr string, callback func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	return f.registry.ListenWithCallback(network, addr, callback)
}

// Listener returns an inherited listener, or nil, nil if there is none of this
// name that has not been claimed. The caller owns it.
func (f *Fds) Listener(network, addr string) (net.Listener, error) {
	return f.registry.Listener(network, addr)
}

// AddListener passes ln on to the next child under the given name. It replaces all
// claimed listeners that were added by this name, even if the name leaves the port open,
// and removes them as [Fds.RemoveListener] does. The caller keeps ln and may close it: a
// duplicate is passed on. If ln is a Unix listener, its Close no longer unlinks the
// socket file; Stop does.
func (f *Fds) AddListener(network, addr string, ln Listener) error {
	return f.registry.AddListener(network, addr, ln, true)
}

// RemoveListener stops passing a listener on. It does not close the caller's. It gives
// a Unix listener back the duty to unlink its socket file when it is closed. If it was
// closed already, RemoveListener unlinks the file. Of several listeners with this name
// the one added first is removed. If there is none, the error is os.ErrNotExist.
//
// In a child whose Ready has not returned, an inherited listener becomes unclaimed again.
func (f *Fds) RemoveListener(network, addr string) error {
	return f.registry.RemoveListener(network, addr)
}

// ListenPacket returns a packet conn inherited from the parent process, or
// creates a new one with Options.ListenConfig. Parent and child both receive
// from the same queue until one of them closes its packet conn.
//
// The caller owns the packet conn. Stop unlinks a Unix socket's file. If a process
// that was killed has left the file, and nobody has it open, it is replaced.
//
// A membership in a multicast group belongs to the socket. A process that joins by an
// inherited socket gets EADDRINUSE, because its parent has joined, and can ignore that.
// A process that drains must not leave the group, because the new one would leave it
// too.
func (f *Fds) ListenPacket(network, addr string) (net.PacketConn, error) {
	return f.registry.ListenPacket(network, addr)
}

// ListenPacketWithCallback returns a packet conn inherited from the parent process, or
// calls callback to create a new one, which must implement PacketConn. Otherwise it does
// what [Fds.ListenWithCallback] does.
func (f *Fds) ListenPacketWithCallback(network, addr string, callback func(network, addr string) (net.PacketConn, error)) (net.PacketConn, error) {
	return f.registry.ListenPacketWithCallback(network, addr, callback)
}

// PacketConn returns an inherited packet conn, or nil, nil if there is none of
// this name that has not been claimed. The caller owns it.
func (f *Fds) PacketConn(network, addr string) (net.PacketConn, error) {
	return f.registry.PacketConn(network, addr)
}

// AddPacketConn passes conn on to the next child under the given name. It replaces
// packet conns that have this name. The caller keeps conn and may close it: a duplicate
// is passed on.
func (f *Fds) AddPacketConn(network, addr string, conn PacketConn) error {
	return f.registry.AddPacketConn(network, addr, conn, true)
}

// RemovePacketConn stops passing a packet conn on. It does not close the
// caller's. From then on the file of a Unix socket is the caller's to unlink, unless it
// has closed the packet conn already: then RemovePacketConn unlinks the file. Of
// several with this name the one added first is removed. If there is none, the
// error is os.ErrNotExist.
func (f *Fds) RemovePacketConn(network, addr string) error {
	return f.registry.RemovePacketConn(network, addr)
}

// Conn returns an inherited connection, or nil, nil if there is none of this
// name that has not been claimed.
//
// The caller owns it. It is passed on to the next child unless it was closed,
// because the registry holds no duplicate of it.
func (f *Fds) Conn(network, addr string) (net.Conn, error) {
	return f.registry.Conn(network, addr)
}

// AddConn passes conn on to the next child under the given name. It replaces
// connections that have this name. The caller keeps conn and may close it: a duplicate is
// passed on, which keeps the connection open until RemoveConn, a successful upgrade, or
// Stop.
func (f *Fds) AddConn(network, addr string, conn Conn) error {
	return f.registry.AddConn(network, addr, conn)
}

// RemoveConn stops passing a connection on. It does not close the caller's. Of
// several with this name the one added first is removed. If there is none, the
// error is os.ErrNotExist.
func (f *Fds) RemoveConn(network, addr string) error {
	return f.registry.RemoveConn(network, addr)
}

// File returns an inherited file, or nil, nil if there is none of this name that
// has not been claimed. The caller owns it; what is passed on is another duplicate
// of the same open file. Its Name is "fd:NAME:". It may be in blocking mode.
func (f *Fds) File(fileName string) (*os.File, error) {
	return f.registry.File(fileName)
}

// Files returns all inherited files that have not been claimed, in the order in
// which they were added. For each, it does what File does. On an error none is
// claimed.
func (f *Fds) Files() ([]*os.File, error) {
	return f.registry.Files()
}

// AddFile passes file on to the next child under the given name. It replaces files that
// have this name. The caller keeps file and may close it: a duplicate, which shares the
// file offset and locks by flock(2), is passed on. A process loses its locks by fcntl(2)
// when it closes any duplicate: do not hold these on a file that is passed on.
func (f *Fds) AddFile(fileName string, file *os.File) error {
	return f.registry.AddFile(fileName, file)
}

// RemoveFile stops passing a file on. It does not close the caller's. If there
// is none with this name, the error is os.ErrNotExist.
func (f *Fds) RemoveFile(fileName string) error {
	return f.registry.RemoveFile(fileName)
}
